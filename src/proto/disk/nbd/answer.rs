//! What has come in answer to one request, put together.
//!
//! Chunks of a read come in any order and between those of other requests. They may not overlap and, unless an error came too, have
//! to cover the request when the last one was seen (section *`NBD_CMD_READ`*, *Structured replies*).

use std::collections::BTreeMap;

use bytes::Bytes;

use super::breach::Breach;
use super::chunk::ChunkHead;
use super::context::MetaContext;
use super::export::Headers;
use super::failure::Failure;
use super::numbers;
use super::request::Command;
use crate::proto::disk::extents::Extents;

/// A request that succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done; there is nothing to tell.
    Done,
    /// The bytes of a read, in order and without a gap.
    Read(Vec<Piece>),
    /// Block status, for each context in the order in which they were asked for: the flags of bytes from the request's first one on.
    /// A server may tell less than was asked, of each context as much as it likes, but something.
    Status(Vec<Extents<u64>>),
}

/// A part of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub offset: u64,
    /// What is there.
    pub content: Content,
}

/// What was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Data(Bytes),
    /// So many zeroes.
    Hole(u64),
}

/// A request that was sent.
#[derive(Debug)]
pub(super) struct InFlight {
    from: u64,
    to: u64,
    wanted: Wanted,
    failure: Option<Failure>,
}

#[derive(Debug)]
enum Wanted {
    Nothing,
    /// Pieces by their first byte.
    Bytes(BTreeMap<u64, Content>),
    Status(Vec<Option<Extents<u64>>>),
}

impl Content {
    /// Bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Hole(length) => *length,
        }
    }

    /// Never: kept beside [`Content::len`].
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl InFlight {
    pub(super) fn new(command: &Command, contexts: usize) -> Self {
        let (from, length) = command.range();
        let wanted = match command {
            Command::Read { .. } => Wanted::Bytes(BTreeMap::new()),
            Command::BlockStatus { .. } => Wanted::Status(vec![None; contexts]),
            _ => Wanted::Nothing,
        };
        Self {
            from,
            to: from + length,
            wanted,
            failure: None,
        }
    }

    /// Bytes that a simple reply has behind its head.
    ///
    /// # Errors
    /// [`Breach::SimpleReply`] where only chunks can tell what was asked for.
    pub(super) fn simple_data(&self, headers: Headers, error: u32) -> Result<usize, Breach> {
        match (&self.wanted, headers) {
            (Wanted::Bytes(_), Headers::Simple) if error == 0 => {
                Ok(usize::try_from(self.to - self.from).expect("the length of a read fits"))
            }
            // Reads are never answered so once chunks were agreed on, not even with an error.
            (Wanted::Bytes(_), Headers::Structured | Headers::Extended) => Err(Breach::SimpleReply),
            (Wanted::Status(_), _) if error == 0 => Err(Breach::SimpleReply),
            _ => Ok(0),
        }
    }

    /// The length of a chunk's payload, if it can answer this.
    pub(super) fn payload_length(&self, head: ChunkHead, headers: Headers) -> Result<usize, Breach> {
        if let Some(found) = head.offset.filter(|offset| *offset != self.from) {
            return Err(Breach::OtherOffset {
                asked: self.from,
                found,
            });
        }
        let status = match headers {
            Headers::Extended => numbers::REPLY_BLOCK_STATUS_EXT,
            _ => numbers::REPLY_BLOCK_STATUS,
        };
        let is_expected = match head.kind {
            numbers::REPLY_NONE if !head.is_last => return Err(Breach::EmptyChunkNotLast),
            numbers::REPLY_NONE => true,
            numbers::REPLY_OFFSET_DATA | numbers::REPLY_OFFSET_HOLE => matches!(self.wanted, Wanted::Bytes(_)),
            kind if kind == status => matches!(self.wanted, Wanted::Status(_)),
            _ => head.is_error(),
        };
        if !is_expected {
            return Err(Breach::UnexpectedChunk { kind: head.kind });
        }
        head.checked_length(self.to - self.from)
    }

    /// Whether `length` bytes from `offset` on may come: they were asked for and did not come yet.
    pub(super) fn check_piece(&self, offset: u64, length: u64) -> Result<(), Breach> {
        let end = offset.saturating_add(length);
        self.check_range(offset, end)?;
        let Wanted::Bytes(pieces) = &self.wanted else {
            return Ok(());
        };
        // Servers should cut at multiples of 512 bytes. Where one does not, its pieces cost more memory than they hold.
        let most = usize::try_from((self.to - self.from) / 512)
            .unwrap_or(usize::MAX)
            .saturating_add(2);
        if pieces.len() >= most {
            return Err(Breach::TooManyPieces { most });
        }
        if let Some((start, before)) = pieces.range(..end).next_back()
            && start + before.len() > offset
        {
            return Err(Breach::Overlap {
                offset: offset.max(*start),
            });
        }
        Ok(())
    }

    /// Takes a piece that was checked.
    pub(super) fn take_piece(&mut self, offset: u64, content: Content) {
        if let Wanted::Bytes(pieces) = &mut self.wanted {
            pieces.insert(offset, content);
        }
    }

    /// Takes all bytes of a read at once.
    pub(super) fn take_whole(&mut self, data: Bytes) {
        self.take_piece(self.from, Content::Data(data));
    }

    /// Takes what a context says, the `which`th of those selected.
    pub(super) fn take_status(&mut self, id: u32, which: usize, descriptors: &[(u64, u64)]) -> Result<(), Breach> {
        let (from, to) = (self.from, self.to);
        let Wanted::Status(statuses) = &mut self.wanted else {
            return Ok(());
        };
        let place = statuses.get_mut(which).filter(|place| place.is_none());
        let place = place.ok_or(Breach::ContextStatus { id })?;
        let mut extents = Extents::new(from);
        let mut end = from;
        for (length, flags) in descriptors {
            // The last one may reach beyond the request, if its state does; what is there was not asked for.
            if *length == 0 || end >= to {
                return Err(Breach::Descriptors { offset: from });
            }
            end = end.saturating_add(*length);
            extents.extend_to(end.min(to), *flags);
        }
        *place = Some(extents);
        Ok(())
    }

    /// Takes an error. The first one is told.
    pub(super) fn take_failure(&mut self, failure: Failure) -> Result<(), Breach> {
        if let Some(offset) = failure.offset {
            self.check_range(offset, offset.saturating_add(1))?;
        }
        self.failure.get_or_insert(failure);
        Ok(())
    }

    /// The reply is over.
    pub(super) fn finish(self, contexts: &[(u32, MetaContext)]) -> Result<Result<Answer, Failure>, Breach> {
        if let Some(failure) = self.failure {
            return Ok(Err(failure));
        }
        let answer = match self.wanted {
            Wanted::Nothing => Answer::Done,
            Wanted::Bytes(pieces) => {
                let mut read = Vec::with_capacity(pieces.len());
                let mut next = self.from;
                for (offset, content) in pieces {
                    if offset != next {
                        break;
                    }
                    next += content.len();
                    read.push(Piece { offset, content });
                }
                if next != self.to {
                    return Err(Breach::Missing { offset: next });
                }
                Answer::Read(read)
            }
            Wanted::Status(statuses) => {
                let told = statuses
                    .into_iter()
                    .zip(contexts)
                    .map(|(status, (_, context))| status.ok_or_else(|| Breach::StatusMissing { name: context.name() }));
                Answer::Status(told.collect::<Result<_, _>>()?)
            }
        };
        Ok(Ok(answer))
    }

    fn check_range(&self, start: u64, end: u64) -> Result<(), Breach> {
        if start < self.from || end > self.to {
            return Err(Breach::OutOfRequest {
                start,
                end,
                from: self.from,
                to: self.to,
            });
        }
        Ok(())
    }
}
