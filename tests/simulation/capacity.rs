//! A link whose capacity is configured: filled from the first round trip on, whatever it loses, and never above the cap.

use std::ops::Range;
use std::time::Duration;

use longhaul::proto::page::ByteRate;
use longhaul::wan::LinkSettings;
use tokio::time::Instant;

use super::{Connected, RTT, SEED, achievable, link_of, mbit, payload_efficiency};

/// In percent, and the share of what is achievable that must arrive.
const LOSSES: [(f64, f64); 5] = [(0.0, 0.98), (0.01, 0.98), (0.1, 0.98), (1.0, 0.98), (2.0, 0.95)];

/// The share of what the link can carry at most that arrives, from the completed handshake on.
async fn share_of_achievable(rate: ByteRate, loss_percent: f64, time: Duration) -> f64 {
    let link = link_of(rate, loss_percent);
    let connected = Connected::over(link.clone(), rate).await;
    let bulk = connected.send_bulk();
    tokio::time::sleep(time).await;
    let share = bulk.arrived_between(Duration::ZERO, time) as f64 / achievable(&link, time);
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
    let bulk = connected.send_bulk();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let window = Duration::from_millis(50);
    let full = 0.9 * rate.bytes_in(window) as f64 * payload_efficiency(1500);
    let first = (0..900)
        .map(Duration::from_millis)
        .find(|begin| bulk.arrived_between(*begin, *begin + window) as f64 >= full);
    eprintln!("90 % of the rate from {first:?} on");
    assert!(first.is_some_and(|first| first <= RTT), "{first:?}");
}

/// What is sent for each byte delivered, and the share of the link that is used, from 5 s on for so long.
async fn with_twice_the_capacity_promised(real: ByteRate, queue: Duration, time: Duration) -> (f64, f64) {
    let link = LinkSettings {
        queue_bytes: real.bytes_in(queue),
        ..link_of(real, 0.0)
    };
    let connected = Connected::over(link, ByteRate(2 * real.0)).await;
    let bulk = connected.send_bulk();
    let (begin, end) = (Duration::from_secs(5), Duration::from_secs(5) + time);
    tokio::time::sleep(end).await;
    let sent: u64 = connected
        .link
        .offered(0)
        .iter()
        .filter(|(at, _)| (connected.since + begin..connected.since + end).contains(&Instant::from_std(*at)))
        .map(|(_, bytes)| bytes)
        .sum();
    let delivered = bulk.arrived_between(begin, end) as f64 / payload_efficiency(1500);
    let used = delivered / real.bytes_in(end - begin) as f64;
    let sent = sent as f64 / delivered;
    eprintln!("{real} real, {queue:?} of queue: {sent:.3} sent for each delivered, {used:.3} of the link used");
    (sent, used)
}

#[tokio::test(start_paused = true)]
async fn half_the_capacity_that_was_promised_is_found_and_used() {
    let queue = Duration::from_millis(50);
    let (sent, used) = with_twice_the_capacity_promised(mbit(50), queue, Duration::from_secs(20)).await;
    assert!(sent <= 1.2 && used >= 0.9, "{sent}, {used}");
}

#[tokio::test(start_paused = true)]
async fn half_of_a_gigabit_is_found_and_used_with_a_short_queue_too() {
    let queue = Duration::from_millis(25);
    let (sent, used) = with_twice_the_capacity_promised(mbit(500), queue, Duration::from_secs(4)).await;
    assert!(sent <= 1.2 && used >= 0.9, "{sent}, {used}");
}

#[tokio::test(start_paused = true)]
async fn no_tenth_of_a_second_carries_more_than_the_cap() {
    let cap = mbit(50);
    let connected = Connected::over(link_of(mbit(100), 1.0), cap).await;
    let _bulk = connected.send_bulk();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let share = fullest_tenth_of_a_second(&connected, Duration::ZERO..Duration::MAX, cap);
    assert!(share <= 1.02, "{share}");
}

/// The most that was sent in 100 ms of `time`, as a share of what `cap` allows.
pub(crate) fn fullest_tenth_of_a_second(connected: &Connected, time: Range<Duration>, cap: ByteRate) -> f64 {
    let since = connected.since.into_std();
    let mut offered = connected.link.offered(0);
    offered.retain(|(at, _)| time.contains(&at.saturating_duration_since(since)));
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
    eprintln!("{share:.4} of the cap in the fullest 100 ms of {time:?}");
    share
}

/// As the calendar does it at the end of the night and of the day.
#[tokio::test(start_paused = true)]
async fn a_rate_that_falls_holds_at_once_and_one_that_rises_again_is_filled() {
    let (night, day) = (mbit(100), mbit(20));
    let connected = Connected::over(link_of(night, 0.1), night).await;
    let bulk = connected.send_bulk();
    let seconds = Duration::from_secs;
    let transport = &connected.sites[0].transport;
    for (rate, until) in [(night, seconds(3)), (day, seconds(8)), (night, seconds(12))] {
        transport.set_link_rate(Some(rate));
        transport.set_peer_rate("b", Some(rate));
        tokio::time::sleep_until(connected.since + until).await;
    }
    let share = fullest_tenth_of_a_second(&connected, seconds(3)..seconds(8), day);
    assert!(share <= 1.02, "{share}");
    // A round trip after each change what was sent before it has arrived.
    for (rate, begin, end) in [(day, seconds(4), seconds(8)), (night, seconds(9), seconds(12))] {
        let carries = rate.bytes_in(end - begin) as f64 * payload_efficiency(1500);
        let share = bulk.arrived_between(begin, end) as f64 / carries;
        eprintln!("{share:.4} of {rate}, seed {SEED}");
        assert!((0.95..=1.02).contains(&share), "{rate}: {share}");
    }
}

#[tokio::test(start_paused = true)]
async fn control_is_not_behind_bulk() {
    let rate = mbit(100);
    let connected = Connected::over(link_of(rate, 0.0), rate).await;
    let _bulk = connected.send_bulk();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let p99 = connected.control_delay(Duration::from_secs(7)).await;
    assert!(p99 <= RTT / 2 + Duration::from_millis(10), "{p99:?}");
}
