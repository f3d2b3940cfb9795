//! The source's machine: gathers what PERMIT needs, and after PERMIT waits for the destination's verdict, whatever happens.

mod recovery;
mod table;

use super::effect::{Effect, IllegalStep};
use super::message::{Doubt, Message, Permit, Resolution, StreamSum, Verdict};
use super::record::Outcome;
use crate::proto::page::JournalId;

/// One migration as its source sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    terms: SourceTerms,
    state: SourceState,
}

/// What does not change during a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceTerms {
    /// Whether the guest ran when the migration began.
    pub was_running: bool,
    /// The destination's journal when the migration began.
    pub destination_journal: JournalId,
}

/// Where the source is in a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Nothing has begun, or everything is over and forgotten.
    Idle,
    /// `Started` is being recorded. `doomed`: how the migration will be closed instead of begun.
    Starting {
        /// Set by what came in meanwhile.
        doomed: Option<Outcome>,
    },
    /// The vmm migrates. The source may end this at will.
    Copying(Evidence),
    /// Everything is sent, and the vmm is being frozen.
    Freezing(StreamSum),
    /// `Permit` is being recorded.
    Permitting {
        /// What is being recorded.
        permit: Permit,
        /// The guest was seen running since: the permit must not be sent.
        loose: bool,
    },
    /// The permit is, or may be, on disk but was never sent by this process: the destination is asked for ABORT.
    Withheld,
    /// The permit is out. Only a verdict, or a person, leads on.
    Permitted {
        /// What was recorded.
        permit: Permit,
        /// Whether missing bytes can be sent again.
        bytes: Bytes,
        /// What a person was told, if something is wrong.
        doubt: Option<Doubt>,
    },
    /// The verdict is being recorded.
    Learning {
        /// As in `Permitted`.
        permit: Permit,
        /// As in `Permitted`.
        bytes: Bytes,
        /// What the destination decided.
        verdict: Verdict,
    },
    /// A person's decision is being recorded.
    Resolving {
        /// As in `Permitted`.
        permit: Permit,
        /// As in `Permitted`.
        bytes: Bytes,
        /// The decision.
        resolution: Resolution,
    },
    /// The guest is being continued here.
    Resuming {
        /// The decision that led here, if it was a person's.
        resolution: Option<Resolution>,
    },
    /// The VM is ours, and its vmm does not continue it.
    Stranded {
        /// The decision that led here, if it was a person's.
        resolution: Option<Resolution>,
    },
    /// The VM is the destination's, and our vmm is being ended.
    Discarding {
        /// The decision that led here, if it was a person's.
        resolution: Option<Resolution>,
    },
    /// `Closed` is being recorded.
    Closing {
        /// Where the VM is.
        outcome: Outcome,
        /// The decision that led here, if it was a person's.
        resolution: Option<Resolution>,
    },
    /// Over.
    Closed {
        /// Where the VM is.
        outcome: Outcome,
        /// The decision that led here, if it was a person's.
        resolution: Option<Resolution>,
    },
}

/// What PERMIT needs of the vmm, in whatever order it is seen. EOF alone proves nothing: it also follows failure and cancel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Evidence {
    /// The stream has ended (EOF), and this is what it was.
    pub stream: Option<StreamSum>,
    /// `query-migrate` says completed.
    pub completed: bool,
    /// `query-status` says postmigrate.
    pub postmigrate: bool,
}

/// Whether the source gateway still holds what the destination has not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bytes {
    /// Yes.
    Held,
    /// No: it was restarted.
    Lost,
}

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The operator wants the migration and every pre-check has passed.
    Begin,
    /// The record asked for is durable.
    Recorded,
    /// The record asked for may or may not be durable.
    JournalFailed,
    /// EOF on the vmm's socket.
    StreamEnded(StreamSum),
    /// The vmm reports the migration completed.
    MigrateCompleted,
    /// The vmm reports its run state postmigrate.
    PostMigrate,
    /// The vmm reports the migration failed or cancelled, or cannot be told to migrate.
    MigrateFailed,
    /// The process is stopped, and no RESUME was seen.
    Frozen,
    /// The process could not be stopped, or a RESUME was seen.
    FreezeFailed,
    /// The guest runs again.
    Resumed,
    /// The vmm refuses to continue the guest.
    ResumeFailed,
    /// The vmm was ended, or is left paused because the configuration says so.
    Discarded,
    /// The vmm's process is gone, for sure.
    VmmDead,
    /// The guest was seen running.
    VmmRunning,
    /// The vmm was seen, its guest paused.
    VmmPaused,
    /// The operator, or the policy, gives up.
    Cancel,
    /// There is contact with the peer, again or still. Comes before any message of a new connection.
    Contact {
        /// The peer's journal as its hello says.
        journal: JournalId,
    },
    /// The peer says something.
    Received(Message),
    /// A person decides.
    Resolve(Resolution),
}

impl Source {
    /// A migration about to begin.
    #[must_use]
    pub fn new(terms: SourceTerms) -> Self {
        Self {
            terms,
            state: SourceState::Idle,
        }
    }

    /// Takes in one event.
    ///
    /// # Errors
    /// The rules do not have this step, and nothing has changed.
    pub fn handle(&mut self, event: &SourceEvent) -> Result<Vec<Effect>, IllegalStep> {
        let (state, effects) = self.state.step(&self.terms, event)?;
        self.state = state;
        Ok(effects)
    }

    /// Where the migration is.
    #[must_use]
    pub fn state(&self) -> &SourceState {
        &self.state
    }

    /// What does not change.
    #[must_use]
    pub fn terms(&self) -> &SourceTerms {
        &self.terms
    }

    /// Where the VM is, once the migration is over.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        match self.state {
            SourceState::Closed { outcome, .. } => Some(outcome),
            _ => None,
        }
    }
}

impl SourceState {
    /// Name of the state, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Starting { .. } => "starting",
            Self::Copying(_) => "copying",
            Self::Freezing(_) => "freezing",
            Self::Permitting { .. } => "permitting",
            Self::Withheld => "withheld",
            Self::Permitted { .. } => "permitted",
            Self::Learning { .. } => "learning",
            Self::Resolving { .. } => "resolving",
            Self::Resuming { .. } => "resuming",
            Self::Stranded { .. } => "stranded",
            Self::Discarding { .. } => "discarding",
            Self::Closing { .. } => "closing",
            Self::Closed { .. } => "closed",
        }
    }
}

impl SourceEvent {
    /// Name of the event, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Begin => "Begin",
            Self::Recorded => "Recorded",
            Self::JournalFailed => "JournalFailed",
            Self::StreamEnded(_) => "StreamEnded",
            Self::MigrateCompleted => "MigrateCompleted",
            Self::PostMigrate => "PostMigrate",
            Self::MigrateFailed => "MigrateFailed",
            Self::Frozen => "Frozen",
            Self::FreezeFailed => "FreezeFailed",
            Self::Resumed => "Resumed",
            Self::ResumeFailed => "ResumeFailed",
            Self::Discarded => "Discarded",
            Self::VmmDead => "VmmDead",
            Self::VmmRunning => "VmmRunning",
            Self::VmmPaused => "VmmPaused",
            Self::Cancel => "Cancel",
            Self::Contact { .. } => "Contact",
            Self::Received(message) => message.name(),
            Self::Resolve(_) => "Resolve",
        }
    }
}
