//! One connection: bytes in, events and bytes to send out.
//!
//! Input may be cut anywhere: the state says how many bytes it takes next, and they are collected until they are whole. Those are a
//! head, or content whose length was checked when its head came, so nothing is collected that was not asked for.

use std::collections::VecDeque;

use bytes::Bytes;

use super::answer::Answer;
use super::breach::Breach;
use super::context::MetaContext;
use super::export::Export;
use super::failure::Failure;
use super::handshake::{Handshake, Refusal};
use super::request::{Command, RequestError};
use super::transmission::{Cookie, Transmission};

/// A connection to one export.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    /// The front of what is taken next.
    collected: Vec<u8>,
    outgoing: VecDeque<Bytes>,
}

#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Transmission(Transmission),
    Failed(ConnectionError),
}

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The handshake is over: commands may be given.
    Ready(Export),
    /// A request has its answer.
    Finished(Cookie, Result<Answer, Failure>),
}

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    /// The server does not keep to the protocol.
    #[error("the server broke the NBD protocol: {0}")]
    Breach(#[from] Breach),
    /// The server does not do what is wanted.
    #[error("the server refused: {0}")]
    Refused(#[from] Refusal),
}

impl Connection {
    /// A connection on which nothing was said yet. The server speaks first.
    ///
    /// # Errors
    /// [`RequestError::Name`], [`RequestError::Contexts`].
    pub fn new(export: &str, contexts: Vec<MetaContext>) -> Result<Self, RequestError> {
        Ok(Self {
            phase: Phase::Handshake(Handshake::new(export, contexts)?),
            collected: Vec::new(),
            outgoing: VecDeque::new(),
        })
    }

    /// Takes what the server sent, cut anywhere, and adds what follows from it to `events`. Then there may be bytes to send.
    ///
    /// # Errors
    /// The connection is over; the same error comes again from then on. Events that came before it are in `events`.
    pub fn feed(&mut self, mut input: &[u8], events: &mut Vec<Event>) -> Result<(), ConnectionError> {
        loop {
            let expected = match &self.phase {
                Phase::Handshake(handshake) => handshake.expected(),
                Phase::Transmission(transmission) => transmission.expected(),
                Phase::Failed(error) => return Err(error.clone()),
            };
            if self.collected.is_empty() {
                self.collected.reserve_exact(expected);
            }
            let (now, later) = input.split_at(input.len().min(expected - self.collected.len()));
            self.collected.extend_from_slice(now);
            input = later;
            if self.collected.len() < expected {
                return Ok(());
            }
            let whole = Bytes::from(std::mem::take(&mut self.collected));
            if let Err(error) = self.advance(whole, events) {
                self.phase = Phase::Failed(error.clone());
                return Err(error);
            }
        }
    }

    /// Sends a command; its answer is an [`Event::Finished`] with this cookie.
    ///
    /// # Errors
    /// Nothing is sent, and the connection is as it was.
    pub fn submit(&mut self, command: Command) -> Result<Cookie, RequestError> {
        match &mut self.phase {
            Phase::Handshake(_) => Err(RequestError::NotReady),
            Phase::Failed(_) => Err(RequestError::Closing),
            Phase::Transmission(transmission) => {
                let outgoing = &mut self.outgoing;
                transmission.submit(command, &mut |bytes| outgoing.push_back(bytes))
            }
        }
    }

    /// Ends the connection politely: no more commands; when the last answer is there, the server is told, and closes its side.
    pub fn close(&mut self) {
        if let Phase::Transmission(transmission) = &mut self.phase {
            let outgoing = &mut self.outgoing;
            transmission.close(&mut |bytes| outgoing.push_back(bytes));
        }
    }

    /// The next bytes to send, in order. What waits is bounded by the requests in flight.
    pub fn take_outgoing(&mut self) -> Option<Bytes> {
        self.outgoing.pop_front()
    }

    /// The export, once the handshake is over.
    #[cfg(test)]
    pub(super) fn export(&self) -> Option<&Export> {
        match &self.phase {
            Phase::Transmission(transmission) => Some(transmission.export()),
            _ => None,
        }
    }

    /// Requests without an answer.
    #[cfg(test)]
    pub(super) fn in_flight(&self) -> usize {
        match &self.phase {
            Phase::Transmission(transmission) => transmission.in_flight(),
            _ => 0,
        }
    }

    fn advance(&mut self, whole: Bytes, events: &mut Vec<Event>) -> Result<(), ConnectionError> {
        let outgoing = &mut |bytes| self.outgoing.push_back(bytes);
        match &mut self.phase {
            Phase::Handshake(handshake) => {
                if let Some(agreement) = handshake.advance(whole, outgoing)? {
                    let transmission = Transmission::new(agreement);
                    events.push(Event::Ready(transmission.export().clone()));
                    self.phase = Phase::Transmission(transmission);
                }
            }
            Phase::Transmission(transmission) => {
                if let Some((cookie, result)) = transmission.advance(whole, outgoing)? {
                    events.push(Event::Finished(cookie, result));
                }
            }
            Phase::Failed(error) => return Err(error.clone()),
        }
        Ok(())
    }
}
