//! What a gateway keeps on disk.

pub(crate) mod file;
pub mod fingerprint;
pub mod journal;
pub mod pages;
mod seal;
pub mod spill;
pub mod trust;
