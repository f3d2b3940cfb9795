//! Disks that are copied with their VM.
//!
//! ```text
//! source's QEMU ─ NBD ─▶ pull ─▶ records ─▶ tunnel's entrance ══ lanes ══▶ tunnel's exit ─▶ records ─▶ take ─ NBD ─▶ destination's QEMU
//!                  rounds over dirty bitmaps                                         images: made by volumes, kept or removed by mark
//!                  compare ◀──────────── what the images hold already ◀──────────────────────────────── tell
//! ```
//!
//! A VM that is off has no hypervisor at either end: there `qemu-nbd` serves its images ([`cold_image`]), which are read once and held meanwhile.
//!
//! Before anything is sent the destination says what its images hold ([`held`](crate::proto::disk::held)): what is equal does not cross. So an image
//! that is old, or that a migration has left unfinished ([`rest`]), is worth having.
//!
//! The stream ([`stream`](crate::proto::disk::stream)) is a session of its own beside the memory's, reduced and resumed like a tunnel's. First
//! everything that is allocated is read while the guest runs; then memory is copied too, and what the guest writes meanwhile follows in rounds.
//! The last one is read while the guest stands, before its hypervisor sends what is left of memory. COMMIT waits until the destination has flushed.
//! The source's disks stay what they are until the VM runs at the destination.

pub(crate) mod cold_image;
mod compare;
pub(crate) mod mark;
pub(crate) mod place;
pub(crate) mod pull;
mod records;
pub(crate) mod rest;
pub(crate) mod take;
mod tell;
pub(crate) mod volumes;
mod watch;

use crate::hypervisor::qemu::GuestDisk;
use crate::proto::disk::stream::MAX_DISKS;
use crate::proto::ownership::StreamSum;
use crate::proto::page::{MigrationId, StreamDigest};
use crate::proto::wire::message::OfferedDisk;

/// Longest name of a disk.
const MAX_NAME: usize = 256;

/// Largest disk: QEMU's own bound is below.
const MAX_SIZE: u64 = 1 << 60;

/// In the place of a migration, in the frames of its disks.
pub(crate) fn stream_of(migration: MigrationId) -> MigrationId {
    let key = blake3::derive_key("longhaul 2026-11 stream of disks", &migration.0);
    MigrationId(key[..16].try_into().expect("a key has more bytes"))
}

/// What both sites agree on where a VM is off: its disks, of which this is the digest, are all that there is.
pub(crate) fn sum_of(digest: [u8; 32]) -> StreamSum {
    StreamSum {
        digest: StreamDigest(digest),
        length: 0,
    }
}

/// What the destination is told of disks.
pub(crate) fn offered(disks: &[GuestDisk]) -> Vec<OfferedDisk> {
    let offer = |disk: &GuestDisk| OfferedDisk {
        name: disk.name.clone(),
        size_bytes: disk.size_bytes,
        allocated_bytes: disk.allocated_bytes,
    };
    disks.iter().map(offer).collect()
}

/// What speaks against an offer, whoever makes it.
pub(crate) fn check_offer(disks: &[OfferedDisk]) -> Result<(), String> {
    if disks.len() > MAX_DISKS {
        return Err(format!("the VM has {} disks; {MAX_DISKS} can be copied", disks.len()));
    }
    for (number, disk) in disks.iter().enumerate() {
        if disk.name.is_empty() || disk.name.len() > MAX_NAME || disk.size_bytes > MAX_SIZE {
            return Err("a disk is described in a way that cannot be".to_owned());
        }
        if disks[..number].iter().any(|other| other.name == disk.name) {
            return Err(format!("two disks are called {}", disk.name));
        }
    }
    Ok(())
}
