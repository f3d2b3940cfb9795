//! The fields of KVM's structures in the order in which they are written: one list for both directions.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_pit_state2, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

/// Writes fields, or fills them. Numbers are little-endian.
pub(super) trait Fields {
    /// Bytes as they are.
    fn bytes(&mut self, bytes: &mut [u8]);

    /// One byte.
    fn u8(&mut self, value: &mut u8) {
        self.bytes(std::slice::from_mut(value));
    }

    /// Two bytes.
    fn u16(&mut self, value: &mut u16) {
        let mut bytes = value.to_le_bytes();
        self.bytes(&mut bytes);
        *value = u16::from_le_bytes(bytes);
    }

    /// Four bytes.
    fn u32(&mut self, value: &mut u32) {
        let mut bytes = value.to_le_bytes();
        self.bytes(&mut bytes);
        *value = u32::from_le_bytes(bytes);
    }

    /// Eight bytes.
    fn u64(&mut self, value: &mut u64) {
        let mut bytes = value.to_le_bytes();
        self.bytes(&mut bytes);
        *value = u64::from_le_bytes(bytes);
    }
}

/// Appends what it is shown.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Fields for Writer {
    fn bytes(&mut self, bytes: &mut [u8]) {
        self.0.extend_from_slice(bytes);
    }
}

/// Fills what it is shown. What is not there is filled with zeros, and remembered.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    is_short: bool,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            is_short: false,
        }
    }

    /// Whether every byte was used, and no more was asked for.
    pub(super) fn is_exact(&self) -> bool {
        !self.is_short && self.rest.is_empty()
    }
}

impl Fields for Reader<'_> {
    fn bytes(&mut self, bytes: &mut [u8]) {
        match self.rest.split_at_checked(bytes.len()) {
            Some((taken, rest)) => {
                bytes.copy_from_slice(taken);
                self.rest = rest;
            }
            None => {
                bytes.fill(0);
                self.rest = &[];
                self.is_short = true;
            }
        }
    }
}

pub(super) fn regs(f: &mut impl Fields, regs: &mut kvm_regs) {
    for register in [
        &mut regs.rax,
        &mut regs.rbx,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.rsp,
        &mut regs.rbp,
        &mut regs.r8,
        &mut regs.r9,
        &mut regs.r10,
        &mut regs.r11,
        &mut regs.r12,
        &mut regs.r13,
        &mut regs.r14,
        &mut regs.r15,
        &mut regs.rip,
        &mut regs.rflags,
    ] {
        f.u64(register);
    }
}

pub(super) fn sregs(f: &mut impl Fields, sregs: &mut kvm_sregs) {
    for segment in [
        &mut sregs.cs,
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
        &mut sregs.tr,
        &mut sregs.ldt,
    ] {
        self::segment(f, segment);
    }
    table(f, &mut sregs.gdt);
    table(f, &mut sregs.idt);
    for register in [
        &mut sregs.cr0,
        &mut sregs.cr2,
        &mut sregs.cr3,
        &mut sregs.cr4,
        &mut sregs.cr8,
        &mut sregs.efer,
        &mut sregs.apic_base,
    ] {
        f.u64(register);
    }
    sregs.interrupt_bitmap.iter_mut().for_each(|word| f.u64(word));
}

fn segment(f: &mut impl Fields, segment: &mut kvm_segment) {
    f.u64(&mut segment.base);
    f.u32(&mut segment.limit);
    f.u16(&mut segment.selector);
    for attribute in [
        &mut segment.type_,
        &mut segment.present,
        &mut segment.dpl,
        &mut segment.db,
        &mut segment.s,
        &mut segment.l,
        &mut segment.g,
        &mut segment.avl,
        &mut segment.unusable,
    ] {
        f.u8(attribute);
    }
}

fn table(f: &mut impl Fields, table: &mut kvm_dtable) {
    f.u64(&mut table.base);
    f.u16(&mut table.limit);
}

pub(super) fn fpu(f: &mut impl Fields, fpu: &mut kvm_fpu) {
    fpu.fpr.iter_mut().for_each(|register| f.bytes(register));
    f.u16(&mut fpu.fcw);
    f.u16(&mut fpu.fsw);
    f.u8(&mut fpu.ftwx);
    f.u16(&mut fpu.last_opcode);
    f.u64(&mut fpu.last_ip);
    f.u64(&mut fpu.last_dp);
    fpu.xmm.iter_mut().for_each(|register| f.bytes(register));
    f.u32(&mut fpu.mxcsr);
}

pub(super) fn debugregs(f: &mut impl Fields, debugregs: &mut kvm_debugregs) {
    debugregs.db.iter_mut().for_each(|register| f.u64(register));
    f.u64(&mut debugregs.dr6);
    f.u64(&mut debugregs.dr7);
    f.u64(&mut debugregs.flags);
}

pub(super) fn events(f: &mut impl Fields, events: &mut kvm_vcpu_events) {
    let (exception, interrupt, nmi, smi) = (
        &mut events.exception,
        &mut events.interrupt,
        &mut events.nmi,
        &mut events.smi,
    );
    for event in [
        &mut exception.injected,
        &mut exception.nr,
        &mut exception.has_error_code,
        &mut exception.pending,
    ] {
        f.u8(event);
    }
    f.u32(&mut exception.error_code);
    for event in [
        &mut interrupt.injected,
        &mut interrupt.nr,
        &mut interrupt.soft,
        &mut interrupt.shadow,
        &mut nmi.injected,
        &mut nmi.pending,
        &mut nmi.masked,
    ] {
        f.u8(event);
    }
    f.u32(&mut events.sipi_vector);
    f.u32(&mut events.flags);
    for event in [
        &mut smi.smm,
        &mut smi.pending,
        &mut smi.smm_inside_nmi,
        &mut smi.latched_init,
        &mut events.triple_fault.pending,
        &mut events.exception_has_payload,
    ] {
        f.u8(event);
    }
    f.u64(&mut events.exception_payload);
}

pub(super) fn xcrs(f: &mut impl Fields, xcrs: &mut kvm_xcrs) {
    f.u32(&mut xcrs.nr_xcrs);
    for xcr in &mut xcrs.xcrs {
        f.u32(&mut xcr.xcr);
        f.u64(&mut xcr.value);
    }
}

/// Without padding, which KVM does not read.
pub(super) fn cpuid(f: &mut impl Fields, entry: &mut kvm_cpuid_entry2) {
    for word in [
        &mut entry.function,
        &mut entry.index,
        &mut entry.flags,
        &mut entry.eax,
        &mut entry.ebx,
        &mut entry.ecx,
        &mut entry.edx,
    ] {
        f.u32(word);
    }
}

pub(super) fn pit(f: &mut impl Fields, pit: &mut kvm_pit_state2) {
    for channel in &mut pit.channels {
        f.u32(&mut channel.count);
        f.u16(&mut channel.latched_count);
        for part in [
            &mut channel.count_latched,
            &mut channel.status_latched,
            &mut channel.status,
            &mut channel.read_state,
            &mut channel.write_state,
            &mut channel.write_latch,
            &mut channel.rw_mode,
            &mut channel.mode,
            &mut channel.bcd,
            &mut channel.gate,
        ] {
            f.u8(part);
        }
        // `count_load_time` is of the source's own clock; KVM begins the period anew at the destination.
        channel.count_load_time = 0;
    }
    f.u32(&mut pit.flags);
}

/// Only the clock: what the source's clocks showed besides is of no use elsewhere.
pub(super) fn clock(f: &mut impl Fields, clock: &mut kvm_clock_data) {
    f.u64(&mut clock.clock);
}
