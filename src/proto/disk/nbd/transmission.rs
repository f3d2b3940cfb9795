//! Requests and replies (section *Transmission phase*).
//!
//! ```text
//!  ┌──────────────► magic ──► head ─┬─ simple ───────────► data of a read ─┐
//!  │                                └─ chunk ─┬─ OFFSET_DATA ► offset ► data ┤
//!  │                                          └─ others ────► payload ──────┤
//!  └────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Replies are told apart by their cookies. Cookies are never used twice, so that a reply that comes twice is a breach and not the
//! answer to something else.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};

use super::answer::{Answer, Content, InFlight};
use super::breach::Breach;
use super::chunk::{ChunkHead, Form, SimpleReply};
use super::context::MetaContext;
use super::export::Export;
use super::failure::{ErrorNumber, Failure};
use super::handshake::Agreement;
use super::request::{self, Command, RequestError};
use super::{MAX_IN_FLIGHT, numbers};

/// Names a request of a connection until its answer is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub(super) u64);

/// What a request came to.
pub(super) type Finished = (Cookie, Result<Answer, Failure>);

/// The state of a connection behind its handshake.
#[derive(Debug)]
pub(super) struct Transmission {
    export: Export,
    contexts: Vec<(u32, MetaContext)>,
    open: BTreeMap<u64, InFlight>,
    next_cookie: u64,
    closing: Closing,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    No,
    /// As soon as no request is open.
    Wanted,
    /// `NBD_CMD_DISC` was sent.
    Said,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug)]
enum Step {
    Magic,
    Head(Form),
    SimpleData {
        cookie: u64,
        length: usize,
    },
    DataOffset(ChunkHead),
    Data {
        head: ChunkHead,
        offset: u64,
        length: usize,
    },
    Payload {
        head: ChunkHead,
        length: usize,
    },
}

impl Transmission {
    pub(super) fn new(agreement: Agreement) -> Self {
        Self {
            export: agreement.export,
            contexts: agreement.contexts,
            open: BTreeMap::new(),
            next_cookie: 1,
            closing: Closing::No,
            step: Step::Magic,
        }
    }

    pub(super) fn export(&self) -> &Export {
        &self.export
    }

    #[cfg(test)]
    pub(super) fn in_flight(&self) -> usize {
        self.open.len()
    }

    pub(super) fn submit(
        &mut self,
        command: Command,
        outgoing: &mut impl FnMut(Bytes),
    ) -> Result<Cookie, RequestError> {
        if self.closing != Closing::No {
            return Err(RequestError::Closing);
        }
        command.check(&self.export, self.contexts.len())?;
        if self.open.len() >= MAX_IN_FLIGHT {
            return Err(RequestError::TooManyInFlight);
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.open.insert(cookie, InFlight::new(&command, self.contexts.len()));
        outgoing(command.encode(&self.export, cookie));
        if let Command::Write { data, .. } = command {
            outgoing(data);
        }
        Ok(Cookie(cookie))
    }

    /// No more requests; `NBD_CMD_DISC` goes out when the last answer is there.
    pub(super) fn close(&mut self, outgoing: &mut impl FnMut(Bytes)) {
        if self.closing == Closing::No {
            self.closing = Closing::Wanted;
        }
        self.disconnect_if_idle(outgoing);
    }

    /// Bytes that [`Transmission::advance`] takes next.
    pub(super) fn expected(&self) -> usize {
        match self.step {
            Step::Magic => 4,
            Step::Head(form) => form.rest(),
            Step::DataOffset(_) => 8,
            Step::SimpleData { length, .. } | Step::Data { length, .. } | Step::Payload { length, .. } => length,
        }
    }

    /// Takes exactly the expected bytes.
    pub(super) fn advance(
        &mut self,
        mut bytes: Bytes,
        outgoing: &mut impl FnMut(Bytes),
    ) -> Result<Option<Finished>, Breach> {
        match std::mem::replace(&mut self.step, Step::Magic) {
            Step::Magic => self.step = Step::Head(Form::of(bytes.get_u32(), self.export.headers)?),
            Step::Head(Form::Simple) => return self.simple(SimpleReply::decode(bytes), outgoing),
            Step::Head(form) => self.chunk(ChunkHead::decode(form, bytes))?,
            Step::SimpleData { cookie, .. } => {
                self.request(cookie)?.take_whole(bytes);
                return self.finish(cookie, outgoing).map(Some);
            }
            Step::DataOffset(head) => {
                let offset = bytes.get_u64();
                // `chunk` has compared it with the request's length.
                let length = usize::try_from(head.length - 8).expect("the length of a read fits");
                self.request(head.cookie)?.check_piece(offset, length as u64)?;
                self.step = Step::Data { head, offset, length };
            }
            Step::Data { head, offset, .. } => {
                self.request(head.cookie)?.take_piece(offset, Content::Data(bytes));
                return self.finish_if_last(head, outgoing);
            }
            Step::Payload { head, .. } => {
                self.payload(head, bytes)?;
                return self.finish_if_last(head, outgoing);
            }
        }
        Ok(None)
    }

    fn request(&mut self, cookie: u64) -> Result<&mut InFlight, Breach> {
        self.open.get_mut(&cookie).ok_or(Breach::UnknownCookie { cookie })
    }

    fn simple(&mut self, reply: SimpleReply, outgoing: &mut impl FnMut(Bytes)) -> Result<Option<Finished>, Breach> {
        let SimpleReply { error, cookie } = reply;
        let headers = self.export.headers;
        let request = self.request(cookie)?;
        let length = request.simple_data(headers, error)?;
        if length > 0 {
            self.step = Step::SimpleData { cookie, length };
            return Ok(None);
        }
        if error != 0 {
            request.take_failure(Failure {
                number: ErrorNumber(error),
                text: String::new(),
                offset: None,
            })?;
        }
        self.finish(cookie, outgoing).map(Some)
    }

    fn chunk(&mut self, head: ChunkHead) -> Result<(), Breach> {
        let headers = self.export.headers;
        let length = self.request(head.cookie)?.payload_length(head, headers)?;
        self.step = match head.kind {
            numbers::REPLY_OFFSET_DATA => Step::DataOffset(head),
            _ => Step::Payload { head, length },
        };
        Ok(())
    }

    fn payload(&mut self, head: ChunkHead, mut payload: Bytes) -> Result<(), Breach> {
        match head.kind {
            numbers::REPLY_NONE => {}
            numbers::REPLY_OFFSET_HOLE => {
                let (offset, length) = (payload.get_u64(), u64::from(payload.get_u32()));
                if length == 0 {
                    return Err(head.malformed());
                }
                let request = self.request(head.cookie)?;
                request.check_piece(offset, length)?;
                request.take_piece(offset, Content::Hole(length));
            }
            numbers::REPLY_BLOCK_STATUS | numbers::REPLY_BLOCK_STATUS_EXT => {
                let (id, descriptors) = head.decode_status(payload)?;
                let which = self.contexts.iter().position(|(selected, _)| *selected == id);
                let which = which.ok_or(Breach::ContextStatus { id })?;
                self.request(head.cookie)?.take_status(id, which, &descriptors)?;
            }
            _ => {
                let failure = head.decode_error(payload)?;
                self.request(head.cookie)?.take_failure(failure)?;
            }
        }
        Ok(())
    }

    fn finish_if_last(
        &mut self,
        head: ChunkHead,
        outgoing: &mut impl FnMut(Bytes),
    ) -> Result<Option<Finished>, Breach> {
        if !head.is_last {
            return Ok(None);
        }
        self.finish(head.cookie, outgoing).map(Some)
    }

    fn finish(&mut self, cookie: u64, outgoing: &mut impl FnMut(Bytes)) -> Result<Finished, Breach> {
        let request = self.open.remove(&cookie).ok_or(Breach::UnknownCookie { cookie })?;
        let result = request.finish(&self.contexts)?;
        // Section *Terminating the transmission phase*: who is told of a shutdown has to disconnect.
        let is_shutdown = matches!(&result, Err(failure) if failure.number == ErrorNumber::SHUTDOWN);
        if is_shutdown && self.closing == Closing::No {
            self.closing = Closing::Wanted;
        }
        self.disconnect_if_idle(outgoing);
        Ok((Cookie(cookie), result))
    }

    fn disconnect_if_idle(&mut self, outgoing: &mut impl FnMut(Bytes)) {
        if self.closing == Closing::Wanted && self.open.is_empty() {
            self.closing = Closing::Said;
            outgoing(request::disconnect(self.export.headers));
        }
    }
}
