//! From a vmm's bytes to payloads: the source's stages in a row.
//!
//! Pure and synchronous; the edge runs it on threads of their own, since it hashes and compresses: [`Encoder::draft`] on one, [`FrameDraft::code`]
//! on others.

use bytes::Bytes;

use crate::proto::page::StreamDigest;
use crate::proto::reduce::{Coded, Coder, Draft, Effort, PageCounts, Reducer, batches};
use crate::proto::vmm_stream::opaque::Chunker;
use crate::proto::vmm_stream::qemu::QemuParser;
use crate::proto::vmm_stream::{Record, StreamEvent};
use crate::proto::wire::FrameKind;
use crate::proto::wire::frame::{HEADER_LEN, MAX_RAW};

/// A payload that waits for its place among the frames.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// Kind of payload.
    pub kind: FrameKind,
    /// The payload.
    pub payload: Bytes,
    /// Stream bytes that it restores to.
    pub stream_bytes: u32,
    /// Device state has begun.
    pub held: bool,
}

impl EncodedFrame {
    /// Bytes of the lane that will carry it.
    #[must_use]
    pub fn lane_bytes(&self) -> u64 {
        (HEADER_LEN + self.payload.len()) as u64
    }
}

/// A frame whose payload is not coded yet.
#[derive(Debug)]
pub struct FrameDraft {
    content: Content,
    stream_bytes: u32,
    held: bool,
}

#[derive(Debug)]
enum Content {
    Plain(Bytes),
    Reduced(Draft),
}

impl FrameDraft {
    fn plain(piece: &[u8]) -> Self {
        Self {
            content: Content::Plain(Bytes::copy_from_slice(piece)),
            stream_bytes: u32::try_from(piece.len()).expect("a piece is at most MAX_RAW"),
            held: false,
        }
    }

    /// The frame, and for [`Encoder::learn`] what coding it has shown.
    pub fn code(self, coder: &mut Coder) -> (EncodedFrame, Option<Coded>) {
        let (kind, payload, coded) = match self.content {
            Content::Plain(payload) => (FrameKind::Plain, payload, None),
            Content::Reduced(draft) => {
                let mut payload = Vec::new();
                let coded = coder.code(draft, &mut payload);
                (FrameKind::Reduced, payload.into(), Some(coded))
            }
        };
        let frame = EncodedFrame {
            kind,
            payload,
            stream_bytes: self.stream_bytes,
            held: self.held,
        };
        (frame, coded)
    }
}

/// A whole vmm stream, as its source saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamSummary {
    /// BLAKE3 of all of it.
    pub digest: StreamDigest,
    /// Its length in bytes.
    pub bytes: u64,
}

/// The source's stages: digest of the stream, parser, reduction.
#[derive(Debug)]
pub struct Encoder {
    hasher: blake3::Hasher,
    bytes: u64,
    reduction: Option<Reduction>,
    held: bool,
    /// Of a session that has one thread.
    coder: Option<Coder>,
}

#[derive(Debug)]
struct Reduction {
    parser: Parser,
    reducer: Reducer,
    /// Bytes that the parser has not taken yet: part of a header and a page at most.
    pending: Vec<u8>,
    records: Vec<Record>,
    block_names: Vec<Vec<u8>>,
    pages: PageCounts,
}

#[derive(Debug)]
enum Parser {
    Qemu(Box<QemuParser>),
    Opaque(Chunker),
}

impl Encoder {
    /// An encoder that carries the bytes as they are (`None`), or reduces them.
    #[must_use]
    pub fn new(reducer: Option<Reducer>) -> Self {
        Self::with(reducer, Parser::Qemu(Box::default()))
    }

    /// The same for a stream that is not of a vmm we know: nothing of it is held.
    #[must_use]
    pub fn of_opaque(reducer: Reducer) -> Self {
        Self::with(Some(reducer), Parser::Opaque(Chunker::default()))
    }

    fn with(reducer: Option<Reducer>, parser: Parser) -> Self {
        let reduction = reducer.map(|reducer| Reduction {
            parser,
            reducer,
            pending: Vec::new(),
            records: Vec::new(),
            block_names: Vec::new(),
            pages: PageCounts::default(),
        });
        Self {
            hasher: blake3::Hasher::new(),
            bytes: 0,
            reduction,
            held: false,
            coder: None,
        }
    }

    /// How hard to compress from now on.
    pub fn set_effort(&mut self, effort: Effort) {
        if let Some(reduction) = &mut self.reduction {
            reduction.reducer.set_effort(effort);
        }
    }

    /// Takes the next bytes of the stream and appends the frames they make: [`Self::draft`], [`FrameDraft::code`] and [`Self::learn`] on one
    /// thread.
    pub fn feed(&mut self, bytes: &[u8], frames: &mut Vec<EncodedFrame>) {
        let mut drafts = Vec::new();
        self.draft(bytes, &mut drafts);
        self.code(drafts, frames);
    }

    /// [`Self::flush`] on one thread.
    pub fn feed_nothing_more(&mut self, frames: &mut Vec<EncodedFrame>) {
        let mut drafts = Vec::new();
        self.flush(&mut drafts);
        self.code(drafts, frames);
    }

    /// Takes the next bytes of the stream and appends drafts of the frames they make. Up to a header and a page stay pending until
    /// more comes.
    pub fn draft(&mut self, bytes: &[u8], drafts: &mut Vec<FrameDraft>) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        match &mut self.reduction {
            Some(reduction) => reduction.draft(bytes, false, &mut self.held, drafts),
            None => drafts.extend(bytes.chunks(MAX_RAW).map(FrameDraft::plain)),
        }
    }

    /// Nothing more has come for now. Whoever reads a stream that we do not know may wait for its last byte: it is not kept until more comes.
    pub fn flush(&mut self, drafts: &mut Vec<FrameDraft>) {
        if let Some(reduction) = &mut self.reduction
            && matches!(reduction.parser, Parser::Opaque(_))
            && !reduction.pending.is_empty()
        {
            reduction.draft(&[], true, &mut self.held, drafts);
        }
    }

    /// Takes in what coding a draft has shown, in any order and at any time before the end.
    pub fn learn(&mut self, coded: Coded) {
        if let Some(reduction) = &mut self.reduction {
            reduction.pages += coded.stats().pages;
            reduction.reducer.learn(coded);
        }
    }

    /// Pages so far, by how they were encoded.
    #[must_use]
    pub fn pages(&self) -> PageCounts {
        self.reduction
            .as_ref()
            .map(|reduction| reduction.pages)
            .unwrap_or_default()
    }

    /// The stream has ended: appends what was still pending, at least one frame, and sums up.
    pub fn finish(mut self, frames: &mut Vec<EncodedFrame>) -> (StreamSummary, PageCounts) {
        let mut drafts = Vec::new();
        let summary = self.end(&mut drafts);
        self.code(drafts, frames);
        (summary, self.pages())
    }

    /// The stream has ended: appends drafts of what was still pending, at least one, and sums up.
    pub fn end(&mut self, drafts: &mut Vec<FrameDraft>) -> StreamSummary {
        if let Some(reduction) = &mut self.reduction {
            reduction.draft(&[], true, &mut self.held, drafts);
        }
        drafts.push(FrameDraft {
            held: true,
            ..FrameDraft::plain(&[])
        });
        StreamSummary {
            digest: StreamDigest(*self.hasher.finalize().as_bytes()),
            bytes: self.bytes,
        }
    }

    /// The reducer, which knows what is left for the next session once everything is coded.
    #[must_use]
    pub fn into_reducer(self) -> Option<Reducer> {
        self.reduction.map(|reduction| reduction.reducer)
    }

    fn code(&mut self, drafts: Vec<FrameDraft>, frames: &mut Vec<EncodedFrame>) {
        for draft in drafts {
            let coder = self.coder.get_or_insert_with(|| Coder::new(0));
            let (frame, coded) = draft.code(coder);
            frames.push(frame);
            if let Some(coded) = coded {
                self.learn(coded);
            }
        }
    }
}

impl Reduction {
    fn draft(&mut self, bytes: &[u8], end: bool, held: &mut bool, drafts: &mut Vec<FrameDraft>) {
        self.pending.extend_from_slice(bytes);
        self.records.clear();
        let mut events = Vec::new();
        let taken = match &mut self.parser {
            Parser::Qemu(parser) => parser.parse(&self.pending, end, &mut self.records, &mut events),
            Parser::Opaque(chunker) => chunker.cut(&self.pending, !end, &mut self.records),
        };
        for event in events {
            match event {
                StreamEvent::RamBlocks(blocks) => {
                    self.block_names = blocks.into_iter().map(|block| block.name).collect();
                }
                // The frames of this stretch are held as a whole: the memory in them is due at the end anyway. Where the parser missed the
                // end of memory, it may still find that of the stream.
                StreamEvent::DeviceState { .. } | StreamEvent::StreamEof { .. } => *held = true,
                _ => {}
            }
        }
        let mut digests = Vec::new();
        for batch in batches(&self.pending[..taken], &self.records, &self.block_names) {
            digests.clear();
            batch.digest_pages(&mut digests);
            drafts.push(FrameDraft {
                content: Content::Reduced(self.reducer.draft(&batch, &digests)),
                stream_bytes: u32::try_from(batch.bytes().len()).expect("a batch is at most MAX_BATCH_BYTES"),
                held: *held,
            });
        }
        self.pending.drain(..taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::reduce::DictionaryLimits;

    #[test]
    fn the_end_of_a_stream_whose_memory_was_not_recognised_is_held() {
        let mut encoder = Encoder::new(Some(Reducer::new(DictionaryLimits::new(16, 4).unwrap(), 16)));
        let (mut before, mut end) = (Vec::new(), Vec::new());
        encoder.feed(b"QEVM\0\0\0\x03", &mut before);
        // EOF and a description of two bytes.
        encoder.feed(b"\0\x06\0\0\0\x02{}", &mut end);
        encoder.finish(&mut end);
        assert!(before.iter().all(|frame| !frame.held));
        assert!(end.iter().map(|frame| frame.stream_bytes).sum::<u32>() >= 8);
        assert!(end.iter().all(|frame| frame.held));
    }
}
