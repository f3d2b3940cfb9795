//! Writes an image: beside, synced, then under its name.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::format::{self, HEAD_AT, HEAD_NUMBER, Head, INDEX_NUMBER, MAGIC, PAGES_AT, SALT_LEN, SEALED_PAGE, Whose};
use super::key::StoreKey;
use super::{StoreError, sync_dir};
use crate::proto::page::{MigrationId, PAGE_SIZE, PageAddress, PageDigest};
use crate::proto::reduce::{KeptPages, KnownPages, PageShelf, digest_many};
use crate::store::seal::SealingKey;

/// Pages that are hashed and sealed at a time.
const AT_A_TIME: usize = 256;

/// Pages between two syncs: the ownership journal's own, on the same disk, waits for no more than 32 MiB of these.
const SYNC_EVERY: u64 = 8192;

/// What an image will hold.
pub(super) struct ToWrite<'a, S> {
    pub(super) id: MigrationId,
    pub(super) whose: &'a Whose,
    pub(super) unix_ms: u64,
    /// Of the contents, by number.
    pub(super) slots: Vec<u32>,
    /// Pages, with the number of their content.
    pub(super) places: Vec<(PageAddress, u32)>,
    pub(super) shelf: &'a mut S,
}

impl<'a, S> ToWrite<'a, S> {
    /// What a session has left. Contents are numbered in the order of the pages that have them, so that two sites whose sessions ended alike
    /// write the same.
    pub(super) fn of_session(id: MigrationId, whose: &'a Whose, unix_ms: u64, kept: &'a mut KeptPages<S>) -> Self {
        let mut numbers = HashMap::new();
        let mut slots = Vec::new();
        let places = kept.places.iter().map(|&(at, slot)| {
            let number = *numbers.entry(slot).or_insert_with(|| {
                slots.push(slot);
                slots.len() as u32 - 1
            });
            (at, number)
        });
        let places = places.collect();
        Self {
            id,
            whose,
            unix_ms,
            slots,
            places,
            shelf: &mut kept.shelf,
        }
    }

    /// Bytes of the image.
    pub(super) fn bytes(&self) -> u64 {
        format::bytes_of(self.slots.len(), self.places.len())
    }
}

/// Writes an image to `path` in `dir`.
pub(super) fn write<S: PageShelf>(
    dir: &Path,
    path: &Path,
    key: &StoreKey,
    image: ToWrite<'_, S>,
) -> Result<Head, StoreError> {
    let beside = dir.join(format!(".{}.part", image.id));
    let written = write_beside(&beside, key, image).and_then(|head| {
        std::fs::rename(&beside, path).map_err(|error| StoreError::io(path, error))?;
        sync_dir(dir)?;
        Ok(head)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

fn write_beside<S: PageShelf>(beside: &Path, key: &StoreKey, image: ToWrite<'_, S>) -> Result<Head, StoreError> {
    let failed = |error| StoreError::io(beside, error);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(beside).map_err(failed)?;
    let mut salt = [0; SALT_LEN];
    getrandom::fill(&mut salt).map_err(|error| failed(std::io::Error::other(error)))?;
    let key = key.of_image(&salt);

    let mut out = BufWriter::with_capacity(AT_A_TIME * SEALED_PAGE, file);
    out.write_all(&[0; PAGES_AT]).map_err(failed)?;
    let digests = write_pages(&mut out, beside, &key, &image.slots, image.shelf)?;
    let pages = KnownPages::new(digests, image.places).expect("each place was given a number");
    let mut index = format::index_to_bytes(&pages);
    key.seal_with_tag(INDEX_NUMBER, &mut index);
    out.write_all(&index).map_err(failed)?;

    let head = Head {
        id: image.id,
        whose: image.whose.clone(),
        unix_ms: image.unix_ms,
        contents: image.slots.len() as u32,
        places: pages.places().len() as u32,
        digest: pages.digest(),
    };
    let mut sealed = head
        .to_bytes()
        .ok_or_else(|| failed(std::io::Error::other("the names of the VM and its tenant are too long")))?;
    key.seal_with_tag(HEAD_NUMBER, &mut sealed);
    let finished = || {
        out.seek(SeekFrom::Start(0))?;
        out.write_all(MAGIC)?;
        out.write_all(&salt)?;
        debug_assert_eq!(HEAD_AT + sealed.len(), PAGES_AT);
        out.write_all(&sealed)?;
        out.into_inner()?.sync_all()
    };
    finished().map_err(failed)?;
    Ok(head)
}

fn write_pages<S: PageShelf>(
    out: &mut BufWriter<File>,
    beside: &Path,
    key: &SealingKey,
    slots: &[u32],
    shelf: &mut S,
) -> Result<Vec<PageDigest>, StoreError> {
    let mut digests = Vec::with_capacity(slots.len());
    let mut pages = vec![[0; PAGE_SIZE]; AT_A_TIME.min(slots.len())];
    let mut sealed = [0; SEALED_PAGE];
    let mut number: u64 = 0;
    for slots in slots.chunks(AT_A_TIME) {
        for (page, &slot) in pages.iter_mut().zip(slots) {
            shelf.get(slot, page)?;
        }
        let pages = &pages[..slots.len()];
        digest_many(&pages.iter().collect::<Vec<_>>(), &mut digests);
        if number > 0 && number.is_multiple_of(SYNC_EVERY) {
            let synced = out.flush().and_then(|()| out.get_ref().sync_data());
            synced.map_err(|error| StoreError::io(beside, error))?;
        }
        for page in pages {
            sealed[..PAGE_SIZE].copy_from_slice(page);
            key.seal_with_tag(number, &mut sealed);
            out.write_all(&sealed).map_err(|error| StoreError::io(beside, error))?;
            number += 1;
        }
    }
    Ok(digests)
}
