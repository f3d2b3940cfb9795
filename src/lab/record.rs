//! What one run of the lab found: a line of JSON, kept raw, from which every table and picture of a report is drawn.
//!
//! Names are stable and new ones are added at will; the unit ends the name. What was not measured is absent, never zero. The words
//! are defined in `docs/lab.md`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::guest::GuestDials;

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
    /// Longest share of a second that a process of the engine waited for a CPU (run delay of `/proc/PID/schedstat`), 0..=1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_delay_share: Option<f64>,
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
}
