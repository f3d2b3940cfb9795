//! A QEMU's disks as its monitor sees them: which there are, who may read or write them from outside, and what the guest writes.
//!
//! Everything that is made here is called [`PREFIX`] and something, so that whoever comes later finds what an earlier process left.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::inventory::{disk_name, text};
use super::{condition, socket_path};
use crate::hypervisor::qmp::{QmpClient, QmpError};
use crate::proto::precopy::{GuestIo, Served};

/// Begins the name of every bitmap and export of ours.
pub const PREFIX: &str = "longhaul-";

/// Bytes for which a bitmap has one bit: qcow2's own cluster.
pub const GRANULARITY: u64 = 64 << 10;

/// A disk that the guest may write to, firmware flash apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    /// As [`Disk::name`](super::Disk::name).
    pub name: String,
    /// The block node that the device uses.
    pub node: String,
    /// What the guest sees, bytes.
    pub size_bytes: u64,
    /// What its image takes, bytes.
    pub allocated_bytes: u64,
    /// The image, where it is a file that can be named.
    pub file: Option<String>,
    /// What is not in the image is in another one.
    pub has_backing: bool,
}

/// The block layer of one QEMU, for as long as somebody uses it.
#[derive(Clone, Debug)]
pub struct BlockLayer {
    qmp: Arc<QmpClient>,
}

/// What an export allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access<'a> {
    /// To read, and to ask what of it a bitmap has.
    Read {
        /// A bitmap that does not collect any more.
        bitmap: Option<&'a str>,
    },
    /// To write.
    Write,
}

/// The block layer did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A socket's path that QEMU cannot use.
    #[error(
        "The socket path {0:?} cannot be given to QEMU: it must be absolute, valid UTF-8 and at most 107 bytes long."
    )]
    SocketPath(String),
    /// Somebody else's server.
    #[error(
        "QEMU has an NBD server running already, of a backup or of another migration, and can have one only: {0} Stop it (nbd-server-stop), then \
         migrate."
    )]
    ServerRuns(QmpError),
    /// An export stays.
    #[error("QEMU does not end the export {id} of a disk within {waited:?}.")]
    ExportStays {
        /// Its id.
        id: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl GuestDisk {
    /// As people call it: the name of the drive, or the id of the device.
    #[must_use]
    pub fn short_name(&self) -> &str {
        short_name(&self.name)
    }
}

/// What people call a disk of this [`Disk::name`](super::Disk::name): `vda` of `/machine/peripheral/vda/virtio-backend`.
#[must_use]
pub fn short_name(name: &str) -> &str {
    let device = name.strip_prefix("/machine/peripheral/");
    device.map_or(name, |rest| rest.split('/').next().unwrap_or(rest))
}

impl BlockLayer {
    pub(super) fn new(qmp: Arc<QmpClient>) -> Self {
        Self { qmp }
    }

    /// The disks that the guest may write to.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn disks(&self) -> Result<Vec<GuestDisk>, BlockError> {
        let disk = |entry: &Value| {
            let inserted = &entry["inserted"];
            let image = &inserted["image"];
            let file = image["filename"].as_str().filter(|name| name.starts_with('/'));
            GuestDisk {
                name: disk_name(entry),
                node: text(&inserted["node-name"]),
                size_bytes: image["virtual-size"].as_u64().unwrap_or(0),
                allocated_bytes: image["actual-size"].as_u64().unwrap_or(0),
                file: file.map(str::to_owned),
                has_backing: inserted["backing_file_depth"].as_u64().is_some_and(|depth| depth > 0),
            }
        };
        let entries = condition::writable_entries(&self.qmp).await?;
        Ok(entries.iter().map(disk).collect())
    }

    /// Starts the NBD server on a unix socket.
    ///
    /// # Errors
    /// [`BlockError::ServerRuns`], [`BlockError::SocketPath`], and those of the monitor.
    pub async fn serve(&self, socket: &Path) -> Result<(), BlockError> {
        let path = socket_path(socket).ok_or_else(|| BlockError::SocketPath(socket.display().to_string()))?;
        let address = json!({ "type": "unix", "data": { "path": path } });
        match self.qmp.execute("nbd-server-start", json!({ "addr": address })).await {
            Ok(_) => Ok(()),
            Err(error) if error.to_string().contains("already running") => Err(BlockError::ServerRuns(error)),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends the NBD server and every export.
    ///
    /// # Errors
    /// Those of the monitor, also where none runs.
    pub async fn stop_serving(&self) -> Result<(), BlockError> {
        self.qmp.execute("nbd-server-stop", json!({})).await?;
        Ok(())
    }

    /// Exports a node under the name `id`.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn export(&self, id: &str, node: &str, access: Access<'_>) -> Result<(), BlockError> {
        let mut export = json!({ "type": "nbd", "id": id, "node-name": node, "name": id });
        match access {
            Access::Write => export["writable"] = json!(true),
            Access::Read { bitmap: Some(bitmap) } => export["bitmaps"] = json!([bitmap]),
            Access::Read { bitmap: None } => {}
        }
        self.qmp.execute("block-export-add", export).await?;
        Ok(())
    }

    /// Ends an export, and waits until it is gone and its bitmap free.
    ///
    /// # Errors
    /// [`BlockError::ExportStays`], and those of the monitor.
    pub async fn end_export(&self, id: &str) -> Result<(), BlockError> {
        let hard = json!({ "id": id, "mode": "hard" });
        self.qmp.execute("block-export-del", hard).await?;
        let end = Instant::now() + EXPORT_GRACE;
        while self.exports().await?.iter().any(|export| export == id) {
            if Instant::now() >= end {
                return Err(BlockError::ExportStays {
                    id: id.to_owned(),
                    waited: EXPORT_GRACE,
                });
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Begins a round on several disks at one moment: for each node the bitmap `next` collects from now on, and `now`, where there is one, does
    /// not any more.
    ///
    /// # Errors
    /// Those of the monitor: none of it has happened.
    pub async fn next_round(&self, nodes: &[&str], now: Option<&str>, next: &str) -> Result<(), BlockError> {
        let mut actions = Vec::new();
        for node in nodes {
            let bitmap = json!({ "node": node, "name": next, "granularity": GRANULARITY });
            actions.push(json!({ "type": "block-dirty-bitmap-add", "data": bitmap }));
            if let Some(now) = now {
                let bitmap = json!({ "node": node, "name": now });
                actions.push(json!({ "type": "block-dirty-bitmap-disable", "data": bitmap }));
            }
        }
        self.qmp.execute("transaction", json!({ "actions": actions })).await?;
        Ok(())
    }

    /// Forgets a bitmap.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn remove_bitmap(&self, node: &str, name: &str) -> Result<(), BlockError> {
        let bitmap = json!({ "node": node, "name": name });
        self.qmp.execute("block-dirty-bitmap-remove", bitmap).await?;
        Ok(())
    }

    /// Bytes that a bitmap has on all disks together, in whole [`GRANULARITY`].
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn dirty_bytes(&self, name: &str) -> Result<u64, BlockError> {
        let list = self.qmp.execute("query-block", json!({})).await?;
        let bitmaps = list.as_array().into_iter().flatten().flat_map(bitmaps_of);
        Ok(bitmaps
            .filter(|(_, bitmap)| bitmap["name"] == name)
            .filter_map(|(_, bitmap)| bitmap["count"].as_u64())
            .sum())
    }

    /// What the guest has asked disks for, those with these nodes together.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn guest_io(&self, disks: &[GuestDisk]) -> Result<GuestIo, BlockError> {
        let list = self.qmp.execute("query-blockstats", json!({})).await?;
        let is_asked = |entry: &&Value| disks.iter().any(|disk| entry["node-name"] == disk.node);
        let entries = list.as_array().into_iter().flatten().filter(is_asked);
        Ok(io_of(entries))
    }

    /// Ends what is ours: exports, then the server, then the bitmaps, by which a server without exports is known as ours. Whatever cannot be ended is
    /// logged, and the next migration tries again.
    pub async fn clean_up(&self) {
        if let Err(error) = self.end_ours().await {
            tracing::warn!(qmp = %self.qmp.path().display(), "something of a migration's disks is left in QEMU: {error}");
        }
    }

    async fn end_ours(&self) -> Result<(), BlockError> {
        let mut had_exports = false;
        for id in self.exports().await? {
            if id.starts_with(PREFIX) {
                had_exports = true;
                self.end_export(&id).await?;
            }
        }
        let list = self.qmp.execute("query-block", json!({})).await?;
        let bitmaps = list.as_array().into_iter().flatten().flat_map(bitmaps_of);
        let is_ours = |bitmap: &Value| bitmap["name"].as_str().is_some_and(|name| name.starts_with(PREFIX));
        let bitmaps: Vec<_> = bitmaps.filter(|(_, bitmap)| is_ours(bitmap)).collect();
        // Somebody else's server has exports of somebody else's, and is not ended.
        if (had_exports || !bitmaps.is_empty()) && self.exports().await?.is_empty() {
            match self.stop_serving().await {
                Err(BlockError::Qmp(error)) if error.is_refusal() => {}
                stopped => stopped?,
            }
        }
        for (node, bitmap) in bitmaps {
            self.remove_bitmap(&node, &text(&bitmap["name"])).await?;
        }
        Ok(())
    }

    async fn exports(&self) -> Result<Vec<String>, BlockError> {
        let list = self.qmp.execute("query-block-exports", json!({})).await?;
        let ids = list.as_array().into_iter().flatten().map(|export| text(&export["id"]));
        Ok(ids.collect())
    }
}

/// The sum of entries of `query-blockstats`.
fn io_of<'a>(entries: impl Iterator<Item = &'a Value>) -> GuestIo {
    let mut io = GuestIo::default();
    for entry in entries {
        let stats = &entry["stats"];
        for (kind, of) in [
            ("rd", &mut io.reads),
            ("wr", &mut io.writes),
            ("flush", &mut io.flushes),
        ] {
            let number = |name: &str| stats[format!("{kind}_{name}")].as_u64().unwrap_or(0);
            *of = Served {
                requests: of.requests.saturating_add(number("operations")),
                nanos: of.nanos.saturating_add(number("total_time_ns")),
            };
        }
    }
    io
}

/// Node and bitmap, for each bitmap of an entry of `query-block`.
fn bitmaps_of(entry: &Value) -> Vec<(String, Value)> {
    let inserted = &entry["inserted"];
    let bitmaps = inserted["dirty-bitmaps"].as_array().into_iter().flatten();
    bitmaps
        .map(|bitmap| (text(&inserted["node-name"]), bitmap.clone()))
        .collect()
}

/// Requests that an export has open end within the time that a disk takes.
const EXPORT_GRACE: Duration = Duration::from_secs(10);

/// Between two looks at what ends by itself; the guest may stand still meanwhile.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_asked_its_disks_for_is_added_up() {
        let entry = json!({ "node-name": "a", "stats": {
            "rd_operations": 10, "rd_total_time_ns": 500, "wr_operations": 3, "wr_total_time_ns": 40,
            "flush_operations": 2, "flush_total_time_ns": 7, "unmap_operations": 1 } });
        let io = io_of([&entry, &entry].into_iter());
        let served = |requests, nanos| Served { requests, nanos };
        assert_eq!(
            io,
            GuestIo {
                reads: served(20, 1_000),
                writes: served(6, 80),
                flushes: served(4, 14)
            }
        );
    }

    #[test]
    fn a_disk_is_called_as_people_call_it() {
        assert_eq!(short_name("/machine/peripheral/vda/virtio-backend"), "vda");
        assert_eq!(short_name("/machine/peripheral/sda"), "sda");
        assert_eq!(short_name("drive0"), "drive0");
        assert_eq!(
            short_name("/machine/unattached/device[3]"),
            "/machine/unattached/device[3]"
        );
    }
}
