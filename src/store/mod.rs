//! What outlives the process.

pub mod fingerprint;
pub mod trust;
