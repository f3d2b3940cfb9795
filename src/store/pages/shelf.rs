//! The shelf of a session that begins with an image: its pages stay in the store, only new ones take room.

use std::sync::Arc;

use super::image::Image;
use crate::proto::page::PAGE_SIZE;
use crate::proto::reduce::{PageShelf, ShelfError};

/// A [`PageShelf`] whose first slots hold the pages of an image until others take their place.
#[derive(Debug)]
pub struct KnownShelf<S> {
    image: Option<Arc<Image>>,
    /// Slots that began with a page of the image.
    known: u64,
    slots: u64,
    /// Slots taken so far, those of the image among them.
    taken: u64,
    new: S,
}

impl<S: PageShelf> KnownShelf<S> {
    /// Over `slots` slots, the first of which hold the pages of `image`; `new` is put to from the slot behind them on.
    pub fn new(image: Option<Arc<Image>>, slots: u32, new: S) -> Self {
        let known = image.as_ref().map_or(0, |image| image.head().contents.min(slots));
        Self {
            image,
            known: known.into(),
            slots: slots.into(),
            taken: known.into(),
            new,
        }
    }
}

impl<S: PageShelf> PageShelf for KnownShelf<S> {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        self.new.put(slot, page)?;
        self.taken += 1;
        Ok(())
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        let is_known = u64::from(slot) < self.known && self.taken <= self.slots + u64::from(slot);
        let Some(image) = self.image.as_ref().filter(|_| is_known) else {
            return self.new.get(slot, page);
        };
        let page: &mut [u8; PAGE_SIZE] = page.try_into().map_err(|_| ShelfError::NoSuchSlot { slot })?;
        image.read(slot, page).map_err(|error| ShelfError::Storage {
            slot,
            source: error.into(),
        })
    }
}
