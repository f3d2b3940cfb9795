//! What happens around the gateways by itself: vmms, operators, other people's hands.

use longhaul::proto::ownership::{
    AbortReason, DestinationEvent, DestinationState, Message, RecordKind, Source, SourceEvent, SourceState,
};

use super::world::{Guest, Mutation, Next, OTHER_SUM, Rules, SUM, Vmm, World};

impl Rules {
    pub(crate) fn source_surroundings(&mut self, world: &World, all: &mut Vec<Next>) {
        if world.migrating && world.source.is_some() {
            self.with(world, all, "source vmm: migrated", true, |rules, w| {
                w.migrating = false;
                w.source_guest = Guest::Stopped;
                w.bytes = true;
                w.evidence = if rules.faults.vmm_trouble { 0b111 } else { 0b1000 };
            });
            if self.faults.vmm_trouble {
                self.with(world, all, "source vmm: migration fails", false, |rules, w| {
                    w.migrating = false;
                    rules.tell_source(w, SourceEvent::MigrateFailed);
                });
            }
        }
        if world.evidence == 0b1000 && world.source.is_some() {
            self.with(
                world,
                all,
                "source vmm: EOF, completed, postmigrate",
                true,
                |rules, w| {
                    w.evidence = 0;
                    for event in [
                        SourceEvent::StreamEnded(SUM),
                        SourceEvent::MigrateCompleted,
                        SourceEvent::PostMigrate,
                    ] {
                        rules.tell_source(w, event);
                    }
                },
            );
        }
        for (bit, event) in [
            (1, SourceEvent::StreamEnded(SUM)),
            (2, SourceEvent::MigrateCompleted),
            (4, SourceEvent::PostMigrate),
        ] {
            // The three are independent; two orders are enough to see that none is taken for all.
            let first = world.evidence.trailing_zeros() == u32::from(bit == 2) + 2 * u32::from(bit == 4);
            if world.evidence & bit != 0 && (first || bit == 4) && world.source.is_some() {
                self.with(world, all, format!("source vmm: {}", event.name()), true, |rules, w| {
                    w.evidence &= !bit;
                    rules.tell_source(w, event);
                });
            }
        }
        let unpermitted = world.source.as_ref().is_some_and(|source| {
            matches!(
                source.state(),
                SourceState::Starting { .. } | SourceState::Copying(_) | SourceState::Freezing(_)
            )
        });
        if unpermitted && self.faults.cancels {
            self.with(world, all, "operator cancels", false, |rules, w| {
                rules.tell_source(w, SourceEvent::Cancel)
            });
        }
        if self.faults.third_party && world.migrating && world.source.is_some() {
            self.with(world, all, "third party: migrate_cancel", false, |rules, w| {
                w.migrating = false;
                rules.tell_source(w, SourceEvent::MigrateFailed);
            });
        }
        if self.faults.third_party && world.source_guest == Guest::Stopped && !world.frozen {
            self.with(world, all, "third party: cont, unseen", false, |_, w| {
                w.source_guest = Guest::Running
            });
            self.with(world, all, "third party: cont, seen", false, |rules, w| {
                w.source_guest = Guest::Running;
                rules.tell_source(w, SourceEvent::VmmRunning);
            });
        }
        if self.faults.source_vmm_dies && world.source_guest != Guest::Dead {
            self.with(world, all, "source vmm dies", false, |rules, w| {
                w.source_guest = Guest::Dead;
                w.frozen = false;
                w.migrating = false;
                rules.tell_source(w, SourceEvent::VmmDead);
            });
        }
        if self.mutation == Mutation::SourceResumesWhenContactIsLost
            && matches!(
                world.source.as_ref().map(Source::state),
                Some(SourceState::Permitted { .. })
            )
        {
            self.with(world, all, "contact is lost", false, |rules, w| {
                let abort = Message::Aborted {
                    reason: AbortReason::TimedOut,
                };
                rules.tell_source(w, SourceEvent::Received(abort));
            });
        }
    }

    pub(crate) fn destination_surroundings(&mut self, world: &World, all: &mut Vec<Next>) {
        let Some(machine) = &world.destination else {
            return self.destination_vmm_dies(world, all);
        };
        let state = machine.state().clone();
        if !world.begun {
            self.with(world, all, "request to prepare arrives", true, |rules, w| {
                w.begun = true;
                if state == DestinationState::New {
                    rules.tell_destination(w, DestinationEvent::Begin);
                }
            });
        }
        if let DestinationState::Receiving { stream: None, .. } = state
            && world.bytes
            && world.vmm == Vmm::Loading
        {
            self.with(world, all, "last byte arrives", true, |rules, w| {
                rules.tell_destination(w, DestinationEvent::StreamEnded(SUM));
            });
            if self.faults.vmm_trouble {
                self.with(world, all, "last byte arrives, stream differs", false, |rules, w| {
                    w.stream_differs = true;
                    rules.tell_destination(w, DestinationEvent::StreamEnded(OTHER_SUM));
                });
            }
        }
        if let DestinationState::Receiving { barriers, .. } | DestinationState::Loading { barriers, .. } = state
            && barriers > 0
        {
            self.with(world, all, "disk is flushed", true, |rules, w| {
                rules.tell_destination(w, DestinationEvent::BarrierPassed);
            });
        }
        if world.vmm == Vmm::Finishing {
            self.with(world, all, "destination vmm: loaded", true, |rules, w| {
                w.vmm = Vmm::Loaded;
                if matches!(state, DestinationState::Loading { .. } | DestinationState::Killing(_)) {
                    rules.tell_destination(w, DestinationEvent::Loaded);
                }
            });
            if self.faults.vmm_trouble && matches!(state, DestinationState::Loading { .. }) {
                self.with(world, all, "destination vmm: load fails", false, |rules, w| {
                    rules.tell_destination(w, DestinationEvent::LoadFailed);
                });
            }
        }
        if self.faults.third_party && world.vmm == Vmm::Loaded {
            for (seen, what) in [(true, "seen"), (false, "unseen")] {
                self.with(
                    world,
                    all,
                    format!("third party: cont at the destination, {what}"),
                    false,
                    |rules, w| {
                        w.vmm = Vmm::Running;
                        if seen {
                            // Before COMMIT what it does is thrown away with it; unseen it is only one that is to be killed.
                            w.guest_ran_at_destination |= w
                                .destination_journal
                                .iter()
                                .any(|kind| matches!(kind, RecordKind::Commit(_)));
                            rules.tell_destination(w, DestinationEvent::VmmRunning);
                        }
                    },
                );
            }
        }
        if matches!(
            state,
            DestinationState::Preparing { .. } | DestinationState::Receiving { .. } | DestinationState::Loading { .. }
        ) {
            self.with(world, all, "destination waits too long", true, |rules, w| {
                rules.tell_destination(w, DestinationEvent::TimedOut);
            });
        }
        if let DestinationState::Recovering { .. } = state {
            self.with(world, all, "destination vmm is seen again", true, |rules, w| {
                let seen = match w.vmm {
                    Vmm::Running => DestinationEvent::VmmRunning,
                    Vmm::Loaded => DestinationEvent::VmmPaused,
                    _ => DestinationEvent::VmmDead,
                };
                rules.tell_destination(w, seen);
            });
        }
        self.destination_vmm_dies(world, all);
    }

    fn destination_vmm_dies(&mut self, world: &World, all: &mut Vec<Next>) {
        if self.faults.vmm_trouble && !matches!(world.vmm, Vmm::None | Vmm::Dead) {
            self.with(world, all, "destination vmm dies", false, |rules, w| {
                w.vmm = Vmm::Dead;
                rules.tell_destination(w, DestinationEvent::VmmDead);
            });
        }
    }
}
