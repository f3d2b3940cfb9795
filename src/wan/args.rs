//! `longhaul wan-emulator`: what `netem-scripts/link` and the lab call.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::check::{CheckError, check};
use super::control::{self, ControlError};
use super::emulator::{self, EmulatorError, EmulatorSettings};
use super::event::{self, Event, EventTable, Value};
use super::link::{Link, LinkError, LinkName, Site};
use super::play::{Ending, PlayError, play};
use super::probe::{ProbeError, ProbeSettings, probe};
use super::profile::{Mistake, Profile, ProfileError, lines};
use super::show::{ShowError, show};
use super::stats::Backend;
use super::{shell, units};
use crate::proto::page::ByteRate;

/// The link between two sites: emulate it, look at it, measure it. Set it up with netem-scripts/link.
#[derive(Debug, clap::Args)]
pub struct EmulatorArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Carries packets between the sites of a link until SIGTERM; SIGUSR1 prints what was carried
    Run {
        #[command(flatten)]
        profile: ProfileArgs,
        #[command(flatten)]
        link: LinkArgs,
        /// Seed of losses and jitter
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Socket for commands [default: the link's own]
        #[arg(long)]
        control: Option<PathBuf>,
        /// File or FIFO that is told READY once packets pass
        #[arg(long)]
        ready: Option<PathBuf>,
    },
    /// Prints a profile after checking it
    Profile {
        #[command(flatten)]
        profile: ProfileArgs,
        /// How to print it
        #[arg(long, value_enum, default_value_t = Format::Json)]
        format: Format,
    },
    /// Prints what a link has carried, as JSON
    Show {
        #[command(flatten)]
        link: LinkArgs,
    },
    /// Plays the events of a link's profile from now on: a line of JSON for each step. A signal stops it and takes back
    /// what it has begun for a time
    Play {
        #[command(flatten)]
        link: LinkArgs,
    },
    /// Changes a link that is up, for good or for a time; then it returns when that is over
    Set {
        #[command(flatten)]
        link: LinkArgs,
        #[command(flatten)]
        change: Box<SetArgs>,
    },
    /// Sends a command to a link's emulator: stats, settings, set ab.loss=1%, lose 20, down ab 3s after 10s, up, reset
    Ask {
        #[command(flatten)]
        link: LinkArgs,
        /// The command
        #[arg(required = true)]
        command: Vec<String>,
    },
    /// Sends UDP through a link and prints rate, one-way delay and loss, as JSON
    Probe {
        #[command(flatten)]
        link: LinkArgs,
        /// The site that sends
        #[arg(long, value_enum, default_value_t = Site::A)]
        from: Site,
        /// At this rate, Ethernet framing included, for example 900mbit
        #[arg(long)]
        rate: ByteRate,
        /// Datagrams in each train
        #[arg(long, default_value_t = 1)]
        segments: usize,
        /// How long to send
        #[arg(long, value_parser = parse_duration, default_value = "2s")]
        duration: Duration,
    },
    /// Measures a link against its profile. Exit code 1 says that it is off, or that the machine was too busy to tell
    ///
    /// Allowed: RTT p50 0.15 ms + 0.1 %, p99 1 ms + 0.1 %; payload rate by UDP 1 %; loss, overtaking and copies within their
    /// 99.9 % interval, which for losses in bursts is that of the bursty process; no drops below the rate. Refused as
    /// starved: lateness of the emulator over 500 us at p99, or over 1 % of the time run delay of the emulator, or windows in
    /// which a probe was ready and mostly did not run.
    #[command(verbatim_doc_comment)]
    Check {
        #[command(flatten)]
        link: LinkArgs,
        /// How long each measurement takes
        #[arg(long, value_parser = parse_duration, default_value = "2s")]
        duration: Duration,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct ProfileArgs {
    /// Name of a profile, or a file that ends in .toml
    #[arg(long)]
    profile: String,
    /// Directory of the profiles
    #[arg(long, default_value = "config/lab/profiles")]
    profiles: PathBuf,
}

#[derive(Debug, clap::Args)]
struct LinkArgs {
    /// Name of the link
    #[arg(long, default_value = "lh")]
    name: LinkName,
}

/// What `set` changes.
#[derive(Debug, clap::Args)]
struct SetArgs {
    /// Lets nothing enter for so long
    #[arg(long)]
    cut: Option<String>,
    /// Loses the next so many datagrams
    #[arg(long)]
    lose: Option<i64>,
    /// There and back
    #[arg(long)]
    rtt: Option<String>,
    /// One way
    #[arg(long)]
    delay: Option<String>,
    /// For example 100mbit
    #[arg(long)]
    rate: Option<String>,
    /// What the bottleneck holds, as time at its rate
    #[arg(long)]
    queue: Option<String>,
    /// A percentage
    #[arg(long)]
    loss: Option<String>,
    /// p/r, p/r/1-h or p/r/1-h/1-k, percentages
    #[arg(long)]
    gilbert_elliott: Option<String>,
    /// Standard deviation of the delay
    #[arg(long)]
    jitter: Option<String>,
    /// A percentage, or 1%/2ms with the lead
    #[arg(long)]
    reordering: Option<String>,
    /// A percentage
    #[arg(long)]
    duplication: Option<String>,
    /// IP bytes
    #[arg(long)]
    mtu: Option<String>,
    /// Another address of a site on the link, 10.77.0.1 to 10.77.0.254
    #[arg(long)]
    address: Option<String>,
    /// The site that it is for: a or b
    #[arg(long, default_value = "a", requires = "address")]
    site: String,
    /// ab, ba or both
    #[arg(long, default_value = "both")]
    direction: String,
    /// The settings are what they were after so long
    #[arg(long = "for")]
    length: Option<String>,
}

/// How a profile is printed.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    /// One object.
    Json,
    /// Assignments for `eval`.
    Shell,
}

/// A verb of `longhaul wan-emulator` failed.
#[derive(Debug, thiserror::Error)]
pub enum WanError {
    /// The profile is not usable.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The link is not up.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// There is no emulator to ask.
    #[error("the link {0} is carried by the kernel: change it with netem-scripts/link set")]
    Kernel(LinkName),
    /// There is nothing to play.
    #[error("the profile {0} has no events: it needs [[event]] tables, as config/lab/profiles/unsteady.toml has")]
    NoEvents(String),
    /// Nothing was to be changed.
    #[error("say what to change, for example --cut 5s, or --loss 5% --for 3s")]
    NoChange,
    /// What was to be changed cannot be.
    #[error("the link is not changed:{}", lines(.0))]
    Change(Vec<Mistake>),
    /// A time line cannot be played.
    #[error(transparent)]
    Play(#[from] PlayError),
    /// The emulator cannot go on.
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
    /// The emulator does not answer.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The counters cannot be read.
    #[error(transparent)]
    Show(#[from] ShowError),
    /// The probe failed.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The check failed.
    #[error(transparent)]
    Check(#[from] CheckError),
}

/// Runs one verb. Results go to stdout. The thread that calls this may end in another network namespace.
///
/// # Errors
/// [`WanError`] where the verb could not be carried out; exit code 1 is returned by a check that found a link off, and for
/// a command that the emulator refused.
pub fn run(args: EmulatorArgs) -> Result<ExitCode, WanError> {
    match args.verb {
        Verb::Run {
            profile,
            link,
            seed,
            control,
            ready,
        } => {
            let profile = profile.load()?;
            let control = control.unwrap_or_else(|| link.name.control_socket());
            emulator::run(EmulatorSettings {
                name: link.name,
                profile,
                seed,
                control,
                ready,
            })?;
        }
        Verb::Profile { profile, format } => {
            let profile = profile.load()?;
            match format {
                Format::Json => println!("{}", profile.json()),
                Format::Shell => print!("{}", shell::assignments(&profile)),
            }
        }
        Verb::Show { link } => println!("{}", json!(show(&Link::open(link.name)?)?)),
        Verb::Play { link } => {
            let link = Link::open(link.name)?;
            if link.profile.events.is_empty() {
                return Err(WanError::NoEvents(link.profile.name));
            }
            return perform(&link, &link.profile.events);
        }
        Verb::Set { link, change } => {
            let events = change.events()?;
            return perform(&Link::open(link.name)?, &events);
        }
        Verb::Ask { link, command } => {
            let link = Link::open(link.name)?;
            if link.backend == Backend::Netem {
                return Err(WanError::Kernel(link.name));
            }
            let answer = control::ask(&link.name.control_socket(), &command.join(" "))?;
            println!("{answer}");
            if answer.starts_with("{\"error\"") {
                return Ok(ExitCode::FAILURE);
            }
        }
        Verb::Probe {
            link,
            from,
            rate,
            segments,
            duration,
        } => {
            let link = Link::open(link.name)?;
            println!(
                "{}",
                json!(probe(
                    &link,
                    ProbeSettings {
                        from,
                        rate,
                        segments,
                        duration
                    }
                )?)
            );
        }
        Verb::Check { link, duration, json } => {
            let report = check(&Link::open(link.name)?, duration)?;
            if json {
                println!("{}", json!(report));
            } else {
                print!("{report}");
            }
            if !report.ok {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn perform(link: &Link, events: &[Event]) -> Result<ExitCode, WanError> {
    let ending = play(link, events, |played| println!("{}", json!(played)))?;
    Ok(match ending {
        Ending::Played => ExitCode::SUCCESS,
        Ending::Stopped => ExitCode::FAILURE,
    })
}

impl SetArgs {
    /// All that is asked for, at once.
    fn events(&self) -> Result<Vec<Event>, WanError> {
        let mut mistakes = Vec::new();
        let name = |_, table: &EventTable| format!("--{}", table.kind.replace('_', "-"));
        let events = event::check(&self.tables(), name, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(WanError::Change(mistakes));
        }
        if events.is_empty() {
            return Err(WanError::NoChange);
        }
        Ok(events)
    }

    fn tables(&self) -> Vec<EventTable> {
        let of_kind = |kind: &str| EventTable {
            at: "0s".to_owned(),
            kind: kind.to_owned(),
            ..EventTable::default()
        };
        let mut tables = Vec::new();
        if let Some(length) = &self.cut {
            tables.push(EventTable {
                length: Some(length.clone()),
                direction: Some(self.direction.clone()),
                ..of_kind("cut")
            });
        }
        if let Some(datagrams) = self.lose {
            tables.push(EventTable {
                datagrams: Some(datagrams),
                direction: Some(self.direction.clone()),
                ..of_kind("lose")
            });
        }
        if let Some(address) = &self.address {
            tables.push(EventTable {
                to: Some(Value::Text(address.clone())),
                site: Some(self.site.clone()),
                ..of_kind("address")
            });
        }
        let settings = [
            ("rtt", &self.rtt),
            ("delay", &self.delay),
            ("rate", &self.rate),
            ("queue", &self.queue),
            ("loss", &self.loss),
            ("gilbert_elliott", &self.gilbert_elliott),
            ("jitter", &self.jitter),
            ("reordering", &self.reordering),
            ("duplication", &self.duplication),
            ("mtu", &self.mtu),
        ];
        tables.extend(settings.into_iter().filter_map(|(kind, value)| {
            Some(EventTable {
                to: Some(Value::Text(value.clone()?)),
                length: self.length.clone(),
                direction: Some(self.direction.clone()),
                ..of_kind(kind)
            })
        }));
        tables
    }
}

impl ProfileArgs {
    fn load(&self) -> Result<Profile, ProfileError> {
        Profile::find(&self.profiles, &self.profile)
    }
}

fn parse_duration(text: &str) -> Result<Duration, units::InvalidDuration> {
    units::duration(text)
}
