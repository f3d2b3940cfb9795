//! Page contents that the source keeps, to send what changed in them.
//!
//! The destination holds every slot's bytes anyway. The source holds as many as it may, and decides by itself which: a page whose copy it has
//! not is sent as a literal, so nothing here is part of the format. Copies are kept from the first pass on while there is room. Then a page that
//! is sent again takes the place of one that was sent once, and where all were sent again, of another now and then: guests rewrite more than
//! fits in rounds, and whoever throws out the oldest then never finds any.

use crate::proto::page::{PAGE_SIZE, PageAddress};

/// Copies of pages by slot of the dictionary.
#[derive(Debug)]
pub(super) struct Copies {
    limit: u32,
    /// Pages, a chunk at a time: growth never copies.
    chunks: Vec<Vec<[u8; PAGE_SIZE]>>,
    /// By frame.
    frames: Vec<Frame>,
    free: Vec<u32>,
    /// The frame of a slot's copy, plus one; 0 is none.
    frame_of: Vec<u32>,
    /// Frames whose page was sent once.
    cold: u32,
    /// Where a frame to take was last looked for.
    hand: u32,
    /// Pages that found no room since one was let in.
    turned_away: u32,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    slot: u32,
    owner: PageAddress,
    again: bool,
}

/// Pages of a chunk.
const CHUNK: usize = 256;

/// Copies that are looked at for one to take: the next page goes on from there.
const LONGEST_SEARCH: u32 = 64;

/// Among copies that were all sent again, one page in this many is let in.
const LET_IN_EVERY: u32 = 16;

impl Copies {
    /// At most `limit` copies of what is in `slots` slots.
    pub(super) fn new(limit: u32, slots: u32) -> Self {
        Self {
            limit,
            chunks: Vec::new(),
            frames: Vec::new(),
            free: Vec::new(),
            // Reserved once; memory is committed as slots are filled.
            frame_of: Vec::with_capacity(if limit > 0 { slots as usize } else { 0 }),
            cold: 0,
            hand: 0,
            turned_away: 0,
        }
    }

    /// What `slot` holds, where a copy is kept.
    pub(super) fn get(&self, slot: u32) -> Option<&[u8; PAGE_SIZE]> {
        let frame = self.frame(slot)?;
        Some(&self.chunks[frame as usize / CHUNK][frame as usize % CHUNK])
    }

    /// `slot` now holds `page`, the new content of the page at `owner`, in place of what it held. `previous`: the slot that held that page when it was
    /// last sent; its copy is given up for this one, unless other pages were the first to have it.
    pub(super) fn put(&mut self, slot: u32, owner: PageAddress, previous: Option<u32>, page: &[u8; PAGE_SIZE]) {
        if self.limit == 0 {
            return;
        }
        let again = previous.is_some();
        let own = previous.filter(|&previous| {
            let frame = self.frame(previous).map(|frame| self.frames[frame as usize]);
            frame.is_some_and(|frame| frame.owner == owner)
        });
        let own = own.and_then(|previous| self.unmap(previous));
        if let Some(frame) = self.unmap(slot) {
            self.release(frame);
        }
        let Some(frame) = own.or_else(|| self.room(again)) else {
            return;
        };
        if own.is_some() {
            self.cold -= u32::from(!self.frames[frame as usize].again);
        }
        self.cold += u32::from(!again);
        self.frames[frame as usize] = Frame { slot, owner, again };
        let mapped = slot as usize;
        if self.frame_of.len() <= mapped {
            self.frame_of.resize(mapped + 1, 0);
        }
        self.frame_of[mapped] = frame + 1;
        let chunk = &mut self.chunks[frame as usize / CHUNK];
        match chunk.get_mut(frame as usize % CHUNK) {
            Some(held) => *held = *page,
            None => chunk.push(*page),
        }
    }

    /// `slot` holds something else now, of which no copy is kept.
    pub(super) fn forget(&mut self, slot: u32) {
        if let Some(frame) = self.unmap(slot) {
            self.release(frame);
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.chunks.len() * CHUNK * PAGE_SIZE
            + self.frames.capacity() * size_of::<Frame>()
            + (self.free.capacity() + self.frame_of.capacity()) * size_of::<u32>()
    }

    fn frame(&self, slot: u32) -> Option<u32> {
        self.frame_of.get(slot as usize)?.checked_sub(1)
    }

    fn unmap(&mut self, slot: u32) -> Option<u32> {
        let frame = self.frame(slot)?;
        self.frame_of[slot as usize] = 0;
        Some(frame)
    }

    /// Gives back a frame that no slot maps to any more.
    fn release(&mut self, frame: u32) {
        self.cold -= u32::from(!self.frames[frame as usize].again);
        self.free.push(frame);
    }

    /// A frame that no slot maps to, for a page that was sent `again`.
    fn room(&mut self, again: bool) -> Option<u32> {
        if let Some(frame) = self.free.pop() {
            return Some(frame);
        }
        let frames = self.frames.len() as u32;
        if frames < self.limit {
            if self.chunks.len() * CHUNK <= frames as usize {
                self.chunks.push(Vec::with_capacity(CHUNK));
            }
            self.frames.push(Frame {
                slot: 0,
                owner: PageAddress { block: 0, page: 0 },
                again,
            });
            return Some(frames);
        }
        if !again {
            return None;
        }
        if self.cold == 0 {
            self.turned_away += 1;
            if self.turned_away < LET_IN_EVERY {
                return None;
            }
            self.turned_away = 0;
        }
        // With none left that was sent once, any will do.
        let wanted = self.cold == 0;
        for _ in 0..LONGEST_SEARCH {
            if self.frames[self.hand as usize].again == wanted {
                break;
            }
            self.hand = (self.hand + 1) % frames;
        }
        let taken = self.hand;
        self.hand = (self.hand + 1) % frames;
        let Frame { slot, again, .. } = self.frames[taken as usize];
        self.unmap(slot);
        self.cold -= u32::from(!again);
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(fill: u8) -> [u8; PAGE_SIZE] {
        [fill; PAGE_SIZE]
    }

    fn at(page: u32) -> PageAddress {
        PageAddress {
            block: 0,
            page: page.into(),
        }
    }

    fn held(copies: &Copies, slots: std::ops::Range<u32>) -> Vec<u32> {
        slots.filter(|&slot| copies.get(slot).is_some()).collect()
    }

    #[test]
    fn copies_are_kept_from_the_first_pass_on_while_there_is_room() {
        let mut copies = Copies::new(3, 256);
        for slot in 0..5 {
            copies.put(slot, at(slot), None, &page(slot as u8));
        }
        assert_eq!(held(&copies, 0..5), [0, 1, 2]);
        assert_eq!(copies.get(1), Some(&page(1)));
    }

    #[test]
    fn a_page_that_is_sent_again_takes_its_copy_along_to_its_new_slot() {
        let mut copies = Copies::new(2, 256);
        copies.put(0, at(0), None, &page(1));
        copies.put(1, at(1), None, &page(2));
        copies.put(2, at(0), Some(0), &page(3));
        assert_eq!(held(&copies, 0..3), [1, 2]);
        assert_eq!(copies.get(2), Some(&page(3)));
    }

    #[test]
    fn a_page_that_is_sent_again_takes_the_place_of_one_that_was_sent_once() {
        let mut copies = Copies::new(2, 256);
        copies.put(0, at(0), None, &page(0));
        copies.put(1, at(1), None, &page(1));
        // Slots 2 and 3 were sent before and had no room.
        copies.put(4, at(2), Some(2), &page(4));
        copies.put(5, at(3), Some(3), &page(5));
        assert_eq!(held(&copies, 0..6), [4, 5]);
        copies.put(6, at(6), None, &page(6));
        assert_eq!(held(&copies, 0..7), [4, 5]);
    }

    #[test]
    fn a_page_that_leaves_a_content_which_others_share_leaves_them_its_copy() {
        let mut copies = Copies::new(4, 256);
        copies.put(0, at(0), None, &page(1));
        // Page 1 was sent as a reference to slot 0, and changes now.
        copies.put(1, at(1), Some(0), &page(2));
        assert_eq!(held(&copies, 0..2), [0, 1]);
        copies.put(2, at(0), Some(0), &page(3));
        assert_eq!(held(&copies, 0..3), [1, 2]);
    }

    #[test]
    fn rounds_over_more_than_fits_still_find_what_was_kept() {
        let mut copies = Copies::new(100, 2000);
        let (pages, mut slot) = (200_u32, 0);
        let mut last = vec![None; pages as usize];
        let mut found = 0;
        for round in 0..10 {
            for (number, last) in (0..).zip(&mut last) {
                if round == 9 && last.is_some_and(|slot| copies.get(slot).is_some()) {
                    found += 1;
                }
                copies.put(slot, at(number), *last, &page(slot as u8));
                *last = Some(slot);
                slot += 1;
            }
        }
        assert!(found > 80, "{found} of 100");
    }

    #[test]
    fn a_slot_that_is_overwritten_has_no_copy_of_what_it_held() {
        let mut copies = Copies::new(4, 256);
        copies.put(0, at(0), None, &page(1));
        copies.put(1, at(1), None, &page(2));
        copies.put(0, at(0), None, &page(3));
        assert_eq!(copies.get(0), Some(&page(3)));
        copies.put(1, at(1), Some(1), &page(4));
        assert_eq!(copies.get(1), Some(&page(4)));
        assert_eq!(copies.cold, 1);
    }

    #[test]
    fn however_slots_come_copies_are_right_and_within_their_limit() {
        let mut copies = Copies::new(50, 256);
        let mut holds: Vec<Option<u8>> = vec![None; 97];
        let mut state = 1_u64;
        for turn in 0..20_000_u32 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let previous = (state >> 60 > 4).then_some((state >> 33) as u32 % 97);
            let slot = turn % 97;
            copies.put(slot, at((state >> 20) as u32 % 40), previous, &page(turn as u8));
            holds[slot as usize] = Some(turn as u8);
            for (slot, &held) in (0..).zip(&holds) {
                if let Some(copy) = copies.get(slot) {
                    assert_eq!(Some(copy[9]), held, "{turn}");
                }
            }
            let cold = (0..97)
                .filter_map(|slot| copies.frame(slot))
                .filter(|&frame| !copies.frames[frame as usize].again)
                .count();
            assert_eq!(copies.cold as usize, cold, "{turn}");
        }
        assert!(copies.frames.len() <= 50);
    }

    #[test]
    fn no_copies_take_no_memory() {
        let mut copies = Copies::new(0, 256);
        copies.put(0, at(0), None, &page(1));
        assert_eq!((copies.get(0), copies.memory_bytes()), (None, 0));
    }
}
