//! The edge where the engine reads clocks and waits.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Now.
#[expect(clippy::disallowed_methods, reason = "the engine's one look at the clock")]
pub(super) fn now() -> Instant {
    Instant::now()
}

/// Time since 1970, by this host's clock.
#[expect(
    clippy::disallowed_methods,
    reason = "events carry the time of day, and the guest's clocks go on by what passed between two hosts"
)]
pub(super) fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Waits until `end`; earlier where somebody has unparked this thread.
pub(super) fn wait_until(end: Instant) {
    let left = end.saturating_duration_since(now());
    if !left.is_zero() {
        std::thread::park_timeout(left);
    }
}
