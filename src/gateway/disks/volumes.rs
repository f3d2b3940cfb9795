//! Images of disks that arrive, made before the hypervisor that opens them is started.
//!
//! An image that is marked ([`mark`](super::mark)) and fits is not made anew: the source sends what is otherwise. A new one may begin as what a base image holds.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::statvfs;
use tokio::net::UnixStream;

use super::mark::{self, Mark, Rest};
use crate::config::{ImageFormat, Preallocation, Vm, VmImage};
use crate::hypervisor::file_lock;
use crate::hypervisor::qemu::short_name;
use crate::hypervisor::qemu_img::{self, QemuImgError};
use crate::proto::page::MigrationId;
use crate::proto::wire::message::OfferedDisk;

/// Time for making one: allocating a large file in full is slow.
const MAKE_DEADLINE: Duration = Duration::from_secs(3600);

/// What is done with an image that a VM has left, or that an earlier migration did not finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Old {
    /// It is written again; one that does not fit is replaced.
    Used,
    /// It stays: the VM is only asked about.
    Stays,
}

/// Makes the images of the disks that a VM arrives with, of which no hypervisor waits. Where one cannot be made, those that were are removed again.
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
    if listens(&vm.qmp).await {
        return Err(format!(
            "a hypervisor of {} is at {site} already, and listens on {}: end it, or see whether the VM runs in it",
            vm.name,
            vm.qmp.display()
        ));
    }
    let images = disks.iter().map(|disk| image_of(site, &vm.images, disk));
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
            mark::discard(vm, migration, Rest::Untouched).await;
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

/// Whether a disk is put there.
pub(crate) fn is_of(image: &VmImage, disk: &OfferedDisk) -> bool {
    image.disk == short_name(&disk.name) || image.disk == disk.name
}

/// Where a disk is put.
///
/// # Errors
/// A sentence.
pub(super) fn image_of<'a>(site: &str, images: &'a [VmImage], disk: &OfferedDisk) -> Result<&'a VmImage, String> {
    images.iter().find(|image| is_of(image, disk)).ok_or_else(|| {
        let name = short_name(&disk.name);
        format!(
            "{site} does not know where to put the disk {name}: add a [[vm.image]] with disk = {name:?} and the path that the VM's command opens"
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
        Ok(file) if Mark::of(&file).is_some_and(|mark| mark.was_used_since(&file)) => {
            Err(format!("{site}: {}", used_since(image)))
        }
        Ok(file) if Mark::of(&file).is_some() => Ok(()),
        Ok(_) => Err(format!(
            "{path} is at {site} already, and is not what a VM has left there: move it away, or say another path in [[vm.image]]"
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(format!("{path} at {site} cannot be looked at: {error}")),
    }
}

/// Somebody may have started the VM from it, and may want what it did.
fn used_since(image: &VmImage) -> String {
    format!(
        "{} was written after its VM had left it: move it away, or remove it where nobody wants what is in it",
        image.path.display()
    )
}

/// Whether a QEMU holds a lock of it: on bytes 100 to 164 for what it does with it, on 200 to 264 for what others must not (`block/file-posix.c`).
pub(crate) fn is_used(file: &File) -> bool {
    file_lock::is_held(file, 100..300, file_lock::Of::Any)
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

async fn make_one(image: &VmImage, migration: MigrationId, size_bytes: u64) -> Result<(), String> {
    let path = image.path.display();
    let unusable = |error: std::io::Error| format!("{path} cannot be made: {error}");
    let fits = image.path.exists() && fits(image, size_bytes).await;
    let held = mark::MARKS.lock().await;
    if let Ok(file) = File::open(&image.path) {
        match Mark::of(&file) {
            Some(mark) if mark.was_used_since(&file) => return Err(used_since(image)),
            Some(mark) if fits => {
                let mark = mark.written_again(migration);
                tracing::info!(%path, %mark, "an image is written again");
                return mark.put(&file).map_err(unusable);
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
    if let Err(error) = Mark::arriving(migration).put(&file) {
        let _ = std::fs::remove_file(&image.path);
        return Err(format!(
            "{path} cannot be made: its file system takes no extended attributes ({error}), by which an image that may be replaced is known"
        ));
    }
    drop(file);
    let cannot = |reason: QemuImgError| format!("{path} cannot be made: {reason}");
    let mut create = qemu_img::command();
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
    qemu_img::run(create, MAKE_DEADLINE).await.map_err(cannot)?;
    if let Some(base) = copied {
        let mut convert = qemu_img::command();
        convert.args(["convert", "-n", "--target-is-zero", "-f", &base.format.to_string()]);
        convert.args(["-O", &image.format.to_string()]);
        convert.arg(&base.path).arg(&image.path);
        qemu_img::run(convert, MAKE_DEADLINE).await.map_err(cannot)?;
    }
    Ok(())
}

/// Whether an image that is there can hold the disk.
async fn fits(image: &VmImage, size_bytes: u64) -> bool {
    let mut info = qemu_img::command();
    info.args(["info", "--output=json", "-f", &image.format.to_string()]);
    info.arg(&image.path);
    let told = qemu_img::run(info, MAKE_DEADLINE).await.ok();
    let told = told.and_then(|told| serde_json::from_slice::<serde_json::Value>(&told).ok());
    told.is_some_and(|told| told["virtual-size"] == size_bytes)
}

/// Whether every image was made for the migration, and reads as zeroes.
pub(crate) fn are_empty(vm: &Vm, migration: MigrationId) -> bool {
    let is_empty = |image: &VmImage| image.base.is_none() && Mark::of_image(image) == Some(Mark::arriving(migration));
    vm.command.is_some() && vm.images.iter().all(is_empty)
}
