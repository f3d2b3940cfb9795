//! The bytes of one lane as they come, in any order.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// A lane that is not whole yet, or just has become so.
#[derive(Clone, Debug, Default)]
pub struct Arriving {
    bytes: BytesMut,
    /// What is there, ascending and apart.
    there: Vec<Range<usize>>,
}

impl Arriving {
    /// Puts bytes in their place. Grows up to the end of what has come, which the caller has compared with its limit.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
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
    }

    /// What is missing of the first `len` bytes, ascending and apart.
    #[must_use]
    pub fn missing(&self, len: usize) -> Vec<Range<usize>> {
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
    pub fn prefix(&self, len: usize) -> Option<&[u8]> {
        let first = self.there.first()?;
        (first.start == 0 && first.end >= len).then(|| &self.bytes[..len])
    }

    /// The bytes so far; what is missing in between is zero.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of a lane that has come to its end.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.bytes.freeze()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
                arriving.put(start, &whole[start..end]);
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
            let end = there.iter().rposition(|there| *there).map_or(0, |last| last + 1);
            prop_assert_eq!(arriving.bytes().len(), end);
            arriving.put(0, &whole);
            prop_assert_eq!(arriving.into_bytes(), Bytes::from(whole));
        }
    }
}
