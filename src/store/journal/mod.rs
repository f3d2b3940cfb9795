//! The ownership journal: an append-only file of [`JournalRecord`]s that says after any crash who may run which VM.
//!
//! What `append` has acknowledged is on disk. What it has refused for [`JournalError::InDoubt`] may be or may not be: the
//! journal takes nothing more, and only opening it anew tells. (A failed fsync is never tried again: the kernel may have marked
//! the pages clean, so that a second fsync succeeds and nothing is on disk. For the same reason opening writes every block it has
//! read once more, byte for byte, before anyone acts on it.)
//!
//! One gateway opens a journal at a time (`flock`). Space is allocated in advance, and a migration does not begin unless the
//! records it may still write have their room. Everything here blocks; an async caller moves it to a thread of its own.

mod block;
mod error;
mod follow;
mod mark;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, RenameFlags, StatxFlags};
use rustix::io::Errno;

use super::file::sync_directory;
use crate::proto::ownership::{JournalRecord, RecordKind, Resolution, Role, Standing};
use crate::proto::page::{JournalId, MigrationId};

pub use error::JournalError;
pub use follow::Follower;

use block::{BLOCK_BYTES, BadHeader, Block, Header, Place, Slot};

/// Blocks by which the file grows: 1 MiB.
const STEP_BLOCKS: u64 = 256;

/// Blocks kept free for each open migration. Either role writes at most four records where no person is involved; each decision
/// of a person is one more.
const BLOCKS_PER_MIGRATION: u64 = 8;

/// Finished migrations that compaction keeps, the latest ones: for `longhaul list`, and for late questions of peers.
pub const FINISHED_KEPT: usize = 1024;

/// How often a lock that is held is tried again, and how long after.
const LOCK_TRIES: u32 = 25;
const BETWEEN_LOCK_TRIES: Duration = Duration::from_millis(10);

/// An open journal. Dropping it lets the next gateway open it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    header: Header,
    records: Vec<JournalRecord>,
    /// Blocks that the file has on disk, the header's included.
    allocated: u64,
    in_doubt: bool,
}

/// What a journal says, read beside the gateway that has it open.
#[derive(Debug)]
pub struct Snapshot {
    /// The journal's name.
    pub id: JournalId,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// All records in order.
    pub records: Vec<JournalRecord>,
    /// A record at the end is being written just now, or was cut short and never acknowledged.
    pub torn: bool,
}

impl Journal {
    /// Opens the journal at `path`, creating it if there is none, and replays it. `now_unix_ms` is when it is created.
    ///
    /// A last record that was cut short was never acknowledged and is dropped. A record with one damaged half is mended.
    ///
    /// # Errors
    /// Another gateway has it open; it is no journal, of another format, or damaged elsewhere than in a record cut short; it lies
    /// in another file than it was written to, or an older content was copied over it; the disk is full or fails. The file is then as it was.
    pub fn open(path: &Path, now_unix_ms: u64) -> Result<Self, JournalError> {
        let failed = |action| {
            move |source| JournalError::Io {
                path: path.to_owned(),
                action,
                source,
            }
        };
        loop {
            match OpenOptions::new().read(true).write(true).open(path) {
                Ok(file) => {
                    lock(&file, path)?;
                    if !is_still_named(&file, path).map_err(failed("opened"))? {
                        continue;
                    }
                    return Self::replay(path, file);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if let Some(journal) = Self::create(path, now_unix_ms)? {
                        return Ok(journal);
                    }
                }
                Err(error) => return Err(failed("opened")(error)),
            }
        }
    }

    /// Takes a journal that was copied, or an older content, for the latest: it is opened from now on.
    ///
    /// # Errors
    /// As [`Journal::open`], but for its place and its age; and there must be one.
    pub fn adopt(path: &Path) -> Result<(), JournalError> {
        let failed = |source| JournalError::Io {
            path: path.to_owned(),
            action: "adopted",
            source,
        };
        let file = loop {
            let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
            lock(&file, path)?;
            if is_still_named(&file, path).map_err(failed)? {
                break file;
            }
        };
        let Read {
            mut header, records, ..
        } = read(path, &file)?;
        header.place = Some(place_of(&file).map_err(failed)?);
        file.write_all_at(&*header.encode(), 0)
            .and_then(|()| file.sync_all())
            .map_err(failed)?;
        mark::set(&file, header.id, header.first_sequence + records.len() as u64);
        Ok(())
    }

    /// The journal's name, which the peers record.
    #[must_use]
    pub fn id(&self) -> JournalId {
        self.header.id
    }

    /// All records in order.
    #[must_use]
    pub fn records(&self) -> &[JournalRecord] {
        &self.records
    }

    /// The records of one migration in order. A gateway that moves a VM to itself has both roles.
    pub fn records_of(&self, migration: MigrationId) -> impl Iterator<Item = &JournalRecord> {
        self.records.iter().filter(move |record| record.migration == migration)
    }

    /// The migrations that must be recovered when the gateway starts, in the order in which they began.
    #[must_use]
    pub fn open_migrations(&self) -> Vec<(MigrationId, Role)> {
        let mut open: Vec<_> = by_migration(&self.records)
            .into_iter()
            .filter(|(_, at)| standing(&self.records, at) == Standing::Open)
            .collect();
        open.sort_by_key(|(_, at)| at[0]);
        open.into_iter().map(|(key, _)| key).collect()
    }

    /// Makes sure that one more migration, and those that are open, will find room for all their records. Called before a
    /// migration is begun; `append` checks it once more.
    ///
    /// # Errors
    /// [`JournalError::Full`]: refuse the migration. Or the journal is in doubt.
    pub fn reserve(&mut self) -> Result<(), JournalError> {
        let open = self.open_migrations().len() as u64;
        self.make_room((open + 1) * BLOCKS_PER_MIGRATION)
    }

    /// Appends `record` and returns once it is on disk.
    ///
    /// To an ownership machine every error here is `JournalFailed`.
    ///
    /// # Errors
    /// [`JournalError::InDoubt`], after which every call says so; [`JournalError::Full`] or [`JournalError::TooLarge`], where
    /// nothing was written.
    pub fn append(&mut self, record: JournalRecord) -> Result<(), JournalError> {
        self.check()?;
        check_sizes(&record)?;
        match record.kind {
            RecordKind::Started { .. } | RecordKind::Prepared => self.reserve()?,
            _ => self.make_room(1)?,
        }
        let at = self.records.len() as u64;
        let block = block::encode_record(self.header.id, self.header.first_sequence + at, &record)
            .expect("the largest fields fit a block");
        let written = self
            .file
            .write_all_at(&*block, offset_of(at))
            .and_then(|()| self.file.sync_data());
        match written {
            Ok(()) => {
                self.records.push(record);
                mark::set(&self.file, self.header.id, self.next_sequence());
                Ok(())
            }
            Err(source) => Err(self.doubt(source)),
        }
    }

    /// Forgets finished migrations, all but the latest [`FINISHED_KEPT`], and returns how many records that were.
    ///
    /// The journal is written anew beside the old one and put in its place, so a crash leaves the one or the other. Kept are
    /// all migrations that are open or owed an answer ([`Standing`]); a source forgotten by its peer has been told so, and an
    /// ABORT forgotten is given again.
    ///
    /// # Errors
    /// The old journal stands and can be used, unless the error is [`JournalError::InDoubt`].
    pub fn compact(&mut self) -> Result<usize, JournalError> {
        self.check()?;
        let forgotten = self.forgettable();
        let dropped = forgotten.iter().filter(|forget| **forget).count();
        if dropped == 0 {
            return Ok(0);
        }
        let kept: Vec<_> = self
            .records
            .iter()
            .zip(&forgotten)
            .filter(|(_, forget)| !**forget)
            .map(|(record, _)| record.clone())
            .collect();
        let failed = |source| JournalError::Io {
            path: self.path.clone(),
            action: "compacted",
            source,
        };
        let open = open_beside(&self.path)?;
        let header = Header {
            first_sequence: self.header.first_sequence + self.records.len() as u64,
            place: Some(place_of(&open).map_err(failed)?),
            ..self.header
        };
        let allocated = write_anew(&open, &header, &kept).map_err(failed)?;
        let named = fs::rename(beside(&self.path), &self.path).and_then(|()| sync_directory(&self.path));
        if let Err(source) = named {
            return Err(self.doubt(source));
        }
        self.file = open;
        self.header = header;
        self.records = kept;
        self.allocated = allocated;
        Ok(dropped)
    }

    /// A new journal under a name beside, complete and locked before it gets its own. `None`: somebody else was faster.
    fn create(path: &Path, now_unix_ms: u64) -> Result<Option<Self>, JournalError> {
        let failed = |source| JournalError::Io {
            path: path.to_owned(),
            action: "created",
            source,
        };
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| failed(io::Error::other(error)))?;
        let file = open_beside(path)?;
        let header = Header {
            id: JournalId(id),
            created_unix_ms: now_unix_ms,
            first_sequence: 1,
            place: Some(place_of(&file).map_err(failed)?),
        };
        let allocated = match write_anew(&file, &header, &[]) {
            Ok(allocated) => allocated,
            Err(source) => {
                let _ = fs::remove_file(beside(path));
                return Err(match source.kind() {
                    io::ErrorKind::StorageFull => JournalError::Full {
                        path: path.to_owned(),
                        source,
                    },
                    _ => failed(source),
                });
            }
        };
        match rustix::fs::renameat_with(
            rustix::fs::CWD,
            beside(path),
            rustix::fs::CWD,
            path,
            RenameFlags::NOREPLACE,
        ) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let _ = fs::remove_file(beside(path));
                return Ok(None);
            }
            Err(error) => return Err(failed(error.into())),
        }
        sync_directory(path).map_err(failed)?;
        Ok(Some(Self {
            path: path.to_owned(),
            file,
            header,
            records: vec![],
            allocated,
            in_doubt: false,
        }))
    }

    fn replay(path: &Path, file: File) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Io {
            path: path.to_owned(),
            action: "made durable",
            source,
        };
        let mut read = read(path, &file)?;
        let here = place_of(&file).map_err(failed)?;
        if read.header.place.replace(here).is_some_and(|place| !place.may_be(here)) {
            return Err(JournalError::Copied { path: path.to_owned() });
        }
        let next = read.header.first_sequence + read.records.len() as u64;
        if mark::is_ahead(&file, read.header.id, next) {
            let path = path.to_owned();
            return Err(if read.torn {
                // What looks cut short was acknowledged.
                let offset = offset_of(read.records.len() as u64);
                JournalError::Damaged { path, offset }
            } else {
                JournalError::Older { path }
            });
        }
        let shown = path.display();
        if read.mended > 0 {
            tracing::warn!(journal = %shown, records = read.mended, "mended records of which one half was damaged; look at the disk");
        }
        if read.torn {
            tracing::info!(journal = %shown, "dropped a record that was cut short and never acknowledged");
        }
        // A copied file may have holes.
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, read.blocks * BLOCK_BYTES as u64) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => {
                return Err(JournalError::Full {
                    path: path.to_owned(),
                    source: error.into(),
                });
            }
        }
        file.write_all_at(&*read.header.encode(), 0).map_err(failed)?;
        for (at, record) in (0..).zip(&read.records) {
            let block = block::encode_record(read.header.id, read.header.first_sequence + at, record)
                .expect("a record that was read fits a block");
            file.write_all_at(&*block, offset_of(at)).map_err(failed)?;
        }
        if read.torn {
            file.write_all_at(&[0; BLOCK_BYTES], offset_of(read.records.len() as u64))
                .map_err(failed)?;
        }
        file.sync_all().map_err(failed)?;
        sync_directory(path).map_err(failed)?;
        mark::set(&file, read.header.id, next);
        Ok(Self {
            path: path.to_owned(),
            file,
            header: read.header,
            records: read.records,
            allocated: read.blocks,
            in_doubt: false,
        })
    }

    fn next_sequence(&self) -> u64 {
        self.header.first_sequence + self.records.len() as u64
    }

    fn check(&self) -> Result<(), JournalError> {
        if self.in_doubt {
            Err(JournalError::InDoubt {
                path: self.path.clone(),
                source: None,
            })
        } else {
            Ok(())
        }
    }

    fn doubt(&mut self, source: io::Error) -> JournalError {
        self.in_doubt = true;
        JournalError::InDoubt {
            path: self.path.clone(),
            source: Some(source),
        }
    }

    /// Allocates until `blocks` more records have room.
    fn make_room(&mut self, blocks: u64) -> Result<(), JournalError> {
        self.check()?;
        let free = |journal: &Self| journal.allocated.saturating_sub(1 + journal.records.len() as u64);
        if free(self) >= blocks {
            return Ok(());
        }
        let forgettable = self.forgettable().into_iter().filter(|forget| *forget).count();
        if forgettable * 4 >= self.records.len() {
            // Where it fails there may still be room to grow, unless the journal is in doubt now.
            if let Err(error @ JournalError::InDoubt { .. }) = self.compact() {
                return Err(error);
            }
        }
        let missing = blocks.saturating_sub(free(self));
        if missing == 0 {
            return Ok(());
        }
        let grown = self.allocated + missing.next_multiple_of(STEP_BLOCKS);
        let full = |source| JournalError::Full {
            path: self.path.clone(),
            source,
        };
        allocate(&self.file, self.allocated, grown)
            .and_then(|()| self.file.sync_all())
            .map_err(full)?;
        self.allocated = grown;
        Ok(())
    }

    /// Which records compaction drops.
    fn forgettable(&self) -> Vec<bool> {
        let mut finished: Vec<_> = by_migration(&self.records)
            .into_values()
            .filter(|at| standing(&self.records, at) == Standing::Finished)
            .collect();
        finished.sort_by_key(|at| at[at.len() - 1]);
        let mut forget = vec![false; self.records.len()];
        for at in finished.iter().rev().skip(FINISHED_KEPT).flatten() {
            forget[*at] = true;
        }
        forget
    }
}

/// Reads the journal at `path` without a lock, also while a gateway has it open.
///
/// # Errors
/// As [`Journal::open`], but for what concerns locks and writing.
pub fn read_only(path: &Path) -> Result<Snapshot, JournalError> {
    let file = File::open(path).map_err(|source| JournalError::Io {
        path: path.to_owned(),
        action: "opened",
        source,
    })?;
    let read = read(path, &file)?;
    Ok(Snapshot {
        id: read.header.id,
        created_unix_ms: read.header.created_unix_ms,
        records: read.records,
        torn: read.torn,
    })
}

/// A journal as it lies on disk.
struct Read {
    header: Header,
    records: Vec<JournalRecord>,
    /// Whole blocks in the file.
    blocks: u64,
    /// The block after the last record is neither record nor zeros.
    torn: bool,
    /// Records with one damaged half.
    mended: usize,
}

fn read(path: &Path, file: &File) -> Result<Read, JournalError> {
    let failed = |source| JournalError::Io {
        path: path.to_owned(),
        action: "read",
        source,
    };
    let damaged = |offset| JournalError::Damaged {
        path: path.to_owned(),
        offset,
    };
    let blocks = file.metadata().map_err(failed)?.len() / BLOCK_BYTES as u64;
    let mut block: Box<Block> = Box::new([0; BLOCK_BYTES]);
    if blocks == 0 {
        return Err(JournalError::NotAJournal { path: path.to_owned() });
    }
    file.read_exact_at(&mut *block, 0).map_err(failed)?;
    let header = Header::decode(&block).map_err(|bad| match bad {
        BadHeader::NotAJournal => JournalError::NotAJournal { path: path.to_owned() },
        BadHeader::OtherVersion(found) => JournalError::OtherVersion {
            path: path.to_owned(),
            found,
        },
        BadHeader::Damaged => damaged(0),
    })?;

    let mut records = vec![];
    let mut torn = false;
    let mut mended = 0;
    let mut ended_at = None;
    for at in 0..blocks - 1 {
        file.read_exact_at(&mut *block, offset_of(at)).map_err(failed)?;
        let slot = block::decode_slot(header.id, &block);
        match (slot, ended_at) {
            (Slot::Record { sequence, record, both }, None) if sequence == header.first_sequence.wrapping_add(at) => {
                records.push(*record);
                mended += usize::from(!both);
            }
            (Slot::Empty, None) => ended_at = Some(at),
            (Slot::Empty, Some(_)) => {}
            (Slot::Broken, None) => (ended_at, torn) = (Some(at), true),
            // Only one record is ever on its way, so whatever follows the end was acknowledged after the end was.
            (Slot::Broken | Slot::Record { .. }, Some(end)) => return Err(damaged(offset_of(end))),
            (Slot::Record { .. }, None) => return Err(damaged(offset_of(at))),
        }
    }
    Ok(Read {
        header,
        records,
        blocks,
        torn,
        mended,
    })
}

/// Whether a locked file is still the one at `path`: the gateway that held the lock may have put a compacted one there.
fn is_still_named(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The file that this is.
fn place_of(file: &File) -> io::Result<Place> {
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)?;
    let birth = told.stx_mask & StatxFlags::BTIME.bits() != 0;
    Ok(Place {
        inode: told.stx_ino,
        birth_seconds: if birth { told.stx_btime.tv_sec } else { 0 },
        birth_nanoseconds: if birth { told.stx_btime.tv_nsec } else { 0 },
    })
}

fn offset_of(record: u64) -> u64 {
    (record + 1) * BLOCK_BYTES as u64
}

fn by_migration(records: &[JournalRecord]) -> BTreeMap<(MigrationId, Role), Vec<usize>> {
    let mut groups: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (at, record) in records.iter().enumerate() {
        groups.entry((record.migration, record.role)).or_default().push(at);
    }
    groups
}

fn standing(records: &[JournalRecord], at: &[usize]) -> Standing {
    Standing::of(at.iter().map(|at| &records[*at].kind))
}

fn check_sizes(record: &JournalRecord) -> Result<(), JournalError> {
    let by = match &record.kind {
        RecordKind::Resolved(resolution) => resolution.by.len(),
        _ => 0,
    };
    for (field, bytes, limit) in [
        ("peer name", record.peer.len(), JournalRecord::MAX_NAME),
        ("VM name", record.vm.len(), JournalRecord::MAX_NAME),
        ("context", record.context.len(), JournalRecord::MAX_CONTEXT),
        ("name of the person", by, Resolution::MAX_BY),
    ] {
        if bytes > limit {
            return Err(JournalError::TooLarge { field, bytes, limit });
        }
    }
    Ok(())
}

/// Takes the file for this process.
///
/// A gateway that has ended may leave a child that is just being started: until it executes its program it shares the lock.
/// So a lock that is held is tried for a moment longer before it is believed.
#[expect(
    clippy::disallowed_methods,
    reason = "on a thread of the journal's own, a quarter of a second at the most"
)]
fn lock(file: &File, path: &Path) -> Result<(), JournalError> {
    let mut tries = LOCK_TRIES;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if tries > 0 => {
                tries -= 1;
                std::thread::sleep(BETWEEN_LOCK_TRIES);
            }
            Err(Errno::WOULDBLOCK) => return Err(JournalError::Locked { path: path.to_owned() }),
            Err(error) => {
                return Err(JournalError::Io {
                    path: path.to_owned(),
                    action: "locked",
                    source: error.into(),
                });
            }
        }
    }
}

/// Where a journal is written before it gets its name.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// The file beside, empty and locked. What a crash left there is nobody's.
fn open_beside(path: &Path) -> Result<File, JournalError> {
    let failed = |source| JournalError::Io {
        path: beside(path),
        action: "created",
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(beside(path))
        .map_err(failed)?;
    lock(&file, path)?;
    file.set_len(0).map_err(failed)?;
    Ok(file)
}

/// Writes a whole journal and returns its blocks once they are on disk.
fn write_anew(file: &File, header: &Header, records: &[JournalRecord]) -> io::Result<u64> {
    let blocks = (1 + records.len() as u64 + BLOCKS_PER_MIGRATION).next_multiple_of(STEP_BLOCKS);
    allocate(file, 0, blocks)?;
    file.write_all_at(&*header.encode(), 0)?;
    for (at, record) in (0..).zip(records) {
        let block = block::encode_record(header.id, header.first_sequence + at, record)
            .expect("a record of the journal fits a block");
        file.write_all_at(&*block, offset_of(at))?;
    }
    file.sync_all()?;
    mark::set(file, header.id, header.first_sequence + records.len() as u64);
    Ok(blocks)
}

/// Gives the file room on disk from block `from` to block `to`, as zeros.
fn allocate(file: &File, from: u64, to: u64) -> io::Result<()> {
    let (offset, bytes) = (from * BLOCK_BYTES as u64, (to - from) * BLOCK_BYTES as u64);
    match rustix::fs::fallocate(file, FallocateFlags::empty(), offset, bytes) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => {
            (from..to).try_for_each(|block| file.write_all_at(&[0; BLOCK_BYTES], block * BLOCK_BYTES as u64))
        }
        Err(error) => Err(error.into()),
    }
}
