//! Images of disks that arrive, made before the hypervisor that opens them is started.
//!
//! An image that is marked ([`mark`](super::mark)) and fits is not made anew: the source sends what is otherwise. A new one may begin as what a base image holds.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::statvfs;
use tokio::net::UnixStream;

use super::mark::{self, Mark, Rest};
use super::place;
use crate::config::{Config, ImageFormat, Preallocation, Vm, VmImage};
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
    config: &Config,
    vm: &Vm,
    migration: MigrationId,
    (disks, places): (&[OfferedDisk], &[Option<PathBuf>]),
    old: Old,
) -> Result<(), String> {
    let site = &config.site;
    if listens(&vm.qmp).await {
        return Err(format!(
            "a hypervisor of {} is at {site} already, and listens on {}: end it, or see whether the VM runs in it",
            vm.name,
            vm.qmp.display()
        ));
    }
    let images = disks.iter().map(|disk| image_of(site, &vm.images, disk));
    let images = images.collect::<Result<Vec<_>, String>>()?;
    let mut locations = Vec::new();
    for (image, place) in images.iter().zip(places) {
        check_path(site, image)?;
        if let Some(target) = place {
            place::check_target(config, image, target)?;
        }
        locations.push(place.clone().unwrap_or_else(|| place::location(&image.path)));
    }
    check_room(site, &images, &locations, disks)?;
    for ((image, place), disk) in images.iter().zip(places).zip(disks) {
        let target = place
            .as_deref()
            .filter(|target| **target != place::location(&image.path));
        let made = match (old, target) {
            (Old::Stays, Some(target)) if image.path.exists() => try_out(target, migration),
            (Old::Stays, None) if image.path.exists() => Ok(()),
            (_, Some(target)) => make_at(config, image, target, migration, disk.size_bytes).await,
            (_, None) => make_one(image, migration, disk.size_bytes).await,
        };
        if let Err(reason) = made {
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
        Err(error) if error.kind() == ErrorKind::NotFound && place::is_dangling(&image.path) => Err(format!(
            "{path} at {site} is a link to {}, which is not there: is its file system mounted? If nothing is wanted of it, remove the link",
            place::location(&image.path).display()
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
fn check_room(site: &str, images: &[&VmImage], locations: &[PathBuf], disks: &[OfferedDisk]) -> Result<(), String> {
    let mut wanted: HashMap<u64, (&Path, u64)> = HashMap::new();
    for ((image, location), disk) in images.iter().zip(locations).zip(disks) {
        let folder = location.parent().unwrap_or(Path::new("/"));
        let unusable = |error| format!("{} at {site} cannot be used: {error}", folder.display());
        let device = std::fs::metadata(folder).map_err(unusable)?.dev();
        let old = std::fs::metadata(&image.path).ok().filter(|old| old.dev() == device);
        let replaced = old.map_or(0, |old| old.blocks() * 512);
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
    match File::open(&image.path) {
        Ok(file) => match Mark::of(&file) {
            Some(mark) if mark.was_used_since(&file) => return Err(used_since(image)),
            Some(_) if is_used(&file) => return Err(format!("{path} is in use since this moment")),
            Some(mark) if fits => {
                let mark = mark.written_again(migration);
                tracing::info!(%path, %mark, "an image is written again");
                return mark.put(&file).map_err(unusable);
            }
            Some(_) => {}
            // Since it was looked at.
            None => return Err(format!("{path} was put there this moment, by somebody else")),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(unusable(error)),
    }
    // A large file is not gone at once.
    match tokio::fs::remove_file(place::location(&image.path)).await {
        Ok(()) => tracing::info!(%path, "an image is replaced"),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(unusable(error)),
    }
    // What is made is marked at once, and may take an hour.
    drop(held);
    make_new(image, migration, size_bytes).await
}

/// Makes an image where a person wants it, and only then the path a link to it, so that whatever is at the path is lost no sooner.
async fn make_at(
    config: &Config,
    image: &VmImage,
    target: &Path,
    migration: MigrationId,
    size_bytes: u64,
) -> Result<(), String> {
    let shown = target.display();
    let unusable = |error: std::io::Error| format!("{shown} cannot be made: {error}");
    let is_ours = || File::open(target).is_ok_and(|file| Mark::of(&file) == Some(Mark::arriving(migration)));
    {
        let _held = mark::MARKS.lock().await;
        // Whoever else wants to go there comes before this, or finds it there.
        place::check_target(config, image, target)?;
        if target.exists() {
            // A gateway has begun to make it and was killed.
            tokio::fs::remove_file(target).await.map_err(unusable)?;
        }
        create(target, migration)?;
    }
    let made = async {
        fill(image, target, size_bytes).await?;
        let _held = mark::MARKS.lock().await;
        let old = place::location(&image.path);
        let had_old = match File::open(&old) {
            Ok(file) => match Mark::of(&file) {
                Some(mark) if mark.was_used_since(&file) => return Err(used_since(image)),
                Some(_) if !is_used(&file) => true,
                _ => return Err(format!("{} is in use since this moment", image.path.display())),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(unusable(error)),
        };
        place::check_target(config, image, target)?;
        if !is_ours() {
            return Err(format!("{shown} was taken this moment, by another migration"));
        }
        // A file at the path itself goes with the link that takes its place.
        let had_other = had_old && place::is_link(&image.path);
        let (path, leads_to) = (image.path.clone(), target.to_owned());
        let linked = tokio::task::spawn_blocking(move || place::link(&path, &leads_to)).await;
        linked.expect("making a link does not panic").map_err(unusable)?;
        tracing::info!(path = %image.path.display(), target = %shown, "an image is put elsewhere");
        if had_other {
            let _ = tokio::fs::remove_file(&old).await;
        }
        Ok(())
    };
    let made = made.await;
    if made.is_err() && place::location(&image.path) != target && is_ours() {
        let _ = tokio::fs::remove_file(target).await;
    }
    made
}

/// Whether an image can be made there, without making one.
fn try_out(target: &Path, migration: MigrationId) -> Result<(), String> {
    if target.exists() {
        // Begun by a gateway that was killed.
        return Ok(());
    }
    create(target, migration)?;
    std::fs::remove_file(target).map_err(|error| format!("{} stays: {error}", target.display()))
}

/// Makes an image where nothing is, marked as one that arrives in `migration`. Where it fails, what was begun may be left, marked so.
///
/// # Errors
/// A sentence.
pub(crate) async fn make_new(image: &VmImage, migration: MigrationId, size_bytes: u64) -> Result<(), String> {
    create(&place::location(&image.path), migration)?;
    fill(image, &image.path, size_bytes).await
}

/// Makes an empty file that is marked so.
fn create(path: &Path, migration: MigrationId) -> Result<(), String> {
    let shown = path.display();
    let unusable = |error: std::io::Error| format!("{shown} cannot be made: {error}");
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(unusable)?;
    if let Err(error) = Mark::arriving(migration).put(&file) {
        let _ = std::fs::remove_file(path);
        return Err(format!(
            "{shown} cannot be made: its file system takes no extended attributes ({error}), by which an image that may be replaced is known"
        ));
    }
    Ok(())
}

/// Makes of an empty file what an image is.
async fn fill(image: &VmImage, path: &Path, size_bytes: u64) -> Result<(), String> {
    let cannot = |reason: QemuImgError| format!("{} cannot be made: {reason}", path.display());
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
    create.arg(path).arg(size_bytes.to_string());
    qemu_img::run(create, MAKE_DEADLINE).await.map_err(cannot)?;
    if let Some(base) = copied {
        let mut convert = qemu_img::command();
        convert.args(["convert", "-n", "--target-is-zero", "-f", &base.format.to_string()]);
        convert.args(["-O", &image.format.to_string()]);
        convert.arg(&base.path).arg(path);
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
