use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const MTU: u16 = 1452;
const RTT: Duration = Duration::from_millis(150);

#[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
fn origin() -> Instant {
    Instant::now()
}

fn megabit(value: u64) -> ByteRate {
    ByteRate::from_bits_per_second(value * 1_000_000)
}

/// A bottleneck in virtual time: a rate, a drop-tail buffer, random loss and half an RTT each way. Every packet is acknowledged.
struct Link {
    rate: ByteRate,
    buffer: Duration,
    loss: f64,
    rtt: Duration,
    /// When the bottleneck has sent all it holds.
    busy_until: Instant,
    random: u64,
}

impl Link {
    fn new(rate: ByteRate, buffer: Duration, loss: f64, now: Instant) -> Self {
        Self {
            rate,
            buffer,
            loss,
            rtt: RTT,
            busy_until: now,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// When the acknowledgement of a packet sent at `now` arrives, if it arrives.
    fn send(&mut self, now: Instant, bytes: u64) -> Option<Instant> {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let starts = self.busy_until.max(now);
        if starts - now > self.buffer {
            return None;
        }
        self.busy_until = starts + self.rate.time_for(bytes);
        let lost = (self.random >> 11) as f64 / (1_u64 << 53) as f64;
        (lost >= self.loss).then(|| self.busy_until + self.rtt)
    }
}

struct Run {
    longest_queue: Duration,
    sent: u64,
    delivered: u64,
    /// The rate at the end of each tenth of a second.
    rates: Vec<ByteRate>,
}

/// A sender with endless data at the controller's rate. A loss is seen when the packets behind it are acknowledged.
fn drive(controller: &mut LinkController, link: &mut Link, start: Instant, time: Duration) -> Run {
    const PACKET: u64 = 14_520;
    let mut run = Run {
        longest_queue: Duration::ZERO,
        sent: 0,
        delivered: 0,
        rates: vec![],
    };
    let mut in_flight: VecDeque<(Instant, Option<Instant>)> = VecDeque::new();
    let (mut now, mut sampled) = (start, start);
    while now < start + time {
        while let Some(&(sent, outcome)) = in_flight.front() {
            match outcome {
                Some(arrives) if arrives <= now => controller.on_ack(RoundTrip { sent, now: arrives }, PACKET),
                None if sent + link.rtt + link.buffer <= now => controller.on_loss(RoundTrip { sent, now }, PACKET),
                _ => break,
            }
            run.delivered += outcome.map_or(0, |_| PACKET);
            in_flight.pop_front();
        }
        if (in_flight.len() as u64) * PACKET < controller.window() {
            in_flight.push_back((now, link.send(now, PACKET)));
            run.sent += PACKET;
            run.longest_queue = run.longest_queue.max(link.busy_until.saturating_duration_since(now));
        }
        now += controller.rate().time_for(PACKET);
        if now >= sampled + Duration::from_millis(100) {
            sampled = now;
            run.rates.push(controller.rate());
        }
    }
    run
}

fn controller(capacity: ByteRate, now: Instant) -> LinkController {
    LinkController::new(ControllerSettings::new(capacity, RTT), MTU, now)
}

#[test]
fn it_starts_at_the_capacity_with_a_window_that_does_not_limit() {
    let controller = controller(megabit(1_000), origin());
    assert_eq!(controller.rate(), megabit(1_000));
    assert_eq!(
        controller.window(),
        megabit(1_000).bytes_in(2 * RTT + Duration::from_millis(10))
    );
}

#[test]
fn random_loss_below_the_tolerance_never_slows_it() {
    for loss in [0.0, 0.001, 0.01, 0.03] {
        let start = origin();
        let mut controller = controller(megabit(1_000), start);
        let mut link = Link::new(megabit(1_000), Duration::from_millis(50), loss, start);
        let run = drive(&mut controller, &mut link, start, Duration::from_secs(10));
        assert!(
            run.rates.iter().all(|rate| *rate == megabit(1_000)),
            "loss {loss}: {:?}",
            run.rates
        );
    }
}

#[test]
fn a_capacity_twice_too_high_is_corrected_without_a_collapse() {
    let start = origin();
    let mut controller = controller(megabit(1_000), start);
    let mut link = Link::new(megabit(500), Duration::from_millis(25), 0.0, start);
    drive(&mut controller, &mut link, start, Duration::from_secs(5));
    let settled = drive(
        &mut controller,
        &mut link,
        start + Duration::from_secs(5),
        Duration::from_secs(20),
    );
    assert!(
        settled.sent <= settled.delivered * 12 / 10,
        "{} sent, {} delivered",
        settled.sent,
        settled.delivered
    );
    let used = settled.delivered as f64 / megabit(500).bytes_in(Duration::from_secs(20)) as f64;
    assert!(used > 0.75, "only {used:.2} of the real capacity used");
}

#[test]
fn a_standing_queue_brakes_without_any_loss() {
    let start = origin();
    let mut controller = controller(megabit(110), start);
    let mut link = Link::new(megabit(100), Duration::from_secs(2), 0.0, start);
    let run = drive(&mut controller, &mut link, start, Duration::from_secs(10));
    assert!(run.rates.iter().any(|rate| *rate < megabit(100)), "{:?}", run.rates);
    let worst = link
        .busy_until
        .saturating_duration_since(start + Duration::from_secs(10));
    assert!(worst < Duration::from_millis(200), "{worst:?} of queue stand");
}

#[test]
fn a_capacity_one_percent_too_high_costs_a_few_milliseconds_of_queue_and_no_brake() {
    // The longer the round trip, the coarser the steps.
    for (rtt, least_use) in [(20, 0.985), (150, 0.985), (600, 0.96)] {
        let rtt = Duration::from_millis(rtt);
        let start = origin();
        let mut controller = LinkController::new(ControllerSettings::new(megabit(101), rtt), MTU, start);
        let mut link = Link {
            rtt,
            ..Link::new(megabit(100), Duration::from_secs(2), 0.0, start)
        };
        drive(&mut controller, &mut link, start, Duration::from_secs(20));
        let settled = start + Duration::from_secs(20);
        let run = drive(&mut controller, &mut link, settled, Duration::from_secs(20));
        let slowest = run.rates.iter().min().copied();
        assert!(slowest > Some(megabit(94)), "{rtt:?}: {slowest:?}");
        let used = run.delivered as f64 / megabit(100).bytes_in(Duration::from_secs(20)) as f64;
        assert!(used > least_use, "{rtt:?}: only {used:.3} of the link used");
        assert!(
            run.longest_queue < Duration::from_millis(25),
            "{rtt:?}: {:?} of queue",
            run.longest_queue
        );
    }
}

#[test]
fn a_path_that_becomes_longer_is_not_taken_for_a_queue_for_ever() {
    for longer in [170, 200, 400].map(Duration::from_millis) {
        let start = origin();
        let mut controller = controller(megabit(100), start);
        let mut link = Link::new(megabit(100), Duration::from_millis(50), 0.001, start);
        drive(&mut controller, &mut link, start, Duration::from_secs(3));
        link.rtt = longer;
        let changed = start + Duration::from_secs(3);
        let run = drive(&mut controller, &mut link, changed, Duration::from_secs(30));
        let (lowest, last) = (run.rates.iter().min(), run.rates.last().copied());
        assert!(lowest > Some(&megabit(50)), "{longer:?}: {lowest:?}");
        assert_eq!(last, Some(megabit(100)), "{longer:?}");
        assert!(
            controller.least_rtt() >= longer,
            "{longer:?}: {:?}",
            controller.least_rtt()
        );
    }
}

#[test]
fn nor_is_one_on_which_a_packet_takes_longer_than_most_queues() {
    let start = origin();
    let mut controller = controller(megabit(1), start);
    let mut now = start;
    for number in 0..12_000 {
        now += megabit(1).time_for(MTU.into());
        let longer = if number < 900 { 20 } else { 120 };
        let trip = RoundTrip {
            sent: now - Duration::from_millis(longer),
            now,
        };
        controller.on_ack(trip, MTU.into());
    }
    assert_eq!(controller.rate(), megabit(1));
}

#[test]
fn an_ecn_mark_brakes_once_for_all_packets_in_flight() {
    let start = origin();
    let mut controller = controller(megabit(1_000), start);
    let marked = |at: u64| RoundTrip {
        sent: start + Duration::from_millis(at),
        now: start + RTT + Duration::from_millis(at),
    };
    controller.on_ecn(marked(1));
    let braked = controller.rate();
    assert_eq!(braked, megabit(900));
    controller.on_ecn(marked(2));
    assert_eq!(controller.rate(), braked, "sent before the brake");
    controller.on_ecn(marked(200));
    assert!(controller.rate() < braked);
}

#[test]
fn after_a_dead_path_it_comes_back_at_once_to_most_of_the_rate_and_then_in_steps() {
    let start = origin();
    let mut controller = controller(megabit(1_000), start);
    let mut link = Link::new(megabit(1_000), Duration::from_millis(50), 0.0, start);
    controller.on_persistent_congestion(start);
    controller.on_persistent_congestion(start);
    assert_eq!(controller.rate(), ByteRate(megabit(1_000).0 / 64));
    let run = drive(&mut controller, &mut link, start, Duration::from_secs(4));
    assert!(run.rates[20] >= megabit(700), "0.7 within 2 s: {:?}", run.rates);
    assert_eq!(controller.rate(), megabit(1_000));
}

#[test]
fn a_new_capacity_is_obeyed_at_once() {
    let mut controller = controller(megabit(1_000), origin());
    controller.set_capacity(megabit(300));
    assert_eq!(controller.rate(), megabit(300));
    controller.set_capacity(megabit(2_000));
    assert_eq!(controller.rate(), megabit(2_000), "it was not braked, so it follows");
    controller.on_persistent_congestion(origin());
    let floor = controller.rate();
    controller.set_capacity(megabit(4_000));
    assert_eq!(controller.rate(), floor, "braked, so it has to recover first");
}

#[test]
fn a_capacity_that_was_small_and_braked_and_becomes_large_is_there_within_seconds() {
    let start = origin();
    let mut controller = controller(megabit(1), start);
    let mut link = Link::new(ByteRate(megabit(1).0 / 2), Duration::from_secs(1), 0.0, start);
    drive(&mut controller, &mut link, start, Duration::from_secs(30));
    assert!(controller.rate() < megabit(1), "{}", controller.rate());
    link.rate = megabit(1_000);
    controller.set_capacity(megabit(1_000));
    drive(
        &mut controller,
        &mut link,
        start + Duration::from_secs(30),
        Duration::from_secs(10),
    );
    assert_eq!(controller.rate(), megabit(1_000));
}

#[test]
fn a_little_more_capacity_is_no_reason_to_forget_what_the_link_carried() {
    let start = origin();
    let mut controller = controller(megabit(100), start);
    let mut link = Link::new(megabit(20), Duration::from_millis(50), 0.0, start);
    drive(&mut controller, &mut link, start, Duration::from_secs(30));
    controller.set_capacity(megabit(101));
    let later = start + Duration::from_secs(30);
    let run = drive(&mut controller, &mut link, later, Duration::from_secs(10));
    assert!(run.rates.iter().all(|rate| *rate < megabit(30)), "{:?}", run.rates);
}

#[test]
fn packets_that_wait_for_each_other_in_the_pacer_are_no_queue() {
    let start = origin();
    let mut controller = controller(megabit(1), start);
    let packet = megabit(1).time_for(MTU.into());
    let mut now = start;
    for number in 0..3_000 {
        // Idle at first; then each waits for four others, on a path of 1 ms.
        let waited = if number < 10 { Duration::ZERO } else { 4 * packet };
        now += packet;
        let trip = RoundTrip {
            sent: now - waited - Duration::from_millis(1),
            now,
        };
        controller.on_ack(trip, MTU.into());
    }
    assert_eq!(controller.rate(), megabit(1));
}

#[test]
fn a_trickle_with_a_lost_packet_is_not_congestion() {
    let start = origin();
    let mut controller = controller(megabit(1_000), start);
    for packet in 0..200_u32 {
        let sent = start + packet * Duration::from_secs(1);
        let trip = RoundTrip { sent, now: sent + RTT };
        if packet % 50 == 7 {
            controller.on_loss(trip, 1_000)
        } else {
            controller.on_ack(trip, 1_000)
        }
    }
    assert_eq!(controller.rate(), megabit(1_000));
}

#[derive(Clone, Debug)]
enum Event {
    Ack { sent_ago_ms: u64, bytes: u64 },
    Loss { sent_ago_ms: u64, bytes: u64 },
    Ecn { sent_ago_ms: u64 },
    Persistent,
    Capacity(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let ago = 0_u64..2_000;
    prop_oneof![
        6 => (ago.clone(), 0_u64..5_000_000).prop_map(|(sent_ago_ms, bytes)| Event::Ack { sent_ago_ms, bytes }),
        3 => (ago.clone(), 0_u64..5_000_000).prop_map(|(sent_ago_ms, bytes)| Event::Loss { sent_ago_ms, bytes }),
        1 => ago.prop_map(|sent_ago_ms| Event::Ecn { sent_ago_ms }),
        1 => Just(Event::Persistent),
        1 => (1_u64..u64::MAX / 16).prop_map(Event::Capacity),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_rate_stays_within_capacity_and_losses_never_raise_it(
        events in prop::collection::vec((0_u64..300, event()), 1..300),
    ) {
        let start = origin();
        let mut now = start + Duration::from_secs(10);
        let mut capacity = megabit(1_000);
        let mut controller = controller(capacity, start);
        for (pause, event) in events {
            now += Duration::from_millis(pause);
            let trip = |ago| RoundTrip { sent: now - Duration::from_millis(ago), now };
            let before = controller.rate();
            match event {
                Event::Ack { sent_ago_ms, bytes } => controller.on_ack(trip(sent_ago_ms), bytes),
                Event::Loss { sent_ago_ms, bytes } => {
                    controller.on_loss(trip(sent_ago_ms), bytes);
                    prop_assert!(controller.rate() <= before);
                }
                Event::Ecn { sent_ago_ms } => {
                    controller.on_ecn(trip(sent_ago_ms));
                    prop_assert!(controller.rate() <= before);
                }
                Event::Persistent => {
                    controller.on_persistent_congestion(now);
                    prop_assert!(controller.rate() <= before);
                }
                Event::Capacity(value) => {
                    capacity = ByteRate(value);
                    controller.set_capacity(capacity);
                }
            }
            prop_assert!(controller.rate() <= capacity);
            prop_assert!(controller.rate().0 > 0);
            prop_assert!(controller.window() >= MIN_WINDOW_PACKETS * u64::from(MTU));
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn from_any_state_it_recovers_on_a_clean_link(
        events in prop::collection::vec((0_u64..300, event()), 0..60),
    ) {
        let start = origin();
        let mut now = start;
        let mut controller = controller(megabit(100), start);
        for (pause, event) in events {
            now += Duration::from_millis(pause);
            match event {
                Event::Loss { bytes, .. } => controller.on_loss(RoundTrip { sent: now, now: now + RTT }, bytes),
                Event::Ecn { .. } => controller.on_ecn(RoundTrip { sent: now, now: now + RTT }),
                Event::Persistent => controller.on_persistent_congestion(now),
                Event::Ack { .. } | Event::Capacity(_) => {}
            }
        }
        now += Duration::from_secs(1);
        let mut link = Link::new(megabit(100), Duration::from_millis(50), 0.001, now);
        drive(&mut controller, &mut link, now, Duration::from_secs(40));
        prop_assert_eq!(controller.rate(), megabit(100));
    }
}

/// A packet in each of these milliseconds, which arrives or is lost.
fn packets(
    controller: &mut LinkController,
    start: Instant,
    times: std::ops::Range<u64>,
    arrives: impl Fn(u64) -> bool,
) {
    for at in times {
        let sent = start + Duration::from_millis(at);
        let trip = RoundTrip { sent, now: sent + RTT };
        if arrives(at) {
            controller.on_ack(trip, 12_500);
        } else {
            controller.on_loss(trip, 12_500);
        }
    }
}

#[test]
fn an_interruption_is_not_judged_but_a_link_that_hardly_carries_anything_is() {
    let start = origin();
    let mut interrupted = controller(megabit(100), start);
    packets(&mut interrupted, start, 0..1, |_| true);
    packets(&mut interrupted, start, 1_000..6_000, |at| {
        !(3_000..4_500).contains(&at)
    });
    assert_eq!(interrupted.rate(), megabit(100), "idle before, and then interrupted");

    let mut too_slow = controller(megabit(100), start);
    packets(&mut too_slow, start, 0..4_000, |at| at % 60 == 0);
    assert!(too_slow.rate() < megabit(25), "{}", too_slow.rate());
}

#[test]
fn what_is_lost_at_the_floor_does_not_keep_it_there() {
    let start = origin();
    let mut controller = controller(megabit(100), start);
    controller.on_persistent_congestion(start);
    packets(&mut controller, start, 1..1_000, |at| at % 10 == 0);
    assert_eq!(controller.rate(), ByteRate(megabit(100).0 / 64));
    packets(&mut controller, start, 1_000..2_500, |_| true);
    assert!(controller.rate() >= megabit(70), "{}", controller.rate());
}

#[test]
fn a_path_that_takes_only_smaller_packets_is_filled_with_these_at_once() {
    let start = origin();
    let mut controller = controller(megabit(100), start);
    packets(&mut controller, start, 0..1_000, |at| at % 40 == 0);
    assert!(controller.rate() < megabit(10), "{}", controller.rate());
    controller.set_mtu(1200);
    packets(&mut controller, start, 1_000..1_010, |_| false);
    packets(&mut controller, start, 1_200..2_500, |_| true);
    assert_eq!(controller.rate(), megabit(100));
}
