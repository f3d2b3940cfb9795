//! The pure core: no socket, file, clock, thread or random source.
#![warn(missing_docs)]

pub mod ownership;
pub mod page;
pub mod precopy;
pub mod rate;
pub mod reduce;
pub mod session;
pub mod vmm_stream;
pub mod wire;
