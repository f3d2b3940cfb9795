//! What can be asked of a running emulator: one line, one answer.
//!
//! ```text
//! stats                         what was carried, as JSON
//! set [ab.|ba.]KEY=VALUE        delay (one way), rate, queue (time), loss, gilbert_elliott (p/r[/1-h[/1-k]]), jitter, mtu
//! down [ab|ba] LENGTH [after T] cuts the link for LENGTH, now or T from now
//! up [ab|ba]                    ends all cuts
//! reset                         starts the lateness figures anew
//! ```

use std::time::Duration;

use super::loss::{GilbertElliott, Loss};
use super::model::{Jitter, LinkSettings};
use super::random::Probability;
use super::units;
use crate::proto::page::ByteRate;

/// A command to a running emulator.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    /// Report what was carried.
    Stats,
    /// Forget the lateness so far.
    Reset,
    /// Change one setting.
    Set { directions: Directions, change: Change },
    /// Cut the link.
    Down {
        directions: Directions,
        length: Duration,
        after: Duration,
    },
    /// End all cuts.
    Up { directions: Directions },
}

/// Which directions a command is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Directions {
    Ab,
    Ba,
    Both,
}

/// One setting, new.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Change {
    OneWayDelay(Duration),
    Rate(ByteRate),
    Queue(Duration),
    Loss(Loss),
    Jitter(Duration),
    Mtu(u32),
}

/// A line is not a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidCommand {
    #[error("{0:?} is not a command; there are stats, set, down, up and reset")]
    Verb(String),
    #[error("{0:?} is not a setting; there are delay, rate, queue, loss, gilbert_elliott, jitter and mtu")]
    Key(String),
    #[error("{value:?} is not a value of {key}: {reason}")]
    Value { key: String, value: String, reason: String },
    #[error("write {0}")]
    Usage(&'static str),
}

impl Directions {
    /// Whether the direction with this index is meant; 0 is from A to B.
    pub(super) fn include(self, index: usize) -> bool {
        match self {
            Self::Ab => index == 0,
            Self::Ba => index == 1,
            Self::Both => true,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "ab" => Some(Self::Ab),
            "ba" => Some(Self::Ba),
            "both" => Some(Self::Both),
            _ => None,
        }
    }
}

impl Command {
    /// Reads one line.
    pub(super) fn parse(line: &str) -> Result<Self, InvalidCommand> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (verb, rest) = words.split_first().ok_or_else(|| InvalidCommand::Verb(String::new()))?;
        let (directions, arguments) = match rest.split_first() {
            Some((first, others)) if *verb != "set" && Directions::parse(first).is_some() => {
                (Directions::parse(first).unwrap_or(Directions::Both), others)
            }
            _ => (Directions::Both, rest),
        };
        match (*verb, arguments) {
            ("stats", []) => Ok(Self::Stats),
            ("reset", []) => Ok(Self::Reset),
            ("up", []) => Ok(Self::Up { directions }),
            ("down", [length]) => Ok(Self::Down {
                directions,
                length: duration("down", length)?,
                after: Duration::ZERO,
            }),
            ("down", [length, "after", after]) => Ok(Self::Down {
                directions,
                length: duration("down", length)?,
                after: duration("after", after)?,
            }),
            ("set", [setting]) => {
                let (key, value) = setting.split_once('=').ok_or(InvalidCommand::Usage(SET_USAGE))?;
                let (directions, key) = match key.split_once('.') {
                    Some((prefix, key)) => (Directions::parse(prefix).ok_or(InvalidCommand::Usage(SET_USAGE))?, key),
                    None => (Directions::Both, key),
                };
                Ok(Self::Set {
                    directions,
                    change: Change::parse(key, value)?,
                })
            }
            ("set", _) => Err(InvalidCommand::Usage(SET_USAGE)),
            ("down", _) => Err(InvalidCommand::Usage(
                "down [ab|ba] LENGTH [after TIME], for example down ab 3s",
            )),
            ("up" | "stats" | "reset", _) => Err(InvalidCommand::Usage("the command without arguments")),
            (other, _) => Err(InvalidCommand::Verb(other.to_owned())),
        }
    }
}

impl Change {
    fn parse(key: &str, value: &str) -> Result<Self, InvalidCommand> {
        match key {
            "delay" => duration(key, value).map(Self::OneWayDelay),
            "queue" => duration(key, value).map(Self::Queue),
            "jitter" => duration(key, value).map(Self::Jitter),
            "rate" => value
                .parse()
                .map(Self::Rate)
                .map_err(|error| invalid(key, value, error)),
            "loss" => Ok(Self::Loss(match chance(key, value)? {
                Probability::NEVER => Loss::None,
                chance => Loss::Bernoulli(chance),
            })),
            "gilbert_elliott" => {
                let parts = value
                    .split('/')
                    .map(|part| chance(key, part))
                    .collect::<Result<Vec<_>, _>>()?;
                let (to_bad, to_good, others) = match parts.as_slice() {
                    [to_bad, to_good, others @ ..] if others.len() <= 2 => (*to_bad, *to_good, others),
                    _ => return Err(invalid(key, value, "write p/r, p/r/1-h or p/r/1-h/1-k")),
                };
                Ok(Self::Loss(Loss::GilbertElliott(GilbertElliott {
                    to_bad,
                    to_good,
                    loss_in_bad: others.first().copied().unwrap_or(Probability::ALWAYS),
                    loss_in_good: others.get(1).copied().unwrap_or(Probability::NEVER),
                })))
            }
            "mtu" => value.parse().map(Self::Mtu).map_err(|error| invalid(key, value, error)),
            other => Err(InvalidCommand::Key(other.to_owned())),
        }
    }

    /// The settings after the change. A queue that is stated as time keeps its bytes when the rate changes later, as the
    /// buffers of a router do.
    pub(super) fn apply(self, settings: &LinkSettings) -> LinkSettings {
        let mut changed = settings.clone();
        match self {
            Self::OneWayDelay(delay) => changed.one_way_delay = delay,
            Self::Rate(rate) => changed.rate = rate,
            Self::Queue(queue) => changed.queue_bytes = changed.rate.bytes_in(queue),
            Self::Loss(loss) => changed.loss = loss,
            Self::Mtu(mtu) => changed.mtu_bytes = mtu,
            Self::Jitter(Duration::ZERO) => changed.jitter = None,
            Self::Jitter(deviation) => {
                let correlation_time = settings
                    .jitter
                    .map_or(super::profile::DEFAULT_JITTER_CORRELATION, |jitter| {
                        jitter.correlation_time
                    });
                changed.jitter = Some(Jitter {
                    deviation,
                    correlation_time,
                });
            }
        }
        changed
    }
}

fn duration(key: &str, value: &str) -> Result<Duration, InvalidCommand> {
    units::duration(value).map_err(|error| invalid(key, value, error))
}

fn chance(key: &str, value: &str) -> Result<Probability, InvalidCommand> {
    units::percentage(value).map_err(|error| invalid(key, value, error))
}

fn invalid(key: &str, value: &str, reason: impl std::fmt::Display) -> InvalidCommand {
    InvalidCommand::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        reason: reason.to_string(),
    }
}

const SET_USAGE: &str = "set [ab.|ba.]KEY=VALUE, for example set ab.loss=0.1%";

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> LinkSettings {
        LinkSettings {
            one_way_delay: Duration::from_millis(75),
            rate: ByteRate::from_bits_per_second(1_000_000_000),
            queue_bytes: 6_250_000,
            overhead_bytes: 14,
            mtu_bytes: 1500,
            loss: Loss::None,
            jitter: None,
        }
    }

    fn set(line: &str) -> LinkSettings {
        match Command::parse(line) {
            Ok(Command::Set { change, .. }) => change.apply(&settings()),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn every_documented_line_is_understood() {
        let both = Directions::Both;
        let seconds = Duration::from_secs;
        assert_eq!(Command::parse("stats"), Ok(Command::Stats));
        assert_eq!(Command::parse(" reset \n"), Ok(Command::Reset));
        assert_eq!(
            Command::parse("up ba"),
            Ok(Command::Up {
                directions: Directions::Ba
            })
        );
        assert_eq!(
            Command::parse("down 3s"),
            Ok(Command::Down {
                directions: both,
                length: seconds(3),
                after: Duration::ZERO
            })
        );
        assert_eq!(
            Command::parse("down ab 3s after 10s"),
            Ok(Command::Down {
                directions: Directions::Ab,
                length: seconds(3),
                after: seconds(10)
            })
        );
        let loss = Change::Loss(Loss::Bernoulli(Probability::new(0.01).expect("a probability")));
        assert_eq!(
            Command::parse("set ab.loss=1%"),
            Ok(Command::Set {
                directions: Directions::Ab,
                change: loss
            })
        );
    }

    #[test]
    fn each_setting_changes_its_field_alone() {
        type Edit = fn(&mut LinkSettings);
        let changes: [(&str, Edit); 7] = [
            ("set delay=10ms", |link| link.one_way_delay = Duration::from_millis(10)),
            ("set rate=100mbit", |link| {
                link.rate = ByteRate::from_bits_per_second(100_000_000)
            }),
            ("set queue=10ms", |link| link.queue_bytes = 1_250_000),
            ("set loss=0%", |link| link.loss = Loss::None),
            ("set jitter=1ms", |link| {
                link.jitter = Some(Jitter {
                    deviation: Duration::from_millis(1),
                    correlation_time: Duration::from_millis(200),
                });
            }),
            ("set jitter=0ms", |link| link.jitter = None),
            ("set mtu=1400", |link| link.mtu_bytes = 1400),
        ];
        for (line, change) in changes {
            let mut expected = settings();
            change(&mut expected);
            assert_eq!(set(line), expected, "{line}");
        }
        let Loss::GilbertElliott(model) = set("set gilbert_elliott=1%/20%/50%").loss else {
            panic!("bursts")
        };
        assert_eq!(model.loss_in_bad.value(), 0.5);
        assert_eq!(model.loss_in_good, Probability::NEVER);
    }

    #[test]
    fn anything_else_is_refused_with_what_to_write() {
        for line in [
            "",
            "halt",
            "set",
            "set loss",
            "set xy.loss=1%",
            "set loss=1",
            "set speed=1",
            "set mtu=-1",
            "down",
            "down 3",
            "down 3s after",
            "down ab ba",
            "stats now",
            "set gilbert_elliott=1%",
            "set rate=9",
            "set gilbert_elliott=1%/2%/3%/4%/5%",
        ] {
            let error = Command::parse(line).expect_err(line).to_string();
            assert!(!error.is_empty(), "{line}");
        }
    }
}
