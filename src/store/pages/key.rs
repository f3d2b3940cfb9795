//! The key of a store, and the keys of its images.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::{StoreError, sync_dir};
use crate::store::seal::{KEY_LEN, SealingKey};

/// The key of a store: everything in it is sealed under keys that are derived from it.
pub(super) struct StoreKey([u8; KEY_LEN]);

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
    pub(super) fn of_image(&self, salt: &[u8; 32]) -> SealingKey {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&self.0);
        hasher.update(salt);
        SealingKey::new(hasher.finalize().as_bytes())
    }
}
