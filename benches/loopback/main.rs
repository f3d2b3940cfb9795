//! Goodput of a link: lanes of incompressible bytes from one transport to another.
//!
//! ```text
//! cargo bench --bench loopback                                  both ends here, over loopback, by criterion
//! cargo bench --bench loopback -- compare [ROUNDS]              beside one stream of stock quinn and TCP with TLS, in turn
//! cargo bench --bench loopback -- serve DIR ADDRESS             the destination, for as long as it runs
//! cargo bench --bench loopback -- send DIR ADDRESS RATE RTT_MS SECONDS [LANE_KIB]
//!                                                               the source; RATE as in 1gbit, or - for none
//! ```
//!
//! `serve` and `send` stand at the two ends of a real or emulated link, in network namespaces for example. DIR holds both ends'
//! identities, so it must be the same. `serve` prints one JSON object for each connection: what arrived in each quarter of
//! a second, in Mbit/s of lane bytes, the mean from the first lane to the end of the last full quarter, and the mean without the first
//! second, in which lanes wait for their repairs. `send` prints what left in each tenth of a second, in Mbit/s at IP level.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a measuring tool reads the clock, and fails by panicking"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use criterion::{Criterion, Throughput};
use longhaul::proto::page::ByteRate;
use longhaul::proto::session::connection_of;
use longhaul::transport::tuning::LANE_BYTES;
use longhaul::transport::{
    ConnectionKind, Identity, PeerConnection, PeerLink, PeerTarget, Transport, TransportSettings, TrustAnchors,
    read_lane, send_lane,
};

#[path = "../../tests/common/anyone.rs"]
mod anyone;
mod raw;

fn main() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    match arguments[..] {
        ["compare"] => compare(&runtime, 10),
        ["compare", rounds] => compare(&runtime, rounds.parse().unwrap()),
        ["serve", dir, address] => runtime.block_on(serve(dir.as_ref(), address.parse().unwrap())),
        ["send", dir, address, rate, rtt, seconds] => {
            runtime.block_on(send(
                dir.as_ref(),
                address.parse().unwrap(),
                rate,
                rtt,
                seconds,
                LANE_BYTES / 1024,
            ));
        }
        ["send", dir, address, rate, rtt, seconds, lane] => {
            runtime.block_on(send(
                dir.as_ref(),
                address.parse().unwrap(),
                rate,
                rtt,
                seconds,
                lane.parse().unwrap(),
            ));
        }
        _ => {
            let mut criterion = Criterion::default().configure_from_args().sample_size(10);
            loopback(&mut criterion, &runtime);
            criterion.final_summary();
        }
    }
}

/// Both ends in one process, without a configured capacity and with one far above what loopback carries.
fn loopback(criterion: &mut Criterion, runtime: &tokio::runtime::Runtime) {
    const LANES: u64 = 64;
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let mut group = criterion.benchmark_group("loopback");
    group.throughput(Throughput::Bytes(LANES * LANE_BYTES as u64));
    for (name, rate) in [
        ("probe", None),
        ("capacity", Some(ByteRate::from_bits_per_second(20_000_000_000))),
    ] {
        let (source, destination) =
            runtime.block_on(async { (site(dir.path(), true, any), site(dir.path(), false, any)) });
        let target = target(
            dir.path(),
            destination.control_address(),
            Some(destination.bulk_address()),
            rate,
            Duration::from_millis(1),
            1,
        );
        let (link, arriving) = runtime.block_on(async {
            let (link, arriving) = tokio::join!(source.dial(&target), accept_link(&destination, 1));
            (link.unwrap(), arriving)
        });
        let data = content(LANE_BYTES);
        group.bench_function(name, |bencher| {
            bencher.iter(|| runtime.block_on(transfer(&link, &arriving.bulk, &data, LANES)));
        });
    }
    group.finish();
}

/// Each moves the same bytes in turn, several times; the medians, and what they are of stock quinn's. One connection each, where nothing is said.
fn compare(runtime: &tokio::runtime::Runtime, rounds: usize) {
    // As many for each of three connections, and for each of two.
    const LANES: u64 = 480;
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let data = content(LANE_BYTES);
    let linked = |(rate, connections): (Option<u64>, u8)| {
        let (source, destination) =
            runtime.block_on(async { (site(dir.path(), true, any), site(dir.path(), false, any)) });
        let rate = rate.map(ByteRate::from_bits_per_second);
        let (control, bulk) = (destination.control_address(), destination.bulk_address());
        let target = target(
            dir.path(),
            control,
            Some(bulk),
            rate,
            Duration::from_millis(1),
            connections,
        );
        let (link, arriving) = runtime.block_on(async {
            let (link, arriving) = tokio::join!(source.dial(&target), accept_link(&destination, connections));
            (link.unwrap(), arriving)
        });
        (source, destination, link, arriving)
    };
    let configured = Some(20_000_000_000);
    let links = [(configured, 1), (configured, 2), (configured, 3), (None, 1)].map(linked);
    let quinn = runtime.block_on(async { raw::RawQuinn::new() });
    let (from, to) = runtime.block_on(quinn.connect());
    let names = [
        "lanes, 20 Gbit/s configured",
        "the same, two connections",
        "the same, three connections",
        "lanes, no rate configured",
        "stock quinn, one stream",
        "TCP with TLS",
    ];
    let mut times = names.map(|_| Vec::new());
    for _ in 0..rounds {
        for (lanes, times) in links.iter().zip(&mut times) {
            let began = Instant::now();
            runtime.block_on(transfer(&lanes.2, &lanes.3.bulk, &data, LANES));
            times.push(began.elapsed());
        }
        let began = Instant::now();
        runtime.block_on(raw::send_stream(&from, &to, &data, LANES));
        times[4].push(began.elapsed());
        times[5].push(raw::send_tls(&data, LANES));
    }
    let medians = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64()
    });
    for (name, seconds) in names.iter().zip(medians) {
        let gigabits = (LANES * LANE_BYTES as u64) as f64 * 8e-9 / seconds;
        println!(
            "{name:<28} {gigabits:6.2} Gbit/s   {:.2} of stock quinn",
            medians[4] / seconds
        );
    }
}

async fn transfer(link: &PeerLink, arriving: &[PeerConnection], data: &Bytes, lanes: u64) {
    let each = lanes / arriving.len() as u64;
    let receive = async {
        let mut receivers = tokio::task::JoinSet::new();
        for connection in arriving {
            let connection = connection.clone();
            receivers.spawn(async move {
                let mut readers = tokio::task::JoinSet::new();
                for _ in 0..each {
                    readers.spawn(read_lane(connection.accept_uni().await.unwrap(), LANE_BYTES));
                }
                while let Some(lane) = readers.join_next().await {
                    assert_eq!(lane.unwrap().unwrap().len(), LANE_BYTES);
                }
            });
        }
        while let Some(received) = receivers.join_next().await {
            received.unwrap();
        }
    };
    let send = async {
        for number in 0..lanes {
            let connection = &link.bulk[connection_of(number, arriving.len())];
            send_lane(connection, &mut [data.clone()]).await.unwrap();
        }
    };
    tokio::join!(receive, send);
}

/// The link that a peer opens with so many bulk connections.
async fn accept_link(transport: &Transport, bulk_connections: u8) -> PeerLink {
    let (mut control, mut bulk) = (None, Vec::new());
    for _ in 0..=bulk_connections {
        let incoming = transport.accept().await.unwrap();
        match incoming.kind {
            ConnectionKind::Bulk => bulk.push(incoming.connection),
            _ => control = Some(incoming.connection),
        }
    }
    PeerLink::new(control.unwrap(), bulk)
}

async fn serve(dir: &Path, address: SocketAddr) {
    let transport = site(dir, false, address);
    let mut controls = Vec::new();
    while let Some(incoming) = transport.accept().await {
        if incoming.kind == ConnectionKind::Bulk {
            tokio::spawn(count(incoming.connection));
        } else {
            controls.push(incoming.connection);
        }
    }
}

async fn count(bulk: PeerConnection) {
    let arrived = Arc::new(AtomicU64::new(0));
    let lanes = async {
        while let Ok(lane) = bulk.accept_uni().await {
            let arrived = arrived.clone();
            tokio::spawn(async move {
                // The source closes the connection with lanes in flight.
                if let Ok(data) = read_lane(lane, 4 * LANE_BYTES).await {
                    arrived.fetch_add(data.len() as u64, Ordering::Relaxed);
                }
            });
        }
    };
    let samples = sample(Duration::from_millis(250), || arrived.load(Ordering::Relaxed), lanes).await;
    let mean = |skip: usize| {
        let (first, last) = (samples.get(skip)?, samples.last()?);
        Some(megabits(*first, *last))
    };
    let stats = bulk.stats();
    println!(
        "{}",
        serde_json::json!({
            "goodput_mbit": mean(0), "settled_goodput_mbit": mean(4), "quarters_mbit": rates(&samples),
            "wire_bytes_received": stats.wire_bytes_received, "wire_bytes_sent": stats.wire_bytes_sent,
        })
    );
}

async fn send(dir: &Path, address: SocketAddr, rate: &str, rtt: &str, seconds: &str, lane_kib: usize) {
    let transport = site(
        dir,
        true,
        SocketAddr::new(
            if address.is_ipv4() {
                [0; 4].into()
            } else {
                [0; 16].into()
            },
            0,
        ),
    );
    let rate = (rate != "-").then(|| rate.parse().unwrap());
    let target = target(dir, address, None, rate, Duration::from_millis(rtt.parse().unwrap()), 1);
    let link = transport.dial(&target).await.unwrap();
    let data = content(lane_kib * 1024);
    let end = Instant::now() + Duration::from_secs_f64(seconds.parse().unwrap());
    let mut sent = 0_u64;
    let offering = async {
        while Instant::now() < end {
            send_lane(&link.bulk[0], &mut [data.clone()]).await.unwrap();
            sent += data.len() as u64;
        }
    };
    let wire = sample(
        Duration::from_millis(100),
        || link.bulk.stats().wire_bytes_sent,
        offering,
    )
    .await;
    let measures = link.stats().bulk;
    link.close(longhaul::transport::CloseCode::Done, "");
    transport.shutdown(longhaul::transport::CloseCode::Done, "").await;
    println!(
        "{}",
        serde_json::json!({
            "wire_mbit": rates(&wire), "offered_bytes": sent, "rtt_ms": measures.rtt.as_secs_f64() * 1e3, "least_rtt_ms": measures.least_rtt.as_secs_f64() * 1e3,
            "sent_packets": measures.sent_packets, "lost_packets": measures.lost_packets, "wire_bytes_sent": measures.wire_bytes_sent,
            "rate_mbit": measures.rate.map(|rate| rate.0 as f64 * 8e-6), "window": measures.congestion_window, "mtu": measures.mtu,
            "shaper_waits": measures.shaper_waits, "shaper_wait_s": measures.shaper_wait.as_secs_f64(), "black_holes": measures.black_holes,
        })
    );
}

type Sample = (Instant, u64);

/// What `counter` shows every `interval` while `work` goes on, without the time before it first rose and after it last did.
async fn sample(interval: Duration, counter: impl Fn() -> u64, work: impl Future<Output = ()>) -> Vec<Sample> {
    let mut samples: Vec<Sample> = Vec::new();
    let sampling = async {
        let mut ticks = tokio::time::interval(interval);
        loop {
            ticks.tick().await;
            samples.push((Instant::now(), counter()));
        }
    };
    tokio::select! { () = work => {}, () = sampling => {} }
    let (least, most) = (samples.first().map(|first| first.1), samples.last().map(|last| last.1));
    let before = samples
        .iter()
        .take_while(|sample| Some(sample.1) == least)
        .count()
        .saturating_sub(1);
    let risen = samples.iter().take_while(|sample| Some(sample.1) != most).count();
    samples.truncate(risen);
    samples.split_off(before.min(risen))
}

fn megabits(from: Sample, to: Sample) -> f64 {
    ((to.1 - from.1) as f64 * 8e-6 / (to.0 - from.0).as_secs_f64()).round()
}

fn rates(samples: &[Sample]) -> Vec<f64> {
    samples.windows(2).map(|pair| megabits(pair[0], pair[1])).collect()
}

fn identity(dir: &Path, source: bool) -> Arc<Identity> {
    Identity::load_or_create(
        &dir.join(if source { "source" } else { "destination" }),
        SystemTime::now(),
    )
    .unwrap()
}

fn site(dir: &Path, source: bool, address: SocketAddr) -> Transport {
    let trust = TrustAnchors::default();
    trust.insert(identity(dir, !source).fingerprint(), "peer");
    Transport::bind(TransportSettings::new(address), identity(dir, source), Arc::new(trust)).unwrap()
}

fn target(
    dir: &Path,
    control: SocketAddr,
    bulk: Option<SocketAddr>,
    rate: Option<ByteRate>,
    rtt: Duration,
    bulk_connections: u8,
) -> PeerTarget {
    PeerTarget {
        name: "peer".to_owned(),
        control_address: control,
        bulk_address: bulk,
        fingerprint: identity(dir, false).fingerprint(),
        rate,
        rate_now: None,
        rtt,
        bulk_connections: Some(bulk_connections),
    }
}

fn content(length: usize) -> Bytes {
    let mut content = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    content.into()
}
