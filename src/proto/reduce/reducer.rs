//! The source's end: batches become payloads.

use std::collections::HashMap;
use std::fmt;

use crate::proto::page::{PAGE_SIZE, PageDigest};
use crate::proto::vmm_stream::PageRecord;

use super::batch::{Batch, Piece, page_at};
use super::classify::{Class, classify};
use super::delta::{Delta, DeltaEncoder};
use super::dictionary::{DictionaryLimits, SourceDictionary};
use super::draft::{Coded, Coder, Draft, Parts};
use super::effort::Effort;
use super::known::{KeptPages, KnownContent, KnownPages};
use super::ops::{OpWriter, PageOp};
use super::packing::{Origin, Packer};
use super::payload::Head;
use super::shelf::PageShelf;
use super::stats::BatchStats;
use super::varint;

/// Encodes the batches of one session, in order.
///
/// What a payload means depends on every payload before it, so all of them must reach the [`Restorer`](super::Restorer), in
/// the order in which they were encoded; what is sent again after a cut is the payload, never the batch encoded once more.
///
/// Where one thread is too slow, [`draft`](Self::draft) and [`Coder::code`] go on several.
pub struct Reducer {
    /// No deltas and no zstd.
    plainly: bool,
    dictionary: SourceDictionary,
    /// Names that the destination knows.
    names: HashMap<u16, Vec<u8>>,
    sequence: u64,
    effort: Effort,
    ops: OpWriter,
    packer: Packer,
    deltas: DeltaEncoder,
    /// Bytes that are carried as they are beside the groups.
    plain: Vec<u8>,
    /// Memory of drafts that are coded.
    spare: Option<Parts>,
    /// Of a session that has one thread.
    coder: Option<Coder>,
    /// Where contents are kept for the next session.
    kept: Option<Box<dyn PageShelf + Send>>,
}

impl Reducer {
    /// Starts a session with an empty dictionary, which remembers the bytes of at most `copies` pages to send what changed in them.
    #[must_use]
    pub fn new(limits: DictionaryLimits, copies: u32) -> Self {
        Self {
            plainly: false,
            dictionary: SourceDictionary::new(limits, copies),
            names: HashMap::new(),
            sequence: 0,
            effort: Effort::LEAST,
            ops: OpWriter::default(),
            packer: Packer::new(),
            deltas: DeltaEncoder::default(),
            plain: Vec::new(),
            spare: None,
            coder: None,
            kept: None,
        }
    }

    /// Starts a session with a destination of before wire version 4, which knows neither deltas nor zstd.
    #[must_use]
    pub fn without_deltas(limits: DictionaryLimits) -> Self {
        Self {
            plainly: true,
            ..Self::new(limits, 0)
        }
    }

    /// Begins with what both ends hold of an earlier session. Before the first batch, as the [`Restorer`](super::Restorer) does.
    pub fn know(&mut self, pages: &KnownPages, content: Box<dyn KnownContent>) {
        self.dictionary.know(pages, content);
    }

    /// Puts every content on `shelf` too, with slots as they are at the destination. It is given up where it fails: the session does not need it.
    pub fn keep_on(&mut self, shelf: Box<dyn PageShelf + Send>) {
        self.kept = Some(shelf);
    }

    /// Whether contents are kept for the next session.
    #[must_use]
    pub fn keeps(&self) -> bool {
        self.kept.is_some()
    }

    /// What is left for the next session, once the last batch is encoded; `None` where nothing was kept, or not all of it, or the guest has more
    /// pages than the dictionary. Takes a moment for each GiB of the guest.
    #[must_use]
    pub fn into_kept(self) -> Option<KeptPages<Box<dyn PageShelf + Send>>> {
        let (shelf, dictionary) = (self.kept?, self.dictionary);
        KeptPages::of(shelf, &dictionary.sent, dictionary.ring())
    }

    /// How hard to compress from the next batch on.
    pub fn set_effort(&mut self, effort: Effort) {
        if !self.plainly {
            self.packer.set_effort(self.effort, effort);
            self.effort = effort;
        }
    }

    /// Appends the payload of `batch` to `out`: [`Self::draft`], [`Coder::code`] and [`Self::learn`] on one thread.
    ///
    /// # Panics
    /// As [`Self::draft`].
    pub fn encode(&mut self, batch: &Batch<'_>, digests: &[PageDigest], out: &mut Vec<u8>) -> BatchStats {
        let draft = self.draft(batch, digests);
        let coded = self.coder.get_or_insert_with(|| Coder::new(0)).code(draft, out);
        let stats = coded.stats();
        self.learn(coded);
        stats
    }

    /// Decides how each page of `batch` goes. Pages and long bytes that cannot be reduced take at most 0.5 % more in the end.
    ///
    /// `digests` are those that [`Batch::digest_pages`] gives. The destination is sent to content by digest, so a wrong one
    /// is a wrong page.
    ///
    /// # Panics
    /// Where there are fewer digests than pages and chunks.
    pub fn draft(&mut self, batch: &Batch<'_>, digests: &[PageDigest]) -> Draft {
        let mut stats = BatchStats {
            bytes_in: batch.bytes.len() as u64,
            ..BatchStats::default()
        };
        let mut digests = digests.iter();
        for piece in &batch.pieces {
            match *piece {
                Piece::Bytes { start, len } => self.encode_bytes(batch.bytes, start, len),
                Piece::Chunk { start, len } => {
                    let digest = next_digest(&mut digests);
                    self.encode_chunk(&batch.bytes[start..start + len], digest);
                }
                Piece::Zero(record) => {
                    self.select_block(batch, record);
                    self.ops.page(PageOp::Zero, record, 0);
                    self.dictionary.sent.zero(record.at);
                    stats.pages.zero += 1;
                }
                Piece::Page { record, content } => {
                    let digest = next_digest(&mut digests);
                    self.select_block(batch, record);
                    self.encode_page(record, page_at(batch.bytes, content), digest, &mut stats);
                }
            }
        }
        let mut spare = self.spare.take().unwrap_or_default();
        spare.plain.clear();
        let parts = Parts {
            ops: self.ops.finish(spare.ops),
            literals: self.packer.finish(spare.literals),
            plain: std::mem::replace(&mut self.plain, spare.plain),
        };
        let head = Head {
            sequence: self.sequence,
            raw_len: batch.bytes.len(),
            ops_len: parts.ops.len(),
            packed_len: parts.literals.content.len(),
            plain_len: parts.plain.len(),
        };
        self.sequence += 1;
        Draft {
            head,
            plainly: self.plainly,
            effort: self.effort,
            stats,
            parts,
        }
    }

    /// Takes in what coding a draft has shown, in any order and at any time: later batches gain from it.
    pub fn learn(&mut self, coded: Coded) {
        // What a weaker codec did not do, the one that is used now may.
        if coded.effort() >= self.effort {
            for (origins, verdict) in coded.verdicts() {
                self.packer.learn(origins, verdict);
            }
        }
        self.spare = Some(coded.into_parts());
    }

    /// Bytes that the dictionary takes now.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.dictionary.memory_bytes()
    }

    fn select_block(&mut self, batch: &Batch<'_>, record: PageRecord) {
        let block = record.at.block;
        if self.ops.block() == Some(block) {
            return;
        }
        let name = &batch.block_names[usize::from(block)];
        if self.names.get(&block) == Some(name) {
            self.ops.select_block(block, None);
        } else {
            self.ops.select_block(block, Some(name));
            self.names.insert(block, name.clone());
        }
    }

    fn encode_page(
        &mut self,
        record: PageRecord,
        content: &[u8; PAGE_SIZE],
        digest: PageDigest,
        stats: &mut BatchStats,
    ) {
        match classify(&mut self.dictionary, record.at, content, digest) {
            Class::Blank => {
                self.ops.page(PageOp::Blank, record, 0);
                stats.pages.zero += 1;
            }
            Class::Same => {
                self.ops.page(PageOp::Same, record, 0);
                stats.pages.same += 1;
            }
            Class::Reference(slot) => {
                self.ops.page(PageOp::Reference, record, slot);
                stats.pages.reference += 1;
            }
            Class::New { previous } => {
                if self.encode_delta(record, previous, content) {
                    stats.pages.delta += 1;
                    self.insert(record, digest, previous, content);
                } else {
                    // First, so that its region is known where incompressible ones are remembered.
                    self.insert(record, digest, previous, content);
                    self.encode_literal(record, content, stats);
                }
            }
        }
    }

    fn insert(&mut self, record: PageRecord, digest: PageDigest, previous: Option<u32>, content: &[u8; PAGE_SIZE]) {
        let slot = self.dictionary.insert(record.at, digest, previous, content);
        let fits = self.dictionary.sent.count() <= u64::from(self.dictionary.ring().capacity());
        if let (Some(slot), Some(shelf)) = (slot, &mut self.kept)
            && !(fits && shelf.put(slot, content).is_ok())
        {
            self.kept = None;
        }
    }

    /// Carries the page as what changed since it was last sent, where that is known and pays.
    fn encode_delta(&mut self, record: PageRecord, previous: Option<u32>, content: &[u8; PAGE_SIZE]) -> bool {
        let origin = self.origin(record);
        let Some(previous) = previous.and_then(|slot| self.dictionary.copy(slot)) else {
            return false;
        };
        match self.deltas.encode(previous, content, self.packer.expected_page(origin)) {
            Some(Delta::Edits(edits)) => {
                if self.packer.is_worth_packing(Origin::Edits, edits) {
                    self.ops.page(PageOp::Delta, record, 0);
                    self.packer.push(Origin::Edits, edits);
                } else {
                    self.ops.page(PageOp::PlainDelta, record, 0);
                    self.plain.extend_from_slice(edits);
                }
                true
            }
            Some(Delta::Similar(coded)) => {
                self.ops.page(PageOp::Similar, record, 0);
                varint::write(coded.len() as u64, &mut self.plain);
                self.plain.extend_from_slice(coded);
                true
            }
            None => false,
        }
    }

    fn origin(&mut self, record: PageRecord) -> Origin {
        let region = self.dictionary.sent.region(record.at);
        region.map_or(Origin::Unremembered, Origin::Region)
    }

    fn encode_literal(&mut self, record: PageRecord, content: &[u8; PAGE_SIZE], stats: &mut BatchStats) {
        let origin = self.origin(record);
        if self.packer.is_worth_packing(origin, content) {
            self.ops.page(PageOp::Literal, record, 0);
            self.packer.push_page(origin, content);
        } else {
            self.ops.page(PageOp::Raw, record, 0);
            self.plain.extend_from_slice(content);
            stats.pages.raw += 1;
        }
    }

    fn encode_chunk(&mut self, content: &[u8], digest: PageDigest) {
        if let Some(slot) = self.dictionary.find(digest) {
            return self.ops.chunk_reference(slot, content.len());
        }
        // Slots that hold no pages cannot be what the next session begins with.
        self.kept = None;
        self.dictionary.insert_chunk(digest);
        let packed = self.packer.is_worth_packing(Origin::Opaque, content);
        self.ops.chunk(!packed, content.len());
        if packed {
            self.packer.push(Origin::Opaque, content);
        } else {
            self.plain.extend_from_slice(content);
        }
    }

    /// Long bytes are judged a page's length at a time, like pages. Short ones are always packed: they are headers.
    fn encode_bytes(&mut self, bytes: &[u8], mut start: usize, len: usize) {
        let end = start + len;
        while start < end {
            let part = start..end.min(start + PAGE_SIZE);
            let content = &bytes[part.clone()];
            let packed = content.len() < PAGE_SIZE || self.packer.is_worth_packing(Origin::Opaque, content);
            self.ops.bytes(!packed, part.len());
            if packed {
                self.packer.push(Origin::Opaque, content);
            } else {
                self.plain.extend_from_slice(content);
            }
            start = part.end;
        }
    }
}

fn next_digest(digests: &mut std::slice::Iter<'_, PageDigest>) -> PageDigest {
    *digests
        .next()
        .expect("a batch is encoded with a digest for each of its pages and chunks")
}

impl fmt::Debug for Reducer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reducer")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}
