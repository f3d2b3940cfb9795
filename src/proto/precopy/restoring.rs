//! How fast the destination turns frames into the vmm's bytes, known only while frames wait for it.
//!
//! Where pages are the same as both sites know them, a kilobyte of frames is a megabyte for the destination to restore and its vmm to take: the
//! path is empty, and what waits there is nothing by its frames and seconds by its content. So it is counted in time.

use std::time::{Duration, Instant};

use super::PathMeter;
use crate::proto::page::ByteRate;

/// What waits at the destination, and what it takes.
#[derive(Debug, Default)]
pub struct Restoring {
    meter: PathMeter,
    /// When frames last waited for the destination.
    waited: Option<Instant>,
    waits: bool,
    decoded_bytes: u64,
    queued_bytes: u64,
}

/// More stream bytes than this wait at a destination that does not keep up: it works on some megabyte in any case.
const QUEUE: u64 = 2 << 20;

/// A destination that takes less is held back by what waits there alone: time between two reads must be short, since the end of the stream comes
/// behind it.
const LEAST: ByteRate = ByteRate(32 << 20);

/// What was measured so long ago says nothing of what the stream is now.
const MEMORY: Duration = Duration::from_secs(1);

/// It is given so much more than it was seen to take, to find out whether it takes more now.
const MORE: (u64, u64) = (4, 3);

impl Restoring {
    /// The destination has restored so many stream bytes, and frames of so many more wait for it.
    pub fn observe(&mut self, now: Instant, decoded_bytes: u64, queued_bytes: u64) {
        if self.is_forgotten(now) {
            self.meter = PathMeter::default();
        }
        let waits = queued_bytes > QUEUE;
        // It had work all the time since the last look: frames waited then and now, and more of them than it has restored.
        let worked = self.waits && waits && decoded_bytes.saturating_sub(self.decoded_bytes) <= self.queued_bytes;
        self.meter.observe(now, decoded_bytes, worked);
        if waits {
            self.waited = Some(now);
        }
        (self.waits, self.decoded_bytes, self.queued_bytes) = (waits, decoded_bytes, queued_bytes);
    }

    /// Stream bytes a second that it may be given; `None` while it keeps up with what comes.
    #[must_use]
    pub fn rate(&self, now: Instant) -> Option<ByteRate> {
        let rate = self.meter.rate().filter(|_| !self.is_forgotten(now))?;
        Some(ByteRate((rate.0 / MORE.1).saturating_mul(MORE.0).max(LEAST.0)))
    }

    /// How long what waits there will take.
    #[must_use]
    pub fn queue(&self) -> Duration {
        match self.meter.rate() {
            Some(rate) if self.queued_bytes > QUEUE => ByteRate(rate.0.max(1)).time_for(self.queued_bytes),
            _ => Duration::ZERO,
        }
    }

    fn is_forgotten(&self, now: Instant) -> bool {
        self.waited
            .is_none_or(|waited| now.saturating_duration_since(waited) > MEMORY)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A look each 10 ms for so long, at a destination that restores `rate` MiB a second with `queued` waiting.
    fn looks(
        restoring: &mut Restoring,
        from: Instant,
        decoded: &mut u64,
        millis: u64,
        rate: u64,
        queued: u64,
    ) -> Instant {
        for step in 1..=millis / 10 {
            *decoded += rate * MIB / 100;
            restoring.observe(from + Duration::from_millis(10 * step), *decoded, queued);
        }
        from + Duration::from_millis(millis)
    }

    #[test]
    fn a_destination_that_keeps_up_has_no_rate_however_slow_the_stream_is() {
        let (mut restoring, mut decoded) = (Restoring::default(), 0);
        let now = looks(&mut restoring, Instant::now(), &mut decoded, 3000, 1, 2 * MIB);
        assert_eq!((restoring.rate(now), restoring.queue()), (None, Duration::ZERO));
    }

    #[test]
    fn what_waits_is_counted_in_the_time_that_it_will_take() {
        let (mut restoring, mut decoded) = (Restoring::default(), 0);
        let now = looks(&mut restoring, Instant::now(), &mut decoded, 1000, 100, 50 * MIB);
        let rate = restoring.rate(now).expect("it does not keep up").0;
        assert!((128 * MIB..=136 * MIB).contains(&rate), "{rate}");
        let queue = restoring.queue().as_millis();
        assert!((480..=520).contains(&queue), "{queue}");
    }

    #[test]
    fn what_was_measured_is_forgotten_once_it_keeps_up() {
        let (mut restoring, mut decoded) = (Restoring::default(), 0);
        let now = looks(&mut restoring, Instant::now(), &mut decoded, 1000, 100, 50 * MIB);
        let now = looks(&mut restoring, now, &mut decoded, 900, 1, 0);
        assert!(restoring.rate(now).is_some());
        assert_eq!(restoring.queue(), Duration::ZERO);
        let now = looks(&mut restoring, now, &mut decoded, 200, 1, 0);
        assert_eq!(restoring.rate(now), None);
    }

    #[test]
    fn silence_of_the_path_is_not_taken_for_a_slow_destination() {
        let (mut restoring, mut decoded) = (Restoring::default(), 0);
        let mut now = Instant::now();
        for burst in [3, 30, 3, 30] {
            restoring.observe(now, decoded, 0);
            now += Duration::from_millis(400);
            // A gap is filled: what came behind it is ready at once, and restored within some milliseconds.
            for step in 1..=burst {
                decoded += MIB;
                restoring.observe(now + Duration::from_millis(step), decoded, (burst - step) * MIB);
            }
            now += Duration::from_millis(burst);
            assert_eq!(restoring.rate(now), None);
        }
    }

    #[test]
    fn acknowledgements_that_were_held_up_say_nothing() {
        let (mut restoring, mut decoded) = (Restoring::default(), 0);
        let now = Instant::now();
        restoring.observe(now, decoded, 3 * MIB);
        // It restored what waited, stood still, and has work again.
        decoded += 20 * MIB;
        restoring.observe(now + Duration::from_secs(2), decoded, 3 * MIB);
        assert_eq!(restoring.rate(now + Duration::from_secs(2)), None);
    }

    #[test]
    fn a_destination_that_becomes_faster_is_followed() {
        let (mut restoring, mut decoded) = (Restoring::default(), 0);
        let mut now = looks(&mut restoring, Instant::now(), &mut decoded, 1000, 50, 20 * MIB);
        for _ in 0..20 {
            let rate = restoring.rate(now).unwrap().0 / MIB;
            now = looks(&mut restoring, now, &mut decoded, 300, rate.min(200), 3 * MIB);
        }
        assert!(restoring.rate(now).unwrap().0 > 180 * MIB);
    }
}
