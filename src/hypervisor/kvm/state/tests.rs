//! Against KVM itself, with guests of a few instructions. Where there is no /dev/kvm they say so and return.

#![expect(unsafe_code, reason = "memory is given to a VM")]

use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, KVM_PIT_SPEAKER_DUMMY, kvm_msr_entry, kvm_pit_config,
    kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::super::vmm::Visit;
use super::msrs::{TSC, TSC_DEADLINE};
use super::vcpu::LAPIC_BYTES;
use super::*;

const MEMORY: usize = 1 << 20;
/// Long after any counter of a test, also of a host that has run for months.
const DEADLINE: u64 = 1 << 60;

struct Machine {
    vm: VmFd,
    vcpus: Mutex<Vec<VcpuFd>>,
    memory: GuestMemoryMmap,
}

impl Vmm for Machine {
    fn pause(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn visit_vcpus(&self, visit: &mut Visit<'_>) -> Result<(), VmmError> {
        let mut vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus
            .iter_mut()
            .enumerate()
            .try_for_each(|(number, vcpu)| visit(number, vcpu))
    }

    fn take_device_writes(&self, _written: &mut dyn FnMut(u64, u64)) {}

    fn vcpu_threads(&self) -> Vec<u32> {
        Vec::new()
    }

    fn save_devices(&self) -> Result<Vec<u8>, VmmError> {
        Ok(Vec::new())
    }

    fn load_devices(&self, _: &[u8]) -> Result<(), VmmError> {
        Ok(())
    }

    fn quit(&self) {}
}

/// `None`, and a word about it, where there is no KVM.
fn kvm() -> Option<Kvm> {
    Kvm::new()
        .inspect_err(|error| println!("SKIP: /dev/kvm cannot be opened: {error}"))
        .ok()
}

impl Machine {
    /// One MiB from 0 on, and every CPU feature that KVM supports.
    fn new(kvm: &Kvm, vcpus: u64, has_devices: bool) -> Self {
        let vm = kvm.create_vm().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        };
        // SAFETY: The mapping is as long as that, and lives as long as the machine.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        if has_devices {
            vm.create_irq_chip().unwrap();
            vm.create_pit2(kvm_pit_config {
                flags: KVM_PIT_SPEAKER_DUMMY,
                ..Default::default()
            })
            .unwrap();
        }
        let supported = kvm.get_supported_cpuid(256).unwrap();
        let vcpus = (0..vcpus)
            .map(|number| {
                let vcpu = vm.create_vcpu(number).unwrap();
                let mut cpuid = supported.clone();
                for entry in cpuid.as_mut_slice() {
                    match entry.function {
                        1 => entry.ebx = entry.ebx & 0x00ff_ffff | (number as u32) << 24,
                        0xb => entry.edx = number as u32,
                        _ => {}
                    }
                    if entry.function == 1 && has_devices {
                        entry.ecx |= 1 << 24 | 1 << 21;
                    }
                }
                vcpu.set_cpuid2(&cpuid).unwrap();
                vcpu
            })
            .collect();
        Self {
            vm,
            vcpus: Mutex::new(vcpus),
            memory,
        }
    }

    fn save(&self) -> MachineState {
        MachineState::save(&Kvm::new().unwrap(), &self.vm, self, clock::wall()).unwrap()
    }

    fn each(&self, mut visit: impl FnMut(usize, &mut VcpuFd)) {
        each_vcpu(self, |number, vcpu| {
            visit(number, vcpu);
            Ok(())
        })
        .unwrap();
    }
}

fn set_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) {
    for &(index, data) in values {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let set = vcpu
            .set_msrs(&kvm_bindings::Msrs::from_entries(&[entry]).unwrap())
            .unwrap();
        assert_eq!(set, 1, "{index:#x}");
    }
}

fn set_word(lapic: &mut kvm_bindings::kvm_lapic_state, register: usize, value: u32) {
    for (to, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *to = byte.cast_signed();
    }
}

/// Long mode with memory mapped as it is, up to 4 GiB, and something in everything else.
fn fill(number: usize, vcpu: &VcpuFd, has_devices: bool) {
    let n = number as u64 + 1;
    let mut sregs = vcpu.get_sregs().unwrap();
    long_mode(&mut sregs);
    sregs.cr2 = 0x1234 * n;
    sregs.fs.base = 0x5000 * n;
    sregs.gs.base = 0x7f00_0000_0000 + n;
    sregs.idt.base = 0x3000;
    sregs.idt.limit = 0x21f;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.rbx, regs.r15, regs.rip) = (n << 40, 0xb0b0 + n, !n, 0x1000 + n);
    (regs.rsp, regs.rflags) = (0x8000, 0x2 | 1 << 6);
    vcpu.set_regs(&regs).unwrap();

    let mut xcrs = vcpu.get_xcrs().unwrap();
    (xcrs.nr_xcrs, xcrs.xcrs[0].value) = (1, 7);
    vcpu.set_xcrs(&xcrs).unwrap();
    let mut xsave = vcpu.get_xsave().unwrap();
    // FCW, MXCSR, st2 and xmm3; XSTATE_BV: x87, SSE and AVX; the upper half of ymm1.
    (xsave.region[0], xsave.region[6]) = (0x27f, 0x1fa0);
    xsave.region[16..18].fill(0x2020_2020 + number as u32);
    xsave.region[52..56].fill(0x3030_3030 + number as u32);
    xsave.region[128] = 7;
    xsave.region[144 + 4] = 0xa5a5_0000 + number as u32;
    // SAFETY: No feature is on here that needs more than 4096 bytes.
    unsafe { vcpu.set_xsave(&xsave) }.unwrap();

    let mut debugregs = vcpu.get_debug_regs().unwrap();
    debugregs.db = [0x1000, 0x2000, 0x3000, 0x4000 + n];
    (debugregs.dr6, debugregs.dr7) = (0xffff_0ff1, 0x402);
    vcpu.set_debug_regs(&debugregs).unwrap();
    if has_devices {
        let mut lapic = vcpu.get_lapic().unwrap();
        // Enabled with a spurious vector, a task priority, and the timer: of the TSC for the first, in divided ticks
        // for the other.
        set_word(&mut lapic, 0xf0, 0x1ff);
        set_word(&mut lapic, 0x80, 0x20);
        set_word(&mut lapic, 0x3e0, 0xa);
        set_word(&mut lapic, 0x320, if number == 0 { 0x4_0055 } else { 0x2_0044 });
        set_word(&mut lapic, 0x380, 0x7fff_ffff);
        set_word(&mut lapic, 0x390, 0x7fff_ffff);
        vcpu.set_lapic(&lapic).unwrap();
    }
    let values = [
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_8000_0000_1000 + n),
        (0xc000_0084, 0x4_7700),
        (0xc000_0102, 0x7fff_0000 + n),
        (0x174, 0x10),
        (0x175, 0x9000 + n),
        (0x277, 0x0007_0406_0007_0406),
        (0x200, 0xc000_0000 | 6),
        (0x201, 0xf_c000_0800),
        (0x2ff, 0xc06),
        (0x3b, 77),
    ];
    set_msrs(vcpu, &values);
    set_msrs(vcpu, &[(TSC, 50_000_000_000_000)]);
    if has_devices && number == 0 {
        set_msrs(vcpu, &[(TSC_DEADLINE, DEADLINE)]);
    }
    let mut events = vcpu.get_vcpu_events().unwrap();
    events.nmi.pending = 1;
    events.nmi.masked = 1;
    events.exception.injected = 1;
    events.exception.nr = 14;
    events.exception.has_error_code = 1;
    events.exception.error_code = 2;
    events.interrupt.shadow = 0;
    vcpu.set_vcpu_events(&events).unwrap();
}

fn long_mode(sregs: &mut kvm_bindings::kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        db: 1,
        l: 0,
        ..code
    };
    (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (code, data, data, data, data, data);
    sregs.gdt.base = 0x4000;
    sregs.gdt.limit = 0x17;
    sregs.cr3 = 0x1_0000;
    // PE, MP, ET, NE, WP, PG; PAE, OSFXSR, OSXMMEXCPT, OSXSAVE; SCE, LME, LMA, NXE.
    (sregs.cr0, sregs.cr4, sregs.efer) = (0x8001_0033, 0x4_0620, 0xd01);
}

/// All that does not go by time.
fn without_time(mut state: MachineState) -> MachineState {
    state.saved_at = Duration::ZERO;
    state.vm.clock = None;
    for vcpu in &mut state.vcpus {
        vcpu.tsc_offset = None;
        // What the timer still has to count, and counters that run: TSC, and Hyper-V's.
        if let Some(lapic) = &mut vcpu.lapic {
            lapic[0x390..0x394].fill(0);
        }
        let runs = [TSC, 0x4000_0010, 0x4000_0020, 0xe7, 0xe8];
        vcpu.msrs.retain(|(index, _)| !runs.contains(index));
    }
    state
}

#[test]
fn a_machine_that_is_put_back_is_the_one_that_was_saved_but_for_time() {
    let Some(kvm) = kvm() else { return };
    let source = Machine::new(&kvm, 2, true);
    source.each(|number, vcpu| fill(number, vcpu, true));
    let saved = source.save();
    let bytes = saved.encode();
    let decoded = MachineState::decode(&bytes).unwrap();
    assert!(decoded == saved);

    let vcpu = &saved.vcpus[1];
    assert_eq!((vcpu.regs.rax, vcpu.regs.rip), (2 << 40, 0x1002));
    assert_eq!(vcpu.fpu.xmm[3][..4], [0x31, 0x30, 0x30, 0x30]);
    assert_eq!(vcpu.xsave[592..596], 0xa5a5_0001u32.to_le_bytes());
    assert_eq!(vcpu.msr(0xc000_0082), Some(0xffff_8000_0000_1002));
    assert_eq!(vcpu.msr(0x200), Some(0xc000_0006));
    assert_eq!(vcpu.events.exception.nr, 14);
    assert_eq!(saved.vcpus[0].msr(TSC_DEADLINE), Some(DEADLINE));

    let destination = Machine::new(&kvm, 2, true);
    decoded.check(&kvm, &destination.vm, &destination).unwrap();
    let is_fixed = is_tsc_fixed(&kvm);
    let downtime = if is_fixed {
        Duration::ZERO
    } else {
        Duration::from_secs(3)
    };
    decoded
        .restore(&destination.vm, &destination, decoded.saved_at + downtime)
        .unwrap();
    let again = destination.save();
    let (before, after) = (without_time(saved.clone()), without_time(again.clone()));
    for (number, (before, after)) in before.vcpus.iter().zip(&after.vcpus).enumerate() {
        let differing: Vec<_> = before.msrs.iter().zip(&after.msrs).filter(|(a, b)| a != b).collect();
        assert!(differing.is_empty(), "vCPU {number}: {differing:x?}");
        assert_eq!(before, after, "vCPU {number}");
    }
    assert_eq!(before.vm, after.vm);

    for (number, (before, after)) in saved.vcpus.iter().zip(&again.vcpus).enumerate() {
        let ticks = after.msr(TSC).unwrap() - before.msr(TSC).unwrap();
        let passed = Duration::from_nanos(ticks * 1_000_000 / u64::from(before.tsc_khz));
        // A vCPU is saved after the one before, and goes on beside it.
        assert!(
            passed + Duration::from_secs(1) >= downtime && passed < downtime + Duration::from_secs(20),
            "vCPU {number}: {passed:?}"
        );
    }
    let clock = |state: &MachineState| Duration::from_nanos(state.vm.clock.unwrap().clock);
    let passed = clock(&again) - clock(&saved);
    assert!(
        passed >= downtime && passed < downtime + Duration::from_secs(20),
        "{passed:?}"
    );
    let timer = |state: &MachineState| {
        let lapic = state.vcpus[1].lapic.as_ref().unwrap();
        u32::from_le_bytes(lapic[0x390..0x394].try_into().unwrap())
    };
    assert!(timer(&again) > 0 && timer(&again) <= timer(&saved));
}

/// Whether KVM ignores what a counter is set to. It says so.
fn is_tsc_fixed(kvm: &Kvm) -> bool {
    let is_fixed = tsc::fixed(&kvm.create_vm().unwrap().create_vcpu(0).unwrap()).is_some();
    if is_fixed {
        eprintln!("KVM does not set counters here: that they are advanced was not tested.");
    }
    is_fixed
}

#[test]
fn counters_keep_their_distance_to_the_tick_where_kvm_tells_offsets() {
    let Some(kvm) = kvm() else { return };
    let source = Machine::new(&kvm, 3, true);
    source.each(|number, vcpu| set_msrs(vcpu, &[(TSC, 9_000_000_000_000 + 60_000_000_000 * number as u64)]));
    let saved = source.save();
    let Some(first) = saved.vcpus[0].tsc_offset.filter(|_| !is_tsc_fixed(&kvm)) else {
        eprintln!("KVM does not tell the offsets of counters: nothing was tested.");
        return;
    };
    let destination = Machine::new(&kvm, 3, true);
    saved.restore(&destination.vm, &destination, saved.saved_at).unwrap();
    let again = destination.save();
    let here = again.vcpus[0].tsc_offset.unwrap();
    for (before, after) in saved.vcpus.iter().zip(&again.vcpus) {
        let before = before.tsc_offset.unwrap().wrapping_sub(first);
        assert_eq!(after.tsc_offset.unwrap().wrapping_sub(here), before);
    }
}

#[test]
fn clocks_go_by_ten_minutes_at_most_and_never_back() {
    let Some(kvm) = kvm() else { return };
    let saved = Machine::new(&kvm, 1, true).save();
    let clock = |now: Duration| {
        let destination = Machine::new(&kvm, 1, true);
        saved.restore(&destination.vm, &destination, now).unwrap();
        let passed = destination.save().vm.clock.unwrap().clock - saved.vm.clock.unwrap().clock;
        Duration::from_nanos(passed).as_secs()
    };
    assert!(clock(Duration::ZERO) < 20);
    assert!((600..620).contains(&clock(saved.saved_at + Duration::from_secs(100_000))));
}

#[test]
fn a_machine_without_devices_in_kvm_is_moved_and_does_not_fit_one_that_has_them() {
    let Some(kvm) = kvm() else { return };
    let source = Machine::new(&kvm, 1, false);
    source.each(|number, vcpu| fill(number, vcpu, false));
    let saved = MachineState::decode(&source.save().encode()).unwrap();
    assert!(saved.vm.chips.is_empty() && saved.vm.pit.is_none() && saved.vcpus[0].lapic.is_none());

    let destination = Machine::new(&kvm, 1, false);
    saved.check(&kvm, &destination.vm, &destination).unwrap();
    saved.restore(&destination.vm, &destination, saved.saved_at).unwrap();
    assert!(without_time(destination.save()) == without_time(saved.clone()));

    let other = Machine::new(&kvm, 2, true);
    let error = saved.check(&kvm, &other.vm, &other).unwrap_err().to_string();
    for clause in [
        "it has 1 vCPUs, and this VM 2",
        "only this VM has local APICs in KVM",
        "only this VM has interrupt controllers in KVM",
        "only this VM has a PIT in KVM",
    ] {
        assert!(error.contains(clause), "{error}");
    }
    assert!(matches!(
        saved.restore(&other.vm, &other, saved.saved_at),
        Err(StateError::Lacks { .. })
    ));
}

#[test]
fn what_the_host_lacks_is_named_in_one_sentence() {
    let Some(kvm) = kvm() else { return };
    let machine = Machine::new(&kvm, 2, true);
    let mut state = MachineState::decode(&machine.save().encode()).unwrap();
    state.check(&kvm, &machine.vm, &machine).unwrap();
    let vcpu = &mut state.vcpus[1];
    for entry in &mut vcpu.cpuid {
        match (entry.function, entry.index) {
            // No host of today has these: the L1 context id, an aborting RTM, a reserved bit and 3DNow!.
            (1, 0) => entry.ecx |= 1 << 10,
            (7, 0) => entry.edx |= 1 << 13 | 1 << 17,
            (0x8000_0001, 0) => entry.edx |= 1 << 31,
            _ => {}
        }
    }
    vcpu.msrs.push((0xdead_0001, 1));
    vcpu.xsave.resize(60 << 10, 0);
    state.vendor = *b"CentaurHauls";
    let error = state.check(&kvm, &machine.vm, &machine).unwrap_err().to_string();
    for part in [
        "The guest cannot run on this host: ",
        "cid",
        "rtm_force_abort",
        "bit 17 of EDX of CPUID 0x7.0",
        "3dnow",
        "(0xdead0001)",
        "61440 bytes",
        "CentaurHauls",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_register_that_does_not_take_its_value_is_named() {
    let Some(kvm) = kvm() else { return };
    let ignores = std::fs::read_to_string("/sys/module/kvm/parameters/ignore_msrs").unwrap_or_default();
    if ignores.trim() == "Y" {
        println!("SKIP: this host's KVM takes any register (ignore_msrs)");
        return;
    }
    let machine = Machine::new(&kvm, 1, true);
    let mut state = machine.save();
    // There is no such register; but one that held nothing is no loss.
    state.vcpus[0].msrs = vec![(0x10, 5), (0xdead_0000, 0), (0xdead_0001, 6)];
    let destination = Machine::new(&kvm, 1, true);
    let error = state
        .restore(&destination.vm, &destination, state.saved_at)
        .unwrap_err();
    assert!(
        matches!(
            error,
            StateError::Msr {
                vcpu: 0,
                index: 0xdead_0001,
                value: 6,
                ..
            }
        ),
        "{error}"
    );
}

/// Maps the first 2 MiB and the local APIC as they are.
fn map(memory: &GuestMemoryMmap) {
    for (at, entry) in [
        (0x1_0000, 0x1_1003),
        (0x1_1000, 0x1_2003),
        (0x1_1018, 0x1_3003),
        (0x1_2000, 0x83),
        (0x1_3000 + 0x1f7 * 8, 0xfee0_0093u64),
    ] {
        memory.write_obj(entry, GuestAddress(at)).unwrap();
    }
}

/// The timer of the local APIC ticks every 5 ms; each tick is counted in the byte at 0x5000, and said at port 0x10.
const TICKS: &[u8] = &[
    0xbf, 0x00, 0x00, 0xe0, 0xfe, // mov edi, 0xfee00000
    0xc7, 0x87, 0xf0, 0x00, 0x00, 0x00, 0xff, 0x01, 0x00, 0x00, // mov dword [rdi+0xf0], 0x1ff      enabled
    0xc7, 0x87, 0xe0, 0x03, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, // mov dword [rdi+0x3e0], 3         divided by 16
    0xc7, 0x87, 0x20, 0x03, 0x00, 0x00, 0x20, 0x00, 0x02,
    0x00, // mov dword [rdi+0x320], 0x20020   periodic, vector 0x20
    0xc7, 0x87, 0x80, 0x03, 0x00, 0x00, 0x12, 0xc4, 0x04, 0x00, // mov dword [rdi+0x380], 312338
    0xfb, // sti
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

const TICK: &[u8] = &[
    0xfe, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00, // inc byte [0x5000]
    0x8a, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00, // mov al, [0x5000]
    0xe6, 0x10, // out 0x10, al
    0xc7, 0x87, 0xb0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // mov dword [rdi+0xb0], 0    end of interrupt
    0x48, 0xcf, // iretq
];

fn load_ticks(machine: &Machine) {
    let memory = &machine.memory;
    map(memory);
    memory.write_slice(TICKS, GuestAddress(0x1000)).unwrap();
    memory.write_slice(TICK, GuestAddress(0x2000)).unwrap();
    // Code at 8 and data at 16.
    memory
        .write_obj(0x00af_9b00_0000_ffffu64, GuestAddress(0x4008))
        .unwrap();
    memory
        .write_obj(0x00cf_9300_0000_ffffu64, GuestAddress(0x4010))
        .unwrap();
    // Vector 0x20: an interrupt gate to 0x2000.
    memory
        .write_obj(0x0000_8e00_0008_2000u64, GuestAddress(0x3200))
        .unwrap();
    machine.each(|_, vcpu| {
        let mut sregs = vcpu.get_sregs().unwrap();
        long_mode(&mut sregs);
        (sregs.idt.base, sregs.idt.limit) = (0x3000, 0x20f);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (0x1000, 0x8000, 2);
        vcpu.set_regs(&regs).unwrap();
    });
}

/// Runs the first vCPU until it has said that many ticks, and what its last exit began is done. The ticks it said.
fn run(machine: &Arc<Machine>, ticks: usize) -> Vec<u8> {
    let (send, said) = mpsc::channel();
    let running = Arc::clone(machine);
    std::thread::spawn(move || {
        let mut vcpus = running.vcpus.lock().unwrap();
        let mut said = Vec::new();
        while said.len() < ticks {
            match vcpus[0].run().unwrap() {
                VcpuExit::IoOut(0x10, data) => said.extend_from_slice(data),
                other => panic!("{other:?}"),
            }
        }
        vcpus[0].set_kvm_immediate_exit(1);
        assert_eq!(vcpus[0].run().unwrap_err().errno(), libc::EINTR);
        vcpus[0].set_kvm_immediate_exit(0);
        drop(vcpus);
        send.send(said).unwrap();
    });
    said.recv_timeout(Duration::from_secs(60))
        .expect("the guest's timer ticks")
}

#[test]
fn a_guest_that_counts_ticks_of_its_timer_goes_on_counting() {
    let Some(kvm) = kvm() else { return };
    let source = Arc::new(Machine::new(&kvm, 1, true));
    load_ticks(&source);
    assert_eq!(run(&source, 3), [1, 2, 3]);
    let bytes = source.save().encode();

    let destination = Arc::new(Machine::new(&kvm, 1, true));
    let mut memory = vec![0; MEMORY];
    source.memory.read_slice(&mut memory, GuestAddress(0)).unwrap();
    destination.memory.write_slice(&memory, GuestAddress(0)).unwrap();
    let state = MachineState::decode(&bytes).unwrap();
    state.check(&kvm, &destination.vm, &*destination).unwrap();
    state.restore(&destination.vm, &*destination, state.saved_at).unwrap();
    assert_eq!(run(&destination, 3), [4, 5, 6]);
}

#[test]
fn a_vcpu_that_waits_to_be_started_still_waits() {
    let Some(kvm) = kvm() else { return };
    let state = Machine::new(&kvm, 2, true).save();
    let destination = Machine::new(&kvm, 2, true);
    state.restore(&destination.vm, &destination, state.saved_at).unwrap();
    let run_states: Vec<_> = destination
        .save()
        .vcpus
        .iter()
        .map(|vcpu| vcpu.mp_state.mp_state)
        .collect();
    assert_eq!(run_states, [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED]);
}

/// As large as one of a small machine, made without KVM.
fn invented() -> MachineState {
    let vcpu = VcpuState {
        cpuid: vec![Default::default(); 30],
        tsc_khz: 2_000_000,
        tsc_offset: Some(5),
        xsave: vec![7; 4096],
        xcrs: Some(Default::default()),
        lapic: Some(Box::new([3; LAPIC_BYTES])),
        msrs: (0..200).map(|index| (index, u64::from(index) << 30)).collect(),
        nested: Some(vcpu::NestedState(vec![1; 128])),
        ..Default::default()
    };
    MachineState {
        saved_at: Duration::new(1_800_000_000, 999_999_999),
        vendor: *b"AuthenticAMD",
        vm: VmState {
            chips: (0..3)
                .map(|id| machine::Chip {
                    id,
                    bytes: Box::new([9; 512]),
                })
                .collect(),
            pit: Some(Default::default()),
            clock: Some(Default::default()),
        },
        vcpus: vec![vcpu.clone(), vcpu],
    }
}

#[test]
fn a_state_that_is_cut_off_anywhere_is_refused() {
    let bytes = invented().encode();
    assert!(MachineState::decode(&bytes).unwrap() == invented());
    for len in 0..bytes.len() {
        assert!(MachineState::decode(&bytes[..len]).is_err(), "{len}");
    }
    let longer = [&*bytes, &[0]].concat();
    assert!(matches!(
        MachineState::decode(&longer),
        Err(StateError::Trailing { bytes: 1 })
    ));
}

#[test]
fn changed_bytes_are_read_as_another_state_or_refused_and_what_is_read_is_written_again() {
    let bytes = invented().encode();
    // A generator of Weyl and xorshift; the seed does not matter.
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = seed ^ seed >> 31;
        x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^ x >> 29
    };
    let mut changed = bytes.clone();
    let check = |changed: &[u8]| {
        if let Ok(state) = MachineState::decode(changed) {
            let again = state.encode();
            assert!(MachineState::decode(&again).unwrap() == state);
        }
    };
    for at in 0..bytes.len() {
        for value in [0, 1, 0x7f, 0xff, bytes[at] ^ 0x80, random() as u8] {
            // The head and each section's head are where it matters; of the rest some.
            if at < 200 || random() % 8 == 0 {
                changed[at] = value;
                check(&changed);
                changed[at] = bytes[at];
            }
        }
    }
    for _ in 0..2000 {
        let mut changed = bytes.clone();
        for _ in 0..=random() % 8 {
            let at = random() as usize % changed.len();
            changed[at] = random() as u8;
        }
        changed.truncate(changed.len() - random() as usize % 64);
        check(&changed);
    }
}

/// The sections of `bytes`: where each begins.
fn sections(bytes: &[u8]) -> Vec<(String, std::ops::Range<usize>)> {
    let mut found = Vec::new();
    let mut at = 12;
    while at < bytes.len() {
        let name = bytes[at..at + 8]
            .iter()
            .take_while(|&&byte| byte != 0)
            .map(|&byte| byte as char);
        let len = u32::from_le_bytes(bytes[at + 10..at + 14].try_into().unwrap()) as usize;
        found.push((name.collect(), at..at + 14 + len));
        at += 14 + len;
    }
    found
}

#[test]
fn a_section_that_is_unknown_newer_missing_or_there_twice_is_refused_by_its_name() {
    let bytes = invented().encode();
    let sections = sections(&bytes);
    let with_count = |count: usize, body: Vec<u8>| [&bytes[..8], &(count as u32).to_le_bytes(), &body].concat();
    for (name, range) in &sections {
        let without = with_count(
            sections.len() - 1,
            [&bytes[12..range.start], &bytes[range.end..]].concat(),
        );
        let is_optional = ["irqchip", "pit", "clock", "xcrs", "lapic", "nested"].contains(&name.as_str());
        assert_eq!(MachineState::decode(&without).is_ok(), is_optional, "without {name}");
        let twice = with_count(
            sections.len() + 1,
            [&bytes[12..range.end], &bytes[range.start..]].concat(),
        );
        assert!(MachineState::decode(&twice).is_err(), "{name} twice");

        let mut newer = bytes.clone();
        newer[range.start + 8] = 2;
        let error = MachineState::decode(&newer).unwrap_err();
        assert!(matches!(error, StateError::Version { section, version: 2 } if section == *name));

        let mut unknown = bytes.clone();
        unknown[range.start..range.start + 8].copy_from_slice(b"pvpanic\n");
        let error = MachineState::decode(&unknown).unwrap_err().to_string();
        assert_eq!(
            error,
            "The state of the machine has a section \"pvpanic\\n\" that this version does not know."
        );
    }
}

#[test]
fn a_machine_of_more_vcpus_than_any_has_is_refused_before_anything_is_allocated() {
    let mut bytes = invented().encode();
    bytes[26..30].copy_from_slice(&1025u32.to_le_bytes());
    assert!(matches!(
        MachineState::decode(&bytes),
        Err(StateError::TooMany { count: 1025, .. })
    ));
}
