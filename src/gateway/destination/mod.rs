//! Drives one migration at its destination: performs what the ownership machine asks for and feeds it what happens.

mod disks;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::Core;
use super::channel::Channel;
use super::contact::{Contact, ContactEvent};
use super::destination_vmm::{ContinueOutcome, DestinationVmm, LoadState};
use super::disks::mark::Rest;
use super::disks::take::{self, Taken};
use super::hooks;
use super::inbound::{Inbound, Progress, Shelf};
use super::keeping;
use super::launches;
use super::registry::{Entry, ResolveOrder};
use super::vm_context::VmContext;
use super::vmm_output::Tail;
use crate::api::{self, Outcome, Phase};
use crate::metrics::{ActiveMigration, Direction, Look};
use crate::migrate;
use crate::proto::ownership::{
    AbortReason, Destination, DestinationEvent, DestinationState, Effect, JournalRecord, Message, RecordKind, Role,
    StreamSum, Verdict,
};
use crate::proto::page::{JournalId, MigrationId};
use crate::proto::session::Decoder;
use crate::proto::wire::SessionMessage;
use crate::proto::wire::message::{Held, OfferedDisk};

/// No contact with the source, and no permit: the migration is aborted here, by so much later than there, so that it is the source that gives
/// up first and says so.
const LONGER_THAN_THE_SOURCE: Duration = Duration::from_secs(30);

/// The guest stands still, and the vmm takes or loads nothing: after this long it will not do so any more. Device state loads in 5-30 ms
/// (QEMU 7.2 and 10.0, 2026-11); a host that swaps takes seconds.
const LONGEST_LOAD: Duration = Duration::from_secs(30);

/// Between looks at the vmm while it loads the tail: the guest stands still.
const CLOSE_LOOK: Duration = Duration::from_millis(2);

/// Between looks at the vmm otherwise.
const LOOK: Duration = Duration::from_millis(500);

/// How long a decided migration waits for the source to hear of it before only the journal remembers it.
const LINGER: Duration = Duration::from_secs(30);

/// A channel for a driver.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) channel: Channel,
    /// Incarnation of the stream that begins, where the source still has one.
    pub(crate) epoch: Option<u32>,
    pub(crate) peer_journal: JournalId,
}

impl Attachment {
    /// Ends the channel with a sentence.
    pub(crate) async fn refuse(mut self, reason: String) {
        let _ = self.channel.sender.send(&SessionMessage::Refused { reason }).await;
    }
}

/// A migration at its destination.
pub(crate) struct DestinationDriver {
    core: Arc<Core>,
    entry: Arc<Entry>,
    machine: Destination,
    effects: VecDeque<Effect>,
    /// `None` where nothing was ever prepared.
    vmm: Option<DestinationVmm>,
    source_journal: JournalId,
    contact: Contact,
    contact_events: mpsc::Receiver<ContactEvent>,
    attachments: mpsc::Receiver<Attachment>,
    orders: mpsc::Receiver<ResolveOrder>,
    waiting_order: Option<ResolveOrder>,
    /// Disks that are copied, until they are opened.
    disks: Vec<OfferedDisk>,
    /// What writes them.
    take: Option<AbortOnDropHandle<Taken>>,
    /// What is written of them is as it was read, and more did not come.
    disks_are_cut: bool,
    /// Where they came from: closed once everything is decided.
    taken: Option<take::Stream>,
    inbound: Option<Arc<Inbound>>,
    progress: Option<watch::Receiver<Progress>>,
    decoder: Option<Decoder<Shelf>>,
    image: Option<MigrationId>,
    keeps: bool,
    window_bytes: u64,
    last_contact: Instant,
    looked: Instant,
    decided_at: Option<Instant>,
    active: Option<ActiveMigration>,
    counted: Counted,
    stream_ended: bool,
    tail_released_at: Option<Instant>,
    /// What the vmm had taken when it was looked at last, and since when that has not changed.
    untaken: Option<(u64, Instant)>,
    /// There was contact with the source, and it was lost.
    was_left: bool,
    /// The end of the vmm was seen and told.
    death_told: bool,
    /// Why the vmm did not start the guest.
    refusal: Option<String>,
}

/// What the metrics have been told of the stream.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    vmm_bytes: u64,
    frame_bytes: u64,
}

/// What a driver begins with.
pub(crate) struct DestinationStart {
    pub(crate) machine: Destination,
    pub(crate) effects: Vec<Effect>,
    pub(crate) vmm: Option<DestinationVmm>,
    pub(crate) source_journal: JournalId,
    /// Where a stream is expected.
    pub(crate) decoder: Option<Decoder<Shelf>>,
    /// What the decoder begins with, where both sites have it.
    pub(crate) image: Option<MigrationId>,
    /// What the stream leaves is for the next one.
    pub(crate) keeps: bool,
    pub(crate) window_bytes: u64,
    /// Disks that are copied.
    pub(crate) disks: Vec<OfferedDisk>,
}

impl DestinationDriver {
    pub(crate) fn new(
        core: Arc<Core>,
        entry: Arc<Entry>,
        orders: mpsc::Receiver<ResolveOrder>,
        attachments: mpsc::Receiver<Attachment>,
        start: DestinationStart,
    ) -> Self {
        let (events, contact_events) = mpsc::channel(64);
        // One that is decided was counted by the process that decided it.
        let active = start
            .machine
            .verdict()
            .is_none()
            .then(|| core.metrics.migration(api::Role::Destination));
        Self {
            core,
            entry,
            machine: start.machine,
            effects: start.effects.into(),
            vmm: start.vmm,
            source_journal: start.source_journal,
            contact: Contact::new(events),
            contact_events,
            attachments,
            orders,
            waiting_order: None,
            disks: start.disks,
            take: None,
            disks_are_cut: false,
            taken: None,
            inbound: None,
            progress: None,
            decoder: start.decoder,
            image: start.image,
            keeps: start.keeps,
            window_bytes: start.window_bytes,
            last_contact: super::clock::now(),
            looked: super::clock::now(),
            decided_at: None,
            active,
            counted: Counted::default(),
            stream_ended: false,
            tail_released_at: None,
            untaken: None,
            was_left: false,
            death_told: false,
            refusal: None,
        }
    }

    /// The channel on which the source made its offer.
    pub(crate) fn adopt(&mut self, channel: Channel) {
        self.contact.adopt(channel);
    }

    /// Drives until the migration is decided and the source knows, or long enough after that only the journal is needed.
    pub(crate) async fn run(mut self, first: Option<DestinationEvent>) {
        if let Some(event) = first {
            self.feed(&event);
        }
        if self.machine.verdict().is_some() {
            self.enquire();
        }
        loop {
            while let Some(effect) = self.effects.pop_front() {
                self.perform(effect).await;
            }
            self.note_verdict().await;
            if self.is_over() {
                break;
            }
            self.wait().await;
        }
        self.stop_stream();
        self.stop_disks();
        self.core.inbound.remove(self.entry.migration);
        self.contact.drop_channel();
        // While this driver's queue still exists: another one cannot have begun.
        self.core.drivers.remove(self.entry.migration);
        if !self.entry.has_ended() {
            let reason = "the source asked about it and it was never here".to_owned();
            let now = super::clock::now();
            let report = migrate::empty_report(&self.entry, now, Outcome::Refused, reason);
            self.entry.finish(report, now);
        }
    }

    fn is_over(&self) -> bool {
        match self.machine.state() {
            DestinationState::Settled(_) => return true,
            // Asked about a migration that was never here, and then not even that.
            DestinationState::New if self.was_left => return true,
            _ => {}
        }
        self.decided_at
            .is_some_and(|at| super::clock::now().saturating_duration_since(at) > LINGER)
    }

    /// The verdict frees the VM for its next migration, whether or not the source has heard of it.
    async fn note_verdict(&mut self) {
        let Some(verdict) = self.machine.verdict() else { return };
        if self.decided_at.is_some() {
            return;
        }
        self.decided_at = Some(super::clock::now());
        self.entry.clear_advice();
        let (outcome, mut reason) = outcome_of(verdict, &self.entry.vm, &self.core.config.site);
        if let (Verdict::Reverted, Some(refusal)) = (verdict, self.refusal.take()) {
            reason += &format!(": {refusal}");
        }
        tracing::info!(migration = %self.entry.migration, vm = self.entry.vm, %outcome, "{reason}");
        if verdict == Verdict::Running
            && let Some(vmm) = &mut self.vmm
        {
            vmm.settle(self.core.config.migration.announce_rounds).await;
            let leftover = self.inbound.as_ref().and_then(|inbound| inbound.take_leftover());
            // The shelf has the memory that was reserved with it.
            keeping::keep(&self.core, &self.entry, leftover, None);
        }
        self.stop_stream();
        self.stop_disks();
        self.put_disks_away(verdict).await;
        self.core.inbound.remove(self.entry.migration);
        let now = super::clock::now();
        if let Some(active) = self.active.take() {
            active.ended(now, outcome);
        }
        hooks::after(&self.core, &self.entry, outcome, &reason);
        self.entry
            .finish(migrate::empty_report(&self.entry, now, outcome, reason), now);
    }

    fn feed(&mut self, event: &DestinationEvent) {
        let resolved = matches!(event, DestinationEvent::Resolve(_));
        let answer = match self.machine.handle(event) {
            Ok(effects) => {
                self.effects.extend(effects);
                Ok(format!("the decision about {} is being carried out", self.entry.vm))
            }
            Err(step) => {
                tracing::warn!(migration = %self.entry.migration, "{step}");
                Err(format!(
                    "the migration of {} does not need a decision: {step}",
                    self.entry.vm
                ))
            }
        };
        if self.machine.verdict().is_some() {
            self.entry.set_decided();
        }
        if resolved && let Some(order) = self.waiting_order.take() {
            let _ = order.reply.send(answer);
        }
    }

    async fn perform(&mut self, effect: Effect) {
        tracing::debug!(migration = %self.entry.migration, ?effect, "destination");
        match effect {
            Effect::Record(kind) => self.record(kind).await,
            Effect::Send(message) => self.contact.send(&SessionMessage::Ownership(message)).await,
            // It is the source that calls: it knows where we are.
            Effect::AskPeer => {}
            Effect::NeedsPerson(doubt) => self.entry.advise(&format!("{}: {doubt}", self.entry.vm)),
            Effect::LoadVmm => {
                if let Err(reason) = self.load().await {
                    self.fail(reason).await;
                    self.feed(&DestinationEvent::LoadFailed);
                }
            }
            Effect::ReleaseHeldTail => {
                self.tail_released_at = Some(super::clock::now());
                if let Some(vmm) = &mut self.vmm {
                    vmm.complete();
                }
                if let Some(inbound) = &self.inbound {
                    inbound.release_tail();
                }
            }
            Effect::ContinueVmm => self.continue_vm().await,
            Effect::KillVmm => {
                let has_rest = !self.disks.is_empty() && self.rest_of_disks() == Rest::Stays;
                if has_rest && let Some(vmm) = &mut self.vmm {
                    // One whose stream ends exits at once, with what it has not written of its disks.
                    vmm.quit().await;
                }
                self.stop_stream();
                self.stop_disks();
                if let Some(vmm) = &mut self.vmm {
                    vmm.kill_confirmed().await;
                }
                self.feed(&DestinationEvent::VmmDead);
            }
            Effect::StartMigrate
            | Effect::CancelMigrate
            | Effect::FreezeVmm
            | Effect::ThawVmm
            | Effect::Resume
            | Effect::QuitVmm => unreachable!("effects of a source"),
        }
    }

    async fn record(&mut self, kind: RecordKind) {
        let record = JournalRecord {
            migration: self.entry.migration,
            role: Role::Destination,
            kind,
            peer: self.entry.peer.clone(),
            peer_journal: self.source_journal,
            vm: self.entry.vm.clone(),
            context: self
                .vmm
                .as_ref()
                .map(|vmm| VmContext::to_bytes(vmm.context()))
                .unwrap_or_default(),
            unix_ms: super::clock::unix_ms(),
        };
        let names_vmm = record.kind == RecordKind::Prepared;
        let event = match self.core.journal.append(record).await {
            Ok(()) => {
                if names_vmm {
                    launches::end(&self.core, self.entry.migration);
                }
                DestinationEvent::Recorded
            }
            Err(error) => {
                self.fail(error.to_string()).await;
                if names_vmm && let Some(vmm) = self.vmm.take() {
                    // Nothing was loaded into it, and it would not be found again.
                    vmm.abandon().await;
                }
                DestinationEvent::JournalFailed
            }
        };
        self.feed(&event);
    }

    async fn load(&mut self) -> Result<(), String> {
        let missing = || "this gateway has no hypervisor for the migration".to_owned();
        let vmm = self.vmm.as_mut().ok_or_else(missing)?;
        let is_off = vmm.is_off();
        if !self.disks.is_empty() {
            let core = &self.core;
            let place = vmm.disks(&core.config.site, core.config.vm(&self.entry.vm)).await?;
            self.take_disks(place).await?;
        }
        if is_off {
            self.entry.set_phase(Phase::Disks);
            let accepted = SessionMessage::Accepted { held: Held::default() };
            self.contact.send(&accepted).await;
            return Ok(());
        }
        let (Some(vmm), Some(decoder)) = (&mut self.vmm, self.decoder.take()) else {
            return Err(missing());
        };
        let path = self.core.stream_socket(self.entry.migration);
        let stream = vmm.receive(&path).await?;
        let inbound = Arc::new(Inbound::start(
            stream,
            self.window_bytes,
            decoder,
            self.keeps,
            Tail::Held,
        ));
        self.progress = Some(inbound.progress());
        self.core
            .inbound
            .insert(self.entry.migration, &self.entry.peer, Arc::clone(&inbound));
        self.inbound = Some(inbound);
        self.entry.set_phase(Phase::Precopy);
        let accepted = match self.image {
            Some(image) => SessionMessage::AcceptedKnowing { image },
            None => SessionMessage::Accepted { held: Held::default() },
        };
        self.contact.send(&accepted).await;
        Ok(())
    }

    async fn continue_vm(&mut self) {
        let outcome = match &mut self.vmm {
            Some(vmm) => vmm.cont().await,
            None => ContinueOutcome::Dead,
        };
        let event = match outcome {
            ContinueOutcome::Running => DestinationEvent::Continued,
            ContinueOutcome::Refused(reason) => {
                self.fail(format!(
                    "the destination's hypervisor refused to start the VM: {reason}"
                ))
                .await;
                self.refusal = Some(reason);
                DestinationEvent::ContinueFailed
            }
            // Asked again at the next look.
            ContinueOutcome::Paused => return,
            ContinueOutcome::Dead => DestinationEvent::VmmDead,
        };
        self.feed(&event);
    }

    /// Tells the metrics what has been added to the stream.
    fn count(&mut self) {
        let (Some(inbound), Some(active)) = (&self.inbound, &self.active) else {
            return;
        };
        let now = Counted {
            vmm_bytes: inbound.vmm_bytes(),
            frame_bytes: inbound.frame_bytes(),
        };
        active.add_vmm_bytes(Direction::Out, now.vmm_bytes.saturating_sub(self.counted.vmm_bytes));
        active.add_frame_bytes(Direction::In, now.frame_bytes.saturating_sub(self.counted.frame_bytes));
        active.look(&Look {
            waiting: inbound.waiting(),
            ..Look::default()
        });
        self.counted = now;
    }

    fn stop_stream(&mut self) {
        self.count();
        // The tail was given to the vmm by now, or must never be.
        if let Some(inbound) = self.inbound.take() {
            inbound.stop();
        }
        self.progress = None;
    }

    /// Waits for one thing to happen and takes it in.
    async fn wait(&mut self) {
        let loading = matches!(self.machine.state(), DestinationState::Loading { .. });
        let look = if loading { CLOSE_LOOK } else { LOOK };
        let inbound = self.inbound.clone();
        let acknowledge = async {
            match &inbound {
                Some(inbound) => inbound.acknowledge_due().await,
                None => std::future::pending().await,
            }
        };
        let mut progress = self.progress.clone();
        let changed = async {
            match &mut progress {
                Some(progress) => {
                    if progress.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        let take = &mut self.take;
        let taken = async {
            match take {
                Some(take) => take.await,
                None => std::future::pending().await,
            }
        };
        // Counted from the last look, not from the last event: frames come more often than looks.
        let next_look = self.looked + look;
        tokio::select! {
            biased;
            () = changed => {
                self.progress = progress;
                self.on_progress().await;
            }
            taken = taken => self.on_taken(taken).await,
            () = tokio::time::sleep_until(next_look.into()) => {
                self.look().await;
                self.count();
                self.looked = super::clock::now();
            }
            Some(event) = self.contact_events.recv() => self.on_contact(event),
            Some(attachment) = self.attachments.recv() => self.on_attachment(attachment).await,
            Some(order) = self.orders.recv() => {
                let event = DestinationEvent::Resolve(order.resolution.clone());
                self.waiting_order = Some(order);
                self.feed(&event);
            }
            () = acknowledge => self.acknowledge().await,
        }
    }

    async fn acknowledge(&mut self) {
        self.count();
        if let Some(inbound) = &self.inbound {
            let ack = SessionMessage::Ack {
                held: inbound.decoded(),
                vmm_bytes: inbound.vmm_bytes(),
                queued_bytes: inbound.queued_bytes(),
            };
            self.contact.send(&ack).await;
        }
    }

    async fn on_progress(&mut self) {
        let Some(progress) = self
            .progress
            .as_mut()
            .map(|progress| progress.borrow_and_update().clone())
        else {
            return;
        };
        if let Some((summary, _)) = progress.restored
            && !self.stream_ended
        {
            self.stream_ended = true;
            self.acknowledge().await;
            self.feed(&DestinationEvent::StreamEnded(StreamSum {
                digest: summary.digest,
                length: summary.bytes,
            }));
        }
        if let Some(reason) = progress.failed {
            self.progress = None;
            if let Some(image) = self.image.filter(|_| progress.shelf_failed) {
                keeping::suspect(&self.core, image);
            }
            if self.vmm.as_ref().is_some_and(DestinationVmm::is_dead) {
                self.fail("the destination's hypervisor died while it loaded the VM".to_owned())
                    .await;
                self.feed(&DestinationEvent::VmmDead);
            } else {
                self.fail(reason).await;
                self.feed(&DestinationEvent::LoadFailed);
            }
        }
    }

    fn on_contact(&mut self, event: ContactEvent) {
        match event {
            ContactEvent::Message { channel, message } if self.contact.is_current(channel) => {
                self.last_contact = super::clock::now();
                match message {
                    SessionMessage::Ownership(message) => self.feed(&DestinationEvent::Received(message)),
                    other => {
                        tracing::debug!(migration = %self.entry.migration, ?other, "not a source's message");
                    }
                }
            }
            ContactEvent::Lost { channel, reason, .. }
                if self.contact.is_current(channel) || !self.contact.is_made() =>
            {
                self.contact.drop_channel();
                self.last_contact = super::clock::now();
                self.was_left = true;
                if self.machine.verdict().is_none() {
                    tracing::warn!(migration = %self.entry.migration, peer = self.entry.peer, "contact lost: {reason}");
                }
                self.enquire();
            }
            ContactEvent::GivenUp { journal } if !self.contact.is_made() => self.on_given_up(journal),
            ContactEvent::Made { .. }
            | ContactEvent::Message { .. }
            | ContactEvent::Impossible { .. }
            | ContactEvent::Refused { .. }
            | ContactEvent::Lost { .. }
            | ContactEvent::GivenUp { .. } => {}
        }
    }

    /// It is the source that comes back. One that has forgotten the migration, or closed it, does not, and would be waited for.
    fn enquire(&mut self) {
        self.contact.enquire(
            Arc::clone(&self.core.links),
            self.entry.peer.clone(),
            self.entry.migration,
        );
    }

    /// The source has nothing open of this migration: it has given it up, or knows the verdict. What it would say, had it found
    /// us, is said for it.
    fn on_given_up(&mut self, journal: JournalId) {
        let event = match self.machine.state() {
            _ if journal != self.source_journal => DestinationEvent::Contact { journal },
            DestinationState::Decided(_) => DestinationEvent::Received(Message::Settled),
            DestinationState::Preparing { .. }
            | DestinationState::Receiving { .. }
            | DestinationState::Loading { .. } => DestinationEvent::Received(Message::Cancel),
            _ => return,
        };
        tracing::info!(migration = %self.entry.migration, peer = self.entry.peer, "the source does not drive it any more");
        self.feed(&event);
    }

    async fn on_attachment(&mut self, attachment: Attachment) {
        let Attachment {
            mut channel,
            epoch,
            peer_journal,
        } = attachment;
        let held = match (epoch, &self.inbound) {
            (Some(epoch), Some(inbound)) => match inbound.resume(epoch) {
                Ok(held) => held,
                Err(error) => {
                    tracing::warn!(migration = %self.entry.migration, "{error}");
                    let refused = SessionMessage::Refused {
                        reason: error.to_string(),
                    };
                    let _ = channel.sender.send(&refused).await;
                    return;
                }
            },
            _ => Held::default(),
        };
        if channel.sender.send(&SessionMessage::Accepted { held }).await.is_err() {
            return;
        }
        self.last_contact = super::clock::now();
        self.contact.adopt(channel);
        self.feed(&DestinationEvent::Contact { journal: peer_journal });
        // What was restored while there was no contact: where everything has arrived, nothing else would tell.
        self.acknowledge().await;
    }

    /// A look at the vmm and at the clock.
    async fn look(&mut self) {
        let now = super::clock::now();
        let receiving = matches!(self.machine.state(), DestinationState::Receiving { .. });
        let longest = self.core.config.migration.longest_cut + LONGER_THAN_THE_SOURCE;
        if receiving && !self.contact.is_made() && now.saturating_duration_since(self.last_contact) > longest {
            self.feed(&DestinationEvent::TimedOut);
            return;
        }
        if self.machine.verdict().is_some() {
            return;
        }
        let loading = matches!(self.machine.state(), DestinationState::Loading { .. });
        let hangs_since = match self.machine.state() {
            DestinationState::Loading { .. } => self.tail_released_at,
            DestinationState::Receiving { permit: Some(_), .. } => self.untaken_since(now),
            _ => None,
        };
        let hangs = hangs_since.is_some_and(|since| now.saturating_duration_since(since) > LONGEST_LOAD);
        let Some(vmm) = &mut self.vmm else { return };
        let event = match vmm.load_state().await {
            LoadState::Loading | LoadState::Unknown if hangs => {
                self.fail(format!(
                    "the destination's hypervisor has not loaded the VM within {} s",
                    LONGEST_LOAD.as_secs()
                ))
                .await;
                DestinationEvent::LoadFailed
            }
            LoadState::Loading | LoadState::Unknown => return,
            LoadState::Loaded if loading && self.tail_released_at.is_some() => DestinationEvent::Loaded,
            LoadState::Loaded => DestinationEvent::VmmPaused,
            LoadState::Running => DestinationEvent::VmmRunning,
            LoadState::Failed(reason) => {
                self.fail(format!("the destination's hypervisor could not load the VM: {reason}"))
                    .await;
                DestinationEvent::LoadFailed
            }
            LoadState::Dead(_) if self.death_told => return,
            LoadState::Dead(reason) => {
                self.death_told = true;
                self.fail(reason).await;
                DestinationEvent::VmmDead
            }
        };
        self.feed(&event);
    }

    /// Since when the vmm has taken nothing of what waits for it.
    fn untaken_since(&mut self, now: Instant) -> Option<Instant> {
        let inbound = self.inbound.as_ref().filter(|inbound| inbound.queued_bytes() > 0)?;
        let taken = inbound.vmm_bytes();
        let since = match self.untaken {
            Some((before, since)) if before == taken => since,
            _ => now,
        };
        self.untaken = Some((taken, since));
        Some(since)
    }

    /// Says in words what the machine only knows as a reason.
    async fn fail(&mut self, reason: String) {
        tracing::warn!(migration = %self.entry.migration, vm = self.entry.vm, "{reason}");
        self.contact.send(&SessionMessage::Failed { reason }).await;
    }
}

/// What a verdict means to whoever looks from this end, and the sentence that says it.
pub(super) fn outcome_of(verdict: Verdict, vm: &str, site: &str) -> (Outcome, String) {
    match verdict {
        Verdict::Running => (Outcome::Completed, format!("{vm} is at {site}")),
        Verdict::Aborted(reason @ AbortReason::Cancelled) => (Outcome::Cancelled, reason.to_string()),
        Verdict::Aborted(reason) => (Outcome::Failed, reason.to_string()),
        Verdict::Reverted => (
            Outcome::Failed,
            format!("{vm} could not be started at {site} and was given back"),
        ),
    }
}
