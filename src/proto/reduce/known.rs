//! What both ends hold before the first payload of a session: pages of an earlier migration, or blocks of a disk.
//!
//! They fill the dictionary from slot 0 on, in their order, and the table of what was last sent for each page, as if the source had
//! just sent them all. So nothing on the wire is special about them: a page that has not changed is *same*, one that has is a delta, one that
//! turned up elsewhere a reference.

use std::fmt;

use super::dictionary::SlotRing;
use super::sent::SentPages;
use crate::proto::page::{ImageDigest, PAGE_SIZE, PageAddress, PageDigest};

/// Contents, numbered from 0 on, and which of them each page had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KnownPages {
    digests: Vec<PageDigest>,
    places: Vec<(PageAddress, u32)>,
}

/// The bytes of known pages, at the source: what changed in them is told by comparing.
pub trait KnownContent: Send {
    /// Copies the content of this number to `page`. `false` where it cannot be had: it is then sent as if it were new.
    fn read(&mut self, number: u32, page: &mut [u8; PAGE_SIZE]) -> bool;
}

/// What a session leaves for the next one: the slot that each page was last sent from, and the contents of slots.
pub struct KeptPages<S> {
    /// By slot.
    pub shelf: S,
    /// In the order of their addresses.
    pub places: Vec<(PageAddress, u32)>,
}

impl KnownPages {
    /// Contents by digest, and the pages that have them.
    ///
    /// # Errors
    /// [`NoSuchContent`] where a place names a content that is not there.
    pub fn new(digests: Vec<PageDigest>, places: Vec<(PageAddress, u32)>) -> Result<Self, NoSuchContent> {
        match places.iter().find(|(_, number)| *number as usize >= digests.len()) {
            Some(&(at, number)) => Err(NoSuchContent { at, number }),
            None => Ok(Self { digests, places }),
        }
    }

    /// Digests of the contents.
    #[must_use]
    pub fn digests(&self) -> &[PageDigest] {
        &self.digests
    }

    /// The pages, and the number of the content that each has.
    #[must_use]
    pub fn places(&self) -> &[(PageAddress, u32)] {
        &self.places
    }

    /// Slots, of so many, that begin with one of these contents.
    #[must_use]
    pub fn slots(&self, slots: u32) -> u32 {
        u32::try_from(self.digests.len()).unwrap_or(u32::MAX).min(slots)
    }

    /// What the other end must have found too.
    #[must_use]
    pub fn digest(&self) -> ImageDigest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.digests.len() as u64).to_le_bytes());
        for digest in &self.digests {
            hasher.update(&digest.0);
        }
        for (at, number) in &self.places {
            hasher.update(&at.block.to_le_bytes());
            hasher.update(&at.page.to_le_bytes());
            hasher.update(&number.to_le_bytes());
        }
        ImageDigest(*hasher.finalize().as_bytes())
    }
}

impl<S> KeptPages<S> {
    /// `None` where more pages were sent than the dictionary has slots: the next session would throw out each page just before it is sent.
    pub(super) fn of(shelf: S, sent: &SentPages, ring: SlotRing) -> Option<Self> {
        if sent.count() > u64::from(ring.capacity()) {
            return None;
        }
        let mut places = sent.places();
        places.retain(|&(_, slot)| ring.holds(slot));
        Some(Self { shelf, places })
    }
}

impl<S> fmt::Debug for KeptPages<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptPages")
            .field("places", &self.places.len())
            .finish_non_exhaustive()
    }
}

/// A page was said to have a content that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {} of block {} has content {number}, which is not there", at.page, at.block)]
pub struct NoSuchContent {
    /// The page.
    pub at: PageAddress,
    /// Number of the content.
    pub number: u32,
}
