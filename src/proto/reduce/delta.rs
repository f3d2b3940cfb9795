//! A page as what changed in its previous version.
//!
//! ```text
//! varint runs
//! runs x { varint skip      bytes that stay, since the end of the run before
//!          varint len - 1
//!          bytes[len] }     of the new version
//! ```
//!
//! The rest stays. New bytes are carried, not differences, so that groups of deltas compress by what they have in common. Short stretches that
//! stay are part of a run where saying so would take more.

use lz4_flex::block::{compress_into_with_dict, decompress_into_with_dict, get_maximum_output_size};

use crate::proto::page::PAGE_SIZE;

use super::varint;

/// Edits of up to this are carried whatever a codec would make of the page: they are found in a fraction of its time.
const FEW_EDITS: usize = 512;

/// Pages in a row after which the codec is tried for one in [`TRIED_AGAIN_EVERY`] only.
const PATIENCE: u32 = 64;
const TRIED_AGAIN_EVERY: u32 = 16;

/// What makes a page of its previous version.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Delta<'a> {
    /// What changed, for [`apply`].
    Edits(&'a [u8]),
    /// The page compressed with its previous version as dictionary, for [`restore_similar`]: what moved within it costs little.
    Similar(&'a [u8]),
}

/// Finds the smallest delta, with the scratch memory it needs.
#[derive(Debug)]
pub(super) struct DeltaEncoder {
    edits: Vec<u8>,
    coded: Vec<u8>,
    /// Pages since the codec's output was last of use.
    in_vain: u32,
}

impl Default for DeltaEncoder {
    fn default() -> Self {
        Self {
            edits: Vec::with_capacity(PAGE_SIZE),
            coded: vec![0; get_maximum_output_size(PAGE_SIZE)],
            in_vain: 0,
        }
    }
}

impl DeltaEncoder {
    /// The smallest delta from `previous` to `page`; `None` where the page takes less as a literal, of which `literal` bytes are expected.
    pub(super) fn encode(
        &mut self,
        previous: &[u8; PAGE_SIZE],
        page: &[u8; PAGE_SIZE],
        literal: usize,
    ) -> Option<Delta<'_>> {
        let less_than_literal = literal.saturating_sub(1).min(PAGE_SIZE);
        let edited = diff(previous, page, less_than_literal, &mut self.edits).then_some(self.edits.len());
        if edited.is_none_or(|edits| edits > FEW_EDITS) && self.tries_codec() {
            let coded = compress_into_with_dict(page, &mut self.coded, previous)
                .expect("the buffer has the codec's largest output for a page");
            if coded < edited.unwrap_or(literal) {
                self.in_vain = 0;
                return Some(Delta::Similar(&self.coded[..coded]));
            }
        }
        edited.is_some().then_some(Delta::Edits(&self.edits))
    }

    /// The codec builds a table of the previous version for each page: guests for which that never pays are spared it.
    fn tries_codec(&mut self) -> bool {
        self.in_vain = self.in_vain.wrapping_add(1);
        self.in_vain <= PATIENCE || self.in_vain.is_multiple_of(TRIED_AGAIN_EVERY)
    }
}

/// Takes a page of [`Delta::Similar`] off the front of `bytes`. `None` where it is none.
pub(super) fn restore_similar(bytes: &mut &[u8], previous: &[u8; PAGE_SIZE], page: &mut [u8; PAGE_SIZE]) -> Option<()> {
    let len = usize::try_from(varint::read(bytes)?).ok()?;
    let coded = bytes.split_off(..len)?;
    decompress_into_with_dict(coded, page, previous)
        .is_ok_and(|len| len == PAGE_SIZE)
        .then_some(())
}

/// A stretch that stays is said from this length on: a skip and a length take two bytes, and finding it takes time.
const LEAST_SKIP: usize = 4;

/// Replaces `edits` by what makes `page` of `previous`. `false` where that takes more than `most` bytes; `edits` is then of no use.
pub(super) fn diff(previous: &[u8; PAGE_SIZE], page: &[u8; PAGE_SIZE], most: usize, edits: &mut Vec<u8>) -> bool {
    edits.clear();
    // The number of runs is known at the end, and almost always takes one byte.
    edits.push(0);
    let (mut runs, mut said) = (0_u64, 0);
    while let Some(start) = first_difference(previous, page, said) {
        let end = end_of_difference(previous, page, start);
        varint::write((start - said) as u64, edits);
        varint::write((end - start - 1) as u64, edits);
        if edits.len() + (end - start) > most {
            return false;
        }
        edits.extend_from_slice(&page[start..end]);
        runs += 1;
        said = end;
    }
    if let Ok(byte) = u8::try_from(runs)
        && byte < 0x80
    {
        edits[0] = byte;
    } else {
        let mut count = Vec::new();
        varint::write(runs, &mut count);
        edits.splice(..1, count);
    }
    edits.len() <= most
}

/// Takes one page's edits off the front of `edits` and applies them to `page`. `None` where they are not what [`diff`] makes.
pub(super) fn apply(edits: &mut &[u8], page: &mut [u8; PAGE_SIZE]) -> Option<()> {
    let runs = varint::read(edits)?;
    if runs > (PAGE_SIZE / LEAST_SKIP) as u64 {
        return None;
    }
    let mut at = 0_usize;
    for _ in 0..runs {
        let skip = usize::try_from(varint::read(edits)?).ok()?;
        let len = usize::try_from(varint::read(edits)?).ok()?.checked_add(1)?;
        let start = at.checked_add(skip)?;
        at = start.checked_add(len)?;
        page.get_mut(start..at)?.copy_from_slice(edits.split_off(..len)?);
    }
    Some(())
}

/// The first byte from `from` on that differs.
fn first_difference(previous: &[u8; PAGE_SIZE], page: &[u8; PAGE_SIZE], from: usize) -> Option<usize> {
    const LINE: usize = 64;
    let mut at = from;
    while at + LINE <= PAGE_SIZE && previous[at..at + LINE] == page[at..at + LINE] {
        at += LINE;
    }
    while at + 8 <= PAGE_SIZE {
        let difference = word(previous, at) ^ word(page, at);
        if difference != 0 {
            return Some(at + difference.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    (at..PAGE_SIZE).find(|&at| previous[at] != page[at])
}

/// The end of the stretch that differs from `start` on: where at least [`LEAST_SKIP`] bytes stay, or all to the end do.
fn end_of_difference(previous: &[u8; PAGE_SIZE], page: &[u8; PAGE_SIZE], start: usize) -> usize {
    let (mut at, mut end) = (start + 1, start + 1);
    while at < PAGE_SIZE {
        if at + 8 <= PAGE_SIZE && differs_everywhere(word(previous, at) ^ word(page, at)) {
            at += 8;
            end = at;
            continue;
        }
        if previous[at] != page[at] {
            end = at + 1;
        } else if at + 1 - end >= LEAST_SKIP {
            break;
        }
        at += 1;
    }
    end
}

fn word(bytes: &[u8; PAGE_SIZE], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("callers stay a word below the end"))
}

/// Whether no byte of `difference` is zero.
fn differs_everywhere(difference: u64) -> bool {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    difference.wrapping_sub(ONES) & !difference & HIGH == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(fill: u8) -> [u8; PAGE_SIZE] {
        [fill; PAGE_SIZE]
    }

    fn edits_of(previous: &[u8; PAGE_SIZE], page: &[u8; PAGE_SIZE]) -> Vec<u8> {
        let mut edits = Vec::new();
        assert!(diff(previous, page, 3 * PAGE_SIZE, &mut edits));
        edits
    }

    #[track_caller]
    fn survives(previous: &[u8; PAGE_SIZE], page: &[u8; PAGE_SIZE]) -> usize {
        let edits = edits_of(previous, page);
        let mut restored = *previous;
        let mut rest = edits.as_slice();
        assert_eq!(apply(&mut rest, &mut restored), Some(()));
        assert!(rest.is_empty());
        assert!(restored == *page);
        edits.len()
    }

    #[test]
    fn a_stretch_of_64_bytes_takes_four_more_wherever_it_is() {
        for start in [0, 1, 63, 64, 1000, PAGE_SIZE - 64] {
            let mut new = page(1);
            new[start..start + 64].fill(2);
            let len = survives(&page(1), &new);
            assert!((67..=68).contains(&len), "{start}: {len}");
        }
    }

    #[test]
    fn the_bytes_of_edits_are_these() {
        let mut new = page(0);
        new[3] = 7;
        new[5] = 8;
        new[4095] = 9;
        assert_eq!(edits_of(&page(0), &new), [2, 3, 2, 7, 0, 8, 0xf9, 0x1f, 0, 9]);
        assert_eq!(edits_of(&page(0), &page(0)), [0]);
    }

    #[test]
    fn every_place_and_length_of_a_change_survives() {
        for start in (0..PAGE_SIZE).step_by(61) {
            for len in [1, 2, 3, 7, 8, 9, 63, 64, 65, 4096] {
                let mut new = page(0xff);
                let end = (start + len).min(PAGE_SIZE);
                new[start..end].fill(0);
                survives(&page(0xff), &new);
            }
        }
    }

    #[test]
    fn a_page_with_nothing_in_common_is_one_run_and_given_up_at_the_limit() {
        assert_eq!(survives(&page(1), &page(2)), PAGE_SIZE + 4);
        assert!(!diff(&page(1), &page(2), PAGE_SIZE, &mut Vec::new()));
        let mut striped = page(1);
        striped.iter_mut().step_by(5).for_each(|byte| *byte = 2);
        survives(&page(1), &striped);
    }

    #[test]
    fn edits_beyond_the_page_or_cut_short_are_refused() {
        let mut new = page(0);
        new[100..200].fill(3);
        let edits = edits_of(&page(0), &new);
        for len in 0..edits.len() {
            assert_eq!(apply(&mut &edits[..len], &mut page(0)), None, "{len}");
        }
        let apply_all = |numbers: &[u64]| {
            let mut edits = Vec::new();
            numbers.iter().for_each(|&number| varint::write(number, &mut edits));
            edits.extend_from_slice(&page(0));
            apply(&mut edits.as_slice(), &mut page(0))
        };
        assert_eq!(apply_all(&[1, 0, 4095]), Some(()));
        assert_eq!(apply_all(&[1, 1, 4095]), None);
        assert_eq!(apply_all(&[1, 4096, 0]), None);
        assert_eq!(apply_all(&[1, u64::MAX, u64::MAX]), None);
        assert_eq!(apply_all(&[1, 0, u64::MAX]), None);
        assert_eq!(apply_all(&[1025]), None);
    }

    proptest! {
        #[test]
        fn whatever_changed_survives(changes in proptest::collection::vec((0..PAGE_SIZE, any::<u8>(), 1_usize..40), 0..400)) {
            let previous = page(0x55);
            let mut new = previous;
            for (start, value, len) in changes {
                let end = (start + len).min(PAGE_SIZE);
                new[start..end].fill(value);
            }
            survives(&previous, &new);
        }

        #[test]
        fn no_edits_reach_beyond_a_page(edits in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = apply(&mut edits.as_slice(), &mut page(0));
        }
    }
}
