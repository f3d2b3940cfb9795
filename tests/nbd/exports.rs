//! What is asked of an export, and what comes of it.

use std::ops::Range;
use std::sync::Arc;

use longhaul::hypervisor::nbd::NbdError;
use longhaul::hypervisor::qmp::QemuVersion;
use longhaul::proto::disk::extents::{Allocation, Dirtiness, Extents};
use longhaul::proto::disk::nbd::{Content, ErrorNumber, Headers, MetaContext, Reading, Zeroing};
use tokio::task::JoinSet;

use crate::qemu::{CLUSTER, FORMATS, Qemu, SIZE, SOON, joined};
use crate::{pattern, qemu_or_return, ranges, status, write};

#[tokio::test]
async fn the_allocation_of_an_export_is_what_was_written() {
    let program = qemu_or_return!();
    for format in FORMATS {
        let qemu = Qemu::start(&program).await;
        qemu.add_disk("disk", format, SIZE).await;
        let client = qemu.add_writer("disk").await;
        let export = client.export();
        assert_eq!(export.size_bytes, SIZE);
        assert!(!export.flags.is_read_only() && export.flags.can_flush() && export.flags.can_trim());
        let has_extended = qemu.qmp.version()
            >= QemuVersion {
                major: 8,
                minor: 2,
                micro: 0,
            };
        let headers = if has_extended {
            Headers::Extended
        } else {
            Headers::Structured
        };
        assert_eq!(export.headers, headers);

        let nothing = status(&client, Allocation::from_flags).await;
        assert_eq!(nothing, Extents::uniform(0..SIZE, Allocation::Hole), "{format}");
        let written = [CLUSTER..2 * CLUSTER, 1 << 20..3 << 20, SIZE - CLUSTER..SIZE];
        for range in written.clone() {
            write(&client, range, 7).await;
        }
        let allocation = status(&client, Allocation::from_flags).await;
        assert_eq!(ranges(&allocation, Allocation::Data), written, "{format}");
        assert_eq!(allocation.end(), SIZE);
        assert_eq!(ranges(&allocation, Allocation::Zero), [], "{format}");
        client.close(SOON).await.unwrap();
    }
}

#[tokio::test]
async fn a_read_gives_the_bytes_that_were_written_and_tells_holes_apart() {
    let program = qemu_or_return!();
    for format in FORMATS {
        let qemu = Qemu::start(&program).await;
        qemu.add_disk("disk", format, SIZE).await;
        let writer = qemu.add_writer("disk").await;
        write(&writer, CLUSTER..2 * CLUSTER, 3).await;
        write(&writer, 3 * CLUSTER..4 * CLUSTER, 4).await;
        qemu.add_export("disk", &[]).await;
        let reader = qemu.client("disk", vec![]).await;
        assert!(reader.export().flags.is_read_only());

        let length = 5 * CLUSTER;
        let mut wanted = vec![0; usize::try_from(length).unwrap()];
        for (cluster, seed) in [(1, 3), (3, 4)] {
            let from = usize::try_from(cluster * CLUSTER).unwrap();
            let data = pattern(CLUSTER, seed);
            wanted[from..from + data.len()].copy_from_slice(&data);
        }
        let length = u32::try_from(length).unwrap();
        let sparse = reader.read(0, length, Reading::Sparse).await.unwrap();
        let forms: Vec<(u64, bool)> = sparse
            .iter()
            .map(|piece| (piece.offset / CLUSTER, matches!(piece.content, Content::Hole(_))))
            .collect();
        assert_eq!(
            forms,
            [(0, true), (1, false), (2, true), (3, false), (4, true)],
            "{format}"
        );
        assert_eq!(joined(&sparse), wanted);
        let whole = reader.read(0, length, Reading::Whole).await.unwrap();
        assert!(matches!(&whole[..], [piece] if matches!(piece.content, Content::Data(_))));
        assert_eq!(joined(&whole), wanted);
        // Any byte, not only whole sectors.
        let few = reader.read(CLUSTER - 1, 3, Reading::Sparse).await.unwrap();
        assert_eq!(joined(&few), wanted[usize::try_from(CLUSTER).unwrap() - 1..][..3]);
    }
}

#[tokio::test]
async fn more_requests_than_may_be_held_are_answered_each_with_its_own_bytes() {
    let qemu = Qemu::start(&qemu_or_return!()).await;
    qemu.add_disk("disk", "qcow2", SIZE).await;
    let client = qemu.add_writer("disk").await;
    let step = u64::from(client.request_limit());
    let count = SIZE / step;
    let seed = |number: u64| u8::try_from(number * 4).unwrap();
    let client = Arc::new(client);
    let mut writes = JoinSet::new();
    for number in 0..count {
        let client = Arc::clone(&client);
        writes.spawn(async move { client.write(number * step, pattern(step, seed(number))).await });
    }
    for result in writes.join_all().await {
        result.unwrap();
    }
    let mut reads = JoinSet::new();
    for number in 0..count {
        let client = Arc::clone(&client);
        reads.spawn(async move {
            let length = u32::try_from(step).unwrap();
            let pieces = client.read(number * step, length, Reading::Sparse).await.unwrap();
            joined(&pieces) == pattern(step, seed(number))
        });
    }
    assert_eq!(reads.join_all().await, vec![true; usize::try_from(count).unwrap()]);
}

#[tokio::test]
async fn bytes_are_zeroed_and_trimmed_and_the_file_stays_sparse() {
    let program = qemu_or_return!();
    for format in FORMATS {
        let qemu = Qemu::start(&program).await;
        qemu.add_disk("disk", format, SIZE).await;
        let client = qemu.add_writer("disk").await;
        let (zeroed, trimmed, kept) = (0..8 << 20, 8 << 20..16 << 20, 16 << 20..18 << 20);
        for range in [zeroed.clone(), trimmed.clone(), kept.clone()] {
            for start in range.step_by(1 << 20) {
                write(&client, start..start + (1 << 20), 9).await;
            }
        }
        client.flush().await.unwrap();
        let full = qemu.allocated_bytes("disk");
        assert!(full >= 18 << 20, "{format}: {full}");

        client.write_zeroes(zeroed.clone(), Zeroing::MayBeHole).await.unwrap();
        client.trim(trimmed.clone()).await.unwrap();
        client.flush().await.unwrap();
        let left = qemu.allocated_bytes("disk");
        // Giving clusters back may itself allocate a cluster or two of qcow2's own tables.
        assert!(
            left <= full - (16 << 20) + 2 * CLUSTER,
            "{format}: {left} of {full} bytes"
        );
        let allocation = status(&client, Allocation::from_flags).await;
        assert_eq!(ranges(&allocation, Allocation::Data), vec![kept.clone()], "{format}");
        let bytes = client.read(4 << 20, 1 << 20, Reading::Whole).await.unwrap();
        assert!(joined(&bytes).iter().all(|byte| *byte == 0));

        // Zeroes that are no hole take space where the format has no cheaper way to reserve it.
        client.write_zeroes(zeroed.clone(), Zeroing::NoHole).await.unwrap();
        client.flush().await.unwrap();
        let after = qemu.allocated_bytes("disk");
        if format == "raw" {
            assert!(after >= left + (8 << 20), "{after} after {left} bytes");
        }
        let bytes = client.read(4 << 20, 1 << 20, Reading::Sparse).await.unwrap();
        assert!(joined(&bytes).iter().all(|byte| *byte == 0));

        // Fast, or refused and nothing else lost.
        match client.write_zeroes(kept.clone(), Zeroing::FastOnly).await {
            Ok(()) => {}
            Err(NbdError::Failed { failure, .. }) => assert_eq!(failure.number, ErrorNumber::NOTSUP),
            Err(other) => panic!("{other}"),
        }
        client.close(SOON).await.unwrap();
    }
}

#[tokio::test]
async fn zeroes_and_status_of_more_than_32_bits_are_asked_for_in_steps() {
    let size = 6_u64 << 30;
    let qemu = Qemu::start(&qemu_or_return!()).await;
    qemu.add_disk("disk", "qcow2", size).await;
    let client = qemu.add_writer("disk").await;
    let written = [
        0..CLUSTER,
        (5 << 30) - CLUSTER..(5 << 30) + CLUSTER,
        size - CLUSTER..size,
    ];
    for range in written.clone() {
        write(&client, range, 5).await;
    }
    let allocation = status(&client, Allocation::from_flags).await;
    assert_eq!(ranges(&allocation, Allocation::Data), written);
    client.write_zeroes(CLUSTER..size, Zeroing::MayBeHole).await.unwrap();
    let allocation = status(&client, Allocation::from_flags).await;
    assert_eq!(ranges(&allocation, Allocation::Data), written[..1]);
    client.trim(0..size).await.unwrap();
    let allocation = status(&client, Allocation::from_flags).await;
    assert_eq!(ranges(&allocation, Allocation::Data), []);
}

#[tokio::test]
async fn many_extents_are_told_to_the_last() {
    let qemu = Qemu::start(&qemu_or_return!()).await;
    qemu.add_disk("disk", "qcow2", SIZE).await;
    let client = qemu.add_writer("disk").await;
    qemu.add_bitmap("disk", "round-1").await;
    let every_second = || (0..SIZE / CLUSTER).step_by(2).map(|cluster| cluster * CLUSTER);
    for start in every_second() {
        write(&client, start..start + 1, 1).await;
    }
    qemu.next_round("disk", "round-1", "round-2").await;
    qemu.add_export("disk", &["round-1"]).await;
    let contexts = vec![MetaContext::DirtyBitmap("round-1".into()), MetaContext::Allocation];
    let reader = qemu.client("disk", contexts).await;
    let [dirty, allocation] = &reader.block_status(0..SIZE).await.unwrap()[..] else {
        panic!("two contexts were asked for");
    };
    let wanted: Vec<Range<u64>> = every_second().map(|start| start..start + CLUSTER).collect();
    assert_eq!(ranges(&dirty.map(Dirtiness::from_flags), Dirtiness::Dirty), wanted);
    assert_eq!(
        ranges(&allocation.map(Allocation::from_flags), Allocation::Data),
        wanted
    );
}
