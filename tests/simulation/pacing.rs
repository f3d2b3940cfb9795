//! The chain that keeps a rate, without QUIC: the controller decides it, a bucket keeps it, the emulator's link is filled by it. Events have
//! the times they have, to the nanosecond, where tokio's timers tick in milliseconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use longhaul::proto::page::ByteRate;
use longhaul::proto::rate::{ControllerSettings, LinkController, RoundTrip, TokenBucket};
use longhaul::wan::{LinkModel, LinkSettings, Verdict};

use super::{RTT, SEED, link_of, mbit};

/// UDP payload, and what it takes of the link.
const PAYLOAD: u64 = 1452;
const ON_WIRE: u64 = PAYLOAD + 42;
/// What quinn sends at once.
const TRAIN: u64 = 10;
/// A packet is found lost when its round trip is over for this long.
const FOUND_LOST_AFTER: Duration = Duration::from_millis(2);
/// The receiver answers this many packets at once.
const ANSWERED_AT_ONCE: usize = 41;

/// What the wire saw of a sender with endless data.
#[derive(Default)]
struct Run {
    sent: Vec<(Duration, u64)>,
    delivered: Vec<(Duration, u64)>,
}

impl Run {
    /// For so long over a link like this one, which is believed to have `capacity`. Each time the sender waits, it wakes up `late`.
    fn of(link: LinkSettings, capacity: ByteRate, time: Duration, late: Duration) -> Self {
        let start = Instant::now();
        let mut model = LinkModel::new(link, SEED, 0, start);
        let mut controller = LinkController::new(ControllerSettings::new(capacity, RTT), PAYLOAD as u16, start);
        let mut bucket = TokenBucket::new(capacity, start);
        let mut run = Self::default();
        // When what was sent is acknowledged, or found lost (`None`: where the bottleneck dropped it).
        let mut in_flight: VecDeque<(Instant, Option<Instant>)> = VecDeque::new();
        let mut now = start;
        while now < start + time {
            run.acknowledge(&mut in_flight, &mut controller, now, start);
            if bucket.rate() != controller.rate() {
                bucket.set_rate(controller.rate(), now);
            }
            if in_flight.len() as u64 * PAYLOAD >= controller.window() {
                now += Duration::from_micros(100);
                continue;
            }
            match bucket.poll(now, TRAIN * ON_WIRE, 0) {
                Ok(()) => {
                    bucket.charge(TRAIN * ON_WIRE);
                    for _ in 0..TRAIN {
                        run.sent.push((now - start, ON_WIRE));
                        let arrives = match model.offer(now, (ON_WIRE - 14) as u32).verdict {
                            Verdict::Deliver { at } | Verdict::Overtake { at } => Some(at),
                            Verdict::Drop(_) => None,
                        };
                        in_flight.push_back((now, arrives));
                    }
                }
                Err(when) => now = when + late,
            }
        }
        run
    }

    /// Acknowledgements come in batches, as late as the last packet that they name.
    fn acknowledge(
        &mut self,
        in_flight: &mut VecDeque<(Instant, Option<Instant>)>,
        controller: &mut LinkController,
        now: Instant,
        start: Instant,
    ) {
        let answered = |(sent, arrives): &(Instant, Option<Instant>)| match arrives {
            Some(at) => *at + RTT / 2,
            None => *sent + RTT + FOUND_LOST_AFTER,
        };
        while let Some(last) = in_flight.get(ANSWERED_AT_ONCE - 1)
            && answered(last) <= now
        {
            let at = answered(last);
            for (sent, arrives) in in_flight.drain(..ANSWERED_AT_ONCE) {
                match arrives {
                    Some(arrived) => {
                        controller.on_ack(RoundTrip { sent, now: at }, PAYLOAD);
                        self.delivered.push((arrived - start, ON_WIRE));
                    }
                    None => controller.on_loss(RoundTrip { sent, now: at }, PAYLOAD),
                }
            }
        }
    }

    /// The most that any stretch of this length carries, of what the rate gives it.
    fn fullest(&self, window: Duration, rate: ByteRate) -> f64 {
        let (mut first, mut sum, mut most) = (0, 0, 0);
        for (at, bytes) in &self.sent {
            sum += bytes;
            while self.sent[first].0 + window <= *at {
                sum -= self.sent[first].1;
                first += 1;
            }
            most = most.max(sum);
        }
        most as f64 / rate.bytes_in(window) as f64
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn bytes_between(events: &[(Duration, u64)], begin: Duration, end: Duration) -> f64 {
    let within = events.iter().filter(|(at, _)| (begin..end).contains(at));
    within.map(|(_, bytes)| bytes).sum::<u64>() as f64
}

fn short_queue(rate: ByteRate) -> LinkSettings {
    LinkSettings {
        queue_bytes: rate.bytes_in(Duration::from_millis(25)),
        ..link_of(rate, 0.0)
    }
}

const LATENESS: [Duration; 3] = [Duration::ZERO, Duration::from_micros(100), Duration::from_millis(1)];

#[test]
fn a_gigabit_is_sent_and_delivered_whole_and_in_no_stretch_exceeded() {
    for late in LATENESS {
        let time = Duration::from_secs(3);
        let rate = mbit(1000);
        let run = Run::of(short_queue(rate), rate, time, late);
        // What leaves in the last round trip is not known to have arrived.
        let (begin, end) = (SECOND / 2, time - RTT - SECOND / 10);
        let used = bytes_between(&run.delivered, begin, end) / rate.bytes_in(end - begin) as f64;
        let [hundred, ten, one] = [100, 10, 1].map(|window| run.fullest(Duration::from_millis(window), rate));
        eprintln!(
            "1 Gbit/s, woken {late:?} late: {used:.4} used; fullest 100, 10 and 1 ms: {hundred:.4}, {ten:.4}, {one:.4} of the rate"
        );
        assert!(used >= 0.99, "{used}");
        assert!(hundred <= 1.02, "{hundred} in 100 ms");
        // What was saved up while idle or woken late, and one train: 2 ms, or a wait of about 1 ms and the lateness.
        assert!(ten <= 1.35, "{ten} in 10 ms");
    }
}

#[test]
fn half_of_the_gigabit_that_was_promised_is_used_and_little_of_it_wasted() {
    for late in LATENESS {
        let real = mbit(500);
        let (begin, end) = (5 * SECOND, 15 * SECOND);
        let run = Run::of(short_queue(real), mbit(1000), end + SECOND / 2, late);
        let delivered = bytes_between(&run.delivered, begin, end);
        let sent = bytes_between(&run.sent, begin, end) / delivered;
        let used = delivered / real.bytes_in(end - begin) as f64;
        eprintln!("500 of 1000 Mbit/s, woken {late:?} late: {sent:.4} sent for each delivered, {used:.4} used");
        assert!(sent <= 1.2, "{sent}");
        assert!(used >= 0.95, "{used}");
    }
}
