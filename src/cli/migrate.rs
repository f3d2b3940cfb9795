//! `longhaul migrate`: the gateway of this site runs the migration, the command is its client.

use std::num::NonZeroU32;
use std::str::FromStr as _;
use std::time::Duration;

use super::control::ControlArgs;
use super::output::{Format, OutputArgs, note, result};
use super::watch::{Interrupt, PatienceArgs, Signals, watch};
use super::{Failure, NO, YES, dry_run, moment};
use crate::api::{ClientError, Outcome, Refusal, Report, StartRequest, Warm};
use crate::config::units::{parse_duration, parse_name};
use crate::proto::page::{ByteRate, MigrationId};
use crate::proto::wire::message::DiskPlace;

/// Moves a VM to another site, while it runs or, with --cold, while it is off.
///
/// The gateway of this site runs the migration; this command shows its progress. Ctrl-C cancels it and the VM stays
/// here. When the terminal is lost, the migration goes on: `longhaul list` names it, `longhaul attach ID` shows it
/// again.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Args {
    /// Name of the VM in the configuration.
    #[arg(value_name = "VM", value_parser = parse_name)]
    vm: String,

    /// Site to move it to.
    #[arg(long = "to", value_name = "PEER", value_parser = parse_name)]
    peer: String,

    /// Longest downtime that is accepted, such as 500ms [default: migration.downtime_limit of the gateway]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    downtime_limit: Option<Duration>,

    /// Cap of this migration, such as 800mbit [default: migration.rate of the gateway]
    #[arg(long, value_name = "RATE", value_parser = ByteRate::from_str)]
    rate: Option<ByteRate>,

    /// Most that is read of its disks, such as 400mbit, so that the guest's own reads and writes are not held up.
    #[arg(long, value_name = "RATE", value_parser = ByteRate::from_str)]
    disk_rate: Option<ByteRate>,

    /// Where a disk that is copied is put at the destination: a [[pool]] of its configuration and a new file in it. The path
    /// of its [[vm.image]] becomes a link to that. May be given for each disk [default: what that path is or leads to]
    #[arg(long = "disk", value_name = "DISK=POOL/FILE", value_parser = parse_disk_place)]
    disk: Vec<DiskPlace>,

    /// Share of the link beside other migrations to the same site: 3 gets three times what 1 gets.
    #[arg(long, value_name = "N", default_value = "1")]
    weight: NonZeroU32,

    /// Longest time until the VM is paused, such as 30m; then it is cancelled [default: migration.deadline of the
    /// gateway]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    deadline: Option<Duration>,

    /// Copy the disks, and what the guest writes to them, until `longhaul switchover ID`; then the rest. The deadline
    /// counts from there.
    #[arg(long)]
    warm: bool,

    /// The same, and go on by itself at this time: 02:00, "2026-12-24 02:00" (this machine's time zone), or
    /// 2026-12-24T02:00:00Z.
    #[arg(long, value_name = "TIME")]
    warm_until: Option<String>,

    /// Move a VM that is off: the images of its [[vm.image]] tables, compared with what the other site has, and nothing is
    /// started there.
    #[arg(long, conflicts_with_all = ["warm", "warm_until", "downtime_limit"])]
    cold: bool,

    /// Make every check and forecast time, bytes and downtime; nothing moves.
    #[arg(long, conflicts_with = "detach")]
    dry_run: bool,

    /// Print the migration's id once it has started and leave it to the gateway.
    #[arg(long)]
    detach: bool,

    #[command(flatten)]
    patience: PatienceArgs,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let client = args.control.client()?;
    let until = args
        .warm_until
        .as_deref()
        .map(|time| moment::parse(time, &moment::now()));
    let until = until.transpose().map_err(Failure::no)?;
    let request = StartRequest {
        vm: args.vm,
        peer: args.peer,
        downtime_limit_seconds: args.downtime_limit.map(|limit| limit.as_secs_f64()),
        rate_bytes_per_second: args.rate.map(|rate| rate.0),
        deadline_seconds: args.deadline.map(|deadline| deadline.as_secs_f64()),
        weight: Some(args.weight),
        warm: (args.warm || until.is_some()).then_some(Warm { until_unix_ms: until }),
        cold: args.cold,
        disk_rate_bytes_per_second: args.disk_rate.map(|rate| rate.0),
        disk_places: args.disk,
    };
    if args.dry_run {
        let answer = client.check(&request).await?;
        args.output.result(&answer, dry_run::text);
        return Ok(if answer.is_yes() { YES } else { NO });
    }
    // From here on a signal is kept until the id is known that it is about.
    let signals = Signals::listen()?;
    let started = match client.start(&request).await {
        Ok(started) => started,
        Err(ClientError::Refused(refusal)) => return Err(refused(&request, &refusal, args.output.format)),
        Err(error) => {
            let look = "`longhaul list` tells, once the gateway runs";
            return Err(Failure::of_change(&error, look));
        }
    };
    if args.detach {
        args.output.result(&started, |started| started.migration.to_string());
        return Ok(YES);
    }
    note(&format!(
        "migration {} of {} to {}",
        started.migration, request.vm, request.peer
    ));
    watch(
        client,
        started.migration,
        signals,
        Interrupt::Cancels,
        args.patience,
        args.output,
    )
    .await
}

fn parse_disk_place(text: &str) -> Result<DiskPlace, &'static str> {
    match text.split_once('=') {
        Some((disk, place)) if !disk.is_empty() && place.contains('/') => Ok(DiskPlace {
            disk: disk.to_owned(),
            place: place.to_owned(),
        }),
        _ => Err("write the disk, = and its place, for example vda=fast/web-1.qcow2"),
    }
}

/// Scripts that read JSON get the object that says so, too: a report but for the id, since there is no migration.
fn refused(request: &StartRequest, refusal: &Refusal, format: Format) -> Failure {
    if format == Format::Json {
        let nothing = MigrationId([0; 16]);
        let report = Report::without_figures(nothing, &request.vm, &request.peer, Outcome::Refused, &refusal.message);
        let mut report = serde_json::to_value(report).expect("a report is plain data");
        if let Some(fields) = report.as_object_mut() {
            fields.remove("migration");
        }
        result(&report.to_string());
    }
    Failure::no(refusal.to_string())
}

const HELP: &str = "\
Examples:
  longhaul migrate db-1 --to tokyo --dry-run
      will it work, how long will it take, how long is the VM paused?
  longhaul migrate db-1 --to tokyo --downtime-limit 300ms --rate 800mbit
  longhaul migrate db-1 --to tokyo --deadline 30m --output json > report.json
  longhaul attach $(longhaul migrate db-1 --to tokyo --detach)
  longhaul migrate db-1 --to tokyo --warm-until 02:00 --detach
      the disks cross today, the VM at night
  longhaul migrate db-1 --to tokyo --cold
      db-1 is off: its images move, and it is off in tokyo

Exit codes say where the VM is:
  0  at the destination, and running unless it was paused or off (--detach: the migration has started)
  1  failed or cancelled: at the source, as it was
  2  usage, configuration or a failed pre-check: nothing was touched
  3  unknown or paused: needs a person, and what to do is printed
With --dry-run: 0 it will work, 2 it will not.";
