//! Bitmaps, and the moments of a migration at which a disk is read or written.

use std::path::Path;

use longhaul::hypervisor::qmp::QemuVersion;
use longhaul::proto::disk::extents::{Allocation, Dirtiness, Transfer, transfers};
use longhaul::proto::disk::nbd::{MetaContext, Reading, Zeroing};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
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

/// Migrates a machine with a disk into a socket that takes everything, and stops it where the last round happens.
async fn before_switchover(program: &Path) -> (Qemu, JoinHandle<u64>) {
    let disk = |folder: &Path| {
        let file = folder.join("disk");
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let node = json!({ "driver": "raw", "node-name": "disk", "discard": "unmap",
            "file": { "driver": "file", "filename": file } });
        vec!["-blockdev".into(), node.to_string()]
    };
    let machine = [
        "-machine",
        "q35",
        "-m",
        "32",
        "-device",
        "virtio-blk-pci,id=vd,drive=disk",
    ];
    let qemu = Qemu::with(program, &machine, disk).await;
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
        let mut stream = listener.accept().await.unwrap().0;
        let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
        while let Ok(length @ 1..) = stream.read(&mut buffer).await {
            bytes += length as u64;
        }
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
    let (qemu, taken) = before_switchover(&qemu_or_return!()).await;
    qemu.next_round("disk", "round-1", "round-2").await;
    qemu.add_export("disk", &["round-1"]).await;
    let contexts = || vec![MetaContext::DirtyBitmap("round-1".into()), MetaContext::Allocation];
    let reader = qemu.client("disk", contexts()).await;
    let dirty = status(&reader, Dirtiness::from_flags).await;
    assert_eq!(ranges(&dirty, Dirtiness::Dirty), vec![1 << 20..(1 << 20) + CLUSTER]);
    let bytes = reader.read(1 << 20, 65536, Reading::Whole).await.unwrap();
    assert_eq!(joined(&bytes), vec![7; 65536]);

    qemu.run("migrate-continue", json!({ "state": "pre-switchover" })).await;
    migration_is(&qemu, "completed").await;
    assert!(taken.await.unwrap() > 0);
    // The export stays, and its bytes can be read, but since 10.0 nobody is told any more which of them to read.
    let bytes = reader.read(1 << 20, 4096, Reading::Whole).await.unwrap();
    assert_eq!(joined(&bytes), vec![7; 4096]);
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

#[tokio::test]
async fn a_destination_that_waits_for_its_guest_takes_writes() {
    let program = qemu_or_return!();
    let disk = |folder: &Path| {
        let file = folder.join("disk");
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let node = json!({ "driver": "raw", "node-name": "disk", "file": { "driver": "file", "filename": file } });
        vec!["-blockdev".into(), node.to_string()]
    };
    let machine = [
        "-machine",
        "q35",
        "-m",
        "32",
        "-device",
        "virtio-blk-pci,drive=disk",
        "-incoming",
        "defer",
    ];
    let qemu = Qemu::with(&program, &machine, disk).await;
    let client = qemu.add_writer("disk").await;
    write(&client, 0..CLUSTER, 8).await;
    client.flush().await.unwrap();
    let bytes = client.read(0, 65536, Reading::Sparse).await.unwrap();
    assert_eq!(joined(&bytes), pattern(CLUSTER, 8));
    let file = std::fs::read(qemu.path("disk")).unwrap();
    assert_eq!(file[..65536], pattern(CLUSTER, 8));
    client.close(SOON).await.unwrap();
    qemu.remove_export("writer").await;
}
