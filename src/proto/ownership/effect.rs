//! What a machine asks of the edge around it, and how it refuses a step.

use super::message::{Doubt, Message};
use super::record::RecordKind;

/// One thing that the edge does for a machine. Effects are performed one after the other in the order in which the machine gave
/// them; events that come in meanwhile are handled at once, and what they ask for queues up behind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Append to the journal. Answered by `Recorded` once it is durable, or by `JournalFailed`, which means that nobody knows
    /// whether it is; it is never tried again. Always the last effect of a step, and never is a second one asked for before the
    /// first is answered.
    Record(RecordKind),
    /// Tell the peer, if there is contact. A message may be lost.
    Send(Message),
    /// Find contact with the peer and report it by `Contact`, then and at every later reconnection, and again every few seconds
    /// while the machine waits.
    AskPeer,
    /// A person must decide or repair something. Shown until the migration goes on.
    NeedsPerson(Doubt),

    /// Source: tell the vmm to migrate. Answered by the vmm's events.
    StartMigrate,
    /// Source: tell the vmm to stop migrating. No harm where it does not migrate.
    CancelMigrate,
    /// Source: stop the vmm's process (SIGSTOP), drain its QMP and see that no RESUME came. Answered by `Frozen`, `FreezeFailed`
    /// or `VmmDead`.
    FreezeVmm,
    /// Source: let the vmm's process go on (SIGCONT). Its guest stays paused. No harm where it was not stopped.
    ThawVmm,
    /// Source: let the guest run (`cont`, no harm where it runs). Answered by `Resumed`, `ResumeFailed` or `VmmDead`.
    Resume,
    /// Source: the VM is gone from here: let the vmm's process go on and end it. Answered by `Discarded` or `VmmDead`.
    QuitVmm,

    /// Destination: start the vmm, or tell it to load. Answered by `Loaded`, `LoadFailed` or `VmmDead` in the end.
    LoadVmm,
    /// Destination: give the vmm the bytes held back, to the EOF byte and beyond.
    ReleaseHeldTail,
    /// Destination: let the guest run (`cont`, no harm where it runs). Answered by `Continued` if the vmm said yes, by
    /// `ContinueFailed` if and only if the vmm said no; if it said nothing, by `VmmRunning`, `VmmPaused` or `VmmDead`.
    ContinueVmm,
    /// Destination: end the vmm. Answered by `VmmDead` when its process is seen to be gone, however long that takes.
    KillVmm,
}

/// What the edge can see of a vmm when the gateway is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VmmFact {
    /// The guest runs.
    Running,
    /// The process exists, the guest does not run. At the destination: and is loaded.
    Paused,
    /// The process is gone, for sure.
    Dead,
    /// Cannot be told yet. The edge goes on looking and reports what it finds.
    Unreachable,
}

/// A step that the rules do not have: a mistake of the edge or of the peer. The machine is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event} is not possible for the {role} of a migration that is {state}")]
pub struct IllegalStep {
    /// "source" or "destination".
    pub role: &'static str,
    /// Name of the state.
    pub state: &'static str,
    /// Name of the event.
    pub event: &'static str,
}

/// The records of a migration are not such as this machine writes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the journal of this migration says {found} after {after}, which no {role} writes; do not edit a journal, and resolve this migration by hand"
)]
pub struct ImpossibleRecords {
    /// "source" or "destination".
    pub role: &'static str,
    /// The record that cannot follow.
    pub found: String,
    /// The record before it, or "nothing".
    pub after: String,
}
