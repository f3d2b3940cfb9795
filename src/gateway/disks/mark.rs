//! What an image is to us, by the image itself.
//!
//! An extended attribute says that it arrives in a migration, or that its VM has left in one. Only such a file is ever written, replaced or removed.
//! A file without the attribute is somebody's, whatever its name says; a copy of an image loses it, and so does whatever is put in its place.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr};

use super::{place, volumes};
use crate::config::{Vm, VmImage};
use crate::proto::page::MigrationId;

const ATTRIBUTE: &str = "user.longhaul.image";

/// Set and removed again, to see whether that can be done.
const PROBE: &str = "user.longhaul.probe";

/// What the attribute says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    state: State,
    /// That made it so.
    migration: MigrationId,
    /// Of an image that was left, when it was written last before that. Marks of earlier releases do not say.
    written: Option<Written>,
}

/// When a file was written last: seconds and nanoseconds of the Unix epoch, by its file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written(i64, i64);

impl Written {
    fn of(file: &File) -> std::io::Result<Self> {
        let about = file.metadata()?;
        Ok(Self(about.mtime(), about.mtime_nsec()))
    }
}

/// What an image is that no VM lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Made for the migration.
    Arriving,
    /// Made for an earlier one that was cut short, and written on.
    Resumed,
    /// Left by the VM earlier, and brought up to date.
    Refreshed,
    /// Made for a migration that was cut short: the next one goes on with it.
    Unfinished,
    /// Its VM went elsewhere: what is in it is old.
    Left,
}

impl State {
    const ALL: [(Self, &str); 5] = [
        (Self::Arriving, "arriving"),
        (Self::Resumed, "resumed"),
        (Self::Refreshed, "refreshed"),
        (Self::Unfinished, "unfinished"),
        (Self::Left, "left"),
    ];

    fn word(self) -> &'static str {
        let named = Self::ALL.iter().find(|(state, _)| *state == self);
        named.map_or("", |(_, word)| word)
    }
}

impl Mark {
    /// Of an image that is made for the migration.
    pub(super) fn arriving(migration: MigrationId) -> Self {
        Self::new(State::Arriving, migration)
    }

    /// Of an image as its VM has left it.
    fn left(file: &File, migration: MigrationId) -> std::io::Result<Self> {
        let written = Some(Written::of(file)?);
        Ok(Self {
            written,
            ..Self::new(State::Left, migration)
        })
    }

    fn new(state: State, migration: MigrationId) -> Self {
        Self {
            state,
            migration,
            written: None,
        }
    }

    /// Somebody has used it since its VM has left it: what is in it may be wanted.
    pub(super) fn was_used_since(self, file: &File) -> bool {
        let is_other = |written| Written::of(file).map_or(true, |now| now != written);
        self.written.is_some_and(is_other)
    }

    /// Of an image with this mark while a further migration writes it.
    pub(super) fn written_again(self, migration: MigrationId) -> Self {
        let state = match self.state {
            State::Arriving | State::Resumed | State::Unfinished => State::Resumed,
            State::Refreshed | State::Left => State::Refreshed,
        };
        Self::new(state, migration)
    }

    /// Of an image that is there.
    pub(super) fn of_image(image: &VmImage) -> Option<Self> {
        Self::of(&File::open(&image.path).ok()?)
    }

    pub(super) fn of(file: &File) -> Option<Self> {
        let mut value = [0; 128];
        let length = fgetxattr(file, ATTRIBUTE, &mut value).ok()?;
        let mut words = std::str::from_utf8(value.get(..length)?).ok()?.split(' ');
        let word = words.next()?;
        let (state, _) = State::ALL.iter().find(|(_, known)| *known == word)?;
        let migration = words.next()?.parse().ok()?;
        let written = words.next().and_then(|time| time.split_once('.'));
        let written = written.and_then(|(seconds, nanos)| Some(Written(seconds.parse().ok()?, nanos.parse().ok()?)));
        Some(Self {
            state: *state,
            migration,
            written,
        })
    }

    pub(super) fn put(self, file: &File) -> std::io::Result<()> {
        fsetxattr(file, ATTRIBUTE, self.to_string().as_bytes(), XattrFlags::empty())?;
        Ok(())
    }

    /// Of an image that is being written in this migration.
    fn is_written_in(self, migration: MigrationId) -> bool {
        self.migration == migration && matches!(self.state, State::Arriving | State::Resumed | State::Refreshed)
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {}", self.state.word(), self.migration)?;
        match self.written {
            Some(Written(seconds, nanos)) => write!(out, " {seconds}.{nanos:09}"),
            None => Ok(()),
        }
    }
}

/// Held by whoever goes by a mark: what is written again must not be removed by somebody who saw it before.
pub(super) static MARKS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Whether no VM lives on it: one has left it, or a migration has begun to write it.
pub(crate) fn is_marked(file: &File) -> bool {
    Mark::of(file).is_some()
}

/// What becomes of images that a migration has begun to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// They are removed.
    Goes,
    /// Another migration may go on with them.
    Stays,
    /// Nothing was written: they are what they were before.
    Untouched,
}

/// Puts away what was made for a migration that the VM did not arrive in: what was there before it stays. To be called once the hypervisor is dead.
pub(crate) async fn discard(vm: &Vm, migration: MigrationId, rest: Rest) {
    if vm.images.is_empty() {
        return;
    }
    let _held = MARKS.lock().await;
    for image in &vm.images {
        put_away(&image.path, migration, rest).await;
    }
}

/// Removes an image that was made for `migration`, and no other file.
pub(crate) async fn discard_one(path: &Path, migration: MigrationId) {
    let _held = MARKS.lock().await;
    put_away(path, migration, Rest::Goes).await;
}

async fn put_away(path: &Path, migration: MigrationId, rest: Rest) {
    let Ok(file) = File::open(path) else { return };
    let Some(mark) = Mark::of(&file).filter(|mark| mark.is_written_in(migration)) else {
        return;
    };
    let state = match (mark.state, rest) {
        (State::Refreshed, _) => Some(State::Left),
        (_, Rest::Stays) | (State::Resumed, Rest::Untouched) => Some(State::Unfinished),
        (_, Rest::Goes | Rest::Untouched) => None,
    };
    let done = match state {
        Some(State::Left) => Mark::left(&file, migration).and_then(|mark| mark.put(&file)),
        Some(state) => Mark::new(state, migration).put(&file),
        None if volumes::is_used(&file) => Err(std::io::Error::other("somebody has opened it")),
        None => place::remove(path).await,
    };
    if let Err(error) = done {
        tracing::warn!(path = %path.display(), "an image that nobody needs stays: {error}");
    }
}

/// Whether something of a migration that was cut short is there, and none has gone on with it.
pub(crate) fn is_unfinished(vm: &Vm, migration: MigrationId) -> bool {
    let unfinished = Mark::new(State::Unfinished, migration);
    vm.images.iter().any(|image| Mark::of_image(image) == Some(unfinished))
}

/// Whether a file is what a migration has begun to write, and nobody has open.
pub(super) fn is_begun(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| {
        let mark = Mark::of(&file);
        mark.is_some_and(|mark| !matches!(mark.state, State::Left | State::Refreshed)) && !volumes::is_used(&file)
    })
}

/// Whether the image at its path is the one that is written in `migration`.
pub(crate) fn is_written(image: &VmImage, migration: MigrationId) -> bool {
    Mark::of_image(image).is_some_and(|mark| mark.is_written_in(migration))
}

/// Removes images that a migration has begun to write and nobody goes on with, of which this is so. `is_over`: the migration is, and was put away.
pub(crate) async fn remove_unfinished(vm: &Vm, is_useless: impl Fn(MigrationId, bool, &File) -> bool) {
    if vm.images.is_empty() {
        return;
    }
    let _held = MARKS.lock().await;
    for image in &vm.images {
        let Ok(file) = File::open(&image.path) else { continue };
        let is_useless = |mark: Mark| match mark.state {
            State::Unfinished => is_useless(mark.migration, true, &file),
            State::Arriving | State::Resumed => is_useless(mark.migration, false, &file),
            State::Refreshed | State::Left => false,
        };
        if Mark::of(&file).is_some_and(is_useless)
            && !volumes::is_used(&file)
            && place::remove(&image.path).await.is_ok()
        {
            tracing::info!(path = %image.path.display(), "an image that no migration goes on with is removed");
        }
    }
}

/// The VM runs with what was made for its migration.
pub(crate) fn keep(vm: &Vm, migration: MigrationId) {
    for image in &vm.images {
        keep_one(&image.path, migration);
    }
}

/// Migrations that have begun to write images of a VM.
pub(super) fn written_in(vm: &Vm) -> Vec<MigrationId> {
    let marks = vm.images.iter().filter_map(Mark::of_image);
    let written = marks.filter(|mark| mark.is_written_in(mark.migration));
    written.map(|mark| mark.migration).collect()
}

/// Makes durable what images are marked as: of those of a VM that is off, nothing else says which are its disks.
pub(crate) async fn sync(images: Vec<PathBuf>) {
    let synced = tokio::task::spawn_blocking(move || {
        for path in images {
            if let Err(error) = File::open(&path).and_then(|file| file.sync_all()) {
                tracing::warn!(path = %path.display(), "what an image is marked as is not durable: {error}");
            }
        }
    });
    synced.await.expect("flushing files does not panic");
}

/// Whether an image can be marked at all: a device cannot, nor a file that is only to be read.
pub(super) fn can_be_marked(file: &File) -> bool {
    fsetxattr(file, PROBE, &[], XattrFlags::empty()).is_ok() && fremovexattr(file, PROBE).is_ok()
}

/// An image that was written in `migration` is the disk of a VM from now on.
pub(crate) fn keep_one(path: &Path, migration: MigrationId) {
    let Ok(file) = File::open(path) else { return };
    if Mark::of(&file).is_some_and(|mark| mark.is_written_in(migration))
        && let Err(error) = fremovexattr(&file, ATTRIBUTE)
    {
        tracing::warn!(path = %path.display(), "an image is still marked as one that arrives, and could be replaced: {error}");
    }
}

/// The VM lives on these images, whatever they were before: a person may have started it from what it had left.
pub(crate) fn claim<'a>(images: impl IntoIterator<Item = &'a Path>) {
    for path in images {
        let Ok(file) = File::open(path) else { continue };
        if Mark::of(&file).is_some()
            && let Err(error) = fremovexattr(&file, ATTRIBUTE)
        {
            tracing::warn!(path = %path.display(), "an image that is in use is marked as one that may be replaced: {error}");
        }
    }
}

/// The VM has left: its images may be replaced when it comes back.
pub(crate) fn leave<'a>(images: impl IntoIterator<Item = &'a Path>, migration: MigrationId) {
    for path in images {
        // Said again after a restart: what was done to it meanwhile must still show.
        let is_told = |mark: Mark| (mark.state, mark.migration) == (State::Left, migration) && mark.written.is_some();
        let marked = File::open(path).and_then(|file| match Mark::of(&file).is_some_and(is_told) {
            true => Ok(()),
            false => Mark::left(&file, migration)?.put(&file),
        });
        if let Err(error) = marked {
            tracing::warn!(path = %path.display(), "an image that its VM has left is not marked, and will not be replaced: {error}");
        }
    }
}
