//! Streams built by hand, element by element, and what every one of them must come to.

mod elements;
mod properties;
mod resync;

use super::qemu::QemuParser;
use super::{LostTrackReason, PageKind, PageRecord, RamBlock, Record, StreamEvent, write_page_header};
use crate::proto::page::{PAGE_SIZE, PageAddress};

/// Id that the built streams give the RAM section.
const RAM_ID: u32 = 2;

/// A stream under construction.
#[derive(Clone, Default)]
struct Stream {
    bytes: Vec<u8>,
    footers: bool,
}

impl Stream {
    /// File header and configuration, footers on.
    fn begin() -> Self {
        Self::headless()
            .raw(b"QEVM\0\0\0\x03")
            .raw(b"\x07\0\0\0\x0bpc-q35-10.0")
    }

    fn headless() -> Self {
        Self {
            bytes: Vec::new(),
            footers: true,
        }
    }

    /// A header, and a RAM START with two blocks of 16 and 2 pages.
    fn with_ram() -> Self {
        Self::begin().ram_start(&[("pc.ram", 16), ("pc.rom", 2)])
    }

    fn without_footers(mut self) -> Self {
        self.footers = false;
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn word(self, word: u64) -> Self {
        self.raw(&word.to_be_bytes())
    }

    fn name(self, name: &str) -> Self {
        self.raw(&[u8::try_from(name.len()).unwrap()]).raw(name.as_bytes())
    }

    /// START (1) or FULL (4) without the body.
    fn opening(self, kind: u8, id: u32, name: &str, version: u32) -> Self {
        self.raw(&[kind])
            .raw(&id.to_be_bytes())
            .name(name)
            .raw(&0u32.to_be_bytes())
            .raw(&version.to_be_bytes())
    }

    /// PART (2) or END (3) without the body.
    fn following(self, kind: u8, id: u32) -> Self {
        self.raw(&[kind]).raw(&id.to_be_bytes())
    }

    fn footer(self, id: u32) -> Self {
        if self.footers {
            self.raw(&[0x7e]).raw(&id.to_be_bytes())
        } else {
            self
        }
    }

    fn ram_start(self, blocks: &[(&str, u64)]) -> Self {
        let total: u64 = blocks.iter().map(|(_, pages)| pages * 4096).sum();
        let mut stream = self.opening(1, RAM_ID, "ram", 4).word(total | 0x04);
        for (name, pages) in blocks {
            stream = stream.name(name).word(pages * 4096);
        }
        stream.eos()
    }

    fn ram_part(self) -> Self {
        self.following(2, RAM_ID)
    }

    fn ram_end(self) -> Self {
        self.following(3, RAM_ID)
    }

    fn eos(self) -> Self {
        self.word(0x10).footer(RAM_ID)
    }

    fn page(self, page: u64, block: Option<&str>, fill: u8) -> Self {
        self.record(page, 0x08, block).raw(&[fill; PAGE_SIZE])
    }

    fn zero(self, page: u64, block: Option<&str>) -> Self {
        self.record(page, 0x02, block).raw(&[0])
    }

    /// Header of a page record; without a block it continues.
    fn record(self, page: u64, flag: u64, block: Option<&str>) -> Self {
        match block {
            Some(block) => self.word(page << 12 | flag).name(block),
            None => self.word(page << 12 | flag | 0x20),
        }
    }

    fn full(self, id: u32, name: &str, body: &[u8]) -> Self {
        self.opening(4, id, name, 1).raw(body).footer(id)
    }

    /// EOF and the description.
    fn eof(self) -> Self {
        let json = br#"{"page_size": 4096, "devices": []}"#;
        self.raw(&[0, 6])
            .raw(&u32::try_from(json.len()).unwrap().to_be_bytes())
            .raw(json)
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    #[track_caller]
    fn parse(&self) -> Parsed {
        let parsed = Parsed::whole(&self.bytes);
        assert_eq!(
            parsed,
            Parsed::sliced(&self.bytes, std::iter::repeat(1)),
            "one byte at a time"
        );
        parsed
    }
}

/// What a parser makes of a stream. Neighbouring runs of bytes are one.
#[derive(Debug, Default, PartialEq)]
struct Parsed {
    records: Vec<Record>,
    events: Vec<StreamEvent>,
    blocks: Vec<RamBlock>,
}

impl Parsed {
    #[track_caller]
    fn whole(bytes: &[u8]) -> Self {
        Self::sliced(bytes, std::iter::empty())
    }

    /// Offers `bytes` in slices of these lengths, then the rest, and checks everything that holds for any stream.
    #[track_caller]
    fn sliced(bytes: &[u8], lens: impl Iterator<Item = usize>) -> Self {
        let mut parser = QemuParser::default();
        let mut parsed = Self::default();
        let (mut consumed, mut offered) = (0, 0usize);
        let mut records = Vec::new();
        for len in lens.chain(std::iter::once(usize::MAX)) {
            offered = bytes.len().min(offered.saturating_add(len));
            let end = offered == bytes.len();
            let slice = &bytes[consumed..offered];
            records.clear();
            let took = parser.parse(slice, end, &mut records, &mut parsed.events);
            assert!(took <= slice.len());
            assert!(
                slice.len() - took <= if end { 0 } else { QemuParser::MAX_PENDING },
                "{} pending",
                slice.len() - took
            );
            let blocks = parser.blocks();
            assert_eq!(
                records.iter().map(|record| record.stream_len(blocks)).sum::<usize>(),
                took
            );
            assert_eq!(rebuild(&records, blocks, slice), slice[..took]);
            parsed.append(&records);
            consumed += took;
            if end {
                break;
            }
        }
        assert_eq!(consumed, bytes.len());
        parsed.blocks = parser.blocks().to_vec();
        parsed
    }

    fn append(&mut self, records: &[Record]) {
        for &record in records {
            match (self.records.last_mut(), record) {
                (Some(Record::Bytes { len }), Record::Bytes { len: more }) => *len += more,
                _ => self.records.push(record),
            }
        }
    }

    /// Block, page and kind of every page, in order.
    fn pages(&self) -> Vec<(u16, u64, PageKind)> {
        let page = |record: &Record| match *record {
            Record::Bytes { .. } | Record::Chunk { .. } => None,
            Record::Page(PageRecord { at, .. }) => Some((at.block, at.page, PageKind::Page)),
            Record::Zero(PageRecord { at, .. }) => Some((at.block, at.page, PageKind::Zero)),
        };
        self.records.iter().filter_map(page).collect()
    }

    fn lost(&self) -> Vec<(u64, LostTrackReason)> {
        let lost = |event: &StreamEvent| match *event {
            StreamEvent::LostTrack { offset, reason } => Some((offset, reason)),
            _ => None,
        };
        self.events.iter().filter_map(lost).collect()
    }
}

/// What the destination makes of the records: it has the bytes, the pages and the block names, and no parser.
fn rebuild(records: &[Record], blocks: &[RamBlock], bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    for record in records {
        let len = record.stream_len(blocks);
        match *record {
            Record::Bytes { .. } | Record::Chunk { .. } => out.extend_from_slice(&bytes[at..at + len]),
            Record::Page(page) => {
                write_page_header(page, PageKind::Page, &blocks[usize::from(page.at.block)].name, &mut out);
                out.extend_from_slice(&bytes[at + len - PAGE_SIZE..at + len]);
            }
            Record::Zero(page) => {
                write_page_header(page, PageKind::Zero, &blocks[usize::from(page.at.block)].name, &mut out);
                out.push(0);
            }
        }
        at += len;
    }
    out
}

fn page_record(block: u16, page: u64, continues: bool) -> PageRecord {
    PageRecord {
        at: PageAddress { block, page },
        continues,
    }
}
