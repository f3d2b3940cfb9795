//! Pre-copy as the source gateway sees it: figures in, settings for the hypervisor and looks for the operator out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::forecasting::{Forecasting, Sample as DirtySample};
use super::keeping::Prepared;
use super::links::Link;
use super::memory::Reservation;
use super::outbound::{Outbound, UNKNOWN_RATE};
use super::registry::Entry;
use super::share::Share;
use crate::api::{self, DiskFigures, Pages, Phase, Progress};
use crate::hypervisor::qemu::{DirtyRateSample, MigrationProgress};
use crate::metrics::{ActiveMigration, Direction, Look};
use crate::proto::page::ByteRate;
use crate::proto::precopy::policy::{Settings, vmm_rate};
use crate::proto::precopy::rounds::{Round, Totals};
use crate::proto::precopy::{
    Backlog, Budget, Decision, DiskRounds, FixedCosts, GoodputMeter, PathMeter, Policy, ProgressTracker, RatioMeter,
    Rounds, Sample, usable_ratio,
};
use crate::proto::reduce::{DictionaryLimits, PageCounts, Reducer};
use crate::proto::wire::hello::{self, Agreement};
use crate::transport::tuning::UNSENT;

/// Whatever is measured, a path is not taken for slower: queues of bytes would not hold a lane.
const LEAST_RATE: ByteRate = ByteRate(128 << 10);

/// Settings are sent to the hypervisor again where they changed by more than this share.
const WORTH_SETTING: f64 = 0.1;

/// The figures of one migration.
#[derive(Debug)]
pub(crate) struct Copying {
    metrics: Arc<ActiveMigration>,
    counted: Totals,
    /// Never goes back: a guest that somebody else pauses and lets go on would seem to switch over twice.
    phase: Phase,
    policy: Policy,
    /// Of a migration that waits: it counts from when that goes on.
    deadline: Option<Duration>,
    costs: FixedCosts,
    tracker: ProgressTracker,
    goodput: GoodputMeter,
    path: PathMeter,
    ratio: RatioMeter,
    rounds: Rounds,
    share: Arc<Share>,
    agreement: Agreement,
    dictionary: Option<DictionaryLimits>,
    coders: usize,
    prepared: Prepared,
    known_pages: u64,
    /// Held until the migration is over, and what it left is kept.
    memory: Option<Reservation>,
    /// None of a VM that is off.
    forecasting: Option<Forecasting>,
    memory_bytes: u64,
    believes: bool,
    /// The guest must not be stopped yet.
    held: bool,
    applied: Option<Settings>,
    last: Option<Progress>,
    wire: WireRate,
    totals: Totals,
    wire_at_start: u64,
    pages: Pages,
    disks_began: Option<Instant>,
    /// Share of the whole that disks were, which were read before memory.
    percent_before: f64,
}

/// What a migration's copying begins with.
#[derive(Debug)]
pub(crate) struct CopyingStart {
    pub(crate) metrics: Arc<ActiveMigration>,
    pub(crate) now: Instant,
    pub(crate) budget: Budget,
    pub(crate) costs: FixedCosts,
    /// Time until the switchover.
    pub(crate) deadline: Option<Duration>,
    /// It counts from when the migration is told to go on.
    pub(crate) waits: bool,
    pub(crate) share: Arc<Share>,
    /// With the peer, when the session was opened.
    pub(crate) agreement: Agreement,
    pub(crate) dictionary: Option<DictionaryLimits>,
    /// Threads that code what the dictionary leaves.
    pub(crate) coders: usize,
    /// What it begins with of the page store, and keeps for it.
    pub(crate) prepared: Prepared,
    /// What this gateway needs for it, beside its disks.
    pub(crate) memory: Option<Reservation>,
    /// None of a VM that is off.
    pub(crate) forecasting: Option<Forecasting>,
    /// Memory of the guest.
    pub(crate) memory_bytes: u64,
    /// IP bytes of the link before the migration.
    pub(crate) wire_at_start: u64,
}

/// Bytes on the wire per second over the last looks.
#[derive(Debug, Default)]
struct WireRate {
    last: Option<(Instant, u64)>,
    bytes_per_second: f64,
}

impl Copying {
    pub(crate) fn new(start: CopyingStart) -> Self {
        Self {
            metrics: start.metrics,
            counted: Totals::default(),
            phase: Phase::Preparing,
            policy: Policy::new(
                start.now,
                start.budget,
                start
                    .deadline
                    .filter(|_| !start.waits)
                    .map(|deadline| start.now + deadline),
            ),
            deadline: start.deadline.filter(|_| start.waits),
            costs: start.costs,
            tracker: ProgressTracker::default(),
            goodput: GoodputMeter::default(),
            path: PathMeter::default(),
            ratio: RatioMeter::default(),
            rounds: Rounds::new(start.now),
            share: start.share,
            agreement: start.agreement,
            dictionary: start.dictionary,
            coders: start.coders,
            known_pages: start.prepared.known_pages(),
            prepared: start.prepared,
            memory: start.memory,
            forecasting: start.forecasting,
            memory_bytes: start.memory_bytes,
            believes: false,
            held: false,
            applied: None,
            last: None,
            wire: WireRate::default(),
            totals: Totals::default(),
            wire_at_start: start.wire_at_start,
            pages: Pages::default(),
            disks_began: None,
            percent_before: 0.0,
        }
    }

    /// What reduces the stream for a peer that speaks this version of the wire format; `None` where it goes as it is.
    pub(crate) fn reducer(&mut self, version: u16) -> Option<Reducer> {
        self.dictionary.map(|limits| {
            let mut reducer = if version >= hello::DELTAS {
                Reducer::new(limits, self.memory.as_ref().map_or(0, Reservation::pages))
            } else {
                Reducer::without_deltas(limits)
            };
            std::mem::take(&mut self.prepared).equip(&mut reducer);
            reducer
        })
    }

    /// What the session goes by.
    pub(crate) fn agreement(&self) -> Agreement {
        self.agreement
    }

    /// Threads that code what the reducer leaves.
    pub(crate) fn coders(&self) -> usize {
        self.coders
    }

    /// What QEMU is told before it starts: the settings of a path of which nothing has been measured yet.
    pub(crate) fn first_settings(&self, link: &Link) -> Settings {
        self.as_held(self.policy.settings(self.path_rate(link), 1.0))
    }

    /// The hypervisor cannot be told a bandwidth and goes by what it measures.
    pub(crate) fn set_believes_itself(&mut self) {
        self.believes = true;
    }

    /// Whether the guest is to be kept running, whatever the policy allows.
    pub(crate) fn set_held(&mut self, held: bool) {
        self.held = held;
    }

    /// Memory of the guest.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// It waits no more.
    pub(crate) fn goes_on(&mut self, now: Instant) {
        if let Some(deadline) = self.deadline {
            self.policy.set_deadline(now + deadline);
        }
    }

    /// Whether it should have ended by now.
    pub(crate) fn is_late(&self, now: Instant) -> bool {
        self.policy.is_late(now)
    }

    fn as_held(&self, settings: Settings) -> Settings {
        match self.held {
            true => settings.held(),
            false => settings,
        }
    }

    /// Takes in a look at the hypervisor. New settings, where they changed enough to be worth a command.
    ///
    /// # Errors
    /// The policy gives up, with the reason for the operator.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        progress: &MigrationProgress,
        outbound: &Outbound,
        disks: Option<DiskRounds>,
        link: &Link,
        entry: &Entry,
    ) -> Result<Option<Settings>, String> {
        let ram = progress.ram.unwrap_or_default();
        self.totals = outbound.totals();
        self.ratio.observe(self.totals);
        self.goodput.observe(now, outbound.acknowledged_bytes());
        let wire_bytes = link.wire_bytes().saturating_sub(self.wire_at_start);
        self.wire.observe(now, wire_bytes);
        let saturated = outbound.was_saturated();
        self.path.observe(now, outbound.acknowledged_bytes(), saturated);
        let goodput = self.path_rate(link);
        let reduction_ratio = usable_ratio(
            self.ratio.pessimistic(),
            goodput,
            outbound
                .encoder_rate()
                .into_iter()
                .chain(outbound.restorer_rate())
                .min(),
            self.rounds.re_send_rate(),
        );
        let left_at_stop = vmm_rate(goodput, reduction_ratio) as f64 * self.policy.allowed_transfer().as_secs_f64();
        let to_go = ram.remaining_bytes.saturating_sub(left_at_stop as u64);
        let backlog = Backlog::before_the_stop(goodput, reduction_ratio, to_go);
        outbound.set_backlog(backlog, goodput, link.rtt());
        link.ask(now, entry.migration, goodput);
        let unsent_in_quic = self.unsent_in_quic(outbound, link);
        let backlog_bytes = outbound.backlog_bytes() + unsent_in_quic;

        let round = u32::try_from(ram.rounds).unwrap_or(u32::MAX);
        // From the switchover on QEMU counts what it sends while the guest stands still as one more round.
        let ended = (self.phase == Phase::Precopy)
            .then(|| self.rounds.observe(now, round, self.totals, ram.remaining_bytes))
            .flatten();
        self.note_round(ended, entry);
        let sample = Sample {
            now,
            round,
            remaining_bytes: ram.remaining_bytes,
            dirty_rate: ByteRate(
                ram.dirty_pages_per_second
                    .saturating_mul(crate::proto::page::PAGE_SIZE as u64),
            ),
            goodput,
            reduction_ratio,
            lag: outbound.lag(),
            disks: disks.map_or(Some(Duration::ZERO), |disks| disks.one_more(goodput)),
        };
        let decision = self.policy.decide(&sample);
        let outlook = self
            .tracker
            .update(&sample, self.memory_bytes, self.policy.allowed_transfer());
        let rate = vmm_rate(goodput, sample.reduction_ratio).max(1);
        let transfer = Duration::from_secs_f64((ram.remaining_bytes as f64 / rate as f64).min(1e6));
        let waiting = goodput.time_for(backlog_bytes).max(sample.lag) + sample.disks.unwrap_or_default();
        // The hypervisor may stop the guest any time now, or has: what others have on the way would be before the guest's rest. A
        // guest that a person paused in the middle has more left than that.
        self.share.set_urgent(
            (round > 1 || self.phase > Phase::Precopy) && transfer <= self.policy.allowed_transfer() + link.rtt(),
        );
        let expected = transfer + waiting + self.costs.one_way + self.costs.syncs + self.costs.load;
        self.metrics.look(&Look {
            dirty_rate: sample.dirty_rate,
            expected_downtime: expected,
            waiting: outbound.waiting(unsent_in_quic),
        });
        self.count();
        let look = Progress {
            migration: entry.migration,
            vm: entry.vm.clone(),
            peer: entry.peer.clone(),
            phase: self.phase,
            round,
            percent: self.percent_before + outlook.percent * (100.0 - self.percent_before) / 100.0,
            elapsed_seconds: now.saturating_duration_since(entry.started).as_secs_f64(),
            wire_bytes_per_second: self.wire.bytes_per_second,
            reduction_ratio: self.reduction_ratio(),
            dirty_bytes_per_second: sample.dirty_rate.0 as f64,
            remaining_bytes: ram.remaining_bytes,
            backlog_bytes,
            expected_downtime_seconds: expected.as_secs_f64(),
            eta_seconds: outlook.eta.map(|eta| eta.as_secs_f64()),
            eta_reason: match self.policy.is_held_by_disks() {
                true => Some("what the guest writes to its disks leaves nothing of the downtime limit".to_owned()),
                false => outlook.note,
            },
            converging: !self.policy.is_stuck() && !self.policy.is_held_by_disks(),
        };
        entry.publish(look.clone());
        self.last = Some(look);
        match decision {
            Decision::Continue(settings) if self.believes => {
                let believed = settings.for_believed(ByteRate(ram.bytes_per_second));
                Ok(self.worth_setting(self.as_held(believed)))
            }
            Decision::Continue(settings) => Ok(self.worth_setting(self.as_held(settings))),
            Decision::GiveUp { reason } => Err(reason),
        }
    }

    /// The hypervisor's stream begins, and with it the first round: over all memory, however short it is.
    pub(crate) fn begin_stream(&mut self, now: Instant) {
        self.rounds.observe(now, 1, Totals::default(), 0);
    }

    /// A look at disks, which are read before memory is; once they are, `waits` says for what it does.
    pub(crate) fn look_at_disks(
        &mut self,
        now: Instant,
        figures: DiskFigures,
        waits: Option<String>,
        link: &Link,
        entry: &Entry,
    ) {
        let wire_bytes = link.wire_bytes().saturating_sub(self.wire_at_start);
        self.wire.observe(now, wire_bytes);
        link.ask(now, entry.migration, self.path_rate(link));
        let DiskFigures {
            allocated_bytes,
            read_bytes,
            ..
        } = figures;
        let all = (allocated_bytes + self.memory_bytes).max(1) as f64;
        let read = read_bytes.min(allocated_bytes) as f64;
        self.percent_before = 100.0 * read / all;
        let elapsed = now
            .saturating_duration_since(self.disks_began.unwrap_or(now))
            .as_secs_f64();
        let remaining_bytes = match waits {
            Some(_) => figures.last_round_bytes,
            None => allocated_bytes.saturating_sub(read_bytes),
        };
        let eta_seconds = (read > 0.0 && elapsed > 1.0 && waits.is_none()).then(|| {
            let of_memory = self.forecasting.as_ref().map_or(0.0, Forecasting::seconds_beside_disks);
            remaining_bytes as f64 * elapsed / read + of_memory
        });
        let mut look = self.blank(Phase::Disks, entry);
        look.percent = self.percent_before;
        look.elapsed_seconds = now.saturating_duration_since(entry.started).as_secs_f64();
        look.wire_bytes_per_second = self.wire.bytes_per_second;
        look.remaining_bytes = remaining_bytes;
        look.eta_seconds = eta_seconds;
        look.eta_reason = waits;
        entry.publish(look.clone());
        self.last = Some(look);
    }

    /// A new phase, with the figures of the last look. `totals`: what the stream has come to meanwhile, where there is one.
    pub(crate) fn show(&mut self, now: Instant, phase: Phase, totals: Option<Totals>, entry: &Entry) {
        self.totals = totals.unwrap_or(self.totals);
        self.enter(now, phase);
        let phase = self.phase;
        if phase > Phase::Precopy {
            let last = self.rounds.finish(now, self.totals);
            self.note_round(last, entry);
        }
        if phase == Phase::Disks {
            self.disks_began = Some(now);
        }
        let mut look = self.last.clone().unwrap_or_else(|| self.blank(phase, entry));
        look.phase = phase;
        look.elapsed_seconds = now.saturating_duration_since(entry.started).as_secs_f64();
        entry.publish(look.clone());
        self.last = Some(look);
    }

    /// Nothing is known yet.
    fn blank(&self, phase: Phase, entry: &Entry) -> Progress {
        Progress {
            migration: entry.migration,
            vm: entry.vm.clone(),
            peer: entry.peer.clone(),
            phase,
            round: 0,
            percent: 0.0,
            elapsed_seconds: 0.0,
            wire_bytes_per_second: 0.0,
            reduction_ratio: 1.0,
            dirty_bytes_per_second: 0.0,
            remaining_bytes: 0,
            backlog_bytes: 0,
            expected_downtime_seconds: 0.0,
            eta_seconds: None,
            eta_reason: None,
            converging: true,
        }
    }

    fn note_round(&self, ended: Option<Round>, entry: &Entry) {
        let Some(round) = ended else { return };
        self.metrics.round_ended(round.duration);
        tracing::info!(migration = %entry.migration, round = round.number, seconds = round.duration.as_secs_f64(),
            vmm_bytes = round.vmm_bytes, frame_bytes = round.wire_bytes, dirty_bytes = round.dirty_bytes, "round");
    }

    fn enter(&mut self, now: Instant, phase: Phase) {
        if phase > self.phase {
            self.metrics.enters(now, phase);
            self.phase = phase;
        }
    }

    /// The last figures, once everything is sent or nothing more will be.
    pub(crate) fn close(&mut self, totals: Totals, pages: PageCounts) {
        self.totals = totals;
        self.pages = pages.into();
        self.count();
        self.metrics.add_pages(&self.pages);
    }

    /// It has ended: counted by outcome.
    pub(crate) fn ended(self, now: Instant, outcome: api::Outcome) {
        self.metrics.ended(now, outcome);
    }

    fn count(&mut self) {
        let before = std::mem::replace(&mut self.counted, self.totals);
        self.metrics
            .add_vmm_bytes(Direction::In, self.totals.vmm_bytes.saturating_sub(before.vmm_bytes));
        self.metrics
            .add_frame_bytes(Direction::Out, self.totals.wire_bytes.saturating_sub(before.wire_bytes));
        self.metrics.add_shaper_wait(self.share.limit().take_waited());
    }

    /// The sample the hypervisor should be asked about by now, for the forecast.
    pub(crate) fn due_sample(&self, now: Instant) -> Option<DirtyRateSample> {
        self.forecasting.as_ref()?.due(now)
    }

    /// What the sample came to.
    pub(crate) fn take_sample(&mut self, sample: DirtySample, entry: &Entry) {
        let Some(forecasting) = &mut self.forecasting else {
            return;
        };
        forecasting.set_sample(sample);
        let forecast = forecasting.forecast();
        if !forecast.converges {
            entry.notice(&forecast.reason);
        }
    }

    pub(crate) fn forecast(&self) -> Option<api::Forecast> {
        self.forecasting.as_ref().map(Forecasting::forecast)
    }

    /// The memory that was reserved, for whoever goes on with what it holds.
    pub(crate) fn take_memory(&mut self) -> Option<Reservation> {
        self.memory.take()
    }

    /// Pages that both sites had before the first was sent.
    pub(crate) fn known_pages(&self) -> u64 {
        self.known_pages
    }

    pub(crate) fn pages(&self) -> Pages {
        self.pages
    }

    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Another link is used from now on, which has carried this much before.
    pub(crate) fn set_wire_at_start(&mut self, bytes: u64) {
        self.wire_at_start = bytes;
    }

    pub(crate) fn wire_at_start(&self) -> u64 {
        self.wire_at_start
    }

    pub(crate) fn reduction_ratio(&self) -> f64 {
        (self.totals.vmm_bytes as f64 / self.totals.wire_bytes.max(1) as f64).max(1.0)
    }

    /// Every round as the report shows it.
    pub(crate) fn rounds(&self) -> Vec<api::Round> {
        self.rounds
            .finished()
            .iter()
            .map(|round| api::Round {
                number: round.number,
                seconds: round.duration.as_secs_f64(),
                vmm_bytes: round.vmm_bytes,
                wire_bytes: round.wire_bytes,
                dirty_bytes: round.dirty_bytes,
            })
            .collect()
    }

    /// What the path takes: the controller's word where a capacity is configured, else the best that was measured.
    fn path_rate(&self, link: &Link) -> ByteRate {
        let promised = link.goodput().or_else(|| self.goodput.best()).unwrap_or(UNKNOWN_RATE);
        // A third above what is measured leaves room to find that more goes.
        let rate = self
            .path
            .rate()
            .map_or(promised, |rate| ByteRate(rate.0 / 3 * 4).min(promised));
        let rate = self.share.limit().rate().map_or(rate, |cap| cap.min(rate));
        rate.max(LEAST_RATE)
    }

    /// What lanes hold beyond what flies. With a capacity, lanes are admitted as they leave and it is next to nothing; without one, the
    /// connection keeps it within [`UNSENT`].
    fn unsent_in_quic(&self, outbound: &Outbound, link: &Link) -> u64 {
        let measured = self.path.rate().or_else(|| self.goodput.best());
        match measured {
            Some(rate) if link.capacity().is_none() => outbound
                .outstanding_bytes()
                .saturating_sub(rate.bytes_in(link.rtt()))
                .min(rate.bytes_in(UNSENT)),
            _ => 0,
        }
    }

    fn worth_setting(&mut self, settings: Settings) -> Option<Settings> {
        let far = |before: f64, now: f64| (now - before).abs() > before * WORTH_SETTING;
        let limit_changed = |applied: Settings| match self.believes {
            // It follows what the hypervisor measures, which is never the same twice.
            true => far(
                applied.downtime_limit.as_secs_f64(),
                settings.downtime_limit.as_secs_f64(),
            ),
            false => applied.downtime_limit != settings.downtime_limit,
        };
        let changed = self.applied.is_none_or(|applied| {
            limit_changed(applied)
                || far(
                    applied.switchover_bandwidth.0 as f64,
                    settings.switchover_bandwidth.0 as f64,
                )
        });
        changed.then(|| {
            self.applied = Some(settings);
            settings
        })
    }
}

impl WireRate {
    const SPAN: Duration = Duration::from_millis(400);

    fn observe(&mut self, now: Instant, bytes: u64) {
        let Some((at, before)) = self.last else {
            self.last = Some((now, bytes));
            return;
        };
        let took = now.saturating_duration_since(at);
        if took >= Self::SPAN {
            self.bytes_per_second = bytes.saturating_sub(before) as f64 / took.as_secs_f64();
            self.last = Some((now, bytes));
        }
    }
}
