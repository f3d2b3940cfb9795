//! The pure core: no runtime, socket, file, clock, thread or random source (`tests/purity.rs`).
//!
//! ```text
//! page         nouns that all stages share: pages and where they live, digests, ids, byte rates
//! vmm_stream   1  a hypervisor's bytes → records; marks pages, never alters a byte
//! reduce       2  records → payloads, and back to the exact bytes
//! wire         3  payloads → frames; control messages, hello, limits
//! session      4  frames in order across lanes and cuts; the stages in a row, for each end
//!
//! ownership    who may run the VM: two state machines and their journal records
//! disk         what of a disk has to be copied: extents, and QEMU's exports of it (NBD)
//! precopy      when to switch over: rounds, estimates, forecast, policy
//! rate         how fast: link controller, probe controller, token bucket
//! ```
//!
//! The last four are beside the path of the data. Time comes in as `now`, randomness as what was drawn; so everything here is
//! tested in virtual time and with printed seeds.
#![warn(missing_docs)]

pub mod disk;
pub mod ownership;
pub mod page;
pub mod precopy;
pub mod rate;
pub mod reduce;
pub mod session;
pub mod vmm_stream;
pub mod wire;
