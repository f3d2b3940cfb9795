//! The page store of a site: what migrations leave for the ones after them.
//!
//! ```text
//! state_dir/store/key            32 random bytes; without them nothing of the rest can be read
//!                 <id>.pages     one image: the memory of a VM as migration <id> left it, or a seed
//!                 .<id>.part     one that is being written
//! ```
//!
//! Both gateways of a migration keep the same image, because both see the same pages in the same order. When a VM moves again, the source names
//! the images that it has, the destination answers which of them it has too, and both begin the session with its pages ([`KnownPages`]).
//!
//! Of a VM the two newest are kept: while one site has not written the newest yet, the sites have the one before in common (not where it has yet
//! to write two: then a session begins with nothing). Seeds are blocks of a disk
//! image that an operator has given to both sites: the contents of pages without the pages.
//!
//! An image is written once, under another name until it is whole and synced, and never changed. So a crash leaves a whole image or none.
//! Every page is sealed (AES-256-GCM) under a key of its image, which is derived from the store's: a page that was damaged is not read as
//! another. An image is offered only after all of it was read and found whole by this process, and whoever has it open keeps it, whatever
//! becomes of its name: a session is never refused a page that it was promised, unless the disk fails under it. Then the migration fails and
//! the VM stays at the source.
//!
//! Calls block on the disk: keep them off the reactor's threads.
//!
//! [`KnownPages`]: crate::proto::reduce::KnownPages

mod format;
mod image;
mod key;
mod seed;
mod shelf;
mod writer;

use std::collections::{HashMap, HashSet};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::FlockOperation;

pub use self::format::{Head, Whose};
pub use self::image::Image;
use self::key::StoreKey;
use self::seed::Blocks;
pub use self::seed::MOST_PAGES as MOST_SEED_PAGES;
pub use self::shelf::KnownShelf;
use self::writer::ToWrite;
use super::spill;
use crate::proto::page::{MigrationId, PAGE_SIZE};
use crate::proto::reduce::{KeptPages, KnownPages, PageShelf};

/// What an image is called in the store's directory.
const EXTENSION: &str = "pages";

/// Most images that a source names in an offer, and a destination looks for.
pub const MOST_OFFERED: usize = 16;

/// Another VM's image is small beside a VM that has more than so many times its pages, used or not.
const SMALL_BESIDE: u64 = 16;

/// Images of a site, in one directory.
#[derive(Debug)]
pub struct PageStore {
    dir: PathBuf,
    most_bytes: u64,
    /// Images that this process has seen to be whole, and when they were written: a seed that was removed and given again is another file.
    whole: Mutex<HashMap<MigrationId, u64>>,
}

/// An image as it lies in the store.
#[derive(Clone, Debug)]
pub struct Listed {
    /// What it says of itself.
    pub head: Head,
    /// Bytes that it takes.
    pub bytes: u64,
    /// When it was written or last used.
    pub used: SystemTime,
}

/// What a look through a store found.
#[derive(Debug, Default)]
pub struct Contents {
    /// Images, the one that was used last first.
    pub images: Vec<Listed>,
    /// Files that are no images of this store, with the reason.
    pub damaged: Vec<(PathBuf, String)>,
    /// Files that cannot be read now, with the reason.
    pub unreadable: Vec<(PathBuf, String)>,
}

impl PageStore {
    /// The store in `dir`, which is made where it is missing. It never takes more than `most_bytes`.
    ///
    /// # Errors
    /// [`StoreError`] where the directory cannot be had.
    pub fn open(dir: &Path, most_bytes: u64) -> Result<Self, StoreError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| StoreError::io(dir, error))?;
        Ok(Self {
            dir: dir.to_owned(),
            most_bytes,
            whole: Mutex::default(),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The most that it may take.
    #[must_use]
    pub fn most_bytes(&self) -> u64 {
        self.most_bytes
    }

    /// Looks at every file.
    ///
    /// # Errors
    /// [`StoreError`] where the directory or the key cannot be read.
    pub fn contents(&self) -> Result<Contents, StoreError> {
        let mut contents = Contents::default();
        let key = StoreKey::load(&self.dir)?;
        for path in self.files(|name| name.ends_with(".pages"))? {
            let listed = match &key {
                Some(key) => Image::open(&path, key).and_then(|image| image.listed()),
                None => Err(StoreError::Erased { dir: self.dir.clone() }),
            };
            match listed {
                Ok(listed) => contents.images.push(listed),
                Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error @ StoreError::Io { .. }) => contents.unreadable.push((path, error.to_string())),
                Err(error) => contents.damaged.push((path, error.to_string())),
            }
        }
        contents.images.sort_by_key(|listed| std::cmp::Reverse(listed.used));
        Ok(contents)
    }

    /// Reads every image that this process has not seen whole yet, and removes what is damaged or was left half written: how many images are
    /// whole, and what was removed. What cannot be read for another reason stays, and is not offered.
    ///
    /// # Errors
    /// [`StoreError`] where the directory or the key cannot be read.
    pub fn scrub(&self) -> Result<(usize, Vec<(PathBuf, String)>), StoreError> {
        {
            // Whoever writes holds the lock until its file has its name.
            let _lock = self.lock()?;
            StoreKey::finish_erasure(&self.dir)?;
            for part in self.files(|name| name.starts_with('.') && name.ends_with(".part"))? {
                self.remove(&part)?;
            }
        }
        let Contents {
            images,
            damaged,
            unreadable,
        } = self.contents()?;
        for (_, reason) in unreadable {
            tracing::warn!("not offered: {reason}");
        }
        let mut suspects: Vec<PathBuf> = damaged.into_iter().map(|(path, _)| path).collect();
        for Listed { head, .. } in &images {
            if self.is_whole(head) {
                continue;
            }
            match self.read_whole(head.id) {
                Ok(()) => {}
                Err(StoreError::Damaged { path, .. }) => suspects.push(path),
                Err(error) => tracing::warn!("not offered: {error}"),
            }
        }
        // With the key as it is now: the store may have been erased and begun again meanwhile.
        let _lock = self.lock()?;
        let key = StoreKey::load(&self.dir)?;
        let mut removed = Vec::new();
        for path in suspects {
            let found = match &key {
                Some(key) => Image::open(&path, key).and_then(|image| image.verify()),
                None => Err(StoreError::Erased { dir: self.dir.clone() }),
            };
            if let Err(error @ (StoreError::Damaged { .. } | StoreError::Erased { .. })) = found {
                self.remove(&path)?;
                removed.push((path, error.to_string()));
            }
        }
        let whole = self.whole().len();
        Ok((whole, removed))
    }

    /// Reads what others have put here since, unless it was `tried` before: how many images were found whole.
    ///
    /// # Errors
    /// [`StoreError`] where the directory or the key cannot be read.
    pub fn take_in(&self, tried: &mut HashSet<(MigrationId, u64)>) -> Result<usize, StoreError> {
        let mut taken = 0;
        for Listed { head, .. } in self.contents()?.images {
            if self.is_whole(&head) || !tried.insert((head.id, head.unix_ms)) {
                continue;
            }
            match self.read_whole(head.id) {
                Ok(()) => taken += 1,
                Err(error) => tracing::warn!("not offered: {error}"),
            }
        }
        Ok(taken)
    }

    /// Images that may be offered for a VM with so many pages: its own, the newest first, then those of others that share with it, then seeds, those of
    /// its tenant first. Others leave half of the room to seeds, and go behind them where they are small beside the VM: they are hardly of its kind.
    #[must_use]
    pub fn candidates(&self, whose: &Whose, pages: u64) -> Vec<Head> {
        let mut heads: Vec<Head> = self.contents().map_or_else(
            |_| Vec::new(),
            |contents| contents.images.into_iter().map(|listed| listed.head).collect(),
        );
        heads.retain(|head| head.whose.shares_with(whose) && self.is_whole(head));
        heads.sort_by_key(|head| (head.whose.vm != whose.vm, std::cmp::Reverse(head.unix_ms)));
        let (mut seeds, mut heads): (Vec<_>, Vec<_>) = heads.into_iter().partition(|head| head.whose.is_seed());
        seeds.sort_by_key(|head| head.whose.tenant.is_empty());
        seeds.truncate(MOST_OFFERED.saturating_sub(heads.len()).max(MOST_OFFERED / 2));
        heads.truncate(MOST_OFFERED - seeds.len());
        heads.append(&mut seeds);
        // Stable: otherwise as before.
        heads.sort_by_key(|head| {
            let is_others = head.whose.vm != whose.vm && !head.whose.is_seed();
            is_others && u64::from(head.contents) * SMALL_BESIDE < pages
        });
        heads
    }

    /// The image of that name, if it is here and whole, and shares with this VM.
    #[must_use]
    pub fn image(&self, id: MigrationId, whose: &Whose) -> Option<Image> {
        let image = self.open_image(id).ok()?;
        (self.is_whole(image.head()) && image.head().whose.shares_with(whose)).then_some(image)
    }

    /// An image is perhaps damaged: it is read again before it is offered again, and removed where it is.
    ///
    /// # Errors
    /// [`StoreError`] where it is.
    pub fn look_again(&self, id: MigrationId) -> Result<(), StoreError> {
        if self.whole().remove(&id).is_none() {
            return Ok(());
        }
        let read = self.read_whole(id);
        if let Err(StoreError::Damaged { .. }) = read {
            self.discard(id);
        }
        read
    }

    /// It is not offered again.
    pub fn discard(&self, id: MigrationId) {
        self.whole().remove(&id);
        let _ = self.remove(&self.path_of(id));
    }

    /// Removes an image: whether it was there.
    ///
    /// # Errors
    /// [`StoreError`] where its file cannot be removed.
    pub fn forget(&self, id: MigrationId) -> Result<bool, StoreError> {
        let _lock = self.lock()?;
        self.whole().remove(&id);
        let path = self.path_of(id);
        let was_there = path.exists();
        self.remove(&path)?;
        Ok(was_there)
    }

    /// Keeps what a session has left, in the place of what the one before the last had left of the VM; what is worth least makes room. `None`
    /// where the disk or the store has no room for it.
    ///
    /// # Errors
    /// [`StoreError`] where it cannot be written; nothing of it is left then.
    pub fn keep<S: PageShelf>(
        &self,
        id: MigrationId,
        whose: &Whose,
        unix_ms: u64,
        kept: &mut KeptPages<S>,
    ) -> Result<Option<Head>, StoreError> {
        let _lock = self.lock()?;
        if self.path_of(id).exists() {
            return Err(StoreError::Taken { id });
        }
        let written = self.write(ToWrite::of_session(id, whose, unix_ms, kept))?;
        if written.is_some() {
            let mut older = self.contents()?.images;
            older
                .retain(|listed| listed.head.whose == *whose && listed.head.unix_ms <= unix_ms && listed.head.id != id);
            older.sort_by_key(|listed| std::cmp::Reverse(listed.head.unix_ms));
            older.iter().skip(1).for_each(|listed| self.discard(listed.head.id));
        }
        Ok(written)
    }

    /// Keeps the blocks of a raw disk image, for VMs of `tenant`, or of all where that is empty; what is worth least makes room. Every site that
    /// does the same with the same image has the same seed. `None` where the disk or the store has no room for it.
    ///
    /// # Errors
    /// [`StoreError`] where the image cannot be read, is not raw or changes meanwhile, or the seed cannot be written.
    pub fn seed(&self, disk: &Path, tenant: &str, unix_ms: u64) -> Result<Option<Seeded>, StoreError> {
        let mut blocks = Blocks::of(disk)?;
        let (id, left_out) = (blocks.id(tenant), blocks.left_out());
        let expected = KnownPages::new(blocks.digests().to_vec(), Vec::new()).expect("there are no places");
        let seeded = |head| Some(Seeded { head, left_out });
        if let Ok(image) = self.open_image(id)
            && image.head().whose == Whose::seed(tenant)
            && image.head().digest == expected.digest()
            && image.verify().is_ok()
        {
            return Ok(seeded(image.head().clone()));
        }
        let _lock = self.lock()?;
        let slots = (0..u32::try_from(blocks.len()).expect("a seed has at most MOST_SEED_PAGES")).collect();
        let head = self.write(ToWrite {
            id,
            whose: &Whose::seed(tenant),
            unix_ms,
            slots,
            places: Vec::new(),
            shelf: &mut blocks,
        })?;
        match head {
            Some(head) if head.digest != expected.digest() => {
                self.discard(id);
                Err(StoreError::Changed { path: disk.to_owned() })
            }
            head => Ok(head.and_then(seeded)),
        }
    }

    /// Writes an image, once there is room for it. The lock is held.
    fn write<S: PageShelf>(&self, image: ToWrite<'_, S>) -> Result<Option<Head>, StoreError> {
        let (bytes, id) = (image.bytes(), image.id);
        let Some(room) = self.most_bytes.checked_sub(bytes) else {
            return Ok(None);
        };
        let mut images = self.contents()?.images;
        // One that is damaged, and replaced.
        images.retain(|listed| listed.head.id != id);
        let used: u64 = images.iter().map(|listed| listed.bytes).sum();
        // A seed is there until an operator says otherwise.
        let seeds: u64 = images
            .iter()
            .filter(|listed| listed.head.whose.is_seed())
            .map(|listed| listed.bytes)
            .sum();
        if seeds > room || !self.has_room(bytes.saturating_sub((used - seeds) / 4 * 3))? {
            return Ok(None);
        }
        worth_least_last(&mut images, Some(image.whose));
        self.throw_out(&mut images, room)?;
        while !self.has_room(bytes)? {
            match images.pop() {
                Some(least) if !least.head.whose.is_seed() => self.discard(least.head.id),
                _ => return Ok(None),
            }
        }
        let key = StoreKey::load_or_create(&self.dir)?;
        let head = writer::write(&self.dir, &self.path_of(id), &key, image)?;
        self.note_whole(&head);
        Ok(Some(head))
    }

    /// Whether the disk has room for so much more, with a quarter left to others.
    fn has_room(&self, bytes: u64) -> Result<bool, StoreError> {
        let pages = spill::pages_with_room(&self.dir).map_err(|error| StoreError::io(&self.dir, error))?;
        Ok(pages.saturating_mul(PAGE_SIZE as u64) >= bytes)
    }

    /// Throws out images, those that are worth least first, until the others take no more than `most_bytes`: how many.
    ///
    /// # Errors
    /// [`StoreError`] where a file cannot be removed.
    pub fn make_room(&self, most_bytes: u64) -> Result<usize, StoreError> {
        let _lock = self.lock()?;
        let mut images = self.contents()?.images;
        worth_least_last(&mut images, None);
        self.throw_out(&mut images, most_bytes)
    }

    /// Of `images`, the one that is worth least last.
    fn throw_out(&self, images: &mut Vec<Listed>, most_bytes: u64) -> Result<usize, StoreError> {
        let mut bytes: u64 = images.iter().map(|listed| listed.bytes).sum();
        let mut removed = 0;
        while bytes > most_bytes
            && let Some(oldest) = images.pop()
        {
            bytes -= oldest.bytes;
            self.whole().remove(&oldest.head.id);
            self.remove(&self.path_of(oldest.head.id))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Makes everything in it unreadable, then removes it: first the key, without which the rest is noise. Sessions that have an image open
    /// keep it until they end.
    ///
    /// # Errors
    /// [`StoreError`] where the key or a file cannot be removed.
    pub fn erase(&self) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        StoreKey::erase(&self.dir)?;
        self.whole().clear();
        for path in self.files(|name| name.ends_with(".pages") || name.ends_with(".part"))? {
            self.remove(&path)?;
        }
        Ok(())
    }

    /// Reads all of an image.
    ///
    /// # Errors
    /// [`StoreError`] where it is not what was written.
    pub fn verify(&self, id: MigrationId) -> Result<(), StoreError> {
        self.open_image(id)?.verify()
    }

    /// Reads all of an image, and offers it from now on where it is whole.
    fn read_whole(&self, id: MigrationId) -> Result<(), StoreError> {
        let image = self.open_image(id)?;
        image.verify()?;
        self.note_whole(image.head());
        Ok(())
    }

    /// The file of the image of that name.
    #[must_use]
    pub fn path_of(&self, id: MigrationId) -> PathBuf {
        self.dir.join(format!("{id}.{EXTENSION}"))
    }

    /// Held by whoever writes or removes, in this process and others. Who only reads needs none: files appear whole, and stay readable.
    fn lock(&self) -> Result<File, StoreError> {
        let locked = File::open(&self.dir).and_then(|dir| {
            rustix::fs::flock(&dir, FlockOperation::LockExclusive)?;
            Ok(dir)
        });
        locked.map_err(|error| StoreError::io(&self.dir, error))
    }

    fn open_image(&self, id: MigrationId) -> Result<Image, StoreError> {
        let key = StoreKey::load(&self.dir)?.ok_or_else(|| StoreError::Erased { dir: self.dir.clone() })?;
        Image::open(&self.path_of(id), &key)
    }

    fn files(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, StoreError> {
        let failed = |error| StoreError::io(&self.dir, error);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().is_some_and(&wanted) {
                files.push(entry.path());
            }
        }
        Ok(files)
    }

    fn remove(&self, path: &Path) -> Result<(), StoreError> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io(path, error)),
            _ => Ok(()),
        }
    }

    fn is_whole(&self, head: &Head) -> bool {
        self.whole().get(&head.id) == Some(&head.unix_ms)
    }

    fn note_whole(&self, head: &Head) {
        self.whole().insert(head.id, head.unix_ms);
    }

    fn whole(&self) -> MutexGuard<'_, HashMap<MigrationId, u64>> {
        // Names only: always consistent.
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seeds first, which operators have put there, and last what newer images stand for: those of which there is a newer one, and those of the VM of
/// which there will be one. Among equals the one that was used last first.
fn worth_least_last(images: &mut [Listed], superseded: Option<&Whose>) {
    let mut newest: HashMap<Whose, u64> = HashMap::new();
    for Listed { head, .. } in images.iter() {
        let ms = newest.entry(head.whose.clone()).or_default();
        *ms = head.unix_ms.max(*ms);
    }
    images.sort_by_key(|Listed { head, used, .. }| {
        let is_old = superseded == Some(&head.whose) || newest[&head.whose] > head.unix_ms;
        let rank = if head.whose.is_seed() { 0 } else { 1 + u8::from(is_old) };
        (rank, std::cmp::Reverse(*used))
    });
}

/// A seed that is in the store.
#[derive(Clone, Debug)]
pub struct Seeded {
    /// What it says of itself.
    pub head: Head,
    /// Blocks of the disk that found no room in it ([`MOST_SEED_PAGES`]).
    pub left_out: u64,
}

/// The directory's entries are on the disk.
fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|error| StoreError::io(dir, error))
}

/// The store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read or written.
    #[error("{} of the page store: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what this program wrote.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is an image of that name: a seed's, which a peer has chosen for its migration.
    #[error(
        "the name of the migration, {id}, is an image's that is in the store, and was chosen by a peer that means ill"
    )]
    Taken {
        /// The name.
        id: MigrationId,
    },
    /// A disk image is in a format of its own.
    #[error(
        "{} is in {shape} format, and not as the disk is: convert it first (qemu-img convert -O raw, or unpack it), in the same way at every site",
        path.display()
    )]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// Its format.
        shape: &'static str,
    },
    /// A disk image has nothing to keep.
    #[error("{} has no block that is not zero", path.display())]
    Blank {
        /// The image.
        path: PathBuf,
    },
    /// A disk image was written to while it was read.
    #[error("{} changed while it was read: use a disk that nobody writes to", path.display())]
    Changed {
        /// The image.
        path: PathBuf,
    },
    /// The key is gone, and with it everything that it sealed.
    #[error("the page store {} has no key: what is in it was erased", dir.display())]
    Erased {
        /// The store.
        dir: PathBuf,
    },
    /// A page of a session that was to be kept cannot be had.
    #[error("a page of the session cannot be read back")]
    Shelf(#[from] crate::proto::reduce::ShelfError),
}

impl StoreError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    fn damaged(path: &Path, reason: &'static str) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason,
        }
    }
}

#[cfg(test)]
mod tests;
