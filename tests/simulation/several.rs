//! A link of several bulk connections: together they have the rate of one, and every lane arrives.

use std::time::Duration;

use super::capacity::fullest_tenth_of_a_second;
use super::{Connected, RTT, SEED, SimulatedLink, link_of, mbit, payload_efficiency, site};

#[tokio::test(start_paused = true)]
async fn three_connections_keep_one_cap_together_and_every_lane_arrives() {
    let (cap, less) = (mbit(300), mbit(60));
    let link = link_of(mbit(600), 1.0);
    let simulated = SimulatedLink::new(link.clone(), SEED);
    let sites = [site(&simulated, 0), site(&simulated, 1)];
    let connected = Connected::over_several(simulated, sites, Some(cap), RTT, 3).await;
    assert_eq!(connected.from.bulk.len(), 3);
    let bulk = connected.send_bulk();
    let seconds = Duration::from_secs;
    tokio::time::sleep_until(connected.since + seconds(6)).await;
    connected.sites[0].transport.set_peer_rate("b", Some(less));
    assert_eq!(connected.from.capacity(), Some(less));
    tokio::time::sleep_until(connected.since + seconds(10)).await;

    for (rate, begin, end) in [(cap, seconds(0), seconds(6)), (less, seconds(6), seconds(10))] {
        let fullest = fullest_tenth_of_a_second(&connected, begin..end, rate);
        assert!(fullest <= 1.02, "{rate}: {fullest}");
        // What was sent before arrives for so long.
        let begin = begin + seconds(1);
        let carries = rate.bytes_in(end - begin) as f64 * (1.0 - link.loss.mean()) * payload_efficiency(1500);
        let share = bulk.arrived_between(begin, end) as f64 / carries;
        eprintln!("three connections, {rate}, seed {SEED}: {share:.4} of what may pass");
        assert!((0.95..=1.02).contains(&share), "{rate}: {share}");
    }
    bulk.complete().await;
}
