//! The site-to-site migration, seen from its source: named phases in a straight line, one exit that says where the VM is.
//!
//! ```text
//! check ─▶ agree ─▶ copy and hand over (gateway::source drives) ─▶ report
//! ```
//!
//! Until `agree` nothing has been touched and a failure is a refusal. From then on the ownership machine decides where the VM
//! is, and the report says it.

mod cold;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::api::{self, Check, DryRun, Phase, Refusal, RefusalKind, Report, StartRequest, Started};
use crate::config::{AfterSuccess, Disks, Hook, Vm};
use crate::gateway::again::{self, Successor};
use crate::gateway::channel::{Channel, ChannelError};
use crate::gateway::copying::{Copying, CopyingStart};
use crate::gateway::disks::cold_image::ColdImage;
use crate::gateway::forecasting::{Forecasting, Sample};
use crate::gateway::hooks::{self, Facts};
use crate::gateway::keeping::Slots;
use crate::gateway::links::Link;
use crate::gateway::memory::Need;
use crate::gateway::registry::{Busy, Entry, ResolveOrder};
use crate::gateway::source::{SourceDriver, SourceEnd, SourceStart};
use crate::gateway::source_vmm::SourceVmm;
use crate::gateway::standing::Held;
use crate::gateway::vm_context::VmContext;
use crate::gateway::wanted::Wanted;
use crate::gateway::{Core, clock, disks, history};
use crate::gateway::{keeping, launches, outbound};
use crate::hypervisor::qemu::{Condition, DirtyRate, GuestDisk, SourceError, SourceVm, VmInventory};
use crate::metrics::ActiveMigration;
use crate::proto::ownership::{Outcome, Source, SourceEvent, SourceTerms};
use crate::proto::page::{ByteRate, MigrationId, PAGE_SIZE, hex};
use crate::proto::precopy::{Budget, FixedCosts, ForecastInput};
use crate::proto::rate::Weight;
use crate::proto::reduce::DictionaryLimits;
use crate::proto::wire::message::{KnownImage, Offer, OfferedDisk, Placeable, Reply};
use crate::proto::wire::{Request, SessionMessage, hello};
use crate::store::pages::Image;
use crate::transport::tuning::UNSENT;

/// Time for a hypervisor's monitor to answer.
const MONITOR_DEADLINE: Duration = Duration::from_secs(5);

/// Time for the destination to tidy up an earlier migration of the VM, run its hook, start its hypervisor and agree.
const AGREE_DEADLINE: Duration = Duration::from_secs(90);

/// The same where it makes images too, perhaps in full.
const AGREE_DEADLINE_WITH_DISKS: Duration = Duration::from_secs(3700);

/// Between calls to a peer that is not back yet.
const CALL_AGAIN: Duration = Duration::from_millis(500);

/// The shortest sample that QEMU offers.
const DIRTY_SAMPLE: Duration = Duration::from_secs(1);

/// What the first pass of a Linux guest is reduced by with lz4 (Debian guest with Redis, 2026-11: 2.4; 3.2 with zstd), and what re-sent pages are: 54
/// there, 6 in the worst of the guests that were looked at (sort, gzip and md5sum), less the caution that guests differ. Assumptions of a forecast,
/// replaced by measurement once a migration runs.
pub(crate) const FIRST_PASS_RATIO: f64 = 2.4;
pub(crate) const RESEND_RATIO: f64 = 4.0;

/// A region of the session dictionary, in bytes of guest memory.
const REGION_BYTES: u64 = 4 << 20;

/// Regions for what is not the guest's main memory: video memory, firmware, option ROMs.
const EXTRA_REGIONS: u64 = 64;

/// Accepts a migration and runs it in the background.
///
/// # Errors
/// The request makes no sense here; everything else is in the report.
pub(crate) async fn start(core: &Arc<Core>, request: StartRequest) -> Result<Started, Refusal> {
    if core.is_draining() {
        return Err(draining());
    }
    vm_of(core, &request)?;
    check_sense(&request)?;
    // One that has just arrived here, or has just been undone.
    core.registry.gives_way(&request.vm, None).await;
    if core.is_draining() {
        return Err(draining());
    }
    let migration = MigrationId(crate::gateway::random::bytes());
    let (entry, orders) = core
        .registry
        .add(migration, &request.vm, &request.peer, api::Role::Source, clock::now())
        .map_err(|busy| Refusal::new(RefusalKind::Conflict, busy.to_string()))?;
    limit(core, &entry, &request);
    tracing::info!(%migration, vm = request.vm, peer = request.peer, "migration requested");
    let request = StartRequest {
        // It goes on across restarts.
        deadline_seconds: request.deadline_seconds.or(core
            .config
            .migration
            .deadline
            .map(|deadline| deadline.as_secs_f64())),
        ..request
    };
    let wanted = Wanted::new(request, core.journal.id(), clock::unix_ms());
    core.wanted.put(migration, wanted.clone()).await;
    spawn(core, entry, orders, wanted);
    Ok(Started { migration })
}

/// What is asked for can be had together.
fn check_sense(request: &StartRequest) -> Result<(), Refusal> {
    if request.cold && (request.warm.is_some() || request.downtime_limit_seconds.is_some()) {
        let text = "a VM that is off has no switchover that could wait or take long: ask for `cold` alone";
        return Err(Refusal::new(RefusalKind::Invalid, text));
    }
    Ok(())
}

fn draining() -> Refusal {
    let text = "the gateway is being stopped and starts no migrations";
    Refusal::new(RefusalKind::Unavailable, text)
}

/// Begins what an earlier process was asked for and has not brought to an end.
pub(crate) async fn start_again(core: &Arc<Core>, next: Successor) {
    let Successor { migration, wanted } = next;
    let StartRequest { vm, peer, .. } = &wanted.request;
    match core.registry.add(migration, vm, peer, api::Role::Source, clock::now()) {
        Ok((entry, orders)) => {
            limit(core, &entry, &wanted.request);
            spawn(core, entry, orders, wanted);
        }
        Err(busy) => {
            core.wanted.forget(migration).await;
            let report = Report::without_figures(migration, vm, peer, api::Outcome::Failed, busy.to_string());
            core.registry.remember(report, api::Role::Source, clock::now());
        }
    }
}

/// Not async itself: a migration may end with the beginning of the next.
fn spawn(core: &Arc<Core>, entry: Arc<Entry>, orders: mpsc::Receiver<ResolveOrder>, wanted: Wanted) {
    if wanted.restarts > 0 {
        tracing::info!(migration = %entry.migration, vm = entry.vm, peer = entry.peer, restarts = wanted.restarts, "begun again");
    }
    tokio::spawn(run(Arc::clone(core), entry, orders, wanted));
}

/// What was asked for, before anybody can know the migration and change it.
fn limit(core: &Core, entry: &Entry, request: &StartRequest) {
    entry.share.set_rate(cap(core, request));
    entry.share.set_weight(request.weight.unwrap_or(Weight::MIN));
    entry.set_warm(request.warm);
}

/// The cap of a migration that is asked for.
fn cap(core: &Core, request: &StartRequest) -> Option<ByteRate> {
    request
        .rate_bytes_per_second
        .map(ByteRate)
        .or(core.config.migration.rate)
}

/// Makes every check and a forecast; nothing moves.
///
/// # Errors
/// The request makes no sense here.
pub(crate) async fn dry_run(core: &Arc<Core>, request: StartRequest) -> Result<DryRun, Refusal> {
    check_sense(&request)?;
    let migration = MigrationId(crate::gateway::random::bytes());
    if request.cold {
        let (checks, _) = cold::check(core, &request, migration, Thoroughness::AskDestination).await;
        return Ok(DryRun {
            vm: request.vm,
            peer: request.peer,
            checks,
            forecast: None,
        });
    }
    let (mut checks, checked) = check(core, &request, migration, Thoroughness::AskDestination).await;
    let forecast = match &checked {
        Some(checked) => Some(checked.forecasting(checked.sample().await).forecast()),
        None => None,
    };
    if let (Some(deadline), Some(forecast)) = (checked.and_then(|checked| checked.deadline), &forecast) {
        let deadline_seconds = deadline.as_secs_f64();
        checks.push(Check {
            name: "deadline".to_owned(),
            ok: forecast.total_seconds <= deadline_seconds,
            detail: format!(
                "{:.1} s are expected, {deadline_seconds:.1} s are allowed",
                forecast.total_seconds
            ),
        });
    }
    Ok(DryRun {
        vm: request.vm,
        peer: request.peer,
        checks,
        forecast,
    })
}

async fn run(core: Arc<Core>, entry: Arc<Entry>, orders: mpsc::Receiver<ResolveOrder>, wanted: Wanted) {
    let request = &wanted.request;
    let metrics = Arc::new(core.metrics.migration(api::Role::Source));
    // Nothing of the VM is changed before both sites agree, so this can be let go of anywhere.
    let agree = async {
        if wanted.restarts > 0 {
            await_peer(&core, &entry, request).await?;
        }
        agree(&core, &entry, request, &metrics).await
    };
    let agreed = tokio::select! {
        agreed = agree => agreed,
        () = entry.cancel.cancelled() => Err("the operator cancelled it".to_owned()),
    };
    match agreed {
        Ok(agreed) => {
            let Agreed {
                vmm,
                link,
                channel,
                copying,
                was_running,
                disks,
                images,
            } = agreed;
            let terms = SourceTerms {
                was_running,
                destination_journal: link.peer_journal(),
            };
            let start = SourceStart {
                vmm,
                machine: Source::new(terms),
                effects: Vec::new(),
                peer_journal: link.peer_journal(),
                copying: Some(copying),
                disks,
                images,
                disk_rate: request.disk_rate_bytes_per_second.map(ByteRate),
                undone_by_restart: false,
            };
            let mut driver = SourceDriver::new(Arc::clone(&core), Arc::clone(&entry), orders, start);
            driver.adopt(link, channel);
            let end = driver.run(Some(SourceEvent::Begin)).await;
            finish(&core, &entry, end).await;
            launches::remove_silent_logs(&core).await;
        }
        Err(reason) => {
            let outcome = if entry.cancel.is_cancelled() {
                api::Outcome::Cancelled
            } else if wanted.restarts > 0 {
                // What was asked for has touched the VM before.
                api::Outcome::Failed
            } else {
                api::Outcome::Refused
            };
            tracing::warn!(migration = %entry.migration, vm = entry.vm, peer = entry.peer, %outcome, "{reason}");
            let now = clock::now();
            metrics.ended(now, outcome);
            core.wanted.forget(entry.migration).await;
            entry.finish(empty_report(&entry, now, outcome, reason), now);
        }
    }
}

/// A peer whose gateway was restarted too may not be back yet: it is waited for as after a cut.
async fn await_peer(core: &Core, entry: &Entry, request: &StartRequest) -> Result<(), String> {
    entry.set_phase(Phase::Checking);
    let deadline = request
        .deadline_seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // Of one that waits it counts from when that goes on.
    let deadline = deadline.filter(|_| request.warm.is_none());
    let longest = deadline.map_or(core.config.migration.longest_cut, |deadline| {
        deadline.min(core.config.migration.longest_cut)
    });
    let reached = async {
        while let Err(error) = core.links.fresh_link(&entry.peer).await {
            tracing::debug!(migration = %entry.migration, peer = entry.peer, "not back yet: {error}");
            tokio::time::sleep(CALL_AGAIN).await;
        }
    };
    let reached = tokio::time::timeout(longest, reached).await;
    reached.map_err(|_| {
        format!(
            "the peer {} could not be reached for {} s",
            entry.peer,
            longest.as_secs()
        )
    })
}

/// Both sites agree: from here on there is a destination that waits.
struct Agreed {
    vmm: SourceVmm,
    link: Arc<Link>,
    channel: Channel,
    copying: Copying,
    was_running: bool,
    disks: Vec<GuestDisk>,
    /// Of a VM that is off: where each of them is.
    images: Option<Vec<ColdImage>>,
}

async fn agree(
    core: &Arc<Core>,
    entry: &Arc<Entry>,
    request: &StartRequest,
    metrics: &Arc<ActiveMigration>,
) -> Result<Agreed, String> {
    entry.set_phase(Phase::Checking);
    metrics.enters(clock::now(), Phase::Checking);
    if request.cold {
        return cold::agree(core, entry, request, metrics).await;
    }
    let (checks, checked) = check(core, request, entry.migration, Thoroughness::OwnSide).await;
    let mut checked = passed(checks, checked)?;
    core.journal.reserve().await.map_err(|error| error.to_string())?;
    entry.set_phase(Phase::Preparing);
    metrics.enters(clock::now(), Phase::Preparing);
    let agreement_held = hold_agreement(core, &request.peer, &mut checked.link).await?;
    let agreement = checked.link.agreement();
    let window_bytes = agreement.limits.window_bytes;
    let slots = checked.slots();
    let offer = checked.offer(entry.migration);
    let regions = offer.regions;
    let limits = |slots| DictionaryLimits::new(slots, regions).map_err(|error| error.to_string());
    let mut images = match agreement.version >= hello::IMAGES {
        true => keeping::candidates(core, &entry.vm, &entry.peer, slots).await,
        false => Vec::new(),
    };
    let deltas = agreement.version >= hello::DELTAS;
    let coders = outbound::coders(agreement.version, checked.link.capacity());
    let need = |dictionary| {
        Need::at_source(window_bytes, dictionary, deltas, coders).with_store(core.store.is_some(), dictionary)
    };
    let (mut memory, most) = loop {
        // For the largest that the destination may take.
        let largest = images.iter().map(Image::head).max_by_key(|head| slots.with(Some(head)));
        let most = need(limits(slots.with(largest))?);
        match core.memory.reserve(most) {
            Ok(memory) => break (memory, most),
            Err(error) => {
                let seed = largest.filter(|head| head.whose.is_seed()).map(|head| head.id);
                let Some(seed) = seed else {
                    return Err(format!("{}: {error}", core.config.site));
                };
                tracing::info!(vm = entry.vm, %seed, "a seed is not offered: {error}");
                images.retain(|image| image.head().id != seed);
            }
        }
    };
    let offered_images = images.iter().map(|image| KnownImage {
        id: image.head().id,
        digest: image.head().digest,
    });
    let offered_images = offered_images.collect();
    let offered = async {
        let deadline = match checked.disks.is_empty() {
            true => AGREE_DEADLINE,
            false => AGREE_DEADLINE_WITH_DISKS,
        };
        let opening = checked
            .opening(offer, offered_images)?
            .with_places(request.disk_places.clone());
        let agreed = tokio::time::timeout(deadline, open_session(&checked.link, opening)).await;
        agreed.map_err(|_| format!("{} did not agree within {} s", entry.peer, deadline.as_secs()))?
    };
    let sample = checked.begin_sample().await;
    let (mut channel, image) = offered.await?;
    drop(agreement_held);
    let image = images.into_iter().find(|held| Some(held.head().id) == image);
    let dictionary = limits(slots.with(image.as_ref().map(Image::head)))?;
    memory.shrink(most, need(dictionary));
    let memory_bytes = memory_of(&checked.inventory);
    let prepared = match keeping::prepare(core, agreement.version, dictionary, memory_bytes, image).await {
        Ok(prepared) => prepared,
        Err(reason) => {
            let cancel = SessionMessage::Cancel { reason: reason.clone() };
            // Where it does not arrive, the destination asks after a while.
            let _ = channel.sender.send(&cancel).await;
            channel.sender.finish();
            return Err(reason);
        }
    };
    core.metrics.add_known_pages(prepared.known_pages());
    let forecasting = checked.forecasting(sample);
    let Checked {
        mut vm,
        link,
        budget,
        costs,
        vm_config,
        deadline,
        disks,
        ..
    } = checked;
    let now = clock::now();
    let mut copying = Copying::new(CopyingStart {
        metrics: Arc::clone(metrics),
        now,
        budget,
        costs,
        deadline,
        waits: request.warm.is_some(),
        share: Arc::clone(&entry.share),
        agreement,
        dictionary: Some(dictionary),
        coders,
        prepared,
        memory: Some(memory),
        forecasting: Some(forecasting),
        memory_bytes,
        wire_at_start: link.wire_bytes(),
    });
    // Somebody may have paused or continued it since it was looked at; what it is now is recorded before anything is changed.
    vm.note_state().await.map_err(|error| error.to_string())?;
    let was_running = vm.was_running();
    let context = VmContext {
        qmp: vm_config.qmp.clone(),
        process: Some(vm.identity().clone()),
        leave_after_success: core.config.after_success(&vm_config) == AfterSuccess::Leave,
        settings: vm.changed_settings(),
        is_off: false,
        images: disks
            .iter()
            .filter_map(|disk| disk.file.clone().map(PathBuf::from))
            .collect(),
    };
    hooks::owe(core, entry.migration, api::Role::Source)?;
    copying.show(now, Phase::Preparing, None, entry);
    Ok(Agreed {
        vmm: SourceVmm::new(vm, context),
        link,
        channel,
        copying,
        was_running,
        disks,
        images: None,
    })
}

/// What the checks found, or everything that speaks against the migration.
fn passed<T>(checks: Vec<Check>, found: Option<T>) -> Result<T, String> {
    let failed: Vec<String> = checks
        .into_iter()
        .filter(|check| !check.ok)
        .map(|check| check.detail)
        .collect();
    if !failed.is_empty() {
        return Err(in_one_line(&failed));
    }
    found.ok_or_else(|| "the checks did not come to an end".to_owned())
}

/// Keeps what is agreed on with the peer as it is until a session was opened by it.
async fn hold_agreement(core: &Core, peer: &str, link: &mut Arc<Link>) -> Result<Held, String> {
    let held = link.hold_agreement().await;
    if link.is_alive() {
        return Ok(held);
    }
    // It was lost since, perhaps while both said hello again.
    *link = core.links.fresh_link(peer).await.map_err(|error| error.to_string())?;
    Ok(link.hold_agreement().await)
}

/// The channel of the session, and the image with which both sites begin it.
async fn open_session(link: &Link, request: Request) -> Result<(Channel, Option<MigrationId>), String> {
    let named: Vec<MigrationId> = match &request {
        Request::OpenKnowing { images, .. }
        | Request::OpenWithDisks { images, .. }
        | Request::Placed {
            request: Placeable::Open { images, .. },
            ..
        } => images.iter().map(|image| image.id).collect(),
        _ => Vec::new(),
    };
    let opened = async {
        let mut channel = Channel::open(link.control(), &request).await?;
        let answer = channel
            .receiver
            .receive::<SessionMessage>()
            .await?
            .ok_or(ChannelError::Closed)?;
        Ok::<_, ChannelError>((channel, answer))
    };
    match opened.await {
        Ok((channel, SessionMessage::Accepted { .. })) => Ok((channel, None)),
        Ok((channel, SessionMessage::AcceptedKnowing { image })) if named.contains(&image) => {
            Ok((channel, Some(image)))
        }
        Ok((_, SessionMessage::Refused { reason } | SessionMessage::Failed { reason })) => Err(reason),
        Ok(_) => Err("the peer answered the offer with something else".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Round trips by which a path is measured that seems to be too long.
const PINGS: u64 = 16;

/// How far checks go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Thoroughness {
    /// Everything here, and that the peer is there. The destination checks when it is offered the VM.
    OwnSide,
    /// The destination is asked too.
    AskDestination,
}

/// What the checks found.
struct Checked {
    vm: SourceVm,
    vm_config: Vm,
    inventory: VmInventory,
    link: Arc<Link>,
    budget: Budget,
    costs: FixedCosts,
    cap: Option<ByteRate>,
    deadline: Option<Duration>,
    /// Those that are copied with the VM.
    disks: Vec<GuestDisk>,
}

/// Every check in turn. `None` unless all of them passed.
async fn check(
    core: &Arc<Core>,
    request: &StartRequest,
    migration: MigrationId,
    how: Thoroughness,
) -> (Vec<Check>, Option<Checked>) {
    let mut checks = Vec::new();
    let mut note = |name: &str, result: Result<String, String>| {
        let check = Check::of(name, result);
        let ok = check.ok;
        checks.push(check);
        ok
    };

    let vm_config = match vm_of(core, request) {
        Ok(vm) => vm.clone(),
        Err(refusal) => {
            note("vm", Err(refusal.message));
            return (checks, None);
        }
    };
    if let Some(open) = core.registry.disk_move(&request.vm) {
        note("vm", Err(Busy::DiskMove(open).to_string()));
        return (checks, None);
    }
    let look = async {
        let vm = SourceVm::connect(&vm_config.qmp, MONITOR_DEADLINE).await?;
        let seen = look_at_vm(&vm, &vm_config).await;
        Ok::<_, SourceError>((vm, seen))
    };
    let (looked, link) = tokio::join!(look, core.links.fresh_link(&request.peer));
    let link = match link {
        Ok(link) => {
            note(
                "peer",
                Ok(format!(
                    "{} answers, RTT {:.1} ms",
                    request.peer,
                    link.rtt().as_secs_f64() * 1e3
                )),
            );
            Some(link)
        }
        Err(error) => {
            note("peer", Err(error.to_string()));
            None
        }
    };
    let mut fine = link.is_some();
    let found = match looked
        .map_err(|error| error.to_string())
        .and_then(|(vm, seen)| Ok((vm, seen?)))
    {
        Ok((vm, seen)) => {
            let is_fine = judge(&seen, &vm_config, &mut note);
            is_fine.then_some((vm, seen.inventory, seen.disks))
        }
        Err(reason) => {
            note("hypervisor", Err(reason));
            None
        }
    };
    fine &= found.is_some();

    let limit = match request.downtime_limit_seconds {
        Some(seconds) => Duration::try_from_secs_f64(seconds).unwrap_or_default(),
        None => core.config.migration.downtime_limit,
    };
    // The path's RTT as it was measured; a queue that happens to stand in it now is no part of the promise.
    let rtt = link.as_ref().map_or(core.config.link.rtt, |link| link.rtt());
    let cap = cap(core, request);
    let is_enough = |rtt| Budget::new(limit, &FixedCosts::on_path(rtt, None)).is_ok();
    let rtt = match &link {
        // What a link has measured that has just been made may be how busy the hosts are.
        Some(link) if !is_enough(rtt) => measured_again(link, is_enough).await,
        _ => rtt,
    };
    let capacity = link.as_ref().and_then(|link| link.goodput());
    let mut costs = FixedCosts::on_path(rtt, capacity.into_iter().chain(cap).min());
    if capacity.is_none() {
        costs.backlog += UNSENT;
    }
    let budget = Budget::new(limit, &costs);
    fine &= note(
        "downtime limit",
        budget
            .as_ref()
            .map(|budget| {
                format!(
                    "{} ms, of which {} ms are left for memory",
                    limit.as_millis(),
                    budget.transfer.as_millis()
                )
            })
            .map_err(ToString::to_string),
    );
    let (Some((vm, inventory, disks)), Some(link), Ok(budget)) = (found, link, budget) else {
        return (checks, None);
    };
    let deadline = deadline_of(core, request);
    let checked = Checked {
        vm,
        vm_config,
        inventory,
        link,
        budget,
        costs,
        cap,
        deadline,
        disks,
    };
    if request.warm.is_some() && checked.disks.is_empty() {
        let name = &request.vm;
        let refusal = format!(
            "no disk of {name} is copied (disks = \"copied\"), so there is nothing to copy before the switchover: leave --warm away"
        );
        fine &= note("warm", Err(refusal));
    }
    if let Err(reason) = check_places(request, &checked.link, !checked.disks.is_empty()) {
        fine &= note("places", Err(reason));
    }
    if let Some(passed) = hook_before(core, request, migration).await {
        fine &= note("pre_check", passed);
    }
    if fine && how == Thoroughness::AskDestination {
        let offer = checked.offer(migration);
        let question = match checked.offered_disks() {
            Ok(disks) if disks.is_empty() => Request::Check(offer),
            Ok(disks) => Request::CheckWithDisks { offer, disks },
            Err(reason) => {
                note("destination", Err(reason));
                return (checks, None);
            }
        };
        let question = question.with_places(request.disk_places.clone());
        fine &= note(
            "destination",
            ask_destination(&checked.link, &question, &request.peer).await,
        );
    }
    (checks, fine.then_some(checked))
}

/// The RTT, by some more round trips, which weigh an eighth each (RFC 9002 5.3): until it is short enough, or as long as before.
async fn measured_again(link: &Link, is_enough: impl Fn(Duration) -> bool) -> Duration {
    for number in 0..PINGS {
        let answer = Channel::ask::<_, Reply>(link.control(), &Request::Ping(number)).await;
        if answer.is_err() || is_enough(link.rtt()) {
            break;
        }
    }
    link.rtt()
}

/// Whether the destination can be told where disks go. Whether they can go there is its own to say.
fn check_places(request: &StartRequest, link: &Link, has_disks: bool) -> Result<(), String> {
    if request.disk_places.is_empty() {
        return Ok(());
    }
    if !has_disks {
        return Err(format!(
            "no disk of {} is copied (disks = \"copied\"), so none can be put anywhere: leave --disk away",
            request.vm
        ));
    }
    if link.agreement().version < hello::PLACES {
        return Err("the peer has an older release, which puts disks where its configuration says: upgrade it, or leave --disk away".to_owned());
    }
    Ok(())
}

/// What the hook before a migration says, where there is one.
async fn hook_before(core: &Core, request: &StartRequest, migration: MigrationId) -> Option<Result<String, String>> {
    if !hooks::is_configured(core, Hook::PreCheck) {
        return None;
    }
    let facts = Facts::new(migration, &request.vm, &request.peer, api::Role::Source);
    let passed = hooks::run(core, Hook::PreCheck, &facts).await;
    Some(passed.map(|()| "the hook has nothing against it".to_owned()))
}

async fn ask_destination(link: &Link, question: &Request, peer: &str) -> Result<String, String> {
    match Channel::ask::<_, Reply>(link.control(), question).await {
        Ok(Reply::Checked(against)) if against.is_empty() => Ok(format!("{peer} would take it")),
        Ok(Reply::Checked(against)) => Err(in_one_line(&against)),
        Ok(Reply::Refused(reason)) => Err(reason),
        Ok(_) => Err(format!("{peer} answered something else")),
        Err(error) => Err(error.to_string()),
    }
}

fn deadline_of(core: &Core, request: &StartRequest) -> Option<Duration> {
    request
        .deadline_seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .or(core.config.migration.deadline)
}

/// What the VM is, and what is going on with it.
struct Seen {
    inventory: VmInventory,
    condition: Condition,
    /// Those that are to be copied.
    disks: Vec<GuestDisk>,
}

async fn look_at_vm(vm: &SourceVm, config: &Vm) -> Result<Seen, String> {
    let seen = async { Ok::<_, SourceError>((vm.inventory().await?, vm.condition().await?)) };
    let (inventory, condition) = seen.await.map_err(|error| error.to_string())?;
    let disks = match config.disks {
        Disks::Copied => vm.block_layer().disks().await.map_err(|error| error.to_string())?,
        Disks::None | Disks::Shared => Vec::new(),
    };
    Ok(Seen {
        inventory,
        condition,
        disks,
    })
}

/// Whether the VM can be moved as it is.
fn judge(seen: &Seen, config: &Vm, note: &mut impl FnMut(&str, Result<String, String>) -> bool) -> bool {
    let Seen {
        inventory,
        condition,
        disks,
    } = seen;
    note(
        "hypervisor",
        Ok(format!("QEMU {}, {}", inventory.version, inventory.machine)),
    );
    let refusals = condition.refusals(config.disks != Disks::None);
    for refusal in &refusals {
        note("condition", Err(refusal.to_string()));
    }
    if refusals.is_empty() {
        note(
            "condition",
            Ok(format!(
                "{} MiB of memory, nothing speaks against it",
                memory_of(inventory) >> 20
            )),
        );
    }
    if !disks.is_empty() {
        let names: Vec<&str> = disks.iter().map(GuestDisk::short_name).collect();
        let allocated: u64 = disks.iter().map(|disk| disk.allocated_bytes).sum();
        note(
            "disks",
            Ok(format!("{} are copied, {} MiB", names.join(", "), allocated >> 20)),
        );
    }
    refusals.is_empty()
}

impl Checked {
    /// The disks as the destination is told of them.
    fn offered_disks(&self) -> Result<Vec<OfferedDisk>, String> {
        if !self.disks.is_empty() && self.link.agreement().version < hello::DISKS {
            return Err("the peer has an older release, which cannot take disks: upgrade it".to_owned());
        }
        let offered = disks::offered(&self.disks);
        disks::check_offer(&offered)?;
        Ok(offered)
    }

    /// What opens the session.
    fn opening(&self, offer: Offer, images: Vec<KnownImage>) -> Result<Request, String> {
        let disks = self.offered_disks()?;
        Ok(match (disks.is_empty(), images.is_empty()) {
            (true, true) => Request::Open(offer),
            (true, false) => Request::OpenKnowing { offer, images },
            (false, _) => Request::OpenWithDisks { offer, images, disks },
        })
    }

    /// Of the session's dictionary.
    fn slots(&self) -> Slots {
        let most = self.link.agreement().limits.dictionary_pages;
        Slots {
            of_guest: dictionary_pages(&self.inventory).min(most),
            most,
        }
    }

    fn offer(&self, migration: MigrationId) -> Offer {
        Offer {
            migration,
            vm: self.vm_config.name.clone(),
            inventory: serde_json::to_string(&self.inventory).expect("an inventory is plain data"),
            was_running: self.vm.was_running(),
            reduce: true,
            dictionary_pages: self.slots().of_guest,
            regions: regions(&self.inventory),
        }
    }

    /// Begins to sample what the guest writes at the moment.
    async fn begin_sample(&self) -> Sample {
        if !self.vm.was_running() {
            return self.nothing_written();
        }
        match self.vm.begin_dirty_rate_sample(DIRTY_SAMPLE).await {
            Ok(sample) => Sample::UnderWay(sample),
            Err(error) => self.no_sample(&error),
        }
    }

    /// What the guest writes at the moment.
    async fn sample(&self) -> Sample {
        if !self.vm.was_running() {
            return self.nothing_written();
        }
        match self.vm.dirty_rate_sample(DIRTY_SAMPLE).await {
            Ok(rate) => Sample::of(rate),
            Err(error) => self.no_sample(&error),
        }
    }

    /// A guest that stands still.
    fn nothing_written(&self) -> Sample {
        Sample::Taken(DirtyRate {
            bytes_per_second: 0,
            sampled_bytes: memory_of(&self.inventory),
        })
    }

    fn no_sample(&self, error: &SourceError) -> Sample {
        tracing::debug!(vm = self.vm_config.name, "no dirty-rate sample: {error}");
        Sample::Unknown
    }

    fn forecasting(&self, sample: Sample) -> Forecasting {
        let memory = memory_of(&self.inventory);
        let goodput = self
            .link
            .goodput()
            .or(self.link.capacity())
            .unwrap_or(ByteRate(12_500_000));
        let known = ForecastInput {
            used_bytes: memory,
            total_bytes: memory,
            disk_bytes: self.disks.iter().map(|disk| disk.allocated_bytes).sum(),
            dirty_rate: ByteRate(0),
            goodput: self.cap.map_or(goodput, |cap| cap.min(goodput)),
            rtt: self.link.rtt(),
            first_pass_ratio: FIRST_PASS_RATIO,
            resend_ratio: RESEND_RATIO,
            budget: self.budget,
        };
        Forecasting::new(known, sample)
    }
}

/// The one exit: says where the VM is. What the restart of a gateway has undone begins again.
pub(crate) async fn finish(core: &Arc<Core>, entry: &Arc<Entry>, mut end: SourceEnd) {
    let successor = again::successor(core, entry, end.undone_by_restart).await;
    if let Err(Some(why)) = &successor {
        let undone = end.reason.take().unwrap_or_default();
        end.reason = Some(format!("{undone}, and {why}"));
    }
    let successor = successor.ok();
    let now = clock::now();
    let outcome = match end.outcome {
        Outcome::RunsAtDestination => api::Outcome::Completed,
        Outcome::RunsAtSource if end.cancelled => api::Outcome::Cancelled,
        Outcome::RunsAtSource => api::Outcome::Failed,
        Outcome::VmmDied => api::Outcome::VmDied,
    };
    let reason = match (outcome, end.reason) {
        (api::Outcome::Completed, _) if end.was_off => {
            format!("{} is at {}, off: start it there", entry.vm, entry.peer)
        }
        (api::Outcome::Completed, _) => format!("{} runs at {}", entry.vm, entry.peer),
        (api::Outcome::VmDied, _) => history::vm_died(&entry.vm),
        (_, Some(reason)) => reason,
        (_, None) => "the migration was undone".to_owned(),
    };
    let mut report = empty_report(entry, now, outcome, reason);
    report.continued_as = successor.as_ref().map(|next| next.migration);
    report.downtime_seconds = end.downtime.map(|downtime| downtime.as_secs_f64());
    report.stream_digest = end.stream.map(|sum| hex(&sum.digest.0));
    report.wire_bytes = end.wire_bytes;
    report.resent_bytes = end.resent_bytes;
    if let Some(downtime) = end.downtime {
        core.metrics.observe_downtime(downtime);
    }
    report.disks = end.disks;
    match end.copying {
        Some(copying) => {
            report.forecast = copying.forecast();
            report.rounds = copying.rounds();
            report.vmm_bytes = copying.totals().vmm_bytes;
            report.reduction_ratio = copying.reduction_ratio();
            report.pages = copying.pages();
            report.known_pages = copying.known_pages();
            copying.ended(now, outcome);
        }
        None => core.metrics.migration(api::Role::Source).ended(now, outcome),
    }
    tracing::info!(migration = %entry.migration, vm = entry.vm, peer = entry.peer, %outcome, reason = report.reason,
        total_seconds = report.total_seconds, downtime_seconds = report.downtime_seconds, wire_bytes = report.wire_bytes);
    hooks::after(core, entry, outcome, &report.reason);
    match successor {
        Some(next) => {
            let (entry, orders) = core.registry.replace(entry, report, next.migration, now);
            limit(core, &entry, &next.wanted.request);
            spawn(core, entry, orders, next.wanted);
        }
        None => entry.finish(report, now),
    }
}

/// A report without figures, of a migration that did not carry any or is seen from its other end.
pub(crate) fn empty_report(entry: &Entry, now: Instant, outcome: api::Outcome, reason: String) -> Report {
    Report {
        total_seconds: now.saturating_duration_since(entry.started).as_secs_f64(),
        ..Report::without_figures(entry.migration, &entry.vm, &entry.peer, outcome, reason)
    }
}

/// Sentences behind each other; some end with their mark and some do not.
pub(crate) fn in_one_line(sentences: &[String]) -> String {
    let mut text = String::new();
    for sentence in sentences {
        if !text.is_empty() {
            text.push_str(if text.ends_with(['.', '?', '!']) { " " } else { ". " });
        }
        text.push_str(sentence);
    }
    text
}

fn vm_of<'a>(core: &'a Core, request: &StartRequest) -> Result<&'a Vm, Refusal> {
    core.config.vm(&request.vm).ok_or_else(|| {
        Refusal::new(
            RefusalKind::NotFound,
            format!(
                "no [[vm]] section is called {}: add one to this gateway's configuration",
                request.vm
            ),
        )
    })
}

fn memory_of(inventory: &VmInventory) -> u64 {
    inventory.base_memory_bytes + inventory.plugged_memory_bytes
}

/// Regions of the session dictionary that a guest has at most.
pub(crate) fn regions(inventory: &VmInventory) -> u32 {
    u32::try_from(memory_of(inventory) / REGION_BYTES + EXTRA_REGIONS)
        .unwrap_or(u32::MAX)
        .min(DictionaryLimits::MAX_REGIONS)
}

/// All of the guest's memory, and a quarter for what changes: evictions in order of age then spare what is re-sent.
fn dictionary_pages(inventory: &VmInventory) -> u32 {
    u32::try_from(memory_of(inventory) / PAGE_SIZE as u64 * 5 / 4)
        .unwrap_or(u32::MAX)
        .min(DictionaryLimits::MAX_SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_do_not_run_together() {
        let sentences = ["a is not b", "Switch it off.", "Is it running?", "c"].map(str::to_owned);
        assert_eq!(in_one_line(&sentences), "a is not b. Switch it off. Is it running? c");
    }
}
