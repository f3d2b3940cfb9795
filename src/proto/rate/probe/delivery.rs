//! How fast packets arrive: what was acknowledged between two moments, over the time that it took.
//!
//! Each moment of sending is remembered with what had been acknowledged by then. When a packet of it is acknowledged,
//!
//! ```text
//! rate = acknowledged since it was sent / max(time since then, time in which the acknowledged was sent)
//! ```
//!
//! (draft-cheng-iccrg-delivery-rate-estimation). The second time keeps acknowledgements that come in a bunch from looking like a
//! faster path. Over less than 10 ms nothing is measured, since that is how coarse timers and delayed acknowledgements are.
//!
//! quinn names a packet by the moment it was sent only, which is the same for all that are sent in one go; so moments are remembered, not
//! packets. One every 64th of a round trip is enough: a measurement from the moment before is a little longer and as exact.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::proto::page::ByteRate;

/// See the head of this file.
#[derive(Clone, Debug)]
pub(super) struct DeliveryMeter {
    /// In the order of time.
    moments: VecDeque<Moment>,
    delivered: u64,
    /// When the last acknowledgement came.
    delivered_at: Instant,
    /// When the newest packet that was acknowledged had been sent.
    newest_sent: Instant,
    /// What was sent up to here was sent by somebody who had no more to send.
    limited_until: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Moment {
    at: Instant,
    delivered: u64,
    delivered_at: Instant,
    newest_sent: Instant,
    limited: bool,
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct DeliveryRate {
    pub(super) rate: ByteRate,
    /// The sender had no more to send, so that the path may be faster.
    pub(super) limited: bool,
}

impl DeliveryMeter {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            moments: VecDeque::new(),
            delivered: 0,
            delivered_at: now,
            newest_sent: now,
            limited_until: None,
        }
    }

    /// Something is sent now, on a path with this round trip time.
    pub(super) fn sent(&mut self, now: Instant, rtt: Duration) {
        let apart = rtt / MOMENTS_A_ROUND_TRIP;
        if self.moments.back().is_some_and(|last| now < last.at + apart) {
            return;
        }
        if self.moments.len() == MAX_MOMENTS {
            self.moments.pop_front();
        }
        self.moments.push_back(Moment {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            newest_sent: self.newest_sent,
            limited: self.is_limited(),
        });
    }

    /// A packet that was sent at `sent` arrived.
    pub(super) fn acknowledged(&mut self, sent: Instant, now: Instant, bytes: u64) {
        self.delivered = self.delivered.saturating_add(bytes);
        self.delivered_at = self.delivered_at.max(now);
        self.newest_sent = self.newest_sent.max(sent);
    }

    /// The sender has no more to send; so many bytes are in flight.
    pub(super) fn limited(&mut self, in_flight: u64) {
        self.limited_until = Some(self.delivered.saturating_add(in_flight));
    }

    fn is_limited(&self) -> bool {
        self.limited_until.is_some_and(|until| self.delivered <= until)
    }

    /// What has been acknowledged in all.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// The rate by the newest packet that was acknowledged.
    pub(super) fn measure(&mut self, now: Instant) -> Option<DeliveryRate> {
        let newest = self.newest_sent;
        let fits = |moment: &Moment| {
            moment.at <= newest && now.saturating_duration_since(moment.delivered_at) >= LEAST_INTERVAL
        };
        while self.moments.get(1).is_some_and(fits) {
            self.moments.pop_front();
        }
        let from = *self.moments.front().filter(|moment| fits(moment))?;
        let arriving = now.saturating_duration_since(from.delivered_at);
        let sending = newest.saturating_duration_since(from.newest_sent);
        let bytes = u128::from(self.delivered - from.delivered);
        let rate = bytes * 1_000_000_000 / arriving.max(sending).as_nanos().max(1);
        Some(DeliveryRate {
            rate: ByteRate(u64::try_from(rate).unwrap_or(u64::MAX)),
            limited: from.limited || self.is_limited(),
        })
    }
}

const MOMENTS_A_ROUND_TRIP: u32 = 64;
const LEAST_INTERVAL: Duration = Duration::from_millis(10);
/// Sixteen round trips, if none of them brought an acknowledgement.
const MAX_MOMENTS: usize = 1024;

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const RTT: Duration = Duration::from_millis(100);

    /// 1000 bytes every millisecond, acknowledged a round trip later in bunches of `bunch` milliseconds; the highest rate measured.
    fn highest(bunch: u32) -> u64 {
        let start = Instant::now();
        let mut meter = DeliveryMeter::new(start);
        let mut highest = 0;
        for tick in 0..1000 {
            let now = start + MS * tick;
            meter.sent(now, RTT);
            if tick >= 100 && (tick - 100) % bunch == bunch - 1 {
                for sent in tick - 100 + 1 - bunch..=tick - 100 {
                    meter.acknowledged(start + MS * sent, now, 1000);
                }
                highest = highest.max(meter.measure(now).map_or(0, |measured| measured.rate.0));
            }
        }
        highest
    }

    #[test]
    fn a_steady_sender_is_measured_at_its_rate_however_acknowledgements_are_bunched() {
        for bunch in [1, 5, 25] {
            let rate = highest(bunch);
            assert!((970_000..=1_035_000).contains(&rate), "bunches of {bunch}: {rate}");
        }
    }

    #[test]
    fn who_had_no_more_to_send_is_measured_as_limited_until_that_has_arrived() {
        let start = Instant::now();
        let mut meter = DeliveryMeter::new(start);
        meter.limited(1000);
        meter.sent(start, RTT);
        meter.acknowledged(start, start + RTT, 1000);
        assert!(meter.measure(start + RTT).is_some_and(|measured| measured.limited));
        for trip in 1..=2 {
            meter.sent(start + trip * RTT, RTT);
            meter.acknowledged(start + trip * RTT, start + (trip + 1) * RTT, 1000);
            let measured = meter.measure(start + (trip + 1) * RTT);
            assert_eq!(measured.map(|measured| measured.limited), Some(trip == 1));
        }
    }
}
