//! A peer offers a VM: checks, the hypervisor that will receive it, and the driver that sees it through.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::Core;
use super::channel::Channel;
use super::destination::{DestinationDriver, DestinationStart};
use super::destination_vmm::DestinationVmm;
use super::launches;
use crate::api::{Outcome, Phase, Role};
use crate::config::Vm;
use crate::hypervisor::qemu::{Severity, VmInventory, compare};
use crate::migrate;
use crate::proto::ownership::{Destination, DestinationEvent, DestinationTerms};
use crate::proto::reduce::DictionaryLimits;
use crate::proto::session::Decoder;
use crate::proto::wire::message::Offer;
use crate::proto::wire::{Hello, SessionMessage};
use crate::store::spill::SpillShelf;

/// Everything that speaks against an offer, without starting anything.
pub(crate) async fn check(core: &Core, peer: &str, offer: &Offer) -> Vec<String> {
    match look(core, offer) {
        Ok((vm, _)) => DestinationVmm::could_start(vm).await.err().into_iter().collect(),
        Err(reason) => {
            tracing::info!(peer, vm = offer.vm, "a check found: {reason}");
            vec![reason]
        }
    }
}

/// What needs no hypervisor.
fn look<'a>(core: &'a Core, offer: &Offer) -> Result<(&'a Vm, VmInventory), String> {
    let site = &core.config.site;
    if core.is_draining() {
        return Err(format!("the gateway at {site} is being stopped and takes no VMs"));
    }
    let vm = core.config.vm(&offer.vm).ok_or_else(|| {
        format!(
            "{site} has no [[vm]] section for {}: add one with `qmp` and `command` to its configuration",
            offer.vm
        )
    })?;
    let inventory: VmInventory = serde_json::from_str(&offer.inventory)
        .map_err(|error| format!("the description of {} cannot be read: {error}", offer.vm))?;
    inventory.check_limits().map_err(|error| error.to_string())?;
    if let Some(open) = core.registry.open_for_vm(&offer.vm) {
        return Err(format!(
            "{site} is busy with migration {} of {}",
            open.migration, offer.vm
        ));
    }
    DictionaryLimits::new(0, offer.regions).map_err(|error| error.to_string())?;
    Ok((vm, inventory))
}

/// Takes an offer, or refuses it with one sentence; sees the migration through to its end.
pub(crate) async fn open(core: Arc<Core>, peer: String, hello: Hello, offer: Offer, mut channel: Channel) {
    let refusal = match accept(&core, &peer, &hello, &offer).await {
        Ok((driver, vm)) => {
            let mut driver = driver;
            driver.adopt(channel);
            tracing::info!(migration = %offer.migration, vm, peer, "receiving");
            driver.run(Some(DestinationEvent::Begin)).await;
            core.drivers.remove(offer.migration);
            launches::remove_silent_logs(&core).await;
            return;
        }
        Err(reason) => reason,
    };
    tracing::info!(migration = %offer.migration, vm = offer.vm, peer, "refused: {refusal}");
    let refused = core.metrics.migration(Role::Destination);
    refused.ended(super::clock::now(), Outcome::Refused);
    let _ = channel.sender.send(&SessionMessage::Refused { reason: refusal }).await;
    channel.sender.finish();
    launches::remove_silent_logs(&core).await;
}

async fn accept(
    core: &Arc<Core>,
    peer: &str,
    hello: &Hello,
    offer: &Offer,
) -> Result<(DestinationDriver, String), String> {
    let (vm, source) = look(core, offer)?;
    let agreement = core.links.hello().agree(hello).map_err(|error| error.to_string())?;
    core.journal.reserve().await.map_err(|error| error.to_string())?;
    if !core.journal.records_of(offer.migration).await.is_empty() {
        return Err(format!("migration {} has been here before", offer.migration));
    }
    let slots = offer.dictionary_pages.min(agreement.limits.dictionary_pages);
    let dictionary = if offer.reduce {
        let limits = DictionaryLimits::new(slots, offer.regions).map_err(|error| error.to_string())?;
        let memory = core.memory.reserve_pages(slots).ok_or_else(|| {
            format!(
                "{} has no memory left for another migration: wait, or raise memory_budget",
                core.config.site
            )
        })?;
        let shelf =
            SpillShelf::new(&core.config.state_dir, slots, memory.pages()).map_err(|error| error.to_string())?;
        Some((limits, super::inbound::Shelf { shelf, _memory: memory }))
    } else {
        None
    };
    let (entry, orders) = core
        .registry
        .add(offer.migration, &offer.vm, peer, Role::Destination, super::clock::now())
        .map_err(|open| {
            format!(
                "{} is busy with migration {} of {}",
                core.config.site, open.migration, offer.vm
            )
        })?;
    let started = start_vm(core, vm, offer, &source).await;
    let vmm = match started {
        Ok(started) => started,
        Err(reason) => {
            launches::end(core, offer.migration);
            let now = super::clock::now();
            let report = migrate::empty_report(&entry, now, Outcome::Refused, reason.clone());
            entry.finish(report, now);
            return Err(reason);
        }
    };
    entry.set_phase(Phase::Preparing);
    let machine = Destination::new(DestinationTerms {
        own_journal: core.journal.id(),
        source_journal: hello.journal,
        barriers: 0,
    });
    let (attach, attachments) = mpsc::channel(4);
    core.drivers.insert(offer.migration, peer, attach);
    let driver = DestinationDriver::new(
        Arc::clone(core),
        entry,
        orders,
        attachments,
        DestinationStart {
            machine,
            effects: Vec::new(),
            vmm: Some(vmm),
            source_journal: hello.journal,
            decoder: Some(Decoder::new(dictionary)),
            window_bytes: agreement.limits.window_bytes,
        },
    );
    Ok((driver, offer.vm.clone()))
}

/// The hypervisor that will receive the VM, compared with the source's. Nothing of it is left where this fails.
async fn start_vm(core: &Core, vm: &Vm, offer: &Offer, source: &VmInventory) -> Result<DestinationVmm, String> {
    let socket = core.stream_socket(offer.migration);
    launches::begin(core, offer.migration)?;
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
