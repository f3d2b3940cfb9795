//! Which pages the guest has written: KVM's dirty log, with manual protection where the kernel has it.
//!
//! Who owns a bit: KVM, until [`DirtyLog::sync`] has taken it into the map of whoever asks; that one, until the page was read after
//! [`DirtyLog::protect`]. A page that is written in between is in KVM's log again, or has the newer content already. A migration that fails takes its map with
//! it: the next one begins with every page, so no bit can be missed.
//!
//! What the VMM's own devices write is not in KVM's log: [`Vmm::take_device_writes`](super::Vmm::take_device_writes) tells of it.

#![expect(
    unsafe_code,
    reason = "slots of guest memory and one ioctl that kvm-ioctls does not have"
)]

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::memory::GuestRam;
use super::page_map::{PageMap, WORD_PAGES};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`: reading the log does not protect pages again, [`KVM_CLEAR_DIRTY_LOG`] does.
const MANUAL_PROTECT: u64 = 1;

/// The kernel cannot keep the log, or not read it.
#[derive(Debug, thiserror::Error)]
pub(super) enum DirtyError {
    /// Of one slot.
    #[error("KVM does not log what is written to slot {slot} of the guest's memory ({at}): {error}")]
    Slot {
        /// The slot.
        slot: u32,
        /// At which step.
        at: &'static str,
        /// The kernel's answer.
        error: std::io::Error,
    },
}

/// The log of a whole guest, which is kept for as long as this is there.
#[derive(Debug)]
pub(super) struct DirtyLog {
    vm: Arc<VmFd>,
    ram: GuestRam,
    is_manual: bool,
}

impl DirtyLog {
    /// Begins to log: whatever is written from now on is in it.
    pub(super) fn start(vm: Arc<VmFd>, ram: GuestRam) -> Result<Self, DirtyError> {
        let is_manual = is_manual(&vm);
        let log = Self { vm, ram, is_manual };
        for block in 0..log.ram.blocks().len() {
            log.set_logging(block, true)?;
        }
        Ok(log)
    }

    /// Adds what was written since the last time to `dirty`; with manual protection also what was written before and not protected since.
    pub(super) fn sync(&self, dirty: &mut PageMap) -> Result<(), DirtyError> {
        for (number, block) in self.ram.blocks().iter().enumerate() {
            // A page count beyond what this host can address does not come out of a map of its memory.
            let len = usize::try_from(block.len).unwrap_or(usize::MAX);
            let log = self
                .vm
                .get_dirty_log(block.slot, len)
                .map_err(|error| self.failed(number, "reading its log", error))?;
            dirty.add(number, &log);
        }
        Ok(())
    }

    /// Makes KVM notice what is written from now on to those pages whose bits are set, from word `word` of a block on: to be called between
    /// [`DirtyLog::sync`] and the reading of them. Each call interrupts every vCPU, so it is worth it for many pages at once.
    pub(super) fn protect(&self, block: usize, word: usize, bits: &[u64]) -> Result<(), DirtyError> {
        if !self.is_manual {
            return Ok(());
        }
        let first = word as u64 * WORD_PAGES;
        let pages = self.ram.blocks()[block].pages() - first;
        let clear = kvm_clear_dirty_log {
            slot: self.ram.blocks()[block].slot,
            num_pages: pages.min(bits.len() as u64 * WORD_PAGES) as u32,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: bits.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the kernel reads a bit for each of `num_pages` pages, which are in `bits`, and `vm` is a KVM file.
        let answer = unsafe { ioctl_with_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG(), &clear) };
        match answer {
            0 => Ok(()),
            _ => Err(self.failed(block, "protecting its pages", kvm_ioctls::Error::last())),
        }
    }

    fn set_logging(&self, block: usize, is_on: bool) -> Result<(), DirtyError> {
        let place = &self.ram.blocks()[block];
        let region = kvm_userspace_memory_region {
            slot: place.slot,
            flags: if is_on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: place.guest_address,
            memory_size: place.len,
            userspace_addr: self.ram.host_address(block),
        };
        // SAFETY: the slot stays what it is, and `ram` keeps its memory mapped.
        let set = unsafe { self.vm.set_user_memory_region(region) };
        set.map_err(|error| self.failed(block, "changing its flags", error))
    }

    fn failed(&self, block: usize, at: &'static str, error: kvm_ioctls::Error) -> DirtyError {
        DirtyError::Slot {
            slot: self.ram.blocks()[block].slot,
            at,
            error: error.into(),
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        for block in 0..self.ram.blocks().len() {
            if let Err(error) = self.set_logging(block, false) {
                tracing::warn!("{error}");
            }
        }
    }
}

/// Whether pages are protected one by one. Once switched on it stays so for the VM: whoever reads the log beside the engine has to clear it as well.
fn is_manual(vm: &VmFd) -> bool {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        ..Default::default()
    };
    cap.args[0] = MANUAL_PROTECT;
    vm.enable_cap(&cap).is_ok()
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    const CODE: u64 = 0x1000;
    const HIGH: u64 = 0x1000_0000;
    /// Pages of the two regions: neither fills its last word.
    const PAGES: [u64; 2] = [100, 70];

    /// A machine that writes where it is told.
    struct Writer {
        vm: Arc<VmFd>,
        vcpu: VcpuFd,
        ram: GuestRam,
    }

    impl Writer {
        /// `None`, where there is no KVM.
        fn new() -> Option<Self> {
            let kvm = Kvm::new()
                .inspect_err(|error| println!("SKIP: /dev/kvm: {error}"))
                .ok()?;
            let vm = Arc::new(kvm.create_vm().unwrap());
            let ranges = [
                (GuestAddress(0), PAGES[0] as usize * 4096),
                (GuestAddress(HIGH), PAGES[1] as usize * 4096),
            ];
            let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
            // mov [0], al; hlt
            memory
                .write_slice(&[0xa2, 0x00, 0x00, 0xf4], GuestAddress(CODE))
                .unwrap();
            let ram = GuestRam::new(memory, &[3, 5]).unwrap();
            for (number, block) in ram.blocks().iter().enumerate() {
                let region = kvm_userspace_memory_region {
                    slot: block.slot,
                    flags: 0,
                    guest_phys_addr: block.guest_address,
                    memory_size: block.len,
                    userspace_addr: ram.host_address(number),
                };
                // SAFETY: `ram` is kept beside the VM.
                unsafe { vm.set_user_memory_region(region) }.unwrap();
            }
            let vcpu = vm.create_vcpu(0).unwrap();
            Some(Self { vm, vcpu, ram })
        }

        fn write(&mut self, block: usize, page: u64) {
            let mut sregs = self.vcpu.get_sregs().unwrap();
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            sregs.ds.base = self.ram.blocks()[block].guest_address + page * 4096;
            self.vcpu.set_sregs(&sregs).unwrap();
            let mut regs = self.vcpu.get_regs().unwrap();
            (regs.rip, regs.rflags) = (CODE, 2);
            self.vcpu.set_regs(&regs).unwrap();
            assert!(matches!(self.vcpu.run().unwrap(), VcpuExit::Hlt));
        }

        fn log(&self) -> DirtyLog {
            DirtyLog::start(Arc::clone(&self.vm), self.ram.clone()).unwrap()
        }

        /// Pages that a look finds.
        fn look(&self, log: &DirtyLog) -> Vec<(usize, u64)> {
            let mut dirty = PageMap::empty(self.ram.blocks());
            log.sync(&mut dirty).unwrap();
            let mut pages = Vec::new();
            for block in 0..PAGES.len() {
                for word in 0..dirty.words(block) {
                    let bits = super::super::page_map::set_bits(dirty.word(block, word));
                    pages.extend(bits.map(|bit| (block, word as u64 * WORD_PAGES + bit)));
                }
            }
            pages
        }
    }

    #[test]
    fn what_is_written_is_found_in_each_region_up_to_its_last_page() {
        let Some(mut writer) = Writer::new() else { return };
        let log = writer.log();
        assert_eq!(writer.look(&log), []);
        let written = [(0, 0), (0, 63), (0, 64), (0, 99), (1, 0), (1, 69)];
        for (block, page) in written {
            writer.write(block, page);
        }
        assert_eq!(writer.look(&log), written);
    }

    #[test]
    fn what_is_written_again_after_it_was_protected_is_found_again() {
        let Some(mut writer) = Writer::new() else { return };
        let log = writer.log();
        writer.write(1, 69);
        writer.write(1, 3);
        assert_eq!(writer.look(&log), [(1, 3), (1, 69)]);
        log.protect(1, 0, &[1 << 3]).unwrap();
        log.protect(1, 1, &[1 << 5]).unwrap();
        assert_eq!(writer.look(&log), []);
        writer.write(1, 69);
        assert_eq!(writer.look(&log), [(1, 69)]);
    }

    #[test]
    fn what_was_not_protected_is_not_lost() {
        let Some(mut writer) = Writer::new() else { return };
        let log = writer.log();
        writer.write(0, 70);
        assert_eq!(writer.look(&log), [(0, 70)]);
        // Written before its turn comes: its content is read after that, or it is found at the next look.
        writer.write(0, 70);
        log.protect(0, 1, &[1 << 6]).unwrap();
        writer.write(0, 70);
        assert_eq!(writer.look(&log), [(0, 70)]);
    }

    #[test]
    fn a_log_that_is_begun_again_has_nothing_of_the_one_before() {
        let Some(mut writer) = Writer::new() else { return };
        let log = writer.log();
        writer.write(0, 9);
        drop(log);
        writer.write(0, 10);
        let log = writer.log();
        assert_eq!(writer.look(&log), []);
        writer.write(0, 9);
        assert_eq!(writer.look(&log), [(0, 9)]);
    }
}
