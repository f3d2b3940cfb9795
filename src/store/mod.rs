//! What outlives the process.

pub mod fingerprint;
pub mod spill;
pub mod trust;
