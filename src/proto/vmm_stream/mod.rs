//! Stage 1: a hypervisor's byte stream as records.
//!
//! Advisory: the parser only marks where pages are. Bytes always pass exactly; where the parser loses its way the ratio
//! suffers, never correctness, because QEMU's device sections carry no length and a stream cannot be delimited from the
//! wire alone.

use super::page::PageAddress;

/// A parsed unit of a vmm stream. Records cover the stream without gap or overlap: concatenating [`Record::stream_len`]
/// bytes each gives back the bytes that went in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// `len` bytes that are carried as they are: headers, device state, whatever is not a page.
    Bytes {
        /// Length in the stream.
        len: usize,
    },
    /// A page record with its canonical header and [`super::page::PAGE_SIZE`] bytes of content.
    Page(PageRecord),
    /// A zero-page record: canonical header, one zero byte.
    Zero(PageRecord),
}

/// Header of a page record. The header's bytes are a function of this, of the block's name and of nothing else; a record
/// whose header is anything but canonical is [`Record::Bytes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord {
    /// The page.
    pub at: PageAddress,
    /// Whether the header says CONTINUE (same block as the page record before) and so carries no block name.
    pub continues: bool,
}
