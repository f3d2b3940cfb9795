//! What has passed in the last tenth of a second: so that a cap holds over any 100 ms, whatever was saved up before.
//!
//! Time is cut into slots of 250 us. The sum is over those that reach into the last 100 ms, so it is never too small, and 0.25 % too large at most.

use std::time::{Duration, Instant};

/// See the head of this file.
#[derive(Clone, Debug)]
pub(super) struct Recent {
    /// Bytes by slot, a ring.
    slots: Box<[u64; SLOTS]>,
    sum: u64,
    /// When the present slot began, and which it is.
    began: Instant,
    present: usize,
}

impl Recent {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            slots: Box::new([0; SLOTS]),
            sum: 0,
            began: now,
            present: 0,
        }
    }

    /// Whether `bytes` more stay within `limit`; otherwise when they will. What is larger than the limit passes when nothing else did.
    pub(super) fn has_room(&mut self, now: Instant, bytes: u64, limit: u64) -> Result<(), Instant> {
        self.advance(now);
        let limit = limit.max(bytes);
        let mut left = self.sum;
        for age in 0..SLOTS {
            if left + bytes <= limit {
                return if age == 0 {
                    Ok(())
                } else {
                    Err(self.began + SLOT * u32::try_from(age).unwrap_or(u32::MAX))
                };
            }
            // The oldest leaves first.
            left -= self.slots[(self.present + 1 + age) % SLOTS];
        }
        Err(self.began + SLOT * SLOTS as u32)
    }

    pub(super) fn add(&mut self, bytes: u64) {
        self.slots[self.present] += bytes;
        self.sum += bytes;
    }

    /// Counts what has passed as `new / old` of it, since the limit changes so.
    pub(super) fn scale(&mut self, new: u64, old: u64) {
        let old = u128::from(old.max(1));
        for slot in self.slots.iter_mut() {
            *slot = u64::try_from(u128::from(*slot) * u128::from(new) / old).unwrap_or(u64::MAX / SLOTS as u64);
        }
        self.sum = self.slots.iter().sum();
    }

    fn advance(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.began).as_nanos() / SLOT.as_nanos();
        if passed == 0 {
            return;
        }
        for _ in 0..passed.min(SLOTS as u128) {
            self.present = (self.present + 1) % SLOTS;
            self.sum -= std::mem::take(&mut self.slots[self.present]);
        }
        self.began += Duration::from_nanos(u64::try_from(passed * SLOT.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// The time over which a cap holds.
pub(super) const WINDOW: Duration = Duration::from_millis(100);
const SLOT: Duration = Duration::from_micros(250);
/// The present one is not over.
const SLOTS: usize = 401;

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
    fn origin() -> Instant {
        Instant::now()
    }

    #[test]
    fn room_comes_back_as_the_oldest_bytes_leave() {
        let start = origin();
        let ms = Duration::from_millis;
        let mut recent = Recent::new(start);
        assert_eq!(recent.has_room(start, 10, 10), Ok(()));
        recent.add(4);
        assert_eq!(recent.has_room(start + ms(50), 7, 10), Err(start + WINDOW + SLOT));
        assert_eq!(recent.has_room(start + ms(50), 6, 10), Ok(()));
        recent.add(6);
        assert_eq!(recent.has_room(start + WINDOW + SLOT, 4, 10), Ok(()));
        assert_eq!(
            recent.has_room(start + WINDOW + SLOT, 5, 10),
            Err(start + ms(150) + SLOT)
        );
    }

    #[test]
    fn what_is_larger_than_the_limit_passes_alone() {
        let start = origin();
        let mut recent = Recent::new(start);
        assert_eq!(recent.has_room(start, 1500, 10), Ok(()));
        recent.add(1500);
        let again = recent.has_room(start, 1500, 10).unwrap_err();
        assert_eq!(recent.has_room(again, 1500, 10), Ok(()));
    }

    #[test]
    fn after_a_long_time_nothing_is_left() {
        let start = origin();
        let mut recent = Recent::new(start);
        recent.add(10);
        assert_eq!(recent.has_room(start + Duration::from_secs(3600), 10, 10), Ok(()));
        assert_eq!(recent.sum, 0);
    }
}
