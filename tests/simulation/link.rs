//! A link between two sites within this process, on tokio's clock: stopped, it goes as fast as the machine computes.
//!
//! ```text
//! site A: sockets ── LinkModel A to B ──▶ what flies, by arrival ──▶ mailboxes :site B      (and back, with a model of its own)
//! ```
//!
//! The arithmetic is that of the emulator. What arrives is handed over when tokio's timers, which tick in milliseconds, say so:
//! up to one late, and in bursts of one.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use longhaul::transport::Network;
use longhaul::wan::{LinkModel, LinkSettings, Verdict};
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::sync::Notify;

/// Addresses of the sites.
pub(crate) const SITES: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 2)),
];

/// IPv4 and UDP.
const HEADERS: u32 = 28;

/// Both sites' sockets, and what is between them.
pub(crate) struct SimulatedLink {
    state: Mutex<State>,
    /// Something arrives earlier than what was waited for.
    sooner: Notify,
}

struct State {
    /// From A to B, from B to A.
    models: [LinkModel; 2],
    /// Bytes at a bottleneck beyond which it marks what it takes in (ECN-CE).
    mark_above: Option<u64>,
    flying: BinaryHeap<Reverse<Flying>>,
    /// Datagrams that were sent so far.
    sent: u64,
    /// What each site has offered: when, and how many bytes at the bottleneck.
    offered: [Vec<(Instant, u64)>; 2],
    mailboxes: HashMap<SocketAddr, Arc<Mailbox>>,
    next_port: u16,
}

/// In the order of arrival, and of sending where that is the same.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Flying {
    at: Instant,
    number: u64,
    to: SocketAddr,
    from: SocketAddr,
    bytes: Vec<u8>,
    /// The two bits of the IP header.
    ecn: u8,
}

impl SimulatedLink {
    /// Idle before now. Must be called within a tokio runtime, on which what flies is handed over.
    pub(crate) fn new(settings: LinkSettings, seed: u64) -> Arc<Self> {
        let model = |stream| LinkModel::new(settings.clone(), seed, stream, now());
        let link = Arc::new(Self {
            state: Mutex::new(State {
                models: [model(0), model(1)],
                mark_above: None,
                flying: BinaryHeap::new(),
                sent: 0,
                offered: [Vec::new(), Vec::new()],
                mailboxes: HashMap::new(),
                next_port: 50_000,
            }),
            sooner: Notify::new(),
        });
        tokio::spawn(hand_over(link.clone()));
        link
    }

    /// What site 0 or 1 has offered so far: when, and how many bytes as the bottleneck counts them.
    pub(crate) fn offered(&self, site: usize) -> Vec<(Instant, u64)> {
        self.lock().offered[site].clone()
    }

    /// From now on the bottlenecks mark what comes while more than this waits.
    pub(crate) fn mark_above(&self, queued_bytes: u64) {
        self.lock().mark_above = Some(queued_bytes);
    }

    /// Somebody else's datagram passes the same bottleneck from this site: when it arrives at the other one, if it does.
    pub(crate) fn pass(&self, site: usize, ip_bytes: u32) -> Option<Instant> {
        match self.lock().models[site].offer(now(), ip_bytes).verdict {
            Verdict::Deliver { at } | Verdict::Overtake { at } => Some(at),
            Verdict::Drop(_) => None,
        }
    }

    /// Bytes that wait at the bottleneck of this site now.
    pub(crate) fn queued(&self, site: usize) -> u64 {
        self.lock().models[site].queued_bytes(now())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl fmt::Debug for SimulatedLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedLink").finish_non_exhaustive()
    }
}

/// Hands over what arrives, for as long as the runtime lives.
async fn hand_over(link: Arc<SimulatedLink>) {
    loop {
        let next = {
            let mut state = link.lock();
            let now = now();
            while state.flying.peek().is_some_and(|Reverse(first)| first.at <= now) {
                let Some(Reverse(arrived)) = state.flying.pop() else {
                    break;
                };
                if let Some(mailbox) = state.mailboxes.get(&arrived.to) {
                    mailbox.put(arrived);
                }
            }
            state.flying.peek().map(|Reverse(first)| first.at)
        };
        let sooner = link.sooner.notified();
        match next {
            Some(at) => tokio::select! {
                () = tokio::time::sleep_until(at.into()) => {}
                () = sooner => {}
            },
            None => sooner.await,
        }
    }
}

/// A network as one site sees it.
#[derive(Debug)]
pub(crate) struct SiteNetwork(pub(crate) Arc<SimulatedLink>);

impl Network for SiteNetwork {
    fn bind(
        &self,
        mut address: SocketAddr,
        receive_buffer: usize,
        _send_buffer: usize,
    ) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let mut state = self.0.lock();
        if address.port() == 0 {
            address.set_port(state.next_port);
            state.next_port += 1;
        }
        if state.mailboxes.contains_key(&address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let mailbox = Arc::new(Mailbox {
            room: receive_buffer,
            contents: Mutex::default(),
        });
        state.mailboxes.insert(address, mailbox.clone());
        Ok(Arc::new(Socket {
            link: self.0.clone(),
            address,
            mailbox,
        }))
    }
}

/// The receive buffer of a socket.
struct Mailbox {
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
    /// Drops what finds no room, as the kernel does.
    fn put(&self, datagram: Flying) {
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

struct Socket {
    link: Arc<SimulatedLink>,
    address: SocketAddr,
    mailbox: Arc<Mailbox>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Socket").field(&self.address).finish()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.link.lock().mailboxes.remove(&self.address);
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let site = usize::from(self.address.ip() == SITES[1]);
        let now = now();
        let mut state = self.link.lock();
        let state = &mut *state;
        let expected = state.flying.peek().map(|Reverse(first)| first.at);
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for datagram in transmit.contents.chunks(size) {
            let ip_bytes = datagram.len() as u32 + HEADERS;
            let overhead = state.models[site].settings().overhead_bytes;
            state.offered[site].push((now, u64::from(ip_bytes + overhead)));
            let crowded = state
                .mark_above
                .is_some_and(|above| state.models[site].queued_bytes(now) > above);
            let ecn = match transmit.ecn {
                Some(_) if crowded => EcnCodepoint::Ce as u8,
                codepoint => codepoint.map_or(0, |codepoint| codepoint as u8),
            };
            let fate = state.models[site].offer(now, ip_bytes);
            for verdict in [Some(fate.verdict), fate.copy].into_iter().flatten() {
                let (Verdict::Deliver { at } | Verdict::Overtake { at }) = verdict else {
                    continue;
                };
                state.sent += 1;
                state.flying.push(Reverse(Flying {
                    at,
                    number: state.sent,
                    to: transmit.destination,
                    from: self.address,
                    bytes: datagram.to_vec(),
                    ecn,
                }));
            }
        }
        let first = state.flying.peek().map(|Reverse(first)| first.at);
        if first.is_some_and(|first| expected.is_none_or(|expected| first < expected)) {
            self.link.sooner.notify_one();
        }
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

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
