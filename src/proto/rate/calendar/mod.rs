//! The rate that holds at a time: by weekday and hour, as a clock on the wall at the site shows them.
//!
//! ```text
//! instant ──time zone──▶ weekday and time on the wall ──first entry that covers them──▶ rate, or none
//! ```
//!
//! Only what the clock on the wall shows counts, so that an operator can tell what holds by looking at it, and nothing has to be
//! remembered between two looks:
//!
//! - Clocks go forward (02:00 becomes 03:00): an entry holds for the part of it that is shown. 02:30-03:30 holds from 03:00 to 03:30,
//!   02:10-02:50 not at all on that day.
//! - Clocks go back (03:00 becomes 02:00): the hour that is shown twice is covered twice. 02:00-03:00 holds for two hours; 02:30-03:30 from the
//!   first 02:30 until the clock is put back, and again from the second.
//! - An entry that goes past midnight belongs to the day on which it begins: `fri 22:00-06:00` ends on Saturday at 06:00.
//! - The wall clock may be set, or the host suspended. Whoever asks with the time of now gets what holds now.

use std::collections::BTreeSet;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan as _};

pub use self::entry::{Hours, InvalidHours, InvalidWeekdays, Weekdays};
use crate::proto::page::ByteRate;

mod entry;

/// See the head of this file. The default has no entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    zone: TimeZone,
    entries: Vec<CalendarEntry>,
}

/// A rate for some hours of some days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalendarEntry {
    /// The days on which the hours begin.
    pub days: Weekdays,
    /// The hours.
    pub hours: Hours,
    /// What holds then.
    pub rate: ByteRate,
}

impl Calendar {
    /// A calendar by the clocks of `zone`. Where several entries cover a time, the first of them holds.
    #[must_use]
    pub fn new(zone: TimeZone, entries: Vec<CalendarEntry>) -> Self {
        Self { zone, entries }
    }

    /// Whether no entry ever holds.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// `at` as the clocks show it, with their distance from UTC: `2026-11-24 18:00 +01:00`.
    #[must_use]
    pub fn shown(&self, at: Timestamp) -> String {
        let local = at.to_zoned(self.zone.clone());
        local.strftime("%Y-%m-%d %H:%M %:z").to_string()
    }

    /// The rate at `at`; `None` where no entry covers it.
    #[must_use]
    pub fn rate_at(&self, at: Timestamp) -> Option<ByteRate> {
        if self.is_empty() {
            return None;
        }
        let local = self.zone.to_datetime(at);
        let covering = |entry: &&CalendarEntry| entry.hours.cover(entry.days, local);
        self.entries.iter().find(covering).map(|entry| entry.rate)
    }

    /// The first time after `after` at which [`rate_at`](Self::rate_at) is another; `None` where it stays what it is.
    #[must_use]
    pub fn next_change(&self, after: Timestamp) -> Option<Timestamp> {
        let now = self.rate_at(after);
        let changes = |at: &Timestamp| *at > after && self.rate_at(*at) != now;
        self.possible_changes(after).into_iter().find(changes)
    }

    /// Every time within [`HORIZON_DAYS`] at which the rate can change, and some more: the ends of entries on each day, and when
    /// clocks are set.
    fn possible_changes(&self, after: Timestamp) -> BTreeSet<Timestamp> {
        let mut times = BTreeSet::new();
        if self.is_empty() {
            return times;
        }
        let today = self.zone.to_datetime(after).date();
        // Clocks that go back at midnight show the end of yesterday again.
        let first = today.yesterday().unwrap_or(today);
        for day in first.series(1.day()).take(HORIZON_DAYS) {
            for time in self.entries.iter().flat_map(|entry| entry.hours.ends()) {
                // Twice where clocks go back over it; where they go forward over it, it is then that it passes.
                let shown = self.zone.to_ambiguous_timestamp(day.to_datetime(time));
                times.extend(shown.earlier());
                times.extend(shown.later());
            }
        }
        if let Some(last) = times.last().copied() {
            let set = self.zone.following(after).map(|transition| transition.timestamp());
            times.extend(set.take_while(|at| *at <= last));
        }
        times
    }
}

impl Default for Calendar {
    fn default() -> Self {
        Self::new(TimeZone::UTC, Vec::new())
    }
}

/// What does not change within a week changes never, unless the clocks went forward over all of it: then within two. Yesterday and a
/// day for what is left of today come on top.
const HORIZON_DAYS: usize = 16;

#[cfg(test)]
mod tests;
