//! What the destination's disks hold before anything is written to them: an older copy, a base image, what an attempt that was cut short has
//! brought. The source is told the digest of every block, and sends those that it has otherwise.
//!
//! ```text
//! 0      1              8               16
//! +------+--------------+---------------+----------------------------------+
//! | kind | 0            | length        |  8 bytes for each block of Blocks …       all little-endian
//! +------+--------------+---------------+----------------------------------+
//! ```
//!
//! The parts of all disks are told in order and without a gap: [`Part::Zeroes`] of any length, [`Part::Blocks`] of one [`REGION`] at most. A block
//! is known by the first 8 bytes of its digest, which is keyed with the migration: nobody who wrote a block knew it. Blocks of which the source says
//! that they are the same are in the digest of its stream with all 32 bytes, so a coincidence fails the migration and does not damage a disk.
//!
//! [`Part::Flushed`] is the last: what the first round has brought is durable. Before that the guest is not stopped, since it would stand for as
//! long as a disk takes to write what its host has buffered.
//!
//! Telling costs 0.2 % of what the destination holds, in the direction in which little else goes.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes that are compared at a time: what a page cache writes.
pub const BLOCK: u64 = 4096;

/// Most bytes of a disk that one [`Part::Blocks`] is about.
pub const REGION: u64 = 1 << 20;

/// Most parts of [`Part::Blocks`] that are told and not yet answered by a record: 4 MiB of digests at the destination.
pub const MOST_OPEN: usize = 512;

/// Keyed BLAKE3 of a block.
pub type Digest = [u8; 32];

/// What of a digest is told.
pub type ShortDigest = u64;

const HEADER_LEN: usize = 16;
const ZEROES: u8 = 1;
const BLOCKS: u8 = 2;
const FLUSHED: u8 = 3;

/// What blocks are compared by in one migration.
#[derive(Clone, Debug)]
pub struct BlockKey([u8; 32]);

impl BlockKey {
    /// That of the migration of this name.
    #[must_use]
    pub fn of(migration: [u8; 16]) -> Self {
        Self(blake3::derive_key("longhaul 2026-11 blocks of disks", &migration))
    }

    /// Of each block of these bytes; the last one may be short.
    #[must_use]
    pub fn digests(&self, bytes: &[u8]) -> Vec<Digest> {
        let blocks = bytes.chunks(BLOCK as usize);
        blocks
            .map(|block| *blake3::keyed_hash(&self.0, block).as_bytes())
            .collect()
    }
}

/// The part of a digest that is told.
#[must_use]
pub fn short(digest: &Digest) -> ShortDigest {
    u64::from_le_bytes(*digest.first_chunk().expect("a digest has more bytes"))
}

/// What is told of the bytes that follow on those of the part before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// They read as zeroes.
    Zeroes,
    /// They have blocks with these digests.
    Blocks(Vec<ShortDigest>),
    /// No bytes: all disks have been told, and what the first round has brought to them is durable.
    Flushed,
}

/// A part of `length` bytes that read as zeroes.
#[must_use]
pub fn zeroes(length: u64) -> Bytes {
    header(ZEROES, length).freeze()
}

/// A part of `length` bytes whose blocks have these digests.
#[must_use]
pub fn blocks(length: u64, digests: &[Digest]) -> Bytes {
    let mut part = header(BLOCKS, length);
    part.reserve(digests.len() * 8);
    for digest in digests {
        part.put_u64_le(short(digest));
    }
    part.freeze()
}

/// The part that follows on the first round.
#[must_use]
pub fn flushed() -> Bytes {
    header(FLUSHED, 0).freeze()
}

fn header(kind: u8, length: u64) -> BytesMut {
    let mut header = BytesMut::with_capacity(HEADER_LEN);
    header.put_u64_le(u64::from(kind));
    header.put_u64_le(length);
    header
}

/// Reads what is told, by a peer that may say anything.
#[derive(Debug)]
pub struct Reader {
    /// Of each disk, in bytes.
    sizes: VecDeque<u64>,
    disk: u16,
    offset: u64,
    has_ended: bool,
}

/// What is told is not about these disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeldError {
    /// No part begins so.
    #[error("what the destination says of its disks has a part of the unknown kind {kind}")]
    Kind {
        /// Its first 8 bytes.
        kind: u64,
    },
    /// Bytes beyond the end of a disk, none, or more than a part may have.
    #[error("what the destination says of its disk {disk} has {length} bytes at {offset}, which cannot be")]
    Length {
        /// The disk's number.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// More than there are disks.
    #[error("what the destination says of its disks goes on after the last one")]
    AfterTheEnd,
}

impl Reader {
    /// Of disks of these sizes.
    #[must_use]
    pub fn new(sizes: impl IntoIterator<Item = u64>) -> Self {
        Self {
            sizes: sizes.into_iter().collect(),
            disk: 0,
            offset: 0,
            has_ended: false,
        }
    }

    /// Takes the next part off the front of `received`, with the number of its disk and its bytes there; `None` where more bytes are needed.
    ///
    /// # Errors
    /// [`HeldError`], before anything is waited for that cannot be.
    pub fn next(&mut self, received: &mut BytesMut) -> Result<Option<(u16, Range<u64>, Part)>, HeldError> {
        // A disk without bytes has no part.
        while self.sizes.front().is_some_and(|size| *size == self.offset) {
            self.sizes.pop_front();
            self.disk += 1;
            self.offset = 0;
        }
        if received.is_empty() {
            return Ok(None);
        }
        if self.has_ended {
            return Err(HeldError::AfterTheEnd);
        }
        let Some(mut header) = received.get(..HEADER_LEN) else {
            return Ok(None);
        };
        let (kind, length) = (header.get_u64_le(), header.get_u64_le());
        let (disk, offset) = (self.disk, self.offset);
        let Some(&size) = self.sizes.front() else {
            if (kind, length) != (u64::from(FLUSHED), 0) {
                return Err(HeldError::AfterTheEnd);
            }
            self.has_ended = true;
            received.advance(HEADER_LEN);
            return Ok(Some((disk, 0..0, Part::Flushed)));
        };
        let most = match kind {
            kind if kind == u64::from(ZEROES) => u64::MAX,
            kind if kind == u64::from(BLOCKS) => REGION,
            kind => return Err(HeldError::Kind { kind }),
        };
        // Whoever compares cuts at regions.
        let is_whole = length == size - offset || length.is_multiple_of(REGION);
        if length == 0 || length > most.min(size - offset) || !is_whole {
            return Err(HeldError::Length { disk, offset, length });
        }
        let is_zero = kind == u64::from(ZEROES);
        let count = if is_zero { 0 } else { length.div_ceil(BLOCK) as usize };
        if received.len() < HEADER_LEN + 8 * count {
            return Ok(None);
        }
        received.advance(HEADER_LEN);
        let part = match is_zero {
            true => Part::Zeroes,
            false => Part::Blocks((0..count).map(|_| received.get_u64_le()).collect()),
        };
        self.offset += length;
        Ok(Some((disk, offset..offset + length, part)))
    }
}

/// What was told of blocks and is not answered yet.
#[derive(Debug, Default)]
pub struct Open(VecDeque<(u16, Range<u64>, Vec<Digest>)>);

impl Open {
    /// The bytes of one [`Part::Blocks`], behind all others.
    pub fn push(&mut self, disk: u16, range: Range<u64>, digests: Vec<Digest>) {
        self.0.push_back((disk, range, digests));
    }

    /// The digests of these blocks; `None` where that was not told, or not of whole blocks.
    #[must_use]
    pub fn digests(&self, disk: u16, range: Range<u64>) -> Option<&[Digest]> {
        let holds = |(of, told, _): &&(u16, Range<u64>, Vec<Digest>)| {
            *of == disk && told.start <= range.start && range.end <= told.end
        };
        let (_, told, digests) = self.0.iter().find(holds)?;
        let is_whole = range.start.is_multiple_of(BLOCK) && (range.end.is_multiple_of(BLOCK) || range.end == told.end);
        let first = (range.start - told.start) / BLOCK;
        let end = (range.end - told.start).div_ceil(BLOCK);
        digests.get(first as usize..end as usize).filter(|_| is_whole)
    }

    /// A record of the first round ends here: nothing before it is asked for again. How many are not open any more.
    pub fn close(&mut self, disk: u16, end: u64) -> usize {
        let before = self.0.len();
        while self
            .0
            .front()
            .is_some_and(|(of, told, _)| (*of, told.end) <= (disk, end))
        {
            self.0.pop_front();
        }
        before - self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: BlockKey = BlockKey([7; 32]);

    fn read(sizes: &[u64], bytes: &[u8], step: usize) -> Result<Vec<(u16, Range<u64>, Part)>, HeldError> {
        let mut reader = Reader::new(sizes.iter().copied());
        let (mut received, mut parts) = (BytesMut::new(), Vec::new());
        for chunk in bytes.chunks(step) {
            received.extend_from_slice(chunk);
            while let Some(part) = reader.next(&mut received)? {
                parts.push(part);
            }
        }
        Ok(parts)
    }

    #[test]
    fn what_is_told_of_several_disks_is_read_back_however_it_is_sliced() {
        let last = KEY.digests(&[3; 5000]);
        let told = [zeroes(REGION), blocks(5000, &last), zeroes(512)].concat();
        let sizes = [REGION + 5000, 0, 512];
        let whole = read(&sizes, &told, told.len()).unwrap();
        assert_eq!(whole[0], (0, 0..REGION, Part::Zeroes));
        let shorts: Vec<_> = last.iter().map(short).collect();
        assert_eq!(whole[1], (0, REGION..REGION + 5000, Part::Blocks(shorts)));
        assert_eq!(whole[2], (2, 0..512, Part::Zeroes));
        for step in 1..told.len() {
            assert_eq!(read(&sizes, &told, step).unwrap(), whole);
        }
    }

    #[test]
    fn parts_that_cannot_be_are_refused_before_they_come() {
        let refusal = |part: &[u8]| read(&[3 * REGION], part, part.len()).unwrap_err();
        let length = |length| HeldError::Length {
            disk: 0,
            offset: 0,
            length,
        };
        assert_eq!(refusal(&zeroes(0)), length(0));
        assert_eq!(refusal(&zeroes(4096)), length(4096));
        assert_eq!(refusal(&zeroes(3 * REGION + 1)), length(3 * REGION + 1));
        assert_eq!(refusal(&zeroes(u64::MAX)), length(u64::MAX));
        assert_eq!(refusal(&header(BLOCKS, 2 * REGION)), length(2 * REGION));
        assert_eq!(refusal(&header(9, REGION)), HeldError::Kind { kind: 9 });
        assert_eq!(
            refusal(&[zeroes(3 * REGION), zeroes(1)].concat()),
            HeldError::AfterTheEnd
        );
    }

    #[test]
    fn the_first_round_is_durable_once_and_after_all_disks() {
        let end = [zeroes(REGION), flushed()].concat();
        assert_eq!(read(&[REGION], &end, 5).unwrap()[1].2, Part::Flushed);
        let early = read(&[REGION], &flushed(), 16).unwrap_err();
        assert_eq!(early, HeldError::Kind { kind: 3 });
        assert_eq!(
            read(&[], &[flushed(), flushed()].concat(), 16),
            Err(HeldError::AfterTheEnd)
        );
    }

    #[test]
    fn the_digests_of_blocks_are_there_until_they_are_answered() {
        let digests = KEY.digests(&(0..3 * BLOCK + 10).map(|at| (at / BLOCK) as u8).collect::<Vec<_>>());
        assert_eq!(digests.len(), 4);
        let mut open = Open::default();
        open.push(1, REGION..REGION + 3 * BLOCK + 10, digests.clone());
        let at = |first, end| REGION + first..REGION + end;
        assert_eq!(open.digests(1, at(BLOCK, 3 * BLOCK)), Some(&digests[1..3]));
        assert_eq!(open.digests(1, at(3 * BLOCK, 3 * BLOCK + 10)), Some(&digests[3..]));
        for wrong in [at(1, BLOCK), at(0, BLOCK + 1), at(0, 4 * BLOCK), 0..BLOCK] {
            assert_eq!(open.digests(1, wrong), None);
        }
        assert_eq!(open.digests(0, at(0, BLOCK)), None);
        assert_eq!(open.close(1, REGION + BLOCK), 0);
        assert_eq!(open.close(2, 0), 1);
        assert_eq!(open.digests(1, at(0, BLOCK)), None);
    }

    #[test]
    fn the_same_block_has_another_digest_in_another_migration() {
        let of = |migration| BlockKey::of([migration; 16]).digests(&[0; 4096]);
        assert_ne!(of(1), of(2));
        assert_eq!(of(1), of(1));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(kind in 0_u8..5, bytes in proptest::collection::vec(any::<u8>(), 0..100), size in 0..4 * REGION) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            let _ = read(&[size, 512], &bytes, 7);
        }
    }
}
