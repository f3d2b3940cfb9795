//! A small world around the two machines: gateways with journals that can crash between any two effects, vmms that die, a network
//! that loses, repeats and reorders without limit, operators and other people. Everything that can happen next is listed.

use std::collections::VecDeque;

use longhaul::proto::ownership::{
    AbortReason, Claim, Destination, DestinationEvent, DestinationState, DestinationTerms, Doubt, Effect,
    JournalRecord, Message, Outcome, RecordKind, Resolution, Role, Source, SourceEvent, SourceState, SourceTerms,
    StreamSum, Verdict, VmmFact,
};
use longhaul::proto::page::{JournalId, MigrationId, StreamDigest};

pub(crate) const SOURCE_JOURNAL: JournalId = JournalId([1; 16]);
pub(crate) const DESTINATION_JOURNAL: JournalId = JournalId([2; 16]);
pub(crate) const NEW_JOURNAL: JournalId = JournalId([3; 16]);
pub(crate) const SUM: StreamSum = StreamSum {
    digest: StreamDigest([7; 32]),
    length: 1000,
};
pub(crate) const OTHER_SUM: StreamSum = StreamSum {
    digest: StreamDigest([8; 32]),
    length: 1000,
};

/// What may go wrong in an exploration.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    pub(crate) was_running: bool,
    pub(crate) barriers: u32,
    pub(crate) crashes: bool,
    pub(crate) vmm_trouble: bool,
    pub(crate) source_vmm_dies: bool,
    pub(crate) third_party: bool,
    pub(crate) cancels: bool,
    /// Whether messages that only inform reach the source, and stay in the network for ever like all others.
    pub(crate) chatty: bool,
    pub(crate) journal_fails: bool,
    pub(crate) people: bool,
    /// Whether a gateway that is down may find an older copy of its journal in the journal's place.
    pub(crate) restores: bool,
}

/// A rule that is broken on purpose, between the machines and the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    None,
    SourceResumesWhenContactIsLost,
    SourceDiscardsOnCommit,
    SourceSkipsTheFreeze,
    PermitIsSentBeforeItIsRecorded,
    AbortWithoutConfirmedDeath,
    CommitIsActedOnBeforeItIsRecorded,
    UnknownIsAnsweredWithoutRecord,
    UnknownIsAnsweredWhateverTheJournal,
    DeadVmmAfterCommitIsGuessedReverted,
    RevertWithoutConfirmedDeath,
    LateCommitAfterAbort,
    PermitIsBelievedForAnyStream,
    OldJournalIsOpened,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Guest {
    /// Executes, unless its process is frozen.
    Running,
    /// Paused by the operator before the migration.
    PausedBefore,
    /// postmigrate.
    Stopped,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Vmm {
    None,
    Loading,
    /// Given the tail.
    Finishing,
    Loaded,
    Running,
    Dead,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Option<Source>,
    pub(crate) source_queue: VecDeque<Effect>,
    pub(crate) source_journal: Vec<RecordKind>,
    pub(crate) source_poisoned: bool,
    /// An older copy lies in the place of the journal.
    pub(crate) source_restored: bool,
    /// Its journal was lost or moved away: the gateway runs and knows nothing of the migration.
    pub(crate) source_forgot: bool,
    pub(crate) source_guest: Guest,
    pub(crate) frozen: bool,
    pub(crate) migrating: bool,
    /// The vmm has sent everything; the bytes live in the source gateway that took them.
    pub(crate) bytes: bool,
    /// Which of EOF, completed, postmigrate the gateway has yet to see.
    pub(crate) evidence: u8,

    pub(crate) destination: Option<Destination>,
    pub(crate) destination_queue: VecDeque<Effect>,
    pub(crate) destination_journal: Vec<RecordKind>,
    pub(crate) destination_poisoned: bool,
    pub(crate) destination_restored: bool,
    pub(crate) journal_lost: bool,
    pub(crate) vmm: Vmm,
    /// The request to prepare has been delivered.
    pub(crate) begun: bool,

    /// Everything ever said, as numbers of `Explorer::messages`: anything of it may arrive at any time, any number of times.
    pub(crate) to_source: u64,
    pub(crate) to_destination: u64,

    /// What the destination was given is not what the source sent.
    pub(crate) stream_differs: bool,
    pub(crate) guest_ran_at_destination: bool,
    pub(crate) source_ended: bool,
    pub(crate) person_decided: bool,
    pub(crate) resume_refused: bool,
    pub(crate) destination_fenced: bool,
    /// A person was asked without one of the reasons that design knows.
    pub(crate) asked_without_reason: Option<Doubt>,
    /// An effect was asked for that must not be.
    pub(crate) broken: Option<&'static str>,
}

/// One thing that can happen, and the world after it. `healthy`: it needs no fault.
pub(crate) struct Next {
    pub(crate) what: String,
    pub(crate) healthy: bool,
    pub(crate) world: World,
}

pub(crate) struct Rules {
    pub(crate) faults: Faults,
    pub(crate) mutation: Mutation,
    pub(crate) messages: Vec<Message>,
}

impl Rules {
    pub(crate) fn new(faults: Faults, mutation: Mutation) -> Self {
        Self {
            faults,
            mutation,
            messages: vec![],
        }
    }

    pub(crate) fn start(&mut self) -> World {
        let mut world = World {
            source: Some(Source::new(self.source_terms())),
            source_queue: VecDeque::new(),
            source_journal: vec![],
            source_poisoned: false,
            source_restored: false,
            source_forgot: false,
            source_guest: if self.faults.was_running {
                Guest::Running
            } else {
                Guest::PausedBefore
            },
            frozen: false,
            migrating: false,
            bytes: false,
            evidence: 0,
            destination: Some(Destination::new(self.destination_terms(DESTINATION_JOURNAL))),
            destination_queue: VecDeque::new(),
            destination_journal: vec![],
            destination_poisoned: false,
            destination_restored: false,
            journal_lost: false,
            vmm: Vmm::None,
            begun: false,
            to_source: 0,
            to_destination: 0,
            stream_differs: false,
            guest_ran_at_destination: false,
            source_ended: false,
            person_decided: false,
            resume_refused: false,
            destination_fenced: false,
            asked_without_reason: None,
            broken: None,
        };
        self.tell_source(&mut world, SourceEvent::Begin);
        world
    }

    fn source_terms(&self) -> SourceTerms {
        SourceTerms {
            was_running: self.faults.was_running,
            destination_journal: DESTINATION_JOURNAL,
        }
    }

    fn destination_terms(&self, own_journal: JournalId) -> DestinationTerms {
        DestinationTerms {
            own_journal,
            source_journal: SOURCE_JOURNAL,
            barriers: self.faults.barriers,
        }
    }

    pub(crate) fn number(&mut self, message: &Message) -> u64 {
        let at = self
            .messages
            .iter()
            .position(|known| known == message)
            .unwrap_or_else(|| {
                self.messages.push(message.clone());
                self.messages.len() - 1
            });
        assert!(at < 64, "more messages than bits");
        1 << at
    }

    /// Feeds the source's machine; no step of this world may be illegal.
    pub(crate) fn tell_source(&mut self, world: &mut World, event: SourceEvent) {
        let Some(machine) = &mut world.source else { return };
        let before = machine.clone();
        let mut effects = match machine.handle(&event) {
            Ok(effects) => effects,
            Err(_) if self.mutation != Mutation::None => return,
            Err(error) => panic!(
                "{error}
in {before:?}
at {event:?}"
            ),
        };
        match self.mutation {
            Mutation::SourceSkipsTheFreeze => {
                if let Some(at) = effects.iter().position(|effect| *effect == Effect::FreezeVmm) {
                    effects.remove(at);
                    effects.extend(machine.handle(&SourceEvent::Frozen).expect("a freeze is awaited"));
                }
            }
            Mutation::PermitIsSentBeforeItIsRecorded => {
                if let Some(Effect::Record(RecordKind::Permit(permit))) = effects.last() {
                    let permit = *permit;
                    let at = effects.len() - 1;
                    effects.insert(at, Effect::Send(Message::Permit(permit)));
                }
            }
            Mutation::SourceDiscardsOnCommit if event == SourceEvent::Received(Message::Committed) => {
                effects.extend(
                    machine
                        .handle(&SourceEvent::Received(Message::Running))
                        .unwrap_or_default(),
                );
            }
            _ => {}
        }
        queue(&mut world.source_queue, effects);
    }

    pub(crate) fn tell_destination(&mut self, world: &mut World, event: DestinationEvent) {
        let Some(machine) = &mut world.destination else { return };
        let before = machine.clone();
        if self.mutation == Mutation::PermitIsBelievedForAnyStream
            && let DestinationEvent::StreamEnded(_) = event
        {
            let effects = machine
                .handle(&DestinationEvent::StreamEnded(SUM))
                .expect("a stream is awaited");
            queue(&mut world.destination_queue, effects);
            return;
        }
        if self.mutation == Mutation::UnknownIsAnsweredWhateverTheJournal
            && let DestinationEvent::Received(Message::Query { permit, bytes_lost, .. }) = event
        {
            let own = machine.terms().own_journal;
            let query = Message::Query {
                permit,
                bytes_lost,
                destination_journal: own,
            };
            let effects = machine.handle(&DestinationEvent::Received(query)).unwrap_or_default();
            queue(&mut world.destination_queue, effects);
            return;
        }
        let mut effects = match machine.handle(&event) {
            Ok(effects) => effects,
            Err(_) if self.mutation != Mutation::None => return,
            Err(error) => panic!("{error}\nin {before:?}\nat {event:?}"),
        };
        match (self.mutation, effects.last().cloned()) {
            (Mutation::AbortWithoutConfirmedDeath, Some(Effect::KillVmm))
                if matches!(machine.state(), DestinationState::Killing(_)) =>
            {
                effects.pop();
                effects.extend(machine.handle(&DestinationEvent::VmmDead).expect("a death is awaited"));
            }
            (Mutation::RevertWithoutConfirmedDeath, Some(Effect::KillVmm))
                if matches!(machine.state(), DestinationState::Reverting { .. }) =>
            {
                effects.pop();
                effects.extend(machine.handle(&DestinationEvent::VmmDead).expect("a death is awaited"));
            }
            (Mutation::CommitIsActedOnBeforeItIsRecorded, Some(Effect::Record(RecordKind::Commit(_)))) => {
                effects.insert(effects.len() - 1, Effect::ContinueVmm);
            }
            (
                Mutation::UnknownIsAnsweredWithoutRecord,
                Some(Effect::Record(RecordKind::Abort(reason @ AbortReason::NeverPrepared))),
            ) => {
                effects = vec![Effect::Send(Message::Aborted { reason })];
                *machine = before;
            }
            (Mutation::LateCommitAfterAbort, Some(Effect::Send(Message::Aborted { .. })))
                if event == DestinationEvent::Recorded && before.terms().source_journal == SOURCE_JOURNAL =>
            {
                *machine = Destination::new(*before.terms());
            }
            (
                Mutation::DeadVmmAfterCommitIsGuessedReverted,
                Some(Effect::Send(Message::InDoubt {
                    doubt: Doubt::MayHaveRun,
                })),
            ) => {
                effects = vec![Effect::Send(Message::Reverted)];
            }
            _ => {}
        }
        queue(&mut world.destination_queue, effects);
    }

    /// Everything that can happen next.
    pub(crate) fn next(&mut self, world: &World) -> Vec<Next> {
        let mut all = vec![];
        self.source_effect(world, &mut all);
        self.destination_effect(world, &mut all);
        self.source_surroundings(world, &mut all);
        self.destination_surroundings(world, &mut all);
        self.network(world, &mut all);
        self.crashes(world, &mut all);
        if self.faults.people {
            self.people(world, &mut all);
        }
        all
    }

    pub(crate) fn with(
        &mut self,
        world: &World,
        all: &mut Vec<Next>,
        what: impl Into<String>,
        healthy: bool,
        change: impl FnOnce(&mut Self, &mut World),
    ) {
        let mut after = world.clone();
        change(self, &mut after);
        all.push(Next {
            what: what.into(),
            healthy,
            world: after,
        });
    }

    fn network(&mut self, world: &World, all: &mut Vec<Next>) {
        for at in 0..self.messages.len() {
            let message = self.messages[at].clone();
            if world.to_destination & (1 << at) != 0 && world.destination.is_some() {
                self.with(
                    world,
                    all,
                    format!("destination hears {message:?}"),
                    true,
                    |rules, w| {
                        rules.tell_destination(w, DestinationEvent::Received(message.clone()));
                    },
                );
            }
            if world.to_source & (1 << at) != 0 && world.source.is_some() {
                self.with(world, all, format!("source hears {message:?}"), true, |rules, w| {
                    rules.tell_source(w, SourceEvent::Received(message.clone()));
                });
            }
        }
        // A contact is offered when its answer is not already on the way, which keeps queues short and loses no behaviour.
        if (world.source.is_some() || world.source_forgot) && world.destination.is_some() {
            if world.source.is_some() && world.source_queue.is_empty() {
                let journal = if world.journal_lost {
                    NEW_JOURNAL
                } else {
                    DESTINATION_JOURNAL
                };
                self.with(world, all, "source has contact", true, |rules, w| {
                    rules.tell_source(w, SourceEvent::Contact { journal });
                });
            }
            if world.destination_queue.is_empty() {
                let journal = if world.source_forgot {
                    NEW_JOURNAL
                } else {
                    SOURCE_JOURNAL
                };
                self.with(world, all, "destination has contact", true, |rules, w| {
                    rules.tell_destination(w, DestinationEvent::Contact { journal });
                });
            }
        }
    }

    fn crashes(&mut self, world: &World, all: &mut Vec<Next>) {
        if self.faults.crashes && world.source.is_some() {
            self.with(world, all, "source gateway crashes", false, |_, w| crash_source(w));
        }
        if self.faults.crashes && world.destination.is_some() {
            self.with(world, all, "destination gateway crashes", false, |_, w| {
                crash_destination(w)
            });
        }
        if self.faults.restores {
            self.restores(world, all);
        }
        if world.source.is_none() && !world.source_forgot && self.opens(world.source_restored) {
            self.with(world, all, "source gateway starts", true, |rules, w| {
                rules.restart_source(w)
            });
        }
        if world.destination.is_none() && self.opens(world.destination_restored) {
            let seen = match world.vmm {
                Vmm::None | Vmm::Dead => VmmFact::Dead,
                Vmm::Loading | Vmm::Finishing | Vmm::Loaded => VmmFact::Paused,
                Vmm::Running => VmmFact::Running,
            };
            for fact in [seen, VmmFact::Unreachable] {
                self.with(
                    world,
                    all,
                    format!("destination gateway starts, vmm {fact:?}"),
                    true,
                    |rules, w| {
                        rules.restart_destination(w, fact);
                    },
                );
            }
            if self.faults.people && !world.journal_lost {
                self.with(world, all, "destination journal is lost", false, |_, w| {
                    w.journal_lost = true;
                    w.destination_journal.clear();
                });
            }
        }
    }

    /// A journal that is older than it was is not opened.
    fn opens(&self, restored: bool) -> bool {
        !restored || self.mutation == Mutation::OldJournalIsOpened
    }

    /// While a gateway is down an older copy of its journal, as a backup may have it, is put back. A gateway that refuses it is
    /// started with a new journal by a person.
    fn restores(&mut self, world: &World, all: &mut Vec<Next>) {
        if world.source.is_none() && !world.source_forgot {
            for kept in (0..world.source_journal.len()).filter(|_| !world.source_restored) {
                self.with(
                    world,
                    all,
                    format!("source journal is restored, {kept} records"),
                    false,
                    |_, w| {
                        w.source_journal.truncate(kept);
                        w.source_restored = true;
                    },
                );
            }
            if world.source_restored {
                self.with(world, all, "source journal is moved away", false, |_, w| {
                    w.source_journal.clear();
                    w.source_restored = false;
                    w.source_forgot = true;
                });
            }
        }
        if world.destination.is_none() && !world.journal_lost {
            for kept in (0..world.destination_journal.len()).filter(|_| !world.destination_restored) {
                self.with(
                    world,
                    all,
                    format!("destination journal is restored, {kept} records"),
                    false,
                    |_, w| {
                        w.destination_journal.truncate(kept);
                        w.destination_restored = true;
                    },
                );
            }
            if world.destination_restored {
                self.with(world, all, "destination journal is moved away", false, |_, w| {
                    w.destination_journal.clear();
                    w.destination_restored = false;
                    w.journal_lost = true;
                });
            }
        }
    }

    fn restart_source(&mut self, world: &mut World) {
        let fact = match world.source_guest {
            Guest::Dead => VmmFact::Dead,
            Guest::Running if !world.frozen => VmmFact::Running,
            _ => VmmFact::Paused,
        };
        let records = records(&world.source_journal, Role::Source, DESTINATION_JOURNAL);
        let (machine, effects) = Source::recover(&records, fact).expect("the source wrote these records");
        world.source_poisoned = false;
        world.source_queue = effects.into();
        world.source = Some(machine);
    }

    fn restart_destination(&mut self, world: &mut World, fact: VmmFact) {
        let own = if world.journal_lost {
            NEW_JOURNAL
        } else {
            DESTINATION_JOURNAL
        };
        let records = records(&world.destination_journal, Role::Destination, SOURCE_JOURNAL);
        world.destination_poisoned = false;
        if records.is_empty() {
            world.destination = Some(Destination::new(self.destination_terms(own)));
            return;
        }
        if self.mutation == Mutation::LateCommitAfterAbort
            && matches!(world.destination_journal.last(), Some(RecordKind::Abort(_)))
        {
            world.destination = Some(Destination::new(self.destination_terms(own)));
            world.destination_journal.clear();
            return;
        }
        let (machine, effects) =
            Destination::recover(&records, own, fact).expect("the destination wrote these records");
        world.destination = Some(machine);
        world.destination_queue = effects.into();
        if self.mutation == Mutation::DeadVmmAfterCommitIsGuessedReverted {
            for effect in &mut world.destination_queue {
                if let Effect::Send(Message::InDoubt {
                    doubt: Doubt::MayHaveRun,
                }) = effect
                {
                    *effect = Effect::Send(Message::Reverted);
                }
            }
        }
    }

    fn people(&mut self, world: &World, all: &mut Vec<Next>) {
        let permitted = matches!(
            world.source.as_ref().map(Source::state),
            Some(SourceState::Permitted { .. })
        );
        if !world.destination_fenced && !world.destination_journal.is_empty() {
            self.with(world, all, "destination host is fenced", false, |_, w| {
                w.destination_fenced = true;
                crash_destination(w);
                w.vmm = Vmm::Dead;
            });
        }
        if permitted && world.destination_fenced && world.vmm == Vmm::Dead {
            self.with(
                world,
                all,
                "person at the source: the peer is fenced",
                false,
                |rules, w| {
                    w.person_decided = true;
                    rules.tell_source(w, resolve(Claim::PeerIsFenced));
                },
            );
        }
        if permitted && world.vmm == Vmm::Running {
            self.with(
                world,
                all,
                "person at the source: the peer owns it",
                false,
                |rules, w| {
                    w.person_decided = true;
                    rules.tell_source(w, resolve(Claim::PeerOwns));
                },
            );
        }
        let stuck = world
            .destination
            .as_ref()
            .is_some_and(|machine| matches!(machine.state(), DestinationState::Stuck { .. }));
        if stuck && !world.person_decided {
            self.with(
                world,
                all,
                "person at the destination: the peer owns it",
                false,
                |rules, w| {
                    w.person_decided = true;
                    let resolution = Resolution {
                        claim: Claim::PeerOwns,
                        by: "alice".into(),
                    };
                    rules.tell_destination(w, DestinationEvent::Resolve(resolution));
                },
            );
        }
    }
}

/// What is already about to be said is not queued again: the network repeats everything anyway.
fn queue(queue: &mut VecDeque<Effect>, effects: Vec<Effect>) {
    for effect in effects {
        let said = matches!(effect, Effect::Send(_) | Effect::NeedsPerson(_) | Effect::FreezeVmm);
        if !(said && queue.contains(&effect)) {
            queue.push_back(effect);
        }
    }
}

fn resolve(claim: Claim) -> SourceEvent {
    SourceEvent::Resolve(Resolution {
        claim,
        by: "alice".into(),
    })
}

pub(crate) fn crash_source(world: &mut World) {
    world.source = None;
    world.source_queue.clear();
    world.bytes = false;
    world.evidence = 0;
    // With `return-path` off the vmm sees its socket closed, fails the migration and lets the guest run on.
    world.migrating = false;
}

pub(crate) fn crash_destination(world: &mut World) {
    world.destination = None;
    world.destination_queue.clear();
}

fn records(kinds: &[RecordKind], role: Role, peer_journal: JournalId) -> Vec<JournalRecord> {
    kinds
        .iter()
        .map(|kind| JournalRecord {
            migration: MigrationId([9; 16]),
            role,
            kind: kind.clone(),
            peer: "site-b".into(),
            peer_journal,
            vm: "web".into(),
            context: vec![],
            unix_ms: 0,
        })
        .collect()
}

impl World {
    fn source_executes(&self) -> bool {
        self.source_guest == Guest::Running && !self.frozen
    }

    /// What must hold at every instant.
    pub(crate) fn violation(&self) -> Option<String> {
        if self.source_executes() && self.vmm == Vmm::Running {
            return Some("the guest runs at both sides".into());
        }
        if self.source_executes() && self.guest_ran_at_destination && !self.person_decided {
            return Some("the guest ran at the destination and runs again from its old state at the source".into());
        }
        let owned = self.guest_ran_at_destination
            || self
                .destination_journal
                .iter()
                .any(|kind| matches!(kind, RecordKind::Running | RecordKind::Resolved(_)))
            || self.journal_lost
            || self.person_decided;
        if self.source_ended && !owned {
            return Some("the source was ended and the destination does not own the VM".into());
        }
        let has = |test: fn(&RecordKind) -> bool| self.destination_journal.iter().any(test);
        if has(|kind| matches!(kind, RecordKind::Commit(_))) && has(|kind| matches!(kind, RecordKind::Abort(_))) {
            return Some("both COMMIT and ABORT are recorded".into());
        }
        if self.stream_differs && has(|kind| matches!(kind, RecordKind::Commit(_))) {
            return Some("a different stream was committed".into());
        }
        // A gateway that has lost its journal has lost its vmm too.
        let alive = !matches!(self.vmm, Vmm::None | Vmm::Dead) && !self.journal_lost;
        if alive && has(|kind| matches!(kind, RecordKind::Abort(_))) {
            return Some("an ABORT is recorded and the vmm lives".into());
        }
        if alive && has(|kind| matches!(kind, RecordKind::Revert)) {
            return Some("a REVERT is recorded and the vmm lives".into());
        }
        for queue in [&self.source_queue, &self.destination_queue] {
            if queue
                .iter()
                .filter(|effect| matches!(effect, Effect::Record(_)))
                .count()
                > 1
            {
                return Some("two records are asked for at once".into());
            }
        }
        if let Some(doubt) = self.asked_without_reason {
            return Some(format!("a person was asked because of {doubt:?}, which is not so"));
        }
        self.broken.map(str::to_owned)
    }

    /// Everything is over and exactly one side has the VM.
    pub(crate) fn is_good(&self, was_running: bool) -> bool {
        let (Some(source), Some(destination)) = (&self.source, &self.destination) else {
            return false;
        };
        if !self.source_queue.is_empty() || !self.destination_queue.is_empty() {
            return false;
        }

        match (source.outcome(), destination.verdict()) {
            (Some(Outcome::RunsAtDestination), Some(Verdict::Running)) => {
                self.vmm == if was_running { Vmm::Running } else { Vmm::Loaded }
            }
            (Some(Outcome::RunsAtSource), Some(Verdict::Aborted(_) | Verdict::Reverted)) => {
                self.vmm != Vmm::Running && self.source_executes() == was_running
            }
            (Some(Outcome::RunsAtSource), None) => {
                *destination.state() == DestinationState::New
                    && self.vmm == Vmm::None
                    && self.source_executes() == was_running
            }
            // Closed before it began, and the gateway has restarted since.
            (None, _) => {
                *source.state() == SourceState::Idle
                    && !matches!(self.vmm, Vmm::Running)
                    && matches!(destination.verdict(), None | Some(Verdict::Aborted(_)))
                    && matches!(
                        destination.state(),
                        DestinationState::New | DestinationState::Decided(_) | DestinationState::Settled(_)
                    )
                    && self.source_executes() == was_running
            }
            _ => false,
        }
    }

    /// One of the cases in which design leaves the decision to a person, or the VM is lost with its vmm.
    pub(crate) fn may_need_a_person(&self) -> bool {
        let has = |test: fn(&RecordKind) -> bool| self.destination_journal.iter().any(test);
        let lost_after_commit = has(|kind| matches!(kind, RecordKind::Commit(_))) && self.vmm == Vmm::Dead;
        let restored = self.source_restored || self.destination_restored || self.source_forgot;
        let broken_journal = self.source_poisoned || self.destination_poisoned || self.journal_lost || restored;
        let source_gone = self.source_guest == Guest::Dead;
        let refused = self.destination.as_ref().is_some_and(|machine| {
            matches!(
                machine.state(),
                DestinationState::Stuck {
                    doubt: Doubt::CannotContinue | Doubt::MayHaveRun,
                    ..
                }
            )
        });
        lost_after_commit || broken_journal || source_gone || refused || self.resume_refused || self.person_decided
    }
}
