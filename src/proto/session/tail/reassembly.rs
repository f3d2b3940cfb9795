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
        if self.computations < MOST_COMPUTATIONS {
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
        if self.repairs.len() == MOST_REPAIRS || lanes.len() < head.lanes.len() || !lanes.iter().all(is_free) {
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
mod tests {
    use proptest::prelude::*;

    use super::super::{Protection, TailRun, repair_frame};
    use super::*;
    use crate::proto::wire::repair::{CoveredLane, RUN};

    const MIGRATION: MigrationId = MigrationId([3; 16]);
    const PACKET: usize = 1412;
    /// Number of the first lane.
    const FIRST: u64 = 100;

    fn frame(sequence: u64, size: usize) -> Frame {
        let payload: Vec<u8> = (0..size)
            .map(|byte| (byte.wrapping_mul(0x9e37_79b9) >> 9) as u8 ^ sequence as u8)
            .collect();
        Frame {
            header: FrameHeader {
                kind: FrameKind::Plain,
                last: false,
                held: false,
                migration: MIGRATION,
                epoch: 2,
                sequence,
                stream_offset: 0,
                stream_bytes: size as u32,
            },
            payload: payload.into(),
        }
    }

    fn lane(frame: &Frame) -> Vec<u8> {
        [frame.encode_header(), frame.payload.clone()].concat()
    }

    /// A destination: lanes as they arrive, and the frames that its session has.
    struct Scene {
        reassembly: Reassembly,
        run: TailRun,
        repair: Frame,
        session: BTreeMap<u64, Frame>,
        computations: usize,
    }

    impl Scene {
        /// Lanes of frames of these sizes, and behind them the lane of the repair; all are open.
        fn of(sizes: &[usize], rows: u8) -> Self {
            let frames = sizes.iter().zip(0..);
            let run = TailRun {
                frames: frames.map(|(size, at)| (frame(40 + at, *size), FIRST + at)).collect(),
            };
            let protection = Protection { rows, row_exponent: 11 };
            let repair = repair_frame(&run, protection);
            let mut reassembly = Reassembly::default();
            (FIRST..=FIRST + sizes.len() as u64).for_each(|lane| reassembly.open(lane));
            Self {
                reassembly,
                run,
                repair,
                session: BTreeMap::new(),
                computations: 0,
            }
        }

        fn repair_lane(&self) -> u64 {
            FIRST + self.run.frames.len() as u64
        }

        fn bytes(&self, number: u64) -> Vec<u8> {
            lane(match self.run.frames.get((number - FIRST) as usize) {
                Some((frame, _)) => frame,
                None => &self.repair,
            })
        }

        fn packets(&self, number: u64) -> usize {
            self.bytes(number).len().div_ceil(PACKET)
        }

        fn due(&mut self, number: u64) -> Option<Computation> {
            let due = self.reassembly.due(number);
            self.computations += usize::from(due.is_some());
            due
        }

        fn put(&mut self, number: u64, packet: usize) {
            let bytes = self.bytes(number);
            let start = packet * PACKET;
            let end = bytes.len().min(start + PACKET);
            self.reassembly.put(number, start, &bytes[start..end]).unwrap();
        }

        /// Computes until nothing is due.
        fn compute(&mut self, due: Option<Computation>) {
            let mut next = due;
            while let Some(computation) = next {
                let id = computation.repair();
                let frames: Vec<Option<Frame>> = computation
                    .sequences()
                    .map(|sequence| self.session.get(&sequence).cloned())
                    .collect();
                let computed = computation.run(&frames);
                if let Some(computed) = &computed {
                    for frame in &computed.frames {
                        self.session.insert(frame.header.sequence, frame.clone());
                    }
                }
                next = self
                    .reassembly
                    .done(id, computed.as_ref().map(|computed| &computed.made[..]));
                self.computations += usize::from(next.is_some());
            }
        }

        /// A packet arrives, and what can be computed with it is.
        fn arrive(&mut self, number: u64, packet: usize) {
            self.put(number, packet);
            let due = self.due(number);
            self.compute(due);
        }

        /// All of a lane but the packets of these numbers arrives, and its end if that is all.
        fn arrive_without(&mut self, number: u64, lost: &[usize]) {
            for packet in (0..self.packets(number)).filter(|packet| !lost.contains(packet)) {
                self.arrive(number, packet);
            }
            if lost.is_empty() {
                self.end(number);
            }
        }

        fn end(&mut self, number: u64) {
            if let Some(frame) = self.reassembly.finish(number).unwrap() {
                self.session.insert(frame.header.sequence, frame);
                self.reassembly.delivered(number);
                let due = self.due(number);
                self.compute(due);
            }
        }

        #[track_caller]
        fn assert_all_there(&self) {
            let frames: Vec<&Frame> = self.run.frames.iter().map(|(frame, _)| frame).collect();
            assert!(self.session.values().eq(frames));
        }

        /// A repair whose head says something else.
        fn change_head(&mut self, change: impl FnOnce(&mut RepairHead)) {
            let mut head = RepairHead::decode(&self.repair.payload).unwrap().unwrap();
            let parity = self.repair.payload.slice(head.len()..);
            change(&mut head);
            self.repair.payload = [head.encode(), parity].concat().into();
        }
    }

    #[test]
    fn a_lane_of_which_nothing_came_is_computed_if_it_is_short_enough() {
        let mut scene = Scene::of(&[50_000, 900, 50_000], 1);
        scene.arrive_without(FIRST, &[]);
        scene.arrive_without(FIRST + 2, &[]);
        scene.arrive_without(FIRST + 3, &[]);
        scene.assert_all_there();
        assert_eq!(scene.computations, 1);
    }

    #[test]
    fn nothing_is_computed_before_a_lane_becomes_whole_by_it() {
        let mut scene = Scene::of(&[200_000, 200_000], 1);
        // In each lane two holes in one block, of which the first has another that could be computed.
        scene.arrive_without(FIRST, &[0, 100, 110]);
        scene.arrive_without(FIRST + 1, &[60, 130]);
        scene.arrive_without(FIRST + 2, &[]);
        assert_eq!(scene.computations, 0);
        scene.arrive(FIRST, 100);
        assert_eq!((scene.computations, scene.session.len()), (1, 1));
        scene.arrive(FIRST + 1, 130);
        scene.assert_all_there();
        assert_eq!(scene.computations, 2);
    }

    #[test]
    fn what_is_being_computed_is_not_begun_again() {
        let mut scene = Scene::of(&[50_000, 50_000], 2);
        scene.arrive_without(FIRST, &[3]);
        scene.arrive_without(FIRST + 1, &[]);
        for packet in 0..2 {
            scene.put(FIRST + 2, packet);
        }
        let due = scene.due(FIRST + 2);
        assert!(due.is_some());
        scene.put(FIRST + 2, 2);
        assert!(scene.due(FIRST + 2).is_none() && scene.due(FIRST).is_none());
        scene.compute(due);
        scene.assert_all_there();
        assert_eq!(scene.computations, 1);
    }

    #[test]
    fn a_repair_that_does_not_make_what_it_promised_is_tried_once() {
        let mut scene = Scene::of(&[50_000, 50_000], 1);
        scene.change_head(|head| head.lanes[0].check = *b"liar");
        scene.arrive_without(FIRST, &[3]);
        scene.arrive_without(FIRST + 2, &[]);
        scene.arrive_without(FIRST + 1, &[]);
        assert_eq!(scene.computations, 1);
        assert_eq!(scene.session.len(), 1);
        // What remains is the lane itself, and QUIC's own repair of it.
        scene.arrive(FIRST, 3);
        scene.end(FIRST);
        scene.assert_all_there();
        assert_eq!(scene.reassembly.memory_bytes(), 0);
    }

    #[test]
    fn a_frame_that_is_not_the_one_covered_is_not_used() {
        for change in [
            |header: &mut FrameHeader| header.sequence += 1,
            |header: &mut FrameHeader| header.epoch += 1,
            |header: &mut FrameHeader| header.migration = MigrationId([4; 16]),
            |header: &mut FrameHeader| header.sequence -= 2,
        ] {
            let mut scene = Scene::of(&[50_000, 50_000], 2);
            let mut other = scene.repair.header;
            change(&mut other);
            scene.repair.header = other;
            scene.arrive_without(FIRST + 2, &[]);
            scene.arrive_without(FIRST, &[7]);
            scene.arrive_without(FIRST + 1, &[7]);
            assert!(scene.session.is_empty());
            assert_eq!(scene.computations, 1);
        }
    }

    #[test]
    fn a_second_repair_over_a_lane_is_not_kept() {
        let mut scene = Scene::of(&[50_000, 50_000], 1);
        scene.arrive_without(FIRST, &[1]);
        scene.arrive_without(FIRST + 1, &[]);
        scene.put(FIRST + 2, 0);
        let first = scene.reassembly.memory_bytes();
        let second = FIRST + 3;
        scene.reassembly.open(second);
        let bytes = lane(&scene.repair);
        scene.reassembly.put(second, 0, &bytes).unwrap();
        assert_eq!(scene.reassembly.memory_bytes(), first);
        assert_eq!(scene.reassembly.finish(second), Ok(None));
        assert!(scene.due(second).is_none());
        scene.arrive_without(FIRST + 2, &[]);
        scene.assert_all_there();
    }

    #[test]
    fn with_a_lane_that_was_given_up_its_repair_goes() {
        let mut scene = Scene::of(&[50_000, 50_000], 1);
        scene.arrive_without(FIRST + 2, &[]);
        scene.arrive_without(FIRST, &[1]);
        scene.reassembly.abandon(FIRST + 1);
        assert_eq!(scene.reassembly.repairs.len(), 0);
        assert_eq!(scene.reassembly.covering.len(), 0);
        scene.arrive(FIRST, 1);
        scene.end(FIRST);
        assert_eq!((scene.computations, scene.session.len()), (0, 1));
        assert_eq!(scene.reassembly.memory_bytes(), 0);
    }

    #[test]
    fn a_repair_over_what_is_there_is_not_kept() {
        let mut scene = Scene::of(&[50_000, 900], 1);
        scene.arrive_without(FIRST, &[]);
        scene.arrive_without(FIRST + 1, &[]);
        scene.arrive_without(FIRST + 2, &[]);
        assert_eq!((scene.computations, scene.reassembly.memory_bytes()), (0, 0));
    }

    #[test]
    fn only_so_many_are_computed_at_a_time_and_the_others_follow() {
        const RUNS: u64 = MOST_COMPUTATIONS as u64 + 3;
        let mut reassembly = Reassembly::default();
        let mut first = Vec::new();
        let run = |at: u64| TailRun {
            frames: vec![(frame(at * RUN, 4000), 2 * at)],
        };
        for at in 0..RUNS {
            reassembly.open(2 * at);
            reassembly.open(2 * at + 1);
            let bytes = lane(&run(at).frames[0].0);
            reassembly.put(2 * at, 0, &bytes[..3000]).unwrap();
            let repair = repair_frame(
                &run(at),
                Protection {
                    rows: 1,
                    row_exponent: 11,
                },
            );
            reassembly.put(2 * at + 1, 0, &lane(&repair)).unwrap();
            first.extend(reassembly.due(2 * at + 1));
        }
        assert_eq!(first.len(), MOST_COMPUTATIONS);
        let mut made = Vec::new();
        let mut next = first.pop();
        while let Some(computation) = next.or_else(|| first.pop()) {
            let id = computation.repair();
            let computed = computation.run(&[None]).unwrap();
            made.push(computed.frames[0].header.sequence);
            next = reassembly.done(id, Some(&computed.made));
        }
        made.sort_unstable();
        assert!(made.into_iter().eq((0..RUNS).map(|at| at * RUN)));
    }

    #[test]
    fn lanes_that_are_longer_or_shorter_than_they_say_are_refused() {
        let put = |bytes: &[u8]| {
            let mut reassembly = Reassembly::default();
            reassembly.open(0);
            reassembly.put(0, 0, bytes)?;
            reassembly.finish(0)
        };
        let scene = Scene::of(&[100], 1);
        for whole in [lane(&frame(0, 100)), lane(&scene.repair)] {
            assert!(put(&whole).is_ok());
            assert!(put(&whole[..whole.len() - 1]).is_err());
            assert!(put(&[&whole[..], b"x"].concat()).is_err());
        }
        // A payload that ends within the head, and one that is longer than the parity.
        for len in [1, 19, scene.repair.payload.len() + 1] {
            let mut repair = scene.repair.clone();
            let mut payload = repair.payload.to_vec();
            payload.resize(len, 0);
            repair.payload = payload.into();
            assert!(matches!(put(&lane(&repair)), Err(ReassemblyError::Repair(_))), "{len}");
        }
    }

    #[test]
    fn a_lane_in_more_pieces_than_lost_packets_make_is_refused() {
        let mut reassembly = Reassembly::default();
        reassembly.open(0);
        let refused = (0..=MOST_PIECES).find_map(|piece| reassembly.put(0, 2 * piece + 1, b"x").err());
        assert_eq!(refused, Some(ReassemblyError::TooManyPieces));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Packets are lost and overtake each other, of lanes and of the repair: whatever comes out is what was sent, all that could be
        /// computed is, and each computation makes a lane whole or is the last.
        #[test]
        fn lost_packets_come_back_byte_for_byte_or_not_at_all(
            sizes in proptest::collection::vec(0usize..120_000, 1..8),
            rows in 1u8..=4,
            losses in proptest::collection::btree_set((0u64..9, 0usize..90), 0..8),
            order in any::<u64>(),
        ) {
            let mut scene = Scene::of(&sizes, rows);
            let lanes = FIRST..=scene.repair_lane();
            let mut packets: Vec<(u64, usize)> = lanes.clone()
                .flat_map(|lane| (0..scene.packets(lane)).map(move |packet| (lane, packet)))
                .collect();
            // Packets leave their place by up to a few hundred.
            packets.sort_by_key(|(lane, packet)| {
                let mixed = (order ^ (lane << 20) ^ *packet as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                lane * 100 + *packet as u64 + mixed % 300
            });
            let (lost, arrived): (Vec<_>, Vec<_>) = packets.into_iter()
                .partition(|(lane, packet)| losses.contains(&(lane - FIRST, *packet)));
            let mut left: BTreeMap<u64, usize> = lanes.map(|lane| (lane, scene.packets(lane))).collect();
            for (lane, packet) in arrived {
                scene.arrive(lane, packet);
                *left.get_mut(&lane).unwrap() -= 1;
                if left[&lane] == 0 {
                    scene.end(lane);
                }
            }
            for (sequence, frame) in &scene.session {
                prop_assert!(scene.run.frames.iter().any(|(sent, _)| sent == frame), "{}", sequence);
            }
            prop_assert!(scene.computations <= sizes.len() + 1);
            let of_repair = lost.iter().any(|(lane, _)| *lane == scene.repair_lane());
            if !of_repair && lost.len() <= usize::from(rows) {
                scene.assert_all_there();
            }
            // QUIC sends again what was lost: in the end everything is there, and nothing is kept.
            for (lane, packet) in lost {
                scene.arrive(lane, packet);
                *left.get_mut(&lane).unwrap() -= 1;
                if left[&lane] == 0 {
                    scene.end(lane);
                }
            }
            scene.assert_all_there();
            prop_assert_eq!(scene.reassembly.memory_bytes(), 0);
            prop_assert!(scene.reassembly.repairs.is_empty() && scene.reassembly.covering.is_empty());
        }

        /// Whatever lanes hold and wherever it lands, there is no panic, and what is counted is what is kept.
        #[test]
        fn hostile_lanes_never_panic(
            heads in proptest::collection::vec(
                (0u64..6, 0u64..12, proptest::collection::vec((0u64..8, 48u32..3000), 1..5)),
                1..4,
            ),
            puts in proptest::collection::vec((0u64..6, 0usize..5000, 0usize..2000, any::<bool>()), 0..60),
        ) {
            let mut reassembly = Reassembly::default();
            (0..6).for_each(|lane| reassembly.open(lane));
            let mut lanes: Vec<Vec<u8>> = (0..6).map(|at| lane(&frame(at, 4000))).collect();
            for (number, sequence, covered) in heads {
                let head = RepairHead {
                    rows: 1,
                    row_exponent: 11,
                    lanes: covered.iter().map(|(lane, bytes)| CoveredLane { lane: *lane, bytes: *bytes, check: [0; 4] }).collect(),
                };
                let mut repair = frame(sequence, 0);
                repair.header.kind = FrameKind::Repair;
                repair.payload = [head.encode(), vec![0; head.parity_bytes()].into()].concat().into();
                lanes[number as usize] = lane(&repair);
            }
            for (number, offset, len, ends) in puts {
                let lane = &lanes[number as usize];
                let offset = offset.min(lane.len());
                let end = (offset + len).min(lane.len());
                if reassembly.put(number, offset, &lane[offset..end]).is_err() {
                    reassembly.abandon(number);
                }
                if ends {
                    match reassembly.finish(number) {
                        Ok(Some(_)) => reassembly.delivered(number),
                        Ok(None) => {}
                        Err(_) => reassembly.abandon(number),
                    }
                }
                let mut next = reassembly.due(number);
                while let Some(computation) = next {
                    let id = computation.repair();
                    let frames: Vec<Option<Frame>> = computation.sequences().map(|_| None).collect();
                    let computed = computation.run(&frames);
                    next = reassembly.done(id, computed.as_ref().map(|computed| &computed.made[..]));
                }
                let arriving = reassembly.lanes.values().map(|lane| &lane.arriving);
                let all = arriving.chain(reassembly.repairs.values().map(|repair| &repair.arriving));
                prop_assert_eq!(reassembly.memory_bytes(), all.map(Arriving::memory_bytes).sum::<usize>());
            }
        }
    }
}
