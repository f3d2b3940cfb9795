//! What one run of the lab found: a line of JSON, kept raw, from which every table and picture of a report is drawn.
//!
//! Names are stable and new ones are added at will; the unit ends the name. What was not measured is absent, never zero. The words
//! are defined in `docs/lab.md`.
//!
//! A line is a [`Run`] unless its `kind` says otherwise: runs have none (`"kind": "run"` is the same), a [`Frontier`] has
//! `"kind": "frontier"`. A kind that is not known is refused, because leaving it out would change what a report says.

use std::io::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::LabError;
use super::guest::GuestDials;

/// One line of the lab's file.
#[derive(Clone, Debug)]
pub enum Record {
    /// A move.
    Run(Box<Run>),
    /// What several moves together found.
    Frontier(Frontier),
}

impl Record {
    /// Reads one line.
    ///
    /// # Errors
    /// [`RecordError`] where it is no JSON, lacks a field, or is of a kind that is not known here.
    pub fn parse(line: &[u8]) -> Result<Self, RecordError> {
        let Kind { kind } = serde_json::from_slice(line)?;
        match kind.as_deref() {
            None | Some("run") => Ok(Self::Run(serde_json::from_slice(line)?)),
            Some("frontier") => Ok(Self::Frontier(serde_json::from_slice(line)?)),
            Some(kind) => Err(RecordError::Kind { kind: kind.to_owned() }),
        }
    }
}

/// A line is no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("it is no JSON of a record")]
    Json(#[from] serde_json::Error),
    #[error("its kind, {kind:?}, is not known to this version of longhaul")]
    Kind { kind: String },
}

/// Looked at first, so that what is wrong with a line is said in the words of its own kind.
#[derive(Deserialize)]
struct Kind {
    #[serde(default)]
    kind: Option<String>,
}

/// One move of one guest by one engine across one link.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// What moved the guest, for example `longhaul` or `qemu-multifd-zstd`.
    pub engine: String,
    /// Name of the link's profile.
    pub profile: String,
    /// Name of the guest in the plan.
    pub guest: String,
    /// Of the guest's content and the link's losses.
    pub seed: u64,
    /// Which repetition of the same cell of the matrix, from 1.
    pub repetition: u32,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it ended so, or why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The figures may be compared: the link was what its profile says and no process of the engine was starved of CPU.
    pub usable: bool,
    /// From the command to the first sign of life at the destination; until it was stopped where it did not finish.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_seconds: Option<f64>,
    /// From the last sign of life at the source to the first at the destination, on the host's clock: no vCPU ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_seconds: Option<f64>,
    /// Longest gap that an outside prober (10 ms) or an open TCP session saw; only of guests with a network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blackout_seconds: Option<f64>,
    /// IP bytes that both sites put onto the link, headers and repairs included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wire_bytes: Option<u64>,
    /// Share of the link's rate that was used from source to destination while the move lasted, 0..=1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_use: Option<f64>,
    /// Passes over the dirty set, as the engine counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u64>,
    /// CPU seconds of hypervisor and gateway per GiB of guest memory, at the source and at the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_seconds_per_gib: Option<Ends<f64>>,
    /// Most memory that a gateway had resident.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<Ends<u64>>,
    /// Of the time that its threads could have run, the share in which they waited for a CPU (run delay of `schedstat`), 0..=1: of
    /// the gateway or hypervisor that waited most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_delay_share: Option<f64>,
    /// Of the CPU time that this machine used, the share that was no part of the measurement, 0..=1: other programs, and what
    /// the host took (steal).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub others_share: Option<f64>,
    /// Pages that the guest rewrote a second while it was moved, at the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_pages_per_second: Option<f64>,
    /// The guest checked its own memory and found it as it must be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_intact: Option<bool>,
    /// Pages of the guest that were checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pages_checked: Option<u64>,
    /// The application inside the guest, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application: Option<Application>,
    /// Course of the migration, sampled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timeline: Vec<Moment>,
    /// The engine's own report, whole: of longhaul what `migrate --output json` prints, of QEMU what `query-migrate` last said.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub report: Map<String, Value>,
    /// The guest's dials.
    pub dials: GuestDials,
    /// Where and with what it was measured.
    pub setting: Setting,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// It had not converged when the time that the plan allows was over.
    NotFinished,
    /// The engine gave up or broke.
    Failed,
    /// This machine cannot run it.
    Unavailable,
}

/// The same figure of both ends.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ends<T> {
    /// Where the guest came from.
    pub source: T,
    /// Where it went.
    pub destination: T,
}

/// An application's work around a move. Under TCG its slowdown is contention for the host's CPUs above all.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Application {
    /// Its name, for example `redis`.
    pub name: String,
    /// Before the move was asked for.
    pub before: Work,
    /// From the command to the arrival.
    pub during: Work,
    /// After the arrival.
    pub after: Work,
}

/// What an application did in a time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Operations a second.
    pub operations_per_second: f64,
    /// 99 of 100 operations took at most this long.
    pub p99_seconds: f64,
}

/// One sample of a migration's course.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Moment {
    /// Seconds since the command.
    pub at_seconds: f64,
    /// Phase or status, in the engine's own word.
    pub phase: String,
    /// Round that runs, from 1.
    pub round: u64,
    /// Memory that is still to be sent.
    pub remaining_bytes: u64,
    /// What the guest writes.
    pub dirty_bytes_per_second: f64,
    /// IP bytes a second on the link from source to destination, since the sample before.
    pub wire_bytes_per_second: f64,
    /// Bytes that the gateway holds and has not sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backlog_bytes: Option<u64>,
}

/// Where and with what a run was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Setting {
    /// Seconds since the Unix epoch when it began.
    pub started_unix_seconds: u64,
    /// `uname -r`.
    pub kernel: String,
    /// CPUs of the machine.
    pub cpus: u32,
    /// `qemu-system-x86_64 --version`, its number.
    pub qemu: String,
    /// How the guest's CPU ran: `tcg` or `kvm`.
    pub accelerator: String,
    /// Version and commit of longhaul.
    pub longhaul: String,
    /// `netem` or `emulator`.
    pub link_backend: String,
    /// Why the link was not what its profile says; absent where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_fault: Option<String>,
    /// TCP settings of the sites' namespaces: `tcp_congestion_control`, `tcp_rmem`, `tcp_wmem`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub tcp: Map<String, Value>,
    /// RTT of the link's profile, with nothing queued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_rtt_seconds: Option<f64>,
    /// Rate of the link's profile, each direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_rate_bits_per_second: Option<f64>,
    /// Mean share of packets that the link's profile loses, each direction, 0..=1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_loss_fraction: Option<f64>,
}

/// How fast a guest may write so that an engine still gets it across, as a search over its writes found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename = "frontier")]
pub struct Frontier {
    /// As in [`Run::engine`].
    pub engine: String,
    /// As in [`Run::profile`].
    pub profile: String,
    /// As in [`Run::guest`]; only its writes a second were varied.
    pub guest: String,
    /// The most at which it converged; absent where it never did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub converges_pages_per_second: Option<u64>,
    /// The least at which it did not; absent where it always did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fails_pages_per_second: Option<u64>,
    /// Why the search ended where it did, other than by a move that did not converge: a guest that cannot write faster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<String>,
    /// How many runs the search took.
    pub runs: u32,
}

/// Adds to a file of results, which is made where it lacks.
pub(super) fn append(file: &Path, text: &str) -> Result<(), LabError> {
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| LabError::file(file, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frontier() -> Frontier {
        Frontier {
            engine: "longhaul".to_owned(),
            profile: "lossy".to_owned(),
            guest: "busy".to_owned(),
            converges_pages_per_second: Some(16_000),
            fails_pages_per_second: None,
            limit: None,
            runs: 7,
        }
    }

    #[test]
    fn a_frontier_is_told_from_a_run_by_its_kind() {
        let line = serde_json::to_vec(&frontier()).unwrap();
        match Record::parse(&line).unwrap() {
            Record::Frontier(found) => assert_eq!(found, frontier()),
            Record::Run(_) => panic!("{} was read as a run", String::from_utf8_lossy(&line)),
        }
        assert_eq!(serde_json::to_value(frontier()).unwrap()["kind"], "frontier");
    }

    #[test]
    fn a_line_with_no_kind_is_a_run() {
        let run = r#"{"engine":"e","profile":"p","guest":"g","seed":1,"repetition":1,"outcome":"not_finished","usable":true,"dials":{},
            "setting":{"started_unix_seconds":1,"kernel":"k","cpus":2,"qemu":"10","accelerator":"tcg","longhaul":"l","link_backend":"netem"}}"#;
        let named = run.replacen('{', r#"{"kind":"run","#, 1);
        for line in [run, &named] {
            assert!(
                matches!(Record::parse(line.as_bytes()), Ok(Record::Run(run)) if run.setting.link_rtt_seconds.is_none())
            );
        }
    }

    #[test]
    fn a_kind_of_tomorrow_is_refused_by_its_name() {
        let error = Record::parse(br#"{"kind":"weather"}"#).unwrap_err();
        assert!(error.to_string().contains("weather"), "{error}");
    }
}
