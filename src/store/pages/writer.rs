//! Writes an image: beside, synced, then under its name.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::format::{self, HEAD_AT, HEAD_NUMBER, Head, INDEX_NUMBER, MAGIC, PAGES_AT, SALT_LEN, SEALED_PAGE, Whose};
use super::key::{ImageKey, StoreKey};
use super::{StoreError, sync_dir};
use crate::proto::page::{MigrationId, PAGE_SIZE, PageDigest};
use crate::proto::reduce::{KeptPages, KnownPages, PageShelf, digest_many};

/// Pages that are hashed and sealed at a time.
const AT_A_TIME: usize = 256;

/// Pages between two syncs: the ownership journal's own, on the same disk, waits for no more than 32 MiB of these.
const SYNC_EVERY: u64 = 8192;

/// Writes the image of `kept` to `path` in `dir`. Contents are numbered in the order of the pages that have them, so that two sites whose
/// sessions ended alike write the same.
pub(super) fn write<S: PageShelf>(
    dir: &Path,
    path: &Path,
    key: &StoreKey,
    (id, whose, unix_ms): (MigrationId, &Whose, u64),
    kept: &mut KeptPages<S>,
) -> Result<Head, StoreError> {
    let beside = dir.join(format!(".{id}.part"));
    let written = write_beside(&beside, key, (id, whose, unix_ms), kept).and_then(|head| {
        std::fs::rename(&beside, path).map_err(|error| StoreError::io(path, error))?;
        sync_dir(dir)?;
        Ok(head)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

fn write_beside<S: PageShelf>(
    beside: &Path,
    key: &StoreKey,
    (id, whose, unix_ms): (MigrationId, &Whose, u64),
    kept: &mut KeptPages<S>,
) -> Result<Head, StoreError> {
    let failed = |error| StoreError::io(beside, error);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(beside).map_err(failed)?;
    let mut salt = [0; SALT_LEN];
    getrandom::fill(&mut salt).map_err(|error| failed(std::io::Error::other(error)))?;
    let key = key.of_image(&salt);

    let mut numbers = HashMap::new();
    let mut slots = Vec::new();
    let places = kept.places.iter().map(|&(at, slot)| {
        let number = *numbers.entry(slot).or_insert_with(|| {
            slots.push(slot);
            slots.len() as u32 - 1
        });
        (at, number)
    });
    let places: Vec<_> = places.collect();
    let mut out = BufWriter::with_capacity(AT_A_TIME * SEALED_PAGE, file);
    out.write_all(&[0; PAGES_AT]).map_err(failed)?;
    let digests = write_pages(&mut out, beside, &key, &slots, &mut kept.shelf)?;
    let pages = KnownPages::new(digests, places).expect("each place was given a number");
    let mut index = format::index_to_bytes(&pages);
    key.seal(INDEX_NUMBER, &mut index);
    out.write_all(&index).map_err(failed)?;

    let head = Head {
        id,
        whose: whose.clone(),
        unix_ms,
        contents: slots.len() as u32,
        places: pages.places().len() as u32,
        digest: pages.digest(),
    };
    let mut sealed = head
        .to_bytes()
        .ok_or_else(|| failed(std::io::Error::other("the names of the VM and its tenant are too long")))?;
    key.seal(HEAD_NUMBER, &mut sealed);
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
    key: &ImageKey,
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
            key.seal(number, &mut sealed);
            out.write_all(&sealed).map_err(|error| StoreError::io(beside, error))?;
            number += 1;
        }
    }
    Ok(digests)
}
