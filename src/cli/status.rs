//! `longhaul status`: everything that is known of one migration.

use std::fmt::Write as _;

use super::control::ControlArgs;
use super::output::{OutputArgs, seconds};
use super::progress::eta;
use super::{Failure, YES, report};
use crate::api::MigrationStatus;
use crate::proto::page::MigrationId;

/// Shows everything that is known of one migration.
///
/// Exit code: 0 it is known, 2 it is not. Where the VM is, is in the answer (`outcome` in the JSON).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Id of the migration, from `longhaul list`.
    #[arg(value_name = "ID")]
    migration: MigrationId,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let status = args.control.client()?.status(args.migration).await?;
    args.output.result(&status, text);
    Ok(YES)
}

fn text(status: &MigrationStatus) -> String {
    let summary = &status.summary;
    let mut text = match &status.report {
        Some(report) => report::text(report),
        None => format!(
            "{} to {}: {}, {:.0} % after {}, this site is the {}\n  migration {}\n",
            summary.vm,
            summary.peer,
            summary.phase,
            summary.percent,
            seconds(summary.elapsed_seconds),
            summary.role,
            summary.migration
        ),
    };
    if let Some(progress) = status.progress.as_ref().filter(|_| status.report.is_none()) {
        let _ = writeln!(text, "  {}", eta(progress));
    }
    for notice in &status.notices {
        let _ = writeln!(text, "  {notice}");
    }
    if let Some(advice) = &status.advice {
        let _ = writeln!(text, "  {advice}");
    }
    text
}
