//! The page store in migrations: what a session begins with, and what it leaves.
//!
//! ```text
//! source                                        destination
//! candidates ── Offer + their digests ────────▶ the first that is here and equal
//! the same   ◀─ AcceptedKnowing { image } ───── pages known, shelf over the image
//! … session …                                   … session …
//! RUNNING: keep                                 RUNNING: keep
//! ```

use std::sync::Arc;

use super::{Core, clock};
use crate::proto::page::MigrationId;
use crate::proto::reduce::{DictionaryLimits, KeptPages, KnownPages, PageShelf, Reducer};
use crate::proto::wire::message::KnownImage;
use crate::store::pages::{Image, KnownShelf, PageStore, SharedImage, StoreError};
use crate::store::spill::SpillShelf;

/// What a session leaves, wherever it kept it.
pub(crate) type Kept = KeptPages<Box<dyn PageShelf + Send>>;

/// Pages that a source has in memory before they go to its spill file: 4 MiB.
pub(crate) const PAGES_AT_SOURCE: u32 = 1 << 10;

/// What a source's reducer begins with and keeps to.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    known: Option<(KnownPages, Arc<Image>)>,
    shelf: Option<KnownShelf<SpillShelf>>,
}

/// An image with the pages in it.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) image: Arc<Image>,
    pub(crate) pages: KnownPages,
}

/// What this site could begin a migration of the VM with. Open from now on: the destination's answer may come after they were thrown out.
pub(crate) async fn candidates(core: &Core, vm: &str) -> Vec<Image> {
    let Some(store) = core.store.clone() else {
        return Vec::new();
    };
    let (vm, tenant) = (vm.to_owned(), tenant_of(core, vm));
    blocking(move || {
        let heads = store.candidates(&vm, &tenant);
        let images = heads
            .iter()
            .filter_map(|head| store.image(head.id, &tenant, clock::wall()));
        images.collect()
    })
    .await
}

/// The first of the peer's images that this site has too.
pub(crate) async fn find(core: &Core, vm: &str, offered: Vec<KnownImage>) -> Option<Found> {
    let store = core.store.clone()?;
    let tenant = tenant_of(core, vm);
    blocking(move || {
        offered.iter().find_map(|offered| {
            let image = store.image(offered.id, &tenant, clock::wall())?;
            (image.head().digest == offered.digest).then(|| read(&store, image))?
        })
    })
    .await
}

/// The pages of an image; one that turns out to be damaged is not used again.
fn read(store: &PageStore, image: Image) -> Option<Found> {
    match image.pages() {
        Ok(pages) => Some(Found {
            image: Arc::new(image),
            pages,
        }),
        Err(error) => {
            tracing::warn!("an image of the page store is not used: {error}");
            store.discard(image.head().id);
            None
        }
    }
}

/// What the source begins with, where the destination took `image`.
///
/// # Errors
/// The image cannot be read any more: the destination counts on it.
pub(crate) async fn prepare(core: &Core, limits: DictionaryLimits, image: Option<Image>) -> Result<Prepared, String> {
    let Some(store) = core.store.clone() else {
        return Ok(Prepared::default());
    };
    let dir = core.config.state_dir.clone();
    blocking(move || {
        let known = match image {
            Some(image) => {
                let found = read(&store, image);
                Some(found.ok_or("the page store's image of the VM is damaged, and thrown out now: try again")?)
            }
            None => None,
        };
        let image = known.as_ref().map(|found| Arc::clone(&found.image));
        let taken = known.as_ref().map_or(0, |found| found.pages.slots(limits.slots()));
        let spill = SpillShelf::after(&dir, limits.slots(), PAGES_AT_SOURCE, taken);
        let shelf = spill
            .inspect_err(|error| tracing::warn!("this migration leaves nothing in the page store: {error}"))
            .ok()
            .map(|spill| KnownShelf::new(image, limits.slots(), spill));
        Ok(Prepared {
            known: known.map(|found| (found.pages, found.image)),
            shelf,
        })
    })
    .await
}

impl Prepared {
    /// Pages of the VM, or of one like it, that both sites have.
    pub(crate) fn known_pages(&self) -> u64 {
        self.known.as_ref().map_or(0, |(pages, _)| pages.places().len() as u64)
    }

    /// Gives the reducer what it begins with.
    pub(crate) fn equip(self, reducer: &mut Reducer) {
        if let Some((pages, image)) = self.known {
            reducer.know(&pages, Box::new(SharedImage(image)));
        }
        if let Some(shelf) = self.shelf {
            reducer.keep_on(Box::new(shelf));
        }
    }
}

/// Writes what a migration left to the store, in the background: the VM runs, and nobody waits for it.
pub(crate) fn keep(core: &Arc<Core>, migration: MigrationId, vm: &str, kept: Option<Kept>) {
    let (Some(store), Some(mut kept)) = (core.store.clone(), kept) else {
        return;
    };
    let (vm, tenant) = (vm.to_owned(), tenant_of(core, vm));
    let core = Arc::clone(core);
    tokio::task::spawn_blocking(move || {
        match store.keep(migration, &vm, &tenant, clock::unix_ms(), &mut kept) {
            Ok(Some(head)) => tracing::info!(%migration, vm, pages = head.contents, "kept for the next migration"),
            Ok(None) => tracing::warn!(%migration, vm, "store.size is too small to keep the memory of this VM"),
            Err(error) => tracing::warn!(%migration, vm, "nothing is kept for the next migration: {error}"),
        }
        measure(&core, &store);
    });
}

/// A migration that began with this image failed here: perhaps because of it.
pub(crate) fn look_again(core: &Core, image: MigrationId) {
    let Some(store) = core.store.clone() else { return };
    tokio::task::spawn_blocking(move || {
        if let Err(error) = store.verify(image) {
            tracing::warn!("removed from the page store: {error}");
            store.discard(image);
        }
    });
}

/// Looks through the store in the background; only what was found whole is offered.
pub(crate) fn scrub(core: &Arc<Core>) {
    let Some(store) = core.store.clone() else { return };
    let core = Arc::clone(core);
    tokio::task::spawn_blocking(move || {
        match store
            .scrub()
            .and_then(|found| Ok((found, store.make_room(store.most_bytes(), None)?)))
        {
            Ok(((whole, removed), _)) => {
                for (path, reason) in removed {
                    tracing::warn!(path = %path.display(), "removed from the page store: {reason}");
                }
                tracing::info!(images = whole, "page store read");
            }
            Err(error) => tracing::warn!("the page store cannot be used: {error}"),
        }
        measure(&core, &store);
    });
}

fn measure(core: &Core, store: &PageStore) {
    if let Ok(contents) = store.contents() {
        let bytes = contents.images.iter().map(|listed| listed.bytes).sum();
        core.metrics.set_store(contents.images.len() as u64, bytes);
    }
}

/// The store of a configuration, where it has one.
pub(super) async fn open(core: &crate::config::Config) -> Result<Option<Arc<PageStore>>, StoreError> {
    let Some(size) = core.store.size else { return Ok(None) };
    let dir = core.store_dir();
    let store = blocking(move || PageStore::open(&dir, size)).await?;
    Ok(Some(Arc::new(store)))
}

/// Whose the VM is. One that is not configured here any more shares with nobody that names a tenant.
fn tenant_of(core: &Core, vm: &str) -> String {
    core.config.vm(vm).map(|vm| vm.tenant.clone()).unwrap_or_default()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("reading the page store does not panic")
}
