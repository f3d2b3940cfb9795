//! Events in the order in which they begin and end, as what has to be done to a link. Pure: whoever has a clock, or a
//! simulated one, does each step when it is due.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::change::{Change, Directions};
use super::event::{Event, Happening};
use super::link::Site;
use super::model::LinkSettings;

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// When, from the start of the time line.
    pub at: Duration,
    /// What.
    pub deed: Deed,
    /// The number of the event that it belongs to, from 0.
    pub event: usize,
    /// It takes the event back. To be done also when the time line is given up in the middle of the event.
    pub is_end: bool,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Deed {
    /// Let nothing enter.
    Cut {
        /// Where.
        directions: Directions,
        /// For so long; `Restore` follows.
        length: Duration,
    },
    /// The cut is over.
    Restore {
        /// Where.
        directions: Directions,
    },
    /// Lose what comes next.
    Lose {
        /// Where.
        directions: Directions,
        /// How many.
        datagrams: u64,
    },
    /// Change a setting.
    Change {
        /// Where.
        directions: Directions,
        /// How.
        change: Change,
    },
    /// Give a site another address.
    Address {
        /// Which one.
        site: Site,
        /// The new one.
        address: Ipv4Addr,
    },
}

/// What has to be done for `events`, from settings `current` (A to B, B to A), in the order of time. Ends come before what
/// begins at the same moment.
#[must_use]
pub fn steps(current: &[LinkSettings; 2], events: &[Event]) -> Vec<Step> {
    let mut current = current.clone();
    let mut order: Vec<usize> = (0..events.len()).collect();
    order.sort_by_key(|index| events[*index].at);
    let mut steps = Vec::new();
    let mut ends: Vec<Step> = Vec::new();
    for event in order {
        let Event { at, happening } = &events[event];
        finish(&mut ends, &mut steps, &mut current, *at);
        let mut end = |after: Duration, deed| {
            ends.push(Step {
                at: at.saturating_add(after),
                deed,
                event,
                is_end: true,
            });
        };
        let deed = match *happening {
            Happening::Cut { directions, length } => {
                end(length, Deed::Restore { directions });
                Deed::Cut { directions, length }
            }
            Happening::Lose { directions, datagrams } => Deed::Lose { directions, datagrams },
            Happening::Address { site, address } => Deed::Address { site, address },
            Happening::Change {
                directions,
                change,
                length,
            } => {
                for index in directions.indices() {
                    if let Some(length) = length {
                        let directions = Directions::one(index);
                        let change = change.undone(&current[index]);
                        end(length, Deed::Change { directions, change });
                    }
                    current[index] = change.apply(&current[index]);
                }
                Deed::Change { directions, change }
            }
        };
        steps.push(Step {
            at: *at,
            deed,
            event,
            is_end: false,
        });
    }
    finish(&mut ends, &mut steps, &mut current, Duration::MAX);
    steps
}

/// Moves the ends that come until `now` to the steps.
fn finish(ends: &mut Vec<Step>, steps: &mut Vec<Step>, current: &mut [LinkSettings; 2], now: Duration) {
    ends.sort_by_key(|step| step.at);
    let due = ends.partition_point(|step| step.at <= now);
    for step in ends.drain(..due) {
        if let Deed::Change { directions, change } = step.deed {
            for index in directions.indices() {
                current[index] = change.apply(&current[index]);
            }
        }
        steps.push(step);
    }
}

/// Every state that a direction of `current` passes through, the first included. For who has to make room for them.
#[must_use]
pub fn states(current: &LinkSettings, events: &[Event]) -> Vec<LinkSettings> {
    let both = [current.clone(), current.clone()];
    let mut states = both.to_vec();
    let mut now = both.clone();
    for step in steps(&both, events) {
        if let Deed::Change { directions, change } = step.deed {
            for index in directions.indices() {
                now[index] = change.apply(&now[index]);
                states.push(now[index].clone());
            }
        }
    }
    states
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut { directions, length } => write!(f, "cut {directions} for {length:?}"),
            Self::Restore { directions } => write!(f, "end of the cut {directions}"),
            Self::Lose { directions, datagrams } => write!(f, "lose {directions} {datagrams} datagrams"),
            Self::Change { directions, change } => write!(f, "{change} {directions}"),
            Self::Address { site, address } => write!(f, "address of site {site} {address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::ByteRate;
    use crate::wan::model::tests::settings;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn change(at: u64, key: &str, value: &str, length: Option<u64>) -> Event {
        Event {
            at: seconds(at),
            happening: Happening::Change {
                directions: Directions::Both,
                change: Change::parse(key, value).expect("valid"),
                length: length.map(seconds),
            },
        }
    }

    fn in_words(current: &[LinkSettings; 2], events: &[Event]) -> Vec<String> {
        let steps = steps(current, events);
        steps
            .iter()
            .map(|step| {
                format!(
                    "{} {}{}",
                    step.at.as_secs(),
                    step.deed,
                    if step.is_end { " (end)" } else { "" }
                )
            })
            .collect()
    }

    #[test]
    fn steps_come_in_the_order_of_time_whatever_the_order_of_the_file() {
        let cut = Event {
            at: seconds(1),
            happening: Happening::Cut {
                directions: Directions::Ab,
                length: seconds(9),
            },
        };
        let events = [change(5, "mtu", "1400", Some(1)), cut, change(3, "loss", "1%", None)];
        let both = [settings(), settings()];
        assert_eq!(
            in_words(&both, &events),
            [
                "1 cut ab for 9s",
                "3 loss 1% both",
                "5 mtu 1400 both",
                "6 mtu 1500 ab (end)",
                "6 mtu 1500 ba (end)",
                "10 end of the cut ab (end)",
            ]
        );
    }

    #[test]
    fn what_ends_brings_back_what_was_in_force_in_each_direction_and_not_the_profile() {
        let mut both = [settings(), settings()];
        both[1].rate = ByteRate::from_bits_per_second(300_000_000);
        let events = [change(2, "rate", "50mbit", None), change(4, "rate", "10mbit", Some(2))];
        assert_eq!(
            in_words(&both, &events),
            [
                "2 rate 50mbit both",
                "4 rate 10mbit both",
                "6 rate 50mbit ab (end)",
                "6 rate 50mbit ba (end)"
            ]
        );
        let first = [change(2, "rate", "50mbit", Some(1))];
        assert_eq!(
            in_words(&both, &first)[1..],
            ["3 rate 1gbit ab (end)", "3 rate 300mbit ba (end)"]
        );
    }

    #[test]
    fn an_end_comes_before_what_begins_in_the_same_moment() {
        let events = [change(4, "rate", "20mbit", None), change(2, "rate", "10mbit", Some(2))];
        let both = [settings(), settings()];
        assert_eq!(
            in_words(&both, &events)[1..],
            ["4 rate 1gbit ab (end)", "4 rate 1gbit ba (end)", "4 rate 20mbit both"]
        );
    }

    #[test]
    fn all_states_are_passed_through_and_a_time_line_without_events_has_one() {
        let events = [change(1, "rtt", "600ms", Some(1)), change(3, "rate", "2gbit", None)];
        let states = states(&settings(), &events);
        let longest = states.iter().map(|state| state.one_way_delay).max();
        let fastest = states.iter().map(|state| state.rate).max();
        assert_eq!(longest, Some(Duration::from_millis(300)));
        assert_eq!(fastest, Some(ByteRate::from_bits_per_second(2_000_000_000)));
        // The longest RTT and the highest rate never meet.
        assert!(
            !states
                .iter()
                .any(|state| Some(state.rate) == fastest && Some(state.one_way_delay) == longest)
        );
        assert!(super::states(&settings(), &[]).iter().all(|state| *state == settings()));
    }
}
