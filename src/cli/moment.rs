//! Times that people write on the command line.

use jiff::civil::{DateTime, Time};
use jiff::{Timestamp, ToSpan as _, Zoned};

/// Now, in this machine's time zone.
pub(super) fn now() -> Zoned {
    crate::gateway::clock::timestamp().to_zoned(jiff::tz::TimeZone::system())
}

/// Milliseconds since the Unix epoch: of a time with its zone, of a date and time in that of `now`, or of the next moment at which a clock shows this.
///
/// # Errors
/// A sentence.
pub(super) fn parse(text: &str, now: &Zoned) -> Result<u64, String> {
    let unusable = || {
        format!(
            "{text:?} is no time: write 02:00 for the next time it is that, \"2026-12-24 02:00\", or 2026-12-24T02:00:00Z"
        )
    };
    let moment = if let Ok(moment) = text.parse::<Timestamp>() {
        moment
    } else if let Ok(moment) = text.parse::<Zoned>() {
        moment.timestamp()
    } else if has_zone(text) {
        // What follows would pass it over.
        return Err(unusable());
    } else if let Ok(datetime) = text.parse::<DateTime>() {
        let there = datetime.to_zoned(now.time_zone().clone());
        there.map_err(|_| unusable())?.timestamp()
    } else {
        let time: Time = text.parse().map_err(|_| unusable())?;
        let today = now.date().to_datetime(time).to_zoned(now.time_zone().clone());
        let today = today.map_err(|_| unusable())?;
        match today > *now {
            true => today.timestamp(),
            false => {
                let tomorrow = now.date().checked_add(1.day()).map_err(|_| unusable())?;
                let tomorrow = tomorrow.to_datetime(time).to_zoned(now.time_zone().clone());
                tomorrow.map_err(|_| unusable())?.timestamp()
            }
        }
    };
    if moment <= now.timestamp() {
        return Err(format!("{text} has passed"));
    }
    u64::try_from(moment.as_millisecond()).map_err(|_| unusable())
}

/// Whether something of a zone stands behind the time.
fn has_zone(text: &str) -> bool {
    let time = text.split_once(['T', 't', ' ']).map_or(text, |(_, time)| time);
    !time.chars().all(|c| c.is_ascii_digit() || c == ':' || c == '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_the_next_one_and_a_date_is_this_machines() {
        let now: Zoned = "2026-11-29T12:00[Asia/Tokyo]".parse().unwrap();
        let of = |text: &str| text.parse::<Timestamp>().unwrap().as_millisecond() as u64;
        for (text, moment) in [
            ("13:00", "2026-11-29T04:00:00Z"),
            ("02:00", "2026-11-29T17:00:00Z"),
            ("2026-12-24 02:00", "2026-12-23T17:00:00Z"),
            ("2026-12-24T02:00", "2026-12-23T17:00:00Z"),
            ("2026-12-24T02:00:00Z", "2026-12-24T02:00:00Z"),
            ("2026-12-24T02:00[Europe/Berlin]", "2026-12-24T01:00:00Z"),
        ] {
            assert_eq!(parse(text, &now), Ok(of(moment)), "{text}");
        }
        assert!(parse("2026-11-28 02:00", &now).unwrap_err().contains("has passed"));
        for zone in ["02:00+09:00", "02:00Z", "2026-12-24 02:00[Nowhere]"] {
            assert!(parse(zone, &now).is_err(), "{zone}");
        }
        assert!(parse("tomorrow", &now).unwrap_err().contains("02:00"));
    }
}
