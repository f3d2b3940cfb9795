//! The lanes of one connection while they arrive, and the repairs over them: what to compute, when, and when to give a repair up.
//!
//! ```text
//! opened ─▶ put … put ─▶ finish: the lane's frame ─▶ delivered ─┐
//!              │                                                 ▼
//!              └── a repair's head is there: kept ──▶ due? ─▶ Computation ─▶ Computed ─▶ done: due again, or forgotten
//! ```
//!
//! Computing copies and hashes up to 4 MiB. So a repair is computed only when that makes at least one lane whole, by one at a time, and
//! given up when what it made is not what it promised.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use bytes::Bytes;

use super::arriving::{Arriving, MOST_PIECES};
use super::{check_of, computable, solve};
use crate::proto::page::MigrationId;
use crate::proto::wire::frame::HEADER_LEN;
use crate::proto::wire::repair::{RepairError, RepairHead};
use crate::proto::wire::{Frame, FrameError, FrameHeader, FrameKind};

/// Repairs that wait for more of what they cover. At 10 Gbit/s and 150 ms 180 cover all that is in flight.
const MOST_REPAIRS: usize = 1024;

/// Computations at a time: each holds up to 4.5 MiB.
const MOST_COMPUTATIONS: usize = 4;

/// What has come of one connection's lanes. A lane is named by the number of its QUIC stream.
#[derive(Debug, Default)]
pub struct Reassembly {
    /// Connections that take lanes beside this one, and have their part of what repairs may take.
    others: usize,
    lanes: HashMap<u64, Lane>,
    /// Lanes before this number were opened: one that is not among `lanes` is over.
    opened: u64,
    /// By the number of the lane that brought them.
    repairs: BTreeMap<u64, Repair>,
    /// The repair over each covered lane.
    covering: HashMap<u64, u64>,
    /// Repairs to be looked at when a computation ends.
    waiting: BTreeSet<u64>,
    computations: usize,
    memory_bytes: usize,
}

#[derive(Debug, Default)]
struct Lane {
    arriving: Arriving,
    /// Once it has arrived, and the length of the lane that follows from it.
    header: Option<(FrameHeader, usize)>,
}

/// A repair whose head has arrived, and what has come of its parity.
#[derive(Debug)]
struct Repair {
    header: FrameHeader,
    head: RepairHead,
    lane_bytes: usize,
    arriving: Arriving,
    /// Of each covered lane, whether its frame is with the session.
    whole: Vec<bool>,
    is_being_computed: bool,
}

impl Reassembly {
    /// For one of so many connections over which lanes are spread: it keeps its part of the repairs that one connection may, and computes
    /// its part of them at a time, one at the least.
    #[must_use]
    pub fn one_of(connections: usize) -> Self {
        Self {
            others: connections.saturating_sub(1),
            ..Self::default()
        }
    }

    /// A lane was opened. Lanes are opened in the order of their numbers.
    pub fn open(&mut self, lane: u64) {
        self.lanes.insert(lane, Lane::default());
        self.opened = lane + 1;
    }

    /// Takes what has come of a lane. Returns the header of its frame when that has become complete.
    ///
    /// # Errors
    /// [`ReassemblyError`]: the peer broke the protocol.
    pub fn put(&mut self, number: u64, offset: usize, bytes: &[u8]) -> Result<Option<FrameHeader>, ReassemblyError> {
        let end = offset + bytes.len();
        if let Some(repair) = self.repairs.get_mut(&number) {
            check_len(repair.lane_bytes, end)?;
            let before = repair.arriving.memory_bytes();
            let fits = repair.arriving.put(offset, bytes);
            self.memory_bytes = self.memory_bytes - before + repair.arriving.memory_bytes();
            return if fits {
                Ok(None)
            } else {
                Err(ReassemblyError::TooManyPieces)
            };
        }
        // Of a lane that is not kept, what comes is of no use.
        let Some(lane) = self.lanes.get_mut(&number) else {
            return Ok(None);
        };
        let before = lane.arriving.memory_bytes();
        let taken = lane.put(offset, bytes);
        self.memory_bytes = self.memory_bytes - before + lane.arriving.memory_bytes();
        let header = taken?;
        if let Some((repair, head)) = lane.repair_head()? {
            self.keep(number, repair, head);
        }
        Ok(header)
    }

    /// A lane has come to its end. Its frame, which the session must be given; `None` for a repair.
    ///
    /// # Errors
    /// [`ReassemblyError`]: the peer broke the protocol.
    pub fn finish(&mut self, number: u64) -> Result<Option<Frame>, ReassemblyError> {
        if let Some(repair) = self.repairs.get(&number) {
            return match repair.arriving.prefix_len() {
                len if len == repair.lane_bytes => Ok(None),
                len => Err(wrong_len(repair.lane_bytes, len).into()),
            };
        }
        let Some(lane) = self.take(number) else {
            return Ok(None);
        };
        match lane.header {
            Some((header, _)) if header.kind == FrameKind::Repair => Err(RepairError::Truncated.into()),
            _ => Ok(Some(Frame::decode(lane.arriving.into_bytes())?)),
        }
    }

    /// The session has the frame of this lane.
    pub fn delivered(&mut self, number: u64) {
        let Some(id) = self.covering.get(&number).copied() else {
            return;
        };
        let repair = self.repairs.get_mut(&id).expect("what covers a lane is kept");
        for (covered, whole) in repair.head.lanes.iter().zip(&mut repair.whole) {
            *whole |= covered.lane == number;
        }
        self.forget_if_over(id);
    }

    /// Nothing more comes of this lane, and what has come is of no use.
    pub fn abandon(&mut self, number: u64) {
        self.take(number);
        self.forget(number);
        if let Some(id) = self.covering.get(&number).copied() {
            self.forget(id);
        }
    }

    /// What is to be computed now that more of this lane has come: of the repair over it, or that it brings. Give it to
    /// [`done`](Self::done) in the end.
    pub fn due(&mut self, number: u64) -> Option<Computation> {
        let id = match self.covering.get(&number) {
            Some(id) => *id,
            None => number,
        };
        if self.computations < (MOST_COMPUTATIONS / (1 + self.others)).max(1) {
            return self.begin(id);
        }
        if self.repairs.contains_key(&id) {
            self.waiting.insert(id);
        }
        None
    }

    /// A computation has ended: what it made is with the session, or its repair was of no use (`None`). Returns the next one.
    pub fn done(&mut self, id: u64, made: Option<&[usize]>) -> Option<Computation> {
        self.computations -= 1;
        match (made, self.repairs.get_mut(&id)) {
            (Some(made), Some(repair)) => {
                repair.is_being_computed = false;
                made.iter().for_each(|at| repair.whole[*at] = true);
                self.forget_if_over(id);
                self.waiting.insert(id);
            }
            (None, Some(_)) => self.forget(id),
            (_, None) => {}
        }
        while let Some(id) = self.waiting.pop_first() {
            if let Some(next) = self.begin(id) {
                return Some(next);
            }
        }
        None
    }

    /// Memory that lanes and repairs take.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    fn keep(&mut self, number: u64, header: FrameHeader, head: RepairHead) {
        let Some(lane) = self.take(number) else { return };
        let lanes: BTreeSet<u64> = head.lanes.iter().map(|covered| covered.lane).collect();
        let is_free = |lane: &u64| !self.covering.contains_key(lane) && *lane != number;
        if self.repairs.len() >= MOST_REPAIRS / (1 + self.others)
            || lanes.len() < head.lanes.len()
            || !lanes.iter().all(is_free)
        {
            return;
        }
        let is_over = |lane: u64| lane < self.opened && !self.lanes.contains_key(&lane);
        let repair = Repair {
            header,
            whole: head.lanes.iter().map(|covered| is_over(covered.lane)).collect(),
            lane_bytes: HEADER_LEN + head.len() + head.parity_bytes(),
            head,
            arriving: lane.arriving,
            is_being_computed: false,
        };
        self.covering.extend(lanes.into_iter().map(|lane| (lane, number)));
        self.memory_bytes += repair.arriving.memory_bytes();
        self.repairs.insert(number, repair);
        self.forget_if_over(number);
    }

    fn begin(&mut self, id: u64) -> Option<Computation> {
        let repair = self.repairs.get_mut(&id).filter(|repair| !repair.is_being_computed)?;
        let computation = repair.computation(id, &self.lanes)?;
        repair.is_being_computed = true;
        self.computations += 1;
        Some(computation)
    }

    fn forget_if_over(&mut self, id: u64) {
        if self
            .repairs
            .get(&id)
            .is_some_and(|repair| !repair.whole.contains(&false))
        {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: u64) {
        if let Some(repair) = self.repairs.remove(&id) {
            self.memory_bytes -= repair.arriving.memory_bytes();
            self.covering.retain(|_, covering| *covering != id);
        }
    }

    fn take(&mut self, number: u64) -> Option<Lane> {
        let lane = self.lanes.remove(&number)?;
        self.memory_bytes -= lane.arriving.memory_bytes();
        Some(lane)
    }
}

impl Lane {
    fn put(&mut self, offset: usize, bytes: &[u8]) -> Result<Option<FrameHeader>, ReassemblyError> {
        if let Some((_, len)) = self.header {
            check_len(len, offset + bytes.len())?;
        }
        if !self.arriving.put(offset, bytes) {
            return Err(ReassemblyError::TooManyPieces);
        }
        let front = match self.header {
            None => self.arriving.prefix(HEADER_LEN).and_then(|front| front.first_chunk()),
            Some(_) => None,
        };
        let Some(front) = front else { return Ok(None) };
        let (header, payload_len) = FrameHeader::decode(front)?;
        let len = HEADER_LEN + payload_len;
        check_len(len, self.arriving.bytes().len())?;
        self.arriving.expect_len(len);
        self.header = Some((header, len));
        Ok(Some(header))
    }

    /// Where this lane brings a repair: its header and its head, once that has arrived.
    fn repair_head(&self) -> Result<Option<(FrameHeader, RepairHead)>, RepairError> {
        let Some((header, len)) = self.header.filter(|(header, _)| header.kind == FrameKind::Repair) else {
            return Ok(None);
        };
        let front = self.arriving.prefix(self.arriving.prefix_len()).unwrap_or_default();
        let Some(head) = RepairHead::decode(&front[HEADER_LEN..])? else {
            return Ok(None);
        };
        head.check(header.sequence, len - HEADER_LEN)?;
        Ok(Some((header, head)))
    }
}

impl Repair {
    /// What there is to compute, where that makes a lane whole.
    fn computation(&self, id: u64, lanes: &HashMap<u64, Lane>) -> Option<Computation> {
        let covered = || self.head.lanes.iter().zip(&self.whole);
        let missing: Vec<Vec<Range<usize>>> = covered()
            .map(|(covered, whole)| {
                let len = covered.bytes as usize;
                match lanes.get(&covered.lane) {
                    _ if *whole => Vec::new(),
                    Some(lane) => lane.arriving.missing(len),
                    None => Arriving::default().missing(len),
                }
            })
            .collect();
        let front = HEADER_LEN + self.head.len();
        let parity_missing: Vec<Range<usize>> = self
            .arriving
            .missing(self.lane_bytes)
            .iter()
            .map(|range| range.start - front..range.end - front)
            .collect();
        let wanted = computable(&self.head, &missing, &parity_missing);
        if wanted.is_empty() {
            return None;
        }
        let mut bytes = Vec::with_capacity(self.head.covered_bytes());
        for (covered, whole) in covered() {
            let len = covered.bytes as usize;
            let end = bytes.len() + len;
            if let Some(lane) = lanes.get(&covered.lane).filter(|_| !whole) {
                let there = lane.arriving.bytes();
                bytes.extend_from_slice(&there[..there.len().min(len)]);
            }
            bytes.resize(end, 0);
        }
        let mut parity = Vec::with_capacity(self.head.parity_bytes());
        parity.extend_from_slice(&self.arriving.bytes()[front..]);
        parity.resize(self.head.parity_bytes(), 0);
        Some(Computation {
            repair: id,
            header: self.header,
            head: self.head.clone(),
            whole: self.whole.clone(),
            bytes,
            missing,
            parity,
            parity_missing,
            wanted,
        })
    }
}

/// Lanes that can be computed, with all that it takes but the frames that the session has.
#[derive(Debug)]
pub struct Computation {
    repair: u64,
    header: FrameHeader,
    head: RepairHead,
    whole: Vec<bool>,
    /// The covered lanes, one behind the other, as far as they have come.
    bytes: Vec<u8>,
    missing: Vec<Vec<Range<usize>>>,
    parity: Vec<u8>,
    parity_missing: Vec<Range<usize>>,
    wanted: Vec<usize>,
}

/// What came of a [`Computation`].
#[derive(Debug)]
pub struct Computed {
    /// Frames that the session does not have yet.
    pub frames: Vec<Frame>,
    /// Covered lanes, by their place, that are whole with these frames.
    pub made: Vec<usize>,
}

impl Computation {
    /// Names the repair for [`Reassembly::done`].
    #[must_use]
    pub fn repair(&self) -> u64 {
        self.repair
    }

    /// The migration whose frames are covered.
    #[must_use]
    pub fn migration(&self) -> MigrationId {
        self.header.migration
    }

    /// The incarnation that they are of.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.header.epoch
    }

    /// Their sequences.
    #[must_use]
    pub fn sequences(&self) -> Range<u64> {
        self.header.sequence..self.header.sequence + self.head.lanes.len() as u64
    }

    /// Computes, with those of the covered frames that the session has. `None` where the repair does not fit them or did not make
    /// what it promised. Takes milliseconds.
    #[must_use]
    pub fn run(mut self, frames: &[Option<Frame>]) -> Option<Computed> {
        let mut starts = Vec::with_capacity(self.head.lanes.len());
        let mut start = 0;
        for (at, covered) in self.head.lanes.iter().enumerate() {
            starts.push(start);
            let place = start..start + covered.bytes as usize;
            start = place.end;
            match frames.get(at)? {
                Some(frame) if frame.lane_bytes() == u64::from(covered.bytes) => {
                    let (header, payload) = self.bytes[place].split_at_mut(HEADER_LEN);
                    header.copy_from_slice(&frame.encode_header());
                    payload.copy_from_slice(&frame.payload);
                    self.missing[at].clear();
                }
                // Another frame than the one that is meant, or one that was taken for whole and never came to the session.
                Some(_) => return None,
                None if self.whole[at] => return None,
                None => {}
            }
        }
        solve(
            &self.head,
            &mut self.bytes,
            &self.missing,
            &self.parity,
            &self.parity_missing,
        );
        let mut computed = Computed {
            frames: Vec::new(),
            made: self.wanted,
        };
        for at in &computed.made {
            if frames[*at].is_some() {
                continue;
            }
            let covered = &self.head.lanes[*at];
            let lane = &self.bytes[starts[*at]..][..covered.bytes as usize];
            if check_of(lane) != covered.check {
                return None;
            }
            // A copy, so that a short frame does not keep all lanes in memory.
            let frame = Frame::decode(Bytes::copy_from_slice(lane)).ok()?;
            let is_covered = frame.header.kind != FrameKind::Repair
                && frame.header.migration == self.header.migration
                && frame.header.epoch == self.header.epoch
                && frame.header.sequence == self.header.sequence + *at as u64;
            if !is_covered {
                return None;
            }
            computed.frames.push(frame);
        }
        Some(computed)
    }
}

/// What came lies beyond the lane's end as its header has it.
fn check_len(len: usize, end: usize) -> Result<(), FrameError> {
    if end > len { Err(wrong_len(len, end)) } else { Ok(()) }
}

fn wrong_len(lane: usize, found: usize) -> FrameError {
    FrameError::WrongLength {
        stated: lane - HEADER_LEN,
        found: found - HEADER_LEN,
    }
}

/// A lane does not arrive as lanes do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReassemblyError {
    /// What it holds is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What it holds is no repair.
    #[error(transparent)]
    Repair(#[from] RepairError),
    /// Holes were made on purpose.
    #[error("a lane arrives in more than {MOST_PIECES} pieces, which lost packets do not make of it")]
    TooManyPieces,
}

#[cfg(test)]
mod tests;
