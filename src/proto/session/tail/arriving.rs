//! The bytes of one lane as they come, in any order.

use std::ops::Range;

use bytes::Bytes;

/// Pieces apart from each other that a lane may be in while it arrives. A lane of the longest is 1311 packets of 1200 bytes: if every
/// other one is lost, 656.
pub(super) const MOST_PIECES: usize = 1024;

/// A lane that is not whole yet, or just has become so.
#[derive(Debug, Default)]
pub(super) struct Arriving {
    bytes: Vec<u8>,
    /// What is there, ascending and apart.
    there: Vec<Range<usize>>,
}

impl Arriving {
    /// The lane will have this length, and takes no more memory than that from now on.
    pub(super) fn expect_len(&mut self, len: usize) {
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&self.bytes);
        self.bytes = bytes;
    }

    /// Puts bytes in their place. Grows up to the end of what has come, which the caller has compared with its limit. `false` where
    /// the lane is in more than [`MOST_PIECES`]: only a peer that makes holes on purpose sends that.
    #[must_use]
    pub(super) fn put(&mut self, offset: usize, bytes: &[u8]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let end = offset + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(bytes);
        // Ranges that touch the new one become part of it; almost always it continues the last.
        let first = self.there.partition_point(|range| range.end < offset);
        let touched = self.there[first..]
            .iter()
            .take_while(|range| range.start <= end)
            .count();
        let merged = self.there[first..first + touched]
            .iter()
            .fold(offset..end, |merged, range| {
                merged.start.min(range.start)..merged.end.max(range.end)
            });
        self.there.splice(first..first + touched, [merged]);
        self.there.len() <= MOST_PIECES
    }

    /// What is missing of the first `len` bytes, ascending and apart.
    #[must_use]
    pub(super) fn missing(&self, len: usize) -> Vec<Range<usize>> {
        let mut missing = Vec::new();
        let mut at = 0;
        for range in &self.there {
            if range.start >= len {
                break;
            }
            if at < range.start {
                missing.push(at..range.start);
            }
            at = range.end;
        }
        if at < len {
            missing.push(at..len);
        }
        missing
    }

    /// The first `len` bytes, if they are there.
    #[must_use]
    pub(super) fn prefix(&self, len: usize) -> Option<&[u8]> {
        let first = self.there.first()?;
        (first.start == 0 && first.end >= len).then(|| &self.bytes[..len])
    }

    /// How many bytes have come without a gap from the beginning on.
    #[must_use]
    pub(super) fn prefix_len(&self) -> usize {
        self.there
            .first()
            .filter(|range| range.start == 0)
            .map_or(0, |range| range.end)
    }

    /// The bytes so far; what is missing in between is zero.
    #[must_use]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Memory that this takes.
    #[must_use]
    pub(super) fn memory_bytes(&self) -> usize {
        self.bytes.capacity() + self.there.capacity() * size_of::<Range<usize>>()
    }

    /// The bytes of a lane that has come to its end.
    #[must_use]
    pub(super) fn into_bytes(self) -> Bytes {
        self.bytes.into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_lane_in_as_many_pieces_as_may_be_is_taken_and_in_one_more_is_not() {
        let mut arriving = Arriving::default();
        for piece in 0..MOST_PIECES {
            assert!(arriving.put(2 * piece + 1, b"x"), "{piece}");
        }
        // One between two of them makes it one piece less.
        assert!(arriving.put(2, b"x"));
        assert!(arriving.put(2 * MOST_PIECES + 1, b"x"));
        assert!(!arriving.put(2 * MOST_PIECES + 3, b"x"));
    }

    #[test]
    fn a_lane_whose_length_is_known_takes_that_much_and_no_more() {
        let mut arriving = Arriving::default();
        assert!(arriving.put(0, &[1; 100]));
        arriving.expect_len(1000);
        for at in 1..10 {
            assert!(arriving.put(100 * at, &[1; 100]));
        }
        assert_eq!(arriving.bytes.capacity(), 1000);
        assert_eq!(arriving.into_bytes(), vec![1; 1000]);
    }

    proptest! {
        #[test]
        fn bytes_that_come_in_any_order_and_more_than_once_end_in_their_place(
            whole in proptest::collection::vec(any::<u8>(), 1..200),
            pieces in proptest::collection::vec((0usize..200, 1usize..40), 0..60),
        ) {
            let mut arriving = Arriving::default();
            let mut there = vec![false; whole.len()];
            for (start, len) in pieces {
                let start = start.min(whole.len() - 1);
                let end = (start + len).min(whole.len());
                prop_assert!(arriving.put(start, &whole[start..end]));
                there[start..end].fill(true);
            }
            let mut missing = vec![false; whole.len()];
            for range in arriving.missing(whole.len()) {
                prop_assert!(!range.is_empty());
                missing[range].fill(true);
            }
            prop_assert!(there.iter().zip(&missing).all(|(there, missing)| there != missing));
            let prefix = there.iter().take_while(|there| **there).count();
            prop_assert_eq!(arriving.prefix(prefix).unwrap_or_default(), &whole[..prefix]);
            prop_assert!(arriving.prefix(prefix + 1).is_none());
            prop_assert_eq!(arriving.prefix_len(), prefix);
            let end = there.iter().rposition(|there| *there).map_or(0, |last| last + 1);
            prop_assert_eq!(arriving.bytes().len(), end);
            prop_assert!(arriving.put(0, &whole));
            prop_assert_eq!(arriving.into_bytes(), Bytes::from(whole));
        }
    }
}
