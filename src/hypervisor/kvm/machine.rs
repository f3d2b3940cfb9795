//! A guest of KVM and the process around it, as the engine moves them.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VmFd};

use super::dirty::{DirtyError, DirtyLog};
use super::memory::GuestRam;
use super::migration::Guidance;
use super::monitor::CpuFeature;
use super::mover::{MoveError, Mover};
use super::page_map::PageMap;
use super::state::WORDS;
use super::stream::StreamError;
use super::vmm::{Vmm, VmmError};
use super::{clock, receiving, sending, state};
use crate::proto::page::PAGE_SIZE;

/// A guest that can be moved.
pub struct Machine {
    pub(super) kvm: Kvm,
    pub(super) vm: Arc<VmFd>,
    pub(super) ram: GuestRam,
    pub(super) vmm: Arc<dyn Vmm>,
    /// Whoever has it keeps the log of what the guest writes. One that was left in it is still kept by KVM, and of no use any more.
    log: Mutex<Option<DirtyLog>>,
    /// Somebody else needs the log.
    log_is_wanted: AtomicBool,
}

/// Between two looks of a sample at whether somebody needs the log.
const SAMPLE_LOOK: Duration = Duration::from_millis(20);

impl Machine {
    /// The guest of `vm`, as `vmm` runs it.
    ///
    /// # Safety
    /// Each block of `ram` is the slot of `vm` that it names: read-write, at that guest address, of that length, on that memory, and logged by nobody else. No
    /// other slot has any of this memory. Memory that is added to the VM later does not go with the guest.
    #[must_use]
    #[expect(
        unsafe_code,
        reason = "KVM is told of these slots again when what is written to them is to be logged"
    )]
    pub unsafe fn new(kvm: Kvm, vm: Arc<VmFd>, ram: GuestRam, vmm: Arc<dyn Vmm>) -> Self {
        Self {
            kvm,
            vm,
            ram,
            vmm,
            log: Mutex::new(None),
            log_is_wanted: AtomicBool::new(false),
        }
    }

    fn start_log(&self) -> Result<DirtyLog, DirtyError> {
        let log = DirtyLog::start(Arc::clone(&self.vm), self.ram.clone())?;
        // What the devices wrote before the log began is in a first pass, and not in a rate.
        self.vmm.take_device_writes(&mut |_, _| {});
        Ok(log)
    }
}

impl Mover for Machine {
    fn send(
        &self,
        stream: &UnixStream,
        guidance: &Guidance,
        stop: &mut dyn FnMut() -> Result<(), MoveError>,
    ) -> Result<(), MoveError> {
        // A sample that is under way ends early.
        self.log_is_wanted.store(true, Ordering::Relaxed);
        let mut held = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        self.log_is_wanted.store(false, Ordering::Relaxed);
        drop(held.take());
        let log = self.start_log()?;
        sending::send(self, &log, stream, guidance, stop)?;
        // To end a log takes time, and the guest waits for whoever is told next that it was sent.
        *held = Some(log);
        Ok(())
    }

    fn receive(&self, stream: &UnixStream) -> Result<(), MoveError> {
        receiving::receive(self, stream)
    }

    fn dirty_rate(&self, period: Duration) -> Result<Option<u64>, MoveError> {
        let Ok(mut held) = self.log.try_lock() else {
            return Ok(None);
        };
        drop(held.take());
        let log = self.start_log()?;
        let begun = clock::now();
        let end = begun + period;
        while clock::now() < end && !self.log_is_wanted.load(Ordering::Relaxed) {
            clock::wait_until(end.min(clock::now() + SAMPLE_LOOK));
        }
        let mut dirty = PageMap::empty(self.ram.blocks());
        log.sync(&mut dirty)?;
        self.add_device_writes(&mut dirty);
        let time = clock::now().saturating_duration_since(begun);
        if time < period / 2 {
            return Ok(None);
        }
        let seconds = time.as_secs_f64().max(1e-3);
        Ok(Some((dirty.count() as f64 * PAGE_SIZE as f64 / seconds) as u64))
    }
}

impl Machine {
    /// What the guest may use of its CPU, by CPUID: what a destination has to have as well.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn cpu_features(&self) -> Result<Vec<CpuFeature>, VmmError> {
        let mut features = Vec::new();
        self.vmm.visit_vcpus(&mut |number, vcpu| {
            if number > 0 {
                return Ok(());
            }
            let entries = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
            let entries = entries.map_err(|error| VmmError(format!("KVM does not tell a vCPU's CPUID: {error}")))?;
            for word in WORDS.iter().filter(|word| !word.is_conditional()) {
                let is_it = |entry: &&kvm_cpuid_entry2| entry.function == word.function && entry.index == word.index;
                let Some(entry) = entries.as_slice().iter().find(is_it) else {
                    continue;
                };
                features.push(CpuFeature {
                    leaf: word.function,
                    subleaf: word.index,
                    register: word.register,
                    bits: word.of(entry) & word.features(),
                });
            }
            Ok(())
        })?;
        Ok(features)
    }

    /// Adds what the VMM's devices have written.
    pub(super) fn add_device_writes(&self, dirty: &mut PageMap) {
        self.vmm.take_device_writes(&mut |address, len| {
            for (number, block) in self.ram.blocks().iter().enumerate() {
                let end = address.saturating_add(len).min(block.guest_address + block.len);
                let start = address.max(block.guest_address);
                if start < end {
                    dirty.add_bytes(number, start - block.guest_address, end - start);
                }
            }
        });
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("ram", &self.ram.blocks())
            .finish_non_exhaustive()
    }
}

impl From<DirtyError> for MoveError {
    fn from(error: DirtyError) -> Self {
        Self(error.to_string())
    }
}

impl From<VmmError> for MoveError {
    fn from(error: VmmError) -> Self {
        Self(error.0)
    }
}

impl From<StreamError> for MoveError {
    fn from(error: StreamError) -> Self {
        Self(error.to_string())
    }
}

impl From<state::StateError> for MoveError {
    fn from(error: state::StateError) -> Self {
        Self(error.to_string())
    }
}
