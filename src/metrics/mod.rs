//! What the gateway counts, and `GET /metrics`, `/live`, `/ready`.
//!
//! The gateway keeps handles, adds once for each batch, and never looks a label up on its data path: an addition is one
//! atomic operation. A scrape reads what is there and disturbs nothing.

mod exposition;
mod series;
mod serve;
mod tunnels;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeMetric;
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

pub use self::series::{Kind, SERIES, Series, Values};
pub use self::serve::serve;
pub use self::tunnels::{Carries, TunnelStream};
use crate::api::{Outcome, Pages, Phase, Role};
use crate::config::Hook;
use crate::proto::page::ByteRate;

type Labels = Vec<(&'static str, String)>;
type Seconds = Counter<f64, AtomicU64>;
type Level = Gauge<f64, AtomicU64>;

/// Everything that one gateway counts.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    ready: AtomicBool,
    vmm_bytes: [Counter; 2],
    frame_bytes: [Counter; 2],
    pages: [Counter; 6],
    rounds: Counter,
    round_duration: Histogram,
    dirty_rate: Level,
    expected_downtime: Level,
    downtime: Histogram,
    queues: [Gauge; 5],
    shaper_wait: Seconds,
    link_rate: Level,
    migrations: [[Counter; Outcome::ALL.len()]; 2],
    active: [Gauge; 2],
    in_doubt: Gauge,
    phases: [Seconds; 8],
    store_bytes: Level,
    store_images: Gauge,
    known_pages: Counter,
    journal_errors: Counter,
    hooks: [[Counter; 2]; Hook::ALL.len()],
    tunnel_streams: [Gauge; 2],
    tunnel_bytes: [Counter; 2],
    tunnel_frame_bytes: [Counter; 2],
    disk_bytes: [Counter; 2],
    disk_frame_bytes: [Counter; 2],
    peers: PeerFamilies,
    moving: Mutex<Moving>,
}

/// The way of bytes, seen from this gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To this gateway.
    In,
    /// From this gateway.
    Out,
}

/// Where bytes wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Read from the vmm, not yet hashed and encoded.
    Reduce,
    /// Encoded, not yet on the way: kept back by a shaper, or unsent in QUIC.
    Frames,
    /// On the way, not yet acknowledged.
    Transport,
    /// Received, not yet restored.
    Restore,
    /// Restored, not yet taken by the vmm.
    Vmm,
}

impl Metrics {
    /// All series at zero; `version` is that of the program. Not ready.
    #[must_use]
    pub fn new(version: &str) -> Self {
        let mut registry = Registry::default();
        let build_info: Family<Labels, Gauge> = register(&mut registry, &series::BUILD_INFO);
        build_info.get_or_create(&vec![("version", version.to_owned())]).set(1);
        let expand = |family: &Family<Labels, Counter>, role: Role| {
            Outcome::ALL.map(|outcome| {
                let labels = vec![("role", role.word().to_owned()), ("outcome", outcome.word().to_owned())];
                family.get_or_create_owned(&labels)
            })
        };
        let vmm_bytes = closed(&mut registry, &series::VMM_BYTES);
        let frame_bytes = closed(&mut registry, &series::FRAME_BYTES);
        let peers = PeerFamilies::register(&mut registry);
        let hooks: Family<Labels, Counter> = register(&mut registry, &series::HOOKS);
        let hooks = Hook::ALL.map(|hook| {
            HOOK_RESULTS.map(|result| {
                let labels = vec![("hook", hook.word().to_owned()), ("result", result.to_owned())];
                hooks.get_or_create_owned(&labels)
            })
        });
        let migrations: Family<Labels, Counter> = register(&mut registry, &series::MIGRATIONS);
        Self {
            ready: AtomicBool::new(false),
            vmm_bytes,
            frame_bytes,
            pages: closed(&mut registry, &series::PAGES),
            rounds: register(&mut registry, &series::ROUNDS),
            round_duration: register_as(
                &mut registry,
                &series::ROUND_DURATION,
                Histogram::new(series::ROUND_EDGES),
            ),
            dirty_rate: register(&mut registry, &series::DIRTY_RATE),
            expected_downtime: register(&mut registry, &series::EXPECTED_DOWNTIME),
            downtime: register_as(&mut registry, &series::DOWNTIME, Histogram::new(series::DOWNTIME_EDGES)),
            queues: closed(&mut registry, &series::QUEUE_BYTES),
            shaper_wait: register(&mut registry, &series::SHAPER_WAIT),
            link_rate: register(&mut registry, &series::LINK_RATE),
            migrations: [
                expand(&migrations, Role::Source),
                expand(&migrations, Role::Destination),
            ],
            active: closed(&mut registry, &series::ACTIVE),
            in_doubt: register(&mut registry, &series::IN_DOUBT),
            phases: closed(&mut registry, &series::PHASE_SECONDS),
            store_bytes: register(&mut registry, &series::STORE_BYTES),
            store_images: register(&mut registry, &series::STORE_IMAGES),
            known_pages: register(&mut registry, &series::KNOWN_PAGES),
            journal_errors: register(&mut registry, &series::JOURNAL_ERRORS),
            hooks,
            tunnel_streams: closed(&mut registry, &series::TUNNEL_STREAMS),
            tunnel_bytes: closed(&mut registry, &series::TUNNEL_BYTES),
            tunnel_frame_bytes: closed(&mut registry, &series::TUNNEL_FRAME_BYTES),
            disk_bytes: closed(&mut registry, &series::DISK_BYTES),
            disk_frame_bytes: closed(&mut registry, &series::DISK_FRAME_BYTES),
            peers,
            moving: Mutex::default(),
            registry,
        }
    }

    /// Says whether this gateway takes migrations: recovery is done, and it is not draining. `/ready` tells.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Whether this gateway takes migrations.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// What the page store has now.
    pub fn set_store(&self, images: u64, bytes: u64) {
        self.store_images.set(i64::try_from(images).unwrap_or(i64::MAX));
        self.store_bytes.set(bytes as f64);
    }

    /// A migration begins with so many pages that both sites have.
    pub fn add_known_pages(&self, pages: u64) {
        self.known_pages.inc_by(pages);
    }

    /// Adds bytes of a vmm stream.
    pub fn add_vmm_bytes(&self, direction: Direction, bytes: u64) {
        self.vmm_bytes[direction as usize].inc_by(bytes);
    }

    /// Adds bytes of frames.
    pub fn add_frame_bytes(&self, direction: Direction, bytes: u64) {
        self.frame_bytes[direction as usize].inc_by(bytes);
    }

    /// Adds the pages of a batch that was sent.
    pub fn add_pages(&self, batch: &Pages) {
        let Pages {
            zero,
            same,
            reference,
            delta,
            literal,
            raw,
        } = *batch;
        for (counter, pages) in self.pages.iter().zip([zero, same, reference, delta, literal, raw]) {
            if pages > 0 {
                counter.inc_by(pages);
            }
        }
    }

    /// A round of pre-copy has ended.
    pub fn round_ended(&self, duration: Duration) {
        self.rounds.inc();
        self.round_duration.observe(duration.as_secs_f64());
    }

    /// [`Phase::Done`] is none that lasts.
    fn phase_ended(&self, phase: Phase, duration: Duration) {
        if let Some(seconds) = self.phases.get(phase as usize) {
            seconds.inc_by(duration.as_secs_f64());
        }
    }

    /// A VM was paused for `downtime`.
    pub fn observe_downtime(&self, downtime: Duration) {
        self.downtime.observe(downtime.as_secs_f64());
    }

    /// Data waited for `duration` because a configured rate was used up.
    pub fn add_shaper_wait(&self, duration: Duration) {
        self.shaper_wait.inc_by(duration.as_secs_f64());
    }

    /// The rate of the link that holds now; zero where none is configured.
    pub fn set_link_rate(&self, rate: ByteRate) {
        self.link_rate.set(rate.0 as f64);
    }

    /// A hook has ended.
    pub fn count_hook(&self, hook: Hook, succeeded: bool) {
        self.hooks[hook as usize][usize::from(!succeeded)].inc();
    }

    /// The journal could not make a record durable.
    pub fn count_journal_error(&self) {
        self.journal_errors.inc();
    }

    /// How many VMs are paused until a person or the peer decides.
    pub fn set_in_doubt(&self, migrations: u32) {
        self.in_doubt.set(migrations.into());
    }

    /// The series of one peer. `name` must come from the configuration or the trust store, so that their number is
    /// bounded.
    #[must_use]
    pub fn peer(&self, name: &str) -> PeerMetrics {
        self.peers.of(name)
    }

    /// Takes away the series of a peer that is gone for good.
    pub fn forget_peer(&self, name: &str) {
        self.peers.forget(name);
    }

    /// A migration runs from now on, until the handle is dropped.
    #[must_use]
    pub fn migration(self: &Arc<Self>, role: Role) -> ActiveMigration {
        self.active[role as usize].inc();
        let number = {
            let mut moving = self.moving();
            moving.next += 1;
            moving.next
        };
        ActiveMigration {
            metrics: self.clone(),
            role,
            number,
            phase: Mutex::default(),
        }
    }

    fn moving(&self) -> MutexGuard<'_, Moving> {
        // Plain numbers, always consistent.
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, moving: &Moving) {
        let guests = || moving.guests.values();
        self.dirty_rate
            .set(guests().map(|guest| guest.dirty_rate.0 as f64).sum());
        for (gauge, stage) in self.queues.iter().zip(Stage::ALL) {
            let bytes = guests().fold(0_u64, |sum, guest| sum.saturating_add(guest.waiting.at(stage)));
            gauge.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
        let longest = guests().map(|guest| guest.expected_downtime).max().unwrap_or_default();
        self.expected_downtime.set(longest.as_secs_f64());
    }
}

/// One look at a guest on its way. An end that does not know a figure leaves it at zero.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// What it dirties, as the policy at its source sees it.
    pub dirty_rate: ByteRate,
    /// If it were paused now.
    pub expected_downtime: Duration,
    /// What waits for it in this gateway.
    pub waiting: Waiting,
}

/// Bytes of one migration that wait, by stage.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waiting([u64; 5]);

impl Waiting {
    /// The same with `bytes` that wait at `stage`.
    #[must_use]
    pub fn with(mut self, stage: Stage, bytes: u64) -> Self {
        self.0[stage as usize] = bytes;
        self
    }

    fn at(&self, stage: Stage) -> u64 {
        self.0[stage as usize]
    }
}

impl Stage {
    /// Every stage, in the order of the path.
    pub const ALL: [Self; 5] = [Self::Reduce, Self::Frames, Self::Transport, Self::Restore, Self::Vmm];
}

/// The guests that are on their way, each under the number of its handle.
#[derive(Debug, Default)]
struct Moving {
    next: u64,
    guests: BTreeMap<u64, Look>,
}

/// A migration that runs, as far as metrics see it. Series are of all migrations together, so it has no name.
#[derive(Debug)]
pub struct ActiveMigration {
    metrics: Arc<Metrics>,
    role: Role,
    number: u64,
    phase: Mutex<Option<(Phase, Instant)>>,
}

impl ActiveMigration {
    /// What is seen now. It counts until the next look, or the end.
    pub fn look(&self, look: &Look) {
        let mut moving = self.metrics.moving();
        moving.guests.insert(self.number, *look);
        self.metrics.publish(&moving);
    }

    /// It is in `phase` from `now` on; the time since the last call was spent in the phase before.
    pub fn enters(&self, now: Instant, phase: Phase) {
        let mut current = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((before, since)) = current.replace((phase, now)) {
            self.metrics.phase_ended(before, now.saturating_duration_since(since));
        }
    }

    /// It has ended, and with it the phase it was in.
    pub fn ended(&self, now: Instant, outcome: Outcome) {
        self.enters(now, Phase::Done);
        self.metrics.migrations[self.role as usize][outcome as usize].inc();
    }
}

/// What a migration counts, it counts for the gateway.
impl Deref for ActiveMigration {
    type Target = Metrics;

    fn deref(&self) -> &Metrics {
        &self.metrics
    }
}

impl Drop for ActiveMigration {
    fn drop(&mut self) {
        self.metrics.active[self.role as usize].dec();
        let mut moving = self.metrics.moving();
        if moving.guests.remove(&self.number).is_some() {
            self.metrics.publish(&moving);
        }
    }
}

/// The series of one peer.
#[derive(Clone, Debug)]
pub struct PeerMetrics {
    wan_bytes: [Counter; 2],
    rtt: Level,
    rate: Level,
    controller_rate: Level,
    connected: Gauge,
    open_migrations: Gauge,
    connects: Counter,
    packets_sent: Counter,
    packets_lost: Counter,
}

impl PeerMetrics {
    /// Adds IP bytes.
    pub fn add_wan_bytes(&self, direction: Direction, bytes: u64) {
        self.wan_bytes[direction as usize].inc_by(bytes);
    }

    /// Adds datagrams that were sent, and those among all sent ones that were declared lost since the last call.
    pub fn add_packets(&self, sent: u64, lost: u64) {
        self.packets_sent.inc_by(sent);
        self.packets_lost.inc_by(lost);
    }

    /// Smoothed RTT of the control connection.
    pub fn set_rtt(&self, rtt: Duration) {
        self.rtt.set(rtt.as_secs_f64());
    }

    /// The cap that holds now; zero where none is configured.
    pub fn set_rate(&self, rate: ByteRate) {
        self.rate.set(rate.0 as f64);
    }

    /// What the link controller allows.
    pub fn set_controller_rate(&self, rate: ByteRate) {
        self.controller_rate.set(rate.0 as f64);
    }

    /// A control connection was made.
    pub fn connected(&self) {
        self.connects.inc();
        self.connected.set(1);
    }

    /// How many migrations with the peer are not over.
    pub fn set_open_migrations(&self, migrations: u32) {
        self.open_migrations.set(migrations.into());
    }

    /// The control connection is gone.
    pub fn disconnected(&self) {
        self.connected.set(0);
    }
}

#[derive(Debug)]
struct PeerFamilies {
    wan_bytes: Family<Labels, Counter>,
    rtt: Family<Labels, Level>,
    rate: Family<Labels, Level>,
    controller_rate: Family<Labels, Level>,
    connected: Family<Labels, Gauge>,
    open_migrations: Family<Labels, Gauge>,
    connects: Family<Labels, Counter>,
    packets_sent: Family<Labels, Counter>,
    packets_lost: Family<Labels, Counter>,
}

impl PeerFamilies {
    fn register(registry: &mut Registry) -> Self {
        Self {
            wan_bytes: register(registry, &series::WAN_BYTES),
            rtt: register(registry, &series::PEER_RTT),
            rate: register(registry, &series::PEER_RATE),
            controller_rate: register(registry, &series::CONTROLLER_RATE),
            connected: register(registry, &series::PEER_CONNECTED),
            open_migrations: register(registry, &series::PEER_MIGRATIONS),
            connects: register(registry, &series::CONNECTS),
            packets_sent: register(registry, &series::PACKETS_SENT),
            packets_lost: register(registry, &series::PACKETS_LOST),
        }
    }

    fn of(&self, name: &str) -> PeerMetrics {
        let peer = peer_labels(name);
        PeerMetrics {
            wan_bytes: DIRECTIONS.map(|word| self.wan_bytes.get_or_create_owned(&wan_labels(name, word))),
            rtt: self.rtt.get_or_create_owned(&peer),
            rate: self.rate.get_or_create_owned(&peer),
            controller_rate: self.controller_rate.get_or_create_owned(&peer),
            connected: self.connected.get_or_create_owned(&peer),
            open_migrations: self.open_migrations.get_or_create_owned(&peer),
            connects: self.connects.get_or_create_owned(&peer),
            packets_sent: self.packets_sent.get_or_create_owned(&peer),
            packets_lost: self.packets_lost.get_or_create_owned(&peer),
        }
    }

    fn forget(&self, name: &str) {
        let peer = peer_labels(name);
        for word in DIRECTIONS {
            self.wan_bytes.remove(&wan_labels(name, word));
        }
        self.rtt.remove(&peer);
        self.rate.remove(&peer);
        self.controller_rate.remove(&peer);
        self.connected.remove(&peer);
        self.open_migrations.remove(&peer);
        self.connects.remove(&peer);
        self.packets_sent.remove(&peer);
        self.packets_lost.remove(&peer);
    }
}

fn peer_labels(name: &str) -> Labels {
    vec![("peer", name.to_owned())]
}

fn wan_labels(name: &str, direction: &str) -> Labels {
    vec![("peer", name.to_owned()), ("direction", direction.to_owned())]
}

fn register<M: Metric + Clone + Default>(registry: &mut Registry, series: &Series) -> M {
    register_as(registry, series, M::default())
}

fn register_as<M: Metric + Clone>(registry: &mut Registry, series: &Series, metric: M) -> M {
    // The encoder adds the suffix of counters and the full stop of the help itself.
    let name = series.name.strip_suffix("_total").unwrap_or(series.name);
    registry.register(name, series.help, metric.clone());
    metric
}

/// One metric for each word of the only label, in the order of the table.
fn closed<M, const N: usize>(registry: &mut Registry, series: &Series) -> [M; N]
where
    M: Clone + Default + EncodeMetric + TypedMetric + Send + Sync + std::fmt::Debug + 'static,
{
    let &[(label, Values::Closed(words))] = series.labels else {
        unreachable!("{} has one closed label, as the table says", series.name);
    };
    let words: &[&str; N] = words
        .try_into()
        .expect("the enum and the table have the same words, as a test checks");
    let family: Family<Labels, M> = register(registry, series);
    words.map(|word| family.get_or_create_owned(&vec![(label, word.to_owned())]))
}

const HOOK_RESULTS: [&str; 2] = ["ok", "failed"];

const DIRECTIONS: [&str; 2] = ["in", "out"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_the_table_are_those_of_the_enums() {
        let words = |series: &Series, label: &str| -> Vec<&str> {
            let (_, values) = series.labels.iter().find(|(name, _)| *name == label).unwrap();
            let Values::Closed(words) = values else {
                panic!("{label} is not closed")
            };
            words.to_vec()
        };
        let mut phases = Phase::ALL.map(Phase::word).to_vec();
        assert_eq!(phases.pop(), Some(Phase::Done.word()));
        assert_eq!(words(&series::PHASE_SECONDS, "phase"), phases);
        assert_eq!(words(&series::MIGRATIONS, "outcome"), Outcome::ALL.map(Outcome::word));
        assert_eq!(
            words(&series::MIGRATIONS, "role"),
            [Role::Source.word(), Role::Destination.word()]
        );
        assert_eq!(
            words(&series::ACTIVE, "role"),
            [Role::Source.word(), Role::Destination.word()]
        );
        assert_eq!(words(&series::HOOKS, "hook"), Hook::ALL.map(Hook::word));
        assert_eq!(words(&series::HOOKS, "result"), HOOK_RESULTS);
        assert_eq!(words(&series::WAN_BYTES, "direction"), DIRECTIONS);
        assert_eq!(words(&series::QUEUE_BYTES, "stage").len(), Stage::ALL.len());
    }

    #[test]
    fn estimates_of_several_guests_add_up_and_leave_with_them() {
        let metrics = Arc::new(Metrics::new("1"));
        let (first, second) = (metrics.migration(Role::Source), metrics.migration(Role::Source));
        let look = |rate, millis| Look {
            dirty_rate: ByteRate(rate),
            expected_downtime: Duration::from_millis(millis),
            waiting: Waiting::default().with(Stage::Frames, 3).with(Stage::Transport, 4),
        };
        first.look(&look(10, 100));
        second.look(&look(5, 300));
        assert_eq!(
            (
                metrics.queues[Stage::Frames as usize].get(),
                metrics.queues[Stage::Transport as usize].get()
            ),
            (6, 8)
        );
        assert_eq!((metrics.dirty_rate.get(), metrics.expected_downtime.get()), (15.0, 0.3));
        drop(second);
        assert_eq!((metrics.dirty_rate.get(), metrics.expected_downtime.get()), (10.0, 0.1));
        drop(first);
        assert_eq!((metrics.dirty_rate.get(), metrics.expected_downtime.get()), (0.0, 0.0));
        assert_eq!(metrics.active[0].get(), 0);
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
    fn every_phase_counts_the_last_one_too() {
        let metrics = Arc::new(Metrics::new("1"));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let migration = metrics.migration(Role::Source);
        migration.enters(at(0), Phase::Checking);
        migration.enters(at(2), Phase::Preparing);
        migration.ended(at(5), Outcome::Cancelled);
        let spent: Vec<f64> = metrics.phases.iter().map(|seconds| seconds.get()).collect();
        assert_eq!(spent, [2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
