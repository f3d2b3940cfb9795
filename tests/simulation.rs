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

use simulated_link::{SITES, SimulatedLink, SiteNetwork};
use transport_site::Site;

mod simulated_link;
mod transport_site;

const RTT: Duration = Duration::from_millis(150);
const SEED: u64 = 20_261_127;

/// In percent, and the share of what is achievable that must arrive.
const LOSSES: [(f64, f64); 5] = [(0.0, 0.98), (0.01, 0.98), (0.1, 0.98), (1.0, 0.98), (2.0, 0.95)];

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
    let settings = TransportSettings::new(SocketAddr::new(SITES[number], 7000));
    Site::on(Arc::new(SiteNetwork(link.clone())), SystemTime::now(), settings)
}

/// A link with a site at each end, and connections between them that begin now.
struct Connected {
    link: Arc<SimulatedLink>,
    _sites: [Site; 2],
    from: PeerLink,
    to: PeerLink,
    since: Instant,
    /// Stream bytes that have arrived, and when.
    arrived: Arc<Mutex<Vec<(Instant, u64)>>>,
}

impl Connected {
    /// Over a link like this one, of which the sender believes that it has this capacity.
    async fn over(settings: LinkSettings, believed: ByteRate) -> Self {
        let link = SimulatedLink::new(settings, SEED);
        let sites = [site(&link, 0), site(&link, 1)];
        sites[0].trusts(&sites[1], "b");
        sites[1].trusts(&sites[0], "a");
        let target = sites[1].as_target("b", Some(believed), RTT);
        let accept = async {
            let accepts = || async { sites[1].transport.accept().await.unwrap() };
            transport_site::link_of(accepts().await, accepts().await)
        };
        let (from, to) = tokio::join!(sites[0].transport.dial(&target), accept);
        Self {
            link,
            _sites: sites,
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

/// The share of what the link can carry at most that arrives, from the completed handshake on.
async fn share_of_achievable(rate: ByteRate, loss_percent: f64, time: Duration) -> f64 {
    let connected = Connected::over(link_of(rate, loss_percent), rate).await;
    connected.send_bulk();
    tokio::time::sleep(time).await;
    let achievable = rate.bytes_in(time) as f64 * (1.0 - loss_percent / 100.0) * payload_efficiency();
    let share = connected.arrived_between(Duration::ZERO, time) as f64 / achievable;
    eprintln!("{rate} {loss_percent} % loss, {time:?}, seed {SEED}: {share:.4} of what the link carries");
    share
}

#[tokio::test(start_paused = true)]
async fn a_slow_lossy_ocean_is_filled_whatever_the_loss() {
    for (loss_percent, least) in LOSSES {
        let share = share_of_achievable(mbit(100), loss_percent, Duration::from_secs(10)).await;
        assert!(share >= least, "{loss_percent} % loss: {share}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_gigabit_of_lossy_ocean_is_filled_too() {
    for loss_percent in [0.0, 1.0] {
        let share = share_of_achievable(mbit(1000), loss_percent, Duration::from_secs(8)).await;
        assert!(share >= 0.98, "{loss_percent} % loss: {share}");
    }
}

#[tokio::test(start_paused = true)]
#[ignore = "a minute of each cell, some five minutes in all"]
async fn every_cell_of_the_matrix_is_filled_for_a_minute() {
    for rate in [mbit(100), mbit(1000)] {
        for (loss_percent, least) in LOSSES {
            let share = share_of_achievable(rate, loss_percent, Duration::from_secs(60)).await;
            assert!(share >= least, "{rate}, {loss_percent} % loss: {share}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_rate_is_there_one_round_trip_after_the_connection() {
    let rate = mbit(100);
    let connected = Connected::over(link_of(rate, 0.0), rate).await;
    connected.send_bulk();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let window = Duration::from_millis(50);
    let full = 0.9 * rate.bytes_in(window) as f64 * payload_efficiency();
    let first = (0..900)
        .map(Duration::from_millis)
        .find(|begin| connected.arrived_between(*begin, *begin + window) as f64 >= full);
    eprintln!("90 % of the rate from {first:?} on");
    assert!(first.is_some_and(|first| first <= RTT), "{first:?}");
}

#[tokio::test(start_paused = true)]
async fn half_the_capacity_that_was_promised_is_found_and_used() {
    let real = mbit(50);
    let connected = Connected::over(link_of(real, 0.0), mbit(100)).await;
    connected.send_bulk();
    let (begin, end) = (Duration::from_secs(5), Duration::from_secs(25));
    tokio::time::sleep(end).await;
    let sent: u64 = connected
        .link
        .offered(0)
        .iter()
        .filter(|(at, _)| (connected.since + begin..connected.since + end).contains(&Instant::from_std(*at)))
        .map(|(_, bytes)| bytes)
        .sum();
    let delivered = connected.arrived_between(begin, end) as f64 / payload_efficiency();
    let used = delivered / real.bytes_in(end - begin) as f64;
    eprintln!(
        "{:.3} sent for each delivered, {used:.3} of the link used",
        sent as f64 / delivered
    );
    assert!(sent as f64 <= 1.2 * delivered);
    assert!(used >= 0.9, "{used}");
}

#[tokio::test(start_paused = true)]
async fn no_tenth_of_a_second_carries_more_than_the_cap() {
    let cap = mbit(50);
    let connected = Connected::over(link_of(mbit(100), 1.0), cap).await;
    connected.send_bulk();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let offered = connected.link.offered(0);
    let window = Duration::from_millis(100);
    let (mut first, mut sum, mut most) = (0, 0, 0);
    for (at, bytes) in &offered {
        sum += bytes;
        while offered[first].0 + window <= *at {
            sum -= offered[first].1;
            first += 1;
        }
        most = most.max(sum);
    }
    let share = most as f64 / cap.bytes_in(window) as f64;
    eprintln!("{share:.4} of the cap in the fullest 100 ms");
    assert!(share <= 1.02, "{share}");
}

#[tokio::test(start_paused = true)]
async fn control_is_not_behind_bulk() {
    const MESSAGES: u64 = 1000;
    let rate = mbit(100);
    let connected = Connected::over(link_of(rate, 0.0), rate).await;
    connected.send_bulk();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (from, to) = (connected.from.control.clone(), connected.to.control.clone());
    let begin = Instant::now();
    let spacing = Duration::from_millis(7);
    let send = async {
        let mut stream = from.open_uni().await.unwrap();
        for number in 0..MESSAGES as u32 {
            tokio::time::sleep_until(begin + spacing * number).await;
            stream.write_all(&[0; 64]).await.unwrap();
        }
        stream.finish().unwrap();
        stream
    };
    let receive = async {
        let mut stream = to.accept_uni().await.unwrap();
        let mut times = Vec::new();
        let mut message = [0; 64];
        for number in 0..MESSAGES as u32 {
            stream.read_exact(&mut message).await.unwrap();
            times.push(begin.elapsed().saturating_sub(spacing * number));
        }
        times.sort_unstable();
        times
    };
    let (_stream, times) = tokio::join!(send, receive);
    let p99 = times[times.len() * 99 / 100];
    eprintln!("control one way: p50 {:?}, p99 {p99:?}", times[times.len() / 2]);
    assert!(p99 <= RTT / 2 + Duration::from_millis(10), "{p99:?}");
}
