//! A peer offers a VM: checks, the hypervisor that will receive it, and the driver that sees it through.

pub(super) mod cold;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::Core;
use super::accept::Known;
use crate::api::{Outcome, Phase, Role};
use crate::config::{Disks, Hook, Vm};
use crate::gateway::channel::Channel;
use crate::gateway::clock;
use crate::gateway::destination::{DestinationDriver, DestinationStart};
use crate::gateway::destination_vmm::DestinationVmm;
use crate::gateway::disks::check_offer;
use crate::gateway::disks::mark::{self, Rest};
use crate::gateway::disks::place;
use crate::gateway::disks::volumes::{self, Old};
use crate::gateway::hooks::{self, Facts};
use crate::gateway::inbound::Shelf;
use crate::gateway::keeping::{self, Found, Slots};
use crate::gateway::launches;
use crate::gateway::memory::{Need, Reservation};
use crate::gateway::registry::{Entry, ResolveOrder};
use crate::hypervisor::qemu::{Disk, Severity, VmInventory, compare};
use crate::migrate;
use crate::proto::ownership::{Destination, DestinationEvent, DestinationTerms};
use crate::proto::page::MigrationId;
use crate::proto::reduce::DictionaryLimits;
use crate::proto::session::Decoder;
use crate::proto::wire::message::{DiskPlace, KnownImage, Offer, OfferedDisk};
use crate::proto::wire::{Limits, SessionMessage, hello};
use crate::store::pages::KnownShelf;
use crate::store::spill::SpillShelf;

/// Everything that speaks against an offer: what would receive the VM is started, compared and ended again.
pub(crate) async fn check(core: &Core, peer: &str, agreed: Limits, offered: &Offered) -> Vec<String> {
    let Offered {
        offer, disks, places, ..
    } = offered;
    let tried = async {
        core.registry.gives_way(&offer.vm, None).await;
        let (vm, source) = look(core, offer)?;
        look_at_disks(core, vm, disks, &source)?;
        let places = find_places(core, vm, disks, places)?;
        core.journal.reserve().await.map_err(|error| error.to_string())?;
        dictionary(core, peer, offer, agreed, Vec::new()).await?;
        let started = start_vm(core, peer, vm, offer, (disks, &places, Old::Stays), &source).await;
        let found = match started {
            Ok(vmm) => {
                vmm.abandon().await;
                mark::discard(vm, offer.migration, Rest::Untouched).await;
                Ok(())
            }
            Err(reason) => Err(reason),
        };
        launches::end(core, offer.migration);
        launches::remove_silent_logs(core).await;
        found
    };
    let found: Result<(), String> = tried.await;
    found
        .err()
        .inspect(|reason| tracing::info!(peer, vm = offer.vm, "a check found: {reason}"))
        .into_iter()
        .collect()
}

/// What needs no hypervisor.
fn look<'a>(core: &'a Core, offer: &Offer) -> Result<(&'a Vm, VmInventory), String> {
    let vm = look_at_vm(core, &offer.vm)?;
    let inventory: VmInventory = serde_json::from_str(&offer.inventory)
        .map_err(|error| format!("the description of {} cannot be read: {error}", offer.vm))?;
    inventory.check_limits().map_err(|error| error.to_string())?;
    let regions = migrate::regions(&inventory);
    if offer.regions > regions {
        return Err(format!(
            "the offer of {} names {} regions of memory and its inventory has {regions}",
            offer.vm, offer.regions
        ));
    }
    Ok((vm, inventory))
}

/// A VM that is offered, as this site knows it: it may come now.
fn look_at_vm<'a>(core: &'a Core, name: &str) -> Result<&'a Vm, String> {
    let site = &core.config.site;
    if core.is_draining() {
        return Err(format!("the gateway at {site} is being stopped and takes no VMs"));
    }
    let vm = core.config.vm(name).ok_or_else(|| {
        format!("{site} has no [[vm]] section for {name}: add one with `qmp` and `command` to its configuration")
    })?;
    if let Some(open) = core.registry.open_for_vm(name) {
        return Err(format!("{site} is busy with migration {} of {name}", open.migration));
    }
    if core.registry.disk_move(name).is_some() {
        return Err(format!("{site} is busy with a disk of {name} that moves there"));
    }
    Ok(vm)
}

/// What speaks against the disks that come with an offer, before any is made.
fn look_at_disks(core: &Core, vm: &Vm, disks: &[OfferedDisk], source: &VmInventory) -> Result<(), String> {
    check_offer(disks)?;
    if !disks.is_empty() && vm.disks != Disks::Copied {
        return Err(format!(
            "{} has disks = \"{}\" for {}, whose disks would be copied there: say disks = \"copied\" at both sites",
            core.config.site, vm.disks, vm.name
        ));
    }
    // It would run here with what an earlier stay has left. Firmware's flash travels with memory.
    let is_left_behind = |disk: &Disk| disk.is_writable && !disk.name.contains("flash");
    if disks.is_empty() && vm.disks == Disks::Copied && source.disks.iter().any(is_left_behind) {
        return Err(format!(
            "{} expects the disks of {} with it, and they are not offered: say disks = \"copied\" at both sites",
            core.config.site, vm.name
        ));
    }
    Ok(())
}

/// Where disks go that are wanted somewhere.
fn find_places(
    core: &Core,
    vm: &Vm,
    disks: &[OfferedDisk],
    places: &[DiskPlace],
) -> Result<Vec<Option<PathBuf>>, String> {
    if vm.command.is_none() && !places.is_empty() {
        return Err(format!(
            "the hypervisor of {} that waits at {} has opened its images already: leave --disk away",
            vm.name, core.config.site
        ));
    }
    place::find(&core.config, vm, disks, places)
}

/// A migration that is offered, with what comes with it.
#[derive(Debug)]
pub(crate) struct Offered {
    pub(crate) offer: Offer,
    /// Images of the page store at the source.
    pub(crate) images: Vec<KnownImage>,
    /// Disks that are copied.
    pub(crate) disks: Vec<OfferedDisk>,
    /// Where some of them are wanted.
    pub(crate) places: Vec<DiskPlace>,
}

/// Takes an offer, or refuses it with one sentence; sees the migration through to its end.
pub(crate) async fn open(core: Arc<Core>, peer: String, known: &Known, offered: Offered, channel: Channel) {
    let (migration, vm) = (offered.offer.migration, offered.offer.vm.clone());
    let accepted = accept(&core, &peer, known, offered).await;
    drive(&core, &peer, migration, &vm, accepted, channel).await;
}

/// An offer that was taken.
struct Accepted {
    driver: DestinationDriver,
    /// Held for as long as it is driven.
    _memory: Option<Reservation>,
}

async fn drive(
    core: &Arc<Core>,
    peer: &str,
    migration: MigrationId,
    vm: &str,
    accepted: Result<Accepted, String>,
    mut channel: Channel,
) {
    let refusal = match accepted {
        Ok(Accepted { mut driver, _memory }) => {
            driver.adopt(channel);
            tracing::info!(%migration, vm, peer, "receiving");
            driver.run(Some(DestinationEvent::Begin)).await;
            launches::remove_silent_logs(core).await;
            return;
        }
        Err(reason) => reason,
    };
    tracing::info!(%migration, vm, peer, "refused: {refusal}");
    let refused = core.metrics.migration(Role::Destination);
    refused.ended(clock::now(), Outcome::Refused);
    let _ = channel.sender.send(&SessionMessage::Refused { reason: refusal }).await;
    channel.sender.finish();
    launches::remove_silent_logs(core).await;
}

/// There is room for a migration in the journal, which does not know it.
async fn expect(core: &Core, migration: MigrationId) -> Result<(), String> {
    core.journal.reserve().await.map_err(|error| error.to_string())?;
    match core.journal.records_of(migration).await.is_empty() {
        true => Ok(()),
        false => Err(format!("migration {migration} has been here before")),
    }
}

/// Does what comes before a driver, or ends the migration as refused.
async fn prepare<T>(core: &Core, entry: &Entry, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let prepared = match hooks::owe(core, entry.migration, Role::Destination) {
        Ok(()) => work.await,
        Err(reason) => Err(reason),
    };
    prepared.inspect_err(|reason| {
        launches::end(core, entry.migration);
        hooks::forget(core, entry.migration, Role::Destination);
        let now = clock::now();
        let report = migrate::empty_report(entry, now, Outcome::Refused, reason.clone());
        entry.finish(report, now);
    })
}

/// A driver that peers find from now on.
fn begin(
    core: &Arc<Core>,
    peer: &str,
    entry: Arc<Entry>,
    orders: mpsc::Receiver<ResolveOrder>,
    start: DestinationStart,
    memory: Option<Reservation>,
) -> Accepted {
    let (attach, attachments) = mpsc::channel(4);
    core.drivers.insert(entry.migration, peer, attach);
    Accepted {
        driver: DestinationDriver::new(Arc::clone(core), entry, orders, attachments, start),
        _memory: memory,
    }
}

async fn accept(core: &Arc<Core>, peer: &str, known: &Known, offered: Offered) -> Result<Accepted, String> {
    let Offered {
        ref offer,
        images,
        disks,
        places,
    } = offered;
    core.registry.gives_way(&offer.vm, Some(peer)).await;
    let (vm, source) = look(core, offer)?;
    look_at_disks(core, vm, &disks, &source)?;
    let places = find_places(core, vm, &disks, &places)?;
    expect(core, offer.migration).await?;
    let agreement = known.agreement();
    let agreed = agreement.limits;
    let (decoder, image, memory) = dictionary(core, peer, offer, agreed, images).await?;
    let (entry, orders) = core
        .registry
        .add(offer.migration, &offer.vm, peer, Role::Destination, clock::now())
        .map_err(|busy| format!("{} is busy: {busy}", core.config.site))?;
    let starting = start_vm(core, peer, vm, offer, (&disks, &places, Old::Used), &source);
    let vmm = prepare(core, &entry, starting).await?;
    entry.set_phase(Phase::Preparing);
    let machine = Destination::new(DestinationTerms {
        own_journal: core.journal.id(),
        source_journal: known.journal,
        barriers: u32::from(!disks.is_empty()),
    });
    let start = DestinationStart {
        machine,
        effects: Vec::new(),
        vmm: Some(vmm),
        source_journal: known.journal,
        decoder: Some(decoder),
        image,
        keeps: core.store.is_some() && agreement.version >= hello::IMAGES,
        window_bytes: agreed.window_bytes,
        disks,
    };
    Ok(begin(core, peer, entry, orders, start, memory))
}

/// What a stream is restored with, and the memory of the migration: held with the dictionary for as long as something is restored,
/// without one for as long as the migration is driven.
async fn dictionary(
    core: &Core,
    peer: &str,
    offer: &Offer,
    agreed: Limits,
    images: Vec<KnownImage>,
) -> Result<(Decoder<Shelf>, Option<MigrationId>, Option<Reservation>), String> {
    let slots = Slots {
        of_guest: offer.dictionary_pages.min(agreed.dictionary_pages),
        most: agreed.dictionary_pages,
    };
    let limits = |slots| DictionaryLimits::new(slots, offer.regions).map_err(|error| error.to_string());
    let reserve = |limits| {
        let need = Need::at_destination(agreed.window_bytes, limits).with_store(core.store.is_some(), limits);
        let reserved = core.memory.reserve(need);
        reserved.map_err(|error| format!("{}: {error}", core.config.site))
    };
    if !offer.reduce {
        return Ok((Decoder::new(None), None, Some(reserve(limits(slots.with(None))?)?)));
    }
    for image in keeping::find(core, &offer.vm, peer, slots, images).await {
        let (id, is_seed) = (image.head().id, image.head().whose.is_seed());
        let limits = limits(slots.with(Some(image.head())))?;
        let begun = match reserve(limits) {
            Ok(memory) => match keeping::open_pages(core, image).await {
                Some(found) => shelf(core, limits, memory, Some(found)).await,
                None => continue,
            },
            Err(reason) => Err(reason),
        };
        match begun {
            Err(reason) if is_seed => tracing::info!(vm = offer.vm, peer, image = %id, "a seed is not used: {reason}"),
            begun => return begun,
        }
    }
    let limits = limits(slots.with(None))?;
    shelf(core, limits, reserve(limits)?, None).await
}

/// Where pages of a stream with this dictionary are kept, with what both ends begin with.
pub(super) async fn shelf(
    core: &Core,
    limits: DictionaryLimits,
    memory: Reservation,
    found: Option<Found>,
) -> Result<(Decoder<Shelf>, Option<MigrationId>, Option<Reservation>), String> {
    let (dir, pages, slots) = (core.config.state_dir.clone(), memory.pages(), limits.slots());
    let taken = found.as_ref().map_or(0, |found| found.pages.slots(slots));
    let spill = tokio::task::spawn_blocking(move || SpillShelf::after(&dir, slots, pages, taken))
        .await
        .expect("making a spill file does not panic")
        .map_err(|error| format!("{}: {error}", core.config.site))?;
    let image = found.as_ref().map(|found| Arc::clone(&found.image));
    let shelf = Shelf {
        shelf: KnownShelf::new(image, spill),
        _memory: memory,
    };
    let mut decoder = Decoder::new(Some((limits, shelf)));
    let image = found.map(|found| {
        decoder.know(&found.pages);
        found.image.head().id
    });
    Ok((decoder, image, None))
}

/// The hypervisor that will receive the VM, compared with the source's. Nothing of it is left where this fails.
async fn start_vm(
    core: &Core,
    peer: &str,
    vm: &Vm,
    offer: &Offer,
    (disks, places, old): (&[OfferedDisk], &[Option<PathBuf>], Old),
    source: &VmInventory,
) -> Result<DestinationVmm, String> {
    let facts = Facts::new(offer.migration, &offer.vm, peer, Role::Destination);
    hooks::run(core, Hook::PreCheck, &facts).await?;
    launches::begin(core, offer.migration)?;
    // A hypervisor that waits already has opened its images.
    if vm.command.is_some() {
        volumes::make(&core.config, vm, offer.migration, (disks, places), old).await?;
    }
    let started = start_with_images(core, vm, offer, source).await;
    if started.is_err() {
        mark::discard(vm, offer.migration, Rest::Untouched).await;
    }
    started
}

/// The same, once there are the images that it opens.
async fn start_with_images(
    core: &Core,
    vm: &Vm,
    offer: &Offer,
    source: &VmInventory,
) -> Result<DestinationVmm, String> {
    let socket = core.stream_socket(offer.migration);
    check_room(
        &core.config.site,
        source.base_memory_bytes + source.plugged_memory_bytes,
    )?;
    let mut vmm = DestinationVmm::start(vm, &socket, core.vmm_log(offer.migration)).await?;
    let mismatches = match vmm.inventory().await {
        Ok(inventory) => compare(source, &inventory),
        Err(reason) => {
            vmm.abandon().await;
            return Err(reason);
        }
    };
    let (fatal, odd): (Vec<_>, Vec<_>) = mismatches
        .into_iter()
        .partition(|mismatch| mismatch.severity == Severity::Refuse);
    for mismatch in odd {
        tracing::warn!(migration = %offer.migration, vm = offer.vm, "{}", mismatch.sentence);
    }
    if !fatal.is_empty() {
        vmm.abandon().await;
        let sentences: Vec<String> = fatal.into_iter().map(|mismatch| mismatch.sentence).collect();
        return Err(migrate::in_one_line(&sentences));
    }
    Ok(vmm)
}

/// The host has room for this much guest memory: available, in huge pages, or as swap, which operators who overcommit rely on.
fn check_room(site: &str, wanted_bytes: u64) -> Result<(), String> {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else {
        return Ok(());
    };
    match room_bytes(&text) {
        Some(room) if room < wanted_bytes => Err(format!(
            "{site} has room for {} MiB of guest memory and the VM has {} MiB: end something there, or add memory or swap",
            room >> 20,
            wanted_bytes >> 20
        )),
        _ => Ok(()),
    }
}

/// What `/proc/meminfo` (proc(5)) says of room for a guest; `None` where it does not say.
fn room_bytes(meminfo: &str) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        let rest = meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        rest.split_ascii_whitespace().next()?.parse().ok()
    };
    let huge_kib = number("HugePages_Free")
        .unwrap_or(0)
        .saturating_mul(number("Hugepagesize").unwrap_or(0));
    let kib = number("MemAvailable")?
        .saturating_add(number("SwapFree").unwrap_or(0))
        .saturating_add(huge_kib);
    Some(kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_is_available_with_swap_and_huge_pages() {
        let meminfo = "MemTotal: 8000 kB\nMemFree: 1 kB\nMemAvailable: 1000 kB\nSwapFree: 200 kB\n\
            HugePages_Total: 4\nHugePages_Free: 2\nHugepagesize: 2048 kB\n";
        assert_eq!(room_bytes(meminfo), Some((1000 + 200 + 2 * 2048) * 1024));
        assert_eq!(room_bytes("MemAvailable: 5 kB\n"), Some(5 * 1024));
        assert_eq!(room_bytes("MemTotal: 8000 kB\n"), None);
    }
}
