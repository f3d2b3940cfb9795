//! What operators, hypervisors, peers and disks get wrong: each gets one clear sentence, the right exit code, and a VM that is
//! where it was.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use common::guest::Machine;
use common::process::{Ended, Running};
use common::{Rig, Site, SitePlan, need, qemu, until};
use longhaul::proto::ownership::{JournalRecord, Outcome, RecordKind, Role};
use longhaul::proto::page::{JournalId, MigrationId};
use longhaul::store::journal::{Journal, JournalError};
use serde_json::json;

/// Slow enough that a guest full of random bytes is in pre-copy for minutes.
const CRAWL: &str = "4mbit";

/// A refusal touches nothing: exit code 2, every one of `words` in the reason, and the VM runs at A and nowhere else.
#[track_caller]
fn assert_refused(rig: &Rig, ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "refused");
    assert_says(report["reason"].as_str().unwrap(), words);
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
}

fn migrate(site: &Site) -> Ended {
    site.run(&["migrate", "vm", "--to", "b", "--output", "json"])
}

/// A rig whose VM runs at A.
fn booted(change: impl FnOnce(&mut SitePlan, &mut SitePlan)) -> Rig {
    let mut rig = Rig::planned(&[("vm", Machine::firmware())], change);
    rig.a.boot("vm");
    rig
}

/// A migration that copies slowly.
#[track_caller]
fn begin_slowly(site: &Site) -> Running {
    let client = site.begin(&["migrate", "vm", "--to", "b", "--rate", CRAWL, "--output", "json"]);
    site.until_phase("precopy");
    client
}

fn as_root() -> Result<(), String> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err("mounting a small disk needs root".to_owned())
    }
}

#[test]
fn a_peer_that_nobody_knows_is_refused_with_what_would_help() {
    need!(qemu());
    let rig = booted(|_, _| {});
    let ended = rig.a.run(&["migrate", "vm", "--to", "atlantis", "--output", "json"]);
    assert_refused(&rig, &ended, &["atlantis", "longhaul pair"]);
}

#[test]
fn a_peer_that_was_unpaired_at_either_end_is_refused() {
    need!(qemu());
    let rig = booted(|_, _| {});
    let gone = rig.b.run(&["unpair", "a"]);
    assert_eq!(gone.code, Some(0), "{gone:?}");
    // B does not know A any more, and A learns so from B.
    assert_refused(&rig, &migrate(&rig.a), &["b"]);
    let gone = rig.a.run(&["unpair", "b"]);
    assert_eq!(gone.code, Some(0), "{gone:?}");
    assert_refused(&rig, &migrate(&rig.a), &["b", "longhaul pair"]);
    // Both can be brought together again.
    rig.pair();
    let moved = migrate(&rig.a);
    assert_eq!(moved.code, Some(0), "{moved:?}");
}

#[test]
fn a_pairing_code_is_good_for_one_gateway_and_until_it_expires() {
    let mut rig = Rig::apart(&[], |_, _| {});
    let mut other = Rig::apart(&[], |_, _| {});
    for site in [&mut rig.a, &mut rig.b, &mut other.b] {
        site.start();
    }
    let invited = rig.a.run(&["pair", "--invite"]);
    let code = invited.stdout.trim().to_owned();
    // The answer may be lost on its way, so the gateway that used the code may ask again.
    for _ in 0..2 {
        let paired = rig.b.run(&["pair", &code]);
        assert_eq!(paired.code, Some(0), "{paired:?}");
    }
    let late = other.b.run(&["pair", &code]);
    assert_eq!(late.code, Some(2), "{late:?}");
    assert_says(&late.stderr, &["used"]);

    let brief = rig.a.run(&["pair", "--invite", "--valid-for", "1ms"]);
    let expired = other.b.run(&["pair", brief.stdout.trim()]);
    assert_eq!(expired.code, Some(2), "{expired:?}");
    assert_says(&expired.stderr, &["expired"]);
    for wrong in ["lh1.", "lh1.AAAA", "what is this", &code[..code.len() - 1]] {
        let ended = rig.b.run(&["pair", wrong]);
        assert_eq!(ended.code, Some(2), "{wrong}: {ended:?}");
        assert!(!ended.stderr.contains("panicked"), "{ended:?}");
    }
}

#[test]
fn a_peer_whose_gateway_is_down_is_refused_before_anything_is_touched() {
    need!(qemu());
    let mut rig = booted(|_, _| {});
    rig.b.kill();
    assert_refused(&rig, &migrate(&rig.a), &["b", "gateway"]);
}

#[test]
fn a_vm_that_is_not_configured_at_either_end_is_refused_by_name() {
    need!(qemu());
    let rig = booted(|_, b| b.vms.clear());
    let ended = rig.a.run(&["migrate", "nobody", "--to", "b"]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert_says(&ended.stderr, &["nobody", "[[vm]]"]);

    let ended = migrate(&rig.a);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert_says(ended.json()["reason"].as_str().unwrap(), &["vm", "[[vm]]", "b has no"]);
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
}

#[test]
fn a_qmp_socket_that_is_missing_or_speaks_something_else_is_refused_by_path() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::firmware())]);
    let socket = rig.a.plan().vm("vm").qmp.clone();
    let path = socket.to_str().unwrap().to_owned();
    let ended = migrate(&rig.a);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert_says(ended.json()["reason"].as_str().unwrap(), &[&path]);

    // Something that greets with words of its own, and something that says nothing at all.
    for greeting in [&b"220 mail.example ESMTP\r\n"[..], &[]] {
        let listener = UnixListener::bind(&socket).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(greeting).unwrap();
            // Until the gateway has had enough.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let ended = migrate(&rig.a);
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert_says(ended.json()["reason"].as_str().unwrap(), &[&path]);
        serving.join().unwrap();
        std::fs::remove_file(&socket).unwrap();
    }
}

#[test]
fn a_destination_with_other_memory_or_devices_is_refused_before_anything_moves() {
    need!(qemu());
    let other = |machine: Machine| {
        move |_: &mut SitePlan, b: &mut SitePlan| {
            let folder = b.vm("vm").qmp.parent().unwrap().to_owned();
            let mut command = machine.command(&folder, "{qmp}");
            command.extend(["-incoming", "defer", "-S"].map(str::to_owned));
            b.vm("vm").command = Some(command);
        }
    };
    let larger = Machine {
        memory_mb: 128,
        ..Machine::firmware()
    };
    let rig = booted(other(larger));
    assert_refused(&rig, &migrate(&rig.a), &["65544 KiB", "131080 KiB"]);
    // A dry run finds the same, and ends what it started for that.
    let dry = rig.a.run(&["migrate", "vm", "--to", "b", "--dry-run"]);
    assert_eq!(dry.code, Some(2), "{dry:?}");
    assert_says(&dry.stdout, &["65544 KiB", "131080 KiB"]);
    rig.assert_only(&[(&rig.a, "vm")]);

    let rig = booted(other(Machine::firmware().with(&["-device", "virtio-rng-pci"])));
    assert_refused(&rig, &migrate(&rig.a), &["virtio-rng"]);

    let chipset = Machine {
        machine: "q35",
        ..Machine::firmware()
    };
    let rig = booted(other(chipset));
    assert_refused(&rig, &migrate(&rig.a), &["q35"]);
}

#[test]
fn a_destination_command_that_ends_or_never_answers_is_told_and_leaves_nothing() {
    need!(qemu());
    let command = |words: &[&str]| {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        move |_: &mut SitePlan, b: &mut SitePlan| b.vm("vm").command = Some(words)
    };
    let marks = ["-incoming", "defer", "-S", "{qmp}"];
    let exits = [&["/bin/sh", "-c", "echo no such machine >&2; exit 7"][..], &marks].concat();
    let rig = booted(command(&exits));
    assert_refused(&rig, &migrate(&rig.a), &["no such machine"]);

    let missing = [&["/nonexistent/qemu"][..], &marks].concat();
    let rig = booted(command(&missing));
    assert_refused(&rig, &migrate(&rig.a), &["/nonexistent/qemu"]);
}

#[test]
fn a_vm_that_is_being_migrated_is_not_migrated_again() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    let first = begin_slowly(&rig.a);
    let second = rig.a.run(&["migrate", "vm", "--to", "b"]);
    assert_eq!(second.code, Some(2), "{second:?}");
    assert_says(&second.stderr, &["vm", "already", "longhaul status"]);
    let id = rig.a.run(&["list", "--output", "json"]).json()[0]["migration"].clone();
    let cancelled = rig.a.run(&["cancel", id.as_str().unwrap()]);
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    assert_eq!(first.wait().code, Some(1));
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
}

#[test]
fn a_migration_that_somebody_else_began_is_not_disturbed() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    let pipe = rig.file("elsewhere");
    let listener = UnixListener::bind(&pipe).unwrap();
    rig.a
        .qmp("vm", "migrate", &json!({ "uri": format!("unix:{}", pipe.display()) }))
        .unwrap();
    // It is never read, so that it goes on for as long as the test.
    let _unread = listener.accept().unwrap();
    let refused = migrate(&rig.a);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert_says(refused.json()["reason"].as_str().unwrap(), &["migrat"]);
    let status = rig.a.qmp("vm", "query-migrate", &json!({})).unwrap();
    assert_eq!(status["status"], "active");
}

#[test]
fn a_source_hypervisor_that_dies_in_precopy_is_reported_and_the_destination_forgets_it() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    let client = begin_slowly(&rig.a);
    until("a hypervisor waits at b", || rig.b.hypervisors("vm").len() == 1);
    rig.a.kill_hypervisors("vm");
    let ended = client.wait();
    // Nobody can say "as before" of a VM that is gone.
    assert_eq!(ended.code, Some(3), "{ended:?}");
    assert_says(ended.json()["reason"].as_str().unwrap(), &["hypervisor"]);
    rig.assert_only(&[]);
}

#[test]
fn a_destination_hypervisor_that_dies_in_precopy_leaves_the_vm_running_here() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    let client = begin_slowly(&rig.a);
    until("a hypervisor waits at b", || rig.b.hypervisors("vm").len() == 1);
    rig.b.kill_hypervisors("vm");
    let ended = client.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_says(ended.json()["reason"].as_str().unwrap(), &["destination"]);
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_second_gateway_on_the_same_port_says_who_has_it_and_touches_nothing() {
    let mut rig = Rig::apart(&[], |_, _| {});
    let taken = UdpSocket::bind(("127.0.0.1", rig.a.port())).unwrap();
    let folder = rig.path().to_owned();
    let refused = Running::start(rig.a.gateway_command(), &folder).wait();
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert_says(&refused.stderr, &[&format!("127.0.0.1:{}", rig.a.port()), "use"]);
    drop(taken);

    rig.a.start();
    let second = Running::start(rig.a.gateway_command(), &folder).wait();
    assert_eq!(second.code, Some(2), "{second:?}");
    assert!(!second.stderr.contains("panicked"), "{second:?}");
    assert_eq!(rig.a.run(&["list"]).code, Some(0), "the first one serves on");
}

#[test]
fn a_journal_that_is_damaged_is_not_guessed_at() {
    let mut rig = Rig::apart(&[], |_, _| {});
    rig.a.start();
    rig.a.kill();
    let journal = rig.a.state_dir().join("journal");
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes[..4096].fill(0xa5);
    std::fs::write(&journal, &bytes).unwrap();
    let folder = rig.path().to_owned();
    let refused = Running::start(rig.a.gateway_command(), &folder).wait();
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert_says(&refused.stderr, &[journal.to_str().unwrap()]);
    assert_eq!(std::fs::read(&journal).unwrap(), bytes, "it is left as it was found");
}

/// A file system of this size, unmounted when dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, kib: u32) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let size = format!("size={kib}k,mode=0700");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "longhaul-test"])
            .arg(at)
            .status();
        assert!(mounted.unwrap().success());
        Self(at)
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("ballast")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Uses up a journal's space but for the last few records, with migrations that are over.
fn use_up(journal: &Path) {
    let mut journal = Journal::open(journal, 0).unwrap();
    for number in 0_u64.. {
        for kind in [
            RecordKind::Started { was_running: true },
            RecordKind::Closed(Outcome::RunsAtSource),
        ] {
            let record = JournalRecord {
                migration: MigrationId(u128::from(number).to_be_bytes()),
                role: Role::Source,
                kind,
                peer: "b".to_owned(),
                peer_journal: JournalId([2; 16]),
                vm: "another".to_owned(),
                context: Vec::new(),
                unix_ms: 0,
            };
            match journal.append(record) {
                Ok(()) => {}
                Err(JournalError::Full { .. }) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_disk_that_is_full_where_the_journal_is_refuses_a_migration_at_either_end() {
    need!(qemu(), as_root());
    for full_at_a in [true, false] {
        let mut rig = Rig::apart(&[("vm", Machine::firmware())], |_, _| {});
        let state = if full_at_a { &rig.a } else { &rig.b }.state_dir().to_owned();
        let disk = SmallDisk::mount(&state, 1400);
        for site in [&mut rig.a, &mut rig.b] {
            site.start();
        }
        rig.pair();
        let site = if full_at_a { &mut rig.a } else { &mut rig.b };
        site.kill();
        disk.fill();
        use_up(&state.join("journal"));
        site.start();
        rig.a.boot("vm");
        let ended = migrate(&rig.a);
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert_says(
            ended.json()["reason"].as_str().unwrap(),
            &[state.to_str().unwrap(), "full"],
        );
        assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
        assert!(rig.b.hypervisors("vm").is_empty());
        rig.a.kill();
        rig.b.kill();
        drop(disk);
    }
}
