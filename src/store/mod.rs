//! What a gateway keeps on disk.

pub mod journal;
