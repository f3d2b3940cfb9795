//! The source's half: numbers frames, keeps them until the destination's decoder has them, sends the gaps after a cut.

use std::collections::VecDeque;

use super::tail::TailRun;
use super::{EncodedFrame, SessionError};
use crate::proto::page::MigrationId;
use crate::proto::wire::frame::MAX_UNACKNOWLEDGED;
use crate::proto::wire::message::Held;
use crate::proto::wire::repair::{MAX_COVERED, RUN};
use crate::proto::wire::{Frame, FrameHeader};

/// More frames are never restored and not yet given to the destination's vmm.
const LAST_DECODED: usize = 8;

/// Frames of one migration on their way out.
///
/// Feed payloads with [`push`](Self::push); whenever [`poll_transmit`](Self::poll_transmit) gives a frame, send it on a lane of its
/// own. `poll_transmit` has something new after `push`, [`on_ack`](Self::on_ack) (the window opens) and [`resume`](Self::resume).
#[derive(Debug)]
pub struct SourceSession {
    migration: MigrationId,
    epoch: u32,
    window_bytes: u64,
    kept: VecDeque<Kept>,
    /// Sequence of `kept[0]`; everything before is at the decoder.
    acknowledged: u64,
    /// Frames before this one have left, in this epoch or an earlier one.
    left: u64,
    /// Index into `kept` from which `poll_transmit` looks for something to send.
    cursor: usize,
    stream_offset: u64,
    /// Stream bytes that the decoder has.
    decoded_bytes: u64,
    /// Bytes of the lanes that it restored last, and what they stand for.
    decoded: VecDeque<(u64, u64)>,
    unsent_bytes: u64,
    outstanding_bytes: u64,
    outstanding: usize,
    resent_bytes: u64,
    ended: bool,
}

#[derive(Debug)]
struct Kept {
    frame: Frame,
    sent: Sent,
    /// Number of the QUIC stream that carries it, on the connection of the current epoch.
    lane: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Never,
    Again,
    Now,
}

impl SourceSession {
    /// A session at its beginning. `window_bytes` bounds what is sent and not yet acknowledged.
    #[must_use]
    pub fn new(migration: MigrationId, window_bytes: u64) -> Self {
        Self {
            migration,
            epoch: 0,
            window_bytes,
            kept: VecDeque::new(),
            acknowledged: 0,
            left: 0,
            cursor: 0,
            stream_offset: 0,
            decoded_bytes: 0,
            decoded: VecDeque::with_capacity(LAST_DECODED),
            unsent_bytes: 0,
            outstanding_bytes: 0,
            outstanding: 0,
            resent_bytes: 0,
            ended: false,
        }
    }

    /// Appends the frame that continues the stream. `last`: nothing follows.
    ///
    /// # Panics
    /// After the last one; the caller has seen the stream's end only once.
    pub fn push(&mut self, encoded: EncodedFrame, last: bool) {
        assert!(!self.ended, "nothing follows the last frame");
        self.ended = last;
        let header = FrameHeader {
            kind: encoded.kind,
            last,
            held: encoded.held,
            migration: self.migration,
            epoch: self.epoch,
            sequence: self.frames(),
            stream_offset: self.stream_offset,
            stream_bytes: encoded.stream_bytes,
        };
        self.stream_offset += u64::from(encoded.stream_bytes);
        let frame = Frame {
            header,
            payload: encoded.payload,
        };
        self.unsent_bytes += frame.lane_bytes();
        self.kept.push_back(Kept {
            frame,
            sent: Sent::Never,
            lane: None,
        });
    }

    /// The next frame for a lane of this epoch, in sequence, or `None` while there is none or the window is full. Whoever serves
    /// an epoch that is over gets nothing: it would be lost with the connection of that epoch.
    pub fn poll_transmit(&mut self, epoch: u32) -> Option<Frame> {
        if epoch != self.epoch {
            return None;
        }
        let from = self.cursor.min(self.kept.len());
        let found = self.kept.iter().skip(from).position(|kept| kept.sent != Sent::Now)? + from;
        self.cursor = found;
        let kept = &mut self.kept[found];
        let bytes = kept.frame.lane_bytes();
        let is_full = self.outstanding_bytes > 0 && self.outstanding_bytes + bytes > self.window_bytes;
        if is_full || self.outstanding == MAX_UNACKNOWLEDGED {
            return None;
        }
        match kept.sent {
            Sent::Again => self.resent_bytes += bytes,
            _ => self.left = kept.frame.header.sequence + 1,
        }
        kept.sent = Sent::Now;
        kept.frame.header.epoch = self.epoch;
        self.unsent_bytes -= bytes;
        self.outstanding_bytes += bytes;
        self.outstanding += 1;
        self.cursor = found + 1;
        Some(kept.frame.clone())
    }

    /// Frame `sequence` left on the lane with this number, in this epoch. One that is acknowledged by now needs no lane, and a
    /// lane of an epoch that is over is of no use.
    pub fn sent_on(&mut self, epoch: u32, sequence: u64, lane: u64) {
        if epoch != self.epoch {
            return;
        }
        let at = sequence
            .checked_sub(self.acknowledged)
            .and_then(|at| usize::try_from(at).ok());
        if let Some(kept) = at.and_then(|at| self.kept.get_mut(at)) {
            kept.lane = Some(lane);
        }
    }

    /// What is in flight once the stream has ended and everything has left, the newest first: the repair of the oldest by QUIC
    /// itself is on its way already. Empty before.
    #[must_use]
    pub fn tail(&self) -> Vec<TailRun> {
        let mut runs: Vec<TailRun> = Vec::new();
        if !self.ended || self.unsent_bytes > 0 {
            return runs;
        }
        let mut covered = usize::MAX;
        let mut continues = false;
        for kept in &self.kept {
            let bytes = kept.frame.lane_bytes() as usize;
            let Some(lane) = kept.lane else {
                continues = false;
                continue;
            };
            continues &=
                !kept.frame.header.sequence.is_multiple_of(RUN) && covered.saturating_add(bytes) <= MAX_COVERED;
            if !continues {
                runs.push(TailRun { frames: Vec::new() });
                covered = 0;
            }
            covered += bytes;
            continues = true;
            let run = runs.last_mut().expect("one was pushed");
            run.frames.push((kept.frame.clone(), lane));
        }
        runs.reverse();
        runs
    }

    /// The destination's decoder has everything before `held.next`.
    ///
    /// # Errors
    /// [`SessionError::AckBeyondSent`]: the peer is not to be trusted any further.
    pub fn on_ack(&mut self, held: &Held) -> Result<(), SessionError> {
        if held.next > self.left {
            return Err(SessionError::AckBeyondSent {
                acknowledged: held.next,
                sent: self.left,
            });
        }
        while self.acknowledged < held.next {
            let kept = self.kept.pop_front().expect("acknowledged frames are kept until now");
            let bytes = kept.frame.lane_bytes();
            let stream_bytes = u64::from(kept.frame.header.stream_bytes);
            self.decoded_bytes += stream_bytes;
            if self.decoded.len() == LAST_DECODED {
                self.decoded.pop_front();
            }
            self.decoded.push_back((bytes, stream_bytes));
            match kept.sent {
                Sent::Now => {
                    self.outstanding_bytes -= bytes;
                    self.outstanding -= 1;
                }
                Sent::Never | Sent::Again => self.unsent_bytes -= bytes,
            }
            self.acknowledged += 1;
            self.cursor = self.cursor.saturating_sub(1);
        }
        Ok(())
    }

    /// Begins a new incarnation after a cut: everything that the destination does not hold is sent again.
    ///
    /// # Errors
    /// [`SessionError::StaleEpoch`] unless `epoch` is newer; [`SessionError::AckBeyondSent`].
    pub fn resume(&mut self, epoch: u32, held: &Held) -> Result<(), SessionError> {
        if epoch <= self.epoch {
            return Err(SessionError::StaleEpoch {
                found: epoch,
                current: self.epoch,
            });
        }
        self.on_ack(held)?;
        self.epoch = epoch;
        self.cursor = 0;
        // Both ascend. Ranges of a peer that do not are misread, to its own harm.
        let mut beyond = held.beyond.iter().peekable();
        for kept in &mut self.kept {
            kept.lane = None;
            let bytes = kept.frame.lane_bytes();
            let sequence = kept.frame.header.sequence;
            while beyond.next_if(|(_, end)| *end <= sequence).is_some() {}
            let arrived = beyond.peek().is_some_and(|(first, _)| *first <= sequence);
            match (kept.sent, arrived) {
                (Sent::Now, false) => {
                    kept.sent = Sent::Again;
                    self.outstanding_bytes -= bytes;
                    self.outstanding -= 1;
                    self.unsent_bytes += bytes;
                }
                (Sent::Again, true) => {
                    kept.sent = Sent::Now;
                    self.outstanding_bytes += bytes;
                    self.outstanding += 1;
                    self.unsent_bytes -= bytes;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Bytes of frames that wait for a lane.
    #[must_use]
    pub fn unsent_bytes(&self) -> u64 {
        self.unsent_bytes
    }

    /// Bytes of frames that are sent and not acknowledged by the decoder.
    #[must_use]
    pub fn outstanding_bytes(&self) -> u64 {
        self.outstanding_bytes
    }

    /// Stream bytes that the decoder has restored.
    #[must_use]
    pub fn decoded_bytes(&self) -> u64 {
        self.decoded_bytes
    }

    /// Stream bytes that wait at the destination, which has `queued` bytes of frames and whose vmm has taken `taken` bytes of the stream: what it has
    /// restored and not given away, and what the frames stand for that arrived behind that.
    #[must_use]
    pub fn stream_bytes_waiting(&self, queued: u64, taken: u64) -> u64 {
        let restored = self.decoded_bytes.saturating_sub(taken);
        let (mut left, mut unaccounted) = (queued, restored);
        for &(lane_bytes, stream_bytes) in self.decoded.iter().rev() {
            if unaccounted == 0 {
                break;
            }
            left = left.saturating_sub(lane_bytes);
            unaccounted = unaccounted.saturating_sub(stream_bytes);
        }
        let arrived = self.kept.iter().take_while(|kept| kept.sent == Sent::Now);
        let arrived = arrived.map_while(|kept| {
            left = left.checked_sub(kept.frame.lane_bytes())?;
            Some(u64::from(kept.frame.header.stream_bytes))
        });
        restored + arrived.sum::<u64>()
    }

    /// Bytes of frames that were sent again after cuts.
    #[must_use]
    pub fn resent_bytes(&self) -> u64 {
        self.resent_bytes
    }

    /// Frames that exist, acknowledged or not.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.acknowledged + self.kept.len() as u64
    }

    /// The incarnation that is current.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Whether the last frame exists and the decoder has it.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.ended && self.kept.is_empty()
    }
}
