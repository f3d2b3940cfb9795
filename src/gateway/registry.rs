//! The migrations that this gateway knows: what commands and metrics see of them.

use std::collections::{HashMap, VecDeque, hash_map};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::move_disk::DiskMove;
use super::share::Share;
use crate::api::{
    Adjustment, Cancellation, Event, Limits, MigrationStatus, MigrationSummary, NewRate, Outcome, Phase, Progress,
    Refusal, RefusalKind, Report, Role, Switchover, Warm,
};
use crate::proto::ownership;
use crate::proto::page::{ByteRate, MigrationId};

/// Migrations that have ended and are still shown.
const REMEMBERED: usize = 200;

/// Events that a watcher may lag behind before it misses looks at the progress. Notices and the report are never missed by one
/// that reads.
const WATCHER_QUEUE: usize = 64;

/// How long a migration that gives way is waited for: its hypervisor is ended, or the peer asked whether it has given up.
const GIVES_WAY_WITHIN: Duration = Duration::from_secs(20);

/// Notices of a migration that are shown.
const NOTICES: usize = 8;

/// Every migration of this process, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    entries: Mutex<VecDeque<Arc<Entry>>>,
    /// Disks that move within the site, by VM: no migration of these begins. Locked after the entries.
    disk_moves: Mutex<HashMap<String, Arc<DiskMove>>>,
    /// The last one of each VM that is over.
    ended_moves: Mutex<HashMap<String, Arc<DiskMove>>>,
}

/// What a VM is in, so that a migration of it cannot begin.
#[derive(Debug)]
pub(crate) enum Busy {
    Migration(Arc<Entry>),
    DiskMove(Arc<DiskMove>),
}

impl std::fmt::Display for Busy {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Migration(open) => write!(
                out,
                "{} is in migration {} already; longhaul status {1} shows it",
                open.vm, open.migration
            ),
            Self::DiskMove(open) => write!(
                out,
                "the disk {} of {} is being moved: wait for its end, or end it by `longhaul move-disk {1} {0} --cancel`",
                open.disk, open.vm
            ),
        }
    }
}

/// One migration at this gateway.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) migration: MigrationId,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) role: Role,
    pub(crate) started: Instant,
    /// Set when somebody asked to cancel.
    pub(crate) cancel: CancellationToken,
    /// What it may take of its link.
    pub(crate) share: Arc<Share>,
    /// Set when it is over.
    over: CancellationToken,
    state: Mutex<State>,
    resolutions: mpsc::Sender<ResolveOrder>,
}

/// A person's decision on its way to the driver of the migration.
#[derive(Debug)]
pub(crate) struct ResolveOrder {
    pub(crate) resolution: ownership::Resolution,
    /// What came of it: a sentence, or why not.
    pub(crate) reply: oneshot::Sender<Result<String, String>>,
}

#[derive(Debug, Default)]
struct State {
    phase: Option<Phase>,
    percent: f64,
    progress: Option<Progress>,
    report: Option<Report>,
    advice: Option<String>,
    /// The newest sentences that the operator should read.
    notices: VecDeque<String>,
    /// From here on a cancellation is refused, with this reason.
    committed: bool,
    /// It waits once its disks are copied, until then or until it is told to go on.
    warm: Option<Warm>,
    is_switchover_ordered: bool,
    was_cut: bool,
    /// What becomes of the VM is known on this side, and what is left is to tidy up.
    decided: bool,
    ended_after: Option<f64>,
    watchers: Vec<mpsc::Sender<Event>>,
}

impl Registry {
    /// A new entry. At most one migration of a VM is open at a time, and none while a disk of it moves.
    ///
    /// # Errors
    /// What the VM is in.
    pub(crate) fn add(
        &self,
        migration: MigrationId,
        vm: &str,
        peer: &str,
        role: Role,
        now: Instant,
    ) -> Result<(Arc<Entry>, mpsc::Receiver<ResolveOrder>), Busy> {
        let mut entries = self.entries();
        if let Some(open) = entries.iter().find(|entry| entry.vm == vm && !entry.has_ended()) {
            return Err(Busy::Migration(Arc::clone(open)));
        }
        if let Some(open) = self.disk_move(vm) {
            return Err(Busy::DiskMove(open));
        }
        Ok(Self::push(&mut entries, migration, vm, peer, role, now))
    }

    /// A disk of a VM moves from now on.
    ///
    /// # Errors
    /// What the VM is in.
    pub(crate) fn hold(&self, moved: &Arc<DiskMove>) -> Result<(), Busy> {
        let entries = self.entries();
        if let Some(open) = entries.iter().find(|entry| entry.vm == moved.vm && !entry.has_ended()) {
            return Err(Busy::Migration(Arc::clone(open)));
        }
        match self.moves().entry(moved.vm.clone()) {
            hash_map::Entry::Occupied(other) => Err(Busy::DiskMove(Arc::clone(other.get()))),
            hash_map::Entry::Vacant(free) => {
                free.insert(Arc::clone(moved));
                Ok(())
            }
        }
    }

    /// It does not any more.
    pub(crate) fn release(&self, moved: &Arc<DiskMove>) {
        self.ended().insert(moved.vm.clone(), Arc::clone(moved));
        self.moves().remove(&moved.vm);
    }

    /// The last move of a disk of this VM that is over.
    pub(crate) fn ended_disk_move(&self, vm: &str) -> Option<Arc<DiskMove>> {
        self.ended().get(vm).cloned()
    }

    fn ended(&self) -> MutexGuard<'_, HashMap<String, Arc<DiskMove>>> {
        self.ended_moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk of this VM that moves.
    pub(crate) fn disk_move(&self, vm: &str) -> Option<Arc<DiskMove>> {
        self.moves().get(vm).cloned()
    }

    /// How many disks move.
    pub(crate) fn disk_moves(&self) -> usize {
        self.moves().len()
    }

    fn moves(&self) -> MutexGuard<'_, HashMap<String, Arc<DiskMove>>> {
        self.disk_moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a migration and puts another of the same VM in its place, at once: whoever hears of the one finds the other.
    pub(crate) fn replace(
        &self,
        ended: &Entry,
        report: Report,
        migration: MigrationId,
        now: Instant,
    ) -> (Arc<Entry>, mpsc::Receiver<ResolveOrder>) {
        let mut entries = self.entries();
        let added = Self::push(&mut entries, migration, &ended.vm, &ended.peer, ended.role, now);
        ended.finish(report, now);
        // This very moment.
        added.0.state().is_switchover_ordered = ended.state().is_switchover_ordered;
        if ended.cancel.is_cancelled() {
            added.0.cancel.cancel();
        }
        added
    }

    /// Waits, for a while, until no migration of the VM is open that is about to end: one that is decided here, or that came from `source`, which
    /// offers the VM anew and so has given it up.
    pub(crate) async fn gives_way(&self, vm: &str, source: Option<&str>) {
        let waited = async {
            while let Some(open) = self.open_for_vm(vm) {
                let given_up = open.role == Role::Destination && Some(open.peer.as_str()) == source;
                if open.needs_person() || !(given_up || open.state().decided) {
                    return;
                }
                open.over.cancelled().await;
            }
        };
        // Where that is not enough, the open migration is the answer.
        let _ = tokio::time::timeout(GIVES_WAY_WITHIN, waited).await;
    }

    /// An entry for a migration that the journal knows, whatever else its VM does meanwhile.
    pub(crate) fn add_recovered(
        &self,
        migration: MigrationId,
        vm: &str,
        peer: &str,
        role: Role,
        now: Instant,
    ) -> (Arc<Entry>, mpsc::Receiver<ResolveOrder>) {
        Self::push(&mut self.entries(), migration, vm, peer, role, now)
    }

    /// An entry for a migration that was over before this process began.
    pub(crate) fn remember(&self, report: Report, role: Role, now: Instant) {
        let seconds = report.total_seconds;
        let mut entries = self.entries();
        let (entry, _) = Self::push(&mut entries, report.migration, &report.vm, &report.peer, role, now);
        entry.finish(report, now);
        entry.state().ended_after = Some(seconds);
    }

    fn push(
        entries: &mut VecDeque<Arc<Entry>>,
        migration: MigrationId,
        vm: &str,
        peer: &str,
        role: Role,
        now: Instant,
    ) -> (Arc<Entry>, mpsc::Receiver<ResolveOrder>) {
        // What is known of its past gives way to what is going on: a peer has asked once more.
        entries.retain(|entry| entry.migration != migration || entry.role != role || !entry.has_ended());
        let (resolutions, orders) = mpsc::channel(1);
        let entry = Arc::new(Entry {
            migration,
            vm: vm.to_owned(),
            peer: peer.to_owned(),
            role,
            started: now,
            cancel: CancellationToken::new(),
            share: Arc::default(),
            over: CancellationToken::new(),
            state: Mutex::default(),
            resolutions,
        });
        entries.push_back(Arc::clone(&entry));
        let ended = entries.iter().filter(|entry| entry.has_ended()).count();
        if ended > REMEMBERED
            && let Some(oldest) = entries.iter().position(|entry| entry.has_ended())
        {
            entries.remove(oldest);
        }
        (entry, orders)
    }

    /// The migration of this name.
    pub(crate) fn get(&self, migration: MigrationId) -> Option<Arc<Entry>> {
        self.entries()
            .iter()
            .rev()
            .find(|entry| entry.migration == migration)
            .cloned()
    }

    /// The newest migration of a VM that is not over.
    pub(crate) fn open_for_vm(&self, vm: &str) -> Option<Arc<Entry>> {
        self.entries()
            .iter()
            .rev()
            .find(|entry| entry.vm == vm && !entry.has_ended())
            .cloned()
    }

    /// The newest first.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.entries().iter().rev().cloned().collect()
    }

    /// Those that are not over.
    pub(crate) fn open(&self) -> Vec<Arc<Entry>> {
        self.entries()
            .iter()
            .filter(|entry| !entry.has_ended())
            .cloned()
            .collect()
    }

    /// How many run from here to this peer.
    pub(crate) fn open_to(&self, peer: &str) -> usize {
        let open = |entry: &&Arc<Entry>| entry.peer == peer && entry.role == Role::Source && !entry.has_ended();
        self.entries().iter().filter(open).count()
    }

    fn entries(&self) -> MutexGuard<'_, VecDeque<Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// A look at the migration, for whoever follows it.
    pub(crate) fn publish(&self, progress: Progress) {
        let mut state = self.state();
        state.phase = Some(progress.phase);
        state.percent = state.percent.max(progress.percent);
        // A watcher that lags misses a look; the next one is as good.
        state.watchers.retain(|watcher| {
            !matches!(
                watcher.try_send(Event::Progress(progress.clone())),
                Err(mpsc::error::TrySendError::Closed(_))
            )
        });
        state.progress = Some(progress);
    }

    /// A sentence that the operator should read.
    pub(crate) fn notice(&self, text: &str) {
        tracing::warn!(migration = %self.migration, vm = self.vm, "{text}");
        let mut state = self.state();
        state
            .watchers
            .retain(|watcher| watcher.try_send(Event::Notice(text.to_owned())).is_ok());
        if state.notices.len() == NOTICES {
            state.notices.pop_front();
        }
        state.notices.push_back(text.to_owned());
    }

    /// A person has to act: whoever looks on is told, and where the VM is in doubt, and need not wait. Shown until the migration
    /// goes on.
    pub(crate) fn advise(&self, advice: &str) {
        tracing::warn!(migration = %self.migration, vm = self.vm, "{advice}");
        let report = self.in_doubt(advice);
        let mut state = self.state();
        state.advice = Some(advice.to_owned());
        tell_last(state.watchers.drain(..), &report);
    }

    /// Nobody has to act any more.
    pub(crate) fn clear_advice(&self) {
        self.state().advice = None;
    }

    /// What a migration that waits for a person reports meanwhile.
    fn in_doubt(&self, advice: &str) -> Report {
        Report::without_figures(
            self.migration,
            &self.vm,
            &self.peer,
            Outcome::InDoubt,
            advice.to_owned(),
        )
    }

    /// Where it stands, without a look at the figures.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.state().phase = Some(phase);
    }

    /// Whether it stands still until a person acts.
    pub(crate) fn needs_person(&self) -> bool {
        self.state().advice.is_some()
    }

    /// From here on nobody can cancel.
    pub(crate) fn set_committed(&self) {
        self.state().committed = true;
    }

    /// From here on it only has to tidy up: the VM's next migration may wait for that.
    pub(crate) fn set_decided(&self) {
        self.state().decided = true;
    }

    /// It is over.
    pub(crate) fn finish(&self, report: Report, now: Instant) {
        let mut state = self.state();
        state.phase = Some(Phase::Done);
        if report.outcome == Outcome::Completed {
            state.percent = 100.0;
        }
        state.ended_after = Some(now.saturating_duration_since(self.started).as_secs_f64());
        state.advice = None;
        tell_last(state.watchers.drain(..), &report);
        state.report = Some(report);
        self.over.cancel();
    }

    /// Whether it is over.
    pub(crate) fn has_ended(&self) -> bool {
        self.state().ended_after.is_some()
    }

    /// The migration that was begun in its place.
    pub(crate) fn successor(&self) -> Option<MigrationId> {
        self.state().report.as_ref().and_then(|report| report.continued_as)
    }

    /// Asks for cancellation.
    ///
    /// # Errors
    /// The sentence that says why it is too late.
    pub(crate) fn request_cancel(&self) -> Result<Cancellation, Refusal> {
        let state = self.state();
        let too_late = |why: &str| {
            Err(Refusal::new(
                RefusalKind::Conflict,
                format!("the migration of {} cannot be cancelled any more: {why}", self.vm),
            ))
        };
        if state.ended_after.is_some() {
            return match state.report.as_ref().and_then(|report| report.continued_as) {
                Some(next) => too_late(&format!("it is over, and was begun again as {next}: cancel that one")),
                None => too_late("it is over"),
            };
        }
        if self.role == Role::Destination {
            return too_late("cancel it at the source gateway, which runs it");
        }
        if state.committed {
            return too_late("the VM has been handed over and only the destination's answer can bring it back");
        }
        if self.cancel.is_cancelled() {
            return Ok(Cancellation::AlreadyRequested);
        }
        // Whoever ends it from now on knows.
        self.cancel.cancel();
        drop(state);
        Ok(Cancellation::Requested)
    }

    /// The peer was away for too long.
    pub(crate) fn set_cut(&self) {
        self.state().was_cut = true;
    }

    /// Whether it ended for no other reason than that the peer was away for too long.
    pub(crate) fn was_cut(&self) -> bool {
        self.state().was_cut && !self.cancel.is_cancelled()
    }

    /// It waits with its disks copied.
    pub(crate) fn set_warm(&self, warm: Option<Warm>) {
        self.state().warm = warm;
    }

    /// Whether it waits with its disks copied until it is told to go on.
    pub(crate) fn waits(&self, now_unix_ms: u64) -> bool {
        let state = self.state();
        let goes_on_by_itself = |warm: Warm| warm.until_unix_ms.is_some_and(|until| until <= now_unix_ms);
        !state.is_switchover_ordered && state.warm.is_some_and(|warm| !goes_on_by_itself(warm))
    }

    /// When it goes on by itself, in milliseconds since the Unix epoch.
    pub(crate) fn waits_until(&self) -> Option<u64> {
        self.state().warm.and_then(|warm| warm.until_unix_ms)
    }

    /// Lets it go on that waits with its disks copied.
    ///
    /// # Errors
    /// The sentence that says why not.
    pub(crate) fn order_switchover(&self, now_unix_ms: u64) -> Result<Switchover, Refusal> {
        let refused = |why: &str| {
            let text = format!("the migration of {} cannot be told to switch over: {why}", self.vm);
            Err(Refusal::new(RefusalKind::Conflict, text))
        };
        if self.has_ended() {
            return refused("it is over");
        }
        if self.role == Role::Destination {
            return refused("tell the source gateway, which runs it");
        }
        if self.state().warm.is_none() {
            return refused("it was begun without --warm and switches over by itself");
        }
        if !self.waits(now_unix_ms) {
            return Ok(Switchover::AlreadyOrdered);
        }
        self.state().is_switchover_ordered = true;
        tracing::info!(migration = %self.migration, vm = self.vm, "told to switch over");
        Ok(Switchover::Ordered)
    }

    /// Changes what it may take of its link from now on.
    ///
    /// # Errors
    /// The sentence that says why not.
    pub(crate) fn adjust(&self, adjustment: &Adjustment) -> Result<Limits, Refusal> {
        let refused = |why: &str| {
            let text = format!("the migration of {} cannot be limited: {why}", self.vm);
            Err(Refusal::new(RefusalKind::Conflict, text))
        };
        if self.has_ended() {
            return refused("it is over");
        }
        if self.role == Role::Destination {
            return refused("limit it at the source gateway, which sends");
        }
        if let Some(weight) = adjustment.weight {
            self.share.set_weight(weight);
        }
        match adjustment.rate {
            Some(NewRate::BytesPerSecond(rate)) => self.share.set_rate(Some(ByteRate(rate))),
            Some(NewRate::Unlimited) => self.share.set_rate(None),
            None => {}
        }
        let limits = self.limits();
        tracing::info!(migration = %self.migration, vm = self.vm, rate = ?limits.rate_bytes_per_second, weight = limits.weight, "limited");
        Ok(limits)
    }

    fn limits(&self) -> Limits {
        Limits {
            rate_bytes_per_second: self.share.limit().rate().map(|rate| rate.0),
            weight: self.share.weight(),
        }
    }

    /// Hands a person's decision to the driver and waits for what came of it.
    ///
    /// # Errors
    /// A sentence: the migration is over, or does not need a person.
    pub(crate) async fn resolve(&self, resolution: ownership::Resolution) -> Result<String, String> {
        let (reply, answer) = oneshot::channel();
        let over = || format!("the migration of {} is over: there is nothing to resolve", self.vm);
        self.resolutions
            .send(ResolveOrder { resolution, reply })
            .await
            .map_err(|_| over())?;
        answer.await.map_err(|_| over())?
    }

    /// Looks on until it is over.
    pub(crate) fn follow(&self) -> mpsc::Receiver<Event> {
        let (watcher, events) = mpsc::channel(WATCHER_QUEUE);
        let mut state = self.state();
        // A new queue has room for these.
        if let Some(progress) = &state.progress {
            let _ = watcher.try_send(Event::Progress(progress.clone()));
        }
        let in_doubt = state.advice.as_deref().map(|advice| self.in_doubt(advice));
        match state.report.as_ref().or(in_doubt.as_ref()) {
            Some(report) => {
                let _ = watcher.try_send(Event::Report(Box::new(report.clone())));
            }
            None => state.watchers.push(watcher),
        }
        events
    }

    /// One line of a list.
    pub(crate) fn summary(&self, now: Instant) -> MigrationSummary {
        let state = self.state();
        MigrationSummary {
            migration: self.migration,
            vm: self.vm.clone(),
            peer: self.peer.clone(),
            role: self.role,
            phase: state.phase.unwrap_or(Phase::Checking),
            outcome: state.report.as_ref().map(|report| report.outcome),
            percent: state.percent,
            elapsed_seconds: state
                .ended_after
                .unwrap_or_else(|| now.saturating_duration_since(self.started).as_secs_f64()),
        }
    }

    /// Everything.
    pub(crate) fn status(&self, now: Instant) -> MigrationStatus {
        let summary = self.summary(now);
        let state = self.state();
        MigrationStatus {
            summary,
            progress: state.progress.clone(),
            report: state.report.clone(),
            advice: state.advice.clone(),
            notices: state.notices.iter().cloned().collect(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last that watchers hear.
fn tell_last(watchers: impl Iterator<Item = mpsc::Sender<Event>>, report: &Report) {
    for watcher in watchers {
        // The queue may be full of looks; the report is worth a task that waits for room.
        let event = Event::Report(Box::new(report.clone()));
        tokio::spawn(async move { watcher.send(event).await });
    }
}
