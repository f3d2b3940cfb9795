//! A site's socket: what arrived waits in its mailbox.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use super::{Flying, SimulatedLink};

/// The receive buffer of a socket.
pub(super) struct Mailbox {
    room: usize,
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    bytes: usize,
    arrived: VecDeque<Flying>,
    reader: Option<Waker>,
}

impl Mailbox {
    pub(super) fn of(room: usize) -> Arc<Self> {
        Arc::new(Self {
            room,
            contents: Mutex::default(),
        })
    }

    /// Drops what finds no room, as the kernel does.
    pub(super) fn put(&self, datagram: Flying) {
        let mut contents = self.contents.lock().unwrap();
        if contents.bytes + datagram.bytes.len() > self.room {
            return;
        }
        contents.bytes += datagram.bytes.len();
        contents.arrived.push_back(datagram);
        if let Some(reader) = contents.reader.take() {
            reader.wake();
        }
    }
}

pub(super) struct Socket {
    pub(super) link: Arc<SimulatedLink>,
    pub(super) address: SocketAddr,
    pub(super) mailbox: Arc<Mailbox>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.address).finish()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.link.forget(self.address);
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.link.send(self.address, transmit);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut contents = self.mailbox.contents.lock().unwrap();
        let mut count = 0;
        for (buffer, meta) in buffers.iter_mut().zip(meta) {
            let Some(datagram) = contents.arrived.pop_front() else {
                break;
            };
            let length = datagram.bytes.len();
            contents.bytes -= length;
            if length > buffer.len() {
                continue;
            }
            buffer[..length].copy_from_slice(&datagram.bytes);
            *meta = RecvMeta {
                addr: datagram.from,
                len: length,
                stride: length,
                ecn: EcnCodepoint::from_bits(datagram.ecn),
                dst_ip: None,
            };
            count += 1;
        }
        if count == 0 {
            contents.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn max_transmit_segments(&self) -> usize {
        10
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
