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
    for (connections, at_a_time) in [(1, MOST_COMPUTATIONS), (2, MOST_COMPUTATIONS / 2), (8, 1)] {
        compute_many(Reassembly::one_of(connections), at_a_time);
    }
}

fn compute_many(mut reassembly: Reassembly, at_a_time: usize) {
    const RUNS: u64 = MOST_COMPUTATIONS as u64 + 3;
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
    assert_eq!(first.len(), at_a_time);
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
