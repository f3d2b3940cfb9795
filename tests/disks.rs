//! VMs whose disks are on no shared storage: real gateways, a real guest that writes its disk and checks it, images of several formats.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::disk_guest::{self, SIZE, UNTOUCHED};
use common::guest::Machine;
use common::process::{Ended, Running};
use common::relay::Relay;
use common::site::{SitePlan, free_port};
use common::{Rig, Site, need, noise, program, qemu, until};
use rustix::fs::getxattr;
use rustix::process::Signal;
use serde_json::{Value, json};

const MARK: &str = "user.longhaul.image";

/// The VM `vm` with its disk at A; where it will be at B.
fn rig(formats: [&str; 2]) -> (Rig, [PathBuf; 2]) {
    changed_rig(formats, |_, _| {})
}

fn changed_rig(formats: [&str; 2], change: impl FnOnce(&mut SitePlan, &mut SitePlan)) -> (Rig, [PathBuf; 2]) {
    let mut files = [PathBuf::new(), PathBuf::new()];
    let rig = Rig::planned(&[("vm", Machine::firmware())], |a, b| {
        for (number, (site, format)) in [(&mut *a, formats[0]), (&mut *b, formats[1])].into_iter().enumerate() {
            let folder = site.folder.clone();
            files[number] = folder.join(format!("vm.{format}"));
            disk_guest::plan(site.vm("vm"), &folder, &files[number], format);
        }
        change(a, b);
    });
    disk_guest::make(&files[0], formats[0]);
    (rig, files)
}

fn mark(file: &Path) -> Option<String> {
    let mut value = [0; 100];
    let length = getxattr(file, MARK, &mut value).ok()?;
    Some(String::from_utf8(value[..length].to_vec()).unwrap())
}

#[track_caller]
fn assert_completed(ended: &Ended) -> Value {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "completed", "{report}");
    report
}

/// Begins to move it to B, slowly.
fn begin(a: &Site, rate: &str) -> Running {
    a.begin(&["migrate", "vm", "--to", "b", "--rate", rate, "--output", "json"])
}

/// Waits until its disk is on its way to where this image was made.
#[track_caller]
fn until_on_its_way(a: &Site, image: &Path) {
    a.until_phase("disks");
    until("an image is there", || image.exists());
}

fn migrate(site: &Site, to: &str) -> Ended {
    site.run(&["migrate", "vm", "--to", to, "--output", "json"])
}

#[test]
fn a_disk_goes_with_its_guest_there_and_back_and_becomes_another_format() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b]) = rig(["raw", "qcow2"]);
    rig.a.boot("vm");
    disk_guest::assert_checks(&at_a);

    let report = assert_completed(&migrate(&rig.a, "b"));
    disk_guest::assert_checks(&at_b);
    let disks = &report["disks"];
    assert!(
        disks["rounds"].as_u64().unwrap() >= 2,
        "the guest wrote all the time: {disks}"
    );
    assert!(disks["read_bytes"].as_u64().unwrap() >= 8 << 20, "{disks}");
    // What stays at A is what the guest had written when it was stopped, and all of that is at B.
    let (before, after) = (disk_guest::content(&at_a, "raw"), disk_guest::content(&at_b, "qcow2"));
    assert_eq!(after.len() as u64, SIZE);
    assert!(before[UNTOUCHED as usize..] == after[UNTOUCHED as usize..]);
    assert!(disk_guest::newest(&after) > disk_guest::newest(&before));
    assert!(disk_guest::newest(&before) > 0);
    assert!(
        std::fs::metadata(&at_b).unwrap().blocks() * 512 < 40 << 20,
        "it stays sparse"
    );
    assert_eq!(mark(&at_b), None);
    let migration = report["migration"].as_str().unwrap();
    let left = mark(&at_a);
    assert!(
        left.as_ref().unwrap().starts_with(&format!("left {migration} ")),
        "{left:?}"
    );
    rig.assert_only(&[(&rig.b, "vm")]);

    // What it has left at A is old: it is not touched by a question, and only what is otherwise comes back.
    let checked = rig.b.run(&["migrate", "vm", "--to", "a", "--dry-run"]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert_eq!(mark(&at_a), left);
    let report = assert_completed(&migrate(&rig.b, "a"));
    disk_guest::assert_checks(&at_a);
    let same_bytes = report["disks"]["same_bytes"].as_u64().unwrap();
    assert!(same_bytes >= 8 << 20, "{report}");
    let back = disk_guest::content(&at_a, "raw");
    assert!(back[UNTOUCHED as usize..] == after[UNTOUCHED as usize..]);
    assert!(disk_guest::newest(&back) > disk_guest::newest(&after));
    assert_eq!(mark(&at_a), None);
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn an_image_that_is_in_the_way_is_not_touched_and_the_guest_stays() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b]) = rig(["qcow2", "raw"]);
    rig.a.boot("vm");
    std::fs::write(&at_b, "somebody's").unwrap();
    let refused = migrate(&rig.a, "b");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    let reason = refused.json()["reason"].as_str().unwrap().to_owned();
    assert!(
        reason.contains(at_b.to_str().unwrap()) && reason.contains("move it away"),
        "{reason}"
    );
    assert_eq!(std::fs::read(&at_b).unwrap(), b"somebody's");
    disk_guest::assert_checks(&at_a);
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn an_image_that_was_left_and_is_used_again_is_not_replaced() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b]) = rig(["raw", "raw"]);
    rig.a.boot("vm");
    assert_completed(&migrate(&rig.a, "b"));
    assert!(mark(&at_a).is_some());
    // Somebody takes a copy of the VM as it was; its monitor is elsewhere.
    let qmp = rig.a.plan().folder.join("other.qmp");
    let words = disk_guest::machine(&at_a, "raw").command(rig.path(), qmp.to_str().unwrap());
    let mut other = std::process::Command::new(&words[0]).args(&words[1..]).spawn().unwrap();
    until("it is there", || qmp.exists());
    let used = std::fs::metadata(&at_a).unwrap();
    let refused = migrate(&rig.b, "a");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    let reason = refused.json()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("is in use"), "{reason}");
    let still = std::fs::metadata(&at_a).unwrap();
    assert_eq!(still.ino(), used.ino());
    disk_guest::assert_checks(&at_b);

    // Nor once it is off again, where it was written: that may be wanted.
    other.kill().unwrap();
    other.wait().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&at_a).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], UNTOUCHED).unwrap();
    let refused = migrate(&rig.b, "a");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    let reason = refused.json()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("was written after its VM had left it"), "{reason}");
    assert_eq!(std::fs::metadata(&at_a).unwrap().ino(), used.ino());
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_dry_run_makes_images_and_leaves_none() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [_, at_b]) = rig(["raw", "raw"]);
    rig.a.boot("vm");
    let checked = rig
        .a
        .run(&["migrate", "vm", "--to", "b", "--dry-run", "--output", "json"]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(checked.stdout.contains("vda are copied"), "{checked:?}");
    assert!(!at_b.exists());
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_migration_that_is_cancelled_while_disks_are_copied_leaves_nothing() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b]) = rig(["raw", "qcow2"]);
    rig.a.boot("vm");
    let client = begin(&rig.a, "10mbit");
    until_on_its_way(&rig.a, &at_b);
    let id = rig.a.run(&["list", "--output", "json"]).json()[0]["migration"].clone();
    let cancelled = rig.a.run(&["cancel", id.as_str().unwrap()]);
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    let ended = client.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    disk_guest::assert_checks(&at_a);
    until("the image is gone", || !at_b.exists());
    assert_eq!(rig.a.qmp("vm", "query-block-exports", &json!({})).unwrap(), json!([]));
    let block = rig.a.qmp("vm", "query-block", &json!({})).unwrap();
    assert!(!block.to_string().contains("longhaul-"), "{block}");
    rig.assert_only(&[(&rig.a, "vm")]);
    // And it can go at once.
    assert_completed(&migrate(&rig.a, "b"));
    disk_guest::assert_checks(&at_b);
}

/// Waits until so many bytes of the disk are in this image.
#[track_caller]
fn until_there_are(image: &Path, bytes: u64) {
    let taken = || std::fs::metadata(image).map_or(0, |metadata| metadata.blocks() * 512);
    until("a part of the disk is there", || taken() >= bytes);
}

/// Kills a gateway and starts it again.
fn kill_and_restart(site: &mut Site) {
    site.gateway().signal(Signal::KILL);
    until("the gateway is dead", || site.gateway().has_ended());
    site.start();
}

#[test]
fn gateways_that_are_killed_while_disks_are_copied_begin_again_and_do_not_send_again_what_has_arrived() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b]) = rig(["qcow2", "qcow2"]);
    rig.a.boot("vm");
    let client = begin(&rig.a, "6mbit");
    until_there_are(&at_b, 3 << 20);
    kill_and_restart(&mut rig.a);
    until_there_are(&at_b, 5 << 20);
    kill_and_restart(&mut rig.b);
    let report = assert_completed(&client.wait());
    disk_guest::assert_checks(&at_b);
    assert_eq!(mark(&at_b), None);
    rig.assert_only(&[(&rig.b, "vm")]);
    // What was not flushed when the hypervisor died is not there, and what the guest has written since is not the same.
    let same_bytes = report["disks"]["same_bytes"].as_u64().unwrap();
    assert!(same_bytes > 2 << 20, "{report}");
    let after = disk_guest::content(&at_b, "qcow2");
    let before = disk_guest::content(&at_a, "qcow2");
    assert!(before[UNTOUCHED as usize..] == after[UNTOUCHED as usize..]);
}

#[test]
fn what_a_killed_gateway_has_left_of_a_disk_goes_when_the_migration_is_cancelled() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b]) = rig(["raw", "qcow2"]);
    rig.a.boot("vm");
    let client = begin(&rig.a, "6mbit");
    until_there_are(&at_b, 2 << 20);
    kill_and_restart(&mut rig.b);
    until("it is gone on with", || {
        mark(&at_b).is_some_and(|mark| mark.starts_with("resumed"))
    });
    let open = || rig.a.run(&["list", "--output", "json"]).json();
    let id = || {
        let open = open();
        let open = open.as_array()?.iter().find(|entry| entry["outcome"].is_null())?;
        open["migration"].as_str().map(str::to_owned)
    };
    until("it is begun again", || id().is_some());
    let cancelled = rig.a.run(&["cancel", &id().unwrap()]);
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    assert_eq!(client.wait().code, Some(1));
    until("the image is gone", || !at_b.exists());
    disk_guest::assert_checks(&at_a);
    rig.assert_only(&[(&rig.a, "vm")]);
}

/// A move to a site that has the image from which the disk was made, to a file of this format. Bytes that the file takes.
fn arrives_on_a_base(format: &str, base_format: &str) -> u64 {
    let mut base = PathBuf::new();
    let (mut rig, [at_a, at_b]) = changed_rig(["raw", format], |_, b| {
        base = b.folder.join("base");
        b.vm("vm").tables += &format!("base = {}\nbase-format = {base_format:?}\n", json!(base));
    });
    // Clusters of which the base has one part that is zero now, and the disk another one that it has not.
    let raw = at_a.with_extension("base");
    std::fs::copy(&at_a, &raw).unwrap();
    for cluster in 0..128 {
        let start = (24 << 20) + cluster * (64 << 10);
        disk_guest::write_at(&at_a, start, &noise(4096, 2 * cluster + 1));
        disk_guest::write_at(&raw, start + (32 << 10), &noise(4096, 2 * cluster + 2));
    }
    disk_guest::convert(&raw, "raw", &base, base_format);
    std::fs::remove_file(raw).unwrap();
    let before = std::fs::read(&base).unwrap();
    rig.a.boot("vm");
    disk_guest::assert_checks(&at_a);
    let report = assert_completed(&migrate(&rig.a, "b"));
    disk_guest::assert_checks(&at_b);
    let (left, arrived) = (disk_guest::content(&at_a, "raw"), disk_guest::content(&at_b, format));
    assert!(left[UNTOUCHED as usize..] == arrived[UNTOUCHED as usize..]);
    assert!(std::fs::read(&base).unwrap() == before, "the base is as it was");
    rig.assert_only(&[(&rig.b, "vm")]);
    // 8 MiB of the disk cannot be compressed, and are in the base.
    let disks = &report["disks"];
    assert!(disks["same_bytes"].as_u64().unwrap() >= 8 << 20, "{report}");
    assert!(disks["wire_bytes"].as_u64().unwrap() < 4 << 20, "{report}");
    std::fs::metadata(&at_b).unwrap().blocks() * 512
}

#[test]
fn of_a_disk_whose_base_the_destination_has_only_what_differs_is_sent_and_the_rest_stays_in_the_base() {
    need!(qemu(), program("qemu-img"));
    let taken = arrives_on_a_base("qcow2", "raw");
    // What the guest has written, 8 MiB at most, and clusters of which something is otherwise: 8 MiB.
    assert!(taken < 18 << 20, "{taken}");
}

#[test]
fn an_image_that_can_have_no_base_begins_as_a_copy_of_it() {
    need!(qemu(), program("qemu-img"));
    let taken = arrives_on_a_base("raw", "qcow2");
    assert!(taken >= 8 << 20, "{taken}");
}

#[test]
fn a_warm_migration_keeps_disks_up_to_date_until_it_is_told_to_switch_over() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b]) = rig(["raw", "qcow2"]);
    rig.a.boot("vm");
    let client = rig
        .a
        .begin(&["migrate", "vm", "--to", "b", "--warm", "--output", "json"]);
    until("its disks have been read", || {
        rig.a.log().contains("disks are read once")
    });
    let id = rig.a.run(&["list", "--output", "json"]).json()[0]["migration"].clone();
    let id = id.as_str().unwrap();
    until("it says what it waits for", || {
        let status = rig.a.run(&["status", id, "--output", "json"]).json();
        let reason = status["progress"]["eta_reason"].as_str();
        reason.is_some_and(|reason| reason.contains("longhaul switchover"))
    });
    disk_guest::assert_checks(&at_a);
    // It waits, also as the successor of one that a restart has undone.
    kill_and_restart(&mut rig.a);
    until("its disks have been read again", || {
        rig.a.log().contains("disks are read once")
    });
    disk_guest::assert_checks(&at_a);
    let list = rig.a.run(&["list", "--output", "json"]).json();
    let is_open = |entry: &&Value| entry["outcome"].is_null();
    let open = list.as_array().unwrap().iter().find(is_open).unwrap();
    assert_eq!(open["phase"], "disks", "{open}");
    let id = open["migration"].as_str().unwrap();
    for _ in 0..2 {
        let told = rig.a.run(&["switchover", id]);
        assert_eq!(told.code, Some(0), "{told:?}");
    }
    assert_completed(&client.wait());
    disk_guest::assert_checks(&at_b);
    let again = rig.a.run(&["switchover", id]);
    assert_eq!(again.code, Some(2), "{again:?}");
    assert!(again.stderr.contains("it is over"), "{again:?}");
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_warm_migration_is_refused_where_no_disk_is_copied() {
    need!(qemu());
    let mut rig = Rig::planned(&[("vm", Machine::firmware())], |_, _| {});
    rig.a.boot("vm");
    let refused = rig
        .a
        .run(&["migrate", "vm", "--to", "b", "--warm-until", "2999-01-01 00:00"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stdout.contains("leave --warm away"), "{refused:?}");
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_cut_while_disks_are_copied_is_waited_for_and_nothing_is_lost() {
    need!(qemu(), program("qemu-img"));
    let mut relays = Vec::new();
    let (mut rig, [at_a, at_b]) = changed_rig(["raw", "raw"], |a, b| {
        for plan in [a, b] {
            let front = free_port();
            relays.push(Relay::start(front, plan.port));
            plan.settings = format!("advertise = \"127.0.0.1:{front}\"\n{}", plan.settings);
        }
    });
    rig.a.boot("vm");
    let client = begin(&rig.a, "20mbit");
    until_on_its_way(&rig.a, &at_b);
    relays.iter().for_each(|relay| relay.cut(true));
    until("the cut is noticed", || {
        rig.a.log().matches("contact lost").count() >= 2
    });
    relays.iter().for_each(|relay| relay.cut(false));
    let ended = client.wait();
    assert_completed(&ended);
    disk_guest::assert_checks(&at_b);
    let (before, after) = (disk_guest::content(&at_a, "raw"), disk_guest::content(&at_b, "raw"));
    assert!(before[UNTOUCHED as usize..] == after[UNTOUCHED as usize..]);
    assert_eq!(rig.a.log().matches("disks are read once").count(), 1);
    rig.assert_only(&[(&rig.b, "vm")]);
}

/// Moves it to B, with its disk in the pool there.
const TO_POOL: [&str; 8] = [
    "migrate",
    "vm",
    "--to",
    "b",
    "--disk",
    "vda=fast/vm.qcow2",
    "--output",
    "json",
];

/// The VM `vm` with its disk at A; where it will be at B, and a pool there where it may be put.
fn rig_with_pool() -> (Rig, [PathBuf; 2], PathBuf) {
    let mut pool = PathBuf::new();
    let (rig, files) = changed_rig(["raw", "qcow2"], |_, b| {
        let folder = b.folder.clone();
        pool = folder.join("fast");
        std::fs::create_dir_all(pool.join("web")).unwrap();
        std::os::unix::fs::symlink("/tmp", pool.join("out")).unwrap();
        b.settings += &format!("[[pool]]\nname = \"fast\"\npath = {}\n", json!(pool));
    });
    (rig, files, pool)
}

#[test]
fn a_disk_is_put_where_the_command_says_and_is_found_there_again() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b], pool) = rig_with_pool();
    rig.a.boot("vm");
    let placed = pool.join("web/vm.qcow2");
    let to = |place: &'static str| ["migrate", "vm", "--to", "b", "--disk", place, "--output", "json"];
    std::fs::write(pool.join("taken.qcow2"), "somebody's").unwrap();
    for (place, says) in [
        ("vdb=fast/vm.qcow2", "no disk called"),
        ("vda=fast/taken.qcow2", "is at b already"),
        ("vda=fast/out/vm.qcow2", "is not in the pool fast"),
    ] {
        for more in [&["--dry-run"][..], &[]] {
            let refused = rig.a.run(&[&to(place)[..], more].concat());
            assert_eq!(refused.code, Some(2), "{refused:?}");
            assert!(refused.stdout.contains(says), "{says}: {refused:?}");
        }
    }
    let to_pool = to("vda=fast/web/vm.qcow2");
    let checked = rig.a.run(&[&to_pool[..], &["--dry-run"]].concat());
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(!placed.exists() && !at_b.exists());

    assert_completed(&rig.a.run(&to_pool));
    disk_guest::assert_checks(&at_b);
    assert_eq!(std::fs::read_link(&at_b).unwrap(), placed);
    assert_eq!(mark(&placed), None);
    rig.assert_only(&[(&rig.b, "vm")]);

    // It leaves from there, and comes back to there, where its image is that it has left.
    assert_completed(&migrate(&rig.b, "a"));
    disk_guest::assert_checks(&at_a);
    assert!(mark(&placed).is_some());
    kill_and_restart(&mut rig.b);
    let report = assert_completed(&migrate(&rig.a, "b"));
    disk_guest::assert_checks(&at_b);
    assert!(report["disks"]["same_bytes"].as_u64().unwrap() >= 8 << 20, "{report}");
    assert_eq!(mark(&placed), None);
    rig.assert_only(&[(&rig.b, "vm")]);

    // Elsewhere again: what it has left there makes way.
    assert_completed(&migrate(&rig.b, "a"));
    assert_completed(&rig.a.run(&TO_POOL));
    disk_guest::assert_checks(&at_b);
    assert_eq!(std::fs::read_link(&at_b).unwrap(), pool.join("vm.qcow2"));
    assert!(!placed.exists());
}

#[test]
fn an_image_that_was_left_at_the_path_itself_makes_way_for_the_link() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [_, at_b], pool) = rig_with_pool();
    rig.a.boot("vm");
    assert_completed(&migrate(&rig.a, "b"));
    assert_completed(&migrate(&rig.b, "a"));
    assert!(mark(&at_b).is_some() && std::fs::symlink_metadata(&at_b).unwrap().is_file());
    let checked = rig.a.run(&[&TO_POOL[..], &["--dry-run"]].concat());
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(std::fs::symlink_metadata(&at_b).unwrap().is_file());
    assert_completed(&rig.a.run(&TO_POOL));
    disk_guest::assert_checks(&at_b);
    assert_eq!(std::fs::read_link(&at_b).unwrap(), pool.join("vm.qcow2"));
    assert_eq!(mark(&at_b), None);
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_disk_is_put_nowhere_where_an_image_is_that_is_not_to_be_replaced() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b], pool) = rig_with_pool();
    rig.a.boot("vm");
    std::fs::write(&at_b, "somebody's").unwrap();
    let placed = pool.join("vm.qcow2");
    let refused = rig.a.run(&TO_POOL);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stdout.contains("move it away"), "{refused:?}");
    assert_eq!(std::fs::read(&at_b).unwrap(), b"somebody's");
    assert!(!placed.exists());
    disk_guest::assert_checks(&at_a);
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_cancelled_migration_leaves_nothing_of_a_disks_place() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b], pool) = rig_with_pool();
    rig.a.boot("vm");
    let placed = pool.join("vm.qcow2");
    let client = rig.a.begin(&[&TO_POOL[..], &["--rate", "20mbit"]].concat());
    until_on_its_way(&rig.a, &placed);
    client.signal(Signal::INT);
    assert_eq!(client.wait().code, Some(1));
    until("the image is gone", || !placed.exists());
    until("so is the link", || std::fs::symlink_metadata(&at_b).is_err());
    assert_eq!(std::fs::read_dir(&pool).unwrap().count(), 2, "what was there before");
    disk_guest::assert_checks(&at_a);
    assert_completed(&migrate(&rig.a, "b"));
    disk_guest::assert_checks(&at_b);
    assert!(std::fs::symlink_metadata(&at_b).unwrap().is_file());
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_link_to_what_is_not_there_is_not_followed() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, at_b], pool) = rig_with_pool();
    rig.a.boot("vm");
    let unmounted = pool.join("web/vm.qcow2");
    std::os::unix::fs::symlink(&unmounted, &at_b).unwrap();
    for more in [&[][..], &["--disk", "vda=fast/vm.qcow2"]] {
        let refused = rig
            .a
            .run(&[&["migrate", "vm", "--to", "b", "--output", "json"][..], more].concat());
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stdout.contains("is its file system mounted?"), "{refused:?}");
    }
    assert!(!unmounted.exists() && !pool.join("vm.qcow2").exists());
    assert_eq!(std::fs::read_link(&at_b).unwrap(), unmounted);
    disk_guest::assert_checks(&at_a);
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_killed_gateway_goes_on_where_the_disk_was_put() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [_, at_b], pool) = rig_with_pool();
    rig.a.boot("vm");
    let placed = pool.join("vm.qcow2");
    let client = rig.a.begin(&[&TO_POOL[..], &["--rate", "6mbit"]].concat());
    until_there_are(&placed, 3 << 20);
    kill_and_restart(&mut rig.b);
    until_there_are(&placed, 4 << 20);
    kill_and_restart(&mut rig.a);
    let report = assert_completed(&client.wait());
    disk_guest::assert_checks(&at_b);
    assert_eq!(mark(&placed), None);
    assert_eq!(std::fs::read_link(&at_b).unwrap(), placed);
    assert!(report["disks"]["same_bytes"].as_u64().unwrap() > 2 << 20, "{report}");
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_guest_that_has_to_wait_for_its_disk_is_read_slower_for_its_sake() {
    need!(qemu(), program("qemu-img"));
    let (mut rig, [at_a, _]) = changed_rig(["raw", "raw"], |a, _| {
        let folder = a.folder.clone();
        let file = folder.join("vm.raw");
        let machine = disk_guest::slow_machine(&file, "raw", 8_000_000);
        disk_guest::plan_with(a.vm("vm"), &folder, &file, "raw", machine);
    });
    disk_guest::write_at(&at_a, UNTOUCHED + (8 << 20), &noise(40 << 20, 2));
    rig.a.boot("vm");
    disk_guest::assert_checks(&at_a);
    let report = assert_completed(&migrate(&rig.a, "b"));
    // Once it is read slower the guest waits no longer: what its requests took on the whole may be near what they take as a rule.
    for figure in ["held_back_seconds", "guest_io_seconds", "guest_io_usual_seconds"] {
        assert!(report["disks"][figure].as_f64().unwrap() > 0.0, "{figure}: {report}");
    }
}

/// A migration between sites of which one has a disk that fails. The reason.
fn fails(failing_is_source: bool, failure: &Value) -> String {
    let (mut rig, [at_a, at_b]) = changed_rig(["raw", "raw"], |a, b| {
        let site = if failing_is_source { a } else { b };
        let folder = site.folder.clone();
        let file = folder.join("vm.raw");
        let machine = disk_guest::failing_machine(&file, "raw", failure);
        disk_guest::plan_with(site.vm("vm"), &folder, &file, "raw", machine);
    });
    rig.a.boot("vm");
    let ended = migrate(&rig.a, "b");
    assert_eq!(ended.code, Some(1), "{ended:?}");
    disk_guest::assert_checks(&at_a);
    until("the image is gone", || !at_b.exists());
    let block = rig.a.qmp("vm", "query-block", &json!({})).unwrap();
    assert!(!block.to_string().contains("longhaul-"), "{block}");
    rig.assert_only(&[(&rig.a, "vm")]);
    ended.json()["reason"].as_str().unwrap().to_owned()
}

#[test]
fn a_disk_that_cannot_be_read_fails_the_migration_and_the_guest_goes_on() {
    need!(qemu(), program("qemu-img"));
    let sector = UNTOUCHED / 512 + 4000;
    let failure = json!({ "event": "read_aio", "iotype": "read", "errno": 5, "sector": sector, "once": false });
    let reason = fails(true, &failure);
    assert!(reason.contains("the disk vda cannot be read at a"), "{reason}");
}

#[test]
fn a_disk_that_is_full_at_the_destination_fails_the_migration_and_the_guest_goes_on() {
    need!(qemu(), program("qemu-img"));
    let sector = UNTOUCHED / 512 + 4000;
    let failure = json!({ "event": "write_aio", "iotype": "write", "errno": 28, "sector": sector, "once": false });
    let reason = fails(false, &failure);
    assert!(
        reason.contains("the disk vda cannot be written") && reason.contains("ENOSPC"),
        "{reason}"
    );
}
