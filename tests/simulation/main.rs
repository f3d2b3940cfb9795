//! Two sites' transports over a simulated link, in virtual time: a minute of 150 ms takes seconds. Seeds are in the messages.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests read the clock, show what they measured, and fail by panicking"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use longhaul::proto::page::ByteRate;
use longhaul::transport::tuning::STREAM_OVERHEAD;
use longhaul::transport::{PeerLink, PeerTarget, TransportSettings};
use longhaul::wan::{ETHERNET_OVERHEAD, LinkSettings, Loss, Ordinals, Probability};
use tokio::time::Instant;

use bulk::Bulk;
use link::{SITES, SimulatedLink, SiteNetwork};
use transport_site::{Site, accept_link};

mod bulk;
mod capacity;
mod cross_traffic;
mod ecn;
mod link;
mod mtu;
mod pacing;
mod paths;
mod probe;
mod roaming;
mod several;
mod shares;
#[path = "../transport_site/mod.rs"]
mod transport_site;

const RTT: Duration = Duration::from_millis(150);
const SEED: u64 = 20_261_127;

fn mbit(value: u64) -> ByteRate {
    ByteRate::from_bits_per_second(value * 1_000_000)
}

/// 150 ms, a queue of 50 ms, independent loss in both directions.
fn link_of(rate: ByteRate, loss_percent: f64) -> LinkSettings {
    LinkSettings {
        one_way_delay: RTT / 2,
        rate,
        queue_bytes: rate.bytes_in(Duration::from_millis(50)),
        overhead_bytes: ETHERNET_OVERHEAD,
        mtu_bytes: 1500,
        loss: if loss_percent > 0.0 {
            Loss::Bernoulli(Probability::new(loss_percent / 100.0).unwrap())
        } else {
            Loss::None
        },
        lost: Ordinals::default(),
        jitter: None,
        reordering: None,
        duplication: Probability::NEVER,
    }
}

fn site(link: &Arc<SimulatedLink>, number: usize) -> Site {
    site_with(link, number, SystemTime::now(), |_| {})
}

/// A site that others on the same link do not meet.
fn site_at(link: &Arc<SimulatedLink>, number: usize, port: u16) -> Site {
    site_with(link, number, SystemTime::now(), |settings| {
        settings.control_address.set_port(port);
    })
}

fn site_with(
    link: &Arc<SimulatedLink>,
    number: usize,
    created: SystemTime,
    change: impl FnOnce(&mut TransportSettings),
) -> Site {
    let mut settings = TransportSettings::new(SocketAddr::new(SITES[number], 7000));
    change(&mut settings);
    Site::on(Arc::new(SiteNetwork(link.clone())), created, settings)
}

/// A link with a site at each end, and connections between them that begin now.
struct Connected {
    link: Arc<SimulatedLink>,
    sites: [Site; 2],
    from: PeerLink,
    to: PeerLink,
    since: Instant,
}

impl Connected {
    /// Over a link like this one, of which the sender believes that it has this capacity, or knows none.
    async fn over(settings: LinkSettings, believed: impl Into<Option<ByteRate>>) -> Self {
        let rtt = settings.one_way_delay * 2;
        Self::beside(SimulatedLink::new(settings, SEED), 7000, believed, rtt).await
    }

    /// The same over a link that others may use too, by other ports.
    async fn beside(link: Arc<SimulatedLink>, port: u16, believed: impl Into<Option<ByteRate>>, rtt: Duration) -> Self {
        let sites = [site_at(&link, 0, port), site_at(&link, 1, port)];
        Self::between(link, sites, believed.into(), rtt).await
    }

    /// Between these sites, of which the first dials.
    async fn between(link: Arc<SimulatedLink>, sites: [Site; 2], believed: Option<ByteRate>, rtt: Duration) -> Self {
        Self::over_several(link, sites, believed, rtt, 1).await
    }

    /// The same with so many bulk connections.
    async fn over_several(
        link: Arc<SimulatedLink>,
        sites: [Site; 2],
        believed: Option<ByteRate>,
        rtt: Duration,
        bulk_connections: u8,
    ) -> Self {
        sites[0].trusts(&sites[1], "b");
        sites[1].trusts(&sites[0], "a");
        let (from, to) = dial(&sites, believed, rtt, bulk_connections).await;
        Self {
            link,
            sites,
            from,
            to,
            since: Instant::now(),
        }
    }

    /// Sends what does not compress, as fast as it goes, from now on.
    fn send_bulk(&self) -> Bulk {
        Bulk::start(&self.from.bulk, &self.to.bulk)
    }

    /// Bytes that wait at the sender's bottleneck at most, in this time from now on.
    async fn longest_queue(&self, time: Duration) -> u64 {
        let end = Instant::now() + time;
        let mut longest = 0;
        while Instant::now() < end {
            longest = longest.max(self.link.queued(0));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        longest
    }

    /// The 99th percentile of how long small messages take one way on control, which are sent for so long from now on.
    async fn control_delay(&self, time: Duration) -> Duration {
        let (from, to) = (&self.from.control, &self.to.control);
        let (begin, spacing) = (Instant::now(), Duration::from_millis(7));
        let messages = (time.as_nanos() / spacing.as_nanos()) as u32;
        let send = async {
            let (mut stream, _answers) = from.open_bi().await.unwrap();
            for number in 0..messages {
                tokio::time::sleep_until(begin + spacing * number).await;
                stream.write_all(&[0; 64]).await.unwrap();
            }
            stream.finish().unwrap();
            stream
        };
        let receive = async {
            let (_answers, mut stream) = to.accept_bi().await.unwrap();
            let mut times = Vec::new();
            let mut message = [0; 64];
            for number in 0..messages {
                stream.read_exact(&mut message).await.unwrap();
                times.push(begin.elapsed().saturating_sub(spacing * number));
            }
            times.sort_unstable();
            times
        };
        let both = async { tokio::join!(send, receive) };
        let (_stream, times) = tokio::time::timeout(10 * time, both).await.expect("control is served");
        let p99 = times[times.len() * 99 / 100];
        eprintln!("control one way: p50 {:?}, p99 {p99:?}", times[times.len() / 2]);
        p99
    }
}

/// A link from the first site to the second, as both see it.
async fn dial(
    sites: &[Site; 2],
    believed: Option<ByteRate>,
    rtt: Duration,
    bulk_connections: u8,
) -> (PeerLink, PeerLink) {
    let target = PeerTarget {
        bulk_connections: Some(bulk_connections),
        ..sites[1].as_target("b", believed, rtt)
    };
    let accept = accept_link(&sites[1].transport, bulk_connections);
    let (from, to) = tokio::join!(sites[0].transport.dial(&target), accept);
    (from.unwrap(), to)
}

/// Stream bytes in a full IPv4 packet, of what it takes of a link that carries packets of `mtu_bytes`.
fn payload_efficiency(mtu_bytes: u32) -> f64 {
    let payload = u64::from(mtu_bytes - 28) - STREAM_OVERHEAD;
    payload as f64 / f64::from(mtu_bytes + ETHERNET_OVERHEAD)
}

/// Stream bytes that a link can carry in this time.
fn achievable(settings: &LinkSettings, time: Duration) -> f64 {
    settings.rate.bytes_in(time) as f64 * (1.0 - settings.loss.mean()) * payload_efficiency(settings.mtu_bytes)
}
