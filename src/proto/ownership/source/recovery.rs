//! The source after a restart of its gateway: from its journal records to a state.

use super::super::effect::{Effect, ImpossibleRecords, VmmFact};
use super::super::message::{Claim, Doubt, Message, Permit, Resolution, Verdict};
use super::super::record::{JournalRecord, Outcome, RecordKind};
use super::table::{close, give_up, take_back};
use super::{Bytes, Source, SourceState, SourceTerms};
use crate::proto::page::JournalId;

impl Source {
    /// The state after a restart of the gateway, from all records of the migration in order, and what to do first.
    ///
    /// Before PERMIT the migration is undone; after it the destination is asked. Nothing here reads an absent record as proof of
    /// more than that: a source without `Started` has touched nothing.
    ///
    /// # Errors
    /// The records are not what a source writes.
    pub fn recover(records: &[JournalRecord], fact: VmmFact) -> Result<(Self, Vec<Effect>), ImpossibleRecords> {
        let mut written = Written::Nothing;
        let mut terms = SourceTerms {
            was_running: false,
            destination_journal: JournalId([0; 16]),
        };
        let mut after = None;
        for record in records {
            written = match (written, &record.kind) {
                (Written::Nothing, RecordKind::Started { was_running }) => {
                    terms = SourceTerms {
                        was_running: *was_running,
                        destination_journal: record.peer_journal,
                    };
                    Written::Started
                }
                (Written::Started, RecordKind::Permit(permit)) => Written::Permit(*permit),
                (Written::Permit(_), RecordKind::Learnt(verdict)) => Written::Learnt(*verdict),
                (Written::Permit(_) | Written::Resolved(_), RecordKind::Resolved(resolution)) => {
                    Written::Resolved(resolution.clone())
                }
                (Written::Resolved(resolution), RecordKind::Closed(outcome)) => {
                    Written::Closed(*outcome, Some(resolution))
                }
                (Written::Started | Written::Learnt(_), RecordKind::Closed(outcome)) => Written::Closed(*outcome, None),
                // The permit was withheld, and the destination aborted.
                (Written::Permit(_), RecordKind::Closed(outcome)) => Written::Closed(*outcome, None),
                (_, found) => {
                    return Err(ImpossibleRecords {
                        role: "source",
                        found: format!("{found:?}"),
                        after: after.map_or_else(|| "nothing".to_owned(), |kind: &RecordKind| format!("{kind:?}")),
                    });
                }
            };
            after = Some(&record.kind);
        }
        let (state, effects) = written.recover(&terms, fact);
        Ok((Self { terms, state }, effects))
    }
}

/// How far the journal goes.
enum Written {
    Nothing,
    Started,
    Permit(Permit),
    Learnt(Verdict),
    Resolved(Resolution),
    Closed(Outcome, Option<Resolution>),
}

impl Written {
    fn recover(self, terms: &SourceTerms, fact: VmmFact) -> (SourceState, Vec<Effect>) {
        let dead = fact == VmmFact::Dead;
        match self {
            Self::Nothing => (SourceState::Idle, vec![]),
            Self::Started if dead => {
                let (state, mut effects) = close(Outcome::VmmDied, None);
                effects.insert(0, Effect::Send(Message::Cancel));
                (state, effects)
            }
            Self::Started => give_up(terms),
            Self::Permit(permit) => {
                let mut effects = vec![];
                let mut doubt = None;
                if fact == VmmFact::Running {
                    doubt = Some(Doubt::RanAfterPermit);
                    effects.push(Effect::NeedsPerson(Doubt::RanAfterPermit));
                }
                if !dead {
                    effects.insert(0, Effect::FreezeVmm);
                }
                effects.push(Effect::AskPeer);
                (
                    SourceState::Permitted {
                        permit,
                        bytes: Bytes::Lost,
                        doubt,
                    },
                    effects,
                )
            }
            Self::Learnt(Verdict::Running) if dead => close(Outcome::RunsAtDestination, None),
            Self::Learnt(Verdict::Running) => (SourceState::Discarding { resolution: None }, vec![Effect::QuitVmm]),
            Self::Learnt(_) if dead => close(Outcome::VmmDied, None),
            Self::Learnt(_) => take_back(terms, None, vec![]),
            Self::Resolved(resolution) => match resolution.claim {
                Claim::PeerIsFenced if dead => close(Outcome::VmmDied, Some(resolution)),
                Claim::PeerIsFenced => take_back(terms, Some(resolution), vec![]),
                Claim::PeerOwns if dead => close(Outcome::RunsAtDestination, Some(resolution)),
                Claim::PeerOwns => (
                    SourceState::Discarding {
                        resolution: Some(resolution),
                    },
                    vec![Effect::QuitVmm],
                ),
            },
            Self::Closed(outcome, resolution) => (SourceState::Closed { outcome, resolution }, vec![]),
        }
    }
}
