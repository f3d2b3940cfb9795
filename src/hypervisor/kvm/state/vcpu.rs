//! One vCPU.

#![expect(
    unsafe_code,
    reason = "the length of the extended state is known to KVM alone, and nested state is a union of KVM's"
)]

use std::ops::RangeInclusive;

use kvm_bindings::{
    CpuId, KVM_MP_STATE_SIPI_RECEIVED, KVM_VCPUEVENT_VALID_SIPI_VECTOR, Xsave, kvm_cpuid_entry2, kvm_debugregs,
    kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

use kvm_ioctls::{Cap, KvmNestedStateBuffer, VcpuFd, VmFd};

use super::codec::XSAVE_MIN;
use super::msrs::{self, TSC, TSC_DEADLINE};
use super::tsc::{self, Counters};
use super::{StateError, is_absent};

/// Bytes of a local APIC.
pub(super) const LAPIC_BYTES: usize = 1024;

/// What KVM knows of a vCPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct VcpuState {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    /// 0: KVM does not say.
    pub(super) tsc_khz: u32,
    /// See [`tsc::offset`].
    pub(super) tsc_offset: Option<u64>,
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) fpu: kvm_fpu,
    /// The standard form of XSAVE. Whole words, 4096 bytes and more.
    pub(super) xsave: Vec<u8>,
    /// `None`: the host has no XSAVE.
    pub(super) xcrs: Option<kvm_xcrs>,
    pub(super) debugregs: kvm_debugregs,
    pub(super) events: kvm_vcpu_events,
    /// `None`: it is not in KVM.
    pub(super) lapic: Option<Box<[u8; LAPIC_BYTES]>>,
    /// By number.
    pub(super) msrs: Vec<(u32, u64)>,
    /// `None`: the guest cannot be a hypervisor.
    pub(super) nested: Option<NestedState>,
}

/// What the guest is as a hypervisor: KVM's structure, as far as it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NestedState(pub(super) Vec<u8>);

impl NestedState {
    /// Bytes, from the head alone to everything.
    pub(super) const LENGTHS: RangeInclusive<usize> = 128..=size_of::<KvmNestedStateBuffer>();

    fn get(fd: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        let mut buffer = KvmNestedStateBuffer::empty();
        fd.nested_state(&mut buffer)?;
        let len = (buffer.size as usize).clamp(*Self::LENGTHS.start(), *Self::LENGTHS.end());
        // SAFETY: All of the structure was made of zeros, its parts are numbers and unions without padding around them,
        // and `len` is at most its size.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&buffer).cast::<u8>(), len) };
        Ok(Self(bytes.to_vec()))
    }

    fn set(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut buffer = KvmNestedStateBuffer::empty();
        let len = self.0.len().min(*Self::LENGTHS.end());
        // SAFETY: `len` bytes are there on both sides, and any bytes are a value of the structure, which is plain
        // numbers.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), std::ptr::from_mut(&mut buffer).cast::<u8>(), len) };
        // By this KVM knows how much it may read.
        buffer.size = len as u32;
        fd.set_nested_state(&buffer)
    }
}

/// How many bytes of extended state KVM reads and writes in this VM.
pub(super) fn xsave_len(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2))
        .unwrap_or(0)
        .next_multiple_of(4)
        .max(XSAVE_MIN)
}

fn words(len: usize) -> Result<Xsave, kvm_ioctls::Error> {
    Xsave::new(len.saturating_sub(XSAVE_MIN).div_ceil(4)).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))
}

fn get_xsave(vm: &VmFd, fd: &VcpuFd) -> Result<Vec<u8>, kvm_ioctls::Error> {
    let has_length = vm.check_extension_int(Cap::Xsave2) > 0;
    let mut xsave = words(xsave_len(vm))?;
    if has_length {
        // SAFETY: It has the length that KVM states for this VM.
        unsafe { fd.get_xsave2(&mut xsave) }?;
    } else {
        let plain = fd.get_xsave()?;
        // SAFETY: The region is written, the length is not.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region = plain.region;
    }
    let region = xsave.as_fam_struct_ref().xsave.region;
    Ok(region
        .iter()
        .chain(xsave.as_slice())
        .flat_map(|word| word.to_le_bytes())
        .collect())
}

/// What is not in `bytes` is zero, as of components that are not in use.
fn set_xsave(vm: &VmFd, fd: &VcpuFd, bytes: &[u8]) -> Result<(), kvm_ioctls::Error> {
    let len = xsave_len(vm);
    if bytes.len() > len {
        return Err(kvm_ioctls::Error::new(libc::E2BIG));
    }
    let mut xsave = words(len)?;
    let mut words = bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap_or_default()));
    // SAFETY: The region is written, the length is not.
    let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    for (to, word) in region.iter_mut().zip(&mut words) {
        *to = word;
    }
    for (to, word) in xsave.as_mut_slice().iter_mut().zip(words) {
        *to = word;
    }
    // SAFETY: It has the length that KVM states for this VM.
    unsafe { fd.set_xsave2(&xsave) }
}

impl VcpuState {
    /// The value of a model-specific register.
    pub(super) fn msr(&self, index: u32) -> Option<u64> {
        let at = self.msrs.binary_search_by_key(&index, |&(index, _)| index).ok()?;
        Some(self.msrs[at].1)
    }

    /// Whether its CPU can run guests.
    fn is_hypervisor(&self) -> bool {
        self.cpuid.iter().any(|entry| match entry.function {
            1 => entry.ecx & 1 << 5 != 0,
            0x8000_0001 => entry.ecx & 1 << 2 != 0,
            _ => false,
        })
    }

    /// Everything, of vCPU `number`, which stands. `known`: the model-specific registers to ask for, by number.
    pub(super) fn save(number: usize, vm: &VmFd, fd: &VcpuFd, known: &[u32]) -> Result<Self, StateError> {
        let at = |doing| {
            move |errno| StateError::Vcpu {
                doing,
                vcpu: number,
                errno,
            }
        };
        // First: KVM takes in what is pending for the local APIC with it, which changes what comes after.
        let mp_state = fd.get_mp_state().map_err(at("read the run state"))?;
        let cpuid = fd
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(at("read CPUID"))?
            .as_slice()
            .to_vec();
        let lapic = match fd.get_lapic() {
            Ok(lapic) => Some(Box::new(lapic.regs.map(i8::cast_unsigned))),
            Err(errno) if is_absent(errno) => None,
            Err(errno) => return Err(at("read the local APIC")(errno)),
        };
        let xcrs = match vm.check_extension(Cap::Xcrs) {
            true => Some(fd.get_xcrs().map_err(at("read the extended control registers"))?),
            false => None,
        };
        let mut state = Self {
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            tsc_offset: tsc::offset(fd),
            mp_state,
            regs: fd.get_regs().map_err(at("read the registers"))?,
            sregs: fd.get_sregs().map_err(at("read the special registers"))?,
            fpu: fd.get_fpu().map_err(at("read the FPU"))?,
            xsave: get_xsave(vm, fd).map_err(at("read the extended state"))?,
            xcrs,
            debugregs: fd.get_debug_regs().map_err(at("read the debug registers"))?,
            lapic,
            msrs: msrs::read(fd, known),
            events: fd.get_vcpu_events().map_err(at("read the pending events"))?,
            nested: None,
            cpuid,
        };
        if state.is_hypervisor() && vm.check_extension(Cap::NestedState) {
            state.nested = Some(NestedState::get(fd).map_err(at("read the nested state"))?);
        }
        Ok(state)
    }

    /// Puts everything back into vCPU `number`, which has not run. Called from 0 on.
    pub(super) fn restore(
        &self,
        number: usize,
        vm: &VmFd,
        fd: &mut VcpuFd,
        counters: &mut Counters,
    ) -> Result<(), StateError> {
        let at = |doing| {
            move |errno| StateError::Vcpu {
                doing,
                vcpu: number,
                errno,
            }
        };
        // By it KVM judges everything else.
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::Malformed {
            section: "cpuid".to_owned(),
        })?;
        fd.set_cpuid2(&cpuid).map_err(at("set CPUID"))?;
        if self.tsc_khz != 0 && fd.get_tsc_khz().ok() != Some(self.tsc_khz) {
            fd.set_tsc_khz(self.tsc_khz)
                .map_err(at("set the frequency of the TSC"))?;
        }
        fd.set_mp_state(self.mp_state).map_err(at("set the run state"))?;
        // The mode of the local APIC is in it, and that of the CPU, which some model-specific registers depend on.
        fd.set_sregs(&self.sregs).map_err(at("set the special registers"))?;
        fd.set_debug_regs(&self.debugregs)
            .map_err(at("set the debug registers"))?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs).map_err(at("set the extended control registers"))?;
        }
        fd.set_fpu(&self.fpu).map_err(at("set the FPU"))?;
        set_xsave(vm, fd, &self.xsave).map_err(at("set the extended state"))?;
        match &self.lapic {
            Some(lapic) => {
                let lapic = kvm_lapic_state {
                    regs: lapic.map(u8::cast_signed),
                };
                fd.set_lapic(&lapic).map_err(at("set the local APIC"))?;
            }
            // Without one KVM takes the task priority from here each time that the vCPU runs.
            None => fd.get_kvm_run().cr8 = self.sregs.cr8,
        }
        let is_plain = |&&(index, _): &&(u32, u64)| index != TSC && index != TSC_DEADLINE;
        let plain: Vec<_> = self.msrs.iter().filter(is_plain).copied().collect();
        msrs::write(number, fd, &plain)?;
        counters.restore(number, fd, self)?;
        // It arms a timer: the mode of that came with the local APIC, and what is compared with it is the counter.
        if let Some(deadline) = self.msr(TSC_DEADLINE) {
            msrs::write(number, fd, &[(TSC_DEADLINE, deadline)])?;
        }
        if let Some(nested) = &self.nested {
            nested.set(fd).map_err(at("set the nested state"))?;
        }
        fd.set_regs(&self.regs).map_err(at("set the registers"))?;
        if vm.check_extension(Cap::KvmclockCtrl) {
            // The guest is told that it stood, so that its watchdogs do not bark. Without kvmclock it cannot be told.
            let _ = fd.kvmclock_ctrl();
        }
        // Last: setting the registers forgets a pending exception.
        let mut events = self.events;
        if self.mp_state.mp_state == KVM_MP_STATE_SIPI_RECEIVED {
            events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        }
        fd.set_vcpu_events(&events).map_err(at("set the pending events"))
    }
}
