//! How hard literals are compressed, by what limits the migration now.
//!
//! A link that waits for the encoder gains from a faster codec, an encoder that waits for the link from a stronger one. The steps, with what
//! they cost beside lz4 and what they made of 150 MB of a Redis guest's first pass (2026-11-27, one core):
//!
//! ```text
//! lz4             1
//! zstd level 1    2.2     61 MB
//! zstd level 3    4.3     57 MB
//! zstd level 5    8.5
//! zstd level 6   12       56 MB
//! ```

use std::fmt;
use std::time::{Duration, Instant};

use super::group::MAX_CODERS;
use crate::proto::page::ByteRate;

/// A step of the ladder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Effort(u8);

impl Effort {
    /// lz4, which costs least.
    pub const LEAST: Self = Self(0);
    /// The strongest that may pay on a slow link.
    pub const MOST: Self = Self(4);

    /// The whole ladder.
    pub const ALL: [Self; 5] = [Self(0), Self(1), Self(2), Self(3), Self(4)];

    /// Where to begin on a link of this rate, with so many coders: the strongest that is sure to keep up.
    #[must_use]
    pub fn for_link(rate: Option<ByteRate>, coders: usize) -> Self {
        let Some(rate) = rate else { return Self::LEAST };
        let busy = busy_with_lz4(rate) / coders.max(1) as f64;
        let keeps_up = |effort: &Self| busy * effort.cost() < ROOM;
        Self::ALL.into_iter().rev().find(keeps_up).unwrap_or(Self::LEAST)
    }

    /// Coders that a link of this rate is worth: as many as keep up with zstd 5, and no more, since they find less in smaller windows.
    #[must_use]
    pub fn coders_for_link(rate: Option<ByteRate>) -> usize {
        let all = rate.map_or(f64::MAX, |rate| busy_with_lz4(rate) * Self(3).cost() / ROOM);
        (all.ceil() as usize).clamp(1, MAX_CODERS)
    }

    /// The level of zstd; `None` is lz4.
    pub(super) fn zstd_level(self) -> Option<i32> {
        match self.0 {
            0 => None,
            1 => Some(1),
            2 => Some(3),
            3 => Some(5),
            _ => Some(6),
        }
    }

    fn cost(self) -> f64 {
        [1.0, 2.2, 4.3, 8.5, 12.0][usize::from(self.0.min(Self::MOST.0))]
    }

    fn stronger(self) -> Option<Self> {
        (self < Self::MOST).then_some(Self(self.0 + 1))
    }

    fn weaker(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.zstd_level() {
            None => f.write_str("lz4"),
            Some(level) => write!(f, "zstd {level}"),
        }
    }
}

/// The share of its time that a coder would be busy with lz4, to fill a link of this rate.
fn busy_with_lz4(rate: ByteRate) -> f64 {
    rate.0 as f64 * USUAL_RATIO / LEAST_SPEED
}

/// Chooses the effort from how busy the coders were.
#[derive(Debug)]
pub struct EffortControl {
    effort: Effort,
    since: Instant,
    encoding: Duration,
    starved: bool,
}

impl EffortControl {
    /// Begins with `first`.
    #[must_use]
    pub fn new(now: Instant, first: Effort) -> Self {
        Self {
            effort: first,
            since: now,
            encoding: Duration::ZERO,
            starved: false,
        }
    }

    /// The effort from now on. Each coder has worked for `encoding` since the last call; `starved`: the link had nothing to send meanwhile.
    pub fn observe(&mut self, now: Instant, encoding: Duration, starved: bool) -> Effort {
        self.encoding += encoding;
        self.starved |= starved;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= PERIOD {
            let busy = self.encoding.as_secs_f64() / elapsed.as_secs_f64();
            if self.starved && busy > TOO_BUSY {
                self.effort = self.effort.weaker().unwrap_or(self.effort);
            } else if !self.starved
                && let Some(stronger) = self.effort.stronger()
                && busy * stronger.cost() / self.effort.cost() < ROOM
            {
                self.effort = stronger;
            }
            self.since = now;
            self.encoding = Duration::ZERO;
            self.starved = false;
        }
        self.effort
    }
}

/// Long enough for several batches on a slow link.
const PERIOD: Duration = Duration::from_millis(250);

/// An encoder that works for more than this share of the time keeps a starved link waiting.
const TOO_BUSY: f64 = 0.7;

/// The share that a stronger codec may come to.
const ROOM: f64 = 0.6;

/// What literals shrink to a part in.
const USUAL_RATIO: f64 = 3.0;

/// Bytes of literals a second that a coder takes with lz4, at least.
const LEAST_SPEED: f64 = 6e8;

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
    fn origin() -> Instant {
        Instant::now()
    }

    /// The effort after some seconds of a link that carries `link` bytes a second, and an encoder that does `encoder` bytes of output
    /// a second at the least effort.
    fn settled(link: f64, encoder: f64, first: Effort) -> Effort {
        let (mut now, step) = (origin(), Duration::from_millis(50));
        let mut control = EffortControl::new(now, first);
        let (mut effort, mut changed) = (first, 0);
        for turn in 0..400 {
            let possible = encoder / effort.cost();
            let starved = possible < link;
            now += step;
            let before = effort;
            effort = control.observe(now, step.mul_f64((link / possible).min(1.0)), starved);
            if effort != before {
                changed = turn;
            }
        }
        assert!(changed < 50, "it never comes to rest");
        effort
    }

    #[test]
    fn a_slow_link_gets_the_strongest_codec_and_a_fast_one_the_fastest() {
        assert_eq!(settled(1e6, 100e6, Effort::LEAST), Effort::MOST);
        assert_eq!(settled(100e6, 60e6, Effort::MOST), Effort::LEAST);
        assert_eq!(settled(20e6, 100e6, Effort::LEAST), Effort(1));
    }

    #[test]
    fn a_migration_begins_with_what_its_coders_keep_up_with() {
        let first =
            |mbit: u64, coders| Effort::for_link(Some(ByteRate::from_bits_per_second(mbit * 1_000_000)), coders);
        assert_eq!(first(10, 1), Effort::MOST);
        assert_eq!(first(100, 1).zstd_level(), Some(5));
        assert_eq!(first(200, 1).zstd_level(), Some(3));
        assert_eq!(first(1000, 1), Effort::LEAST);
        assert_eq!(first(1000, 4).zstd_level(), Some(1));
        assert_eq!(Effort::for_link(None, 4), Effort::LEAST);
        let coders = |mbit: u64| Effort::coders_for_link(Some(ByteRate::from_bits_per_second(mbit * 1_000_000)));
        assert_eq!([1, 100, 200, 300, 1000, 10_000].map(coders), [1, 1, 2, 3, 4, 4]);
        assert_eq!(Effort::coders_for_link(None), 4);
    }

    #[test]
    fn it_comes_to_rest_wherever_it_begins() {
        for link in 1..200 {
            for first in Effort::ALL {
                settled(f64::from(link) * 1e6, 150e6, first);
            }
        }
    }

    #[test]
    fn an_idle_guest_changes_nothing() {
        let now = origin();
        let mut control = EffortControl::new(now, Effort(2));
        let effort = control.observe(now + Duration::from_secs(1), Duration::from_millis(10), true);
        assert_eq!(effort, Effort(2));
    }
}
