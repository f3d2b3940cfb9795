//! A bottleneck that marks (ECN-CE) instead of queueing: the queue stays short and nothing is lost, in either mode.

use std::time::Duration;

use super::{Connected, RTT, SEED, link_of, mbit, payload_efficiency};

/// Half the capacity that is believed in, or none known: the longest queue and the share of the link used, from 5 s on, and all packets lost
/// from then on.
async fn marked(believed_mbit: Option<u64>) -> (Duration, f64, u64) {
    let rate = mbit(50);
    let mut settings = link_of(rate, 0.0);
    settings.queue_bytes = rate.bytes_in(RTT);
    let connected = Connected::over(settings, believed_mbit.map(mbit)).await;
    connected.link.mark_above(rate.bytes_in(Duration::from_millis(5)));
    let bulk = connected.send_bulk();
    let (begin, end) = (Duration::from_secs(5), Duration::from_secs(15));
    tokio::time::sleep(begin).await;
    let lost_before = connected.from.bulk.stats().lost_packets;
    let longest = connected.longest_queue(end - begin).await;
    let lost = connected.from.bulk.stats().lost_packets - lost_before;
    let achievable = rate.bytes_in(end - begin) as f64 * payload_efficiency(1500);
    let used = bulk.arrived_between(begin, end) as f64 / achievable;
    let queue = rate.time_for(longest);
    eprintln!(
        "believed {believed_mbit:?} Mbit/s, 50 real, marked above 5 ms, seed {SEED}: {used:.3} used, {queue:?} of queue, {lost} lost"
    );
    (queue, used, lost)
}

#[tokio::test(start_paused = true)]
async fn a_capacity_that_is_too_high_is_corrected_by_marks_without_a_loss() {
    let (queue, used, lost) = marked(Some(100)).await;
    assert!(queue <= Duration::from_millis(100), "{queue:?}");
    assert_eq!(lost, 0);
    assert!(used >= 0.7, "{used}");
}

#[tokio::test(start_paused = true)]
async fn probing_stops_at_marks_without_a_loss() {
    let (queue, used, lost) = marked(None).await;
    assert!(queue <= Duration::from_millis(100), "{queue:?}");
    assert_eq!(lost, 0);
    assert!(used >= 0.65, "{used}");
}
