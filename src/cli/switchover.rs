//! `longhaul switchover`: a migration that was begun with `--warm` goes on.

use super::control::ControlArgs;
use super::output::note;
use super::{Failure, YES};
use crate::api::Switchover;
use crate::proto::page::MigrationId;

/// Lets a migration go on that was begun with --warm: memory is copied now, and the VM moves.
///
/// Where the disks have not been read once yet, it goes on as soon as they have. Exit code: 0 it goes on (`longhaul
/// attach ID` shows it), 2 it does not, 3 the gateway went away before it answered: `longhaul status ID` tells.
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
    let answer = args.control.client()?.switch_over(args.migration).await;
    match answer.map_err(|error| Failure::of_change(&error, &look))? {
        Switchover::Ordered => note("it goes on"),
        Switchover::AlreadyOrdered => note("it goes on already"),
    }
    Ok(YES)
}
