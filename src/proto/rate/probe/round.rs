//! What one round trip brought: from the first packet sent in it until its acknowledgement.

use std::time::{Duration, Instant};

use super::super::controller::RoundTrip;
use super::delivery::DeliveryRate;
use crate::proto::page::ByteRate;

/// See the head of this file.
#[derive(Clone, Debug)]
pub(super) struct Round {
    began: Instant,
    /// Losses among what was sent before are not counted: they were answered already.
    counts_from: Instant,
    delivered: u64,
    lost: u64,
    least_rtt: Option<Duration>,
    last_rtt: Option<Duration>,
    /// The last rate that was measured.
    latest: Option<ByteRate>,
    marked: bool,
    limited: bool,
}

impl Round {
    /// Judges only what is sent from `now` on.
    pub(super) fn starting(now: Instant) -> Self {
        Self {
            began: now,
            counts_from: now,
            delivered: 0,
            lost: 0,
            least_rtt: None,
            last_rtt: None,
            latest: None,
            marked: false,
            limited: false,
        }
    }

    /// The next one, which judges what this one would have.
    pub(super) fn next(&mut self, now: Instant) {
        *self = Self {
            counts_from: self.counts_from,
            ..Self::starting(now)
        };
    }

    pub(super) fn delivered(&mut self, trip: RoundTrip, bytes: u64) {
        let rtt = trip.now.saturating_duration_since(trip.sent);
        self.delivered = self.delivered.saturating_add(bytes);
        self.least_rtt = Some(self.least_rtt.map_or(rtt, |least| least.min(rtt)));
        self.last_rtt = Some(rtt);
    }

    pub(super) fn lost(&mut self, trip: RoundTrip, bytes: u64) {
        if trip.sent >= self.counts_from {
            self.lost = self.lost.saturating_add(bytes);
        }
    }

    pub(super) fn marked(&mut self, trip: RoundTrip) {
        self.marked |= trip.sent >= self.counts_from;
    }

    pub(super) fn measured(&mut self, measured: DeliveryRate) {
        self.latest = Some(measured.rate);
        self.limited |= measured.limited;
    }

    /// The sender held itself back: what was measured says nothing about the path.
    pub(super) fn limit(&mut self) {
        self.limited = true;
    }

    pub(super) fn is_limited(&self) -> bool {
        self.limited
    }

    /// The rate at the end of it, where it was the path's.
    pub(super) fn latest(&self) -> Option<ByteRate> {
        self.latest.filter(|_| !self.limited)
    }

    pub(super) fn least_rtt(&self) -> Option<Duration> {
        self.least_rtt
    }

    pub(super) fn last_rtt(&self) -> Option<Duration> {
        self.last_rtt
    }

    /// Whether more was lost than a packet or two.
    pub(super) fn has_losses(&self, packet: u64) -> bool {
        self.lost >= LEAST_LOST * packet
    }

    /// Whether a packet sent at `sent` and acknowledged now ends it.
    pub(super) fn is_over(&self, newest_sent: Instant, now: Instant, packet: u64) -> bool {
        newest_sent >= self.began
            && now.saturating_duration_since(self.began) >= LEAST_ROUND
            && self.delivered.saturating_add(self.lost) >= LEAST_PACKETS * packet
    }

    /// The share that was lost.
    pub(super) fn loss(&self) -> f64 {
        self.lost as f64 / (self.delivered.saturating_add(self.lost)).max(1) as f64
    }

    /// Whether the link marked packets, or lost more than a path does that loses `tolerance` of them by chance: three standard
    /// deviations, so that a round of a hundred packets is not taken for congested by the fourth that is missing.
    pub(super) fn is_congested(&self, tolerance: f64, packet: u64) -> bool {
        let packets = (self.delivered.saturating_add(self.lost) / packet.max(1)).max(1) as f64;
        let by_chance = tolerance + 3.0 * (tolerance / packets).sqrt();
        self.marked || (self.lost >= LEAST_LOST * packet && self.loss() > by_chance)
    }
}

const LEAST_ROUND: Duration = Duration::from_millis(10);
const LEAST_PACKETS: u64 = 16;
const LEAST_LOST: u64 = 4;
