//! What happens to a link while it is up, as a profile's `[[event]]` tables or `netem-scripts/link set` say it.
//!
//! A table is checked here, and every mistake in it is named; when and in which order things are done is `timeline`'s.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use serde::Deserialize;

use super::change::{Change, Directions, InvalidChange, KEYS};
use super::link::Site;
use super::profile::Mistake;
use super::units;

/// Something that happens to a link.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When, from the start of the time line.
    pub at: Duration,
    /// What.
    pub happening: Happening,
}

/// What happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Happening {
    /// Nothing enters the directions for so long; what is on its way still arrives.
    Cut {
        /// Which ones.
        directions: Directions,
        /// For so long.
        length: Duration,
    },
    /// The next datagrams of the directions are lost.
    Lose {
        /// Which ones.
        directions: Directions,
        /// How many, of each.
        datagrams: u64,
    },
    /// A setting of the directions changes.
    Change {
        /// Which ones.
        directions: Directions,
        /// How.
        change: Change,
        /// Then it is what it was. For good, where there is none.
        length: Option<Duration>,
    },
    /// A site has another address on the link, and the old one no longer.
    Address {
        /// Which one.
        site: Site,
        /// In 10.77.0.0/24.
        address: Ipv4Addr,
    },
}

/// An event as it is written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EventTable {
    pub(super) at: String,
    pub(super) kind: String,
    #[serde(rename = "for")]
    pub(super) length: Option<String>,
    pub(super) direction: Option<String>,
    pub(super) to: Option<Value>,
    pub(super) datagrams: Option<i64>,
    pub(super) site: Option<String>,
}

/// What a setting changes to: most are texts, an MTU is a number.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Value {
    Text(String),
    Number(i64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => write!(f, "{number}"),
        }
    }
}

/// Checks the tables, in the order of the file. All mistakes are added to `mistakes`, under the `name` of their table,
/// which is told its number from 1.
pub(super) fn check(
    tables: &[EventTable],
    name: impl Fn(usize, &EventTable) -> String,
    mistakes: &mut Vec<Mistake>,
) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    for (index, table) in tables.iter().enumerate() {
        let mut checker = Checker {
            prefix: name(index + 1, table),
            mistakes,
        };
        if let Some(event) = checker.event(table) {
            if let Some(other) = events.iter().find(|other| other.disturbs(&event)) {
                let text = format!("{event} meets {other}: what would be in force then?");
                checker.mistake("at", text);
            }
            events.push(event);
        }
    }
    events
}

/// How a table of a profile is named.
pub(super) fn numbered(number: usize, _: &EventTable) -> String {
    format!("event {number}")
}

/// Reads one table.
struct Checker<'a> {
    prefix: String,
    mistakes: &'a mut Vec<Mistake>,
}

impl Checker<'_> {
    fn mistake(&mut self, key: &str, text: impl Into<String>) {
        self.mistakes.push(Mistake {
            key: format!("{}.{key}", self.prefix),
            text: text.into(),
        });
    }

    fn take<T, E: fmt::Display>(&mut self, key: &str, read: Result<T, E>) -> Option<T> {
        read.map_err(|error| self.mistake(key, error.to_string())).ok()
    }

    fn event(&mut self, table: &EventTable) -> Option<Event> {
        let at = self.take("at", units::duration(&table.at));
        let length = match &table.length {
            None => Some(None),
            Some(text) => self.take("for", units::duration(text)).map(Some),
        };
        if length == Some(Some(Duration::ZERO)) {
            self.mistake("for", "0 is no time at all");
            return None;
        }
        let directions = match table.direction.as_deref() {
            None => Some(Directions::Both),
            Some(text) => {
                let directions = Directions::parse(text);
                if directions.is_none() {
                    self.mistake("direction", format!("{text:?} is no direction; write ab, ba or both"));
                }
                directions
            }
        };
        self.only_known(table);
        let happening = match table.kind.as_str() {
            "cut" => {
                if length == Some(None) {
                    self.mistake("for", "a cut needs the time that it lasts");
                }
                Happening::Cut {
                    directions: directions?,
                    length: length??,
                }
            }
            "lose" => {
                let datagrams = table
                    .datagrams
                    .and_then(|count| u64::try_from(count).ok())
                    .filter(|count| *count > 0);
                if datagrams.is_none() {
                    self.mistake("datagrams", "say how many of the next datagrams are lost, at least 1");
                }
                Happening::Lose {
                    directions: directions?,
                    datagrams: datagrams?,
                }
            }
            "address" => {
                let site = self.site(table.site.as_deref());
                let address = self.address(table.to.as_ref());
                Happening::Address {
                    site: site?,
                    address: address?,
                }
            }
            kind => {
                let change = match (&table.to, Change::parse(kind, "")) {
                    (_, Err(InvalidChange::Key(_))) => {
                        self.mistake(
                            "kind",
                            format!("{kind:?} is no kind; there are cut, lose, address and {KEYS}"),
                        );
                        None
                    }
                    (None, _) => {
                        self.mistake("to", format!("say what {kind} changes to"));
                        None
                    }
                    (Some(value), _) => self.take("to", Change::parse(kind, &value.to_string())),
                };
                Happening::Change {
                    directions: directions?,
                    change: change?,
                    length: length?,
                }
            }
        };
        Some(Event { at: at?, happening })
    }

    /// Keys that another kind has are as wrong as those that none has.
    fn only_known(&mut self, table: &EventTable) {
        let kind = table.kind.as_str();
        let takes = |key: &str| match kind {
            "cut" => matches!(key, "for" | "direction"),
            "lose" => matches!(key, "datagrams" | "direction"),
            "address" => matches!(key, "to" | "site"),
            _ => matches!(key, "to" | "for" | "direction"),
        };
        let given = [
            ("for", table.length.is_some()),
            ("direction", table.direction.is_some()),
            ("to", table.to.is_some()),
            ("datagrams", table.datagrams.is_some()),
            ("site", table.site.is_some()),
        ];
        for (key, given) in given {
            if given && !takes(key) {
                self.mistake(key, format!("an event of kind {kind} has none"));
            }
        }
    }

    fn site(&mut self, text: Option<&str>) -> Option<Site> {
        match text {
            None | Some("a") => Some(Site::A),
            Some("b") => Some(Site::B),
            Some(other) => {
                self.mistake("site", format!("{other:?} is no site; write a or b"));
                None
            }
        }
    }

    fn address(&mut self, value: Option<&Value>) -> Option<Ipv4Addr> {
        let text = value.map(Value::to_string).unwrap_or_default();
        let address = text.parse().ok().filter(|address: &Ipv4Addr| {
            let [a, b, c, host] = address.octets();
            [a, b, c] == NETWORK && (1..255).contains(&host)
        });
        if address.is_none() {
            self.mistake(
                "to",
                format!("{text:?} is no address of the link; take one of 10.77.0.1 to 10.77.0.254"),
            );
        }
        address
    }
}

impl Event {
    /// When its effect is over; itself where it changes something for good or has no duration.
    fn end(&self) -> Duration {
        match self.happening {
            Happening::Cut { length, .. } => self.at.saturating_add(length),
            Happening::Change { length, .. } => self.at.saturating_add(length.unwrap_or_default()),
            Happening::Lose { .. } | Happening::Address { .. } => self.at,
        }
    }

    /// Whether both are about the same thing at the same time, so that the end of one would undo the other.
    fn disturbs(&self, other: &Self) -> bool {
        let same = match (&self.happening, &other.happening) {
            (Happening::Cut { directions: one, .. }, Happening::Cut { directions: two, .. }) => one.meet(*two),
            (
                Happening::Change {
                    directions: one,
                    change,
                    ..
                },
                Happening::Change {
                    directions: two,
                    change: new,
                    ..
                },
            ) => one.meet(*two) && change.meets(*new),
            (Happening::Address { site: one, .. }, Happening::Address { site: two, .. }) => {
                return one == two && self.at == other.at;
            }
            _ => false,
        };
        // What ends at the moment in which the other begins does not disturb it.
        let (first, second) = if self.at <= other.at {
            (self, other)
        } else {
            (other, self)
        };
        same && (second.at < first.end() || second.at == first.at)
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:?}", self.happening, self.at)
    }
}

impl fmt::Display for Happening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut { directions, length } => write!(f, "cut {directions} for {length:?}"),
            Self::Lose { directions, datagrams } => write!(f, "lose {directions} {datagrams} datagrams"),
            Self::Change {
                directions,
                change,
                length: None,
            } => write!(f, "{change} {directions}"),
            Self::Change {
                directions,
                change,
                length: Some(length),
            } => write!(f, "{change} {directions} for {length:?}"),
            Self::Address { site, address } => write!(f, "address of site {site} {address}"),
        }
    }
}

const NETWORK: [u8; 3] = [10, 77, 0];

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(toml: &str) -> (Vec<Event>, Vec<String>) {
        #[derive(Deserialize)]
        struct File {
            event: Vec<EventTable>,
        }
        let file: File = toml::from_str(toml).unwrap_or_else(|error| panic!("{error}"));
        let mut mistakes = Vec::new();
        let events = check(&file.event, numbered, &mut mistakes);
        (events, mistakes.iter().map(Mistake::to_string).collect())
    }

    fn one(line: &str) -> (Vec<Event>, Vec<String>) {
        checked(&format!("event = [{{ at = '10s', {line} }}]"))
    }

    #[test]
    fn each_kind_is_read() {
        let seconds = Duration::from_secs;
        let cases = [
            (
                "kind = 'cut', for = '5s', direction = 'ab'",
                Happening::Cut {
                    directions: Directions::Ab,
                    length: seconds(5),
                },
            ),
            (
                "kind = 'rate', to = '100mbit', for = '3s'",
                Happening::Change {
                    directions: Directions::Both,
                    change: Change::parse("rate", "100mbit").expect("a rate"),
                    length: Some(seconds(3)),
                },
            ),
            (
                "kind = 'mtu', to = 1400, direction = 'ba'",
                Happening::Change {
                    directions: Directions::Ba,
                    change: Change::Mtu(1400),
                    length: None,
                },
            ),
            (
                "kind = 'lose', datagrams = 20",
                Happening::Lose {
                    directions: Directions::Both,
                    datagrams: 20,
                },
            ),
            (
                "kind = 'address', to = '10.77.0.11'",
                Happening::Address {
                    site: Site::A,
                    address: Ipv4Addr::new(10, 77, 0, 11),
                },
            ),
        ];
        for (line, happening) in cases {
            let event = Event {
                at: seconds(10),
                happening,
            };
            assert_eq!(one(line), (vec![event], vec![]), "{line}");
        }
    }

    #[test]
    fn each_mistake_is_named_by_event_and_key() {
        for (line, key) in [
            ("kind = 'cut'", "for"),
            ("kind = 'cut', for = '0s'", "for"),
            ("kind = 'cut', for = '5'", "for"),
            ("kind = 'cut', for = '5s', to = '1'", "to"),
            ("kind = 'cut', for = '5s', direction = 'up'", "direction"),
            ("kind = 'cut', for = '5s', site = 'a'", "site"),
            ("kind = 'storm'", "kind"),
            ("kind = 'rate'", "to"),
            ("kind = 'rate', to = 'fast'", "to"),
            ("kind = 'rate', to = '1mbit', datagrams = 3", "datagrams"),
            ("kind = 'mtu', to = 1279", "to"),
            ("kind = 'lose'", "datagrams"),
            ("kind = 'lose', datagrams = 0", "datagrams"),
            ("kind = 'lose', datagrams = -1", "datagrams"),
            ("kind = 'lose', datagrams = 1, for = '1s'", "for"),
            ("kind = 'address'", "to"),
            ("kind = 'address', to = '10.78.0.1'", "to"),
            ("kind = 'address', to = '10.77.0.255'", "to"),
            ("kind = 'address', to = '10.77.0.1', site = 'c'", "site"),
        ] {
            let (_, mistakes) = one(line);
            assert_eq!(mistakes.len(), 1, "{line}: {mistakes:?}");
            assert!(
                mistakes[0].starts_with(&format!("event 1.{key}: ")),
                "{line}: {mistakes:?}"
            );
        }
    }

    #[test]
    fn all_mistakes_of_all_events_are_reported_at_once() {
        let (_, mistakes) = checked(
            "[[event]]\nat = 'noon'\nkind = 'cut'\ndirection = 'up'\n[[event]]\nat = '1s'\nkind = 'rate'\nto = 'fast'",
        );
        let keys: Vec<&str> = mistakes
            .iter()
            .filter_map(|mistake| mistake.split(": ").next())
            .collect();
        assert_eq!(keys, ["event 1.at", "event 1.direction", "event 1.for", "event 2.to"]);
    }

    #[test]
    fn events_that_would_undo_each_other_are_refused_and_those_that_touch_are_not() {
        let pair = |one: &str, other: &str| checked(&format!("event = [{{ {one} }}, {{ {other} }}]")).1.len();
        let long = "at = '10s', kind = 'rate', to = '1mbit', for = '5s'";
        assert_eq!(pair(long, "at = '14.9s', kind = 'rate', to = '2mbit'"), 1);
        assert_eq!(pair(long, "at = '15s', kind = 'rate', to = '2mbit'"), 0);
        assert_eq!(pair(long, "at = '10s', kind = 'rate', to = '2mbit'"), 1);
        assert_eq!(pair("at = '14.9s', kind = 'rate', to = '2mbit'", long), 1);
        assert_eq!(pair(long, "at = '12s', kind = 'loss', to = '1%'"), 0);
        let ab = "at = '10s', kind = 'cut', for = '5s', direction = 'ab'";
        assert_eq!(pair(ab, "at = '12s', kind = 'cut', for = '5s', direction = 'ba'"), 0);
        assert_eq!(pair(ab, "at = '12s', kind = 'cut', for = '5s'"), 1);
    }
}
