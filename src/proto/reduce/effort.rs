//! How hard literals are compressed, by what limits the migration now.
//!
//! A link that waits for the encoder gains from a faster codec, an encoder that waits for the link from a stronger one. The steps, with what
//! they cost beside lz4 and what they made of 150 MB of a Redis guest's first pass (2026-11-27, one core):
//!
//! ```text
//! lz4             1
//! zstd level 1    2.5     61 MB
//! zstd level 3    4       57 MB
//! zstd level 6   10       56 MB
//! ```

use std::fmt;
use std::time::{Duration, Instant};

use crate::proto::page::ByteRate;

/// A step of the ladder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Effort(u8);

impl Effort {
    /// lz4, which costs least.
    pub const LEAST: Self = Self(0);
    /// The strongest that may pay on a slow link.
    pub const MOST: Self = Self(3);

    /// The whole ladder.
    pub const ALL: [Self; 4] = [Self(0), Self(1), Self(2), Self(3)];

    /// Where to begin on a link of this rate: what one core is known to keep up with.
    #[must_use]
    pub fn for_link(rate: Option<ByteRate>) -> Self {
        match rate {
            Some(rate) if rate <= ByteRate::from_bits_per_second(200_000_000) => Self(2),
            _ => Self::LEAST,
        }
    }

    /// The level of zstd; `None` is lz4.
    pub(super) fn zstd_level(self) -> Option<i32> {
        match self.0 {
            0 => None,
            1 => Some(1),
            2 => Some(3),
            _ => Some(6),
        }
    }

    fn cost(self) -> f64 {
        [1.0, 2.5, 4.0, 10.0][usize::from(self.0.min(Self::MOST.0))]
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

/// Chooses the effort from how busy the encoder was.
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

    /// The effort from now on. The encoder has worked for `encoding` since the last call; `starved`: the link had nothing to send meanwhile.
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
