//! Cutting a stretch of a vmm stream into batches within the limits.

use crate::proto::page::{PAGE_SIZE, PageAddress, PageDigest};
use crate::proto::vmm_stream::{MAX_BLOCK_NAME, PageKind, PageRecord, Record, write_page_header};

use super::digest::digest_many;
use super::ops::{BLOCK_LIMIT, PAGE_NUMBER_LIMIT};
use super::{MAX_BATCH_BYTES, MAX_BATCH_RECORDS};

/// A stretch of a vmm stream that one payload carries: at most [`MAX_BATCH_BYTES`] and [`MAX_BATCH_RECORDS`].
///
/// Its pieces cover the bytes without gap or overlap, and every header in it is canonical; [`batches`] sees to both.
#[derive(Debug)]
pub struct Batch<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) pieces: Vec<Piece>,
    pub(super) block_names: &'a [Vec<u8>],
}

impl<'a> Batch<'a> {
    /// The bytes that the batch carries.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Appends the digest of each page's content, and of each chunk, to `out`, in their order.
    pub fn digest_pages(&self, out: &mut Vec<PageDigest>) {
        let mut pages: Vec<&[u8; PAGE_SIZE]> = Vec::new();
        for piece in &self.pieces {
            match *piece {
                Piece::Page { content, .. } => pages.push(page_at(self.bytes, content)),
                Piece::Chunk { start, len } => {
                    digest_many(&pages, out);
                    pages.clear();
                    out.push(PageDigest::of(&self.bytes[start..start + len]));
                }
                Piece::Bytes { .. } | Piece::Zero(_) => {}
            }
        }
        digest_many(&pages, out);
    }
}

/// The page of content at `offset`, which a piece says is there.
pub(super) fn page_at(bytes: &[u8], offset: usize) -> &[u8; PAGE_SIZE] {
    bytes[offset..]
        .first_chunk()
        .expect("a page piece covers a whole page of its batch")
}

/// One part of a batch. Offsets count from the start of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Bytes that are carried as they are.
    Bytes { start: usize, len: usize },
    /// A page record whose content starts at `content`.
    Page { record: PageRecord, content: usize },
    /// A zero-page record.
    Zero(PageRecord),
    /// Bytes that may come again: 1 to a page's length.
    Chunk { start: usize, len: usize },
}

/// Cuts `bytes`, which `records` describe, into batches.
///
/// `block_names` has the name of block `n` at index `n`. A record that does not say what the bytes are (a header that is not
/// canonical, an unknown block, a length beyond the end) costs ratio, never correctness: its bytes are carried as they are.
#[must_use]
pub fn batches<'a>(bytes: &'a [u8], records: &'a [Record], block_names: &'a [Vec<u8>]) -> Batches<'a> {
    Batches {
        bytes,
        records: records.iter(),
        plain: 0,
        block_names,
        header: Vec::new(),
    }
}

/// The batches of a stretch of a vmm stream, in order; made by [`batches`].
#[derive(Debug)]
pub struct Batches<'a> {
    /// What is not yet in a batch.
    bytes: &'a [u8],
    /// Records of `bytes` after the first `plain` bytes.
    records: std::slice::Iter<'a, Record>,
    /// Bytes at the front of `bytes` that are carried as they are.
    plain: usize,
    block_names: &'a [Vec<u8>],
    /// Scratch: the header that a record ought to have.
    header: Vec<u8>,
}

impl<'a> Iterator for Batches<'a> {
    type Item = Batch<'a>;

    fn next(&mut self) -> Option<Batch<'a>> {
        let mut pieces = Vec::new();
        let mut len = 0;
        while pieces.len() < MAX_BATCH_RECORDS {
            if self.plain > 0 {
                let taken = self.plain.min(MAX_BATCH_BYTES - len);
                push_bytes(&mut pieces, len, taken);
                self.plain -= taken;
                len += taken;
                if self.plain > 0 {
                    break;
                }
            }
            let left = self.bytes.len() - len;
            let Some(record) = self.records.as_slice().first() else {
                if left == 0 || len == MAX_BATCH_BYTES {
                    break;
                }
                self.plain = left;
                continue;
            };
            let (record, kind) = match *record {
                Record::Bytes { len: bytes } => {
                    self.plain = bytes.min(left);
                    self.records.next();
                    continue;
                }
                Record::Chunk { len: chunk } => {
                    if chunk == 0 || chunk > PAGE_SIZE.min(left) {
                        self.plain = chunk.min(left);
                    } else if len + chunk > MAX_BATCH_BYTES {
                        break;
                    } else {
                        pieces.push(Piece::Chunk { start: len, len: chunk });
                        len += chunk;
                    }
                    self.records.next();
                    continue;
                }
                Record::Page(record) => (record, PageKind::Page),
                Record::Zero(record) => (record, PageKind::Zero),
            };
            let Some(name) = self
                .name_of(record)
                .filter(|name| kind.record_len(record, name) <= left)
            else {
                // Where the next record starts is unknown.
                self.records = [].iter();
                continue;
            };
            let record_len = kind.record_len(record, name);
            if len + record_len > MAX_BATCH_BYTES {
                break;
            }
            self.records.next();
            if self.is_canonical(record, kind, name, len) {
                pieces.push(match kind {
                    PageKind::Page => Piece::Page {
                        record,
                        content: len + record_len - PAGE_SIZE,
                    },
                    PageKind::Zero => Piece::Zero(record),
                });
            } else {
                push_bytes(&mut pieces, len, record_len);
            }
            len += record_len;
        }
        let (bytes, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        (!pieces.is_empty()).then_some(Batch {
            bytes,
            pieces,
            block_names: self.block_names,
        })
    }
}

impl<'a> Batches<'a> {
    /// The name that a header of `record` has to carry; empty and unused where the record continues its block.
    fn name_of(&self, record: PageRecord) -> Option<&'a [u8]> {
        match self.block_names.get(usize::from(record.at.block)) {
            Some(name) => (name.len() <= MAX_BLOCK_NAME).then_some(name.as_slice()),
            None => record.continues.then_some(&[]),
        }
    }

    fn is_canonical(&mut self, record: PageRecord, kind: PageKind, name: &[u8], at: usize) -> bool {
        let PageAddress { block, page } = record.at;
        let known = usize::from(block) < self.block_names.len().min(usize::from(BLOCK_LIMIT));
        if !known || page >= PAGE_NUMBER_LIMIT {
            return false;
        }
        self.header.clear();
        write_page_header(record, kind, name, &mut self.header);
        let body = at + self.header.len();
        self.bytes[at..body] == self.header && (kind == PageKind::Page || self.bytes[body] == 0)
    }
}

/// Adds bytes that are carried as they are, to the piece before where that is such bytes too.
fn push_bytes(pieces: &mut Vec<Piece>, start: usize, added: usize) {
    match pieces.last_mut() {
        Some(Piece::Bytes { len, .. }) => *len += added,
        _ if added == 0 => {}
        _ => pieces.push(Piece::Bytes { start, len: added }),
    }
}
