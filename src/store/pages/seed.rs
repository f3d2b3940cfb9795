//! Seeds: what operating systems are installed from, as the blocks of a disk image.
//!
//! Much of what a Linux guest has in memory is cache of its disk, a page of it a block of 4 KiB. Where both sites have read the same disk image
//! into their stores, these pages are named and not sent, in the first migration of a VM too.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::StoreError;
use crate::proto::page::{MigrationId, PAGE_SIZE, PageDigest};
use crate::proto::reduce::{PageShelf, ShelfError, digest_many};

/// Most pages of a seed, 3 GiB: a session's dictionary has 4 GiB, and needs room for the guest.
pub const MOST_PAGES: usize = 3 << 18;

/// Blocks that are read at a time.
const AT_A_TIME: usize = 256;

/// The distinct blocks of a disk image that are not zero, in their order.
#[derive(Debug)]
pub(super) struct Blocks {
    file: File,
    /// Where each begins, in blocks.
    at: Vec<u64>,
    digests: Vec<PageDigest>,
    /// Other blocks, for which [`MOST_PAGES`] had no room.
    left_out: u64,
}

/// What begins files that hold the blocks of a disk in another shape than the disk's.
const OTHER_SHAPES: [(&[u8], &str); 7] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
];

impl Blocks {
    /// Reads all of `path`; holes of a sparse file cost nothing.
    pub(super) fn of(path: &Path) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io(path, error);
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(failed(io::Error::other("it is neither a file nor a disk")));
        }
        let file = File::open(path).map_err(failed)?;
        let mut start = [0; 8];
        let read = file.read_at(&mut start, 0).map_err(failed)?;
        if let Some((_, shape)) = OTHER_SHAPES.iter().find(|(magic, _)| start[..read].starts_with(magic)) {
            return Err(StoreError::NotRaw {
                path: path.to_owned(),
                shape,
            });
        }
        let mut blocks = Self {
            file,
            at: Vec::new(),
            digests: Vec::new(),
            left_out: 0,
        };
        blocks.read_all().map_err(failed)?;
        if blocks.at.is_empty() {
            return Err(StoreError::Blank { path: path.to_owned() });
        }
        Ok(blocks)
    }

    fn read_all(&mut self) -> io::Result<()> {
        let mut seen = HashSet::new();
        let mut buffer = vec![0; AT_A_TIME * PAGE_SIZE];
        let mut next = 0;
        while let Some(data) = self.data_from(next * PAGE_SIZE as u64)? {
            next = data / PAGE_SIZE as u64;
            let len = read_at_most(&self.file, &mut buffer, next * PAGE_SIZE as u64)?;
            // A file that ends within a block ends in zeroes, as on a disk.
            buffer[len..].fill(0);
            let (pages, _) = buffer.as_chunks::<PAGE_SIZE>();
            let pages = &pages[..len.div_ceil(PAGE_SIZE)];
            if pages.is_empty() {
                break;
            }
            let mut digests = Vec::with_capacity(pages.len());
            digest_many(&pages.iter().collect::<Vec<_>>(), &mut digests);
            for ((number, page), digest) in (next..).zip(pages).zip(digests) {
                if page.iter().all(|&byte| byte == 0) || seen.contains(&digest) {
                    continue;
                }
                if self.at.len() == MOST_PAGES {
                    self.left_out += 1;
                } else {
                    seen.insert(digest);
                    self.at.push(number);
                    self.digests.push(digest);
                }
            }
            next += pages.len() as u64;
        }
        Ok(())
    }

    /// Where data begins from this offset on; where the file system cannot tell, here.
    fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => Ok(Some(data)),
            Err(Errno::NXIO) => Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::SPIPE) => Ok(Some(offset)),
            Err(error) => Err(error.into()),
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.at.len()
    }

    /// How many more the file has.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// What it is called at every site that has read the same.
    pub(super) fn id(&self, tenant: &str) -> MigrationId {
        let mut hasher = blake3::Hasher::new_derive_key("longhaul 2026-11 id of a seed");
        for digest in &self.digests {
            hasher.update(&digest.0);
        }
        hasher.update(tenant.as_bytes());
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        MigrationId(id)
    }

    /// The digests of what was read.
    pub(super) fn digests(&self) -> &[PageDigest] {
        &self.digests
    }
}

/// Fills as much of `buffer` as there is.
fn read_at_most(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], offset + len as u64) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

impl PageShelf for Blocks {
    fn put(&mut self, slot: u32, _: &[u8]) -> Result<(), ShelfError> {
        Err(ShelfError::NoSuchSlot { slot })
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        let at = *self.at.get(slot as usize).ok_or(ShelfError::NoSuchSlot { slot })?;
        let read = read_at_most(&self.file, page, at * PAGE_SIZE as u64);
        let len = read.map_err(|error| ShelfError::Storage {
            slot,
            source: error.into(),
        })?;
        page[len..].fill(0);
        Ok(())
    }
}
