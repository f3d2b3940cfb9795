//! The client of NBD exports against real QEMUs: disks without a guest, and the steps by which a disk is pulled.
//!
//! ```text
//! exports.rs   what is asked of an export, and what comes of it
//! rounds.rs    bitmaps, and the moments of a migration at which a disk is read or written
//! failures.rs  disks, servers and connections that fail
//! ```
//!
//! Needs qemu-system-x86 (7.2 or later); `LONGHAUL_TEST_QEMU` names another binary. 7.2 has structured replies, 8.2 and later
//! extended headers.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod exports;
mod failures;
mod qemu;
#[path = "../common/qemu_under_test.rs"]
mod qemu_under_test;
mod rounds;

use std::ops::Range;

use bytes::Bytes;
use longhaul::hypervisor::nbd::NbdClient;
use longhaul::proto::disk::extents::Extents;

/// Ends the test early where there is no QEMU.
macro_rules! qemu_or_return {
    () => {
        match crate::qemu_under_test::qemu() {
            Some(program) => program,
            None => return,
        }
    };
}
pub(crate) use qemu_or_return;

/// Bytes that are neither zero nor all the same.
pub(crate) fn pattern(length: u64, seed: u8) -> Bytes {
    (0..length).map(|at| (at % 251) as u8 ^ seed | 1).collect()
}

pub(crate) async fn write(client: &NbdClient, range: Range<u64>, seed: u8) {
    let data = pattern(range.end - range.start, seed);
    client.write(range.start, data).await.unwrap();
}

/// What the first context says.
pub(crate) async fn status<S: Copy + PartialEq>(client: &NbdClient, state: impl FnMut(u64) -> S) -> Extents<S> {
    let size = client.export().size_bytes;
    client.block_status(0..size).await.unwrap()[0].map(state)
}

/// Those of `state`.
pub(crate) fn ranges<S: Copy + PartialEq>(extents: &Extents<S>, state: S) -> Vec<Range<u64>> {
    let of_it = extents.iter().filter(|extent| extent.state == state);
    of_it.map(|extent| extent.start..extent.end).collect()
}
