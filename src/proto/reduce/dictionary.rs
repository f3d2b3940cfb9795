//! The session dictionary: what both ends hold, kept in step by the payload sequence alone.
//!
//! Every new content, whether it came as a literal or as what changed, goes to the next slot of a ring, in place of the oldest. So its slot is
//! its number modulo the capacity, and neither a slot nor an eviction is ever on the wire.

use crate::proto::page::{PAGE_SIZE, PageAddress, PageDigest};

use super::copies::Copies;
use super::index::ContentIndex;
use super::known::{KnownContent, KnownPages};
use super::sent::SentPages;

/// How much both ends remember. It is part of the format: both ends of a session must have the same limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DictionaryLimits {
    slots: u32,
    regions: u32,
}

impl DictionaryLimits {
    /// Most slots: a dictionary of 1 TiB.
    pub const MAX_SLOTS: u32 = (1 << 28) - 1;
    /// Most regions: a guest of 8 TiB, for which each end keeps 8 GiB of table.
    pub const MAX_REGIONS: u32 = 1 << 21;

    /// A dictionary of `slots` pages (0: none at all) which remembers what was last sent for the pages of `regions` aligned
    /// regions of 4 MiB of guest memory.
    ///
    /// The source takes about 20.5 bytes per slot, 4 more and the pages where it holds copies, and the destination's shelf a page; each end takes 4 KiB per region in use.
    ///
    /// # Errors
    /// [`DictionaryTooLarge`] above [`Self::MAX_SLOTS`] or [`Self::MAX_REGIONS`].
    pub const fn new(slots: u32, regions: u32) -> Result<Self, DictionaryTooLarge> {
        if slots > Self::MAX_SLOTS || regions > Self::MAX_REGIONS {
            return Err(DictionaryTooLarge { slots, regions });
        }
        Ok(Self { slots, regions })
    }

    /// Pages that the dictionary holds when it is full.
    #[must_use]
    pub const fn slots(self) -> u32 {
        self.slots
    }

    /// Regions of 4 MiB whose pages are remembered.
    #[must_use]
    pub const fn regions(self) -> u32 {
        self.regions
    }
}

/// A dictionary was asked for that cannot be numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a dictionary of {slots} pages over {regions} regions is too large: at most {} and {} can be numbered",
    DictionaryLimits::MAX_SLOTS,
    DictionaryLimits::MAX_REGIONS
)]
pub struct DictionaryTooLarge {
    /// Slots asked for.
    pub slots: u32,
    /// Regions asked for.
    pub regions: u32,
}

/// The ring of slots, as both ends see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotRing {
    capacity: u32,
    filled: u32,
    next: u32,
    taken: u64,
}

impl SlotRing {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            capacity,
            filled: 0,
            next: 0,
            taken: 0,
        }
    }

    /// The slot of the next literal, from now on; `None` where there is no dictionary.
    pub(super) fn take(&mut self) -> Option<u32> {
        if self.capacity == 0 {
            return None;
        }
        let slot = self.next;
        self.next = (slot + 1) % self.capacity;
        self.filled = self.filled.max(slot + 1);
        self.taken += 1;
        Some(slot)
    }

    /// Takes the first `count` slots of a ring of which none has been taken; how many there are for them.
    pub(super) fn take_first(&mut self, count: usize) -> u32 {
        let taken = u32::try_from(count).unwrap_or(u32::MAX).min(self.capacity);
        self.filled = taken;
        self.next = if taken == self.capacity { 0 } else { taken };
        self.taken = taken.into();
        taken
    }

    /// Whether `slot` still holds what it held first.
    pub(super) fn is_on_first_lap(&self, slot: u32) -> bool {
        self.holds(slot) && self.taken <= u64::from(self.capacity) + u64::from(slot)
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Whether `slot` holds a page.
    pub(super) fn holds(&self, slot: u32) -> bool {
        slot < self.filled
    }
}

/// The source's side: a digest per slot, where to find a content, and copies of some.
pub(super) struct SourceDictionary {
    ring: SlotRing,
    digests: Vec<PageDigest>,
    index: ContentIndex,
    copies: Copies,
    known: Option<Known>,
    pub(super) sent: SentPages,
}

/// The bytes of the first slots, as long as they hold what they held first.
struct Known {
    count: u32,
    content: Box<dyn KnownContent>,
    page: Box<[u8; PAGE_SIZE]>,
}

impl SourceDictionary {
    /// With the bytes of at most `copies` pages.
    pub(super) fn new(limits: DictionaryLimits, copies: u32) -> Self {
        Self {
            ring: SlotRing::new(limits.slots),
            // Reserved once, so that growth never copies; memory is committed as slots are filled.
            digests: Vec::with_capacity(limits.slots as usize),
            index: ContentIndex::new(limits.slots),
            copies: Copies::new(copies.min(limits.slots), limits.slots),
            known: None,
            sent: SentPages::new(limits.regions),
        }
    }

    /// Whether the slot that held `at` when it was last sent holds `digest`.
    pub(super) fn is_same(&mut self, at: PageAddress, digest: PageDigest) -> bool {
        self.sent
            .slot(at)
            .is_some_and(|slot| self.digests[slot as usize] == digest)
    }

    /// A slot that holds `digest`.
    pub(super) fn find(&self, digest: PageDigest) -> Option<u32> {
        self.index.find(digest, |slot| self.digests[slot as usize] == digest)
    }

    /// Fills the dictionary, of which nothing has been used, with what both ends know.
    pub(super) fn know(&mut self, pages: &KnownPages, content: Box<dyn KnownContent>) {
        let count = self.ring.take_first(pages.digests().len());
        for (slot, &digest) in (0..count).zip(pages.digests()) {
            self.digests.push(digest);
            self.index.insert(digest, slot);
        }
        self.sent.know(pages, count);
        self.known = Some(Known {
            count,
            content,
            page: Box::new([0; PAGE_SIZE]),
        });
    }

    /// The bytes in `slot`, where they can be had here.
    pub(super) fn copy(&mut self, slot: u32) -> Option<&[u8; PAGE_SIZE]> {
        if self.copies.get(slot).is_some() {
            return self.copies.get(slot);
        }
        let known = self.known.as_mut().filter(|known| slot < known.count)?;
        (self.ring.is_on_first_lap(slot) && known.content.read(slot, &mut known.page)).then_some(&*known.page)
    }

    pub(super) fn ring(&self) -> SlotRing {
        self.ring
    }

    /// Gives the next slot, in place of what it held, to a new `content` of the page `at`, which was last sent from slot `previous`; which slot
    /// that is.
    pub(super) fn insert(
        &mut self,
        at: PageAddress,
        digest: PageDigest,
        previous: Option<u32>,
        content: &[u8; PAGE_SIZE],
    ) -> Option<u32> {
        let slot = self.ring.take()?;
        self.copies.put(slot, at, previous, content);
        self.hold(slot, digest);
        self.sent.set(at, slot);
        Some(slot)
    }

    /// Gives the next slot to a chunk, which is of no page.
    pub(super) fn insert_chunk(&mut self, digest: PageDigest) {
        if let Some(slot) = self.ring.take() {
            self.copies.forget(slot);
            self.hold(slot, digest);
        }
    }

    fn hold(&mut self, slot: u32, digest: PageDigest) {
        match self.digests.get_mut(slot as usize) {
            Some(held) => {
                self.index.remove(*held, slot);
                *held = digest;
            }
            None => self.digests.push(digest),
        }
        self.index.insert(digest, slot);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.digests.len() * size_of::<PageDigest>()
            + self.index.memory_bytes()
            + self.copies.memory_bytes()
            + self.sent.memory_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the digests stand for does not matter here.
    const BLANK: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

    fn digest(seed: u8) -> PageDigest {
        PageDigest([seed; 16])
    }

    fn at(page: u64) -> PageAddress {
        PageAddress { block: 0, page }
    }

    fn dictionary(slots: u32) -> SourceDictionary {
        SourceDictionary::new(DictionaryLimits::new(slots, 4).unwrap(), 0)
    }

    #[test]
    fn the_oldest_content_makes_room_and_is_found_no_more() {
        let mut dictionary = dictionary(2);
        for seed in 0..3 {
            dictionary.insert(at(seed.into()), digest(seed), None, &BLANK);
        }
        assert_eq!(dictionary.find(digest(0)), None);
        assert_eq!(dictionary.find(digest(1)), Some(1));
        assert_eq!(dictionary.find(digest(2)), Some(0));
    }

    #[test]
    fn what_a_full_dictionary_holds_is_still_found_after_many_laps() {
        let slots = 5000;
        let mut dictionary = dictionary(slots);
        let content = |literal: u32| PageDigest::of(&literal.to_le_bytes());
        for literal in 0..20 * slots {
            dictionary.insert(at(0), content(literal), None, &BLANK);
        }
        let held = (19 * slots..20 * slots)
            .filter(|&literal| dictionary.find(content(literal)).is_some())
            .count();
        assert!(held * 100 >= slots as usize * 98, "{held} of {slots}");
    }

    #[test]
    fn a_page_is_same_only_while_its_slot_holds_its_content() {
        let mut dictionary = dictionary(1);
        dictionary.insert(at(0), digest(1), None, &BLANK);
        assert!(dictionary.is_same(at(0), digest(1)));
        assert!(!dictionary.is_same(at(0), digest(2)));
        assert!(!dictionary.is_same(at(1), digest(1)));
        dictionary.insert(at(1), digest(2), None, &BLANK);
        assert!(!dictionary.is_same(at(0), digest(1)));
    }

    #[test]
    fn no_dictionary_holds_nothing() {
        let mut dictionary = dictionary(0);
        dictionary.insert(at(0), digest(1), None, &BLANK);
        assert!(!dictionary.is_same(at(0), digest(1)));
        assert_eq!(dictionary.find(digest(1)), None);
    }

    #[test]
    fn a_dictionary_of_as_many_pages_as_the_guest_has_costs_about_24_bytes_a_page() {
        let pages = 1 << 16;
        let mut dictionary = SourceDictionary::new(DictionaryLimits::new(pages, pages / 1024).unwrap(), 0);
        for page in 0..pages {
            dictionary.insert(at(page.into()), PageDigest::of(&page.to_le_bytes()), None, &BLANK);
        }
        let per_page = dictionary.memory_bytes() as f64 / f64::from(pages);
        assert!(per_page < 24.6, "{per_page}");
    }

    #[test]
    fn a_dictionary_that_cannot_be_numbered_is_refused() {
        assert!(DictionaryLimits::new(DictionaryLimits::MAX_SLOTS, DictionaryLimits::MAX_REGIONS).is_ok());
        assert!(DictionaryLimits::new(DictionaryLimits::MAX_SLOTS + 1, 1).is_err());
        assert!(DictionaryLimits::new(1, DictionaryLimits::MAX_REGIONS + 1).is_err());
    }
}
