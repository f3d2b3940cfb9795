//! `longhaul resolve`: a person states where a VM is that is in doubt.

use super::control::ControlArgs;
use super::output::OutputArgs;
use super::{Failure, YES};
use crate::api::{ResolveRequest, Statement};
use crate::config::units::parse_name;

/// Ends the doubt about a VM by your statement.
///
/// A gateway that lost contact after it gave the VM away neither resumes nor discards its copy, because the VM might
/// then run twice or nowhere. When contact will not come back, look at the other site yourself and state what you
/// found. The gateway believes you: a wrong statement runs the VM twice, or loses it.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
#[command(group(clap::ArgGroup::new("statement").required(true)))]
pub(super) struct Args {
    /// Name of the VM.
    #[arg(value_name = "VM", value_parser = parse_name)]
    vm: String,

    /// No copy runs at the peer and none can start there (its host is off or cut off for good): run the VM here.
    #[arg(long, group = "statement")]
    peer_is_fenced: bool,

    /// The VM runs at the peer: give up the copy here.
    #[arg(long, group = "statement")]
    runs_at_peer: bool,

    /// The copy here is dead, with whatever it did since it was committed: let the peer run its own.
    #[arg(long, group = "statement")]
    lost_here: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let statement = match (args.peer_is_fenced, args.runs_at_peer) {
        (true, _) => Statement::PeerIsFenced,
        (false, true) => Statement::RunsAtPeer,
        (false, false) => Statement::LostHere,
    };
    let request = ResolveRequest { vm: args.vm, statement };
    let answer = args.control.client()?.resolve(&request).await;
    let resolution = answer.map_err(|error| Failure::of_change(&error, LOOK))?;
    args.output.result(&resolution, |resolution| resolution.result.clone());
    Ok(YES)
}

const HELP: &str = "\
Examples:
  longhaul status ID                     what is in doubt, and why
  longhaul resolve db-1 --peer-is-fenced at the source, when the destination's host is gone
  longhaul resolve db-1 --runs-at-peer   at the source, when you see it run at the destination
  longhaul resolve db-1 --lost-here      at the destination, when its copy died right after it was committed

Exit codes: 0 resolved, 2 not (nothing was touched), 3 the gateway went away before it answered: it may be resolved all
the same, and `longhaul list` and `longhaul status ID` tell.";

const LOOK: &str = "`longhaul list` and `longhaul status ID` tell, once the gateway runs";
