//! The way back: what the program at the exit writes. It goes as messages, at most [`AHEAD`] bytes before the program at the entrance has taken
//! them, and is kept until then: what a cut has swallowed is said again.
//!
//! Bytes are counted from 0, and the end takes one number like a byte.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::proto::wire::SessionMessage;

/// Bytes that are not taken: 3.5 Mbit/s over 150 ms. They go beside control messages and before all bulk.
pub(super) const AHEAD: u64 = 64 << 10;

/// Bytes in one message.
pub(super) const LONGEST: usize = 16 << 10;

/// Messages that are not taken. A program that writes little at a time fills them, and then writes more into each.
pub(super) const MESSAGES_AHEAD: usize = 64;

/// What the exit has to say, and has said.
#[derive(Debug, Default)]
pub(super) struct Answers {
    kept: VecDeque<Bytes>,
    /// Number of the first that is kept.
    first: u64,
    /// Number after the last.
    end: u64,
    ended: bool,
}

impl Answers {
    /// Whether more may be said now.
    pub(super) fn has_room(&self) -> bool {
        !self.ended && self.end - self.first < AHEAD && self.kept.len() < MESSAGES_AHEAD
    }

    /// The program has written these; no bytes: it has ended. What to send for it.
    pub(super) fn say(&mut self, bytes: Bytes) -> SessionMessage {
        let message = answer(self.end, &bytes);
        self.ended = bytes.is_empty();
        self.end += numbers(&bytes);
        self.kept.push_back(bytes);
        message
    }

    /// All that may not have arrived, after a cut.
    pub(super) fn again(&self) -> impl Iterator<Item = SessionMessage> {
        self.kept.iter().scan(self.first, |number, bytes| {
            let message = answer(*number, bytes);
            *number += numbers(bytes);
            Some(message)
        })
    }

    /// The other end has taken everything before this number.
    ///
    /// # Errors
    /// It has not been said.
    pub(super) fn taken(&mut self, until: u64) -> Result<(), NeverSaid> {
        if until > self.end {
            return Err(NeverSaid { until });
        }
        while let Some(front) = self.kept.front_mut() {
            let all = numbers(front);
            let taken = until.saturating_sub(self.first).min(all);
            self.first += taken;
            if taken < all {
                let _ = front.split_to(taken as usize);
                break;
            }
            self.kept.pop_front();
        }
        Ok(())
    }

    /// Whether everything has been said and taken.
    pub(super) fn are_over(&self) -> bool {
        self.ended && self.first == self.end
    }

    /// Bytes so far.
    pub(super) fn bytes(&self) -> u64 {
        self.end - u64::from(self.ended)
    }
}

/// What of an answer the entrance has not had: all of them end where the last one did. No bytes of one that was not empty: it is old.
///
/// # Errors
/// There is a gap, or more than may be ahead of `taken`.
pub(super) fn fresh(expected: u64, taken: u64, offset: u64, mut bytes: Bytes) -> Result<Option<Bytes>, OutOfTurn> {
    let end = offset.checked_add(numbers(&bytes)).ok_or(OutOfTurn)?;
    if offset > expected || end > taken.saturating_add(AHEAD + LONGEST as u64) {
        return Err(OutOfTurn);
    }
    if end <= expected {
        return Ok(None);
    }
    let had = (expected - offset) as usize;
    let _ = bytes.split_to(had);
    Ok(Some(bytes))
}

fn answer(offset: u64, bytes: &Bytes) -> SessionMessage {
    SessionMessage::Answer {
        offset,
        bytes: bytes.to_vec(),
    }
}

fn numbers(bytes: &Bytes) -> u64 {
    (bytes.len() as u64).max(1)
}

/// The peer has taken what does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer took answers until {until}, which were never said")]
pub(super) struct NeverSaid {
    until: u64,
}

/// The peer says answers that are not the next ones, or too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer's answers are not in turn, or more than may wait")]
pub(super) struct OutOfTurn;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parts(message: SessionMessage) -> (u64, Bytes) {
        match message {
            SessionMessage::Answer { offset, bytes } => (offset, bytes.into()),
            other => unreachable!("{other:?}"),
        }
    }

    /// The entrance: what its program has taken.
    #[derive(Default)]
    struct Entrance {
        had: Vec<u8>,
        expected: u64,
        ended: bool,
    }

    impl Entrance {
        fn hear(&mut self, message: SessionMessage) {
            let (offset, bytes) = parts(message);
            let Some(bytes) = fresh(self.expected, self.expected, offset, bytes).unwrap() else {
                return;
            };
            assert!(!self.ended, "nothing follows the end");
            self.ended = bytes.is_empty();
            self.expected += numbers(&bytes);
            self.had.extend_from_slice(&bytes);
        }
    }

    proptest! {
        #[test]
        fn whatever_is_lost_in_cuts_the_other_end_has_every_byte_once_and_in_order(
            steps in prop::collection::vec((1_usize..5, any::<bool>(), any::<bool>(), any::<bool>()), 0..60),
        ) {
            let (mut answers, mut entrance, mut said) = (Answers::default(), Entrance::default(), Vec::new());
            for (len, arrives, is_told, cut) in steps {
                let bytes: Vec<u8> = (0..len).map(|step| (said.len() + step) as u8).collect();
                said.extend_from_slice(&bytes);
                let message = answers.say(bytes.into());
                // After one that is lost nothing arrives before the cut is over.
                if arrives && entrance.expected == parts(message.clone()).0 {
                    entrance.hear(message);
                }
                if is_told {
                    answers.taken(entrance.expected).unwrap();
                }
                if cut {
                    answers.again().for_each(|message| entrance.hear(message));
                }
            }
            answers.say(Bytes::new());
            prop_assert!(!answers.has_room());
            prop_assert_eq!(answers.bytes(), said.len() as u64);
            answers.again().for_each(|message| entrance.hear(message));
            answers.taken(entrance.expected).unwrap();
            prop_assert!(answers.are_over() && entrance.ended);
            prop_assert_eq!(&entrance.had, &said);
            prop_assert_eq!(answers.taken(said.len() as u64 + 2), Err(NeverSaid { until: said.len() as u64 + 2 }));
        }
    }

    #[test]
    fn no_more_is_said_than_the_other_end_must_keep() {
        let mut answers = Answers::default();
        while answers.has_room() {
            answers.say(Bytes::from(vec![1; LONGEST]));
        }
        assert_eq!(answers.bytes(), AHEAD);
        answers.taken(1).unwrap();
        assert!(answers.has_room());
        let mut little = Answers::default();
        while little.has_room() {
            little.say(Bytes::from_static(b"!"));
        }
        assert_eq!(little.bytes(), MESSAGES_AHEAD as u64);
        assert_eq!(parts(answers.again().next().unwrap()).0, 1);
    }

    #[test]
    fn answers_with_a_gap_or_too_far_ahead_are_refused() {
        let some = Bytes::from_static(b"some");
        assert_eq!(fresh(4, 0, 5, some.clone()), Err(OutOfTurn));
        assert_eq!(fresh(4, 0, u64::MAX, some.clone()), Err(OutOfTurn));
        assert_eq!(fresh(4, 0, 0, some.clone()), Ok(None));
        assert_eq!(fresh(4, 0, 2, some.clone()), Ok(Some(Bytes::from_static(b"me"))));
        let far = AHEAD + LONGEST as u64;
        assert_eq!(fresh(far, 0, far, some.clone()), Err(OutOfTurn));
        assert_eq!(fresh(far, 4, far, some.clone()), Ok(Some(some)));
    }
}
