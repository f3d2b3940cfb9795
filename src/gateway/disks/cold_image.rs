//! The image of a VM that is off, which nobody can start the VM from as long as it is held.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{mark, volumes};
use crate::config::ImageFormat;
use crate::hypervisor::qemu_img::{self, QemuImgError};
use crate::hypervisor::{file_lock, image_lock};

/// Time for looking at an image.
const LOOK_DEADLINE: Duration = Duration::from_secs(30);

/// A lock on the whole of an image, by which every QEMU that would write it is refused.
#[derive(Debug)]
pub(crate) struct Hold(File);

/// The image of a VM that is off.
#[derive(Clone, Debug)]
pub(crate) struct ColdImage {
    hold: Arc<Hold>,
    pub(crate) path: PathBuf,
    pub(crate) format: ImageFormat,
    pub(crate) is_device: bool,
    /// User and group.
    pub(crate) owner: (u32, u32),
    /// What the guest sees, bytes.
    pub(crate) size_bytes: u64,
    /// What it takes, with the images behind it, bytes.
    pub(crate) allocated_bytes: u64,
    pub(crate) snapshots: usize,
    pub(crate) has_backing: bool,
    pub(crate) is_encrypted: bool,
    /// That its VM has left it can be told by itself.
    pub(crate) can_be_marked: bool,
}

/// It cannot be held.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ColdImageError {
    /// Its VM runs, or something else works on it.
    #[error("{} is in use{}{who}", path.display(), if who.is_empty() { "" } else { ". " })]
    InUse {
        path: PathBuf,
        /// A sentence, or nothing.
        who: String,
    },
    #[error("{} cannot be read: {error}", path.display())]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error(
        "{path} is not the disk: its VM has left it for another site, or a migration has begun to write it. If it is the disk all the same, say so: \
         setfattr -x user.longhaul.image {path}", path = path.display()
    )]
    NotTheDisk { path: PathBuf },
    #[error("{} is no {format} image that can be read: {reason}", path.display())]
    NoImage {
        path: PathBuf,
        format: ImageFormat,
        reason: String,
    },
    #[error(transparent)]
    Tool(QemuImgError),
}

impl Hold {
    /// Takes hold of an image that nobody uses.
    ///
    /// # Errors
    /// [`ColdImageError::InUse`], [`ColdImageError::Unreadable`].
    pub(crate) async fn take(path: &Path) -> Result<Self, ColdImageError> {
        let unreadable = |error| ColdImageError::Unreadable {
            path: path.to_owned(),
            error,
        };
        let file = File::open(path).map_err(unreadable)?;
        let locked = file_lock::share_whole(&file);
        if volumes::is_used(&file) {
            return Err(ColdImageError::InUse {
                path: path.to_owned(),
                who: image_lock::who_writes(path).await.unwrap_or_default(),
            });
        }
        locked.map_err(unreadable)?;
        Ok(Self(file))
    }
}

impl ColdImage {
    /// Takes hold of an image that nobody uses, and looks at it.
    ///
    /// # Errors
    /// [`ColdImageError`]
    pub(crate) async fn open(path: &Path, format: ImageFormat) -> Result<Self, ColdImageError> {
        let hold = Hold::take(path).await?;
        let about = hold.0.metadata().map_err(|error| ColdImageError::Unreadable {
            path: path.to_owned(),
            error,
        })?;
        if mark::is_marked(&hold.0) {
            return Err(ColdImageError::NotTheDisk { path: path.to_owned() });
        }
        let mut image = Self {
            can_be_marked: mark::can_be_marked(&hold.0),
            hold: Arc::new(hold),
            path: path.to_owned(),
            format,
            is_device: about.file_type().is_block_device(),
            owner: (about.uid(), about.gid()),
            size_bytes: 0,
            allocated_bytes: 0,
            snapshots: 0,
            has_backing: false,
            is_encrypted: false,
        };
        let mut info = qemu_img::command();
        info.args(["info", "--output=json", "--backing-chain", &image.unlocked()]);
        let said = match qemu_img::run(info, LOOK_DEADLINE).await {
            Ok(said) => Ok(said),
            Err(QemuImgError::Failed(error)) => Err(error),
            Err(error) => return Err(ColdImageError::Tool(error)),
        };
        let chain = said.and_then(|said| serde_json::from_slice::<Value>(&said).map_err(|error| error.to_string()));
        let chain = chain.map_err(|reason| ColdImageError::NoImage {
            path: path.to_owned(),
            format,
            reason,
        })?;
        let about = &chain[0];
        image.size_bytes = about["virtual-size"].as_u64().unwrap_or(0);
        // A device has no holes that could be told.
        let each = chain.as_array().into_iter().flatten();
        let allocated = each.filter_map(|image| image["actual-size"].as_u64()).sum();
        image.allocated_bytes = if image.is_device { image.size_bytes } else { allocated };
        image.snapshots = about["snapshots"].as_array().map_or(0, Vec::len);
        image.has_backing = about["backing-filename"].is_string();
        image.is_encrypted = about["encrypted"] == true;
        Ok(image)
    }

    /// What QEMU's programs open: without locks of their own, as ours is in their way too.
    pub(crate) fn unlocked(&self) -> String {
        let driver = if self.is_device { "host_device" } else { "file" };
        let file = json!({ "driver": driver, "filename": self.path, "locking": "off" });
        format!("json:{}", json!({ "driver": self.format.to_string(), "file": file }))
    }

    /// Held for as long as this is.
    pub(crate) fn hold(&self) -> Arc<Hold> {
        Arc::clone(&self.hold)
    }
}
