//! Connections to peers, what they measure, and those of them that make a link.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use quinn::{Connection, Endpoint, VarInt};
use tokio::time::MissedTickBehavior;

use super::bulk::Bulk;
use super::bundle::Bundle;
use super::congestion;
use super::paced_socket::{PacedSocket, Route, SharedBucket, header_bytes};
use super::tls::ConnectionKind;
use super::trust::Fingerprint;
use super::tuning::{PROTECTED_RTT, STREAM_OVERHEAD, stream_rate, window_of_flight};
use crate::proto::page::ByteRate;
use crate::proto::rate::LossMeter;

/// Why a connection is closed; the number travels, the reason beside it is for the peer's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    /// Nothing more to say.
    Done = 0,
    /// The gateway shuts down; what is unfinished is resumed with its successor.
    Draining = 1,
    /// The peer is no longer trusted.
    Unpaired = 2,
    /// Another connection took the place of this one.
    Replaced = 3,
    /// The peer broke the protocol.
    Protocol = 4,
    /// The peer may not do this.
    Refused = 5,
}

impl From<CloseCode> for VarInt {
    fn from(code: CloseCode) -> Self {
        Self::from_u32(code as u32)
    }
}

/// An authenticated connection. Clones share it; when the last one is dropped, it is closed with [`CloseCode::Done`].
///
/// Derefs to [`quinn::Connection`], whose clones keep it open too.
#[derive(Clone)]
pub struct PeerConnection(Arc<Inner>);

pub(super) struct Inner {
    connection: Connection,
    peer: Option<String>,
    fingerprint: Fingerprint,
    kind: ConnectionKind,
    path: Path,
    loss: Mutex<LossMeter>,
}

/// How the packets of a connection leave this site.
pub(super) struct Path {
    pub(super) route: Arc<Route>,
    pub(super) budget: Arc<SharedBucket>,
    pub(super) socket: Arc<PacedSocket>,
    /// Bytes that the connection may buffer.
    pub(super) window: u64,
    /// The connection's own endpoint, where it has one.
    pub(super) endpoint: Option<Endpoint>,
    /// The connections with which it shares the rates of the link.
    pub(super) bundle: Bundle,
}

impl Path {
    /// The rate's limit, where an operator said what the link carries. Without, the rate that there is was found and may be found to be another.
    fn capacity(&self) -> Option<ByteRate> {
        let rate = self.route.rate().filter(|rate| rate.is_configured())?;
        Some(rate.capacity())
    }
}

impl PeerConnection {
    pub(super) fn new(
        connection: Connection,
        peer: Option<String>,
        fingerprint: Fingerprint,
        kind: ConnectionKind,
        path: Path,
    ) -> Self {
        let finds_its_rate = kind == ConnectionKind::Bulk && path.capacity().is_none();
        let inner = Arc::new(Inner {
            connection,
            peer,
            fingerprint,
            kind,
            path,
            loss: Mutex::default(),
        });
        if finds_its_rate {
            tokio::spawn(bound_unsent(Arc::downgrade(&inner)));
        }
        Self(inner)
    }

    pub(super) fn of(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// The peer's name here; `None` only while pairing with a gateway that is not known yet.
    #[must_use]
    pub fn peer(&self) -> Option<&str> {
        self.0.peer.as_deref()
    }

    /// The key that the peer proved to hold.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint
    }

    /// Whether it was made from here, to send lanes.
    #[must_use]
    pub fn is_dialled(&self) -> bool {
        self.0.path.endpoint.is_some()
    }

    /// What the connection is for.
    #[must_use]
    pub fn kind(&self) -> ConnectionKind {
        self.0.kind
    }

    /// The connections that were dialled together with this one.
    #[must_use]
    pub fn bundle(&self) -> Bundle {
        self.0.path.bundle
    }

    /// Closes the connection and tells the peer why, in at most a few hundred bytes of text.
    pub fn close_with(&self, code: CloseCode, reason: &str) {
        self.0.connection.close(code.into(), reason.as_bytes());
    }

    /// What the connection measured so far.
    #[must_use]
    pub fn stats(&self) -> ConnectionMeasures {
        let stats = self.0.connection.stats();
        self.0
            .loss()
            .observe(now(), stats.path.sent_packets, stats.path.lost_packets);
        let header = header_bytes(self.0.connection.remote_address());
        let counters = self.0.path.route.counters();
        ConnectionMeasures {
            rtt: stats.path.rtt,
            least_rtt: stats.path.min_rtt,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            wire_bytes_sent: stats.udp_tx.bytes + stats.udp_tx.datagrams * header,
            wire_bytes_received: stats.udp_rx.bytes + stats.udp_rx.datagrams * header,
            congestion_window: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            black_holes: stats.path.black_holes_detected,
            rate: self.0.path.route.rate().map(|rate| rate.rate()),
            shaper_waits: counters.waits(),
            shaper_wait: counters.wait_time(),
        }
    }

    /// Bytes of streams that have left so far and were not found lost, about.
    #[must_use]
    pub fn stream_bytes_sent(&self) -> u64 {
        let measures = self.stats();
        let headers = measures.sent_packets * (self.header_bytes() + STREAM_OVERHEAD);
        measures.wire_bytes_sent.saturating_sub(headers + measures.lost_bytes)
    }

    /// Bytes of IP and UDP headers of each packet: 28 or 48.
    #[must_use]
    pub fn header_bytes(&self) -> u64 {
        header_bytes(self.0.connection.remote_address())
    }

    /// For messages on it that must not wait for QUIC to find out that they were lost.
    #[must_use]
    pub fn doubling(&self) -> Doubling {
        Doubling {
            connection: self.0.connection.clone(),
            route: Arc::clone(&self.0.path.route),
        }
    }

    /// Share of packets that the path lost of late, as far as was seen: never 0.
    #[must_use]
    pub fn loss_at_most(&self) -> f64 {
        let _ = self.stats();
        self.0.loss().share_at_most()
    }

    /// Bounds what QUIC holds of streams, sent or not, below the window of the connection. Only where a capacity is
    /// configured; otherwise the connection follows its controller by itself.
    pub fn bound_held(&self, bytes: u64) {
        if self.0.path.capacity().is_some() {
            self.0.connection.set_send_window(bytes.min(self.0.path.window));
        }
    }

    /// Its part of the capacity that holds now; `None` where none is configured.
    pub(super) fn capacity(&self) -> Option<ByteRate> {
        self.0.path.capacity()
    }

    /// Stream bytes a second that it can carry now; `None` where no capacity is configured.
    pub(super) fn goodput(&self) -> Option<ByteRate> {
        let path = &self.0.path;
        self.capacity()?;
        let measures = self.stats();
        let rate = measures.rate?;
        let cap = path.budget.rate().map(|cap| path.bundle.share(cap));
        let rate = cap.map_or(rate, |cap| cap.min(rate));
        Some(stream_rate(
            rate,
            measures.mtu,
            self.header_bytes(),
            self.0.loss().share(),
        ))
    }
}

/// Sends single datagrams of a connection twice. Does not keep a [`PeerConnection`] from closing.
#[derive(Debug)]
pub struct Doubling {
    connection: Connection,
    route: Arc<Route>,
}

impl Doubling {
    /// At least the next so many datagrams, where they go by themselves.
    pub fn of_next(&self, datagrams: u32) {
        self.route.send_twice(datagrams);
    }

    /// Whether the path is long enough for what is frequent, too.
    #[must_use]
    pub fn is_far(&self) -> bool {
        self.connection.rtt() >= PROTECTED_RTT
    }
}

impl Inner {
    fn loss(&self) -> std::sync::MutexGuard<'_, LossMeter> {
        // Plain numbers, always consistent.
        self.loss.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.connection.close_reason().is_some()
    }

    pub(super) fn peer(&self) -> Option<&str> {
        self.peer.as_deref()
    }

    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        self.connection.close(code.into(), reason.as_bytes());
    }

    pub(super) fn endpoint(&self) -> Option<&Endpoint> {
        self.path.endpoint.as_ref()
    }

    /// Of the link; the connection takes its share.
    pub(super) fn set_capacity(&self, capacity: Option<ByteRate>) {
        let share = capacity.map(|capacity| self.path.bundle.share(capacity));
        self.path.route.set_capacity(share);
    }

    /// Lets the route follow the peer, which was at `listed` when it last did, and the controller of the path. Where it is listed now.
    pub(super) fn follow(&self, listed: SocketAddr) -> SocketAddr {
        if let Some(rate) = congestion::rate_of(&self.connection) {
            self.path.route.adopt(&rate);
        }
        let present = self.connection.remote_address();
        if present == listed || !self.path.socket.move_route(present, &self.path.route) {
            return listed;
        }
        tracing::info!(peer = self.peer(), kind = ?self.kind, from = %listed, to = %present, "a peer changed its address");
        present
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.path.socket.remove_route(&self.path.route);
        self.connection.close(CloseCode::Done.into(), b"");
    }
}

/// Where the rate is being found, keeps the send window at what flies at it and a little more: nothing above can tell how much that
/// would be. Nobody else sets it then.
async fn bound_unsent(connection: Weak<Inner>) {
    let mut ticks = tokio::time::interval(UNSENT_CHECK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = 0;
    loop {
        ticks.tick().await;
        let Some(inner) = connection.upgrade().filter(|inner| !inner.is_closed()) else {
            return;
        };
        let Some(rate) = inner.path.route.rate() else { return };
        let path = inner.connection.stats().path;
        let loss = {
            let mut meter = inner.loss();
            meter.observe(now(), path.sent_packets, path.lost_packets);
            meter.share()
        };
        let window = window_of_flight(rate.reach(), path.rtt, loss).min(inner.path.window);
        if window != before {
            inner.connection.set_send_window(window);
            before = window;
        }
    }
}

/// Several times in a round trip of a long link, so that a start-up that doubles in each is not held back.
const UNSENT_CHECK: Duration = Duration::from_millis(20);

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Deref for PeerConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0.connection
    }
}

impl fmt::Debug for PeerConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerConnection")
            .field("kind", &self.0.kind)
            .field("peer", &self.0.peer)
            .field("address", &self.0.connection.remote_address())
            .finish_non_exhaustive()
    }
}

/// What one connection measured since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionMeasures {
    /// Smoothed round trip time.
    pub rtt: Duration,
    /// Least round trip time ever.
    pub least_rtt: Duration,
    /// QUIC packets sent.
    pub sent_packets: u64,
    /// Of these, found lost.
    pub lost_packets: u64,
    /// Bytes of QUIC packets found lost.
    pub lost_bytes: u64,
    /// Bytes at IP level (with 28 or 48 bytes of headers a datagram), repairs and acknowledgements included.
    pub wire_bytes_sent: u64,
    /// The same, received.
    pub wire_bytes_received: u64,
    /// Bytes that may be in flight.
    pub congestion_window: u64,
    /// UDP payload of a full packet.
    pub mtu: u16,
    /// Times the path stopped to carry full packets.
    pub black_holes: u64,
    /// The controller's rate. Found rather than configured, it is a guess at what the path carries.
    pub rate: Option<ByteRate>,
    /// Times the paced socket made a packet wait.
    pub shaper_waits: u64,
    /// Time packets waited there.
    pub shaper_wait: Duration,
}

impl ConnectionMeasures {
    /// Of both connections together.
    pub(super) fn beside(self, other: Self) -> Self {
        Self {
            rtt: self.rtt.max(other.rtt),
            least_rtt: self.least_rtt.min(other.least_rtt),
            sent_packets: self.sent_packets + other.sent_packets,
            lost_packets: self.lost_packets + other.lost_packets,
            lost_bytes: self.lost_bytes + other.lost_bytes,
            wire_bytes_sent: self.wire_bytes_sent + other.wire_bytes_sent,
            wire_bytes_received: self.wire_bytes_received + other.wire_bytes_received,
            congestion_window: self.congestion_window.saturating_add(other.congestion_window),
            mtu: self.mtu.min(other.mtu),
            black_holes: self.black_holes + other.black_holes,
            rate: self
                .rate
                .zip(other.rate)
                .map(|(one, two)| ByteRate(one.0.saturating_add(two.0))),
            shaper_waits: self.shaper_waits + other.shaper_waits,
            shaper_wait: self.shaper_wait + other.shaper_wait,
        }
    }
}

/// Two gateways' link: a control connection and one or several for bulk, each on a socket of its own.
#[derive(Clone, Debug)]
pub struct PeerLink {
    /// For what must never wait.
    pub control: PeerConnection,
    /// For lanes of data.
    pub bulk: Bulk,
}

impl PeerLink {
    /// The link of connections that the same peer opened.
    ///
    /// # Panics
    /// Where none is for bulk.
    #[must_use]
    pub fn new(control: PeerConnection, bulk: Vec<PeerConnection>) -> Self {
        Self {
            control,
            bulk: Bulk::new(bulk),
        }
    }

    /// The peer's address for control.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.control.remote_address()
    }

    /// What its connections measured.
    #[must_use]
    pub fn stats(&self) -> LinkMeasures {
        LinkMeasures {
            control: self.control.stats(),
            bulk: self.bulk.stats(),
        }
    }

    /// Caps everything that is sent to this peer, from now on: the pacer's bucket, and the controllers' capacity. `None` lifts the cap,
    /// and leaves the controllers of a link that was opened with a capacity.
    ///
    /// Windows were sized when the connection was made, so a rate far above the first one fills the link only on a new connection.
    pub fn set_rate(&self, rate: Option<ByteRate>) {
        for connection in std::iter::once(&self.control).chain(self.bulk.iter()) {
            connection.0.path.budget.set_rate(rate);
            connection.0.set_capacity(rate);
        }
    }

    /// The capacity that holds now; `None` where none is configured.
    #[must_use]
    pub fn capacity(&self) -> Option<ByteRate> {
        self.bulk.capacity()
    }

    /// Stream bytes a second that this link can carry now: the controller's rate less headers and what is lost of late. `None`
    /// where no capacity is configured. Admit bulk at slightly less than this, and almost nothing unsent sits in QUIC.
    #[must_use]
    pub fn goodput(&self) -> Option<ByteRate> {
        self.bulk.goodput()
    }

    /// Closes all of its connections.
    pub fn close(&self, code: CloseCode, reason: &str) {
        for connection in &*self.bulk {
            connection.close_with(code, reason);
        }
        self.control.close_with(code, reason);
    }
}

/// What a link measured since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkMeasures {
    /// The control connection.
    pub control: ConnectionMeasures,
    /// The bulk connections together.
    pub bulk: ConnectionMeasures,
}

impl LinkMeasures {
    /// Bytes at IP level in both directions, repairs included: what the report calls `wire_bytes`.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        [self.control, self.bulk]
            .iter()
            .map(|measures| measures.wire_bytes_sent + measures.wire_bytes_received)
            .sum()
    }

    /// Packets that were found lost, on all connections.
    #[must_use]
    pub fn lost_packets(&self) -> u64 {
        self.control.lost_packets + self.bulk.lost_packets
    }
}
