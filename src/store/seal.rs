//! Sealing of pages on a disk: AES-256-GCM under a key that seals each number once.

use std::io;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// An AES-256-GCM key. A number seals once at most: it is the nonce.
pub(super) struct SealingKey(LessSafeKey);

/// Bytes that sealing adds.
pub(super) const TAG_LEN: usize = 16;

/// What shows that sealed bytes are what was sealed.
pub(super) type Tag = [u8; TAG_LEN];

/// Bytes of a key.
pub(super) const KEY_LEN: usize = 32;

impl SealingKey {
    pub(super) fn new(key: &[u8; KEY_LEN]) -> Self {
        Self(LessSafeKey::new(
            UnboundKey::new(&AES_256_GCM, key).expect("the key has its length"),
        ))
    }

    /// A random key that is nowhere but in memory.
    pub(super) fn ephemeral() -> io::Result<Self> {
        let mut key = [0; KEY_LEN];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        Ok(Self::new(&key))
    }

    /// Seals all but the last [`TAG_LEN`] bytes of `sealed` in place under `number`, which was not used before; those
    /// become the tag that opens it.
    pub(super) fn seal_with_tag(&self, number: u64, sealed: &mut [u8]) {
        let (bytes, tag) = sealed.split_at_mut(sealed.len() - TAG_LEN);
        tag.copy_from_slice(&self.seal(number, bytes));
    }

    /// Seals `bytes` in place under `number`, which was not used before, and gives the tag that opens them.
    pub(super) fn seal(&self, number: u64, bytes: &mut [u8]) -> Tag {
        let tag = self.0.seal_in_place_separate_tag(nonce(number), Aad::empty(), bytes);
        let tag = tag.expect("pages and indexes are far shorter than what AES-GCM can seal");
        tag.as_ref().try_into().expect("a tag has its length")
    }

    /// Opens in place what was sealed under `number`, with the tag behind it; `None` where it is not what was sealed.
    pub(super) fn open<'a>(&self, number: u64, sealed: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.0.open_in_place(nonce(number), Aad::empty(), sealed).ok()
    }
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl std::fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealingKey")
    }
}
