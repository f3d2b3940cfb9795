//! The key of a store, and the keys of its images.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::{StoreError, sync_dir};

/// The key of a store: everything in it is sealed under keys that are derived from it.
pub(super) struct StoreKey([u8; KEY_LEN]);

/// The key of one image. A number seals once.
pub(super) struct ImageKey(LessSafeKey);

/// Bytes that sealing adds.
pub(super) const TAG_LEN: usize = 16;

const KEY_LEN: usize = 32;
const FILE_NAME: &str = "key";

/// What a key is called that is being erased.
const ERASED: &str = ".key.erased";

/// Names what keys are derived for (BLAKE3, `derive_key`): never used for anything else.
const CONTEXT: &str = "longhaul page store 2026-11-27 key of an image";

impl StoreKey {
    /// The key in `dir`; `None` where there is none.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>, StoreError> {
        let path = dir.join(FILE_NAME);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io(&path, error)),
        };
        let mut key = [0; KEY_LEN];
        let read = file.read_exact(&mut key);
        match read {
            // Of an erasure that was cut short: nothing may ever be sealed with it.
            Ok(()) if key == [0; KEY_LEN] => Ok(None),
            Ok(()) => Ok(Some(Self(key))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(StoreError::damaged(&path, "it is shorter than a key: erase the store"))
            }
            Err(error) => Err(StoreError::io(&path, error)),
        }
    }

    /// The key in `dir`, a new one where there is none.
    pub(super) fn load_or_create(dir: &Path) -> Result<Self, StoreError> {
        if let Some(key) = Self::load(dir)? {
            return Ok(key);
        }
        let (path, beside) = (dir.join(FILE_NAME), dir.join(".key.part"));
        let created = || {
            let mut key = [0; KEY_LEN];
            getrandom::fill(&mut key).map_err(io::Error::other)?;
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&beside)?;
            file.write_all(&key)?;
            file.sync_all()?;
            std::fs::rename(&beside, &path)?;
            Ok(Self(key))
        };
        let key = created().map_err(|error| StoreError::io(&path, error))?;
        sync_dir(dir)?;
        Ok(key)
    }

    /// Overwrites and removes the key in `dir`, which first loses its name: what is overwritten in part is no key.
    pub(super) fn erase(dir: &Path) -> Result<(), StoreError> {
        let path = dir.join(FILE_NAME);
        // Before another one takes the name.
        Self::finish_erasure(dir)?;
        match std::fs::rename(&path, dir.join(ERASED)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(StoreError::io(&path, error)),
            Ok(()) => {
                sync_dir(dir)?;
                Self::finish_erasure(dir)
            }
        }
    }

    /// The second half of an erasure, also of one that was cut short.
    pub(super) fn finish_erasure(dir: &Path) -> Result<(), StoreError> {
        let path = dir.join(ERASED);
        let erased = || {
            let file = match OpenOptions::new().write(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                opened => opened?,
            };
            file.write_all_at(&[0; KEY_LEN], 0)?;
            file.sync_all()?;
            std::fs::remove_file(&path)
        };
        erased().map_err(|error| StoreError::io(&path, error))?;
        sync_dir(dir)
    }

    /// The key of the image with this salt.
    pub(super) fn of_image(&self, salt: &[u8; 32]) -> ImageKey {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&self.0);
        hasher.update(salt);
        let key =
            UnboundKey::new(&AES_256_GCM, hasher.finalize().as_bytes()).expect("a BLAKE3 hash has the length of a key");
        ImageKey(LessSafeKey::new(key))
    }
}

impl ImageKey {
    /// Seals all but the last [`TAG_LEN`] bytes of `sealed` in place under `number`; those become the tag that opens it.
    pub(super) fn seal(&self, number: u64, sealed: &mut [u8]) {
        let (bytes, tag) = sealed.split_at_mut(sealed.len() - TAG_LEN);
        let made = self.0.seal_in_place_separate_tag(nonce(number), Aad::empty(), bytes);
        tag.copy_from_slice(
            made.expect("an image is far shorter than what AES-GCM can seal")
                .as_ref(),
        );
    }

    /// Opens in place what was sealed under `number`; `None` where it is not what was sealed.
    pub(super) fn open<'a>(&self, number: u64, sealed: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.0.open_in_place(nonce(number), Aad::empty(), sealed).ok()
    }
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl std::fmt::Debug for ImageKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ImageKey")
    }
}
