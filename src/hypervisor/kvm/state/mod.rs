//! What KVM knows of a machine: saved at the source, put back at the destination.
//!
//! ```text
//! machine.rs   interrupt controllers, PIT, clock
//! vcpu.rs      one vCPU: what is read, and in which order it is put back
//! msrs.rs      model-specific registers, and which of them there are
//! tsc.rs       the counters of all vCPUs, equal to each other
//! cpu.rs       what this host's KVM can do, and what a guest needs of that
//! features.rs  names of CPU features
//! codec.rs     bytes: sections, and their limits
//! fields.rs    the fields of KVM's structures
//! ```
//!
//! # What is not in it
//!
//! The VMM makes the same VM at both ends, and this fills it: memory slots, the routing of interrupts, ioeventfds and
//! irqfds, capabilities that are switched on (split irqchip, x2APIC's long ids, exception payloads, Hyper-V's synthetic
//! interrupts), and the number of machine check banks are its. Neither is confidential memory (SEV, TDX), of which
//! nobody can read the registers.

mod codec;
mod cpu;
mod features;
mod fields;
mod machine;
mod msrs;
#[cfg(test)]
mod tests;
mod tsc;
mod vcpu;

use std::time::Duration;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use self::cpu::{Host, Lacks};
pub(super) use self::features::WORDS;
use self::machine::VmState;
use self::tsc::Counters;
use self::vcpu::VcpuState;
use super::clock;
use super::vmm::{Vmm, VmmError};

/// Longest time by which clocks are advanced. A wall clock that is further off is wrong.
const DOWNTIME_MAX: Duration = Duration::from_secs(600);

/// A machine, as far as KVM knows it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MachineState {
    /// Wall time at the source when it was saved, since 1970.
    saved_at: Duration,
    /// Who has made the CPUs of the source, as CPUID says it.
    vendor: [u8; 12],
    vm: VmState,
    vcpus: Vec<VcpuState>,
}

/// Why a machine cannot be saved, read or put back. The guest is as it was, but for a VM that was being filled: that is
/// of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// The VMM does not show its vCPUs.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// KVM refuses something that has nothing to do with the guest.
    #[error("KVM does not {doing}: {errno}.")]
    Host {
        /// What was asked.
        doing: &'static str,
        /// Its reason.
        errno: kvm_ioctls::Error,
    },
    /// KVM refuses something of the machine.
    #[error("KVM does not {doing} of the machine: {errno}.")]
    Vm {
        /// What was asked.
        doing: &'static str,
        /// Its reason.
        errno: kvm_ioctls::Error,
    },
    /// KVM refuses something of a vCPU.
    #[error("KVM does not {doing} of vCPU {vcpu}: {errno}.")]
    Vcpu {
        /// What was asked.
        doing: &'static str,
        /// Its number.
        vcpu: usize,
        /// KVM's reason.
        errno: kvm_ioctls::Error,
    },
    /// A register does not take its value here.
    #[error("KVM does not set the model-specific register {index:#x} of vCPU {vcpu} to {value:#x}; {}.", now(*.here))]
    Msr {
        /// The vCPU.
        vcpu: usize,
        /// The register's number.
        index: u32,
        /// What the guest had in it.
        value: u64,
        /// What is in it; `None`: there is none.
        here: Option<u64>,
    },
    /// This host is another one than the guest needs.
    #[error("The guest cannot run on this host: {clauses}.")]
    Lacks {
        /// What is lacking, cut to a bearable length.
        clauses: String,
    },
    /// The VM has no vCPUs, or more than can be told.
    #[error("The machine has {count} vCPUs; 1 to {} can be moved.", codec::VCPUS)]
    Vcpus {
        /// How many.
        count: usize,
    },
    /// The bytes are something else.
    #[error("This is not the state of a machine as this version writes it.")]
    NotAState,
    /// The bytes end too early.
    #[error("The state of the machine is cut off.")]
    Cut,
    /// The bytes go on.
    #[error("There are {bytes} bytes after the state of the machine.")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// It would be lost on the guest.
    #[error("The state of the machine has a section \"{name}\" that this version does not know.")]
    UnknownSection {
        /// Escaped.
        name: String,
    },
    /// A section in another version.
    #[error("The section {section} of the machine's state has version {version}, which is not known here.")]
    Version {
        /// Its name.
        section: String,
        /// Its version.
        version: u16,
    },
    /// A section that is not what its name says, is there twice, or not where it belongs.
    #[error("The section {section} of the machine's state is malformed.")]
    Malformed {
        /// Its name.
        section: String,
    },
    /// A section that has to be there.
    #[error("A section {section} of the machine's state is missing.")]
    Missing {
        /// Its name.
        section: &'static str,
    },
    /// More than any machine has.
    #[error("The section {section} of the machine's state has {count} entries; at most {most} are taken.")]
    TooMany {
        /// Its name.
        section: String,
        /// Stated.
        count: usize,
        /// Limit.
        most: usize,
    },
}

fn now(value: Option<u64>) -> String {
    match value {
        Some(value) => format!("it is {value:#x} here"),
        None => "this host has no such register".to_owned(),
    }
}

/// Whether KVM says by `errno` that the VM has no such device.
fn is_absent(errno: kvm_ioctls::Error) -> bool {
    [libc::ENXIO, libc::EINVAL, libc::ENOTTY].contains(&errno.errno())
}

/// Shows every vCPU to `visit`, and keeps what went wrong there as it was.
fn each_vcpu(
    vmm: &dyn Vmm,
    mut visit: impl FnMut(usize, &mut VcpuFd) -> Result<(), StateError>,
) -> Result<(), StateError> {
    let mut failure = None;
    let visited = vmm.visit_vcpus(&mut |number, fd| {
        visit(number, fd).map_err(|error| {
            let sentence = VmmError(error.to_string());
            failure = Some(error);
            sentence
        })
    });
    match failure {
        Some(error) => Err(error),
        None => Ok(visited?),
    }
}

impl MachineState {
    /// Everything that KVM knows of the machine. The guest stands, and goes on standing if it is to go on elsewhere.
    /// `now_wall`: wall time, since 1970.
    ///
    /// What each vCPU last left `KVM_RUN` for is complete ([`Vmm::pause`]): an instruction that reads from a device or a
    /// port would be half done, and the half is not in the state.
    ///
    /// # Errors
    /// KVM or the VMM refuse. Nothing has changed.
    pub(crate) fn save(kvm: &Kvm, vm: &VmFd, vmm: &dyn Vmm, now_wall: Duration) -> Result<Self, StateError> {
        let vendor = cpu::vendor(kvm)?;
        let known = msrs::known(kvm)?;
        let vm_state = VmState::save(vm)?;
        let mut vcpus = Vec::new();
        each_vcpu(vmm, |number, fd| {
            vcpus.push(VcpuState::save(number, vm, fd, &known)?);
            Ok(())
        })?;
        if vcpus.is_empty() || vcpus.len() > codec::VCPUS {
            return Err(StateError::Vcpus { count: vcpus.len() });
        }
        Ok(Self {
            saved_at: now_wall,
            vendor,
            vm: vm_state,
            vcpus,
        })
    }

    /// As bytes: about 2 KiB, and 10 KiB for each vCPU.
    pub(crate) fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// From bytes that may be anything. What is allocated is in proportion to them.
    ///
    /// # Errors
    /// They are not what [`MachineState::encode`] gives, or are of a version that knows more.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        codec::decode(bytes)
    }

    /// Whether the guest can run in this VM, of this host. Changes nothing; [`MachineState::restore`] may still be
    /// refused something by KVM.
    ///
    /// # Errors
    /// [`StateError::Lacks`] names everything that is lacking.
    pub(crate) fn check(&self, kvm: &Kvm, vm: &VmFd, vmm: &dyn Vmm) -> Result<(), StateError> {
        let host = Host::of(kvm)?;
        let mut lacks = Lacks::default();
        if self.vendor != host.vendor() {
            lacks.add(format!(
                "the CPUs of the source are of {}, and this host's of {}",
                self.vendor.escape_ascii(),
                host.vendor().escape_ascii()
            ));
        }
        let mut count = 0;
        let mut tsc_khz = 0;
        let mut lapics = 0;
        each_vcpu(vmm, |_, fd| {
            count += 1;
            tsc_khz = fd.get_tsc_khz().unwrap_or(0);
            lapics += usize::from(fd.get_lapic().is_ok());
            Ok(())
        })?;
        if count != self.vcpus.len() {
            lacks.add(format!("it has {} vCPUs, and this VM {count}", self.vcpus.len()));
        }
        let has_lapics = self.vcpus.iter().any(|vcpu| vcpu.lapic.is_some());
        if has_lapics != (lapics > 0) {
            let holder = if has_lapics { "the source" } else { "this VM" };
            lacks.add(format!("only {holder} has local APICs in KVM"));
        }
        for difference in self.vm.differences(&VmState::save(vm)?) {
            lacks.add(difference);
        }
        if let Some((vcpu, tsc)) = self.vcpus.first().and_then(|vcpu| Some((vcpu, vcpu.msr(msrs::TSC)?))) {
            let passed = clock::wall().saturating_sub(self.saved_at).min(DOWNTIME_MAX);
            let tsc = tsc.wrapping_add(tsc::ticks(passed, vcpu.tsc_khz));
            host.compare_fixed_tsc(tsc, vcpu.tsc_khz, &mut lacks);
        }
        let room = vcpu::xsave_len(vm);
        for vcpu in &self.vcpus {
            host.compare(vcpu, &mut lacks);
            host.compare_tsc(vcpu.tsc_khz, tsc_khz, &mut lacks);
            if vcpu.xsave.len() > room {
                lacks.add(format!(
                    "its extended state has {} bytes, and {room} fit here",
                    vcpu.xsave.len()
                ));
            }
        }
        match lacks.sentence() {
            None => Ok(()),
            Some(clauses) => Err(StateError::Lacks { clauses }),
        }
    }

    /// Puts everything back into a VM that was made the same way and has not run, of which the memory is complete.
    /// `now_wall`: wall time here, since 1970.
    ///
    /// The guest's counters and its clock go on by what has passed on the wall since it was saved, 0 to 10 minutes; all
    /// vCPUs' counters by the same. The wall clocks are two hosts': by as much as this host's is ahead of the source's,
    /// too much passes, by as much as it is behind, too little, and what the guest takes for the time is off by that
    /// until it asks somebody. Nothing ever goes back, as less than nothing counts as nothing.
    ///
    /// # Errors
    /// The VM is filled in part, and of no use.
    pub(crate) fn restore(&self, vm: &VmFd, vmm: &dyn Vmm, now_wall: Duration) -> Result<(), StateError> {
        let downtime = now_wall.saturating_sub(self.saved_at).min(DOWNTIME_MAX);
        let mut counters = Counters::new(downtime);
        let mut restored = 0;
        self.vm.restore_clock(vm, downtime)?;
        each_vcpu(vmm, |number, fd| {
            let vcpu = self.vcpus.get(number);
            restored += 1;
            vcpu.map_or(Ok(()), |vcpu| vcpu.restore(number, vm, fd, &mut counters))
        })?;
        if restored != self.vcpus.len() {
            let clauses = format!("it has {} vCPUs, and this VM {restored}", self.vcpus.len());
            return Err(StateError::Lacks { clauses });
        }
        self.vm.restore_devices(vm)
    }
}
