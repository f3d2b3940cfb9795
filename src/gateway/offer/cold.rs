//! A peer offers a VM that is off: what arrives are its images, and no hypervisor is needed.

use std::sync::Arc;

use super::{Known, drive, look_at_vm};
use crate::api::{Phase, Role};
use crate::config::{Disks, Hook, Vm, VmImage};
use crate::gateway::channel::Channel;
use crate::gateway::destination::DestinationStart;
use crate::gateway::destination_vmm::DestinationVmm;
use crate::gateway::disks::check_offer;
use crate::gateway::disks::mark::{self, Rest};
use crate::gateway::disks::place;
use crate::gateway::disks::volumes::{self, Old};
use crate::gateway::hooks::{self, Facts};
use crate::gateway::{Core, clock, launches};
use crate::proto::ownership::{Destination, DestinationTerms};
use crate::proto::wire::message::{ColdOffer, DiskPlace};

/// Everything that speaks against an offer: images are made, and removed again.
pub(crate) async fn check(core: &Core, peer: &str, offer: &ColdOffer, places: &[DiskPlace]) -> Vec<String> {
    let tried = async {
        core.registry.gives_way(&offer.vm, None).await;
        let vm = look(core, offer)?;
        core.journal.reserve().await.map_err(|error| error.to_string())?;
        let made = make(core, peer, vm, offer, (places, Old::Stays)).await;
        if made.is_ok() {
            mark::discard(vm, offer.migration, Rest::Untouched).await;
        }
        launches::end(core, offer.migration);
        made
    };
    let found: Result<(), String> = tried.await;
    found
        .err()
        .inspect(|reason| tracing::info!(peer, vm = offer.vm, "a check found: {reason}"))
        .into_iter()
        .collect()
}

/// Takes an offer, or refuses it with one sentence; sees the migration through to its end.
pub(crate) async fn open(
    core: Arc<Core>,
    peer: String,
    known: &Known,
    (offer, places): (ColdOffer, Vec<DiskPlace>),
    channel: Channel,
) {
    let accepted = accept(&core, &peer, known, &offer, &places).await;
    drive(&core, &peer, offer.migration, &offer.vm, accepted, channel).await;
}

fn look<'a>(core: &'a Core, offer: &ColdOffer) -> Result<&'a Vm, String> {
    let site = &core.config.site;
    let vm = look_at_vm(core, &offer.vm)?;
    check_offer(&offer.disks)?;
    if offer.disks.is_empty() {
        return Err(format!("{} is offered without a disk", vm.name));
    }
    if vm.disks != Disks::Copied {
        return Err(format!(
            "{site} has disks = \"{}\" for {}, whose disks would be copied there: say disks = \"copied\" at both sites",
            vm.disks, vm.name
        ));
    }
    // One that was left here is of another time than those that come.
    let is_offered = |image: &VmImage| offer.disks.iter().any(|disk| volumes::is_of(image, disk));
    if let Some(image) = vm.images.iter().find(|image| !is_offered(image)) {
        return Err(format!(
            "{site} has a [[vm.image]] for the disk {} of {}, which is not offered: say it at both sites, or at none",
            image.disk, vm.name
        ));
    }
    Ok(vm)
}

async fn make(
    core: &Core,
    peer: &str,
    vm: &Vm,
    offer: &ColdOffer,
    (places, old): (&[DiskPlace], Old),
) -> Result<(), String> {
    let places = place::find(&core.config, vm, &offer.disks, places)?;
    let facts = Facts::new(offer.migration, &offer.vm, peer, Role::Destination);
    hooks::run(core, Hook::PreCheck, &facts).await?;
    launches::begin(core, offer.migration)?;
    volumes::make(&core.config, vm, offer.migration, (&offer.disks, &places), old).await
}

async fn accept(
    core: &Arc<Core>,
    peer: &str,
    known: &Known,
    offer: &ColdOffer,
    places: &[DiskPlace],
) -> Result<super::Accepted, String> {
    core.registry.gives_way(&offer.vm, Some(peer)).await;
    let vm = look(core, offer)?;
    super::expect(core, offer.migration).await?;
    let vmm = DestinationVmm::off(vm, core.vmm_log(offer.migration));
    vmm.context()
        .check_fits()
        .map_err(|reason| format!("{}: {reason}", core.config.site))?;
    let (entry, orders) = core
        .registry
        .add(offer.migration, &offer.vm, peer, Role::Destination, clock::now())
        .map_err(|busy| format!("{} is busy: {busy}", core.config.site))?;
    super::prepare(core, &entry, make(core, peer, vm, offer, (places, Old::Used))).await?;
    entry.set_phase(Phase::Preparing);
    let machine = Destination::new(DestinationTerms {
        own_journal: core.journal.id(),
        source_journal: known.journal,
        barriers: 1,
    });
    let start = DestinationStart {
        machine,
        effects: Vec::new(),
        vmm: Some(vmm),
        source_journal: known.journal,
        decoder: None,
        image: None,
        keeps: false,
        window_bytes: 0,
        disks: offer.disks.clone(),
    };
    Ok(super::begin(core, peer, entry, orders, start, None))
}
