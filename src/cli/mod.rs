//! The command line: one file for each verb. Parsing does no work; `run` of a verb does it.
//!
//! Results go to stdout, everything else to stderr. The exit code of `migrate` says where the VM is
//! ([`Where`](crate::api::Where)); other verbs say 0 for yes, 2 for no, and 3 where they cannot know.

mod attach;
mod cancel;
mod check_config;
mod control;
mod dry_run;
mod fingerprint;
mod gateway;
#[cfg(target_arch = "x86_64")]
mod guest;
mod journal;
mod limit;
mod link_test;
mod list;
mod migrate;
mod moment;
mod move_disk;
mod output;
mod pair;
mod peers;
mod progress;
mod report;
mod resolve;
mod settings;
mod status;
mod store;
mod switchover;
mod unpair;
mod watch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use self::output::note;
use crate::api::{ClientError, Where};
use crate::lab::LabCommand;
use crate::wan::EmulatorArgs;

/// Moves running virtual machines between continents.
///
/// One gateway stands at each site (`longhaul gateway`); the other verbs talk to the gateway of this site through its
/// control socket. `longhaul migrate` moves a VM to another site and tells beforehand whether that will work.
#[derive(Debug, Parser)]
#[command(name = "longhaul", version, propagate_version = true, after_long_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// Every verb. A verb whose work is elsewhere (such as a tool of the lab) takes the arguments from there and is run in
/// [`Verb::run`].
#[derive(Debug, Subcommand)]
enum Verb {
    Gateway(gateway::Args),
    CheckConfig(check_config::Args),
    Migrate(migrate::Args),
    List(list::Args),
    Status(status::Args),
    Attach(attach::Args),
    Cancel(cancel::Args),
    Switchover(switchover::Args),
    Limit(limit::Args),
    MoveDisk(move_disk::Args),
    Resolve(resolve::Args),
    Pair(pair::Args),
    Peers(peers::Args),
    LinkTest(link_test::Args),
    Unpair(unpair::Args),
    Fingerprint(fingerprint::Args),
    #[command(subcommand)]
    Store(store::StoreCommand),
    #[command(subcommand)]
    Journal(journal::JournalCommand),
    #[cfg(target_arch = "x86_64")]
    Guest(guest::Args),
    WanEmulator(EmulatorArgs),
    #[command(subcommand)]
    Lab(LabCommand),
}

impl Verb {
    fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Gateway(args) => gateway::run(&args).map(ExitCode::from),
            Self::CheckConfig(args) => check_config::run(&args).map(ExitCode::from),
            Self::Migrate(args) => ask(migrate::run(args)),
            Self::List(args) => ask(list::run(args)),
            Self::Status(args) => ask(status::run(args)),
            Self::Attach(args) => ask(attach::run(args)),
            Self::Cancel(args) => ask(cancel::run(args)),
            Self::Switchover(args) => ask(switchover::run(args)),
            Self::Limit(args) => ask(limit::run(args)),
            Self::MoveDisk(args) => ask(move_disk::run(args)),
            Self::Resolve(args) => ask(resolve::run(args)),
            Self::Pair(args) => ask(pair::run(args)),
            Self::Peers(args) => ask(peers::run(args)),
            Self::LinkTest(args) => ask(link_test::run(args)),
            Self::Unpair(args) => ask(unpair::run(args)),
            Self::Fingerprint(args) => ask(fingerprint::run(args)),
            Self::Store(command) => store::run(&command).map(ExitCode::from),
            Self::Journal(command) => journal::run(&command).map(ExitCode::from),
            #[cfg(target_arch = "x86_64")]
            Self::Guest(args) => guest::run(args).map(ExitCode::from),
            Self::WanEmulator(args) => crate::wan::run(args).map_err(|error| Failure::no(with_causes(&error))),
            Self::Lab(lab) => run_lab(lab),
        }
    }
}

/// The whole program: parses the arguments, runs the verb, says what failed.
#[must_use]
pub fn main() -> ExitCode {
    match Cli::parse().verb.run() {
        Ok(code) => code,
        Err(failure) => {
            note(&format!("longhaul: {}", failure.message));
            ExitCode::from(failure.code)
        }
    }
}

/// Runs a verb that asks the gateway: one thread is enough to wait.
fn ask(verb: impl Future<Output = Result<u8, Failure>>) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::no(format!("cannot start: {error}")))?;
    runtime.block_on(verb).map(ExitCode::from)
}

/// An error and what is behind it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    text
}

/// Runs the lab, which drives several processes at once.
fn run_lab(lab: LabCommand) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| Failure::no(format!("cannot start: {error}")))?;
    Ok(runtime.block_on(lab.run()).into())
}

/// A verb did not do what it was asked for.
#[derive(Debug)]
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// No, and nothing was touched.
    fn no(message: impl Into<String>) -> Self {
        Self {
            code: NO,
            message: message.into(),
        }
    }

    /// A request that changes something failed. Where the answer was lost it may have been carried out; `look` says how to see
    /// that.
    fn of_change(error: &ClientError, look: &str) -> Self {
        match error {
            ClientError::Lost { .. } | ClientError::Garbled { .. } => {
                Self::unknown(format!("{error}; it may have been done all the same: {look}"))
            }
            ClientError::Unreachable { .. } | ClientError::Refused(_) => Self::no(error.to_string()),
        }
    }

    /// What has become of it cannot be told from here; the message says what to do.
    fn unknown(message: impl Into<String>) -> Self {
        Self {
            code: Where::Unknown.exit_code(),
            message: message.into(),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::no(error.to_string())
    }
}

/// The verb did it, or the answer is yes.
const YES: u8 = 0;

/// The verb did nothing, or the answer is no. Usage errors have this code too (clap). A verb that cannot know whether it did
/// something fails by [`Failure::of_change`].
const NO: u8 = 2;

const EXAMPLES: &str = "\
Examples:
  longhaul check-config /etc/longhaul/gateway.toml
  longhaul gateway --config /etc/longhaul/gateway.toml

  longhaul pair --invite                 at one site: prints a code
  longhaul pair lh1.Zm9v…                at the other site: both trust each other
  longhaul peers
  longhaul link-test --to tokyo          what is the link worth?

  longhaul migrate db-1 --to tokyo --dry-run
  longhaul migrate db-1 --to tokyo
  longhaul list

  longhaul move-disk db-1 vda --to /fast/   to another place at this site, while the guest runs

Exit codes of migrate and attach say where the VM is:
  0  running at the destination
  1  failed or cancelled: running at the source
  2  usage, configuration or a failed pre-check: nothing was touched
  3  unknown or paused: needs a person, and what to do is printed
Other verbs, and migrate --dry-run: 0 yes, 2 no; 3 where the gateway went away before it answered, so that it may have
been done.";

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
