//! `longhaul cancel`: the VM stays at the source.

use super::control::ControlArgs;
use super::output::note;
use super::{Failure, YES};
use crate::api::Cancellation;
use crate::proto::page::MigrationId;

/// Cancels a migration; the VM stays at the source.
///
/// Refused once the destination may run the VM. Exit code: 0 it is being cancelled (`longhaul attach ID` tells when it
/// is done), 2 it is not, 3 the gateway went away before it answered: `longhaul status ID` tells.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Id of the migration, from `longhaul list`.
    #[arg(value_name = "ID")]
    migration: MigrationId,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let look = format!("`longhaul status {}` tells", args.migration);
    let answer = args.control.client()?.cancel(args.migration).await;
    match answer.map_err(|error| Failure::of_change(&error, &look))? {
        Cancellation::Requested => note("it is being cancelled"),
        Cancellation::AlreadyRequested => note("it was already being cancelled"),
    }
    Ok(YES)
}
