//! What the ownership journal says of a migration.

use serde::{Deserialize, Serialize};

use super::message::{AbortReason, Permit, Resolution, Verdict};
use crate::proto::page::{JournalId, MigrationId};

/// Which end of a migration this gateway is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// The VM comes from here.
    Source,
    /// The VM goes here.
    Destination,
}

/// One fact in the journal. It is durable before anything is done because of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JournalRecord {
    /// Which migration.
    pub migration: MigrationId,
    /// Which end of it this gateway is.
    pub role: Role,
    /// What is true from now on.
    pub kind: RecordKind,
    /// The peer's name in the configuration. At most [`JournalRecord::MAX_NAME`] bytes.
    pub peer: String,
    /// The peer's journal when the migration began.
    pub peer_journal: JournalId,
    /// The VM's name. At most [`JournalRecord::MAX_NAME`] bytes; empty where an unknown migration is aborted.
    pub vm: String,
    /// What the edge needs to find its vmm again, for example its QMP socket and process. At most
    /// [`JournalRecord::MAX_CONTEXT`] bytes, which this layer does not read.
    pub context: Vec<u8>,
    /// Milliseconds since the Unix epoch. For people: no rule depends on it.
    pub unix_ms: u64,
}

impl JournalRecord {
    /// Most bytes of `peer` and of `vm`.
    pub const MAX_NAME: usize = 255;
    /// Most bytes of `context`.
    pub const MAX_CONTEXT: usize = 1024;
}

/// What a journal record states.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RecordKind {
    /// Source: a migration of the vmm is about to begin.
    Started {
        /// Whether the guest ran, and so must run again if the migration is undone.
        was_running: bool,
    },
    /// Destination: a vmm is about to be told to load.
    Prepared,
    /// Source: the vCPUs are stopped and stay so.
    Permit(Permit),
    /// Destination: the VM is ours from here on, by this permit. From now on there is no ABORT.
    Commit(Permit),
    /// Destination: our vmm is dead and the VM is not ours. From now on there is no COMMIT.
    Abort(AbortReason),
    /// Destination: the VM runs, or is left paused as it was.
    Running,
    /// Destination: COMMIT is undone. The guest has not run here and the vmm is dead.
    Revert,
    /// Source: what the destination decided.
    Learnt(Verdict),
    /// A person decided.
    Resolved(Resolution),
    /// Nothing is left to be done, and the peer will not ask for what it has not been told.
    Closed(Outcome),
}

/// Where a finished migration has left the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// Where it was, as it was.
    RunsAtSource,
    /// Moved.
    RunsAtDestination,
    /// Its vmm at the source died, and the destination never owned it.
    VmmDied,
}

/// How much of a migration is left to do, by its records at one gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// It must be recovered when the gateway starts.
    Open,
    /// Nothing is to be done, but the peer may still ask and depends on the answer: the records must be kept.
    Owed,
    /// The peer cannot be harmed when the records are gone.
    Finished,
}

impl Standing {
    /// The standing of one migration in one role, from the kinds of all its records in order.
    ///
    /// An ABORT is finished at once, since an unknown migration is answered with ABORT too. RUNNING and REVERT are owed until the
    /// source says that it has recorded them. What a person decided is kept for ever: the other side may come back in any state.
    #[must_use]
    pub fn of<'a>(kinds: impl Iterator<Item = &'a RecordKind>) -> Self {
        let mut standing = Self::Open;
        let mut resolved = false;
        for kind in kinds {
            match kind {
                RecordKind::Closed(_) | RecordKind::Abort(_) => standing = Self::Finished,
                RecordKind::Running | RecordKind::Revert => standing = Self::Owed,
                RecordKind::Resolved(_) => (standing, resolved) = (Self::Open, true),
                RecordKind::Started { .. }
                | RecordKind::Prepared
                | RecordKind::Permit(_)
                | RecordKind::Commit(_)
                | RecordKind::Learnt(_) => {}
            }
        }
        if resolved && standing == Self::Finished {
            Self::Owed
        } else {
            standing
        }
    }
}
