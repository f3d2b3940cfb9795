//! A guest as one stream: QEMU's framing and its RAM section, so that whatever carries a QEMU's guest carries this one.
//!
//! ```text
//! FileHeader, Configuration "longhaul-kvm"
//! START ram: block list      PART ram: page records      …      END ram: page records
//! FULL longhaul-kvm: u64 n, KVM's state[n], u64 m, the VMM's devices[m]
//! EOF, DESCRIPTION
//! ```
//!
//! The pictures of the parts are in [`element`](crate::proto::vmm_stream::qemu::element) and [`ram`](crate::proto::vmm_stream::qemu::ram). Pages may come in
//! any order and any number of times: the last one counts.

mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub(super) use reader::{Reader, StreamError};
pub(super) use writer::Writer;

/// What stands in the configuration in the place of a machine type.
const MACHINE: &[u8] = b"longhaul-kvm";

/// The section of what is not memory, and its version.
const STATE_SECTION: &[u8] = b"longhaul-kvm";
const STATE_VERSION: u32 = 1;

/// Numbers of the two sections.
const RAM_ID: u32 = 0;
const STATE_ID: u32 = 1;

/// Ends the stream as QEMU's does. There is nothing in it to be read: a gateway finds by it where the stream ends.
const DESCRIPTION: &[u8] = br#"{"page_size": 4096, "devices": []}"#;

/// Most bytes of either state: 1024 vCPUs have some 32 MiB.
const STATE_LIMIT: u64 = 64 << 20;
