//! What an image looks like on the disk.
//!
//! ```text
//! 0         magic[16]  salt[32]   the key of the image is BLAKE3 (derive_key) of the store's key and the salt
//! 48        sealed head[4048]     number 2^64 - 1: u16 n, postcard(Head)[n], zeroes
//! 4096      sealed page[4112] × contents        numbers 0, 1, …
//! …         sealed index          number 2^64 - 2: digest[16] × contents, (u16 block, u64 page, u32 content) × places
//! ```
//!
//! Sealed: AES-256-GCM, the tag of 16 bytes behind. Numbers are the nonces, integers are little-endian. The file ends with the index.

use serde::{Deserialize, Serialize};

use crate::proto::page::{ImageDigest, MigrationId, PAGE_SIZE, PageAddress, PageDigest};
use crate::proto::reduce::KnownPages;
use crate::store::seal::TAG_LEN;

/// Begins every image of this format.
pub(super) const MAGIC: &[u8; 16] = b"longhaul pages 1";

pub(super) const SALT_LEN: usize = 32;
pub(super) const HEAD_AT: usize = MAGIC.len() + SALT_LEN;

/// Pages begin here.
pub(super) const PAGES_AT: usize = 4096;

/// A page and its tag.
pub(super) const SEALED_PAGE: usize = PAGE_SIZE + TAG_LEN;

pub(super) const HEAD_NUMBER: u64 = u64::MAX;
pub(super) const INDEX_NUMBER: u64 = u64::MAX - 1;

const DIGEST: usize = 16;
const PLACE: usize = 14;

/// An image of 4 TiB.
const MOST_CONTENTS: u32 = 1 << 30;

/// The VM that moved, and between whom: images are shared by VMs of one tenant that move between the same two sites. So a peer is only ever told of,
/// and can only ever name, what it has itself sent or received, and seeds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Whose {
    /// The VM.
    pub vm: String,
    /// Its tenant.
    pub tenant: String,
    /// The other site.
    pub peer: String,
}

impl Whose {
    /// Of a seed: what an operator gave to every site. It serves VMs of this tenant, or of all where none is named, whatever the peer.
    #[must_use]
    pub fn seed(tenant: &str) -> Self {
        Self {
            vm: String::new(),
            tenant: tenant.to_owned(),
            peer: String::new(),
        }
    }

    /// Whether it is a seed's: no VM and no site is without a name.
    #[must_use]
    pub fn is_seed(&self) -> bool {
        self.vm.is_empty() && self.peer.is_empty()
    }

    /// Whether an image of `self` may serve `other`.
    #[must_use]
    pub fn shares_with(&self, other: &Self) -> bool {
        if self.is_seed() {
            return self.tenant.is_empty() || self.tenant == other.tenant;
        }
        self.tenant == other.tenant && self.peer == other.peer
    }
}

/// What an image says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The migration that left it; of a seed, made from its content.
    pub id: MigrationId,
    /// Whose memory it is.
    pub whose: Whose,
    /// When it was written, in milliseconds since 1970 UTC.
    pub unix_ms: u64,
    /// Pages in it.
    pub contents: u32,
    /// Pages of the VM that have one of them.
    pub places: u32,
    /// Of its [`KnownPages`].
    pub digest: ImageDigest,
}

impl Head {
    /// The head in what was sealed as one; `None` where it is none.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (len, rest) = bytes.split_first_chunk()?;
        let head: Self = postcard::from_bytes(rest.get(..usize::from(u16::from_le_bytes(*len)))?).ok()?;
        (head.contents <= MOST_CONTENTS && head.places <= MOST_CONTENTS).then_some(head)
    }

    /// As it is sealed, with room for the tag; `None` where names are too long.
    pub(super) fn to_bytes(&self) -> Option<Vec<u8>> {
        let head = postcard::to_allocvec(self).ok()?;
        let mut bytes = u16::try_from(head.len()).ok()?.to_le_bytes().to_vec();
        bytes.extend_from_slice(&head);
        (bytes.len() <= PAGES_AT - HEAD_AT - TAG_LEN).then(|| {
            bytes.resize(PAGES_AT - HEAD_AT, 0);
            bytes
        })
    }

    /// Where the index begins.
    pub(super) fn index_at(&self) -> u64 {
        PAGES_AT as u64 + u64::from(self.contents) * SEALED_PAGE as u64
    }

    /// Bytes of the index with its tag.
    pub(super) fn index_len(&self) -> usize {
        self.contents as usize * DIGEST + self.places as usize * PLACE + TAG_LEN
    }

    /// Bytes of the whole file.
    pub(super) fn file_len(&self) -> u64 {
        self.index_at() + self.index_len() as u64
    }
}

/// What the image of so many contents and places takes.
pub(super) fn bytes_of(contents: usize, places: usize) -> u64 {
    (PAGES_AT + TAG_LEN) as u64 + contents as u64 * (SEALED_PAGE + DIGEST) as u64 + places as u64 * PLACE as u64
}

/// The index as it is sealed, with room for the tag.
pub(super) fn index_to_bytes(pages: &KnownPages) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(pages.digests().len() * DIGEST + pages.places().len() * PLACE + TAG_LEN);
    for digest in pages.digests() {
        bytes.extend_from_slice(&digest.0);
    }
    for (at, content) in pages.places() {
        bytes.extend_from_slice(&at.block.to_le_bytes());
        bytes.extend_from_slice(&at.page.to_le_bytes());
        bytes.extend_from_slice(&content.to_le_bytes());
    }
    bytes.resize(bytes.len() + TAG_LEN, 0);
    bytes
}

/// The pages of an opened index; `None` where it is not one of an image with this head.
pub(super) fn index_from_bytes(head: &Head, bytes: &[u8]) -> Option<KnownPages> {
    let (digests, places) = bytes.split_at_checked(head.contents as usize * DIGEST)?;
    let digests = digests.as_chunks::<DIGEST>().0.iter().map(|digest| PageDigest(*digest));
    let places = places.as_chunks::<PLACE>().0.iter().map(|place| {
        let (block, rest) = place.split_first_chunk()?;
        let (page, rest) = rest.split_first_chunk()?;
        let at = PageAddress {
            block: u16::from_le_bytes(*block),
            page: u64::from_le_bytes(*page),
        };
        Some((at, u32::from_le_bytes(*rest.first_chunk()?)))
    });
    let pages = KnownPages::new(digests.collect(), places.collect::<Option<_>>()?).ok()?;
    (pages.places().len() == head.places as usize && pages.digest() == head.digest).then_some(pages)
}
