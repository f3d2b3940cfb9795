//! Weekdays and hours, as operators write them.

use std::str::FromStr;

use jiff::civil::{DateTime, Time, Weekday};

/// A set of weekdays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weekdays {
    /// Bit 0 is Monday.
    bits: u8,
}

impl Weekdays {
    /// All seven.
    pub const DAILY: Self = Self { bits: 0b111_1111 };

    pub(super) fn contain(self, day: Weekday) -> bool {
        self.bits & bit(day) != 0
    }
}

/// Days and ranges between commas: `mon`, `mon-fri`, `mon-thu, sat`. A range may go past Sunday: `sat-mon`. `daily` is all.
impl FromStr for Weekdays {
    type Err = InvalidWeekdays;

    fn from_str(text: &str) -> Result<Self, InvalidWeekdays> {
        let mut bits = 0;
        for part in text.to_ascii_lowercase().split(',').map(str::trim) {
            if part == "daily" {
                return if text.contains(',') {
                    Err(InvalidWeekdays)
                } else {
                    Ok(Self::DAILY)
                };
            }
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let last = weekday(last)?;
            let mut day = weekday(first)?;
            bits |= bit(day);
            while day != last {
                day = day.next();
                bits |= bit(day);
            }
        }
        Ok(Self { bits })
    }
}

fn weekday(text: &str) -> Result<Weekday, InvalidWeekdays> {
    let names = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let text = text.trim();
    let (_, day) = names
        .iter()
        .zip(Weekday::Monday.cycle_forward())
        .find(|(name, _)| **name == text)
        .ok_or(InvalidWeekdays)?;
    Ok(day)
}

fn bit(day: Weekday) -> u8 {
    1 << day.to_monday_zero_offset()
}

/// Hours of a day, half-open, to the minute. They may go past midnight, and are never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hours {
    /// Minutes from 00:00, below [`DAY`].
    start: u16,
    /// The same, 1 to [`DAY`]. Not above `start`: on the day after.
    end: u16,
}

impl Hours {
    /// From midnight to midnight.
    pub const WHOLE_DAY: Self = Self { start: 0, end: DAY };

    /// Whether they hold on one of `days` when the clock shows `local`. What is past midnight belongs to the day before.
    pub(super) fn cover(self, days: Weekdays, local: DateTime) -> bool {
        let (today, now) = (local.date().weekday(), minute_of(local.time()));
        if self.start < self.end {
            return days.contain(today) && (self.start..self.end).contains(&now);
        }
        (days.contain(today) && now >= self.start) || (days.contain(today.previous()) && now < self.end)
    }

    /// What the clock shows when they begin and when they end.
    pub(super) fn ends(self) -> [Time; 2] {
        [self.start, self.end % DAY].map(|minutes| {
            let (hour, minute) = (minutes / 60, minutes % 60);
            // Both are below 24 and 60.
            Time::constant(hour as i8, minute as i8, 0, 0)
        })
    }
}

/// `08:00-18:00`; `22:00-06:00` goes past midnight. `24:00` is the end of a day.
impl FromStr for Hours {
    type Err = InvalidHours;

    fn from_str(text: &str) -> Result<Self, InvalidHours> {
        let (start, end) = text.split_once('-').ok_or(InvalidHours)?;
        let (start, end) = (minutes(start)?, minutes(end)?);
        if start == DAY || start == end {
            return Err(InvalidHours);
        }
        let end = if end == 0 { DAY } else { end };
        Ok(Self { start, end })
    }
}

/// Minutes from midnight at `text`, at most [`DAY`].
fn minutes(text: &str) -> Result<u16, InvalidHours> {
    let (hour, minute) = text.trim().split_once(':').ok_or(InvalidHours)?;
    let number = |digits: &str| match digits.len() {
        2 if digits.bytes().all(|digit| digit.is_ascii_digit()) => digits.parse::<u16>().map_err(|_| InvalidHours),
        _ => Err(InvalidHours),
    };
    let (hour, minute) = (number(hour)?, number(minute)?);
    let total = hour * 60 + minute;
    if minute < 60 && total <= DAY {
        Ok(total)
    } else {
        Err(InvalidHours)
    }
}

fn minute_of(time: Time) -> u16 {
    u16::from(time.hour().unsigned_abs()) * 60 + u16::from(time.minute().unsigned_abs())
}

/// Minutes in a day.
const DAY: u16 = 24 * 60;

/// A text is not a set of weekdays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "write days as mon, tue, wed, thu, fri, sat, sun, for example mon-fri or \"mon-thu, sat\"; daily is all of them"
)]
pub struct InvalidWeekdays;

/// A text is not a span of hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write local time from-to, for example 08:00-18:00, or past midnight 22:00-06:00; a whole day is 00:00-24:00")]
pub struct InvalidHours;
