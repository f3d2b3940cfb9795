//! VMs that are off move: real gateways, real images, no hypervisor.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::disk_guest::{content, convert};
use common::guest::Machine;
use common::process::{Ended, processes_of};
use common::{Rig, Site, need, noise, program, qemu, until};
use rustix::fs::{getxattr, setxattr};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Bytes of each disk.
const SIZE: u64 = 256 << 20;

/// Formats of the two disks at one site.
type Formats = [&'static str; 2];

struct Off {
    rig: Rig,
    a: [PathBuf; 2],
    b: [PathBuf; 2],
    formats: [Formats; 2],
}

/// The VM `vm`, off at A, with the disks `vda` and `vdb`.
fn off(at_a: Formats, at_b: Formats) -> Off {
    off_with(at_a, at_b, "")
}

/// The same, where the images at B have these settings too.
fn off_with(at_a: Formats, at_b: Formats, more_at_b: &str) -> Off {
    let mut files: [[PathBuf; 2]; 2] = Default::default();
    let rig = Rig::planned(&[("vm", Machine::firmware())], |a, b| {
        for (number, (site, formats)) in [(&mut *a, at_a), (&mut *b, at_b)].into_iter().enumerate() {
            let mut tables = String::new();
            for (disk, format) in ["vda", "vdb"].into_iter().zip(formats) {
                let file = site.folder.join(format!("{disk}.{format}"));
                let path = json!(file);
                tables += &format!("[[vm.image]]\ndisk = \"{disk}\"\npath = {path}\nformat = \"{format}\"\n");
                if number == 1 {
                    tables += more_at_b;
                }
                files[number][usize::from(disk == "vdb")] = file;
            }
            let vm = site.vm("vm");
            vm.settings = "disks = \"copied\"".to_owned();
            vm.tables = tables;
        }
    });
    let [a, b] = files;
    for (number, (file, format)) in a.iter().zip(at_a).enumerate() {
        make(file, format, number as u64 + 1);
    }
    Off {
        rig,
        a,
        b,
        formats: [at_a, at_b],
    }
}

/// An image of which some megabytes are used: at its beginning, in the middle and at its very end.
fn make(file: &Path, format: &str, seed: u64) {
    let raw = file.with_extension("made");
    let disk = std::fs::File::create(&raw).unwrap();
    disk.set_len(SIZE).unwrap();
    for (offset, length, seed) in [
        (0, 3 << 20, seed),
        (100 << 20, 5 << 20, seed + 10),
        (SIZE - 4096, 4096, seed + 20),
    ] {
        std::os::unix::fs::FileExt::write_all_at(&disk, &noise(length, seed), offset).unwrap();
    }
    convert(&raw, "raw", file, format);
    std::fs::remove_file(raw).unwrap();
}

fn mark(file: &Path) -> Option<String> {
    let mut value = [0; 100];
    let length = getxattr(file, "user.longhaul.image", &mut value).ok()?;
    Some(String::from_utf8(value[..length].to_vec()).unwrap())
}

fn taken(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |about| about.blocks() * 512)
}

/// Command lines of what serves images at either site.
fn servers(rig: &Rig) -> Vec<String> {
    let lines = processes_of(rig.path()).into_iter().map(|(_, line)| line);
    lines.filter(|line| line.contains("qemu-nbd")).collect()
}

impl Off {
    fn contents(&self, at: usize) -> [Vec<u8>; 2] {
        let files = [&self.a, &self.b][at];
        [0, 1].map(|disk| content(&files[disk], self.formats[at][disk]))
    }

    /// It is at one site and nowhere else: there its images are the disks, and as they were before; at the other they are marked, or not there.
    #[track_caller]
    fn assert_at(&self, at: usize, before: &[Vec<u8>; 2]) {
        let (here, there) = match at {
            0 => (&self.a, &self.b),
            _ => (&self.b, &self.a),
        };
        for file in here {
            until("an image is the disk", || file.exists() && mark(file).is_none());
        }
        for file in there {
            until("an image is no disk", || !file.exists() || mark(file).is_some());
        }
        assert!(self.contents(at) == *before, "the disks hold what they held");
        self.rig.assert_only(&[]);
        until("nothing serves an image", || servers(&self.rig).is_empty());
    }
}

fn migrate(site: &Site, to: &str) -> Ended {
    site.run(&["migrate", "vm", "--to", to, "--cold", "--output", "json"])
}

#[track_caller]
fn assert_completed(ended: &Ended) -> Value {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "completed", "{report}");
    report
}

/// Kills a gateway and starts it again.
fn kill_and_restart(site: &mut Site) {
    site.gateway().signal(Signal::KILL);
    until("the gateway is dead", || site.gateway().has_ended());
    site.start();
}

#[test]
fn a_vm_that_is_off_moves_with_its_disks_in_other_formats_and_comes_back_by_what_has_changed() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let off = off(["raw", "qcow2"], ["qcow2", "vmdk"]);
    let before = off.contents(0);

    let checked = off.rig.a.run(&["migrate", "vm", "--to", "b", "--cold", "--dry-run"]);
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(checked.stdout.contains("vda, vdb are copied"), "{checked:?}");
    assert!(!off.b[0].exists() && !off.b[1].exists());
    off.assert_at(0, &before);

    let report = assert_completed(&migrate(&off.rig.a, "b"));
    assert!(
        report["reason"].as_str().unwrap().contains("vm is at b, off"),
        "{report}"
    );
    assert!(report["downtime_seconds"].is_null(), "{report}");
    assert!(report["wire_bytes"].as_u64().unwrap() > 16 << 20, "{report}");
    off.assert_at(1, &before);
    for file in &off.b {
        assert!(taken(file) < 24 << 20, "{} is sparse", file.display());
    }
    let left = format!("left {}", report["migration"].as_str().unwrap());
    assert!(off.a.iter().all(|file| mark(file).unwrap().starts_with(&left)));

    // What has left is not the VM.
    let again = migrate(&off.rig.a, "b");
    assert_eq!(again.code, Some(2), "{again:?}");
    assert!(
        again.json()["reason"].as_str().unwrap().contains("is not the disk"),
        "{again:?}"
    );

    let report = assert_completed(&migrate(&off.rig.b, "a"));
    let disks = &report["disks"];
    assert!(disks["same_bytes"].as_u64().unwrap() >= 16 << 20, "{report}");
    assert!(disks["wire_bytes"].as_u64().unwrap() < 1 << 20, "{report}");
    off.assert_at(0, &before);
}

#[test]
fn the_other_formats_that_qemu_writes_are_written_too_and_stay_sparse() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let off = off(["qcow2", "vmdk"], ["vdi", "vhdx"]);
    let before = off.contents(0);
    assert_completed(&migrate(&off.rig.a, "b"));
    off.assert_at(1, &before);
    for file in &off.b {
        assert!(taken(file) < 64 << 20, "{} takes {}", file.display(), taken(file));
    }
}

#[test]
fn a_vm_that_runs_is_not_moved_as_one_that_is_off_and_none_can_be_started_while_it_moves() {
    need!(qemu(), program("qemu-img"), program("qemu-nbd"));
    let mut off = off(["raw", "raw"], ["raw", "raw"]);
    let before = off.contents(0);
    off.rig.a.boot("vm");
    let refused = migrate(&off.rig.a, "b");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.json()["reason"].as_str().unwrap().contains("leave --cold away"),
        "{refused:?}"
    );
    off.rig.a.kill_hypervisors("vm");
    until("it is off", || off.rig.a.hypervisors("vm").is_empty());

    let client = off
        .rig
        .a
        .begin(&["migrate", "vm", "--to", "b", "--cold", "--rate", "20mbit"]);
    until("its disks are on their way", || taken(&off.b[0]) > 1 << 20);
    let drive = format!("format=raw,file={},if=none,id=a", off.a[0].display());
    let started = std::process::Command::new(common::guest::qemu_program())
        .args(["-M", "none", "-display", "none", "-drive", &drive])
        .output()
        .unwrap();
    assert!(!started.status.success(), "{started:?}");
    assert!(String::from_utf8_lossy(&started.stderr).contains("lock"), "{started:?}");
    client.signal(Signal::INT);
    assert_eq!(client.wait().code, Some(1));
    until("nothing has come", || !off.b.iter().any(|file| file.exists()));
    off.assert_at(0, &before);
}

#[test]
fn gateways_that_are_killed_in_the_middle_go_on_with_what_has_arrived() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let mut off = off(["raw", "qcow2"], ["qcow2", "raw"]);
    let before = off.contents(0);
    let client = off.rig.a.begin(&[
        "migrate", "vm", "--to", "b", "--cold", "--rate", "40mbit", "--output", "json",
    ]);
    until("a part is there", || taken(&off.b[0]) > 3 << 20);
    kill_and_restart(&mut off.rig.a);
    until("another part is there", || taken(&off.b[0]) > 6 << 20);
    kill_and_restart(&mut off.rig.b);
    let report = assert_completed(&client.wait());
    assert!(report["disks"]["same_bytes"].as_u64().unwrap() > 2 << 20, "{report}");
    off.assert_at(1, &before);
}

#[test]
fn gateways_that_are_killed_when_it_is_handed_over_agree_on_where_it_is() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let mut off = off(["raw", "raw"], ["raw", "raw"]);
    let before = off.contents(0);
    for (kill_source, says) in [(true, "permit"), (false, "disks are written")] {
        let said = |rig: &Rig| {
            let site = if kill_source { &rig.a } else { &rig.b };
            site.log().matches(says).count()
        };
        let before_it = said(&off.rig);
        let client = off
            .rig
            .a
            .begin(&["migrate", "vm", "--to", "b", "--cold", "--output", "json"]);
        until("it is handed over", || said(&off.rig) > before_it);
        let site = if kill_source { &mut off.rig.a } else { &mut off.rig.b };
        kill_and_restart(site);
        let ended = client.wait();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        off.assert_at(1, &before);
        assert_completed(&migrate(&off.rig.b, "a"));
        off.assert_at(0, &before);
    }
}

#[test]
fn a_base_that_the_destination_has_does_not_cross() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base.raw");
    make(&base, "raw", 1);
    let settings = format!("base = {}\nbase-format = \"raw\"\n", json!(base));
    let off = off_with(["raw", "raw"], ["qcow2", "raw"], &settings);
    let before = off.contents(0);
    let report = assert_completed(&migrate(&off.rig.a, "b"));
    off.assert_at(1, &before);
    // The first disk is the base, the second one is something else.
    assert!(taken(&off.b[0]) < 2 << 20, "{}", taken(&off.b[0]));
    let disks = &report["disks"];
    assert!(disks["same_bytes"].as_u64().unwrap() >= 8 << 20, "{report}");
    assert!(disks["wire_bytes"].as_u64().unwrap() < 10 << 20, "{report}");
}

#[test]
fn an_image_of_another_size_is_replaced_where_it_is_ours_and_in_the_way_where_it_is_not() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let off = off(["raw", "raw"], ["raw", "raw"]);
    let before = off.contents(0);
    std::fs::write(&off.b[1], vec![1; 1 << 20]).unwrap();
    let refused = migrate(&off.rig.a, "b");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.json()["reason"].as_str().unwrap().contains("move it away"),
        "{refused:?}"
    );
    assert_eq!(std::fs::read(&off.b[1]).unwrap(), vec![1; 1 << 20]);
    assert!(!off.b[0].exists());
    let left = format!("left {}", "0".repeat(32));
    setxattr(
        &off.b[1],
        "user.longhaul.image",
        left.as_bytes(),
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    assert_completed(&migrate(&off.rig.a, "b"));
    off.assert_at(1, &before);
}

#[test]
fn an_image_that_was_left_and_used_again_since_is_not_written_over() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let off = off(["raw", "raw"], ["raw", "raw"]);
    assert_completed(&migrate(&off.rig.a, "b"));
    let before = off.contents(1);
    let used = noise(4096, 9);
    let file = std::fs::OpenOptions::new().write(true).open(&off.a[1]).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &used, 1 << 20).unwrap();

    let checked = off.rig.b.run(&["migrate", "vm", "--to", "a", "--cold", "--dry-run"]);
    let refused = migrate(&off.rig.b, "a");
    assert_eq!(
        (checked.code, refused.code),
        (Some(2), Some(2)),
        "{checked:?} {refused:?}"
    );
    for said in [checked.stdout, refused.json()["reason"].to_string()] {
        assert!(said.contains("was written after its VM had left it"), "{said}");
    }
    assert!(content(&off.a[1], "raw")[1 << 20..][..4096] == used);
    off.assert_at(1, &before);

    std::fs::remove_file(&off.a[1]).unwrap();
    assert_completed(&migrate(&off.rig.b, "a"));
    off.assert_at(0, &before);
}

#[test]
fn a_disk_is_put_where_the_command_says_and_is_found_there_again() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let mut off = off(["raw", "raw"], ["vmdk", "vmdk"]);
    let pool = off.b[0].with_file_name("fast");
    std::fs::create_dir(&pool).unwrap();
    off.rig.b.plan().settings += &format!("[[pool]]\nname = \"fast\"\npath = {}\n", json!(pool));
    kill_and_restart(&mut off.rig.b);
    let before = off.contents(0);
    let placed = pool.join("disk.vmdk");
    let to_pool = [
        "migrate",
        "vm",
        "--to",
        "b",
        "--cold",
        "--disk",
        "vda=fast/disk.vmdk",
        "--output",
        "json",
    ];
    until("it is refused for two disks at one place", || {
        let twice = off
            .rig
            .a
            .run(&[&to_pool[..], &["--disk", "vdb=fast/disk.vmdk"]].concat());
        assert_eq!(twice.code, Some(2), "{twice:?}");
        twice.stdout.contains("is there twice")
    });
    let both = off
        .rig
        .a
        .run(&[&to_pool[..], &["--disk", "vdb=fast/b.vmdk", "--dry-run"]].concat());
    assert_eq!(both.code, Some(0), "{both:?}");
    assert_eq!(std::fs::read_dir(&pool).unwrap().count(), 0);
    assert_completed(&off.rig.a.run(&to_pool));
    assert_eq!(std::fs::read_link(&off.b[0]).unwrap(), placed);
    off.assert_at(1, &before);
    kill_and_restart(&mut off.rig.b);
    assert_completed(&migrate(&off.rig.b, "a"));
    off.assert_at(0, &before);
    assert!(mark(&placed).is_some());
}

#[test]
fn a_vm_does_not_arrive_without_an_image_that_was_removed_while_it_came() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let off = off(["raw", "raw"], ["qcow2", "raw"]);
    let before = off.contents(0);
    let client = off.rig.a.begin(&[
        "migrate", "vm", "--to", "b", "--cold", "--rate", "40mbit", "--output", "json",
    ]);
    until("a part is there", || taken(&off.b[0]) > 1 << 20);
    std::fs::remove_file(&off.b[0]).unwrap();
    let failed = client.wait();
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(failed.stdout.contains("is not what was written any more"), "{failed:?}");
    until("nothing is left at B", || off.b.iter().all(|file| !file.exists()));
    off.assert_at(0, &before);
}

/// Makes the cluster of a qcow2 image in which this byte is one that QEMU cannot read: it would not lie where clusters do (docs/interop/qcow2.txt).
fn break_cluster(image: &Path, byte: u64) {
    let mut bytes = std::fs::read(image).unwrap();
    let number = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let cluster = 1_u64 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
    let in_table = cluster / 8;
    let table = |entry: u64| (entry & 0x00ff_ffff_ffff_fe00) as usize;
    let first = table(number(&bytes, 40)) + (byte / cluster / in_table) as usize * 8;
    let second = table(number(&bytes, first)) + (byte / cluster % in_table) as usize * 8;
    let entry = number(&bytes, second);
    assert_ne!(entry, 0, "it is allocated");
    bytes[second..second + 8].copy_from_slice(&(entry | 0x200).to_be_bytes());
    std::fs::write(image, bytes).unwrap();
}

#[test]
fn an_image_that_cannot_be_read_fails_the_migration_and_stays_what_it_is() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let off = off(["raw", "qcow2"], ["qcow2", "raw"]);
    break_cluster(&off.a[1], 102 << 20);
    let before = off.a.each_ref().map(|file| std::fs::read(file).unwrap());
    let failed = migrate(&off.rig.a, "b");
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let reason = failed.json()["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("the disk vdb cannot be read at a"), "{reason}");
    until("nothing is left at B", || off.b.iter().all(|file| !file.exists()));
    assert!(off.a.iter().all(|file| mark(file).is_none()));
    assert!(off.a.each_ref().map(|file| std::fs::read(file).unwrap()) == before);
    off.rig.assert_only(&[]);
    until("nothing serves an image", || servers(&off.rig).is_empty());
}

#[test]
fn a_file_that_does_not_end_with_a_sector_arrives_whole() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let off = off(["raw", "raw"], ["raw", "raw"]);
    let state = noise(1_000_001, 7);
    std::fs::write(&off.a[1], &state).unwrap();
    assert_completed(&migrate(&off.rig.a, "b"));
    let mut arrived = std::fs::read(&off.b[1]).unwrap();
    assert!(arrived.len() < state.len() + 512 && arrived[state.len()..].iter().all(|byte| *byte == 0));
    arrived.truncate(state.len());
    assert!(arrived == state);
}

#[test]
fn a_site_that_knows_of_another_disk_does_not_take_the_vm_without_it() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let mut off = off(["raw", "raw"], ["raw", "raw"]);
    let before = off.contents(0);
    let third = json!(off.b[0].with_file_name("vdc.raw"));
    off.rig.b.plan().vm("vm").tables += &format!("[[vm.image]]\ndisk = \"vdc\"\npath = {third}\nformat = \"raw\"\n");
    kill_and_restart(&mut off.rig.b);
    // The connection to the gateway before may be in use for a moment.
    until("it is refused for want of a disk", || {
        let refused = migrate(&off.rig.a, "b");
        assert_eq!(refused.code, Some(2), "{refused:?}");
        let reason = refused.json()["reason"].as_str().unwrap().to_owned();
        reason.contains("for the disk vdc of vm, which is not offered")
    });
    off.assert_at(0, &before);
}

#[test]
fn an_image_whose_vm_is_here_by_the_journal_is_its_disk_whatever_its_mark_says() {
    need!(program("qemu-img"), program("qemu-nbd"));
    let mut off = off(["raw", "raw"], ["raw", "raw"]);
    let before = off.contents(0);
    let report = assert_completed(&migrate(&off.rig.a, "b"));
    // As after a power failure that took what the mark was changed to.
    let arriving = format!("arriving {}", report["migration"].as_str().unwrap());
    for file in &off.b {
        setxattr(
            file,
            "user.longhaul.image",
            arriving.as_bytes(),
            rustix::fs::XattrFlags::empty(),
        )
        .unwrap();
    }
    kill_and_restart(&mut off.rig.b);
    off.assert_at(1, &before);
}
