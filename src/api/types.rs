//! What travels over the control socket, as JSON. These names are stable; fields are added, never renamed. Durations
//! and times are seconds as numbers, amounts are bytes, rates are bytes per second; the unit ends the name.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::proto::page::{MigrationId, hex, unhex};
use crate::proto::reduce::PageCounts;
use crate::proto::wire::message::DiskPlace;
use crate::store::trust::{Fingerprint, PairedBy};

/// Starts a migration, or asks what it would do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// Name of the VM in the configuration.
    pub vm: String,
    /// Name of the peer.
    pub peer: String,
    /// Longest downtime that is accepted; `None`: as configured.
    #[serde(default)]
    pub downtime_limit_seconds: Option<f64>,
    /// Cap of this migration; `None`: as configured.
    #[serde(default)]
    pub rate_bytes_per_second: Option<u64>,
    /// Longest time until switchover; `None`: as configured.
    #[serde(default)]
    pub deadline_seconds: Option<f64>,
    /// Share beside other migrations to the same peer; `None`: 1.
    #[serde(default)]
    pub weight: Option<NonZeroU32>,
    /// Disks are copied, and what the guest writes to them, until it is told to go on; `None`: it goes on by itself.
    #[serde(default)]
    pub warm: Option<Warm>,
    /// The VM is off, and its images move.
    #[serde(default)]
    pub cold: bool,
    /// Most bytes of disks that are read in a second; `None`: as many as the link takes.
    #[serde(default)]
    pub disk_rate_bytes_per_second: Option<u64>,
    /// Where disks are put that do not go where the destination's configuration says.
    #[serde(default)]
    pub disk_places: Vec<DiskPlace>,
}

/// When a migration goes on whose disks are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// At this time, in milliseconds since the Unix epoch; `None`: when it is told to.
    #[serde(default)]
    pub until_unix_ms: Option<u64>,
}

/// A migration was told to go on to its switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Switchover {
    /// It goes on now, or as soon as its disks have been read once.
    Ordered,
    /// It was told before, or its time has come.
    AlreadyOrdered,
}

/// Changes what a migration that runs may take of its link. What is not said stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adjustment {
    /// Its cap.
    #[serde(default)]
    pub rate: Option<NewRate>,
    /// Share beside other migrations to the same peer.
    #[serde(default)]
    pub weight: Option<NonZeroU32>,
}

/// A cap from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewRate {
    /// That of the link alone.
    Unlimited,
    /// This one.
    BytesPerSecond(u64),
}

/// What a migration may take of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Its cap; `None`: that of the link.
    pub rate_bytes_per_second: Option<u64>,
    /// Its share beside other migrations to the same peer.
    pub weight: NonZeroU32,
}

/// A migration was accepted and runs in the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Its name, for `status`, `attach` and `cancel`.
    #[serde(with = "id_text")]
    pub migration: MigrationId,
}

/// Answer to a dry run: every check and what the migration would cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DryRun {
    /// Name of the VM.
    pub vm: String,
    /// Name of the peer.
    pub peer: String,
    /// Every check, in the order in which they were made.
    pub checks: Vec<Check>,
    /// `None` where a check failed before the VM could be sampled.
    pub forecast: Option<Forecast>,
}

impl DryRun {
    /// Whether the migration would start and is expected to converge.
    #[must_use]
    pub fn is_yes(&self) -> bool {
        self.checks.iter().all(|check| check.ok) && self.forecast.as_ref().is_none_or(|forecast| forecast.converges)
    }
}

/// One thing that was looked at before anything moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at: `peer`, `machine type`, `disks`.
    pub name: String,
    /// Whether the migration may go ahead as far as this is concerned.
    pub ok: bool,
    /// What was found; where it is not ok, what to do.
    pub detail: String,
}

impl Check {
    /// What was found, or what speaks against it.
    #[must_use]
    pub fn of(name: &str, result: Result<String, String>) -> Self {
        Self {
            name: name.to_owned(),
            ok: result.is_ok(),
            detail: result.unwrap_or_else(|reason| reason),
        }
    }
}

/// What a migration is expected to cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// From start to running at the destination.
    pub total_seconds: f64,
    /// Bytes of frames: after reduction, without headers and repairs.
    pub wire_bytes: u64,
    /// From the pause at the source to the resume at the destination.
    pub downtime_seconds: f64,
    /// Dirty rate that was sampled; 0 where it could not be.
    pub dirty_bytes_per_second: f64,
    /// Whether the hypervisor could sample it. Where not, the forecast is that of a guest that writes nothing.
    pub dirty_rate_known: bool,
    /// Whether the rounds get small enough to keep the downtime limit.
    pub converges: bool,
    /// Why it does or does not, with what would help.
    pub reason: String,
}

/// Where a migration stands, in the order in which it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Pre-checks at both sites.
    Checking,
    /// Both hypervisors are set up.
    Preparing,
    /// Disks that are copied with the VM are read for the first time, while it runs at the source.
    Disks,
    /// Rounds, while the VM runs at the source.
    Precopy,
    /// The VM is being paused at the source.
    Switchover,
    /// The rest is sent while no vCPU runs.
    StopAndCopy,
    /// Permit is given; the destination decides.
    Committing,
    /// The VM runs at the destination; the source is tidied up.
    Finishing,
    /// There is a report.
    Done,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 9] = [
        Self::Checking,
        Self::Preparing,
        Self::Disks,
        Self::Precopy,
        Self::Switchover,
        Self::StopAndCopy,
        Self::Committing,
        Self::Finishing,
        Self::Done,
    ];

    /// Its word in JSON, metrics and progress lines.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Checking => "checking",
            Self::Preparing => "preparing",
            Self::Disks => "disks",
            Self::Precopy => "precopy",
            Self::Switchover => "switchover",
            Self::StopAndCopy => "stop_and_copy",
            Self::Committing => "committing",
            Self::Finishing => "finishing",
            Self::Done => "done",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// One look at a running migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Which migration.
    #[serde(with = "id_text")]
    pub migration: MigrationId,
    /// Name of the VM.
    pub vm: String,
    /// Name of the peer.
    pub peer: String,
    /// Where it stands.
    pub phase: Phase,
    /// Number of the round, from 1; 0 before the first.
    pub round: u32,
    /// Share of the work that is done, 0 to 100. What is shown never runs backwards, whatever comes.
    pub percent: f64,
    /// Since the start.
    pub elapsed_seconds: f64,
    /// Bytes on the wire per second, lately.
    pub wire_bytes_per_second: f64,
    /// Bytes in / bytes out so far, >= 1.
    pub reduction_ratio: f64,
    /// What the guest dirties per second, lately.
    pub dirty_bytes_per_second: f64,
    /// What is still to be sent in this round.
    pub remaining_bytes: u64,
    /// What the gateway holds and has not sent yet.
    #[serde(default)]
    pub backlog_bytes: u64,
    /// Downtime if the VM were paused now.
    pub expected_downtime_seconds: f64,
    /// Until the VM runs at the destination; `None` while it is unknown or the migration is not converging.
    pub eta_seconds: Option<f64>,
    /// Why the ETA grew, or why there is none; `None` where there is nothing to explain.
    pub eta_reason: Option<String>,
    /// Whether the rounds get smaller.
    pub converging: bool,
}

/// One pass over the dirty set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// From 1.
    pub number: u32,
    /// How long it took.
    pub seconds: f64,
    /// Bytes that the hypervisor gave.
    pub vmm_bytes: u64,
    /// Bytes of frames: after reduction, without headers and repairs.
    pub wire_bytes: u64,
    /// What the guest dirtied meanwhile, and the next round begins with; of the last round: what was left at the last look.
    pub dirty_bytes: u64,
}

/// Pages by how they were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// All zeroes.
    pub zero: u64,
    /// Identical to what was sent for this address before.
    pub same: u64,
    /// Named, since the destination holds the content.
    pub reference: u64,
    /// As a difference from the previous version.
    pub delta: u64,
    /// Carried, compressed in a group.
    pub literal: u64,
    /// Carried as they are.
    pub raw: u64,
}

impl From<PageCounts> for Pages {
    fn from(counts: PageCounts) -> Self {
        let PageCounts {
            zero,
            same,
            reference,
            delta,
            literal,
            raw,
        } = counts;
        Self {
            zero,
            same,
            reference,
            delta,
            literal,
            raw,
        }
    }
}

/// What was copied of the disks of a VM, all of them together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskFigures {
    /// What the images took at the source when it began.
    pub allocated_bytes: u64,
    /// Read in all rounds.
    pub read_bytes: u64,
    /// Zeroes, which are not sent.
    pub zero_bytes: u64,
    /// Read, and not sent since the destination had them.
    #[serde(default)]
    pub same_bytes: u64,
    /// Bytes of frames that this took.
    pub wire_bytes: u64,
    /// Rounds, the first one over everything.
    pub rounds: u32,
    /// Read in the last round; where the guest wrote nothing before it was stopped, in the one before.
    pub last_round_bytes: u64,
    /// Reads waited so long, for the rate that was asked for and for the guest.
    #[serde(default)]
    pub held_back_seconds: f64,
    /// A request of the guest to these disks took so long on average while everything was read; `None` where it had too few.
    #[serde(default)]
    pub guest_io_seconds: Option<f64>,
    /// The same requests would have taken so long before.
    #[serde(default)]
    pub guest_io_usual_seconds: Option<f64>,
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The VM is at the destination.
    Completed,
    /// It failed; the VM is at the source.
    Failed,
    /// It was cancelled; the VM is at the source.
    Cancelled,
    /// A check refused it; nothing was touched.
    Refused,
    /// Where the VM may run is not known; it is paused until a person decides.
    InDoubt,
    /// The hypervisor at the source died before the destination owned the VM: it runs nowhere until a person starts it.
    VmDied,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 6] = [
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
        Self::Refused,
        Self::InDoubt,
        Self::VmDied,
    ];

    /// Its word in JSON, metrics and reports.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::InDoubt => "in_doubt",
            Self::VmDied => "vm_died",
        }
    }

    /// Where the VM is after it.
    #[must_use]
    pub const fn vm_is(self) -> Where {
        match self {
            Self::Completed => Where::Destination,
            Self::Failed | Self::Cancelled => Where::Source,
            Self::Refused => Where::Untouched,
            Self::InDoubt | Self::VmDied => Where::Unknown,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// Where the VM is, which is what the exit code of `migrate` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Where {
    /// At the destination, as it was before: running, or paused if it had been paused.
    Destination,
    /// At the source, as it was before.
    Source,
    /// Where it was; nothing was touched.
    Untouched,
    /// Unknown, paused or nowhere; a person has to decide.
    Unknown,
}

impl Where {
    /// Exit code that says this.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Destination => 0,
            Self::Source => 1,
            Self::Untouched => 2,
            Self::Unknown => 3,
        }
    }
}

/// What remains of a migration when it has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Which migration.
    #[serde(with = "id_text")]
    pub migration: MigrationId,
    /// Name of the VM.
    pub vm: String,
    /// Name of the peer.
    pub peer: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it ended so, one sentence; for `in_doubt` also what to do.
    pub reason: String,
    /// From start to end.
    pub total_seconds: f64,
    /// From the pause at the source to the resume at the destination; `None` where the VM was never paused.
    pub downtime_seconds: Option<f64>,
    /// Every round, in order.
    pub rounds: Vec<Round>,
    /// Bytes that the source hypervisor gave.
    pub vmm_bytes: u64,
    /// IP bytes on the link to the peer meanwhile, in both directions, repairs included. Migrations to one peer at the same
    /// time share its link, and each counts all of it.
    pub wire_bytes: u64,
    /// Bytes of frames that were sent a second time, after the path had been cut.
    #[serde(default)]
    pub resent_bytes: u64,
    /// `vmm_bytes` / bytes of frames, >= 1.
    pub reduction_ratio: f64,
    /// Pages by how they were sent, also where it did not arrive.
    pub pages: Pages,
    /// Pages that an earlier migration had left at both sites, or blocks of a disk that both were given, which this one began with.
    #[serde(default)]
    pub known_pages: u64,
    /// What was copied of disks; `None` where none were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<DiskFigures>,
    /// BLAKE3 of the vmm stream, hexadecimal, equal at both ends; `None` where it did not end.
    pub stream_digest: Option<String>,
    /// What was expected at the start; `None` where it ended before.
    pub forecast: Option<Forecast>,
    /// A gateway was restarted and has undone this migration: the one that was begun in its place.
    #[serde(default, with = "optional_id_text", skip_serializing_if = "Option::is_none")]
    pub continued_as: Option<MigrationId>,
}

impl Report {
    /// Of a migration that carried nothing, or whose figures are not known here.
    #[must_use]
    pub fn without_figures(
        migration: MigrationId,
        vm: &str,
        peer: &str,
        outcome: Outcome,
        reason: impl Into<String>,
    ) -> Self {
        Self {
            migration,
            vm: vm.to_owned(),
            peer: peer.to_owned(),
            outcome,
            reason: reason.into(),
            total_seconds: 0.0,
            downtime_seconds: None,
            rounds: Vec::new(),
            vmm_bytes: 0,
            wire_bytes: 0,
            resent_bytes: 0,
            reduction_ratio: 1.0,
            pages: Pages::default(),
            known_pages: 0,
            disks: None,
            stream_digest: None,
            forecast: None,
            continued_as: None,
        }
    }
}

/// One line of the stream that follows a migration: `{"progress": {…}}`, `{"notice": "…"}`, and as the last `{"report":
/// {…}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A look at it, a few each second.
    Progress(Progress),
    /// A sentence that the operator should read, such as that the downtime limit cannot be kept.
    Notice(String),
    /// It has ended.
    Report(Box<Report>),
}

/// One migration in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationSummary {
    /// Which migration.
    #[serde(with = "id_text")]
    pub migration: MigrationId,
    /// Name of the VM.
    pub vm: String,
    /// Name of the peer.
    pub peer: String,
    /// Which end this gateway is.
    pub role: Role,
    /// Where it stands.
    pub phase: Phase,
    /// `None` while it runs.
    pub outcome: Option<Outcome>,
    /// 0 to 100.
    pub percent: f64,
    /// Since the start, or from start to end.
    pub elapsed_seconds: f64,
}

/// Everything that is known of one migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// As in the list.
    pub summary: MigrationSummary,
    /// The last look at it, while it runs.
    pub progress: Option<Progress>,
    /// When it has ended.
    pub report: Option<Report>,
    /// What a person has to do, where it is in doubt.
    pub advice: Option<String>,
    /// The newest sentences that the operator should read, the last one at the end.
    #[serde(default)]
    pub notices: Vec<String>,
}

/// Which end of a migration a gateway is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The VM leaves here.
    Source,
    /// The VM arrives here.
    Destination,
}

impl Role {
    /// Its word in JSON, metrics and lists.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// Answer to a cancellation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cancellation {
    /// It is being cancelled from now on.
    Requested,
    /// It was being cancelled already.
    AlreadyRequested,
}

/// What a person states about a migration that is in doubt. The gateway believes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statement {
    /// No copy runs at the peer, and none can start there: the VM may run here.
    PeerIsFenced,
    /// The VM runs at the peer: the copy here is given up.
    RunsAtPeer,
    /// The copy here is dead for good, with whatever it did since the commit: the peer may run its own.
    LostHere,
}

/// Resolves the migration of a VM that is in doubt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// Name of the VM.
    pub vm: String,
    /// What the person states.
    pub statement: Statement,
}

/// What a resolution did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolution {
    /// Which migration it ended.
    #[serde(with = "id_text")]
    pub migration: MigrationId,
    /// Where the VM is now, one sentence.
    pub result: String,
}

/// What is known of a peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its site's name.
    pub name: String,
    /// Where it is called; `None` where neither pairing nor configuration said.
    pub address: Option<String>,
    /// Whether it may do anything.
    pub trust: Trust,
    /// Whether there is a control connection at this moment.
    pub connected: bool,
    /// Smoothed RTT of the control connection.
    pub rtt_seconds: Option<f64>,
    /// Cap on what is sent to it that holds now, by configuration and calendar.
    pub rate_bytes_per_second: Option<u64>,
    /// Of its public key, where it is paired.
    pub fingerprint: Option<Fingerprint>,
}

/// Whether a peer may do anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Paired: it may offer and receive VMs.
    Paired,
    /// Configured, but not paired: it is refused.
    Unpaired,
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Paired => "paired",
            Self::Unpaired => "not paired",
        })
    }
}

/// Asks for an invitation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    /// Where the other site reaches this gateway; `None`: as configured.
    #[serde(default)]
    pub address: Option<String>,
    /// How long the code can be used; `None`: ten minutes.
    #[serde(default)]
    pub valid_for_seconds: Option<f64>,
}

/// A code for the other site, to be used once.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Invitation {
    /// One line. Whoever has it may pair: it is a secret until it is used or has expired.
    pub code: String,
    /// How long it can be used.
    pub valid_for_seconds: f64,
}

/// Leaves the code out, since what is debugged is logged.
impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invitation")
            .field("valid_for_seconds", &self.valid_for_seconds)
            .finish_non_exhaustive()
    }
}

/// Uses a code from the other site.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcceptInvite {
    /// The line that `pair --invite` printed there.
    pub code: String,
}

/// Leaves the code out, since what is debugged is logged.
impl fmt::Debug for AcceptInvite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcceptInvite").finish_non_exhaustive()
    }
}

/// Trusts a peer whose fingerprint a person has compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairByFingerprint {
    /// Its site's name.
    pub peer: String,
    /// Of its public key.
    pub fingerprint: Fingerprint,
    /// Where it is called.
    pub address: String,
}

/// A peer that is trusted from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paired {
    /// Its site's name.
    pub peer: String,
    /// Of its public key.
    pub fingerprint: Fingerprint,
    /// Where it is called, if that is known.
    pub address: Option<String>,
    /// How trust was made.
    pub by: PairedBy,
}

/// Who this gateway is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of its site.
    pub site: String,
    /// Of its public key.
    pub fingerprint: Fingerprint,
    /// Where others reach it, if that is configured.
    pub address: Option<String>,
    /// Version of the program.
    pub version: String,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind of reason.
    pub kind: RefusalKind,
    /// One sentence: what happened, to whom, what to do.
    pub message: String,
}

impl Refusal {
    /// A refusal of that kind with that sentence.
    #[must_use]
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }
}

/// What kind of reason a refusal has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The request itself is wrong.
    Invalid,
    /// There is no such VM, peer or migration.
    NotFound,
    /// It does not fit to what is going on, such as a second migration of a VM.
    Conflict,
    /// A check refused it, such as a peer that is not paired.
    Refused,
    /// The gateway is draining, or the peer cannot be reached.
    Unavailable,
    /// Something broke in the gateway.
    Internal,
}

/// Ids as 32 hexadecimal digits.
pub mod id_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use super::{MigrationId, hex, unhex};

    /// Writes the digits.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(id: &MigrationId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(&id.0))
    }

    /// Reads the digits.
    ///
    /// # Errors
    /// Where the text is no id.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MigrationId, D::Error> {
        let text = String::deserialize(deserializer)?;
        unhex(&text).map(MigrationId).map_err(D::Error::custom)
    }
}

/// The same where there may be none.
mod optional_id_text {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{MigrationId, id_text};

    #[derive(Serialize, Deserialize)]
    struct Id(#[serde(with = "id_text")] MigrationId);

    pub(super) fn serialize<S: Serializer>(id: &Option<MigrationId>, serializer: S) -> Result<S::Ok, S::Error> {
        id.map(Id).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<MigrationId>, D::Error> {
        Ok(Option::<Id>::deserialize(deserializer)?.map(|Id(id)| id))
    }
}
