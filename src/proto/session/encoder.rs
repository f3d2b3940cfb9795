//! From a vmm's bytes to payloads, and back: the stages in a row.
//!
//! Pure and synchronous; the edge runs it on a thread of its own.

use bytes::Bytes;

use crate::proto::page::StreamDigest;
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
}

impl Default for Encoder {
    fn default() -> Self {
        Self { hasher: blake3::Hasher::new(), bytes: 0 }
    }
}

impl Encoder {
    /// Takes the next bytes of the stream and appends the frames they make.
    pub fn feed(&mut self, bytes: &[u8], frames: &mut Vec<EncodedFrame>) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        for piece in bytes.chunks(MAX_RAW) {
            frames.push(EncodedFrame {
                kind: FrameKind::Plain,
                payload: Bytes::copy_from_slice(piece),
                stream_bytes: u32::try_from(piece.len()).expect("a piece is at most MAX_RAW"),
                held: false,
            });
        }
    }

    /// The stream has ended: appends what was still pending, at least one frame, and sums up.
    pub fn finish(self, frames: &mut Vec<EncodedFrame>) -> StreamSummary {
        frames.push(EncodedFrame { kind: FrameKind::Plain, payload: Bytes::new(), stream_bytes: 0, held: true });
        StreamSummary { digest: StreamDigest(*self.hasher.finalize().as_bytes()), bytes: self.bytes }
    }
}
