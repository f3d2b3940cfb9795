//! Commands, what is checked of them, and their bytes (section *Request message*).
//!
//! ```text
//! compact   magic 4 │ flags 2 │ type 2 │ cookie 8 │ offset 8 │ length 4 │ data of a write
//! extended  magic 4 │ flags 2 │ type 2 │ cookie 8 │ offset 8 │ length 8 │ data of a write
//! ```
//!
//! A command that the server would have to refuse, or that it did not offer, is not sent.

use bytes::{BufMut, Bytes, BytesMut};

use super::export::{Export, Headers};
use super::{MAX_IN_FLIGHT, numbers};

/// One thing to do with an export. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `NBD_CMD_READ`.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Whether holes are told apart.
        reading: Reading,
    },
    /// `NBD_CMD_WRITE`.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes; at most [`u32::MAX`] without extended headers.
        length: u64,
        /// What they may become.
        zeroing: Zeroing,
    },
    /// `NBD_CMD_TRIM`: nobody needs these bytes any more. What they read as afterwards is not promised.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes; at most [`u32::MAX`] without extended headers.
        length: u64,
    },
    /// `NBD_CMD_FLUSH`: every write that was answered before this was sent is durable when it is answered.
    Flush,
    /// `NBD_CMD_BLOCK_STATUS`, for all selected contexts.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes; at most [`u32::MAX`] without extended headers.
        length: u64,
    },
}

/// How a read is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Holes come as such. QEMU closes the connection when such a read fails (7.2.22 and 10.0.2, 2026-11-29).
    Sparse,
    /// In one piece (`NBD_CMD_FLAG_DF`), holes as zeroes. When it fails QEMU says so and goes on. Where a server does not offer it,
    /// the read is a sparse one.
    Whole,
}

/// What zeroed bytes may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// A hole where the format has holes.
    MayBeHole,
    /// Allocated zeroes (`NBD_CMD_FLAG_NO_HOLE`).
    NoHole,
    /// Whatever is fast, or else [`NOTSUP`](super::ErrorNumber::NOTSUP) (`NBD_CMD_FLAG_FAST_ZERO`).
    FastOnly,
}

/// A command that cannot be given to this export now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A name that is no string of the protocol.
    #[error("a name of {} bytes, or with a NUL, cannot be said in NBD: {name:.40?}", name.len())]
    Name {
        /// The name.
        name: String,
    },
    /// Contexts that cannot be selected together.
    #[error("{count} metadata contexts are too many, or one is among them twice")]
    Contexts {
        /// How many.
        count: usize,
    },
    /// Bytes that are not there.
    #[error("bytes {offset}..{end} are not all on an export of {size} bytes")]
    OutOfExport {
        /// First byte.
        offset: u64,
        /// One past the last byte; saturated.
        end: u64,
        /// The export's size.
        size: u64,
    },
    /// A request for nothing: its answer is not defined.
    #[error("a request at byte {offset} is for no byte at all")]
    Empty {
        /// First byte.
        offset: u64,
    },
    /// The export's smallest block is larger than one byte.
    #[error("bytes {offset}..{end} are not whole blocks of {minimum} bytes, which this export wants")]
    Unaligned {
        /// First byte.
        offset: u64,
        /// One past the last byte.
        end: u64,
        /// Its smallest block.
        minimum: u32,
    },
    /// More than the server takes at once.
    #[error("a request for {length} bytes is larger than the server's most, {most} bytes")]
    TooLong {
        /// Bytes.
        length: u64,
        /// The largest request.
        most: u64,
    },
    /// The server does not offer it.
    #[error("the export does not offer {what}")]
    NotOffered {
        /// What.
        what: &'static str,
    },
    /// All requests that may be open are.
    #[error("{MAX_IN_FLIGHT} requests are open, which is the most")]
    TooManyInFlight,
    /// Not before the handshake is over.
    #[error("the handshake is not over")]
    NotReady,
    /// Not after `NBD_CMD_DISC`, or after the server said that it is shutting down.
    #[error("the connection is being closed")]
    Closing,
}

impl Command {
    /// The bytes that it is about.
    pub(super) fn range(&self) -> (u64, u64) {
        match *self {
            Self::Read { offset, length, .. } => (offset, u64::from(length)),
            Self::Write { offset, ref data } => (offset, data.len() as u64),
            Self::WriteZeroes { offset, length, .. }
            | Self::Trim { offset, length }
            | Self::BlockStatus { offset, length } => (offset, length),
            Self::Flush => (0, 0),
        }
    }

    /// Whether `export` can be asked for it; `contexts` are those selected.
    pub(super) fn check(&self, export: &Export, contexts: usize) -> Result<(), RequestError> {
        let flags = export.flags;
        let missing = match self {
            Self::Read { .. } => None,
            Self::Write { .. } | Self::WriteZeroes { .. } | Self::Trim { .. } if flags.is_read_only() => {
                Some("writing")
            }
            Self::Write { .. } => None,
            Self::WriteZeroes { .. } if !flags.can_write_zeroes() => Some("writing zeroes"),
            Self::WriteZeroes {
                zeroing: Zeroing::FastOnly,
                ..
            } if !flags.can_zero_fast() => Some("zeroes that are fast or refused"),
            Self::WriteZeroes { .. } => None,
            Self::Trim { .. } => (!flags.can_trim()).then_some("trim"),
            Self::Flush => (!flags.can_flush()).then_some("flush"),
            Self::BlockStatus { .. } => (contexts == 0).then_some("block status: no metadata context was selected"),
        };
        if let Some(what) = missing {
            return Err(RequestError::NotOffered { what });
        }
        if *self == Self::Flush {
            return Ok(());
        }
        self.check_range(export)
    }

    fn check_range(&self, export: &Export) -> Result<(), RequestError> {
        let (offset, length) = self.range();
        let minimum = export.block_sizes.minimum;
        if length == 0 {
            return Err(RequestError::Empty { offset });
        }
        let end = offset.saturating_add(length);
        if end > export.size_bytes {
            return Err(RequestError::OutOfExport {
                offset,
                end,
                size: export.size_bytes,
            });
        }
        // The end of an export whose size is no multiple cannot be reached in whole blocks; the server says what it makes of that.
        let is_whole = |place: u64| place.is_multiple_of(u64::from(minimum));
        if !is_whole(offset) || !(is_whole(end) || end == export.size_bytes) {
            return Err(RequestError::Unaligned { offset, end, minimum });
        }
        let most = match self {
            Self::Read { .. } | Self::Write { .. } => u64::from(export.block_sizes.maximum),
            _ if export.headers == Headers::Extended => u64::MAX,
            _ => u64::from(u32::MAX),
        };
        if length > most {
            return Err(RequestError::TooLong { length, most });
        }
        Ok(())
    }

    /// Its header; the data of a write follows it. It has been checked for `export`.
    pub(super) fn encode(&self, export: &Export, cookie: u64) -> Bytes {
        let (kind, mut flags) = match *self {
            Self::Read { reading, .. } => {
                let is_whole = reading == Reading::Whole && export.flags.can_read_whole();
                (numbers::CMD_READ, if is_whole { numbers::FLAG_DF } else { 0 })
            }
            Self::Write { .. } => (numbers::CMD_WRITE, 0),
            Self::WriteZeroes { zeroing, .. } => {
                let flags = match zeroing {
                    Zeroing::MayBeHole => 0,
                    Zeroing::NoHole => numbers::FLAG_NO_HOLE,
                    Zeroing::FastOnly => numbers::FLAG_FAST_ZERO,
                };
                (numbers::CMD_WRITE_ZEROES, flags)
            }
            Self::Trim { .. } => (numbers::CMD_TRIM, 0),
            Self::Flush => (numbers::CMD_FLUSH, 0),
            Self::BlockStatus { .. } => (numbers::CMD_BLOCK_STATUS, 0),
        };
        if kind == numbers::CMD_WRITE && export.headers == Headers::Extended {
            flags |= numbers::FLAG_PAYLOAD_LEN;
        }
        let (offset, length) = self.range();
        header(export.headers, flags, kind, cookie, offset, length)
    }
}

/// `NBD_CMD_DISC`, which has no answer.
pub(super) fn disconnect(headers: Headers) -> Bytes {
    header(headers, 0, numbers::CMD_DISC, 0, 0, 0)
}

fn header(headers: Headers, flags: u16, kind: u16, cookie: u64, offset: u64, length: u64) -> Bytes {
    let is_extended = headers == Headers::Extended;
    let mut bytes = BytesMut::with_capacity(32);
    bytes.put_u32(if is_extended {
        numbers::EXTENDED_REQUEST
    } else {
        numbers::REQUEST
    });
    bytes.put_u16(flags);
    bytes.put_u16(kind);
    bytes.put_u64(cookie);
    bytes.put_u64(offset);
    if is_extended {
        bytes.put_u64(length);
    } else {
        bytes.put_u32(u32::try_from(length).expect("a checked length of compact headers"));
    }
    bytes.freeze()
}
