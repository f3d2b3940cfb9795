//! What a vmm's stream comes in by: one connection, or those of a migration with multifd.

use std::future::poll_fn;
use std::io::{Error, ErrorKind, Result};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::clock;
use super::stream_socket::{CONNECT_DEADLINE, StreamSocket};
use crate::proto::vmm_stream::qemu::multifd::Merger;

/// Most bytes taken from a connection at once where there are several: what waits in one of them is held in memory.
const AT_ONCE: usize = 64 << 10;

/// And the least, a page with what is before it: pages come out whole.
const LEAST_AT_ONCE: usize = 8 << 10;

/// Reads of what a channel has left when the main stream has ended: its socket holds far less.
const READS_AT_THE_END: usize = 64;

const TOO_FEW: &str =
    "the hypervisor did not make as many connections as it has multifd channels; is somebody changing its settings?";

/// A vmm's stream, as it comes.
#[derive(Debug)]
pub(crate) enum VmmInput {
    One { socket: UnixStream, buffer: BytesMut },
    Several(Box<Several>),
}

/// Main stream and multifd channels, merged.
#[derive(Debug)]
pub(crate) struct Several {
    /// Where connections are still to come, and when they have to have.
    missing: Option<(StreamSocket, Instant)>,
    connections: Vec<UnixStream>,
    merger: Merger,
    /// Whose turn it is to be read first.
    turn: usize,
}

impl From<UnixStream> for VmmInput {
    fn from(socket: UnixStream) -> Self {
        Self::One {
            socket,
            buffer: BytesMut::new(),
        }
    }
}

impl VmmInput {
    /// The connections of a migration with so many multifd channels: the first, and those that are still to come to `socket`.
    pub(super) fn several(first: UnixStream, socket: StreamSocket, channels: u8) -> Result<Self> {
        let mut several = Several {
            missing: Some((socket, clock::now() + CONNECT_DEADLINE)),
            connections: Vec::new(),
            merger: Merger::new(channels),
            turn: 0,
        };
        several.add(first)?;
        Ok(Self::Several(Box::new(several)))
    }

    /// The next bytes, about `most` where as many are there; none at the end. Cancel-safe.
    pub(super) async fn read(&mut self, most: usize) -> Result<Bytes> {
        match self {
            Self::One { socket, buffer } => read_one(socket, buffer, most).await,
            Self::Several(several) => several.read(most).await,
        }
    }
}

async fn read_one(socket: &mut UnixStream, buffer: &mut BytesMut, most: usize) -> Result<Bytes> {
    buffer.reserve(most);
    if socket.read_buf(&mut buffer.limit(most)).await? > 0 {
        // What is there already goes into the same batch: larger groups reduce better and cost fewer lanes.
        while buffer.len() < most {
            let rest = most - buffer.len();
            match socket.try_read_buf(&mut (&mut *buffer).limit(rest)) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
    Ok(buffer.split().freeze())
}

impl Several {
    fn add(&mut self, connection: UnixStream) -> Result<()> {
        self.merger.connect().map_err(Error::other)?;
        self.connections.push(connection);
        if self.merger.is_complete() {
            self.missing = None;
        }
        Ok(())
    }

    async fn read(&mut self, most: usize) -> Result<Bytes> {
        let mut out = Vec::new();
        loop {
            let taken = self.take(most, &mut out)?;
            if !out.is_empty() || self.merger.has_ended() {
                return Ok(out.into());
            }
            // Nothing is taken from here on, so nothing is lost where this is dropped.
            if taken > 0 {
                tokio::task::yield_now().await;
                continue;
            }
            let deadline = self.missing.as_ref().map(|(_, deadline)| *deadline);
            let ready = poll_fn(|context| self.poll_ready(context));
            let ready = match deadline {
                Some(deadline) => tokio::time::timeout_at(deadline.into(), ready)
                    .await
                    .map_err(|_| Error::new(ErrorKind::TimedOut, TOO_FEW))?,
                None => ready.await,
            };
            if let Some(connection) = ready? {
                self.add(connection)?;
            }
        }
    }

    /// Takes what is there, from one connection after the other, until `most` bytes were taken or have come of them. Returns how many were taken.
    fn take(&mut self, most: usize, out: &mut Vec<u8>) -> Result<usize> {
        let (mut taken, mut idle) = (0, 0);
        while out.len().max(taken) < most && idle < self.connections.len() && !self.merger.has_ended() {
            let one = self.turn % self.connections.len();
            self.turn = one + 1;
            let room = (most - out.len().max(taken)).clamp(LEAST_AT_ONCE, AT_ONCE);
            match self.take_from(one, room, out)? {
                0 => idle += 1,
                bytes => {
                    taken += bytes;
                    idle = 0;
                }
            }
        }
        Ok(taken)
    }

    /// Takes what a connection has, up to so many bytes.
    fn take_from(&mut self, one: usize, room: usize, out: &mut Vec<u8>) -> Result<usize> {
        if !self.merger.may_read(one) {
            return Ok(0);
        }
        let pending = self.merger.pending(one);
        pending.reserve(room);
        match self.connections[one].try_read_buf(&mut pending.limit(room)) {
            Ok(0) => {
                // QEMU closes its channels first: what they have sent is there.
                if self.merger.is_main(one) {
                    for channel in (0..self.connections.len()).filter(|&other| other != one) {
                        let mut reads = 0..READS_AT_THE_END;
                        while reads.next().is_some() && self.take_from(channel, AT_ONCE, out)? > 0 {}
                    }
                }
                self.merger.close(one).map_err(Error::other)?;
                Ok(0)
            }
            Ok(bytes) => {
                self.merger.advance(one, out).map_err(Error::other)?;
                Ok(bytes)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Ready where a connection has something, or is a new one.
    fn poll_ready(&self, context: &mut Context<'_>) -> Poll<Result<Option<UnixStream>>> {
        if let Some((socket, _)) = &self.missing
            && let Poll::Ready(accepted) = socket.listener.poll_accept(context)
        {
            return Poll::Ready(accepted.map(|(connection, _)| Some(connection)));
        }
        for (one, connection) in self.connections.iter().enumerate() {
            if self.merger.may_read(one)
                && let Poll::Ready(ready) = connection.poll_read_ready(context)
            {
                return Poll::Ready(ready.map(|()| None));
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;

    use super::*;

    /// A channel's greeting and an empty packet that synchronises.
    fn channel(number: u8) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 1344];
        for at in [0, 64] {
            bytes[at..at + 8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
        }
        bytes[24] = number;
        bytes[64 + 11] = 1;
        bytes
    }

    /// A main stream up to the end of RAM's START, and what of it comes out merged.
    fn start() -> (Vec<u8>, Vec<u8>) {
        let mut start = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
        start.extend_from_slice(b"\0\0\0\0\0\0\x10\x04\x06pc.ram\0\0\0\0\0\0\x10\0");
        let mut merged = start.clone();
        merged.extend_from_slice(EOS);
        start.extend_from_slice(FLUSH);
        start.extend_from_slice(EOS);
        (start, merged)
    }

    const FLUSH: &[u8] = b"\0\0\0\0\0\0\x02\0";
    /// The end of records and the footer.
    const EOS: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";

    fn bind(name: &str) -> StreamSocket {
        let path = std::env::temp_dir().join(format!("longhaul-vmm-input-{name}-{}", std::process::id()));
        StreamSocket::bind(path).unwrap()
    }

    #[tokio::test]
    async fn connections_that_come_in_any_order_are_one_stream_and_the_socket_goes_when_all_are_there() {
        let socket = bind("order");
        let path = socket.path.clone();
        let (start, expected) = start();
        let mut first = UnixStream::connect(&path).await.unwrap();
        let (accepted, _) = socket.listener.accept().await.unwrap();
        let mut input = VmmInput::several(accepted, socket, 2).unwrap();
        first.write_all(&channel(1)).await.unwrap();
        let mut main = UnixStream::connect(&path).await.unwrap();
        main.write_all(&start).await.unwrap();
        let mut last = UnixStream::connect(&path).await.unwrap();
        last.write_all(&channel(0)).await.unwrap();
        let read = async {
            let mut read = Vec::new();
            while read.len() < expected.len() {
                read.extend_from_slice(&input.read(16).await.unwrap());
            }
            drop(main);
            (read, input.read(16).await.unwrap())
        };
        let (read, end) = tokio::time::timeout(Duration::from_secs(30), read)
            .await
            .expect("everything is there");
        assert_eq!((read, end), (expected, Bytes::new()));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_page_that_a_channel_has_left_when_the_main_stream_ends_is_an_error() {
        let socket = bind("late");
        let mut main = UnixStream::connect(&socket.path).await.unwrap();
        let mut late = UnixStream::connect(&socket.path).await.unwrap();
        let (accepted, _) = socket.listener.accept().await.unwrap();
        let mut input = VmmInput::several(accepted, socket, 1).unwrap();
        let (mut stream, _) = start();
        stream.extend_from_slice(b"\x03\0\0\0\x02");
        stream.extend_from_slice(EOS);
        main.write_all(&stream).await.unwrap();
        late.write_all(&channel(0)).await.unwrap();
        let read = async {
            // Up to END, which ends with its footer.
            while !input.read(1 << 16).await.unwrap().ends_with(EOS) {}
            let mut page = channel(0).split_off(64);
            page[11] = 0;
            page[19] = 1;
            page[22] = 0x10;
            page[64..70].copy_from_slice(b"pc.ram");
            page.extend_from_slice(&[7; 4096]);
            late.write_all(&page).await.unwrap();
            drop((main, late));
            loop {
                match input.read(1 << 16).await {
                    Ok(read) if read.is_empty() => return None,
                    Ok(_) => {}
                    Err(error) => return Some(error.to_string()),
                }
            }
        };
        let error = tokio::time::timeout(Duration::from_secs(30), read).await.unwrap();
        assert!(error.unwrap().contains("after its end"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_does_not_come_is_an_error_after_a_while() {
        let socket = bind("missing");
        let _first = UnixStream::connect(&socket.path).await.unwrap();
        let (accepted, _) = socket.listener.accept().await.unwrap();
        let mut input = VmmInput::several(accepted, socket, 2).unwrap();
        let error = input.read(16).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}
