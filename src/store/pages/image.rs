//! An image that is open to be read.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::format::{self, HEAD_AT, HEAD_NUMBER, Head, INDEX_NUMBER, MAGIC, PAGES_AT, SALT_LEN, SEALED_PAGE};
use super::key::StoreKey;
use super::{Listed, StoreError};
use crate::proto::page::PAGE_SIZE;
use crate::proto::reduce::{KnownContent, KnownPages, digest_many};
use crate::store::seal::SealingKey;

/// An image of the store. What it holds stays readable until it is dropped, whatever becomes of its file's name.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    key: SealingKey,
    head: Head,
}

/// Pages that are verified at a time.
const AT_A_TIME: usize = 256;

impl Image {
    /// Opens the file and reads what it says of itself.
    pub(super) fn open(path: &Path, key: &StoreKey) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io(path, error);
        let file = OpenOptions::new().read(true).open(path).map_err(failed)?;
        let mut start = [0; PAGES_AT];
        file.read_exact_at(&mut start, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => StoreError::damaged(path, "it is shorter than its head"),
            _ => failed(error),
        })?;
        let salt: &[u8; SALT_LEN] = start[MAGIC.len()..].first_chunk().expect("the head is longer");
        if !start.starts_with(MAGIC) {
            return Err(StoreError::damaged(path, "it does not begin as an image does"));
        }
        let key = key.of_image(salt);
        let head = key.open(HEAD_NUMBER, &mut start[HEAD_AT..]);
        let head = head.and_then(|bytes| Head::from_bytes(bytes));
        let head =
            head.ok_or_else(|| StoreError::damaged(path, "its head is not what was sealed with this store's key"))?;
        if file.metadata().map_err(failed)?.len() != head.file_len() {
            return Err(StoreError::damaged(path, "it has not the length that its head states"));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            key,
            head,
        })
    }

    /// What it says of itself.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// What a session that begins with it knows.
    ///
    /// # Errors
    /// [`StoreError`] where the index cannot be read.
    pub fn pages(&self) -> Result<KnownPages, StoreError> {
        let mut index = vec![0; self.head.index_len()];
        let read = self.file.read_exact_at(&mut index, self.head.index_at());
        read.map_err(|error| StoreError::io(&self.path, error))?;
        let index = self.key.open(INDEX_NUMBER, &mut index);
        let pages = index.and_then(|bytes| format::index_from_bytes(&self.head, bytes));
        pages.ok_or_else(|| StoreError::damaged(&self.path, "its index is not what was sealed"))
    }

    /// Copies the content of this number to `page`.
    ///
    /// # Errors
    /// [`StoreError`] where it is not there or not what was sealed.
    pub fn read(&self, number: u32, page: &mut [u8; PAGE_SIZE]) -> Result<(), StoreError> {
        if number >= self.head.contents {
            return Err(StoreError::damaged(&self.path, "a page beyond its end was asked for"));
        }
        let mut sealed = [0; SEALED_PAGE];
        let at = PAGES_AT as u64 + u64::from(number) * SEALED_PAGE as u64;
        let read = self.file.read_exact_at(&mut sealed, at);
        read.map_err(|error| StoreError::io(&self.path, error))?;
        match self.key.open(number.into(), &mut sealed) {
            Some(opened) => page.copy_from_slice(opened),
            None => return Err(StoreError::damaged(&self.path, "a page is not what was sealed")),
        }
        Ok(())
    }

    /// Reads all of it.
    ///
    /// # Errors
    /// [`StoreError`] where anything is not what was written.
    pub fn verify(&self) -> Result<(), StoreError> {
        let known = self.pages()?;
        let mut pages = vec![[0; PAGE_SIZE]; AT_A_TIME.min(known.digests().len())];
        let mut found = Vec::with_capacity(AT_A_TIME);
        let mut number = 0;
        for expected in known.digests().chunks(AT_A_TIME) {
            for page in &mut pages[..expected.len()] {
                self.read(number, page)?;
                number += 1;
            }
            found.clear();
            digest_many(&pages[..expected.len()].iter().collect::<Vec<_>>(), &mut found);
            if found != expected {
                return Err(StoreError::damaged(
                    &self.path,
                    "a page is not the one that its index names",
                ));
            }
        }
        Ok(())
    }

    pub(super) fn listed(&self) -> Result<Listed, StoreError> {
        let metadata = self
            .file
            .metadata()
            .map_err(|error| StoreError::io(&self.path, error))?;
        Ok(Listed {
            head: self.head.clone(),
            bytes: metadata.len(),
            used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        })
    }

    /// It counts as used `now`.
    ///
    /// # Errors
    /// What the system says.
    pub fn touch(&self, now: SystemTime) -> io::Result<()> {
        self.file.set_modified(now)
    }
}

impl KnownContent for Arc<Image> {
    fn read(&mut self, number: u32, page: &mut [u8; PAGE_SIZE]) -> bool {
        // The session goes on without it; the next scrub finds what is wrong.
        Image::read(self, number, page).is_ok()
    }
}
