//! The tables `[[link.calendar]]` and `[[peer.calendar]]`: which rate holds when.

use std::str::FromStr;

use jiff::tz::{TimeZone, TimeZoneDatabase};

use super::section::Section;
use crate::proto::page::ByteRate;
use crate::proto::rate::{Calendar, CalendarEntry, Hours, Weekdays};

/// Nine for each weekday: who needs more has a file written by a program, and a mistake in it.
const MAX_ENTRIES: usize = 64;

/// The calendar in `section`, by the clocks of `zone`. `most` is what its rates must not exceed, which is configured as `bounded_by`.
pub(super) fn read(section: &mut Section<'_>, zone: &TimeZone, most: Option<ByteRate>, bounded_by: &str) -> Calendar {
    let mut tables = section.sections("calendar");
    if !tables.is_empty() && most.is_none() && !section.states("rate") {
        let message = format!("needs {bounded_by}: the most that may ever be sent, which windows are made for");
        section.mistake("calendar", message);
    }
    if tables.len() > MAX_ENTRIES {
        let message = format!("has {} entries; there may be {MAX_ENTRIES}", tables.len());
        section.mistake("calendar", message);
        tables.truncate(MAX_ENTRIES);
    }
    let entries = tables.into_iter().filter_map(|mut table| {
        let days = table.required("days", Weekdays::from_str);
        let hours = table.required("hours", Hours::from_str);
        let rate = table.required("rate", ByteRate::from_str);
        if let (Some(rate), Some(most)) = (rate, most)
            && rate > most
        {
            table.mistake(
                "rate",
                format!("{rate} is above {bounded_by}, {most}, the most that may ever be sent"),
            );
        }
        table.finish();
        Some(CalendarEntry {
            days: days?,
            hours: hours?,
            rate: rate?,
        })
    });
    Calendar::new(zone.clone(), entries.collect())
}

/// The time zone of that name: as the host knows it, which may be newer, or as this program does.
pub(super) fn parse_zone(name: &str) -> Result<TimeZone, &'static str> {
    let known = jiff::tz::db()
        .get(name)
        .or_else(|_| TimeZoneDatabase::bundled().get(name));
    known
        .ok()
        .filter(|zone| !zone.is_unknown())
        .ok_or("is no time zone; write its IANA name, for example Europe/Berlin, or UTC")
}
