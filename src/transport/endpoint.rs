//! The site's two listening sockets, and what all of its connections share.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use aws_lc_rs::hmac;
use quinn::congestion::ControllerFactory;
use quinn::{Endpoint, EndpointConfig, TokioRuntime};
use quinn_proto::HashedConnectionIdGenerator;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::accept::{self, Incoming, MAX_HANDSHAKES};
use super::congestion::LinkControllerFactory;
use super::datagram_size::LargestDatagram;
use super::identity::Identity;
use super::link::{CloseCode, Inner, PeerConnection};
use super::network::{Network, Udp};
use super::paced_socket::{PacedSocket, Route, SharedBucket};
use super::tls::{ConnectionKind, ServerTls};
use super::trust::TrustAnchors;
use super::tuning::{MAX_UDP_PAYLOAD, Tuning};
use crate::proto::page::ByteRate;

/// What an operator says about this site's end.
#[derive(Clone, Debug)]
pub struct TransportSettings {
    /// Where peers reach control and pairing. An IPv6 wildcard takes IPv4 too.
    pub control_address: SocketAddr,
    /// Where peers reach bulk; `None`: the port after control's.
    pub bulk_address: Option<SocketAddr>,
    /// The most that this site's uplink may ever carry, as `tc` counts it (with 14 bytes of Ethernet header a packet), which all peers share; windows are made for it. `None`: not limited here.
    pub link: Option<ByteRate>,
    /// Round trip time that connections opened by peers are tuned for.
    pub rtt: Duration,
    /// Without a packet for this long, a connection is given up.
    pub idle_timeout: Duration,
    /// Bytes that one connection buffers at most, in each direction.
    pub window_budget: u64,
}

impl TransportSettings {
    /// Defaults for a site that listens on `control_address`: no limit, 150 ms, 10 s, 128 MiB.
    #[must_use]
    pub fn new(control_address: SocketAddr) -> Self {
        Self {
            control_address,
            bulk_address: None,
            link: None,
            rtt: Duration::from_millis(150),
            idle_timeout: Duration::from_secs(10),
            window_budget: 128 * 1024 * 1024,
        }
    }
}

/// One site's QUIC: accepts peers, dials them, forgets them.
#[derive(Debug)]
pub struct Transport {
    pub(super) shared: Arc<Shared>,
    accepted: tokio::sync::Mutex<mpsc::Receiver<Incoming>>,
    renewal: JoinHandle<()>,
}

/// A listening endpoint and its socket.
#[derive(Clone, Debug)]
pub(super) struct Listener {
    pub(super) endpoint: Endpoint,
    pub(super) socket: Arc<PacedSocket>,
    /// Bytes that a connection may buffer.
    pub(super) window: u64,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) settings: TransportSettings,
    pub(super) network: Arc<dyn Network>,
    pub(super) identity: Arc<Identity>,
    pub(super) trust: Arc<TrustAnchors>,
    pub(super) invitation: Arc<AtomicBool>,
    control: Listener,
    bulk: Listener,
    pub(super) link: Arc<SharedBucket>,
    /// What may be sent to whom nobody knows yet, by both listening sockets.
    strangers: Arc<SharedBucket>,
    peers: Mutex<Peers>,
}

#[derive(Default)]
struct Peers {
    budgets: HashMap<String, Arc<SharedBucket>>,
    connections: Vec<Weak<Inner>>,
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peers")
            .field("connections", &self.connections.len())
            .finish_non_exhaustive()
    }
}

impl Transport {
    /// Listens for peers, on one UDP socket for control and pairing and one for bulk. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`] where an address cannot be used.
    pub fn bind(
        settings: TransportSettings,
        identity: Arc<Identity>,
        trust: Arc<TrustAnchors>,
    ) -> Result<Self, BindError> {
        Self::bind_on(Arc::new(Udp), settings, identity, trust)
    }

    /// The same on another network.
    ///
    /// # Errors
    /// [`BindError`] where an address cannot be used.
    pub fn bind_on(
        network: Arc<dyn Network>,
        settings: TransportSettings,
        identity: Arc<Identity>,
        trust: Arc<TrustAnchors>,
    ) -> Result<Self, BindError> {
        let bulk_address = match settings.bulk_address {
            Some(address) => address,
            None => port_after(settings.control_address).ok_or(BindError::NoPortForBulk)?,
        };
        let invitation = Arc::new(AtomicBool::new(false));
        let link = Arc::new(SharedBucket::new(settings.link));
        let strangers = Arc::new(SharedBucket::new(settings.link.map(set_aside)));
        let listen = |address, purpose, kinds: &[ConnectionKind]| {
            let resets = resettable(&identity, purpose);
            let tls = ServerTls::new(identity.clone(), trust.clone(), invitation.clone(), kinds.to_vec())
                .map_err(BindError::Tls)?;
            listen(&*network, &settings, address, tls, kinds, resets, [&strangers, &link]).map_err(
                |source| match source.kind() {
                    io::ErrorKind::AddrInUse => BindError::InUse { address },
                    _ => BindError::Io { address, source },
                },
            )
        };
        let control = listen(
            settings.control_address,
            "control",
            &[ConnectionKind::Control, ConnectionKind::Pairing],
        )?;
        let bulk = listen(bulk_address, "bulk", &[ConnectionKind::Bulk])?;

        let renewal = tokio::spawn(renew(Arc::downgrade(&identity)));
        let peers = Mutex::default();
        let shared = Arc::new(Shared {
            settings,
            network,
            identity,
            trust,
            invitation,
            control,
            bulk,
            link,
            strangers,
            peers,
        });
        let (sender, accepted) = mpsc::channel(MAX_HANDSHAKES);
        for listener in [&shared.control, &shared.bulk] {
            tokio::spawn(accept::run(shared.clone(), listener.clone(), sender.clone()));
        }
        Ok(Self {
            shared,
            accepted: accepted.into(),
            renewal,
        })
    }

    /// The next connection that a peer opened; `None` once the transport is shut down.
    pub async fn accept(&self) -> Option<Incoming> {
        self.accepted.lock().await.recv().await
    }

    /// Where peers reach control and pairing.
    #[must_use]
    pub fn control_address(&self) -> SocketAddr {
        self.shared
            .control
            .endpoint
            .local_addr()
            .unwrap_or(self.shared.settings.control_address)
    }

    /// Where peers reach bulk.
    #[must_use]
    pub fn bulk_address(&self) -> SocketAddr {
        self.shared
            .bulk
            .endpoint
            .local_addr()
            .unwrap_or(self.shared.settings.control_address)
    }

    /// While open, gateways that are not trusted may connect to pair ([`ConnectionKind::Pairing`]), and for nothing else.
    pub fn set_invitation(&self, open: bool) {
        self.shared.invitation.store(open, Ordering::Release);
    }

    /// Closes every connection with `peer`, and says how many there were. Remove it from the [`TrustAnchors`] before, or it may
    /// come back.
    pub fn close_peer(&self, peer: &str, code: CloseCode, reason: &str) -> usize {
        let connections = self.shared.connections();
        let of_peer = connections
            .iter()
            .filter(|connection| connection.peer() == Some(peer) && !connection.is_closed());
        of_peer.map(|connection| connection.close(code, reason)).count()
    }

    /// Every connection that is open, whoever opened it.
    #[must_use]
    pub fn open_connections(&self) -> Vec<PeerConnection> {
        let connections = self.shared.connections().into_iter();
        connections
            .filter(|connection| !connection.is_closed())
            .map(PeerConnection::of)
            .collect()
    }

    /// The cap on everything that this site sends, from the next packet on. Controllers do not follow by themselves: say
    /// [`set_peer_rate`](Self::set_peer_rate) of every peer whose share is another now. Windows stay as they were made, for the rate of the settings.
    pub fn set_link_rate(&self, rate: Option<ByteRate>) {
        self.shared.link.set_rate(rate);
        self.shared.strangers.set_rate(rate.map(set_aside));
    }

    /// The cap on everything that is sent to `peer`; connections that are open follow at once.
    pub fn set_peer_rate(&self, peer: &str, rate: Option<ByteRate>) {
        self.shared.budget(peer).set_rate(rate);
        for connection in self.shared.connections() {
            if connection.peer() == Some(peer) {
                connection.set_capacity(rate);
            }
        }
    }

    /// Closes everything and waits a few seconds for the peers to be told. [`accept`](Self::accept) ends.
    pub async fn shutdown(&self, code: CloseCode, reason: &str) {
        let connections = self.shared.connections();
        for connection in &connections {
            connection.close(code, reason);
        }
        let mut endpoints: Vec<Endpoint> = connections
            .iter()
            .filter_map(|connection| connection.endpoint().cloned())
            .collect();
        endpoints.extend([self.shared.control.endpoint.clone(), self.shared.bulk.endpoint.clone()]);
        let told = async {
            for endpoint in &endpoints {
                endpoint.close(code.into(), reason.as_bytes());
                endpoint.wait_idle().await;
            }
        };
        let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, told).await;
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.renewal.abort();
        for listener in [&self.shared.control, &self.shared.bulk] {
            listener.endpoint.close(CloseCode::Done.into(), b"");
        }
    }
}

impl Shared {
    /// The bucket of everything that is sent to `peer`.
    pub(super) fn budget(&self, peer: &str) -> Arc<SharedBucket> {
        self.peers().budgets.entry(peer.to_owned()).or_default().clone()
    }

    /// Lets `close_peer` and `shutdown` find the connection for as long as it is in use.
    pub(super) fn register(&self, connection: &PeerConnection) {
        let mut peers = self.peers();
        peers.connections.retain(|known| known.strong_count() > 0);
        peers.connections.push(Arc::downgrade(connection.inner()));
    }

    fn connections(&self) -> Vec<Arc<Inner>> {
        self.peers().connections.iter().filter_map(Weak::upgrade).collect()
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

const RENEWAL_CHECK: Duration = Duration::from_secs(3600);

/// Of the link, for handshakes: a twentieth, which is some hundred of them a second at 100 Mbit/s.
fn set_aside(link: ByteRate) -> ByteRate {
    ByteRate(link.0 / 20).max(ByteRate(64 << 10))
}

/// For the connections of the socket whose datagrams are `largest`.
pub(super) fn controller(
    capacity: Option<ByteRate>,
    rtt: Duration,
    largest: &Arc<LargestDatagram>,
) -> Arc<dyn ControllerFactory + Send + Sync> {
    let largest = largest.clone();
    Arc::new(LinkControllerFactory { capacity, rtt, largest })
}

/// An endpoint that ends the connections of the process before it, at their first packet (RFC 9000, 10.3): peers need not wait
/// for their idle timeout to learn of a restart. A secret for each socket, since a token that one of them gives away must not
/// end a connection of the other (21.11).
fn resettable(identity: &Identity, purpose: &str) -> EndpointConfig {
    let ids = identity.derived_secret(&format!("connection ids of {purpose}"));
    let (id_key, _) = ids.split_first_chunk().expect("the secret is longer than a number");
    let id_key = u64::from_le_bytes(*id_key);
    let tokens = identity.derived_secret(&format!("reset tokens of {purpose}"));
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &tokens)));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    config
}

fn listen(
    network: &dyn Network,
    settings: &TransportSettings,
    address: SocketAddr,
    tls: ServerTls,
    kinds: &[ConnectionKind],
    resets: EndpointConfig,
    unrouted: [&Arc<SharedBucket>; 2],
) -> io::Result<Listener> {
    let tuning = Tuning::derive(
        settings.link,
        settings.rtt,
        settings.window_budget,
        settings.idle_timeout,
    );
    let largest = Arc::<LargestDatagram>::default();
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
    config
        .transport_config(Arc::new(
            tuning.transport_config(controller(settings.link, settings.rtt, &largest), kinds[0]),
        ))
        .migration(true)
        .max_incoming(MAX_HANDSHAKES)
        .incoming_buffer_size(64 * 1024)
        .incoming_buffer_size_total(1024 * 1024);
    let socket = network.bind(address, tuning.receive_buffer, tuning.send_buffer)?;
    let [strangers, link] = unrouted;
    let socket = PacedSocket::new(socket, largest, Route::of_strangers(strangers.clone(), link.clone()));
    Ok(Listener {
        endpoint: endpoint(&socket, Some(config), resets)?,
        socket,
        window: tuning.window,
    })
}

pub(super) fn endpoint(
    socket: &Arc<PacedSocket>,
    server: Option<quinn::ServerConfig>,
    mut config: EndpointConfig,
) -> io::Result<Endpoint> {
    config
        .max_udp_payload_size(MAX_UDP_PAYLOAD)
        .expect("QUIC allows every size from 1200 bytes on");
    Endpoint::new_with_abstract_socket(config, server, socket.clone(), Arc::new(TokioRuntime))
}

/// The bulk port where none is given. Port 0 (any free port) stays 0.
pub(super) fn port_after(address: SocketAddr) -> Option<SocketAddr> {
    let port = match address.port() {
        0 => 0,
        port => port.checked_add(1)?,
    };
    Some(SocketAddr::new(address.ip(), port))
}

/// Renews the certificate in time for as long as anybody uses the identity.
#[expect(clippy::disallowed_methods, reason = "certificates end by the wall clock")]
async fn renew(identity: Weak<Identity>) {
    let mut check = tokio::time::interval(RENEWAL_CHECK);
    loop {
        check.tick().await;
        let Some(identity) = identity.upgrade() else { return };
        match identity.renew_if_due(std::time::SystemTime::now()) {
            Ok(true) => tracing::info!(fingerprint = %identity.fingerprint(), "the certificate was renewed"),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the certificate was not renewed"),
        }
    }
}

/// The site cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else listens there.
    #[error("UDP {address} is in use; is another gateway running?")]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be used.
    #[error("UDP {address} cannot be listened on: {source}")]
    Io {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// There is no port after 65535.
    #[error("the control port is the last one, so the bulk address must be given")]
    NoPortForBulk,
    /// The TLS library refused our configuration.
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
}
