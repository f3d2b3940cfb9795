//! What is known of a move on disk: enough to end it after this process was killed.
//!
//! A file in the state directory for each move, from before its image is made until it is either the disk or gone.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::api::id_text;
use crate::hypervisor::process::ProcessIdentity;
use crate::proto::page::MigrationId;
use crate::store::file::{remove_file, replace_file};

const EXTENSION: &str = "disk-move";

/// One move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Marks the new image.
    #[serde(with = "id_text")]
    pub(super) id: MigrationId,
    pub(super) vm: String,
    /// The disk, as people call it.
    pub(super) disk: String,
    pub(super) from: Option<PathBuf>,
    pub(super) to: PathBuf,
    /// Format of the new image.
    pub(super) format: String,
    pub(super) remove_old: bool,
    /// Where a QEMU does it; `None`: the VM is off.
    pub(super) live: Option<InQemu>,
    /// The VM is off, and the new image is its disk.
    #[serde(default)]
    pub(super) is_done: bool,
}

/// Where the disk is in which QEMU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct InQemu {
    pub(super) qmp: PathBuf,
    pub(super) process: ProcessIdentity,
    /// QEMU's name of the disk.
    pub(super) disk: String,
    /// Nodes of the old image and of the new one, which is the name of the job too.
    pub(super) old_node: String,
    pub(super) new_node: String,
    /// The old image in QEMU's words.
    pub(super) old_file: String,
    /// The guest may have turned to the new image.
    pub(super) turning: bool,
}

impl Record {
    /// Writes it, durably.
    ///
    /// # Errors
    /// A sentence.
    pub(super) async fn write(&self, state_dir: &Path) -> Result<(), String> {
        let path = self.path(state_dir);
        let bytes = serde_json::to_vec(self).expect("a record is plain data, with paths that came as text");
        let written = tokio::task::spawn_blocking(move || replace_file(&path, &bytes));
        let written = written.await.expect("writing a file does not panic");
        written.map_err(|error| format!("the move cannot be noted in {}: {error}", state_dir.display()))
    }

    /// It is over.
    pub(super) async fn remove(&self, state_dir: &Path) {
        let path = self.path(state_dir);
        let removed = tokio::task::spawn_blocking(move || remove_file(&path));
        if let Err(error) = removed.await.expect("removing a file does not panic") {
            tracing::warn!(
                vm = self.vm,
                disk = self.disk,
                "the note of a move that is over stays: {error}"
            );
        }
    }

    /// What an earlier process left.
    pub(super) fn load_all(state_dir: &Path) -> Vec<Record> {
        let mut records = Vec::new();
        for entry in std::fs::read_dir(state_dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.to_string_lossy().ends_with(&format!(".{EXTENSION}.new")) {
                let _ = std::fs::remove_file(path);
            } else if path.extension().is_some_and(|extension| extension == EXTENSION) {
                let read = std::fs::read(&path).map_err(|error| error.to_string());
                match read.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string())) {
                    Ok(record) => records.push(record),
                    Err(error) => tracing::error!(path = %path.display(),
                        "what an earlier process noted of a move of a disk cannot be read: {error}; look whether a job longhaul-move-… is left in a \
                         QEMU, and remove the file"),
                }
            }
        }
        records
    }

    fn path(&self, state_dir: &Path) -> PathBuf {
        state_dir.join(format!("{}.{EXTENSION}", self.id))
    }
}
