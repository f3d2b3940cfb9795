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
pub(super) mod tests;
