//! A link between two sites within this process, on tokio's clock: stopped, it goes as fast as the machine computes.
//!
//! ```text
//! site A: sockets ── LinkModel A to B ──▶ what flies, by arrival ──▶ mailboxes :site B      (and back, with a model of its own)
//! ```
//!
//! The arithmetic is that of the emulator. What arrives is handed over when tokio's timers, which tick in milliseconds, say so:
//! up to one late, and in bursts of one.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use longhaul::transport::Network;
use longhaul::wan::{LinkModel, LinkSettings, Verdict};
use quinn::AsyncUdpSocket;
use quinn::udp::{EcnCodepoint, Transmit};
use tokio::sync::Notify;

use socket::{Mailbox, Socket};

mod socket;

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
    flying: BinaryHeap<Reverse<Flying>>,
    /// Datagrams that were sent so far.
    sent: u64,
    /// What each site has offered: when, and how many bytes at the bottleneck.
    offered: [Vec<(Instant, u64)>; 2],
    /// By the address that the other site sees.
    mailboxes: HashMap<SocketAddr, Arc<Mailbox>>,
    /// A bottleneck where more than this waits marks what comes, where that is ECN-capable.
    mark_above: Option<u64>,
    /// Sockets that the other site sees at another address than they have.
    seen_at: HashMap<SocketAddr, SocketAddr>,
    next_port: u16,
}

/// In the order of arrival, and of sending where that is the same.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Flying {
    at: Instant,
    number: u64,
    to: SocketAddr,
    from: SocketAddr,
    /// The codepoint, 0 for none.
    ecn: u8,
    bytes: Vec<u8>,
}

impl SimulatedLink {
    /// Idle before now. Must be called within a tokio runtime, on which what flies is handed over.
    pub(crate) fn new(settings: LinkSettings, seed: u64) -> Arc<Self> {
        let model = |stream| LinkModel::new(settings.clone(), seed, stream, now());
        let link = Arc::new(Self {
            state: Mutex::new(State {
                models: [model(0), model(1)],
                flying: BinaryHeap::new(),
                sent: 0,
                offered: [Vec::new(), Vec::new()],
                mailboxes: HashMap::new(),
                mark_above: None,
                seen_at: HashMap::new(),
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

    /// Changes what the link is like from this site to the other.
    pub(crate) fn change(&self, site: usize, change: impl FnOnce(&mut LinkSettings)) {
        let model = &mut self.lock().models[site];
        let mut settings = model.settings().clone();
        change(&mut settings);
        model.change(settings);
    }

    /// Lets nothing more enter from this site for so long.
    pub(crate) fn cut(&self, site: usize, length: Duration) {
        self.lock().models[site].cut(now(), length);
    }

    /// The other site sees the socket at `address` as `seen` from now on, and what it sends to where that was is lost: a NAT forgot
    /// the socket, or its site goes out by another uplink.
    pub(crate) fn rebind(&self, address: SocketAddr, seen: SocketAddr) {
        let mut state = self.lock();
        let before = state.seen_at.insert(address, seen).unwrap_or(address);
        let mailbox = state.mailboxes.remove(&before).unwrap();
        assert!(state.mailboxes.insert(seen, mailbox).is_none(), "{seen} is in use");
    }

    fn send(&self, from: SocketAddr, transmit: &Transmit<'_>) {
        let site = usize::from(from.ip() == SITES[1]);
        let now = now();
        let mut state = self.lock();
        let state = &mut *state;
        let from = state.seen_at.get(&from).copied().unwrap_or(from);
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
                    from,
                    ecn,
                    bytes: datagram.to_vec(),
                }));
            }
        }
        let first = state.flying.peek().map(|Reverse(first)| first.at);
        if first.is_some_and(|first| expected.is_none_or(|expected| first < expected)) {
            self.sooner.notify_one();
        }
    }

    /// The socket at `address` is closed.
    fn forget(&self, address: SocketAddr) {
        let mut state = self.lock();
        let seen = state.seen_at.remove(&address).unwrap_or(address);
        state.mailboxes.remove(&seen);
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
        let mailbox = Mailbox::of(receive_buffer);
        state.mailboxes.insert(address, mailbox.clone());
        Ok(Arc::new(Socket {
            link: self.0.clone(),
            address,
            mailbox,
        }))
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
