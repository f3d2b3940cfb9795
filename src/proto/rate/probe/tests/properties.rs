//! What holds in whatever order events come.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Event {
    Sent,
    Ack { sent_ago_ms: u64, bytes: u64 },
    Acks { count: u64 },
    EndAcks { in_flight: u64, limited: bool },
    Loss { sent_ago_ms: u64, bytes: u64 },
    Ecn { sent_ago_ms: u64 },
    Persistent,
    Cap(u64),
    Mtu(u16),
}

fn event() -> impl Strategy<Value = Event> {
    let ago = 0_u64..2_000;
    prop_oneof![
        4 => Just(Event::Sent),
        3 => (ago.clone(), 0_u64..5_000_000).prop_map(|(sent_ago_ms, bytes)| Event::Ack { sent_ago_ms, bytes }),
        6 => (1_u64..200).prop_map(|count| Event::Acks { count }),
        6 => (0_u64..50_000_000, prop::bool::weighted(0.2))
            .prop_map(|(in_flight, limited)| Event::EndAcks { in_flight, limited }),
        3 => (ago.clone(), 0_u64..5_000_000).prop_map(|(sent_ago_ms, bytes)| Event::Loss { sent_ago_ms, bytes }),
        1 => ago.prop_map(|sent_ago_ms| Event::Ecn { sent_ago_ms }),
        1 => Just(Event::Persistent),
        1 => prop_oneof![1_u64..u64::MAX, Just(u64::MAX)].prop_map(Event::Cap),
        1 => (1200_u16..9000).prop_map(Event::Mtu),
    ]
}

/// Does `event`, which may be of a packet sent up to half a second after `now`.
fn apply(controller: &mut ProbeController, event: &Event, now: Instant) {
    let trip = |ago| RoundTrip {
        sent: now + ms(500) - ms(ago),
        now,
    };
    match *event {
        Event::Sent => controller.on_sent(now),
        Event::Ack { sent_ago_ms, bytes } => controller.on_ack(trip(sent_ago_ms), bytes),
        Event::Acks { count } => {
            for _ in 0..count {
                controller.on_ack(trip(500 + 150), MTU.into());
            }
            controller.on_end_acks(now, 0, false);
        }
        Event::EndAcks { in_flight, limited } => controller.on_end_acks(now, in_flight, limited),
        Event::Loss { sent_ago_ms, bytes } => controller.on_loss(trip(sent_ago_ms), bytes),
        Event::Ecn { sent_ago_ms } => controller.on_ecn(trip(sent_ago_ms)),
        Event::Persistent => controller.on_persistent_congestion(now),
        Event::Cap(cap) => controller.set_cap(ByteRate(cap)),
        Event::Mtu(mtu) => controller.set_mtu(mtu),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_rate_stays_below_the_cap_and_the_window_above_its_floor_whatever_happens(
        events in prop::collection::vec((-50_i64..300, event()), 1..300),
    ) {
        let start = origin();
        let mut now = start + 10 * SECOND;
        let mut controller = ProbeController::new(RTT, MTU, start);
        let (mut cap, mut mtu) = (u64::MAX, MTU);
        for (pause, event) in &events {
            now = if *pause < 0 { now - ms(pause.unsigned_abs()) } else { now + ms(pause.unsigned_abs()) };
            let before = controller.reach();
            apply(&mut controller, event, now);
            match event {
                Event::Cap(value) => cap = *value,
                Event::Mtu(value) => mtu = *value,
                Event::Loss { .. } | Event::Ecn { .. } | Event::Persistent => {
                    // Start-up doubles, from no more than this.
                    let starting = scaled(controller.first_rate(), START_UP_GAIN);
                    prop_assert!(controller.reach() <= before.max(starting).max(controller.least_rate()));
                }
                _ => {}
            }
            prop_assert!(controller.rate().0 <= cap);
            prop_assert!(controller.reach().0 <= cap);
            prop_assert!(controller.rate() >= controller.least_rate().min(ByteRate(cap)));
            prop_assert!(controller.window() >= FLOOR_PACKETS * u64::from(mtu));
        }
    }

    #[test]
    fn the_more_of_a_round_is_lost_the_less_is_sent_afterwards(
        seconds in 1_u32..12,
        loss in 0.0_f64..0.03,
        lost in prop::collection::vec(0_u64..2_000, 2),
    ) {
        let mut link = probed(RTT, ms(50), loss);
        link.run(seconds * SECOND);
        let now = link.now;
        let mut reaches = Vec::new();
        for packets in [lost[0].min(lost[1]), lost[0].max(lost[1])] {
            let mut controller = link.probing(0).clone();
            let trip = RoundTrip { sent: now, now: now + RTT };
            controller.on_loss(trip, packets * u64::from(MTU));
            for _ in 0..100 {
                controller.on_ack(trip, MTU.into());
            }
            controller.on_end_acks(now + RTT, 1_000_000, false);
            reaches.push(controller.reach());
        }
        prop_assert!(reaches[1] <= reaches[0], "{reaches:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn from_any_state_it_recovers_when_the_congestion_ends(
        events in prop::collection::vec((0_i64..300, event()), 0..60),
    ) {
        let mut link = probed(RTT, ms(50), 0.001);
        link.run(3 * SECOND);
        for (pause, event) in &events {
            link.now += ms(pause.unsigned_abs());
            let now = link.now;
            // Nobody has more in flight than the window, so nobody is limited for long by what was in flight.
            if matches!(
                event,
                Event::Loss { .. } | Event::Ecn { .. } | Event::Persistent | Event::EndAcks { limited: false, .. }
            ) {
                apply(link.probing(0), event, now);
            }
        }
        link.run(25 * SECOND);
        let used = link.run(5 * SECOND)[0];
        prop_assert!(used >= 0.85, "{used}");
    }
}
