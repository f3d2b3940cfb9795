//! A range of a disk as runs of one state each.
//!
//! ```text
//! start        64 KiB        128 KiB                 1 MiB = end
//!   ├── Data ────┼── Hole ──────┼── Data ───────────────┤       neighbours differ, nothing is left out
//! ```
//!
//! States come from NBD's block status ([`Allocation`], [`Dirtiness`]); [`transfers`] says what of a round has to be read, and what
//! need not be because it is zero. Offsets and lengths are bytes; ranges are half-open.

use std::ops::Range;

/// Runs that cover a range without a gap. Neighbours differ in their state, so equal content has one form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents<S> {
    start: u64,
    runs: Vec<Run<S>>,
}

/// The end of a run; its start is the end of the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run<S> {
    end: u64,
    state: S,
}

/// Bytes next to each other that share a state. Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent<S> {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// What they share.
    pub state: S,
}

/// What the `base:allocation` context says of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// They have to be read to be known.
    Data,
    /// They are allocated and read as zeroes.
    Zero,
    /// They are not allocated and read as zeroes.
    Hole,
}

/// What a `qemu:dirty-bitmap` context says of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dirtiness {
    /// Written since the bitmap began, or beside such bytes within the bitmap's granularity.
    Dirty,
    /// Not written since.
    Clean,
}

/// What a round does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Nothing: the destination has them.
    Skip,
    /// They are read and sent.
    Read,
    /// They are zero now: told, not read.
    Zeroes,
}

/// Extents were to be appended that begin beyond the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("extents from byte {start} do not follow on those that end at byte {end}: what is between is not known")]
pub struct Gap {
    /// Where the first ones end.
    pub end: u64,
    /// Where the next ones begin.
    pub start: u64,
}

impl<S> Extent<S> {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never: kept beside [`Extent::len`].
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

impl<S: Copy + PartialEq> Extents<S> {
    /// Of no bytes yet, from `start` on.
    #[must_use]
    pub fn new(start: u64) -> Self {
        Self {
            start,
            runs: Vec::new(),
        }
    }

    /// One state for all of `range`.
    #[must_use]
    pub fn uniform(range: Range<u64>, state: S) -> Self {
        let mut extents = Self::new(range.start);
        extents.extend_to(range.end, state);
        extents
    }

    /// Gives the bytes from the end up to `end` a state. Does nothing where that is no byte.
    pub fn extend_to(&mut self, end: u64, state: S) {
        if end <= self.end() {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if last.state == state => last.end = end,
            _ => self.runs.push(Run { end, state }),
        }
    }

    /// Adds what `next` says of the bytes beyond the end.
    ///
    /// # Errors
    /// [`Gap`] where `next` begins beyond the end.
    pub fn append(&mut self, next: &Self) -> Result<(), Gap> {
        if next.start > self.end() {
            return Err(Gap {
                end: self.end(),
                start: next.start,
            });
        }
        for extent in next.iter() {
            self.extend_to(extent.end, extent.state);
        }
        Ok(())
    }

    /// First byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.runs.last().map_or(self.start, |last| last.end)
    }

    /// Whether it covers no byte.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of extents.
    pub fn count(&self) -> usize {
        self.runs.len()
    }

    /// Bytes whose state is `state`.
    pub fn bytes_of(&self, state: S) -> u64 {
        let of_it = self.iter().filter(|extent| extent.state == state);
        of_it.map(|extent| extent.len()).sum()
    }

    /// The extents in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent<S>> + Clone {
        self.runs.iter().scan(self.start, |start, run| {
            let extent = Extent {
                start: *start,
                end: run.end,
                state: run.state,
            };
            *start = run.end;
            Some(extent)
        })
    }

    /// The extents in order, none longer than `most` bytes: they are cut at multiples of `most`, so that the pieces of one round lie
    /// where those of the next do.
    ///
    /// # Panics
    /// If `most` is zero.
    pub fn pieces(&self, most: u64) -> impl Iterator<Item = Extent<S>> + Clone {
        assert!(most > 0, "pieces have bytes");
        self.iter().flat_map(move |whole| {
            let mut start = whole.start;
            std::iter::from_fn(move || {
                let cut = (start / most).saturating_add(1).saturating_mul(most);
                let piece = Extent {
                    start,
                    end: cut.min(whole.end),
                    state: whole.state,
                };
                start = piece.end;
                (!piece.is_empty()).then_some(piece)
            })
        })
    }

    /// From `byte` to the end of its run; `None` where nothing is said of it.
    pub fn at(&self, byte: u64) -> Option<Extent<S>> {
        let run = self.runs.get(self.runs.partition_point(|run| run.end <= byte))?;
        (byte >= self.start).then_some(Extent {
            start: byte,
            end: run.end,
            state: run.state,
        })
    }

    /// What is said of the bytes in `range`, as far as it is covered.
    #[must_use]
    pub fn within(&self, range: Range<u64>) -> Self {
        let start = range.start.clamp(self.start, self.end());
        let end = range.end.clamp(start, self.end());
        let mut part = Self::new(start);
        let first = self.runs.partition_point(|run| run.end <= start);
        for run in &self.runs[first..] {
            part.extend_to(run.end.min(end), run.state);
            if run.end >= end {
                break;
            }
        }
        part
    }

    /// The same bytes with other states.
    #[must_use]
    pub fn map<T: Copy + PartialEq>(&self, mut state: impl FnMut(S) -> T) -> Extents<T> {
        let mut mapped = Extents::new(self.start);
        for run in &self.runs {
            mapped.extend_to(run.end, state(run.state));
        }
        mapped
    }

    /// What follows from this and `other`, for the bytes that both cover.
    #[must_use]
    pub fn combine<T, U>(&self, other: &Extents<T>, mut state: impl FnMut(S, T) -> U) -> Extents<U>
    where
        T: Copy + PartialEq,
        U: Copy + PartialEq,
    {
        let start = self.start.max(other.start);
        let mut combined = Extents::new(start);
        let mut own = self.iter().skip_while(|extent| extent.end <= start).peekable();
        let mut others = other.iter().skip_while(|extent| extent.end <= start).peekable();
        while let (Some(one), Some(two)) = (own.peek(), others.peek()) {
            let end = one.end.min(two.end);
            combined.extend_to(end, state(one.state, two.state));
            if one.end == end {
                own.next();
            }
            if two.end <= end {
                others.next();
            }
        }
        combined
    }
}

impl Allocation {
    /// From the flags of a block status descriptor (`NBD_STATE_HOLE`, `NBD_STATE_ZERO`).
    ///
    /// Only `NBD_STATE_ZERO` promises what the bytes are. A hole without it is undefined by the protocol; QEMU says so of what it
    /// knows nothing about, and then it has to be read.
    #[must_use]
    pub fn from_flags(flags: u64) -> Self {
        match (flags & STATE_ZERO != 0, flags & STATE_HOLE != 0) {
            (false, _) => Self::Data,
            (true, false) => Self::Zero,
            (true, true) => Self::Hole,
        }
    }
}

impl Dirtiness {
    /// From the flags of a block status descriptor (`NBD_STATE_DIRTY` of QEMU's `docs/interop/nbd.txt`).
    #[must_use]
    pub fn from_flags(flags: u64) -> Self {
        if flags & STATE_DIRTY == 0 {
            Self::Clean
        } else {
            Self::Dirty
        }
    }
}

/// What a round does with the bytes that both tell about: dirty ones are read, or told to be zero where the allocation says so.
#[must_use]
pub fn transfers(dirty: &Extents<Dirtiness>, allocation: &Extents<Allocation>) -> Extents<Transfer> {
    dirty.combine(allocation, |dirty, allocation| match (dirty, allocation) {
        (Dirtiness::Clean, _) => Transfer::Skip,
        (Dirtiness::Dirty, Allocation::Data) => Transfer::Read,
        (Dirtiness::Dirty, Allocation::Zero | Allocation::Hole) => Transfer::Zeroes,
    })
}

/// `NBD_STATE_HOLE` of `base:allocation`.
const STATE_HOLE: u64 = 1;
/// `NBD_STATE_ZERO` of `base:allocation`.
const STATE_ZERO: u64 = 2;
/// `NBD_STATE_DIRTY` of `qemu:dirty-bitmap`.
const STATE_DIRTY: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The state of each byte, for comparison.
    fn bytes<S: Copy + PartialEq>(extents: &Extents<S>) -> Vec<(u64, S)> {
        let each = extents.iter().flat_map(|extent| {
            assert!(!extent.is_empty());
            (extent.start..extent.end).map(move |byte| (byte, extent.state))
        });
        each.collect()
    }

    fn any_extents() -> impl Strategy<Value = Extents<u8>> {
        (0_u64..40, prop::collection::vec((0_u64..20, 0_u8..3), 0..12)).prop_map(|(start, runs)| {
            let mut extents = Extents::new(start);
            for (len, state) in runs {
                extents.extend_to(extents.end() + len, state);
            }
            extents
        })
    }

    proptest! {
        #[test]
        fn neighbours_differ_and_nothing_is_left_out(extents in any_extents()) {
            let all: Vec<_> = extents.iter().collect();
            prop_assert_eq!(all.len(), extents.count());
            prop_assert!(all.windows(2).all(|two| two[0].end == two[1].start && two[0].state != two[1].state));
            prop_assert_eq!(bytes(&extents).len() as u64, extents.end() - extents.start());
            let by_state: u64 = (0..3).map(|state| extents.bytes_of(state)).sum();
            prop_assert_eq!(by_state, extents.end() - extents.start());
        }

        #[test]
        fn a_byte_is_found_with_what_follows_of_its_run(extents in any_extents(), byte in 0_u64..300) {
            let whole = extents.iter().find(|extent| (extent.start..extent.end).contains(&byte));
            prop_assert_eq!(extents.at(byte), whole.map(|extent| Extent { start: byte, ..extent }));
        }

        #[test]
        fn a_part_says_of_its_bytes_what_the_whole_says(extents in any_extents(), from in 0_u64..300, to in 0_u64..300) {
            let part = extents.within(from..to);
            let wanted: Vec<_> = bytes(&extents).into_iter().filter(|(byte, _)| (from..to).contains(byte)).collect();
            prop_assert_eq!(bytes(&part), wanted);
        }

        #[test]
        fn parts_put_together_are_the_whole(extents in any_extents(), cut in 0_u64..300, overlap in 0_u64..5) {
            let mut whole = extents.within(0..cut);
            let rest = extents.within(cut.saturating_sub(overlap)..u64::MAX);
            // Where the cut lies beyond the end, both are clamped to it.
            prop_assert!(whole.append(&rest).is_ok());
            prop_assert_eq!(whole, extents);
        }

        #[test]
        fn what_follows_from_two_is_said_of_each_byte_that_both_cover(one in any_extents(), two in any_extents()) {
            let combined = one.combine(&two, |one, two| (one, two));
            let others = bytes(&two);
            let wanted: Vec<_> = bytes(&one).into_iter().filter_map(|(byte, state)| {
                let other = others.iter().find(|(at, _)| *at == byte)?;
                Some((byte, (state, other.1)))
            }).collect();
            prop_assert_eq!(bytes(&combined), wanted);
        }

        #[test]
        fn pieces_are_the_extents_and_no_longer_than_allowed(extents in any_extents(), most in 1_u64..30) {
            let pieces: Vec<_> = extents.pieces(most).collect();
            prop_assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.start / most == (piece.end - 1) / most));
            let mut again = Extents::new(extents.start());
            for piece in pieces {
                prop_assert_eq!(piece.start, again.end());
                again.extend_to(piece.end, piece.state);
            }
            prop_assert_eq!(again, extents);
        }

        #[test]
        fn other_states_are_merged_where_they_are_equal(extents in any_extents()) {
            let mapped = extents.map(|state| state == 0);
            let wanted: Vec<_> = bytes(&extents).into_iter().map(|(byte, state)| (byte, state == 0)).collect();
            prop_assert_eq!(bytes(&mapped), wanted);
            prop_assert!(mapped.iter().zip(mapped.iter().skip(1)).all(|(one, next)| one.state != next.state));
        }
    }

    #[test]
    fn extents_behind_a_gap_are_not_appended() {
        let mut extents = Extents::uniform(0..10, 1);
        assert_eq!(
            extents.append(&Extents::uniform(11..12, 1)),
            Err(Gap { end: 10, start: 11 })
        );
        assert_eq!(extents.append(&Extents::uniform(10..12, 1)), Ok(()));
        assert_eq!(extents, Extents::uniform(0..12, 1));
    }

    #[test]
    fn the_last_bytes_of_the_largest_disk_are_cut_without_overflow() {
        let extents = Extents::uniform(u64::MAX - 3..u64::MAX, ());
        assert_eq!(extents.pieces(1 << 63).map(|piece| piece.len()).sum::<u64>(), 3);
        assert_eq!(extents.pieces(2).count(), 2);
    }

    #[test]
    fn only_bytes_that_are_said_to_be_zero_need_not_be_read() {
        assert_eq!(Allocation::from_flags(0), Allocation::Data);
        assert_eq!(Allocation::from_flags(1), Allocation::Data);
        assert_eq!(Allocation::from_flags(2), Allocation::Zero);
        assert_eq!(Allocation::from_flags(3), Allocation::Hole);
        // Flags that are not known say nothing.
        assert_eq!(Allocation::from_flags(4 | 3), Allocation::Hole);
        assert_eq!(Dirtiness::from_flags(0), Dirtiness::Clean);
        assert_eq!(Dirtiness::from_flags(1), Dirtiness::Dirty);
    }

    #[test]
    fn dirty_bytes_are_read_unless_they_are_zero_and_clean_ones_are_left() {
        let mut dirty = Extents::uniform(0..100, Dirtiness::Clean);
        dirty.extend_to(300, Dirtiness::Dirty);
        let mut allocation = Extents::uniform(0..150, Allocation::Data);
        allocation.extend_to(200, Allocation::Zero);
        allocation.extend_to(250, Allocation::Hole);
        allocation.extend_to(300, Allocation::Data);
        let found: Vec<_> = transfers(&dirty, &allocation)
            .iter()
            .map(|extent| (extent.end, extent.state))
            .collect();
        let wanted = [
            (100, Transfer::Skip),
            (150, Transfer::Read),
            (250, Transfer::Zeroes),
            (300, Transfer::Read),
        ];
        assert_eq!(found, wanted);
    }
}
