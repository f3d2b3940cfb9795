//! The destination's half: puts frames back into their order within a bound, refuses older incarnations.

use std::collections::BTreeMap;

use super::SessionError;
use crate::proto::wire::Frame;
use crate::proto::wire::message::Held;
use crate::proto::wire::repair::RUN;

/// Frames of one migration on their way in.
#[derive(Debug)]
pub struct DestinationSession {
    epoch: u32,
    window_bytes: u64,
    next: u64,
    stream_offset: u64,
    waiting: BTreeMap<u64, Frame>,
    waiting_bytes: u64,
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
        if frame.header.last {
            if self.waiting.range(sequence..).next().is_some() {
                return Err(SessionError::BeyondTheEnd { sequence });
            }
            self.end = Some(sequence + 1);
        }
        let bytes = frame.lane_bytes();
        if self.waiting_bytes + bytes > self.window_bytes {
            return Err(SessionError::WindowExceeded {
                buffered_bytes: self.waiting_bytes + bytes,
                limit_bytes: self.window_bytes,
            });
        }
        self.waiting_bytes += bytes;
        self.waiting.insert(sequence, frame);
        Ok(())
    }

    /// The next frame in order, if it has arrived.
    ///
    /// # Errors
    /// [`SessionError::OutOfStep`] where the frame does not continue the stream.
    pub fn poll_frame(&mut self) -> Result<Option<Frame>, SessionError> {
        let Some(frame) = self.waiting.remove(&self.next) else {
            return Ok(None);
        };
        self.waiting_bytes -= frame.lane_bytes();
        if frame.header.stream_offset != self.stream_offset {
            return Err(SessionError::OutOfStep {
                sequence: self.next,
                found: frame.header.stream_offset,
                expected: self.stream_offset,
            });
        }
        self.stream_offset += u64::from(frame.header.stream_bytes);
        self.next += 1;
        if self.next.is_multiple_of(RUN) {
            self.taken.clear();
        } else {
            self.taken.push(frame.clone());
        }
        Ok(Some(frame))
    }

    /// Begins a new incarnation; frames of the old one are refused from here on.
    ///
    /// # Errors
    /// [`SessionError::StaleEpoch`] unless `epoch` is newer.
    pub fn resume(&mut self, epoch: u32) -> Result<Held, SessionError> {
        if epoch <= self.epoch {
            return Err(SessionError::StaleEpoch {
                found: epoch,
                current: self.epoch,
            });
        }
        self.epoch = epoch;
        self.taken.clear();
        Ok(self.held())
    }

    /// What has arrived: everything before the frame that [`poll_frame`](Self::poll_frame) waits for, and ranges beyond.
    #[must_use]
    pub fn held(&self) -> Held {
        let mut beyond: Vec<(u64, u64)> = Vec::new();
        for &sequence in self.waiting.keys() {
            match beyond.last_mut() {
                Some((_, end)) if *end == sequence => *end += 1,
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
        let in_order = self
            .waiting
            .iter()
            .zip(self.next..)
            .take_while(|((sequence, _), next)| *sequence == next);
        in_order.map(|((_, frame), _)| frame.lane_bytes()).sum()
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
    use crate::proto::wire::frame::HEADER_LEN;

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
        std::iter::from_fn(|| source.poll_transmit()).last().unwrap()
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
            session.resume(1),
            Err(SessionError::StaleEpoch { found: 1, current: 1 })
        );
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
        assert!(source.poll_transmit().is_some());
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
                    0..=3 => if let Some(frame) = source.poll_transmit() {
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
    }
}
