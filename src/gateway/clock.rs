//! The gateway's clock: the one edge where time is read.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Now, for measuring.
#[expect(clippy::disallowed_methods, reason = "the edge that reads the clock for the core")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Now, for certificates and people.
#[expect(clippy::disallowed_methods, reason = "the edge that reads the wall clock")]
pub(crate) fn wall() -> SystemTime {
    SystemTime::now()
}

/// Now, for calendars. What is beyond the year 9999 is the end of it.
pub(crate) fn timestamp() -> jiff::Timestamp {
    jiff::Timestamp::try_from(wall()).unwrap_or(jiff::Timestamp::MAX)
}

/// Milliseconds since the Unix epoch, for people.
pub(crate) fn unix_ms() -> u64 {
    let since = wall().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
