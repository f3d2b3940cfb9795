//! Parity over a block of bytes: as many lost packets as there are parity rows can be computed from the rest.
//!
//! ```text
//! row 0   d0 ............ row_bytes        parity 0 = d0 ^ d1 ^ d2 ^ …            (over each column)
//! row 1   d1 ............                  parity 1 = d0 ^ 2·d1 ^ 4·d2 ^ …
//! …                                        parity j = Σ 2^(j·i) · di              in GF(256), x^8+x^4+x^3+x^2+1
//! ```
//!
//! A hole is as long as a packet at most, and a row at least as long as a packet: so a hole, wherever it begins, takes one byte of
//! a column at the most, and a block with `m` parity rows is whole again after any `m` lost packets. Columns are solved by
//! themselves, as a row may be missing in some of them only. Any `m` rows can be solved from `m` parity rows that follow each other (a
//! Vandermonde matrix of distinct elements, each of its columns times a power of its element); from others it would depend on which.

use std::ops::Range;

use crate::proto::wire::repair::{BLOCK_ROWS, MAX_ROWS};

/// The parity rows of `block`, one behind the other: `rows` times `row_bytes` bytes. What the last row lacks counts as zero.
///
/// # Panics
/// Where the block has more than [`BLOCK_ROWS`] rows, beyond 255 of which the elements 2^i would repeat, or `row_bytes` is not a multiple of 8.
#[must_use]
pub(super) fn parity(block: &[u8], row_bytes: usize, rows: usize) -> Vec<u8> {
    assert!(block.len() <= BLOCK_ROWS * row_bytes && row_bytes.is_multiple_of(8));
    let mut out = Vec::with_capacity(rows * row_bytes);
    let mut sums = vec![0_u64; row_bytes / 8];
    let mut padded = vec![0_u8; row_bytes];
    for power in 0..rows {
        sums.fill(0);
        // Horner's rule, from the last row to the first.
        for row in block.chunks(row_bytes).rev() {
            let row = if row.len() == row_bytes {
                row
            } else {
                padded.fill(0);
                padded[..row.len()].copy_from_slice(row);
                &padded
            };
            for (sum, word) in sums.iter_mut().zip(row.as_chunks::<8>().0) {
                *sum = times_power_of_two(*sum, power) ^ u64::from_le_bytes(*word);
            }
        }
        out.extend(sums.iter().flat_map(|sum| sum.to_le_bytes()));
    }
    out
}

/// Computes the `missing` bytes of `block` from the others and from the parity rows, of which `parity_missing` is not there.
/// `false` where that cannot be done; the block's missing bytes are undefined then.
///
/// Ranges are half-open, ascending and apart.
#[must_use]
pub(super) fn repair(
    block: &mut [u8],
    missing: &[Range<usize>],
    row_bytes: usize,
    parity: &[u8],
    parity_missing: &[Range<usize>],
) -> bool {
    let steps = steps(missing, row_bytes, parity.len() / row_bytes, parity_missing);
    steps.is_some_and(|steps| steps.iter().all(|step| solve(block, step, row_bytes, parity)))
}

/// Whether enough has come to try [`repair`] with so many parity rows.
#[must_use]
pub(super) fn is_repairable(
    missing: &[Range<usize>],
    row_bytes: usize,
    rows: usize,
    parity_missing: &[Range<usize>],
) -> bool {
    steps(missing, row_bytes, rows, parity_missing).is_some()
}

/// Parts of rows that may be missing of a block and its parity for it to be looked at: eight times as many as may be lost of a column.
/// What comes in more pieces was not lost by packets, and would take long to look at.
const MOST_HOLES: usize = 8 * MAX_ROWS as usize;

/// Columns in which the same rows are missing.
struct Step {
    columns: Range<usize>,
    lost: Vec<usize>,
    /// As many parity rows as are lost, by the power of two they were made with.
    powers: Range<usize>,
}

/// What has to be solved; `None` where there is too little parity somewhere.
fn steps(
    missing: &[Range<usize>],
    row_bytes: usize,
    parity_rows: usize,
    parity_missing: &[Range<usize>],
) -> Option<Vec<Step>> {
    let in_rows =
        |ranges: &[Range<usize>]| -> Vec<Hole> { ranges.iter().flat_map(|range| holes_of(range, row_bytes)).collect() };
    let (holes, parity_holes) = (in_rows(missing), in_rows(parity_missing));
    if holes.len() + parity_holes.len() > MOST_HOLES {
        return None;
    }
    let mut edges: Vec<usize> = holes
        .iter()
        .chain(&parity_holes)
        .flat_map(|hole| [hole.columns.start, hole.columns.end])
        .collect();
    edges.sort_unstable();
    edges.dedup();
    let mut steps = Vec::new();
    for edge in edges.windows(2) {
        let columns = edge[0]..edge[1];
        let lost = rows_in(&holes, &columns);
        if lost.is_empty() {
            continue;
        }
        let without = rows_in(&parity_holes, &columns);
        let first = (0..(parity_rows + 1).saturating_sub(lost.len()))
            .find(|first| !without.iter().any(|row| (*first..first + lost.len()).contains(row)))?;
        let powers = first..first + lost.len();
        steps.push(Step { columns, lost, powers });
    }
    Some(steps)
}

/// The part of a hole that lies in one row.
struct Hole {
    row: usize,
    columns: Range<usize>,
}

fn holes_of(range: &Range<usize>, row_bytes: usize) -> impl Iterator<Item = Hole> {
    let Range { start, end } = *range;
    let rows = if start < end {
        start / row_bytes..(end - 1) / row_bytes + 1
    } else {
        0..0
    };
    rows.map(move |row| {
        let first = row * row_bytes;
        Hole {
            row,
            columns: start.max(first) - first..end.min(first + row_bytes) - first,
        }
    })
}

/// The rows that are missing in these columns, ascending.
fn rows_in(holes: &[Hole], columns: &Range<usize>) -> Vec<usize> {
    let covers = |hole: &&Hole| hole.columns.start <= columns.start && columns.end <= hole.columns.end;
    let mut rows: Vec<usize> = holes.iter().filter(covers).map(|hole| hole.row).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// Computes the rows of a step in its columns.
fn solve(block: &mut [u8], step: &Step, row_bytes: usize, parity: &[u8]) -> bool {
    let Step { columns, lost, powers } = step;
    let field = Field::get();
    let Some(inverse) = field.inverse(lost, powers.clone()) else {
        return false;
    };
    let width = columns.len();
    // What of each parity row is left when the rows that are there are taken out of it.
    let mut rests: Vec<Vec<u8>> = powers
        .clone()
        .map(|power| parity[power * row_bytes..][columns.clone()].to_vec())
        .collect();
    for (row, bytes) in block.chunks(row_bytes).enumerate() {
        if lost.contains(&row) {
            continue;
        }
        let there = bytes
            .get(columns.start..columns.end.min(bytes.len()))
            .unwrap_or_default();
        for (rest, power) in rests.iter_mut().zip(powers.clone()) {
            field.add_product(rest, there, field.element(row * power));
        }
    }
    for (row, factors) in lost.iter().zip(&inverse) {
        let mut found = vec![0; width];
        for (rest, factor) in rests.iter().zip(factors) {
            field.add_product(&mut found, rest, *factor);
        }
        let first = row * row_bytes + columns.start;
        // The last row may end within the columns; what it lacks was counted as zero.
        let end = (first + width).min(block.len());
        if first < end {
            block[first..end].copy_from_slice(&found[..end - first]);
        }
    }
    true
}

/// `word`, eight elements of GF(256), times 2^power.
fn times_power_of_two(word: u64, power: usize) -> u64 {
    (0..power).fold(word, |word, _| {
        let high = word & 0x8080_8080_8080_8080;
        // 0xff in each byte whose high bit was set.
        let mask = (high << 1).wrapping_sub(high >> 7);
        ((word ^ high) << 1) ^ (mask & 0x1d1d_1d1d_1d1d_1d1d)
    })
}

/// GF(256) by logarithms to the base 2.
struct Field {
    power: [u8; 255],
    log: [u8; 256],
}

impl Field {
    fn get() -> &'static Self {
        static FIELD: Field = Field::new();
        &FIELD
    }

    const fn new() -> Self {
        let (mut power, mut log) = ([0; 255], [0; 256]);
        let (mut at, mut element) = (0, 1_u8);
        while at < 255 {
            power[at] = element;
            log[element as usize] = at as u8;
            element = (element << 1) ^ if element & 0x80 == 0 { 0 } else { 0x1d };
            at += 1;
        }
        Self { power, log }
    }

    /// 2^exponent.
    fn element(&self, exponent: usize) -> u8 {
        self.power[exponent % 255]
    }

    fn product(&self, one: u8, other: u8) -> u8 {
        if one == 0 || other == 0 {
            return 0;
        }
        self.element(usize::from(self.log[usize::from(one)]) + usize::from(self.log[usize::from(other)]))
    }

    fn reciprocal(&self, element: u8) -> u8 {
        self.element(255 - usize::from(self.log[usize::from(element)]))
    }

    /// Adds `bytes` times `factor` to `sums`.
    fn add_product(&self, sums: &mut [u8], bytes: &[u8], factor: u8) {
        match factor {
            0 => {}
            1 => sums.iter_mut().zip(bytes).for_each(|(sum, byte)| *sum ^= byte),
            _ => {
                let table: [u8; 256] = std::array::from_fn(|byte| self.product(byte as u8, factor));
                sums.iter_mut()
                    .zip(bytes)
                    .for_each(|(sum, byte)| *sum ^= table[usize::from(*byte)]);
            }
        }
    }

    /// The inverse of the matrix with 2^(row · power) for each power (down) and row (across), as many of the ones as of the others.
    /// `None` where it has none.
    fn inverse(&self, rows: &[usize], powers: Range<usize>) -> Option<Vec<Vec<u8>>> {
        let size = rows.len();
        // Gauss and Jordan on the matrix with the unit matrix at its right.
        let mut matrix: Vec<Vec<u8>> = (0..size)
            .map(|down| {
                let left = rows.iter().map(|row| self.element(row * (powers.start + down)));
                left.chain((0..size).map(|across| u8::from(across == down))).collect()
            })
            .collect();
        for column in 0..size {
            let pivot = (column..size).find(|row| matrix[*row][column] != 0)?;
            matrix.swap(column, pivot);
            let factor = self.reciprocal(matrix[column][column]);
            for element in &mut matrix[column] {
                *element = self.product(*element, factor);
            }
            let solved = matrix[column].clone();
            for (row, elements) in matrix.iter_mut().enumerate() {
                if row != column {
                    let factor = elements[column];
                    self.add_product(elements, &solved, factor);
                }
            }
        }
        Some(matrix.into_iter().map(|row| row[size..].to_vec()).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROW: usize = 64;
    const PACKET: usize = 44;
    const MAX: usize = MAX_ROWS as usize;

    fn block(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 11) as u8).collect()
    }

    #[test]
    fn the_first_parity_row_is_the_sum_of_all_rows() {
        let block = block(3 * ROW);
        let sum: Vec<u8> = (0..ROW)
            .map(|at| block[at] ^ block[ROW + at] ^ block[2 * ROW + at])
            .collect();
        assert_eq!(parity(&block, ROW, 1), sum);
    }

    #[test]
    fn doubling_eight_elements_is_doubling_each() {
        let field = Field::get();
        for byte in 0..=255_u8 {
            let word = u64::from_le_bytes([byte, 0, 255, byte, 1, 128, 127, byte]);
            for power in 0..MAX {
                let each = word.to_le_bytes().map(|byte| field.product(byte, field.element(power)));
                assert_eq!(times_power_of_two(word, power).to_le_bytes(), each);
            }
        }
    }

    #[test]
    fn one_hole_more_than_there_are_parity_rows_is_not_guessed_at() {
        let whole = block(8 * ROW);
        let rows = parity(&whole, ROW, 2);
        let holes = |count: usize| (0..count).map(|row| row * ROW..row * ROW + 5).collect::<Vec<_>>();
        let mut broken = whole.clone();
        broken[..5].fill(0);
        broken[ROW..ROW + 5].fill(0);
        assert!(repair(&mut broken.clone(), &holes(2), ROW, &rows, &[]));
        assert!(!repair(&mut broken, &holes(3), ROW, &rows, &[]));
    }

    #[test]
    fn parity_rows_that_follow_each_other_are_enough_wherever_they_begin() {
        let whole = block(BLOCK_ROWS * ROW);
        let parity = parity(&whole, ROW, MAX);
        for first in 0..MAX {
            // All parity rows before and behind three of them are missing.
            let gap: Vec<Range<usize>> = [0..first * ROW, (first + 3) * ROW..MAX * ROW]
                .into_iter()
                .filter(|gap| !gap.is_empty())
                .collect();
            let holes: Vec<Range<usize>> = [5, 6, 63].iter().map(|row| row * ROW..row * ROW + 5).collect();
            let mut broken = whole.clone();
            holes.iter().for_each(|hole| broken[hole.clone()].fill(0));
            let is_enough = first + 3 <= MAX;
            assert_eq!(is_repairable(&holes, ROW, MAX, &gap), is_enough, "{first}");
            if is_enough {
                assert!(repair(&mut broken, &holes, ROW, &parity, &gap));
                assert_eq!(broken, whole, "{first}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_packets_up_to_the_number_of_parity_rows_come_back(
            len in 1usize..=BLOCK_ROWS * ROW,
            rows in 1usize..=MAX,
            starts in proptest::collection::btree_set(0usize..BLOCK_ROWS * ROW, 0..=MAX),
        ) {
            let whole = block(len);
            let parity = parity(&whole, ROW, rows);
            let mut broken = whole.clone();
            let mut missing: Vec<Range<usize>> = Vec::new();
            for start in starts.into_iter().filter(|start| *start < len).take(rows) {
                // Packets do not overlap.
                let start = missing.last().map_or(start, |last| start.max(last.end));
                let end = (start + PACKET).min(len);
                if start < end {
                    broken[start..end].fill(0xee);
                    missing.push(start..end);
                }
            }
            prop_assert!(repair(&mut broken, &missing, ROW, &parity, &[]));
            prop_assert_eq!(broken, whole);
        }

        #[test]
        fn what_is_missing_of_the_parity_counts_against_it_and_never_makes_wrong_bytes(
            holes in proptest::collection::vec((0usize..20, 0usize..ROW - 8), 1..4),
            parity_holes in proptest::collection::vec((0usize..5, 0usize..ROW - 8), 0..3),
        ) {
            let whole = block(20 * ROW);
            let mut parity = parity(&whole, ROW, 5);
            let ranges = |holes: &[(usize, usize)]| {
                let mut ranges: Vec<Range<usize>> =
                    holes.iter().map(|(row, at)| row * ROW + at..row * ROW + at + 8).collect();
                ranges.sort_by_key(|range| range.start);
                ranges.dedup_by(|later, first| later.start < first.end);
                ranges
            };
            let (missing, parity_missing) = (ranges(&holes), ranges(&parity_holes));
            let mut broken = whole.clone();
            missing.iter().for_each(|range| broken[range.clone()].fill(1));
            parity_missing.iter().for_each(|range| parity[range.clone()].fill(1));
            if repair(&mut broken, &missing, ROW, &parity, &parity_missing) {
                prop_assert_eq!(broken, whole);
            } else {
                prop_assert!(!parity_missing.is_empty());
            }
        }
    }
}
