//! How far a journal has come, written on the file itself and not into it.
//!
//! Whoever copies an old journal over the file (`cp backup journal`) replaces its content and leaves the file: it has the same inode, and is
//! as old as before. Its extended attributes stay too. So the journal's name and the number of its next record stand in one of them, which is set
//! after the record is on disk: the content is never behind its mark, whatever crashes, unless somebody has put an older one there.

use std::fs::File;

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};

use crate::proto::page::JournalId;

const NAME: &str = "user.longhaul.journal";

/// The journal's name and a sequence number, 8 bytes, little-endian.
const BYTES: usize = 16 + 8;

/// Marks that the records before `next_sequence` are on disk.
///
/// A file system may have no such attributes, or no room for this one. The mark is then missing or older, which is no lie.
pub(super) fn set(file: &File, id: JournalId, next_sequence: u64) {
    let mut value = [0; BYTES];
    value[..16].copy_from_slice(&id.0);
    value[16..].copy_from_slice(&next_sequence.to_le_bytes());
    if let Err(error) = fsetxattr(file, NAME, &value, XattrFlags::empty()) {
        tracing::debug!(%error, "the journal's file cannot be marked; an older content that is copied over it will not be noticed");
    }
}

/// Whether the file has held more than the journal `id` up to the record before `next_sequence`, or another journal.
pub(super) fn is_ahead(file: &File, id: JournalId, next_sequence: u64) -> bool {
    let mut value = [0; BYTES];
    match fgetxattr(file, NAME, &mut value) {
        Ok(BYTES) => {
            let (name, marked) = value.split_at(16);
            let marked = u64::from_le_bytes(marked.try_into().expect("eight bytes are left"));
            name != id.0 || marked > next_sequence
        }
        _ => false,
    }
}
