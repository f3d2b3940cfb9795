//! A VM that is off moves: its images are held here and read once, and no hypervisor is needed at either site.

use std::sync::Arc;
use std::time::Duration;

use super::{
    AGREE_DEADLINE_WITH_DISKS, Agreed, Thoroughness, ask_destination, cap, check_places, deadline_of, hold_agreement,
    hook_before, open_session, passed, vm_of,
};
use crate::api::{self, Check, Phase, StartRequest};
use crate::config::{Disks, Vm};
use crate::gateway::copying::{Copying, CopyingStart};
use crate::gateway::disks::cold_image::ColdImage;
use crate::gateway::disks::volumes;
use crate::gateway::keeping::Prepared;
use crate::gateway::links::Link;
use crate::gateway::registry::{Busy, Entry};
use crate::gateway::source_vmm::SourceVmm;
use crate::gateway::vm_context::VmContext;
use crate::gateway::{Core, clock, disks, hooks};
use crate::hypervisor::qemu::GuestDisk;
use crate::metrics::ActiveMigration;
use crate::proto::page::{ByteRate, MigrationId};
use crate::proto::precopy::{Budget, FixedCosts};
use crate::proto::wire::message::ColdOffer;
use crate::proto::wire::{Request, hello};

/// No guest stands still: what a budget is for does not happen.
const NO_DOWNTIME: Duration = Duration::from_secs(3600);

/// What the checks found.
pub(super) struct Checked {
    vm: Vm,
    link: Arc<Link>,
    images: Vec<ColdImage>,
    cap: Option<ByteRate>,
    deadline: Option<Duration>,
}

/// Every check in turn. `None` unless all of them passed.
pub(super) async fn check(
    core: &Arc<Core>,
    request: &StartRequest,
    migration: MigrationId,
    how: Thoroughness,
) -> (Vec<Check>, Option<Checked>) {
    let mut checks = Vec::new();
    let mut note = |name: &str, result| checks.push(Check::of(name, result));
    let found = find(core, request, migration, how, &mut note).await;
    let is_fine = checks.iter().all(|check| check.ok);
    (checks, found.filter(|_| is_fine))
}

async fn find(
    core: &Arc<Core>,
    request: &StartRequest,
    migration: MigrationId,
    how: Thoroughness,
    note: &mut (impl FnMut(&str, Result<String, String>) + Send),
) -> Option<Checked> {
    let vm = match look_at_vm(core, request).await {
        Ok(vm) => vm,
        Err(reason) => {
            note("vm", Err(reason));
            return None;
        }
    };
    note("vm", Ok(format!("{} is off", vm.name)));
    let (link, images) = tokio::join!(core.links.fresh_link(&request.peer), open_images(&vm));
    let link = match link {
        Ok(link) if link.agreement().version < hello::COLD => {
            let text = "the peer has an older release, which takes VMs that run only: upgrade it";
            note("peer", Err(text.to_owned()));
            None
        }
        Ok(link) => {
            let rtt = link.rtt().as_secs_f64() * 1e3;
            note("peer", Ok(format!("{} answers, RTT {rtt:.1} ms", request.peer)));
            Some(link)
        }
        Err(error) => {
            note("peer", Err(error.to_string()));
            None
        }
    };
    let images = match images {
        Ok(images) => images,
        Err(reason) => {
            note("disks", Err(reason));
            return None;
        }
    };
    let link = link?;
    let cap = cap(core, request);
    let disk_rate = request.disk_rate_bytes_per_second.map(ByteRate);
    let rate = link.goodput().into_iter().chain(cap).chain(disk_rate).min();
    note("disks", Ok(summary(&vm, &images, rate)));
    let checked = Checked {
        vm,
        link,
        images,
        cap,
        deadline: deadline_of(core, request),
    };
    if let (Some(deadline), Some(rate)) = (checked.deadline, rate.filter(|_| how == Thoroughness::AskDestination)) {
        let (seconds, expected) = (
            deadline.as_secs_f64(),
            rate.time_for(checked.allocated_bytes()).as_secs_f64(),
        );
        let text = format!("{expected:.0} s are expected at most, {seconds:.0} s are allowed");
        note("deadline", if expected <= seconds { Ok(text) } else { Err(text) });
    }
    let mut is_fine = true;
    if let Err(reason) = check_places(request, &checked.link, true) {
        is_fine = false;
        note("places", Err(reason));
    }
    if let Some(passed) = hook_before(core, request, migration).await {
        is_fine &= passed.is_ok();
        note("pre_check", passed);
    }
    if is_fine && how == Thoroughness::AskDestination {
        let question = Request::CheckCold(checked.offer(migration)).with_places(request.disk_places.clone());
        note(
            "destination",
            ask_destination(&checked.link, &question, &request.peer).await,
        );
    }
    Some(checked)
}

async fn look_at_vm(core: &Core, request: &StartRequest) -> Result<Vm, String> {
    let vm = vm_of(core, request).map_err(|refusal| refusal.message)?;
    if let Some(open) = core.registry.disk_move(&request.vm) {
        return Err(Busy::DiskMove(open).to_string());
    }
    if volumes::listens(&vm.qmp).await {
        return Err(format!(
            "{} has a hypervisor, which listens on {}: shut the VM down, or leave --cold away and it moves while it runs",
            vm.name,
            vm.qmp.display()
        ));
    }
    if vm.disks != Disks::Copied || vm.images.is_empty() {
        return Err(format!(
            "where the disks of {} are is not known while it is off: say disks = \"copied\" and a [[vm.image]] for each of them",
            vm.name
        ));
    }
    Ok(vm.clone())
}

async fn open_images(vm: &Vm) -> Result<Vec<ColdImage>, String> {
    let mut images = Vec::new();
    for image in &vm.images {
        let opened = ColdImage::open(&image.path, image.format)
            .await
            .map_err(|error| error.to_string())?;
        if opened.is_encrypted {
            return Err(format!(
                "{} is encrypted, and its secret is not known here: it can be moved while {} runs",
                image.path.display(),
                vm.name
            ));
        }
        images.push(opened);
    }
    Ok(images)
}

/// What there is to read, and how long it takes at most.
fn summary(vm: &Vm, images: &[ColdImage], rate: Option<ByteRate>) -> String {
    let names: Vec<&str> = vm.images.iter().map(|image| image.disk.as_str()).collect();
    let allocated: u64 = images.iter().map(|image| image.allocated_bytes).sum();
    let mut text = format!("{} are copied, {} MiB", names.join(", "), allocated >> 20);
    if let Some(rate) = rate {
        let seconds = rate.time_for(allocated).as_secs_f64();
        text += &format!(
            ", at {:.0} Mbit/s in {seconds:.0} s where nothing can be reduced",
            rate.0 as f64 * 8e-6
        );
    }
    for lost in notices(images) {
        text += "; ";
        text += &lost;
    }
    text
}

/// What does not come along, and what a person has to look after.
fn notices(images: &[ColdImage]) -> impl Iterator<Item = String> {
    let snapshots = images.iter().filter(|image| image.snapshots > 0).map(|image| {
        let (count, path) = (image.snapshots, image.path.display());
        format!("the {count} snapshots in {path} do not come along")
    });
    let unmarked = images.iter().filter(|image| !image.can_be_marked).map(|image| {
        let path = image.path.display();
        format!("{path} cannot be marked as left (it takes no extended attributes): see to it that nobody takes it for the disk afterwards")
    });
    snapshots.chain(unmarked)
}

impl Checked {
    fn allocated_bytes(&self) -> u64 {
        self.images.iter().map(|image| image.allocated_bytes).sum()
    }

    fn disks(&self) -> Vec<GuestDisk> {
        let disk = |(name, image): (&str, &ColdImage)| GuestDisk {
            name: name.to_owned(),
            node: String::new(),
            size_bytes: image.size_bytes,
            allocated_bytes: image.allocated_bytes,
            file: image.path.to_str().map(str::to_owned),
            has_backing: image.has_backing,
        };
        let names = self.vm.images.iter().map(|image| image.disk.as_str());
        names.zip(&self.images).map(disk).collect()
    }

    fn offer(&self, migration: MigrationId) -> ColdOffer {
        ColdOffer {
            migration,
            vm: self.vm.name.clone(),
            disks: disks::offered(&self.disks()),
        }
    }
}

/// Both sites agree, and the images here are held.
pub(super) async fn agree(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    request: &StartRequest,
    metrics: &Arc<ActiveMigration>,
) -> Result<Agreed, String> {
    let (checks, checked) = check(core, request, entry.migration, Thoroughness::OwnSide).await;
    let mut checked = passed(checks, checked)?;
    let paths = checked.images.iter().map(|image| image.path.clone()).collect();
    let context = VmContext::off(&checked.vm.qmp, paths);
    context.check_fits()?;
    core.journal.reserve().await.map_err(|error| error.to_string())?;
    entry.set_phase(Phase::Preparing);
    metrics.enters(clock::now(), Phase::Preparing);
    let agreement_held = hold_agreement(core, &request.peer, &mut checked.link).await?;
    let question = Request::OpenCold(checked.offer(entry.migration)).with_places(request.disk_places.clone());
    let deadline = AGREE_DEADLINE_WITH_DISKS;
    let opened = tokio::time::timeout(deadline, open_session(&checked.link, question)).await;
    let (channel, _) =
        opened.map_err(|_| format!("{} did not agree within {} s", entry.peer, deadline.as_secs()))??;
    drop(agreement_held);
    let disks = checked.disks();
    let Checked {
        vm: _,
        link,
        images,
        cap,
        deadline,
    } = checked;
    let costs = FixedCosts::on_path(link.rtt(), link.goodput().into_iter().chain(cap).min());
    let budget = Budget::new(NO_DOWNTIME, &costs).map_err(|error| error.to_string())?;
    let now = clock::now();
    let mut copying = Copying::new(CopyingStart {
        metrics: Arc::clone(metrics),
        now,
        budget,
        costs,
        deadline,
        waits: false,
        share: Arc::clone(&entry.share),
        agreement: link.agreement(),
        dictionary: None,
        coders: 1,
        prepared: Prepared::default(),
        memory: None,
        forecasting: None,
        memory_bytes: 0,
        wire_at_start: link.wire_bytes(),
    });
    hooks::owe(core, entry.migration, api::Role::Source)?;
    for lost in notices(&images) {
        entry.notice(&lost);
    }
    copying.show(now, Phase::Preparing, None, entry);
    Ok(Agreed {
        vmm: SourceVmm::off(context, &images),
        link,
        channel,
        copying,
        was_running: false,
        disks,
        images: Some(images),
    })
}
