//! How long this machine takes to run a thread that something has woken, from times at which that is known.
//!
//! A packet says not when it came, only that the thread runs: 40 to 80 us later on an idle virtual machine (2026-11-27).
//! What a timer wakes knows when it was to run, and takes as long (medians of 5 s: 76 us by timer, 61 us by another thread).

use std::time::{Duration, Instant};

use super::clock;

/// The last wake-ups by a timer.
#[derive(Debug)]
pub(super) struct WakeUps {
    recent: [Duration; SAMPLES],
    next: usize,
    usual: Duration,
}

impl WakeUps {
    /// Sleeps some tens of milliseconds to learn how it is.
    pub(super) fn learn() -> Self {
        let mut wake_ups = Self {
            recent: [Duration::ZERO; SAMPLES],
            next: 0,
            usual: Duration::ZERO,
        };
        for _ in 0..SAMPLES {
            let asleep = clock::now();
            clock::sleep(DEEP);
            wake_ups.record(asleep, asleep + DEEP, clock::now());
        }
        wake_ups
    }

    /// A timer that was set to `due` woke, at `now`, the thread that had slept since `asleep`.
    pub(super) fn record(&mut self, asleep: Instant, due: Instant, now: Instant) {
        if due.saturating_duration_since(asleep) < DEEP {
            return;
        }
        self.recent[self.next] = now.saturating_duration_since(due);
        self.next = (self.next + 1) % SAMPLES;
        if self.next.is_multiple_of(RECKON_EVERY) {
            let mut sorted = self.recent;
            sorted.sort_unstable();
            self.usual = sorted[SAMPLES / 2];
        }
    }

    /// When something came that woke, at `now`, a thread that has slept since `asleep`. Half of the wake-ups take longer than
    /// what is taken off here.
    pub(super) fn came(&self, asleep: Instant, now: Instant) -> Instant {
        let slept = now.saturating_duration_since(asleep);
        // It may not have slept at all.
        if slept < AWAKE {
            now
        } else {
            now - self.usual.min(slept)
        }
    }
}

const SAMPLES: usize = 16;
const RECKON_EVERY: usize = 4;
/// A processor that was idle for less wakes up sooner, and its times are not the usual ones.
const DEEP: Duration = Duration::from_millis(5);
/// What waits for no longer has found something at once.
const AWAKE: Duration = Duration::from_micros(20);

#[cfg(test)]
mod tests {
    use super::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    /// After sleeps of ten milliseconds that ended so many microseconds late.
    fn late_by(times: impl IntoIterator<Item = u64>) -> WakeUps {
        let mut wake_ups = WakeUps {
            recent: [Duration::ZERO; SAMPLES],
            next: 0,
            usual: Duration::ZERO,
        };
        let asleep = clock::now();
        let due = asleep + us(10_000);
        for time in times {
            wake_ups.record(asleep, due, due + us(time));
        }
        wake_ups
    }

    #[test]
    fn the_median_of_the_wake_ups_is_taken_off() {
        let now = clock::now();
        assert_eq!(late_by(0..16).came(now, now + us(1000)), now + us(992));
    }

    #[test]
    fn a_single_long_wake_up_changes_nothing() {
        let now = clock::now();
        let wake_ups = late_by((1..16).map(|_| 60).chain([50_000]));
        assert_eq!(wake_ups.came(now, now + us(1000)), now + us(940));
    }

    #[test]
    fn short_sleeps_teach_nothing() {
        let now = clock::now();
        let mut wake_ups = late_by([60; SAMPLES]);
        for _ in 0..SAMPLES {
            wake_ups.record(now, now + us(1000), now + us(1010));
        }
        assert_eq!(wake_ups.came(now, now + us(1000)), now + us(940));
    }

    #[test]
    fn what_did_not_sleep_was_there_at_once() {
        let now = clock::now();
        let wake_ups = late_by([300; SAMPLES]);
        assert_eq!(wake_ups.came(now, now + us(10)), now + us(10));
        assert_eq!(wake_ups.came(now, now + us(250)), now, "not before it slept");
    }
}
