//! Stage 1: a hypervisor's byte stream as records.
//!
//! ```text
//! bytes of any slicing → QemuParser or Chunker → Record, Record, …     (source)
//! Record → write_page_header + content, or the bytes as they were → the same bytes     (destination, no parser there)
//! ```
//!
//! Advisory: the parser only marks where pages are. Bytes always pass exactly; where the parser loses its way the ratio
//! suffers, never correctness, because QEMU's device sections carry no length and a stream cannot be delimited from the
//! wire alone. Nothing that follows from a record or an event may be relied on for who owns the VM.
//!
//! `qemu` is the parser of QEMU's format, `opaque` is for any other stream. The format of a page record is here, because both ends need it.

pub mod opaque;
pub mod qemu;
#[cfg(test)]
mod tests;

use super::page::{PAGE_SIZE, PageAddress};

/// A parsed unit of a vmm stream. Records cover the stream without gap or overlap: concatenating [`Record::stream_len`]
/// bytes each gives back the bytes that went in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// `len` bytes that are carried as they are: headers, device state, whatever is not a page.
    Bytes {
        /// Length in the stream.
        len: usize,
    },
    /// A page record with its canonical header and [`PAGE_SIZE`] bytes of content.
    Page(PageRecord),
    /// A zero-page record: canonical header, one zero byte.
    Zero(PageRecord),
    /// `len` bytes that may come again, at most [`PAGE_SIZE`]: a chunk that its content ends.
    Chunk {
        /// Length in the stream.
        len: usize,
    },
}

impl Record {
    /// Bytes that the record covers in the stream.
    ///
    /// `blocks` is the list that the record's parser gives ([`qemu::QemuParser::blocks`]). The name of a block that is not
    /// in it counts as empty; the parser makes no such record.
    #[must_use]
    pub fn stream_len(&self, blocks: &[RamBlock]) -> usize {
        let (record, kind) = match self {
            Self::Bytes { len } | Self::Chunk { len } => return *len,
            Self::Page(record) => (record, PageKind::Page),
            Self::Zero(record) => (record, PageKind::Zero),
        };
        let name = blocks
            .get(usize::from(record.at.block))
            .map_or(&[][..], |block| &block.name);
        kind.record_len(*record, name)
    }
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

/// What follows the header of a page record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// The content of the page: [`Record::Page`].
    Page,
    /// One zero byte: [`Record::Zero`].
    Zero,
}

impl PageKind {
    /// Bytes of a whole record: the header that [`write_page_header`] writes for a name of at most [`MAX_BLOCK_NAME`] bytes,
    /// and what follows it.
    #[must_use]
    #[inline]
    pub fn record_len(self, record: PageRecord, block_name: &[u8]) -> usize {
        let name = if record.continues { 0 } else { 1 + block_name.len() };
        let content = match self {
            Self::Page => PAGE_SIZE,
            Self::Zero => 1,
        };
        WORD + name + content
    }
}

/// Appends the canonical header of a page record to `out`: what stands in the stream before the content of a
/// [`Record::Page`], or before the zero byte of a [`Record::Zero`].
///
/// ```text
/// u64 (big-endian) address in the block | flags        flags: 0x08 page or 0x02 zero; 0x20 where the record continues
/// u8 n, name[n]                                        only where it does not continue
/// ```
///
/// `block_name` is the name of block `record.at.block` and is ignored where the record continues. The format has room for
/// [`MAX_BLOCK_NAME`] bytes: a longer name is cut off, and page bits beyond 2^52 are dropped. A parser makes neither; from
/// a peer that does, the stream comes out different and its digest tells.
#[inline]
pub fn write_page_header(record: PageRecord, kind: PageKind, block_name: &[u8], out: &mut Vec<u8>) {
    let flags = match kind {
        PageKind::Page => FLAG_PAGE,
        PageKind::Zero => FLAG_ZERO,
    };
    let address = record.at.page << PAGE_BITS;
    if record.continues {
        out.extend_from_slice(&(address | flags | FLAG_CONTINUE).to_be_bytes());
        return;
    }
    let name = &block_name[..block_name.len().min(MAX_BLOCK_NAME)];
    out.extend_from_slice(&(address | flags).to_be_bytes());
    out.push(name.len() as u8);
    out.extend_from_slice(name);
}

/// A block of guest RAM as the stream lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's `idstr`, 1 to [`MAX_BLOCK_NAME`] bytes, e.g. `pc.ram`.
    pub name: Vec<u8>,
    /// Bytes of the block that take part in the migration (`used_length`).
    pub length: u64,
}

/// What a parser learns about the stream beside its records. Offsets count bytes from the start of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// The machine type with its version, e.g. `pc-q35-10.0`: printable ASCII, at most 255 bytes.
    Machine(String),
    /// The block list, complete. At most once in a stream, and before the first record that names a page.
    RamBlocks(Vec<RamBlock>),
    /// A pass over RAM ended before `offset`: from here on, pages come that were sent before. The stream does not say so
    /// itself; QEMU walks RAM in ascending order, so a page that is not behind its predecessor starts a new pass. With
    /// multifd, where pages are on other channels, it is the flush record of a PART section (QEMU 8.1 and newer); in what
    /// is merged of them it means nothing. Within a pass a page comes at most once.
    RoundEnd {
        /// Start of the first record of the new pass, or end of the flush record.
        offset: u64,
    },
    /// The END section of RAM is over: no page follows, what does is device state.
    DeviceState {
        /// First byte of device state.
        offset: u64,
    },
    /// The stream contradicted what the parser knew, or went on in a way that it does not understand. Bytes pass as
    /// [`Record::Bytes`] until [`StreamEvent::Regained`], if that ever comes. The body of a section that states no length is
    /// no contradiction and makes no event.
    LostTrack {
        /// Where the parser gave up.
        offset: u64,
        /// What it met.
        reason: LostTrackReason,
    },
    /// The parser is sure again where it is: the place where it picked up the thread was confirmed by what followed.
    Regained {
        /// From here on pages are marked again.
        offset: u64,
    },
    /// The stream's EOF byte. Found by walking the device sections from footer to footer, or by the description where the
    /// machine goes without footers; not found where it goes without both. A guest can influence the content of those
    /// sections: good for progress and estimates, not a fact to rest safety on.
    StreamEof {
        /// Position of the EOF byte.
        offset: u64,
    },
    /// The JSON description of the device state that follows EOF, unless the machine suppresses it. The stream ends with it.
    Description {
        /// First byte of the JSON.
        offset: u64,
        /// Its stated length in bytes.
        len: u32,
    },
}

/// Why a parser no longer knows where it is in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LostTrackReason {
    /// Not `QEVM` version 3: another hypervisor, a multifd channel, or no migration at all.
    #[error("the stream does not start as a QEMU migration stream does")]
    NotQemu,
    /// The configuration section has a name or a subsection that is not known.
    #[error("the configuration section is not understood")]
    Configuration,
    /// The guest's page size is not [`PAGE_SIZE`].
    #[error("the guest's page size is not 4 KiB")]
    TargetPageSize,
    /// No section, command or end of the stream where one has to be.
    #[error("a section header was expected and something else came")]
    Element,
    /// The RAM section has another version than 4, or comes twice.
    #[error("the RAM section has an unknown version or came twice")]
    RamSection,
    /// The block list contradicts itself, or has more than [`MAX_BLOCKS`] entries.
    #[error("the list of RAM blocks contradicts itself or is too long")]
    BlockList,
    /// A RAM record with unknown flags or impossible fields.
    #[error("a RAM record is not understood")]
    RamRecord,
    /// A page record of a block that is not listed.
    #[error("a page belongs to a RAM block that was not listed")]
    UnknownBlock,
    /// A page record whose address is not in its block.
    #[error("a page lies outside its RAM block")]
    OutsideBlock,
    /// A section footer names another section.
    #[error("a section footer does not match its section")]
    Footer,
}

/// Longest name of a RAM block, in bytes: the length is one byte on the wire.
pub const MAX_BLOCK_NAME: usize = 255;

/// Most RAM blocks that a parser keeps track of. A guest has a few dozen (one per memory device and option ROM, of which
/// QEMU allows 256 and a few); with names of full length this bounds the list at 300 KiB.
pub const MAX_BLOCKS: usize = 1024;

/// Bytes of the word that starts every RAM record: an address, its low bits flags.
const WORD: usize = 8;
pub(crate) const PAGE_BITS: u32 = PAGE_SIZE.trailing_zeros();
pub(crate) const FLAG_ZERO: u64 = 0x002;
pub(crate) const FLAG_PAGE: u64 = 0x008;
pub(crate) const FLAG_CONTINUE: u64 = 0x020;

/// Where a parser puts what it finds.
struct Output<'a> {
    records: &'a mut Vec<Record>,
    /// Records before this one were there before; they are not merged into.
    first: usize,
    events: &'a mut Vec<StreamEvent>,
}

impl<'a> Output<'a> {
    fn new(records: &'a mut Vec<Record>, events: &'a mut Vec<StreamEvent>) -> Self {
        Self {
            first: records.len(),
            records,
            events,
        }
    }

    /// `len` bytes as they are, merged with the bytes before them.
    fn bytes(&mut self, len: usize) {
        if len == 0 {
            return;
        }
        if self.records.len() > self.first
            && let Some(Record::Bytes { len: before }) = self.records.last_mut()
        {
            *before += len;
            return;
        }
        self.records.push(Record::Bytes { len });
    }
}

/// What an attempt to read something from the start of a slice gives.
#[derive(Debug, PartialEq, Eq)]
enum Read<T> {
    Is(T),
    /// The slice ends too early to tell.
    More,
    Not(LostTrackReason),
}
