//! Drives one migration at its source: performs what the ownership machine asks for and feeds it what happens.
//!
//! The machine decides (`proto::ownership`), the policy advises (`proto::precopy`), this file routes. Everything that
//! happens comes in over one queue, so that nothing here can wait for two things in the wrong order.

mod before_switchover;
mod disks;
mod hearing;
mod looking;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use self::before_switchover::Hold;
pub(crate) use self::before_switchover::LEAST_PAGE_BYTES;
use self::disks::CopiedDisks;
use super::Core;
use super::clock;
use super::contact::{Contact, ContactEvent, Search};
use super::copying::Copying;
use super::disks::cold_image::ColdImage;
use super::keeping;
use super::links::Link;
use super::outbound::{Outbound, StreamEnd};
use super::registry::{Entry, ResolveOrder};
use super::source_vmm::{FreezeOutcome, ResumeOutcome, SourceVmm};
use super::stream_socket::{CONNECT_DEADLINE, StreamSocket};
use super::vmm_input::VmmInput;
use crate::api::{DiskFigures, Phase};
use crate::hypervisor::qemu::{GuestDisk, SourceError, SwitchoverBandwidth};
use crate::proto::ownership::{
    Doubt, Effect, JournalRecord, Outcome, Permit, RecordKind, Role, Source, SourceEvent, SourceState, StreamSum,
};
use crate::proto::page::{ByteRate, JournalId};
use crate::proto::precopy::budget::LOOK;
use crate::proto::reduce::Effort;
use crate::proto::session::Encoder;
use crate::proto::wire::{SessionMessage, hello};

/// Between looks at the vmm once its stream has ended: the guest stands still.
const CLOSE_LOOK: Duration = Duration::from_millis(2);

/// A migration at its source, from the agreement of both sites to its end.
pub(crate) struct SourceDriver {
    core: Arc<Core>,
    entry: Arc<Entry>,
    machine: Source,
    effects: VecDeque<Effect>,
    vmm: SourceVmm,
    peer_journal: JournalId,
    contact: Contact,
    contact_events: mpsc::Receiver<ContactEvent>,
    orders: mpsc::Receiver<ResolveOrder>,
    waiting_order: Option<ResolveOrder>,
    link: Option<Arc<Link>>,
    stream: Option<Stream>,
    /// `None` where a restarted gateway finishes what its predecessor began.
    copying: Option<Copying>,
    /// What waits for the hook before the switchover.
    hold: Hold,
    disks: CopiedDisks,
    lost_contact: Option<Instant>,
    looked: Instant,
    /// A person was told that the destination is not heard of.
    silence_told: bool,
    /// When a vmm that was asked to continue its guest did not answer.
    asked_to_resume: Option<Instant>,
    /// What the destination last had, and since when nothing has been added, while the guest stands still.
    standstill: Option<(u64, Instant)>,
    cancel_seen: bool,
    /// Its predecessor was restarted in the middle of it, or so was the destination's gateway; nobody wanted it to end.
    undone_by_restart: bool,
    /// Why the migration failed, in the words of whoever noticed first.
    reason: Option<String>,
    stopped_at: Option<Instant>,
    resumed_at: Option<Instant>,
    earlier_wire_bytes: u64,
}

struct Stream {
    outbound: Arc<Outbound>,
    end: Option<oneshot::Receiver<StreamEnd>>,
    sum: Option<StreamSum>,
    sender: Option<AbortHandle>,
    /// Stream bytes that the link had sent when this migration began to use it.
    left_before: u64,
}

/// How a driven migration ended.
#[derive(Debug)]
pub(crate) struct SourceEnd {
    pub(crate) outcome: Outcome,
    /// The VM is off, wherever it is.
    pub(crate) was_off: bool,
    pub(crate) reason: Option<String>,
    pub(crate) cancelled: bool,
    /// The VM is here because a gateway was restarted, and for no other reason.
    pub(crate) undone_by_restart: bool,
    pub(crate) downtime: Option<Duration>,
    pub(crate) wire_bytes: u64,
    pub(crate) resent_bytes: u64,
    pub(crate) stream: Option<StreamSum>,
    pub(crate) copying: Option<Copying>,
    /// What was read of disks, where any were copied.
    pub(crate) disks: Option<DiskFigures>,
}

/// What a driver begins with.
pub(crate) struct SourceStart {
    pub(crate) vmm: SourceVmm,
    pub(crate) machine: Source,
    pub(crate) effects: Vec<Effect>,
    pub(crate) peer_journal: JournalId,
    pub(crate) copying: Option<Copying>,
    /// Those that are copied.
    pub(crate) disks: Vec<GuestDisk>,
    /// Of a VM that is off: where each of them is.
    pub(crate) images: Option<Vec<ColdImage>>,
    /// Disks are read no faster.
    pub(crate) disk_rate: Option<ByteRate>,
    /// By what is known at the start: see [`SourceEnd`].
    pub(crate) undone_by_restart: bool,
}

impl SourceDriver {
    pub(crate) fn new(
        core: Arc<Core>,
        entry: Arc<Entry>,
        orders: mpsc::Receiver<ResolveOrder>,
        start: SourceStart,
    ) -> Self {
        let (events, contact_events) = mpsc::channel(64);
        Self {
            core,
            entry,
            machine: start.machine,
            effects: start.effects.into(),
            vmm: start.vmm,
            peer_journal: start.peer_journal,
            contact: Contact::new(events),
            contact_events,
            orders,
            waiting_order: None,
            link: None,
            stream: None,
            copying: start.copying,
            hold: Hold::Open,
            disks: CopiedDisks::new(start.disks, start.images, start.disk_rate),
            lost_contact: None,
            looked: clock::now(),
            silence_told: false,
            asked_to_resume: None,
            standstill: None,
            cancel_seen: false,
            undone_by_restart: start.undone_by_restart,
            reason: None,
            stopped_at: None,
            resumed_at: None,
            earlier_wire_bytes: 0,
        }
    }

    /// The channel on which the destination accepted.
    pub(crate) fn adopt(&mut self, link: Arc<Link>, channel: super::channel::Channel) {
        self.contact.adopt(channel);
        self.link = Some(link);
    }

    /// Drives to the end. Until PERMIT the guest runs here or is made to run here again; from then on what the destination, or
    /// a person, decides.
    pub(crate) async fn run(mut self, first: Option<SourceEvent>) -> SourceEnd {
        if let Some(event) = first {
            self.feed(&event);
        }
        loop {
            while let Some(effect) = self.effects.pop_front() {
                self.perform(effect).await;
            }
            if let Some(outcome) = self.machine.outcome() {
                return self.end(outcome).await;
            }
            self.wait().await;
        }
    }

    async fn end(mut self, outcome: Outcome) -> SourceEnd {
        if let Some(stream) = &mut self.stream {
            stream.outbound.stop();
            if let Some(copying) = &mut self.copying {
                copying.close(stream.outbound.totals(), stream.outbound.pages());
            }
        }
        self.disks.stop();
        if outcome != Outcome::RunsAtDestination {
            self.put_back().await;
        } else if let (Some(stream), Some(copying)) = (&self.stream, &mut self.copying) {
            let leftover = stream.outbound.take_leftover();
            keeping::keep(&self.core, &self.entry, leftover, copying.take_memory());
        }
        let downtime = match (self.stopped_at, self.resumed_at) {
            (Some(stopped), Some(resumed)) if outcome == Outcome::RunsAtDestination => {
                let heard_after = self.link.as_ref().map_or(Duration::ZERO, |link| link.rtt() / 2);
                Some(resumed.saturating_duration_since(stopped).saturating_sub(heard_after))
            }
            _ => None,
        };
        // What was said last still arrives.
        self.contact.drop_channel();
        let wire_bytes = self.wire_bytes();
        SourceEnd {
            outcome,
            was_off: self.vmm.is_off(),
            reason: self.reason,
            cancelled: self.cancel_seen,
            undone_by_restart: self.undone_by_restart && outcome == Outcome::RunsAtSource && !self.cancel_seen,
            downtime,
            wire_bytes,
            resent_bytes: self.stream.as_ref().map_or(0, |stream| stream.outbound.resent_bytes()),
            stream: self.stream.as_ref().and_then(|stream| stream.sum),
            copying: self.copying,
            disks: self.disks.figures(),
        }
    }

    /// IP bytes of every link that the migration has used.
    fn wire_bytes(&self) -> u64 {
        let current = match (&self.link, &self.copying) {
            (Some(link), Some(copying)) => link.wire_bytes().saturating_sub(copying.wire_at_start()),
            _ => 0,
        };
        self.earlier_wire_bytes + current
    }

    fn feed(&mut self, event: &SourceEvent) {
        match self.machine.handle(event) {
            Ok(effects) => {
                if let SourceEvent::Resolve(_) = event
                    && let Some(order) = self.waiting_order.take()
                {
                    self.undone_by_restart = false;
                    let text = format!("the decision about {} is being carried out", self.entry.vm);
                    let _ = order.reply.send(Ok(text));
                }
                self.effects.extend(effects);
            }
            Err(step) => {
                if let SourceEvent::Resolve(_) = event
                    && let Some(order) = self.waiting_order.take()
                {
                    let text = format!("the migration of {} does not need a decision: {step}", self.entry.vm);
                    let _ = order.reply.send(Err(text));
                }
                tracing::warn!(migration = %self.entry.migration, "{step}");
            }
        }
        if matches!(
            self.machine.state(),
            SourceState::Permitting { .. }
                | SourceState::Permitted { .. }
                | SourceState::Withheld
                | SourceState::Learning { .. }
        ) {
            self.entry.set_committed();
        }
        if matches!(
            self.machine.state(),
            SourceState::Learning { .. } | SourceState::Discarding { .. } | SourceState::Closing { .. }
        ) {
            self.entry.set_decided();
        }
    }

    async fn perform(&mut self, effect: Effect) {
        tracing::debug!(migration = %self.entry.migration, ?effect, "source");
        match effect {
            Effect::Record(kind) => self.record(kind).await,
            Effect::Send(message) => {
                self.contact.send(&SessionMessage::Ownership(message)).await;
            }
            Effect::AskPeer => self.look_for_peer(),
            Effect::NeedsPerson(doubt) => self.entry.advise(&format!("{}: {doubt}", self.entry.vm)),
            Effect::StartMigrate => self.start().await,
            Effect::CancelMigrate => {
                // A hook that runs is killed.
                self.hold = Hold::Open;
                self.disks.stop();
                if let Some(stream) = &self.stream {
                    stream.outbound.stop();
                }
                self.vmm.cancel().await;
            }
            Effect::FreezeVmm => {
                let outcome = match self.machine.state() {
                    SourceState::Freezing(_) => self.vmm.freeze().await,
                    // Handed over, and the gateway was restarted since.
                    SourceState::Permitted {
                        doubt: None | Some(Doubt::NotFrozen),
                        ..
                    } => match self.vmm.freeze().await {
                        FreezeOutcome::Failed(reason) => self.stop_again(reason).await,
                        done => done,
                    },
                    // Handed over, and seen running: it must stand, whatever its monitor says.
                    _ => {
                        self.stop_again("the guest was continued by somebody else".to_owned())
                            .await
                    }
                };
                let event = match outcome {
                    FreezeOutcome::Frozen => SourceEvent::Frozen,
                    FreezeOutcome::Dead => SourceEvent::VmmDead,
                    FreezeOutcome::Failed(reason) => {
                        self.fail(reason);
                        SourceEvent::FreezeFailed
                    }
                };
                self.feed(&event);
            }
            Effect::ThawVmm => self.vmm.thaw().await,
            Effect::Resume => {
                let event = match self.vmm.resume().await {
                    ResumeOutcome::Running => SourceEvent::Resumed,
                    ResumeOutcome::Dead => SourceEvent::VmmDead,
                    ResumeOutcome::Refused(reason) => {
                        self.fail(reason);
                        SourceEvent::ResumeFailed
                    }
                    ResumeOutcome::Silent(reason) => {
                        self.entry
                            .notice(&format!("{} does not go on here yet: {reason}", self.entry.vm));
                        self.fail(reason);
                        self.asked_to_resume = Some(clock::now());
                        return;
                    }
                };
                self.asked_to_resume = None;
                self.feed(&event);
            }
            Effect::QuitVmm => self.discard().await,
            Effect::LoadVmm | Effect::ReleaseHeldTail | Effect::ContinueVmm | Effect::KillVmm => {
                unreachable!("effects of a destination")
            }
        }
    }

    /// Stops the process of a guest that may have run since it was handed over. That it stands now does not undo what it did.
    async fn stop_again(&mut self, why: String) -> FreezeOutcome {
        match self.vmm.stop_again().await {
            Ok(()) => FreezeOutcome::Failed(why),
            Err(error) => {
                let vm = &self.entry.vm;
                self.entry.advise(&format!(
                    "{vm} was handed over, and its process here cannot be stopped ({error}): stop it by hand, or {vm} may run twice"
                ));
                FreezeOutcome::Failed(format!("{why}; {error}"))
            }
        }
    }

    async fn record(&mut self, kind: RecordKind) {
        if let RecordKind::Permit(permit) = &kind {
            self.show(Phase::Committing, Some(permit));
        }
        if let RecordKind::Closed(Outcome::RunsAtSource) = &kind {
            // After this record nobody comes back to it.
            self.put_back().await;
            if !self.undone_by_restart || self.cancel_seen {
                // What has failed by itself is not begun again, whenever this process ends.
                self.core.wanted.forget(self.entry.migration).await;
            }
        }
        let record = JournalRecord {
            migration: self.entry.migration,
            role: Role::Source,
            kind,
            peer: self.entry.peer.clone(),
            peer_journal: self.peer_journal,
            vm: self.entry.vm.clone(),
            context: self.vmm.context().to_bytes(),
            unix_ms: clock::unix_ms(),
        };
        let event = match self.core.journal.append(record).await {
            Ok(()) => SourceEvent::Recorded,
            Err(error) => {
                self.fail(error.to_string());
                SourceEvent::JournalFailed
            }
        };
        self.feed(&event);
    }

    async fn start_migrate(&mut self) -> Result<(), String> {
        let Some(copying) = &mut self.copying else {
            return Err("this gateway has no stream for the migration".to_owned());
        };
        let Some(link) = self.link.clone() else {
            return Err("the connection to the peer is lost".to_owned());
        };
        let path = self.core.stream_socket(self.entry.migration);
        let socket = StreamSocket::bind(path).map_err(|error| format!("no socket for the vmm's stream: {error}"))?;
        let accept = async {
            tokio::time::timeout(CONNECT_DEADLINE, socket.listener.accept())
                .await
                .map_err(|_| "the hypervisor did not connect to the gateway's migration socket".to_owned())?
                .map_err(|error| format!("the hypervisor could not connect: {error}"))
        };
        let settings = copying.first_settings(&link);
        let has_disks = !self.disks.is_empty();
        let migrate = async {
            let vm = self.vmm.connected().await?;
            vm.prepare(settings.downtime_limit).await?;
            if has_disks {
                vm.wait_before_switchover().await?;
            }
            let channels = vm.multifd_channels().await?;
            if vm.set_switchover_bandwidth(settings.switchover_bandwidth.0).await? == SwitchoverBandwidth::NotSupported
            {
                copying.set_believes_itself();
            }
            vm.migrate(&socket.path).await?;
            Ok(channels)
        };
        let migrate = async { migrate.await.map_err(|error: SourceError| error.to_string()) };
        // The vmm connects before it answers the command.
        let ((stream, _), channels) = tokio::try_join!(accept, migrate)?;
        let vmm = match channels {
            Some(channels) => VmmInput::several(stream, socket, channels).map_err(|error| error.to_string())?,
            None => stream.into(),
        };
        copying.begin_stream(clock::now());
        let agreement = copying.agreement();
        let window_bytes = agreement.limits.window_bytes;
        // The link may be another one than the migration was agreed on.
        let version = agreement.version.min(link.agreement().version);
        let encoder = Encoder::new(copying.reducer(version));
        let coders = match version >= hello::CODERS {
            true => copying.coders(),
            false => 1,
        };
        let effort = Effort::for_link(link.capacity(), coders);
        let (outbound, end) = Outbound::start(vmm, self.entry.migration, window_bytes, encoder, effort, coders);
        let outbound = Arc::new(outbound);
        self.contact.acknowledges(Arc::clone(&outbound));
        self.stream = Some(Stream {
            outbound,
            end: Some(end),
            sum: None,
            sender: None,
            left_before: 0,
        });
        self.hold_at_start();
        self.start_sending(&link);
        self.show(Phase::Precopy, None);
        Ok(())
    }

    fn start_sending(&mut self, link: &Arc<Link>) {
        let Some(stream) = &mut self.stream else { return };
        if let Some(sender) = stream.sender.take() {
            sender.abort();
        }
        stream.left_before = link.bulk_left();
        stream.sender = Some(stream.outbound.send_over(link, &self.entry.share));
    }

    /// Ends the vmm whose VM runs elsewhere, or leaves it paused where the configuration says so.
    async fn discard(&mut self) {
        self.show(Phase::Finishing, None);
        if let Err(reason) = self.vmm.discard(self.entry.migration).await {
            self.entry.notice(&format!(
                "{} runs at {}, but its old process here could not be ended: {reason}",
                self.entry.vm, self.entry.peer
            ));
        }
        self.feed(&SourceEvent::Discarded);
    }

    pub(crate) fn look_for_peer(&mut self) {
        if self.contact.is_made() {
            return;
        }
        self.lost_contact.get_or_insert_with(clock::now);
        let epoch = self.stream.as_ref().map(|stream| stream.outbound.epoch() + 1);
        self.contact.search(
            Arc::clone(&self.core.links),
            self.entry.peer.clone(),
            self.entry.migration,
            Search::Migration(epoch),
        );
    }

    /// Waits for one thing to happen and takes it in.
    async fn wait(&mut self) {
        let look = if self.stream.as_ref().is_some_and(|stream| stream.sum.is_some())
            && matches!(self.machine.state(), SourceState::Copying(_))
        {
            CLOSE_LOOK
        } else {
            LOOK
        };
        let mut end = self.stream.as_mut().and_then(|stream| stream.end.take());
        let stream_end = async {
            match &mut end {
                Some(end) => end.await.unwrap_or(StreamEnd::Stopped),
                None => std::future::pending().await,
            }
        };
        let cancelled = async {
            if self.cancel_seen {
                std::future::pending().await
            } else {
                self.entry.cancel.cancelled().await;
            }
        };
        // Counted from the last look, not from the last event: acknowledgements come more often than looks.
        let next_look = self.looked + look;
        tokio::select! {
            biased;
            ended = stream_end => {
                end = None;
                self.on_stream_end(ended);
            }
            () = tokio::time::sleep_until(next_look.into()) => {
                self.look().await;
                self.looked = clock::now();
            }
            Some(event) = self.contact_events.recv() => self.on_contact(event).await,
            ended = self.hold.ended() => self.on_before_switchover(ended).await,
            () = self.disks.changed() => self.on_disks().await,
            event = self.vmm.next_event() => self.on_vm_event(event).await,
            () = cancelled => {
                self.cancel_seen = true;
                self.fail("the operator cancelled it".to_owned());
                self.feed(&SourceEvent::Cancel);
            }
            Some(order) = self.orders.recv() => {
                let event = SourceEvent::Resolve(order.resolution.clone());
                self.waiting_order = Some(order);
                self.feed(&event);
            }
        }
        if let (Some(end), Some(stream)) = (end, &mut self.stream) {
            stream.end = Some(end);
        }
    }

    /// Keeps the first reason: what follows from it says less.
    fn fail(&mut self, reason: String) {
        if self.reason.is_none() {
            self.reason = Some(reason);
        }
    }

    fn show(&mut self, phase: Phase, permit: Option<&Permit>) {
        if let Some(permit) = permit {
            tracing::info!(migration = %self.entry.migration, vm = self.entry.vm, digest = %permit.stream.digest,
                bytes = permit.stream.length, "permit");
        }
        tracing::info!(migration = %self.entry.migration, vm = self.entry.vm, %phase);
        let totals = self.stream.as_ref().map(|stream| stream.outbound.totals());
        match &mut self.copying {
            Some(copying) => copying.show(clock::now(), phase, totals, &self.entry),
            None => self.entry.set_phase(phase),
        }
    }
}
