//! The bytes of a payload.
//!
//! ```text
//! u8     format = 2; 1 where there are neither deltas nor zstd in the session
//! varint sequence         of this payload in the session, from 0
//! varint raw_len          bytes of vmm stream
//! varint ops_len, packed_len, plain_len
//! ops[ops_len]            what the stream is made of, in order (`ops.rs`)
//! groups                  of 128 KiB of content, the last one shorter; together packed_len bytes of content (`group.rs`)
//! plain[plain_len]        literal bytes that are not compressed
//! ```
//!
//! Integers are LEB128 (`varint.rs`).

use crate::proto::page::PageAddress;

use super::{MAX_BATCH_BYTES, MAX_PAYLOAD_BYTES, varint};

/// What the first byte of a payload says.
const FORMAT: u8 = 2;

/// The format before there were deltas and zstd. Everything it has means the same now.
const FORMAT_WITHOUT_DELTAS: u8 = 1;

/// The lengths at the front of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) sequence: u64,
    pub(super) raw_len: usize,
    pub(super) ops_len: usize,
    pub(super) packed_len: usize,
    pub(super) plain_len: usize,
}

impl Head {
    /// `plainly`: for a destination that knows neither deltas nor zstd.
    pub(super) fn write(&self, plainly: bool, out: &mut Vec<u8>) {
        out.push(if plainly { FORMAT_WITHOUT_DELTAS } else { FORMAT });
        varint::write(self.sequence, out);
        for len in [self.raw_len, self.ops_len, self.packed_len, self.plain_len] {
            varint::write(len as u64, out);
        }
    }

    /// Takes the head off the front of `payload`.
    pub(super) fn read(payload: &mut &[u8]) -> Result<Self, PayloadError> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(PayloadError::TooLarge);
        }
        match payload.split_off_first() {
            Some(&(FORMAT | FORMAT_WITHOUT_DELTAS)) => {}
            Some(&format) => return Err(PayloadError::UnknownFormat { format }),
            None => return Err(PayloadError::Truncated),
        }
        let sequence = varint::read(payload).ok_or(PayloadError::Truncated)?;
        let mut lengths = [0; 4];
        for len in &mut lengths {
            let value = varint::read(payload).ok_or(PayloadError::Truncated)?;
            *len = usize::try_from(value).unwrap_or(usize::MAX);
        }
        let [raw_len, ops_len, packed_len, plain_len] = lengths;
        // Every literal byte is a byte of the stream, and edits are shorter than their page.
        if raw_len > MAX_BATCH_BYTES || packed_len > raw_len || plain_len > raw_len - packed_len {
            return Err(PayloadError::TooLarge);
        }
        Ok(Self {
            sequence,
            raw_len,
            ops_len,
            packed_len,
            plain_len,
        })
    }
}

/// The form of a payload is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// The payload ends inside something.
    #[error("it ends too soon")]
    Truncated,
    /// Bytes are left over that nothing refers to.
    #[error("it has bytes that nothing refers to")]
    Surplus,
    /// The first byte names no format that this version has.
    #[error("it has format {format}, which this version does not know")]
    UnknownFormat {
        /// The first byte.
        format: u8,
    },
    /// An op that this version does not have, or flags that the op does not have.
    #[error("it has op {op:#04x}, which this version does not know")]
    UnknownOp {
        /// The first byte of the op.
        op: u8,
    },
    /// A group of literals is coded as this version cannot decode.
    #[error("it has a group of codec {codec}, which this version does not know")]
    UnknownCodec {
        /// The codec byte.
        codec: u8,
    },
    /// A group of literals does not decode to its length.
    #[error("it has a group of literals that does not decompress to its length")]
    DamagedGroup,
    /// More than [`MAX_BATCH_BYTES`], literal bytes beyond the batch's length, or a payload of more than
    /// [`MAX_PAYLOAD_BYTES`].
    #[error("it has or claims more bytes than a batch may have")]
    TooLarge,
    /// More than [`MAX_BATCH_RECORDS`] pages and chunks.
    #[error("it claims more pages than a batch may have")]
    TooManyRecords,
    /// A chunk of no bytes, or of more than a slot holds.
    #[error("it has a chunk of {len} bytes, which no slot can hold")]
    ChunkOutOfRange {
        /// The length.
        len: u64,
    },
    /// The ops make more or fewer bytes than the payload says.
    #[error("its ops do not make the length that it states")]
    WrongLength,
    /// A page before any block was selected.
    #[error("it has a page before it says which block")]
    NoBlock,
    /// A block that was never named, or whose number is too large.
    #[error("it speaks of block {number}, which has no name")]
    NoSuchBlock {
        /// The number.
        number: u64,
    },
    /// A page number outside 0 to 2^52 - 1.
    #[error("it has a page address out of range")]
    AddressOutOfRange,
    /// What changed in a page does not fit a page, or does not decompress to one.
    #[error("it has a change of page {} of block {} that does not make a page", at.page, at.block)]
    DamagedDelta {
        /// The page.
        at: PageAddress,
    },
    /// A slot number outside 0 to 2^32 - 1.
    #[error("it has a slot number out of range")]
    SlotOutOfRange,
}
