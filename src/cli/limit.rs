//! `longhaul limit`: what a migration that runs may take of its link.

use std::num::NonZeroU32;
use std::str::FromStr as _;

use super::control::ControlArgs;
use super::output::{OutputArgs, wire_rate};
use super::{Failure, YES};
use crate::api::{Adjustment, Limits, NewRate};
use crate::proto::page::{ByteRate, MigrationId};

/// Changes what a migration that runs may take of its link.
///
/// What is not said stays as it is; without flags the limits are shown. A guest that stands still goes before every
/// weight, whatever is said here.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Args {
    /// Id of the migration, from `longhaul list`.
    #[arg(value_name = "ID")]
    migration: MigrationId,

    /// Cap of this migration, such as 800mbit.
    #[arg(long, value_name = "RATE", value_parser = ByteRate::from_str)]
    rate: Option<ByteRate>,

    /// No cap but that of the link.
    #[arg(long, conflicts_with = "rate")]
    unlimited: bool,

    /// Share of the link beside other migrations to the same site: 3 gets three times what 1 gets.
    #[arg(long, value_name = "N")]
    weight: Option<NonZeroU32>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let rate = match (args.rate, args.unlimited) {
        (Some(rate), _) => Some(NewRate::BytesPerSecond(rate.0)),
        (None, true) => Some(NewRate::Unlimited),
        (None, false) => None,
    };
    let adjustment = Adjustment {
        rate,
        weight: args.weight,
    };
    let answer = args.control.client()?.adjust(args.migration, &adjustment).await;
    let look = format!("`longhaul limit {}` shows what holds", args.migration);
    let limits = answer.map_err(|error| Failure::of_change(&error, &look))?;
    args.output.result(&limits, text);
    Ok(YES)
}

fn text(limits: &Limits) -> String {
    let rate = match limits.rate_bytes_per_second {
        Some(rate) => format!("at most {}", wire_rate(rate as f64)),
        None => "no cap but that of the link".to_owned(),
    };
    format!("{rate}, weight {}", limits.weight)
}

const HELP: &str = "\
Examples:
  longhaul limit 4f1c… --rate 200mbit
  longhaul limit 4f1c… --unlimited --weight 3

Exit code: 0 the limits hold from now on, 2 they do not, 3 the gateway went away before it answered.";
