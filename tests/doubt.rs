//! VMs that were handed over when something hung: who is told what, and who may run the VM.
//!
//! The destination's hypervisor is stopped (SIGSTOP) while the guest is copied, so that it never loads what it is given.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::path::Path;

use common::guest::Machine;
use common::process::{Running, send};
use common::{Rig, Site, need, qemu, until};
use rustix::process::Signal;
use serde_json::{Value, json};

/// The guest's firmware and devices are across after a second or two.
const SLOWLY: &str = "4mbit";

/// A VM at A that is on its way to a hypervisor at B which has been stopped.
fn on_its_way() -> (Rig, Running) {
    let mut rig = Rig::planned(&[("vm", Machine::firmware())], |a, _| {
        a.metrics = true;
        // Once is enough to see what comes of it.
        a.settings += "[migration]\nrestarts = \"0\"\n";
    });
    rig.a.boot("vm");
    let client = rig
        .a
        .begin(&["migrate", "vm", "--to", "b", "--rate", SLOWLY, "--output", "json"]);
    rig.a.until_phase("precopy");
    until("a hypervisor waits at b", || rig.b.hypervisors("vm").len() == 1);
    send(rig.b.hypervisors("vm")[0], Signal::STOP);
    (rig, client)
}

/// The newest migration that a gateway lists.
fn newest(site: &Site) -> Value {
    site.run(&["list", "--output", "json"]).json()[0].clone()
}

fn is_stopped(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| rest.trim_start().starts_with('T'))
}

/// Asks the hypervisor of `vm` to continue its guest, through its second monitor. It may be stopped before it answers.
fn ask_to_continue(site: &mut Site) {
    let socket = format!("{}.test", site.plan().vm("vm").qmp.display());
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let commands = "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"cont\"}\n";
    std::io::Write::write_all(&mut stream, commands.as_bytes()).unwrap();
}

#[test]
fn a_destination_that_hangs_while_it_loads_is_given_up_and_the_vm_goes_on_at_the_source() {
    need!(qemu());
    let (rig, client) = on_its_way();
    let ended = client.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let reason = ended.json()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("load"), "{reason}");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_vm_that_was_handed_over_to_a_gateway_that_is_gone_is_in_doubt_until_it_is_back() {
    need!(qemu());
    let (mut rig, client) = on_its_way();
    rig.a.until_phase("committing");
    rig.b.gateway().signal(Signal::KILL);
    let ended = client.wait();
    assert_eq!(ended.code, Some(3), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "in_doubt", "{report}");
    let advice = report["reason"].as_str().unwrap().to_owned();
    assert!(advice.contains("longhaul resolve vm --peer-is-fenced"), "{advice}");
    let id = report["migration"].as_str().unwrap().to_owned();
    let status = rig.a.run(&["status", &id, "--output", "json"]).json();
    assert_eq!(status["advice"], advice, "{status}");
    // Whoever comes later hears the same at once.
    assert_eq!(rig.a.run(&["attach", &id]).code, Some(3));
    let metrics = || rig_metrics(&rig.a);
    until("the doubt is counted", || {
        metrics().contains("longhaul_migrations_in_doubt 1")
    });

    // At the source nobody can say that this copy is lost: it is the one there is.
    let lost = rig.a.run(&["resolve", "vm", "--lost-here"]);
    assert_eq!(lost.code, Some(2), "{lost:?}");
    assert!(
        lost.stderr.contains("--lost-here is said at the destination"),
        "{lost:?}"
    );

    // Somebody continues the copy that was handed over. It is stopped again.
    let source = rig.a.hypervisors("vm")[0];
    assert!(is_stopped(source));
    send(source, Signal::CONT);
    ask_to_continue(&mut rig.a);
    until("it is stopped again", || is_stopped(source));

    // The gateway is back: it had not committed, and says so.
    rig.b.start();
    until("it is over at a", || newest(&rig.a)["phase"] == "done");
    assert_eq!(rig.a.run(&["attach", &id]).code, Some(1));
    until("vm runs at a", || rig.a.state("vm").as_deref() == Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

fn rig_metrics(site: &Site) -> String {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", site.port())).unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    answer
}

#[test]
fn a_hypervisor_at_the_destination_that_runs_a_vm_already_is_left_alone() {
    need!(qemu());
    let mut rig = Rig::planned(&[("vm", Machine::firmware())], |_, b| b.vm("vm").command = None);
    rig.a.boot("vm");
    rig.b.boot("vm");
    for more in [&[][..], &["--dry-run"]] {
        let args = [&["migrate", "vm", "--to", "b", "--output", "json"], more].concat();
        let refused = rig.a.run(&args);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stdout.contains("-incoming defer"), "{refused:?}");
    }
    for site in [&rig.a, &rig.b] {
        assert_eq!(site.state("vm").as_deref(), Some("running"));
    }
    // Its own command to wait is as good as one that the gateway starts.
    rig.b.kill_hypervisors("vm");
    until("it is gone", || rig.b.hypervisors("vm").is_empty());
    let _ = std::fs::remove_file(rig.b.plan().vm("vm").qmp.clone());
    rig.b.launch("vm", &Machine::firmware(), &["-incoming", "defer", "-S"]);
    let moved = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
}

/// A disk that is never more than somebody's file. `shared`: whether others may write to it too.
fn disk_words(disk: &Path, shared: &str) -> [String; 4] {
    let node = format!("driver=file,node-name=disk,filename={}", disk.display());
    let device = format!("virtio-blk-pci,drive=disk,share-rw={shared}");
    ["-blockdev", &node, "-device", &device].map(str::to_owned)
}

#[test]
fn a_vm_whose_disk_somebody_holds_at_the_destination_goes_on_at_the_source_and_the_report_says_who() {
    need!(qemu());
    let folder = tempfile::Builder::new().prefix("lh").tempdir().unwrap();
    let disk = folder.path().join("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    // Both sites are one host here: what holds the image must be in the way of the destination and not of the source.
    let (at_source, at_destination) = (disk_words(&disk, "on"), disk_words(&disk, "off"));
    let machine = Machine::firmware().with(&at_source.each_ref().map(String::as_str));
    let mut rig = Rig::planned(&[("vm", machine)], |a, b| {
        for plan in [a, &mut *b] {
            plan.vm("vm").settings = "disks = \"shared\"".to_owned();
        }
        for word in b.vm("vm").command.iter_mut().flatten() {
            if *word == at_source[3] {
                word.clone_from(&at_destination[3]);
            }
        }
    });
    let mut holder = std::process::Command::new(common::guest::qemu_program());
    holder
        .args([
            "-M",
            "pc",
            "-m",
            "32",
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
        ])
        .args(["-S", "-name", "guest=leftover"])
        .args(&at_source);
    let holder = Running::start(holder, rig.path());
    rig.a.boot("vm");
    until("the image is held", || {
        let files = std::fs::read_dir(format!("/proc/{}/fdinfo", holder.id())).unwrap();
        files
            .flatten()
            .any(|file| std::fs::read_to_string(file.path()).is_ok_and(|text| text.contains("OFDLCK")))
    });
    let ended = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let report = ended.json();
    let told = format!(
        "The lock of {} is held on the same host by {} (process {}, VM leftover)",
        disk.display(),
        Path::new(&common::guest::qemu_program()).file_name().unwrap().display(),
        holder.id()
    );
    let reason = report["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("the destination's hypervisor refused to start the VM"),
        "{reason}"
    );
    assert!(reason.contains(&told), "{reason}");
    let id = report["migration"].as_str().unwrap();
    let at_b = rig.b.run(&["status", id, "--output", "json"]).json();
    assert!(at_b["report"]["reason"].as_str().unwrap().contains(&told), "{at_b}");
    assert!(rig.b.log().contains(&format!("process {}, VM leftover", holder.id())));
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
    drop(holder);

    // Nothing is in the way any more.
    let moved = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn ctrl_c_while_the_destination_is_being_prepared_ends_it_at_once() {
    need!(qemu());
    let silent = ["/bin/sh", "-c", "exec sleep 100", "-incoming", "defer", "-S", "{qmp}"];
    let mut rig = Rig::planned(&[("vm", Machine::firmware())], |_, b| {
        b.vm("vm").command = Some(silent.map(str::to_owned).to_vec());
    });
    rig.a.boot("vm");
    let client = rig.a.begin(&["migrate", "vm", "--to", "b", "--output", "json"]);
    rig.a.until_phase("preparing");
    client.signal(Signal::INT);
    let ended = client.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(ended.json()["outcome"], json!("cancelled"));
    assert_eq!(ended.json()["reason"], "the operator cancelled it");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}
