//! What a move would do, and everything that speaks against it before anything is made.

use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::api::{MoveDiskPlan, MoveDiskRequest, Refusal, RefusalKind};
use crate::config::{ImageFormat, Preallocation, Vm, VmImage};
use crate::gateway::Core;
use crate::gateway::disks::cold_image::{ColdImage, ColdImageError};
use crate::gateway::disks::volumes;
use crate::hypervisor::qemu::{MirrorVm, MovableDisk, RunState, short_name};

/// A QEMU that answers does so at once.
pub(super) const MONITOR_DEADLINE: Duration = Duration::from_secs(10);

/// What is to be done.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) shown: MoveDiskPlan,
    pub(super) job: Job,
    pub(super) how: How,
}

/// What both ways need.
#[derive(Debug)]
pub(super) struct Job {
    /// The new image.
    pub(super) image: VmImage,
    pub(super) vm: Vm,
    pub(super) rate_bytes_per_second: Option<u64>,
    pub(super) remove_old: bool,
}

/// How it is done.
#[derive(Debug)]
pub(super) enum How {
    /// The VM runs here.
    Live { vm: Box<MirrorVm>, disk: Box<MovableDisk> },
    /// It is off.
    Cold(ColdImage),
}

/// The present image.
struct Present {
    path: Option<PathBuf>,
    format: ImageFormat,
    size_bytes: u64,
    allocated_bytes: u64,
    notes: Vec<String>,
    how: How,
}

impl Plan {
    /// # Errors
    /// The first thing that speaks against it.
    pub(super) async fn make(core: &Core, request: &MoveDiskRequest) -> Result<Plan, Refusal> {
        let vm = core.config.vm(&request.vm).ok_or_else(|| {
            let text = format!(
                "no [[vm]] section is called {}: add one to this gateway's configuration",
                request.vm
            );
            Refusal::new(RefusalKind::NotFound, text)
        })?;
        let word = |text: &Option<String>| text.as_deref().map(ImageFormat::from_str).transpose().map_err(invalid);
        let (wanted, from_format) = (word(&request.format)?, word(&request.from_format)?);
        let preallocation = request.preallocation.as_deref().map(Preallocation::from_str);
        let preallocation = preallocation
            .transpose()
            .map_err(invalid)?
            .unwrap_or(Preallocation::Off);
        if !request.to.is_absolute() {
            return Err(invalid(format!("{} is no absolute path", request.to.display())));
        }
        let present = if volumes::listens(&vm.qmp).await {
            running(vm, request, wanted).await?
        } else {
            switched_off(vm, request, from_format).await?
        };
        let format = wanted.unwrap_or(present.format);
        if !format.takes(preallocation) {
            return Err(invalid(format!("{preallocation} is not there for {format} images")));
        }
        let to = new_path(request, &vm.name, present.path.as_deref(), format)?;
        let is_live = matches!(present.how, How::Live { .. });
        // QEMU's mirror cannot leave holes in the other formats (7.2, 10.0; 2026-11-29): it writes all of the disk.
        let fills = is_live && !matches!(format, ImageFormat::Raw | ImageFormat::Qcow2);
        let mut notes = present.notes;
        if fills {
            notes.push(format!(
                "a {format} image that is written while the VM runs takes as much as the guest sees of the disk, whatever is in it"
            ));
        }
        let whole = fills || matches!(preallocation, Preallocation::Falloc | Preallocation::Full);
        let needed = if whole {
            present.size_bytes
        } else {
            present.allocated_bytes
        };
        let room_bytes = room(&to, needed)?;
        Ok(Plan {
            shown: MoveDiskPlan {
                vm: vm.name.clone(),
                disk: short_name(&request.disk).to_owned(),
                live: is_live,
                from: present.path,
                from_format: present.format.to_string(),
                to: to.clone(),
                format: format.to_string(),
                size_bytes: present.size_bytes,
                allocated_bytes: present.allocated_bytes,
                room_bytes,
                notes,
            },
            job: Job {
                image: VmImage {
                    disk: request.disk.clone(),
                    path: to,
                    format,
                    preallocation,
                    base: None,
                },
                vm: vm.clone(),
                rate_bytes_per_second: request.rate_bytes_per_second,
                remove_old: request.remove_old,
            },
            how: present.how,
        })
    }
}

/// The disk as the QEMU that runs the VM has it.
async fn running(vm: &Vm, request: &MoveDiskRequest, wanted: Option<ImageFormat>) -> Result<Present, Refusal> {
    if request.from.is_some() {
        let text = format!(
            "{} runs here, and its QEMU knows which image the disk is: leave --from out, or end the VM first",
            vm.name
        );
        return Err(Refusal::new(RefusalKind::Conflict, text));
    }
    let qemu = MirrorVm::connect(&vm.qmp, MONITOR_DEADLINE).await.map_err(refused)?;
    qemu.check().await.map_err(refused)?;
    let disk = qemu.disk(&request.disk).await.map_err(refused)?;
    let name = short_name(&disk.name);
    if disk.is_encrypted {
        return Err(encrypted(name));
    }
    if FILTERS.contains(&disk.driver.as_str()) {
        return Err(refused(format!(
            "a filter of QEMU's ({}) is before the image of {name}, and would not be before the new one: take it away first, or wait until the job \
             that it belongs to has ended",
            disk.driver
        )));
    }
    let format = match ImageFormat::from_str(&disk.driver) {
        Ok(format) => format,
        // A device or a file without a format of its own.
        Err(_) if PROTOCOLS.contains(&disk.driver.as_str()) => ImageFormat::Raw,
        Err(_) => wanted.ok_or_else(|| invalid(format!("{name} is of the format {}: say --format", disk.driver)))?,
    };
    let mut notes = Vec::new();
    if !disk.bitmaps.is_empty() {
        let bitmaps = disk.bitmaps.join(", ");
        notes.push(format!(
            "its bitmaps do not come along ({bitmaps}): the next backup has to be a full one"
        ));
    }
    if disk.snapshots > 0 {
        notes.push(format!(
            "the {} snapshots in its image do not come along",
            disk.snapshots
        ));
    }
    if disk.has_backing {
        notes.push(
            "the new image stands alone: what is in the images behind the present one is copied into it".to_owned(),
        );
    }
    if matches!(qemu.state(), RunState::Other(state) if state == "io-error") {
        notes.push("the guest stands after an I/O error: let it go on (QMP cont) once the disk is moved".to_owned());
    }
    Ok(Present {
        path: disk.file.as_ref().map(PathBuf::from),
        format,
        size_bytes: disk.size_bytes,
        allocated_bytes: disk.allocated_bytes,
        notes,
        how: How::Live {
            vm: Box::new(qemu),
            disk: Box::new(disk),
        },
    })
}

/// The image of a VM that is off, which nobody can start from it as long as this is held.
async fn switched_off(vm: &Vm, request: &MoveDiskRequest, format: Option<ImageFormat>) -> Result<Present, Refusal> {
    let disk = short_name(&request.disk);
    let image = vm
        .images
        .iter()
        .find(|image| image.disk == disk || image.disk == request.disk);
    let path = request.from.as_ref().or(image.map(|image| &image.path)).ok_or_else(|| {
        invalid(format!(
            "{} does not run here (nobody listens on {}), and no [[vm.image]] says where its disk {disk} is: say --from PATH",
            vm.name,
            vm.qmp.display()
        ))
    })?;
    // QEMU's own guess would believe a header that a guest has written.
    let format = format.or(image.map(|image| image.format)).ok_or_else(|| {
        invalid(format!(
            "the format of {} is not known: say --from-format",
            path.display()
        ))
    })?;
    let source = ColdImage::open(path, format).await.map_err(|error| match error {
        ColdImageError::InUse { path, who } => {
            let text = format!(
                "{} is in use, and its VM cannot be asked to move it. {who}",
                path.display()
            );
            Refusal::new(RefusalKind::Conflict, text.trim_end())
        }
        error => refused(error),
    })?;
    if source.is_encrypted {
        return Err(encrypted(disk));
    }
    let mut notes = Vec::new();
    if source.snapshots > 0 {
        notes.push(format!(
            "the {} snapshots in its image do not come along",
            source.snapshots
        ));
    }
    if source.has_backing {
        notes.push(
            "the new image stands alone: what is in the images behind the present one is copied into it".to_owned(),
        );
    }
    Ok(Present {
        path: Some(path.clone()),
        format,
        size_bytes: source.size_bytes,
        allocated_bytes: source.allocated_bytes,
        notes,
        how: How::Cold(source),
    })
}

/// Where the new image will be: nothing is there.
fn new_path(
    request: &MoveDiskRequest,
    vm: &str,
    present: Option<&Path>,
    format: ImageFormat,
) -> Result<PathBuf, Refusal> {
    let to = if request.to.is_dir() {
        let alone = PathBuf::from(format!("{vm}-{}", short_name(&request.disk).replace('/', "-")));
        // A block device says nothing by its name.
        let is_file = |path: &&Path| !std::fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device());
        let name = present
            .filter(is_file)
            .and_then(Path::file_name)
            .map_or(alone, PathBuf::from);
        request.to.join(renamed(&name, format))
    } else if request.to.as_os_str().as_bytes().ends_with(b"/") {
        return Err(refused(format!("there is no directory {}", request.to.display())));
    } else {
        request.to.clone()
    };
    match std::fs::symlink_metadata(&to) {
        Ok(_) => Err(Refusal::new(
            RefusalKind::Conflict,
            format!(
                "{} is there already, and nothing is ever overwritten: move it away, or say another path",
                to.display()
            ),
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(to),
        Err(error) => Err(refused(format!("{} cannot be used: {error}", to.display()))),
    }
}

/// The name with the suffix of the format, in the place of another format's.
fn renamed(name: &Path, format: ImageFormat) -> PathBuf {
    let suffix = name.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
    match ImageFormat::from_str(suffix) {
        Ok(_) => name.with_extension(format.to_string()),
        Err(_) if suffix == "img" && format == ImageFormat::Raw => name.to_owned(),
        Err(_) if suffix == "img" => name.with_extension(format.to_string()),
        Err(_) => {
            let mut name = name.as_os_str().to_owned();
            name.push(format!(".{format}"));
            name.into()
        }
    }
}

/// What is free at a path, bytes, which is enough.
fn room(to: &Path, needed_bytes: u64) -> Result<u64, Refusal> {
    let folder = to.parent().unwrap_or(Path::new("/"));
    let unusable = |error: std::io::Error| refused(format!("{} cannot be used: {error}", folder.display()));
    let room = File::open(folder)
        .and_then(|folder| Ok(rustix::fs::fstatvfs(folder)?))
        .map_err(unusable)?;
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    if free < needed_bytes {
        return Err(refused(format!(
            "{} has room for {} MiB and the disk takes {} MiB",
            folder.display(),
            free >> 20,
            needed_bytes.div_ceil(1 << 20)
        )));
    }
    Ok(free)
}

fn encrypted(disk: &str) -> Refusal {
    refused(format!(
        "the image of {disk} is encrypted, and the new one would not be: it is not moved"
    ))
}

pub(super) fn refused(reason: impl std::fmt::Display) -> Refusal {
    Refusal::new(RefusalKind::Refused, reason.to_string())
}

fn invalid(reason: impl std::fmt::Display) -> Refusal {
    Refusal::new(RefusalKind::Invalid, reason.to_string())
}

/// Drivers that stand before an image (QEMU `qapi/block-core.json`, BlockdevDriver), or that a job puts there (`*_top`).
const FILTERS: [&str; 13] = [
    "throttle",
    "copy-on-read",
    "copy-before-write",
    "compress",
    "preallocate",
    "quorum",
    "replication",
    "blkdebug",
    "blkverify",
    "blklogwrites",
    "blkreplay",
    "mirror_top",
    "commit_top",
];

/// Drivers that are a disk by themselves.
const PROTOCOLS: [&str; 8] = ["file", "host_device", "nbd", "rbd", "nfs", "iscsi", "io_uring", "nvme"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_image_has_the_old_ones_name_and_its_own_suffix() {
        for (old, format, new) in [
            ("db.raw", ImageFormat::Qcow2, "db.qcow2"),
            ("db.qcow2", ImageFormat::Qcow2, "db.qcow2"),
            ("db.img", ImageFormat::Raw, "db.img"),
            ("db.img", ImageFormat::Vmdk, "db.vmdk"),
            ("db", ImageFormat::Raw, "db.raw"),
            ("db.v2", ImageFormat::Vdi, "db.v2.vdi"),
        ] {
            assert_eq!(renamed(Path::new(old), format), Path::new(new));
        }
    }

    #[test]
    fn room_is_enough_or_both_figures_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("x");
        let free = room(&image, 0).unwrap();
        assert!(free > 0);
        let refusal = room(&image, u64::MAX).unwrap_err();
        assert!(refusal.message.contains("has room for"), "{}", refusal.message);
    }
}
