//! Links to peers: dialled beforehand or when a migration needs one, kept, replaced when they break.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::channel::{Channel, ChannelError};
use super::clock;
use super::memory::LEAST_PAGES;
use super::standing::{Held, Standing};
use crate::config::{Config, PeerAddress};
use crate::proto::page::{ByteRate, JournalId, MigrationId};
use crate::proto::wire::hello::{self, Agreement};
use crate::proto::wire::message::Reply;
use crate::proto::wire::{Hello, HelloError, Limits, Request};
use crate::shaper::{Shaper, Turns};
use crate::store::spill;
use crate::store::trust::TrustStore;
use crate::transport::tuning::PROTECTED_RTT;
use crate::transport::{Bulk, CloseCode, DialError, PeerConnection, PeerLink, PeerTarget, Transport};

/// How long a peer may take from the first packet to its hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// How much longer than three round trips the first address of a peer may take to answer before the second is called.
const HEAD_START: Duration = Duration::from_millis(500);

/// Share of the controller's goodput that bulk is admitted at: what is admitted leaves at once, so that almost nothing unsent
/// sits in QUIC, where nothing can overtake it.
const ADMITTED_SHARE: f64 = 0.995;

/// What QUIC may hold beyond the path's own BDP, in time.
const QUEUED_IN_QUIC: Duration = Duration::from_millis(50);

/// Room in QUIC's send window for lanes that wait for a lost packet: they are held whole until it is repaired.
const LANES_IN_REPAIR: u64 = 4 << 20;

/// A migration that has not asked for this long has ended, or uses another link. While it copies it asks ten times a second.
const ASKED: Duration = Duration::from_secs(1);

/// What was agreed on a link holds for this long where nobody uses it and its peer cannot say hello again; then both ends may have more or less room.
const AGREED: Duration = Duration::from_secs(60);

/// Where a link over the second address is not used, the first address is tried this often: it may be back.
const BACK_TO_FIRST: Duration = Duration::from_secs(300);

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
    standing: Standing,
    turns: Arc<Turns>,
    asks: std::sync::Mutex<Asks>,
    made: Instant,
    /// Of one that was made over the peer's second address: when the first was last tried.
    first_tried: Option<std::sync::Mutex<Instant>>,
}

/// Over which of a peer's addresses it is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The first, and where that does not answer, the second.
    Any,
    /// The first alone, where there is one.
    First,
}

/// What [`Links::keep`] found or did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It was there, for so long.
    Ready(Duration),
    /// It has been dialled.
    Made,
    /// There is none yet: somebody else dials, or it is not the time to.
    Missing,
}

/// What the migrations on a link ask of it, each by its own measure of the path.
#[derive(Debug, Default)]
struct Asks(HashMap<MigrationId, (Instant, ByteRate)>);

/// A question that has been asked, until this is dropped.
type Asked = JoinSet<Result<Reply, ChannelError>>;

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

    /// What it answers to a peer that connects: VMs come from there, and their dictionary spills to the disk here, so that no more of it is
    /// agreed on than there is room for now.
    pub(crate) async fn answer(&self) -> Hello {
        let dir = self.config.state_dir.clone();
        let room = tokio::task::spawn_blocking(move || spill::pages_with_room(&dir)).await;
        // A disk that does not answer is none. So many pages stay in memory in any case.
        let pages = room.map_or(0, |room| room.unwrap_or_default()).max(LEAST_PAGES);
        let mut hello = self.hello.clone();
        let most = &mut hello.limits.dictionary_pages;
        *most = u32::try_from(pages).unwrap_or(u32::MAX).min(*most);
        hello
    }

    /// The link to `peer`: the one there is, or a new one.
    ///
    /// # Errors
    /// [`LinkError`], with what to do.
    pub(crate) async fn link(&self, peer: &str) -> Result<Arc<Link>, LinkError> {
        self.link_if(peer, |_| true).await
    }

    /// The same for a migration that begins: what is agreed on it holds now, unless others use it.
    ///
    /// # Errors
    /// [`LinkError`], with what to do.
    pub(crate) async fn fresh_link(&self, peer: &str) -> Result<Arc<Link>, LinkError> {
        let now = clock::now();
        self.link_if(peer, |link| {
            // One is the slot's own.
            Arc::strong_count(link) > 1 || link.standing.age(now) < AGREED
        })
        .await
    }

    async fn link_if(&self, peer: &str, is_fit: impl Fn(&Arc<Link>) -> bool) -> Result<Arc<Link>, LinkError> {
        let slot = Arc::clone(self.links.lock().await.entry(peer.to_owned()).or_default());
        let mut slot = slot.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.is_alive() && is_fit(link)) {
            return Ok(Arc::clone(link));
        }
        let link = Arc::new(self.dial(peer, Way::Any).await?);
        *slot = Some(Arc::clone(&link));
        Ok(link)
    }

    /// Paired peers of which it is known where they are.
    pub(crate) fn peers_with_address(&self) -> BTreeSet<String> {
        let trusted = self.trust.peers().into_iter();
        let with_address = trusted.filter(|(name, peer)| {
            let configured = self.config.peer(name);
            peer.address.is_some()
                || configured.is_some_and(|peer| peer.address.is_some() || peer.second_address.is_some())
        });
        with_address.map(|(name, _)| name).collect()
    }

    /// Sees to a link on which migrations can begin at once: dials where there is none and it may, and says hello again where the last time is
    /// `old`. Leaves links alone that somebody uses.
    ///
    /// # Errors
    /// [`LinkError`], with what to do.
    pub(crate) async fn keep(&self, peer: &str, old: Duration, may_dial: bool) -> Result<Kept, LinkError> {
        let slot = Arc::clone(self.links.lock().await.entry(peer.to_owned()).or_default());
        let Ok(mut slot) = slot.try_lock() else {
            return Ok(Kept::Missing);
        };
        let now = clock::now();
        if let Some(link) = slot.as_ref().filter(|link| link.is_alive()) {
            let ready = Kept::Ready(now.saturating_duration_since(link.made));
            // One is the slot's own. A failure would cut the sessions on it.
            if Arc::strong_count(link) > 1 {
                return Ok(ready);
            }
            if link.should_try_first(now) {
                let head_start = self.head_start(peer);
                if let Ok(Ok(first)) = tokio::time::timeout(head_start, self.dial(peer, Way::First)).await {
                    *slot = Some(Arc::new(first));
                    return Ok(Kept::Made);
                }
                return Ok(ready);
            }
            if link.standing.age(now) >= old && link.agreement().version >= hello::HELLO_AGAIN {
                let link = Arc::clone(link);
                drop(slot);
                self.agree_again(peer, &link).await?;
            }
            return Ok(ready);
        }
        if !may_dial {
            return Ok(Kept::Missing);
        }
        let patience = self.patience(peer);
        let dialled = tokio::time::timeout(patience, self.dial(peer, Way::Any)).await;
        *slot = Some(Arc::new(dialled.map_err(|_| LinkError::silent(peer, patience))??));
        Ok(Kept::Made)
    }

    async fn agree_again(&self, peer: &str, link: &Link) -> Result<(), LinkError> {
        let Some(_renewing) = link.standing.renew() else {
            return Ok(());
        };
        let hello = Request::Hello(self.hello.clone());
        let patience = self.patience(peer);
        let reply = tokio::time::timeout(patience, Channel::ask(link.control(), &hello)).await;
        let agreed = reply.map_err(|_| LinkError::silent(peer, patience)).and_then(|reply| {
            let (theirs, agreement) = self.agreed(peer, reply)?;
            if theirs.journal != link.peer.journal || agreement.version != link.agreement().version {
                return Err(LinkError::Refused {
                    peer: peer.to_owned(),
                    reason: "it says to be another gateway now".to_owned(),
                });
            }
            Ok(agreement)
        });
        match agreed {
            Ok(agreement) => {
                link.standing.set(agreement, clock::now());
                Ok(())
            }
            // The peer may go by another agreement now. Who waits for this one finds the link closed.
            Err(error) => {
                link.close_broken(&error.to_string());
                Err(error)
            }
        }
    }

    /// What follows from a peer's answer to a hello.
    fn agreed(&self, peer: &str, reply: Result<Reply, ChannelError>) -> Result<(Hello, Agreement), LinkError> {
        let name = || peer.to_owned();
        let hello = match reply.map_err(|source| LinkError::Channel { peer: name(), source })? {
            Reply::Hello(hello) => hello,
            Reply::Refused(reason) => return Err(LinkError::Refused { peer: name(), reason }),
            _ => {
                let source = ChannelError::Closed;
                return Err(LinkError::Channel { peer: name(), source });
            }
        };
        let agreement = self.hello.agree(&hello);
        let agreement = agreement.map_err(|source| LinkError::Hello { peer: name(), source })?;
        Ok((hello, agreement))
    }

    /// Time for which bulk waited since this was last asked, because the capacity of its link was used up. A link that is being
    /// dialled is asked the next time.
    pub(crate) async fn take_waited(&self) -> Duration {
        let slots: Vec<Arc<Slot>> = self.links.lock().await.values().cloned().collect();
        let waited = |slot: &Arc<Slot>| Some(slot.try_lock().ok()?.as_ref()?.turns.limit().take_waited());
        slots.iter().filter_map(waited).sum()
    }

    /// How long to wait for a link and one answer on it: eight trips there and back, with time for a lost packet.
    pub(crate) fn patience(&self, peer: &str) -> Duration {
        Duration::from_secs(2) + self.configured_rtt(peer) * 8
    }

    /// How long it takes at most to reach a peer by its second way, where it has one.
    pub(crate) fn second_way(&self, peer: &str) -> Option<Duration> {
        let configured = self.config.peer(peer)?;
        configured.second_address.as_ref().map(|_| self.patience(peer))
    }

    /// How long an address may take to answer before another is called.
    fn head_start(&self, peer: &str) -> Duration {
        self.configured_rtt(peer) * 3 + HEAD_START
    }

    /// The round trip time to a peer as it is configured.
    pub(crate) fn configured_rtt(&self, peer: &str) -> Duration {
        let peer = self.config.peer(peer);
        peer.and_then(|peer| peer.rtt).unwrap_or(self.config.link.rtt)
    }

    async fn dial(&self, peer: &str, way: Way) -> Result<Link, LinkError> {
        let attempt = async {
            let (link, mut hello, by_second) = self.dial_by(peer, way).await?;
            let reply = hello.join_next().await.expect("one question was asked");
            let reply = reply.expect("asking is not aborted and does not panic");
            Ok((link, by_second, self.agreed(peer, reply)?))
        };
        let (link, by_second, (hello, agreement)) = tokio::time::timeout(HELLO_DEADLINE, attempt)
            .await
            .map_err(|_| LinkError::silent(peer, HELLO_DEADLINE))??;
        tracing::info!(
            peer,
            site = hello.site,
            software = hello.software,
            version = agreement.version,
            bulk_connections = link.bulk.len(),
            "linked"
        );
        let turns = Turns::new(Shaper::new(admitted(link.goodput())));
        Ok(Link {
            link,
            peer: hello,
            standing: Standing::new(agreement, clock::now()),
            turns,
            asks: std::sync::Mutex::default(),
            made: clock::now(),
            first_tried: by_second.then(|| std::sync::Mutex::new(clock::now())),
        })
    }

    /// Calls the peer at its first address, and where that does not answer, at its second; and says hello. One at a time: lanes are taken
    /// from one link of a peer, and the later of two would end the earlier. Whether it was the second comes last.
    async fn dial_by(&self, peer: &str, way: Way) -> Result<(PeerLink, Asked, bool), LinkError> {
        let name = || peer.to_owned();
        let configured = self.config.peer(peer);
        let trusted = self.trust.get(peer).ok_or_else(|| match configured {
            Some(_) => LinkError::NotPaired { peer: name() },
            None => LinkError::Unknown { peer: name() },
        })?;
        let first = configured.and_then(|peer| peer.address.clone()).or(trusted.address);
        let second = configured.and_then(|peer| peer.second_address.clone());
        let dial = async |address: &PeerAddress, is_second: bool| {
            let control_address = resolve_address(address)
                .await
                .map_err(|reason| LinkError::NoSuchHost { peer: name(), reason })?;
            let target = PeerTarget {
                name: name(),
                control_address,
                bulk_address: None,
                fingerprint: trusted.fingerprint,
                rate: configured.and_then(|peer| peer.rate).or(self.config.link.rate),
                rate_now: self.config.peer_rate_at(peer, clock::timestamp()),
                rtt: self.configured_rtt(peer),
                bulk_connections: configured.and_then(|peer| peer.bulk_connections),
            };
            // What it takes to answer is no part of reaching the peer.
            let hello = |control: &PeerConnection| {
                let (control, hello) = (control.clone(), Request::Hello(self.hello.clone()));
                let mut asked = Asked::new();
                asked.spawn(async move { Channel::ask(&control, &hello).await });
                asked
            };
            let dialled = self.transport.dial_and(&target, hello).await;
            let (link, hello) = dialled.map_err(|source| LinkError::Dial {
                peer: name(),
                source: Box::new(source),
            })?;
            Ok((link, hello, is_second))
        };
        let (first, second) = match (first, second) {
            (Some(first), Some(_)) if way == Way::First => return dial(&first, false).await,
            (Some(first), Some(second)) => (first, second),
            (Some(only), None) | (None, Some(only)) => return dial(&only, false).await,
            (None, None) => return Err(LinkError::NoAddress { peer: name() }),
        };
        let head_start = self.head_start(peer);
        if let Ok(Ok(link)) = tokio::time::timeout(head_start, dial(&first, false)).await {
            return Ok(link);
        }
        tracing::info!(peer, %second, "the first address does not answer: calling the second");
        let by_second = match tokio::time::timeout(head_start, dial(&second, true)).await {
            Ok(Ok(link)) => return Ok(link),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("{second} did not answer within {head_start:?}"),
        };
        // It may only be slow.
        dial(&first, false).await.map_err(|by_first| LinkError::NoAnswer {
            first: by_first.to_string(),
            second: by_second,
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
        self.agreement().version >= hello::REPAIRS && self.rtt() >= PROTECTED_RTT
    }

    /// For lanes.
    pub(crate) fn bulk(&self) -> &Bulk {
        &self.link.bulk
    }

    /// What both sides speak and hold.
    pub(crate) fn agreement(&self) -> Agreement {
        self.standing.agreement()
    }

    /// Keeps the agreement as it is: for whoever opens a session by it, until the peer has answered.
    pub(crate) async fn hold_agreement(&self) -> Held {
        self.standing.hold().await
    }

    /// The journal behind the peer.
    pub(crate) fn peer_journal(&self) -> JournalId {
        self.peer.journal
    }

    /// Whose turn it is among all that send to this peer.
    pub(crate) fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// Smoothed RTT, as the control connection measured it.
    pub(crate) fn rtt(&self) -> Duration {
        self.link.control.rtt()
    }

    /// Stream bytes per second that the path carries, where a capacity is configured; keeps the admission at it.
    pub(crate) fn goodput(&self) -> Option<ByteRate> {
        let goodput = self.link.goodput();
        self.turns.limit().set_rate(admitted(goodput));
        goodput
    }

    /// Bytes of IP and UDP headers of a packet to the peer.
    pub(crate) fn header_bytes(&self) -> u64 {
        self.link.bulk.header_bytes()
    }

    /// Capacity that holds now, as configured, headers included.
    pub(crate) fn capacity(&self) -> Option<ByteRate> {
        self.link.capacity()
    }

    /// A migration would fill this rate. What QUIC holds of lanes, sent or not, follows from all that are on the link: beyond the
    /// path's own needs it is a queue that nothing overtakes. A promise that the path does not keep makes it no longer, since migrations
    /// ask for what they measure.
    pub(crate) fn ask(&self, now: Instant, migration: MigrationId, rate: ByteRate) {
        let asked = self
            .asks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .total(now, migration, rate);
        if let Some(goodput) = self.goodput() {
            let bulk = &self.link.bulk;
            let bdp = asked.min(goodput).bytes_in(self.rtt() + QUEUED_IN_QUIC);
            let connections = bulk.len() as u64;
            let share = (bdp + bdp / 2) / connections;
            let in_repair = (LANES_IN_REPAIR / connections).max(1 << 20);
            for connection in &**bulk {
                connection.bound_held(share.saturating_add(in_repair));
            }
        }
    }

    /// Stream bytes that have left on lanes since the link was made.
    pub(crate) fn bulk_left(&self) -> u64 {
        self.link.bulk.stream_bytes_sent()
    }

    /// IP bytes in both directions since the link was made.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.link.stats().wire_bytes()
    }

    /// Whether it was made over the second address, and the first may be back. Not again before a while has passed.
    fn should_try_first(&self, now: Instant) -> bool {
        let Some(tried) = &self.first_tried else { return false };
        let mut tried = tried.lock().unwrap_or_else(PoisonError::into_inner);
        let due = now.saturating_duration_since(*tried) >= BACK_TO_FIRST;
        if due {
            *tried = now;
        }
        due
    }

    /// Whether all of its connections are up.
    pub(crate) fn is_alive(&self) -> bool {
        self.link.control.close_reason().is_none() && self.link.bulk.is_whole()
    }

    /// One connection broke: the others are of no use without it, and whoever waits on it must notice.
    pub(crate) fn close_broken(&self, reason: &str) {
        tracing::debug!("a link is given up: {reason}");
        self.link
            .close(CloseCode::Replaced, "another connection of the link is lost");
    }
}

impl Asks {
    fn total(&mut self, now: Instant, migration: MigrationId, rate: ByteRate) -> ByteRate {
        self.0.insert(migration, (now, rate));
        self.0.retain(|_, (at, _)| now.saturating_duration_since(*at) < ASKED);
        ByteRate(self.0.values().fold(0, |sum, (_, rate)| sum.saturating_add(rate.0)))
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
        source: Box<DialError>,
    },
    /// Neither address.
    #[error("{first}; and at its second address: {second}")]
    NoAnswer {
        /// What came of the first address.
        first: String,
        /// What came of the second.
        second: String,
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

impl LinkError {
    fn silent(peer: &str, waited: Duration) -> Self {
        Self::Silent {
            peer: peer.to_owned(),
            seconds: waited.as_secs(),
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_asked_for_the_sum_of_what_its_migrations_want_and_forgets_those_that_ended() {
        let start = Instant::now();
        let mut asks = Asks::default();
        let [one, two] = [MigrationId([1; 16]), MigrationId([2; 16])];
        assert_eq!(asks.total(start, one, ByteRate(100)), ByteRate(100));
        assert_eq!(asks.total(start, two, ByteRate(10)), ByteRate(110));
        assert_eq!(asks.total(start, one, ByteRate(90)), ByteRate(100));
        let later = start + ASKED;
        assert_eq!(asks.total(later, two, ByteRate(10)), ByteRate(10));
        assert_eq!(asks.total(later, one, ByteRate(u64::MAX)), ByteRate(u64::MAX));
    }
}
