//! The transition tables, whole: every state that the machines can reach with sample data, against every event.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use longhaul::proto::ownership::{
    AbortReason, Claim, Destination, DestinationEvent, DestinationState, DestinationTerms, Doubt, Effect, IllegalStep,
    JournalRecord, Message, Permit, RecordKind, Resolution, Role, Source, SourceEvent, SourceState, SourceTerms,
    Standing, Verdict, VmmFact,
};
use longhaul::proto::page::MigrationId;

use crate::world::{DESTINATION_JOURNAL, NEW_JOURNAL, OTHER_SUM, SOURCE_JOURNAL, SUM};

fn permit(was_running: bool) -> Permit {
    Permit {
        stream: SUM,
        was_running,
        destination_journal: DESTINATION_JOURNAL,
    }
}

fn resolution(claim: Claim) -> Resolution {
    Resolution {
        claim,
        by: "alice".into(),
    }
}

fn source_events() -> Vec<SourceEvent> {
    use SourceEvent as E;
    let mut events = vec![
        E::Begin,
        E::Recorded,
        E::JournalFailed,
        E::StreamEnded(SUM),
        E::StreamEnded(OTHER_SUM),
        E::MigrateCompleted,
        E::PostMigrate,
        E::MigrateFailed,
        E::Frozen,
        E::FreezeFailed,
        E::Resumed,
        E::ResumeFailed,
        E::Discarded,
        E::VmmDead,
        E::VmmRunning,
        E::VmmPaused,
        E::Cancel,
        E::Contact {
            journal: DESTINATION_JOURNAL,
        },
        E::Contact { journal: NEW_JOURNAL },
        E::Resolve(resolution(Claim::PeerIsFenced)),
        E::Resolve(resolution(Claim::PeerOwns)),
    ];
    events.extend(
        [
            Message::InProgress,
            Message::MissingBytes,
            Message::Committed,
            Message::Running,
            Message::Aborted {
                reason: AbortReason::TimedOut,
            },
            Message::Reverted,
            Message::Unknown,
            Message::InDoubt {
                doubt: Doubt::MayHaveRun,
            },
            Message::Settled,
        ]
        .map(E::Received),
    );
    events
}

fn destination_events(was_running: bool) -> Vec<DestinationEvent> {
    use DestinationEvent as E;
    let query = |permit, bytes_lost, destination_journal| Message::Query {
        permit,
        bytes_lost,
        destination_journal,
    };
    let mut events = vec![
        E::Begin,
        E::Recorded,
        E::JournalFailed,
        E::StreamEnded(SUM),
        E::StreamEnded(OTHER_SUM),
        E::BarrierPassed,
        E::Loaded,
        E::LoadFailed,
        E::Continued,
        E::ContinueFailed,
        E::VmmDead,
        E::VmmRunning,
        E::VmmPaused,
        E::TimedOut,
        E::Cancel,
        E::Contact {
            journal: SOURCE_JOURNAL,
        },
        E::Contact { journal: NEW_JOURNAL },
        E::Resolve(resolution(Claim::PeerIsFenced)),
        E::Resolve(resolution(Claim::PeerOwns)),
    ];
    events.extend(
        [
            Message::Permit(permit(was_running)),
            Message::Permit(Permit {
                destination_journal: NEW_JOURNAL,
                ..permit(was_running)
            }),
            query(Some(permit(was_running)), false, DESTINATION_JOURNAL),
            query(Some(permit(was_running)), true, DESTINATION_JOURNAL),
            query(None, true, DESTINATION_JOURNAL),
            query(Some(permit(was_running)), false, NEW_JOURNAL),
            Message::Cancel,
            Message::Settled,
            Message::Resolved(resolution(Claim::PeerIsFenced)),
            Message::Running,
        ]
        .map(E::Received),
    );
    events
}

/// The table, a block of text for each state, and the graph of the states by name. `step` is the machine's; `starts` are its
/// first state and those after recoveries.
fn table<S: Clone + PartialEq + std::fmt::Debug, E: std::fmt::Debug>(
    starts: Vec<S>,
    events: &[E],
    name: impl Fn(&S) -> &'static str,
    event_name: impl Fn(&E) -> &'static str,
    step: impl Fn(&S, &E) -> Result<(S, Vec<Effect>), IllegalStep>,
) -> (Vec<String>, String) {
    let mut states = starts;
    let mut blocks = vec![];
    let mut edges: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    let mut at = 0;
    while at < states.len() {
        let state = states[at].clone();
        let mut rows: Vec<(String, Vec<String>)> = vec![];
        for event in events {
            let row = match step(&state, event) {
                Ok((after, effects)) => {
                    let to = if after == state {
                        "stays".to_owned()
                    } else {
                        format!("{after:?}")
                    };
                    if name(&after) != name(&state) {
                        let labels = edges.entry((name(&state), name(&after))).or_default();
                        if !labels.contains(&event_name(event)) {
                            labels.push(event_name(event));
                        }
                    }
                    let record = effects.iter().position(|effect| matches!(effect, Effect::Record(_)));
                    assert!(
                        record.is_none_or(|at| at == effects.len() - 1),
                        "a record must be the last effect: {state:?} at {event:?} gives {effects:?}"
                    );
                    if !states.contains(&after) {
                        states.push(after);
                    }
                    let does = if effects.is_empty() {
                        String::new()
                    } else {
                        format!(" {effects:?}")
                    };
                    short(&format!("{to}{does}"))
                }
                Err(error) => {
                    assert_eq!((error.state, error.event), (name(&state), event_name(event)));
                    "illegal".to_owned()
                }
            };
            let event = short(&format!("{event:?}")).replace("Received", "");
            match rows.iter_mut().find(|(known, _)| *known == row) {
                Some((_, events)) => events.push(event),
                None => rows.push((row, vec![event])),
            }
        }
        let mut text = format!("{}\n", short(&format!("{state:?}")));
        for (row, events) in rows {
            let _ = writeln!(text, "    {row}\n        {}", events.join(", "));
        }
        blocks.push(text);
        at += 1;
    }
    let mut graph = "digraph {\n".to_owned();
    for ((from, to), labels) in edges {
        let _ = writeln!(graph, "    \"{from}\" -> \"{to}\" [label=\"{}\"]", labels.join("\\n"));
    }
    graph.push_str("}\n");
    (blocks, graph)
}

/// Sample data by short names.
fn short(text: &str) -> String {
    let mut text = text.to_owned();
    for (long, name) in [
        (format!("{SUM:?}"), "SUM"),
        (format!("{OTHER_SUM:?}"), "OTHER"),
        (format!("{DESTINATION_JOURNAL:?}"), "DESTINATION"),
        (format!("{SOURCE_JOURNAL:?}"), "SOURCE"),
        (format!("{NEW_JOURNAL:?}"), "NEW"),
    ] {
        text = text.replace(&long, name);
    }
    for was_running in [true, false] {
        let permit = format!("Permit {{ stream: SUM, was_running: {was_running}, destination_journal: ");
        text = text
            .replace(&format!("{permit}DESTINATION }}"), "PERMIT")
            .replace(&format!("{permit}NEW }}"), "PERMIT to NEW");
    }
    text
}

fn records(role: Role, kinds: &[RecordKind]) -> Vec<JournalRecord> {
    kinds
        .iter()
        .map(|kind| JournalRecord {
            migration: MigrationId([9; 16]),
            role,
            kind: kind.clone(),
            peer: "peer".into(),
            peer_journal: if role == Role::Source {
                DESTINATION_JOURNAL
            } else {
                SOURCE_JOURNAL
            },
            vm: "web".into(),
            context: vec![],
            unix_ms: 1,
        })
        .collect()
}

const FACTS: [VmmFact; 4] = [VmmFact::Running, VmmFact::Paused, VmmFact::Dead, VmmFact::Unreachable];

fn source_histories(was_running: bool) -> Vec<Vec<RecordKind>> {
    use RecordKind as K;
    let started = K::Started { was_running };
    let permit = K::Permit(permit(was_running));
    let aborted = Verdict::Aborted(AbortReason::TimedOut);
    let fenced = K::Resolved(resolution(Claim::PeerIsFenced));
    let owns = K::Resolved(resolution(Claim::PeerOwns));
    let closed = K::Closed(longhaul::proto::ownership::Outcome::RunsAtSource);
    vec![
        vec![],
        vec![started.clone()],
        vec![started.clone(), permit.clone()],
        vec![started.clone(), permit.clone(), K::Learnt(Verdict::Running)],
        vec![started.clone(), permit.clone(), K::Learnt(aborted)],
        vec![started.clone(), permit.clone(), K::Learnt(Verdict::Reverted)],
        vec![started.clone(), permit.clone(), fenced],
        vec![started.clone(), permit.clone(), owns],
        vec![started.clone(), closed.clone()],
        vec![started, permit, K::Learnt(aborted), closed],
    ]
}

fn destination_histories(was_running: bool) -> Vec<Vec<RecordKind>> {
    use RecordKind as K;
    let commit = K::Commit(permit(was_running));
    let moved = K::Closed(longhaul::proto::ownership::Outcome::RunsAtDestination);
    vec![
        vec![],
        vec![K::Prepared],
        vec![K::Abort(AbortReason::NeverPrepared)],
        vec![K::Prepared, K::Abort(AbortReason::TimedOut)],
        vec![K::Prepared, commit.clone()],
        vec![K::Prepared, commit.clone(), K::Running],
        vec![K::Prepared, commit.clone(), K::Revert],
        vec![K::Prepared, commit.clone(), K::Resolved(resolution(Claim::PeerOwns))],
        vec![
            K::Prepared,
            commit.clone(),
            K::Resolved(resolution(Claim::PeerIsFenced)),
        ],
        vec![K::Prepared, commit, K::Running, moved],
    ]
}

fn golden(name: &str, text: String) {
    insta::with_settings!({ snapshot_path => "goldens", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn every_step_of_the_source_is_as_written_down() {
    let mut running = vec![];
    for was_running in [true, false] {
        let terms = SourceTerms {
            was_running,
            destination_journal: DESTINATION_JOURNAL,
        };
        let mut starts = vec![SourceState::Idle];
        for history in source_histories(was_running) {
            for fact in FACTS {
                let (machine, _) = Source::recover(&records(Role::Source, &history), fact).unwrap();
                if !starts.contains(machine.state()) {
                    starts.push(machine.state().clone());
                }
            }
        }
        let (blocks, graph) = table(
            starts,
            &source_events(),
            SourceState::name,
            SourceEvent::name,
            |state, event| state.step(&terms, event),
        );
        if was_running {
            golden("source", blocks.join("\n"));
            let page = include_str!("../../docs/ownership.md");
            assert!(
                page.contains(&graph),
                "docs/ownership.md shows another graph than this one:\n{graph}"
            );
            running = blocks;
        } else {
            // Only what a guest that was paused changes.
            golden(
                "source_paused_guest",
                blocks
                    .into_iter()
                    .filter(|block| !running.contains(block))
                    .collect::<Vec<_>>()
                    .join("\n"),
            );
        }
    }
}

#[test]
fn every_step_of_the_destination_is_as_written_down() {
    let mut running = vec![];
    for was_running in [true, false] {
        let terms = DestinationTerms {
            own_journal: DESTINATION_JOURNAL,
            source_journal: SOURCE_JOURNAL,
            barriers: 1,
        };
        let mut starts = vec![DestinationState::New];
        for history in destination_histories(was_running) {
            for fact in FACTS {
                let records = records(Role::Destination, &history);
                let (machine, _) = Destination::recover(&records, DESTINATION_JOURNAL, fact).unwrap();
                if !starts.contains(machine.state()) {
                    starts.push(machine.state().clone());
                }
            }
        }
        let (blocks, graph) = table(
            starts,
            &destination_events(was_running),
            DestinationState::name,
            DestinationEvent::name,
            |state, event| state.step(&terms, event),
        );
        if was_running {
            golden("destination", blocks.join("\n"));
            let page = include_str!("../../docs/ownership.md");
            assert!(
                page.contains(&graph),
                "docs/ownership.md shows another graph than this one:\n{graph}"
            );
            running = blocks;
        } else {
            // Only what a guest that was paused changes.
            golden(
                "destination_paused_guest",
                blocks
                    .into_iter()
                    .filter(|block| !running.contains(block))
                    .collect::<Vec<_>>()
                    .join("\n"),
            );
        }
    }
}

#[test]
fn every_recovery_is_as_written_down() {
    let mut text = String::new();
    for was_running in [true, false] {
        let _ = writeln!(
            text,
            "guest {} before\n",
            if was_running { "ran" } else { "was paused" }
        );
        for history in source_histories(was_running) {
            let _ = writeln!(text, "source {}", short(&format!("{history:?}")));
            for fact in FACTS {
                let (machine, effects) = Source::recover(&records(Role::Source, &history), fact).unwrap();
                let shown = short(&format!("{:?} {effects:?}", machine.state()));
                let _ = writeln!(text, "    vmm {fact:?} -> {shown}");
            }
        }
        for history in destination_histories(was_running) {
            let records = records(Role::Destination, &history);
            let standing = Standing::of(history.iter());
            let _ = writeln!(text, "destination {} {standing:?}", short(&format!("{history:?}")));
            for fact in FACTS {
                let (machine, effects) = Destination::recover(&records, DESTINATION_JOURNAL, fact).unwrap();
                let shown = short(&format!("{:?} {effects:?}", machine.state()));
                let _ = writeln!(text, "    vmm {fact:?} -> {shown}");
            }
        }
    }
    golden("recovery", text);
}

#[test]
fn records_that_no_machine_writes_are_refused_by_name() {
    let commit = RecordKind::Commit(permit(true));
    let abort = RecordKind::Abort(AbortReason::TimedOut);
    for kinds in [
        vec![commit.clone()],
        vec![RecordKind::Prepared, commit, abort.clone()],
        vec![abort.clone(), RecordKind::Prepared],
        vec![RecordKind::Prepared, RecordKind::Running],
    ] {
        let records = records(Role::Destination, &kinds);
        let error = Destination::recover(&records, DESTINATION_JOURNAL, VmmFact::Dead).unwrap_err();
        assert!(error.to_string().contains("no destination writes"), "{error}");
    }
    for kinds in [
        vec![RecordKind::Permit(permit(true))],
        vec![
            RecordKind::Started { was_running: true },
            RecordKind::Learnt(Verdict::Running),
        ],
        vec![RecordKind::Started { was_running: true }, abort],
    ] {
        let error = Source::recover(&records(Role::Source, &kinds), VmmFact::Paused).unwrap_err();
        assert!(error.to_string().contains("no source writes"), "{error}");
    }
}
