//! Two sites' transports over a simulated link, in virtual time: a minute of 150 ms takes seconds. Seeds are in the messages.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests read the clock, show what they measured, and fail by panicking"
)]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use longhaul::proto::page::ByteRate;
use longhaul::transport::tuning::{LANE_BYTES, LINK_BYTES_PER_PACKET, MAX_UDP_PAYLOAD, STREAM_OVERHEAD};
use longhaul::transport::{PeerLink, TransportSettings, next_chunk, send_lane};
use longhaul::wan::{ETHERNET_OVERHEAD, LinkSettings, Loss, Ordinals, Probability};
use tokio::time::Instant;

use link::{SITES, SimulatedLink, SiteNetwork};
use transport_site::Site;

mod capacity;
mod cross_traffic;
mod ecn;
mod link;
mod probe;
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

fn site(link: &Arc<SimulatedLink>, number: usize, port: u16) -> Site {
    let settings = TransportSettings::new(SocketAddr::new(SITES[number], port));
    Site::on(Arc::new(SiteNetwork(link.clone())), SystemTime::now(), settings)
}

/// A link with a site at each end, and connections between them that begin now.
struct Connected {
    link: Arc<SimulatedLink>,
    sites: [Site; 2],
    from: PeerLink,
    to: PeerLink,
    since: Instant,
    /// Stream bytes that have arrived, and when.
    arrived: Arc<Mutex<Vec<(Instant, u64)>>>,
}

impl Connected {
    /// Over a link like this one, of which the sender believes that it has this capacity, or knows none.
    async fn over(settings: LinkSettings, believed: impl Into<Option<ByteRate>>) -> Self {
        let rtt = settings.one_way_delay * 2;
        Self::beside(SimulatedLink::new(settings, SEED), 7000, believed.into(), rtt).await
    }

    /// The same over a link that others may use too, by other ports.
    async fn beside(link: Arc<SimulatedLink>, port: u16, believed: Option<ByteRate>, rtt: Duration) -> Self {
        let sites = [site(&link, 0, port), site(&link, 1, port)];
        sites[0].trusts(&sites[1], "b");
        sites[1].trusts(&sites[0], "a");
        let target = sites[1].as_target("b", believed, rtt);
        let accept = async {
            let accepts = || async { sites[1].transport.accept().await.unwrap() };
            transport_site::link_of(accepts().await, accepts().await)
        };
        let (from, to) = tokio::join!(sites[0].transport.dial(&target), accept);
        Self {
            link,
            sites,
            from: from.unwrap(),
            to,
            since: Instant::now(),
            arrived: Arc::default(),
        }
    }

    /// Sends what does not compress, as fast as it goes, from now on.
    fn send_bulk(&self) {
        let mut content = vec![0; LANE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        let (content, bulk) = (Bytes::from(content), self.from.bulk.clone());
        tokio::spawn(async move { while send_lane(&bulk, &mut [content.clone()]).await.is_ok() {} });
        let (bulk, arrived) = (self.to.bulk.clone(), self.arrived.clone());
        tokio::spawn(async move {
            while let Ok(mut lane) = bulk.accept_uni().await {
                let arrived = arrived.clone();
                tokio::spawn(async move {
                    while let Ok(Some((_, chunk))) = next_chunk(&mut lane, LANE_BYTES).await {
                        arrived.lock().unwrap().push((Instant::now(), chunk.len() as u64));
                    }
                });
            }
        });
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

    /// Stream bytes that have arrived in this time since the connections exist.
    fn arrived_between(&self, begin: Duration, end: Duration) -> u64 {
        let window = self.since + begin..self.since + end;
        let arrived = self.arrived.lock().unwrap();
        arrived
            .iter()
            .filter(|(at, _)| window.contains(at))
            .map(|(_, bytes)| bytes)
            .sum()
    }
}

/// Stream bytes in a full packet, of what it takes of the link.
fn payload_efficiency() -> f64 {
    (u64::from(MAX_UDP_PAYLOAD) - STREAM_OVERHEAD) as f64 / LINK_BYTES_PER_PACKET as f64
}
