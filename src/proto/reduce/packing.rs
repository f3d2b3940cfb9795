//! Where literal bytes go: into groups that are compressed, or beside them where compressing has lately not paid.

use crate::proto::page::PAGE_SIZE;

use super::effort::Effort;
use super::group::{Encoder, GROUP_BYTES};

/// Where literal bytes come from. What was incompressible is remembered by origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Bytes of the stream that are not pages.
    Opaque,
    /// What changed in pages.
    Edits,
    /// Pages of a region that nobody remembers.
    Unremembered,
    /// Pages of this region.
    Region(u32),
}

/// Gathers literal bytes into groups and codes each when it is full.
pub(super) struct Packer {
    encoder: Encoder,
    /// Content of the group that is not yet full.
    group: Vec<u8>,
    /// Pages that begin in this group.
    group_pages: u64,
    /// Bytes in this group by origin.
    shares: Vec<(Origin, usize)>,
    patience: Patience,
    /// What a page has taken of late.
    page_bytes: usize,
    packed: Packed,
}

/// What has been packed since the batch began.
#[derive(Debug, Default)]
pub(super) struct Packed {
    /// The groups, as they go into the payload.
    pub(super) coded: Vec<u8>,
    /// Bytes of content in them.
    pub(super) content_len: usize,
    /// Pages that begin in a group which compressing made smaller.
    pub(super) compressed_pages: u64,
    /// Pages that begin in another.
    pub(super) stored_pages: u64,
}

impl Packer {
    pub(super) fn new() -> Self {
        Self {
            encoder: Encoder::new(),
            group: Vec::with_capacity(GROUP_BYTES),
            group_pages: 0,
            shares: Vec::new(),
            patience: Patience::default(),
            page_bytes: PAGE_SIZE / 2,
            packed: Packed::default(),
        }
    }

    /// How hard to compress from now on.
    pub(super) fn set_effort(&mut self, effort: Effort) {
        if self.encoder.set_effort(effort) {
            // A stronger codec may do what the weaker could not.
            self.patience = Patience::default();
        }
    }

    /// About how many bytes a page of `origin` takes as a literal, by those of late.
    pub(super) fn expected_page(&self, origin: Origin) -> usize {
        if self.patience.is_over(origin) {
            PAGE_SIZE
        } else {
            self.page_bytes
        }
    }

    /// Whether `content` (at most [`GROUP_BYTES`]) is worth packing.
    pub(super) fn is_worth_packing(&mut self, origin: Origin, content: &[u8]) -> bool {
        match self.patience.next(origin) {
            Attempt::Pack => true,
            Attempt::Skip => false,
            // A page's edits are too few to be judged by themselves.
            Attempt::Probe if origin == Origin::Edits => {
                self.patience.learn(origin, true);
                true
            }
            Attempt::Probe => {
                let pays = self.encoder.would_pay(content);
                self.patience.learn(origin, pays);
                pays
            }
        }
    }

    pub(super) fn push_page(&mut self, origin: Origin, content: &[u8]) {
        self.group_pages += 1;
        self.push(origin, content);
    }

    pub(super) fn push(&mut self, origin: Origin, mut content: &[u8]) {
        while let Some(head) = content.split_off(..content.len().min(GROUP_BYTES - self.group.len()))
            && !head.is_empty()
        {
            self.group.extend_from_slice(head);
            match self.shares.last_mut() {
                Some((last, bytes)) if *last == origin => *bytes += head.len(),
                _ => self.shares.push((origin, head.len())),
            }
            if self.group.len() == GROUP_BYTES {
                self.close_group();
            }
        }
    }

    /// Ends the batch's packing: what it came to, until the next batch begins with [`Self::clear`].
    pub(super) fn finish(&mut self) -> &Packed {
        if !self.group.is_empty() {
            self.close_group();
        }
        &self.packed
    }

    pub(super) fn clear(&mut self) {
        let mut coded = std::mem::take(&mut self.packed.coded);
        coded.clear();
        self.packed = Packed {
            coded,
            ..Packed::default()
        };
    }

    fn close_group(&mut self) {
        let before = self.packed.coded.len();
        let pays = self.encoder.encode(&self.group, &mut self.packed.coded);
        let coded = self.packed.coded.len() - before;
        if self.group_pages > 0 {
            let page_bytes = (PAGE_SIZE * coded / self.group.len()).min(PAGE_SIZE);
            self.page_bytes = (3 * self.page_bytes + page_bytes) / 4;
        }
        self.packed.content_len += self.group.len();
        if pays {
            self.packed.compressed_pages += self.group_pages;
        } else {
            self.packed.stored_pages += self.group_pages;
        }
        // A share too small to have decided the group says nothing about its origin. Nor does a small group: the tail
        // of a batch, or a few headers.
        if !pays && self.group.len() >= TELLING_BYTES {
            for &(origin, bytes) in &self.shares {
                let telling = if origin == Origin::Edits { 2 } else { 8 };
                if bytes * telling >= self.group.len() {
                    self.patience.learn(origin, false);
                }
            }
        }
        self.group.clear();
        self.group_pages = 0;
        self.shares.clear();
    }
}

/// Groups shorter than this teach nothing.
const TELLING_BYTES: usize = 4096;

/// Remembers by origin that compressing did not pay, and tries again now and then.
#[derive(Debug, Default)]
struct Patience {
    /// By origin: 0 pack, 1 probe, n skip n - 1 times before the next probe.
    countdowns: Vec<u8>,
}

enum Attempt {
    Pack,
    Skip,
    Probe,
}

impl Patience {
    fn next(&mut self, origin: Origin) -> Attempt {
        match self.countdowns.get_mut(cell(origin)) {
            None | Some(0) => Attempt::Pack,
            Some(1) => Attempt::Probe,
            Some(countdown) => {
                *countdown -= 1;
                Attempt::Skip
            }
        }
    }

    fn is_over(&self, origin: Origin) -> bool {
        self.countdowns
            .get(cell(origin))
            .is_some_and(|&countdown| countdown > 0)
    }

    fn learn(&mut self, origin: Origin, pays: bool) {
        let cell = cell(origin);
        if self.countdowns.len() <= cell {
            self.countdowns.resize(cell + 1, 0);
        }
        self.countdowns[cell] = if pays { 0 } else { PROBE_EVERY };
    }
}

fn cell(origin: Origin) -> usize {
    match origin {
        Origin::Opaque => 0,
        Origin::Edits => 1,
        Origin::Unremembered => 2,
        Origin::Region(region) => 3 + region as usize,
    }
}

/// One literal in this many of an incompressible origin is tried again.
const PROBE_EVERY: u8 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64) -> Vec<u8> {
        let mut state = seed;
        std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(PAGE_SIZE)
        .collect()
    }

    #[test]
    fn what_did_not_pay_is_skipped_and_probed_once_in_32() {
        let mut packer = Packer::new();
        let mut packed = Vec::new();
        for seed in 0..96 {
            let page = noise(seed);
            let pack = packer.is_worth_packing(Origin::Region(0), &page);
            packed.push(pack);
            if pack {
                packer.push_page(Origin::Region(0), &page);
            }
        }
        assert!(packed[..32].iter().all(|&pack| pack), "the first group is tried");
        assert!(packed[32..].iter().all(|&pack| !pack), "nothing after it is");
        // The 64 skipped so far hold two probes, which did not pay either: 31 skips are to come before the next.
        let text = vec![7; PAGE_SIZE];
        let after: Vec<bool> = (0..40)
            .map(|_| packer.is_worth_packing(Origin::Region(0), &text))
            .collect();
        assert_eq!(after.iter().position(|&pack| pack), Some(31));
        assert!(after[31..].iter().all(|&pack| pack));
        assert!(
            packer.is_worth_packing(Origin::Region(1), &noise(0)),
            "another region has its own memory"
        );
        assert!(packer.is_worth_packing(Origin::Opaque, &noise(0)));
    }

    #[test]
    fn a_small_share_of_an_incompressible_group_is_not_judged() {
        let mut packer = Packer::new();
        packer.push(Origin::Opaque, &[7; 100]);
        for seed in 0..40 {
            packer.push_page(Origin::Region(0), &noise(seed));
        }
        assert!(packer.is_worth_packing(Origin::Opaque, &[7; 100]));
        assert!(!packer.is_worth_packing(Origin::Region(0), &noise(1)));
    }

    #[test]
    fn pages_are_counted_in_the_group_in_which_they_begin() {
        let mut packer = Packer::new();
        packer.push(Origin::Opaque, &[1; 5]);
        for seed in 0..32 {
            packer.push_page(Origin::Region(0), &noise(seed));
        }
        packer.push(Origin::Region(0), &[0; GROUP_BYTES - PAGE_SIZE]);
        packer.push_page(Origin::Region(0), &[2; PAGE_SIZE]);
        let packed = packer.finish();
        assert_eq!((packed.stored_pages, packed.compressed_pages), (32, 1));
        assert_eq!(packed.content_len, 5 + 33 * PAGE_SIZE + GROUP_BYTES - PAGE_SIZE);
    }
}
