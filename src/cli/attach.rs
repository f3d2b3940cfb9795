//! `longhaul attach`: looks on at a migration that runs.

use super::Failure;
use super::control::ControlArgs;
use super::output::OutputArgs;
use super::watch::{Interrupt, PatienceArgs, Signals, watch};
use crate::proto::page::MigrationId;

/// Shows the progress of a migration until it has ended, and its report.
///
/// Ctrl-C detaches again; the migration goes on. Exit codes are those of `longhaul migrate`, and 3 after Ctrl-C, since
/// the end was not seen.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Id of the migration, from `longhaul list`.
    #[arg(value_name = "ID")]
    migration: MigrationId,

    #[command(flatten)]
    patience: PatienceArgs,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let client = args.control.client()?;
    let signals = Signals::listen()?;
    watch(
        client,
        args.migration,
        signals,
        Interrupt::Detaches,
        args.patience,
        args.output,
    )
    .await
}
