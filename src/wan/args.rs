//! `longhaul wan-emulator`: what `netem-scripts/link` and the lab call.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::check::{CheckError, check};
use super::control::{self, ControlError};
use super::emulator::{self, EmulatorError, EmulatorSettings};
use super::link::{Link, LinkError, LinkName, Site};
use super::probe::{ProbeError, ProbeSettings, probe};
use super::profile::{Profile, ProfileError};
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
    /// Sends a command to a link's emulator: stats, set ab.loss=1%, down ab 3s after 10s, up, reset
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
    /// Measures a link against its profile; exit code 1 says that it is off
    Check {
        #[command(flatten)]
        link: LinkArgs,
        /// How long each of four probes sends
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
    #[error("the link {0} is carried by the kernel: change it with tc -n {router}, devices to-a and to-b", router = .0.router())]
    Kernel(LinkName),
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

impl ProfileArgs {
    fn load(&self) -> Result<Profile, ProfileError> {
        Profile::find(&self.profiles, &self.profile)
    }
}

fn parse_duration(text: &str) -> Result<Duration, units::InvalidDuration> {
    units::duration(text)
}
