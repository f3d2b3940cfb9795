//! Guests of KVM under the native engine, moved by real gateways on loopback.

#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use common::guest::Machine;
use common::process::Running;
use common::{PATIENCE, Rig, Site, need, qmp, until, until_some};
use serde_json::{Value, json};

/// KVM, as the demo guest needs it.
fn kvm() -> Result<(), String> {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    opened
        .map(drop)
        .map_err(|error| format!("/dev/kvm cannot be opened: {error}"))
}

/// A guest with two vCPUs that writes 64 bytes to each of so many pages a second.
fn guest(pages_per_second: u32, more: &[&str]) -> Machine {
    let rate = pages_per_second.to_string();
    let words = ["--vcpus", "2", "--working-set", "8mib", "--pages-per-second", &rate];
    Machine::native(64, &[&words[..], more].concat())
}

/// A rig whose guest tells its signs of life at each site.
fn rig(machine: &Machine) -> Rig {
    Rig::planned(&[("vm", machine.clone())], |a, b| {
        for site in [a, b] {
            let beat = site.folder.join("vm.beat").display().to_string();
            let vm = site.vm("vm");
            vm.machine = vm.machine.clone().with_native(&["--heartbeat", &beat]);
            vm.command.as_mut().unwrap().extend(["--heartbeat".to_owned(), beat]);
        }
    })
}

/// What the guest says of its memory, where it runs.
struct Beats {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Beats {
    #[track_caller]
    fn at(site: &Site) -> Self {
        let path: PathBuf = site.folder().join("vm.beat");
        let stream = until_some("the guest's signs of life are told", || UnixStream::connect(&path).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            reader: BufReader::new(stream.try_clone().unwrap()),
            writer: stream,
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the guest's signs of life end: {line:?}");
        line
    }

    /// Signs, pages written, errors.
    fn beat(&mut self) -> (u64, u64, u64) {
        loop {
            let line = self.line();
            if let Some(numbers) = line.strip_prefix("beat ") {
                let numbers: Vec<u64> = numbers.split_whitespace().map(|word| word.parse().unwrap()).collect();
                return (numbers[0], numbers[1], numbers[3]);
            }
        }
    }

    /// Every page is looked at from outside, and none is wrong, nor was when the guest looked at it; and it writes on.
    #[track_caller]
    fn prove(&mut self, pages: u64) {
        let written = self.verify(pages);
        until("the guest writes on", || self.beat().1 > written);
    }

    /// Every page is looked at from outside. How many the guest has written.
    #[track_caller]
    fn verify(&mut self, pages: u64) -> u64 {
        self.writer.write_all(b"verify 7\n").unwrap();
        let answer = loop {
            let line = self.line();
            if line.starts_with("verified ") {
                break line;
            }
        };
        let numbers: Vec<u64> = answer[9..]
            .split_whitespace()
            .map(|word| word.parse().unwrap())
            .collect();
        assert_eq!(numbers[..3], [7, pages, 0], "{answer}");
        numbers[3]
    }
}

/// Pages of the working set.
const PAGES: u64 = 8 << 8;

#[track_caller]
fn migrate(from: &Site, to: &Site, more: &[&str]) -> Value {
    let mut words = vec!["migrate", "vm", "--to", to.name(), "--output", "json"];
    words.extend(more);
    let ended = from.run(&words);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.json()
}

#[test]
fn a_guest_of_kvm_goes_there_and_back_and_every_page_is_what_it_wrote() {
    need!(kvm());
    let mut rig = rig(&guest(2000, &[]));
    rig.a.boot("vm");
    let mut beats = Beats::at(&rig.a);
    let (mut signs, mut written, _) = beats.beat();
    beats.prove(PAGES);
    for turn in 0..2 {
        let (from, to) = if turn == 0 { (&rig.a, &rig.b) } else { (&rig.b, &rig.a) };
        let report = migrate(from, to, &[]);
        assert_eq!(report["outcome"], "completed", "{report}");
        assert!(report["pages"]["zero"].as_u64() > Some(0), "{report}");
        let mut there = Beats::at(to);
        let beat = there.beat();
        assert!(
            beat.0 > signs && beat.1 > written && beat.2 == 0,
            "{beat:?} after {signs} {written}"
        );
        (signs, written) = (beat.0, beat.1);
        there.prove(PAGES);
        rig.assert_only(&[(to, "vm")]);
    }
    // Its timer and its clock go on.
    let said = PathBuf::from(format!("{}.says", rig.a.folder().join("vm.qmp").display()));
    let lines = || std::fs::read_to_string(&said).unwrap_or_default();
    let before = lines().lines().count();
    until("the guest says more", || lines().lines().count() > before + 1);
    let last = lines().lines().last().unwrap().to_owned();
    assert!(last.contains(" errors 0 "), "{last}");
}

#[test]
fn a_guest_of_kvm_that_stood_stands_where_it_arrives() {
    need!(kvm());
    let mut rig = rig(&guest(500, &[]));
    rig.a.boot("vm");
    rig.a.qmp("vm", "stop", &json!({})).unwrap();
    migrate(&rig.a, &rig.b, &[]);
    assert_eq!(rig.b.state("vm").as_deref(), Some("paused"));
    let mut beats = Beats::at(&rig.b);
    let written = beats.verify(PAGES);
    assert_eq!(beats.verify(PAGES), written, "it stands");
    rig.b.qmp("vm", "cont", &json!({})).unwrap();
    beats.prove(PAGES);
}

#[test]
fn a_migration_of_a_guest_of_kvm_that_is_cancelled_or_cut_leaves_it_running_and_the_next_one_misses_no_page() {
    need!(kvm());
    let mut rig = Rig::planned(&[("vm", guest(2000, &["--random-percent", "100"]))], |a, b| {
        for site in [a, b] {
            site.settings = "[link]\nrtt = \"10ms\"\nrate = \"20mbit\"\n".to_owned();
            let beat = site.folder.join("vm.beat").display().to_string();
            let vm = site.vm("vm");
            vm.machine = vm.machine.clone().with_native(&["--heartbeat", &beat]);
            vm.command.as_mut().unwrap().extend(["--heartbeat".to_owned(), beat]);
        }
    });
    rig.a.boot("vm");
    for way in ["cancel", "kill"] {
        let client = rig
            .a
            .begin(&["migrate", "vm", "--to", "b", "--rate", "4mbit", "--deadline", "5m"]);
        rig.a.until_phase("precopy");
        match way {
            "cancel" => {
                let list = rig.a.run(&["list", "--output", "json"]).json();
                let id = list[0]["migration"].as_str().unwrap().to_owned();
                assert_eq!(rig.a.run(&["cancel", &id]).code, Some(0));
            }
            _ => rig.b.kill_hypervisors("vm"),
        }
        let ended = client.wait();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
        Beats::at(&rig.a).prove(PAGES);
        rig.assert_only(&[(&rig.a, "vm")]);
    }
    migrate(&rig.a, &rig.b, &[]);
    Beats::at(&rig.b).prove(PAGES);
}

#[test]
fn a_machine_that_is_another_one_at_the_destination_is_refused_before_anything_moves() {
    need!(kvm());
    let mut rig = Rig::planned(&[("vm", guest(500, &[]))], |_, b| {
        let command = b.vm("vm").command.as_mut().unwrap();
        let vcpus = command.iter().position(|word| word == "--vcpus").unwrap();
        command[vcpus + 1] = "1".to_owned();
    });
    rig.a.boot("vm");
    let ended = rig.a.run(&["migrate", "vm", "--to", "b"]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stdout.contains("2 vCPUs"), "{ended:?}");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn the_vmm_of_the_example_is_moved_and_its_guest_goes_on_counting() {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_longhaul")).with_file_name("examples/small_vmm");
    need!(
        kvm(),
        program
            .is_file()
            .then_some(())
            .ok_or("examples/small_vmm is not built".to_owned())
    );
    let rig = Rig::planned(&[("vm", guest(1, &[]))], |a, b| {
        for site in [a, b] {
            let command = [program.to_str().unwrap(), "{qmp}", "--incoming", "defer", "-S"];
            site.vm("vm").command = Some(command.map(str::to_owned).into());
        }
    });
    let socket = |site: &Site| site.folder().join("vm.qmp");
    let mut command = std::process::Command::new(&program);
    command.arg(socket(&rig.a));
    let source = Running::start(command, rig.a.folder());
    until("the guest prints", || source.stdout().contains(".."));
    migrate(&rig.a, &rig.b, &[]);
    rig.assert_only(&[(&rig.b, "vm")]);
    until("the guest prints at the destination", || {
        said_by_hypervisors(&rig.b).contains("..")
    });
    let status = qmp::ask(&socket(&rig.b), "query-status", &json!({})).unwrap();
    assert_eq!(status["status"], "running");
    qmp::ask(&socket(&rig.b), "quit", &json!({})).unwrap();
    until("it has ended", || {
        rig.b.hypervisors("vm").is_empty() && !socket(&rig.b).exists()
    });
}

/// What the hypervisors that a site's gateway started have printed.
fn said_by_hypervisors(site: &Site) -> String {
    let files = std::fs::read_dir(site.state_dir()).unwrap().flatten();
    let logs = files.filter(|file| file.file_name().to_string_lossy().starts_with("vmm-"));
    logs.map(|log| std::fs::read_to_string(log.path()).unwrap_or_default())
        .collect()
}
