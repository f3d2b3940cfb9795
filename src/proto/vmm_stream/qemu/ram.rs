//! The body of QEMU's RAM section, version 4 (`migration/ram.c`): the block list in START, then records until EOS.
//!
//! ```text
//! record: u64 = address | flags, then by flag
//!   0x002 ZERO      [u8 n, name[n] unless CONTINUE], u8 fill          fill is 0; nothing else is sent today
//!   0x004 MEM_SIZE  block list, only at the start of START; address = sum of the lengths
//!   0x008 PAGE      [name], 4096 bytes
//!   0x010 EOS       end of this section's body
//!   0x020 CONTINUE  modifier: same block as the page record before
//!   0x040 XBZRLE    [name], u8 1, u16 len, len bytes
//!   0x100 COMPRESS  [name], u32 len, len bytes                        QEMU up to 9.0
//!   0x200 FLUSH     multifd synchronisation, nothing follows          QEMU 8.1 and newer
//! block list: {u8 n, name[n], u64 length, [u64 page size], [u64 guest address]} until the lengths give the sum
//! ```
//!
//! Whether the two optional words are there depends on the capabilities of the migration, which the stream does not state.
//! It can be told apart all the same: a name has at least one byte while those words start with a zero byte, and behind the
//! last block a word without flags is one of them, because no record is without flags.

use super::super::{
    FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO, LostTrackReason, MAX_BLOCK_NAME, MAX_BLOCKS, Output, PAGE_BITS, PageRecord,
    RamBlock, Read, Record, StreamEvent, WORD,
};
use super::element::{be16, be32, be64};
use crate::proto::page::{PAGE_SIZE, PageAddress};

/// The section's name and the only version there is.
pub(crate) const SECTION_NAME: &[u8] = b"ram";
pub(crate) const SECTION_VERSION: u32 = 4;

pub(crate) const FLAG_MASK: u64 = PAGE_SIZE as u64 - 1;
pub(crate) const FLAG_MEM_SIZE: u64 = 0x004;
pub(crate) const FLAG_EOS: u64 = 0x010;
const FLAG_XBZRLE: u64 = 0x040;
const FLAG_COMPRESS: u64 = 0x100;
pub(super) const FLAG_FLUSH: u64 = 0x200;

/// Most bytes of a compressed page: zlib's `compressBound(4096)`, which is what QEMU's destination accepts.
const MAX_COMPRESSED: u32 = 4110;

/// Optional words behind a block: page size and guest address.
const MAX_BLOCK_WORDS: u8 = 2;

/// What the parser knows of the guest's RAM.
#[derive(Debug, Default)]
pub(super) struct Ram {
    blocks: Vec<RamBlock>,
    /// Numbers of the blocks in the order of their names.
    by_name: Vec<u16>,
    /// Pages of the largest block.
    most_pages: u64,
    /// Block of the last page record, which CONTINUE refers to. `None` before the first and where track was lost.
    current: Option<u16>,
    /// Last page of the pass that goes on; see [`StreamEvent::RoundEnd`].
    last: Option<PageAddress>,
}

/// A RAM record and what to do about it. `len` is in bytes and covers the whole record, for `Counted` its fixed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RamRecord {
    Page {
        record: PageRecord,
        len: usize,
    },
    Zero {
        record: PageRecord,
        len: usize,
    },
    /// A page in a form that has no canonical header, or whose block is unknown since track was lost.
    Odd {
        block: Option<u16>,
        len: usize,
    },
    /// `body` bytes follow that are not to be looked at.
    Counted {
        block: Option<u16>,
        len: usize,
        body: u64,
    },
    Flush,
    Eos,
}

/// Why [`Ram::records`] stopped.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// The rest is not a whole record yet.
    More,
    Eos,
    Flush,
    /// As many bytes follow that are not to be looked at.
    Skip(u64),
    Lost(LostTrackReason),
}

/// Where in the block list the parser is.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockList {
    /// Bytes of RAM that the blocks to come must sum up to.
    left: u64,
    /// Optional words that the last block has so far.
    words: u8,
}

/// One step through the block list.
#[derive(Debug)]
pub(super) enum ListStep {
    /// So many bytes belong to the list, which goes on.
    Took(usize, BlockList),
    Complete,
}

impl Ram {
    pub(super) fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Forgets where in RAM the stream is, as is due after bytes that were not understood.
    pub(super) fn lose_place(&mut self) {
        self.current = None;
        self.last = None;
    }

    /// Starts a new pass without a page having come back.
    pub(super) fn start_round(&mut self) {
        self.last = None;
    }

    /// Reads the MEM_SIZE record in front of the block list. It has [`WORD`] bytes.
    pub(super) fn read_total(bytes: &[u8]) -> Read<BlockList> {
        let Some(word) = be64(bytes) else { return Read::More };
        let left = word & !FLAG_MASK;
        if word & FLAG_MASK != FLAG_MEM_SIZE || left == 0 {
            return Read::Not(LostTrackReason::BlockList);
        }
        Read::Is(BlockList { left, words: 0 })
    }

    /// Reads the next part of the block list.
    pub(super) fn read_list(&mut self, mut list: BlockList, bytes: &[u8]) -> Read<ListStep> {
        const NOT: LostTrackReason = LostTrackReason::BlockList;
        let Some(&n) = bytes.first() else { return Read::More };
        if list.left == 0 || (n == 0 && !self.blocks.is_empty()) {
            let Some(word) = be64(bytes) else { return Read::More };
            if list.left == 0 && word & FLAG_MASK != 0 {
                return if self.index() {
                    Read::Is(ListStep::Complete)
                } else {
                    Read::Not(NOT)
                };
            }
            list.words += 1;
            if list.words > MAX_BLOCK_WORDS {
                return Read::Not(NOT);
            }
            return Read::Is(ListStep::Took(WORD, list));
        }
        let end = 1 + usize::from(n);
        let Some(name) = bytes.get(1..end) else {
            return Read::More;
        };
        let Some(length) = be64(&bytes[end..]) else {
            return Read::More;
        };
        let Some(left) = list.left.checked_sub(length) else {
            return Read::Not(NOT);
        };
        if n == 0 || self.blocks.len() == MAX_BLOCKS {
            return Read::Not(NOT);
        }
        self.blocks.push(RamBlock {
            name: name.to_vec(),
            length,
        });
        Read::Is(ListStep::Took(end + WORD, BlockList { left, words: 0 }))
    }

    /// Closes the block list; false where two blocks have one name.
    fn index(&mut self) -> bool {
        let blocks = &self.blocks;
        self.by_name = (0..blocks.len() as u16).collect();
        self.by_name.sort_by_key(|&block| &blocks[usize::from(block)].name);
        self.most_pages = blocks.iter().map(pages).max().unwrap_or(0);
        self.by_name
            .windows(2)
            .all(|pair| blocks[usize::from(pair[0])].name != blocks[usize::from(pair[1])].name)
    }

    /// Marks the records at the start of `bytes`, up to the first that needs the caller. Returns the bytes marked.
    ///
    /// `offset` is the place of `bytes` in the stream.
    pub(super) fn records(&mut self, bytes: &[u8], offset: u64, out: &mut Output<'_>) -> (usize, Pause) {
        let mut at = 0;
        loop {
            at += self.continued_pages(&bytes[at..], offset + at as u64, out);
            let found = match self.read(&bytes[at..]) {
                Read::Is(found) => found,
                Read::More => return (at, Pause::More),
                Read::Not(reason) => return (at, Pause::Lost(reason)),
            };
            match found {
                RamRecord::Page { record, len } => {
                    self.visit(record.at, offset + at as u64, out);
                    out.records.push(Record::Page(record));
                    at += len;
                }
                RamRecord::Zero { record, len } => {
                    self.visit(record.at, offset + at as u64, out);
                    out.records.push(Record::Zero(record));
                    at += len;
                }
                RamRecord::Odd { block, len } => {
                    self.current = block;
                    out.bytes(len);
                    at += len;
                }
                RamRecord::Counted { block, len, body } => {
                    self.current = block;
                    out.bytes(len);
                    return (at + len, Pause::Skip(body));
                }
                RamRecord::Flush => {
                    out.bytes(WORD);
                    return (at + WORD, Pause::Flush);
                }
                RamRecord::Eos => {
                    out.bytes(WORD);
                    return (at + WORD, Pause::Eos);
                }
            }
        }
    }

    /// Marks the run of canonical pages that continue the block of the page before: nearly every record of a stream, and
    /// worth a loop of its own (zero pages, 9 bytes each: 7 times as fast). Stops at whatever else comes. Returns the bytes
    /// marked.
    fn continued_pages(&mut self, bytes: &[u8], offset: u64, out: &mut Output<'_>) -> usize {
        const PAGE: u64 = FLAG_PAGE | FLAG_CONTINUE;
        const ZERO: u64 = FLAG_ZERO | FLAG_CONTINUE;
        let (Some(block), Some(last)) = (self.current, self.last) else {
            return 0;
        };
        if last.block != block {
            return 0;
        }
        let pages = pages(&self.blocks[usize::from(block)]);
        let mut last = last.page;
        let mut at = 0;
        while let Some(word) = be64(&bytes[at..]) {
            let page = word >> PAGE_BITS;
            if page >= pages {
                break;
            }
            let record = PageRecord {
                at: PageAddress { block, page },
                continues: true,
            };
            let (record, len) = match word & FLAG_MASK {
                PAGE if bytes.len() - at >= WORD + PAGE_SIZE => (Record::Page(record), WORD + PAGE_SIZE),
                ZERO if bytes.get(at + WORD) == Some(&0) => (Record::Zero(record), WORD + 1),
                _ => break,
            };
            if page <= last {
                out.events.push(StreamEvent::RoundEnd {
                    offset: offset + at as u64,
                });
            }
            last = page;
            out.records.push(record);
            at += len;
        }
        self.last = Some(PageAddress { block, page: last });
        at
    }

    /// Marks one record as bytes, because nobody is sure yet that it is one. Returns the bytes marked.
    pub(super) fn unsure_record(&mut self, bytes: &[u8], out: &mut Output<'_>) -> (usize, Pause) {
        let (len, pause) = match self.read(bytes) {
            Read::Is(RamRecord::Page { record, len } | RamRecord::Zero { record, len }) => {
                self.current = Some(record.at.block);
                (len, Pause::More)
            }
            Read::Is(RamRecord::Odd { block, len }) => {
                self.current = block;
                (len, Pause::More)
            }
            Read::Is(RamRecord::Counted { block, len, body }) => {
                self.current = block;
                (len, Pause::Skip(body))
            }
            Read::Is(RamRecord::Flush) => (WORD, Pause::Flush),
            Read::Is(RamRecord::Eos) => (WORD, Pause::Eos),
            Read::More => (0, Pause::More),
            Read::Not(reason) => (0, Pause::Lost(reason)),
        };
        out.bytes(len);
        (len, pause)
    }

    /// Notes that the stream is at a page, and a new round where RAM starts over.
    #[inline]
    fn visit(&mut self, at: PageAddress, offset: u64, out: &mut Output<'_>) {
        self.current = Some(at.block);
        if self.last.is_some_and(|last| at <= last) {
            out.events.push(StreamEvent::RoundEnd { offset });
        }
        self.last = Some(at);
    }

    /// Whether `bytes` start as a RAM record does, judged by its header alone (at most 264 bytes).
    pub(super) fn starts_record(&self, bytes: &[u8]) -> Read<()> {
        match self.read_header(bytes) {
            Read::Is(_) => Read::Is(()),
            Read::More => Read::More,
            Read::Not(reason) => Read::Not(reason),
        }
    }

    /// Reads a whole record.
    #[inline]
    fn read(&self, bytes: &[u8]) -> Read<RamRecord> {
        let Header {
            flag,
            record,
            block,
            len: header,
        } = match self.read_header(bytes) {
            Read::Is(found) => found,
            Read::More => return Read::More,
            Read::Not(reason) => return Read::Not(reason),
        };
        let body = &bytes[header..];
        match flag {
            FLAG_PAGE => {
                let len = header + PAGE_SIZE;
                if body.len() < PAGE_SIZE {
                    return Read::More;
                }
                Read::Is(match block {
                    Some(_) => RamRecord::Page { record, len },
                    None => RamRecord::Odd { block, len },
                })
            }
            FLAG_ZERO => {
                let len = header + 1;
                match (body.first(), block) {
                    (None, _) => Read::More,
                    (Some(0), Some(_)) => Read::Is(RamRecord::Zero { record, len }),
                    (Some(_), _) => Read::Is(RamRecord::Odd { block, len }),
                }
            }
            FLAG_XBZRLE => {
                let (Some(&encoding), Some(len)) = (body.first(), be16(body, 1)) else {
                    return Read::More;
                };
                if encoding != 1 || usize::from(len) > PAGE_SIZE {
                    return Read::Not(LostTrackReason::RamRecord);
                }
                Read::Is(RamRecord::Counted {
                    block,
                    len: header + 3,
                    body: u64::from(len),
                })
            }
            FLAG_COMPRESS => {
                let Some(len) = be32(body, 0) else { return Read::More };
                if len > MAX_COMPRESSED {
                    return Read::Not(LostTrackReason::RamRecord);
                }
                Read::Is(RamRecord::Counted {
                    block,
                    len: header + 4,
                    body: u64::from(len),
                })
            }
            FLAG_FLUSH => Read::Is(RamRecord::Flush),
            _ => Read::Is(RamRecord::Eos),
        }
    }

    /// Reads the word at the start of a record and the name behind it, and checks both against the block list.
    #[inline]
    fn read_header(&self, bytes: &[u8]) -> Read<Header> {
        let Some(word) = be64(bytes) else { return Read::More };
        let page = word >> PAGE_BITS;
        let flag = word & FLAG_MASK & !FLAG_CONTINUE;
        let continues = word & FLAG_CONTINUE != 0;
        let (block, len) = match flag {
            FLAG_PAGE | FLAG_ZERO | FLAG_XBZRLE | FLAG_COMPRESS if continues => (self.current, WORD),
            FLAG_PAGE | FLAG_ZERO | FLAG_XBZRLE | FLAG_COMPRESS => match self.read_name(&bytes[WORD..]) {
                Read::Is((block, len)) => (Some(block), WORD + len),
                Read::More => return Read::More,
                Read::Not(reason) => return Read::Not(reason),
            },
            FLAG_EOS | FLAG_FLUSH if word == flag => {
                let at = PageAddress { block: 0, page };
                return Read::Is(Header {
                    flag,
                    record: PageRecord { at, continues },
                    block: None,
                    len: WORD,
                });
            }
            _ => return Read::Not(LostTrackReason::RamRecord),
        };
        let most_pages = block.map_or(self.most_pages, |block| pages(&self.blocks[usize::from(block)]));
        if page >= most_pages {
            return Read::Not(LostTrackReason::OutsideBlock);
        }
        let at = PageAddress {
            block: block.unwrap_or(0),
            page,
        };
        Read::Is(Header {
            flag,
            record: PageRecord { at, continues },
            block,
            len,
        })
    }

    /// The block that a length-prefixed name names, and the bytes that the name takes.
    fn read_name(&self, bytes: &[u8]) -> Read<(u16, usize)> {
        const _: () = assert!(MAX_BLOCK_NAME == u8::MAX as usize);
        let Some(&n) = bytes.first() else { return Read::More };
        let len = 1 + usize::from(n);
        let Some(name) = bytes.get(1..len) else {
            return Read::More;
        };
        match self.block(name) {
            Some(block) => Read::Is((block, len)),
            None => Read::Not(LostTrackReason::UnknownBlock),
        }
    }

    /// The block of a name, once the list is complete.
    pub(super) fn block(&self, name: &[u8]) -> Option<u16> {
        self.by_name
            .binary_search_by(|&block| self.blocks[usize::from(block)].name.as_slice().cmp(name))
            .ok()
            .map(|place| self.by_name[place])
    }

    /// Pages of a listed block.
    pub(super) fn pages_of(&self, block: u16) -> u64 {
        pages(&self.blocks[usize::from(block)])
    }
}

/// The start of a record. `record.at.block` is meaningless where `block` is `None`.
struct Header {
    flag: u64,
    record: PageRecord,
    block: Option<u16>,
    len: usize,
}

/// Pages of a block; its last may be in part.
#[inline]
fn pages(block: &RamBlock) -> u64 {
    block.length.div_ceil(PAGE_SIZE as u64)
}
