//! What travels over the control socket about moving a disk within a site, with the promises of [`types`](super::types).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Moves a disk of a VM to another image at this site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveDiskRequest {
    /// Name of the VM.
    pub vm: String,
    /// The disk: the id of its drive, or of its device.
    pub disk: String,
    /// Absolute path of the new image, or of a directory that is there.
    pub to: PathBuf,
    /// Format of the new image; `None`: as it is.
    #[serde(default)]
    pub format: Option<String>,
    /// QEMU's `preallocation` of the new image.
    #[serde(default)]
    pub preallocation: Option<String>,
    /// Most that is copied.
    #[serde(default)]
    pub rate_bytes_per_second: Option<u64>,
    /// The present image, absolute, of a VM that does not run; `None`: that of its `[[vm.image]]`.
    #[serde(default)]
    pub from: Option<PathBuf>,
    /// Format of `from`.
    #[serde(default)]
    pub from_format: Option<String>,
    /// The old image is removed once the disk is moved.
    #[serde(default)]
    pub remove_old: bool,
}

/// Which move is meant: at most one of a VM is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskOfVm {
    /// Name of the VM.
    pub vm: String,
    /// The disk.
    pub disk: String,
}

/// What will be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveDiskPlan {
    /// Name of the VM.
    pub vm: String,
    /// The disk.
    pub disk: String,
    /// The VM runs here, and goes on meanwhile.
    pub live: bool,
    /// The present image; `None` where QEMU has no name for it.
    pub from: Option<PathBuf>,
    /// Its format.
    pub from_format: String,
    /// The new image.
    pub to: PathBuf,
    /// Its format.
    pub format: String,
    /// What the guest sees of the disk.
    pub size_bytes: u64,
    /// What the present image takes.
    pub allocated_bytes: u64,
    /// What is free where the new one will be.
    pub room_bytes: u64,
    /// What does not come along, in sentences.
    pub notes: Vec<String>,
}

/// One line of the stream that follows a move: `{"progress": {…}}`, `{"notice": "…"}`, and as the last `{"report": {…}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveDiskEvent {
    /// A look at it, a few each second.
    Progress(MoveDiskProgress),
    /// A sentence that the operator should read.
    Notice(String),
    /// It has ended.
    Report(Box<MoveDiskReport>),
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveDiskProgress {
    /// What is done.
    pub phase: MoveDiskPhase,
    /// Bytes of the disk, as the guest sees it, that are done in this phase.
    pub done_bytes: u64,
    /// All of them. What the guest writes may add to it.
    pub total_bytes: u64,
    /// Since it began.
    pub elapsed_seconds: f64,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveDiskPhase {
    /// The new image is made.
    Making,
    /// It is filled.
    Copying,
    /// The guest turns to it.
    Turning,
    /// It is compared with the old one.
    Comparing,
    /// What was made is taken away again.
    Undoing,
}

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveDiskOutcome {
    /// The disk is the new image.
    Moved,
    /// The disk is the old image, and nothing is left of the new one.
    Failed,
    /// The same, because somebody wanted it.
    Cancelled,
    /// Which of the two is the disk cannot be told: a person has to look.
    Unknown,
}

/// What came of a move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveDiskReport {
    /// How it ended.
    pub outcome: MoveDiskOutcome,
    /// What was to be done.
    #[serde(flatten)]
    pub plan: MoveDiskPlan,
    /// In a sentence, where it was not moved: why.
    pub reason: Option<String>,
    /// From the request to the end.
    pub total_seconds: f64,
    /// What the new image takes.
    pub new_bytes: Option<u64>,
    /// The old image is gone.
    pub old_removed: bool,
    /// What a person has to do now, in sentences.
    pub todo: Vec<String>,
}
