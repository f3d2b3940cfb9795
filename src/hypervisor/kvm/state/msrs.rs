//! Model-specific registers: which there are, and how many of them at once.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::StateError;

/// The time stamp counter.
pub(super) const TSC: u32 = 0x10;
/// When the local APIC's timer fires, in ticks of the counter. Held only while the timer is in that mode.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// Comes and goes with the special registers.
const APIC_BASE: u32 = 0x1b;

/// Registers of a call (`KVM_MAX_MSR_ENTRIES`).
const AT_ONCE: usize = 256;

/// Registers that KVM keeps and does not list: memory types, machine checks (32 banks), debug control.
fn unlisted() -> impl Iterator<Item = u32> {
    let fixed = [
        TSC,
        0x179,
        0x17a,
        0x17b,
        0x1d9,
        0x250,
        0x258,
        0x259,
        0x277,
        0x2ff,
        TSC_DEADLINE,
        0x4d0,
    ];
    fixed
        .into_iter()
        .chain(0x200..0x210)
        .chain(0x268..0x270)
        .chain(0x400..0x480)
}

/// Every register that a guest on this host may have.
pub(super) fn known(kvm: &Kvm) -> Result<Vec<u32>, StateError> {
    let listed = kvm.get_msr_index_list().map_err(|errno| StateError::Host {
        doing: "list the model-specific registers",
        errno,
    })?;
    let mut known: Vec<u32> = listed.as_slice().iter().copied().chain(unlisted()).collect();
    known.sort_unstable();
    known.dedup();
    known.retain(|&index| index != APIC_BASE);
    Ok(known)
}

/// Those of `indices` that can be read.
pub(super) fn read(fd: &VcpuFd, indices: &[u32]) -> Vec<(u32, u64)> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(AT_ONCE)];
        let Some(mut msrs) = entries(chunk.iter().map(|&index| (index, 0))) else {
            break;
        };
        let got = fd.get_msrs(&mut msrs).unwrap_or(0).min(chunk.len());
        values.extend(msrs.as_slice()[..got].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that it cannot read.
        let done = if got < chunk.len() { got + 1 } else { got };
        rest = &rest[done..];
    }
    values
}

/// Sets registers in order. One that cannot be set is fine where it has the value already, and one that is 0 where
/// there is none such.
pub(super) fn write(vcpu: usize, fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), StateError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(AT_ONCE)];
        let Some(msrs) = entries(chunk.iter().copied()) else {
            break;
        };
        let set = fd.set_msrs(&msrs).unwrap_or(0).min(chunk.len());
        rest = &rest[set..];
        if set == chunk.len() {
            continue;
        }
        let (index, value) = rest[0];
        let here = read(fd, &[index]).first().map(|&(_, here)| here);
        if here.unwrap_or(0) != value {
            return Err(StateError::Msr {
                vcpu,
                index,
                value,
                here,
            });
        }
        rest = &rest[1..];
    }
    Ok(())
}

/// `None` only for more than [`AT_ONCE`].
fn entries(values: impl Iterator<Item = (u32, u64)>) -> Option<Msrs> {
    let entries: Vec<_> = values
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).ok()
}
