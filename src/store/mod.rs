//! What outlives the process.

pub mod fingerprint;
pub mod journal;
pub mod spill;
pub mod trust;
