//! A path of which nobody said what it carries: found, filled whatever it loses, and shared.

use std::sync::atomic::Ordering;
use std::time::Duration;

use longhaul::proto::page::ByteRate;
use longhaul::wan::LinkSettings;

use super::bulk::Bulk;
use super::link::SimulatedLink;
use super::{Connected, RTT, SEED, cross_traffic, link_of, mbit, payload_efficiency};

const SECOND: Duration = Duration::from_secs(1);

fn share(bulk: &Bulk, rate: ByteRate, begin: Duration, end: Duration) -> f64 {
    bulk.arrived_between(begin, end) as f64 / rate.bytes_in(end - begin) as f64 / payload_efficiency(1500)
}

/// A link with this RTT and a queue of that much time.
fn shared_link(rate: ByteRate, rtt: Duration, queue: Duration) -> LinkSettings {
    LinkSettings {
        one_way_delay: rtt / 2,
        queue_bytes: rate.bytes_in(queue),
        ..link_of(rate, 0.0)
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_ocean_is_found_and_filled_whatever_the_loss() {
    let rate = mbit(100);
    for (loss_percent, least) in [(0.0, 0.95), (0.1, 0.95), (1.0, 0.95), (2.0, 0.8)] {
        let connected = Connected::over(link_of(rate, loss_percent), None).await;
        let bulk = connected.send_bulk();
        let end = 12 * SECOND;
        tokio::time::sleep(end).await;
        let carried = 1.0 - loss_percent / 100.0;
        let settled = share(&bulk, rate, 4 * SECOND, end) / carried;
        let from_the_start = share(&bulk, rate, Duration::ZERO, end) / carried;
        let window = Duration::from_millis(150);
        let full = (0..12_000)
            .step_by(10)
            .map(Duration::from_millis)
            .find(|begin| share(&bulk, rate, *begin, *begin + window) >= 0.9 * carried);
        eprintln!(
            "{rate} unknown, {loss_percent} % loss, seed {SEED}: {settled:.4} of what the link carries from 4 s on, {from_the_start:.4} in all, \
             90 % after {full:?}"
        );
        assert!(settled >= least, "{loss_percent} % loss: {settled}");
        assert!(full.is_some_and(|full| full <= 3 * SECOND), "{full:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_local_network_is_filled_too() {
    let rate = mbit(1000);
    let connected = Connected::over(
        shared_link(rate, Duration::from_millis(1), Duration::from_millis(10)),
        None,
    )
    .await;
    let bulk = connected.send_bulk();
    tokio::time::sleep(2 * SECOND).await;
    let share = share(&bulk, rate, SECOND / 2, 2 * SECOND);
    eprintln!("{rate} unknown, 1 ms, seed {SEED}: {share:.4} from 0.5 s on");
    assert!(share >= 0.9, "{share}");
}

#[tokio::test(start_paused = true)]
async fn two_that_probe_come_to_share_a_bottleneck() {
    let (rate, rtt) = (mbit(50), Duration::from_millis(50));
    let link = SimulatedLink::new(shared_link(rate, rtt, rtt), SEED);
    let first = Connected::beside(link.clone(), 7000, None, rtt).await;
    let one = first.send_bulk();
    tokio::time::sleep(SECOND).await;
    let second = Connected::beside(link, 7100, None, rtt).await;
    let other = second.send_bulk();
    let (begin, end) = (35 * SECOND, 95 * SECOND);
    tokio::time::sleep(end).await;
    let shares =
        [(&one, Duration::ZERO), (&other, SECOND)].map(|(bulk, late)| share(bulk, rate, begin - late, end - late));
    eprintln!("two unknown to each other, seed {SEED}: {shares:.3?} of the link from 35 s on");
    assert!(
        shares[0] / shares[1] <= 1.7 && shares[1] / shares[0] <= 1.7,
        "{shares:?}"
    );
    assert!(shares[0] + shares[1] >= 0.8, "{shares:?}");
}

#[tokio::test(start_paused = true)]
async fn a_cubic_flow_beside_it_keeps_a_share_and_leaves_one() {
    let (rate, rtt) = (mbit(50), Duration::from_millis(50));
    let connected = Connected::over(shared_link(rate, rtt, rtt), None).await;
    let delivered = cross_traffic::cubic(connected.link.clone(), rtt);
    tokio::time::sleep(5 * SECOND).await;
    let bulk = connected.send_bulk();
    let (begin, end) = (20 * SECOND, 180 * SECOND);
    tokio::time::sleep(begin).await;
    let before = delivered.load(Ordering::Relaxed);
    tokio::time::sleep(end - begin).await;
    let cubic = (delivered.load(Ordering::Relaxed) - before) as f64 / rate.bytes_in(end - begin) as f64;
    let own = share(&bulk, rate, begin, end);
    eprintln!("beside CUBIC, seed {SEED}: {own:.3} of the link, CUBIC {cubic:.3}");
    assert!(own >= 0.2 && cubic >= 0.15, "{own} and {cubic}");
}

#[tokio::test(start_paused = true)]
async fn what_others_leave_is_used_and_the_queue_stays_bounded() {
    let rate = mbit(100);
    let connected = Connected::over(link_of(rate, 0.0), None).await;
    let bulk = connected.send_bulk();
    tokio::time::sleep(5 * SECOND).await;
    let others = cross_traffic::constant(connected.link.clone(), mbit(50), 8 * SECOND);
    tokio::spawn(others);
    tokio::time::sleep(3 * SECOND).await;
    let longest = rate.time_for(connected.longest_queue(5 * SECOND).await);
    tokio::time::sleep(7 * SECOND).await;
    let beside = share(&bulk, rate, 8 * SECOND, 13 * SECOND);
    let alone = share(&bulk, rate, 17 * SECOND, 20 * SECOND);
    eprintln!(
        "half of the link taken by others, seed {SEED}: {beside:.3} used meanwhile, at most {longest:?} of queue, {alone:.3} afterwards"
    );
    assert!((0.4..=0.55).contains(&beside), "{beside}");
    assert!(alone >= 0.9, "{alone}");
    assert!(longest <= RTT / 3, "{longest:?}");
}

#[tokio::test(start_paused = true)]
async fn a_cap_set_from_outside_holds_and_is_lifted() {
    let (rate, cap) = (mbit(100), mbit(20));
    let connected = Connected::over(link_of(rate, 0.1), None).await;
    assert_eq!(
        (connected.from.capacity(), connected.from.goodput()),
        (None, None),
        "found is not configured"
    );
    let bulk = connected.send_bulk();
    tokio::time::sleep(4 * SECOND).await;
    connected.from.set_rate(Some(cap));
    tokio::time::sleep(4 * SECOND).await;
    connected.from.set_rate(None);
    tokio::time::sleep(5 * SECOND).await;
    let capped = share(&bulk, cap, 5 * SECOND, 8 * SECOND);
    let lifted = share(&bulk, rate, 11 * SECOND, 13 * SECOND);
    eprintln!("capped to {cap}, seed {SEED}: {capped:.3} of the cap, and {lifted:.3} of the link once it was lifted");
    assert!((0.9..=1.02).contains(&capped), "{capped}");
    assert!(lifted >= 0.9, "{lifted}");
}
