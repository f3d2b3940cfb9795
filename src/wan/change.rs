//! One setting of a running link, new: as commands, events and `netem-scripts/link set` state it.
//!
//! | key | value |
//! | --- | --- |
//! | `rtt`, `delay` | a duration; `delay` is that of one way |
//! | `rate` | as `tc` writes it |
//! | `queue` | a duration at the present rate |
//! | `loss` | a percentage |
//! | `gilbert_elliott` | `p/r`, `p/r/1-h` or `p/r/1-h/1-k`, percentages |
//! | `jitter` | a duration, the standard deviation, or `1ms/200ms` with the correlation time |
//! | `reordering` | a percentage, or `1%/2ms` with the lead |
//! | `duplication` | a percentage |
//! | `mtu` | IP bytes |

use std::fmt;
use std::time::Duration;

use super::loss::{GilbertElliott, Loss};
use super::model::{Jitter, LinkSettings, Reordering};
use super::profile;
use super::random::Probability;
use super::units;
use crate::proto::page::ByteRate;

/// Which directions of a link are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directions {
    /// From site A to site B.
    Ab,
    /// From site B to site A.
    Ba,
    /// There and back.
    Both,
}

/// One setting, new.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// Of each direction that is meant.
    OneWayDelay(Duration),
    /// Ethernet framing included.
    Rate(ByteRate),
    /// What the bottleneck's queue holds.
    QueueBytes(u64),
    /// The same, as time at the rate that is in force when the change is made.
    Queue(Duration),
    /// Which datagrams are lost by chance.
    Loss(Loss),
    /// Variation of the delay.
    Jitter(Option<Jitter>),
    /// Which datagrams overtake others.
    Reordering(Option<Reordering>),
    /// How many come twice.
    Duplication(Probability),
    /// Longer IP packets are dropped.
    Mtu(u32),
}

/// A text is not a change of a setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidChange {
    /// There is no such key.
    #[error("{0:?} is not a setting; there are {KEYS}")]
    Key(String),
    /// The key cannot have this value.
    #[error("{value:?} is not a value of {key}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// As it was given.
        value: String,
        /// What to write.
        reason: String,
    },
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

    /// The indices of those that are meant.
    pub(super) fn indices(self) -> impl Iterator<Item = usize> {
        (0..2).filter(move |index| self.include(*index))
    }

    /// The direction with this index.
    pub(super) fn one(index: usize) -> Self {
        if index == 0 { Self::Ab } else { Self::Ba }
    }

    /// Whether some direction is meant by both.
    pub(super) fn meet(self, other: Self) -> bool {
        self.indices().any(|index| other.include(index))
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "ab" => Some(Self::Ab),
            "ba" => Some(Self::Ba),
            "both" => Some(Self::Both),
            _ => None,
        }
    }
}

impl fmt::Display for Directions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ab => "ab",
            Self::Ba => "ba",
            Self::Both => "both",
        })
    }
}

impl Change {
    /// Reads the value of a key.
    pub(super) fn parse(key: &str, value: &str) -> Result<Self, InvalidChange> {
        match key {
            "rtt" => {
                within(key, value, duration(key, value)?, profile::LONGEST_RTT).map(|rtt| Self::OneWayDelay(rtt / 2))
            }
            "delay" => within(key, value, duration(key, value)?, profile::LONGEST_RTT).map(Self::OneWayDelay),
            "queue" => within(key, value, duration(key, value)?, profile::LONGEST_RTT).map(Self::Queue),
            "rate" => {
                let rate: ByteRate = value.parse().map_err(|error| invalid(key, value, error))?;
                match profile::outside_rates(rate) {
                    Some(reason) => Err(invalid(key, value, reason)),
                    None => Ok(Self::Rate(rate)),
                }
            }
            "mtu" => {
                let mtu: u32 = value.parse().map_err(|error| invalid(key, value, error))?;
                match profile::outside_mtus(i64::from(mtu)) {
                    Some(reason) => Err(invalid(key, value, reason)),
                    None => Ok(Self::Mtu(mtu)),
                }
            }
            "jitter" => {
                let (deviation, correlation_time) = match value.split_once('/') {
                    Some((deviation, correlation)) => (deviation, duration(key, correlation)?),
                    None => (value, profile::DEFAULT_JITTER_CORRELATION),
                };
                let deviation = within(key, value, duration(key, deviation)?, profile::LONGEST_RTT)?;
                if correlation_time == Duration::ZERO {
                    return Err(invalid(
                        key,
                        value,
                        "a correlation time of 0 would reorder nearly every packet",
                    ));
                }
                Ok(Self::Jitter((deviation > Duration::ZERO).then_some(Jitter {
                    deviation,
                    correlation_time,
                })))
            }
            "loss" => Ok(Self::Loss(match chance(key, value)? {
                Probability::NEVER => Loss::None,
                chance => Loss::Bernoulli(chance),
            })),
            "gilbert_elliott" => gilbert_elliott(key, value).map(|model| Self::Loss(Loss::GilbertElliott(model))),
            "duplication" => chance(key, value).map(Self::Duplication),
            "reordering" => {
                let (share, lead) = match value.split_once('/') {
                    Some((share, lead)) => (share, duration(key, lead)?),
                    None => (value, Duration::MAX),
                };
                let share = chance(key, share)?;
                Ok(Self::Reordering(
                    (share != Probability::NEVER).then_some(Reordering { share, lead }),
                ))
            }
            other => Err(InvalidChange::Key(other.to_owned())),
        }
    }

    /// The settings after the change. A queue that is stated as time keeps its bytes when the rate changes later, as the
    /// buffers of a router do.
    #[must_use]
    pub fn apply(self, settings: &LinkSettings) -> LinkSettings {
        let mut changed = settings.clone();
        match self {
            Self::OneWayDelay(delay) => changed.one_way_delay = delay,
            Self::Rate(rate) => changed.rate = rate,
            Self::QueueBytes(bytes) => changed.queue_bytes = bytes,
            Self::Queue(queue) => changed.queue_bytes = changed.rate.bytes_in(queue),
            Self::Loss(loss) => changed.loss = loss,
            Self::Jitter(jitter) => changed.jitter = jitter,
            Self::Reordering(reordering) => changed.reordering = reordering,
            Self::Duplication(share) => changed.duplication = share,
            Self::Mtu(mtu) => changed.mtu_bytes = mtu,
        }
        changed
    }

    /// The change that brings back what `settings` have where this one changes them.
    #[must_use]
    pub fn undone(self, settings: &LinkSettings) -> Self {
        match self {
            Self::OneWayDelay(_) => Self::OneWayDelay(settings.one_way_delay),
            Self::Rate(_) => Self::Rate(settings.rate),
            Self::QueueBytes(_) | Self::Queue(_) => Self::QueueBytes(settings.queue_bytes),
            Self::Loss(_) => Self::Loss(settings.loss),
            Self::Jitter(_) => Self::Jitter(settings.jitter),
            Self::Reordering(_) => Self::Reordering(settings.reordering),
            Self::Duplication(_) => Self::Duplication(settings.duplication),
            Self::Mtu(_) => Self::Mtu(settings.mtu_bytes),
        }
    }

    /// Whether both change the same setting.
    #[must_use]
    pub fn meets(self, other: Self) -> bool {
        self.setting() == other.setting()
    }

    /// The name of what is changed.
    fn setting(self) -> &'static str {
        match self {
            Self::OneWayDelay(_) => "delay",
            Self::Rate(_) => "rate",
            Self::QueueBytes(_) | Self::Queue(_) => "queue",
            Self::Loss(_) => "loss",
            Self::Jitter(_) => "jitter",
            Self::Reordering(_) => "reordering",
            Self::Duplication(_) => "duplication",
            Self::Mtu(_) => "mtu",
        }
    }
}

/// In the words in which it is read, as far as a person needs them.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |chance: Probability| format!("{}%", chance.value() * 100.0);
        write!(f, "{} ", self.setting())?;
        match *self {
            Self::OneWayDelay(time) | Self::Queue(time) => write!(f, "{time:?}"),
            Self::Rate(rate) => write!(f, "{rate}"),
            Self::QueueBytes(bytes) => write!(f, "{bytes} bytes"),
            Self::Loss(Loss::None) => f.write_str("0%"),
            Self::Loss(Loss::Bernoulli(chance)) => f.write_str(&percent(chance)),
            Self::Loss(Loss::GilbertElliott(model)) => {
                write!(
                    f,
                    "in bursts, {} on average",
                    percent_rounded(Loss::GilbertElliott(model).mean())
                )
            }
            Self::Jitter(jitter) => write!(f, "{:?}", jitter.map_or(Duration::ZERO, |jitter| jitter.deviation)),
            Self::Reordering(reordering) => f.write_str(&percent(
                reordering.map_or(Probability::NEVER, |reordering| reordering.share),
            )),
            Self::Duplication(share) => f.write_str(&percent(share)),
            Self::Mtu(bytes) => write!(f, "{bytes}"),
        }
    }
}

fn percent_rounded(share: f64) -> String {
    format!("{:.4}%", share * 100.0)
}

/// Reads a duration.
pub(super) fn duration(key: &str, value: &str) -> Result<Duration, InvalidChange> {
    units::duration(value).map_err(|error| invalid(key, value, error))
}

fn within(key: &str, value: &str, time: Duration, longest: Duration) -> Result<Duration, InvalidChange> {
    if time <= longest {
        Ok(time)
    } else {
        Err(invalid(key, value, format!("{longest:?} is the longest")))
    }
}

fn chance(key: &str, value: &str) -> Result<Probability, InvalidChange> {
    units::percentage(value).map_err(|error| invalid(key, value, error))
}

fn gilbert_elliott(key: &str, value: &str) -> Result<GilbertElliott, InvalidChange> {
    let parts = value
        .split('/')
        .map(|part| chance(key, part))
        .collect::<Result<Vec<_>, _>>()?;
    let (to_bad, to_good, others) = match parts.as_slice() {
        [to_bad, to_good, others @ ..] if others.len() <= 2 => (*to_bad, *to_good, others),
        _ => return Err(invalid(key, value, "write p/r, p/r/1-h or p/r/1-h/1-k")),
    };
    if to_good == Probability::NEVER {
        return Err(invalid(key, value, "an r of 0% would never leave the bad state"));
    }
    Ok(GilbertElliott {
        to_bad,
        to_good,
        loss_in_bad: others.first().copied().unwrap_or(Probability::ALWAYS),
        loss_in_good: others.get(1).copied().unwrap_or(Probability::NEVER),
    })
}

fn invalid(key: &str, value: &str, reason: impl fmt::Display) -> InvalidChange {
    InvalidChange::Value {
        key: key.to_owned(),
        value: value.to_owned(),
        reason: reason.to_string(),
    }
}

/// For messages.
pub(super) const KEYS: &str = "rtt, delay, rate, queue, loss, gilbert_elliott, jitter, reordering, duplication and mtu";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::model::tests::settings;

    fn half() -> Probability {
        Probability::new(0.5).expect("a probability")
    }

    type Edit = fn(&mut LinkSettings);

    const CHANGES: [(&str, &str, Edit); 11] = [
        ("rtt", "20ms", |link| link.one_way_delay = Duration::from_millis(10)),
        ("delay", "10ms", |link| link.one_way_delay = Duration::from_millis(10)),
        ("rate", "100mbit", |link| {
            link.rate = ByteRate::from_bits_per_second(100_000_000);
        }),
        ("queue", "10ms", |link| link.queue_bytes = 1_250_000),
        ("loss", "50%", |link| link.loss = Loss::Bernoulli(half())),
        ("gilbert_elliott", "50%/50%", |link| {
            link.loss = Loss::GilbertElliott(GilbertElliott {
                to_bad: half(),
                to_good: half(),
                loss_in_bad: Probability::ALWAYS,
                loss_in_good: Probability::NEVER,
            });
        }),
        ("jitter", "1ms", |link| {
            link.jitter = Some(Jitter {
                deviation: Duration::from_millis(1),
                correlation_time: Duration::from_millis(200),
            });
        }),
        ("reordering", "50%", |link| {
            link.reordering = Some(Reordering {
                share: half(),
                lead: Duration::MAX,
            });
        }),
        ("reordering", "50%/2ms", |link| {
            link.reordering = Some(Reordering {
                share: half(),
                lead: Duration::from_millis(2),
            });
        }),
        ("duplication", "50%", |link| link.duplication = half()),
        ("mtu", "1400", |link| link.mtu_bytes = 1400),
    ];

    #[test]
    fn each_key_changes_its_setting_alone_and_can_be_undone() {
        for (key, value, edit) in CHANGES {
            let mut expected = settings();
            edit(&mut expected);
            let change = Change::parse(key, value).unwrap_or_else(|error| panic!("{error}"));
            let changed = change.apply(&settings());
            assert_eq!(changed, expected, "{key}");
            assert_ne!(changed, settings(), "{key}");
            assert_eq!(change.undone(&settings()).apply(&changed), settings(), "{key}");
            assert!(!change.to_string().is_empty());
        }
    }

    #[test]
    fn nothing_is_a_value_too() {
        for (key, value) in [
            ("loss", "0%"),
            ("jitter", "0ms"),
            ("reordering", "0%"),
            ("duplication", "0%"),
        ] {
            let change = Change::parse(key, value).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(change.apply(&settings()), settings(), "{key}");
        }
    }

    #[test]
    fn bounds_are_those_of_a_profile_and_pass_just_inside() {
        for (key, inside, outside) in [
            ("rtt", "60s", "60.001s"),
            ("delay", "60s", "60.001s"),
            ("rate", "100gbit", "100.1gbit"),
            ("rate", "8kbit", "7kbit"),
            ("mtu", "1280", "1279"),
            ("mtu", "65535", "65536"),
            ("loss", "100%", "100.1%"),
            ("gilbert_elliott", "0%/100%", "1%/0%"),
            ("reordering", "100%/0ms", "100%/0"),
            ("jitter", "1ms/1us", "1ms/0us"),
        ] {
            assert!(Change::parse(key, inside).is_ok(), "{key} {inside}");
            let error = Change::parse(key, outside).expect_err(outside).to_string();
            assert!(error.contains(key), "{error}");
        }
        assert!(Change::parse("speed", "1").is_err_and(|error| error.to_string().contains("rate")));
    }

    #[test]
    fn changes_of_one_setting_meet_and_others_do_not() {
        let change = |key, value| Change::parse(key, value).expect("valid");
        assert!(change("loss", "1%").meets(change("gilbert_elliott", "1%/10%")));
        assert!(change("rtt", "1ms").meets(change("delay", "1ms")));
        assert!(!change("rate", "1mbit").meets(change("queue", "1ms")));
    }
}
