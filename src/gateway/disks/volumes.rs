//! Images of disks that arrive: made before the hypervisor that opens them is started, removed where nothing came of it.
//!
//! What an image is to us stands on the file itself, in an extended attribute: it arrives in a migration, or its VM has left in one. Only such
//! a file is ever replaced or removed. A file without the attribute is somebody's, whatever its name says; a copy of an image loses it, and so does
//! whatever is put in its place.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{XattrFlags, fgetxattr, fremovexattr, fsetxattr, statvfs};
use rustix::process::{Flock, FlockOffsetType, FlockType, fcntl_getlk};
use tokio::net::UnixStream;
use tokio::process::Command;

use crate::config::{ImageFormat, Preallocation, Vm, VmImage};
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
enum Mark {
    /// It is being written in this migration, and is of no use without the rest.
    Arriving(MigrationId),
    /// Its VM went elsewhere in this migration: what is in it is old.
    Left(MigrationId),
}

impl Mark {
    fn text(self) -> String {
        match self {
            Self::Arriving(migration) => format!("arriving {migration}"),
            Self::Left(migration) => format!("left {migration}"),
        }
    }

    fn of(file: &File) -> Option<Self> {
        let mut value = [0; 64];
        let length = fgetxattr(file, ATTRIBUTE, &mut value).ok()?;
        let (word, migration) = std::str::from_utf8(value.get(..length)?).ok()?.split_once(' ')?;
        let migration = migration.parse().ok()?;
        match word {
            "arriving" => Some(Self::Arriving(migration)),
            "left" => Some(Self::Left(migration)),
            _ => None,
        }
    }

    fn put(self, file: &File) -> std::io::Result<()> {
        fsetxattr(file, ATTRIBUTE, self.text().as_bytes(), XattrFlags::empty())?;
        Ok(())
    }
}

/// What is done with an image that a VM has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Old {
    /// A new one is made in its place.
    Replaced,
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
            discard(vm, migration).await;
            return Err(format!("{site}: {reason}"));
        }
    }
    Ok(())
}

/// Whether somebody listens there, busy or not.
async fn listens(socket: &Path) -> bool {
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

/// Whether a QEMU holds a lock of it: on bytes 100 to 164 for what it does with it, on 200 to 264 for what others must not (`block/file-posix.c`).
fn is_used(file: &File) -> bool {
    let lock = Flock {
        start: 100,
        length: 200,
        pid: None,
        typ: FlockType::WriteLock,
        offset_type: FlockOffsetType::Set,
    };
    matches!(fcntl_getlk(file, &lock), Ok(Some(_)))
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
        let entry = wanted.entry(device).or_insert((folder, 0));
        entry.1 = entry.1.saturating_add(needed).saturating_sub(replaced);
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

async fn make_one(image: &VmImage, migration: MigrationId, size_bytes: u64) -> Result<(), String> {
    let path = image.path.display();
    let unusable = |error: std::io::Error| format!("{path} cannot be made: {error}");
    // A large file is not gone at once.
    match tokio::fs::remove_file(&image.path).await {
        Ok(()) => tracing::info!(%path, "an image is replaced"),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(unusable(error)),
    }
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(&image.path);
    let file = file.map_err(unusable)?;
    if let Err(error) = Mark::Arriving(migration).put(&file) {
        let _ = std::fs::remove_file(&image.path);
        return Err(format!(
            "{path} cannot be made: its file system takes no extended attributes ({error}), by which an image that may be replaced is known"
        ));
    }
    drop(file);
    let mut command = Command::new(QEMU_IMG);
    command.args(["create", "-q", "-f", &image.format.to_string()]);
    if matches!(image.format, ImageFormat::Raw | ImageFormat::Qcow2) {
        command.args(["-o", &format!("preallocation={}", image.preallocation)]);
    }
    command.arg(&image.path).arg(size_bytes.to_string());
    command.stdin(Stdio::null()).kill_on_drop(true);
    let made = tokio::time::timeout(MAKE_DEADLINE, command.output()).await;
    let made = made.map_err(|_| format!("{path} was not made within {} s", MAKE_DEADLINE.as_secs()))?;
    let made = made.map_err(|error| match error.kind() {
        ErrorKind::NotFound => format!("{QEMU_IMG} is not installed (Debian: qemu-utils), which makes images"),
        _ => format!("{QEMU_IMG} cannot be started: {error}"),
    })?;
    if !made.status.success() {
        let said = String::from_utf8_lossy(&made.stderr);
        return Err(format!("{path} cannot be made: {}", said.trim().replace('\n', " ")));
    }
    Ok(())
}

/// Removes what was made for a migration that the VM did not arrive in. To be called once the hypervisor is dead.
pub(crate) async fn discard(vm: &Vm, migration: MigrationId) {
    for image in &vm.images {
        if File::open(&image.path).is_ok_and(|file| Mark::of(&file) == Some(Mark::Arriving(migration)))
            && let Err(error) = tokio::fs::remove_file(&image.path).await
        {
            tracing::warn!(path = %image.path.display(), "an image that nobody needs stays: {error}");
        }
    }
}

/// The VM runs with what was made for its migration.
pub(crate) fn keep(vm: &Vm, migration: MigrationId) {
    for image in &vm.images {
        let Ok(file) = File::open(&image.path) else { continue };
        if Mark::of(&file) == Some(Mark::Arriving(migration))
            && let Err(error) = fremovexattr(&file, ATTRIBUTE)
        {
            tracing::warn!(path = %image.path.display(), "an image is still marked as one that arrives, and could be replaced: {error}");
        }
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
        let marked = File::open(path).and_then(|file| Mark::Left(migration).put(&file));
        if let Err(error) = marked {
            tracing::warn!(path = %path.display(), "an image that its VM has left is not marked, and will not be replaced: {error}");
        }
    }
}
