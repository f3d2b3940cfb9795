//! The ops of a payload: what the stream is made of, in order.
//!
//! ```text
//! op                      high four bits of its first byte; the low four are its flags
//!  0 zero records         pages
//!  1 same                 pages, each identical to what was last sent for it, zeroes aside
//!  2 reference            pages, then varint slot: zigzag of its distance from the slot after the last reference's
//!  3                      kept: reference by digest
//!  4 delta                pages, each what changed in its previous version (`delta.rs`); edits from the groups
//!  5 delta                the same, edits from plain
//!  6 literal              pages, content from the groups
//!  7 raw                  pages, content from plain
//!  8 bytes                varint len; from the groups, or with flag 1 from plain
//!  9 chunk reference       varint slot: zigzag of its distance from the slot after the last reference's; varint len, 1 to 4096: the first bytes
//!                         of what the slot holds
//! 10 blank                page records with content that is all zeroes
//! 11 block                varint number: the block of what follows, from its page 0 on; with flag 1 then u8 n, name[n]: its name from now on
//! 12 delta                pages, each with its previous version as dictionary: varint n, lz4 block[n] from plain
//! 13 chunk                 varint len, 1 to 4096; from the groups, or with flag 1 from plain: takes the next slot, filled up with zeroes
//! 14, 15                  kept
//!
//! pages: a run of adjacent pages (and of adjacent slots)
//!  flag 8                 the first record carries the block's name; all others continue
//!  flag 2 or 4            varint: how far the first page is after (2) or before (4) the page after the last run, less 1;
//!                         with neither flag it is that page; never both
//!  flag 1                 varint: length of the run, less 2; otherwise one page
//!                         the operands come in this order
//! ```
//!
//! So a page that is sent again unchanged takes one byte and its distance: 3 bytes up to 64 MiB, 4 up to 8 GiB. A payload
//! starts with no block, page 0 and slot 0; the names of blocks and the dictionary last beyond it.

use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::vmm_stream::PageRecord;

use super::payload::PayloadError;
use super::{MAX_BATCH_RECORDS, varint};

/// Block numbers are below this. QEMU guests have some tens.
pub(super) const BLOCK_LIMIT: u16 = 1024;

/// Page numbers are below this: their address fits the header of a page record.
pub(super) const PAGE_NUMBER_LIMIT: u64 = 1 << 52;

/// How the pages of a run are carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageOp {
    Zero,
    Same,
    Reference,
    /// Edits in the groups.
    Delta,
    /// Edits beside the groups.
    PlainDelta,
    /// Compressed with its previous version as dictionary.
    Similar,
    Literal,
    Raw,
    Blank,
}

impl PageOp {
    fn number(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Same => 1,
            Self::Reference => 2,
            Self::Delta => 4,
            Self::PlainDelta => 5,
            Self::Literal => 6,
            Self::Raw => 7,
            Self::Blank => 10,
            Self::Similar => 12,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Zero,
            1 => Self::Same,
            2 => Self::Reference,
            4 => Self::Delta,
            5 => Self::PlainDelta,
            6 => Self::Literal,
            7 => Self::Raw,
            10 => Self::Blank,
            12 => Self::Similar,
            _ => return None,
        })
    }
}

const OP_BYTES: u8 = 8;
const OP_CHUNK_REFERENCE: u8 = 9;
const OP_BLOCK: u8 = 11;
const OP_CHUNK: u8 = 13;

const NAMED: u8 = 8;
const BACK: u8 = 4;
const FORWARD: u8 = 2;
const RUN: u8 = 1;
const PLAIN: u8 = 1;
const DEFINE: u8 = 1;

/// Adjacent pages that are carried alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) op: PageOp,
    pub(super) first: PageRecord,
    /// At least one.
    pub(super) count: u64,
    /// Slot of the first page of a reference; zero for other ops.
    pub(super) slot: u32,
}

/// What an op says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Op<'a> {
    Pages(Run),
    Bytes { plain: bool, len: usize },
    Chunk { plain: bool, len: usize },
    ChunkReference { slot: u32, len: usize },
    Name { block: u16, name: &'a [u8] },
}

/// Where the last op left off. Both ends move it alike.
#[derive(Debug, Default)]
struct Cursor {
    block: Option<u16>,
    page: u64,
    slot: u32,
}

impl Cursor {
    fn advance(&mut self, run: &Run) {
        self.page = run.first.at.page + run.count;
        if run.op == PageOp::Reference {
            self.slot = run.slot.wrapping_add(run.count as u32);
        }
    }
}

/// Writes ops, joining neighbours into runs.
#[derive(Debug, Default)]
pub(super) struct OpWriter {
    ops: Vec<u8>,
    cursor: Cursor,
    open: Open,
}

/// What may still grow.
#[derive(Clone, Copy, Debug, Default)]
enum Open {
    #[default]
    Nothing,
    Pages(Run),
    Bytes {
        plain: bool,
        len: usize,
    },
}

impl OpWriter {
    /// The block that the next page is in, if that is said already.
    pub(super) fn block(&self) -> Option<u16> {
        self.cursor.block
    }

    /// Selects the block of the pages that follow, with its name where the destination does not know it yet.
    pub(super) fn select_block(&mut self, block: u16, name: Option<&[u8]>) {
        self.close();
        self.ops.push(OP_BLOCK << 4 | if name.is_some() { DEFINE } else { 0 });
        varint::write(block.into(), &mut self.ops);
        if let Some(name) = name {
            self.ops.push(name.len() as u8);
            self.ops.extend_from_slice(name);
        }
        self.cursor.block = Some(block);
        self.cursor.page = 0;
    }

    /// Adds a page of the selected block; `slot` is that of a reference, otherwise zero.
    pub(super) fn page(&mut self, op: PageOp, record: PageRecord, slot: u32) {
        if let Open::Pages(run) = &mut self.open
            && run.op == op
            && record.continues
            && record.at.page == run.first.at.page + run.count
            && (op != PageOp::Reference || u64::from(slot) == u64::from(run.slot) + run.count)
        {
            run.count += 1;
            return;
        }
        self.close();
        self.open = Open::Pages(Run {
            op,
            first: record,
            count: 1,
            slot,
        });
    }

    /// Adds bytes that are carried as they are.
    pub(super) fn bytes(&mut self, plain: bool, added: usize) {
        if let Open::Bytes { plain: open, len } = &mut self.open
            && *open == plain
        {
            *len += added;
            return;
        }
        self.close();
        self.open = Open::Bytes { plain, len: added };
    }

    /// Adds a chunk that takes the next slot.
    pub(super) fn chunk(&mut self, plain: bool, len: usize) {
        self.close();
        self.ops.push(OP_CHUNK << 4 | if plain { PLAIN } else { 0 });
        varint::write(len as u64, &mut self.ops);
    }

    /// Adds a chunk that a slot holds.
    pub(super) fn chunk_reference(&mut self, slot: u32, len: usize) {
        self.close();
        self.ops.push(OP_CHUNK_REFERENCE << 4);
        self.write_slot(slot);
        varint::write(len as u64, &mut self.ops);
        self.cursor.slot = slot.wrapping_add(1);
    }

    /// Ends the ops of the batch. Those of the next one take the memory of `spare`.
    pub(super) fn finish(&mut self, mut spare: Vec<u8>) -> Vec<u8> {
        self.close();
        self.cursor = Cursor::default();
        spare.clear();
        std::mem::replace(&mut self.ops, spare)
    }

    fn close(&mut self) {
        match std::mem::take(&mut self.open) {
            Open::Nothing => {}
            Open::Pages(run) => self.write_run(&run),
            Open::Bytes { plain, len } => {
                self.ops.push(OP_BYTES << 4 | if plain { PLAIN } else { 0 });
                varint::write(len as u64, &mut self.ops);
            }
        }
    }

    fn write_run(&mut self, run: &Run) {
        let mut first = run.op.number() << 4;
        if !run.first.continues {
            first |= NAMED;
        }
        if run.count > 1 {
            first |= RUN;
        }
        let page = run.first.at.page;
        let distance = page.abs_diff(self.cursor.page);
        if page != self.cursor.page {
            first |= if page > self.cursor.page { FORWARD } else { BACK };
        }
        self.ops.push(first);
        if distance > 0 {
            varint::write(distance - 1, &mut self.ops);
        }
        if run.count > 1 {
            varint::write(run.count - 2, &mut self.ops);
        }
        if run.op == PageOp::Reference {
            self.write_slot(run.slot);
        }
        self.cursor.advance(run);
    }

    fn write_slot(&mut self, slot: u32) {
        let distance = i64::from(slot) - i64::from(self.cursor.slot);
        varint::write(varint::zigzag(distance), &mut self.ops);
    }
}

/// Reads ops back, and refuses what an [`OpWriter`] cannot have written about lengths, counts and addresses.
#[derive(Debug)]
pub(super) struct OpReader<'a> {
    ops: &'a [u8],
    cursor: Cursor,
    /// Pages and chunks.
    records: u64,
}

impl<'a> OpReader<'a> {
    pub(super) fn new(ops: &'a [u8]) -> Self {
        Self {
            ops,
            cursor: Cursor::default(),
            records: 0,
        }
    }

    /// The next op, or `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<Op<'a>>, PayloadError> {
        loop {
            let Some(&first) = self.ops.split_off_first() else {
                return Ok(None);
            };
            let (number, flags) = (first >> 4, first & 0xf);
            if let Some(op) = PageOp::from_number(number) {
                return self.read_run(op, flags).map(Op::Pages).map(Some);
            }
            match number {
                OP_BYTES if flags & !PLAIN == 0 => {
                    let len = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
                    return Ok(Some(Op::Bytes {
                        plain: flags & PLAIN != 0,
                        len,
                    }));
                }
                OP_CHUNK if flags & !PLAIN == 0 => {
                    self.count(1)?;
                    return Ok(Some(Op::Chunk {
                        plain: flags & PLAIN != 0,
                        len: self.chunk_len()?,
                    }));
                }
                OP_CHUNK_REFERENCE if flags == 0 => {
                    self.count(1)?;
                    let slot = self.slot()?;
                    self.cursor.slot = slot.wrapping_add(1);
                    return Ok(Some(Op::ChunkReference {
                        slot,
                        len: self.chunk_len()?,
                    }));
                }
                OP_BLOCK if flags & !DEFINE == 0 => {
                    let number = self.varint()?;
                    let block = u16::try_from(number)
                        .ok()
                        .filter(|&block| block < BLOCK_LIMIT)
                        .ok_or(PayloadError::NoSuchBlock { number })?;
                    self.cursor.block = Some(block);
                    self.cursor.page = 0;
                    if flags & DEFINE != 0 {
                        let &len = self.ops.split_off_first().ok_or(PayloadError::Truncated)?;
                        let name = self.ops.split_off(..usize::from(len)).ok_or(PayloadError::Truncated)?;
                        return Ok(Some(Op::Name { block, name }));
                    }
                }
                _ => return Err(PayloadError::UnknownOp { op: first }),
            }
        }
    }

    fn read_run(&mut self, op: PageOp, flags: u8) -> Result<Run, PayloadError> {
        let block = self.cursor.block.ok_or(PayloadError::NoBlock)?;
        let page = match flags & (FORWARD | BACK) {
            0 => Some(self.cursor.page),
            FORWARD => self
                .varint()?
                .checked_add(1)
                .and_then(|distance| self.cursor.page.checked_add(distance)),
            BACK => self
                .varint()?
                .checked_add(1)
                .and_then(|distance| self.cursor.page.checked_sub(distance)),
            _ => {
                return Err(PayloadError::UnknownOp {
                    op: op.number() << 4 | flags,
                });
            }
        };
        let page = page
            .filter(|&page| page < PAGE_NUMBER_LIMIT)
            .ok_or(PayloadError::AddressOutOfRange)?;
        let count = if flags & RUN == 0 {
            1
        } else {
            self.varint()?.saturating_add(2)
        };
        self.count(count)?;
        if count > PAGE_NUMBER_LIMIT - page {
            return Err(PayloadError::AddressOutOfRange);
        }
        let slot = if op == PageOp::Reference { self.slot()? } else { 0 };
        let first = PageRecord {
            at: PageAddress { block, page },
            continues: flags & NAMED == 0,
        };
        let run = Run { op, first, count, slot };
        self.cursor.advance(&run);
        Ok(run)
    }

    /// Each may make the destination look something up.
    fn count(&mut self, more: u64) -> Result<(), PayloadError> {
        self.records = self.records.saturating_add(more);
        if self.records > MAX_BATCH_RECORDS as u64 {
            return Err(PayloadError::TooManyRecords);
        }
        Ok(())
    }

    fn slot(&mut self) -> Result<u32, PayloadError> {
        let distance = varint::unzigzag(self.varint()?);
        let slot = i64::from(self.cursor.slot).checked_add(distance);
        slot.and_then(|slot| u32::try_from(slot).ok())
            .ok_or(PayloadError::SlotOutOfRange)
    }

    fn chunk_len(&mut self) -> Result<usize, PayloadError> {
        let len = self.varint()?;
        if len == 0 || len > PAGE_SIZE as u64 {
            return Err(PayloadError::ChunkOutOfRange { len });
        }
        Ok(len as usize)
    }

    fn varint(&mut self) -> Result<u64, PayloadError> {
        varint::read(&mut self.ops).ok_or(PayloadError::Truncated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(page: u64, continues: bool) -> PageRecord {
        PageRecord {
            at: PageAddress { block: 3, page },
            continues,
        }
    }

    fn read_all(ops: &[u8]) -> Result<Vec<Op<'_>>, PayloadError> {
        let mut reader = OpReader::new(ops);
        let mut all = Vec::new();
        while let Some(op) = reader.next()? {
            all.push(op);
        }
        Ok(all)
    }

    /// Golden: format 2 must not change.
    #[test]
    fn ops_of_format_2_have_these_bytes() {
        let mut writer = OpWriter::default();
        writer.select_block(3, Some(b"pc.ram"));
        writer.page(PageOp::Zero, record(0, false), 0);
        writer.page(PageOp::Zero, record(1, true), 0);
        writer.page(PageOp::Zero, record(2, true), 0);
        writer.page(PageOp::Same, record(203, true), 0);
        writer.page(PageOp::Reference, record(10, true), 300);
        writer.page(PageOp::Reference, record(11, true), 301);
        writer.bytes(false, 5);
        writer.bytes(true, 200);
        writer.page(PageOp::Literal, record(12, true), 0);
        writer.page(PageOp::Raw, record(13, true), 0);
        writer.page(PageOp::Blank, record(14, false), 0);
        writer.page(PageOp::Delta, record(15, true), 0);
        writer.page(PageOp::Delta, record(16, true), 0);
        writer.page(PageOp::PlainDelta, record(17, true), 0);
        writer.page(PageOp::Similar, record(18, true), 0);
        let expected: &[&[u8]] = &[
            b"\xb1\x03\x06pc.ram",
            b"\x09\x01",
            b"\x12\xc7\x01",
            b"\x25\xc1\x01\x00\xd8\x04",
            b"\x80\x05",
            b"\x81\xc8\x01",
            b"\x60",
            b"\x70",
            b"\xa8",
            b"\x41\x00",
            b"\x50",
            b"\xc0",
        ];
        assert_eq!(writer.finish(Vec::new()), expected.concat());

        let pages = |op, first, count, slot| Op::Pages(Run { op, first, count, slot });
        let ops = vec![
            Op::Name {
                block: 3,
                name: b"pc.ram",
            },
            pages(PageOp::Zero, record(0, false), 3, 0),
            pages(PageOp::Same, record(203, true), 1, 0),
            pages(PageOp::Reference, record(10, true), 2, 300),
            Op::Bytes { plain: false, len: 5 },
            Op::Bytes { plain: true, len: 200 },
            pages(PageOp::Literal, record(12, true), 1, 0),
            pages(PageOp::Raw, record(13, true), 1, 0),
            pages(PageOp::Blank, record(14, false), 1, 0),
            pages(PageOp::Delta, record(15, true), 2, 0),
            pages(PageOp::PlainDelta, record(17, true), 1, 0),
            pages(PageOp::Similar, record(18, true), 1, 0),
        ];
        assert_eq!(read_all(&expected.concat()), Ok(ops));
    }

    #[test]
    fn ops_and_flags_that_are_kept_for_later_are_refused() {
        let block = [0xb0, 3];
        for op in [0x30, 0x82, 0x91, 0xb2, 0xd2, 0xe0, 0xf0, 0x06] {
            let ops = [block.as_slice(), &[op, 1, 1, 1]].concat();
            assert_eq!(read_all(&ops), Err(PayloadError::UnknownOp { op }), "{op:#x}");
        }
    }

    /// Golden, as above.
    #[test]
    fn ops_of_chunks_have_these_bytes() {
        let mut writer = OpWriter::default();
        writer.chunk(false, 1024);
        writer.chunk(true, 4096);
        writer.chunk_reference(300, 2000);
        writer.chunk_reference(301, 1);
        let expected: &[&[u8]] = &[
            b"\xd0\x80\x08",
            b"\xd1\x80\x20",
            b"\x90\xd8\x04\xd0\x0f",
            b"\x90\x00\x01",
        ];
        assert_eq!(writer.finish(Vec::new()), expected.concat());
        let ops = vec![
            Op::Chunk {
                plain: false,
                len: 1024,
            },
            Op::Chunk { plain: true, len: 4096 },
            Op::ChunkReference { slot: 300, len: 2000 },
            Op::ChunkReference { slot: 301, len: 1 },
        ];
        assert_eq!(read_all(&expected.concat()), Ok(ops));
        for op in [&[0xd0][..], &[0x90, 0]] {
            assert_eq!(
                read_all(&[op, &[0]].concat()),
                Err(PayloadError::ChunkOutOfRange { len: 0 })
            );
            assert_eq!(
                read_all(&[op, &[0x81, 0x20]].concat()),
                Err(PayloadError::ChunkOutOfRange { len: 4097 })
            );
        }
        let many = [0x90, 0, 1].repeat(MAX_BATCH_RECORDS + 1);
        assert_eq!(read_all(&many), Err(PayloadError::TooManyRecords));
    }

    #[test]
    fn addresses_slots_and_counts_out_of_range_are_refused() {
        let with = |op: u8, operands: &[u64]| {
            let mut ops = vec![0xb0, 3, op];
            operands.iter().for_each(|&operand| varint::write(operand, &mut ops));
            read_all(&ops).map(|ops| ops.len())
        };
        assert_eq!(with(0x02, &[PAGE_NUMBER_LIMIT - 2]), Ok(1));
        assert_eq!(
            with(0x02, &[PAGE_NUMBER_LIMIT - 1]),
            Err(PayloadError::AddressOutOfRange)
        );
        assert_eq!(with(0x02, &[u64::MAX]), Err(PayloadError::AddressOutOfRange));
        assert_eq!(with(0x04, &[0]), Err(PayloadError::AddressOutOfRange));
        assert_eq!(with(0x01, &[4094]), Ok(1));
        assert_eq!(with(0x01, &[4095]), Err(PayloadError::TooManyRecords));
        assert_eq!(with(0x01, &[u64::MAX]), Err(PayloadError::TooManyRecords));
        assert_eq!(
            with(0x03, &[PAGE_NUMBER_LIMIT - 2, 0]),
            Err(PayloadError::AddressOutOfRange)
        );
        assert_eq!(with(0x20, &[varint::zigzag(u32::MAX.into())]), Ok(1));
        assert_eq!(
            with(0x20, &[varint::zigzag(1 << 32)]),
            Err(PayloadError::SlotOutOfRange)
        );
        assert_eq!(with(0x20, &[varint::zigzag(-1)]), Err(PayloadError::SlotOutOfRange));
        assert_eq!(read_all(&[0x00]), Err(PayloadError::NoBlock));
        assert_eq!(
            read_all(&[0xb0, 0x80, 0x08]),
            Err(PayloadError::NoSuchBlock { number: 1024 })
        );
        assert_eq!(read_all(&[0xb1, 0, 2, b'a']), Err(PayloadError::Truncated));
    }
}
