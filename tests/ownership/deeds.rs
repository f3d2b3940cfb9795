//! What the world does when a machine asks for an effect, and how that may go wrong.

use longhaul::proto::ownership::{DestinationEvent, Doubt, Effect, Message, RecordKind, SourceEvent};

use super::world::{Guest, Next, Rules, Vmm, World, crash_destination, crash_source};

impl Rules {
    /// Performs the next effect. A crash between a deed and its answer leaves the same world as one right after the answer, and
    /// is listed there.
    pub(crate) fn source_effect(&mut self, world: &World, all: &mut Vec<Next>) {
        let Some(effect) = world.source_queue.front().cloned() else {
            return;
        };
        let mut popped = world.clone();
        popped.source_queue.pop_front();
        let name = format!("source: {effect:?}");
        match effect {
            Effect::Record(kind) => {
                if popped.source_poisoned {
                    self.with(&popped, all, name, true, |rules, w| {
                        rules.tell_source(w, SourceEvent::JournalFailed)
                    });
                    return;
                }
                let mut durable = popped.clone();
                durable.source_journal.push(kind);
                self.with(&durable, all, name.clone(), true, |rules, w| {
                    rules.tell_source(w, SourceEvent::Recorded)
                });
                if self.faults.journal_fails {
                    for (written, what) in [(&durable, "written"), (&popped, "not written")] {
                        self.with(written, all, format!("{name} fails, {what}"), false, |rules, w| {
                            w.source_poisoned = true;
                            rules.tell_source(w, SourceEvent::JournalFailed);
                        });
                    }
                }
            }
            Effect::Send(message) => {
                let bit = self.number(&message);
                self.with(world, all, name, true, |_, w| {
                    w.source_queue.pop_front();
                    w.to_destination |= bit;
                });
            }
            Effect::NeedsPerson(doubt) => self.with(world, all, name, true, |_, w| {
                w.source_queue.pop_front();
                let reason = match doubt {
                    Doubt::JournalFailed => w.source_poisoned,
                    Doubt::JournalChanged => w.journal_lost,
                    Doubt::PeerInDoubt => true, // Weighed where the destination asked.
                    Doubt::CannotResume => w.resume_refused,
                    // A journal that failed under the record of an ABORT, or under the last record, is found out of date.
                    Doubt::RanAfterPermit => true,
                    Doubt::Contradicted => w.person_decided,
                    Doubt::NotFrozen => w.source_guest == Guest::Running,
                    _ => false,
                };
                if !reason {
                    w.asked_without_reason = Some(doubt);
                }
            }),
            Effect::AskPeer => self.with(world, all, name, true, |_, w| {
                w.source_queue.pop_front();
            }),
            Effect::StartMigrate => self.with(world, all, name, true, |_, w| {
                w.source_queue.pop_front();
                w.migrating = w.source_guest != Guest::Dead;
            }),
            Effect::CancelMigrate => self.with(world, all, name, true, |_, w| {
                w.source_queue.pop_front();
                w.migrating = false;
            }),
            Effect::FreezeVmm => {
                self.with(world, all, name, true, |rules, w| {
                    w.source_queue.pop_front();
                    let answer = match w.source_guest {
                        Guest::Dead => SourceEvent::VmmDead,
                        Guest::Running if !w.frozen => {
                            w.frozen = true;
                            SourceEvent::FreezeFailed
                        }
                        _ => {
                            w.frozen = true;
                            SourceEvent::Frozen
                        }
                    };
                    rules.tell_source(w, answer);
                });
            }
            Effect::ThawVmm => self.with(world, all, name, true, |_, w| {
                w.source_queue.pop_front();
                w.frozen = false;
            }),
            Effect::Resume => {
                let mut resumed = popped.clone();
                if resumed.source_guest != Guest::Dead {
                    resumed.source_guest = Guest::Running;
                }
                self.with(&resumed, all, name.clone(), true, |rules, w| {
                    let answer = if w.source_guest == Guest::Dead {
                        SourceEvent::VmmDead
                    } else {
                        SourceEvent::Resumed
                    };
                    rules.tell_source(w, answer);
                });
                if self.faults.crashes {
                    self.with(&resumed, all, format!("{name}, crash"), false, |_, w| crash_source(w));
                }
                if self.faults.source_vmm_dies {
                    self.with(&popped, all, format!("{name} is refused"), false, |rules, w| {
                        w.resume_refused = true;
                        rules.tell_source(w, SourceEvent::ResumeFailed);
                    });
                }
            }
            Effect::QuitVmm => self.with(world, all, name, true, |rules, w| {
                w.source_queue.pop_front();
                w.source_ended = true;
                w.source_guest = Guest::Dead;
                w.frozen = false;
                rules.tell_source(w, SourceEvent::Discarded);
            }),
            other => panic!("the source asks for {other:?}"),
        }
    }

    pub(crate) fn destination_effect(&mut self, world: &World, all: &mut Vec<Next>) {
        let Some(effect) = world.destination_queue.front().cloned() else {
            return;
        };
        let mut popped = world.clone();
        popped.destination_queue.pop_front();
        let name = format!("destination: {effect:?}");
        match effect {
            Effect::Record(kind) => {
                if popped.destination_poisoned {
                    self.with(&popped, all, name, true, |rules, w| {
                        rules.tell_destination(w, DestinationEvent::JournalFailed);
                    });
                    return;
                }
                let mut durable = popped.clone();
                durable.destination_journal.push(kind);
                self.with(&durable, all, name.clone(), true, |rules, w| {
                    rules.tell_destination(w, DestinationEvent::Recorded);
                });
                if self.faults.journal_fails {
                    for (written, what) in [(&durable, "written"), (&popped, "not written")] {
                        self.with(written, all, format!("{name} fails, {what}"), false, |rules, w| {
                            w.destination_poisoned = true;
                            rules.tell_destination(w, DestinationEvent::JournalFailed);
                        });
                    }
                }
            }
            Effect::Send(message) => {
                let informs = matches!(
                    message,
                    Message::InProgress | Message::MissingBytes | Message::Committed
                );
                if informs && !self.faults.chatty {
                    self.with(&popped, all, name, true, |_, _| {});
                    return;
                }
                let bit = self.number(&message);
                self.with(world, all, name, true, |_, w| {
                    w.destination_queue.pop_front();
                    w.to_source |= bit;
                });
            }
            Effect::NeedsPerson(doubt) => self.with(world, all, name, true, |_, w| {
                w.destination_queue.pop_front();
                let committed = w
                    .destination_journal
                    .iter()
                    .any(|kind| matches!(kind, RecordKind::Commit(_)));
                let reason = match doubt {
                    Doubt::JournalFailed => w.destination_poisoned,
                    Doubt::MayHaveRun => {
                        committed && w.vmm == Vmm::Dead && !w.destination_journal.contains(&RecordKind::Running)
                    }
                    Doubt::CannotContinue => committed,
                    Doubt::Contradicted => w.person_decided,
                    _ => false,
                };
                if !reason {
                    w.asked_without_reason = Some(doubt);
                }
            }),
            Effect::AskPeer => self.with(world, all, name, true, |_, w| {
                w.destination_queue.pop_front();
            }),
            Effect::LoadVmm => self.with(world, all, name, true, |_, w| {
                w.destination_queue.pop_front();
                if w.vmm == Vmm::None {
                    w.vmm = Vmm::Loading;
                }
            }),
            Effect::ReleaseHeldTail => self.with(world, all, name, true, |_, w| {
                w.destination_queue.pop_front();
                let forgotten = w.source_restored || w.source_forgot;
                let permitted = w
                    .source_journal
                    .iter()
                    .any(|kind| matches!(kind, RecordKind::Permit(_)));
                if !permitted && !forgotten {
                    w.broken = Some("the tail was released and no permit is recorded");
                }
                if w.vmm == Vmm::Loading {
                    w.vmm = Vmm::Finishing;
                }
            }),
            Effect::KillVmm => self.with(world, all, name, true, |rules, w| {
                w.destination_queue.pop_front();
                w.vmm = Vmm::Dead;
                rules.tell_destination(w, DestinationEvent::VmmDead);
            }),
            Effect::ContinueVmm => {
                if !popped
                    .destination_journal
                    .iter()
                    .any(|kind| matches!(kind, RecordKind::Commit(_)))
                {
                    popped.broken = Some("the guest is continued and no commit is recorded");
                }
                if popped.vmm == Vmm::Dead {
                    self.with(&popped, all, name, true, |rules, w| {
                        rules.tell_destination(w, DestinationEvent::VmmDead);
                    });
                    return;
                }
                let mut running = popped.clone();
                running.vmm = Vmm::Running;
                running.guest_ran_at_destination = true;
                self.with(&running, all, name.clone(), true, |rules, w| {
                    rules.tell_destination(w, DestinationEvent::Continued);
                });
                if self.faults.crashes {
                    self.with(&running, all, format!("{name}, crash"), false, |_, w| {
                        crash_destination(w)
                    });
                }
                if self.faults.vmm_trouble {
                    self.with(&popped, all, format!("{name} is refused"), false, |rules, w| {
                        let answer = match w.vmm {
                            Vmm::Running => DestinationEvent::VmmRunning,
                            _ => DestinationEvent::ContinueFailed,
                        };
                        rules.tell_destination(w, answer);
                    });
                    self.with(&running, all, format!("{name}, vmm dies"), false, |rules, w| {
                        w.vmm = Vmm::Dead;
                        rules.tell_destination(w, DestinationEvent::VmmDead);
                    });
                    self.with(&running, all, format!("{name}, answer is lost"), false, |rules, w| {
                        rules.tell_destination(w, DestinationEvent::VmmRunning);
                    });
                    self.with(&popped, all, format!("{name}, question is lost"), false, |rules, w| {
                        let seen = match w.vmm {
                            Vmm::Running => DestinationEvent::VmmRunning,
                            _ => DestinationEvent::VmmPaused,
                        };
                        rules.tell_destination(w, seen);
                    });
                }
            }
            other => panic!("the destination asks for {other:?}"),
        }
    }
}
