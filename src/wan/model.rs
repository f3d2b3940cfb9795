//! One direction of a link as arithmetic: what becomes of a datagram that is offered now.
//!
//! ```text
//! offer(now, bytes) → outage → mtu → script → loss → bottleneck (rate, byte-limited queue, tail drop) → delay → at
//!                                                 └─ duplication: a copy, right behind it
//! ```
//!
//! No packet, clock, socket or thread is in here, so the emulator and an in-process simulation use the same model and
//! behave alike. The order of datagrams is kept, whatever the jitter and however the settings change; only those that
//! [`Reordering`] picks overtake others. Each purpose has random numbers of its own, so that one setting does not change
//! what another draws.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::loss::{Loss, LossProcess};
use super::ordinals::Ordinals;
use super::random::{Probability, Random};
use crate::proto::page::ByteRate;

/// Bytes of Ethernet framing that `tc` counts with each IP packet, and so does the bottleneck.
pub const ETHERNET_OVERHEAD: u32 = 14;

/// What one direction of the link is like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkSettings {
    /// From the bottleneck's exit to the other site. Half the RTT.
    pub one_way_delay: Duration,
    /// What the bottleneck passes, [`LinkSettings::overhead_bytes`] included. Zero counts as one byte per second.
    #[serde(with = "rate_in_bytes")]
    pub rate: ByteRate,
    /// What may wait at the bottleneck, overhead included, the datagram in transmission too; what does not fit whole is
    /// dropped.
    pub queue_bytes: u64,
    /// Added to the IP bytes of each datagram at the bottleneck.
    pub overhead_bytes: u32,
    /// Longer IP packets are dropped.
    pub mtu_bytes: u32,
    /// Which datagrams are lost by chance.
    pub loss: Loss,
    /// Which datagrams are lost by their number since the link began.
    pub lost: Ordinals,
    /// Variation of the delay.
    pub jitter: Option<Jitter>,
    /// Which datagrams overtake others.
    pub reordering: Option<Reordering>,
    /// How many of the datagrams that were not lost come twice. A copy passes the bottleneck like any datagram.
    pub duplication: Probability,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jitter {
    /// Standard deviation.
    pub deviation: Duration,
    /// Time in which a deviation falls to 1/e.
    pub correlation_time: Duration,
}

/// A share of the datagrams takes a shorter way behind the bottleneck, as with `reorder` of `tc netem`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reordering {
    /// How many do.
    pub share: Probability,
    /// By how much it is shorter. As long as the delay or longer, they do not wait at all, which is what netem does.
    pub lead: Duration,
}

/// What becomes of a datagram, and of its copy where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Of the datagram.
    pub verdict: Verdict,
    /// Of its copy.
    pub copy: Option<Verdict>,
}

/// What becomes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It reaches the other site then.
    Deliver {
        /// Never before the delivery of an earlier datagram.
        at: Instant,
    },
    /// It reaches the other site before some that were offered earlier.
    Overtake {
        /// Never before the delivery of an earlier datagram that overtakes.
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
    /// Its number, or a burst that was asked for, said so.
    Script,
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
    overtakers: Random,
    copies: Random,
    /// How many datagrams were offered, and up to which of them all are lost.
    offered: u64,
    lost_until: u64,
    /// How long a full queue takes to drain.
    queue_time: Duration,
    /// Half-open windows in which nothing enters.
    outages: Vec<(Instant, Instant)>,
    /// The bottleneck has sent all it accepted then, and `fraction / rate` nanoseconds later.
    busy_until: Instant,
    fraction: u64,
    last_delivery: Instant,
    last_overtaking: Instant,
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
            overtakers: Random::new(seed, FURTHER_STREAMS + 2 * stream),
            copies: Random::new(seed, FURTHER_STREAMS + 2 * stream + 1),
            offered: 0,
            lost_until: 0,
            queue_time: settings.queue_time(),
            settings,
            outages: Vec::new(),
            busy_until: now,
            fraction: 0,
            last_delivery: now,
            last_overtaking: now,
        }
    }

    /// The settings in force.
    #[must_use]
    pub fn settings(&self) -> &LinkSettings {
        &self.settings
    }

    /// Offers one datagram of `ip_bytes`. Calls must come in the order of time.
    pub fn offer(&mut self, now: Instant, ip_bytes: u32) -> Fate {
        self.offered += 1;
        let verdict = match self.refuses(now, ip_bytes) {
            Some(cause) => Verdict::Drop(cause),
            None => self.carry(now, ip_bytes),
        };
        let doubled = !matches!(verdict, Verdict::Drop(_)) && self.copies.hit(self.settings.duplication);
        Fate {
            verdict,
            copy: doubled.then(|| self.carry(now, ip_bytes)),
        }
    }

    /// Why a datagram does not come as far as the bottleneck.
    fn refuses(&mut self, now: Instant, ip_bytes: u32) -> Option<DropCause> {
        if !self.outages.is_empty() && self.is_down(now) {
            Some(DropCause::Outage)
        } else if ip_bytes > self.settings.mtu_bytes {
            Some(DropCause::Mtu)
        } else if self.offered <= self.lost_until || self.settings.lost.contain(self.offered) {
            Some(DropCause::Script)
        } else if self.loss.loses() {
            Some(DropCause::Loss)
        } else {
            None
        }
    }

    /// Takes a datagram through the bottleneck and the delay.
    fn carry(&mut self, now: Instant, ip_bytes: u32) -> Verdict {
        let Some(sent_at) = self.enqueue(now, ip_bytes) else {
            return Verdict::Drop(DropCause::Queue);
        };
        let delay = match self.settings.jitter {
            None => self.settings.one_way_delay,
            Some(jitter) => self.wander.apply(jitter, self.settings.one_way_delay, sent_at),
        };
        if let Some(reordering) = self.settings.reordering
            && self.overtakers.hit(reordering.share)
        {
            let at = (sent_at + delay.saturating_sub(reordering.lead)).max(self.last_overtaking);
            self.last_overtaking = at;
            return Verdict::Overtake { at };
        }
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

    /// Loses the next `datagrams` that would otherwise be left to chance.
    pub fn lose(&mut self, datagrams: u64) {
        self.lost_until = self.offered.saturating_add(datagrams);
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

/// A rate in JSON: bytes per second.
mod rate_in_bytes {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    use crate::proto::page::ByteRate;

    pub(super) fn serialize<S: Serializer>(rate: &ByteRate, serializer: S) -> Result<S::Ok, S::Error> {
        rate.0.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ByteRate, D::Error> {
        u64::deserialize(deserializer).map(ByteRate)
    }
}

const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// Behind the random streams of loss and jitter of all directions, so that those stay what they were.
const FURTHER_STREAMS: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;

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
            lost: Ordinals::default(),
            jitter: None,
            reordering: None,
            duplication: Probability::NEVER,
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant has no other source; the tests only add to it"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    fn delivery(fate: Fate) -> Instant {
        match fate.verdict {
            Verdict::Deliver { at } => at,
            other => panic!("not delivered in order: {other:?}"),
        }
    }

    fn chance(value: f64) -> Probability {
        Probability::new(value).expect("a probability")
    }

    fn passes(fate: Fate) -> bool {
        matches!(fate.verdict, Verdict::Deliver { .. })
    }

    fn dropped(cause: DropCause) -> Fate {
        Fate {
            verdict: Verdict::Drop(cause),
            copy: None,
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
        while passes(link.offer(begin, 1500)) {
            accepted += 1;
        }
        assert_eq!(accepted, 4128);
        assert_eq!(link.queued_bytes(begin), 4128 * 1514);
        assert_eq!(link.offer(begin, 1500), dropped(DropCause::Queue));
        assert!(passes(link.offer(begin, 208 - ETHERNET_OVERHEAD)));
        assert_eq!(link.offer(begin, 1), dropped(DropCause::Queue));
        // One line time later there is room for exactly one.
        let later = begin + Duration::from_nanos(1514 * 8);
        assert!(passes(link.offer(later, 1500)));
        assert_eq!(link.offer(later, 1500), dropped(DropCause::Queue));
    }

    #[test]
    fn a_full_queue_adds_its_depth_to_the_delay() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        let mut last = begin;
        while let Verdict::Deliver { at } = link.offer(begin, 1500).verdict {
            last = at;
        }
        let waited = last - begin - 75 * MS;
        assert!(waited <= 50 * MS && waited > 49 * MS, "{waited:?}");
    }

    #[test]
    fn a_datagram_of_the_mtu_passes_and_one_byte_more_does_not() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        assert!(passes(link.offer(begin, 1500)));
        assert_eq!(link.offer(begin, 1501), dropped(DropCause::Mtu));
    }

    #[test]
    fn a_cut_takes_what_enters_in_its_window_and_nothing_else() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        link.cut(begin + 10 * MS, 20 * MS);
        let fate = |link: &mut LinkModel, ms: u32| passes(link.offer(begin + ms * MS, 100));
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
        assert_eq!(link.offer(begin, 1500), dropped(DropCause::Loss));
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
            let loss = Loss::Bernoulli(chance(0.5));
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

    #[test]
    fn the_share_that_overtakes_arrives_its_lead_earlier_and_the_others_keep_their_order() {
        let begin = start();
        let reordering = Some(Reordering {
            share: chance(0.1),
            lead: 2 * MS,
        });
        let mut link = LinkModel::new(
            LinkSettings {
                reordering,
                ..settings()
            },
            11,
            0,
            begin,
        );
        let line_time = Duration::from_nanos(1514 * 8);
        let (mut overtaking, mut last, mut last_overtaking) = (0, begin, begin);
        for index in 0..100_000_u32 {
            let now = begin + index * Duration::from_micros(20);
            match link.offer(now, 1500).verdict {
                Verdict::Deliver { at } => {
                    assert_eq!(at - now, 75 * MS + line_time);
                    assert!(at >= last);
                    last = at;
                }
                Verdict::Overtake { at } => {
                    assert_eq!(at - now, 73 * MS + line_time);
                    assert!(at >= last_overtaking);
                    last_overtaking = at;
                    overtaking += 1;
                }
                Verdict::Drop(cause) => panic!("dropped: {cause:?}"),
            }
        }
        // Binomial: deviation 95.
        assert!((9_620..=10_380).contains(&overtaking), "{overtaking}");
    }

    #[test]
    fn a_lead_beyond_the_delay_is_no_delay_and_never_a_time_before_the_bottleneck() {
        let begin = start();
        let reordering = Some(Reordering {
            share: Probability::ALWAYS,
            lead: Duration::MAX,
        });
        let mut link = LinkModel::new(
            LinkSettings {
                reordering,
                ..settings()
            },
            1,
            0,
            begin,
        );
        let at = begin + Duration::from_nanos(1514 * 8);
        assert_eq!(link.offer(begin, 1500).verdict, Verdict::Overtake { at });
    }

    #[test]
    fn a_copy_passes_the_bottleneck_right_behind_its_datagram() {
        let begin = start();
        let duplication = Probability::ALWAYS;
        let mut link = LinkModel::new(
            LinkSettings {
                duplication,
                ..settings()
            },
            1,
            0,
            begin,
        );
        let line_time = Duration::from_nanos(1514 * 8);
        let first = begin + 75 * MS + line_time;
        assert_eq!(
            link.offer(begin, 1500),
            Fate {
                verdict: Verdict::Deliver { at: first },
                copy: Some(Verdict::Deliver { at: first + line_time })
            }
        );
        assert_eq!(link.queued_bytes(begin), 2 * 1514);
    }

    #[test]
    fn a_share_of_those_that_pass_is_doubled_and_no_lost_one_is() {
        let begin = start();
        let settings = LinkSettings {
            loss: Loss::Bernoulli(chance(0.5)),
            duplication: chance(0.02),
            ..settings()
        };
        let mut link = LinkModel::new(settings, 12, 0, begin);
        let (mut passed, mut copies) = (0_u32, 0_u32);
        for index in 0..200_000_u32 {
            let fate = link.offer(begin + index * Duration::from_micros(30), 1500);
            passed += u32::from(passes(fate));
            copies += u32::from(fate.copy.is_some());
            assert!(passes(fate) || fate.copy.is_none());
        }
        // 2 % of 100 000: deviation 44, and that of `passed` adds 4.
        assert!((99_100..=100_900).contains(&passed), "{passed}");
        assert!((1_820..=2_180).contains(&copies), "{copies}");
    }

    #[test]
    fn reordering_and_copies_do_not_change_which_datagrams_are_lost() {
        let begin = start();
        let plain = LinkSettings {
            loss: Loss::Bernoulli(chance(0.1)),
            ..settings()
        };
        let lost = |settings: &LinkSettings| -> Vec<u32> {
            let mut link = LinkModel::new(settings.clone(), 13, 0, begin);
            let mut is_lost = |index: &u32| {
                let now = begin + *index * Duration::from_micros(40);
                link.offer(now, 1500) == dropped(DropCause::Loss)
            };
            (0..5_000).filter(|index| is_lost(index)).collect()
        };
        let busy = LinkSettings {
            duplication: chance(0.3),
            reordering: Some(Reordering {
                share: chance(0.3),
                lead: MS,
            }),
            ..plain.clone()
        };
        assert!(lost(&plain).len() > 400);
        assert_eq!(lost(&plain), lost(&busy));
    }

    #[test]
    fn a_script_loses_the_numbers_it_names_and_no_other() {
        let begin = start();
        let lost = "2, 5-7".parse().expect("numbers");
        let mut link = LinkModel::new(LinkSettings { lost, ..settings() }, 1, 0, begin);
        let gone: Vec<u32> = (1..=10)
            .filter(|_| link.offer(begin, 100) == dropped(DropCause::Script))
            .collect();
        assert_eq!(gone, [2, 5, 6, 7]);
    }

    #[test]
    fn a_burst_loses_the_next_datagrams_and_the_one_behind_them_passes() {
        let begin = start();
        let mut link = LinkModel::new(settings(), 1, 0, begin);
        assert!(passes(link.offer(begin, 100)));
        link.lose(3);
        let fates: Vec<bool> = (0..5).map(|_| passes(link.offer(begin, 100))).collect();
        assert_eq!(fates, [false, false, false, true, true]);
    }

    #[test]
    fn settings_survive_json() {
        let all = LinkSettings {
            loss: Loss::Bernoulli(chance(0.1)),
            lost: "3-4".parse().expect("numbers"),
            jitter: Some(Jitter {
                deviation: MS,
                correlation_time: 200 * MS,
            }),
            reordering: Some(Reordering {
                share: chance(0.01),
                lead: Duration::MAX,
            }),
            duplication: chance(0.001),
            ..settings()
        };
        let json = serde_json::to_string(&all).expect("plain data");
        assert_eq!(serde_json::from_str::<LinkSettings>(&json).expect("the same"), all);
    }
}
