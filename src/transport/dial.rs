//! Links to peers are dialled: a control connection and those for bulk, each from a socket of its own.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::{ConnectionError, EndpointConfig};
use tokio::task::JoinSet;

use super::bundle::Bundle;
use super::congestion;
use super::datagram_size::LargestDatagram;
use super::endpoint::{Shared, Transport, controller, endpoint, port_after};
use super::link::{Path, PeerConnection, PeerLink};
use super::paced_socket::{PacedSocket, Priority, Route, SharedBucket};
use super::tls::{self, ConnectionKind};
use super::trust::Fingerprint;
use super::tuning::{self, MOST_BULK_CONNECTIONS, Tuning};
use crate::proto::page::ByteRate;

/// A peer to connect to.
#[derive(Clone, Debug)]
pub struct PeerTarget {
    /// Its name here.
    pub name: String,
    /// Its control address.
    pub control_address: SocketAddr,
    /// Its bulk address; `None`: the port after control's.
    pub bulk_address: Option<SocketAddr>,
    /// The key it must prove to hold; it must be trusted too.
    pub fingerprint: Fingerprint,
    /// The capacity of the path to it, as `tc` counts it: filled from the first round trip on, never exceeded; windows are made for it.
    /// `None`: not known, so that the controller finds it.
    pub rate: Option<ByteRate>,
    /// The part of it that holds at present. `None`: all.
    pub rate_now: Option<ByteRate>,
    /// The round trip time of the path.
    pub rtt: Duration,
    /// Connections that lanes are spread over, 1 to [`MOST_BULK_CONNECTIONS`]. `None`: as many as the capacity needs.
    pub bulk_connections: Option<u8>,
}

impl Transport {
    /// Opens a link to a trusted peer: all handshakes, side by side, and the peer's word that it trusts us (two round trips).
    ///
    /// # Errors
    /// [`DialError`] where the peer does not answer, is not who it should be, or does not want us.
    pub async fn dial(&self, target: &PeerTarget) -> Result<PeerLink, DialError> {
        let (link, ()) = self.dial_and(target, |_| ()).await?;
        Ok(link)
    }

    /// The same, and `begin` as soon as the control connection can be used: after the first round trip, when the peer has proved who it is. Whether
    /// it trusts us is not known then; what was begun is given only where it does.
    ///
    /// # Errors
    /// Those of [`Self::dial`].
    pub async fn dial_and<T>(
        &self,
        target: &PeerTarget,
        begin: impl FnOnce(&PeerConnection) -> T,
    ) -> Result<(PeerLink, T), DialError> {
        let failed = |cause| DialError {
            peer: target.name.clone(),
            address: target.control_address,
            cause,
        };
        let bulk_address = match target.bulk_address {
            Some(address) => address,
            None => port_after(target.control_address).ok_or_else(|| failed(DialCause::NoPortForBulk))?,
        };
        let rate = match (target.rate, self.shared.settings.link) {
            (Some(rate), Some(link)) => Some(rate.min(link)),
            (rate, _) => rate,
        };
        let present = [target.rate_now, self.shared.link.rate()];
        let rate_now = rate.map(|most| present.into_iter().flatten().fold(most, ByteRate::min));
        let budget = self.shared.budget(&target.name);
        budget.set_rate(rate_now);
        let attempt = |address, kind, bundle| Attempt {
            address,
            kind,
            peer: Some(target.name.clone()),
            fingerprint: target.fingerprint,
            rate,
            rate_now,
            rtt: target.rtt,
            budget: budget.clone(),
            bundle,
        };
        let wanted = target
            .bulk_connections
            .unwrap_or_else(|| tuning::bulk_connections(rate));
        let all = async |bundle: Bundle| {
            let mut dialling: JoinSet<_> = (0..bundle.connections())
                .map(|_| {
                    let attempt = attempt(bulk_address, ConnectionKind::Bulk, bundle);
                    self.shared.clone().open(attempt)
                })
                .collect();
            let mut bulk = Vec::new();
            while let Some(dialled) = dialling.join_next().await {
                bulk.push(dialled.expect("dialling is not aborted and does not panic")?);
            }
            Ok(bulk)
        };
        let bulk = async {
            let bundle = Bundle::of(wanted.clamp(1, MOST_BULK_CONNECTIONS));
            match all(bundle).await {
                Err(DialCause::OtherProtocol) if bundle.connections() > 1 => {
                    tracing::info!(peer = target.name, "it knows one bulk connection only");
                    all(Bundle::alone()).await
                }
                dialled => dialled,
            }
        };
        let control = async {
            let attempt = attempt(target.control_address, ConnectionKind::Control, Bundle::alone());
            let control = self.shared.connect(attempt).await?;
            let begun = begin(&control);
            self.shared.admit(&control).await?;
            Ok((control, begun))
        };
        let ((control, begun), bulk) = tokio::try_join!(control, bulk).map_err(failed)?;
        Ok((PeerLink::new(control, bulk), begun))
    }

    /// Connects to a gateway that invited this one, to introduce ourselves. Only its key is known.
    ///
    /// # Errors
    /// [`DialError`] where nobody answers, the key is another, or the invitation is over.
    pub async fn dial_to_pair(&self, address: SocketAddr, key: Fingerprint) -> Result<PeerConnection, DialError> {
        let attempt = Attempt {
            address,
            kind: ConnectionKind::Pairing,
            peer: None,
            fingerprint: key,
            rate: None,
            rate_now: None,
            rtt: self.shared.settings.rtt,
            budget: Arc::default(),
            bundle: Bundle::alone(),
        };
        let failed = |cause| DialError {
            peer: key.to_string(),
            address,
            cause,
        };
        self.shared.clone().open(attempt).await.map_err(failed)
    }
}

/// One connection to open.
struct Attempt {
    address: SocketAddr,
    kind: ConnectionKind,
    peer: Option<String>,
    fingerprint: Fingerprint,
    /// Of the link, for the windows.
    rate: Option<ByteRate>,
    /// Of the link, to begin at.
    rate_now: Option<ByteRate>,
    rtt: Duration,
    budget: Arc<SharedBucket>,
    /// With which others it has what is the link's.
    bundle: Bundle,
}

impl Shared {
    /// Connects, and waits for the peer's word that it trusts us.
    async fn open(self: Arc<Self>, attempt: Attempt) -> Result<PeerConnection, DialCause> {
        let connection = self.connect(attempt).await?;
        self.admit(&connection).await?;
        Ok(connection)
    }

    /// Connects from a socket of its own, so that control never queues behind bulk in one. The peer has proved then who it is.
    async fn connect(&self, attempt: Attempt) -> Result<PeerConnection, DialCause> {
        let Attempt {
            address,
            kind,
            peer,
            fingerprint,
            rate,
            rate_now,
            rtt,
            budget,
            bundle,
        } = attempt;
        let trust = (kind != ConnectionKind::Pairing).then(|| self.trust.clone());
        let tls = tls::client(self.identity.clone(), kind, fingerprint, trust, bundle).map_err(DialCause::Tls)?;
        let settings = &self.settings;
        let share = |rate: Option<ByteRate>| rate.map(|rate| bundle.share(rate));
        let window_budget = bundle.part(settings.window_budget);
        let tuning = Tuning::derive(share(rate), rtt, window_budget, settings.idle_timeout);
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        let largest = Arc::<LargestDatagram>::default();
        config.transport_config(Arc::new(
            tuning.transport_config(controller(share(rate_now), rtt, &largest), kind),
        ));

        let local = local_address(address, settings.control_address);
        let socket = self
            .network
            .bind(local, tuning.receive_buffer, tuning.send_buffer)
            .map_err(DialCause::Socket)?;
        // Our own handshake.
        let unrouted = Route::new(Priority::Control, None, Arc::default(), self.link.clone());
        let socket = PacedSocket::new(socket, largest, unrouted);
        let endpoint = endpoint(&socket, None, EndpointConfig::default()).map_err(DialCause::Socket)?;
        let connecting = endpoint
            // Certificates are checked by key, so no name matters.
            .connect_with(config, address, &bundle.name())
            .map_err(DialCause::Address)?;
        let connection = connecting.await.map_err(DialCause::of_connection)?;

        let priority = if kind == ConnectionKind::Bulk {
            Priority::Bulk
        } else {
            Priority::Control
        };
        let rate = congestion::rate_of(&connection);
        let route = Arc::new(Route::new(priority, rate, budget.clone(), self.link.clone()));
        socket.set_only_route(route.clone());
        let path = Path {
            route,
            budget,
            socket,
            window: tuning.window,
            endpoint: Some(endpoint),
            bundle,
        };
        Ok(PeerConnection::new(connection, peer, fingerprint, kind, path))
    }

    /// The peer trusts us, and it is still trusted here: from now on the connection is one of this gateway's.
    async fn admit(&self, connection: &PeerConnection) -> Result<(), DialCause> {
        confirmed(connection).await.map_err(DialCause::of_connection)?;
        self.register(connection);
        let pairing = connection.kind() == ConnectionKind::Pairing;
        if !pairing && !self.trust.contains(&connection.fingerprint()) {
            return Err(DialCause::Unpaired);
        }
        Ok(())
    }
}

const CONFIRMATION_CHECK: Duration = Duration::from_millis(2);

/// Where to send from: the address we listen on where it is a particular one of the same family, else whatever routes there.
fn local_address(peer: SocketAddr, listening: SocketAddr) -> SocketAddr {
    let ip = match (peer.ip(), listening.ip()) {
        (IpAddr::V4(_), own @ IpAddr::V4(_)) | (IpAddr::V6(_), own @ IpAddr::V6(_)) => own,
        (IpAddr::V4(_), _) => Ipv4Addr::UNSPECIFIED.into(),
        (IpAddr::V6(_), _) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, 0)
}

/// In TLS 1.3 a client is done before the server has seen its certificate. HANDSHAKE_DONE says that the server accepted it; quinn
/// has no future for it, only a counter.
async fn confirmed(connection: &quinn::Connection) -> Result<(), ConnectionError> {
    let mut check = tokio::time::interval(CONFIRMATION_CHECK);
    while connection.stats().frame_rx.handshake_done == 0 {
        tokio::select! {
            _ = check.tick() => {}
            error = connection.closed() => return Err(error),
        }
    }
    Ok(())
}

/// A peer could not be connected to.
#[derive(Debug, thiserror::Error)]
#[error("no connection to {peer} at {address}: {cause}")]
pub struct DialError {
    /// The peer's name, or its key while pairing.
    pub peer: String,
    /// Its control address.
    pub address: SocketAddr,
    /// What went wrong.
    pub cause: DialCause,
}

/// What went wrong while connecting.
#[derive(Debug, thiserror::Error)]
pub enum DialCause {
    /// Nobody answered.
    #[error("no answer; check the address, the firewall (UDP, control and bulk port) and that the gateway runs")]
    NoAnswer,
    /// The other end is not the gateway that it should be.
    #[error("it is not the gateway this site paired with ({reason})")]
    NotThePeer {
        /// What it showed.
        reason: String,
    },
    /// The peer does not trust this site's key.
    #[error("the peer does not trust this gateway; pair them again ({reason})")]
    NotTrustedThere {
        /// What it said.
        reason: String,
    },
    /// Trust was withdrawn here meanwhile.
    #[error("it is no longer trusted here")]
    Unpaired,
    /// The peer speaks another version of the protocol.
    #[error("it speaks another protocol version; run the same release at both sites")]
    OtherProtocol,
    /// The peer closed the connection, or it broke.
    #[error("{0}")]
    Lost(ConnectionError),
    /// The address is not one to connect to.
    #[error("{0}")]
    Address(quinn::ConnectError),
    /// No local socket.
    #[error("no local UDP socket: {0}")]
    Socket(io::Error),
    /// There is no port after 65535.
    #[error("its control port is the last one, so its bulk address must be given")]
    NoPortForBulk,
    /// The TLS library refused our configuration.
    #[error("TLS cannot be set up: {0}")]
    Tls(rustls::Error),
}

impl DialCause {
    /// TLS alerts travel as QUIC error codes 0x100 + alert (RFC 9001, 4.8); 120 is no_application_protocol.
    fn of_connection(error: ConnectionError) -> Self {
        const ALERTS: std::ops::Range<u64> = 0x100..0x200;
        const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;
        let code = match &error {
            ConnectionError::TransportError(error) => u64::from(error.code),
            ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
            _ => 0,
        };
        match error {
            ConnectionError::TimedOut => Self::NoAnswer,
            ConnectionError::VersionMismatch => Self::OtherProtocol,
            _ if code == NO_APPLICATION_PROTOCOL => Self::OtherProtocol,
            ConnectionError::TransportError(error) if ALERTS.contains(&code) => {
                Self::NotThePeer { reason: error.reason }
            }
            ConnectionError::ConnectionClosed(close) if ALERTS.contains(&code) => Self::NotTrustedThere {
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            error => Self::Lost(error),
        }
    }
}
