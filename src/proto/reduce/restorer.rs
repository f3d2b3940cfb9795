//! The destination's end: payloads become the exact bytes of the vmm stream.

use std::collections::HashMap;
use std::fmt;

use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::vmm_stream::{PageKind, PageRecord, write_page_header};

use super::delta;
use super::dictionary::{DictionaryLimits, SlotRing};
use super::group::{Decoder, GROUP_BYTES, GroupError};
use super::known::{KeptPages, KnownPages};
use super::ops::{Op, OpReader, PageOp, Run};
use super::payload::{Head, PayloadError};
use super::sent::SentPages;
use super::shelf::{PageShelf, ShelfError};
use super::stats::BatchStats;

/// Restores the payloads of one session, in the order in which the [`Reducer`](super::Reducer) made them.
pub struct Restorer<S> {
    shelf: S,
    ring: SlotRing,
    sent: SentPages,
    names: HashMap<u16, Box<[u8]>>,
    /// The sequence number to come; `None` once a payload failed.
    sequence: Option<u64>,
    /// Content of the groups of one payload, at most [`MAX_BATCH_BYTES`](super::MAX_BATCH_BYTES).
    packed: Vec<u8>,
    /// Whether compressing each of those groups paid.
    paid: Vec<bool>,
    groups: Decoder,
}

impl<S: PageShelf> Restorer<S> {
    /// Starts a session with an empty dictionary; `shelf` must have room for the dictionary's slots.
    pub fn new(limits: DictionaryLimits, shelf: S) -> Self {
        Self {
            shelf,
            ring: SlotRing::new(limits.slots()),
            sent: SentPages::new(limits.regions()),
            names: HashMap::new(),
            sequence: Some(0),
            packed: Vec::new(),
            paid: Vec::new(),
            groups: Decoder::new(),
        }
    }

    /// Begins with what both ends hold of an earlier session, of which the shelf has content n in slot n. Before the first payload, as the
    /// [`Reducer`](super::Reducer) does.
    pub fn know(&mut self, pages: &KnownPages) {
        let count = self.ring.take_first(pages.digests().len());
        self.sent.know(pages, count);
    }

    /// What is left for the next session, once the last payload is restored; `None` where the guest has more pages than the dictionary. Takes a
    /// moment for each GiB of the guest.
    pub fn into_kept(self) -> Option<KeptPages<S>> {
        KeptPages::of(self.shelf, &self.sent, self.ring)
    }

    /// Appends the bytes that `payload` carries to `out`: at most [`MAX_BATCH_BYTES`](super::MAX_BATCH_BYTES).
    ///
    /// # Errors
    /// [`RestoreError`] where the payload is not what the source's reducer made next, or the shelf fails. Nothing is then
    /// appended, and every further payload fails: what the dictionary holds is no longer known to be what the source thinks.
    pub fn restore(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<BatchStats, RestoreError> {
        let expected = self.sequence.take().ok_or(RestoreError::AfterFailure)?;
        let start = out.len();
        match self.restore_batch(expected, payload, out) {
            Ok(stats) => {
                self.sequence = Some(expected + 1);
                Ok(stats)
            }
            Err(error) => {
                out.truncate(start);
                Err(error)
            }
        }
    }

    /// Bytes that the dictionary takes now, without the shelf.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.sent.memory_bytes()
    }

    fn restore_batch(&mut self, expected: u64, payload: &[u8], out: &mut Vec<u8>) -> Result<BatchStats, RestoreError> {
        let mut rest = payload;
        let head = Head::read(&mut rest)?;
        if head.sequence != expected {
            return Err(RestoreError::OutOfOrder {
                expected,
                found: head.sequence,
            });
        }
        let ops = rest.split_off(..head.ops_len).ok_or(PayloadError::Truncated)?;
        self.decode_groups(head.packed_len, &mut rest)?;
        if rest.len() < head.plain_len {
            return Err(PayloadError::Truncated.into());
        }
        if rest.len() > head.plain_len {
            return Err(PayloadError::Surplus.into());
        }

        out.reserve(head.raw_len);
        let mut output = Output {
            limit: out.len() + head.raw_len,
            out,
        };
        let mut literals = Literals {
            packed: &self.packed[..head.packed_len],
            plain: rest,
            packed_offset: 0,
        };
        let mut stats = BatchStats {
            bytes_in: head.raw_len as u64,
            bytes_out: payload.len() as u64,
            ..BatchStats::default()
        };
        let mut reader = OpReader::new(ops);
        while let Some(op) = reader.next()? {
            match op {
                Op::Bytes { plain, len } => {
                    output.need(len)?;
                    output.out.extend_from_slice(literals.take(plain, len)?);
                }
                Op::Chunk { plain, len } => {
                    output.need(len)?;
                    let chunk = literals.take(plain, len)?;
                    if let Some(slot) = self.ring.take() {
                        let mut content = [0; PAGE_SIZE];
                        content[..len].copy_from_slice(chunk);
                        self.shelf.put(slot, &content)?;
                    }
                    output.out.extend_from_slice(chunk);
                }
                Op::ChunkReference { slot, len } => {
                    output.need(len)?;
                    if !self.ring.holds(slot) {
                        return Err(RestoreError::EmptySlot { slot });
                    }
                    let mut content = [0; PAGE_SIZE];
                    self.shelf.get(slot, &mut content)?;
                    output.out.extend_from_slice(&content[..len]);
                }
                Op::Name { block, name } => {
                    self.names.insert(block, name.into());
                }
                Op::Pages(run) => {
                    let mut pages = Pages {
                        shelf: &mut self.shelf,
                        ring: &mut self.ring,
                        sent: &mut self.sent,
                        paid: &self.paid,
                    };
                    let number = run.first.at.block;
                    let name = self
                        .names
                        .get(&number)
                        .ok_or(PayloadError::NoSuchBlock { number: number.into() })?;
                    pages.restore(&run, name, &mut literals, &mut output, &mut stats)?;
                }
            }
        }
        if output.out.len() != output.limit {
            return Err(PayloadError::WrongLength.into());
        }
        if !literals.packed.is_empty() || !literals.plain.is_empty() {
            return Err(PayloadError::Surplus.into());
        }
        Ok(stats)
    }

    fn decode_groups(&mut self, packed_len: usize, rest: &mut &[u8]) -> Result<(), PayloadError> {
        if self.packed.len() < packed_len {
            self.packed.resize(packed_len, 0);
        }
        self.paid.clear();
        for content in self.packed[..packed_len].chunks_mut(GROUP_BYTES) {
            let paid = self.groups.decode(rest, content).map_err(|error| match error {
                GroupError::Truncated => PayloadError::Truncated,
                GroupError::UnknownCodec(codec) => PayloadError::UnknownCodec { codec },
                GroupError::Damaged => PayloadError::DamagedGroup,
            })?;
            self.paid.push(paid);
        }
        Ok(())
    }
}

impl<S> fmt::Debug for Restorer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restorer")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

/// Where restored bytes go, and how far.
struct Output<'a> {
    out: &'a mut Vec<u8>,
    limit: usize,
}

impl Output<'_> {
    /// Refuses `len` more bytes than the batch has.
    fn need(&self, len: usize) -> Result<(), PayloadError> {
        if len > self.limit - self.out.len() {
            Err(PayloadError::WrongLength)
        } else {
            Ok(())
        }
    }
}

/// Literal bytes that no op has taken yet.
struct Literals<'a> {
    packed: &'a [u8],
    plain: &'a [u8],
    packed_offset: usize,
}

impl<'a> Literals<'a> {
    fn take(&mut self, plain: bool, len: usize) -> Result<&'a [u8], PayloadError> {
        let area = if plain { &mut self.plain } else { &mut self.packed };
        let taken = area.split_off(..len).ok_or(PayloadError::Truncated)?;
        if !plain {
            self.packed_offset += len;
        }
        Ok(taken)
    }

    /// Lets `read` take what it needs off the front of the groups' content.
    fn take_packed<T>(&mut self, read: impl FnOnce(&mut &'a [u8]) -> T) -> T {
        let before = self.packed.len();
        let taken = read(&mut self.packed);
        self.packed_offset += before - self.packed.len();
        taken
    }
}

/// What a run of pages reads and changes.
struct Pages<'a, S> {
    shelf: &'a mut S,
    ring: &'a mut SlotRing,
    sent: &'a mut SentPages,
    paid: &'a [bool],
}

impl<S: PageShelf> Pages<'_, S> {
    fn restore(
        &mut self,
        run: &Run,
        name: &[u8],
        literals: &mut Literals<'_>,
        output: &mut Output<'_>,
        stats: &mut BatchStats,
    ) -> Result<(), RestoreError> {
        let kind = if run.op == PageOp::Zero {
            PageKind::Zero
        } else {
            PageKind::Page
        };
        let counts = &mut stats.pages;
        for index in 0..run.count {
            let at = PageAddress {
                page: run.first.at.page + index,
                ..run.first.at
            };
            let record = PageRecord {
                at,
                continues: run.first.continues || index > 0,
            };
            output.need(kind.record_len(record, name))?;
            write_page_header(record, kind, name, output.out);
            match run.op {
                PageOp::Zero => {
                    output.out.push(0);
                    self.sent.zero(at);
                    counts.zero += 1;
                }
                PageOp::Blank => {
                    output.out.resize(output.out.len() + PAGE_SIZE, 0);
                    self.sent.zero(at);
                    counts.zero += 1;
                }
                PageOp::Same => {
                    let slot = self.sent.slot(at).ok_or(RestoreError::NeverSent { at })?;
                    self.fetch(slot, output.out)?;
                    self.sent.same(at);
                    counts.same += 1;
                }
                PageOp::Reference => {
                    let slot = u64::from(run.slot) + index;
                    let slot = u32::try_from(slot).map_err(|_| PayloadError::SlotOutOfRange)?;
                    self.fetch(slot, output.out)?;
                    self.sent.set(at, slot);
                    counts.reference += 1;
                }
                PageOp::Delta | PageOp::PlainDelta | PageOp::Similar => {
                    let slot = self.sent.slot(at).ok_or(RestoreError::NeverSent { at })?;
                    let page = self.changed(run.op, at, slot, literals)?;
                    self.keep(at, &page, output.out)?;
                    counts.delta += 1;
                }
                PageOp::Literal => {
                    let paid = self.paid.get(literals.packed_offset / GROUP_BYTES);
                    self.keep(at, literals.take(false, PAGE_SIZE)?, output.out)?;
                    if paid == Some(&true) {
                        counts.literal += 1;
                    } else {
                        counts.raw += 1;
                    }
                }
                PageOp::Raw => {
                    self.keep(at, literals.take(true, PAGE_SIZE)?, output.out)?;
                    counts.raw += 1;
                }
            }
        }
        Ok(())
    }

    fn fetch(&mut self, slot: u32, out: &mut Vec<u8>) -> Result<(), RestoreError> {
        if !self.ring.holds(slot) {
            return Err(RestoreError::EmptySlot { slot });
        }
        let start = out.len();
        out.resize(start + PAGE_SIZE, 0);
        Ok(self.shelf.get(slot, &mut out[start..])?)
    }

    /// The page at `at`, whose previous version is in `slot`.
    fn changed(
        &mut self,
        op: PageOp,
        at: PageAddress,
        slot: u32,
        literals: &mut Literals<'_>,
    ) -> Result<[u8; PAGE_SIZE], RestoreError> {
        if !self.ring.holds(slot) {
            return Err(RestoreError::EmptySlot { slot });
        }
        let mut page = [0; PAGE_SIZE];
        self.shelf.get(slot, &mut page)?;
        let changed = match op {
            PageOp::Delta => literals.take_packed(|packed| delta::apply(packed, &mut page)),
            PageOp::PlainDelta => delta::apply(&mut literals.plain, &mut page),
            _ => {
                let previous = page;
                delta::restore_similar(&mut literals.plain, &previous, &mut page)
            }
        };
        changed.ok_or(PayloadError::DamagedDelta { at })?;
        Ok(page)
    }

    fn keep(&mut self, at: PageAddress, page: &[u8], out: &mut Vec<u8>) -> Result<(), RestoreError> {
        if let Some(slot) = self.ring.take() {
            self.shelf.put(slot, page)?;
            self.sent.set(at, slot);
        }
        out.extend_from_slice(page);
        Ok(())
    }
}

/// A payload cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The payload is malformed.
    #[error("the peer sent a payload that cannot be read")]
    Malformed(#[from] PayloadError),
    /// A payload was lost, repeated or overtaken.
    #[error("the peer's payload {found} came where payload {expected} was due")]
    OutOfOrder {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// A page that was to be repeated or changed has not been sent in this session.
    #[error("the peer spoke of page {} of block {} as it was sent before, but never sent it", at.page, at.block)]
    NeverSent {
        /// The page.
        at: PageAddress,
    },
    /// A reference to a slot that holds nothing.
    #[error("the peer referred to slot {slot} of the dictionary, which holds nothing")]
    EmptySlot {
        /// The slot.
        slot: u32,
    },
    /// The pages cannot be kept or read back at this end.
    #[error("the dictionary's pages cannot be kept")]
    Shelf(#[from] ShelfError),
    /// An earlier payload failed, so the dictionary cannot be trusted.
    #[error("an earlier payload of this session could not be restored")]
    AfterFailure,
}
