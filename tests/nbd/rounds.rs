//! Bitmaps, and the moments of a migration at which a disk is read or written.

use std::path::Path;

use longhaul::hypervisor::nbd::NbdClient;
use longhaul::hypervisor::qmp::QemuVersion;
use longhaul::proto::disk::extents::{Allocation, Dirtiness, Transfer, transfers};
use longhaul::proto::disk::nbd::{MetaContext, Reading, Zeroing};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::qemu::{CLUSTER, FORMATS, Qemu, SIZE, SOON, joined};
use crate::{pattern, qemu_or_return, ranges, status, write};

#[tokio::test]
async fn a_frozen_bitmap_has_the_clusters_of_its_round_and_the_next_one_those_after() {
    let program = qemu_or_return!();
    for format in FORMATS {
        let qemu = Qemu::start(&program).await;
        qemu.add_disk("disk", format, SIZE).await;
        let writer = qemu.add_writer("disk").await;
        write(&writer, 0..4 * CLUSTER, 1).await;
        qemu.add_bitmap("disk", "round-1").await;
        // A byte dirties its cluster.
        write(&writer, 2 * CLUSTER..2 * CLUSTER + 1, 2).await;
        write(&writer, 20 * CLUSTER..22 * CLUSTER, 2).await;
        let zeroes = 3 * CLUSTER..4 * CLUSTER;
        writer.write_zeroes(zeroes, Zeroing::MayBeHole).await.unwrap();
        qemu.next_round("disk", "round-1", "round-2").await;
        write(&writer, 20 * CLUSTER..21 * CLUSTER, 3).await;
        write(&writer, 40 * CLUSTER..41 * CLUSTER, 3).await;

        qemu.add_export("disk", &["round-1"]).await;
        let contexts = || vec![MetaContext::Allocation, MetaContext::DirtyBitmap("round-1".into())];
        let reader = qemu.client("disk", contexts()).await;
        let [allocation, dirty] = &reader.block_status(0..SIZE).await.unwrap()[..] else {
            panic!("two contexts were asked for");
        };
        let dirty = dirty.map(Dirtiness::from_flags);
        let wanted = [2 * CLUSTER..4 * CLUSTER, 20 * CLUSTER..22 * CLUSTER];
        assert_eq!(ranges(&dirty, Dirtiness::Dirty), wanted, "{format}");
        let round = transfers(&dirty, &allocation.map(Allocation::from_flags));
        let wanted = [2 * CLUSTER..3 * CLUSTER, 20 * CLUSTER..22 * CLUSTER];
        assert_eq!(ranges(&round, Transfer::Read), wanted, "{format}");
        assert_eq!(
            ranges(&round, Transfer::Zeroes),
            vec![3 * CLUSTER..4 * CLUSTER],
            "{format}"
        );
        reader.close(SOON).await.unwrap();

        // The next round: what was written behind the freeze, though the disk has moved on since.
        qemu.remove_export("disk").await;
        let old = json!({ "node": "disk", "name": "round-1" });
        qemu.run("block-dirty-bitmap-remove", old).await;
        qemu.next_round("disk", "round-2", "round-3").await;
        qemu.add_export("disk", &["round-2"]).await;
        let context = vec![MetaContext::DirtyBitmap("round-2".into())];
        let reader = qemu.client("disk", context).await;
        let dirty = status(&reader, Dirtiness::from_flags).await;
        let wanted = [20 * CLUSTER..21 * CLUSTER, 40 * CLUSTER..41 * CLUSTER];
        assert_eq!(ranges(&dirty, Dirtiness::Dirty), wanted, "{format}");
        let bytes = reader.read(40 * CLUSTER, 100, Reading::Whole).await.unwrap();
        assert_eq!(joined(&bytes), pattern(100, 3));
    }
}

#[tokio::test]
async fn a_bitmap_that_still_collects_is_not_exported_and_one_that_is_exported_not_removed() {
    let qemu = Qemu::start(&qemu_or_return!()).await;
    qemu.add_disk("disk", "qcow2", SIZE).await;
    qemu.add_bitmap("disk", "round-1").await;
    let export = json!({ "type": "nbd", "id": "disk", "node-name": "disk", "name": "disk", "bitmaps": ["round-1"] });
    let refusal = qemu.refusal("block-export-add", export).await;
    assert!(refusal.contains("incompatible with readonly export"), "{refusal}");
    qemu.next_round("disk", "round-1", "round-2").await;
    qemu.add_export("disk", &["round-1"]).await;
    let remove = json!({ "node": "disk", "name": "round-1" });
    let refusal = qemu.refusal("block-dirty-bitmap-remove", remove).await;
    assert!(refusal.contains("in use by another operation"), "{refusal}");
}

/// A machine with a disk of this format: the node and the file `disk`.
async fn machine(program: &Path, format: &str, arguments: &[&str]) -> Qemu {
    let maker = Qemu::start(program).await;
    maker.add_disk("disk", format, SIZE).await;
    let disk = |folder: &Path| {
        let file = folder.join("disk");
        std::fs::copy(maker.path("disk"), &file).unwrap();
        let node = json!({ "driver": format, "node-name": "disk", "discard": "unmap",
            "file": { "driver": "file", "filename": file, "discard": "unmap" } });
        vec!["-blockdev".into(), node.to_string()]
    };
    let device = "virtio-blk-pci,id=vd,drive=disk";
    let machine = [&["-machine", "q35", "-m", "32", "-device", device], arguments].concat();
    Qemu::with(program, &machine, disk).await
}

/// Lets a running machine migrate up to where its last round happens, into a socket that takes everything.
async fn before_switchover(program: &Path, format: &str) -> (Qemu, JoinHandle<Vec<u8>>) {
    let qemu = machine(program, format, &[]).await;
    qemu.add_bitmap("disk", "round-1").await;
    qemu.run("cont", json!({})).await;
    // As the guest would write: others may not while it has the disk.
    let written = "qemu-io -d /machine/peripheral/vd/virtio-backend \"write -P 7 1M 64k\"";
    let answer = qemu
        .run("human-monitor-command", json!({ "command-line": written }))
        .await;
    assert_eq!(answer, "", "it says nothing where it succeeds");
    let stream = qemu.path("stream");
    let listener = UnixListener::bind(&stream).unwrap();
    let taken = tokio::spawn(async move {
        let mut bytes = Vec::new();
        let mut stream = listener.accept().await.unwrap().0;
        stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    });
    let pause = json!([{ "capability": "pause-before-switchover", "state": true }]);
    qemu.run("migrate-set-capabilities", json!({ "capabilities": pause }))
        .await;
    qemu.run("migrate", json!({ "uri": format!("unix:{}", stream.display()) }))
        .await;
    migration_is(&qemu, "pre-switchover").await;
    (qemu, taken)
}

/// Lets it hand over; gives the whole stream.
async fn hand_over(qemu: &Qemu, taken: JoinHandle<Vec<u8>>) -> Vec<u8> {
    qemu.run("migrate-continue", json!({ "state": "pre-switchover" })).await;
    migration_is(qemu, "completed").await;
    taken.await.unwrap()
}

async fn migration_is(qemu: &Qemu, wanted: &str) {
    qemu.until(wanted, async || {
        let status = qemu.run("query-migrate", json!({})).await["status"].clone();
        assert!(status != "failed" && status != "cancelled", "{status}");
        status == wanted
    })
    .await;
}

#[tokio::test]
async fn the_last_round_is_read_while_the_source_waits_before_its_switchover() {
    let program = qemu_or_return!();
    for format in FORMATS {
        let (qemu, taken) = before_switchover(&program, format).await;
        qemu.next_round("disk", "round-1", "round-2").await;
        qemu.add_export("disk", &["round-1"]).await;
        let contexts = vec![MetaContext::DirtyBitmap("round-1".into()), MetaContext::Allocation];
        let reader = qemu.client("disk", contexts).await;
        let dirty = status(&reader, Dirtiness::from_flags).await;
        assert_eq!(ranges(&dirty, Dirtiness::Dirty), vec![1 << 20..(1 << 20) + CLUSTER]);
        let bytes = reader.read(1 << 20, 65536, Reading::Whole).await.unwrap();
        assert_eq!(joined(&bytes), vec![7; 65536]);

        assert!(!hand_over(&qemu, taken).await.is_empty());
        // The export stays, and its bytes can be read, but since 10.0 nobody is told any more which of them to read.
        let bytes = reader.read(1 << 20, 65536, Reading::Sparse).await.unwrap();
        assert_eq!(joined(&bytes), vec![7; 65536]);
        let after = reader.block_status(0..SIZE).await;
        let tells_inactive = QemuVersion {
            major: 10,
            minor: 0,
            micro: 0,
        };
        if qemu.qmp.version() >= tells_inactive {
            let text = after.unwrap_err().to_string();
            assert!(
                text.contains("it is not permitted (EPERM): export is inactive"),
                "{text}"
            );
        }
    }
}

/// A destination whose guest is loaded and stopped, with a writer of its disk.
async fn loaded(program: &Path, format: &str) -> (Qemu, NbdClient) {
    let (source, taken) = before_switchover(program, format).await;
    let stream = hand_over(&source, taken).await;
    let qemu = machine(program, format, &["-incoming", "defer"]).await;
    let client = qemu.add_writer("disk").await;
    write(&client, 0..CLUSTER, 8).await;
    let incoming = qemu.path("incoming");
    qemu.run(
        "migrate-incoming",
        json!({ "uri": format!("unix:{}", incoming.display()) }),
    )
    .await;
    let mut socket = UnixStream::connect(&incoming).await.unwrap();
    socket.write_all(&stream).await.unwrap();
    drop(socket);
    migration_is(&qemu, "completed").await;
    assert_eq!(qemu.run("query-status", json!({})).await["status"], "paused");
    (qemu, client)
}

/// What the QEMU has said beside its monitor.
fn log(qemu: &Qemu) -> String {
    std::fs::read_to_string(qemu.path("log")).unwrap()
}

#[tokio::test]
async fn a_destination_takes_writes_until_its_guest_has_the_disk() {
    let program = qemu_or_return!();
    for format in FORMATS {
        let (qemu, client) = loaded(&program, format).await;
        // Loaded and stopped: the last round still arrives.
        write(&client, CLUSTER..2 * CLUSTER, 9).await;
        client.flush().await.unwrap();
        let bytes = client.read(0, 2 * 65536, Reading::Sparse).await.unwrap();
        assert_eq!(joined(&bytes), [pattern(CLUSTER, 8), pattern(CLUSTER, 9)].concat());
        client.close(SOON).await.unwrap();
        qemu.remove_export("writer").await;
        qemu.run("cont", json!({})).await;
        assert_eq!(log(&qemu), "", "{format}");
    }
}

#[tokio::test]
async fn a_guest_is_continued_though_its_disk_is_still_exported_for_writing() {
    let (qemu, client) = loaded(&qemu_or_return!(), "qcow2").await;
    qemu.run("cont", json!({})).await;
    assert_eq!(qemu.run("query-status", json!({})).await["status"], "running");
    // The monitor does not tell, and nothing is prevented: who continues a guest has to remove the export before.
    assert!(
        log(&qemu).contains("Permission conflict on node 'disk'"),
        "{}",
        log(&qemu)
    );
    write(&client, 0..CLUSTER, 1).await;
}
