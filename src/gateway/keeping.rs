//! The page store in migrations: what a session begins with, and what it leaves.
//!
//! ```text
//! source                                        destination
//! candidates ── Offer + their digests ────────▶ the first that is here and equal
//! the same   ◀─ AcceptedKnowing { image } ───── pages known, shelf over the image
//! … session …                                   … session …
//! RUNNING: keep                                 RUNNING: keep
//! ```

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::leftover::Leftover;
use super::memory::Reservation;
use super::registry::Entry;
use super::{Core, clock};
use crate::config::Config;
use crate::proto::page::{MigrationId, PAGE_SIZE};
use crate::proto::reduce::{DictionaryLimits, KnownPages, Reducer};
use crate::proto::wire::hello;
use crate::proto::wire::message::KnownImage;
use crate::store::pages::{Head, Image, KnownShelf, MOST_OFFERED, PageStore, StoreError, Whose};
use crate::store::spill::{self, SpillShelf};

/// Pages that a source has in memory before they go to its spill file: 4 MiB.
pub(crate) const PAGES_AT_SOURCE: u32 = 1 << 10;

/// What a source's reducer begins with and keeps to.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    known: Option<Found>,
    shelf: Option<KnownShelf>,
}

/// An image with the pages in it.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) image: Arc<Image>,
    pub(crate) pages: KnownPages,
}

/// What this site could begin a migration of the VM with. Open from now on: the destination's answer may come after they were thrown out.
pub(crate) async fn candidates(core: &Core, vm: &str, peer: &str, slots: Slots) -> Vec<Image> {
    let Some(store) = core.store.clone() else {
        return Vec::new();
    };
    let whose = whose(core, vm, peer);
    blocking(move || {
        let disk = spill::pages_with_room(store.dir()).unwrap_or(0);
        let heads = store.candidates(&whose, slots.pages_of_guest()).into_iter();
        let usable = heads.filter(|head| {
            let lacks = if !slots.fits(head) {
                "slots in the dictionary (memory_budget, at either site)"
            } else if head.whose.is_seed() && disk < u64::from(slots.with(Some(head))) + u64::from(slots.of_guest) {
                "room on the store's disk to keep what the migration leaves"
            } else {
                return true;
            };
            tracing::info!(vm = whose.vm, image = %head.id, pages = head.contents, "not offered: for so many pages it lacks {lacks}");
            false
        });
        usable.filter_map(|head| store.image(head.id, &whose)).collect()
    })
    .await
}

/// The peer's images that this site has too, in the peer's order.
pub(crate) async fn find(core: &Core, vm: &str, peer: &str, slots: Slots, offered: Vec<KnownImage>) -> Vec<Image> {
    let Some(store) = core.store.clone() else {
        return Vec::new();
    };
    let whose = whose(core, vm, peer);
    blocking(move || {
        let found = offered.iter().take(MOST_OFFERED).filter_map(|offered| {
            let image = store.image(offered.id, &whose)?;
            (image.head().digest == offered.digest && slots.fits(image.head())).then_some(image)
        });
        found.collect()
    })
    .await
}

/// What a session that begins with this image knows; `None` where it is damaged. Once there is memory for it.
pub(crate) async fn open_pages(core: &Core, image: Image) -> Option<Found> {
    let store = core.store.clone()?;
    blocking(move || read(&store, image)).await
}

/// Slots of a session's dictionary. Both ends come to the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    /// As offered for the guest.
    pub(crate) of_guest: u32,
    /// As agreed on the link.
    pub(crate) most: u32,
}

impl Slots {
    /// Pages of a guest for which so many slots are offered: a quarter more than it has.
    fn pages_of_guest(self) -> u64 {
        u64::from(self.of_guest) * 4 / 5
    }

    /// Where a session begins with this image: what a seed holds has no pages yet, and should not make those of the guest leave the dictionary.
    pub(crate) fn with(self, image: Option<&Head>) -> u32 {
        let seed = image
            .filter(|head| head.whose.is_seed())
            .map_or(0, |head| head.contents);
        self.of_guest.saturating_add(seed).min(self.most)
    }

    /// What is held of an image while a session begins is reserved for as many pages as the dictionary has.
    fn fits(self, head: &Head) -> bool {
        let slots = self.with(Some(head));
        head.contents <= slots && head.places <= slots
    }
}

/// The pages of an image; one that turns out to be damaged is not used again.
fn read(store: &PageStore, image: Image) -> Option<Found> {
    match image.pages() {
        Ok(pages) => {
            // Which one is thrown out first is a matter of economy: where this fails it is merely not the best choice.
            let _ = image.touch(clock::wall());
            Some(Found {
                image: Arc::new(image),
                pages,
            })
        }
        Err(error) => {
            tracing::warn!("an image of the page store is not used: {error}");
            store.discard(image.head().id);
            None
        }
    }
}

/// What the source begins with, where the destination took `image`, and where it keeps pages of a guest with so much memory. Of a peer before wire
/// version 5 nothing is known.
///
/// # Errors
/// The image cannot be read any more: the destination counts on it.
pub(crate) async fn prepare(
    core: &Core,
    version: u16,
    limits: DictionaryLimits,
    memory_bytes: u64,
    image: Option<Image>,
) -> Result<Prepared, String> {
    let Some(store) = core.store.clone().filter(|_| version >= hello::IMAGES) else {
        return Ok(Prepared::default());
    };
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
        Ok(Prepared {
            known,
            shelf: shelf(&store, limits, memory_bytes, taken).map(|spill| KnownShelf::new(image, spill)),
        })
    })
    .await
}

/// Room for the pages that a source sends, until it is known whether they are kept, and for keeping them.
fn shelf(store: &PageStore, limits: DictionaryLimits, memory_bytes: u64, taken: u32) -> Option<SpillShelf> {
    let image = (memory_bytes / PAGE_SIZE as u64).min(limits.slots().into());
    if spill::pages_with_room(store.dir()).is_ok_and(|room| room < u64::from(limits.slots()) + image) {
        tracing::warn!(
            "this migration leaves nothing in the page store: its disk has no room for {} MiB meanwhile and {} MiB to be kept",
            u64::from(limits.slots()) >> 8,
            image >> 8
        );
        return None;
    }
    let spill = SpillShelf::after(store.dir(), limits.slots(), PAGES_AT_SOURCE, taken);
    spill
        .inspect_err(|error| tracing::warn!("this migration leaves nothing in the page store: {error}"))
        .ok()
}

impl Prepared {
    /// Pages of the VM, or of one like it, or of a seed, that both sites have.
    pub(crate) fn known_pages(&self) -> u64 {
        let pages = self.known.as_ref().map(|found| &found.pages);
        pages.map_or(0, |pages| pages.places().len().max(pages.digests().len()) as u64)
    }

    /// Gives the reducer what it begins with.
    pub(crate) fn equip(self, reducer: &mut Reducer) {
        if let Some(Found { image, pages }) = self.known {
            reducer.know(&pages, Box::new(image));
        }
        if let Some(shelf) = self.shelf {
            reducer.keep_on(Box::new(shelf));
        }
    }
}

/// Writes what a migration left to the store, in the background: the VM runs, and nobody waits for it. `memory` covers what that takes.
pub(crate) fn keep(core: &Arc<Core>, entry: &Entry, leftover: Option<Leftover>, memory: Option<Reservation>) {
    let (to_keep, rest) = leftover.map_or((None, None), Leftover::split);
    let (Some(store), Some(to_keep)) = (core.store.clone(), to_keep) else {
        // What was reserved is free when it is.
        tokio::task::spawn_blocking(move || drop((rest, memory)));
        return;
    };
    let (migration, vm) = (entry.migration, entry.vm.clone());
    let whose = whose(core, &vm, &entry.peer);
    let core = Arc::clone(core);
    tokio::task::spawn_blocking(move || {
        let _memory = memory;
        let kept = to_keep().map(|mut kept| store.keep(migration, &whose, clock::unix_ms(), &mut kept));
        match kept {
            Some(Ok(Some(head))) => {
                tracing::info!(%migration, vm, pages = head.contents, "kept for the next migration")
            }
            Some(Ok(None)) => {
                tracing::warn!(%migration, vm, "nothing is kept for the next migration: store.size, or the disk, has no room for it")
            }
            Some(Err(error)) => {
                tracing::warn!(%migration, vm, "nothing is kept for the next migration: {error}");
                if let StoreError::Shelf(_) = error {
                    // Perhaps a page of the image that the session began with.
                    for head in store.candidates(&whose, 0) {
                        look_again(&store, head.id);
                    }
                }
            }
            None => tracing::info!(%migration, vm, "nothing is kept for the next migration: not all of its pages were"),
        }
        measure(&core, &store);
    });
}

/// A migration that began with this image could not be restored here: perhaps because of it.
pub(crate) fn suspect(core: &Core, image: MigrationId) {
    let Some(store) = core.store.clone() else { return };
    tokio::task::spawn_blocking(move || look_again(&store, image));
}

fn look_again(store: &PageStore, image: MigrationId) {
    if let Err(error) = store.look_again(image) {
        tracing::warn!("not offered any more: {error}");
    }
}

/// Looks through the store; only what was found whole is offered. Then takes in what is put there by others than this gateway: seeds.
pub(crate) async fn watch(core: Arc<Core>) {
    let Some(store) = core.store.clone() else { return };
    let (mut tried, mut told) = (HashSet::new(), false);
    let (scrubbing, scrubbed) = (Arc::clone(&core), Arc::clone(&store));
    blocking(move || scrub(&scrubbing, &scrubbed)).await;
    loop {
        tokio::time::sleep(LOOK).await;
        let (core, store) = (Arc::clone(&core), Arc::clone(&store));
        (tried, told) = blocking(move || {
            match store.take_in(&mut tried) {
                Ok(0) => {}
                Ok(images) => {
                    tracing::info!(images, "taken into the page store");
                    measure(&core, &store);
                }
                Err(error) if !told => {
                    tracing::warn!("what is put into the page store is not taken in: {error}");
                    told = true;
                }
                Err(_) => {}
            }
            (tried, told)
        })
        .await;
    }
}

/// Between looks for what others have put into the store.
const LOOK: Duration = Duration::from_secs(30);

fn scrub(core: &Core, store: &PageStore) {
    match store
        .scrub()
        .and_then(|found| Ok((found, store.make_room(store.most_bytes())?)))
    {
        Ok(((whole, removed), _)) => {
            for (path, reason) in removed {
                tracing::warn!(path = %path.display(), "removed from the page store: {reason}");
            }
            tracing::info!(images = whole, "page store read");
        }
        Err(error) => tracing::warn!("the page store cannot be used: {error}"),
    }
    measure(core, store);
}

fn measure(core: &Core, store: &PageStore) {
    if let Ok(contents) = store.contents() {
        let bytes = contents.images.iter().map(|listed| listed.bytes).sum();
        core.metrics.set_store(contents.images.len() as u64, bytes);
    }
}

/// The store of a configuration, where it has one. VMs move without it too, and some may wait for this gateway.
pub(super) async fn open(config: &Config) -> Option<Arc<PageStore>> {
    let size = config.store.size?;
    let dir = config.store_dir();
    let opened = blocking(move || PageStore::open(&dir, size)).await;
    opened
        .inspect_err(|error| {
            tracing::error!(
                "nothing is kept of VMs that move until this is mended and the gateway started again: {error}"
            )
        })
        .ok()
        .map(Arc::new)
}

/// Whose the VM is. One that is not configured here any more shares with nobody that names a tenant.
fn whose(core: &Core, vm: &str, peer: &str) -> Whose {
    Whose {
        vm: vm.to_owned(),
        tenant: core.config.vm(vm).map(|vm| vm.tenant.clone()).unwrap_or_default(),
        peer: peer.to_owned(),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("reading the page store does not panic")
}
