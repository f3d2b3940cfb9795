//! A small disk for one gateway's state, in memory, that can be filled.
//!
//! The journal's space is allocated in advance, and a migration that has begun would not notice that the disk is full. So that appends
//! fail, the space is taken away before the migration begins: a hole is punched behind the journal's last record, as if it lay on a
//! disk that is thinly provisioned.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::lab::process::{ProcessError, run};

/// The disk under the state directory of one gateway.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    directory: PathBuf,
}

impl Disk {
    /// Mounts an empty disk on `directory`, which is made.
    pub(super) async fn mount(directory: &Path) -> Result<Self, ProcessError> {
        let shown = directory.display().to_string();
        run(&["mkdir", "-m", "700", &shown]).await?;
        let options = format!("size={SIZE},mode=700");
        run(&["mount", "-t", "tmpfs", "-o", &options, "longhaul-lab", &shown]).await?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// Takes from a journal without a record the space that it has for them, and leaves little other room: then filling takes no time.
    /// Nothing may be appended meanwhile.
    pub(super) fn prepare(&self, journal: &Path) -> std::io::Result<()> {
        let file = OpenOptions::new().write(true).open(journal)?;
        let length = file.metadata()?.len();
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, punch, BLOCK, length.saturating_sub(BLOCK))?;
        let disk = statvfs(&self.directory)?;
        let room = (disk.f_bavail * disk.f_frsize).saturating_sub(LEFT);
        let filler = File::create(self.filler())?;
        fallocate(&filler, FallocateFlags::empty(), 0, room)?;
        Ok(())
    }

    /// Leaves no room for another block.
    pub(super) fn fill(&self) -> std::io::Result<()> {
        let mut filler = OpenOptions::new().append(true).open(self.filler())?;
        // It ends with the error that is wanted.
        while filler.write_all(&[0; BLOCK as usize]).is_ok() {}
        Ok(())
    }

    /// Makes room again.
    pub(super) fn free(&self) -> std::io::Result<()> {
        std::fs::remove_file(self.filler())
    }

    fn filler(&self) -> PathBuf {
        self.directory.join("filler")
    }
}

/// Unmounts every disk below `directory`. What still uses one keeps it until it ends.
pub(super) async fn unmount_below(directory: &Path) -> Result<(), ProcessError> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for point in points.filter(|point| Path::new(point).starts_with(directory)) {
        run(&["umount", "--lazy", point]).await?;
    }
    Ok(())
}

const SIZE: &str = "8m";
/// Of the journal, and of a page.
const BLOCK: u64 = 4096;
/// Room until the disk is filled, for what gateway and hypervisor write beside the journal.
const LEFT: u64 = 256 << 10;
