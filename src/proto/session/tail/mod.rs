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
//! The source makes a [`repair`](repair_frame) for each run of frames with consecutive sequences ([`TailRun`]); the destination's
//! [`Reassembly`] computes what is missing from lanes that are whole, lanes of which parts have come, and the repair.

mod arriving;
mod parity;
mod reassembly;

use std::ops::Range;

use bytes::BytesMut;

pub use self::reassembly::{Computation, Computed, Reassembly, ReassemblyError};
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

/// Which of the covered lanes can be computed whole by now: those of which something is missing, and all of it in blocks that can be
/// solved. `missing` has what is missing of each lane, counted from its start, `parity_missing` what is missing of the parity.
fn computable(head: &RepairHead, missing: &[Vec<Range<usize>>], parity_missing: &[Range<usize>]) -> Vec<usize> {
    let all = joined(head, missing);
    let block_bytes = BLOCK_ROWS * head.row_bytes();
    let mut solvable: Vec<Option<bool>> = vec![None; head.covered_bytes().div_ceil(block_bytes)];
    let mut is_solvable = |number: usize| {
        *solvable[number].get_or_insert_with(|| {
            let holes = within(&all, number * block_bytes..(number + 1) * block_bytes);
            let without = within(parity_missing, parity_of(head, number));
            parity::is_repairable(&holes, head.row_bytes(), usize::from(head.rows), &without)
        })
    };
    let mut start = 0;
    let mut lanes = Vec::new();
    for (at, (lane, holes)) in head.lanes.iter().zip(missing).enumerate() {
        let mut blocks =
            |hole: &Range<usize>| (start + hole.start) / block_bytes..=(start + hole.end - 1) / block_bytes;
        if !holes.is_empty() && holes.iter().flat_map(&mut blocks).all(&mut is_solvable) {
            lanes.push(at);
        }
        start += lane.bytes as usize;
    }
    lanes
}

/// Computes what is missing of `bytes`, the covered lanes one behind the other, in the blocks where that can be done. `parity` is what
/// follows the repair's head, without what is in `parity_missing`.
fn solve(
    head: &RepairHead,
    bytes: &mut [u8],
    missing: &[Vec<Range<usize>>],
    parity: &[u8],
    parity_missing: &[Range<usize>],
) {
    let all = joined(head, missing);
    let block_bytes = BLOCK_ROWS * head.row_bytes();
    for (number, block) in bytes.chunks_mut(block_bytes).enumerate() {
        let holes = within(&all, number * block_bytes..(number + 1) * block_bytes);
        if holes.is_empty() {
            continue;
        }
        let span = parity_of(head, number);
        let without = within(parity_missing, span.clone());
        // A block that cannot be solved fails the check of its lanes.
        let _ = parity::repair(block, &holes, head.row_bytes(), &parity[span], &without);
    }
}

/// Where the parity of a block is.
fn parity_of(head: &RepairHead, block: usize) -> Range<usize> {
    let bytes = usize::from(head.rows) * head.row_bytes();
    block * bytes..(block + 1) * bytes
}

/// What is missing of the lanes, one behind the other.
fn joined(head: &RepairHead, missing: &[Vec<Range<usize>>]) -> Vec<Range<usize>> {
    let mut start = 0;
    let mut all = Vec::new();
    for (lane, holes) in head.lanes.iter().zip(missing) {
        all.extend(holes.iter().map(|hole| start + hole.start..start + hole.end));
        start += lane.bytes as usize;
    }
    all
}

/// The parts of `ranges`, ascending and apart, that lie in `span`, counted from its start.
fn within(ranges: &[Range<usize>], span: Range<usize>) -> Vec<Range<usize>> {
    let first = ranges.partition_point(|range| range.end <= span.start);
    ranges[first..]
        .iter()
        .take_while(|range| range.start < span.end)
        .map(|range| range.start.max(span.start) - span.start..range.end.min(span.end) - span.start)
        .collect()
}

fn check_of(lane: &[u8]) -> [u8; 4] {
    CoveredLane::check_of(&StreamDigest(*blake3::hash(lane).as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
