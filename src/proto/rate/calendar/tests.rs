use jiff::civil::{DateTime, Weekday};
use jiff::tz::TimeZoneDatabase;
use jiff::{SignedDuration, Timestamp, ToSpan as _};
use proptest::prelude::*;

use super::*;

/// Of the built-in database, so that no host's own makes a difference.
fn zone(name: &str) -> TimeZone {
    TimeZoneDatabase::bundled().get(name).unwrap()
}

fn megabit(value: u64) -> ByteRate {
    ByteRate::from_bits_per_second(value * 1_000_000)
}

/// Entries as `days`, `hours`, Mbit/s.
fn calendar(zone_name: &str, entries: &[(&str, &str, u64)]) -> Calendar {
    let entries = entries.iter().map(|(days, hours, rate)| CalendarEntry {
        days: days.parse().unwrap(),
        hours: hours.parse().unwrap(),
        rate: megabit(*rate),
    });
    Calendar::new(zone(zone_name), entries.collect())
}

fn utc(text: &str) -> Timestamp {
    format!("{text}Z").parse().unwrap()
}

/// Times in UTC with the rate in Mbit/s that must hold then.
#[track_caller]
fn holds(calendar: &Calendar, expected: &[(&str, Option<u64>)]) {
    for (at, rate) in expected {
        assert_eq!(calendar.rate_at(utc(at)), rate.map(megabit), "{at}");
    }
}

/// Changes from `from` on, up to and without `until`, all in UTC.
fn changes(calendar: &Calendar, from: &str, until: &str) -> Vec<String> {
    let (mut at, until) = (utc(from), utc(until));
    let mut found = Vec::new();
    while let Some(next) = calendar.next_change(at).filter(|next| *next < until) {
        found.push(next.strftime("%Y-%m-%dT%H:%M:%S").to_string());
        at = next;
    }
    found
}

#[test]
fn an_entry_holds_from_its_first_minute_to_the_one_before_its_end() {
    let office = calendar("UTC", &[("mon-fri", "08:00-18:00", 200)]);
    holds(
        &office,
        &[
            ("2026-11-23T07:59:59.999", None),
            ("2026-11-23T08:00:00", Some(200)),
            ("2026-11-23T17:59:59.999", Some(200)),
            ("2026-11-23T18:00:00", None),
            ("2026-11-27T12:00:00", Some(200)),
            ("2026-11-28T12:00:00", None),
            ("2026-11-29T12:00:00", None),
        ],
    );
    assert_eq!(
        changes(&office, "2026-11-27T07:00:00", "2026-11-30T09:00:00"),
        ["2026-11-27T08:00:00", "2026-11-27T18:00:00", "2026-11-30T08:00:00"]
    );
}

#[test]
fn what_goes_past_midnight_belongs_to_the_day_on_which_it_begins() {
    let friday = calendar("UTC", &[("fri", "22:00-06:00", 900)]);
    holds(
        &friday,
        &[
            ("2026-11-27T05:59:00", None),
            ("2026-11-27T21:59:59", None),
            ("2026-11-27T22:00:00", Some(900)),
            ("2026-11-28T00:00:00", Some(900)),
            ("2026-11-28T05:59:59", Some(900)),
            ("2026-11-28T06:00:00", None),
            ("2026-11-28T22:00:00", None),
        ],
    );
    assert_eq!(
        changes(&friday, "2026-11-27T12:00:00", "2026-12-04T12:00:00"),
        ["2026-11-27T22:00:00", "2026-11-28T06:00:00"]
    );
}

#[test]
fn sunday_night_goes_on_into_monday() {
    let sunday = calendar("UTC", &[("sun", "23:30-00:30", 5)]);
    holds(
        &sunday,
        &[
            ("2026-11-29T00:15:00", None),
            ("2026-11-29T23:30:00", Some(5)),
            ("2026-11-30T00:29:59", Some(5)),
            ("2026-11-30T00:30:00", None),
            ("2026-11-30T23:45:00", None),
        ],
    );
}

#[test]
fn midnight_ends_a_day_however_it_is_written() {
    for hours in ["22:00-24:00", "22:00-00:00"] {
        let monday = calendar("UTC", &[("mon", hours, 5)]);
        holds(
            &monday,
            &[("2026-11-23T23:59:59", Some(5)), ("2026-11-24T00:00:00", None)],
        );
    }
    let always = calendar("Europe/Berlin", &[("daily", "00:00-24:00", 5)]);
    holds(
        &always,
        &[("2026-03-29T00:59:59", Some(5)), ("2026-03-29T01:00:00", Some(5))],
    );
    assert_eq!(always.next_change(utc("2026-03-28T00:00:00")), None);
    assert_eq!(Calendar::default().next_change(utc("2026-03-28T00:00:00")), None);
}

#[test]
fn the_first_entry_that_covers_a_time_holds() {
    let lunch = calendar(
        "UTC",
        &[
            ("mon", "12:00-13:00", 1),
            ("mon-fri", "08:00-18:00", 2),
            ("daily", "00:00-24:00", 3),
        ],
    );
    holds(
        &lunch,
        &[
            ("2026-11-23T12:30:00", Some(1)),
            ("2026-11-23T13:00:00", Some(2)),
            ("2026-11-24T12:30:00", Some(2)),
            ("2026-11-24T18:00:00", Some(3)),
        ],
    );
    let hidden = calendar("UTC", &[("daily", "00:00-24:00", 3), ("mon", "12:00-13:00", 1)]);
    assert_eq!(
        hidden.next_change(utc("2026-11-23T00:00:00")),
        None,
        "it is never another"
    );
}

#[test]
fn berlin_keeps_its_office_hours_when_clocks_go_forward_and_back() {
    let office = calendar("Europe/Berlin", &[("daily", "08:00-18:00", 200)]);
    assert_eq!(
        changes(&office, "2026-03-28T00:00:00", "2026-03-30T00:00:00"),
        [
            "2026-03-28T07:00:00",
            "2026-03-28T17:00:00",
            "2026-03-29T06:00:00",
            "2026-03-29T16:00:00"
        ]
    );
    assert_eq!(
        changes(&office, "2026-10-24T00:00:00", "2026-10-26T00:00:00"),
        [
            "2026-10-24T06:00:00",
            "2026-10-24T16:00:00",
            "2026-10-25T07:00:00",
            "2026-10-25T17:00:00"
        ]
    );
}

#[test]
fn what_clocks_skip_when_they_go_forward_does_not_hold() {
    // 02:00 in Berlin becomes 03:00 at 01:00 UTC.
    let half = calendar("Europe/Berlin", &[("sun", "02:30-03:30", 7)]);
    assert_eq!(
        changes(&half, "2026-03-29T00:00:00", "2026-03-29T12:00:00"),
        ["2026-03-29T01:00:00", "2026-03-29T01:30:00"]
    );
    let all = calendar("Europe/Berlin", &[("sun", "02:10-02:50", 7)]);
    assert_eq!(
        changes(&all, "2026-03-28T00:00:00", "2026-04-05T12:00:00"),
        ["2026-04-05T00:10:00", "2026-04-05T00:50:00"],
        "the next one is a week later"
    );
    // New York: 02:00 becomes 03:00 at 07:00 UTC.
    let york = calendar("America/New_York", &[("daily", "01:30-02:30", 7)]);
    assert_eq!(
        changes(&york, "2026-03-08T00:00:00", "2026-03-09T00:00:00"),
        ["2026-03-08T06:30:00", "2026-03-08T07:00:00"]
    );
}

#[test]
fn what_clocks_show_twice_when_they_go_back_holds_twice() {
    // 03:00 in Berlin becomes 02:00 at 01:00 UTC.
    let hour = calendar("Europe/Berlin", &[("sun", "02:00-03:00", 7)]);
    assert_eq!(
        changes(&hour, "2026-10-25T00:00:00", "2026-10-26T00:00:00"),
        ["2026-10-25T02:00:00"],
        "it began at 00:00"
    );
    holds(
        &hour,
        &[("2026-10-24T23:59:59", None), ("2026-10-25T00:00:00", Some(7))],
    );
    let half = calendar("Europe/Berlin", &[("sun", "02:30-03:30", 7)]);
    assert_eq!(
        changes(&half, "2026-10-24T12:00:00", "2026-10-26T00:00:00"),
        [
            "2026-10-25T00:30:00",
            "2026-10-25T01:00:00",
            "2026-10-25T01:30:00",
            "2026-10-25T02:30:00"
        ]
    );
    // New York: 02:00 becomes 01:00 at 06:00 UTC.
    let york = calendar("America/New_York", &[("daily", "00:30-01:30", 7)]);
    assert_eq!(
        changes(&york, "2026-11-01T00:00:00", "2026-11-02T00:00:00"),
        [
            "2026-11-01T04:30:00",
            "2026-11-01T05:30:00",
            "2026-11-01T06:00:00",
            "2026-11-01T06:30:00"
        ]
    );
}

#[test]
fn a_night_in_which_clocks_are_set_is_an_hour_shorter_or_longer() {
    let night = calendar("Europe/Berlin", &[("sat", "22:00-06:00", 9)]);
    assert_eq!(
        changes(&night, "2026-03-28T12:00:00", "2026-03-29T12:00:00"),
        ["2026-03-28T21:00:00", "2026-03-29T04:00:00"]
    );
    assert_eq!(
        changes(&night, "2026-10-24T12:00:00", "2026-10-25T12:00:00"),
        ["2026-10-24T20:00:00", "2026-10-25T05:00:00"]
    );
}

#[test]
fn in_the_south_summer_begins_in_october() {
    // Sydney goes forward on 2026-10-04 at 16:00 UTC of the day before, and back on 2026-04-05.
    let office = calendar("Australia/Sydney", &[("sun", "08:00-09:00", 3)]);
    assert_eq!(
        changes(&office, "2026-09-26T12:00:00", "2026-10-05T00:00:00"),
        [
            "2026-09-26T22:00:00",
            "2026-09-26T23:00:00",
            "2026-10-03T21:00:00",
            "2026-10-03T22:00:00"
        ]
    );
    let skipped = calendar("Australia/Sydney", &[("sun", "02:30-03:30", 3)]);
    assert_eq!(
        changes(&skipped, "2026-10-03T12:00:00", "2026-10-04T00:00:00"),
        ["2026-10-03T16:00:00", "2026-10-03T16:30:00"]
    );
    assert_eq!(
        changes(&skipped, "2026-04-04T12:00:00", "2026-04-05T00:00:00"),
        [
            "2026-04-04T15:30:00",
            "2026-04-04T16:00:00",
            "2026-04-04T16:30:00",
            "2026-04-04T17:30:00"
        ]
    );
}

#[test]
fn a_zone_may_be_half_an_hour_off() {
    let kolkata = calendar("Asia/Kolkata", &[("mon", "00:00-08:00", 4)]);
    assert_eq!(
        changes(&kolkata, "2026-11-22T00:00:00", "2026-11-24T00:00:00"),
        ["2026-11-22T18:30:00", "2026-11-23T02:30:00"]
    );
    // Lord Howe sets its clocks by half an hour: 02:00 becomes 02:30 at 15:30 UTC.
    let howe = calendar("Australia/Lord_Howe", &[("daily", "01:45-02:15", 4)]);
    assert_eq!(
        changes(&howe, "2026-10-03T12:00:00", "2026-10-04T12:00:00"),
        ["2026-10-03T15:15:00", "2026-10-03T15:30:00"]
    );
}

#[test]
fn clocks_that_go_back_over_midnight_show_the_end_of_yesterday_again() {
    // Asuncion, as long as it had summer time: 00:00 on Sunday becomes 23:00 on Saturday at 03:00 UTC.
    let asuncion = calendar("America/Asuncion", &[("sat", "23:00-23:30", 4)]);
    assert_eq!(
        changes(&asuncion, "2024-03-23T12:00:00", "2024-03-24T12:00:00"),
        [
            "2024-03-24T02:00:00",
            "2024-03-24T02:30:00",
            "2024-03-24T03:00:00",
            "2024-03-24T03:30:00"
        ]
    );
    // The Azores: 01:00 becomes 00:00 at 01:00 UTC.
    let azores = calendar("Atlantic/Azores", &[("sun", "00:00-01:00", 4)]);
    assert_eq!(
        changes(&azores, "2026-10-24T12:00:00", "2026-10-25T12:00:00"),
        ["2026-10-25T00:00:00", "2026-10-25T02:00:00"]
    );
}

#[test]
fn a_clock_that_is_set_back_brings_back_what_held_then() {
    let office = calendar("Europe/Berlin", &[("mon-fri", "08:00-18:00", 200)]);
    let (before, after) = ("2026-11-23T06:59:00", "2026-11-23T07:00:00");
    holds(&office, &[(after, Some(200)), (before, None), (after, Some(200))]);
}

#[test]
fn the_ends_of_time_are_no_trouble() {
    let office = calendar(
        "Europe/Berlin",
        &[("daily", "08:00-18:00", 200), ("daily", "22:00-06:00", 100)],
    );
    for at in [Timestamp::MIN, Timestamp::MAX] {
        let _ = (office.rate_at(at), office.next_change(at));
    }
}

#[test]
fn days_are_written_as_lists_and_ranges() {
    let days = |text: &str| -> Vec<Weekday> {
        let days: Weekdays = text.parse().unwrap();
        let all = Monday.cycle_forward().take(7);
        all.filter(|day| days.contain(*day)).collect()
    };
    use Weekday::{Friday, Monday, Saturday, Sunday, Thursday, Tuesday, Wednesday};
    assert_eq!(days("mon"), [Monday]);
    assert_eq!(days("Mon-Fri"), [Monday, Tuesday, Wednesday, Thursday, Friday]);
    assert_eq!(days("mon-tue, sat"), [Monday, Tuesday, Saturday]);
    assert_eq!(days("sat - mon,wed"), [Monday, Wednesday, Saturday, Sunday]);
    assert_eq!(days("sun-sun"), [Sunday]);
    assert_eq!(days("daily").len(), 7);
    assert_eq!(days("daily"), days("mon-sun"));
    for bad in [
        "",
        ",",
        "mon,",
        "monday",
        "mon-",
        "-fri",
        "mon-wed-fri",
        "daily, mon",
        "mon tue",
        "1-5",
        "montag",
    ] {
        assert_eq!(bad.parse::<Weekdays>(), Err(InvalidWeekdays), "{bad}");
    }
}

#[test]
fn hours_are_written_from_and_to() {
    assert_eq!("00:00-24:00".parse(), Ok(Hours::WHOLE_DAY));
    assert_eq!("22:00-00:00".parse::<Hours>(), "22:00-24:00".parse());
    assert_eq!("08:00 - 18:00".parse::<Hours>(), "08:00-18:00".parse());
    for bad in [
        "",
        "08:00",
        "8:00-18:00",
        "08-18",
        "08:00-08:00",
        "00:00-00:00",
        "24:00-06:00",
        "08:60-09:00",
        "08:00-24:01",
        "25:00-26:00",
        "08:00-18:00-20:00",
        "+8:00-18:00",
        "08:00-18:00:00",
        "-",
        "é:00-18:00",
    ] {
        assert_eq!(bad.parse::<Hours>(), Err(InvalidHours), "{bad}");
    }
}

const ZONES: [&str; 9] = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Asuncion",
    "Australia/Sydney",
    "Australia/Lord_Howe",
    "Asia/Kolkata",
    "Africa/Casablanca",
    "Pacific/Apia",
];

/// The same by intervals of local time: each day on which an entry begins makes one.
fn naive(zone: &TimeZone, entries: &[(u8, u16, u16, u64)], at: Timestamp) -> Option<ByteRate> {
    let local = zone.to_datetime(at);
    let at_minute = |day: i64, minute: u16| -> DateTime {
        let midnight = local.date().to_datetime(jiff::civil::Time::midnight());
        midnight + SignedDuration::from_hours(24 * day) + SignedDuration::from_mins(i64::from(minute))
    };
    let covers = |(days, start, end, _): &&(u8, u16, u16, u64)| {
        [-1, 0].into_iter().any(|day| {
            let begins = at_minute(day, *start);
            let ends = at_minute(if end <= start { day + 1 } else { day }, *end);
            let weekday = begins.date().weekday().to_monday_zero_offset();
            days >> weekday & 1 == 1 && begins <= local && local < ends
        })
    };
    entries.iter().find(covers).map(|(.., rate)| ByteRate(*rate))
}

/// As an operator would write it.
fn written(entries: &[(u8, u16, u16, u64)]) -> Vec<CalendarEntry> {
    let names = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let time = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
    let entry = |(days, start, end, rate): &(u8, u16, u16, u64)| {
        let days: Vec<&str> = (0..7)
            .filter(|day| days >> day & 1 == 1)
            .map(|day| names[day])
            .collect();
        CalendarEntry {
            days: days.join(",").parse().unwrap(),
            hours: format!("{}-{}", time(*start), time(*end)).parse().unwrap(),
            rate: ByteRate(*rate),
        }
    };
    entries.iter().map(entry).collect()
}

fn some_entries() -> impl Strategy<Value = Vec<(u8, u16, u16, u64)>> {
    // Quarters of hours, so that ends meet, and single minutes.
    let minute = prop_oneof![(0u16..96).prop_map(|quarter| quarter * 15), 0u16..1440];
    let entry = (1u8..128, minute.clone(), minute, 1u64..4);
    let not_empty = entry.prop_filter("hours are never empty", |(_, start, end, _)| start != end);
    proptest::collection::vec(not_empty, 0..5)
}

/// Minutes of 2010 to 2037, more often than not in the days around which clocks are set.
fn some_minute() -> impl Strategy<Value = i64> {
    let day = prop_oneof![0i64..366, 60i64..100, 270i64..320];
    (40i64..68, day, 0i64..1440).prop_map(|(year, day, minute)| (year * 365 + year / 4 + day) * 1440 + minute)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_rate_of_each_minute_is_that_of_a_naive_evaluation_and_changes_when_it_is_said_to(
        zone_name in proptest::sample::select(&ZONES[..]),
        entries in some_entries(),
        start in some_minute(),
    ) {
        let zone = zone(zone_name);
        let calendar = Calendar::new(zone.clone(), written(&entries));
        let at = |minute: i64| Timestamp::from_second(minute * 60).unwrap();
        let mut next = calendar.next_change(at(start));
        let mut before = calendar.rate_at(at(start));
        for minute in start..start + 9 * 1440 {
            let now = at(minute);
            let rate = calendar.rate_at(now);
            prop_assert_eq!(rate, naive(&zone, &entries, now), "{}", now);
            prop_assert_eq!(calendar.rate_at(now + 59.seconds()), rate, "{}", now);
            if rate != before {
                prop_assert_eq!(next, Some(now));
                next = calendar.next_change(now);
            }
            prop_assert!(next.is_none_or(|next| next > now), "{:?} at {}", next, now);
            before = rate;
        }
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in ".{0,20}|[a-z:0-9, -]{0,20}") {
        let _ = (text.parse::<Weekdays>(), text.parse::<Hours>());
    }
}
