//! Digest → slot, at the source: which slot holds a content.

use crate::proto::page::PageDigest;

/// A compact hash table of slots, in buckets of one cache line.
///
/// An entry packs a slot (plus one; zero is empty) with as many bits of the digest as are left over, so that a lookup reads a
/// slot's full digest only where it almost certainly matches. A digest has two buckets and goes to the emptier one. The
/// table may forget: with both buckets full the new entry takes the place of another, and that content will be sent as a
/// literal again (1.6 % of a full dictionary after many evictions). It never affects what the destination does, and content chosen to crowd a bucket costs ratio only.
#[derive(Debug)]
pub(super) struct ContentIndex {
    buckets: Vec<Bucket>,
    slot_bits: u32,
}

impl ContentIndex {
    /// An index for slots below `capacity`.
    pub(super) fn new(capacity: u32) -> Self {
        let entries = u64::from(capacity) * LOAD.1 / LOAD.0;
        let buckets = entries.div_ceil(WAYS as u64) as usize;
        Self {
            buckets: vec![Bucket([0; WAYS]); buckets],
            slot_bits: u32::BITS - capacity.leading_zeros(),
        }
    }

    /// A slot that was entered under `digest`; `holds` says whether a candidate's digest really is `digest`.
    pub(super) fn find(&self, digest: PageDigest, holds: impl Fn(u32) -> bool) -> Option<u32> {
        if self.buckets.is_empty() {
            return None;
        }
        let place = self.place(digest);
        [place.first, place.second].into_iter().find_map(|bucket| {
            let mut candidates = self.matches(bucket, place.tag);
            while candidates != 0 {
                let way = candidates.trailing_zeros() as usize;
                candidates &= candidates - 1;
                // An empty way looks like tag 0 with slot -1.
                if let Some(slot) = self.slot_of(self.buckets[bucket].0[way])
                    && holds(slot)
                {
                    return Some(slot);
                }
            }
            None
        })
    }

    /// Enters `slot`, which holds the content of `digest`.
    pub(super) fn insert(&mut self, digest: PageDigest, slot: u32) {
        if self.buckets.is_empty() {
            return;
        }
        let place = self.place(digest);
        let entry = place.tag << self.slot_bits | (slot + 1);
        let free = |bucket: usize| self.buckets[bucket].0.iter().filter(|&&entry| entry == 0).count();
        let bucket = if free(place.first) >= free(place.second) {
            place.first
        } else {
            place.second
        };
        let ways = &mut self.buckets[bucket].0;
        let way = ways
            .iter()
            .position(|&entry| entry == 0)
            .unwrap_or(usize::from(digest.0[0]) % WAYS);
        ways[way] = entry;
    }

    /// Takes out `slot`, which was entered under `digest`, unless it was forgotten before.
    pub(super) fn remove(&mut self, digest: PageDigest, slot: u32) {
        if self.buckets.is_empty() {
            return;
        }
        let place = self.place(digest);
        let entry = place.tag << self.slot_bits | (slot + 1);
        for bucket in [place.first, place.second] {
            if let Some(way) = self.buckets[bucket].0.iter_mut().find(|way| **way == entry) {
                *way = 0;
                return;
            }
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.buckets.len() * size_of::<Bucket>()
    }

    fn place(&self, digest: PageDigest) -> Place {
        let low = u64::from_le_bytes(*digest.0.first_chunk().expect("a digest has 16 bytes"));
        let high = u64::from_le_bytes(*digest.0.last_chunk().expect("a digest has 16 bytes"));
        let scale = |hash: u64| ((u128::from(hash) * self.buckets.len() as u128) >> 64) as usize;
        Place {
            first: scale(low),
            second: scale(high),
            tag: low as u32 & (u32::MAX >> self.slot_bits),
        }
    }

    /// The ways of a bucket whose tag is `tag`, as bits.
    fn matches(&self, bucket: usize, tag: u32) -> u32 {
        let entries = &self.buckets[bucket].0;
        (0..WAYS).fold(0, |bits, way| {
            bits | u32::from(entries[way] >> self.slot_bits == tag) << way
        })
    }

    fn slot_of(&self, entry: u32) -> Option<u32> {
        (entry & !(u32::MAX << self.slot_bits)).checked_sub(1)
    }
}

#[derive(Clone, Debug)]
#[repr(align(64))]
struct Bucket([u32; WAYS]);

struct Place {
    first: usize,
    second: usize,
    tag: u32,
}

/// Entries in a bucket: 16 of 4 bytes are a cache line.
const WAYS: usize = 16;
/// Slots per entry at most, as a fraction: 9/10, that is 4.4 bytes a slot.
const LOAD: (u64, u64) = (9, 10);

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(seed: u32) -> PageDigest {
        PageDigest::of(&seed.to_le_bytes())
    }

    #[test]
    fn a_full_index_finds_nearly_every_slot_and_nothing_that_was_taken_out() {
        let capacity = 20_000;
        let mut index = ContentIndex::new(capacity);
        for slot in 0..capacity {
            index.insert(digest(slot), slot);
        }
        let found = (0..capacity)
            .filter(|&slot| index.find(digest(slot), |found| found == slot) == Some(slot))
            .count();
        assert!(found * 1000 >= capacity as usize * 995, "{found} of {capacity}");
        for slot in 0..capacity / 2 {
            index.remove(digest(slot), slot);
        }
        for slot in 0..capacity / 2 {
            assert_eq!(index.find(digest(slot), |found| found == slot), None);
        }
    }

    #[test]
    fn crowding_one_bucket_forgets_entries_and_nothing_else() {
        let mut index = ContentIndex::new(1000);
        let crowd = |seed: u32| {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&seed.to_le_bytes());
            PageDigest(bytes)
        };
        for slot in 0..1000 {
            index.insert(crowd(slot), slot);
        }
        let found = (0..1000)
            .filter(|&slot| index.find(crowd(slot), |found| found == slot).is_some())
            .count();
        assert!((1..=2 * WAYS).contains(&found), "{found}");
        index.insert(digest(7), 7);
        assert_eq!(index.find(digest(7), |found| found == 7), Some(7));
    }
}
