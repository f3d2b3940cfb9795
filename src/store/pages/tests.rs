use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;

use super::*;
use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::reduce::ShelfError;

/// Pages in memory, by slot.
struct Slots(Vec<[u8; PAGE_SIZE]>);

impl PageShelf for Slots {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        assert_eq!(slot as usize, self.0.len());
        self.0.push(page.try_into().unwrap());
        Ok(())
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        page.copy_from_slice(self.0.get(slot as usize).ok_or(ShelfError::NoSuchSlot { slot })?);
        Ok(())
    }
}

fn page(seed: u32) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut page);
    page
}

fn whose(vm: &str, tenant: &str) -> Whose {
    Whose {
        vm: vm.to_owned(),
        tenant: tenant.to_owned(),
        peer: "tokyo".to_owned(),
    }
}

fn id(number: u8) -> MigrationId {
    MigrationId([number; 16])
}

/// What a session leaves: `pages` pages, of which every third has the content of the one before it.
fn kept(pages: u32) -> KeptPages<Slots> {
    let contents = (0..pages).map(page).collect();
    let places = (0..pages).map(|number| {
        let at = PageAddress {
            block: 1,
            page: number.into(),
        };
        (at, if number % 3 == 2 { number - 1 } else { number })
    });
    KeptPages {
        shelf: Slots(contents),
        places: places.collect(),
    }
}

fn store(dir: &Path) -> PageStore {
    PageStore::open(&dir.join("store"), 1 << 30).unwrap()
}

#[test]
fn an_image_holds_what_the_session_left() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut left = kept(1000);
    let head = store.keep(id(1), &whose("db-1", ""), 7, &mut left).unwrap().unwrap();
    assert_eq!((head.places, head.contents), (1000, 667));
    let image = store.image(id(1), &whose("db-1", "")).unwrap();
    let known = image.pages().unwrap();
    assert_eq!(known.digest(), head.digest);
    for (&(at, number), &(expected_at, slot)) in known.places().iter().zip(&left.places) {
        let mut found = [0; PAGE_SIZE];
        image.read(number, &mut found).unwrap();
        assert_eq!((at, found), (expected_at, page(slot)));
    }
    assert!(image.verify().is_ok());
    assert!(image.read(667, &mut [0; PAGE_SIZE]).is_err());
}

#[test]
fn sites_that_were_left_the_same_know_the_same() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let heads = [&one, &other].map(|dir| {
        store(dir.path())
            .keep(id(1), &whose("db-1", ""), 7, &mut kept(100))
            .unwrap()
            .unwrap()
    });
    assert_eq!(heads[0].digest, heads[1].digest);
    let mut changed = kept(100);
    changed.shelf.0[51][9] ^= 1;
    let changed = store(one.path())
        .keep(id(2), &whose("db-1", ""), 7, &mut changed)
        .unwrap()
        .unwrap();
    assert_ne!(changed.digest, heads[0].digest);
}

#[test]
fn only_what_this_process_has_read_whole_is_offered() {
    let dir = tempfile::tempdir().unwrap();
    store(dir.path())
        .keep(id(1), &whose("db-1", ""), 7, &mut kept(10))
        .unwrap();
    let after_restart = store(dir.path());
    assert!(after_restart.candidates(&whose("db-1", ""), 10).is_empty());
    assert!(after_restart.image(id(1), &whose("db-1", "")).is_none());
    assert_eq!(after_restart.scrub().unwrap().0, 1);
    assert_eq!(after_restart.candidates(&whose("db-1", ""), 10).len(), 1);
    assert!(after_restart.image(id(1), &whose("db-1", "")).is_some());
}

#[test]
fn a_bit_that_flips_anywhere_is_found_and_never_read_as_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let clean = store(dir.path());
    clean.keep(id(1), &whose("db-1", ""), 7, &mut kept(64)).unwrap();
    let path = clean.path_of(id(1));
    let whole = std::fs::read(&path).unwrap();
    for flip in 0..100 {
        let at = flip * whole.len() / 100 + flip % 7;
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (flip % 8);
        std::fs::write(&path, &damaged).unwrap();
        if let Ok(key) = StoreKey::load(clean.dir())
            && let Ok(image) = Image::open(&path, &key.unwrap())
        {
            let known = image.pages();
            for number in 0..image.head().contents {
                let mut found = [0; PAGE_SIZE];
                if let (Ok(known), Ok(())) = (&known, image.read(number, &mut found)) {
                    let digest = crate::proto::page::PageDigest::of(&found);
                    assert_eq!(digest, known.digests()[number as usize], "bit {flip}");
                }
            }
        }
        let restarted = store(dir.path());
        let (images, removed) = restarted.scrub().unwrap();
        assert_eq!((images, removed.len()), (0, 1), "bit {flip} of byte {at}");
        assert!(!path.exists());
    }
}

#[test]
fn a_torn_image_is_removed_and_the_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let before = store(dir.path());
    before.keep(id(1), &whose("db-1", ""), 7, &mut kept(64)).unwrap();
    before.keep(id(2), &whose("db-2", ""), 8, &mut kept(64)).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(before.path_of(id(1)))
        .unwrap();
    file.set_len(100_000).unwrap();
    std::fs::write(before.dir().join(".0123.part"), b"half").unwrap();
    let restarted = store(dir.path());
    let (whole, removed) = restarted.scrub().unwrap();
    assert_eq!((whole, removed.len()), (1, 1));
    assert!(removed[0].1.contains("length"), "{removed:?}");
    assert!(!before.dir().join(".0123.part").exists());
}

#[test]
fn tenants_share_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", "acme"), 7, &mut kept(10)).unwrap();
    assert!(store.candidates(&whose("db-1", ""), 10).is_empty());
    assert!(store.image(id(1), &whose("db-1", "other")).is_none());
    assert!(store.image(id(1), &whose("db-1", "acme")).is_some());
}

#[test]
fn a_peer_is_not_told_of_what_went_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 7, &mut kept(10)).unwrap();
    let elsewhere = Whose {
        peer: "paris".to_owned(),
        ..whose("db-1", "")
    };
    assert!(store.candidates(&elsewhere, 10).is_empty());
    assert!(store.image(id(1), &elsewhere).is_none());
    // The VM's image with one peer is not in the place of that with another.
    store.keep(id(2), &elsewhere, 8, &mut kept(10)).unwrap();
    assert_eq!(store.contents().unwrap().images.len(), 2);
}

#[test]
fn an_erasure_that_was_cut_short_leaves_nothing_that_is_taken_for_a_key() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 7, &mut kept(10)).unwrap();
    std::fs::write(store.dir().join("key"), [0; 32]).unwrap();
    assert!(matches!(store.open_image(id(1)), Err(StoreError::Erased { .. })));
    store.keep(id(2), &whose("db-2", ""), 7, &mut kept(10)).unwrap();
    assert_ne!(std::fs::read(store.dir().join("key")).unwrap(), [0; 32]);
    assert!(store.open_image(id(2)).is_ok());
}

#[test]
fn an_erasure_that_was_cut_short_is_finished_by_the_next_look() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 7, &mut kept(10)).unwrap();
    let cut_short = store.dir().join(".key.erased");
    std::fs::rename(store.dir().join("key"), &cut_short).unwrap();
    let open = File::open(&cut_short).unwrap();
    store.erase().unwrap();
    let mut left = [1; 32];
    open.read_exact_at(&mut left, 0).unwrap();
    assert_eq!((left, std::fs::read_dir(store.dir()).unwrap().count()), ([0; 32], 0));
}

#[test]
fn what_cannot_be_read_now_is_not_offered_and_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 7, &mut kept(10)).unwrap();
    // Reading a directory fails, and not because of what is in it.
    std::fs::create_dir(store.path_of(id(2))).unwrap();
    let (whole, removed) = store.scrub().unwrap();
    assert_eq!((whole, removed.len()), (1, 0));
    assert_eq!(store.contents().unwrap().unreadable.len(), 1);
}

#[test]
fn an_older_session_that_is_written_late_does_not_take_the_place_of_a_newer_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(2), &whose("db-1", ""), 8, &mut kept(10)).unwrap();
    store.keep(id(1), &whose("db-1", ""), 7, &mut kept(10)).unwrap();
    assert_eq!(store.candidates(&whose("db-1", ""), 10)[0].id, id(2));
}

#[test]
fn a_suspect_is_offered_again_only_where_it_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 7, &mut kept(10)).unwrap();
    store.look_again(id(1)).unwrap();
    assert_eq!(store.candidates(&whose("db-1", ""), 10).len(), 1);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(store.path_of(id(1)))
        .unwrap();
    file.write_all_at(&[0; 64], 5000).unwrap();
    assert!(store.look_again(id(1)).is_err());
    assert!(store.candidates(&whose("db-1", ""), 10).is_empty() && !store.path_of(id(1)).exists());
}

#[test]
fn a_vm_has_its_two_newest_images_and_they_are_offered_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 1, &mut kept(10)).unwrap();
    store.keep(id(2), &whose("db-2", ""), 2, &mut kept(10)).unwrap();
    store.keep(id(3), &whose("db-3", ""), 3, &mut kept(10)).unwrap();
    store.keep(id(4), &whose("db-1", ""), 4, &mut kept(10)).unwrap();
    assert_eq!(offered(&store, &whose("db-2", "")), [id(2), id(4), id(3), id(1)]);
    store.keep(id(5), &whose("db-1", ""), 5, &mut kept(10)).unwrap();
    assert_eq!(offered(&store, &whose("db-1", "")), [id(5), id(4), id(3), id(2)]);
}

fn offered(store: &PageStore, whose: &Whose) -> Vec<MigrationId> {
    store.candidates(whose, 10).iter().map(|head| head.id).collect()
}

#[test]
fn a_vms_older_image_makes_room_before_another_vms_only_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = PageStore::open(&dir.path().join("store"), 140_000).unwrap();
    store.keep(id(1), &whose("db-1", ""), 1, &mut kept(12)).unwrap();
    store.keep(id(2), &whose("db-2", ""), 2, &mut kept(12)).unwrap();
    store.keep(id(3), &whose("db-2", ""), 3, &mut kept(12)).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH;
    store.open_image(id(1)).unwrap().touch(long_ago).unwrap();
    store.keep(id(4), &whose("db-3", ""), 4, &mut kept(12)).unwrap();
    let mut left = offered(&store, &whose("db-1", ""));
    left.sort_unstable();
    assert_eq!(left, [id(1), id(3), id(4)]);
}

/// A sparse disk: blocks of these contents, 0 for a block of zeroes, behind a hole of a MiB.
fn disk(dir: &Path, blocks: &[u32]) -> PathBuf {
    let path = dir.join("disk.raw");
    let file = File::create(&path).unwrap();
    for (number, &block) in (256..).zip(blocks) {
        let content = if block == 0 { [0; PAGE_SIZE] } else { page(block) };
        file.write_all_at(&content, number * PAGE_SIZE as u64).unwrap();
    }
    file.set_len((blocks.len() as u64 + 1000) * PAGE_SIZE as u64).unwrap();
    path
}

#[test]
fn a_seed_has_each_block_once_and_is_the_same_at_every_site() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let heads = [&one, &other].map(|dir| {
        let store = store(dir.path());
        let disk = disk(dir.path(), &[3, 0, 4, 3, 5, 4]);
        let head = store.seed(&disk, "", 9).unwrap().unwrap().head;
        let image = store.image(head.id, &whose("db-1", "acme")).unwrap();
        let contents: Vec<_> = (0..head.contents)
            .map(|number| {
                let mut found = [0; PAGE_SIZE];
                image.read(number, &mut found).unwrap();
                found
            })
            .collect();
        assert_eq!(contents, [3, 4, 5].map(page));
        assert!(image.verify().is_ok() && image.pages().unwrap().places().is_empty());
        // Again, it is there.
        assert_eq!(store.seed(&disk, "", 10).unwrap().unwrap().head, head);
        head
    });
    assert_eq!(heads[0], heads[1]);
}

#[test]
fn a_file_that_ends_within_a_block_ends_in_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, [7; 100]).unwrap();
    let store = store(dir.path());
    let head = store.seed(&path, "", 9).unwrap().unwrap().head;
    let mut found = [0; PAGE_SIZE];
    let image = store.image(head.id, &whose("db-1", "")).unwrap();
    image.read(0, &mut found).unwrap();
    assert!(found[..100] == [7; 100] && found[100..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_seed_of_a_tenant_serves_nobody_else_and_another_tenants_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let disk = disk(dir.path(), &[3, 4]);
    let seeds = ["acme", "other"].map(|tenant| store.seed(&disk, tenant, 9).unwrap().unwrap().head.id);
    assert_ne!(seeds[0], seeds[1]);
    assert_eq!(offered(&store, &whose("db-1", "acme")), [seeds[0]]);
    assert!(store.image(seeds[0], &whose("db-1", "other")).is_none());
    assert!(offered(&store, &whose("db-1", "")).is_empty());
}

#[test]
fn a_seed_of_the_tenant_goes_before_a_newer_one_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let disk = disk(dir.path(), &[3, 4]);
    let seeds = ["acme", ""].map(|tenant| {
        store
            .seed(&disk, tenant, 9 - tenant.len() as u64)
            .unwrap()
            .unwrap()
            .head
            .id
    });
    assert_eq!(offered(&store, &whose("db-1", "acme")), seeds);
}

#[test]
fn seeds_are_offered_behind_what_vms_left_and_have_room_among_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let seed = store.seed(&disk(dir.path(), &[3, 4]), "", 1).unwrap().unwrap().head.id;
    for number in 0..20 {
        let vm = format!("db-{number}");
        store
            .keep(id(number), &whose(&vm, ""), 2 + u64::from(number), &mut kept(9))
            .unwrap();
    }
    let offered = offered(&store, &whose("db-7", ""));
    assert_eq!(
        (offered.len(), offered[0], offered[MOST_OFFERED - 1]),
        (MOST_OFFERED, id(7), seed)
    );
}

#[test]
fn an_image_that_is_small_beside_the_vm_goes_behind_a_seed_unless_it_is_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let seed = store.seed(&disk(dir.path(), &[3, 4]), "", 1).unwrap().unwrap().head.id;
    store.keep(id(1), &whose("db-1", ""), 2, &mut kept(9)).unwrap();
    store.keep(id(2), &whose("db-2", ""), 3, &mut kept(9)).unwrap();
    let offered = |pages| {
        let heads = store.candidates(&whose("db-1", ""), pages);
        heads.iter().map(|head| head.id).collect::<Vec<_>>()
    };
    assert_eq!(offered(96), [id(1), id(2), seed]);
    assert_eq!(offered(97), [id(1), seed, id(2)]);
}

#[test]
fn a_peer_that_names_a_migration_after_a_seed_does_not_replace_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let disk = disk(dir.path(), &[3, 4]);
    let seed = store.seed(&disk, "", 1).unwrap().unwrap().head;
    let taken = store.keep(seed.id, &whose("db-1", ""), 2, &mut kept(9));
    assert!(matches!(taken, Err(StoreError::Taken { id }) if id == seed.id));
    assert_eq!(store.open_image(seed.id).unwrap().head(), &seed);
    // And where it was there first, the seed takes its place.
    store.forget(seed.id).unwrap();
    store
        .keep(seed.id, &whose("db-1", ""), 2, &mut kept(9))
        .unwrap()
        .unwrap();
    assert_eq!(store.seed(&disk, "", 1).unwrap().unwrap().head, seed);
    assert_eq!(store.open_image(seed.id).unwrap().head(), &seed);
}

#[test]
fn a_seed_that_was_removed_and_given_again_is_read_again_before_it_is_offered() {
    let dir = tempfile::tempdir().unwrap();
    let (gateway, operator) = (store(dir.path()), store(dir.path()));
    let disk = disk(dir.path(), &[3, 4]);
    let mut tried = HashSet::new();
    let seed = operator.seed(&disk, "", 1).unwrap().unwrap().head.id;
    assert_eq!(gateway.take_in(&mut tried).unwrap(), 1);
    operator.forget(seed).unwrap();
    operator.seed(&disk, "", 2).unwrap();
    assert!(offered(&gateway, &whose("db-1", "")).is_empty());
    assert!(gateway.image(seed, &whose("db-1", "")).is_none());
    assert_eq!(gateway.take_in(&mut tried).unwrap(), 1);
    assert_eq!(offered(&gateway, &whose("db-1", "")), [seed]);
}

#[test]
fn a_seed_stays_where_vms_need_room() {
    let dir = tempfile::tempdir().unwrap();
    let store = PageStore::open(&dir.path().join("store"), 100_000).unwrap();
    let disk = disk(dir.path(), &[1, 2, 3, 4, 5, 6, 7, 8]);
    let seed = store.seed(&disk, "", 1).unwrap().unwrap().head.id;
    store.open_image(seed).unwrap().touch(SystemTime::UNIX_EPOCH).unwrap();
    store
        .keep(id(1), &whose("db-1", ""), 2, &mut kept(12))
        .unwrap()
        .unwrap();
    store
        .keep(id(2), &whose("db-2", ""), 3, &mut kept(12))
        .unwrap()
        .unwrap();
    assert_eq!(offered(&store, &whose("db-2", "")), [id(2), seed]);
    let large = store.keep(id(3), &whose("db-3", ""), 4, &mut kept(30)).unwrap();
    assert!(large.is_none(), "not even where it would have room without the seed");
    assert!(store.forget(seed).unwrap() && !store.forget(seed).unwrap());
    assert!(
        store
            .keep(id(3), &whose("db-3", ""), 4, &mut kept(30))
            .unwrap()
            .is_some()
    );
}

#[test]
fn what_is_no_raw_disk_or_an_empty_one_is_no_seed() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let path = dir.path().join("disk");
    for start in [b"QFI\xfb".as_slice(), b"\x1f\x8b\x08", b"\xfd7zXZ\0"] {
        std::fs::write(&path, start).unwrap();
        assert!(matches!(store.seed(&path, "", 1), Err(StoreError::NotRaw { .. })));
    }
    for empty in [0, 10_000] {
        std::fs::write(&path, vec![0; empty]).unwrap();
        assert!(matches!(store.seed(&path, "", 1), Err(StoreError::Blank { .. })));
    }
    assert!(store.contents().unwrap().images.is_empty());
}

#[test]
fn what_another_process_put_into_the_store_is_offered_once_it_was_read() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = store(dir.path());
    let mut tried = HashSet::new();
    assert_eq!(gateway.take_in(&mut tried).unwrap(), 0);
    let seed = store(dir.path())
        .seed(&disk(dir.path(), &[3, 4]), "", 1)
        .unwrap()
        .unwrap()
        .head
        .id;
    assert!(offered(&gateway, &whose("db-1", "")).is_empty());
    assert_eq!(gateway.take_in(&mut tried).unwrap(), 1);
    assert_eq!(offered(&gateway, &whose("db-1", "")), [seed]);
    assert_eq!(gateway.take_in(&mut tried).unwrap(), 0);
}

#[test]
fn what_was_not_used_for_longest_makes_room_and_open_images_stay_readable() {
    let dir = tempfile::tempdir().unwrap();
    let store = PageStore::open(&dir.path().join("store"), 100_000).unwrap();
    store.keep(id(1), &whose("db-1", ""), 1, &mut kept(12)).unwrap();
    store.keep(id(2), &whose("db-2", ""), 2, &mut kept(12)).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH;
    for number in [1, 2] {
        store.open_image(id(number)).unwrap().touch(long_ago).unwrap();
    }
    let open = store.image(id(1), &whose("db-1", "")).unwrap();
    open.touch(long_ago + std::time::Duration::from_secs(1)).unwrap();
    store.keep(id(3), &whose("db-3", ""), 3, &mut kept(12)).unwrap();
    let mut left: Vec<_> = store
        .contents()
        .unwrap()
        .images
        .iter()
        .map(|listed| listed.head.id)
        .collect();
    left.sort_unstable();
    assert_eq!(left, [id(1), id(3)]);
    store.make_room(0).unwrap();
    assert!(store.contents().unwrap().images.is_empty());
    assert!(open.verify().is_ok());
    assert!(
        store
            .keep(id(4), &whose("db-4", ""), 4, &mut kept(60))
            .unwrap()
            .is_none(),
        "it alone is too large"
    );
}

#[test]
fn an_erased_store_cannot_be_read_even_where_its_files_were_copied() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 1, &mut kept(10)).unwrap();
    let copy = std::fs::read(store.path_of(id(1))).unwrap();
    assert!(!copy.windows(32).any(|window| window == &page(0)[..32]));
    store.erase().unwrap();
    assert_eq!(std::fs::read_dir(store.dir()).unwrap().count(), 0);
    std::fs::write(store.path_of(id(1)), copy).unwrap();
    assert!(matches!(store.open_image(id(1)), Err(StoreError::Erased { .. })));
    store.keep(id(2), &whose("db-2", ""), 1, &mut kept(10)).unwrap();
    assert!(matches!(store.open_image(id(1)), Err(StoreError::Damaged { .. })));
    assert!(store.open_image(id(2)).is_ok());
}

#[test]
fn a_session_whose_pages_cannot_be_read_back_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut left = kept(10);
    left.shelf.0.truncate(5);
    assert!(matches!(
        store.keep(id(1), &whose("db-1", ""), 1, &mut left),
        Err(StoreError::Shelf(_))
    ));
    let names: Vec<_> = std::fs::read_dir(store.dir())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["key"]);
}

#[test]
fn a_page_that_is_damaged_after_it_was_offered_fails_and_is_not_another() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    store.keep(id(1), &whose("db-1", ""), 1, &mut kept(10)).unwrap();
    let image = store.image(id(1), &whose("db-1", "")).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(store.path_of(id(1)))
        .unwrap();
    file.write_all_at(&[0; 64], 4096 + 3 * 4112).unwrap();
    let mut found = [0; PAGE_SIZE];
    assert!(matches!(image.read(3, &mut found), Err(StoreError::Damaged { .. })));
    assert_eq!(found, [0; PAGE_SIZE]);
    image.read(4, &mut found).unwrap();
    assert_eq!(found, page(6), "every third content is left out");
}

proptest! {
    /// A session that begins with an image has its pages in the first slots until the ring comes around.
    #[test]
    fn a_shelf_over_an_image_has_each_page_until_its_slot_is_taken(slots in 1_u32..40, contents in 1_u32..30, puts in 0_u32..100) {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut left = kept(contents);
        left.places.retain(|(at, _)| at.page % 3 != 2);
        store.keep(id(1), &whose("db-1", ""), 1, &mut left).unwrap();
        let image = std::sync::Arc::new(store.image(id(1), &whose("db-1", "")).unwrap());
        let known = image.pages().unwrap().slots(slots);
        let mut expected: Vec<Option<[u8; PAGE_SIZE]>> = vec![None; slots as usize];
        for number in 0..known {
            expected[number as usize] = Some(page(left.places[number as usize].1));
        }
        let spill = spill::SpillShelf::after(dir.path(), slots, 3, known).unwrap();
        let mut shelf = KnownShelf::new(Some(image), spill);
        for put in 0..puts {
            let slot = (known + put) % slots;
            shelf.put(slot, &page(1000 + put)).unwrap();
            expected[slot as usize] = Some(page(1000 + put));
        }
        for (slot, expected) in (0..).zip(expected) {
            let mut found = [0; PAGE_SIZE];
            match expected {
                Some(expected) => {
                    shelf.get(slot, &mut found).unwrap();
                    prop_assert_eq!(found, expected);
                }
                None => prop_assert!(shelf.get(slot, &mut found).is_err()),
            }
        }
    }
}
