//! Durations and percentages as operators write them: `150ms`, `0.1%`. Rates are read by [`crate::proto::page::ByteRate`].

use std::time::Duration;

use super::random::Probability;

/// A text is not a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a duration with its unit, for example 150ms, 0.2ms, 100us or 3s; an hour is the longest")]
pub(super) struct InvalidDuration;

/// A text is not a percentage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a percentage from 0% to 100% with its sign, for example 0.1%")]
pub(super) struct InvalidPercentage;

/// Reads a number with `us`, `ms` or `s`, to the nanosecond.
pub(super) fn duration(text: &str) -> Result<Duration, InvalidDuration> {
    let text = text.trim();
    let (number, nanos) = [("us", 1e3), ("ms", 1e6), ("s", 1e9)]
        .iter()
        .find_map(|(unit, nanos)| text.strip_suffix(unit).map(|number| (number.trim(), *nanos)))
        .ok_or(InvalidDuration)?;
    let value = plain_number(number).ok_or(InvalidDuration)? * nanos;
    if value > LONGEST_NANOS {
        return Err(InvalidDuration);
    }
    Ok(Duration::from_nanos(value.round() as u64))
}

/// Reads a number with `%`.
pub(super) fn percentage(text: &str) -> Result<Probability, InvalidPercentage> {
    let number = text.trim().strip_suffix('%').ok_or(InvalidPercentage)?;
    let value = plain_number(number.trim()).ok_or(InvalidPercentage)?;
    Probability::new(value / 100.0).ok_or(InvalidPercentage)
}

/// Digits with at most one point: no sign, exponent, infinity or `nan`.
fn plain_number(text: &str) -> Option<f64> {
    let digits = text.bytes().any(|byte| byte.is_ascii_digit());
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if digits && plain { text.parse().ok() } else { None }
}

const LONGEST_NANOS: f64 = 3600e9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit_and_a_plain_number() {
        assert_eq!(duration("150ms"), Ok(Duration::from_millis(150)));
        assert_eq!(duration(" 0.2 ms "), Ok(Duration::from_micros(200)));
        assert_eq!(duration("75us"), Ok(Duration::from_micros(75)));
        assert_eq!(duration("3600s"), Ok(Duration::from_secs(3600)));
        for bad in [
            "",
            "150",
            "ms",
            "-1ms",
            "nanms",
            "1e3ms",
            "1.2.3s",
            "3601s",
            ".ms",
            "9".repeat(400).as_str(),
        ] {
            assert_eq!(duration(bad), Err(InvalidDuration), "{bad}");
        }
        assert_eq!(duration(&format!("{}s", "9".repeat(400))), Err(InvalidDuration));
    }

    #[test]
    fn percentages_need_their_sign_and_end_at_a_hundred() {
        assert_eq!(percentage("0.1%"), Probability::new(0.001).ok_or(InvalidPercentage));
        assert_eq!(percentage("100%"), Ok(Probability::ALWAYS));
        assert_eq!(percentage("0 %"), Ok(Probability::NEVER));
        for bad in ["0.1", "%", "-1%", "100.1%", "nan%", ""] {
            assert_eq!(percentage(bad), Err(InvalidPercentage), "{bad}");
        }
    }
}
