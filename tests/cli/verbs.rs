//! Every other verb: 0 for yes, 2 for no, results on stdout, a sentence on stderr.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};

use longhaul::api::{
    Command, ControlSocket, Identity, Invitation, MigrationStatus, MigrationSummary, Outcome, Paired, PeerStatus,
    Phase, Refusal, RefusalKind, Resolution, Role, Statement, Trust,
};
use longhaul::store::trust::{Fingerprint, PairedBy};
use tempfile::TempDir;

use super::gateway::{DEADLINE, Gateway, ID, longhaul, plain, text};

const KEY: Fingerprint = Fingerprint([0x11; 32]);

fn summary() -> MigrationSummary {
    MigrationSummary {
        migration: ID,
        vm: "db-1".into(),
        peer: "tokyo".into(),
        role: Role::Source,
        phase: Phase::Precopy,
        outcome: None,
        percent: 62.0,
        elapsed_seconds: 9.0,
    }
}

fn paired(peer: String, by: PairedBy) -> Paired {
    Paired {
        peer,
        fingerprint: KEY,
        address: Some("tokyo.example.net:4646".into()),
        by,
    }
}

/// A gateway that knows one migration, one peer, and everything that it is told.
fn knows(directory: &TempDir) -> (Gateway, Receiver<String>) {
    let (sender, told) = channel();
    let gateway = Gateway::on(directory, move |command| {
        let tell = |what: String| sender.send(what).unwrap();
        let nothing = || Refusal::new(RefusalKind::NotFound, "there is no such migration");
        match command {
            Command::List { reply } => {
                let ended = MigrationSummary {
                    outcome: Some(Outcome::InDoubt),
                    role: Role::Destination,
                    ..summary()
                };
                reply.send(Ok(vec![summary(), ended]));
            }
            Command::Status { migration, reply } => reply.send(if migration == ID {
                let advice = Some("look at tokyo, then run `longhaul resolve db-1`".into());
                Ok(MigrationStatus {
                    summary: summary(),
                    progress: None,
                    report: None,
                    advice,
                    notices: Vec::new(),
                })
            } else {
                Err(nothing())
            }),
            Command::Cancel { reply, .. } => {
                reply.send(Err(Refusal::new(
                    RefusalKind::Conflict,
                    "the destination may run it already",
                )));
            }
            Command::Resolve { request, by, reply } => {
                tell(format!("{} {:?} by {by}", request.vm, request.statement));
                reply.send(Ok(Resolution {
                    migration: ID,
                    result: "db-1 runs here".into(),
                }));
            }
            Command::Peers { reply } => reply.send(Ok(vec![
                PeerStatus {
                    name: "tokyo".into(),
                    address: Some("tokyo.example.net:4646".into()),
                    trust: Trust::Paired,
                    connected: true,
                    rtt_seconds: Some(0.15),
                    rate_bytes_per_second: Some(25_000_000),
                    fingerprint: Some(KEY),
                },
                PeerStatus {
                    name: "oslo".into(),
                    address: None,
                    trust: Trust::Unpaired,
                    connected: false,
                    rtt_seconds: None,
                    rate_bytes_per_second: None,
                    fingerprint: None,
                },
            ])),
            Command::Invite { request, reply } => {
                tell(format!("{:?} {:?}", request.address, request.valid_for_seconds));
                reply.send(Ok(Invitation {
                    code: "lh1.Zm9v".into(),
                    valid_for_seconds: 600.0,
                }));
            }
            Command::AcceptInvite { request, reply } => {
                tell(request.code);
                reply.send(Ok(paired("frankfurt".into(), PairedBy::Accepted)));
            }
            Command::PairByFingerprint { request, reply } => {
                tell(format!("{} {} {}", request.peer, request.fingerprint, request.address));
                reply.send(Ok(paired(request.peer, PairedBy::Fingerprint)));
            }
            Command::Unpair { peer, reply } => {
                tell(peer.clone());
                let unknown = Refusal::new(RefusalKind::NotFound, "oslo is not paired");
                reply.send(if peer == "tokyo" { Ok(()) } else { Err(unknown) });
            }
            Command::Identity { reply } => reply.send(Ok(Identity {
                site: "frankfurt".into(),
                fingerprint: KEY,
                address: None,
                version: "0.1.0".into(),
            })),
            other => panic!("unexpected {other:?}"),
        }
    });
    (gateway, told)
}

#[test]
fn lists_and_states_are_for_people_and_for_programs() {
    let directory = tempfile::tempdir().unwrap();
    let (gateway, _told) = knows(&directory);
    let id = ID.to_string();
    for (args, words) in [
        (
            vec!["list"],
            vec!["db-1", "precopy", "62 %", "in_doubt", "destination", id.as_str()],
        ),
        (vec!["status", &id], vec!["db-1", "precopy", "longhaul resolve db-1"]),
        (
            vec!["peers"],
            vec!["tokyo", "paired", "not paired", "150 ms", "200mbit", "sha256:11111111-"],
        ),
        (vec!["fingerprint"], vec!["sha256:11111111-"]),
    ] {
        let output = gateway.run(&args);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let said = text(&output.stdout);
        for word in words {
            assert!(said.contains(word), "{word:?} is missing in {said}");
        }
        let json = gateway.run(&[&args[..], &["--output", "json"]].concat());
        serde_json::from_slice::<serde_json::Value>(&json.stdout).unwrap();
    }
    let peers: Vec<PeerStatus> = serde_json::from_slice(&gateway.run(&["peers", "--output", "json"]).stdout).unwrap();
    assert_eq!((peers[0].rtt_seconds, peers[1].trust), (Some(0.15), Trust::Unpaired));
}

#[test]
fn no_is_2_with_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let (gateway, _told) = knows(&directory);
    let (id, other) = (ID.to_string(), "0".repeat(32));
    for (args, sentence) in [
        (vec!["status", &other], "there is no such migration"),
        (vec!["cancel", &id], "the destination may run it already"),
        (vec!["unpair", "oslo"], "oslo is not paired"),
    ] {
        let output = gateway.run(&args);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(text(&output.stderr).contains(sentence), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
    assert_eq!(gateway.run(&["unpair", "tokyo"]).status.code(), Some(0));
}

#[test]
fn a_gateway_that_dies_before_it_answers_may_have_done_it() {
    let id = ID.to_string();
    for (args, code, look) in [
        (vec!["cancel", &id], 3, "longhaul status"),
        (vec!["switchover", &id], 3, "longhaul status"),
        (vec!["limit", &id, "--weight", "2"], 3, "longhaul limit"),
        (vec!["resolve", "db-1", "--runs-at-peer"], 3, "longhaul list"),
        (vec!["unpair", "tokyo"], 3, "longhaul peers"),
        (vec!["pair", "lh1.Zm9v"], 3, "longhaul peers"),
        // Who only looks has done nothing.
        (vec!["link-test", "--to", "tokyo"], 2, "went away before it answered"),
        (vec!["list"], 2, "went away before it answered"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let dies = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = std::io::Read::read(&mut stream, &mut [0; 64]).unwrap();
        });
        let output = longhaul(&args, &socket).output().unwrap();
        dies.join().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?} {output:?}");
        assert!(text(&output.stderr).contains(look), "{args:?} {output:?}");
    }
}

#[test]
fn what_a_person_states_is_what_is_resolved() {
    let directory = tempfile::tempdir().unwrap();
    let (gateway, told) = knows(&directory);
    for (flag, statement) in [
        ("--peer-is-fenced", Statement::PeerIsFenced),
        ("--runs-at-peer", Statement::RunsAtPeer),
        ("--lost-here", Statement::LostHere),
    ] {
        let output = gateway.run(&["resolve", "db-1", flag]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(text(&output.stdout).trim(), "db-1 runs here");
        let stated = told.recv_timeout(DEADLINE).unwrap();
        let by = stated.strip_prefix(&format!("db-1 {statement:?} by ")).unwrap();
        assert!(!by.is_empty() && by != "an unknown user", "{stated}");
    }
    for args in [
        vec!["resolve", "db-1"],
        vec!["resolve", "db-1", "--peer-is-fenced", "--lost-here"],
    ] {
        assert_eq!(gateway.run(&args).status.code(), Some(2));
    }
    assert!(told.try_recv().is_err(), "nothing is resolved without one statement");
}

#[test]
fn pairing_goes_by_code_from_arguments_or_stdin_or_by_fingerprint() {
    let directory = tempfile::tempdir().unwrap();
    let (gateway, told) = knows(&directory);
    let output = gateway.run(&["pair", "--invite", "--address", "gw.example.net", "--valid-for", "5m"]);
    assert_eq!(text(&output.stdout), "lh1.Zm9v\n");
    assert!(text(&output.stderr).contains("longhaul pair CODE"), "{output:?}");
    assert_eq!(
        told.recv_timeout(DEADLINE).unwrap(),
        "Some(\"gw.example.net:4646\") Some(300.0)"
    );

    let output = gateway.run(&["pair", "lh1.Zm9v"]);
    assert!(
        text(&output.stdout).contains("frankfurt at tokyo.example.net:4646 is trusted"),
        "{output:?}"
    );
    assert_eq!(told.recv_timeout(DEADLINE).unwrap(), "lh1.Zm9v");

    let socket = directory.path().join("control.sock");
    let mut child = longhaul(&["pair", "-"], &socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"lh1.YmFy\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(told.recv_timeout(DEADLINE).unwrap(), "lh1.YmFy");

    let key = KEY.to_string();
    let output = gateway.run(&[
        "pair",
        "--peer",
        "tokyo",
        "--fingerprint",
        &key,
        "--address",
        "tokyo.example.net",
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        told.recv_timeout(DEADLINE).unwrap(),
        format!("tokyo {key} tokyo.example.net:4646")
    );

    for wrong in [
        vec!["pair"],
        vec!["pair", "lh1.Zm9v", "--invite"],
        vec!["pair", "--peer", "tokyo"],
        vec![
            "pair",
            "--peer",
            "tokyo",
            "--fingerprint",
            "sha256:11",
            "--address",
            "tokyo",
        ],
        vec!["pair", "lh1.Zm9v", "--valid-for", "5m"],
        vec!["pair", "lh1.Zm9v", "--address", "tokyo"],
        vec!["pair", "lh1.Zm9v", "--fingerprint", &key],
        vec!["pair", "--invite", "--fingerprint", &key],
        vec!["pair", "--peer", "tokyo", "--fingerprint", &key],
    ] {
        let output = gateway.run(&wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?} {output:?}");
    }
    assert!(told.try_recv().is_err(), "nothing is paired by a wrong command");
}

#[test]
fn wrong_usage_is_2_and_says_what_is_right() {
    for (args, sentence) in [
        (vec!["teleport"], "teleport"),
        (vec!["migrate", "db-1"], "--to"),
        (vec!["migrate", "db 1", "--to", "tokyo"], "a name has 1 to 63"),
        (
            vec!["migrate", "db-1", "--to", "tokyo", "--rate", "800"],
            "write a rate with its unit",
        ),
        (
            vec!["migrate", "db-1", "--to", "tokyo", "--downtime-limit", "300"],
            "write a duration with its unit",
        ),
        (
            vec!["migrate", "db-1", "--to", "tokyo", "--dry-run", "--detach"],
            "cannot be used with",
        ),
        (vec!["attach", "7"], "32 hexadecimal digits"),
    ] {
        let output = plain(&args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?} {output:?}");
        assert!(text(&output.stderr).contains(sentence), "{args:?} {output:?}");
    }
}

#[test]
fn help_teaches_examples_and_exit_codes() {
    for verb in [vec![], vec!["migrate"], vec!["resolve"], vec!["pair"], vec!["gateway"]] {
        let output = plain(&[&verb[..], &["--help"]].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let said = text(&output.stdout);
        assert!(said.contains("Examples:") && said.contains("Exit codes"), "{said}");
    }
    assert_eq!(plain(&["--version"]).output().unwrap().status.code(), Some(0));
}

#[test]
fn check_config_reports_every_mistake_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gateway.toml");
    std::fs::write(&file, "memory_budget = \"1b\"\nlisten = \"here\"\nfoo = 1\n").unwrap();
    let path = file.to_str().unwrap();
    let output = plain(&["check-config", path]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    for word in [
        "4 mistakes",
        "line 1: memory_budget",
        "line 2: listen",
        "line 3: foo",
        "site: is missing",
    ] {
        assert!(said.contains(word), "{word:?} is missing in {said}");
    }
    let missing = directory.path().join("none.toml");
    assert_eq!(
        plain(&["check-config", missing.to_str().unwrap()])
            .output()
            .unwrap()
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn every_shipped_configuration_is_valid() {
    for name in ["gateway.toml", "site-a.toml", "site-b.toml"] {
        let file = format!("{}/config/{name}", env!("CARGO_MANIFEST_DIR"));
        let output = plain(&["check-config", &file]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
}

#[test]
fn a_flag_goes_over_the_environment_and_that_over_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("gateway.toml");
    std::fs::write(&file, "site = \"from-file\"\n").unwrap();
    let path = file.to_str().unwrap();
    let site = |args: &[&str], environment: Option<&str>| {
        let mut command = plain(&[&["check-config", path], args].concat());
        if let Some(site) = environment {
            command.env("LONGHAUL_SITE", site);
        }
        text(&command.output().unwrap().stdout)
    };
    assert!(site(&[], None).contains("site from-file"));
    assert!(site(&[], Some("from-environment")).contains("site from-environment"));
    assert!(site(&["--site", "from-flag"], Some("from-environment")).contains("site from-flag"));
}

#[test]
fn the_gateway_is_found_by_the_state_dir_of_its_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let (_gateway, _told) = knows(&directory);
    let file = directory.path().join("gateway.toml");
    let text = format!("state_dir = {:?}\nsite = \"no name\"\n", directory.path());
    std::fs::write(&file, text).unwrap();
    let output = plain(&["fingerprint", "--config", file.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let output = plain(&["fingerprint"])
        .env("LONGHAUL_STATE_DIR", directory.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_second_gateway_on_the_same_state_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _first = runtime
        .block_on(async { ControlSocket::bind(&directory.path().join("control.sock")) })
        .unwrap();
    let file = directory.path().join("gateway.toml");
    let config = format!(
        "site = \"a\"\nstate_dir = {:?}\n[metrics]\nlisten = \"off\"\n",
        directory.path()
    );
    std::fs::write(&file, config).unwrap();
    let output = plain(&["gateway", "--config", file.to_str().unwrap()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        text(&output.stderr).contains("another gateway runs on the control socket"),
        "{output:?}"
    );
}
