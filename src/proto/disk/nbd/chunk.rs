//! Replies in bytes (sections *Simple reply message*, *Structured reply chunk message*, *Extended reply chunk message*).
//!
//! ```text
//! simple      magic 4 │ error 4 │ cookie 8 │ data of a read
//! structured  magic 4 │ flags 2 │ type 2 │ cookie 8 │ length 4 │ payload
//! extended    magic 4 │ flags 2 │ type 2 │ cookie 8 │ offset 8 │ length 8 │ payload
//! ```

use bytes::{Buf, Bytes};

use super::breach::Breach;
use super::export::Headers;
use super::failure::{ErrorNumber, Failure};
use super::{MAX_DESCRIPTORS, MAX_STRING, numbers};

/// The form of a reply, from its first four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Simple,
    Structured,
    Extended,
}

/// A reply without chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SimpleReply {
    pub(super) error: u32,
    pub(super) cookie: u64,
}

/// The head of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkHead {
    pub(super) is_last: bool,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    /// The request's, repeated; only with extended headers.
    pub(super) offset: Option<u64>,
    /// Bytes of payload; not compared with anything yet.
    pub(super) length: u64,
}

impl Form {
    /// Which one begins with `magic`, if it was agreed on.
    pub(super) fn of(magic: u32, agreed: Headers) -> Result<Self, Breach> {
        match (magic, agreed) {
            (numbers::SIMPLE_REPLY, Headers::Simple | Headers::Structured) => Ok(Self::Simple),
            (numbers::STRUCTURED_REPLY, Headers::Structured) => Ok(Self::Structured),
            (numbers::EXTENDED_REPLY, Headers::Extended) => Ok(Self::Extended),
            _ => Err(Breach::NoReply { magic }),
        }
    }

    /// Bytes of the head behind the magic.
    pub(super) fn rest(self) -> usize {
        match self {
            Self::Simple => 12,
            Self::Structured => 16,
            Self::Extended => 28,
        }
    }
}

impl SimpleReply {
    pub(super) fn decode(mut rest: Bytes) -> Self {
        Self {
            error: rest.get_u32(),
            cookie: rest.get_u64(),
        }
    }
}

impl ChunkHead {
    pub(super) fn decode(form: Form, mut rest: Bytes) -> Self {
        let flags = rest.get_u16();
        let kind = rest.get_u16();
        let cookie = rest.get_u64();
        let (offset, length) = if form == Form::Extended {
            (Some(rest.get_u64()), rest.get_u64())
        } else {
            (None, u64::from(rest.get_u32()))
        };
        Self {
            is_last: flags & numbers::REPLY_DONE != 0,
            kind,
            cookie,
            offset,
            length,
        }
    }

    pub(super) fn is_error(self) -> bool {
        self.kind & numbers::REPLY_IS_ERROR != 0
    }

    pub(super) fn malformed(self) -> Breach {
        Breach::MalformedChunk { kind: self.kind }
    }

    /// The length, if a chunk of this kind can have it in answer to a request for `requested` bytes.
    pub(super) fn checked_length(self, requested: u64) -> Result<usize, Breach> {
        let of_descriptors = |front: u64, each: u64| {
            let count = self.length.checked_sub(front).unwrap_or(1);
            count > 0 && count.is_multiple_of(each) && count / each <= MAX_DESCRIPTORS as u64
        };
        let is_possible = match self.kind {
            numbers::REPLY_NONE => self.length == 0,
            numbers::REPLY_OFFSET_DATA => self.length > 8 && self.length - 8 <= requested,
            numbers::REPLY_OFFSET_HOLE => self.length == 12,
            numbers::REPLY_BLOCK_STATUS => of_descriptors(4, 8),
            numbers::REPLY_BLOCK_STATUS_EXT => of_descriptors(8, 16),
            _ if self.is_error() => (6..=MAX_ERROR as u64).contains(&self.length),
            _ => return Err(Breach::UnexpectedChunk { kind: self.kind }),
        };
        usize::try_from(self.length)
            .ok()
            .filter(|_| is_possible)
            .ok_or(Breach::ChunkLength {
                kind: self.kind,
                bytes: self.length,
            })
    }

    /// The payload of an error chunk of any kind. Kinds that are not known end their request too.
    pub(super) fn decode_error(self, mut payload: Bytes) -> Result<Failure, Breach> {
        let number = payload.try_get_u32().map_err(|_| self.malformed())?;
        let text = usize::from(payload.try_get_u16().map_err(|_| self.malformed())?);
        if number == 0 {
            return Err(Breach::ErrorZero);
        }
        if text > payload.len() {
            return Err(self.malformed());
        }
        let text = payload.split_to(text);
        let offset = match self.kind {
            numbers::REPLY_ERROR_OFFSET => Some(payload.try_get_u64().map_err(|_| self.malformed())?),
            _ => None,
        };
        Ok(Failure {
            number: ErrorNumber(number),
            text: String::from_utf8_lossy(&text).into_owned(),
            offset,
        })
    }

    /// The payload of block status: the context's id, and lengths with their flags.
    pub(super) fn decode_status(self, mut payload: Bytes) -> Result<(u32, Vec<(u64, u64)>), Breach> {
        let id = payload.try_get_u32().map_err(|_| self.malformed())?;
        let is_extended = self.kind == numbers::REPLY_BLOCK_STATUS_EXT;
        let each = if is_extended { 16 } else { 8 };
        if is_extended {
            let count = payload.try_get_u32().map_err(|_| self.malformed())?;
            if payload.len() != count as usize * each {
                return Err(self.malformed());
            }
        }
        let descriptors = payload.chunks_exact(each).map(|mut descriptor| {
            if is_extended {
                (descriptor.get_u64(), descriptor.get_u64())
            } else {
                (u64::from(descriptor.get_u32()), u64::from(descriptor.get_u32()))
            }
        });
        Ok((id, descriptors.collect()))
    }
}

/// Number, length of the text, text, offset.
const MAX_ERROR: usize = 4 + 2 + MAX_STRING + 8;
