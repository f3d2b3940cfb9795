//! The session dictionary's pages at the destination: the newest in memory, the others in a spill file.
//!
//! ```text
//! put ──► ring of frames in memory ──(oldest 64 at a time, sealed)──► slot × 4096 in the file
//! get ◄── newest pages                                  get ◄── older pages, opened
//! ```
//!
//! The file has no name, so nothing is left behind however the process ends. What its blocks hold then can be read by nobody:
//! the key that sealed it was in memory only. Its room is claimed when it is made, so that a full disk is known before a
//! session relies on it. Calls block on the disk: keep them off the reactor's threads.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::seal::{SealingKey, TAG_LEN, Tag};
use crate::proto::page::PAGE_SIZE;
use crate::proto::reduce::{PageShelf, ShelfError};

/// A [`PageShelf`] with a bound on its memory and on its file.
#[derive(Debug)]
pub struct SpillShelf {
    slots: u64,
    /// Pages put so far, those that are elsewhere among them; the slot of put `n` is `n % slots`.
    puts: u64,
    /// Puts before this one are elsewhere.
    taken: u64,
    /// The first put that is still in memory; all before it are in the file, or overwritten.
    in_memory_from: u64,
    /// The frame of put `n` is `n % frame_count`.
    frames: Vec<u8>,
    frame_count: u64,
    spill: Option<Spill>,
}

/// Pages that left memory.
#[derive(Debug)]
struct Spill {
    file: File,
    /// Seals a page under the number of its put, which never comes again.
    key: SealingKey,
    /// By slot. Disks do return what was never written to them.
    tags: Vec<Tag>,
}

impl SpillShelf {
    /// A shelf for `slots` pages, of which the newest `pages_in_memory` (at least one) stay in memory.
    ///
    /// It takes 4096 bytes of memory per page in memory, and where that is less than all, 16 bytes of memory per slot and
    /// 4096 bytes per slot of a file in `dir`, which should be on a disk: a file in memory saves none.
    ///
    /// # Errors
    /// [`SpillError`] where the file cannot be made, or the disk has no room for it.
    pub fn new(dir: &Path, slots: u32, pages_in_memory: u32) -> Result<Self, SpillError> {
        Self::after(dir, slots, pages_in_memory, 0)
    }

    /// The same where the first `taken` slots hold pages that are elsewhere: it is put to from the slot behind them on, and has theirs once others
    /// have taken their place.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn after(dir: &Path, slots: u32, pages_in_memory: u32, taken: u32) -> Result<Self, SpillError> {
        let frame_count = u64::from(pages_in_memory.clamp(1, slots.max(1)));
        let spill = (frame_count < u64::from(slots))
            .then(|| Spill::create(dir, slots, taken.min(slots)))
            .transpose()?;
        Ok(Self {
            slots: slots.into(),
            puts: taken.min(slots).into(),
            in_memory_from: taken.min(slots).into(),
            taken: taken.min(slots).into(),
            frames: vec![0; frame_count as usize * PAGE_SIZE],
            frame_count,
            spill,
        })
    }

    /// Bytes of the spill file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        if self.spill.is_some() {
            self.slots * PAGE_SIZE as u64
        } else {
            0
        }
    }

    /// The put that `slot` holds.
    fn put_in(&self, slot: u32) -> Option<u64> {
        let slot = u64::from(slot);
        if slot >= self.slots.min(self.puts) {
            return None;
        }
        let last = self.puts - 1;
        let age = (last % self.slots + self.slots - slot) % self.slots;
        last.checked_sub(age).filter(|&put| put >= self.taken)
    }

    fn frame(&self, put: u64) -> usize {
        (put % self.frame_count) as usize * PAGE_SIZE
    }

    /// Moves the oldest pages out of memory: at least one.
    fn make_room(&mut self) -> Result<(), ShelfError> {
        let Some(spill) = &mut self.spill else {
            // The oldest page is the one whose slot is put next.
            self.in_memory_from += 1;
            return Ok(());
        };
        let end = self.puts.min(self.in_memory_from + WRITE_PAGES);
        while self.in_memory_from < end {
            let slot = self.in_memory_from % self.slots;
            let frame = self.in_memory_from % self.frame_count;
            // Adjacent in memory and in the file.
            let count = (end - self.in_memory_from)
                .min(self.slots - slot)
                .min(self.frame_count - frame);
            let start = frame as usize * PAGE_SIZE;
            let frames = &mut self.frames[start..start + count as usize * PAGE_SIZE];
            let written = spill.write(slot, self.in_memory_from, frames);
            // They are sealed, written or not: from here on none of them is taken for a page.
            self.in_memory_from += count;
            written?;
        }
        Ok(())
    }
}

impl PageShelf for SpillShelf {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        if self.slots == 0 || u64::from(slot) != self.puts % self.slots {
            return Err(ShelfError::NoSuchSlot { slot });
        }
        if self.puts - self.in_memory_from == self.frame_count {
            self.make_room()?;
        }
        let start = self.frame(self.puts);
        self.frames[start..start + PAGE_SIZE].copy_from_slice(page);
        self.puts += 1;
        Ok(())
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        let put = self.put_in(slot).ok_or(ShelfError::NoSuchSlot { slot })?;
        match &self.spill {
            Some(spill) if put < self.in_memory_from => spill.read(slot, put, page),
            _ => {
                let start = self.frame(put);
                page.copy_from_slice(&self.frames[start..start + PAGE_SIZE]);
                Ok(())
            }
        }
    }
}

impl Spill {
    fn create(dir: &Path, slots: u32, taken: u32) -> Result<Self, SpillError> {
        let cannot_create = |source| SpillError::Create {
            dir: dir.to_owned(),
            source,
        };
        let bytes = u64::from(slots) * PAGE_SIZE as u64;
        // Asked first, because a file that claims its room piece by piece fills the disk before it fails.
        let disk = rustix::fs::statvfs(dir).map_err(|error| cannot_create(error.into()))?;
        if disk.f_bavail.saturating_mul(disk.f_frsize) < bytes {
            let source = Errno::NOSPC.into();
            return Err(SpillError::NoRoom {
                dir: dir.to_owned(),
                bytes,
                source,
            });
        }
        let key = SealingKey::ephemeral().map_err(cannot_create)?;
        let file = unnamed_file(dir).map_err(cannot_create)?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            // A file system that cannot claim room: the disk may then fill up during the session.
            Err(Errno::OPNOTSUPP) => file.set_len(bytes),
            claimed => claimed.map_err(io::Error::from),
        }
        .map_err(|source| SpillError::NoRoom {
            dir: dir.to_owned(),
            bytes,
            source,
        })?;
        let mut tags = Vec::with_capacity(slots as usize);
        tags.resize(taken as usize, [0; TAG_LEN]);
        Ok(Self { file, key, tags })
    }

    /// Writes adjacent `pages`, of the puts from `put` on, to the slots from `first` on. They are sealed where they are: nobody looks for them in memory
    /// again.
    fn write(&mut self, first: u64, put: u64, pages: &mut [u8]) -> Result<(), ShelfError> {
        let (whole, _) = pages.as_chunks_mut::<PAGE_SIZE>();
        // Slots are filled in order, so those beyond the end are the next to come.
        for (number, page) in (0..).zip(whole.iter_mut()) {
            let tag = self.key.seal(put + number, page);
            match self.tags.get_mut((first + number) as usize) {
                Some(place) => *place = tag,
                None => self.tags.push(tag),
            }
        }
        self.file
            .write_all_at(pages, first * PAGE_SIZE as u64)
            .map_err(|source| ShelfError::Storage {
                slot: first as u32,
                source: source.into(),
            })
    }

    fn read(&self, slot: u32, put: u64, page: &mut [u8]) -> Result<(), ShelfError> {
        let mut sealed = [0; PAGE_SIZE + TAG_LEN];
        self.file
            .read_exact_at(&mut sealed[..PAGE_SIZE], u64::from(slot) * PAGE_SIZE as u64)
            .map_err(|source| ShelfError::Storage {
                slot,
                source: source.into(),
            })?;
        sealed[PAGE_SIZE..].copy_from_slice(&self.tags[slot as usize]);
        let opened = self.key.open(put, &mut sealed).ok_or(ShelfError::Damaged { slot })?;
        page.copy_from_slice(opened);
        Ok(())
    }
}

/// Pages for which a spill file in `dir` has room now, with a quarter of what is free left to others. Blocks on the disk.
///
/// # Errors
/// What the system says of the directory.
pub fn pages_with_room(dir: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(dir)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    Ok(free / 4 * 3 / PAGE_SIZE as u64)
}

/// A file in `dir` that only this process can reach.
fn unnamed_file(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // What file systems and kernels without O_TMPFILE answer (open(2)).
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => created_and_unlinked_file(dir),
        Err(error) => Err(error.into()),
    }
}

fn created_and_unlinked_file(dir: &Path) -> io::Result<File> {
    let mut number = 0_u32;
    loop {
        let path = dir.join(format!(".spill-{}-{number}", std::process::id()));
        match OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
        {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            // Another shelf of this process, between its two steps, or what a killed process of the same number left.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < NAMES_TRIED => number += 1,
            Err(error) => return Err(error),
        }
    }
}

/// The spill file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    /// No file can be made in the directory.
    #[error("no spill file can be made in {}", dir.display())]
    Create {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk has no room for the file.
    #[error(
        "{} has no room left for the {} MiB that the gateways agreed on when they connected: free some, or start it again once no other \
         migration runs between them, and they agree on less",
        dir.display(),
        bytes >> 20
    )]
    NoRoom {
        /// The directory.
        dir: PathBuf,
        /// Size of the file.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Pages written at once: 256 KiB is one request to most disks.
const WRITE_PAGES: u64 = 64;
/// Names tried before giving up.
const NAMES_TRIED: u32 = 1000;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;

    use super::*;

    fn page(seed: u64) -> [u8; PAGE_SIZE] {
        std::array::from_fn(|i| seed.to_le_bytes()[i % 8] ^ i as u8)
    }

    fn byte_at(shelf: &SpillShelf, place: u64) -> u8 {
        let mut byte = [0];
        let spill = shelf.spill.as_ref().unwrap();
        spill.file.read_exact_at(&mut byte, place).unwrap();
        byte[0]
    }

    fn get(shelf: &mut SpillShelf, slot: u32) -> Result<[u8; PAGE_SIZE], ShelfError> {
        let mut content = [0; PAGE_SIZE];
        shelf.get(slot, &mut content).map(|()| content)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_slot_gives_back_the_last_page_put_in_it(slots in 1_u32..200, in_memory in 0_u32..220, puts in 0_u64..500) {
            let dir = tempfile::tempdir().unwrap();
            let mut shelf = SpillShelf::new(dir.path(), slots, in_memory).unwrap();
            for put in 0..puts {
                shelf.put((put % u64::from(slots)) as u32, &page(put)).unwrap();
            }
            for slot in 0..slots {
                let last = (0..puts).rev().find(|put| put % u64::from(slots) == u64::from(slot));
                prop_assert_eq!(get(&mut shelf, slot).ok(), last.map(page), "slot {}", slot);
            }
            prop_assert!(get(&mut shelf, slots).is_err());
        }
    }

    #[test]
    fn the_file_has_no_name_and_is_as_large_as_the_dictionary_from_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = SpillShelf::new(dir.path(), 100, 10).unwrap();
        assert_eq!(shelf.file_bytes(), 100 * PAGE_SIZE as u64);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let metadata = shelf.spill.as_ref().unwrap().file.metadata().unwrap();
        assert_eq!(
            (metadata.len(), metadata.mode() & 0o777, metadata.nlink()),
            (shelf.file_bytes(), 0o600, 0)
        );
    }

    #[test]
    fn a_file_that_had_a_name_for_a_moment_is_as_private() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join(format!(".spill-{}-0", std::process::id())),
            "left behind",
        )
        .unwrap();
        let metadata = created_and_unlinked_file(dir.path()).unwrap().metadata().unwrap();
        assert_eq!(
            (metadata.len(), metadata.mode() & 0o777, metadata.nlink()),
            (0, 0o600, 0)
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_dictionary_that_fits_memory_has_no_file() {
        let mut shelf = SpillShelf::new(Path::new("/nowhere"), 8, 8).unwrap();
        assert_eq!(shelf.file_bytes(), 0);
        shelf.put(0, &page(1)).unwrap();
        assert_eq!(get(&mut shelf, 0).unwrap(), page(1));
        assert!(matches!(
            SpillShelf::new(Path::new("/nowhere"), 9, 8),
            Err(SpillError::Create { .. })
        ));
    }

    #[test]
    fn a_page_damaged_on_disk_is_not_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut shelf = SpillShelf::new(dir.path(), 10, 1).unwrap();
        for slot in 0..10 {
            shelf.put(slot, &page(slot.into())).unwrap();
        }
        let place = 3 * PAGE_SIZE as u64 + 7;
        shelf
            .spill
            .as_ref()
            .unwrap()
            .file
            .write_all_at(&[!byte_at(&shelf, place)], place)
            .unwrap();
        assert!(matches!(get(&mut shelf, 3), Err(ShelfError::Damaged { slot: 3 })));
        assert_eq!(get(&mut shelf, 4).unwrap(), page(4));
    }

    #[test]
    fn a_page_that_could_not_be_written_is_not_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut shelf = SpillShelf::new(dir.path(), 4, 1).unwrap();
        shelf.put(0, &page(0)).unwrap();
        // Takes nothing, and gives zeroes.
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        shelf.spill.as_mut().unwrap().file = full;
        assert!(matches!(shelf.put(1, &page(1)), Err(ShelfError::Storage { .. })));
        assert!(matches!(get(&mut shelf, 0), Err(ShelfError::Damaged { slot: 0 })));
    }

    #[test]
    fn nothing_of_a_page_is_on_the_disk_in_the_clear_and_the_same_page_looks_different_there_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut shelf = SpillShelf::new(dir.path(), 4, 1).unwrap();
        let mut seen = std::collections::HashSet::new();
        for put in 0..12 {
            shelf.put(put % 4, &page(7)).unwrap();
            // The last one is in memory.
            if let Some(before) = put.checked_sub(1) {
                let mut on_disk = [0; PAGE_SIZE];
                let at = u64::from(before % 4) * PAGE_SIZE as u64;
                shelf
                    .spill
                    .as_ref()
                    .unwrap()
                    .file
                    .read_exact_at(&mut on_disk, at)
                    .unwrap();
                let blocks = on_disk.as_chunks::<16>().0;
                assert!(blocks.iter().all(|block| !page(7).as_chunks::<16>().0.contains(block)));
                assert!(seen.insert(on_disk));
                assert_eq!(get(&mut shelf, before % 4).unwrap(), page(7));
            }
        }
    }

    #[test]
    fn slots_out_of_ring_order_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut shelf = SpillShelf::new(dir.path(), 4, 2).unwrap();
        assert!(matches!(
            shelf.put(1, &page(0)),
            Err(ShelfError::NoSuchSlot { slot: 1 })
        ));
        let mut none = SpillShelf::new(dir.path(), 0, 2).unwrap();
        assert!(none.put(0, &page(0)).is_err());
        assert!(get(&mut none, 0).is_err());
    }

    #[test]
    fn a_file_for_as_many_pages_as_there_is_room_for_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let pages = pages_with_room(dir.path()).unwrap();
        assert!(pages > 0);
        // Not more than a test may claim of the disk.
        assert!(SpillShelf::new(dir.path(), pages.min(10_000) as u32, 1).is_ok());
    }

    #[test]
    fn a_file_system_without_room_is_known_at_once() {
        // procfs has no room at all.
        assert_eq!(pages_with_room(Path::new("/proc")).unwrap(), 0);
        let refused = SpillShelf::new(Path::new("/proc"), 9, 8);
        assert!(matches!(refused, Err(SpillError::NoRoom { bytes, .. }) if bytes == 9 * PAGE_SIZE as u64));
    }
}
