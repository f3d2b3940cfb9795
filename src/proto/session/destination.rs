//! The destination's half: puts frames back into their order within a bound, refuses older incarnations.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::SessionError;
use crate::proto::wire::Frame;
use crate::proto::wire::frame::MAX_UNACKNOWLEDGED;
use crate::proto::wire::message::Held;
use crate::proto::wire::repair::RUN;

/// Ranges that [`DestinationSession::held`] tells at the most: a pair takes up to 20 bytes of a message of 512 KiB. What lies beyond
/// is sent again, and dropped.
const MOST_RANGES: usize = 4096;

/// Frames of one migration on their way in.
#[derive(Debug)]
pub struct DestinationSession {
    epoch: u32,
    window_bytes: u64,
    next: u64,
    stream_offset: u64,
    waiting: BTreeMap<u64, Frame>,
    waiting_bytes: u64,
    /// The first frame, from `next` on, that has not arrived.
    gap: u64,
    /// Bytes of the frames from `next` to `gap`.
    ready_bytes: u64,
    /// Taken frames of the run that is not over: what is missing of it may have to be computed from them.
    taken: Vec<Frame>,
    end: Option<u64>,
}

impl DestinationSession {
    /// A session at its beginning. `window_bytes` bounds what waits out of order; the source agreed to it.
    #[must_use]
    pub fn new(window_bytes: u64) -> Self {
        Self {
            epoch: 0,
            window_bytes,
            next: 0,
            stream_offset: 0,
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            gap: 0,
            ready_bytes: 0,
            taken: Vec::new(),
            end: None,
        }
    }

    /// Takes a frame from a lane. One that is already held is dropped without a word: resumes may overlap.
    ///
    /// # Errors
    /// [`SessionError`]; on [`SessionError::OldEpoch`] the session goes on, on anything else the peer broke the agreement.
    pub fn receive(&mut self, frame: Frame) -> Result<(), SessionError> {
        let sequence = frame.header.sequence;
        if frame.header.epoch != self.epoch {
            return Err(SessionError::OldEpoch {
                found: frame.header.epoch,
                current: self.epoch,
            });
        }
        if self.end.is_some_and(|end| sequence >= end) {
            return Err(SessionError::BeyondTheEnd { sequence });
        }
        if sequence < self.next || self.waiting.contains_key(&sequence) {
            return Ok(());
        }
        if frame.header.last && self.waiting.range(sequence..).next().is_some() {
            return Err(SessionError::BeyondTheEnd { sequence });
        }
        if self.waiting.len() == MAX_UNACKNOWLEDGED {
            return Err(SessionError::TooManyFrames {
                sequence,
                limit: MAX_UNACKNOWLEDGED,
            });
        }
        let bytes = frame.lane_bytes();
        if self.waiting_bytes + bytes > self.window_bytes {
            return Err(SessionError::WindowExceeded {
                buffered_bytes: self.waiting_bytes + bytes,
                limit_bytes: self.window_bytes,
            });
        }
        if frame.header.last {
            self.end = Some(sequence + 1);
        }
        self.waiting_bytes += bytes;
        self.waiting.insert(sequence, frame);
        while let Some(frame) = self.waiting.get(&self.gap) {
            self.ready_bytes += frame.lane_bytes();
            self.gap += 1;
        }
        Ok(())
    }

    /// The next frame in order, if it has arrived.
    ///
    /// # Errors
    /// [`SessionError::OutOfStep`] where the frame does not continue the stream.
    pub fn poll_frame(&mut self) -> Result<Option<Frame>, SessionError> {
        let Entry::Occupied(entry) = self.waiting.entry(self.next) else {
            return Ok(None);
        };
        let found = entry.get().header.stream_offset;
        if found != self.stream_offset {
            return Err(SessionError::OutOfStep {
                sequence: self.next,
                found,
                expected: self.stream_offset,
            });
        }
        let frame = entry.remove();
        self.waiting_bytes -= frame.lane_bytes();
        self.ready_bytes -= frame.lane_bytes();
        self.stream_offset += u64::from(frame.header.stream_bytes);
        self.next += 1;
        if self.next.is_multiple_of(RUN) {
            self.taken.clear();
        } else {
            self.taken.push(frame.clone());
        }
        Ok(Some(frame))
    }

    /// Begins a new incarnation; frames of the old one are refused from here on. Asked again, it answers again: a source that did
    /// not get the answer has sent nothing of this incarnation yet, and calls with the same epoch.
    ///
    /// # Errors
    /// [`SessionError::StaleEpoch`] where a newer one has begun.
    pub fn resume(&mut self, epoch: u32) -> Result<Held, SessionError> {
        if epoch < self.epoch {
            return Err(SessionError::StaleEpoch {
                found: epoch,
                current: self.epoch,
            });
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            self.taken.clear();
        }
        Ok(self.held())
    }

    /// What has arrived: everything before the frame that [`poll_frame`](Self::poll_frame) waits for, and ranges beyond, at most
    /// so many as a message takes.
    #[must_use]
    pub fn held(&self) -> Held {
        let mut beyond: Vec<(u64, u64)> = Vec::new();
        for &sequence in self.waiting.keys() {
            let told = beyond.len();
            match beyond.last_mut() {
                Some((_, end)) if *end == sequence => *end += 1,
                _ if told == MOST_RANGES => break,
                _ => beyond.push((sequence, sequence + 1)),
            }
        }
        Held {
            next: self.next,
            beyond,
        }
    }

    /// Whether the frame has arrived.
    #[must_use]
    pub fn has(&self, sequence: u64) -> bool {
        sequence < self.next || self.waiting.contains_key(&sequence)
    }

    /// The frame, where it has arrived and its run is not over.
    #[must_use]
    pub fn frame(&self, sequence: u64) -> Option<&Frame> {
        let taken = || self.taken.iter().find(|frame| frame.header.sequence == sequence);
        self.waiting.get(&sequence).or_else(taken)
    }

    /// The incarnation that is current.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The first frame that was not yet taken by [`poll_frame`](Self::poll_frame).
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.next
    }

    /// Bytes of frames that have arrived in order and are not yet taken.
    #[must_use]
    pub fn ready_bytes(&self) -> u64 {
        self.ready_bytes
    }

    /// Bytes that wait out of order.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes
    }

    /// Whether every frame up to the last has been taken.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.end == Some(self.next)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::{EncodedFrame, SourceSession};
    use super::*;
    use crate::proto::page::MigrationId;
    use crate::proto::wire::FrameKind;
    use crate::proto::wire::frame::{HEADER_LEN, MAX_POSITION};

    fn encoded(payload: Vec<u8>) -> EncodedFrame {
        let stream_bytes = u32::try_from(payload.len()).unwrap();
        EncodedFrame {
            kind: FrameKind::Plain,
            payload: payload.into(),
            stream_bytes,
            held: false,
        }
    }

    fn frame(sequence: u64, last: bool) -> Frame {
        let mut source = SourceSession::new(MigrationId([1; 16]), 1 << 20);
        for at in 0..=sequence {
            source.push(encoded(b"ab".to_vec()), last && at == sequence);
        }
        std::iter::from_fn(|| source.poll_transmit(0)).last().unwrap()
    }

    #[test]
    fn a_frame_of_an_older_incarnation_is_refused() {
        let mut session = DestinationSession::new(1 << 20);
        session.resume(1).unwrap();
        assert_eq!(
            session.receive(frame(0, false)),
            Err(SessionError::OldEpoch { found: 0, current: 1 })
        );
        assert_eq!(
            session.resume(0),
            Err(SessionError::StaleEpoch { found: 0, current: 1 })
        );
    }

    #[test]
    fn a_source_that_missed_the_answer_to_its_attach_is_answered_again() {
        let mut source = SourceSession::new(MigrationId([1; 16]), 1 << 20);
        let mut destination = DestinationSession::new(1 << 20);
        for at in 0..3 {
            source.push(encoded(b"ab".to_vec()), at == 2);
        }
        let first = source.poll_transmit(0).unwrap();
        destination.receive(first).unwrap();
        assert!(destination.poll_frame().unwrap().is_some());
        let lost = destination.resume(1).unwrap();
        let held = destination.resume(1).unwrap();
        assert_eq!(held, lost);
        source.resume(1, &held).unwrap();
        while let Some(frame) = source.poll_transmit(1) {
            destination.receive(frame).unwrap();
        }
        while destination.poll_frame().unwrap().is_some() {}
        assert!(destination.is_finished());
    }

    #[test]
    fn an_attach_that_is_repeated_leaves_repairs_what_they_need() {
        let mut session = DestinationSession::new(1 << 20);
        let mut first = frame(0, false);
        first.header.epoch = 1;
        session.resume(1).unwrap();
        session.receive(first.clone()).unwrap();
        assert!(session.poll_frame().unwrap().is_some());
        session.resume(1).unwrap();
        assert_eq!(session.frame(0), Some(&first));
        session.resume(2).unwrap();
        assert_eq!(session.frame(0), None);
    }

    #[test]
    fn a_sender_of_an_incarnation_that_is_over_takes_nothing_with_it() {
        let mut source = SourceSession::new(MigrationId([1; 16]), 1 << 20);
        source.push(encoded(b"ab".to_vec()), true);
        source.resume(1, &Held::default()).unwrap();
        assert_eq!(source.poll_transmit(0), None);
        let frame = source.poll_transmit(1).unwrap();
        source.sent_on(0, frame.header.sequence, 77);
        assert!(source.tail().is_empty());
        source.sent_on(1, frame.header.sequence, 78);
        assert_eq!(source.tail()[0].frames[0].1, 78);
    }

    #[test]
    fn as_many_frames_wait_as_are_sent_unacknowledged_and_not_one_more() {
        let mut source = SourceSession::new(MigrationId([1; 16]), u64::MAX);
        let mut session = DestinationSession::new(u64::MAX);
        for _ in 0..MAX_UNACKNOWLEDGED + 2 {
            source.push(encoded(Vec::new()), false);
        }
        let mut last = None;
        while let Some(frame) = source.poll_transmit(0) {
            // The first is late, so that all others wait for it.
            if frame.header.sequence > 0 {
                session.receive(frame.clone()).unwrap();
            }
            last = Some(frame);
        }
        let mut next = last.unwrap();
        assert_eq!(next.header.sequence + 1, MAX_UNACKNOWLEDGED as u64);
        next.header.sequence += 1;
        session.receive(next.clone()).unwrap();
        next.header.sequence += 1;
        assert!(matches!(session.receive(next), Err(SessionError::TooManyFrames { .. })));
    }

    #[test]
    fn more_gaps_than_a_message_tells_are_sent_again() {
        let mut source = SourceSession::new(MigrationId([1; 16]), u64::MAX);
        let mut session = DestinationSession::new(u64::MAX);
        let frames = 2 * MOST_RANGES as u64 + 8;
        for _ in 0..frames {
            source.push(encoded(b"ab".to_vec()), false);
        }
        while let Some(frame) = source.poll_transmit(0) {
            if frame.header.sequence % 2 == 1 {
                session.receive(frame).unwrap();
            }
        }
        let held = session.resume(1).unwrap();
        assert_eq!(held.beyond.len(), MOST_RANGES);
        source.resume(1, &held).unwrap();
        let again = std::iter::from_fn(|| source.poll_transmit(1)).count() as u64;
        assert_eq!(again, frames - MOST_RANGES as u64);
    }

    #[test]
    fn a_frame_that_is_out_of_step_changes_nothing() {
        let mut session = DestinationSession::new(1 << 20);
        let mut crooked = frame(0, false);
        crooked.header.stream_offset = 7;
        session.receive(crooked).unwrap();
        let before = (session.held(), session.waiting_bytes(), session.ready_bytes());
        for _ in 0..2 {
            assert!(matches!(
                session.poll_frame(),
                Err(SessionError::OutOfStep { found: 7, .. })
            ));
        }
        assert_eq!((session.held(), session.waiting_bytes(), session.ready_bytes()), before);
    }

    #[test]
    fn what_waits_out_of_order_is_bounded_just_where_it_was_agreed() {
        let bytes = (HEADER_LEN + 2) as u64;
        let mut session = DestinationSession::new(2 * bytes);
        session.receive(frame(1, false)).unwrap();
        session.receive(frame(2, false)).unwrap();
        assert!(matches!(
            session.receive(frame(3, false)),
            Err(SessionError::WindowExceeded { .. })
        ));
    }

    #[test]
    fn nothing_lies_beyond_the_last_frame() {
        let mut session = DestinationSession::new(1 << 20);
        session.receive(frame(2, true)).unwrap();
        assert_eq!(
            session.receive(frame(3, false)),
            Err(SessionError::BeyondTheEnd { sequence: 3 })
        );
        let mut session = DestinationSession::new(1 << 20);
        session.receive(frame(3, false)).unwrap();
        assert_eq!(
            session.receive(frame(2, true)),
            Err(SessionError::BeyondTheEnd { sequence: 2 })
        );
    }

    #[test]
    fn an_acknowledgement_of_what_was_never_sent_is_refused() {
        let mut source = SourceSession::new(MigrationId([1; 16]), 1 << 20);
        source.push(encoded(b"ab".to_vec()), false);
        let held = Held {
            next: 1,
            beyond: Vec::new(),
        };
        assert_eq!(
            source.on_ack(&held),
            Err(SessionError::AckBeyondSent {
                acknowledged: 1,
                sent: 0
            })
        );
        assert!(source.poll_transmit(0).is_some());
        assert_eq!(source.on_ack(&held), Ok(()));
    }

    proptest! {
        /// Lanes overtake each other, connections die and take frames with them, acknowledgements come late: the frames
        /// come out once each and in order, and only what was lost is sent again.
        #[test]
        fn every_frame_comes_out_once_and_in_order_whatever_the_lanes_do(
            sizes in proptest::collection::vec(1usize..200, 1..60),
            steps in proptest::collection::vec((0u8..10, 0usize..1000), 0..300),
            window in 300u64..5000,
        ) {
            let mut source = SourceSession::new(MigrationId([1; 16]), window);
            let mut destination = DestinationSession::new(window);
            for (at, size) in sizes.iter().enumerate() {
                source.push(encoded(vec![u8::try_from(at).unwrap(); *size]), at + 1 == sizes.len());
            }
            let mut lanes = Vec::new();
            let mut out = Vec::new();
            let mut lost = BTreeSet::new();
            let mut sent = 0usize;
            let mut step = |action: u8, index: usize, lanes: &mut Vec<Frame>| {
                match action {
                    0..=3 => if let Some(frame) = source.poll_transmit(source.epoch()) {
                        sent += 1;
                        lanes.push(frame);
                    },
                    4..=7 => if !lanes.is_empty() {
                        let frame = lanes.swap_remove(index % lanes.len());
                        destination.receive(frame).unwrap();
                        while let Some(frame) = destination.poll_frame().unwrap() {
                            out.push(frame);
                        }
                    },
                    8 => source.on_ack(&Held { next: destination.next_sequence(), beyond: Vec::new() }).unwrap(),
                    _ => {
                        lost.extend(lanes.drain(..).map(|frame| frame.header.sequence));
                        let epoch = source.epoch() + 1;
                        let held = destination.resume(epoch).unwrap();
                        source.resume(epoch, &held).unwrap();
                    }
                }
                (source.is_finished(), source.outstanding_bytes())
            };
            for (action, index) in &steps {
                let (_, outstanding) = step(*action, *index, &mut lanes);
                prop_assert!(outstanding <= window);
            }
            for round in 0..40 * sizes.len() {
                let action = [0, 4, 8][round % 3];
                if step(action, 0, &mut lanes).0 {
                    break;
                }
            }
            prop_assert!(destination.is_finished());
            let sequences: Vec<u64> = out.iter().map(|frame| frame.header.sequence).collect();
            prop_assert_eq!(sequences, (0..sizes.len() as u64).collect::<Vec<_>>());
            let bytes: Vec<usize> = out.iter().map(|frame| frame.payload.len()).collect();
            prop_assert_eq!(&bytes, &sizes);
            prop_assert!(sent >= sizes.len());
            if lost.is_empty() {
                prop_assert_eq!(sent, sizes.len());
            }
        }

        /// Headers of a peer that means ill, as far as they decode: refused or sorted in, never a panic, and the running counts
        /// stay what a walk over the frames finds.
        #[test]
        fn whatever_decodes_is_refused_or_sorted_in(
            steps in proptest::collection::vec(
                (0u8..8, position(), position(), 0u32..3, any::<bool>(), 0usize..100),
                0..80,
            ),
            window in 0u64..4000,
        ) {
            let mut session = DestinationSession::new(window);
            for (action, sequence, stream_offset, epoch, last, len) in steps {
                match action {
                    0 => drop(session.resume(epoch)),
                    1 => drop(session.resume(u32::MAX - epoch)),
                    2 | 3 => while let Ok(Some(_)) = session.poll_frame() {},
                    _ => {
                        let mut frame = frame(0, last);
                        frame.payload = vec![0; len].into();
                        frame.header.stream_bytes = u32::try_from(len).unwrap();
                        (frame.header.sequence, frame.header.stream_offset) = (sequence, stream_offset);
                        frame.header.epoch = if action == 4 { epoch } else { session.epoch() };
                        let lane = [frame.encode_header(), frame.payload].concat();
                        if let Ok(frame) = Frame::decode(lane.into()) {
                            let _ = session.receive(frame);
                        }
                    }
                }
                let held = session.held();
                prop_assert!(held.beyond.windows(2).all(|pair| pair[0].1 < pair[1].0));
                prop_assert!(session.waiting_bytes() <= window);
                let ready = session.waiting.iter().zip(session.next..).take_while(|((at, _), next)| **at == *next);
                prop_assert_eq!(session.ready_bytes(), ready.map(|((_, frame), _)| frame.lane_bytes()).sum::<u64>());
                let _ = (session.has(sequence), session.frame(sequence), session.is_finished());
            }
        }

        /// What a peer says it holds may be anything.
        #[test]
        fn no_account_of_what_is_held_confuses_the_source(
            frames in 0usize..20,
            steps in proptest::collection::vec(
                (0u8..4, position(), proptest::collection::vec((position(), position()), 0..6)),
                0..30,
            ),
        ) {
            let mut source = SourceSession::new(MigrationId([1; 16]), 400);
            for at in 0..frames {
                source.push(encoded(vec![0; at]), false);
            }
            let all = source.unsent_bytes();
            let mut acknowledged = 0;
            for (action, next, beyond) in steps {
                let held = Held { next, beyond };
                let before = source.unsent_bytes() + source.outstanding_bytes();
                match action {
                    0 => drop(source.on_ack(&held)),
                    1 => drop(source.resume(source.epoch() + 1, &held)),
                    _ => while source.poll_transmit(source.epoch()).is_some() {},
                }
                let after = source.unsent_bytes() + source.outstanding_bytes();
                acknowledged += before - after;
                prop_assert!(acknowledged <= all);
            }
        }
    }

    /// Near the beginning, near the end of what can be said, or anywhere.
    fn position() -> impl Strategy<Value = u64> {
        prop_oneof![
            8 => 0u64..12,
            1 => MAX_POSITION - 2..MAX_POSITION + 2,
            1 => u64::MAX - 2..=u64::MAX,
            1 => any::<u64>(),
        ]
    }
}
