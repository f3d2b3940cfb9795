//! `longhaul check-config`: would the gateway start with this?

use std::path::PathBuf;

use super::output::result;
use super::settings::Settings;
use super::{Failure, YES};
use crate::config::{Config, DEFAULT_PATH};

/// Reads a configuration and names every mistake in it.
///
/// Takes the flags and environment variables of `longhaul gateway` too, and checks what the gateway would run with.
/// Exit code: 0 it is valid, 2 it is not.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file.
    #[arg(value_name = "FILE", default_value = DEFAULT_PATH)]
    file: PathBuf,

    #[command(flatten)]
    settings: Settings,
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
    Ok(YES)
}
