//! `longhaul list`: every migration that the gateway remembers.

use super::control::ControlArgs;
use super::output::{OutputArgs, seconds, table};
use super::{Failure, YES};
use crate::api::MigrationSummary;

/// Lists migrations that run, and those that have ended and are remembered.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let migrations = args.control.client()?.list().await?;
    args.output.result(&migrations, |migrations| text(migrations));
    Ok(YES)
}

fn text(migrations: &[MigrationSummary]) -> String {
    if migrations.is_empty() {
        return "no migrations".to_owned();
    }
    let rows: Vec<_> = migrations
        .iter()
        .map(|migration| {
            [
                migration.migration.to_string(),
                migration.vm.clone(),
                migration.role.to_string(),
                migration.peer.clone(),
                migration
                    .outcome
                    .map_or_else(|| migration.phase.to_string(), |outcome| outcome.to_string()),
                format!("{:.0} %", migration.percent),
                seconds(migration.elapsed_seconds),
            ]
        })
        .collect();
    table(["ID", "VM", "THIS SITE IS", "PEER", "STATE", "DONE", "TIME"], &rows)
}
