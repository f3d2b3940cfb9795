//! The controller of a link whose capacity is known: send at that rate from the first packet, and brake only on evidence that
//! the link is not what the operator said.
//!
//! Random loss is no such evidence; that is what sets it apart from CUBIC, which at 150 ms and 0.1 % loss keeps 3.5 Mbit/s of any
//! link. Each round (one round trip, at least 50 ms and 50 packets) is judged by three figures:
//!
//! ```text
//! loss        L = lost / (lost + delivered)                        congested above the tolerance (5 %)
//! queue       Q = least RTT of the round - least RTT              congested above max(20 ms, least RTT / 4)
//! fit         F = (time the packets were sent in / time they arrived in) x (1 - L), at most 1
//!
//! congested in two rounds running        rate = 0.9 x F x rate       (0.9 of what the link delivered)
//! ECN mark                               rate = 0.9 x F x rate       at once
//! L > 4 x tolerance                      rate = F x rate             at once: the capacity is plainly wrong
//! persistent congestion (RFC 9002, 7.6)  rate = floor, then eight times as much each clean round up to 0.7 of the old rate
//! silence: nothing of 50 ms arrived      not judged at all, unless there was another within the last 10 s
//! four clean rounds running              rate = 1.25 x rate, up to the capacity
//! ```
//!
//! Below that, a standing queue is drained by trimming the rate a little ([`queue`]).
//!
//! Silence is a path that was interrupted: it says nothing of the capacity, and a link that is too slow loses packets among others that it
//! delivers. Judged as loss, 1.5 s of it cost the rate of the next 5 s (2026-11-27).
//!
//! F is relative, so a sender with little to send does not brake down to the little it sent. After a brake, packets that were sent
//! before it are not judged again. Starting at a remembered capacity is the idea of Careful Resume (RFC 9959); here
//! the memory is the configuration.
//!
//! `window = rate x (2 x least RTT + 10 ms)`: twice the BDP so that it never limits, since the pacer does, with room for the peer's ACK
//! delay and our timers on short links.

use std::time::{Duration, Instant};

use self::queue::StandingQueue;
use crate::proto::page::ByteRate;

mod queue;

/// What the operator says about the link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ControllerSettings {
    /// The rate that is never exceeded.
    pub capacity: ByteRate,
    /// Round trip time until one is measured.
    pub rtt: Duration,
    /// Share of packets that the link may lose without being congested, 0..1.
    pub loss_tolerance: f64,
}

impl ControllerSettings {
    /// A link of this capacity and round trip time, with a loss tolerance of 5 %.
    #[must_use]
    pub fn new(capacity: ByteRate, rtt: Duration) -> Self {
        Self {
            capacity,
            rtt,
            loss_tolerance: 0.05,
        }
    }
}

/// See the head of this file.
#[derive(Clone, Debug)]
pub struct LinkController {
    capacity: ByteRate,
    loss_tolerance: f64,
    rate: ByteRate,
    /// Up to where the rate grows fast after a collapse.
    resume: Option<ByteRate>,
    configured_rtt: Duration,
    queue: StandingQueue,
    /// The rate before the first of several brakes for a queue.
    before_brakes: Option<ByteRate>,
    round: Round,
    congested_rounds: u32,
    clean_rounds: u32,
    silence: Silence,
    /// The losses that are reported next are those of packets too large for the path.
    narrowed: bool,
    mtu: u64,
}

/// When a packet left and when its acknowledgement came.
#[derive(Clone, Copy, Debug)]
pub struct RoundTrip {
    /// When the packet was sent.
    pub sent: Instant,
    /// When it was acknowledged or found lost.
    pub now: Instant,
}

impl LinkController {
    /// Starts at the capacity.
    #[must_use]
    pub fn new(settings: ControllerSettings, mtu: u16, now: Instant) -> Self {
        Self {
            capacity: settings.capacity,
            loss_tolerance: settings.loss_tolerance,
            rate: settings.capacity,
            resume: None,
            configured_rtt: settings.rtt,
            queue: StandingQueue::new(),
            before_brakes: None,
            round: Round::starting(now),
            congested_rounds: 0,
            clean_rounds: 0,
            silence: Silence::default(),
            narrowed: false,
            mtu: mtu.into(),
        }
    }

    /// The rate to send at, in bytes at IP level.
    #[must_use]
    pub fn rate(&self) -> ByteRate {
        scaled(self.rate, 1.0 - self.queue.trim())
            .max(ByteRate(1))
            .min(self.rate)
    }

    /// Bytes that may be in flight.
    #[must_use]
    pub fn window(&self) -> u64 {
        let time = self.least_rtt().saturating_mul(2) + WINDOW_ALLOWANCE;
        self.rate.bytes_in(time).max(MIN_WINDOW_PACKETS * self.mtu)
    }

    /// The round trip time without queues: the least that was measured, or the configured one before.
    #[must_use]
    pub fn least_rtt(&self) -> Duration {
        self.queue.base().unwrap_or(self.configured_rtt)
    }

    /// The link has another capacity from now on. Less takes effect at once. More takes effect at once if the link was full before. Otherwise it is
    /// taken to carry as much of the new one as of the old one, which is approached eightfold each clean round.
    pub fn set_capacity(&mut self, capacity: ByteRate) {
        if self.rate == self.capacity {
            self.rate = capacity;
        } else if capacity > self.capacity {
            let more = capacity.0 as f64 / self.capacity.0.max(1) as f64;
            self.resume = Some(scaled(self.resume.unwrap_or(self.rate), more));
        }
        self.capacity = capacity;
        self.rate = self.rate.min(capacity);
    }

    /// The path takes packets of this size. Smaller ones than before: what was lost until now, and is reported next, was too large for it.
    pub fn set_mtu(&mut self, mtu: u16) {
        if u64::from(mtu) < self.mtu {
            self.narrowed = true;
            self.resume = Some(self.capacity);
        }
        self.mtu = mtu.into();
    }

    /// A packet arrived.
    pub fn on_ack(&mut self, trip: RoundTrip, bytes: u64) {
        let rtt = trip.now.saturating_duration_since(trip.sent);
        self.queue.sample(rtt);
        if self.silence.broken_by(trip) && self.round.lost > 0 {
            self.round = Round::starting(trip.sent);
            self.silence.forgiven = Some(trip.now);
        }
        if self.round.counts(trip.sent) {
            self.round.delivered(trip, rtt, bytes);
            self.end_round_if_complete(trip);
        }
    }

    /// Packets were lost, the last of which was sent at `trip.sent`.
    pub fn on_loss(&mut self, trip: RoundTrip, bytes: u64) {
        if std::mem::take(&mut self.narrowed) {
            self.restart_rounds(trip.now);
        } else if self.silence.forgives(trip) {
            return;
        }
        if self.round.counts(trip.sent) {
            self.round.lost += bytes;
        }
    }

    /// The link marked a packet that was sent at `trip.sent` (ECN-CE).
    pub fn on_ecn(&mut self, trip: RoundTrip) {
        if self.round.counts(trip.sent) {
            self.brake(0.9 * self.round.fit(), trip.now);
        }
    }

    /// Everything that was sent for several round trips is lost.
    pub fn on_persistent_congestion(&mut self, now: Instant) {
        if self.resume.is_none() {
            self.resume = Some(scaled(self.rate(), 0.7));
        }
        self.rate = self.floor().min(self.rate());
        self.queue.reset_trim();
        self.restart_rounds(now);
    }

    fn end_round_if_complete(&mut self, trip: RoundTrip) {
        let enough = self.round.delivered + self.round.lost >= MIN_ROUND_PACKETS * self.mtu;
        let long = trip.now.saturating_duration_since(self.round.began) >= MIN_ROUND;
        if !enough || !long || trip.sent < self.round.began {
            return;
        }
        let loss = self.round.loss();
        let round_rtt = self.round.least_rtt.unwrap_or(self.configured_rtt);
        self.queue.observe(round_rtt, self.capacity.time_for(self.mtu));
        let queued = self.queue.length(round_rtt) > MIN_QUEUE.max(self.least_rtt() / 4);
        if loss > SEVERE * self.loss_tolerance {
            self.brake(self.round.fit(), trip.now);
        } else if loss > self.loss_tolerance || queued {
            self.congested_rounds += 1;
            self.clean_rounds = 0;
            if self.congested_rounds < ROUNDS_TO_BRAKE {
                self.round.next(trip.now);
            } else if queued {
                self.brake_for_queue(round_rtt, trip.now);
            } else {
                self.brake(0.9 * self.round.fit(), trip.now);
            }
        } else {
            self.congested_rounds = 0;
            self.before_brakes = None;
            self.clean_rounds += 1;
            self.queue.adapt(round_rtt);
            self.recover();
            self.round.next(trip.now);
        }
    }

    /// Brakes, unless brakes do not help: then the path is longer than it was, and the rate returns to what it was before them.
    fn brake_for_queue(&mut self, round_rtt: Duration, now: Instant) {
        let (before, factor) = (self.rate(), 0.9 * self.round.fit());
        let before = *self.before_brakes.get_or_insert(before);
        if self.queue.braked(round_rtt) {
            self.before_brakes = None;
            self.resume = Some(before);
            self.restart_rounds(now);
        } else {
            self.brake(factor, now);
        }
    }

    fn brake(&mut self, factor: f64, now: Instant) {
        let rate = self.rate();
        // What is lost at the floor is not lost to the rate: packets may be too large for the path, or it is down still.
        if rate > self.floor() {
            self.resume = None;
        }
        self.rate = scaled(rate, factor).max(self.floor()).min(rate);
        self.queue.reset_trim();
        self.restart_rounds(now);
    }

    fn recover(&mut self) {
        if let Some(resume) = self.resume {
            self.rate = scaled(self.rate, 8.0).min(resume).max(self.rate).min(self.capacity);
            if self.rate >= resume.min(self.capacity) {
                self.resume = None;
            }
        } else if self.clean_rounds >= ROUNDS_TO_RECOVER {
            self.rate = scaled(self.rate, 1.25)
                .max(ByteRate(self.rate.0.saturating_add(1)))
                .min(self.capacity);
            self.clean_rounds = 0;
        }
    }

    /// Judges only what is sent from `now` on.
    fn restart_rounds(&mut self, now: Instant) {
        self.congested_rounds = 0;
        self.clean_rounds = 0;
        self.round = Round::starting(now);
    }

    /// The lowest rate to brake to: still enough packets a round trip to see a recovery by.
    fn floor(&self) -> ByteRate {
        ByteRate(self.capacity.0 / 64)
            .max(ByteRate(16 * 1024))
            .min(self.capacity)
    }
}

/// Tells when the path carried nothing for a while.
#[derive(Clone, Debug, Default)]
struct Silence {
    /// The latest packet that arrived was sent then.
    heard: Option<Instant>,
    /// What was sent before this, and lost, is not judged.
    broken: Option<Instant>,
    /// Losses were last forgiven then.
    forgiven: Option<Instant>,
}

impl Silence {
    /// Whether nothing arrived of what was sent for a while before this packet, or nothing was sent. Not where losses were forgiven of late:
    /// what is left of a link that hardly carries anything must not pass for silences.
    #[must_use]
    fn broken_by(&mut self, trip: RoundTrip) -> bool {
        let heard = *self.heard.get_or_insert(trip.sent);
        self.heard = Some(heard.max(trip.sent));
        let silent = trip.sent.saturating_duration_since(heard) >= MIN_SILENCE;
        let seldom = |forgiven| trip.now.saturating_duration_since(forgiven) >= BETWEEN_SILENCES;
        let broken = silent && self.forgiven.is_none_or(seldom);
        if broken {
            self.broken = Some(trip.sent);
        }
        broken
    }

    /// Whether a loss belongs to it.
    fn forgives(&mut self, trip: RoundTrip) -> bool {
        let belongs = self.broken.is_some_and(|broken| trip.sent < broken);
        if belongs {
            self.forgiven = Some(trip.now);
        }
        belongs
    }
}

const MIN_SILENCE: Duration = Duration::from_millis(50);
const BETWEEN_SILENCES: Duration = Duration::from_secs(10);

const WINDOW_ALLOWANCE: Duration = Duration::from_millis(10);
const MIN_WINDOW_PACKETS: u64 = 64;
const MIN_ROUND_PACKETS: u64 = 50;
const MIN_QUEUE: Duration = Duration::from_millis(20);
const MIN_ROUND: Duration = Duration::from_millis(50);
const SEVERE: f64 = 4.0;
const ROUNDS_TO_BRAKE: u32 = 2;
const ROUNDS_TO_RECOVER: u32 = 4;

pub(super) fn scaled(rate: ByteRate, factor: f64) -> ByteRate {
    ByteRate((rate.0 as f64 * factor) as u64)
}

/// What one round trip brought.
#[derive(Clone, Debug)]
struct Round {
    /// An acknowledgement of a packet sent from here on ends the round.
    began: Instant,
    /// Packets sent before this are not counted.
    counts_from: Instant,
    delivered: u64,
    lost: u64,
    least_rtt: Option<Duration>,
    first: Option<RoundTrip>,
    last: Option<RoundTrip>,
}

impl Round {
    fn starting(now: Instant) -> Self {
        Self {
            began: now,
            counts_from: now,
            delivered: 0,
            lost: 0,
            least_rtt: None,
            first: None,
            last: None,
        }
    }

    fn next(&mut self, now: Instant) {
        *self = Self {
            counts_from: self.counts_from,
            ..Self::starting(now)
        };
    }

    fn counts(&self, sent: Instant) -> bool {
        sent >= self.counts_from
    }

    fn delivered(&mut self, trip: RoundTrip, rtt: Duration, bytes: u64) {
        self.delivered += bytes;
        self.least_rtt = Some(self.least_rtt.map_or(rtt, |least| least.min(rtt)));
        self.first.get_or_insert(trip);
        self.last = Some(trip);
    }

    fn loss(&self) -> f64 {
        let total = self.delivered + self.lost;
        if total == 0 {
            0.0
        } else {
            self.lost as f64 / total as f64
        }
    }

    /// The share of the sent rate that the link carried, 0..=1.
    fn fit(&self) -> f64 {
        let stretch = match (self.first, self.last) {
            (Some(first), Some(last)) => {
                let sent = last.sent.saturating_duration_since(first.sent).as_secs_f64();
                let arrived = last.now.saturating_duration_since(first.now).as_secs_f64();
                if arrived > sent { sent / arrived } else { 1.0 }
            }
            _ => 1.0,
        };
        // Half at most in one step: a pause of the receiver must not look like a link without capacity.
        (stretch * (1.0 - self.loss())).max(0.5 * (1.0 - self.loss()))
    }
}

#[cfg(test)]
mod tests;
