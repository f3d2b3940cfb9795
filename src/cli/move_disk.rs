//! `longhaul move-disk`: a disk of a VM becomes another image at this site.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr as _;

use tokio::sync::mpsc;

use super::control::ControlArgs;
use super::output::{OutputArgs, bytes, note, seconds};
use super::progress::Bar;
use super::watch::{Signals, Told};
use super::{Failure, NO, YES};
use crate::api::{
    Cancellation, Client, ClientError, DiskOfVm, Following, MoveDiskEvent, MoveDiskOutcome, MoveDiskPhase,
    MoveDiskPlan, MoveDiskProgress, MoveDiskReport, MoveDiskRequest,
};
use crate::config::units::parse_name;
use crate::config::{ImageFormat, Preallocation};
use crate::proto::page::ByteRate;

/// Moves a disk of a VM to another place or format at this site, with the guest running on.
///
/// Where the VM runs, its QEMU copies the disk, and turns the guest to the new image once both are the same: the guest notices nothing but
/// the load. Where it is off, qemu-img copies the image and compares the two, and the VM cannot be started meanwhile. The old image is never
/// changed, and stays unless --remove-old says otherwise. Nothing is ever overwritten.
///
/// Afterwards whatever starts the VM has to name the new image: the report says where. Ctrl-C cancels the move and leaves nothing behind. When
/// the terminal is lost the move goes on: the same command without --to shows it again.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Args {
    /// Name of the VM in the configuration.
    #[arg(value_name = "VM", value_parser = parse_name)]
    vm: String,

    /// The disk: the id of its drive, or of its device, such as vda.
    #[arg(value_name = "DISK")]
    disk: String,

    /// The new image, or a directory for it; without it a move that is under way is shown.
    #[arg(long, value_name = "PATH", conflicts_with = "cancel")]
    to: Option<PathBuf>,

    /// Format of the new image: raw, qcow2, vmdk, vhdx or vdi [default: as it is]
    #[arg(long = "format", value_name = "FORMAT", value_parser = ImageFormat::from_str, requires = "to")]
    new_format: Option<ImageFormat>,

    /// What is allocated of the new image before anything is copied: off, metadata, falloc or full [default: off]
    #[arg(long, value_name = "HOW", value_parser = Preallocation::from_str, requires = "to")]
    preallocation: Option<Preallocation>,

    /// Most that is copied, such as 800mbit; below what the guest writes it never ends.
    #[arg(long, value_name = "RATE", value_parser = ByteRate::from_str, requires = "to")]
    limit: Option<ByteRate>,

    /// The present image of a VM that is off [default: the path of its [[vm.image]]]
    #[arg(long, value_name = "PATH", requires = "to")]
    from: Option<PathBuf>,

    /// Format of that image [default: the format of the disk's [[vm.image]]]
    #[arg(long, value_name = "FORMAT", value_parser = ImageFormat::from_str, requires = "from")]
    from_format: Option<ImageFormat>,

    /// Remove the old image once the disk is moved.
    #[arg(long, requires = "to")]
    remove_old: bool,

    /// Make every check and say what would be done; nothing is made.
    #[arg(long, requires = "to")]
    dry_run: bool,

    /// Cancel the move of this disk that is under way.
    #[arg(long)]
    cancel: bool,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let client = args.control.client()?;
    let of = DiskOfVm {
        vm: args.vm.clone(),
        disk: args.disk.clone(),
    };
    if args.cancel {
        let look = format!("`longhaul move-disk {} {}` tells", of.vm, of.disk);
        let answer = client.cancel_move_disk(&of).await;
        match answer.map_err(|error| Failure::of_change(&error, &look))? {
            Cancellation::Requested => note("it is being cancelled"),
            Cancellation::AlreadyRequested => note("it was already being cancelled"),
        }
        return Ok(YES);
    }
    let output = args.output;
    let signals = Signals::listen()?;
    let Some(to) = &args.to else {
        let events = client.follow_move_disk(&of).await?;
        return watch(client, of, events, signals, output).await;
    };
    let request = MoveDiskRequest {
        to: absolute(to)?,
        format: args.new_format.map(|format| format.to_string()),
        preallocation: args.preallocation.map(|how| how.to_string()),
        rate_bytes_per_second: args.limit.map(|limit| limit.0),
        from: args.from.as_ref().map(absolute).transpose()?,
        from_format: args.from_format.map(|format| format.to_string()),
        remove_old: args.remove_old,
        vm: args.vm,
        disk: args.disk,
    };
    if args.dry_run {
        let plan = client.check_move_disk(&request).await?;
        output.result(&plan, plan_text);
        return Ok(YES);
    }
    let look = format!("`longhaul move-disk {} {}` tells", of.vm, of.disk);
    let begun = client.move_disk(&request).await;
    let events = begun.map_err(|error| Failure::of_change(&error, &look))?;
    watch(client, of, events, signals, output).await
}

/// The gateway has another working directory.
fn absolute(path: &PathBuf) -> Result<PathBuf, Failure> {
    let absolute = std::path::absolute(path).map_err(|error| Failure::no(format!("{}: {error}", path.display())))?;
    match absolute.to_str() {
        Some(_) => Ok(absolute),
        None => Err(Failure::no(format!("{} is not valid UTF-8", absolute.display()))),
    }
}

/// Looks on until it has ended.
async fn watch(
    client: Client,
    of: DiskOfVm,
    mut events: Following<MoveDiskEvent>,
    mut signals: Signals,
    output: OutputArgs,
) -> Result<u8, Failure> {
    let display = Bar::on_stderr();
    let (answers, mut answer) = mpsc::channel(1);
    let mut shown: Option<(MoveDiskPhase, u64)> = None;
    loop {
        tokio::select! {
            event = events.next() => match event {
                Ok(Some(MoveDiskEvent::Progress(progress))) => {
                    let tenth = progress.done_bytes.saturating_mul(10) / progress.total_bytes.max(1);
                    // A log is readable when it has a line for each tenth.
                    let is_worth_a_line = shown != Some((progress.phase, tenth));
                    shown = Some((progress.phase, tenth));
                    display.show(percent(&progress), &line(&progress), is_worth_a_line);
                }
                Ok(Some(MoveDiskEvent::Notice(text))) => display.notice(&text),
                Ok(Some(MoveDiskEvent::Report(report))) => {
                    display.clear();
                    output.result(&*report, report_text);
                    return Ok(match report.outcome {
                        MoveDiskOutcome::Moved => YES,
                        MoveDiskOutcome::Failed | MoveDiskOutcome::Cancelled => NO,
                        MoveDiskOutcome::Unknown => UNKNOWN,
                    });
                }
                Ok(None) | Err(ClientError::Lost { .. }) => {
                    display.clear();
                    return Err(Failure::unknown(format!(
                        "the gateway went away; when it is started again it undoes the move of {} of {}, unless the disk had been moved: its log \
                         tells. The guest runs on in any case",
                        of.disk, of.vm
                    )));
                }
                Err(error) => return Err(error.into()),
            },
            told = signals.next() => match told {
                Told::Interrupt => {
                    display.notice("cancelling; the disk stays what it is");
                    let (client, of, answers) = (client.clone(), of.clone(), answers.clone());
                    tokio::spawn(async move { answers.send(client.cancel_move_disk(&of).await).await });
                }
                Told::Leave => {
                    display.clear();
                    return Err(Failure::unknown(format!(
                        "detached; the move goes on, `longhaul move-disk {} {}` shows it again",
                        of.vm, of.disk
                    )));
                }
            },
            Some(answer) = answer.recv() => match answer {
                Ok(Cancellation::Requested) => {}
                Ok(Cancellation::AlreadyRequested) => display.notice("it was already being cancelled"),
                Err(error) => display.notice(&format!("not cancelled: {error}")),
            },
        }
    }
}

fn percent(progress: &MoveDiskProgress) -> f64 {
    100.0 * progress.done_bytes as f64 / progress.total_bytes.max(1) as f64
}

fn line(progress: &MoveDiskProgress) -> String {
    let phase = match progress.phase {
        MoveDiskPhase::Making => return "the new image is made".to_owned(),
        MoveDiskPhase::Turning => return "the guest turns to the new image".to_owned(),
        MoveDiskPhase::Undoing => return "what was made is taken away again".to_owned(),
        MoveDiskPhase::Copying => "copying",
        MoveDiskPhase::Comparing => "comparing",
    };
    format!(
        "{phase}  {:.0} %  {} of {}  {}",
        percent(progress),
        bytes(progress.done_bytes),
        bytes(progress.total_bytes),
        seconds(progress.elapsed_seconds)
    )
}

fn plan_text(plan: &MoveDiskPlan) -> String {
    let how = if plan.live {
        "while the guest runs"
    } else {
        "while the VM is off"
    };
    let from = plan
        .from
        .as_ref()
        .map_or("its present image".to_owned(), |from| from.display().to_string());
    let mut text = format!(
        "{} of {} can be moved, {how}:\n  from  {from} ({}, {} of {} allocated)\n  to    {} ({}; {} are free there)\n",
        plan.disk,
        plan.vm,
        plan.from_format,
        bytes(plan.allocated_bytes),
        bytes(plan.size_bytes),
        plan.to.display(),
        plan.format,
        bytes(plan.room_bytes),
    );
    for note in &plan.notes {
        let _ = writeln!(text, "  note  {note}");
    }
    text
}

fn report_text(report: &MoveDiskReport) -> String {
    let plan = &report.plan;
    let (disk, vm) = (&plan.disk, &plan.vm);
    let reason = report.reason.as_deref().unwrap_or_default();
    let mut text = match report.outcome {
        MoveDiskOutcome::Moved => format!(
            "{disk} of {vm} is {} now ({}, {} allocated), after {}\n",
            plan.to.display(),
            plan.format,
            bytes(report.new_bytes.unwrap_or_default()),
            seconds(report.total_seconds)
        ),
        MoveDiskOutcome::Failed => format!("{disk} of {vm} was not moved and is what it was: {reason}\n"),
        MoveDiskOutcome::Cancelled => format!("the move of {disk} of {vm} is cancelled: the disk is what it was\n"),
        MoveDiskOutcome::Unknown => format!("what {disk} of {vm} is has to be found out: {reason}\n"),
    };
    if report.outcome == MoveDiskOutcome::Moved {
        let old = match &plan.from {
            Some(from) if report.old_removed => format!("the old image {} is removed", from.display()),
            Some(from) => format!("the old image {} stays as it was", from.display()),
            None => "the old image stays as it was".to_owned(),
        };
        let _ = writeln!(text, "{old}");
        for note in &plan.notes {
            let _ = writeln!(text, "note: {note}");
        }
    }
    for todo in &report.todo {
        let _ = writeln!(text, "to do: {todo}");
    }
    text
}

/// A person has to look.
const UNKNOWN: u8 = 3;

const HELP: &str = "\
Examples:
  longhaul move-disk db-1 vda --to /fast/ --dry-run
      will it work, and what will the new image be called?
  longhaul move-disk db-1 vda --to /fast/db-1.qcow2 --format qcow2
  longhaul move-disk db-1 vda --to /fast/ --limit 800mbit --remove-old
  longhaul move-disk db-1 vda                  shows a move that is under way
  longhaul move-disk db-1 vda --cancel
  longhaul move-disk db-1 vda --from /slow/db-1.raw --from-format raw --to /fast/
      the VM is off, and no [[vm.image]] says where its disk is

Exit code: 0 the disk is the new image, 2 it is the old one and nothing is left of the new one, 3 a person has to look,
or the gateway went away meanwhile. With --dry-run 0 says that it can be moved, with --cancel that it is being cancelled.";
