//! A migration with multifd as one stream: what its source would have sent without.
//!
//! ```text
//! main stream ─┐   sections, device state; zero pages of QEMU before 9.0
//! channel 0   ─┼─▶ Merger ─▶ one plain stream, which the destination needs no multifd for
//! channel n-1 ─┘   pages
//! ```
//!
//! QEMU synchronises main stream and channels once a round, or once a section with machine types before 8.1. Between two synchronisations a
//! page comes once at most, so its order there is of no account; over a synchronisation it is. So nobody is read beyond a
//! synchronisation before all have come to it. Memory ends behind one too: a page that comes later, or that none followed, is an error.
//!
//! Not advisory, as the parser is: a contradiction ends the migration, whose VM goes on at the source. Channels whose payload is compressed
//! are refused.

mod main_stream;
mod merged;
mod packet;
#[cfg(test)]
mod tests;

use self::main_stream::{MainStream, Reached};
use self::merged::Merged;
use self::packet::{INITIAL_LEN, MAGIC, PACKET_LEN, Packet};
use super::element::{FILE_HEADER, be32};
use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::vmm_stream::LostTrackReason;

/// What a migration with multifd did that its merger cannot follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MultifdError {
    /// A connection that starts like nothing that belongs to a migration.
    #[error("a connection of the migration is neither its main stream nor a multifd channel")]
    Stranger,
    /// More connections than main stream and channels.
    #[error(
        "the hypervisor made more connections than the {channels} multifd channels that it was set to use and its main stream"
    )]
    TooManyConnections {
        /// Channels that were to come.
        channels: u8,
    },
    /// Two of one number, or one with a number too high.
    #[error("multifd channel {0} came twice, or is beyond those that the hypervisor was set to use")]
    Channel(u8),
    /// A packet with a field that cannot be.
    #[error("a multifd packet is not understood: {0}")]
    Packet(&'static str),
    /// The payload is compressed.
    #[error("the multifd channels are compressed; set multifd-compression to none: the gateway reduces better itself")]
    Compressed,
    /// A device's state on a channel.
    #[error(
        "a device sends its state over multifd channels, which the gateway does not carry; set x-migration-multifd-transfer to off"
    )]
    DeviceState,
    /// Pages of a block that the main stream has not listed.
    #[error("a multifd packet names a RAM block that was not listed")]
    UnknownBlock,
    /// Pages that the block does not have.
    #[error("a multifd packet has pages outside of their RAM block")]
    OutsideBlock,
    /// The main stream is not understood.
    #[error("the main stream of a migration with multifd cannot be followed: {0}")]
    MainStream(LostTrackReason),
    /// A record in the main stream's RAM section that does not belong there.
    #[error("the main stream of a migration with multifd has a RAM record that is not understood")]
    Record,
    /// A device whose state comes before the end of memory (VFIO, virtio-mem).
    #[error(
        "a device sends state before the end of memory, as VFIO and virtio-mem do, which cannot be told from pages with multifd; switch multifd off"
    )]
    OtherDevice,
    /// Pages that nobody has synchronised, where memory ends.
    #[error("memory ended and pages had come since the last synchronisation of the multifd channels")]
    NotSynchronised,
    /// An ancient machine type.
    #[error("the machine type has no section footers, without which multifd cannot be used here; switch multifd off")]
    NoFooters,
    /// A page before the list of blocks was over, or after memory was.
    #[error("a multifd channel sent pages before the start of memory or after its end")]
    PageOutOfPlace,
    /// A channel had part of a packet when the main stream ended.
    #[error("the main stream ended in the middle of what multifd channel {0} was sending")]
    CutShort(u8),
}

/// Merges main stream and channels.
///
/// Connections are called by the number that [`Merger::connect`] gave; any other panics.
///
/// Holds for each connection what its reader has put into [`Merger::pending`] and could not be merged yet: less than a page or a packet
/// where it is being read, and what was read beyond a synchronisation where it has to wait.
#[derive(Debug)]
pub struct Merger {
    channels: u8,
    connections: Vec<Connection>,
    main: MainStream,
    merged: Merged,
    /// Synchronisations that all have come to.
    synchronised: u64,
    /// Connections that have come to the next.
    waiting: usize,
    has_ended: bool,
}

/// A connection that was made. `synchronisations`: those that it has come to.
#[derive(Debug, Default)]
struct Connection {
    role: Role,
    pending: Vec<u8>,
    synchronisations: u64,
    is_closed: bool,
}

#[derive(Debug, Default)]
enum Role {
    /// It has not said yet.
    #[default]
    Unknown,
    Main,
    Channel {
        number: u8,
        /// The packet whose pages are coming, and how many were received.
        packet: Option<(Packet, usize)>,
    },
}

impl Connection {
    /// The number of a channel that has sent part of something.
    fn unfinished(&self) -> Option<u8> {
        match &self.role {
            Role::Channel { number, packet } if packet.is_some() || !self.pending.is_empty() => Some(*number),
            _ => None,
        }
    }
}

impl Merger {
    /// For so many channels and a main stream.
    #[must_use]
    pub fn new(channels: u8) -> Self {
        Self {
            channels,
            connections: Vec::new(),
            main: MainStream::default(),
            merged: Merged::default(),
            synchronised: 0,
            waiting: 0,
            has_ended: false,
        }
    }

    /// Whether all connections have been made.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.connections.len() > usize::from(self.channels)
    }

    /// One more connection was made: the number by which it is called from now on, from 0 on.
    ///
    /// # Errors
    /// [`MultifdError::TooManyConnections`].
    pub fn connect(&mut self) -> Result<usize, MultifdError> {
        if self.is_complete() {
            return Err(MultifdError::TooManyConnections {
                channels: self.channels,
            });
        }
        self.connections.push(Connection::default());
        Ok(self.connections.len() - 1)
    }

    /// Whether more may be read from a connection: not beyond a synchronisation that others have not come to, and not after its end.
    #[must_use]
    pub fn may_read(&self, connection: usize) -> bool {
        self.may_consume(connection) && !self.connections[connection].is_closed
    }

    /// Where a connection's next bytes go. [`Merger::advance`] takes them from there.
    pub fn pending(&mut self, connection: usize) -> &mut Vec<u8> {
        &mut self.connections[connection].pending
    }

    /// Appends to `out` what follows from the bytes that a connection has pending.
    ///
    /// # Errors
    /// The migration cannot go on; nothing may be called after it.
    pub fn advance(&mut self, connection: usize, out: &mut Vec<u8>) -> Result<(), MultifdError> {
        let mut seen = self.synchronised;
        self.consume(connection, out)?;
        while seen < self.synchronised {
            seen = self.synchronised;
            for other in 0..self.connections.len() {
                self.consume(other, out)?;
            }
        }
        self.check_closed();
        Ok(())
    }

    /// A connection has ended. With the main one the merged stream does, with a channel that others wait for, and with the last: of a migration
    /// that broke off. When the main stream ends, what the channels have sent has to have been taken.
    ///
    /// # Errors
    /// As for [`Merger::advance`].
    pub fn close(&mut self, connection: usize) -> Result<(), MultifdError> {
        self.connections[connection].is_closed = true;
        if self.connections.iter().all(|one| one.is_closed) {
            self.has_ended = true;
        }
        if self.is_main(connection) {
            self.has_ended = true;
            if self.main.is_over()
                && let Some(number) = self.connections.iter().find_map(Connection::unfinished)
            {
                return Err(MultifdError::CutShort(number));
            }
        }
        self.check_closed();
        Ok(())
    }

    /// Whether the merged stream has.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Whether a connection is the main one. What the others have sent is read before its end is told.
    #[must_use]
    pub fn is_main(&self, connection: usize) -> bool {
        matches!(self.connections[connection].role, Role::Main)
    }

    fn may_consume(&self, connection: usize) -> bool {
        self.connections[connection].synchronisations <= self.synchronised
    }

    /// Nobody waits for a channel that has ended: the hypervisor says why it did.
    fn check_closed(&mut self) {
        let has_left = |one: &Connection| one.is_closed && one.synchronisations == self.synchronised;
        if !self.main.is_over() && self.waiting > 0 && self.connections.iter().any(has_left) {
            self.has_ended = true;
        }
    }

    /// Takes what a connection has pending, up to the next synchronisation.
    fn consume(&mut self, connection: usize, out: &mut Vec<u8>) -> Result<(), MultifdError> {
        if !self.may_consume(connection) {
            return Ok(());
        }
        let mut pending = std::mem::take(&mut self.connections[connection].pending);
        let (taken, reached) = self.consume_bytes(connection, &pending, out)?;
        pending.drain(..taken);
        self.connections[connection].pending = pending;
        if reached == Reached::Sync {
            self.connections[connection].synchronisations += 1;
            self.waiting += 1;
            if self.waiting > usize::from(self.channels) {
                self.waiting = 0;
                self.synchronised += 1;
                self.merged.synchronised();
            }
        }
        Ok(())
    }

    fn consume_bytes(
        &mut self,
        connection: usize,
        bytes: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, Reached), MultifdError> {
        let mut at = 0;
        if matches!(self.connections[connection].role, Role::Unknown) {
            let Some((role, len)) = self.introduce(bytes)? else {
                return Ok((0, Reached::More));
            };
            self.connections[connection].role = role;
            at = len;
        }
        let Self {
            connections,
            main,
            merged,
            ..
        } = self;
        let (taken, reached) = match &mut connections[connection].role {
            Role::Channel { packet, .. } => consume_channel(packet, &bytes[at..], main, merged, out)?,
            Role::Main | Role::Unknown => main.advance(&bytes[at..], merged, out)?,
        };
        Ok((at + taken, reached))
    }

    /// What a connection is that starts with these bytes, and how many of them only said so. `None`: too few to tell.
    fn introduce(&self, bytes: &[u8]) -> Result<Option<(Role, usize)>, MultifdError> {
        let Some(magic) = be32(bytes, 0) else { return Ok(None) };
        if magic == MAGIC {
            let Some(initial) = bytes.get(..INITIAL_LEN) else {
                return Ok(None);
            };
            let number = packet::read_initial(initial)?;
            let is_there = |one: &Connection| matches!(one.role, Role::Channel { number: its, .. } if its == number);
            if number >= self.channels || self.connections.iter().any(is_there) {
                return Err(MultifdError::Channel(number));
            }
            return Ok(Some((Role::Channel { number, packet: None }, INITIAL_LEN)));
        }
        let is_second = self.connections.iter().any(|one| matches!(one.role, Role::Main));
        if Some(magic) != be32(&FILE_HEADER, 0) || is_second {
            return Err(MultifdError::Stranger);
        }
        Ok(Some((Role::Main, 0)))
    }
}

/// Takes a channel's packets and their pages, up to the next synchronisation.
fn consume_channel(
    current: &mut Option<(Packet, usize)>,
    bytes: &[u8],
    main: &MainStream,
    merged: &mut Merged,
    out: &mut Vec<u8>,
) -> Result<(usize, Reached), MultifdError> {
    let section = main.section();
    let mut put = |block: u16, page: u64, content: Option<&[u8]>| {
        let at = PageAddress { block, page };
        merged.page(at, content, section, out)
    };
    let mut at = 0;
    loop {
        let Some((packet, received)) = current else {
            let Some(packet) = packet::read_packet(&bytes[at..], section.ram)? else {
                return Ok((at, Reached::More));
            };
            at += PACKET_LEN;
            for &page in &packet.zero_pages {
                put(packet.block, page, None)?;
            }
            *current = Some((packet, 0));
            continue;
        };
        let Some(&page) = packet.pages.get(*received) else {
            let is_sync = packet.is_sync;
            *current = None;
            if is_sync {
                return Ok((at, Reached::Sync));
            }
            continue;
        };
        let Some(content) = bytes.get(at..at + PAGE_SIZE) else {
            return Ok((at, Reached::More));
        };
        put(packet.block, page, Some(content))?;
        *received += 1;
        at += PAGE_SIZE;
    }
}
