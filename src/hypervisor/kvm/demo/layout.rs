//! Where the demo guest has what, by guest address. Everything is below 2 GiB but the working set, which is the last
//! thing and goes as far as the memory.

use crate::proto::page::PAGE_SIZE;

/// Bytes of memory at least: what is before the working set, and as much again.
pub const SMALLEST_MEMORY: u64 = 2 * WORKING_SET;
/// Bytes of memory at most: above are devices.
pub const LARGEST_MEMORY: u64 = 3 << 30;
/// vCPUs at most: their counters share one page.
pub const MOST_VCPUS: usize = PAGE_SIZE / COUNTERS_SIZE as usize;

/// Segment descriptors.
pub(super) const GDT: u64 = 0x1000;
/// Interrupt gates.
pub(super) const IDT: u64 = 0x2000;
/// The root of the page tables, their second level, and four tables of 2 MiB pages: all of the first 4 GiB, where each
/// address is itself.
pub(super) const PAGE_TABLES: u64 = 0x3000;
/// The page of [`parameter`]s.
pub(super) const PARAMETERS: u64 = 0x9000;
/// [`COUNTERS_SIZE`] bytes for each vCPU.
pub(super) const COUNTERS: u64 = 0xa000;
/// The payload.
pub(super) const CODE: u64 = 0x1_0000;
/// A page for each vCPU.
pub(super) const STACKS: u64 = 0x2_0000;
/// The generation of each page of the working set, 32 bits.
pub(super) const TABLE: u64 = 0x20_0000;
/// The working set.
pub(super) const WORKING_SET: u64 = 0x100_0000;

/// Offsets in the page of parameters, each of 64 bits.
pub(super) mod parameter {
    /// [`super::MAGIC`].
    pub(in super::super) const MAGIC: usize = 0x00;
    /// vCPUs.
    pub(in super::super) const VCPUS: usize = 0x08;
    /// Pages of the working set.
    pub(in super::super) const PAGES: usize = 0x10;
    /// Words that are written into a page.
    pub(in super::super) const WORDS: usize = 0x18;
    /// Bytes from one of them to the next.
    pub(in super::super) const STRIDE: usize = 0x20;
    /// TSC cycles from one page to the next; 0: no pause.
    pub(in super::super) const INTERVAL: usize = 0x28;
    /// TSC cycles in a second.
    pub(in super::super) const SECOND: usize = 0x30;
    /// Share of the writes that go to the first tenth, of 65536; 0: to each page in turn.
    pub(in super::super) const SKEW: usize = 0x38;
    /// What the words are derived from.
    pub(in super::super) const SEED: usize = 0x40;
    /// Whether generation 0 of a page is zero instead of words.
    pub(in super::super) const IS_BLANK: usize = 0x48;
    /// TSC cycles from one sign of life to the next; 0: it makes none.
    pub(in super::super) const SIGN: usize = 0x80;
    // From here on the guest does not look: the dials as the operator turned them.
    /// Pages per second.
    pub(in super::super) const RATE: usize = 0x50;
    /// Percent.
    pub(in super::super) const SKEW_PERCENT: usize = 0x58;
    /// Bytes per page.
    pub(in super::super) const BYTES: usize = 0x60;
    /// What the pages begin as.
    pub(in super::super) const CONTENT: usize = 0x68;
    /// Percent of the pages that are random whatever the others are.
    pub(in super::super) const RANDOM_PERCENT: usize = 0x70;
    /// Nanoseconds from one sign of life to the next.
    pub(in super::super) const BEAT: usize = 0x78;
}

/// Offsets in the counters of a vCPU, each of 64 bits.
pub(super) mod counter {
    /// Pages that it has written.
    pub(in super::super) const PAGES: usize = 0x00;
    /// Pages that were not what it had written before, and sums of the table that were not its number of writes.
    pub(in super::super) const ERRORS: usize = 0x08;
    /// Lines written; vCPU 0 only.
    pub(in super::super) const BEATS: usize = 0x10;
    /// Interrupts of its timer.
    pub(in super::super) const TICKS: usize = 0x18;
    /// Sum of the generations of its pages, as its register has it.
    pub(in super::super) const SUM: usize = 0x20;
    /// The page that it writes, or wrote last: number in the working set.
    pub(in super::super) const WRITING: usize = 0x28;
    /// TSC at which the next line is due.
    pub(in super::super) const NEXT_BEAT: usize = 0x30;
    /// Pages of its first tenth.
    pub(in super::super) const HOT: usize = 0x38;
    /// Its number.
    pub(in super::super) const NUMBER: usize = 0x40;
    /// Signs of life; vCPU 0 only.
    pub(in super::super) const SIGNS: usize = 0x48;
    /// TSC at which the next one is due.
    pub(in super::super) const NEXT_SIGN: usize = 0x50;
}

/// The port to which the guest writes when it makes a sign of life.
pub(super) const SIGN_PORT: u16 = 0x500;
/// Bytes of the counters of a vCPU.
pub(super) const COUNTERS_SIZE: u64 = 0x100;
/// Says that there is a demo guest in this memory, of this version.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"longhau1");

/// The part of `pages` pages that vCPU `number` of `vcpus` owns: its first one and their count.
pub(super) fn share(pages: u64, vcpus: usize, number: usize) -> (u64, u64) {
    let (vcpus, number) = (vcpus as u64, number as u64);
    let first = pages * number / vcpus;
    (first, pages * (number + 1) / vcpus - first)
}
