//! Where the destination keeps the bytes of the dictionary's pages.

use std::error::Error;

/// Holds one page per slot of the dictionary.
///
/// [`Restorer`](super::Restorer) puts slots in ring order (0, 1, … capacity - 1, 0, …) and gets only slots that it has put,
/// so an implementation may rely on the order and must not lose a page before its slot is put again.
pub trait PageShelf {
    /// Stores `page` ([`PAGE_SIZE`](crate::proto::page::PAGE_SIZE) bytes) in `slot`, in place of what was there.
    ///
    /// # Errors
    /// [`ShelfError`] where the page cannot be kept. The session cannot go on.
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError>;

    /// Copies the page in `slot` to `page` ([`PAGE_SIZE`](crate::proto::page::PAGE_SIZE) bytes).
    ///
    /// # Errors
    /// [`ShelfError`] where the page is not there, or not as it was put. The session cannot go on.
    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError>;
}

impl<S: PageShelf + ?Sized> PageShelf for Box<S> {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        (**self).put(slot, page)
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        (**self).get(slot, page)
    }
}

/// A shelf cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ShelfError {
    /// A slot beyond the shelf's size, out of ring order, or never filled.
    #[error("the page shelf has no page in slot {slot}")]
    NoSuchSlot {
        /// The slot that was named.
        slot: u32,
    },
    /// The page read back is not the page that was put.
    #[error("the page in slot {slot} of the page shelf was damaged in storage")]
    Damaged {
        /// The slot that was read.
        slot: u32,
    },
    /// The storage behind the shelf failed.
    #[error("the storage behind the page shelf failed at slot {slot}")]
    Storage {
        /// The slot that was read or written.
        slot: u32,
        /// What the storage said.
        source: Box<dyn Error + Send + Sync>,
    },
}
