//! The destination's transition table.

use super::super::effect::{Effect, IllegalStep, VmmFact};
use super::super::message::{AbortReason, Claim, Doubt, Message, Permit, Resolution, Verdict};
use super::super::record::{Outcome, RecordKind};
use super::{DestinationEvent, DestinationState, DestinationTerms, Fate};

type Step = Result<(DestinationState, Vec<Effect>), IllegalStep>;

impl DestinationState {
    /// The transition table: the state after `event` and what to do, in order.
    ///
    /// # Errors
    /// The rules do not have this step.
    pub fn step(&self, terms: &DestinationTerms, event: &DestinationEvent) -> Step {
        use DestinationEvent as E;

        let illegal = || {
            Err(IllegalStep {
                role: "destination",
                state: self.name(),
                event: event.name(),
            })
        };
        let stay = |effects: Vec<Effect>| Ok((self.clone(), effects));

        match event {
            E::Received(
                Message::InProgress
                | Message::MissingBytes
                | Message::Committed
                | Message::Running
                | Message::Aborted { .. }
                | Message::Reverted
                | Message::Unknown
                | Message::InDoubt { .. },
            ) => return illegal(),
            // Meant for a journal that is not here: what that one said is not known, and silence in this one proves nothing.
            E::Received(
                Message::Query {
                    destination_journal, ..
                }
                | Message::Permit(Permit {
                    destination_journal, ..
                }),
            ) if *destination_journal != terms.own_journal => {
                return stay(vec![Effect::Send(Message::InDoubt {
                    doubt: Doubt::JournalChanged,
                })]);
            }
            _ => {}
        }

        match self {
            Self::New => match event {
                E::Begin => Ok((
                    Self::Preparing { abort: None },
                    vec![Effect::Record(RecordKind::Prepared)],
                )),
                // Recorded before it is answered, so that a late `Begin` and a late permit find a decided migration.
                E::Received(Message::Query { .. }) => Ok(record_abort(AbortReason::NeverPrepared)),
                E::Received(Message::Permit(_)) => stay(vec![Effect::Send(Message::Unknown)]),
                E::Received(_) | E::Contact { .. } => stay(vec![]),
                _ => illegal(),
            },

            Self::Preparing { abort } => match event {
                E::Recorded => match abort {
                    Some(reason) => Ok(record_abort(*reason)),
                    None => Ok((
                        Self::Receiving {
                            stream: None,
                            permit: None,
                            barriers: terms.barriers,
                        },
                        vec![Effect::LoadVmm],
                    )),
                },
                E::JournalFailed => Ok(journal_lost()),
                E::VmmDead => Ok((
                    Self::Preparing {
                        abort: Some(abort.unwrap_or(AbortReason::VmmDied)),
                    },
                    vec![],
                )),
                E::Received(Message::Query { bytes_lost: true, .. }) => Ok((
                    Self::Preparing {
                        abort: Some(abort.unwrap_or(AbortReason::BytesLost)),
                    },
                    vec![],
                )),
                E::Received(Message::Query { .. }) => stay(vec![Effect::Send(Message::MissingBytes)]),
                E::Received(Message::Permit(_)) => stay(vec![Effect::Send(Message::Unknown)]),
                _ => match terms.ends_before_commit(event) {
                    Some(reason) => Ok((
                        Self::Preparing {
                            abort: Some(abort.unwrap_or(reason)),
                        },
                        vec![],
                    )),
                    None if matches!(event, E::Received(_) | E::Contact { .. } | E::VmmRunning | E::VmmPaused) => {
                        stay(vec![])
                    }
                    None => illegal(),
                },
            },

            Self::Receiving { .. } | Self::Loading { .. } => self.before_commit(terms, event),

            Self::Committing { permit, fate } => match event {
                E::Recorded => match fate {
                    Fate::Continue if permit.was_running => Ok((
                        Self::Continuing {
                            permit: *permit,
                            first: true,
                        },
                        vec![Effect::ContinueVmm, Effect::Send(Message::Committed)],
                    )),
                    Fate::Continue => Ok(record_running(*permit)),
                    // No `cont` was ever asked for, so the guest has not run.
                    Fate::Dead => Ok(record_revert(*permit)),
                    Fate::Yield => Ok((Self::Reverting { permit: *permit }, vec![Effect::KillVmm])),
                },
                E::JournalFailed => Ok(journal_lost()),
                E::VmmDead => Ok((
                    Self::Committing {
                        permit: *permit,
                        fate: Fate::Dead,
                    },
                    vec![],
                )),
                E::Received(Message::Resolved(_)) if *fate == Fate::Continue => Ok((
                    Self::Committing {
                        permit: *permit,
                        fate: Fate::Yield,
                    },
                    vec![],
                )),
                E::Received(Message::Query { .. }) => stay(vec![Effect::Send(Message::InProgress)]),
                E::Received(Message::Permit(_) | Message::Resolved(_) | Message::Settled) => stay(vec![]),
                E::Contact { .. } | E::VmmPaused | E::VmmRunning | E::TimedOut | E::Loaded => stay(vec![]),
                _ => illegal(),
            },

            Self::Recovering { permit } => match event {
                E::VmmRunning => Ok(found(*permit, VmmFact::Running)),
                E::VmmPaused => Ok(found(*permit, VmmFact::Paused)),
                E::VmmDead => Ok(found(*permit, VmmFact::Dead)),
                // The source's copy runs by a person's word; ours must not be continued beside it.
                E::Received(Message::Resolved(_)) => Ok(stuck(*permit, Doubt::Contradicted)),
                E::Received(Message::Query { .. } | Message::Permit(_)) => stay(vec![Effect::Send(Message::Committed)]),
                E::Received(Message::Settled) | E::Contact { .. } | E::TimedOut => stay(vec![]),
                _ => illegal(),
            },

            Self::Continuing { permit, first } => match event {
                E::Continued | E::VmmRunning => Ok(record_running(*permit)),
                E::ContinueFailed if *first => Ok((Self::Reverting { permit: *permit }, vec![Effect::KillVmm])),
                E::ContinueFailed => Ok(stuck(*permit, Doubt::CannotContinue)),
                // The answer was lost: the vmm may have run and stopped again.
                E::VmmPaused => Ok((
                    Self::Continuing {
                        permit: *permit,
                        first: false,
                    },
                    vec![Effect::ContinueVmm],
                )),
                E::VmmDead => Ok(stuck(*permit, Doubt::MayHaveRun)),
                E::Received(Message::Resolved(_)) => stay(vec![Effect::NeedsPerson(Doubt::Contradicted)]),
                E::Received(Message::Query { .. } | Message::Permit(_)) => stay(vec![Effect::Send(Message::Committed)]),
                E::Received(Message::Settled) | E::Contact { .. } | E::TimedOut | E::Loaded => stay(vec![]),
                _ => illegal(),
            },

            Self::Reverting { permit } => match event {
                E::VmmDead => Ok(record_revert(*permit)),
                // Refused, and yet it runs: what it did before it is dead is not known.
                E::VmmRunning | E::Continued => Ok(stuck(*permit, Doubt::MayHaveRun)),
                E::Received(Message::Query { .. } | Message::Permit(_)) => stay(vec![Effect::Send(Message::Committed)]),
                E::Received(_) | E::Contact { .. } | E::VmmPaused | E::TimedOut => stay(vec![]),
                _ => illegal(),
            },

            Self::RecordingRevert { .. } | Self::RecordingRunning { .. } => match (event, self) {
                (E::Recorded, Self::RecordingRevert { .. }) => Ok(decide(Verdict::Reverted)),
                (E::Recorded, _) => Ok(decide(Verdict::Running)),
                (E::JournalFailed, _) => Ok(journal_lost()),
                (E::Received(Message::Query { .. } | Message::Permit(_)), _) => {
                    stay(vec![Effect::Send(Message::Committed)])
                }
                (E::Received(Message::Resolved(_)), Self::RecordingRunning { .. }) => {
                    stay(vec![Effect::NeedsPerson(Doubt::Contradicted)])
                }
                (E::Received(_) | E::Contact { .. } | E::TimedOut, _) => stay(vec![]),
                (E::VmmDead | E::VmmRunning | E::VmmPaused | E::Continued, _) => stay(vec![]),
                _ => illegal(),
            },

            Self::Killing(reason) => match event {
                E::VmmDead => Ok(record_abort(*reason)),
                E::Received(Message::Query { .. } | Message::Permit(_)) => {
                    stay(vec![Effect::Send(Message::InProgress)])
                }
                E::Received(_) | E::Contact { .. } | E::TimedOut | E::Cancel => stay(vec![]),
                // The vmm and the stream go on reporting until it is dead.
                E::StreamEnded(_) | E::BarrierPassed | E::Loaded | E::LoadFailed | E::VmmRunning | E::VmmPaused => {
                    stay(vec![])
                }
                _ => illegal(),
            },

            Self::RecordingAbort(reason) => match event {
                E::Recorded => Ok(decide(Verdict::Aborted(*reason))),
                E::JournalFailed => Ok(journal_lost()),
                E::Received(Message::Query { .. } | Message::Permit(_)) => {
                    stay(vec![Effect::Send(Message::InProgress)])
                }
                E::Received(_) | E::Contact { .. } | E::TimedOut | E::Cancel | E::VmmDead => stay(vec![]),
                E::StreamEnded(_) | E::BarrierPassed | E::Loaded | E::LoadFailed => stay(vec![]),
                _ => illegal(),
            },

            Self::Decided(verdict) | Self::Settling(verdict) | Self::Settled(verdict) => {
                self.after_decision(terms, event, *verdict)
            }

            Self::Stuck { permit, doubt } => match event {
                E::Resolve(resolution) => Ok((
                    Self::Resolving {
                        permit: *permit,
                        doubt: *doubt,
                        claim: resolution.claim,
                    },
                    vec![Effect::Record(RecordKind::Resolved(resolution.clone()))],
                )),
                // Ours does not run, and the source's copy runs by a person's word: theirs it is.
                E::Received(Message::Resolved(theirs)) if *doubt != Doubt::Contradicted => {
                    let ours = Resolution {
                        claim: Claim::PeerOwns,
                        by: theirs.by.clone(),
                    };
                    Ok((
                        Self::Resolving {
                            permit: *permit,
                            doubt: *doubt,
                            claim: ours.claim,
                        },
                        vec![Effect::Record(RecordKind::Resolved(ours))],
                    ))
                }
                E::VmmDead if *doubt != Doubt::MayHaveRun => Ok(stuck(*permit, Doubt::MayHaveRun)),
                E::VmmRunning if *doubt == Doubt::CannotContinue => Ok(record_running(*permit)),
                E::Received(Message::Query { .. } | Message::Permit(_)) | E::Contact { .. } => {
                    stay(vec![Effect::Send(Message::InDoubt { doubt: *doubt })])
                }
                E::Received(_) | E::VmmDead | E::VmmRunning | E::VmmPaused | E::TimedOut => stay(vec![]),
                E::Continued | E::ContinueFailed => stay(vec![]),
                _ => illegal(),
            },

            Self::Resolving { permit, doubt, claim } => match event {
                E::Recorded => match (claim, doubt) {
                    (Claim::PeerOwns, _) => Ok((Self::Yielding, vec![Effect::KillVmm])),
                    (Claim::PeerIsFenced, Doubt::MayHaveRun) => Ok(decide(Verdict::Running)),
                    (Claim::PeerIsFenced, _) => Ok((
                        Self::Continuing {
                            permit: *permit,
                            first: false,
                        },
                        vec![Effect::ContinueVmm, Effect::Send(Message::Committed)],
                    )),
                },
                E::JournalFailed => Ok(journal_lost()),
                E::VmmDead => Ok((
                    Self::Resolving {
                        permit: *permit,
                        doubt: Doubt::MayHaveRun,
                        claim: *claim,
                    },
                    vec![],
                )),
                E::Received(Message::Query { .. } | Message::Permit(_)) | E::Contact { .. } => {
                    stay(vec![Effect::Send(Message::InDoubt { doubt: *doubt })])
                }
                E::Received(_) | E::VmmRunning | E::VmmPaused | E::TimedOut => stay(vec![]),
                E::Continued | E::ContinueFailed => stay(vec![]),
                _ => illegal(),
            },

            Self::Yielding => match event {
                E::VmmDead => Ok(decide(Verdict::Reverted)),
                E::Received(Message::Query { .. } | Message::Permit(_)) => {
                    stay(vec![Effect::Send(Message::InProgress)])
                }
                E::Received(_) | E::Contact { .. } | E::VmmRunning | E::VmmPaused | E::TimedOut => stay(vec![]),
                E::Continued | E::ContinueFailed => stay(vec![]),
                _ => illegal(),
            },

            Self::JournalLost => match event {
                E::Received(Message::Query { .. } | Message::Permit(_)) | E::Contact { .. } => {
                    stay(vec![Effect::Send(Message::InDoubt {
                        doubt: Doubt::JournalFailed,
                    })])
                }
                E::Begin | E::Recorded | E::Resolve(_) => illegal(),
                _ => stay(vec![]),
            },
        }
    }

    /// `Receiving` and `Loading`: the destination may abort at will, and goes on only with a permit for these very bytes.
    fn before_commit(&self, terms: &DestinationTerms, event: &DestinationEvent) -> Step {
        use DestinationEvent as E;

        let illegal = || {
            Err(IllegalStep {
                role: "destination",
                state: self.name(),
                event: event.name(),
            })
        };
        let stay = |effects: Vec<Effect>| Ok((self.clone(), effects));

        match (event, self) {
            // Nothing is awaited from the source any more.
            (E::TimedOut, Self::Loading { .. }) => return stay(vec![]),
            (E::VmmDead, _) => return Ok(record_abort(AbortReason::VmmDied)),
            (E::VmmRunning, _) => return Ok(kill(AbortReason::RanEarly)),
            (E::LoadFailed, _) | (E::Loaded, Self::Receiving { .. }) => return Ok(kill(AbortReason::LoadFailed)),
            (E::VmmPaused | E::Received(Message::Settled), _) => return stay(vec![]),
            _ => {}
        }
        if let Some(reason) = terms.ends_before_commit(event) {
            return Ok(kill(reason));
        }
        match (event, self) {
            (E::Contact { .. }, _) => stay(vec![Effect::Send(Message::InProgress)]),
            (
                E::StreamEnded(sum),
                Self::Receiving {
                    stream,
                    permit,
                    barriers,
                },
            ) => match stream {
                Some(known) if known != sum => illegal(),
                _ => Ok(Self::Receiving {
                    stream: Some(*sum),
                    permit: *permit,
                    barriers: *barriers,
                }
                .weigh()),
            },
            (E::StreamEnded(sum), Self::Loading { permit, .. }) if permit.stream == *sum => stay(vec![]),
            (
                E::Received(Message::Permit(new)),
                Self::Receiving {
                    stream,
                    permit,
                    barriers,
                },
            ) => match permit {
                Some(known) if known != new => illegal(),
                _ => Ok(Self::Receiving {
                    stream: *stream,
                    permit: Some(*new),
                    barriers: *barriers,
                }
                .weigh()),
            },
            (E::Received(Message::Permit(new)), Self::Loading { permit, .. }) if permit == new => stay(vec![]),
            (
                E::Received(Message::Query {
                    permit: asked,
                    bytes_lost,
                    ..
                }),
                Self::Receiving {
                    stream,
                    permit,
                    barriers,
                },
            ) => match (asked, permit) {
                (Some(new), Some(known)) if new != known => illegal(),
                // The source withholds its permit: there will be none.
                (None, _) if *bytes_lost => Ok(kill(AbortReason::BytesLost)),
                _ => {
                    let permit = asked.or(*permit);
                    let (state, mut effects) = Self::Receiving {
                        stream: *stream,
                        permit,
                        barriers: *barriers,
                    }
                    .weigh();
                    if let Self::Receiving { stream: None, .. } = state {
                        if *bytes_lost {
                            return Ok(kill(AbortReason::BytesLost));
                        }
                        effects.push(Effect::Send(Message::MissingBytes));
                    } else {
                        effects.push(Effect::Send(Message::InProgress));
                    }
                    Ok((state, effects))
                }
            },
            (E::Received(Message::Query { .. }), Self::Loading { .. }) => stay(vec![Effect::Send(Message::InProgress)]),
            (
                E::BarrierPassed,
                Self::Receiving {
                    stream,
                    permit,
                    barriers,
                },
            ) => match barriers.checked_sub(1) {
                Some(barriers) => Ok((
                    Self::Receiving {
                        stream: *stream,
                        permit: *permit,
                        barriers,
                    },
                    vec![],
                )),
                None => illegal(),
            },
            (
                E::BarrierPassed,
                Self::Loading {
                    permit,
                    barriers,
                    loaded,
                },
            ) => match barriers.checked_sub(1) {
                Some(barriers) => Ok(Self::Loading {
                    permit: *permit,
                    barriers,
                    loaded: *loaded,
                }
                .weigh()),
                None => illegal(),
            },
            // A repeat is a no-op: the first one has led on already if it could.
            (E::Loaded, Self::Loading { permit, barriers, .. }) => Ok(Self::Loading {
                permit: *permit,
                barriers: *barriers,
                loaded: true,
            }
            .weigh()),
            _ => illegal(),
        }
    }

    /// What the evidence of `Receiving` or `Loading` leads to.
    fn weigh(self) -> (Self, Vec<Effect>) {
        match self {
            Self::Receiving {
                stream: Some(sum),
                permit: Some(permit),
                ..
            } if sum != permit.stream => kill(AbortReason::StreamDiffers),
            Self::Receiving {
                stream: Some(_),
                permit: Some(permit),
                barriers,
            } => (
                Self::Loading {
                    permit,
                    barriers,
                    loaded: false,
                },
                vec![Effect::ReleaseHeldTail],
            ),
            Self::Loading {
                permit,
                barriers: 0,
                loaded: true,
            } => (
                Self::Committing {
                    permit,
                    fate: Fate::Continue,
                },
                vec![Effect::Record(RecordKind::Commit(permit))],
            ),
            waiting => (waiting, vec![]),
        }
    }

    /// `Decided`, `Settling`, `Settled`: says its verdict to whoever asks.
    fn after_decision(&self, terms: &DestinationTerms, event: &DestinationEvent, verdict: Verdict) -> Step {
        use DestinationEvent as E;

        let illegal = || {
            Err(IllegalStep {
                role: "destination",
                state: self.name(),
                event: event.name(),
            })
        };
        let stay = |effects: Vec<Effect>| Ok((self.clone(), effects));
        match (event, self) {
            (E::Received(Message::Settled), Self::Decided(_)) => {
                let outcome = match verdict {
                    Verdict::Running => Outcome::RunsAtDestination,
                    Verdict::Aborted(_) | Verdict::Reverted => Outcome::RunsAtSource,
                };
                Ok((
                    Self::Settling(verdict),
                    vec![Effect::Record(RecordKind::Closed(outcome))],
                ))
            }
            (E::Recorded | E::JournalFailed, Self::Settling(_)) => Ok((Self::Settled(verdict), vec![])),
            (E::Received(Message::Query { .. } | Message::Permit(_) | Message::Cancel), _) => {
                stay(vec![Effect::Send(verdict.message())])
            }
            (E::Received(Message::Resolved(_)), _) => match verdict {
                Verdict::Running => stay(vec![
                    Effect::NeedsPerson(Doubt::Contradicted),
                    Effect::Send(verdict.message()),
                ]),
                Verdict::Aborted(_) | Verdict::Reverted => stay(vec![Effect::Send(verdict.message())]),
            },
            (E::Contact { journal }, Self::Decided(_)) if *journal == terms.source_journal => {
                stay(vec![Effect::Send(verdict.message())])
            }
            (E::Received(_) | E::Contact { .. } | E::TimedOut, _) => stay(vec![]),
            (E::VmmDead | E::VmmRunning | E::VmmPaused | E::Continued | E::ContinueFailed, _) => stay(vec![]),
            (E::StreamEnded(_) | E::BarrierPassed | E::Loaded | E::LoadFailed, _) => stay(vec![]),
            (E::Cancel, _) if matches!(verdict, Verdict::Aborted(_) | Verdict::Reverted) => stay(vec![]),
            _ => illegal(),
        }
    }
}

fn decide(verdict: Verdict) -> (DestinationState, Vec<Effect>) {
    (
        DestinationState::Decided(verdict),
        vec![Effect::Send(verdict.message())],
    )
}

impl DestinationTerms {
    /// What ends a migration as long as there is no COMMIT.
    fn ends_before_commit(&self, event: &DestinationEvent) -> Option<AbortReason> {
        match event {
            DestinationEvent::Cancel | DestinationEvent::Received(Message::Cancel) => Some(AbortReason::Cancelled),
            DestinationEvent::TimedOut => Some(AbortReason::TimedOut),
            DestinationEvent::Contact { journal } if *journal != self.source_journal => {
                Some(AbortReason::JournalChanged)
            }
            DestinationEvent::Received(Message::Resolved(_)) => Some(AbortReason::Resolved),
            _ => None,
        }
    }
}

/// COMMIT is recorded and RUNNING is not, and this is what is seen of the vmm.
pub(super) fn found(permit: Permit, fact: VmmFact) -> (DestinationState, Vec<Effect>) {
    use DestinationState as S;
    match fact {
        VmmFact::Running => record_running(permit),
        VmmFact::Paused if permit.was_running => (
            S::Continuing { permit, first: false },
            vec![Effect::ContinueVmm, Effect::Send(Message::Committed)],
        ),
        VmmFact::Paused => record_running(permit),
        VmmFact::Dead => {
            let (state, mut effects) = stuck(permit, Doubt::MayHaveRun);
            effects.insert(1, Effect::AskPeer);
            (state, effects)
        }
        VmmFact::Unreachable => (S::Recovering { permit }, vec![]),
    }
}

fn stuck(permit: Permit, doubt: Doubt) -> (DestinationState, Vec<Effect>) {
    let effects = vec![Effect::NeedsPerson(doubt), Effect::Send(Message::InDoubt { doubt })];
    (DestinationState::Stuck { permit, doubt }, effects)
}

fn kill(reason: AbortReason) -> (DestinationState, Vec<Effect>) {
    (DestinationState::Killing(reason), vec![Effect::KillVmm])
}

pub(super) fn record_abort(reason: AbortReason) -> (DestinationState, Vec<Effect>) {
    (
        DestinationState::RecordingAbort(reason),
        vec![Effect::Record(RecordKind::Abort(reason))],
    )
}

fn record_running(permit: Permit) -> (DestinationState, Vec<Effect>) {
    (
        DestinationState::RecordingRunning { permit },
        vec![Effect::Record(RecordKind::Running)],
    )
}

fn record_revert(permit: Permit) -> (DestinationState, Vec<Effect>) {
    (
        DestinationState::RecordingRevert { permit },
        vec![Effect::Record(RecordKind::Revert)],
    )
}

fn journal_lost() -> (DestinationState, Vec<Effect>) {
    let doubt = Doubt::JournalFailed;
    (
        DestinationState::JournalLost,
        vec![Effect::NeedsPerson(doubt), Effect::Send(Message::InDoubt { doubt })],
    )
}
