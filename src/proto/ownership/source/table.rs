//! The source's transition table.

use super::super::effect::{Effect, IllegalStep};
use super::super::message::{Claim, Doubt, Message, Permit, Resolution, Verdict};
use super::super::record::{Outcome, RecordKind};
use super::{Bytes, Evidence, SourceEvent, SourceState, SourceTerms};

type Step = Result<(SourceState, Vec<Effect>), IllegalStep>;

impl SourceState {
    /// The transition table: the state after `event` and what to do, in order.
    ///
    /// # Errors
    /// The rules do not have this step.
    pub fn step(&self, terms: &SourceTerms, event: &SourceEvent) -> Step {
        use SourceEvent as E;

        let illegal = || {
            Err(IllegalStep {
                role: "source",
                state: self.name(),
                event: event.name(),
            })
        };
        let stay = |effects: Vec<Effect>| Ok((self.clone(), effects));

        if let E::Received(
            Message::Permit(_) | Message::Query { .. } | Message::Cancel | Message::Settled | Message::Resolved(_),
        ) = event
        {
            return illegal();
        }
        match self {
            Self::Idle => match event {
                E::Begin => Ok((
                    Self::Starting { doomed: None },
                    vec![Effect::Record(RecordKind::Started {
                        was_running: terms.was_running,
                    })],
                )),
                // Forgotten here, so closed here; the peer, which has not heard so, speaks only to the journal it began with.
                E::Received(Message::Running | Message::Aborted { .. } | Message::Reverted) => {
                    stay(vec![Effect::Send(Message::Settled)])
                }
                E::Received(Message::InProgress | Message::MissingBytes) => stay(vec![Effect::Send(Message::Cancel)]),
                E::Received(_) | E::Contact { .. } => stay(vec![]),
                E::VmmDead | E::VmmRunning | E::VmmPaused => stay(vec![]),
                _ => illegal(),
            },

            Self::Starting { doomed } => match event {
                E::Recorded => match doomed {
                    None => Ok((Self::Copying(Evidence::default()), vec![Effect::StartMigrate])),
                    Some(outcome) => {
                        let (state, mut effects) = close(*outcome, None);
                        effects.insert(0, Effect::Send(Message::Cancel));
                        Ok((state, effects))
                    }
                },
                E::JournalFailed => Ok((
                    Self::Closed {
                        outcome: doomed.unwrap_or(Outcome::RunsAtSource),
                        resolution: None,
                    },
                    vec![Effect::Send(Message::Cancel)],
                )),
                E::VmmDead => Ok((
                    Self::Starting {
                        doomed: Some(Outcome::VmmDied),
                    },
                    vec![],
                )),
                _ if terms.ends_before_permit(event) => Ok((
                    Self::Starting {
                        doomed: Some(doomed.unwrap_or(Outcome::RunsAtSource)),
                    },
                    vec![],
                )),
                E::Received(Message::Committed | Message::Running) => illegal(),
                E::Contact { .. } | E::Received(_) | E::VmmRunning | E::VmmPaused => stay(vec![]),
                _ => illegal(),
            },

            Self::Copying(_) | Self::Freezing(_) => self.before_permit(terms, event),

            Self::Permitting { permit, loose } => match event {
                E::Recorded if *loose => Ok(withhold(terms, Doubt::RanAfterPermit)),
                E::Recorded => Ok((
                    Self::Permitted {
                        permit: *permit,
                        bytes: Bytes::Held,
                        doubt: None,
                    },
                    vec![Effect::Send(Message::Permit(*permit))],
                )),
                E::JournalFailed => Ok(withhold(terms, Doubt::JournalFailed)),
                E::VmmRunning => Ok((
                    Self::Permitting {
                        permit: *permit,
                        loose: true,
                    },
                    vec![Effect::FreezeVmm],
                )),
                // An ABORT that crosses the permit is said again in answer to it.
                E::Received(Message::Committed | Message::Running) => illegal(),
                E::Received(_) | E::Contact { .. } | E::VmmDead | E::VmmPaused => stay(vec![]),
                E::Frozen | E::FreezeFailed | E::MigrateCompleted | E::PostMigrate => stay(vec![]),
                _ => illegal(),
            },

            Self::Withheld => match event {
                // No record: the journal may be broken, and the destination's ABORT stands whatever is on it.
                E::Received(Message::Aborted { .. } | Message::Reverted) => Ok(take_back(terms, None, vec![])),
                E::Received(Message::Committed | Message::Running) => illegal(),
                E::Contact { .. } | E::Received(Message::Unknown) => stay(vec![Effect::Send(ask_for_abort(terms))]),
                E::VmmRunning => stay(vec![Effect::FreezeVmm]),
                E::Received(_) | E::VmmDead | E::VmmPaused | E::Frozen | E::FreezeFailed => stay(vec![]),
                _ => illegal(),
            },

            Self::Permitted { permit, bytes, doubt } => self.after_permit(terms, event, *permit, *bytes, *doubt),

            Self::Learning { permit, bytes, verdict } => match event {
                E::Recorded => {
                    let settled = vec![Effect::Send(Message::Settled)];
                    match verdict {
                        Verdict::Running => Ok((
                            Self::Discarding { resolution: None },
                            vec![Effect::Send(Message::Settled), Effect::QuitVmm],
                        )),
                        Verdict::Aborted(_) | Verdict::Reverted => Ok(take_back(terms, None, settled)),
                    }
                }
                // What the destination has recorded is enough to run the guest, but not to end it: that can wait for a journal.
                E::JournalFailed => match verdict {
                    Verdict::Running => Ok((
                        Self::Permitted {
                            permit: *permit,
                            bytes: *bytes,
                            doubt: Some(Doubt::JournalFailed),
                        },
                        vec![Effect::NeedsPerson(Doubt::JournalFailed)],
                    )),
                    Verdict::Aborted(_) | Verdict::Reverted => Ok(take_back(terms, None, vec![])),
                },
                E::VmmRunning => stay(vec![Effect::FreezeVmm]),
                E::Received(_) | E::Contact { .. } | E::VmmDead | E::VmmPaused | E::Frozen | E::FreezeFailed => {
                    stay(vec![])
                }
                _ => illegal(),
            },

            Self::Resolving {
                permit,
                bytes,
                resolution,
            } => match event {
                E::Recorded => match resolution.claim {
                    Claim::PeerIsFenced => {
                        let told = vec![Effect::Send(Message::Resolved(resolution.clone()))];
                        Ok(take_back(terms, Some(resolution.clone()), told))
                    }
                    Claim::PeerOwns => Ok((
                        Self::Discarding {
                            resolution: Some(resolution.clone()),
                        },
                        vec![Effect::QuitVmm],
                    )),
                },
                E::JournalFailed => Ok((
                    Self::Permitted {
                        permit: *permit,
                        bytes: *bytes,
                        doubt: Some(Doubt::JournalFailed),
                    },
                    vec![Effect::NeedsPerson(Doubt::JournalFailed)],
                )),
                E::VmmRunning => stay(vec![Effect::FreezeVmm]),
                E::Received(_) | E::Contact { .. } | E::VmmDead | E::VmmPaused | E::Frozen | E::FreezeFailed => {
                    stay(vec![])
                }
                _ => illegal(),
            },

            Self::Resuming { resolution } | Self::Stranded { resolution } => match (event, self) {
                (E::Resumed | E::VmmRunning, _) => Ok(close(Outcome::RunsAtSource, resolution.clone())),
                (E::VmmDead, _) => Ok(close(Outcome::VmmDied, resolution.clone())),
                (E::ResumeFailed, Self::Resuming { .. }) => Ok((
                    Self::Stranded {
                        resolution: resolution.clone(),
                    },
                    vec![Effect::NeedsPerson(Doubt::CannotResume)],
                )),
                (
                    E::Resolve(Resolution {
                        claim: Claim::PeerIsFenced,
                        ..
                    }),
                    Self::Stranded { .. },
                ) => Ok((
                    Self::Resuming {
                        resolution: resolution.clone(),
                    },
                    vec![Effect::ThawVmm, Effect::Resume],
                )),
                (E::Received(message), _) => stay(answer(message, Outcome::RunsAtSource, resolution.as_ref(), false)),
                (E::Contact { .. }, _) => stay(tell(resolution.as_ref())),
                (E::Cancel | E::VmmPaused | E::Frozen | E::FreezeFailed, _) => stay(vec![]),
                // The vmm goes on reporting on the migration that was given up.
                (E::StreamEnded(_) | E::MigrateCompleted | E::PostMigrate | E::MigrateFailed, _) => stay(vec![]),
                _ => illegal(),
            },

            Self::Discarding { resolution } => match event {
                E::Discarded | E::VmmDead => Ok(close(Outcome::RunsAtDestination, resolution.clone())),
                E::Received(message) => stay(answer(message, Outcome::RunsAtDestination, resolution.as_ref(), true)),
                E::Contact { .. } => stay(tell(resolution.as_ref())),
                E::VmmRunning | E::VmmPaused | E::Frozen | E::FreezeFailed => stay(vec![]),
                _ => illegal(),
            },

            Self::Closing { outcome, resolution } | Self::Closed { outcome, resolution } => match (event, self) {
                // The last record changes nothing: without it the restarted gateway comes to the same end again.
                (E::Recorded | E::JournalFailed, Self::Closing { .. }) => Ok((
                    Self::Closed {
                        outcome: *outcome,
                        resolution: resolution.clone(),
                    },
                    vec![],
                )),
                (E::Received(message), _) => {
                    let over = matches!(self, Self::Closed { .. }) || *outcome == Outcome::RunsAtDestination;
                    stay(answer(message, *outcome, resolution.as_ref(), over))
                }
                (E::Contact { .. }, _) => stay(tell(resolution.as_ref())),
                (E::Cancel, _) if *outcome != Outcome::RunsAtDestination => stay(vec![]),
                (E::Resumed | E::ResumeFailed | E::Discarded | E::Frozen | E::FreezeFailed, _) => stay(vec![]),
                (E::VmmDead | E::VmmRunning | E::VmmPaused, _) => stay(vec![]),
                (E::StreamEnded(_) | E::MigrateCompleted | E::PostMigrate | E::MigrateFailed, _) => stay(vec![]),
                _ => illegal(),
            },
        }
    }

    /// `Copying` and `Freezing`: the destination cannot run without PERMIT, so the source may end it at will.
    fn before_permit(&self, terms: &SourceTerms, event: &SourceEvent) -> Step {
        use SourceEvent as E;

        let illegal = || {
            Err(IllegalStep {
                role: "source",
                state: self.name(),
                event: event.name(),
            })
        };
        if terms.ends_before_permit(event) {
            return Ok(give_up(terms));
        }
        match (self, event) {
            (Self::Copying(evidence), E::StreamEnded(sum)) => match evidence.stream {
                Some(known) if known != *sum => illegal(),
                _ => Ok(Evidence {
                    stream: Some(*sum),
                    ..*evidence
                }
                .weigh()),
            },
            (Self::Copying(evidence), E::MigrateCompleted) => Ok(Evidence {
                completed: true,
                ..*evidence
            }
            .weigh()),
            (Self::Copying(evidence), E::PostMigrate) => Ok(Evidence {
                postmigrate: true,
                ..*evidence
            }
            .weigh()),
            (Self::Freezing(stream), E::Frozen) => {
                let permit = Permit {
                    stream: *stream,
                    was_running: terms.was_running,
                    destination_journal: terms.destination_journal,
                };
                Ok((
                    Self::Permitting { permit, loose: false },
                    vec![Effect::Record(RecordKind::Permit(permit))],
                ))
            }
            (Self::Freezing(_), E::FreezeFailed | E::VmmRunning) => Ok(give_up(terms)),
            (Self::Freezing(known), E::StreamEnded(sum)) if known != sum => illegal(),
            (Self::Freezing(_), E::StreamEnded(_) | E::MigrateCompleted | E::PostMigrate) => Ok((self.clone(), vec![])),
            (_, E::VmmDead) => {
                let (state, mut effects) = close(Outcome::VmmDied, None);
                effects.insert(0, Effect::Send(Message::Cancel));
                Ok((state, effects))
            }
            (_, E::Received(Message::Committed | Message::Running)) => illegal(),
            (_, E::Received(_) | E::Contact { .. } | E::VmmRunning | E::VmmPaused) => Ok((self.clone(), vec![])),
            _ => illegal(),
        }
    }

    /// `Permitted`: loss of contact is never a reason to resume.
    fn after_permit(
        &self,
        terms: &SourceTerms,
        event: &SourceEvent,
        permit: Permit,
        bytes: Bytes,
        doubt: Option<Doubt>,
    ) -> Step {
        use SourceEvent as E;

        let illegal = || {
            Err(IllegalStep {
                role: "source",
                state: self.name(),
                event: event.name(),
            })
        };
        let stay = |effects: Vec<Effect>| Ok((self.clone(), effects));
        let doubting = |new: Doubt, mut effects: Vec<Effect>| {
            if doubt != Some(new) {
                effects.push(Effect::NeedsPerson(new));
            }
            Ok((
                Self::Permitted {
                    permit,
                    bytes,
                    doubt: Some(new),
                },
                effects,
            ))
        };
        let query = Message::Query {
            permit: Some(permit),
            bytes_lost: bytes == Bytes::Lost,
            destination_journal: terms.destination_journal,
        };
        match event {
            E::Contact { journal } if *journal != terms.destination_journal => doubting(Doubt::JournalChanged, vec![]),
            E::Contact { .. } => {
                let doubt = doubt.filter(|doubt| *doubt != Doubt::JournalChanged);
                Ok((Self::Permitted { permit, bytes, doubt }, vec![Effect::Send(query)]))
            }
            E::Received(_) if doubt == Some(Doubt::JournalChanged) => stay(vec![]),
            E::Received(message) => match Verdict::stated_by(message) {
                Some(Verdict::Running) => match doubt {
                    // The guest ran here meanwhile: which copy to keep is not ours to say.
                    Some(Doubt::RanAfterPermit | Doubt::Contradicted) => doubting(Doubt::Contradicted, vec![]),
                    Some(Doubt::JournalFailed) => stay(vec![]),
                    _ => self.learn(permit, bytes, Verdict::Running),
                },
                Some(verdict) => match doubt {
                    Some(Doubt::JournalFailed) => Ok(take_back(terms, None, vec![])),
                    _ => self.learn(permit, bytes, verdict),
                },
                None => match message {
                    Message::Unknown => stay(vec![Effect::Send(query)]),
                    Message::InDoubt { .. } if doubt.is_none() => doubting(Doubt::PeerInDoubt, vec![]),
                    _ => stay(vec![]),
                },
            },
            E::VmmRunning => doubting(Doubt::RanAfterPermit, vec![Effect::FreezeVmm]),
            E::FreezeFailed if doubt.is_none() => doubting(Doubt::NotFrozen, vec![]),
            E::Frozen if doubt == Some(Doubt::NotFrozen) => Ok((
                Self::Permitted {
                    permit,
                    bytes,
                    doubt: None,
                },
                vec![],
            )),
            E::Frozen | E::FreezeFailed | E::VmmDead | E::VmmPaused => stay(vec![]),
            E::MigrateCompleted | E::PostMigrate => stay(vec![]),
            E::Resolve(resolution) => Ok((
                Self::Resolving {
                    permit,
                    bytes,
                    resolution: resolution.clone(),
                },
                vec![Effect::Record(RecordKind::Resolved(resolution.clone()))],
            )),
            _ => illegal(),
        }
    }

    fn learn(&self, permit: Permit, bytes: Bytes, verdict: Verdict) -> Step {
        Ok((
            Self::Learning { permit, bytes, verdict },
            vec![Effect::Record(RecordKind::Learnt(verdict))],
        ))
    }
}

impl SourceTerms {
    /// What ends a migration as long as there is no PERMIT: our side or the other gives up, or the other has lost its memory.
    fn ends_before_permit(&self, event: &SourceEvent) -> bool {
        match event {
            SourceEvent::Cancel | SourceEvent::MigrateFailed => true,
            SourceEvent::Received(message) => {
                matches!(
                    message,
                    Message::Aborted { .. } | Message::Reverted | Message::InDoubt { .. }
                )
            }
            SourceEvent::Contact { journal } => *journal != self.destination_journal,
            _ => false,
        }
    }
}

impl Evidence {
    /// The state that this much evidence allows.
    fn weigh(self) -> (SourceState, Vec<Effect>) {
        match self {
            Self {
                stream: Some(sum),
                completed: true,
                postmigrate: true,
            } => (SourceState::Freezing(sum), vec![Effect::FreezeVmm]),
            incomplete => (SourceState::Copying(incomplete), vec![]),
        }
    }
}

/// Ends the migration before PERMIT: the guest goes on at the source.
pub(super) fn give_up(terms: &SourceTerms) -> (SourceState, Vec<Effect>) {
    let (state, mut effects) = take_back(terms, None, vec![Effect::Send(Message::Cancel)]);
    let thawed = effects
        .iter()
        .position(|effect| *effect == Effect::ThawVmm)
        .map_or(effects.len(), |at| at + 1);
    effects.insert(thawed, Effect::CancelMigrate);
    (state, effects)
}

/// The VM is the source's: as it was, so it will be.
pub(super) fn take_back(
    terms: &SourceTerms,
    resolution: Option<Resolution>,
    mut effects: Vec<Effect>,
) -> (SourceState, Vec<Effect>) {
    effects.push(Effect::ThawVmm);
    if terms.was_running {
        effects.push(Effect::Resume);
        (SourceState::Resuming { resolution }, effects)
    } else {
        let (state, closing) = close(Outcome::RunsAtSource, resolution);
        effects.extend(closing);
        (state, effects)
    }
}

pub(super) fn close(outcome: Outcome, resolution: Option<Resolution>) -> (SourceState, Vec<Effect>) {
    (
        SourceState::Closing { outcome, resolution },
        vec![Effect::Record(RecordKind::Closed(outcome))],
    )
}

fn withhold(terms: &SourceTerms, doubt: Doubt) -> (SourceState, Vec<Effect>) {
    let effects = vec![
        Effect::NeedsPerson(doubt),
        Effect::AskPeer,
        Effect::Send(ask_for_abort(terms)),
    ];
    (SourceState::Withheld, effects)
}

fn ask_for_abort(terms: &SourceTerms) -> Message {
    Message::Query {
        permit: None,
        bytes_lost: true,
        destination_journal: terms.destination_journal,
    }
}

/// What a source that has its outcome says to a peer that has not heard of it. `over`: nothing here needs the verdict again.
fn answer(message: &Message, outcome: Outcome, resolution: Option<&Resolution>, over: bool) -> Vec<Effect> {
    match (Verdict::stated_by(message), outcome) {
        (Some(Verdict::Running), Outcome::RunsAtSource | Outcome::VmmDied) => {
            vec![Effect::NeedsPerson(Doubt::Contradicted)]
        }
        (Some(Verdict::Aborted(_) | Verdict::Reverted), Outcome::RunsAtDestination) if resolution.is_some() => {
            vec![Effect::NeedsPerson(Doubt::Contradicted)]
        }
        (Some(_), _) if over => vec![Effect::Send(Message::Settled)],
        (Some(_), _) => vec![],
        (None, Outcome::RunsAtSource | Outcome::VmmDied) if resolution.is_none() => match message {
            Message::InProgress | Message::MissingBytes => vec![Effect::Send(Message::Cancel)],
            _ => vec![],
        },
        (None, _) => tell(resolution),
    }
}

/// A destination that was away hears what a person decided meanwhile.
fn tell(resolution: Option<&Resolution>) -> Vec<Effect> {
    resolution
        .map(|resolution| Effect::Send(Message::Resolved(resolution.clone())))
        .into_iter()
        .collect()
}
