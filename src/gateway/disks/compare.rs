//! What the destination says of its disks, and what of a disk here is otherwise.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::net::unix::OwnedReadHalf;

use crate::hypervisor::nbd::{NbdClient, NbdError};
use crate::hypervisor::qemu::GuestDisk;
use crate::proto::disk::held::{BLOCK, BlockKey, Digest, HeldError, Part, REGION, Reader, ShortDigest, short};
use crate::proto::disk::nbd::{Content, Piece, Reading};

/// What the destination says, as it comes.
pub(super) struct Told {
    stream: OwnedReadHalf,
    received: BytesMut,
    parts: Reader,
    next: Option<(Range<u64>, Part)>,
}

/// It does not.
#[derive(Debug, thiserror::Error)]
pub(super) enum ToldError {
    #[error("the destination does not say any more what its disks hold")]
    BrokenOff,
    #[error("what the destination says of its disks cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Held(#[from] HeldError),
}

impl Told {
    /// Of these disks.
    pub(super) fn new(stream: OwnedReadHalf, disks: &[GuestDisk]) -> Self {
        Self {
            stream,
            received: BytesMut::new(),
            parts: Reader::new(disks.iter().map(|disk| disk.size_bytes)),
            next: None,
        }
    }

    /// Whether [`Told::next`] has something at once.
    ///
    /// # Errors
    /// [`ToldError`]
    pub(super) fn is_there(&mut self) -> Result<bool, ToldError> {
        if self.next.is_none() {
            let next = self.parts.next(&mut self.received)?;
            self.next = next.map(|(_, range, part)| (range, part));
        }
        Ok(self.next.is_some())
    }

    /// The bytes that follow on those of the part before, of the next disk after the last of one.
    ///
    /// # Errors
    /// [`ToldError`]
    pub(super) async fn next(&mut self) -> Result<(Range<u64>, Part), ToldError> {
        loop {
            if self.is_there()?
                && let Some(next) = self.next.take()
            {
                return Ok(next);
            }
            self.received.reserve(RECEIVED);
            if self.stream.read_buf(&mut self.received).await? == 0 {
                return Err(ToldError::BrokenOff);
            }
        }
    }

    /// Until the destination has closed the stream.
    ///
    /// # Errors
    /// [`ToldError`]: something was said after the end, or before it where nothing was asked.
    pub(super) async fn end(&mut self) -> Result<(), ToldError> {
        let has_more = !self.received.is_empty() || self.stream.read(&mut [0; 16]).await? > 0;
        if has_more {
            return Err(HeldError::AfterTheEnd.into());
        }
        Ok(())
    }
}

/// Bytes that are read at a time, at least.
const RECEIVED: usize = 16 << 10;

/// Some bytes of a region, beside the destination's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Compared {
    /// Bytes.
    pub(super) length: u64,
    pub(super) found: Found,
}

/// What they are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The same, with these digests.
    Same(Vec<Digest>),
    /// Zeroes, and something else there.
    Zeroes,
    /// Something else.
    Data(Bytes),
}

/// Reads a region, where it is not all zeroes, and compares it.
///
/// # Errors
/// Of the disk.
pub(super) async fn region(
    disk: &NbdClient,
    range: Range<u64>,
    has_data: bool,
    key: BlockKey,
    held: Arc<[ShortDigest]>,
) -> Result<Vec<Compared>, NbdError> {
    let bytes = read(disk, range, has_data).await?;
    let compared = tokio::task::spawn_blocking(move || compare(&key, &bytes, &held));
    Ok(compared.await.expect("comparing does not panic"))
}

/// The bytes of at most a region.
///
/// # Errors
/// Of the disk.
pub(super) async fn read(disk: &NbdClient, range: Range<u64>, has_data: bool) -> Result<Bytes, NbdError> {
    let length = u32::try_from(range.end - range.start).expect("a region is short");
    debug_assert!(u64::from(length) <= REGION);
    let mut bytes = BytesMut::zeroed(if has_data { 0 } else { length as usize });
    if has_data {
        let mut pieces = disk.read(range.start, length, Reading::Whole).await?;
        if let [
            Piece {
                content: Content::Data(data),
                ..
            },
        ] = &mut pieces[..]
        {
            return Ok(std::mem::take(data));
        }
        for piece in pieces {
            match piece.content {
                Content::Data(data) => bytes.extend_from_slice(&data),
                Content::Hole(hole) => bytes.resize(bytes.len() + hole as usize, 0),
            }
        }
    }
    Ok(bytes.freeze())
}

/// Neighbours of one kind are told as one.
fn compare(key: &BlockKey, bytes: &Bytes, held: &[ShortDigest]) -> Vec<Compared> {
    let digests = key.digests(bytes);
    let is_same = |block: usize| held.get(block) == Some(&short(&digests[block]));
    let range_of = |block: usize| block * BLOCK as usize..bytes.len().min((block + 1) * BLOCK as usize);
    let kind = |block: usize| match is_same(block) {
        true => Kind::Same,
        false if bytes[range_of(block)].iter().all(|byte| *byte == 0) => Kind::Zeroes,
        false => Kind::Data,
    };
    let mut found: Vec<(Kind, Range<usize>)> = Vec::new();
    for block in 0..digests.len() {
        let kind = kind(block);
        match found.last_mut() {
            Some((last, blocks)) if *last == kind => blocks.end = block + 1,
            _ => found.push((kind, block..block + 1)),
        }
    }
    let compared = found.into_iter().map(|(kind, blocks)| {
        let range = blocks.start * BLOCK as usize..range_of(blocks.end - 1).end;
        Compared {
            length: range.len() as u64,
            found: match kind {
                Kind::Same => Found::Same(digests[blocks].to_vec()),
                Kind::Zeroes => Found::Zeroes,
                Kind::Data => Found::Data(bytes.slice(range)),
            },
        }
    });
    compared.collect()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Same,
    Zeroes,
    Data,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_blocks_are_the_same_zeroes_are_told_and_the_rest_is_sent() {
        let key = BlockKey::of([1; 16]);
        let block = |byte| vec![byte; BLOCK as usize];
        let here = Bytes::from([block(1), block(2), block(0), block(0), block(0), block(3), vec![4; 100]].concat());
        let there = [block(1), block(2), block(0), block(9), block(9), block(9), vec![4; 100]].concat();
        let held: Vec<_> = key.digests(&there).iter().map(short).collect();
        let digests = key.digests(&here);
        let compared = |length, found| Compared { length, found };
        let expected = [
            compared(3 * BLOCK, Found::Same(digests[..3].to_vec())),
            compared(2 * BLOCK, Found::Zeroes),
            compared(BLOCK, Found::Data(here.slice(5 * BLOCK as usize..6 * BLOCK as usize))),
            compared(100, Found::Same(digests[6..].to_vec())),
        ];
        assert_eq!(compare(&key, &here, &held), expected);
        // One that says too little has nothing of the rest.
        assert!(matches!(
            compare(&key, &here, &[])[..],
            [
                Compared {
                    found: Found::Data(_),
                    ..
                },
                ..
            ]
        ));
    }
}
