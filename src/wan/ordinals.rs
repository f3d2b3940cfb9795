//! Datagrams by their number, as a script names those that are lost: `"17, 100-109"`.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Numbers of datagrams. The first that is offered to a direction has number 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ordinals {
    /// In order and apart from each other.
    ranges: Vec<RangeInclusive<u64>>,
}

/// A text is not a list of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write numbers from 1 and ranges of them, for example 17, 100-109; at most {MAX_RANGES} of them")]
pub struct InvalidOrdinals;

impl Ordinals {
    /// Whether `number` is among them.
    #[must_use]
    pub fn contain(&self, number: u64) -> bool {
        let after = self.ranges.partition_point(|range| *range.start() <= number);
        after > 0 && self.ranges[after - 1].contains(&number)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

impl FromStr for Ordinals {
    type Err = InvalidOrdinals;

    fn from_str(text: &str) -> Result<Self, InvalidOrdinals> {
        let number = |text: &str| text.trim().parse().ok().filter(|number| *number > 0_u64);
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (number(first), number(last)) {
                (Some(first), Some(last)) if first <= last && ranges.len() < MAX_RANGES => ranges.push(first..=last),
                _ => return Err(InvalidOrdinals),
            }
        }
        ranges.sort_by_key(|range| *range.start());
        let mut merged: Vec<RangeInclusive<u64>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(before) if range.start() <= before.end() => {
                    *before = *before.start()..=(*before.end()).max(*range.end());
                }
                _ => merged.push(range),
            }
        }
        Ok(Self { ranges: merged })
    }
}

impl fmt::Display for Ordinals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.ranges.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            if range.start() == range.end() {
                write!(f, "{comma}{}", range.start())?;
            } else {
                write!(f, "{comma}{}-{}", range.start(), range.end())?;
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for Ordinals {
    type Error = InvalidOrdinals;

    fn try_from(text: String) -> Result<Self, InvalidOrdinals> {
        if text.is_empty() {
            Ok(Self::default())
        } else {
            text.parse()
        }
    }
}

impl From<Ordinals> for String {
    fn from(ordinals: Ordinals) -> Self {
        ordinals.to_string()
    }
}

/// A control line carries them all.
const MAX_RANGES: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ranges_are_read_in_any_order_and_may_overlap() {
        let ordinals: Ordinals = "100-109, 17,105-120 , 1".parse().expect("a list");
        let inside: Vec<u64> = (0..200).filter(|number| ordinals.contain(*number)).collect();
        let expected: Vec<u64> = [1, 17].into_iter().chain(100..=120).collect();
        assert_eq!(inside, expected);
        assert_eq!(ordinals.to_string(), "1, 17, 100-120");
    }

    #[test]
    fn what_is_no_list_of_numbers_from_one_is_refused() {
        for bad in ["", "0", "x", "5-3", "1,,2", "-3", "1-2-3", "1;2"] {
            assert_eq!(bad.parse::<Ordinals>(), Err(InvalidOrdinals), "{bad}");
        }
        let many = vec!["1"; MAX_RANGES].join(",");
        assert!(many.parse::<Ordinals>().is_ok());
        assert_eq!(format!("{many},1").parse::<Ordinals>(), Err(InvalidOrdinals));
    }

    #[test]
    fn no_numbers_contain_none_and_survive_json() {
        let none = Ordinals::default();
        assert!(none.is_empty() && !none.contain(1));
        let json = serde_json::to_string(&none).expect("a text");
        assert_eq!(serde_json::from_str::<Ordinals>(&json).expect("the same"), none);
    }
}
