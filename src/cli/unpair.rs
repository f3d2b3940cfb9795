//! `longhaul unpair`: a peer is trusted no more.

use super::control::ControlArgs;
use super::output::note;
use super::{Failure, YES};
use crate::config::units::parse_name;

/// Trusts a peer no more and closes its connections.
///
/// Exit code: 0 it was trusted and is no more, 2 nothing has changed, 3 the gateway went away before it answered: `longhaul
/// peers` tells. Do the same at the other site.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Name of the peer.
    #[arg(value_name = "NAME", value_parser = parse_name)]
    peer: String,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let answer = args.control.client()?.unpair(&args.peer).await;
    answer.map_err(|error| Failure::of_change(&error, LOOK))?;
    note(&format!("{} is trusted no more", args.peer));
    Ok(YES)
}

const LOOK: &str = "`longhaul peers` tells who is trusted";
