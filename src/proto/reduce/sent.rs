//! Which slot of the dictionary held each page when it was last sent.

use std::collections::HashMap;

use crate::proto::page::PageAddress;

use super::known::KnownPages;

/// Pages of one region: 4 MiB of guest memory, 4 KiB of table.
pub(super) const REGION_PAGES: usize = 1024;

/// Page address → slot. Both ends keep it, from the payload sequence alone.
///
/// Regions are added as their first page is sent, up to a limit that both ends know; pages of further regions are not
/// remembered. Zeroes only mark the entry, so that a page which was zero in between may still be the same as before, and one that ends as zero
/// leaves nothing. An entry is never cleared: whether its slot still holds the page's content is for the source to tell, by
/// digest, and what a slot number means is the same at both ends.
#[derive(Debug)]
pub(super) struct SentPages {
    region_limit: u32,
    regions: HashMap<(u16, u64), u32>,
    slots: Vec<Box<[u32; REGION_PAGES]>>,
    /// The region used last: pages come in runs.
    last: Option<((u16, u64), u32)>,
    /// Entries.
    count: u64,
}

impl SentPages {
    pub(super) fn new(region_limit: u32) -> Self {
        Self {
            region_limit,
            regions: HashMap::new(),
            slots: Vec::new(),
            last: None,
            count: 0,
        }
    }

    /// Pages that are remembered.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The slot that held the page when it was last sent.
    pub(super) fn slot(&mut self, at: PageAddress) -> Option<u32> {
        let region = self.region(at)?;
        let slot = self.slots[region as usize][index_in_region(at)];
        (slot != NEVER).then_some(slot & !ZERO)
    }

    /// The page has just been sent as zeroes.
    pub(super) fn zero(&mut self, at: PageAddress) {
        if let Some(region) = self.region(at) {
            // It is never of an entry that is not there: that has the mark already.
            self.slots[region as usize][index_in_region(at)] |= ZERO;
        }
    }

    /// The page has just been sent as what it was before.
    pub(super) fn same(&mut self, at: PageAddress) {
        if let Some(region) = self.region(at) {
            let entry = &mut self.slots[region as usize][index_in_region(at)];
            if *entry != NEVER {
                *entry &= !ZERO;
            }
        }
    }

    /// Remembers that the page has just been sent with the content of `slot`.
    pub(super) fn set(&mut self, at: PageAddress, slot: u32) {
        let region = match self.region(at) {
            Some(region) => region,
            None if self.slots.len() >= self.region_limit as usize => return,
            None => {
                let key = region_key(at);
                let region = self.slots.len() as u32;
                self.slots.push(Box::new([NEVER; REGION_PAGES]));
                self.regions.insert(key, region);
                self.last = Some((key, region));
                region
            }
        };
        let entry = &mut self.slots[region as usize][index_in_region(at)];
        self.count += u64::from(*entry == NEVER);
        *entry = slot;
    }

    /// Number of the region of `at`, counted in the order in which regions were added.
    pub(super) fn region(&mut self, at: PageAddress) -> Option<u32> {
        let key = region_key(at);
        if let Some((last, region)) = self.last
            && last == key
        {
            return Some(region);
        }
        let region = *self.regions.get(&key)?;
        self.last = Some((key, region));
        Some(region)
    }

    /// Every page that both ends know was last sent from the slot of its content's number, of which there are `slots`.
    pub(super) fn know(&mut self, pages: &KnownPages, slots: u32) {
        for &(at, number) in pages.places().iter().filter(|(_, number)| *number < slots) {
            self.set(at, number);
        }
    }

    /// The slot of each page that is not zero now, in the order of addresses.
    pub(super) fn places(&self) -> Vec<(PageAddress, u32)> {
        let mut regions: Vec<_> = self.regions.iter().map(|(&key, &region)| (key, region)).collect();
        regions.sort_unstable();
        let mut places = Vec::new();
        for ((block, number), region) in regions {
            let first = number * REGION_PAGES as u64;
            let slots = &self.slots[region as usize][..];
            let pages = (first..).zip(slots).filter(|&(_, &slot)| slot & ZERO == 0);
            places.extend(pages.map(|(page, &slot)| (PageAddress { block, page }, slot)));
        }
        places
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.slots.len() * (REGION_PAGES * size_of::<u32>() + size_of::<usize>())
            + self.regions.capacity() * size_of::<((u16, u64), u32)>()
    }
}

fn region_key(at: PageAddress) -> (u16, u64) {
    (at.block, at.page / REGION_PAGES as u64)
}

fn index_in_region(at: PageAddress) -> usize {
    (at.page % REGION_PAGES as u64) as usize
}

/// No slot has this number.
const NEVER: u32 = u32::MAX;

/// Marks the entry of a page that was zero since. Slots are below it ([`super::DictionaryLimits::MAX_SLOTS`]).
const ZERO: u32 = 1 << 31;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(block: u16, page: u64) -> PageAddress {
        PageAddress { block, page }
    }

    #[test]
    fn a_page_remembers_its_last_slot_and_its_neighbours_do_not() {
        let mut sent = SentPages::new(2);
        sent.set(at(0, 1023), 5);
        sent.set(at(1, 1023), 6);
        sent.set(at(0, 1023), 7);
        assert_eq!(sent.slot(at(0, 1023)), Some(7));
        assert_eq!(sent.slot(at(1, 1023)), Some(6));
        assert_eq!(sent.slot(at(0, 1022)), None);
        assert_eq!(sent.slot(at(0, 1024)), None);
    }

    #[test]
    fn regions_beyond_the_limit_are_not_remembered_and_take_no_memory() {
        let mut sent = SentPages::new(1);
        sent.set(at(0, 0), 1);
        let before = sent.memory_bytes();
        for page in 1..100 {
            sent.set(at(0, page << 40), 2);
            assert_eq!(sent.slot(at(0, page << 40)), None);
        }
        assert_eq!(sent.memory_bytes(), before);
        assert_eq!(sent.slot(at(0, 0)), Some(1));
    }
}
