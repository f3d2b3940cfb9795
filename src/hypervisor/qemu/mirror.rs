//! A disk that becomes another image while its guest writes to it, by QEMU's own mirror job.
//!
//! ```text
//! connect → disk → attach → begin → job … → complete → job …  ─┬→ node_of is ours: remove_node of the old one
//!                              └── cancel → job … ─────────────┴→ it is not: remove_node of ours
//! ```
//!
//! Which of the two a disk is, only the node of its device tells ([`MirrorVm::node_of`]): a job that has ended may have ended either way.
//! Jobs are kept by QEMU until they are dismissed, so that also whoever comes later finds how they ended.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::block::short_name;
use super::condition::{self, Condition};
use super::inventory::{disk_name, text};
use super::owner::{OwnerError, owner};
use super::state::{MigrationStatus, RunState};
use super::{SourceError, query_run_state};
use crate::hypervisor::process::{Process, ProcessIdentity};
use crate::hypervisor::qmp::{Events, QmpClient, QmpError};

/// A QEMU in which a disk is moved. Dropping it closes the monitor and changes nothing else.
#[derive(Debug)]
pub struct MirrorVm {
    qmp: QmpClient,
    process: Process,
    state: RunState,
}

/// A disk that the guest may write to, and what of it a copy has to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovableDisk {
    /// As [`Disk::name`](super::Disk::name).
    pub name: String,
    /// The block node that the device uses.
    pub node: String,
    /// QEMU's name of its driver: the format, or a filter.
    pub driver: String,
    /// What the guest sees, bytes.
    pub size_bytes: u64,
    /// What its image and those behind it take, bytes.
    pub allocated_bytes: u64,
    /// The image, where it can be named.
    pub file: Option<String>,
    /// The image as QEMU calls it.
    pub node_file: String,
    /// What others may use it for: bitmaps of backups, by name.
    pub bitmaps: Vec<String>,
    /// Snapshots within the image.
    pub snapshots: usize,
    /// Whether it only has what differs from another image.
    pub has_backing: bool,
    /// Whether its content is ciphertext.
    pub is_encrypted: bool,
    cache: Value,
    detect_zeroes: String,
}

/// The image that a disk is to become.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Name of its node, and of the job: at most 27 bytes, as QEMU takes 31 and the job's filter needs some.
    pub node: &'a str,
    /// The image, which has been made.
    pub path: &'a Path,
    /// QEMU's name of its format.
    pub format: &'a str,
    /// Whether blocks that the guest discards, or that are zero, are given back to the file system.
    pub discards: bool,
}

/// A job as QEMU knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorJob {
    /// It copies, or is about to end.
    Runs {
        /// Bytes of the disk that are done.
        done_bytes: u64,
        /// All of them; writes of the guest may add to it.
        total_bytes: u64,
    },
    /// Both are the same, and stay so until it is completed.
    Ready,
    /// It has ended, in QEMU's words where by an error.
    Ended(Option<String>),
}

/// A disk cannot be moved, or not by this QEMU.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// libvirt keeps a model of the disks, which would be wrong.
    #[error(
        "The VM is managed by libvirt ({sign}), which must do this itself: virsh blockcopy DOMAIN DISK PATH --pivot."
    )]
    Libvirt {
        /// How it was recognised.
        sign: String,
    },
    /// Its disks may belong to another QEMU.
    #[error(
        "The VM is being migrated, or was (its state is {state}, its migration {status}): its disks cannot be moved."
    )]
    Migrates {
        /// State of the guest.
        state: RunState,
        /// Status of the migration.
        status: MigrationStatus,
    },
    /// There is no such disk.
    #[error("The VM has no writable disk {disk}; it has {known}.")]
    NoSuchDisk {
        /// What was asked for.
        disk: String,
        /// What there is.
        known: String,
    },
    /// The process behind the monitor.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// What the machine's state is asked by.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl MirrorVm {
    /// Connects. Nothing is changed.
    ///
    /// # Errors
    /// Those of the monitor, and of the process behind it.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<MirrorVm, MirrorError> {
        let qmp = QmpClient::connect(path, deadline).await?;
        let process = owner(&qmp).await?;
        let state = query_run_state(&qmp).await?;
        Ok(MirrorVm { qmp, process, state })
    }

    /// The process.
    pub fn identity(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    /// User and group of the process, who open its images; `None` where it has ended.
    pub fn user(&self) -> Option<(u32, u32)> {
        let process = std::fs::metadata(format!("/proc/{}", self.process.pid())).ok()?;
        Some((process.uid(), process.gid()))
    }

    /// State of the guest when this was connected.
    pub fn state(&self) -> &RunState {
        &self.state
    }

    /// What the monitor tells from now on.
    pub fn events(&self) -> Events {
        self.qmp.events()
    }

    /// Whether disks of this VM may be moved now.
    ///
    /// # Errors
    /// [`MirrorError::Libvirt`], [`MirrorError::Migrates`], those of the monitor.
    pub async fn check(&self) -> Result<(), MirrorError> {
        let condition = Condition::collect(&self.qmp, &self.process).await?;
        if let Some(sign) = condition.libvirt_sign {
            return Err(MirrorError::Libvirt { sign });
        }
        let elsewhere = matches!(
            self.state,
            RunState::InMigrate | RunState::FinishMigrate | RunState::PostMigrate
        );
        if elsewhere || condition.migration.is_under_way() {
            return Err(MirrorError::Migrates {
                state: self.state.clone(),
                status: condition.migration,
            });
        }
        Ok(())
    }

    /// The writable disk that people call so.
    ///
    /// # Errors
    /// [`MirrorError::NoSuchDisk`], those of the monitor.
    pub async fn disk(&self, wanted: &str) -> Result<MovableDisk, MirrorError> {
        let entries = condition::writable_entries(&self.qmp).await?;
        let disks: Vec<MovableDisk> = entries.iter().map(MovableDisk::read).collect();
        let is_it = |disk: &&MovableDisk| disk.name == wanted || short_name(&disk.name) == wanted;
        let found = disks.iter().find(is_it).cloned().map(|mut disk| {
            disk.file = disk.file.and_then(|file| self.absolute(&file));
            disk
        });
        found.ok_or_else(|| {
            let names: Vec<&str> = disks.iter().map(|disk| short_name(&disk.name)).collect();
            let known = if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            };
            MirrorError::NoSuchDisk {
                disk: wanted.to_owned(),
                known,
            }
        })
    }

    /// A path of QEMU's, seen from anywhere.
    fn absolute(&self, file: &str) -> Option<String> {
        if file.starts_with('/') {
            return Some(file.to_owned());
        }
        let folder = std::fs::read_link(format!("/proc/{}/cwd", self.process.pid())).ok()?;
        Some(folder.join(file).to_str()?.to_owned())
    }

    /// The node that the device of a disk uses; `None` where there is no such disk.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn node_of(&self, disk: &str) -> Result<Option<String>, MirrorError> {
        let list: Vec<Value> = self.qmp.query("query-block", json!({})).await?;
        let entry = list.iter().find(|entry| disk_name(entry) == disk);
        Ok(entry.map(|entry| text(&entry["inserted"]["node-name"])))
    }

    /// Opens the new image as a node of its own, with the caching of the present one.
    ///
    /// # Errors
    /// Those of the monitor: QEMU cannot open it.
    pub async fn attach(&self, disk: &MovableDisk, target: &Target<'_>) -> Result<(), MirrorError> {
        let discard = if target.discards { "unmap" } else { "ignore" };
        let cache = json!({ "direct": disk.cache["direct"] == true, "no-flush": disk.cache["no-flush"] == true });
        // `unmap` needs what discards.
        let detect = match disk.detect_zeroes.as_str() {
            "unmap" if !target.discards => "on",
            "on" => "on",
            "unmap" => "unmap",
            _ => "off",
        };
        let file = json!({ "driver": "file", "filename": target.path, "discard": discard, "cache": cache });
        let node = json!({
            "driver": target.format, "node-name": target.node, "discard": discard, "detect-zeroes": detect, "cache": cache, "file": file,
        });
        self.qmp.execute("blockdev-add", node).await?;
        Ok(())
    }

    /// Begins to copy, in the background: what the guest writes meanwhile is copied again. `write-blocking` would bring both together whatever
    /// the guest writes, but a job that is cancelled or fails while such a write is under way corrupts the heap of QEMU 7.2, and the guest is
    /// lost (2026-11-29; also 10.0 frees `in_flight_bitmap` at `immediate_exit` of `block/mirror.c` without a wait for these writes).
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn begin(&self, disk: &MovableDisk, target: &Target<'_>, rate: Option<u64>) -> Result<(), MirrorError> {
        let mut mirror = json!({
            "job-id": target.node,
            "device": disk.node,
            "target": target.node,
            "filter-node-name": format!("{}-top", target.node),
            "sync": "full",
            "copy-mode": "background",
            "on-source-error": "report",
            "on-target-error": "report",
            "auto-dismiss": false,
        });
        if let Some(rate) = rate {
            mirror["speed"] = json!(i64::try_from(rate).unwrap_or(i64::MAX));
        }
        self.qmp.execute("blockdev-mirror", mirror).await?;
        Ok(())
    }

    /// The job of this name; `None` where there is none.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn job(&self, id: &str) -> Result<Option<MirrorJob>, MirrorError> {
        let jobs: Vec<Value> = self.qmp.query("query-jobs", json!({})).await?;
        let job = jobs.iter().find(|job| job["id"] == id);
        Ok(job.map(|job| match job["status"].as_str() {
            Some("ready") => MirrorJob::Ready,
            Some("concluded") => MirrorJob::Ended(job["error"].as_str().map(str::to_owned)),
            _ => MirrorJob::Runs {
                done_bytes: job["current-progress"].as_u64().unwrap_or(0),
                total_bytes: job["total-progress"].as_u64().unwrap_or(0),
            },
        }))
    }

    /// Lets the device turn to the new image, once the job is ready: without a limit from now on, by which what the guest writes could not be
    /// caught up with. It has turned when the job has ended without an error.
    ///
    /// # Errors
    /// Those of the monitor. After others than refusals it may turn all the same.
    pub async fn complete(&self, id: &str) -> Result<(), MirrorError> {
        let unlimited = json!({ "device": id, "speed": 0 });
        self.qmp.execute("block-job-set-speed", unlimited).await?;
        self.qmp.execute("job-complete", json!({ "id": id })).await?;
        Ok(())
    }

    /// Ends the job; the device stays at its image, unless it had turned already.
    ///
    /// # Errors
    /// Those of the monitor; a job that ends by itself may refuse.
    pub async fn cancel(&self, id: &str) -> Result<(), MirrorError> {
        self.qmp.execute("job-cancel", json!({ "id": id })).await?;
        Ok(())
    }

    /// Lets QEMU forget a job that has ended.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn dismiss(&self, id: &str) -> Result<(), MirrorError> {
        self.qmp.execute("job-dismiss", json!({ "id": id })).await?;
        Ok(())
    }

    /// Closes an image that no device uses. One that is not there is no error.
    ///
    /// # Errors
    /// Those of the monitor: something uses it still.
    pub async fn remove_node(&self, node: &str) -> Result<(), MirrorError> {
        if !self.nodes().await?.iter().any(|known| known["node-name"] == node) {
            return Ok(());
        }
        self.qmp.execute("blockdev-del", json!({ "node-name": node })).await?;
        Ok(())
    }

    /// Closes every node that has `file` open and that nobody uses, and tells whether none is left.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn close_file(&self, file: &str) -> Result<bool, MirrorError> {
        let has_it = |node: &&Value| node["file"] == file;
        for node in self.nodes().await?.iter().filter(has_it) {
            // Format before file: the one that is in use refuses, and goes with the other.
            let _ = self.remove_node(&text(&node["node-name"])).await;
        }
        // A file's node that was defined by itself is free by now.
        for node in self.nodes().await?.iter().filter(has_it) {
            let _ = self.remove_node(&text(&node["node-name"])).await;
        }
        Ok(!self.nodes().await?.iter().any(|node| has_it(&node)))
    }

    async fn nodes(&self) -> Result<Vec<Value>, MirrorError> {
        let flat = json!({ "flat": true });
        Ok(self.qmp.query("query-named-block-nodes", flat).await?)
    }
}

impl MovableDisk {
    /// From an entry of `query-block`.
    fn read(entry: &Value) -> MovableDisk {
        let inserted = &entry["inserted"];
        let image = &inserted["image"];
        let file = image["filename"].as_str().filter(|name| is_path(name));
        let mut allocated_bytes = 0u64;
        let mut layer = image;
        while layer.is_object() {
            allocated_bytes = allocated_bytes.saturating_add(layer["actual-size"].as_u64().unwrap_or(0));
            layer = &layer["backing-image"];
        }
        let bitmaps = inserted["dirty-bitmaps"].as_array().into_iter().flatten();
        MovableDisk {
            name: disk_name(entry),
            node: text(&inserted["node-name"]),
            driver: text(&inserted["drv"]),
            size_bytes: image["virtual-size"].as_u64().unwrap_or(0),
            allocated_bytes,
            file: file.map(str::to_owned),
            node_file: text(&inserted["file"]),
            bitmaps: bitmaps.map(|bitmap| text(&bitmap["name"])).collect(),
            snapshots: image["snapshots"].as_array().map_or(0, Vec::len),
            has_backing: image["backing-image"].is_object(),
            is_encrypted: image["encrypted"] == true || inserted["encrypted"] == true,
            cache: inserted["cache"].clone(),
            detect_zeroes: text(&inserted["detect_zeroes"]),
        }
    }
}

/// Whether a file name of QEMU's is one, and not `json:{…}` or `nbd://…`.
fn is_path(name: &str) -> bool {
    name.starts_with('/') || !name.is_empty() && !name.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_copy_has_to_keep_is_read_through_all_layers() {
        let base = json!({ "filename": "/b.raw", "actual-size": 5, "virtual-size": 64 });
        let entry = json!({ "device": "", "qdev": "/machine/peripheral/vda/virtio-backend", "inserted": {
            "node-name": "disk", "drv": "qcow2", "ro": false, "detect_zeroes": "on", "encrypted": false,
            "cache": { "direct": true, "no-flush": false, "writeback": true }, "dirty-bitmaps": [{ "name": "daily" }],
            "image": { "filename": "/v.qcow2", "virtual-size": 64, "actual-size": 7, "snapshots": [{}], "backing-image": base } } });
        let disk = MovableDisk::read(&entry);
        assert_eq!(short_name(&disk.name), "vda");
        assert_eq!((disk.size_bytes, disk.allocated_bytes), (64, 12));
        assert_eq!(disk.bitmaps, ["daily"]);
        assert_eq!((disk.snapshots, disk.has_backing, disk.is_encrypted), (1, true, false));
        assert_eq!(disk.file.as_deref(), Some("/v.qcow2"));
    }
}
