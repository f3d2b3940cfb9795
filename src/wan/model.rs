//! One direction of a link as arithmetic: what becomes of a datagram that is offered now.
//!
//! ```text
//! offer(now, bytes) → outage → mtu → loss → bottleneck (rate, byte-limited queue, tail drop) → one-way delay → at
//! ```
//!
//! No packet, clock, socket or thread is in here, so the emulator and an in-process simulation use the same model and
//! behave alike. The order of datagrams is kept, whatever the jitter and however the settings change.

use std::time::{Duration, Instant};

use super::loss::{Loss, LossProcess};
use super::random::Random;
use crate::proto::page::ByteRate;

/// Bytes of Ethernet framing that `tc` counts with each IP packet, and so does the bottleneck.
pub const ETHERNET_OVERHEAD: u32 = 14;

/// What one direction of the link is like.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkSettings {
    /// From the bottleneck's exit to the other site. Half the RTT.
    pub one_way_delay: Duration,
    /// What the bottleneck passes, [`LinkSettings::overhead_bytes`] included. Zero counts as one byte per second.
    pub rate: ByteRate,
    /// What may wait at the bottleneck, overhead included, the datagram in transmission too; what does not fit whole is
    /// dropped.
    pub queue_bytes: u64,
    /// Added to the IP bytes of each datagram at the bottleneck.
    pub overhead_bytes: u32,
    /// Longer IP packets are dropped.
    pub mtu_bytes: u32,
    /// Which datagrams are lost.
    pub loss: Loss,
    /// Variation of the delay.
    pub jitter: Option<Jitter>,
}

impl LinkSettings {
    /// How long a full queue takes to drain.
    #[must_use]
    pub fn queue_time(&self) -> Duration {
        self.rate.time_for(self.queue_bytes)
    }
}

/// Delay that wanders about its mean as an Ornstein-Uhlenbeck process, as queues along a path make it do. Independent
/// delays for each datagram would reorder nearly all of them at high rates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jitter {
    /// Standard deviation.
    pub deviation: Duration,
    /// Time in which a deviation falls to 1/e.
    pub correlation_time: Duration,
}

/// What becomes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It reaches the other site then.
    Deliver {
        /// Never before the delivery of an earlier datagram.
        at: Instant,
    },
    /// It does not.
    Drop(DropCause),
}

/// Why a datagram did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropCause {
    /// The direction was cut.
    Outage,
    /// It was longer than the MTU.
    Mtu,
    /// The loss model took it.
    Loss,
    /// It did not fit into the bottleneck's queue.
    Queue,
}

/// One direction of a link.
#[derive(Clone, Debug)]
pub struct LinkModel {
    settings: LinkSettings,
    loss: LossProcess,
    wander: Wander,
    /// How long a full queue takes to drain.
    queue_time: Duration,
    /// Half-open windows in which nothing enters.
    outages: Vec<(Instant, Instant)>,
    /// The bottleneck has sent all it accepted then, and `fraction / rate` nanoseconds later.
    busy_until: Instant,
    fraction: u64,
    last_delivery: Instant,
}

impl LinkModel {
    /// A direction that has been idle before `now`. Directions of one link share the seed and differ in `stream`.
    #[must_use]
    pub fn new(settings: LinkSettings, seed: u64, stream: u64, now: Instant) -> Self {
        Self {
            loss: LossProcess::new(settings.loss, Random::new(seed, 2 * stream)),
            wander: Wander {
                nanos: 0.0,
                at: now,
                random: Random::new(seed, 2 * stream + 1),
            },
            queue_time: settings.queue_time(),
            settings,
            outages: Vec::new(),
            busy_until: now,
            fraction: 0,
            last_delivery: now,
        }
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &LinkSettings {
        &self.settings
    }

    /// Offers one datagram of `ip_bytes`. Calls must come in the order of time.
    pub fn offer(&mut self, now: Instant, ip_bytes: u32) -> Verdict {
        if !self.outages.is_empty() && self.is_down(now) {
            return Verdict::Drop(DropCause::Outage);
        }
        if ip_bytes > self.settings.mtu_bytes {
            return Verdict::Drop(DropCause::Mtu);
        }
        if self.loss.loses() {
            return Verdict::Drop(DropCause::Loss);
        }
        let Some(sent_at) = self.enqueue(now, ip_bytes) else {
            return Verdict::Drop(DropCause::Queue);
        };
        let delay = match self.settings.jitter {
            None => self.settings.one_way_delay,
            Some(jitter) => self.wander.apply(jitter, self.settings.one_way_delay, sent_at),
        };
        let at = (sent_at + delay).max(self.last_delivery);
        self.last_delivery = at;
        Verdict::Deliver { at }
    }

    /// When the bottleneck has sent a datagram that arrives now, or `None` when the queue has no room for it.
    fn enqueue(&mut self, now: Instant, ip_bytes: u32) -> Option<Instant> {
        let rate = self.settings.rate.0.max(1);
        let bytes = u64::from(ip_bytes) + u64::from(self.settings.overhead_bytes);
        // The division's remainder is carried, so that the rate is exact to the byte over any time.
        let (start, fraction) = if self.busy_until >= now {
            (self.busy_until, self.fraction)
        } else {
            (now, 0)
        };
        let scaled = bytes * NANOS_PER_SECOND + fraction;
        let finish = start + Duration::from_nanos(scaled / rate);
        if finish.saturating_duration_since(now) > self.queue_time {
            return None;
        }
        self.busy_until = finish;
        self.fraction = scaled % rate;
        Some(finish)
    }

    /// Bytes that wait at the bottleneck, its overhead included.
    #[must_use]
    pub fn queued_bytes(&self, now: Instant) -> u64 {
        self.settings
            .rate
            .bytes_in(self.busy_until.saturating_duration_since(now))
    }

    /// Replaces the settings. What was accepted keeps its delivery; nothing later overtakes it.
    pub fn change(&mut self, settings: LinkSettings) {
        if settings.loss != self.settings.loss {
            self.loss.change(settings.loss);
        }
        if settings.rate != self.settings.rate {
            self.fraction = 0;
        }
        self.queue_time = settings.queue_time();
        self.settings = settings;
    }

    /// Lets nothing enter from `start` for `length`. What is on its way still arrives.
    pub fn cut(&mut self, start: Instant, length: Duration) {
        self.outages.push((start, start + length));
    }

    /// Forgets all cuts, running and planned.
    pub fn restore(&mut self) {
        self.outages.clear();
    }

    fn is_down(&mut self, now: Instant) -> bool {
        self.outages.retain(|(_, end)| now < *end);
        self.outages.iter().any(|(start, _)| *start <= now)
    }
}

/// The present deviation of the delay, and how it goes on.
#[derive(Clone, Debug)]
struct Wander {
    nanos: f64,
    at: Instant,
    random: Random,
}

impl Wander {
    fn apply(&mut self, jitter: Jitter, delay: Duration, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        let kept = (-elapsed / jitter.correlation_time.as_secs_f64().max(1e-9)).exp();
        let deviation = jitter.deviation.as_nanos() as f64;
        self.nanos = self.nanos * kept + deviation * (1.0 - kept * kept).sqrt() * self.random.normal();
        self.at = now;
        // A float below zero saturates to zero: nothing arrives before it was sent.
        Duration::from_nanos((delay.as_nanos() as f64 + self.nanos) as u64)
    }
}

const NANOS_PER_SECOND: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::random::Probability;

    const MS: Duration = Duration::from_millis(1);

    /// 150 ms RTT, 1 Gbit/s, 50 ms of queue: 6.25 MB.
    fn settings() -> LinkSettings {
        LinkSettings {
            one_way_delay: 75 * MS,
            rate: ByteRate::from_bits_per_second(1_000_000_000),
            queue_bytes: 6_250_000,
            overhead_bytes: ETHERNET_OVERHEAD,
            mtu_bytes: 1500,
            loss: Loss::None,
            jitter: None,
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant has no other source; the tests only add to it"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    fn delivery(verdict: Verdict) -> Instant {
        match verdict {
            Verdict::Deliver { at } => at,
            Verdict::Drop(cause) => panic!("dropped: {cause:?}"),
        }
    }

    #[test]
    fn a_lone_datagram_takes_its_line_time_and_the_delay() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        // 1250 bytes with the overhead are 10 microseconds at 1 Gbit/s.
        let at = delivery(link.offer(begin, 1250 - ETHERNET_OVERHEAD));
        assert_eq!(at - begin, 75 * MS + Duration::from_micros(10));
    }

    #[test]
    fn the_rate_is_exact_to_a_nanosecond_after_a_hundred_thousand_datagrams() {
        let begin = start();
        for bits in [1_000_000_000, 999_999_937, 50_000_000, 9_999_999_991_u64] {
            let rate = ByteRate(bits / 8);
            let mut link = LinkModel::new(
                LinkSettings {
                    rate,
                    queue_bytes: 1 << 30,
                    ..settings()
                },
                1,
                0,
                begin,
            );
            let count = 100_000_u64;
            let mut last = begin;
            for index in 0..count {
                // Offered as soon as there is room, so the bottleneck never idles.
                let now = (last.max(begin + 75 * MS) - 75 * MS).max(begin);
                last = delivery(link.offer(now, if index % 2 == 0 { 52 } else { 1500 }));
            }
            let bytes = count / 2 * u64::from(52 + 1500 + 2 * ETHERNET_OVERHEAD);
            let exact = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate.0)) as u64);
            let off = (last - begin).abs_diff(exact + 75 * MS);
            assert!(off <= Duration::from_nanos(1), "{bits} bit/s is off by {off:?}");
        }
    }

    #[test]
    fn a_busy_bottleneck_carries_the_remainder_of_every_division() {
        let begin = start();
        // 7 bytes per second: each byte takes 142857142.857... nanoseconds.
        let settings = LinkSettings {
            rate: ByteRate(7),
            queue_bytes: 70_000,
            overhead_bytes: 0,
            ..settings()
        };
        let mut link = LinkModel::new(settings, 1, 0, begin);
        let last = (0..70).map(|_| delivery(link.offer(begin, 1))).last().expect("seventy");
        assert_eq!(last - begin, Duration::from_secs(10) + 75 * MS);
    }

    #[test]
    fn the_queue_holds_its_bytes_and_not_one_datagram_more() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        // 6 250 000 bytes of queue are 4128 full datagrams of 1514 bytes, and 208 bytes that hold no other.
        let mut accepted = 0;
        while let Verdict::Deliver { .. } = link.offer(begin, 1500) {
            accepted += 1;
        }
        assert_eq!(accepted, 4128);
        assert_eq!(link.queued_bytes(begin), 4128 * 1514);
        assert_eq!(link.offer(begin, 1500), Verdict::Drop(DropCause::Queue));
        assert!(matches!(
            link.offer(begin, 208 - ETHERNET_OVERHEAD),
            Verdict::Deliver { .. }
        ));
        assert_eq!(link.offer(begin, 1), Verdict::Drop(DropCause::Queue));
        // One line time later there is room for exactly one.
        let later = begin + Duration::from_nanos(1514 * 8);
        assert!(matches!(link.offer(later, 1500), Verdict::Deliver { .. }));
        assert_eq!(link.offer(later, 1500), Verdict::Drop(DropCause::Queue));
    }

    #[test]
    fn a_full_queue_adds_its_depth_to_the_delay() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        let mut last = begin;
        while let Verdict::Deliver { at } = link.offer(begin, 1500) {
            last = at;
        }
        let waited = last - begin - 75 * MS;
        assert!(waited <= 50 * MS && waited > 49 * MS, "{waited:?}");
    }

    #[test]
    fn a_datagram_of_the_mtu_passes_and_one_byte_more_does_not() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        assert!(matches!(link.offer(begin, 1500), Verdict::Deliver { .. }));
        assert_eq!(link.offer(begin, 1501), Verdict::Drop(DropCause::Mtu));
    }

    #[test]
    fn a_cut_takes_what_enters_in_its_window_and_nothing_else() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        link.cut(begin + 10 * MS, 20 * MS);
        let fate = |link: &mut LinkModel, ms: u32| matches!(link.offer(begin + ms * MS, 100), Verdict::Deliver { .. });
        assert!(fate(&mut link, 9));
        assert!(!fate(&mut link, 10));
        assert!(!fate(&mut link, 29));
        assert!(fate(&mut link, 30));
        link.cut(begin + 40 * MS, Duration::from_secs(3600));
        link.restore();
        assert!(fate(&mut link, 41));
    }

    #[test]
    fn loss_takes_no_time_at_the_bottleneck() {
        let begin = start();
        let mut link = LinkModel::new(
            LinkSettings {
                loss: Loss::Bernoulli(Probability::ALWAYS),
                ..settings()
            },
            1,
            0,
            begin,
        );
        assert_eq!(link.offer(begin, 1500), Verdict::Drop(DropCause::Loss));
        assert_eq!(link.queued_bytes(begin), 0);
    }

    #[test]
    fn order_is_kept_under_jitter_and_when_the_delay_falls() {
        let begin = start();
        let jitter = Some(Jitter {
            deviation: 5 * MS,
            correlation_time: 20 * MS,
        });
        let mut link = LinkModel::new(LinkSettings { jitter, ..settings() }, 9, 0, begin);
        let mut last = begin;
        for index in 0..100_000_u32 {
            let now = begin + index * Duration::from_micros(20);
            if index == 50_000 {
                link.change(LinkSettings {
                    one_way_delay: MS,
                    ..link.settings().clone()
                });
            }
            let at = delivery(link.offer(now, 100));
            assert!(at >= last && at >= now);
            last = at;
        }
        assert!(
            last - begin < Duration::from_secs(2) + 40 * MS,
            "the shorter delay is in force"
        );
    }

    #[test]
    fn jitter_has_the_asked_mean_and_deviation() {
        let begin = start();
        let jitter = Some(Jitter {
            deviation: 3 * MS,
            correlation_time: 20 * MS,
        });
        let mut link = LinkModel::new(LinkSettings { jitter, ..settings() }, 10, 0, begin);
        let (mut sum, mut squares) = (0.0, 0.0);
        let count = 20_000;
        for index in 0..count {
            // 200 ms apart: ten correlation times, so the samples are independent and none waits for the one before.
            let now = begin + index * 200 * MS;
            let ms = (delivery(link.offer(now, 100)) - now).as_secs_f64() * 1000.0;
            sum += ms;
            squares += ms * ms;
        }
        let mean = sum / f64::from(count);
        let deviation = (squares / f64::from(count) - mean * mean).sqrt();
        assert!((mean - 75.0).abs() < 0.1, "{mean}");
        assert!((deviation - 3.0).abs() < 0.1, "{deviation}");
    }

    #[test]
    fn one_seed_gives_the_same_verdicts_and_the_directions_differ() {
        let begin = start();
        let fates = |seed, stream| {
            let loss = Loss::Bernoulli(Probability::new(0.5).expect("one half"));
            let mut link = LinkModel::new(LinkSettings { loss, ..settings() }, seed, stream, begin);
            (0..64).map(|_| link.offer(begin, 100)).collect::<Vec<_>>()
        };
        assert_eq!(fates(5, 0), fates(5, 0));
        assert_ne!(fates(5, 0), fates(5, 1));
        assert_ne!(fates(5, 0), fates(6, 0));
    }

    #[test]
    fn a_rate_step_takes_hold_for_the_next_datagram() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        link.change(LinkSettings {
            rate: ByteRate::from_bits_per_second(10_000_000),
            ..settings()
        });
        let at = delivery(link.offer(begin, 1250 - ETHERNET_OVERHEAD));
        assert_eq!(at - begin, 76 * MS);
    }
}
