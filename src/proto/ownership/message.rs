//! What the two gateways tell each other about who owns a VM, and the words in which they give reasons.

use serde::{Deserialize, Serialize};

use crate::proto::page::{JournalId, StreamDigest};

/// What both ends measure of a vmm stream: equal sums mean equal bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StreamSum {
    /// BLAKE3 of the stream, first byte to last.
    pub digest: StreamDigest,
    /// Bytes in the stream.
    pub length: u64,
}

/// The source's word that its vCPUs are stopped and stay so until it learns ABORT or REVERT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Permit {
    /// The stream that the destination must have loaded, to the byte.
    pub stream: StreamSum,
    /// Whether the guest ran before the migration. A guest that was paused is left paused at the destination.
    pub was_running: bool,
    /// Who is permitted: the destination that holds this journal. One that has lost it may have decided already.
    pub destination_journal: JournalId,
}

/// One message between the ownership machines of a migration. The frame around it names the migration.
///
/// Any message may be lost, repeated or overtaken: the machines do not rely on order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message {
    /// Source: the destination may commit. Sent right behind the last byte of the stream.
    Permit(Permit),
    /// Source: what has become of the migration?
    Query {
        /// The permit once more, so that a lost one does no harm. `None`: the source has withheld it and asks for ABORT.
        permit: Option<Permit>,
        /// The source gateway was restarted and can send nothing again: what is not complete must be aborted.
        bytes_lost: bool,
        /// The destination's journal as the source recorded it when the migration began.
        destination_journal: JournalId,
    },
    /// Source: given up before PERMIT; the guest stays at the source.
    Cancel,
    /// Source: the verdict is recorded here, or was never needed; the destination may forget the migration.
    Settled,
    /// Source: a person decided, and the source acted on it.
    Resolved(Resolution),
    /// Destination: not decided yet, nothing is needed.
    InProgress,
    /// Destination: not decided yet, and bytes of the stream are missing.
    MissingBytes,
    /// Destination: COMMIT is recorded. Informs only; the source waits for a verdict.
    Committed,
    /// Destination: RUNNING is recorded. The VM is owned there for good.
    Running,
    /// Destination: ABORT is recorded and its vmm is dead.
    Aborted {
        /// Why.
        reason: AbortReason,
    },
    /// Destination: COMMIT was undone before the guest ran, and its vmm is dead.
    Reverted,
    /// Destination: no vmm has been prepared for a migration of this id. Not a verdict: the source answers with a query.
    Unknown,
    /// Destination: it cannot tell who owns the VM.
    InDoubt {
        /// What a person at the destination was told.
        doubt: Doubt,
    },
}

impl Message {
    /// Name of the message, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Permit(_) => "permit",
            Self::Query { .. } => "query",
            Self::Cancel => "cancel",
            Self::Settled => "settled",
            Self::Resolved(_) => "resolved",
            Self::InProgress => "in progress",
            Self::MissingBytes => "missing bytes",
            Self::Committed => "committed",
            Self::Running => "running",
            Self::Aborted { .. } => "aborted",
            Self::Reverted => "reverted",
            Self::Unknown => "unknown",
            Self::InDoubt { .. } => "in doubt",
        }
    }
}

/// How the destination decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Verdict {
    /// The VM is owned at the destination: it ran there, or was left paused there as it had been.
    Running,
    /// The destination never ran the guest and never will.
    Aborted(AbortReason),
    /// The destination gives the VM back and its vmm is dead.
    Reverted,
}

impl Verdict {
    /// The message that tells the source.
    #[must_use]
    pub fn message(self) -> Message {
        match self {
            Self::Running => Message::Running,
            Self::Aborted(reason) => Message::Aborted { reason },
            Self::Reverted => Message::Reverted,
        }
    }

    /// The verdict that a message states, if it states one.
    #[must_use]
    pub fn stated_by(message: &Message) -> Option<Self> {
        match message {
            Message::Running => Some(Self::Running),
            Message::Aborted { reason } => Some(Self::Aborted(*reason)),
            Message::Reverted => Some(Self::Reverted),
            _ => None,
        }
    }
}

/// Why the destination recorded ABORT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum AbortReason {
    /// By the operator at either end.
    #[error("the migration was cancelled")]
    Cancelled,
    /// No contact, and no PERMIT, for as long as the destination waits.
    #[error("the destination heard nothing more from the source before it was permitted to run the VM")]
    TimedOut,
    /// Digest or length differ from the permit's.
    #[error("the bytes that arrived are not the bytes that the source sent")]
    StreamDiffers,
    /// Said by the vmm, or it loaded before it was given the end of the stream.
    #[error("the destination vmm could not load the VM")]
    LoadFailed,
    /// Before COMMIT.
    #[error("the destination vmm died before it could be started")]
    VmmDied,
    /// The guest was found running at the destination before COMMIT: started with no `-S`, or continued by a third party.
    #[error("the destination vmm started the VM by itself and was killed; start it with -S and let nobody continue it")]
    RanEarly,
    /// A gateway that was restarted before COMMIT does not go on.
    #[error("the destination gateway was restarted before it had committed")]
    Restarted,
    /// The source gateway was restarted and the destination lacks bytes.
    #[error("the source gateway was restarted and could not send the missing bytes again")]
    BytesLost,
    /// The destination's journal, which is unchanged, has nothing of this migration.
    #[error("the destination had not begun to load the VM")]
    NeverPrepared,
    /// The source's journal is not the one the migration began with.
    #[error("the source gateway lost its journal")]
    JournalChanged,
    /// A person gave the VM to the source.
    #[error("a person decided at the source")]
    Resolved,
}

/// Why the machines cannot decide and a person must. The text says what happened and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Doubt {
    /// A record may or may not be on disk.
    #[error(
        "the ownership journal could not be written, so it is not known what it holds; repair or free its disk and restart \
         the gateway, which reads the journal and goes on"
    )]
    JournalFailed,
    /// The other side does not have the journal any more with which the migration began.
    #[error(
        "the peer has another journal than the one this migration began with, so it cannot know what it decided; find out \
         where the VM runs and make sure that it cannot run at the other side: longhaul resolve VM --peer-is-fenced says that it is \
         this side's, --runs-at-peer (at the destination: --lost-here) that it is the other's"
    )]
    JournalChanged,
    /// The peer has told us that it is in doubt.
    #[error(
        "the destination cannot tell whether the VM has run there; look at the destination gateway, which says why, and \
         resolve it there, or fence the destination and run longhaul resolve VM --peer-is-fenced here"
    )]
    PeerInDoubt,
    /// COMMIT, no RUNNING, and the vmm is dead.
    #[error(
        "the destination was allowed to start the VM and its vmm is dead, so the VM may or may not have run here; if the \
         source's copy may go on from where it was paused, run longhaul resolve VM --lost-here here"
    )]
    MayHaveRun,
    /// After a restart, `cont` of the destination vmm returned an error: an earlier one may have succeeded.
    #[error(
        "the destination vmm holds the VM paused and refuses to continue it; continue it by hand, or give the VM back with \
         longhaul resolve VM --lost-here"
    )]
    CannotContinue,
    /// The VM is the source's again and does not start.
    #[error(
        "the VM belongs to this side again and its vmm refuses to continue it; continue it by hand, or run \
         longhaul resolve VM --peer-is-fenced to try again"
    )]
    CannotResume,
    /// The guest was seen running at the source after PERMIT.
    #[error(
        "the VM was continued at the source by somebody else after it had been handed over; it is stopped again, and the \
         destination's answer decides"
    )]
    RanAfterPermit,
    /// The process could not be stopped after a restart of the gateway.
    #[error(
        "the paused vmm of a VM that was handed over could not be stopped (SIGSTOP); make sure that nobody continues it until the \
         destination has answered"
    )]
    NotFrozen,
    /// Both sides claim the VM.
    #[error(
        "both sides claim the VM; stop one of the two copies by hand and then run longhaul resolve VM there, with --runs-at-peer at the source or \
         --lost-here at the destination"
    )]
    Contradicted,
}

/// A person's decision, as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resolution {
    /// What the person states.
    pub claim: Claim,
    /// Who states it, for the record: a user name. At most [`Resolution::MAX_BY`] bytes.
    pub by: String,
}

impl Resolution {
    /// Most bytes of `by`.
    pub const MAX_BY: usize = 128;
}

/// What a person may state to `longhaul resolve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Claim {
    /// `--peer-is-fenced`: the VM does not run at the other side and cannot. It is this side's.
    PeerIsFenced,
    /// `--runs-at-peer` and `--lost-here`: the VM is the other side's. This side must never run it.
    PeerOwns,
}
