//! `migrate` and `attach`: the exit code says where the VM is, whatever happens on the way.

use std::sync::mpsc::{Receiver, Sender, channel};

use longhaul::api::{
    Cancellation, Check, Command, DryRun, Event, MigrationStatus, MigrationSummary, Outcome, Phase, Refusal,
    RefusalKind, Report, Role, StartRequest, Started,
};
use longhaul::proto::wire::message::DiskPlace;
use rustix::process::Signal;

use super::gateway::{DEADLINE, Gateway, ID, forecast, longhaul, progress, report, text};

/// A gateway that starts every migration and tells `events` of it.
fn tells(directory: &tempfile::TempDir, events: Vec<Event>) -> Gateway {
    Gateway::on(directory, move |command| match command {
        Command::Start { reply, .. } => reply.send(Ok(Started { migration: ID })),
        Command::Follow { migration, reply } => {
            assert_eq!(migration, ID);
            let (sender, receiver) = tokio::sync::mpsc::channel(16);
            for event in &events {
                sender.try_send(event.clone()).unwrap();
            }
            reply.send(Ok(receiver));
        }
        other => panic!("unexpected {other:?}"),
    })
}

/// What happened at a gateway under [`holds`].
#[derive(Debug, PartialEq)]
enum Seen {
    Followed,
    Cancelled,
    FollowerLeft,
}

/// A gateway whose migration goes on until it is cancelled, and what it sees.
fn holds(directory: &tempfile::TempDir, seen: Sender<Seen>) -> Gateway {
    let mut follower = None;
    let mut cancelled = false;
    Gateway::on(directory, move |command| match command {
        Command::Start { reply, .. } => reply.send(Ok(Started { migration: ID })),
        Command::Follow { reply, .. } => {
            let (sender, receiver) = tokio::sync::mpsc::channel(16);
            sender.try_send(progress(Phase::Precopy, 1, 10.0)).unwrap();
            reply.send(Ok(receiver));
            seen.send(Seen::Followed).unwrap();
            let (left, seen) = (sender.clone(), seen.clone());
            tokio::spawn(async move {
                left.closed().await;
                let _ = seen.send(Seen::FollowerLeft);
            });
            follower = Some(sender);
        }
        Command::Cancel { reply, .. } => {
            reply.send(Ok(if cancelled {
                Cancellation::AlreadyRequested
            } else {
                Cancellation::Requested
            }));
            cancelled = true;
            seen.send(Seen::Cancelled).unwrap();
        }
        Command::Status { reply, .. } => {
            // Lets the test end it when it likes.
            if let Some(follower) = &follower {
                follower.try_send(report(Outcome::Cancelled)).unwrap();
            }
            reply.send(Err(Refusal::new(RefusalKind::NotFound, "ended")));
        }
        other => panic!("unexpected {other:?}"),
    })
}

#[track_caller]
fn expect(seen: &Receiver<Seen>, what: &Seen) {
    assert_eq!(seen.recv_timeout(DEADLINE).as_ref(), Ok(what));
}

#[test]
fn the_exit_code_says_where_the_vm_is() {
    let outcomes = [
        (Outcome::Completed, 0),
        (Outcome::Failed, 1),
        (Outcome::Cancelled, 1),
        (Outcome::Refused, 2),
        (Outcome::InDoubt, 3),
    ];
    for (outcome, code) in outcomes {
        let directory = tempfile::tempdir().unwrap();
        let gateway = tells(&directory, vec![progress(Phase::Precopy, 1, 50.0), report(outcome)]);
        let output = gateway.run(&["migrate", "db-1", "--to", "tokyo"]);
        assert_eq!(output.status.code(), Some(code), "{outcome} {output:?}");
        let attached = gateway.run(&["attach", &ID.to_string()]);
        assert_eq!(attached.status.code(), Some(code), "{outcome} {attached:?}");
        let said = text(&output.stdout);
        assert!(said.contains("db-1") && said.contains(&ID.to_string()), "{said}");
        assert_eq!(
            said.contains("because the test says so"),
            outcome != Outcome::Completed,
            "{said}"
        );
    }
}

/// What every report has, whatever came of the migration.
const REPORT: [&str; 15] = [
    "vm",
    "peer",
    "outcome",
    "reason",
    "total_seconds",
    "downtime_seconds",
    "rounds",
    "vmm_bytes",
    "wire_bytes",
    "resent_bytes",
    "reduction_ratio",
    "pages",
    "known_pages",
    "stream_digest",
    "forecast",
];

#[test]
fn the_report_alone_goes_to_stdout_and_has_its_stable_names() {
    let directory = tempfile::tempdir().unwrap();
    let gateway = tells(
        &directory,
        vec![progress(Phase::Precopy, 1, 50.0), report(Outcome::Completed)],
    );
    let output = gateway.run(&["migrate", "db-1", "--to", "tokyo", "--output", "json"]);
    let said = text(&output.stdout);
    assert_eq!(said.lines().count(), 1, "{said}");
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    for name in REPORT {
        assert!(report.get(name).is_some(), "{name} is missing in {said}");
    }
    for name in ["zero", "same", "reference", "delta", "literal", "raw"] {
        assert!(report["pages"].get(name).is_some(), "{name} is missing in {said}");
    }
    for name in [
        "total_seconds",
        "wire_bytes",
        "downtime_seconds",
        "dirty_bytes_per_second",
        "converges",
        "reason",
    ] {
        assert!(report["forecast"].get(name).is_some(), "{name} is missing in {said}");
    }
    assert_eq!(report["outcome"], "completed");
    assert_eq!(report["migration"], ID.to_string());
    assert_eq!(report["rounds"][0]["number"], 1);
    assert!(text(&output.stderr).contains("precopy round 1"), "{output:?}");
}

#[test]
fn plain_progress_never_runs_backwards() {
    let directory = tempfile::tempdir().unwrap();
    let events = vec![
        progress(Phase::Checking, 0, 0.0),
        progress(Phase::Precopy, 1, 60.0),
        progress(Phase::Precopy, 2, 40.0),
        Event::Notice("the downtime limit of 300 ms cannot be kept".into()),
        progress(Phase::StopAndCopy, 2, 95.0),
        report(Outcome::Completed),
    ];
    let output = tells(&directory, events).run(&["migrate", "db-1", "--to", "tokyo"]);
    let said = text(&output.stderr);
    assert!(said.contains("the downtime limit of 300 ms cannot be kept"), "{said}");
    let shown: Vec<u32> = said
        .lines()
        .filter_map(|line| line.split_once(" %")?.0.rsplit(' ').next()?.parse().ok())
        .collect();
    assert_eq!(shown, [0, 60, 60, 95], "{said}");
}

#[test]
fn what_is_asked_for_reaches_the_gateway() {
    let directory = tempfile::tempdir().unwrap();
    let (sender, requests) = channel();
    let gateway = Gateway::on(&directory, move |command| match command {
        Command::Start { request, reply } => {
            sender.send(request).unwrap();
            reply.send(Ok(Started { migration: ID }));
        }
        other => panic!("unexpected {other:?}"),
    });
    let args = [
        "migrate",
        "db-1",
        "--to",
        "tokyo",
        "--downtime-limit",
        "300ms",
        "--rate",
        "800mbit",
        "--deadline",
        "30m",
        "--weight",
        "3",
        "--disk-rate",
        "400mbit",
        "--disk",
        "vda=fast/db-1.qcow2",
        "--disk",
        "vdb=slow/db-1/data.raw",
    ];
    let output = gateway.run(&[&args[..], &["--detach"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(text(&output.stdout).trim(), ID.to_string());
    let expected = StartRequest {
        vm: "db-1".into(),
        peer: "tokyo".into(),
        downtime_limit_seconds: Some(0.3),
        rate_bytes_per_second: Some(100_000_000),
        deadline_seconds: Some(1800.0),
        weight: std::num::NonZeroU32::new(3),
        warm: None,
        cold: false,
        disk_rate_bytes_per_second: Some(50_000_000),
        disk_places: [("vda", "fast/db-1.qcow2"), ("vdb", "slow/db-1/data.raw")]
            .map(|(disk, place)| DiskPlace {
                disk: disk.into(),
                place: place.into(),
            })
            .to_vec(),
    };
    assert_eq!(requests.recv_timeout(DEADLINE), Ok(expected));
}

#[test]
fn a_refused_start_touched_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let gateway = Gateway::on(&directory, |command| match command {
        Command::Start { reply, .. } => {
            reply.send(Err(Refusal::new(
                RefusalKind::Conflict,
                "db-1 is being migrated already",
            )));
        }
        other => panic!("unexpected {other:?}"),
    });
    let output = gateway.run(&["migrate", "db-1", "--to", "tokyo", "--output", "json"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("db-1 is being migrated already"),
        "{output:?}"
    );
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (report["outcome"].as_str(), report["vm"].as_str()),
        (Some("refused"), Some("db-1"))
    );
    for name in REPORT {
        assert!(report.get(name).is_some(), "{name} is missing in {report}");
    }
    assert_eq!(report.get("migration"), None, "there is no migration");
}

#[test]
fn without_a_gateway_nothing_is_touched_and_the_socket_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let output = longhaul(&["migrate", "db-1", "--to", "tokyo"], &socket)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("no gateway runs on the control socket"),
        "{output:?}"
    );
    assert!(text(&output.stderr).contains("none.sock"), "{output:?}");
}

#[test]
fn a_gateway_that_dies_while_it_starts_leaves_it_unknown() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let dies = std::thread::spawn(move || {
        use std::io::Read as _;
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 64]).unwrap();
    });
    let output = longhaul(&["migrate", "db-1", "--to", "tokyo"], &socket)
        .output()
        .unwrap();
    dies.join().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text(&output.stderr).contains("longhaul list"), "{output:?}");
}

#[test]
fn ctrl_c_cancels_and_a_second_one_says_that_it_does_so_already() {
    let directory = tempfile::tempdir().unwrap();
    let (sender, seen) = channel();
    let gateway = holds(&directory, sender);
    let running = gateway.start(&["migrate", "db-1", "--to", "tokyo"]);
    expect(&seen, &Seen::Followed);
    running.wait_for("precopy round 1");
    running.signal(Signal::INT);
    running.wait_for("cancelling");
    expect(&seen, &Seen::Cancelled);
    running.signal(Signal::INT);
    running.wait_for("already being cancelled");
    gateway.run(&["status", &ID.to_string()]);
    assert_eq!(running.finish().0, Some(1));
    expect(&seen, &Seen::FollowerLeft);
}

#[test]
fn a_lost_terminal_detaches_and_the_migration_goes_on() {
    for signal in [Signal::HUP, Signal::TERM, Signal::KILL] {
        let directory = tempfile::tempdir().unwrap();
        let (sender, seen) = channel();
        let gateway = holds(&directory, sender);
        let running = gateway.start(&["migrate", "db-1", "--to", "tokyo"]);
        expect(&seen, &Seen::Followed);
        running.wait_for("precopy round 1");
        running.signal(signal);
        let (code, said) = running.finish();
        if signal != Signal::KILL {
            assert_eq!(code, Some(3), "{said}");
            assert!(said.contains("longhaul attach"), "{said}");
        }
        // Not cancelled: the next that is seen is that nobody looks on any more.
        expect(&seen, &Seen::FollowerLeft);
    }
}

#[test]
fn ctrl_c_in_attach_only_detaches() {
    let directory = tempfile::tempdir().unwrap();
    let (sender, seen) = channel();
    let gateway = holds(&directory, sender);
    let running = gateway.start(&["attach", &ID.to_string()]);
    expect(&seen, &Seen::Followed);
    running.wait_for("precopy round 1");
    running.signal(Signal::INT);
    assert_eq!(running.finish().0, Some(3));
    expect(&seen, &Seen::FollowerLeft);
}

#[test]
fn a_gateway_that_comes_back_tells_how_it_ended() {
    let directory = tempfile::tempdir().unwrap();
    let (sender, seen) = channel();
    let first = holds(&directory, sender);
    let running = first.start(&["migrate", "db-1", "--to", "tokyo"]);
    expect(&seen, &Seen::Followed);
    drop(first);
    running.wait_for("the gateway went away");
    let _second = tells(&directory, vec![report(Outcome::Completed)]);
    assert_eq!(running.finish().0, Some(0));
}

#[test]
fn a_gateway_that_comes_back_without_a_record_has_not_touched_the_vm() {
    let directory = tempfile::tempdir().unwrap();
    let (sender, seen) = channel();
    let first = holds(&directory, sender);
    let running = first.start(&["migrate", "db-1", "--to", "tokyo"]);
    expect(&seen, &Seen::Followed);
    drop(first);
    running.wait_for("the gateway went away");
    let _second = Gateway::on(&directory, |command| match command {
        Command::Follow { reply, .. } => reply.send(Err(Refusal::new(RefusalKind::NotFound, "unknown"))),
        other => panic!("unexpected {other:?}"),
    });
    let (code, said) = running.finish();
    assert_eq!(code, Some(1));
    assert!(said.contains("was not touched"), "{said}");
}

#[test]
fn a_gateway_that_does_not_come_back_leaves_it_unknown() {
    let directory = tempfile::tempdir().unwrap();
    let (sender, seen) = channel();
    let gateway = holds(&directory, sender);
    let running = gateway.start(&["migrate", "db-1", "--to", "tokyo", "--wait-for-gateway", "300ms"]);
    expect(&seen, &Seen::Followed);
    drop(gateway);
    let (code, said) = running.finish();
    assert_eq!(code, Some(3));
    assert!(
        said.contains("where the VM is cannot be told") && said.contains("longhaul attach"),
        "{said}"
    );
}

/// A gateway whose streams of events are empty, and that answers for the status.
fn tells_nothing_but(directory: &tempfile::TempDir, status: MigrationStatus) -> Gateway {
    Gateway::on(directory, move |command| match command {
        Command::Follow { reply, .. } => reply.send(Ok(tokio::sync::mpsc::channel(1).1)),
        Command::Status { reply, .. } => reply.send(Ok(status.clone())),
        other => panic!("unexpected {other:?}"),
    })
}

fn status(phase: Phase, report: Option<Report>) -> MigrationStatus {
    MigrationStatus {
        summary: MigrationSummary {
            migration: ID,
            vm: "db-1".into(),
            peer: "tokyo".into(),
            role: Role::Destination,
            phase,
            outcome: report.as_ref().map(|report| report.outcome),
            percent: 0.0,
            elapsed_seconds: 1.0,
        },
        progress: None,
        report,
        advice: None,
        notices: Vec::new(),
    }
}

#[test]
fn a_stream_that_ends_without_a_report_is_answered_by_the_status() {
    let Event::Report(failed) = report(Outcome::Failed) else {
        unreachable!("it is a report")
    };
    for (status, code, sentence) in [
        (status(Phase::Done, Some(*failed)), 1, "because the test says so"),
        (status(Phase::Done, None), 3, "left no report"),
        (status(Phase::Precopy, None), 3, "tells nothing of the migration"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let gateway = tells_nothing_but(&directory, status);
        let output = gateway.run(&["attach", &ID.to_string(), "--wait-for-gateway", "600ms"]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let (said, noted) = (text(&output.stdout), text(&output.stderr));
        assert!(said.contains(sentence) || noted.contains(sentence), "{output:?}");
        assert!(noted.lines().count() <= 3, "{noted}");
    }
}

#[test]
fn a_dry_run_says_yes_only_if_every_check_passes_and_it_converges() {
    for (ok, converges, code) in [(true, true, 0), (false, true, 2), (true, false, 2)] {
        let directory = tempfile::tempdir().unwrap();
        let gateway = Gateway::on(&directory, move |command| match command {
            Command::Check { request, reply } => reply.send(Ok(DryRun {
                vm: request.vm,
                peer: request.peer,
                checks: vec![
                    Check {
                        name: "peer".into(),
                        ok: true,
                        detail: "connected, RTT 150 ms".into(),
                    },
                    Check {
                        name: "disks".into(),
                        ok,
                        detail: "virtio0 is writable and not shared".into(),
                    },
                ],
                forecast: Some(forecast(converges)),
            })),
            other => panic!("unexpected {other:?}"),
        });
        let output = gateway.run(&["migrate", "db-1", "--to", "tokyo", "--dry-run"]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let said = text(&output.stdout);
        assert!(
            said.contains("disks: virtio0 is writable") && said.contains("downtime 230 ms"),
            "{said}"
        );
        assert_eq!(said.contains("does NOT converge"), !converges, "{said}");
        let json = gateway.run(&["migrate", "db-1", "--to", "tokyo", "--dry-run", "--output", "json"]);
        let answer: DryRun = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!(answer.checks[1].ok, ok);
    }
}

#[test]
fn a_closed_stdout_does_not_change_the_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let gateway = tells(
        &directory,
        vec![progress(Phase::Precopy, 1, 50.0), report(Outcome::Completed)],
    );
    let socket = directory.path().join("control.sock");
    let mut child = longhaul(&["migrate", "db-1", "--to", "tokyo"], &socket)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Both readers are gone before anything is written.
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    drop(gateway);
}
