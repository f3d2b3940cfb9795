//! The page store: what a VM that moves again does not send, and what becomes of a store whose writer is killed.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::guest::Machine;
use common::process::Ended;
use common::{Rig, Site, need, qemu, until};
use longhaul::proto::page::{MigrationId, PAGE_SIZE, PageAddress, PageDigest};
use longhaul::proto::reduce::{KeptPages, PageShelf, ShelfError};
use longhaul::store::pages::{PageStore, Whose};
use rustix::process::Signal;
use serde_json::Value;

const STORE: &str = "[store]\nsize = \"1gib\"\n";

fn rig(vms: &[(&str, Machine)]) -> Rig {
    Rig::planned(vms, |a, b| {
        for plan in [a, b] {
            plan.settings.push_str(STORE);
        }
    })
}

/// `longhaul store VERB` for this site.
fn store(site: &Site, verb: &str) -> (Option<i32>, Value) {
    store_of(site, &[verb])
}

fn store_of(site: &Site, words: &[&str]) -> (Option<i32>, Value) {
    let config = site.state_dir().parent().unwrap().join("gateway.toml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command
        .arg("store")
        .args(words)
        .args(["--output", "json", "--config"])
        .arg(config);
    let ran = command.output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    (
        ran.status.code(),
        serde_json::from_str(&said).unwrap_or_else(|_| panic!("{ran:?}")),
    )
}

fn images(site: &Site) -> Vec<Value> {
    store(site, "status").1["images"].as_array().unwrap().clone()
}

/// Both sites keep so many images.
#[track_caller]
fn until_kept(rig: &Rig, count: usize) {
    for site in [&rig.a, &rig.b] {
        until(&format!("{} keeps {count} images", site.name()), || {
            images(site).len() == count
        });
    }
}

#[track_caller]
fn moved(site: &Site, vm: &str, to: &str) -> Value {
    let ended: Ended = site.run(&["migrate", vm, "--to", to, "--output", "json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.json()
}

fn number(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"))
}

fn restart(site: &mut Site) {
    let gateway = site.take_gateway();
    gateway.signal(Signal::TERM);
    gateway.wait();
    site.start();
    until("the store was looked through", || {
        site.log().contains("page store read")
    });
}

#[test]
fn a_vm_that_comes_back_after_both_gateways_were_restarted_sends_only_what_it_changed() {
    need!(qemu());
    let mut rig = rig(&[("vm", Machine::restless(64, 512))]);
    rig.a.boot("vm");
    let there = moved(&rig.a, "vm", "b");
    assert_eq!(number(&there, "known_pages"), 0);
    until_kept(&rig, 1);
    assert_eq!(images(&rig.a)[0]["pages"], images(&rig.b)[0]["pages"]);

    restart(&mut rig.a);
    restart(&mut rig.b);
    let back = moved(&rig.b, "vm", "a");
    assert!(number(&back, "known_pages") > 15_000, "{back}");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    let (first, second) = (number(&there, "wire_bytes"), number(&back, "wire_bytes"));
    println!("{first} bytes there, {second} back");
    assert!(second * 10 <= first, "{second} of {first}");
    rig.assert_only(&[(&rig.a, "vm")]);
    until_kept(&rig, 2);
    assert_eq!(store(&rig.a, "verify").0, Some(0));
}

#[test]
fn a_vm_that_moves_on_before_one_site_has_written_its_newest_image_begins_with_the_one_before() {
    need!(qemu());
    let mut rig = rig(&[("vm", Machine::restless(64, 512))]);
    rig.a.boot("vm");
    let there = moved(&rig.a, "vm", "b");
    until_kept(&rig, 1);
    let first = images(&rig.b)[0]["migration"].clone();
    moved(&rig.b, "vm", "a");
    until_kept(&rig, 2);
    let newest = images(&rig.b)
        .into_iter()
        .find(|image| image["migration"] != first)
        .unwrap();
    let forgotten = store_of(&rig.b, &["forget", newest["migration"].as_str().unwrap()]);
    assert_eq!(forgotten.0, Some(0), "{forgotten:?}");
    let again = moved(&rig.a, "vm", "b");
    assert!(number(&again, "known_pages") > 15_000, "{again}");
    let (first, second) = (number(&there, "wire_bytes"), number(&again, "wire_bytes"));
    assert!(second * 10 <= first, "{second} of {first}");
    // The newest has its name before the one that it supersedes is gone.
    until("a kept it and the one before", || {
        let kept = images(&rig.a);
        kept.len() == 2 && kept.iter().any(|image| image["migration"] == again["migration"])
    });
}

#[test]
fn what_both_sites_have_of_a_disk_is_not_sent_in_a_first_migration_either() {
    need!(qemu());
    let vms = ["seeded", "strange"].map(|vm| (vm, Machine::filled(48)));
    let mut rig = Rig::planned(&vms, |a, b| {
        for plan in [a, b] {
            plan.settings.push_str(STORE);
            plan.vm("seeded").settings = "tenant = \"acme\"\n".to_owned();
        }
    });
    for (vm, _) in &vms {
        rig.a.boot(vm);
    }
    // A disk that has what the guest has in memory.
    let disk = rig.path().join("disk.raw");
    let dump = serde_json::json!({ "val": 0, "size": 40 << 20, "filename": disk });
    rig.a.qmp("seeded", "pmemsave", &dump).unwrap();
    let seeds = [&rig.a, &rig.b].map(|site| {
        let (code, seed) = store_of(site, &["seed", "--tenant", "acme", disk.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{seed}");
        seed
    });
    assert_eq!(seeds[0], seeds[1]);
    assert!(number(&seeds[0], "pages") > 9_000, "{seeds:?}");
    std::fs::remove_file(&disk).unwrap();
    // Without a restart.
    for site in [&rig.a, &rig.b] {
        until("the gateway took it in", || {
            site.log().contains("taken into the page store")
        });
    }
    let strange = moved(&rig.a, "strange", "b");
    let seeded = moved(&rig.a, "seeded", "b");
    let bytes = [&strange, &seeded].map(|report| number(report, "wire_bytes"));
    println!("{bytes:?}");
    assert_eq!(number(&strange, "known_pages"), 0);
    assert!(number(&seeded, "known_pages") > 9_000, "{seeded}");
    assert!(bytes[1] * 3 < bytes[0], "{bytes:?}");
    rig.assert_only(&[(&rig.b, "seeded"), (&rig.b, "strange")]);
}

#[test]
fn a_disk_image_that_is_not_raw_is_refused_with_the_command_that_makes_it_so() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("gateway.toml");
    let text = format!("site = \"a\"\nstate_dir = {:?}\n{STORE}", dir.path().join("state"));
    std::fs::write(&config, text).unwrap();
    let disk = dir.path().join("disk.qcow2");
    std::fs::write(&disk, b"QFI\xfb and so on").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    let ran = command
        .args(["store", "seed"])
        .arg(&disk)
        .arg("--config")
        .arg(config)
        .output()
        .unwrap();
    assert_eq!(ran.status.code(), Some(2), "{ran:?}");
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(
        said.contains("qcow2") && said.contains("qemu-img convert -O raw"),
        "{said}"
    );
}

#[test]
fn a_second_vm_of_the_same_image_sends_little_unless_it_is_of_another_tenant() {
    need!(qemu());
    let vms = ["one", "two", "strange"].map(|vm| (vm, Machine::filled(48)));
    let mut rig = Rig::planned(&vms, |a, b| {
        for plan in [a, b] {
            plan.settings.push_str(STORE);
            plan.vm("strange").settings = "tenant = \"acme\"\n".to_owned();
        }
    });
    for (vm, _) in &vms {
        rig.a.boot(vm);
    }
    let first = moved(&rig.a, "one", "b");
    until_kept(&rig, 1);
    let second = moved(&rig.a, "two", "b");
    until_kept(&rig, 2);
    let strange = moved(&rig.a, "strange", "b");
    let bytes = [&first, &second, &strange].map(|report| number(report, "wire_bytes"));
    println!("{bytes:?}");
    assert!(bytes[1] * 10 <= bytes[0], "{bytes:?}");
    assert!(bytes[2] * 2 > bytes[0], "{bytes:?}");
    assert_eq!(number(&strange, "known_pages"), 0);
}

#[test]
fn an_image_that_is_damaged_under_a_migration_fails_it_and_not_the_vm() {
    need!(qemu());
    let mut rig = rig(&[("vm", Machine::restless(48, 256))]);
    rig.a.boot("vm");
    moved(&rig.a, "vm", "b");
    until_kept(&rig, 1);
    // After a found it whole.
    let image = file_of_image(rig.a.state_dir());
    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    for page in 0..8000 {
        file.write_all_at(b"damage", 4096 + page * 4112 + 100).unwrap();
    }
    let failed = rig.b.run(&["migrate", "vm", "--to", "a", "--output", "json"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);
    until("a threw it out", || !image.exists());
    let back = moved(&rig.b, "vm", "a");
    assert_eq!(number(&back, "known_pages"), 0);
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
}

#[test]
fn a_store_that_was_erased_is_begun_again() {
    need!(qemu());
    let mut rig = rig(&[("vm", Machine::restless(32, 256))]);
    rig.a.boot("vm");
    moved(&rig.a, "vm", "b");
    until_kept(&rig, 1);
    assert_eq!(store(&rig.b, "erase").0, Some(0));
    assert!(images(&rig.b).is_empty());
    let back = moved(&rig.b, "vm", "a");
    assert_eq!(number(&back, "known_pages"), 0);
    until("both keep the newest", || {
        [&rig.a, &rig.b]
            .iter()
            .all(|site| images(site).iter().any(|image| image["migration"] == back["migration"]))
    });
    let there = moved(&rig.a, "vm", "b");
    assert!(number(&there, "known_pages") > 0, "{there}");
}

fn file_of_image(state_dir: &Path) -> PathBuf {
    let files = std::fs::read_dir(state_dir.join("store")).unwrap();
    let mut images = files
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "pages"));
    images.next().unwrap()
}

/// Pages that are a function of their number.
struct Made {
    seed: u64,
}

impl PageShelf for Made {
    fn put(&mut self, slot: u32, _: &[u8]) -> Result<(), ShelfError> {
        Err(ShelfError::NoSuchSlot { slot })
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(&slot.to_le_bytes());
        hasher.finalize_xof().fill(page);
        Ok(())
    }
}

const PAGES: u32 = 700;

fn made(seed: u64) -> KeptPages<Made> {
    let places = (0..PAGES).map(|page| {
        let at = PageAddress {
            block: 0,
            page: page.into(),
        };
        (at, page)
    });
    KeptPages {
        shelf: Made { seed },
        places: places.collect(),
    }
}

fn whose(vm: &str) -> Whose {
    Whose {
        vm: vm.to_owned(),
        tenant: String::new(),
        peer: "tokyo".to_owned(),
    }
}

fn id_of(seed: u64) -> MigrationId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&seed.to_le_bytes());
    MigrationId(id)
}

const WRITES_TO: &str = "LONGHAUL_TEST_STORE";
const WRITES_FROM: &str = "LONGHAUL_TEST_STORE_FROM";

/// Run in a process of its own, which is killed.
#[test]
#[ignore = "run by a_store_whose_writer_is_killed_fifty_times_has_whole_images_only"]
fn child_that_writes_images() {
    let (Some(dir), Ok(from)) = (std::env::var_os(WRITES_TO), std::env::var(WRITES_FROM)) else {
        return;
    };
    let store = PageStore::open(Path::new(&dir), 40 << 20).unwrap();
    println!("writing");
    for seed in from.parse::<u64>().unwrap().. {
        let vm = format!("vm-{}", seed % 5);
        store
            .keep(id_of(seed), &whose(&vm), seed, &mut made(seed))
            .unwrap()
            .unwrap();
    }
}

/// Numbers of a child's images begin at a multiple of this.
const FIRST: u64 = 1_000_000;

/// Images whose numbers begin at `first`, and bytes of the one that is being written.
fn written(dir: &Path, first: u64) -> (u64, u64) {
    let mut found = (0, 0);
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let of_child = (0..3).any(|number| name.contains(&id_of(first + number).to_string()));
        if of_child && name.ends_with(".pages") {
            found.0 += 1;
        } else if of_child {
            found.1 = entry.metadata().map_or(0, |file| file.len());
        }
    }
    found
}

#[test]
fn a_store_whose_writer_is_killed_fifty_times_has_whole_images_only() {
    use std::io::{BufRead as _, BufReader};
    let dir = tempfile::tempdir().unwrap();
    let mut most = 0;
    for kill in 0..50_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "child_that_writes_images"])
            .env(WRITES_TO, dir.path())
            .env(WRITES_FROM, (kill * FIRST).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        assert!(out.lines().any(|line| line.unwrap().contains("writing")));
        // Somewhere in its first, second or third image: by then as many of its files are there and the next one is so long.
        let (images, bytes) = (kill % 3, (kill % 4) << 20);
        until("the child writes", || {
            let (whole, growing) = written(dir.path(), kill * FIRST);
            whole > images || (whole == images && growing >= bytes)
        });
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));

        let store = PageStore::open(dir.path(), 40 << 20).unwrap();
        let (whole, removed) = store.scrub().unwrap();
        assert!(removed.is_empty(), "only names of whole images are given: {removed:?}");
        most = most.max(whole);
        for head in store.candidates(&whose("vm-0"), PAGES.into()) {
            let image = store.image(head.id, &head.whose).unwrap();
            let known = image.pages().unwrap();
            for number in [0, PAGES / 2, PAGES - 1] {
                let (mut found, mut expected) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
                image.read(number, &mut found).unwrap();
                Made { seed: head.unix_ms }.get(number, &mut expected).unwrap();
                assert_eq!(PageDigest::of(&found), known.digests()[number as usize]);
                assert!(found == expected, "page {number} of {head:?}");
            }
        }
    }
    println!("up to {most} images were whole");
    assert!(most >= 3, "the children were killed before they had written anything");
}
