//! The destination's stages: from frames, in order, back to the vmm's bytes and their digest.

use bytes::Bytes;

use super::encoder::StreamSummary;
use crate::proto::page::StreamDigest;
use crate::proto::reduce::{DictionaryLimits, KeptPages, KnownPages, PageCounts, PageShelf, RestoreError, Restorer};
use crate::proto::wire::{Frame, FrameKind};

/// Restores one migration's stream, with pages that a dictionary names on the shelf `S`.
#[derive(Debug)]
pub struct Decoder<S> {
    hasher: blake3::Hasher,
    bytes: u64,
    restorer: Option<Restorer<S>>,
    pages: PageCounts,
}

impl<S: PageShelf> Decoder<S> {
    /// A decoder of bytes as they are (`None`), or of payloads that were reduced with a dictionary of these limits.
    #[must_use]
    pub fn new(dictionary: Option<(DictionaryLimits, S)>) -> Self {
        let restorer = dictionary.map(|(limits, shelf)| Restorer::new(limits, shelf));
        Self {
            hasher: blake3::Hasher::new(),
            bytes: 0,
            restorer,
            pages: PageCounts::default(),
        }
    }

    /// Begins with what both ends hold of an earlier session, of which the shelf has content n in slot n.
    pub fn know(&mut self, pages: &KnownPages) {
        if let Some(restorer) = &mut self.restorer {
            restorer.know(pages);
        }
    }

    /// What is left for the next session, once the last frame is restored.
    #[must_use]
    pub fn into_kept(self) -> Option<KeptPages<S>> {
        self.restorer.and_then(Restorer::into_kept)
    }

    /// The stream bytes that the next frame in sequence stands for.
    ///
    /// # Errors
    /// [`DecodeError`]: the peer sent what its own encoder cannot have made, or the shelf failed; the migration cannot go on.
    pub fn restore(&mut self, frame: &Frame) -> Result<Bytes, DecodeError> {
        let bytes = match (frame.header.kind, &mut self.restorer) {
            (FrameKind::Plain, _) => frame.payload.clone(),
            (FrameKind::Reduced, None) => return Err(DecodeError::NotNegotiated),
            (FrameKind::Repair, _) => return Err(DecodeError::Repair),
            (FrameKind::Reduced, Some(restorer)) => {
                let mut bytes = Vec::with_capacity(frame.header.stream_bytes as usize);
                let stats = restorer.restore(&frame.payload, &mut bytes)?;
                self.pages += stats.pages;
                bytes.into()
            }
        };
        if bytes.len() != frame.header.stream_bytes as usize {
            return Err(DecodeError::WrongLength {
                stated: frame.header.stream_bytes,
                restored: bytes.len(),
            });
        }
        self.hasher.update(&bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes)
    }

    /// Digest and length of everything so far.
    #[must_use]
    pub fn summary(&self) -> StreamSummary {
        StreamSummary {
            digest: StreamDigest(*self.hasher.finalize().as_bytes()),
            bytes: self.bytes,
        }
    }

    /// Pages so far, by how they came.
    #[must_use]
    pub fn pages(&self) -> PageCounts {
        self.pages
    }
}

/// A frame does not restore.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A reduced frame where plain ones were agreed.
    #[error("a reduced frame came where plain ones were agreed")]
    NotNegotiated,
    /// A repair stands for no bytes of the stream.
    #[error("a repair came where the stream goes on")]
    Repair,
    /// The payload is not one that an encoder in step with this decoder makes.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// More or fewer bytes than the header says.
    #[error("a frame restores to {restored} bytes and states {stated}")]
    WrongLength {
        /// Bytes stated.
        stated: u32,
        /// Bytes restored.
        restored: usize,
    },
}
