//! The destination after a restart of its gateway: from its journal records to a state.

use super::super::effect::{Effect, ImpossibleRecords, VmmFact};
use super::super::message::{AbortReason, Claim, Permit, Verdict};
use super::super::record::{JournalRecord, RecordKind};
use super::table::{found, record_abort};
use super::{Destination, DestinationState, DestinationTerms};
use crate::proto::page::JournalId;

impl Destination {
    /// The state after a restart of the gateway, from all records of the migration in order, and what to do first.
    ///
    /// # Errors
    /// The records are not what a destination writes.
    pub fn recover(
        records: &[JournalRecord],
        own_journal: JournalId,
        fact: VmmFact,
    ) -> Result<(Self, Vec<Effect>), ImpossibleRecords> {
        let source_journal = records.first().map_or(JournalId([0; 16]), |record| record.peer_journal);
        let terms = DestinationTerms {
            own_journal,
            source_journal,
            barriers: 0,
        };
        let mut written = Written::Nothing;
        let mut after = None;
        for record in records {
            written = match (written, &record.kind) {
                (Written::Nothing, RecordKind::Prepared) => Written::Prepared,
                (Written::Nothing | Written::Prepared, RecordKind::Abort(reason)) => {
                    Written::Decided(Verdict::Aborted(*reason))
                }
                (Written::Prepared, RecordKind::Commit(permit)) => Written::Commit(*permit),
                (Written::Commit(_) | Written::Resolved(..), RecordKind::Running) => Written::Decided(Verdict::Running),
                (Written::Commit(_), RecordKind::Revert) => Written::Decided(Verdict::Reverted),
                (Written::Commit(permit) | Written::Resolved(permit, _), RecordKind::Resolved(resolution)) => {
                    Written::Resolved(permit, resolution.claim)
                }
                (Written::Decided(verdict), RecordKind::Closed(_)) => Written::Settled(verdict),
                (Written::Resolved(_, claim), RecordKind::Closed(_)) => Written::Settled(claimed(claim)),
                (_, found) => {
                    return Err(ImpossibleRecords {
                        role: "destination",
                        found: format!("{found:?}"),
                        after: after.map_or_else(|| "nothing".to_owned(), |kind: &RecordKind| format!("{kind:?}")),
                    });
                }
            };
            after = Some(&record.kind);
        }
        let (state, effects) = written.recover(fact);
        Ok((Self { terms, state }, effects))
    }
}

/// How far the journal goes.
enum Written {
    Nothing,
    Prepared,
    Commit(Permit),
    Resolved(Permit, Claim),
    Decided(Verdict),
    Settled(Verdict),
}

impl Written {
    fn recover(self, fact: VmmFact) -> (DestinationState, Vec<Effect>) {
        use DestinationState as S;
        match self {
            Self::Nothing => (S::New, vec![]),
            Self::Prepared if fact == VmmFact::Dead => record_abort(AbortReason::Restarted),
            Self::Prepared => (S::Killing(AbortReason::Restarted), vec![Effect::KillVmm]),
            Self::Commit(permit) => found(permit, fact),
            Self::Resolved(_, Claim::PeerOwns) if fact == VmmFact::Dead => (S::Decided(Verdict::Reverted), vec![]),
            Self::Resolved(_, Claim::PeerOwns) => (S::Yielding, vec![Effect::KillVmm]),
            Self::Resolved(_, Claim::PeerIsFenced) if fact == VmmFact::Dead => (S::Decided(Verdict::Running), vec![]),
            Self::Resolved(permit, Claim::PeerIsFenced) => found(permit, fact),
            Self::Decided(verdict) => (S::Decided(verdict), vec![]),
            Self::Settled(verdict) => (S::Settled(verdict), vec![]),
        }
    }
}

/// What a person's claim at the destination amounts to.
fn claimed(claim: Claim) -> Verdict {
    match claim {
        Claim::PeerIsFenced => Verdict::Running,
        Claim::PeerOwns => Verdict::Reverted,
    }
}
