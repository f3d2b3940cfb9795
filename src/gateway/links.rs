//! Links to peers: dialled when a migration needs one, kept, replaced when they break.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use super::channel::{Channel, ChannelError};
use crate::config::{Config, PeerAddress};
use crate::proto::page::{ByteRate, JournalId};
use crate::proto::wire::hello::{self, Agreement};
use crate::proto::wire::message::Reply;
use crate::proto::wire::{Hello, HelloError, Limits, Request};
use crate::shaper::Shaper;
use crate::store::trust::TrustStore;
use crate::transport::{CloseCode, DialError, PeerConnection, PeerLink, PeerTarget, Transport};

/// How long a peer may take from the first packet to its hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Share of the controller's goodput that bulk is admitted at: what is admitted leaves at once, so that almost nothing unsent
/// sits in QUIC, where nothing can overtake it.
const ADMITTED_SHARE: f64 = 0.995;

/// On a shorter path QUIC's own repair takes no longer than the parity's way through both gateways.
const PROTECTED_RTT: Duration = Duration::from_millis(5);

/// Every link of this gateway.
#[derive(Debug)]
pub(crate) struct Links {
    config: Arc<Config>,
    transport: Arc<Transport>,
    trust: Arc<TrustStore>,
    hello: Hello,
    links: Mutex<HashMap<String, Arc<Slot>>>,
}

/// Where a peer's link is kept; held while it is dialled, so that nobody dials twice.
type Slot = Mutex<Option<Arc<Link>>>;

/// A link with what both sides agreed on it.
#[derive(Debug)]
pub(crate) struct Link {
    link: PeerLink,
    peer: Hello,
    agreement: Agreement,
    shaper: Option<Arc<Shaper>>,
    capacity: Option<ByteRate>,
}

impl Links {
    pub(crate) fn new(
        config: Arc<Config>,
        transport: Arc<Transport>,
        trust: Arc<TrustStore>,
        journal: JournalId,
        limits: Limits,
    ) -> Self {
        let hello = Hello::new(config.site.clone(), journal, limits);
        Self {
            config,
            transport,
            trust,
            hello,
            links: Mutex::default(),
        }
    }

    /// What this gateway says first.
    pub(crate) fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The link to `peer`: the one there is, or a new one.
    ///
    /// # Errors
    /// [`LinkError`], with what to do.
    pub(crate) async fn link(&self, peer: &str) -> Result<Arc<Link>, LinkError> {
        let slot = Arc::clone(self.links.lock().await.entry(peer.to_owned()).or_default());
        let mut slot = slot.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.is_alive()) {
            return Ok(Arc::clone(link));
        }
        let link = Arc::new(self.dial(peer).await?);
        *slot = Some(Arc::clone(&link));
        Ok(link)
    }

    /// Time for which bulk waited since this was last asked, because the capacity of its link was used up. A link that is being
    /// dialled is asked the next time.
    pub(crate) async fn take_waited(&self) -> Duration {
        let slots: Vec<Arc<Slot>> = self.links.lock().await.values().cloned().collect();
        let waited = |slot: &Arc<Slot>| Some(slot.try_lock().ok()?.as_ref()?.shaper()?.take_waited());
        slots.iter().filter_map(waited).sum()
    }

    /// How long to wait for a link and one answer on it: eight trips there and back, with time for a lost packet.
    pub(crate) fn patience(&self, peer: &str) -> Duration {
        let rtt = self
            .config
            .peer(peer)
            .and_then(|peer| peer.rtt)
            .unwrap_or(self.config.link.rtt);
        Duration::from_secs(2) + rtt * 8
    }

    async fn dial(&self, peer: &str) -> Result<Link, LinkError> {
        let target = self.target(peer).await?;
        let name = || peer.to_owned();
        let capacity = target.rate;
        let attempt = async {
            let link = self
                .transport
                .dial(&target)
                .await
                .map_err(|source| LinkError::Dial { peer: name(), source })?;
            let reply = Channel::ask(&link.control, &Request::Hello(self.hello.clone()))
                .await
                .map_err(|source| LinkError::Channel { peer: name(), source })?;
            match reply {
                Reply::Hello(hello) => Ok((link, hello)),
                Reply::Refused(reason) => Err(LinkError::Refused { peer: name(), reason }),
                _ => Err(LinkError::Channel {
                    peer: name(),
                    source: ChannelError::Closed,
                }),
            }
        };
        let (link, hello) = tokio::time::timeout(HELLO_DEADLINE, attempt)
            .await
            .map_err(|_| LinkError::Silent {
                peer: name(),
                seconds: HELLO_DEADLINE.as_secs(),
            })??;
        let agreement = self
            .hello
            .agree(&hello)
            .map_err(|source| LinkError::Hello { peer: name(), source })?;
        tracing::info!(
            peer,
            site = hello.site,
            software = hello.software,
            version = agreement.version,
            "linked"
        );
        let shaper = admitted(link.goodput()).map(|rate| Arc::new(Shaper::new(rate)));
        Ok(Link {
            link,
            peer: hello,
            agreement,
            shaper,
            capacity,
        })
    }

    async fn target(&self, peer: &str) -> Result<PeerTarget, LinkError> {
        let configured = self.config.peer(peer);
        let trusted = self.trust.get(peer);
        let Some(trusted) = trusted else {
            return Err(if configured.is_some() {
                LinkError::NotPaired { peer: peer.to_owned() }
            } else {
                LinkError::Unknown { peer: peer.to_owned() }
            });
        };
        let address = configured
            .and_then(|peer| peer.address.clone())
            .or(trusted.address)
            .ok_or_else(|| LinkError::NoAddress { peer: peer.to_owned() })?;
        let control_address = resolve_address(&address)
            .await
            .map_err(|reason| LinkError::NoSuchHost {
                peer: peer.to_owned(),
                reason,
            })?;
        Ok(PeerTarget {
            name: peer.to_owned(),
            control_address,
            bulk_address: None,
            fingerprint: trusted.fingerprint,
            rate: configured.and_then(|peer| peer.rate).or(self.config.link.rate),
            rtt: configured.and_then(|peer| peer.rtt).unwrap_or(self.config.link.rtt),
        })
    }
}

impl Link {
    /// For messages.
    pub(crate) fn control(&self) -> &PeerConnection {
        &self.link.control
    }

    /// Whether parity is sent behind a stream's end: the peer knows it, and waiting for QUIC's own repair would be long.
    pub(crate) fn protects_tail(&self) -> bool {
        self.agreement.version >= hello::REPAIRS && self.rtt() >= PROTECTED_RTT
    }

    /// For lanes.
    pub(crate) fn bulk(&self) -> &PeerConnection {
        &self.link.bulk
    }

    /// What both sides speak and hold.
    pub(crate) fn agreement(&self) -> Agreement {
        self.agreement
    }

    /// The journal behind the peer.
    pub(crate) fn peer_journal(&self) -> JournalId {
        self.peer.journal
    }

    /// Admits what all migrations to this peer send together, where a capacity is configured.
    pub(crate) fn shaper(&self) -> Option<Arc<Shaper>> {
        self.shaper.clone()
    }

    /// Smoothed RTT, as the control connection measured it.
    pub(crate) fn rtt(&self) -> Duration {
        self.link.control.rtt()
    }

    /// Stream bytes per second that the path carries, where a capacity is configured; keeps the admission at it.
    pub(crate) fn goodput(&self) -> Option<ByteRate> {
        let goodput = self.link.goodput();
        if let (Some(rate), Some(shaper)) = (admitted(goodput), &self.shaper) {
            shaper.set_rate(rate);
        }
        goodput
    }

    /// Capacity as configured, headers included.
    pub(crate) fn capacity(&self) -> Option<ByteRate> {
        self.capacity
    }

    /// Bounds what QUIC holds of lanes, sent or not: what it holds beyond the path's own needs is a queue that nothing overtakes.
    pub(crate) fn set_send_window(&self, bytes: u64) {
        self.link.bulk.set_send_window(bytes);
    }

    /// IP bytes in both directions since the link was made.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.link.stats().wire_bytes()
    }

    /// Whether both connections are up.
    pub(crate) fn is_alive(&self) -> bool {
        self.link.control.close_reason().is_none() && self.link.bulk.close_reason().is_none()
    }

    /// One connection broke: the other is of no use without it, and whoever waits on it must notice.
    pub(crate) fn close_broken(&self, reason: &str) {
        tracing::debug!("a link is given up: {reason}");
        self.link
            .close(CloseCode::Replaced, "the other connection of the link is lost");
    }
}

/// Where a host is.
///
/// # Errors
/// A sentence.
pub(crate) async fn resolve_address(address: &PeerAddress) -> Result<SocketAddr, String> {
    tokio::net::lookup_host((address.host.as_str(), address.port))
        .await
        .map_err(|error| format!("the name {} is not known: {error}", address.host))?
        .next()
        .ok_or_else(|| format!("the name {} has no address", address.host))
}

fn admitted(goodput: Option<ByteRate>) -> Option<ByteRate> {
    goodput.map(|rate| ByteRate((rate.0 as f64 * ADMITTED_SHARE) as u64))
}

/// There is no link to a peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// Nobody of that name.
    #[error("no peer is called {peer}: longhaul peers lists them, longhaul pair adds one")]
    Unknown {
        /// The name.
        peer: String,
    },
    /// In the configuration, but not trusted.
    #[error(
        "{peer} is configured but not paired: run longhaul pair --invite at one site and longhaul pair CODE at the other"
    )]
    NotPaired {
        /// The name.
        peer: String,
    },
    /// Trusted, but nobody said where it is.
    #[error("{peer} has no address: add `address` to its [[peer]] section")]
    NoAddress {
        /// The name.
        peer: String,
    },
    /// Its address leads nowhere.
    #[error("{peer} cannot be reached: {reason}")]
    NoSuchHost {
        /// The name.
        peer: String,
        /// What the resolver said.
        reason: String,
    },
    /// No connection.
    #[error("{peer} cannot be reached: {source}")]
    Dial {
        /// The name.
        peer: String,
        /// Why.
        source: DialError,
    },
    /// A connection, but no hello.
    #[error("{peer} answers, but not as a gateway should: {source}")]
    Channel {
        /// The name.
        peer: String,
        /// Why.
        source: ChannelError,
    },
    /// Nothing came in time.
    #[error("{peer} did not answer within {seconds} s: check that its gateway runs and that UDP passes")]
    Silent {
        /// The name.
        peer: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The peer said no.
    #[error("{peer} refused: {reason}")]
    Refused {
        /// The name.
        peer: String,
        /// In the peer's words.
        reason: String,
    },
    /// Nothing in common.
    #[error("{peer}: {source}")]
    Hello {
        /// The name.
        peer: String,
        /// Why.
        source: HelloError,
    },
}
