//! Drives one migration at its source: performs what the ownership machine asks for and feeds it what happens.
//!
//! The machine decides (`proto::ownership`), the policy advises (`proto::precopy`), this file routes. Everything that
//! happens comes in over one queue, so that nothing here can wait for two things in the wrong order.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::Core;
use super::contact::{Contact, ContactEvent};
use super::copying::Copying;
use super::forecasting::Sample;
use super::links::Link;
use super::outbound::{Outbound, StreamEnd};
use super::registry::{Entry, ResolveOrder};
use super::source_vmm::{FreezeOutcome, ResumeOutcome, SourceVmm, VmEvent};
use crate::api::Phase;
use crate::hypervisor::qemu::{MigrationStatus, PermitConditions, SourceError, SwitchoverBandwidth};
use crate::proto::ownership::{
    AbortReason, Doubt, Effect, JournalRecord, Message, Outcome, Permit, RecordKind, Role, Source, SourceEvent,
    SourceState, StreamSum, VmmFact,
};
use crate::proto::page::JournalId;
use crate::proto::precopy::policy::Settings;
use crate::proto::session::Encoder;
use crate::proto::wire::SessionMessage;
use crate::shaper::Shaper;

/// How long pre-copy waits for the peer to come back before it is given up; the VM runs on all the while.
const LONGEST_SILENCE: Duration = Duration::from_secs(120);

/// The same once the guest stands still: it is let go on soon, since it could not be handed over.
const LONGEST_PAUSED_SILENCE: Duration = Duration::from_secs(2);

/// The guest stands still, there is contact, and yet nothing goes on: it is let go on after this long. A hypervisor or a disk that
/// is busy for a moment is waited for.
const LONGEST_STANDSTILL: Duration = Duration::from_secs(15);

/// A guest that was handed over stands still without a word from the destination: after this long a person is told. A gateway that is
/// restarted is back by then.
const SILENCE_TO_TELL: Duration = Duration::from_secs(30);

/// Until a vmm that did not answer is asked again to continue its guest.
const RESUME_AGAIN: Duration = Duration::from_secs(1);

/// Between looks at the vmm while the guest runs.
const LOOK: Duration = Duration::from_millis(100);

/// Between looks at the vmm once its stream has ended: the guest stands still.
const CLOSE_LOOK: Duration = Duration::from_millis(2);

/// How long a vmm may take to connect to the socket it was told to migrate to.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

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
    lost_contact: Option<Instant>,
    looked: Instant,
    /// A person was told that the destination is not heard of.
    silence_told: bool,
    /// When a vmm that was asked to continue its guest did not answer.
    asked_to_resume: Option<Instant>,
    /// What the destination last had, and since when nothing has been added, while the guest stands still.
    standstill: Option<(u64, Instant)>,
    cancel_seen: bool,
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
    shaper: Option<Arc<Shaper>>,
}

/// How a driven migration ended.
#[derive(Debug)]
pub(crate) struct SourceEnd {
    pub(crate) outcome: Outcome,
    pub(crate) reason: Option<String>,
    pub(crate) cancelled: bool,
    pub(crate) downtime: Option<Duration>,
    pub(crate) wire_bytes: u64,
    pub(crate) stream: Option<StreamSum>,
    pub(crate) copying: Option<Copying>,
}

/// What a driver begins with.
pub(crate) struct SourceStart {
    pub(crate) vmm: SourceVmm,
    pub(crate) machine: Source,
    pub(crate) effects: Vec<Effect>,
    pub(crate) peer_journal: JournalId,
    pub(crate) copying: Option<Copying>,
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
            lost_contact: None,
            looked: super::clock::now(),
            silence_told: false,
            asked_to_resume: None,
            standstill: None,
            cancel_seen: false,
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
        if outcome != Outcome::RunsAtDestination {
            self.vmm.restore_settings().await;
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
            reason: self.reason,
            cancelled: self.cancel_seen,
            downtime,
            wire_bytes,
            stream: self.stream.as_ref().and_then(|stream| stream.sum),
            copying: self.copying,
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
    }

    async fn perform(&mut self, effect: Effect) {
        tracing::debug!(migration = %self.entry.migration, ?effect, "source");
        match effect {
            Effect::Record(kind) => self.record(kind).await,
            Effect::Send(message) => self.contact.send(&SessionMessage::Ownership(message)).await,
            Effect::AskPeer => self.look_for_peer(),
            Effect::NeedsPerson(doubt) => self.entry.advise(&format!("{}: {doubt}", self.entry.vm)),
            Effect::StartMigrate => {
                if let Err(error) = self.start_migrate().await {
                    self.fail(error);
                    self.feed(&SourceEvent::MigrateFailed);
                }
            }
            Effect::CancelMigrate => {
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
                        self.asked_to_resume = Some(super::clock::now());
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
            self.vmm.restore_settings().await;
        }
        let record = JournalRecord {
            migration: self.entry.migration,
            role: Role::Source,
            kind,
            peer: self.entry.peer.clone(),
            peer_journal: self.peer_journal,
            vm: self.entry.vm.clone(),
            context: self.vmm.context().to_bytes(),
            unix_ms: super::clock::unix_ms(),
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
        let migrate = async {
            let vm = self.vmm.connected().await?;
            vm.prepare(settings.downtime_limit).await?;
            if vm.set_switchover_bandwidth(settings.switchover_bandwidth.0).await? == SwitchoverBandwidth::NotSupported
            {
                copying.set_believes_itself();
            }
            vm.migrate(&socket.path).await
        };
        let migrate = async { migrate.await.map_err(|error: SourceError| error.to_string()) };
        // The vmm connects before it answers the command.
        let ((stream, _), ()) = tokio::try_join!(accept, migrate)?;
        copying.begin_stream(super::clock::now());
        let window_bytes = link.agreement().limits.window_bytes;
        let (outbound, end) = Outbound::start(
            stream,
            self.entry.migration,
            window_bytes,
            Encoder::new(copying.dictionary()),
        );
        let shaper = copying.shaper();
        let outbound = Arc::new(outbound);
        self.contact.acknowledges(Arc::clone(&outbound));
        self.stream = Some(Stream {
            outbound,
            end: Some(end),
            sum: None,
            sender: None,
            shaper,
        });
        self.start_sending(&link);
        self.show(Phase::Precopy, None);
        Ok(())
    }

    fn start_sending(&mut self, link: &Arc<Link>) {
        let Some(stream) = &mut self.stream else { return };
        if let Some(sender) = stream.sender.take() {
            sender.abort();
        }
        let outbound = Arc::clone(&stream.outbound);
        let epoch = outbound.epoch();
        let link = Arc::clone(link);
        let shapers: Vec<Arc<Shaper>> = stream.shaper.iter().cloned().chain(link.shaper()).collect();
        let task = tokio::spawn(async move {
            let protects_tail = link.protects_tail();
            if let Err(error) = outbound.send(link.bulk(), &shapers, protects_tail, epoch).await {
                // The control connection tells the driver; both run over the same path.
                link.close_broken(&error.to_string());
            }
        });
        stream.sender = Some(task.abort_handle());
    }

    /// Ends the vmm whose VM runs elsewhere, or leaves it paused where the configuration says so.
    async fn discard(&mut self) {
        self.show(Phase::Finishing, None);
        if let Err(reason) = self.vmm.discard().await {
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
        self.lost_contact.get_or_insert_with(super::clock::now);
        let epoch = self.stream.as_ref().map(|stream| stream.outbound.epoch() + 1);
        self.contact.search(
            Arc::clone(&self.core.links),
            self.entry.peer.clone(),
            self.entry.migration,
            epoch,
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
                self.looked = super::clock::now();
            }
            Some(event) = self.contact_events.recv() => self.on_contact(event).await,
            event = self.vmm.next_event() => self.on_vm_event(event),
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

    fn on_stream_end(&mut self, ended: StreamEnd) {
        match ended {
            StreamEnd::Eof(summary) => {
                let sum = StreamSum {
                    digest: summary.digest,
                    length: summary.bytes,
                };
                if let Some(stream) = &mut self.stream {
                    stream.sum = Some(sum);
                }
                self.show(Phase::StopAndCopy, None);
                self.feed(&SourceEvent::StreamEnded(sum));
            }
            StreamEnd::Failed(error) => {
                self.fail(format!("the hypervisor's migration stream failed: {error}"));
                self.feed(&SourceEvent::MigrateFailed);
            }
            StreamEnd::Stopped => {}
        }
    }

    async fn on_contact(&mut self, event: ContactEvent) {
        match event {
            ContactEvent::Made { link, channel, held } => {
                self.lost_contact = None;
                if std::mem::take(&mut self.silence_told) {
                    self.entry.clear_advice();
                }
                // Before the channel is heard: what it acknowledges is of the new incarnation.
                let resumed = self.stream.as_ref().map(|stream| {
                    let epoch = stream.outbound.epoch() + 1;
                    stream.outbound.resume(epoch, &held)
                });
                self.contact.adopt(channel);
                self.feed(&SourceEvent::Contact {
                    journal: link.peer_journal(),
                });
                match resumed {
                    Some(Ok(())) => self.start_sending(&link),
                    Some(Err(error)) => {
                        self.fail(format!("the stream cannot go on after the cut: {error}"));
                        self.feed(&SourceEvent::Cancel);
                    }
                    None => {}
                }
                self.earlier_wire_bytes = self.wire_bytes();
                if let Some(copying) = &mut self.copying {
                    copying.set_wire_at_start(link.wire_bytes());
                }
                self.link = Some(link);
            }
            ContactEvent::Message { channel, message } if self.contact.is_current(channel) => {
                self.on_message(message).await;
            }
            ContactEvent::Lost { channel, reason } if self.contact.is_current(channel) || !self.contact.is_made() => {
                self.contact.drop_channel();
                if self.machine.outcome().is_none() && self.lost_contact.is_none() {
                    tracing::warn!(migration = %self.entry.migration, peer = self.entry.peer, "contact lost: {reason}");
                    self.look_for_peer();
                }
            }
            ContactEvent::Impossible { reason } => {
                self.fail(reason);
                self.feed(&SourceEvent::Cancel);
            }
            ContactEvent::Message { .. } | ContactEvent::Lost { .. } | ContactEvent::GivenUp { .. } => {}
        }
    }

    async fn on_message(&mut self, message: SessionMessage) {
        match message {
            SessionMessage::Failed { reason } => self.fail(reason),
            SessionMessage::Ownership(message) => {
                match &message {
                    Message::Running => self.resumed_at = self.resumed_at.or(Some(super::clock::now())),
                    Message::Aborted { reason } => self.fail(abort_text(*reason)),
                    Message::Reverted => {
                        self.fail("the destination's hypervisor refused to start the VM and gave it back".to_owned());
                    }
                    _ => {}
                }
                self.feed(&SourceEvent::Received(message));
            }
            // Heard by the stream itself.
            SessionMessage::Ack { .. } | SessionMessage::Loaded => {}
            SessionMessage::Accepted { .. } | SessionMessage::Refused { .. } | SessionMessage::Cancel { .. } => {
                tracing::debug!(migration = %self.entry.migration, "the peer said what only opens or ends a session");
            }
        }
    }

    fn on_vm_event(&mut self, event: VmEvent) {
        match event {
            VmEvent::Stopped => {
                if self.stopped_at.is_none() && self.stream.is_some() {
                    self.stopped_at = Some(super::clock::now());
                    self.show(Phase::Switchover, None);
                }
            }
            VmEvent::Resumed => {
                self.stopped_at = None;
                self.feed(&SourceEvent::VmmRunning);
            }
            VmEvent::Deaf => {
                if self.vmm.is_dead() {
                    self.fail("the hypervisor's process at the source died".to_owned());
                    self.feed(&SourceEvent::VmmDead);
                }
            }
            VmEvent::Other => {}
        }
    }

    /// A look at the vmm and at the clock.
    async fn look(&mut self) {
        let now = super::clock::now();
        let is_copying = match self.machine.state() {
            SourceState::Copying(_) => true,
            SourceState::Starting { .. } => false,
            SourceState::Permitted { .. } => return self.look_after_permit(now).await,
            SourceState::Resuming { .. } => return self.resume_again(now),
            _ => return,
        };
        if self.waits_in_vain(now) || !is_copying {
            return;
        }
        let Some(stream) = &self.stream else { return };
        if stream.sum.is_some() {
            return self.look_for_completion().await;
        }
        let answer = match self.vmm.connected().await {
            Ok(vm) => vm.progress().await,
            Err(error) => Err(error),
        };
        let progress = match answer {
            Ok(progress) => progress,
            Err(error) => return self.on_silence(&error.to_string()),
        };
        if matches!(progress.status, MigrationStatus::Failed | MigrationStatus::Cancelled) {
            let why = progress.error.as_deref().unwrap_or("it gave no reason");
            self.fail(format!(
                "the source's hypervisor ended the migration ({}): {why}",
                progress.status
            ));
            self.feed(&SourceEvent::MigrateFailed);
            return;
        }
        let Some(link) = self.link.clone() else { return };
        let outbound = Arc::clone(&stream.outbound);
        self.look_at_sample(now).await;
        let Some(copying) = &mut self.copying else { return };
        match copying.look(now, &progress, &outbound, &link, &self.entry) {
            Ok(Some(settings)) => {
                if let Err(error) = self.apply(settings).await {
                    tracing::debug!(migration = %self.entry.migration, "settings were not applied: {error}");
                }
            }
            Ok(None) => {}
            Err(reason) => {
                self.fail(reason);
                self.feed(&SourceEvent::Cancel);
            }
        }
    }

    /// The sample for the forecast ends while the first round is on its way.
    async fn look_at_sample(&mut self, now: Instant) {
        let Some(copying) = &mut self.copying else { return };
        let Some(due) = copying.due_sample(now) else { return };
        let answer = match self.vmm.connected().await {
            Ok(vm) => vm.dirty_rate(due).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(Some(rate)) => copying.take_sample(Sample::of(rate), &self.entry),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(migration = %self.entry.migration, "no dirty-rate sample: {error}");
                copying.take_sample(Sample::Unknown, &self.entry);
            }
        }
    }

    /// Gives up a pre-copy whose peer has been away for too long, or takes nothing any more while the guest stands still.
    fn waits_in_vain(&mut self, now: Instant) -> bool {
        let reason = if let Some(since) = self.lost_contact {
            let longest = if self.stopped_at.is_some() {
                LONGEST_PAUSED_SILENCE
            } else {
                LONGEST_SILENCE
            };
            (now.saturating_duration_since(since) > longest).then(|| {
                format!(
                    "the peer {} could not be reached for {} s",
                    self.entry.peer,
                    longest.as_secs()
                )
            })
        } else if let (Some(_), Some(stream)) = (self.stopped_at, &self.stream) {
            let taken = stream.outbound.acknowledged_bytes();
            let since = match self.standstill {
                Some((before, since)) if before == taken => since,
                _ => self.standstill.insert((taken, now)).1,
            };
            (now.saturating_duration_since(since) > LONGEST_STANDSTILL).then(|| {
                format!(
                    "nothing went on for {} s while {} stood still",
                    LONGEST_STANDSTILL.as_secs(),
                    self.entry.vm
                )
            })
        } else {
            self.standstill = None;
            None
        };
        let Some(reason) = reason else { return false };
        self.fail(reason);
        self.feed(&SourceEvent::Cancel);
        true
    }

    /// The VM is ours again, and its vmm was too busy to say whether it goes on: it is asked until it says.
    fn resume_again(&mut self, now: Instant) {
        if let Some(at) = self.asked_to_resume
            && now.saturating_duration_since(at) > RESUME_AGAIN
        {
            self.asked_to_resume = None;
            self.effects.extend([Effect::ThawVmm, Effect::Resume]);
        }
    }

    /// The guest is handed over: its process must stand, and somebody should know if the destination says nothing.
    async fn look_after_permit(&mut self, now: Instant) {
        if self.vmm.was_let_go() {
            let event = match self.vmm.ask_after_let_go().await {
                VmmFact::Dead => SourceEvent::VmmDead,
                VmmFact::Running => SourceEvent::VmmRunning,
                VmmFact::Paused | VmmFact::Unreachable => {
                    // Its guest has not run; it is stopped again before it can.
                    if let Err(reason) = self.vmm.stop_again().await {
                        tracing::warn!(migration = %self.entry.migration, "{reason}");
                    }
                    return;
                }
            };
            return self.feed(&event);
        }
        let silent = |since: Instant| now.saturating_duration_since(since) > SILENCE_TO_TELL;
        if self.lost_contact.is_some_and(silent) && !self.entry.needs_person() {
            let Entry { vm, peer, .. } = &*self.entry;
            self.entry.advise(&format!(
                "{vm} is paused: it was handed over to {peer}, which has not been heard of for {} s and may run it. This goes on by \
                 itself as soon as {peer} is back. If that site is gone for good, make sure that nothing runs there and say: \
                 longhaul resolve {vm} --peer-is-fenced",
                SILENCE_TO_TELL.as_secs()
            ));
            self.silence_told = true;
        }
    }

    /// Tells the vmm how long it may plan to stop and how fast the rest will be taken.
    async fn apply(&mut self, settings: Settings) -> Result<(), SourceError> {
        let vm = self.vmm.connected().await?;
        // A QEMU that cannot be told (before 8.2) goes by what our socket took lately; its limit accounts for that.
        vm.set_switchover_bandwidth(settings.switchover_bandwidth.0).await?;
        vm.set_downtime_limit(settings.downtime_limit).await
    }

    /// The stream has ended; whether that was success only the vmm can say.
    async fn look_for_completion(&mut self) {
        let answer = match self.vmm.connected().await {
            Ok(vm) => vm.permit_conditions().await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(PermitConditions::Met) => {
                if self.stopped_at.is_none() {
                    self.stopped_at = Some(super::clock::now());
                }
                self.feed(&SourceEvent::MigrateCompleted);
                self.feed(&SourceEvent::PostMigrate);
            }
            Ok(PermitConditions::NotYet { .. }) => {}
            Ok(conditions @ (PermitConditions::Failed { .. } | PermitConditions::Disturbed { .. })) => {
                self.fail(format!("the source's hypervisor did not finish: {conditions}"));
                self.feed(&SourceEvent::MigrateFailed);
            }
            Err(error) => self.on_silence(&error.to_string()),
        }
    }

    /// The vmm did not answer: dead, or busy.
    fn on_silence(&mut self, error: &str) {
        if self.vmm.is_dead() {
            self.fail("the hypervisor's process at the source died".to_owned());
            self.feed(&SourceEvent::VmmDead);
        } else {
            tracing::debug!(migration = %self.entry.migration, "the hypervisor did not answer: {error}");
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
            Some(copying) => copying.show(super::clock::now(), phase, totals, &self.entry),
            None => self.entry.set_phase(phase),
        }
    }
}

fn abort_text(reason: AbortReason) -> String {
    reason.to_string()
}

/// A listening socket that is removed again.
struct StreamSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl StreamSocket {
    /// The directory is the gateway's own (0700), so nobody else can connect first.
    fn bind(path: PathBuf) -> std::io::Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        Ok(Self { path, listener })
    }
}

impl Drop for StreamSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
