//! What can be asked of a running emulator: one line, one answer.
//!
//! ```text
//! stats                         what was carried, as JSON
//! settings                      what is in force in both directions, as JSON
//! set [ab.|ba.]KEY=VALUE        changes one setting; the keys are those of `Change`
//! replace ab|ba JSON            all settings of a direction, in the form that `settings` prints
//! lose [ab|ba] N                loses the next N datagrams
//! down [ab|ba] LENGTH [after T] cuts the link for LENGTH, now or T from now
//! up [ab|ba]                    ends all cuts
//! reset                         starts the lateness figures anew
//! ```

use std::time::Duration;

use super::change::{Change, Directions, InvalidChange, duration};
use super::model::LinkSettings;

/// A command to a running emulator.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    /// Report what was carried.
    Stats,
    /// Report what is in force.
    Settings,
    /// Forget the lateness so far.
    Reset,
    /// Change one setting.
    Set { directions: Directions, change: Change },
    /// Change all settings.
    Replace {
        directions: Directions,
        settings: Box<LinkSettings>,
    },
    /// Lose the next datagrams.
    Lose { directions: Directions, datagrams: u64 },
    /// Cut the link.
    Down {
        directions: Directions,
        length: Duration,
        after: Duration,
    },
    /// End all cuts.
    Up { directions: Directions },
}

/// A line is not a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidCommand {
    #[error("{0:?} is not a command; there are stats, settings, set, replace, lose, down, up and reset")]
    Verb(String),
    #[error(transparent)]
    Change(#[from] InvalidChange),
    #[error("write {0}")]
    Usage(&'static str),
}

impl Command {
    /// Reads one line.
    pub(super) fn parse(line: &str) -> Result<Self, InvalidCommand> {
        // The JSON may hold blanks.
        if let Some(rest) = line.trim().strip_prefix("replace ") {
            return Self::parse_replace(rest.trim());
        }
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
            ("settings", []) => Ok(Self::Settings),
            ("reset", []) => Ok(Self::Reset),
            ("lose", [datagrams]) => Ok(Self::Lose {
                directions,
                datagrams: datagrams.parse().map_err(|_| InvalidCommand::Usage(LOSE_USAGE))?,
            }),
            ("lose", _) => Err(InvalidCommand::Usage(LOSE_USAGE)),
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
                    change: Change::parse(key.trim(), value.trim())?,
                })
            }
            ("set", _) => Err(InvalidCommand::Usage(SET_USAGE)),
            ("down", _) => Err(InvalidCommand::Usage(
                "down [ab|ba] LENGTH [after TIME], for example down ab 3s",
            )),
            ("up" | "stats" | "settings" | "reset", _) => Err(InvalidCommand::Usage("the command without arguments")),
            (other, _) => Err(InvalidCommand::Verb(other.to_owned())),
        }
    }

    fn parse_replace(rest: &str) -> Result<Self, InvalidCommand> {
        let usage = InvalidCommand::Usage("replace ab|ba JSON, in the form that settings prints");
        let Some((first, json)) = rest.split_once(' ') else {
            return Err(usage);
        };
        match (Directions::parse(first), serde_json::from_str(json)) {
            (Some(directions), Ok(settings)) => Ok(Self::Replace {
                directions,
                settings: Box::new(settings),
            }),
            _ => Err(usage),
        }
    }
}

const LOSE_USAGE: &str = "lose [ab|ba] N, for example lose ab 20";
const SET_USAGE: &str = "set [ab.|ba.]KEY=VALUE, for example set ab.loss=0.1%";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::loss::Loss;
    use crate::wan::random::Probability;

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
        assert_eq!(Command::parse("settings"), Ok(Command::Settings));
        assert_eq!(
            Command::parse("lose ba 20"),
            Ok(Command::Lose {
                directions: Directions::Ba,
                datagrams: 20
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
    fn what_settings_prints_replaces_settings() {
        let settings = crate::wan::model::tests::settings();
        let json = serde_json::to_string_pretty(&settings)
            .expect("plain data")
            .replace('\n', " ");
        assert_eq!(
            Command::parse(&format!("replace ab {json}\n")),
            Ok(Command::Replace {
                directions: Directions::Ab,
                settings: Box::new(settings)
            })
        );
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
            "settings now",
            "lose",
            "lose ab",
            "lose x",
            "lose ab -1",
            "replace ab",
            "replace ab {}",
            "replace xy {}",
            "set gilbert_elliott=1%",
            "set rate=9",
            "set gilbert_elliott=1%/2%/3%/4%/5%",
        ] {
            let error = Command::parse(line).expect_err(line).to_string();
            assert!(!error.is_empty(), "{line}");
        }
    }
}
