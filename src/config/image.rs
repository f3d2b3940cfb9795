//! The tables `[[vm.image]]`: where the disks of a VM are made that arrives with them.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::section::Section;
use super::{Disks, Vm, parse_absolute};
use crate::proto::disk::stream::MAX_DISKS;

/// The image of one disk, which the VM's command opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmImage {
    /// The disk: the id of its drive, or of its device.
    pub disk: String,
    /// The file.
    pub path: PathBuf,
    /// What the file is, whatever it is at the other site.
    pub format: ImageFormat,
    /// What is taken of the file system before anything is written.
    pub preallocation: Preallocation,
    /// What a new image begins with, so that it need not come from the other site.
    pub base: Option<BaseImage>,
}

/// An image that the site has of old, and from which a disk was made. It must never change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseImage {
    /// The file.
    pub path: PathBuf,
    /// What the file is. It is never guessed: who writes a raw image could make it look like another.
    pub format: ImageFormat,
}

/// Formats that QEMU can make and write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is its own word")]
pub enum ImageFormat {
    Raw,
    Qcow2,
    Vmdk,
    Vhdx,
    Vdi,
}

/// QEMU's `preallocation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: the image grows.
    Off,
    /// What tells where blocks are; qcow2 only.
    Metadata,
    /// All of it, unwritten.
    Falloc,
    /// All of it, written.
    Full,
}

words!(ImageFormat { "raw" => Raw, "qcow2" => Qcow2, "vmdk" => Vmdk, "vhdx" => Vhdx, "vdi" => Vdi });
words!(Preallocation { "off" => Off, "metadata" => Metadata, "falloc" => Falloc, "full" => Full });

impl ImageFormat {
    /// Whether QEMU can make an image of this format so.
    #[must_use]
    pub fn takes(self, preallocation: Preallocation) -> bool {
        match self {
            Self::Qcow2 => true,
            Self::Raw => preallocation != Preallocation::Metadata,
            Self::Vmdk | Self::Vhdx | Self::Vdi => preallocation == Preallocation::Off,
        }
    }
}

/// One table.
pub(super) fn read(mut section: Section<'_>) -> VmImage {
    let base = section.value("base", parse_absolute);
    let base_format = section.value("base-format", ImageFormat::from_str);
    let image = VmImage {
        disk: section.required("disk", parse_disk).unwrap_or_default(),
        path: section.required("path", parse_absolute).unwrap_or_default(),
        format: section
            .value("format", ImageFormat::from_str)
            .unwrap_or(ImageFormat::Qcow2),
        preallocation: section
            .value("preallocation", Preallocation::from_str)
            .unwrap_or(Preallocation::Off),
        base: base.map(|path| BaseImage {
            path,
            format: base_format.unwrap_or(ImageFormat::Qcow2),
        }),
    };
    if base_format.is_some() && image.base.is_none() {
        section.mistake("base-format", "is of no use without base".to_owned());
    }
    if image.base.is_some() && image.format == ImageFormat::Qcow2 && image.preallocation != Preallocation::Off {
        section.mistake("preallocation", "is not there for an image on top of a base".to_owned());
    }
    if image.base.as_ref().is_some_and(|base| base.path == image.path) {
        section.mistake("base", "is the image itself, which is written".to_owned());
    }
    if !image.format.takes(image.preallocation) {
        section.mistake(
            "preallocation",
            format!("{} is not there for {} images", image.preallocation, image.format),
        );
    }
    section.finish();
    image
}

/// Mistakes that only show when a VM is seen as a whole, beside those before it.
pub(super) fn check(vm: &Vm, others: &[Vm], section: &Section<'_>) {
    if !vm.images.is_empty() && vm.disks != Disks::Copied {
        section.mistake("image", "is made for a VM with disks = \"copied\" only");
    }
    if vm.images.len() > MAX_DISKS {
        section.mistake("image", format!("there may be {MAX_DISKS} for a VM"));
    }
    for (number, image) in vm.images.iter().enumerate() {
        let before = &vm.images[..number];
        if before.iter().any(|other| other.disk == image.disk) {
            section.mistake("image", format!("the disk {:?} is there twice", image.disk));
        }
        if before.iter().any(|other| other.path == image.path) {
            section.mistake("image", format!("{} is there twice", image.path.display()));
        }
    }
    for other in others {
        if let Some(path) = shared(vm, other) {
            let text = format!(
                "{} is an image of the VM {:?} too, and would be written by both",
                path.display(),
                other.name
            );
            section.mistake("image", text);
        }
        // An image that stands on a base is wrong as soon as that changes.
        if let Some(path) = base_of_other(vm, other).or_else(|| base_of_other(other, vm)) {
            let text = format!(
                "{} is the base of an image, and would be written by a VM",
                path.display()
            );
            section.mistake("image", text);
        }
    }
}

/// An image of two VMs.
fn shared<'a>(vm: &'a Vm, other: &Vm) -> Option<&'a Path> {
    let paths = vm.images.iter().map(|image| image.path.as_path());
    let is_theirs = |path: &&Path| other.images.iter().any(|image| image.path == **path);
    paths.filter(|path| !path.as_os_str().is_empty()).find(is_theirs)
}

/// An image of one VM on which one of another stands.
fn base_of_other<'a>(vm: &'a Vm, other: &Vm) -> Option<&'a Path> {
    let paths = vm.images.iter().map(|image| image.path.as_path());
    let bases = || other.images.iter().filter_map(|image| image.base.as_ref());
    let is_base = |path: &&Path| bases().any(|base| base.path == **path);
    paths.filter(|path| !path.as_os_str().is_empty()).find(is_base)
}

fn parse_disk(text: &str) -> Result<String, &'static str> {
    match text.len() {
        1..=256 => Ok(text.to_owned()),
        _ => Err("write the id of the drive or of the device, 1 to 256 bytes"),
    }
}
