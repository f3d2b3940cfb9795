//! A real QEMU with disks and no guest, told by QMP what to do with them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use longhaul::hypervisor::nbd::{NbdClient, NbdError};
use longhaul::hypervisor::qmp::QmpClient;
use longhaul::proto::disk::nbd::{Content, MetaContext, Piece};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Time for anything that happens soon on an idle machine; CI machines are not idle.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Bytes of a disk.
pub(crate) const SIZE: u64 = 64 << 20;

/// Granularity of bitmaps, and of qcow2's clusters.
pub(crate) const CLUSTER: u64 = 64 << 10;

/// The formats that disks have.
pub(crate) const FORMATS: [&str; 2] = ["raw", "qcow2"];

/// A QEMU of a test, ended with it.
pub(crate) struct Qemu {
    child: Child,
    pub(crate) qmp: QmpClient,
    folder: TempDir,
}

impl Qemu {
    /// Without a machine; its NBD server listens.
    pub(crate) async fn start(program: &Path) -> Self {
        Self::with(program, &["-machine", "none"], |_| Vec::new()).await
    }

    /// With more arguments, of which some name files in its folder. Its NBD server listens.
    pub(crate) async fn with(program: &Path, arguments: &[&str], files: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let folder = tempfile::Builder::new().prefix("longhaul-nbd-").tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let mut child = Command::new(program)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-S"])
            .args(arguments)
            .args(files(folder.path()))
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let connected = async {
            loop {
                if let Ok(qmp) = QmpClient::connect(&socket, SOON).await {
                    return qmp;
                }
                let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
                assert!(child.try_wait().unwrap().is_none(), "{log}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let qmp = tokio::time::timeout(SOON, connected).await.expect("no monitor");
        let qemu = Self { child, qmp, folder };
        let address = json!({ "type": "unix", "data": { "path": qemu.socket() } });
        qemu.run("nbd-server-start", json!({ "addr": address })).await;
        qemu
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where its NBD server listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("nbd")
    }

    pub(crate) async fn run(&self, command: &str, arguments: Value) -> Value {
        self.qmp.execute(command, arguments).await.unwrap()
    }

    /// Why it does not.
    pub(crate) async fn refusal(&self, command: &str, arguments: Value) -> String {
        self.qmp.execute(command, arguments).await.unwrap_err().to_string()
    }

    /// Adds an empty disk of `size` bytes: the node `name`, in the file `name`.
    pub(crate) async fn add_disk(&self, name: &str, format: &str, size: u64) {
        let file = std::fs::File::create(self.path(name)).unwrap();
        if format == "raw" {
            file.set_len(size).unwrap();
        }
        let node = format!("{name}-file");
        self.run(
            "blockdev-add",
            json!({ "driver": "file", "node-name": node, "filename": self.path(name), "discard": "unmap" }),
        )
        .await;
        if format != "raw" {
            let options = json!({ "driver": format, "file": node, "size": size, "cluster-size": CLUSTER });
            self.run("blockdev-create", json!({ "job-id": "create", "options": options }))
                .await;
            self.until("the image is created", async || {
                let jobs = self.run("query-jobs", json!({})).await;
                assert_eq!(jobs[0]["error"], Value::Null);
                jobs[0]["status"] == "concluded"
            })
            .await;
            self.run("job-dismiss", json!({ "id": "create" })).await;
        }
        self.run(
            "blockdev-add",
            json!({ "driver": format, "node-name": name, "file": node, "discard": "unmap" }),
        )
        .await;
    }

    /// Exports a node for writing under the name `writer`.
    pub(crate) async fn add_writer(&self, node: &str) -> NbdClient {
        let export = json!({ "type": "nbd", "id": "writer", "node-name": node, "name": "writer", "writable": true });
        self.run("block-export-add", export).await;
        self.client("writer", vec![MetaContext::Allocation]).await
    }

    /// Exports a node for reading under its own name, with bitmaps.
    pub(crate) async fn add_export(&self, node: &str, bitmaps: &[&str]) {
        let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "bitmaps": bitmaps });
        self.run("block-export-add", export).await;
    }

    /// Removes an export that nobody uses any more, and waits until it is gone.
    pub(crate) async fn remove_export(&self, id: &str) {
        self.run("block-export-del", json!({ "id": id, "mode": "safe" })).await;
        self.until("the export is gone", async || {
            let exports = self.run("query-block-exports", json!({})).await;
            !exports.as_array().unwrap().iter().any(|export| export["id"] == id)
        })
        .await;
    }

    pub(crate) async fn client(&self, export: &str, contexts: Vec<MetaContext>) -> NbdClient {
        self.connect(export, contexts).await.unwrap()
    }

    pub(crate) async fn connect(&self, export: &str, contexts: Vec<MetaContext>) -> Result<NbdClient, NbdError> {
        NbdClient::connect(&self.socket(), export, contexts, SOON).await
    }

    pub(crate) async fn add_bitmap(&self, node: &str, bitmap: &str) {
        self.run("block-dirty-bitmap-add", bitmap_of(node, bitmap)).await;
    }

    /// Begins the bitmap `next` and freezes `now`, at one moment.
    pub(crate) async fn next_round(&self, node: &str, now: &str, next: &str) {
        let actions = json!([
            { "type": "block-dirty-bitmap-add", "data": bitmap_of(node, next) },
            { "type": "block-dirty-bitmap-disable", "data": { "node": node, "name": now } },
        ]);
        self.run("transaction", json!({ "actions": actions })).await;
    }

    /// Bytes that the file of a disk takes.
    pub(crate) fn allocated_bytes(&self, disk: &str) -> u64 {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(self.path(disk)).unwrap().blocks() * 512
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits for a condition, with a deadline.
    pub(crate) async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let wait = async {
            while !condition().await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = tokio::time::timeout(SOON, wait).await;
        waited.unwrap_or_else(|_| panic!("not in time: {what}"));
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Arguments that make a bitmap.
fn bitmap_of(node: &str, bitmap: &str) -> Value {
    json!({ "node": node, "name": bitmap, "granularity": CLUSTER })
}

/// The bytes of a read.
pub(crate) fn joined(pieces: &[Piece]) -> Vec<u8> {
    let bytes = pieces.iter().flat_map(|piece| match &piece.content {
        Content::Data(data) => data.to_vec(),
        Content::Hole(length) => vec![0; usize::try_from(*length).unwrap()],
    });
    bytes.collect()
}
