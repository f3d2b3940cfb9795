//! Link profiles: what a link is like, as an operator states it in a TOML file. Both directions are alike.
//!
//! ```toml
//! rtt = "150ms"          # required; each direction delays by half of it
//! rate = "1gbit"         # required; each direction, Ethernet framing (14 bytes a packet) included
//! queue = "50ms"         # what the bottleneck holds before it drops, as time at the rate
//! loss = "0.1%"          # of the datagrams in each direction, each on its own; or instead
//! gilbert_elliott = { p = "0.02%", r = "20%", loss_in_bad = "100%", loss_in_good = "0%" }
//! lose = "17, 100-109"   # and these, by their number in each direction since the link is up, from 1
//! jitter = "1ms"         # standard deviation of the delay in each direction; order is kept
//! jitter_correlation = "200ms"
//! reordering = "1%"      # of the datagrams overtake others, as with tc netem: they do not wait for the delay at all,
//! reordering_lead = "2ms" # or, with this key, arrive only so much earlier than the others, as on real paths
//! duplication = "0.1%"   # of the datagrams that pass come twice; the copy passes the bottleneck right behind
//! mtu = 1500             # IP bytes
//!
//! # What happens when `netem-scripts/link play` has started the clock:
//! [[event]]
//! at = "10s"             # required, as is the kind
//! kind = "cut"           # nothing enters; what is on its way still arrives
//! for = "5s"             # how long it lasts: required of a cut, and without it any other event is for good
//! direction = "ab"       # ab, ba or both; both where it is not given
//!
//! [[event]]
//! at = "20s"
//! kind = "rate"          # rtt, delay (one way), rate, queue, loss, gilbert_elliott ("p/r/1-h/1-k"), jitter, reordering
//! to = "100mbit"         # ("1%/2ms"), duplication or mtu changes to this; then to what it was before
//! for = "3s"
//!
//! [[event]]
//! at = "30s"
//! kind = "lose"          # the next datagrams of the direction, whatever they are
//! datagrams = 20
//!
//! [[event]]
//! at = "40s"
//! kind = "address"       # the site's address on the link; the one before is removed
//! site = "a"             # a or b; a where it is not given
//! to = "10.77.0.11"
//! ```
//!
//! The kernel's netem cannot keep order under jitter, reorder by a lead, or lose by number: links of such profiles are
//! emulated. A datagram beyond the MTU vanishes in the emulator; with netem the router answers it, as routers should.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::event::{self, Event, EventTable};
use super::loss::{GilbertElliott, Loss};
use super::model::{ETHERNET_OVERHEAD, Jitter, LinkSettings, Reordering};
use super::ordinals::Ordinals;
use super::random::Probability;
use super::{timeline, units};
use crate::proto::page::ByteRate;

/// A link that both directions follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Name of the file without `.toml`.
    pub name: String,
    /// There and back, without queues.
    pub rtt: Duration,
    /// Of each direction, Ethernet framing included.
    pub rate: ByteRate,
    /// Depth of each direction's queue, as time at `rate`.
    pub queue: Duration,
    /// Of each direction.
    pub loss: Loss,
    /// Datagrams of each direction that are lost whatever chance says.
    pub lost: Ordinals,
    /// Of each direction.
    pub jitter: Option<Jitter>,
    /// Of each direction.
    pub reordering: Option<Reordering>,
    /// Of each direction.
    pub duplication: Probability,
    /// IP bytes of the longest packet.
    pub mtu_bytes: u32,
    /// What happens when its time line is played, in the order of the file.
    pub events: Vec<Event>,
}

/// A profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// There is no such file.
    #[error("there is no link profile {name}: {} does not exist{}", path.display(), known_names(known))]
    Unknown {
        /// As it was asked for.
        name: String,
        /// Where it was looked for.
        path: PathBuf,
        /// Profiles in the same directory.
        known: Vec<String>,
    },
    /// The file cannot be read.
    #[error("the link profile {} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, has a key that does not exist, or lacks one.
    #[error("the link profile {} is not valid: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words, with line and column.
        message: String,
    },
    /// Fields have values that no link can have.
    #[error("the link profile {} is not valid:{}", path.display(), lines(mistakes))]
    Values {
        /// The file.
        path: PathBuf,
        /// One for each field, all of them.
        mistakes: Vec<Mistake>,
    },
}

/// What is wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The field's key; of an event's field, with the number of the event.
    pub key: String,
    /// A clause that goes on from the key.
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.text)
    }
}

impl Profile {
    /// Reads the profile `name` of `directory`, or the file that `name` points to where it ends in `.toml`.
    ///
    /// # Errors
    /// [`ProfileError`], which lists every mistake in the values.
    pub fn find(directory: &Path, name: &str) -> Result<Self, ProfileError> {
        let path = if name.ends_with(".toml") {
            PathBuf::from(name)
        } else {
            directory.join(format!("{name}.toml"))
        };
        if !name.ends_with(".toml") && name.contains(['/', '\0']) || !path.is_file() {
            let known = path.parent().map(names_in).unwrap_or_default();
            return Err(ProfileError::Unknown {
                name: name.to_owned(),
                path,
                known,
            });
        }
        Self::read(&path)
    }

    /// Reads the profile in the file `path`.
    ///
    /// # Errors
    /// [`ProfileError`], which lists every mistake in the values.
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let text = std::fs::read_to_string(path).map_err(|source| ProfileError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        let name = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned())
            .unwrap_or_default();
        let file: ProfileFile = toml::from_str(&text).map_err(|error| ProfileError::Syntax {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        file.check(name).map_err(|mistakes| ProfileError::Values {
            path: path.to_owned(),
            mistakes,
        })
    }

    /// Bytes that a direction's queue holds.
    #[must_use]
    pub fn queue_bytes(&self) -> u64 {
        self.rate.bytes_in(self.queue)
    }

    /// The delay of each direction.
    #[must_use]
    pub fn one_way_delay(&self) -> Duration {
        self.rtt / 2
    }

    /// The profile in base units, for scripts and reports.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "name": self.name,
            "rtt_seconds": self.rtt.as_secs_f64(),
            "rate_bits_per_second": u128::from(self.rate.0) * 8,
            "queue_bytes": self.queue_bytes(),
            "loss_fraction": self.loss.mean(),
            "jitter_seconds": self.jitter.map_or(0.0, |jitter| jitter.deviation.as_secs_f64()),
            "reordering_fraction": self.reordering.map_or(0.0, |reordering| reordering.share.value()),
            "duplication_fraction": self.duplication.value(),
            "events": self.events.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "mtu_bytes": self.mtu_bytes,
        })
    }

    /// The model's settings, for either direction.
    #[must_use]
    pub fn direction(&self) -> LinkSettings {
        LinkSettings {
            one_way_delay: self.one_way_delay(),
            rate: self.rate,
            queue_bytes: self.queue_bytes(),
            overhead_bytes: ETHERNET_OVERHEAD,
            mtu_bytes: self.mtu_bytes,
            loss: self.loss,
            lost: self.lost.clone(),
            jitter: self.jitter,
            reordering: self.reordering,
            duplication: self.duplication,
        }
    }

    /// Every state that a direction passes through when the time line is played, the first included.
    #[must_use]
    pub fn states(&self) -> Vec<LinkSettings> {
        timeline::states(&self.direction(), &self.events)
    }
}

/// The file, with values as they are written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileFile {
    rtt: String,
    rate: String,
    queue: Option<String>,
    loss: Option<String>,
    gilbert_elliott: Option<GilbertElliottTable>,
    lose: Option<String>,
    jitter: Option<String>,
    jitter_correlation: Option<String>,
    reordering: Option<String>,
    reordering_lead: Option<String>,
    duplication: Option<String>,
    mtu: Option<i64>,
    #[serde(default)]
    event: Vec<EventTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GilbertElliottTable {
    p: String,
    r: String,
    loss_in_bad: Option<String>,
    loss_in_good: Option<String>,
}

impl ProfileFile {
    fn check(self, name: String) -> Result<Profile, Vec<Mistake>> {
        let mut fields = Fields::default();
        let rtt = fields.duration("rtt", Some(&self.rtt), Duration::ZERO);
        fields.require(rtt <= LONGEST_RTT, "rtt", || {
            format!("{:?} is longer than a minute", rtt)
        });
        let rate = fields.rate(&self.rate);
        let outside = outside_rates(rate);
        fields.require(outside.is_none(), "rate", || outside.unwrap_or_default());
        let queue = fields.duration("queue", self.queue.as_deref(), DEFAULT_QUEUE);
        let mtu = self.mtu.unwrap_or(DEFAULT_MTU);
        let mtu_bytes = u32::try_from(mtu).unwrap_or(0);
        let outside = outside_mtus(mtu);
        fields.require(outside.is_none(), "mtu", || outside.unwrap_or_default());
        let packet = u64::from(mtu_bytes + ETHERNET_OVERHEAD);
        fields.require(rate.bytes_in(queue) >= packet || rate < SLOWEST, "queue", || {
            format!("{queue:?} at {rate} does not hold one packet of {packet} bytes")
        });
        fields.require(queue <= LONGEST_RTT, "queue", || {
            format!("{queue:?} is longer than a minute")
        });
        let loss = fields.loss(self.loss.as_deref(), self.gilbert_elliott.as_ref());
        let lost = self.lose.as_deref().map_or_else(Ordinals::default, |text| {
            fields.take("lose", text, text.parse(), Ordinals::default())
        });
        let jitter = fields.jitter(self.jitter.as_deref(), self.jitter_correlation.as_deref(), rtt / 2);
        let reordering = fields.reordering(self.reordering.as_deref(), self.reordering_lead.as_deref());
        let duplication = self
            .duplication
            .as_deref()
            .map_or(Probability::NEVER, |text| fields.percentage("duplication", text));
        let events = event::check(&self.event, event::numbered, &mut fields.mistakes);
        if fields.mistakes.is_empty() {
            Ok(Profile {
                name,
                rtt,
                rate,
                queue,
                loss,
                lost,
                jitter,
                reordering,
                duplication,
                mtu_bytes,
                events,
            })
        } else {
            Err(fields.mistakes)
        }
    }
}

/// Collects mistakes, so that a user sees all of them at once.
#[derive(Default)]
struct Fields {
    mistakes: Vec<Mistake>,
}

impl Fields {
    fn require(&mut self, holds: bool, key: &'static str, text: impl FnOnce() -> String) {
        if !holds && self.mistakes.iter().all(|mistake| mistake.key != key) {
            self.mistakes.push(Mistake {
                key: key.to_owned(),
                text: text(),
            });
        }
    }

    fn take<T, E: fmt::Display>(&mut self, key: &'static str, text: &str, read: Result<T, E>, otherwise: T) -> T {
        read.unwrap_or_else(|error| {
            self.mistakes.push(Mistake {
                key: key.to_owned(),
                text: format!("{text:?} is not understood; {error}"),
            });
            otherwise
        })
    }

    fn duration(&mut self, key: &'static str, text: Option<&str>, default: Duration) -> Duration {
        text.map_or(default, |text| self.take(key, text, units::duration(text), default))
    }

    fn rate(&mut self, text: &str) -> ByteRate {
        self.take("rate", text, text.parse(), FASTEST)
    }

    fn percentage(&mut self, key: &'static str, text: &str) -> Probability {
        self.take(key, text, units::percentage(text), Probability::NEVER)
    }

    fn loss(&mut self, loss: Option<&str>, table: Option<&GilbertElliottTable>) -> Loss {
        self.require(loss.is_none() || table.is_none(), "gilbert_elliott", || {
            "loss is given too; state one of them".to_owned()
        });
        if let Some(table) = table {
            let model = GilbertElliott {
                to_bad: self.percentage("gilbert_elliott.p", &table.p),
                to_good: self.percentage("gilbert_elliott.r", &table.r),
                loss_in_bad: self.percentage(
                    "gilbert_elliott.loss_in_bad",
                    table.loss_in_bad.as_deref().unwrap_or("100%"),
                ),
                loss_in_good: self.percentage(
                    "gilbert_elliott.loss_in_good",
                    table.loss_in_good.as_deref().unwrap_or("0%"),
                ),
            };
            self.require(model.to_good.value() > 0.0, "gilbert_elliott.r", || {
                "0% would never leave the bad state".to_owned()
            });
            return Loss::GilbertElliott(model);
        }
        match loss.map(|text| self.percentage("loss", text)) {
            Some(chance) if chance != Probability::NEVER => Loss::Bernoulli(chance),
            _ => Loss::None,
        }
    }

    fn jitter(&mut self, deviation: Option<&str>, correlation: Option<&str>, delay: Duration) -> Option<Jitter> {
        let deviation = self.duration("jitter", deviation, Duration::ZERO);
        let correlation_time = self.duration("jitter_correlation", correlation, DEFAULT_JITTER_CORRELATION);
        self.require(deviation <= delay / 3, "jitter", || {
            format!(
                "{deviation:?} is more than a third of the one-way delay of {delay:?}, so that it would be cut off at 0"
            )
        });
        self.require(correlation_time > Duration::ZERO, "jitter_correlation", || {
            "0 would reorder nearly every packet".to_owned()
        });
        (deviation > Duration::ZERO).then_some(Jitter {
            deviation,
            correlation_time,
        })
    }

    fn reordering(&mut self, share: Option<&str>, lead: Option<&str>) -> Option<Reordering> {
        self.require(share.is_some() || lead.is_none(), "reordering_lead", || {
            "say with reordering which share of the datagrams has it".to_owned()
        });
        let lead = self.duration("reordering_lead", lead, Duration::MAX);
        self.require(lead > Duration::ZERO, "reordering_lead", || {
            "0 would overtake nothing".to_owned()
        });
        let share = share.map(|text| self.percentage("reordering", text))?;
        (share != Probability::NEVER).then_some(Reordering { share, lead })
    }
}

/// Why no link has this rate, if none has.
pub(super) fn outside_rates(rate: ByteRate) -> Option<String> {
    (!(SLOWEST..=FASTEST).contains(&rate)).then(|| format!("{rate} is outside {SLOWEST} to {FASTEST}"))
}

/// Why no link has this MTU, if none has.
pub(super) fn outside_mtus(mtu: i64) -> Option<String> {
    (!(i64::from(SMALLEST_MTU)..=i64::from(LARGEST_MTU)).contains(&mtu))
        .then(|| format!("{mtu} is outside {SMALLEST_MTU} (the least that IPv6 needs) to {LARGEST_MTU}"))
}

/// Names of the profiles in `directory`, sorted.
fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_suffix(".toml")?.to_owned()))
        .collect();
    names.sort();
    names
}

fn known_names(names: &[String]) -> String {
    if names.is_empty() {
        String::new()
    } else {
        format!(". There are {}", names.join(", "))
    }
}

/// One on a line.
pub(super) fn lines(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(|mistake| format!("\n  {mistake}")).collect()
}

/// A common depth of access and transit buffers, and the one all published figures of this project use.
const DEFAULT_QUEUE: Duration = Duration::from_millis(50);
/// Queues along a path change within some hundred milliseconds.
pub(super) const DEFAULT_JITTER_CORRELATION: Duration = Duration::from_millis(200);
const DEFAULT_MTU: i64 = 1500;
/// RFC 8200, section 5.
const SMALLEST_MTU: u32 = 1280;
/// The largest that a TUN device takes.
const LARGEST_MTU: u32 = 65_535;
/// Four times a geostationary satellite's RTT is 2.4 s; beyond a minute somebody mistook the unit.
pub(super) const LONGEST_RTT: Duration = Duration::from_secs(60);
const SLOWEST: ByteRate = ByteRate::from_bits_per_second(8_000);
const FASTEST: ByteRate = ByteRate::from_bits_per_second(100_000_000_000);

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Profile, String> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("test.toml");
        std::fs::write(&path, text).expect("a file");
        Profile::read(&path).map_err(|error| error.to_string())
    }

    fn shipped(name: &str) -> Profile {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/lab/profiles");
        Profile::find(&directory, name).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn the_shipped_profiles_are_the_documented_links() {
        let links: [(&str, f64, u64, f64); 8] = [
            ("lan", 0.2, 1000, 0.0),
            ("metro", 10.0, 1000, 0.0),
            ("transatlantic", 80.0, 1000, 0.01),
            ("intercontinental", 150.0, 1000, 0.1),
            ("intercontinental-100m", 150.0, 100, 0.1),
            ("lossy", 150.0, 1000, 1.0),
            ("bursty", 150.0, 1000, 0.1),
            ("satellite", 600.0, 50, 0.5),
        ];
        for (name, rtt_ms, rate_mbit, loss_percent) in links {
            let profile = shipped(name);
            assert_eq!(profile.name, name);
            assert_eq!(profile.rtt, Duration::from_secs_f64(rtt_ms / 1000.0), "{name}");
            assert_eq!(
                profile.rate,
                ByteRate::from_bits_per_second(rate_mbit * 1_000_000),
                "{name}"
            );
            assert!(
                (profile.loss.mean() * 100.0 - loss_percent).abs() < 1e-6,
                "{name}: {}",
                profile.loss.mean()
            );
            assert_eq!(
                (profile.queue, profile.mtu_bytes, profile.jitter),
                (DEFAULT_QUEUE, 1500, None),
                "{name}"
            );
            assert_eq!(matches!(profile.loss, Loss::GilbertElliott(_)), name == "bursty");
        }
    }

    #[test]
    fn defaults_are_a_queue_of_50_ms_no_loss_and_1500_bytes() {
        let profile = parse("rtt = '150ms'\nrate = '1gbit'").expect("valid");
        assert_eq!((profile.loss, profile.jitter), (Loss::None, None));
        assert_eq!((profile.queue_bytes(), profile.mtu_bytes), (6_250_000, 1500));
        assert_eq!(profile.one_way_delay(), Duration::from_millis(75));
    }

    #[test]
    fn every_field_is_read() {
        let profile = parse(
            "rtt = '100ms'\nrate = '50mbit'\nqueue = '200ms'\njitter = '1ms'\njitter_correlation = '30ms'\nmtu = 9000\n\
             lose = '3'\nreordering = '1%'\nreordering_lead = '2ms'\nduplication = '0.1%'\n\
             gilbert_elliott = { p = '1%', r = '10%', loss_in_bad = '50%', loss_in_good = '0.1%' }",
        )
        .expect("valid");
        let chance = |value| Probability::new(value).expect("a probability");
        let model = GilbertElliott {
            to_bad: chance(0.01),
            to_good: chance(0.1),
            loss_in_bad: chance(0.5),
            loss_in_good: chance(0.001),
        };
        assert_eq!(profile.loss, Loss::GilbertElliott(model));
        let jitter = Jitter {
            deviation: Duration::from_millis(1),
            correlation_time: Duration::from_millis(30),
        };
        assert_eq!((profile.jitter, profile.mtu_bytes), (Some(jitter), 9000));
        assert_eq!(profile.queue_bytes(), 1_250_000);
        let reordering = Reordering {
            share: chance(0.01),
            lead: Duration::from_millis(2),
        };
        assert_eq!(profile.reordering, Some(reordering));
        assert_eq!(profile.duplication, chance(0.001));
        assert!(profile.lost.contain(3) && !profile.lost.contain(4));
    }

    #[test]
    fn reordering_without_a_lead_is_that_of_netem() {
        let profile = parse("rtt = '150ms'\nrate = '1gbit'\nreordering = '1%'").expect("valid");
        assert_eq!(
            profile.reordering.map(|reordering| reordering.lead),
            Some(Duration::MAX)
        );
        let none = parse("rtt = '150ms'\nrate = '1gbit'\nreordering = '0%'").expect("valid");
        assert_eq!(none.reordering, None);
    }

    #[test]
    fn events_are_read_and_the_states_they_lead_to_are_known() {
        let profile = parse(
            "rtt = '150ms'\nrate = '1gbit'\n[[event]]\nat = '1s'\nkind = 'rate'\nto = '2gbit'\nfor = '1s'\n\
             [[event]]\nat = '5s'\nkind = 'cut'\nfor = '3s'\ndirection = 'ab'",
        )
        .expect("valid");
        assert_eq!(profile.events.len(), 2);
        let fastest = profile.states().iter().map(|state| state.rate).max();
        assert_eq!(fastest, Some(ByteRate::from_bits_per_second(2_000_000_000)));
    }

    #[test]
    fn mistakes_in_events_are_reported_with_those_of_the_link() {
        let error = parse("rtt = '1h'\nrate = '1gbit'\n[[event]]\nat = '1s'\nkind = 'cut'").expect_err("two mistakes");
        for key in ["rtt", "event 1.for"] {
            assert!(error.contains(&format!("\n  {key}: ")), "{error}");
        }
    }

    #[test]
    fn each_mistake_is_named_by_its_key() {
        for (line, key) in [
            ("rtt = '61s'", "rtt"),
            ("rtt = '150'", "rtt"),
            ("rate = '1000'", "rate"),
            ("rate = '1kbit'", "rate"),
            ("rate = '101gbit'", "rate"),
            ("queue = '10us'", "queue"),
            ("queue = '-1ms'", "queue"),
            ("loss = '0.1'", "loss"),
            ("loss = '101%'", "loss"),
            ("mtu = 1279", "mtu"),
            ("mtu = 65536", "mtu"),
            ("mtu = -1", "mtu"),
            ("jitter = '30ms'", "jitter"),
            ("jitter_correlation = '0ms'", "jitter_correlation"),
            ("lose = '0'", "lose"),
            ("reordering = '1'", "reordering"),
            ("reordering_lead = '1ms'", "reordering_lead"),
            ("reordering = '1%'\nreordering_lead = '0ms'", "reordering_lead"),
            ("duplication = '101%'", "duplication"),
            ("event = [{ at = '1s', kind = 'cut' }]", "event 1.for"),
            ("gilbert_elliott = { p = '1%', r = '0%' }", "gilbert_elliott.r"),
            ("gilbert_elliott = { p = 'x', r = '1%' }", "gilbert_elliott.p"),
            (
                "loss = '1%'\ngilbert_elliott = { p = '1%', r = '10%' }",
                "gilbert_elliott",
            ),
        ] {
            let mut text = line.to_owned();
            for (given, default) in [("rtt", "rtt = '150ms'"), ("rate", "rate = '1gbit'")] {
                if !line.starts_with(given) {
                    text = format!("{default}\n{text}");
                }
            }
            let error = parse(&text).expect_err(line);
            assert!(error.contains(&format!("\n  {key}: ")), "{line}: {error}");
            assert_eq!(error.matches("\n  ").count(), 1, "one mistake, one line: {error}");
        }
    }

    #[test]
    fn all_mistakes_are_reported_at_once() {
        let error = parse("rtt = '1h'\nrate = 'fast'\nloss = 'some'").expect_err("three mistakes");
        for key in ["rtt", "rate", "loss"] {
            assert!(error.contains(&format!("\n  {key}: ")), "{error}");
        }
    }

    #[test]
    fn unknown_and_missing_keys_are_errors() {
        let unknown = parse("rtt = '1ms'\nrate = '1gbit'\nlatency = '1ms'").expect_err("an unknown key");
        assert!(unknown.contains("latency"), "{unknown}");
        let missing = parse("rtt = '1ms'").expect_err("no rate");
        assert!(missing.contains("rate"), "{missing}");
        let number = parse("rtt = 150\nrate = '1gbit'").expect_err("no unit");
        assert!(number.contains("rtt") && number.contains("string"), "{number}");
    }

    #[test]
    fn a_profile_that_does_not_exist_is_answered_with_those_that_do() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/lab/profiles");
        for name in ["moon", "../profiles/lan", "no/such.toml"] {
            let error = Profile::find(&directory, name).expect_err(name).to_string();
            assert!(error.contains("there is no link profile"), "{error}");
        }
        let error = Profile::find(&directory, "moon").expect_err("no moon").to_string();
        assert!(
            error.contains("cut-5s, intercontinental, intercontinental-100m, lan"),
            "{error}"
        );
    }
}
