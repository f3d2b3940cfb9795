//! The destination's stages: from frames, in order, back to the vmm's bytes and their digest.

use bytes::Bytes;

use super::encoder::StreamSummary;
use crate::proto::page::StreamDigest;
use crate::proto::wire::{Frame, FrameKind};

/// Restores one migration's stream.
#[derive(Debug, Default)]
pub struct Decoder {
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Decoder {
    /// The stream bytes that the next frame in sequence stands for.
    ///
    /// # Errors
    /// [`DecodeError`]: the peer sent what its own encoder cannot have made; the migration cannot go on.
    pub fn restore(&mut self, frame: &Frame) -> Result<Bytes, DecodeError> {
        let bytes = match frame.header.kind {
            FrameKind::Plain => frame.payload.clone(),
            FrameKind::Reduced => return Err(DecodeError::NotNegotiated),
        };
        if bytes.len() != frame.header.stream_bytes as usize {
            return Err(DecodeError::WrongLength { stated: frame.header.stream_bytes, restored: bytes.len() });
        }
        self.hasher.update(&bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// Digest and length of everything so far.
    #[must_use]
    pub fn summary(&self) -> StreamSummary {
        StreamSummary { digest: StreamDigest(*self.hasher.finalize().as_bytes()), bytes: self.bytes }
    }
}

/// A frame does not restore.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A reduced frame where plain ones were agreed.
    #[error("a reduced frame came where plain ones were agreed")]
    NotNegotiated,
    /// More or fewer bytes than the header says.
    #[error("a frame restores to {restored} bytes and states {stated}")]
    WrongLength {
        /// Bytes stated.
        stated: u32,
        /// Bytes restored.
        restored: usize,
    },
}
