//! Disks: what of one has to be copied, and the words in which QEMU is asked for it.
//!
//! ```text
//! extents.rs   a range of a disk in runs of one state: allocated or not, dirty or not, and what follows from both
//! held.rs      what the destination's disks hold already, told to the source: it need not come again
//! nbd/         a client of the NBD protocol: bytes in; answers and bytes to send out
//! stream.rs    all disks of a VM as one stream of bytes, from where they are read to where they are written
//! ```
//!
//! A disk is pulled like memory: a dirty bitmap in QEMU collects what the guest writes, a read-only export of the live node tells
//! the bitmap and the bytes. The destination's QEMU writes through an export of its own, so that formats and locks stay its business.
//! Nothing here knows of rounds or of a link.

pub mod extents;
pub mod held;
pub mod nbd;
pub mod stream;
