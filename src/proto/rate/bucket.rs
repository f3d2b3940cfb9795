//! A token bucket that keeps its average exactly, although the timers that drive it do not.
//!
//! Credit is counted in billionths of a byte, so that no refill is ever rounded: over any time t it earns `rate x t` to within
//! one byte. A send passes while there is any credit and may leave a debt, which later sends wait for; so a burst
//! larger than the bucket still passes and still counts in full.
//!
//! Two depths. A sender that was idle may send `BURST` (2 ms of rate) at once. A sender that was told to wait and was woken late,
//! because tokio's timers tick in milliseconds or the machine is busy, keeps what it earned meanwhile up to `CATCH_UP` (12 ms);
//! without that, every late wake-up would be lost rate. Neither makes any 100 ms carry more than 1.02 of the rate, or two sends more than
//! the rate where that is more ([`Recent`]): what was missed is made up for over several of them.

use std::time::{Duration, Instant};

use super::recent::{Recent, WINDOW};
use crate::proto::page::ByteRate;

const BURST: Duration = Duration::from_millis(2);
const CATCH_UP: Duration = Duration::from_millis(12);

/// After this long without being told to wait, a sender counts as idle again.
const BEHIND: Duration = Duration::from_millis(10);

/// A fiftieth of the rate may come on top in 100 ms.
const OVER: u64 = 50;

/// Billionths of a byte in a byte, and nanoseconds in a second.
const NANO: i128 = 1_000_000_000;

/// Lets bytes pass at a rate. Time comes in with each call and never goes back.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate: ByteRate,
    /// Billionths of a byte; negative while sends wait.
    credit: i128,
    refilled: Instant,
    behind_until: Option<Instant>,
    recent: Recent,
}

impl TokenBucket {
    /// A full bucket.
    #[must_use]
    pub fn new(rate: ByteRate, now: Instant) -> Self {
        Self {
            rate,
            credit: depth(rate, BURST),
            refilled: now,
            behind_until: None,
            recent: Recent::new(now),
        }
    }

    /// The rate at which it refills.
    #[must_use]
    pub fn rate(&self) -> ByteRate {
        self.rate
    }

    /// Refills at `rate` from `now` on. What was earned so far stays, down to the new depth.
    pub fn set_rate(&mut self, rate: ByteRate, now: Instant) {
        self.refill(now);
        self.recent.scale(rate.0, self.rate.0);
        self.rate = rate;
        self.credit = self.credit.min(depth(rate, CATCH_UP));
    }

    /// Whether a send of `bytes` may pass now; otherwise when to ask again, so that about 1 ms of rate can pass then. A send of higher
    /// priority states how many bytes of debt it may make before it waits too (0: none).
    ///
    /// # Errors
    /// The time to wait for.
    pub fn poll(&mut self, now: Instant, bytes: u64, debt: u64) -> Result<(), Instant> {
        self.refill(now);
        let missing = -i128::from(debt) * NANO - self.credit;
        if missing < 0 {
            let fair = self.rate.bytes_in(WINDOW);
            // Where a send is more than 1 ms of rate, the allowance would not hold two of them.
            let limit = (fair + fair / OVER).max(fair.saturating_add(2 * bytes));
            return self.recent.has_room(now, bytes, limit).inspect_err(|when| {
                self.behind_until = Some(*when + BEHIND);
            });
        }
        let target = missing.saturating_add(depth(self.rate, BURST) / 2).max(1);
        let nanos = target.unsigned_abs().div_ceil(u128::from(self.rate.0.max(1)));
        let when = now + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX).min(MAX_WAIT_NANOS));
        self.behind_until = Some(when + BEHIND);
        Err(when)
    }

    /// Counts bytes that have passed.
    pub fn charge(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_sub(i128::from(bytes) * NANO);
        self.recent.add(bytes);
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled);
        if elapsed.is_zero() {
            return;
        }
        self.refilled = now;
        let behind = self.behind_until.is_some_and(|until| now <= until);
        let limit = depth(self.rate, if behind { CATCH_UP } else { BURST });
        let earned = depth(self.rate, elapsed);
        self.credit = self.credit.saturating_add(earned).min(limit.max(self.credit));
    }
}

/// A wait is asked for again after at most this long, however low the rate.
const MAX_WAIT_NANOS: u64 = 1_000_000_000;

/// What `rate` earns in `time`, in billionths of a byte.
fn depth(rate: ByteRate, time: Duration) -> i128 {
    let nanos = i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
    i128::from(rate.0).saturating_mul(nanos)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
    fn origin() -> Instant {
        Instant::now()
    }

    /// A sender with endless data, woken `lateness` after each time it was told; the bytes it sent in `time`.
    fn greedy(rate: ByteRate, send: u64, time: Duration, mut lateness: impl FnMut() -> Duration) -> u64 {
        let start = origin();
        let mut bucket = TokenBucket::new(rate, start);
        let (mut now, mut sent) = (start, 0);
        while now < start + time {
            match bucket.poll(now, send, 0) {
                Ok(()) => {
                    bucket.charge(send);
                    sent += send;
                }
                Err(when) => {
                    assert!(when > now);
                    now = when + lateness();
                }
            }
        }
        sent
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_average_is_exact_although_every_wake_up_is_late(
            rate in 100_000_u64..1_250_000_000,
            send in 1_200_u64..14_800,
            lateness in prop::collection::vec(0_u64..6_000_000, 1..50),
        ) {
            let rate = ByteRate(rate);
            let mut late = lateness.iter().cycle().map(|nanos| Duration::from_nanos(*nanos));
            let time = Duration::from_millis(300);
            let sent = greedy(rate, send, time, || late.next().unwrap());
            let fair = rate.bytes_in(time);
            let slack = rate.bytes_in(CATCH_UP + BURST) + send + 1;
            prop_assert!(sent <= fair + slack, "{sent} of {fair}");
            prop_assert!(sent + slack >= fair, "{sent} of {fair}");
        }

        #[test]
        fn no_pattern_of_sends_exceeds_the_rate_in_any_window(
            sends in prop::collection::vec((0_u64..3_000_000, 1_u64..20_000), 1..400),
            rate in 1_000_u64..2_000_000_000,
        ) {
            let (rate, start) = (ByteRate(rate), origin());
            let mut bucket = TokenBucket::new(rate, start);
            let (mut now, mut passed) = (start, vec![]);
            for (pause, bytes) in sends {
                now += Duration::from_nanos(pause);
                if bucket.poll(now, bytes, 0).is_ok() {
                    bucket.charge(bytes);
                    passed.push((now, bytes));
                }
            }
            for first in 0..passed.len() {
                let (mut sum, mut largest) = (0, 0);
                for &(time, bytes) in &passed[first..] {
                    sum += bytes;
                    let fair = rate.bytes_in(time - passed[first].0) + rate.bytes_in(CATCH_UP);
                    prop_assert!(sum <= fair + bytes + 1, "{sum} > {fair} + {bytes}");
                    if time - passed[first].0 < WINDOW {
                        let fair = rate.bytes_in(WINDOW);
                        largest = largest.max(bytes);
                        let most = (fair + fair / OVER).max(fair + 2 * largest);
                        prop_assert!(sum <= most, "{sum} in 100 ms, {most} are allowed");
                    }
                }
            }
        }
    }

    #[test]
    fn an_idle_sender_bursts_two_milliseconds_and_no_more() {
        let (rate, start) = (ByteRate(1_000_000), origin());
        let mut bucket = TokenBucket::new(rate, start);
        let later = start + Duration::from_secs(60);
        let mut passed = 0;
        while bucket.poll(later, 100, 0).is_ok() {
            bucket.charge(100);
            passed += 100;
        }
        assert_eq!(passed, 2_000);
    }

    #[test]
    fn priority_passes_on_debt_and_everything_else_pays_for_it() {
        let (rate, start) = (ByteRate(1_000_000), origin());
        let mut bucket = TokenBucket::new(rate, start);
        bucket.charge(2_000);
        assert!(bucket.poll(start, 1, 0).is_err(), "bulk waits");
        assert!(bucket.poll(start, 1, 1_000).is_ok(), "control does not");
        bucket.charge(1_000);
        assert!(bucket.poll(start, 1, 1_000).is_err(), "control has a limit too");
        let when = bucket.poll(start, 1, 0).unwrap_err();
        assert_eq!(
            when - start,
            Duration::from_millis(2),
            "1 ms of debt and 1 ms to have something to send"
        );
    }

    #[test]
    fn a_new_rate_holds_from_now_on() {
        let start = origin();
        let mut bucket = TokenBucket::new(ByteRate(1_000_000), start);
        bucket.charge(2_000);
        bucket.set_rate(ByteRate(10_000), start);
        bucket.charge(10);
        let when = bucket.poll(start, 1, 0).unwrap_err();
        assert_eq!(when - start, Duration::from_millis(2));
        bucket.set_rate(ByteRate(0), start);
        assert!(
            bucket.poll(start, 1, 0).is_err(),
            "a rate of zero waits, and does not divide"
        );
    }
}
