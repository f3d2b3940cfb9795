//! A disk that moves to another image at its site: a real gateway, a real guest that writes its disk and checks it.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::disk_guest::{self, SIZE, UNTOUCHED};
use common::guest::Machine;
use common::process::{Ended, Running, processes_of};
use common::{Rig, need, program, qemu, until};
use rustix::fs::getxattr;
use rustix::process::Signal;
use serde_json::{Value, json};

/// The VM `vm` at A, its disk in this format; the image, and an empty folder beside it.
fn rig(format: &str) -> (Rig, PathBuf, PathBuf) {
    let (mut image, mut pool) = (PathBuf::new(), PathBuf::new());
    // One gateway is enough where nothing migrates.
    let mut rig = Rig::apart(&[("vm", Machine::firmware())], |a, _| {
        image = a.folder.join(format!("vm.{format}"));
        pool = a.folder.join("pool");
        let folder = a.folder.clone();
        disk_guest::plan(a.vm("vm"), &folder, &image, format);
    });
    std::fs::create_dir(&pool).unwrap();
    disk_guest::make(&image, format);
    rig.a.start();
    (rig, image, pool)
}

fn begin(rig: &Rig, to: &Path, more: &[&str]) -> Running {
    let mut words = vec![
        "move-disk",
        "vm",
        "vda",
        "--to",
        to.to_str().unwrap(),
        "--output",
        "json",
    ];
    words.extend(more);
    rig.a.begin(&words)
}

fn move_to(rig: &Rig, to: &Path, more: &[&str]) -> Ended {
    begin(rig, to, more).wait()
}

/// Begins to move it, so slowly that it is not over before something else happens, and waits until bytes are there.
#[track_caller]
fn begin_slowly(rig: &Rig, to: &Path, format: &str) -> Running {
    let mut client = begin(rig, to, &["--limit", "4mbit", "--format", format]);
    until("it copies", || {
        assert!(!client.has_ended(), "{}", client.stderr());
        client.stderr().contains("copying")
    });
    client
}

#[track_caller]
fn assert_moved(ended: &Ended) -> Value {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "moved", "{report}");
    report
}

/// Nodes of the VM's block layer: name, driver and file.
fn nodes(rig: &Rig) -> Vec<[String; 3]> {
    let nodes = rig
        .a
        .qmp("vm", "query-named-block-nodes", &json!({ "flat": true }))
        .unwrap();
    let text = |node: &Value, key: &str| node[key].as_str().unwrap_or_default().to_owned();
    let nodes = nodes.as_array().unwrap().iter();
    nodes
        .map(|node| ["node-name", "drv", "file"].map(|key| text(node, key)))
        .collect()
}

/// Nothing of a move is left: the guest runs on with `image`, `other` is not there.
#[track_caller]
fn assert_only(rig: &Rig, image: &Path, other: &Path) {
    until("the other image is gone", || !other.exists());
    let is_image = |file: &String| Path::new(file) == image;
    until("QEMU knows nothing of it", || {
        let jobs = rig.a.qmp("vm", "query-jobs", &json!({})).unwrap();
        let is_ours = |[name, _, file]: &[String; 3]| name.starts_with("longhaul-") && !is_image(file);
        jobs == json!([]) && !nodes(rig).iter().any(is_ours)
    });
    assert!(nodes(rig).iter().any(|[_, _, file]| is_image(file)), "{:?}", nodes(rig));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_disk_moves_and_becomes_another_format_while_its_guest_writes_and_checks_it() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, image, pool) = rig("raw");
    rig.a.boot("vm");
    disk_guest::assert_checks(&image);

    let checked = move_to(&rig, &pool, &["--format", "qcow2", "--dry-run"]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    let new = pool.join("vm.qcow2");
    assert_eq!(checked.json()["to"], json!(new));
    assert!(!new.exists());

    let report = assert_moved(&move_to(&rig, &pool, &["--format", "qcow2"]));
    assert_eq!(report["live"], true, "{report}");
    let todo = report["todo"].to_string();
    assert!(todo.contains("[[vm.image]]") && todo.contains("`command`"), "{todo}");
    disk_guest::assert_checks(&image);
    // QEMU has let go of the old image, which stays as it was in that moment.
    let files: Vec<String> = nodes(&rig).into_iter().map(|[_, _, file]| file).collect();
    assert!(
        files.iter().any(|file| Path::new(file) == new) && !files.iter().any(|file| Path::new(file) == image),
        "{files:?}"
    );
    let (old, moved) = (disk_guest::content(&image, "raw"), disk_guest::content(&new, "qcow2"));
    assert_eq!(moved.len() as u64, SIZE);
    assert!(old[UNTOUCHED as usize..] == moved[UNTOUCHED as usize..]);
    assert!(disk_guest::newest(&moved) > disk_guest::newest(&old) && disk_guest::newest(&old) > 0);
    let allocated = report["new_bytes"].as_u64().unwrap();
    assert!(allocated < 40 << 20, "it stays sparse: {allocated}");
    let mut mark = [0; 64];
    assert!(getxattr(&new, "user.longhaul.image", &mut mark).is_err());

    // And back, over a name that is free again only because the person says so.
    let refused = move_to(&rig, &image, &["--format", "raw"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("nothing is ever overwritten"), "{refused:?}");
    let back = pool.join("back.raw");
    let report = assert_moved(&move_to(&rig, &back, &["--format", "raw", "--remove-old"]));
    assert_eq!(report["old_removed"], true, "{report}");
    assert!(!new.exists());
    assert_only(&rig, &back, &new);
    disk_guest::assert_checks(&image);
    let content = disk_guest::content(&back, "raw");
    assert!(content[UNTOUCHED as usize..] == old[UNTOUCHED as usize..]);
    assert!(disk_guest::newest(&content) > disk_guest::newest(&moved));
}

#[test]
fn a_move_that_is_cancelled_leaves_nothing_and_the_guest_runs_on() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, image, pool) = rig("qcow2");
    rig.a.boot("vm");
    let new = pool.join("new.raw");
    for by_key in [true, false] {
        let client = begin_slowly(&rig, &new, "raw");
        let second = move_to(&rig, &pool.join("second"), &[]);
        assert_eq!(second.code, Some(2), "{second:?}");
        assert!(second.stderr.contains("is being moved"), "{second:?}");
        if by_key {
            client.signal(Signal::INT);
        } else {
            let cancelled = rig.a.run(&["move-disk", "vm", "vda", "--cancel"]);
            assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
        }
        let ended = client.wait();
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert_eq!(ended.json()["outcome"], "cancelled", "{ended:?}");
        assert_only(&rig, &image, &new);
        disk_guest::assert_checks(&image);
    }
}

/// A small file system of its own.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Result<Small, String> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", size, "longhaul-test"]).arg(at);
        match mount.status() {
            Ok(status) if status.success() => Ok(Small(at.to_owned())),
            failed => Err(format!("mounting a tmpfs needs root: {failed:?}")),
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_place_that_becomes_full_ends_the_move_with_one_sentence_and_nothing_is_left() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, image, pool) = rig("raw");
    let small = Small::mount(&pool, "size=40m");
    if let Err(reason) = &small {
        return println!("SKIP: {reason}");
    }
    rig.a.boot("vm");
    let filler = pool.join("filler");
    std::fs::write(&filler, vec![1; 39 << 20]).unwrap();
    let refused = move_to(&rig, &pool, &[]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("has room for"), "{refused:?}");

    std::fs::remove_file(&filler).unwrap();
    let client = begin_slowly(&rig, &pool, "raw");
    std::fs::write(&filler, vec![1; 38 << 20]).unwrap_err();
    let ended = client.wait();
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "failed", "{report}");
    let reason = report["reason"].as_str().unwrap();
    assert!(reason.starts_with("there is no room left for"), "{reason}");
    assert_only(&rig, &image, &pool.join("vm.raw"));
    disk_guest::assert_checks(&image);
}

#[test]
fn a_gateway_that_is_killed_meanwhile_takes_the_move_back_when_it_is_started_again() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, image, pool) = rig("raw");
    rig.a.boot("vm");
    let new = pool.join("vm.qcow2");
    let client = begin_slowly(&rig, &pool, "qcow2");
    rig.a.gateway().signal(Signal::KILL);
    until("the gateway is dead", || rig.a.gateway().has_ended());
    let ended = client.wait();
    assert_eq!(ended.code, Some(3), "{ended:?}");
    disk_guest::assert_checks(&image);
    assert!(new.exists());
    rig.a.start();
    assert_only(&rig, &image, &new);
    // And it can be moved at once.
    assert_moved(&move_to(&rig, &pool, &["--format", "qcow2"]));
    disk_guest::assert_checks(&image);
}

#[test]
fn the_disk_of_a_vm_that_is_off_is_copied_and_compared_and_cannot_be_used_meanwhile() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, image, pool) = rig("raw");
    let new = pool.join("vm.qcow2");
    let before = disk_guest::content(&image, "raw");

    // Cancelled, with the image held until then.
    let client = begin_slowly(&rig, &pool.join("slow.raw"), "raw");
    let opened = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 4k"])
        .arg(&image)
        .output();
    if let Ok(opened) = opened {
        assert!(!opened.status.success(), "{opened:?}");
    }
    client.signal(Signal::INT);
    let ended = client.wait();
    assert_eq!(ended.json()["outcome"], "cancelled", "{ended:?}");
    assert!(!pool.join("slow.raw").exists());

    // Killed: the copy goes on without anybody, and is ended.
    let client = begin_slowly(&rig, &pool.join("slow.raw"), "raw");
    rig.a.gateway().signal(Signal::KILL);
    until("the gateway is dead", || rig.a.gateway().has_ended());
    assert_eq!(client.wait().code, Some(3));
    rig.a.start();
    until("the copy is ended", || {
        let tools = processes_of(&pool);
        tools.is_empty() && !pool.join("slow.raw").exists() && rig.a.leftovers().is_empty()
    });

    let report = assert_moved(&move_to(&rig, &pool, &["--format", "qcow2"]));
    assert_eq!(report["live"], false, "{report}");
    assert!(before == disk_guest::content(&new, "qcow2"));
    assert!(before == disk_guest::content(&image, "raw"));
    assert!(report["new_bytes"].as_u64().unwrap() < 40 << 20, "{report}");

    // One that runs under another monitor is not asked, and not read.
    let qmp = rig.a.plan().folder.join("other.qmp");
    let words = disk_guest::machine(&image, "raw").command(rig.path(), qmp.to_str().unwrap());
    let mut other = Command::new(&words[0]).args(&words[1..]).spawn().unwrap();
    let monitor = PathBuf::from(format!("{}.test", qmp.display()));
    until("it is there", || {
        common::qmp::ask(&monitor, "query-status", &json!({})).is_some()
    });
    let refused = move_to(&rig, &pool.join("third.raw"), &[]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("is in use") && refused.stderr.contains("process"),
        "{refused:?}"
    );
    other.kill().unwrap();
    other.wait().unwrap();
    rig.assert_only(&[]);
}

#[test]
fn a_disk_does_not_move_while_its_vm_migrates_nor_the_other_way_round() {
    need!(qemu(), program("qemu-img"));
    let (mut image, mut pool) = (PathBuf::new(), PathBuf::new());
    let mut rig = Rig::planned(&[("vm", Machine::firmware())], |a, b| {
        image = a.folder.join("vm.raw");
        pool = a.folder.join("pool");
        for site in [a, b] {
            let folder = site.folder.clone();
            disk_guest::plan(site.vm("vm"), &folder, &folder.join("vm.raw"), "raw");
        }
    });
    std::fs::create_dir(&pool).unwrap();
    disk_guest::make(&image, "raw");
    rig.a.boot("vm");
    let migration = rig
        .a
        .begin(&["migrate", "vm", "--to", "b", "--rate", "4mbit", "--output", "json"]);
    rig.a.until_phase("disks");
    let refused = move_to(&rig, &pool, &[]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("is in migration"), "{refused:?}");
    migration.signal(Signal::INT);
    assert_eq!(migration.wait().code, Some(1));

    let client = begin_slowly(&rig, &pool, "raw");
    let refused = rig.a.run(&["migrate", "vm", "--to", "b"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("the disk vda of vm is being moved"),
        "{refused:?}"
    );
    let checked = rig.a.run(&["migrate", "vm", "--to", "b", "--dry-run"]);
    assert_eq!(checked.code, Some(2), "{checked:?}");
    client.signal(Signal::INT);
    assert_eq!(client.wait().code, Some(2));
    assert_only(&rig, &image, &pool.join("vm.raw"));
    disk_guest::assert_checks(&image);
}
