use std::time::{Duration, Instant};

use super::*;

mod bottleneck;
mod properties;
mod sharing;

use bottleneck::{Bottleneck, Sender};

const MTU: u16 = 1452;
const PACKET: u64 = MTU as u64 + HEADERS;
const RTT: Duration = Duration::from_millis(150);
const SECOND: Duration = Duration::from_secs(1);

#[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
fn origin() -> Instant {
    Instant::now()
}

fn megabit(value: u64) -> ByteRate {
    ByteRate::from_bits_per_second(value * 1_000_000)
}

fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

/// A bottleneck of 100 Mbit/s that one flow probes over this path.
fn probed(rtt: Duration, buffer: Duration, loss: f64) -> Bottleneck {
    let now = origin();
    Bottleneck::new(megabit(100), buffer, loss, now).with(Sender::probe(rtt, now), rtt)
}

#[test]
fn it_starts_with_32_packets_a_round_trip_and_doubles() {
    let now = origin();
    let controller = ProbeController::new(RTT, MTU, now);
    assert_eq!(controller.window(), FLOOR_PACKETS * u64::from(MTU));
    let first = ByteRate(FLOOR_PACKETS * PACKET * 1000 / 150);
    assert!(controller.rate().0.abs_diff(first.0) <= 3, "{:?}", controller.rate());
    let mut link = probed(RTT, ms(50), 0.0);
    link.run(10 * RTT);
    let used = link.run(SECOND)[0];
    assert!(used >= 0.93, "{used}");
}

#[test]
fn a_path_is_filled_whatever_it_loses_up_to_two_percent() {
    for (rtt, buffer) in [(150, 50), (150, 5), (20, 50)] {
        for (loss, least) in [(0.0, 0.97), (0.001, 0.97), (0.01, 0.97), (0.02, 0.9)] {
            let mut link = probed(ms(rtt), ms(buffer), loss);
            link.run(4 * SECOND);
            let used = link.run(15 * SECOND)[0] / (1.0 - loss);
            assert!(used >= least, "{rtt} ms, buffer {buffer} ms, loss {loss}: {used}");
        }
    }
}

#[test]
fn alone_it_keeps_the_queue_short() {
    for rtt in [150, 20] {
        let mut link = probed(ms(rtt), ms(300), 0.0);
        link.run(10 * SECOND);
        link.run(10 * SECOND);
        assert!(link.longest_queue <= ms(12), "{rtt} ms: {:?}", link.longest_queue);
    }
}

#[test]
fn who_has_less_to_send_finds_the_rate_where_it_left_it() {
    let mut link = probed(RTT, ms(50), 0.001);
    link.run(5 * SECOND);
    let source = std::mem::replace(&mut link.flows[0].source, megabit(5));
    link.run(30 * SECOND);
    assert!(link.probing(0).rate() >= megabit(95), "{:?}", link.probing(0).rate());
    link.flows[0].source = source;
    let used = link.run(2 * SECOND)[0];
    assert!(used >= 0.85, "{used}");
}

#[test]
fn who_never_had_much_to_send_is_not_taken_for_full() {
    let mut link = probed(RTT, ms(50), 0.0);
    let source = std::mem::replace(&mut link.flows[0].source, megabit(1));
    link.run(20 * SECOND);
    link.flows[0].source = source;
    link.run(2 * SECOND);
    let used = link.run(2 * SECOND)[0];
    assert!(used >= 0.9, "{used}");
}

#[test]
fn a_path_that_becomes_longer_is_learnt_and_filled_again() {
    for longer in [200, 400].map(Duration::from_millis) {
        let mut link = probed(RTT, ms(50), 0.001);
        link.run(5 * SECOND);
        link.flows[0].rtt = longer;
        link.run(20 * SECOND);
        assert!(link.probing(0).path.least() >= longer, "{:?}", link.probing(0).path);
        let used = link.run(10 * SECOND)[0];
        assert!(used >= 0.93, "{longer:?}: {used}");
    }
}

#[test]
fn a_capacity_that_doubles_or_halves_is_followed() {
    let mut link = probed(RTT, ms(50), 0.0);
    link.run(5 * SECOND);
    link.rate = megabit(50);
    link.run(3 * SECOND);
    let used = link.run(5 * SECOND)[0];
    assert!(used >= 0.9, "halved: {used}");
    link.rate = megabit(100);
    link.run(5 * SECOND);
    let used = link.run(5 * SECOND)[0];
    assert!(used >= 0.9, "doubled: {used}");
}

#[test]
fn marks_keep_it_from_a_loss() {
    let mut link = probed(RTT, RTT, 0.0);
    link.mark_above = Some(ms(5));
    link.run(3 * SECOND);
    let before = link.flows[0].lost;
    let used = link.run(10 * SECOND)[0];
    assert!(used >= 0.9, "{used}");
    assert_eq!(link.flows[0].lost, before);
    assert!(link.longest_queue <= ms(45), "{:?}", link.longest_queue);
}

#[test]
fn after_a_dead_path_it_comes_back_by_doubling() {
    let mut link = probed(RTT, ms(50), 0.0);
    link.run(5 * SECOND);
    let now = link.now;
    link.probing(0).on_persistent_congestion(now);
    assert!(link.probing(0).rate() <= megabit(3), "{:?}", link.probing(0).rate());
    link.run(2 * SECOND);
    let used = link.run(SECOND)[0];
    assert!(used >= 0.9, "{used}");
}
