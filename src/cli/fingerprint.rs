//! `longhaul fingerprint`: who this gateway is.

use super::control::ControlArgs;
use super::output::OutputArgs;
use super::{Failure, YES};

/// Prints the fingerprint of this gateway's public key, for `longhaul pair --peer` at the other site.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let identity = args.control.client()?.identity().await?;
    args.output
        .result(&identity, |identity| identity.fingerprint.to_string());
    Ok(YES)
}
