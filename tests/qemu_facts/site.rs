//! Guests, monitors and disks as these facts need them.

use std::path::Path;
use std::time::Duration;

use longhaul::hypervisor::process::{Process, ProcessIdentity};
use longhaul::hypervisor::qemu::{DestinationError, RunState, SourceVm};
use longhaul::hypervisor::qmp::{QemuVersion, QmpClient};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::boot_sector::boot_sector;
use super::harness::{self, Guest, LIMIT, SOON, Site};

/// What only newer versions do.
pub(crate) trait Since {
    fn is_at_least(&self, major: u32, minor: u32) -> bool;
}

impl Since for QemuVersion {
    fn is_at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

/// Waits for something that has to be asked for, with a deadline.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, wait)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// A source whose guest writes to 128 pages, over and over, and a third party's monitor of it.
pub(crate) async fn restless(site: &Site) -> (Guest, SourceVm, QmpClient) {
    let disk = site.path("boot.img");
    std::fs::write(&disk, boot_sector()).expect("there is room");
    let drive = format!("id=boot,file={},format=raw,readonly=on,if=none", disk.display());
    let arguments = ["-drive", &drive, "-device", "virtio-blk-pci,drive=boot"];
    let (guest, source) = site.source(&arguments).await;
    let third = guest.third_party().await;
    // The firmware writes there too, but not so often.
    for _ in 0..5 {
        let before = counter(&third).await;
        eventually("it counts", async || counter(&third).await != before).await;
    }
    (guest, source, third)
}

/// What the guest of [`restless`] counts up in its first page, in QEMU's words.
pub(crate) async fn counter(monitor: &QmpClient) -> String {
    let arguments = json!({ "command-line": "xp /1hx 0x10040" });
    let answer = monitor.execute("human-monitor-command", arguments).await;
    answer.expect("memory is read").to_string()
}

pub(crate) async fn set_capabilities(monitor: &QmpClient, capabilities: &[(&str, bool)]) {
    let list: Vec<Value> = capabilities
        .iter()
        .map(|(name, is_on)| json!({ "capability": name, "state": is_on }))
        .collect();
    let set = monitor.execute("migrate-set-capabilities", json!({ "capabilities": list }));
    set.await.expect("capabilities are set");
}

/// Tells a monitor to end its process; whether it still answers is luck.
pub(crate) async fn quit(monitor: &QmpClient) {
    let _ = monitor.execute("quit", json!({})).await;
}

pub(crate) fn is_gone(identity: &ProcessIdentity) -> bool {
    Process::reattach(identity).is_ok_and(|process| process.is_none_or(|process| !process.is_alive()))
}

/// A destination without the gateway's settings: it waits, and listens once it is told to.
pub(crate) async fn plain_destination(site: &Site, name: &str, arguments: &[&str]) -> (Guest, QmpClient) {
    let arguments = [arguments, &["-S", "-incoming", "defer"]].concat();
    let guest = site
        .start(&harness::destination_qemu(&site.qemu), name, &arguments)
        .await;
    let monitor = guest.third_party().await;
    set_capabilities(&monitor, &[("events", true)]).await;
    (guest, monitor)
}

pub(crate) fn incoming(site: &Site) -> Value {
    json!({ "uri": format!("unix:{}", site.path("stream").display()) })
}

pub(crate) async fn status(monitor: &QmpClient, command: &str) -> String {
    let answer = monitor.execute(command, json!({})).await.expect("it answers");
    answer["status"].as_str().unwrap_or("none").to_owned()
}

/// The whole stream of a guest that has stayed paused at the source since.
pub(crate) async fn recorded(site: &Site) -> (Guest, SourceVm, Vec<u8>) {
    let (guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.expect("it can be prepared");
    let stream = site.take_stream(&source).await;
    (guest, source, stream)
}

/// Gives `bytes` to a destination, ends the connection, and tells what came of it. The guest has not run.
pub(crate) async fn load(site: &Site, bytes: &[u8]) -> Result<RunState, DestinationError> {
    let (_guard, mut destination) = site.destination(&[]).await;
    let mut events = destination.events();
    let prepared = destination.prepare(&site.path("stream")).await;
    prepared.expect("it can be prepared");
    let connected = UnixStream::connect(site.path("stream")).await;
    // One that has found a fault does not take the rest.
    let _ = connected.expect("it listens").write_all(bytes).await;
    let loaded = destination.wait_loaded(SOON).await;
    if let Err(DestinationError::LoadFailed { .. }) = &loaded {
        let state = destination.run_state().await.expect("it stays");
        assert_eq!(state, RunState::InMigrate);
    }
    destination.kill(SOON).await.expect("it can be killed");
    while let Ok(event) = events.next().await {
        assert_ne!(event.name, "RESUME");
    }
    loaded.map(|loaded| loaded.run_state().clone())
}

/// QEMU said why it did not load: since 9.1 by its monitor, as it is told to, and before by its last words.
#[track_caller]
pub(crate) fn assert_refused(loaded: &Result<RunState, DestinationError>, version: QemuVersion, what: &str) {
    let reason = match loaded {
        Err(DestinationError::LoadFailed { reason }) if version.is_at_least(9, 1) => reason,
        Err(DestinationError::Ended { ending }) if !version.is_at_least(9, 1) => {
            assert!(ending.starts_with("exit status: 1; "), "{what}: {ending}");
            ending
        }
        other => panic!("{what}: {other:?}"),
    };
    assert!(reason.contains("load of migration failed"), "{what}: {reason}");
}

/// Whether any process has QEMU's permission to write to an image: a lock on its byte 101 (`block/file-posix.c`).
pub(crate) fn is_locked_for_writing(image: &Path) -> bool {
    use rustix::process::{Flock, FlockOffsetType, FlockType, fcntl_getlk};
    let file = std::fs::OpenOptions::new().read(true).write(true).open(image);
    let wanted = Flock {
        start: 101,
        length: 1,
        pid: None,
        typ: FlockType::WriteLock,
        offset_type: FlockOffsetType::Set,
    };
    let found = fcntl_getlk(file.expect("the image is there"), &wanted);
    found.expect("locks can be asked for").is_some()
}
