//! The canonical header of a QEMU page record (`migration/ram.c`, version 4 of the `ram` section).
//!
//! ```text
//! u64 BE  address in the block | flags        0x02 zero, 0x08 page, 0x20 continue
//! u8 n, name[n]                               absent with the continue flag
//! then 4096 bytes of content, or one zero byte
//! ```

use crate::proto::page::PAGE_SIZE;
use crate::proto::vmm_stream::PageRecord;

/// What follows a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageKind {
    /// [`PAGE_SIZE`] bytes of content.
    Page,
    /// One zero byte.
    Zero,
}

impl PageKind {
    /// Bytes after the header.
    pub(super) fn body_len(self) -> usize {
        match self {
            Self::Page => PAGE_SIZE,
            Self::Zero => 1,
        }
    }
}

/// Page numbers below this have an address that fits the header.
pub(super) const PAGE_NUMBER_LIMIT: u64 = 1 << 52;

/// Longest block name: its length is one byte.
pub(super) const MAX_BLOCK_NAME: usize = 255;

/// Appends the header of `record` in the block called `name`, which is not written when the record continues its block.
pub(super) fn write_page_header(record: PageRecord, kind: PageKind, name: &[u8], out: &mut Vec<u8>) {
    let mut word = record.at.page * PAGE_SIZE as u64;
    word |= match kind {
        PageKind::Page => 0x08,
        PageKind::Zero => 0x02,
    };
    if record.continues {
        word |= 0x20;
    }
    out.extend_from_slice(&word.to_be_bytes());
    if !record.continues {
        out.push(name.len() as u8);
        out.extend_from_slice(name);
    }
}

/// Length of what [`write_page_header`] appends.
pub(super) fn page_header_len(record: PageRecord, name: &[u8]) -> usize {
    if record.continues { 8 } else { 9 + name.len() }
}
