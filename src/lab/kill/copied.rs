//! A disk that goes with the guest of each case: at the end whoever has the VM has all of it, and nobody else anything that looks like it.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::moment::Place;
use super::site::Site;
use crate::gateway::disks::mark::is_marked;
use crate::lab::disk_pass::content;
use crate::lab::disks::image;
use crate::lab::error::LabError;
use crate::lab::guest::GuestDisk;

/// Bytes of it that are in use; it is as large again so many times.
const USED: u64 = 8 << 20;
const SPARSE: u64 = 4;

/// The disk before any case.
#[derive(Clone, Debug)]
pub(super) struct Pristine(PathBuf);

impl Pristine {
    pub(super) async fn make(directory: &Path, seed: u64) -> Result<Self, LabError> {
        let image = directory.join("disk");
        content::make_sparse(&image, USED, SPARSE, seed).await?;
        Ok(Self(image))
    }

    /// Gives the guest of a case this disk. Where it goes it becomes another format.
    pub(super) fn lay(&self, site: &mut Site) -> Result<(), LabError> {
        let (name, format) = match site.place {
            Place::A => ("disk.raw", "raw"),
            Place::B => ("disk.qcow2", "qcow2"),
        };
        let image = site.directory.join(name);
        if site.place == Place::A {
            std::fs::copy(&self.0, &image).map_err(|source| LabError::file(&image, source))?;
        }
        site.files.disk = Some(GuestDisk {
            image,
            format,
            is_shared: false,
            base: None,
        });
        Ok(())
    }

    /// What is wrong with the disks where the VM is, alive or dead, at `place`. The guest has written nothing to it.
    pub(super) async fn problems(&self, sites: &[Site; 2], place: Place) -> Result<Vec<String>, LabError> {
        let mut problems = Vec::new();
        for site in sites {
            let Some(disk) = &site.files.disk else { continue };
            let marked = File::open(&disk.image).map(|file| is_marked(&file));
            match (site.place == place, marked) {
                (true, Ok(true)) => problems.push(format!("the disk at {place} is marked as none")),
                (true, Ok(false)) => {
                    let pristine = GuestDisk {
                        image: self.0.clone(),
                        format: "raw",
                        ..disk.clone()
                    };
                    if let Err(reason) = image::compare(&pristine, disk).await? {
                        problems.push(format!("the disk at {place} holds something else: {reason}"));
                    }
                }
                (true, Err(error)) => problems.push(format!("the disk at {place} cannot be opened: {error}")),
                (false, Ok(false)) => problems.push(format!("an image at {} looks like the disk", site.place)),
                (false, _) => {}
            }
        }
        Ok(problems)
    }
}
