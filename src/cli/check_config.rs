//! `longhaul check-config`: would the gateway start with this?

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::output::result;
use super::settings::Settings;
use super::{Failure, YES};
use crate::config::{Config, DEFAULT_PATH};
use crate::gateway::clock;
use crate::proto::page::ByteRate;
use crate::proto::rate::Calendar;

/// Reads a configuration and names every mistake in it.
///
/// Takes the flags and environment variables of `longhaul gateway` too, and checks what the gateway would run with. Of each calendar it
/// says what holds now and until when, and of each hook whether its file can be run.
/// Exit code: 0 it is valid, 2 it is not.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file.
    #[arg(value_name = "FILE", default_value = DEFAULT_PATH)]
    file: PathBuf,

    #[command(flatten)]
    settings: Settings,
}

/// Why nobody can run this file, if nobody can. Not a mistake of the configuration, which may be there before its hooks.
fn not_executable(program: &Path) -> Option<&'static str> {
    match std::fs::metadata(program) {
        Err(_) => Some("is missing"),
        Ok(file) if !file.is_file() => Some("is not a file"),
        Ok(file) if file.permissions().mode() & 0o111 == 0 => Some("is not executable: chmod +x it"),
        Ok(_) => None,
    }
}

pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let config =
        Config::load(&args.file, &args.settings.overrides()).map_err(|error| Failure::no(error.to_string()))?;
    result(&format!(
        "{} is valid: site {}, {} peers, {} VMs",
        args.file.display(),
        config.site,
        config.peers.len(),
        config.vms.len()
    ));
    let now = clock::timestamp();
    let say = |whose: &str, calendar: &Calendar, rate: Option<ByteRate>| {
        let Some(rate) = rate.filter(|_| !calendar.is_empty()) else {
            return;
        };
        let (at, next) = (calendar.shown(now), calendar.next_change(now));
        let until = next.map_or_else(
            || "for ever".to_owned(),
            |next| format!("until {}", calendar.shown(next)),
        );
        result(&format!("{whose}: {rate} at {at}, {until}"));
    };
    say("link.calendar", &config.link.calendar, config.link_rate_at(now));
    for peer in &config.peers {
        let whose = format!("calendar of {}", peer.name);
        say(&whose, &peer.calendar, config.peer_rate_at(&peer.name, now));
    }
    for (hook, program) in &config.hooks.programs {
        if let Some(wrong) = not_executable(program) {
            result(&format!("hooks.{hook}: {} {wrong}", program.display()));
        }
    }
    Ok(YES)
}
