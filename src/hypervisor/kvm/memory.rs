//! The guest's memory, by blocks as the migration stream names them.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::proto::page::PAGE_SIZE;

/// A stretch of guest memory: one region of the memory map, one slot of KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its name in the stream; the same at both ends. 1 to 255 bytes.
    pub name: String,
    /// KVM's number of its slot (`KVM_SET_USER_MEMORY_REGION`).
    pub slot: u32,
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Bytes, whole pages.
    pub len: u64,
}

impl Block {
    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE as u64
    }
}

/// Memory of a guest that may run while it is read. What is read while the guest writes may be torn; the page is dirty then, and is read again.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    blocks: Vec<Block>,
}

/// A memory map that cannot be migrated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RamError {
    /// A slot for each region is needed.
    #[error("There are {regions} regions of guest memory and {slots} slots are named.")]
    Slots {
        /// Regions of the map.
        regions: usize,
        /// Slots that were given.
        slots: usize,
    },
    /// Dirty tracking is by pages.
    #[error("The guest memory at {guest_address:#x} does not consist of whole pages of 4 KiB.")]
    NotPages {
        /// Where it begins.
        guest_address: u64,
    },
}

impl GuestRam {
    /// A map of which region `n`, in the order of addresses, is KVM's slot `slots[n]` and is called `ram<n>` in the stream. Only what goes with the guest is in
    /// it: a ROM that the destination has as well is not.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn new(memory: GuestMemoryMmap, slots: &[u32]) -> Result<Self, RamError> {
        let regions = memory.num_regions();
        if slots.len() != regions {
            return Err(RamError::Slots {
                regions,
                slots: slots.len(),
            });
        }
        let mut blocks = Vec::with_capacity(regions);
        for (number, (region, &slot)) in memory.iter().zip(slots).enumerate() {
            let block = Block {
                name: format!("ram{number}"),
                slot,
                guest_address: region.start_addr().0,
                len: region.len(),
            };
            let page = PAGE_SIZE as u64;
            if !block.guest_address.is_multiple_of(page) || !block.len.is_multiple_of(page) {
                return Err(RamError::NotPages {
                    guest_address: block.guest_address,
                });
            }
            blocks.push(block);
        }
        Ok(Self { memory, blocks })
    }

    /// Its blocks, by address.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Bytes of all blocks.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Reads page `page` of block `block`.
    ///
    /// # Panics
    /// Where there is no such page.
    pub fn read(&self, block: usize, page: u64, into: &mut [u8; PAGE_SIZE]) {
        let (region, at) = self.place(block, page);
        region.read_slice(into, at).expect("a page inside of a block");
    }

    /// Writes page `page` of block `block`.
    ///
    /// # Panics
    /// Where there is no such page.
    pub fn write(&self, block: usize, page: u64, content: &[u8; PAGE_SIZE]) {
        let (region, at) = self.place(block, page);
        region.write_slice(content, at).expect("a page inside of a block");
    }

    /// Where a block is in this process.
    pub(super) fn host_address(&self, block: usize) -> u64 {
        self.place(block, 0).0.as_ptr() as u64
    }

    fn place(&self, block: usize, page: u64) -> (&vm_memory::GuestRegionMmap, MemoryRegionAddress) {
        let address = GuestAddress(self.blocks[block].guest_address);
        let region = self.memory.find_region(address).expect("a block is a region");
        (region, MemoryRegionAddress(page * PAGE_SIZE as u64))
    }
}
