//! The shelf of a session that begins with an image: its pages stay in the store, only new ones take room.

use std::sync::Arc;

use super::image::Image;
use crate::proto::page::PAGE_SIZE;
use crate::proto::reduce::{PageShelf, ShelfError};
use crate::store::spill::SpillShelf;

/// A [`PageShelf`] whose first slots hold the pages of an image until others take their place.
#[derive(Debug)]
pub struct KnownShelf {
    image: Option<Arc<Image>>,
    new: SpillShelf,
}

impl KnownShelf {
    /// `new` begins behind the pages of `image` ([`SpillShelf::after`]).
    #[must_use]
    pub fn new(image: Option<Arc<Image>>, new: SpillShelf) -> Self {
        Self { image, new }
    }
}

impl PageShelf for KnownShelf {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        self.new.put(slot, page)
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        let found = self.new.get(slot, page);
        let Some(image) = self.image.as_ref().filter(|image| slot < image.head().contents) else {
            return found;
        };
        // What is below has every page that was put: it lacks only those that are in the image still.
        if !matches!(found, Err(ShelfError::NoSuchSlot { .. })) {
            return found;
        }
        let page: &mut [u8; PAGE_SIZE] = page.try_into().map_err(|_| ShelfError::NoSuchSlot { slot })?;
        image.read(slot, page).map_err(|error| ShelfError::Storage {
            slot,
            source: error.into(),
        })
    }
}
