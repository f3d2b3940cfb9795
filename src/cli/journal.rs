//! `longhaul journal`: what the ownership journal of this site says.

use std::path::PathBuf;

use jiff::Timestamp;
use serde::Serialize;

use super::output::{OutputArgs, table};
use super::{Failure, YES, with_causes};
use crate::config::{Config, DEFAULT_PATH, Overrides};
use crate::proto::ownership::{Claim, JournalRecord, Outcome, RecordKind, Role, Verdict};
use crate::proto::page::hex;
use crate::store::journal::{Journal, JournalError, read_only};

/// Shows the ownership journal, in which this site's gateway has written who may run which VM, or takes a copy of it for the journal.
#[derive(Debug, clap::Subcommand)]
pub(super) enum JournalCommand {
    /// Lists every record, the oldest first, also while the gateway runs. Changes nothing.
    ///
    /// Exit code: 0 it is whole, 2 it cannot be read or is damaged.
    Show(ShowArgs),
    /// Says that a journal which was copied or moved here is the latest: no gateway has used it elsewhere since.
    ///
    /// A gateway refuses a journal that lies in another file than it was written to, or has held more than it does now, since a copy from a backup lies about what was decided
    /// since. Say this after the state directory was moved to another disk or host with the gateway stopped, and never of a backup.
    ///
    /// Exit code: 0 the gateway may be started, 2 nothing was changed.
    Adopt(AdoptArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct ShowArgs {
    #[command(flatten)]
    which: Which,

    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct AdoptArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The journal [default: that of the configuration's state_dir]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,

    /// Configuration of the gateway.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH, conflicts_with = "file")]
    config: PathBuf,
}

#[derive(Debug, Serialize)]
struct Shown {
    journal: String,
    created: String,
    /// The last record was being written, or was cut short: nobody has relied on it.
    torn: bool,
    records: Vec<ShownRecord>,
}

#[derive(Debug, Serialize)]
struct ShownRecord {
    time: String,
    migration: String,
    role: &'static str,
    vm: String,
    peer: String,
    peer_journal: String,
    record: &'static str,
    detail: String,
}

pub(super) fn run(command: &JournalCommand) -> Result<u8, Failure> {
    match command {
        JournalCommand::Show(args) => show(args),
        JournalCommand::Adopt(args) => {
            Journal::adopt(&args.which.path()?).map_err(|error| failure(&error))?;
            Ok(YES)
        }
    }
}

fn show(args: &ShowArgs) -> Result<u8, Failure> {
    let snapshot = read_only(&args.which.path()?).map_err(|error| failure(&error))?;
    let shown = Shown {
        journal: hex(&snapshot.id.0),
        created: time(snapshot.created_unix_ms),
        torn: snapshot.torn,
        records: snapshot.records.iter().map(shown).collect(),
    };
    args.output.result(&shown, text);
    Ok(YES)
}

impl Which {
    fn path(&self) -> Result<PathBuf, Failure> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let config =
            Config::load(&self.config, &Overrides::default()).map_err(|error| Failure::no(error.to_string()))?;
        Ok(config.state_dir.join("journal"))
    }
}

fn failure(error: &JournalError) -> Failure {
    Failure::no(with_causes(error))
}

fn shown(record: &JournalRecord) -> ShownRecord {
    let (name, detail) = words(&record.kind);
    ShownRecord {
        time: time(record.unix_ms),
        migration: record.migration.to_string(),
        role: match record.role {
            Role::Source => "source",
            Role::Destination => "destination",
        },
        vm: record.vm.clone(),
        peer: record.peer.clone(),
        peer_journal: hex(&record.peer_journal.0),
        record: name,
        detail,
    }
}

/// A record's name, and what else it says.
fn words(kind: &RecordKind) -> (&'static str, String) {
    match kind {
        RecordKind::Started { was_running: true } => ("started", String::new()),
        RecordKind::Started { was_running: false } => ("started", "the guest was paused".to_owned()),
        RecordKind::Prepared => ("prepared", String::new()),
        RecordKind::Permit(permit) => (
            "permit",
            format!("{} bytes, {}", permit.stream.length, permit.stream.digest),
        ),
        RecordKind::Commit(permit) => (
            "commit",
            format!("{} bytes, {}", permit.stream.length, permit.stream.digest),
        ),
        RecordKind::Abort(reason) => ("abort", reason.to_string()),
        RecordKind::Running => ("running", String::new()),
        RecordKind::Revert => ("revert", String::new()),
        RecordKind::Learnt(Verdict::Running) => ("learnt", "the destination runs it".to_owned()),
        RecordKind::Learnt(Verdict::Aborted(reason)) => ("learnt", reason.to_string()),
        RecordKind::Learnt(Verdict::Reverted) => ("learnt", "the destination gave it back".to_owned()),
        RecordKind::Resolved(resolution) => {
            let claim = match resolution.claim {
                Claim::PeerIsFenced => "the VM is this side's",
                Claim::PeerOwns => "the VM is the other side's",
            };
            ("resolved", format!("{claim}, says {}", resolution.by))
        }
        RecordKind::Closed(Outcome::RunsAtSource) => ("closed", "the VM is at the source".to_owned()),
        RecordKind::Closed(Outcome::RunsAtDestination) => ("closed", "the VM is at the destination".to_owned()),
        RecordKind::Closed(Outcome::VmmDied) => ("closed", "the VM's hypervisor died at the source".to_owned()),
    }
}

fn time(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.map_or_else(|| "?".to_owned(), |time| format!("{time:.0}"))
}

fn text(shown: &Shown) -> String {
    let rows: Vec<_> = shown
        .records
        .iter()
        .map(|record| {
            [
                record.time.clone(),
                record.migration.clone(),
                record.role.to_owned(),
                record.vm.clone(),
                record.peer.clone(),
                record.record.to_owned(),
                record.detail.clone(),
            ]
        })
        .collect();
    let mut text = format!("journal {}, begun {}\n", shown.journal, shown.created);
    if !rows.is_empty() {
        text += &table(["TIME", "MIGRATION", "ROLE", "VM", "PEER", "RECORD", ""], &rows);
    }
    if shown.torn {
        text += "a last record is being written, or was cut short and never relied on\n";
    }
    text
}
