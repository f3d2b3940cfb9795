//! The controller of a path of which nobody said what it carries, and which others may use too: it finds the rate by itself, as
//! BBR does (draft-ietf-ccwg-bbr), from how fast packets arrive rather than from which are lost.
//!
//! The bandwidth B is the highest rate at which packets arrived ([`delivery`]) in this cycle and the one before. Packets leave at a
//! multiple of it that depends on the phase. A round is one round trip, at least 10 ms and 16 packets.
//!
//! ```text
//! start-up  2.77 x B   doubles each round, until it is congested, or a round stays below 1.25 x the best one and a queue stands,
//!                      or three rounds do
//! drain     0.5 x B    until no more is in flight than the path holds, four rounds at most
//! cruise    0.99 x B   (0.98 after it was congested) for 1.5 to 2.25 s, at least 8 and at most 63 rounds
//! up        (1+s) x B  one round: is there more?
//! down      (1-s) x B  one round, in which the answer comes. B grew and no queue did: up again, with 2 s. Otherwise cruise, with s / 2.
//! listen    0.5 x B    two rounds, if nothing came near the least RTT for 10 s ([`path`]): others keep a queue, or the path is longer
//!
//! s                    between 1/32 and 1/4; whatever it is, at least 48 packets in max(RTT, 100 ms), up to B
//! B                    never less than 12 packets in max(RTT, 100 ms)
//! congested            more than 2 % of a round lost, and more than chance would take (three standard deviations), or an ECN mark:
//!                      B = max(0.7 x B, the rate that arrived), s = s / 2, 0.75 x B for a round
//! overflowing          a queue stands in a whole round of the cruise and packets are lost, however few, or it is congested then:
//!                      the same with 0.8 of the rate that arrived
//! persistent congestion (RFC 9002, 7.6)  start-up again
//! ```
//!
//! So random loss up to 2 % does not slow it, while CUBIC needs less than one lost packet in 10 000 to fill a long path.
//!
//! What is fair to others: alone, its probes are of 3 % and its queue is empty between them. So a queue that stands means that somebody
//! else is there, and losses then are of its overflow and answered like CUBIC answers them; probes stay small, since they find a queue and
//! nothing more. When the others slow down, the queue goes away and the probes grow. The same number of packets in every flow's probe
//! is what brings two flows together (additive increase). A buffer of less than some 6 ms shows no queue; there CUBIC is left little,
//! as beside any BBR.
//!
//! Whoever has less to send than the path takes is *limited*: nothing that is measured then lowers B or ends a phase, so a gateway that
//! is held up by its encoder finds the rate where it left it. So is who is capped from outside.
//!
//! `window = B x (2.25 x least RTT + 10 ms)`, at least 32 packets: a bound on the queue that this sender makes where nothing is
//! lost, with room for delayed acknowledgements on short paths.

use std::time::{Duration, Instant};

use self::delivery::DeliveryMeter;
use self::path::PathLength;
use self::round::Round;
use super::controller::{RoundTrip, scaled};
use crate::proto::page::ByteRate;

mod delivery;
mod path;
mod round;

/// See the head of this file.
#[derive(Clone, Debug)]
pub struct ProbeController {
    cap: ByteRate,
    mtu: u64,
    path: PathLength,
    delivery: DeliveryMeter,
    bandwidth: Bandwidth,
    round: Round,
    phase: Phase,
    /// By how much a probe exceeds the bandwidth, as a share of it.
    step: f64,
    newest_sent: Instant,
    /// What was sent before arrives at the rate that was given up, and tells nothing of the new one.
    counts_from: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    StartUp { best: ByteRate, flat_rounds: u32 },
    Drain { rounds: u32 },
    Cruise { since: Instant, rounds: u32, gain: f64 },
    Up { before: ByteRate },
    Down { before: ByteRate, answers: bool },
    Listen { rounds: u32, least: Option<Duration> },
}

/// The highest rate in the cycle that runs and the one before.
#[derive(Clone, Copy, Debug)]
struct Bandwidth {
    before: ByteRate,
    now: ByteRate,
}

impl ProbeController {
    /// Starts with what 32 packets a round trip make of this path, whose round trip time is `rtt` until one is measured.
    #[must_use]
    pub fn new(rtt: Duration, mtu: u16, now: Instant) -> Self {
        let mut controller = Self {
            cap: ByteRate(u64::MAX),
            mtu: mtu.into(),
            path: PathLength::new(rtt, now),
            delivery: DeliveryMeter::new(now),
            bandwidth: Bandwidth {
                before: ByteRate(0),
                now: ByteRate(0),
            },
            round: Round::starting(now),
            phase: Phase::start_up(),
            step: MAX_STEP,
            newest_sent: now,
            counts_from: now,
        };
        controller.bandwidth.now = controller.first_rate();
        controller
    }

    /// The rate to send at, in bytes as the link counts them.
    #[must_use]
    pub fn rate(&self) -> ByteRate {
        self.wanted().min(self.cap).max(ByteRate(1))
    }

    /// The highest rate that it may come to within a round trip, as far as is known.
    #[must_use]
    pub fn reach(&self) -> ByteRate {
        self.rate().max(self.bandwidth.highest().min(self.cap))
    }

    /// The round trip time without queues: the least of late, or the one that was assumed before.
    #[must_use]
    pub fn least_rtt(&self) -> Duration {
        self.path.least()
    }

    /// Bytes of UDP payload that may be in flight.
    #[must_use]
    pub fn window(&self) -> u64 {
        let time = self.path.least().mul_f64(WINDOW_GAIN) + WINDOW_ALLOWANCE;
        self.payload(self.bandwidth.highest().min(self.cap).bytes_in(time))
            .max(FLOOR_PACKETS * self.mtu)
    }

    /// Never more than this, from now on.
    pub fn set_cap(&mut self, cap: ByteRate) {
        self.cap = cap;
    }

    /// The path takes packets of this size.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.mtu = mtu.into();
    }

    /// Packets leave now.
    pub fn on_sent(&mut self, now: Instant) {
        self.delivery.sent(now, self.path.least());
    }

    /// A packet of this payload arrived.
    pub fn on_ack(&mut self, trip: RoundTrip, payload: u64) {
        let bytes = payload.saturating_add(HEADERS);
        let rtt = trip.now.saturating_duration_since(trip.sent);
        if self.path.sample(rtt, trip.now) && matches!(self.phase, Phase::StartUp { .. }) {
            self.bandwidth.raise(self.first_rate());
        }
        self.newest_sent = self.newest_sent.max(trip.sent);
        self.delivery.acknowledged(trip.sent, trip.now, bytes);
        self.round.delivered(trip, bytes);
    }

    /// One acknowledgement is taken in; so many bytes of payload are still in flight. `limited`: there was no more to send.
    pub fn on_end_acks(&mut self, now: Instant, in_flight: u64, limited: bool) {
        if limited {
            self.delivery.limited(in_flight);
            self.round.limit();
        } else if self.wanted() > self.cap {
            self.round.limit();
        }
        if let Some(measured) = self.delivery.measure(now) {
            self.round.measured(measured);
            if self.newest_sent >= self.counts_from && !matches!(self.phase, Phase::Down { answers: false, .. }) {
                self.bandwidth.raise(measured.rate);
            }
        }
        if self.round.is_over(self.newest_sent, now, self.packet()) {
            self.end_round(now, in_flight);
        }
    }

    /// Packets of this payload in all were lost, the last of which was sent at `trip.sent`.
    pub fn on_loss(&mut self, trip: RoundTrip, payload: u64) {
        let packets = payload.div_ceil(self.mtu.max(1));
        self.round
            .lost(trip, payload.saturating_add(packets.saturating_mul(HEADERS)));
    }

    /// The link marked a packet that was sent at `trip.sent` (ECN-CE).
    pub fn on_ecn(&mut self, trip: RoundTrip) {
        self.round.marked(trip);
    }

    /// Everything that was sent for several round trips is lost.
    pub fn on_persistent_congestion(&mut self, now: Instant) {
        let first = self.first_rate();
        self.bandwidth.bound(first);
        self.bandwidth.turn();
        self.counts_from = now;
        self.enter(Phase::start_up(), now);
    }

    fn end_round(&mut self, now: Instant, in_flight: u64) {
        let congested = self.round.is_congested(LOSS_TOLERANCE, self.packet());
        match self.phase {
            Phase::StartUp { best, flat_rounds } => self.start_up(now, best, flat_rounds, congested),
            Phase::Drain { rounds } => {
                let holds = self.payload(
                    self.bandwidth
                        .highest()
                        .bytes_in(self.path.least() + WINDOW_ALLOWANCE / 2),
                );
                if in_flight <= holds || rounds + 1 >= MAX_DRAIN_ROUNDS {
                    self.enter(Phase::cruise(now, congested), now);
                } else {
                    self.phase = Phase::Drain { rounds: rounds + 1 };
                    self.round.next(now);
                }
            }
            Phase::Cruise { .. } if congested || self.is_overflowing() => self.slow_down(now, LEFT_TO_OTHERS),
            _ if congested => self.slow_down(now, 1.0),
            Phase::Cruise { since, rounds, gain } => self.cruise(now, since, rounds, gain),
            Phase::Up { before } => self.enter(Phase::Down { before, answers: true }, now),
            Phase::Down { before, answers } => {
                let goes_on = answers && self.was_answered(before);
                if answers && !self.round.is_limited() {
                    let factor = if goes_on { 2.0 } else { 0.5 };
                    self.step = (self.step * factor).clamp(MIN_STEP, MAX_STEP);
                }
                if !answers {
                    self.counts_from = now;
                }
                if goes_on {
                    self.up(now);
                } else {
                    self.enter(Phase::cruise(now, !answers), now);
                }
            }
            Phase::Listen { rounds, least } => {
                let least = [least, self.round.least_rtt()].into_iter().flatten().min();
                if rounds + 1 < LISTEN_ROUNDS {
                    self.phase = Phase::Listen {
                        rounds: rounds + 1,
                        least,
                    };
                    self.round.next(now);
                } else {
                    if let Some(least) = least {
                        self.path.set(least, now);
                    }
                    self.enter(Phase::cruise(now, false), now);
                }
            }
        }
    }

    fn start_up(&mut self, now: Instant, best: ByteRate, flat_rounds: u32, congested: bool) {
        let least = self.path.least();
        let queue = self.round.least_rtt().map(|rtt| rtt.saturating_sub(least));
        let queued = queue.is_some_and(|queue| queue > (least / 8).max(START_UP_QUEUE));
        let Some(latest) = self.round.latest() else {
            if congested {
                self.bandwidth
                    .bound(scaled(self.bandwidth.highest(), 1.0 - self.round.loss()));
                self.enter(Phase::Drain { rounds: 0 }, now);
            } else {
                self.round.next(now);
            }
            return;
        };
        let grew = latest.0 as f64 >= best.0 as f64 * FULL_GROWTH;
        let flat_rounds = if grew { 0 } else { flat_rounds + 1 };
        if congested || queued && !grew || flat_rounds >= FULL_ROUNDS {
            self.bandwidth.bound(latest);
            self.enter(Phase::Drain { rounds: 0 }, now);
            return;
        }
        let best = if grew { latest } else { best };
        self.phase = Phase::StartUp { best, flat_rounds };
        self.round.next(now);
    }

    fn cruise(&mut self, now: Instant, since: Instant, rounds: u32, gain: f64) {
        let rounds = rounds + 1;
        // Flows that probe at the same time would take each other's probe for the path's answer.
        let spread = (self.delivery.delivered() / 4096 % 1000) as f64 / 1000.0;
        let long_enough = now.saturating_duration_since(since) >= PROBE_EVERY.mul_f64(1.0 + spread / 2.0);
        let due = rounds >= MIN_CRUISE_ROUNDS && long_enough || rounds >= MAX_CRUISE_ROUNDS;
        if self.round.is_limited() {
            self.round.next(now);
        } else if self.path.is_old(now) {
            let phase = Phase::Listen { rounds: 0, least: None };
            self.enter(phase, now);
        } else if due {
            self.bandwidth.turn();
            self.up(now);
        } else {
            self.phase = Phase::Cruise { since, rounds, gain };
            self.round.next(now);
        }
    }

    fn up(&mut self, now: Instant) {
        let before = self.bandwidth.highest();
        self.enter(Phase::Up { before }, now);
    }

    /// Whether the probe from this rate found more, rather than a queue.
    fn was_answered(&self, before: ByteRate) -> bool {
        let grew = self.bandwidth.highest().0 as f64 > before.0 as f64 * (1.0 + self.excess(before) / 3.0);
        let least = self.path.least();
        let made = least.mul_f64(self.step / 2.0).max(STANDING_QUEUE);
        let queued = self.round.last_rtt().is_some_and(|rtt| rtt > least + made);
        grew && !queued
    }

    fn is_overflowing(&self) -> bool {
        let least = self.path.least();
        let empty = least + (least / 16).max(STANDING_QUEUE);
        self.round.least_rtt().is_some_and(|rtt| rtt > empty) && self.round.has_losses(self.packet())
    }

    /// To this share of what arrives.
    fn slow_down(&mut self, now: Instant, share: f64) {
        let highest = self.bandwidth.highest();
        let arrives = self.round.latest().unwrap_or(scaled(highest, 1.0 - self.round.loss()));
        self.bandwidth
            .bound(scaled(arrives, share).max(scaled(highest, LEAST_KEPT)));
        self.step = (self.step / 2.0).max(MIN_STEP);
        let before = self.bandwidth.highest();
        self.enter(Phase::Down { before, answers: false }, now);
    }

    fn enter(&mut self, phase: Phase, now: Instant) {
        self.phase = phase;
        self.round = Round::starting(now);
    }

    fn wanted(&self) -> ByteRate {
        let gain = match self.phase {
            Phase::StartUp { .. } => START_UP_GAIN,
            Phase::Drain { .. } | Phase::Listen { .. } => 0.5,
            Phase::Cruise { gain, .. } => gain,
            Phase::Up { before } => 1.0 + self.excess(before),
            Phase::Down { before, answers: true } => 1.0 - self.excess(before).min(MAX_STEP),
            Phase::Down { answers: false, .. } => 1.0 - MAX_STEP,
        };
        scaled(self.bandwidth.highest(), gain).max(self.least_rate())
    }

    /// By how much a probe of a flow at this rate exceeds it, as a share. Some of it is the same number of packets for every flow, without
    /// which two flows would keep for ever the shares that they began with.
    fn excess(&self, rate: ByteRate) -> f64 {
        let seconds = self.path.least().max(SHORT_PATH).as_secs_f64();
        let added = ADDED_PACKETS * self.packet() as f64 / seconds;
        (added / rate.0.max(1) as f64).min(1.0).max(self.step)
    }

    fn first_rate(&self) -> ByteRate {
        let rate = self.packets_in(FLOOR_PACKETS, self.path.least().max(LEAST_FIRST_RTT));
        scaled(rate, 1.0 / START_UP_GAIN)
    }

    /// What it sends at however congested the path is: enough to see by that it no longer is.
    fn least_rate(&self) -> ByteRate {
        self.packets_in(LEAST_PACKETS, self.path.least().max(SHORT_PATH))
    }

    fn packets_in(&self, packets: u64, time: Duration) -> ByteRate {
        let rate = u128::from(packets * self.packet()) * 1_000_000_000 / time.as_nanos().max(1);
        ByteRate(u64::try_from(rate).unwrap_or(u64::MAX))
    }

    /// A full packet as the link counts it.
    fn packet(&self) -> u64 {
        self.mtu + HEADERS
    }

    /// The UDP payload in full packets that take so many bytes of the link.
    fn payload(&self, bytes: u64) -> u64 {
        let payload = u128::from(bytes) * u128::from(self.mtu) / u128::from(self.packet());
        u64::try_from(payload).unwrap_or(u64::MAX)
    }
}

impl Phase {
    fn start_up() -> Self {
        Self::StartUp {
            best: ByteRate(0),
            flat_rounds: 0,
        }
    }

    fn cruise(now: Instant, careful: bool) -> Self {
        Self::Cruise {
            since: now,
            rounds: 0,
            gain: if careful { CAREFUL_CRUISE } else { CRUISE },
        }
    }
}

impl Bandwidth {
    fn highest(self) -> ByteRate {
        self.before.max(self.now)
    }

    fn raise(&mut self, rate: ByteRate) {
        self.now = self.now.max(rate);
    }

    fn bound(&mut self, rate: ByteRate) {
        self.now = self.now.min(rate);
        self.before = self.before.min(rate);
    }

    /// A cycle ends: what was measured in the one before it is forgotten.
    fn turn(&mut self) {
        self.before = self.now;
        self.now = ByteRate(0);
    }
}

/// IPv4, UDP and Ethernet, as the paced socket counts them.
const HEADERS: u64 = 42;

/// The side that only receives must always be able to send its window updates: while one waits, quinn sends no acknowledgement
/// either, and the sender saw gaps of 10 000 packets between them, at 1 Gbit/s and 1 % loss (2026-11-23). Three times the initial
/// window of RFC 6928 is still polite.
const FLOOR_PACKETS: u64 = 32;

const LOSS_TOLERANCE: f64 = 0.02;
const LEFT_TO_OTHERS: f64 = 0.8;
const LEAST_KEPT: f64 = 0.7;

/// Longer than acknowledgements are delayed (5 ms).
const STANDING_QUEUE: Duration = Duration::from_millis(6);

const START_UP_GAIN: f64 = 2.77;
const FULL_GROWTH: f64 = 1.25;
const FULL_ROUNDS: u32 = 3;
const START_UP_QUEUE: Duration = Duration::from_millis(10);
const MAX_DRAIN_ROUNDS: u32 = 4;
const CRUISE: f64 = 0.99;
const CAREFUL_CRUISE: f64 = 0.98;
const PROBE_EVERY: Duration = Duration::from_millis(1500);
const MIN_CRUISE_ROUNDS: u32 = 8;
const MAX_CRUISE_ROUNDS: u32 = 63;
const MAX_STEP: f64 = 0.25;
const MIN_STEP: f64 = 1.0 / 32.0;
const ADDED_PACKETS: f64 = 48.0;
const LISTEN_ROUNDS: u32 = 2;
const WINDOW_GAIN: f64 = 2.25;
const WINDOW_ALLOWANCE: Duration = Duration::from_millis(10);
const LEAST_PACKETS: u64 = 12;
/// Rates that are so many packets a round trip are no higher on shorter paths.
const SHORT_PATH: Duration = Duration::from_millis(100);
const LEAST_FIRST_RTT: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests;
