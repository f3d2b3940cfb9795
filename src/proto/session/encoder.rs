//! From a vmm's bytes to payloads: the source's stages in a row.
//!
//! Pure and synchronous; the edge runs it on a thread of its own, since it hashes and compresses.

use bytes::Bytes;

use crate::proto::page::StreamDigest;
use crate::proto::reduce::{Effort, PageCounts, Reducer, batches};
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
}

#[derive(Debug)]
struct Reduction {
    parser: QemuParser,
    reducer: Reducer,
    /// Bytes that the parser has not taken yet: part of a header and a page at most.
    pending: Vec<u8>,
    records: Vec<Record>,
    block_names: Vec<Vec<u8>>,
    pages: PageCounts,
}

impl Encoder {
    /// An encoder that carries the bytes as they are (`None`), or reduces them.
    #[must_use]
    pub fn new(reducer: Option<Reducer>) -> Self {
        let reduction = reducer.map(|reducer| Reduction {
            parser: QemuParser::default(),
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
        }
    }

    /// How hard to compress from now on.
    pub fn set_effort(&mut self, effort: Effort) {
        if let Some(reduction) = &mut self.reduction {
            reduction.reducer.set_effort(effort);
        }
    }

    /// Takes the next bytes of the stream and appends the frames they make. Up to a header and a page stay pending until more
    /// comes.
    pub fn feed(&mut self, bytes: &[u8], frames: &mut Vec<EncodedFrame>) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        match &mut self.reduction {
            Some(reduction) => reduction.feed(bytes, false, &mut self.held, frames),
            None => frames.extend(bytes.chunks(MAX_RAW).map(plain)),
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
    pub fn finish(self, frames: &mut Vec<EncodedFrame>) -> (StreamSummary, PageCounts) {
        let (summary, pages, _) = self.finish_with_reducer(frames);
        (summary, pages)
    }

    /// The same, and the reducer, which knows what is left for the next session.
    pub fn finish_with_reducer(
        mut self,
        frames: &mut Vec<EncodedFrame>,
    ) -> (StreamSummary, PageCounts, Option<Reducer>) {
        if let Some(reduction) = &mut self.reduction {
            reduction.feed(&[], true, &mut self.held, frames);
        }
        frames.push(EncodedFrame {
            held: true,
            ..plain(&[])
        });
        let summary = StreamSummary {
            digest: StreamDigest(*self.hasher.finalize().as_bytes()),
            bytes: self.bytes,
        };
        let pages = self.pages();
        (summary, pages, self.reduction.map(|reduction| reduction.reducer))
    }
}

impl Reduction {
    fn feed(&mut self, bytes: &[u8], end: bool, held: &mut bool, frames: &mut Vec<EncodedFrame>) {
        self.pending.extend_from_slice(bytes);
        self.records.clear();
        let mut events = Vec::new();
        let taken = self.parser.parse(&self.pending, end, &mut self.records, &mut events);
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
            let mut payload = Vec::new();
            let stats = self.reducer.encode(&batch, &digests, &mut payload);
            self.pages += stats.pages;
            frames.push(EncodedFrame {
                kind: FrameKind::Reduced,
                payload: payload.into(),
                stream_bytes: u32::try_from(batch.bytes().len()).expect("a batch is at most MAX_BATCH_BYTES"),
                held: *held,
            });
        }
        self.pending.drain(..taken);
    }
}

fn plain(piece: &[u8]) -> EncodedFrame {
    EncodedFrame {
        kind: FrameKind::Plain,
        payload: Bytes::copy_from_slice(piece),
        stream_bytes: u32::try_from(piece.len()).expect("a piece is at most MAX_RAW"),
        held: false,
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
