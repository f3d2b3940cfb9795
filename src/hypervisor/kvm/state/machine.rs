//! What KVM knows of the machine besides its vCPUs.

#![expect(unsafe_code, reason = "an interrupt controller is a union of KVM's")]

use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_irqchip__bindgen_ty_1, kvm_pit_state2,
};
use kvm_ioctls::{Cap, VmFd};

use super::{StateError, is_absent};

/// Interrupt controllers, timer and clock. What the VMM has not created is not there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct VmState {
    pub(super) chips: Vec<Chip>,
    pub(super) pit: Option<kvm_pit_state2>,
    /// Only `clock` is used: ns since the guest was started, without the time that it stood.
    pub(super) clock: Option<kvm_clock_data>,
}

/// An interrupt controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chip {
    /// `KVM_IRQCHIP_PIC_MASTER`, `_SLAVE` or `_IOAPIC`.
    pub(super) id: u32,
    pub(super) bytes: Box<[u8; 512]>,
}

impl Default for Chip {
    fn default() -> Self {
        Self {
            id: 0,
            bytes: Box::new([0; 512]),
        }
    }
}

impl Chip {
    /// How many there are.
    pub(super) const COUNT: u32 = 3;

    fn get(vm: &VmFd, id: u32) -> Result<Self, kvm_ioctls::Error> {
        let mut raw = kvm_irqchip {
            chip_id: id,
            pad: 0,
            chip: kvm_irqchip__bindgen_ty_1 { dummy: [0; 512] },
        };
        vm.get_irqchip(&mut raw)?;
        // SAFETY: All 512 bytes were zeros, and KVM has written over some; any byte is an `i8`.
        let dummy = unsafe { raw.chip.dummy };
        Ok(Self {
            id,
            bytes: Box::new(dummy.map(i8::cast_unsigned)),
        })
    }

    fn set(&self, vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
        vm.set_irqchip(&kvm_irqchip {
            chip_id: self.id,
            pad: 0,
            chip: kvm_irqchip__bindgen_ty_1 {
                dummy: self.bytes.map(u8::cast_signed),
            },
        })
    }
}

fn at(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |errno| StateError::Vm { doing, errno }
}

/// `None` where the VM has no such thing.
fn present<T>(doing: &'static str, got: Result<T, kvm_ioctls::Error>) -> Result<Option<T>, StateError> {
    match got {
        Ok(state) => Ok(Some(state)),
        Err(errno) if is_absent(errno) => Ok(None),
        Err(errno) => Err(StateError::Vm { doing, errno }),
    }
}

impl VmState {
    pub(super) fn save(vm: &VmFd) -> Result<Self, StateError> {
        let mut chips = Vec::new();
        for id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            chips.extend(present("read an interrupt controller", Chip::get(vm, id))?);
        }
        let pit = present("read the PIT", vm.get_pit2())?.map(|mut pit| {
            // Of the host's own clock.
            pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
            pit.reserved = [0; 9];
            pit
        });
        let clock = match vm.check_extension(Cap::AdjustClock) {
            true => {
                let clock = vm.get_clock().map_err(at("read the clock"))?.clock;
                Some(kvm_clock_data {
                    clock,
                    ..Default::default()
                })
            }
            false => None,
        };
        Ok(Self { chips, pit, clock })
    }

    /// Before the vCPUs: with kvmclock's registers KVM writes into the guest's memory what follows from the clock.
    pub(super) fn restore_clock(&self, vm: &VmFd, downtime: Duration) -> Result<(), StateError> {
        let Some(saved) = self.clock else { return Ok(()) };
        let downtime = u64::try_from(downtime.as_nanos()).unwrap_or(u64::MAX);
        let clock = kvm_clock_data {
            clock: saved.clock.saturating_add(downtime),
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(at("set the clock"))
    }

    /// After the vCPUs: what the IOAPIC holds is delivered at once, to local APICs that have to be there.
    pub(super) fn restore_devices(&self, vm: &VmFd) -> Result<(), StateError> {
        for chip in &self.chips {
            chip.set(vm).map_err(at("set an interrupt controller"))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(at("set the PIT"))?;
        }
        Ok(())
    }

    /// What this one has that `here` has not, or the other way round.
    pub(super) fn differences(&self, here: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for (what, there, here) in [
            ("interrupt controllers", !self.chips.is_empty(), !here.chips.is_empty()),
            ("a PIT", self.pit.is_some(), here.pit.is_some()),
        ] {
            if there != here {
                let holder = if there { "the source" } else { "this VM" };
                found.push(format!("only {holder} has {what} in KVM"));
            }
        }
        found
    }
}
