//! Notices that acknowledgements have stopped coming, so that a cut does not swallow a whole window.
//!
//! A window of two round trips lets a sender go on for one and a half of them into a cut, and all of it is sent again. Packets that were
//! sent in a row are acknowledged in a row, so a cut shows long before the window is full: as soon as the next acknowledgement in that row
//! is late. At 150 ms and 100 Mbit/s a cut then takes 0.8 BDP where it took 1.5 (2026-11-27).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// When packets left that are not acknowledged yet, to a fraction of the time that an acknowledgement may be late.
#[derive(Clone, Debug, Default)]
pub struct Overdue {
    sent: VecDeque<Instant>,
}

impl Overdue {
    /// A packet left that the peer must acknowledge.
    pub fn on_sent(&mut self, now: Instant, rtt: Duration) {
        let fine = self
            .sent
            .back()
            .is_some_and(|&last| now.saturating_duration_since(last) < allowance(rtt) / STEPS);
        if !fine && self.sent.len() < MOST_STEPS {
            self.sent.push_back(now);
        }
    }

    /// A packet that left at `sent` was acknowledged. What left before it was so too, or is lost.
    pub fn on_ack(&mut self, sent: Instant) {
        while self.sent.front().is_some_and(|&first| first <= sent) {
            self.sent.pop_front();
        }
    }

    /// Whether an acknowledgement is late by so much that the path must be interrupted.
    #[must_use]
    pub fn is_overdue(&self, now: Instant, rtt: Duration) -> bool {
        self.sent
            .front()
            .is_some_and(|&first| now.saturating_duration_since(first) > rtt + allowance(rtt))
    }
}

/// How late an acknowledgement may be. Longer than a receiver's pauses, and short enough that what is sent meanwhile, with what was under
/// way when the path broke, is less than a round trip's worth.
fn allowance(rtt: Duration) -> Duration {
    rtt / 4 + Duration::from_millis(10)
}

/// Departures that are told apart in the time of one allowance.
const STEPS: u32 = 8;

/// Enough for what leaves until it is overdue: (rtt + allowance) / (allowance / 8) is below 40.
const MOST_STEPS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(150);

    #[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_row_of_packets_that_is_acknowledged_in_a_row_is_never_overdue() {
        let start = origin();
        let mut overdue = Overdue::default();
        for now in 0..2000 {
            overdue.on_sent(start + ms(now), RTT);
            if now >= 150 {
                overdue.on_ack(start + ms(now - 150));
            }
            assert!(!overdue.is_overdue(start + ms(now), RTT), "{now}");
        }
        assert!(overdue.sent.len() <= 40, "{}", overdue.sent.len());
    }

    #[test]
    fn silence_in_the_middle_of_a_row_is_overdue_within_a_third_of_a_round_trip() {
        let start = origin();
        let mut overdue = Overdue::default();
        let mut found = None;
        for now in 0..600 {
            if (150..300).contains(&now) {
                overdue.on_ack(start + ms(now - 150));
            }
            if overdue.is_overdue(start + ms(now), RTT) {
                found.get_or_insert(now);
            }
            overdue.on_sent(start + ms(now), RTT);
        }
        let found = found.unwrap();
        assert!((345..355).contains(&found), "{found}");
        // One acknowledgement of the latest ends it.
        overdue.on_ack(start + ms(599));
        assert!(!overdue.is_overdue(start + ms(600), RTT));
    }

    #[test]
    fn a_pause_of_the_sender_is_not_silence_of_the_peer() {
        let start = origin();
        let mut overdue = Overdue::default();
        overdue.on_sent(start, RTT);
        overdue.on_ack(start);
        overdue.on_sent(start + ms(5000), RTT);
        assert!(!overdue.is_overdue(start + ms(5150), RTT));
    }

    #[test]
    fn lost_packets_among_others_are_not_silence() {
        let start = origin();
        let mut overdue = Overdue::default();
        for now in 0..1000 {
            overdue.on_sent(start + ms(now), RTT);
            if now >= 150 && now % 10 != 0 {
                overdue.on_ack(start + ms(now - 150));
            }
            assert!(!overdue.is_overdue(start + ms(now), RTT), "{now}");
        }
    }
}
