//! The destination's machine: decides COMMIT or ABORT, exactly one, and never runs a guest without a recorded COMMIT.

mod recovery;
mod table;

use super::effect::{Effect, IllegalStep};
use super::message::{AbortReason, Claim, Doubt, Message, Permit, Resolution, StreamSum, Verdict};
use crate::proto::page::JournalId;

/// One migration as its destination sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    terms: DestinationTerms,
    state: DestinationState,
}

/// What does not change during a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DestinationTerms {
    /// This gateway's journal.
    pub own_journal: JournalId,
    /// The source's journal when the migration began.
    pub source_journal: JournalId,
    /// How many disks must report that they are flushed before COMMIT.
    pub barriers: u32,
}

/// Where the destination is in a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationState {
    /// Nothing is known of it.
    New,
    /// `Prepared` is being recorded; no vmm has been touched. `abort`: what came in meanwhile.
    Preparing {
        /// Why the migration will be aborted instead of begun.
        abort: Option<AbortReason>,
    },
    /// The vmm loads what arrives; the tail is held back.
    Receiving {
        /// What arrived, once all has.
        stream: Option<StreamSum>,
        /// What the source permitted, once it has.
        permit: Option<Permit>,
        /// Disks that are not flushed yet.
        barriers: u32,
    },
    /// The vmm was given the whole stream.
    Loading {
        /// What the source permitted.
        permit: Permit,
        /// Disks that are not flushed yet.
        barriers: u32,
        /// Whether the vmm has said that it is loaded.
        loaded: bool,
    },
    /// `Commit` is being recorded.
    Committing {
        /// What the source permitted.
        permit: Permit,
        /// What follows.
        fate: Fate,
    },
    /// COMMIT was found after a restart; what the vmm does is not known yet.
    Recovering {
        /// What the source permitted.
        permit: Permit,
    },
    /// `cont` was asked for.
    Continuing {
        /// What the source permitted.
        permit: Permit,
        /// Whether this is the only `cont` ever: if the vmm refuses it, the guest has not run.
        first: bool,
    },
    /// The guest has not run and cannot be made to; the vmm is being ended.
    Reverting {
        /// What the source permitted.
        permit: Permit,
    },
    /// `Revert` is being recorded.
    RecordingRevert {
        /// What the source permitted.
        permit: Permit,
    },
    /// `Running` is being recorded.
    RecordingRunning {
        /// What the source permitted.
        permit: Permit,
    },
    /// The vmm is being ended; not aborted before it is dead.
    Killing(AbortReason),
    /// `Abort` is being recorded.
    RecordingAbort(AbortReason),
    /// Decided. The source may not know yet.
    Decided(Verdict),
    /// The source knows, and that is being recorded.
    Settling(Verdict),
    /// The source knows; this may be forgotten.
    Settled(Verdict),
    /// Only a person leads on.
    Stuck {
        /// What the source permitted.
        permit: Permit,
        /// Why.
        doubt: Doubt,
    },
    /// A person's decision is being recorded.
    Resolving {
        /// What the source permitted.
        permit: Permit,
        /// Why a person was needed.
        doubt: Doubt,
        /// What the person states.
        claim: Claim,
    },
    /// A person gave the VM back; the vmm is being ended.
    Yielding,
    /// A record may or may not be on disk. Only a restart, which reads the journal, leads on.
    JournalLost,
}

/// What follows once COMMIT is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// The guest is continued.
    Continue,
    /// The vmm has died meanwhile, before any `cont`.
    Dead,
    /// A person has given the VM to the source meanwhile.
    Yield,
}

/// What happens to a destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// The source wants the migration and every pre-check has passed.
    Begin,
    /// The record asked for is durable.
    Recorded,
    /// The record asked for may or may not be durable.
    JournalFailed,
    /// The whole stream has arrived, its tail included.
    StreamEnded(StreamSum),
    /// One disk is flushed.
    BarrierPassed,
    /// The vmm has loaded the whole stream and is paused.
    Loaded,
    /// The vmm cannot be started or refuses the stream.
    LoadFailed,
    /// The vmm said yes to `cont`.
    Continued,
    /// The vmm said no to `cont`.
    ContinueFailed,
    /// The vmm's process is gone, for sure.
    VmmDead,
    /// The guest was seen running.
    VmmRunning,
    /// The vmm was seen, its guest loaded and paused.
    VmmPaused,
    /// No contact with the source for as long as the destination waits.
    TimedOut,
    /// The operator gives up.
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

impl Destination {
    /// A migration of which nothing is recorded: about to begin, or asked for by a source.
    #[must_use]
    pub fn new(terms: DestinationTerms) -> Self {
        Self {
            terms,
            state: DestinationState::New,
        }
    }

    /// Takes in one event.
    ///
    /// # Errors
    /// The rules do not have this step, and nothing has changed.
    pub fn handle(&mut self, event: &DestinationEvent) -> Result<Vec<Effect>, IllegalStep> {
        let (state, effects) = self.state.step(&self.terms, event)?;
        self.state = state;
        Ok(effects)
    }

    /// Where the migration is.
    #[must_use]
    pub fn state(&self) -> &DestinationState {
        &self.state
    }

    /// What does not change.
    #[must_use]
    pub fn terms(&self) -> &DestinationTerms {
        &self.terms
    }

    /// How the migration was decided, once it is.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        match self.state {
            DestinationState::Decided(verdict)
            | DestinationState::Settling(verdict)
            | DestinationState::Settled(verdict) => Some(verdict),
            _ => None,
        }
    }
}

impl DestinationState {
    /// Name of the state, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::New => "unknown",
            Self::Preparing { .. } => "preparing",
            Self::Receiving { .. } => "receiving",
            Self::Loading { .. } => "loading",
            Self::Committing { .. } => "committing",
            Self::Recovering { .. } => "recovering",
            Self::Continuing { .. } => "continuing",
            Self::Reverting { .. } => "reverting",
            Self::RecordingRevert { .. } => "recording revert",
            Self::RecordingRunning { .. } => "recording running",
            Self::Killing(_) => "killing",
            Self::RecordingAbort(_) => "recording abort",
            Self::Decided(Verdict::Running) => "running",
            Self::Decided(Verdict::Aborted(_)) => "aborted",
            Self::Decided(Verdict::Reverted) => "reverted",
            Self::Settling(_) => "settling",
            Self::Settled(_) => "settled",
            Self::Stuck { .. } => "stuck",
            Self::Resolving { .. } => "resolving",
            Self::Yielding => "yielding",
            Self::JournalLost => "journal lost",
        }
    }
}

impl DestinationEvent {
    /// Name of the event, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Begin => "Begin",
            Self::Recorded => "Recorded",
            Self::JournalFailed => "JournalFailed",
            Self::StreamEnded(_) => "StreamEnded",
            Self::BarrierPassed => "BarrierPassed",
            Self::Loaded => "Loaded",
            Self::LoadFailed => "LoadFailed",
            Self::Continued => "Continued",
            Self::ContinueFailed => "ContinueFailed",
            Self::VmmDead => "VmmDead",
            Self::VmmRunning => "VmmRunning",
            Self::VmmPaused => "VmmPaused",
            Self::TimedOut => "TimedOut",
            Self::Cancel => "Cancel",
            Self::Contact { .. } => "Contact",
            Self::Received(message) => message.name(),
            Self::Resolve(_) => "Resolve",
        }
    }
}
