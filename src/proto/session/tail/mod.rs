//! The end of a stream is protected against loss: the guest stands still for it.
//!
//! ```text
//! t = 0      the last frame leaves; behind it, parity over all that is in flight
//! t = 75 ms  the last frame arrives, and with it the parity: what was lost is computed
//! t = 227 ms without parity: the repair of a packet that was lost at t = 0 arrives (150 ms RTT, 2 ms until it counts as lost)
//! ```
//!
//! At 1 Gbit/s and 150 ms 12 500 packets are in flight when the stream ends. At 0.1 % loss a dozen of them are lost, and nothing can
//! be loaded before the last of these is repaired, which takes 200 ms and more almost always. Parity of two rows in 64 KiB, 3 % of
//! what is in flight, saves that trip. It is sent once, when the stream has ended: before, a repair costs nobody anything.
//!
//! The source makes a [`repair`](repair_frame) for each run of frames with consecutive sequences ([`TailRun`]); the destination
//! [rebuilds](rebuild) what is missing from lanes that are whole, lanes of which parts have come, and the repair.

mod arriving;
mod parity;

use std::ops::Range;

use bytes::{Bytes, BytesMut};

pub use self::arriving::Arriving;
use crate::proto::page::StreamDigest;
use crate::proto::wire::repair::{BLOCK_ROWS, CoveredLane, MAX_ROWS, ROW_EXPONENTS, RepairHead};
use crate::proto::wire::{Frame, FrameHeader, FrameKind};

/// Chance of a block that lost more packets than it has parity rows. With 150 blocks in flight one move in seven then waits for one
/// repair.
const BLOCK_FAILS: f64 = 1e-3;

/// Frames that are in flight, each on its lane, with consecutive sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TailRun {
    /// The frames in order, each with the number of the QUIC stream that is its lane.
    pub frames: Vec<(Frame, u64)>,
}

/// How much parity a path needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protection {
    /// Parity rows for each block.
    pub rows: u8,
    /// A row has 2^this bytes, at least a packet's.
    pub row_exponent: u8,
}

impl Protection {
    /// For a path that loses this share of its packets, of `packet_bytes` each: the fewest rows with which a block has lost more than them
    /// in one case of a thousand.
    ///
    /// Losses are taken as independent; those of a burst spoil the block they hit, and are repaired as ever.
    #[must_use]
    pub fn against(loss: f64, packet_bytes: u16) -> Self {
        let row_exponent = ROW_EXPONENTS
            .into_iter()
            .find(|exponent| 1_u32 << exponent >= u32::from(packet_bytes))
            .unwrap_or(*ROW_EXPONENTS.end());
        let packets = (BLOCK_ROWS << row_exponent) as f64 / f64::from(packet_bytes.max(1));
        let mean = loss.clamp(0.0, 1.0) * packets;
        // Poisson: P(more than n) = 1 - Σ e^-mean · mean^k / k!
        let (mut term, mut rows) = ((-mean).exp(), 0);
        let mut more = 1.0 - term;
        while rows < MAX_ROWS && (rows == 0 || more > BLOCK_FAILS) {
            rows += 1;
            term *= mean / f64::from(rows);
            more -= term;
        }
        Self { rows, row_exponent }
    }
}

/// The repair of a run, as a frame. Takes about a millisecond for each parity row and megabyte.
///
/// # Panics
/// Where the run is empty.
#[must_use]
pub fn repair_frame(run: &TailRun, protection: Protection) -> Frame {
    let mut covered = BytesMut::new();
    let mut lanes = Vec::with_capacity(run.frames.len());
    for (frame, lane) in &run.frames {
        let start = covered.len();
        covered.extend_from_slice(&frame.encode_header());
        covered.extend_from_slice(&frame.payload);
        lanes.push(CoveredLane {
            lane: *lane,
            bytes: u32::try_from(covered.len() - start).expect("a lane is far below 4 GiB"),
            check: check_of(&covered[start..]),
        });
    }
    let Protection { rows, row_exponent } = protection;
    let head = RepairHead {
        rows,
        row_exponent,
        lanes,
    };
    let mut payload = BytesMut::with_capacity(head.len() + head.parity_bytes());
    payload.extend_from_slice(&head.encode());
    for block in covered.chunks(BLOCK_ROWS * head.row_bytes()) {
        payload.extend_from_slice(&parity::parity(block, head.row_bytes(), usize::from(rows)));
    }
    let first = run.frames.first().expect("a run has frames").0.header;
    Frame {
        header: FrameHeader {
            kind: FrameKind::Repair,
            last: false,
            held: false,
            stream_bytes: 0,
            ..first
        },
        payload: payload.freeze(),
    }
}

/// A lane that a repair covers, as the destination has it.
#[derive(Clone, Debug)]
pub enum Covered {
    /// All of it.
    Whole(Frame),
    /// What has come so far.
    Coming(Arriving),
}

/// Whether something can be computed: `missing` of the bytes of all the lanes that are covered, one behind the other, and
/// `parity_missing` of the parity.
#[must_use]
pub fn is_worth_trying(head: &RepairHead, missing: &[Range<usize>], parity_missing: &[Range<usize>]) -> bool {
    let rows = usize::from(head.rows);
    let (block_bytes, parity_block) = (BLOCK_ROWS * head.row_bytes(), rows * head.row_bytes());
    let blocks = head.covered_bytes().div_ceil(block_bytes);
    (0..blocks).any(|number| {
        let holes = within(missing, number * block_bytes..(number + 1) * block_bytes);
        let without = within(parity_missing, number * parity_block..(number + 1) * parity_block);
        !holes.is_empty() && parity::is_repairable(&holes, head.row_bytes(), rows, &without)
    })
}

/// Computes the lanes that are not whole, and returns those that came out right. `parity` is what follows the repair's head, without
/// what is in `parity_missing`.
#[must_use]
pub fn rebuild(head: &RepairHead, lanes: &[Covered], parity: &[u8], parity_missing: &[Range<usize>]) -> Vec<Bytes> {
    if lanes.len() != head.lanes.len() || parity.len() != head.parity_bytes() {
        return Vec::new();
    }
    let mut bytes = BytesMut::with_capacity(head.covered_bytes());
    let mut missing: Vec<Range<usize>> = Vec::new();
    for (covered, lane) in head.lanes.iter().zip(lanes) {
        let (start, len) = (bytes.len(), covered.bytes as usize);
        match lane {
            Covered::Whole(frame) if frame.lane_bytes() == u64::from(covered.bytes) => {
                bytes.extend_from_slice(&frame.encode_header());
                bytes.extend_from_slice(&frame.payload);
            }
            // Another frame than the one that is meant: nothing of this fits together.
            Covered::Whole(_) => return Vec::new(),
            Covered::Coming(arriving) => {
                let there = arriving.bytes();
                bytes.extend_from_slice(&there[..there.len().min(len)]);
                bytes.resize(start + len, 0);
                missing.extend(
                    arriving
                        .missing(len)
                        .into_iter()
                        .map(|range| start + range.start..start + range.end),
                );
            }
        }
    }
    let (block_bytes, parity_block) = (BLOCK_ROWS * head.row_bytes(), usize::from(head.rows) * head.row_bytes());
    for (number, block) in bytes.chunks_mut(block_bytes).enumerate() {
        let holes = within(&missing, number * block_bytes..(number + 1) * block_bytes);
        if holes.is_empty() {
            continue;
        }
        let span = number * parity_block..(number + 1) * parity_block;
        let without = within(parity_missing, span.clone());
        // A block that cannot be computed fails the check of its lanes, and the others are told all the same.
        let _ = parity::repair(block, &holes, head.row_bytes(), &parity[span], &without);
    }
    let bytes = bytes.freeze();
    let mut start = 0;
    let mut rebuilt = Vec::new();
    for (covered, lane) in head.lanes.iter().zip(lanes) {
        let whole = bytes.slice(start..start + covered.bytes as usize);
        start += whole.len();
        if matches!(lane, Covered::Coming(_)) && check_of(&whole) == covered.check {
            rebuilt.push(whole);
        }
    }
    rebuilt
}

/// The parts of `ranges` that lie in `span`, counted from its start.
fn within(ranges: &[Range<usize>], span: Range<usize>) -> Vec<Range<usize>> {
    ranges
        .iter()
        .map(|range| range.start.max(span.start)..range.end.min(span.end))
        .filter(|range| range.start < range.end)
        .map(|range| range.start - span.start..range.end - span.start)
        .collect()
}

fn check_of(lane: &[u8]) -> [u8; 4] {
    CoveredLane::check_of(&StreamDigest(*blake3::hash(lane).as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::page::MigrationId;

    const PACKET: usize = 1412;

    fn run(sizes: &[usize]) -> TailRun {
        let frames = sizes.iter().zip(0..).map(|(size, at)| {
            let payload: Vec<u8> = (0..*size)
                .map(|byte| (byte.wrapping_mul(0x9e37_79b9) >> 9) as u8 ^ at as u8)
                .collect();
            let frame = Frame {
                header: FrameHeader {
                    kind: FrameKind::Plain,
                    last: false,
                    held: false,
                    migration: MigrationId([3; 16]),
                    epoch: 2,
                    sequence: 40 + at,
                    stream_offset: 0,
                    stream_bytes: *size as u32,
                },
                payload: payload.into(),
            };
            (frame, 100 + at)
        });
        TailRun {
            frames: frames.collect(),
        }
    }

    fn lane(frame: &Frame) -> Vec<u8> {
        [frame.encode_header(), frame.payload.clone()].concat()
    }

    /// A lane whose packets of these numbers were lost.
    fn with_holes(lane: &[u8], lost: &[usize]) -> Arriving {
        let mut arriving = Arriving::default();
        for (number, packet) in lane.chunks(PACKET).enumerate() {
            if !lost.contains(&number) {
                arriving.put(number * PACKET, packet);
            }
        }
        arriving
    }

    fn taken_apart(repair: &Frame) -> (RepairHead, &[u8]) {
        let head = RepairHead::decode(&repair.payload).unwrap().unwrap();
        let len = head.len();
        (head, &repair.payload[len..])
    }

    #[test]
    fn more_loss_asks_for_more_rows_and_larger_packets_for_larger_ones() {
        let rows = |loss| Protection::against(loss, 1452).rows;
        assert_eq!([rows(0.0), rows(0.001), rows(0.01), rows(0.02)], [1, 2, 5, 7]);
        assert_eq!(rows(1.0), MAX_ROWS);
        let exponent = |packet| Protection::against(0.001, packet).row_exponent;
        assert_eq!(
            [exponent(1280), exponent(2048), exponent(2049), exponent(8952)],
            [11, 11, 12, 14]
        );
    }

    #[test]
    fn a_lane_of_which_nothing_came_is_computed_if_it_is_short_enough() {
        let run = run(&[50_000, 900, 50_000]);
        let repair = repair_frame(
            &run,
            Protection {
                rows: 1,
                row_exponent: 11,
            },
        );
        let (head, parity) = taken_apart(&repair);
        let lanes: Vec<Covered> = run
            .frames
            .iter()
            .map(|(frame, lane)| match lane {
                101 => Covered::Coming(Arriving::default()),
                _ => Covered::Whole(frame.clone()),
            })
            .collect();
        let rebuilt = rebuild(&head, &lanes, parity, &[]);
        assert_eq!(rebuilt.len(), 1);
        assert_eq!(Frame::decode(rebuilt[0].clone()).as_ref(), Ok(&run.frames[1].0));
    }

    #[test]
    fn frames_of_another_incarnation_rebuild_nothing() {
        let run = run(&[50_000, 50_000]);
        let repair = repair_frame(
            &run,
            Protection {
                rows: 1,
                row_exponent: 11,
            },
        );
        let (head, parity) = taken_apart(&repair);
        let mut older = run.frames[0].0.clone();
        older.header.epoch = 1;
        // Its header is in the first row, as the hole in the other lane is not: that one is right all the same.
        let damaged = with_holes(&lane(&run.frames[1].0), &[5]);
        let elsewhere = rebuild(
            &head,
            &[Covered::Whole(older.clone()), Covered::Coming(damaged)],
            parity,
            &[],
        );
        assert!(elsewhere.len() <= 1);
        // A hole that is computed from the header's row is not.
        let start = lane(&older).len().div_ceil(2048) * 2048 - lane(&older).len();
        let mut arriving = Arriving::default();
        let second = lane(&run.frames[1].0);
        arriving.put(0, &second[..start]);
        arriving.put(start + 40, &second[start + 40..]);
        let rebuilt = rebuild(&head, &[Covered::Whole(older), Covered::Coming(arriving)], parity, &[]);
        assert!(rebuilt.is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn lost_packets_come_back_byte_for_byte_or_not_at_all(
            sizes in proptest::collection::vec(0usize..120_000, 1..8),
            rows in 1u8..=4,
            losses in proptest::collection::vec((0usize..8, 0usize..90), 0..8),
            parity_loss in proptest::option::of(0usize..3),
        ) {
            let run = run(&sizes);
            let repair = repair_frame(&run, Protection { rows, row_exponent: 11 });
            let (head, parity) = taken_apart(&repair);
            prop_assert_eq!(parity.len(), head.parity_bytes());
            let lanes: Vec<Covered> = run.frames.iter().enumerate().map(|(at, (frame, _))| {
                let lost: Vec<usize> = losses.iter().filter(|(lane, _)| *lane == at).map(|(_, packet)| *packet).collect();
                if lost.is_empty() { Covered::Whole(frame.clone()) } else { Covered::Coming(with_holes(&lane(frame), &lost)) }
            }).collect();
            let mut parity = parity.to_vec();
            let gap: Vec<Range<usize>> = parity_loss
                .map(|at| (at * PACKET).min(parity.len())..((at + 1) * PACKET).min(parity.len()))
                .into_iter().filter(|range| !range.is_empty()).collect();
            gap.iter().for_each(|range| parity[range.clone()].fill(0));
            let rebuilt = rebuild(&head, &lanes, &parity, &gap);
            for lane_bytes in &rebuilt {
                let frame = Frame::decode(lane_bytes.clone()).unwrap();
                prop_assert!(run.frames.iter().any(|(sent, _)| *sent == frame));
            }
            let coming = lanes.iter().filter(|lane| matches!(lane, Covered::Coming(_))).count();
            let distinct: std::collections::BTreeSet<_> = losses.iter().collect();
            if distinct.len() <= usize::from(rows) && gap.is_empty() {
                prop_assert_eq!(rebuilt.len(), coming);
            }
        }
    }
}
