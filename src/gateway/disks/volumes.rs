//! Images of disks that arrive: made before the hypervisor that opens them is started, removed where nothing came of it.
//!
//! What an image is to us stands on the file itself, in an extended attribute ([`Mark`]): it arrives in a migration, or its VM has left in one. Only
//! such a file is ever written, replaced or removed. A file without the attribute is somebody's, whatever its name says; a copy of an image loses it,
//! and so does whatever is put in its place.
//!
//! An image that is marked and fits is not made anew: the source sends what is otherwise. A new one may begin as what a base image holds.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr, statvfs};
use tokio::net::UnixStream;
use tokio::process::Command;

use crate::config::{ImageFormat, Preallocation, Vm, VmImage};
use crate::hypervisor::file_lock;
use crate::hypervisor::qemu::short_name;
use crate::proto::page::MigrationId;
use crate::proto::wire::message::OfferedDisk;

const ATTRIBUTE: &str = "user.longhaul.image";

/// Makes images (Debian: qemu-utils).
const QEMU_IMG: &str = "qemu-img";

/// Time for making one: allocating a large file in full is slow.
const MAKE_DEADLINE: Duration = Duration::from_secs(3600);

/// What the attribute says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    state: State,
    /// That made it so.
    migration: MigrationId,
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

    /// What it is while a further migration writes it.
    fn written_again(self) -> Self {
        match self {
            Self::Arriving | Self::Resumed | Self::Unfinished => Self::Resumed,
            Self::Refreshed | Self::Left => Self::Refreshed,
        }
    }

    fn word(self) -> &'static str {
        let named = Self::ALL.iter().find(|(state, _)| *state == self);
        named.map_or("", |(_, word)| word)
    }
}

impl Mark {
    fn of(file: &File) -> Option<Self> {
        let mut value = [0; 64];
        let length = fgetxattr(file, ATTRIBUTE, &mut value).ok()?;
        let (word, migration) = std::str::from_utf8(value.get(..length)?).ok()?.split_once(' ')?;
        let (state, _) = State::ALL.iter().find(|(_, known)| *known == word)?;
        Some(Self {
            state: *state,
            migration: migration.parse().ok()?,
        })
    }

    fn put(self, file: &File) -> std::io::Result<()> {
        let text = format!("{} {}", self.state.word(), self.migration);
        fsetxattr(file, ATTRIBUTE, text.as_bytes(), XattrFlags::empty())?;
        Ok(())
    }

    /// Of an image that is being written in this migration.
    fn is_written_in(self, migration: MigrationId) -> bool {
        self.migration == migration && matches!(self.state, State::Arriving | State::Resumed | State::Refreshed)
    }
}

/// What is done with an image that a VM has left, or that an earlier migration did not finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Old {
    /// It is written again; one that does not fit is replaced.
    Used,
    /// It stays: the VM is only asked about.
    Stays,
}

/// Makes the images of the disks that a VM arrives with. Where one cannot be made, those that were are removed again.
///
/// # Errors
/// A sentence for both operators.
pub(crate) async fn make(
    site: &str,
    vm: &Vm,
    migration: MigrationId,
    disks: &[OfferedDisk],
    old: Old,
) -> Result<(), String> {
    // A hypervisor that waits already has opened its images.
    if vm.command.is_none() {
        return Ok(());
    }
    if listens(&vm.qmp).await {
        return Err(format!(
            "a hypervisor of {} is at {site} already, and listens on {}: end it, or see whether the VM runs in it",
            vm.name,
            vm.qmp.display()
        ));
    }
    let images = disks.iter().map(|disk| image_of(site, vm, disk));
    let images = images.collect::<Result<Vec<_>, String>>()?;
    for image in &images {
        check_path(site, image)?;
    }
    check_room(site, &images, disks)?;
    for (image, disk) in images.iter().zip(disks) {
        if old == Old::Stays && image.path.exists() {
            continue;
        }
        if let Err(reason) = make_one(image, migration, disk.size_bytes).await {
            discard(vm, migration, Rest::Untouched).await;
            return Err(format!("{site}: {reason}"));
        }
    }
    Ok(())
}

/// Whether somebody listens there, busy or not.
pub(crate) async fn listens(socket: &Path) -> bool {
    match UnixStream::connect(socket).await {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

fn image_of<'a>(site: &str, vm: &'a Vm, disk: &OfferedDisk) -> Result<&'a VmImage, String> {
    let name = short_name(&disk.name);
    let is_it = |image: &&VmImage| image.disk == name || image.disk == disk.name;
    vm.images.iter().find(is_it).ok_or_else(|| {
        format!(
            "{site} does not know where to put the disk {name} of {}: add a [[vm.image]] with disk = {name:?} and the path that the VM's command \
             opens",
            vm.name
        )
    })
}

/// There is nothing in the way that is not ours to replace, or that is used again whatever it was.
fn check_path(site: &str, image: &VmImage) -> Result<(), String> {
    let path = image.path.display();
    match File::open(&image.path) {
        Ok(file) if is_used(&file) => Err(format!(
            "{path} at {site} is in use, by a QEMU that holds its lock: if that is the VM itself, it runs at {site} already"
        )),
        Ok(file) if Mark::of(&file).is_some() => Ok(()),
        Ok(_) => Err(format!(
            "{path} is at {site} already, and is not what a VM has left there: move it away, or say another path in [[vm.image]]"
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("{path} at {site} cannot be looked at: {error}")),
    }
}

/// Whether no VM lives on it: one has left it, or a migration has begun to write it.
pub(crate) fn is_marked(file: &File) -> bool {
    Mark::of(file).is_some()
}

/// Whether a QEMU holds a lock of it: on bytes 100 to 164 for what it does with it, on 200 to 264 for what others must not (`block/file-posix.c`).
pub(crate) fn is_used(file: &File) -> bool {
    file_lock::is_held(file, 100..300)
}

/// Each file system has room for what its images take at the source, beside what is replaced there.
fn check_room(site: &str, images: &[&VmImage], disks: &[OfferedDisk]) -> Result<(), String> {
    let mut wanted: HashMap<u64, (&Path, u64)> = HashMap::new();
    for (image, disk) in images.iter().zip(disks) {
        let folder = image.path.parent().unwrap_or(Path::new("/"));
        let unusable = |error| format!("{} at {site} cannot be used: {error}", folder.display());
        let device = std::fs::metadata(folder).map_err(unusable)?.dev();
        let replaced = std::fs::metadata(&image.path).map_or(0, |old| old.blocks() * 512);
        let whole = matches!(image.preallocation, Preallocation::Falloc | Preallocation::Full);
        let needed = if whole { disk.size_bytes } else { disk.allocated_bytes };
        // How much of a base image is kept shows when the disk is compared with it.
        let shared = image.base.as_ref().filter(|_| image.format == ImageFormat::Qcow2);
        let shared = shared.and_then(|base| std::fs::metadata(&base.path).ok());
        let shared = shared.map_or(0, |base| base.blocks() * 512);
        let needed = needed.saturating_sub(shared).saturating_sub(replaced);
        let entry = wanted.entry(device).or_insert((folder, 0));
        entry.1 = entry.1.saturating_add(needed);
    }
    for (folder, bytes) in wanted.into_values() {
        let room = statvfs(folder).map_err(|error| format!("{} at {site}: {error}", folder.display()))?;
        let room = room.f_bavail.saturating_mul(room.f_frsize);
        if room < bytes {
            return Err(format!(
                "{} at {site} has room for {} MiB and the disks take {} MiB",
                folder.display(),
                room >> 20,
                bytes.div_ceil(1 << 20)
            ));
        }
    }
    Ok(())
}

/// Held by whoever goes by a mark: what is written again must not be removed by somebody who saw it before.
static MARKS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn make_one(image: &VmImage, migration: MigrationId, size_bytes: u64) -> Result<(), String> {
    let path = image.path.display();
    let unusable = |error: std::io::Error| format!("{path} cannot be made: {error}");
    let fits = image.path.exists() && fits(image, size_bytes).await;
    let held = MARKS.lock().await;
    if let Ok(file) = File::open(&image.path) {
        match Mark::of(&file) {
            Some(mark) if fits => {
                let state = mark.state.written_again();
                tracing::info!(%path, state = state.word(), "an image is written again");
                return Mark { state, migration }.put(&file).map_err(unusable);
            }
            Some(_) => {}
            // Since it was looked at.
            None => return Err(format!("{path} was put there this moment, by somebody else")),
        }
    }
    // A large file is not gone at once.
    match tokio::fs::remove_file(&image.path).await {
        Ok(()) => tracing::info!(%path, "an image is replaced"),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(unusable(error)),
    }
    // What is made is marked at once, and may take an hour.
    drop(held);
    make_new(image, migration, size_bytes).await
}

/// Makes an image where nothing is, marked as one that arrives in `migration`. Where it fails, what was begun may be left, marked so.
///
/// # Errors
/// A sentence.
pub(crate) async fn make_new(image: &VmImage, migration: MigrationId, size_bytes: u64) -> Result<(), String> {
    let path = image.path.display();
    let unusable = |error: std::io::Error| format!("{path} cannot be made: {error}");
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(&image.path);
    let file = file.map_err(unusable)?;
    let mark = Mark {
        state: State::Arriving,
        migration,
    };
    if let Err(error) = mark.put(&file) {
        let _ = std::fs::remove_file(&image.path);
        return Err(format!(
            "{path} cannot be made: its file system takes no extended attributes ({error}), by which an image that may be replaced is known"
        ));
    }
    drop(file);
    let cannot = |reason| format!("{path} cannot be made: {reason}");
    let mut create = Command::new(QEMU_IMG);
    create.args(["create", "-q", "-f", &image.format.to_string()]);
    if matches!(image.format, ImageFormat::Raw | ImageFormat::Qcow2) {
        create.args(["-o", &format!("preallocation={}", image.preallocation)]);
    }
    let (backing, copied) = match &image.base {
        Some(base) if image.format == ImageFormat::Qcow2 => (Some(base), None),
        base => (None, base.as_ref()),
    };
    if let Some(base) = backing {
        create.args(["-F", &base.format.to_string(), "-b"]).arg(&base.path);
    }
    create.arg(&image.path).arg(size_bytes.to_string());
    run(create).await.map_err(cannot)?;
    if let Some(base) = copied {
        let mut convert = Command::new(QEMU_IMG);
        convert.args(["convert", "-n", "--target-is-zero", "-f", &base.format.to_string()]);
        convert.args(["-O", &image.format.to_string()]);
        convert.arg(&base.path).arg(&image.path);
        run(convert).await.map_err(cannot)?;
    }
    Ok(())
}

/// Whether an image that is there can hold the disk.
async fn fits(image: &VmImage, size_bytes: u64) -> bool {
    let mut info = Command::new(QEMU_IMG);
    info.args(["info", "--output=json", "-f", &image.format.to_string()]);
    info.arg(&image.path);
    let told = run(info).await.ok();
    let told = told.and_then(|told| serde_json::from_slice::<serde_json::Value>(&told).ok());
    told.is_some_and(|told| told["virtual-size"] == size_bytes)
}

/// What qemu-img says, or why it failed.
async fn run(mut command: Command) -> Result<Vec<u8>, String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(MAKE_DEADLINE, command.output()).await;
    let ended = ended.map_err(|_| format!("{QEMU_IMG} was not done within {} s", MAKE_DEADLINE.as_secs()))?;
    let ended = ended.map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("{QEMU_IMG} is not installed (Debian: qemu-utils), which makes images"),
        _ => format!("{QEMU_IMG} cannot be started: {error}"),
    })?;
    match ended.status.success() {
        true => Ok(ended.stdout),
        false => Err(String::from_utf8_lossy(&ended.stderr).trim().replace('\n', " ")),
    }
}

/// Whether every image was made for the migration, and reads as zeroes.
pub(crate) fn are_empty(vm: &Vm, migration: MigrationId) -> bool {
    let is_empty = |image: &VmImage| {
        let mark = File::open(&image.path).ok().and_then(|file| Mark::of(&file));
        let made = Mark {
            state: State::Arriving,
            migration,
        };
        image.base.is_none() && mark == Some(made)
    };
    vm.command.is_some() && vm.images.iter().all(is_empty)
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
        Some(state) => Mark { state, migration }.put(&file),
        None => tokio::fs::remove_file(path).await,
    };
    if let Err(error) = done {
        tracing::warn!(path = %path.display(), "an image that nobody needs stays: {error}");
    }
}

/// Whether something of a migration that was cut short is there, and none has gone on with it.
pub(crate) fn is_unfinished(vm: &Vm, migration: MigrationId) -> bool {
    let unfinished = Mark {
        state: State::Unfinished,
        migration,
    };
    let mark = |image: &VmImage| Mark::of(&File::open(&image.path).ok()?);
    vm.images.iter().any(|image| mark(image) == Some(unfinished))
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
            && !is_used(&file)
            && tokio::fs::remove_file(&image.path).await.is_ok()
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
        let mark = Mark {
            state: State::Left,
            migration,
        };
        let marked = File::open(path).and_then(|file| mark.put(&file));
        if let Err(error) = marked {
            tracing::warn!(path = %path.display(), "an image that its VM has left is not marked, and will not be replaced: {error}");
        }
    }
}
