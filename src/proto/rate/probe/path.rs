//! How long the path is: the least round trip time, and when it was last seen.
//!
//! A least that nothing came near to for ten seconds is either hidden by a queue that others keep, or no longer true. Which of
//! them, only a round with less in flight shows ([`Phase::Listen`](super::Phase)); what is measured then is the new length.

use std::time::{Duration, Instant};

/// See the head of this file.
#[derive(Clone, Debug)]
pub(super) struct PathLength {
    assumed: Duration,
    least: Option<Duration>,
    /// When a packet last took about the least.
    seen: Instant,
}

impl PathLength {
    pub(super) fn new(assumed: Duration, now: Instant) -> Self {
        Self {
            assumed,
            least: None,
            seen: now,
        }
    }

    /// A packet took this long there and back. Says whether it is the first.
    pub(super) fn sample(&mut self, rtt: Duration, now: Instant) -> bool {
        let first = self.least.is_none();
        let least = self.least.map_or(rtt, |least| least.min(rtt));
        self.least = Some(least);
        if rtt <= least + (least / NEAR).max(NEAR_AT_LEAST) {
            self.seen = self.seen.max(now);
        }
        first
    }

    pub(super) fn least(&self) -> Duration {
        self.least.unwrap_or(self.assumed).max(SHORTEST)
    }

    /// Whether it is time to look again.
    pub(super) fn is_old(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.seen) >= KEPT
    }

    /// Takes what was measured while little was in flight.
    pub(super) fn set(&mut self, rtt: Duration, now: Instant) {
        self.least = Some(rtt);
        self.seen = now;
    }
}

const KEPT: Duration = Duration::from_secs(10);
const NEAR: u32 = 32;
const NEAR_AT_LEAST: Duration = Duration::from_millis(1);
const SHORTEST: Duration = Duration::from_micros(50);
