//! The time stamp counters of the vCPUs, which stay equal to each other as exactly as KVM can.

#![expect(unsafe_code, reason = "kvm-ioctls has no attributes of a vCPU on x86")]

use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr};
use kvm_ioctls::VcpuFd;

use super::StateError;
use super::msrs::{self, TSC};
use super::vcpu::VcpuState;

const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// Guest ticks = host ticks (scaled) + offset, modulo 2^64. `None` where KVM does not tell (before Linux 5.16).
pub(super) fn offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    attribute(fd, KVM_GET_DEVICE_ATTR, &mut offset).ok()?;
    Some(offset)
}

fn set_offset(fd: &VcpuFd, mut offset: u64) -> Result<(), kvm_ioctls::Error> {
    attribute(fd, KVM_SET_DEVICE_ATTR, &mut offset)
}

fn attribute(fd: &VcpuFd, request: libc::c_ulong, value: &mut u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
    };
    // SAFETY: `fd` is open. Both requests read the structure, and read or write the 8 bytes at `addr`, which outlive
    // the call.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_ref(&attribute)) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

/// What the counter of a vCPU shows that KVM cannot set, although it says so (without hardware virtualisation it is the
/// host's). `None`: it can be set. The vCPU is of no use afterwards.
pub(super) fn fixed(fd: &VcpuFd) -> Option<u64> {
    const FAR: u64 = 1 << 40;
    let before = read(fd)?;
    set(0, fd, before.wrapping_add(FAR)).ok()?;
    let after = read(fd)?;
    (after.wrapping_sub(before) < FAR / 2).then_some(after)
}

fn read(fd: &VcpuFd) -> Option<u64> {
    msrs::read(fd, &[TSC]).first().map(|&(_, now)| now)
}

/// Sets a counter, and returns the offset that this is, if KVM tells.
fn set(number: usize, fd: &VcpuFd, tsc: u64) -> Result<Option<u64>, StateError> {
    if let (Some(here), Some(now)) = (offset(fd), read(fd)) {
        let offset = here.wrapping_add(tsc.wrapping_sub(now));
        set_offset(fd, offset).map_err(failed(number))?;
        return Ok(Some(offset));
    }
    msrs::write(number, fd, &[(TSC, tsc)])?;
    Ok(None)
}

fn failed(vcpu: usize) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |errno| StateError::Vcpu {
        doing: "set the TSC",
        vcpu,
        errno,
    }
}

/// How the counters are put back: the first vCPU's goes on from where it was, by the downtime later, and the others
/// keep their distance to it.
#[derive(Debug)]
pub(super) struct Counters {
    downtime: Duration,
    first: Option<First>,
}

#[derive(Debug)]
struct First {
    /// What was saved.
    saved: u64,
    saved_offset: Option<u64>,
    khz: u32,
    /// What was set.
    tsc: u64,
    offset: Option<u64>,
}

impl Counters {
    pub(super) fn new(downtime: Duration) -> Self {
        Self { downtime, first: None }
    }

    /// Sets the counter of the next vCPU, from 0 on. Its frequency is set already.
    pub(super) fn restore(&mut self, number: usize, fd: &VcpuFd, vcpu: &VcpuState) -> Result<(), StateError> {
        let Some(saved) = vcpu.msr(TSC) else { return Ok(()) };
        let Some(first) = &self.first else {
            let khz = match vcpu.tsc_khz {
                0 => fd.get_tsc_khz().unwrap_or(0),
                khz => khz,
            };
            let tsc = saved.wrapping_add(ticks(self.downtime, khz));
            let offset = set(number, fd, tsc)?;
            self.first = Some(First {
                saved,
                saved_offset: vcpu.tsc_offset,
                khz,
                tsc,
                offset,
            });
            return Ok(());
        };
        let distance = first.distance(saved, vcpu);
        match first.offset {
            Some(offset) => set_offset(fd, offset.wrapping_add(distance)).map_err(failed(number)),
            // KVM makes counters equal that are set to nearly the same one after the other.
            None => msrs::write(number, fd, &[(TSC, first.tsc.wrapping_add(distance))]),
        }
    }
}

impl First {
    /// Ticks by which another counter was ahead, modulo 2^64.
    fn distance(&self, saved: u64, vcpu: &VcpuState) -> u64 {
        match (self.saved_offset, vcpu.tsc_offset) {
            (Some(first), Some(offset)) if vcpu.tsc_khz == self.khz => offset.wrapping_sub(first),
            // They were read one after the other: less than a second is that.
            _ => {
                let apart = saved.wrapping_sub(self.saved);
                let second = u64::from(self.khz) * 1000;
                match apart.cast_signed().unsigned_abs() < second {
                    true => 0,
                    false => apart,
                }
            }
        }
    }
}

/// Ticks in `time`.
pub(super) fn ticks(time: Duration, khz: u32) -> u64 {
    let ticks = time.as_nanos() * u128::from(khz) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_minutes_at_three_gigahertz_are_counted_without_overflow() {
        assert_eq!(ticks(Duration::from_secs(600), 3_000_000), 1_800_000_000_000);
        assert_eq!(ticks(Duration::MAX, u32::MAX), u64::MAX);
    }

    #[test]
    fn counters_that_were_read_one_after_the_other_are_equal_and_others_keep_their_distance() {
        let first = First {
            saved: 1000,
            saved_offset: None,
            khz: 1_000_000,
            tsc: 0,
            offset: None,
        };
        let vcpu = VcpuState::default();
        assert_eq!(first.distance(900_000, &vcpu), 0);
        assert_eq!(first.distance(5_000_001_000, &vcpu), 5_000_000_000);
        let exact = First {
            saved_offset: Some(10),
            ..first
        };
        let vcpu = VcpuState {
            tsc_khz: 1_000_000,
            tsc_offset: Some(7),
            ..VcpuState::default()
        };
        assert_eq!(exact.distance(900_000, &vcpu), 3u64.wrapping_neg());
    }
}
