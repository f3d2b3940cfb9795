//! What became of a batch: counted alike by both ends.

use std::ops::AddAssign;

/// Pages of a batch by how they were carried. Every page record is counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// All zeroes, whether the hypervisor said so or sent the zeroes.
    pub zero: u64,
    /// Identical to what was last sent for the same page.
    pub same: u64,
    /// Content that the dictionary holds.
    pub reference: u64,
    /// Sent as a difference from the page's previous version.
    pub delta: u64,
    /// Carried compressed.
    pub literal: u64,
    /// Carried as it is because compressing it did not pay.
    pub raw: u64,
}

/// What one batch, or a sum of them, was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchStats {
    /// Pages by encoding.
    pub pages: PageCounts,
    /// Bytes of vmm stream.
    pub bytes_in: u64,
    /// Bytes of payload.
    pub bytes_out: u64,
}

impl PageCounts {
    /// All of them.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.zero + self.same + self.reference + self.delta + self.literal + self.raw
    }
}

impl AddAssign for PageCounts {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.same += other.same;
        self.reference += other.reference;
        self.delta += other.delta;
        self.literal += other.literal;
        self.raw += other.raw;
    }
}

impl AddAssign for BatchStats {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
    }
}
