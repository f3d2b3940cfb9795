//! The edge's clock: the only place of the link that reads time or sleeps.

use std::time::{Duration, Instant};

use rustix::thread::{NanosleepRelativeResult, nanosleep};
use rustix::time::Timespec;

#[expect(clippy::disallowed_methods, reason = "the edge of the pure model: time enters here")]
pub(super) fn now() -> Instant {
    Instant::now()
}

/// Sleeps for `time`, through signals.
pub(super) fn sleep(time: Duration) {
    let mut request = timespec(time);
    while let NanosleepRelativeResult::Interrupted(rest) = nanosleep(&request) {
        request = rest;
    }
}

/// `time` as the kernel takes it. Longer than a century is a century.
pub(super) fn timespec(time: Duration) -> Timespec {
    let seconds = i64::try_from(time.as_secs())
        .unwrap_or(i64::MAX)
        .min(100 * 365 * 86_400);
    Timespec {
        tv_sec: seconds,
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}
