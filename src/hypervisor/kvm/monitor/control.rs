//! The one place where a guest is stopped and started, whoever asks: commands of any session, a migration, the guest
//! itself.
//!
//! Everything happens under one lock, the events included: what a session is told is in the order in which it came
//! about, and nobody is answered with a state that is not told yet. The engine sends and loads outside of it.

use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::super::clock::{now, wall};
use super::super::migration::Guidance;
use super::super::mover::{MoveError, Mover};
use super::super::vmm::{Vmm, VmmError};
use super::commands::Refusal;
use super::hub::{Delivery, Hub};
use super::inventory::Machine;
use super::listener::{Listener, connect};
use super::session::line;
use super::settings::{Capability, Settings};
use super::states::{Effect, Event, RunState, States, Status};
use crate::proto::page::PAGE_SIZE;

/// What all sessions and migrations share.
pub(super) struct Control {
    pub(super) hub: Hub,
    pub(super) vmm: Arc<dyn Vmm>,
    pub(super) machine: Machine,
    mover: Arc<dyn Mover>,
    core: Mutex<Core>,
    /// A migration that waits in pre-switchover has something to look at.
    turn: Condvar,
    has_shut_down: AtomicBool,
    is_announcing: AtomicBool,
}

struct Core {
    states: States,
    settings: Settings,
    transfer: Option<Transfer>,
    sample: Sample,
    /// The guest came from elsewhere and has not run here yet.
    has_arrived: bool,
    /// Nothing is begun any more.
    is_closed: bool,
}

/// The last migration.
struct Transfer {
    guidance: Arc<Guidance>,
    stream: Option<Arc<UnixStream>>,
    /// Where an incoming one is waited for.
    listener: Option<Arc<Listener>>,
    thread: Option<JoinHandle<()>>,
    is_outgoing: bool,
    begun: Instant,
    stopped: Option<Instant>,
    ended: Option<Instant>,
}

/// How fast the guest writes to its memory.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    status: SampleStatus,
    /// Since 1970.
    begun_seconds: u64,
    period_seconds: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum SampleStatus {
    #[default]
    Unstarted,
    Measuring,
    Measured {
        bytes_per_second: u64,
    },
}

impl Transfer {
    fn new(settings: &Settings, is_outgoing: bool) -> Self {
        let guidance = Guidance::new(Duration::from_millis(settings.downtime_limit_ms));
        guidance.set_switchover_bandwidth(settings.switchover_bandwidth);
        Self {
            guidance: Arc::new(guidance),
            stream: None,
            listener: None,
            thread: None,
            is_outgoing,
            begun: now(),
            stopped: None,
            ended: None,
        }
    }

    /// Makes whoever waits for it end.
    fn give_up(&self) {
        self.guidance.cancel();
        if let Some(stream) = &self.stream {
            // It fails where the other side has gone already.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if let Some(listener) = &self.listener {
            listener.close();
        }
    }
}

impl Control {
    pub(super) fn new(vmm: Arc<dyn Vmm>, mover: Arc<dyn Mover>, machine: Machine, run: RunState) -> Self {
        Self {
            hub: Hub::default(),
            vmm,
            machine,
            mover,
            core: Mutex::new(Core {
                states: States::new(run),
                settings: Settings::default(),
                transfer: None,
                sample: Sample::default(),
                has_arrived: false,
                is_closed: false,
            }),
            turn: Condvar::new(),
            has_shut_down: AtomicBool::new(false),
            is_announcing: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the guest is.
    pub(super) fn run_state(&self) -> RunState {
        self.lock().states.run()
    }

    /// Whether nothing is begun any more.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// The threads that run vCPUs.
    pub(super) fn vcpu_threads(&self) -> Vec<u32> {
        let _one_call_at_a_time = self.lock();
        self.vmm.vcpu_threads()
    }

    /// Does what the states ask for, in order. The guest is where they say afterwards, also where it fails.
    fn perform(&self, core: &mut Core, effects: Vec<Effect>) -> Result<(), VmmError> {
        for effect in effects {
            let done = match effect {
                Effect::Pause => self.vmm.pause(),
                Effect::Resume => self.vmm.resume(),
                Effect::Emit(event) => {
                    self.tell(core, event);
                    Ok(())
                }
            };
            if let Err(error) = done {
                tracing::error!(?effect, %error, "the VMM did not do what the guest's state needs");
                if effect == Effect::Pause {
                    core.states.pause_failed();
                } else {
                    for effect in core.states.resume_failed() {
                        if let Effect::Emit(event) = effect {
                            self.tell(core, event);
                        }
                    }
                }
                return Err(error);
            }
            if effect == Effect::Resume && std::mem::take(&mut core.has_arrived) && core.settings.announce_rounds > 0 {
                self.vmm.announce();
            }
        }
        Ok(())
    }

    fn tell(&self, core: &Core, event: Event) {
        let (name, data) = match event {
            Event::Stop => ("STOP", None),
            Event::Resume => ("RESUME", None),
            Event::Shutdown => ("SHUTDOWN", Some(json!({ "guest": true, "reason": "guest-shutdown" }))),
            Event::Migration(_) if !core.settings.tells_migration() => return,
            Event::Migration(status) => ("MIGRATION", Some(json!({ "status": status.name() }))),
        };
        // Whoever freezes this process looks for it in its socket, and takes the guest for stopped where it is not.
        let delivery = if event == Event::Resume {
            Delivery::Now
        } else {
            Delivery::Eventual
        };
        self.say_event(name, data, delivery);
    }

    fn say_event(&self, name: &str, data: Option<Value>, delivery: Delivery) {
        let time = wall();
        let timestamp = json!({ "seconds": time.as_secs(), "microseconds": time.subsec_micros() });
        let mut message = json!({ "event": name, "timestamp": timestamp });
        if let Some(data) = data {
            message["data"] = data;
        }
        self.hub.tell(&line(&message), delivery);
    }

    /// Starts a guest that stands here.
    pub(super) fn start(&self) -> Result<(), VmmError> {
        let mut core = self.lock();
        let effects = core.states.cont().unwrap_or_default();
        self.perform(&mut core, effects)
    }

    /// Makes a guest stand of which there is to be no monitor.
    pub(super) fn stand(&self) {
        let mut core = self.lock();
        let effects = core.states.stop();
        // Said in the log.
        let _ = self.perform(&mut core, effects);
    }

    /// `stop`.
    pub(super) fn stop(&self) -> Result<(), Refusal> {
        let mut core = self.lock();
        let effects = core.states.stop();
        Ok(self.perform(&mut core, effects)?)
    }

    /// `cont`.
    pub(super) fn cont(&self) -> Result<(), Refusal> {
        let mut core = self.lock();
        let effects = core.states.cont().map_err(Refusal::generic)?;
        Ok(self.perform(&mut core, effects)?)
    }

    /// `quit`, told to everybody. The VMM is told by the session, once it has answered.
    pub(super) fn quit(&self) {
        let _core = self.lock();
        let data = json!({ "guest": false, "reason": "host-qmp-quit" });
        self.say_event("SHUTDOWN", Some(data), Delivery::Eventual);
    }

    /// The guest has shut itself down. From now on it does not go elsewhere, even before [`Control::settle_shut_down`].
    pub(super) fn note_shut_down(&self) -> bool {
        !self.has_shut_down.swap(true, Ordering::SeqCst)
    }

    /// Brings the guest to where one that has shut down is.
    pub(super) fn settle_shut_down(&self) {
        let mut core = self.lock();
        self.shut_down(&mut core);
    }

    fn shut_down(&self, core: &mut Core) {
        let effects = core.states.shut_down();
        if effects.is_empty() {
            return;
        }
        // Said in the log; what is not paused is a guest without anything to do.
        let _ = self.perform(core, effects);
        if core.states.status().is_under_way() {
            self.give_up(core);
        }
    }

    fn give_up(&self, core: &Core) {
        if let Some(transfer) = &core.transfer {
            transfer.give_up();
        }
        self.turn.notify_all();
    }

    /// `query-status`.
    pub(super) fn status(&self) -> Value {
        let run = self.run_state();
        json!({ "status": run.name(), "running": run == RunState::Running })
    }

    /// `query-migrate-capabilities`.
    pub(super) fn capabilities(&self) -> Value {
        self.lock().settings.capabilities()
    }

    /// `query-migrate-parameters`.
    pub(super) fn parameters(&self) -> Value {
        self.lock().settings.parameters()
    }

    /// `migrate-set-capabilities`.
    pub(super) fn set_capabilities(&self, wanted: &[Capability]) -> Result<(), Refusal> {
        let mut core = self.lock();
        if core.states.status().is_under_way() {
            return Err(Refusal::generic(
                "Capabilities cannot be changed while a migration is under way.",
            ));
        }
        core.settings = core.settings.with_capabilities(wanted)?;
        Ok(())
    }

    /// `migrate-set-parameters`.
    pub(super) fn set_parameters(&self, wanted: &Map<String, Value>) -> Result<(), Refusal> {
        let mut core = self.lock();
        core.settings = core.settings.with_parameters(wanted)?;
        let Core { settings, transfer, .. } = &mut *core;
        if let Some(transfer) = transfer {
            let guidance = &transfer.guidance;
            guidance.set_downtime_limit(Duration::from_millis(settings.downtime_limit_ms));
            guidance.set_switchover_bandwidth(settings.switchover_bandwidth);
        }
        Ok(())
    }

    /// `migrate`: returns once that has begun.
    pub(super) fn migrate(self: &Arc<Self>, path: &Path) -> Result<(), Refusal> {
        let mut core = self.lock();
        if core.is_closed {
            return Err(Refusal::generic("The monitor is being closed."));
        }
        let effects = core.states.migrate().map_err(Refusal::generic)?;
        let mut transfer = Transfer::new(&core.settings, true);
        let (control, path, guidance) = (Arc::clone(self), path.to_owned(), Arc::clone(&transfer.guidance));
        // It waits for the lock before it does anything.
        let thread = spawn("migration", move || control.send(&path, &guidance));
        let refusal = match thread {
            Ok(thread) => {
                transfer.thread = Some(thread);
                None
            }
            Err(error) => Some(error),
        };
        core.transfer = Some(transfer);
        self.perform(&mut core, effects)?;
        let Some(error) = refusal else {
            return Ok(());
        };
        let effects = core.states.sent(Err(error.to_string()));
        self.perform(&mut core, effects)?;
        Err(Refusal::generic(&format!("No thread for the migration: {error}.")))
    }

    /// Sends the guest away, and lets it run again where that comes to nothing.
    fn send(&self, path: &Path, guidance: &Guidance) {
        // Not before the migration has been told.
        drop(self.lock());
        let outcome = self.send_into(path, guidance);
        let mut core = self.lock();
        let effects = core.states.sent(outcome.map_err(|error| error.0));
        self.end_transfer(&mut core, "away", effects);
    }

    /// What follows from the end of a migration, which went away or to here.
    fn end_transfer(&self, core: &mut Core, way: &'static str, effects: Vec<Effect>) {
        if let Some(transfer) = &mut core.transfer {
            transfer.stream = None;
            transfer.ended = Some(now());
        }
        tracing::info!(
            way,
            status = core.states.status().name(),
            reason = core.states.error(),
            "a migration has ended"
        );
        // Said in the log.
        let _ = self.perform(core, effects);
    }

    fn send_into(&self, path: &Path, guidance: &Guidance) -> Result<(), MoveError> {
        let stream = connect(path).map_err(|error| {
            MoveError(format!(
                "The socket {} cannot be connected to: {error}.",
                path.display()
            ))
        })?;
        let stream = Arc::new(stream);
        {
            let mut core = self.lock();
            let effects = core.states.connected().ok_or_else(given_up)?;
            if let Some(transfer) = &mut core.transfer {
                transfer.stream = Some(Arc::clone(&stream));
            }
            self.perform(&mut core, effects).map_err(|error| MoveError(error.0))?;
        }
        // A guest that stands for the last part must not be left so.
        let sending = AssertUnwindSafe(|| self.mover.send(&stream, guidance, &mut || self.switch_over()));
        catch_unwind(sending).unwrap_or_else(|_| Err(MoveError("The engine has panicked.".to_owned())))
    }

    /// Makes the guest stand, says so, and returns when the rest may be sent.
    fn switch_over(&self) -> Result<(), MoveError> {
        let mut core = self.lock();
        let is_asked = core.settings.waits_before_switchover();
        let effects = core
            .states
            .switch_over(is_asked)
            .map_err(|reason| MoveError(reason.to_owned()))?;
        if let Some(transfer) = &mut core.transfer {
            transfer.stopped = Some(now());
        }
        self.perform(&mut core, effects).map_err(|error| MoveError(error.0))?;
        // The vCPU that noted it stands by now, and its thread may wait for the lock.
        if self.has_shut_down.load(Ordering::SeqCst) {
            self.shut_down(&mut core);
        }
        let core = self.turn.wait_while(core, |core| core.states.waits_for_continue());
        let core = core.unwrap_or_else(PoisonError::into_inner);
        if core.states.may_send_rest() {
            Ok(())
        } else {
            Err(given_up())
        }
    }

    /// `migrate-continue`.
    pub(super) fn continue_switchover(&self) -> Result<(), Refusal> {
        let mut core = self.lock();
        let effects = core.states.continue_switchover().map_err(Refusal::generic)?;
        self.perform(&mut core, effects)?;
        self.turn.notify_all();
        Ok(())
    }

    /// `migrate_cancel`: returns at once. Fine where nothing is to be cancelled.
    pub(super) fn cancel(&self) -> Result<(), Refusal> {
        let mut core = self.lock();
        let effects = core.states.cancel();
        if effects.is_empty() {
            return Ok(());
        }
        self.perform(&mut core, effects)?;
        self.give_up(&core);
        Ok(())
    }

    /// `migrate-incoming`: returns once it is listened on `path`.
    pub(super) fn migrate_incoming(self: &Arc<Self>, path: &Path) -> Result<(), Refusal> {
        let mut core = self.lock();
        if core.is_closed {
            return Err(Refusal::generic("The monitor is being closed."));
        }
        core.states.check_expects().map_err(Refusal::generic)?;
        let listener = Listener::new(path).map_err(|error| Refusal::generic(&error.to_string()))?;
        let listener = Arc::new(listener);
        let (control, accepting) = (Arc::clone(self), Arc::clone(&listener));
        // It waits for the lock before it tells anything.
        let thread = spawn("migration", move || control.receive(accepting));
        let thread = thread.map_err(|error| Refusal::generic(&format!("No thread for the migration: {error}.")))?;
        core.transfer = Some(Transfer {
            listener: Some(listener),
            thread: Some(thread),
            ..Transfer::new(&core.settings, false)
        });
        let effects = core.states.expect();
        Ok(self.perform(&mut core, effects)?)
    }

    /// Takes the guest in.
    fn receive(&self, listener: Arc<Listener>) {
        // Not before it has been told that it is waited for.
        drop(self.lock());
        let outcome = self.receive_from(listener);
        let mut core = self.lock();
        core.has_arrived = outcome.is_ok();
        let effects = core.states.loaded(outcome.map_err(|error| error.0));
        self.end_transfer(&mut core, "to here", effects);
    }

    fn receive_from(&self, listener: Arc<Listener>) -> Result<(), MoveError> {
        let stream = listener.accept();
        if let Some(transfer) = &mut self.lock().transfer {
            transfer.listener = None;
        }
        // One connection: nobody else is let in.
        drop(listener);
        let stream = Arc::new(stream.map_err(|error| MoveError(format!("Nobody has connected: {error}.")))?);
        {
            let mut core = self.lock();
            if core.is_closed {
                return Err(given_up());
            }
            if let Some(transfer) = &mut core.transfer {
                transfer.stream = Some(Arc::clone(&stream));
            }
            let effects = core.states.accepted();
            self.perform(&mut core, effects).map_err(|error| MoveError(error.0))?;
        }
        let receiving = AssertUnwindSafe(|| self.mover.receive(&stream));
        catch_unwind(receiving).unwrap_or_else(|_| Err(MoveError("The engine has panicked.".to_owned())))
    }

    /// `query-migrate`.
    pub(super) fn progress(&self) -> Value {
        let core = self.lock();
        let status = core.states.status();
        let Some(transfer) = &core.transfer else {
            return json!({});
        };
        let mut answer = json!({ "status": status.name() });
        if let Some(reason) = core.states.error() {
            answer["error-desc"] = json!(reason);
        }
        if !transfer.is_outgoing {
            return answer;
        }
        let end = transfer.ended.unwrap_or_else(now);
        answer["total-time"] = json!(millis(end.saturating_duration_since(transfer.begun)));
        let progress = transfer.guidance.progress();
        match status {
            Status::Completed => {
                let stopped = transfer.stopped.unwrap_or(end);
                answer["downtime"] = json!(millis(end.saturating_duration_since(stopped)));
            }
            _ if status.is_under_way() => answer["expected-downtime"] = json!(millis(progress.expected_downtime)),
            _ => {}
        }
        if matches!(status, Status::None | Status::Setup) {
            return answer;
        }
        answer["setup-time"] = json!(0);
        let page = PAGE_SIZE as u64;
        // JSON has no number for what the engine could not divide.
        let bytes_per_second = Some(progress.bytes_per_second).filter(|rate| rate.is_finite());
        answer["ram"] = json!({
            "transferred": progress.transferred_bytes,
            "remaining": progress.remaining_bytes,
            "total": progress.total_bytes.max(self.machine.memory_bytes()),
            "duplicate": progress.zero_pages,
            "normal": progress.normal_pages,
            "normal-bytes": progress.normal_pages.saturating_mul(page),
            "page-size": page,
            "dirty-pages-rate": progress.dirty_pages_per_second,
            "mbps": bytes_per_second.unwrap_or(0.0) / 125_000.0,
            "dirty-sync-count": progress.rounds,
        });
        answer
    }

    /// `calc-dirty-rate`: returns once that has begun.
    pub(super) fn begin_sample(self: &Arc<Self>, period_seconds: u64) -> Result<(), Refusal> {
        let mut core = self.lock();
        if core.sample.status == SampleStatus::Measuring {
            return Err(Refusal::generic("The dirty rate is being measured already."));
        }
        if core.states.status().is_under_way() {
            return Err(Refusal::generic(
                "The dirty rate cannot be measured while a migration is under way.",
            ));
        }
        let control = Arc::clone(self);
        let period = Duration::from_secs(period_seconds);
        let thread = spawn("dirty rate", move || {
            let measuring = AssertUnwindSafe(|| control.mover.dirty_rate(period));
            let rate = catch_unwind(measuring);
            let rate = rate.unwrap_or_else(|_| Err(MoveError("The engine has panicked.".to_owned())));
            control.lock().sample.status = match rate {
                Ok(Some(bytes_per_second)) => SampleStatus::Measured { bytes_per_second },
                Ok(None) => SampleStatus::Unstarted,
                Err(error) => {
                    tracing::warn!(%error, "the dirty rate was not measured");
                    SampleStatus::Unstarted
                }
            };
        });
        thread.map_err(|error| Refusal::generic(&format!("No thread for the measurement: {error}.")))?;
        core.sample = Sample {
            status: SampleStatus::Measuring,
            begun_seconds: wall().as_secs(),
            period_seconds,
        };
        Ok(())
    }

    /// `query-dirty-rate`.
    pub(super) fn sample(&self) -> Value {
        let sample = self.lock().sample;
        let (status, rate) = match sample.status {
            SampleStatus::Unstarted => ("unstarted", None),
            SampleStatus::Measuring => ("measuring", None),
            SampleStatus::Measured { bytes_per_second } => ("measured", Some(bytes_per_second.div_ceil(1 << 20))),
        };
        let mut answer = json!({
            "status": status,
            "start-time": sample.begun_seconds,
            "calc-time": sample.period_seconds,
            "calc-time-unit": "second",
            "mode": "dirty-bitmap",
            "sample-pages": 0,
        });
        if let Some(mebibytes) = rate {
            answer["dirty-rate"] = json!(mebibytes);
        }
        answer
    }

    /// `announce-self`: `rounds` times, after `initial`, then each time `step` later than the last, at most `most`.
    /// Returns at once; one that is said while another is under way is left out, for it would say the same.
    pub(super) fn announce(self: &Arc<Self>, rounds: u64, initial: Duration, step: Duration, most: Duration) {
        if rounds == 0 || self.is_announcing.swap(true, Ordering::SeqCst) {
            return;
        }
        let control = Arc::clone(self);
        let announcing = spawn("announce", move || {
            let mut pause = initial;
            for round in 0..rounds {
                if round > 0 {
                    std::thread::park_timeout(pause);
                    pause = pause.saturating_add(step).min(most);
                }
                let core = control.lock();
                if core.is_closed || core.states.run() != RunState::Running {
                    break;
                }
                control.vmm.announce();
            }
            control.is_announcing.store(false, Ordering::SeqCst);
        });
        if let Err(error) = announcing {
            tracing::warn!(%error, "the guest was not announced");
            self.is_announcing.store(false, Ordering::SeqCst);
        }
    }

    /// Begins nothing any more, ends all sessions, and a migration that is under way; waits until that has ended.
    pub(super) fn close(&self) {
        let thread = {
            let mut core = self.lock();
            core.is_closed = true;
            let effects = core.states.cancel();
            // Said in the log.
            let _ = self.perform(&mut core, effects);
            self.give_up(&core);
            core.transfer.as_mut().and_then(|transfer| transfer.thread.take())
        };
        self.hub.close();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // What it panicked of is in its own output.
            let _ = thread.join();
        }
    }
}

fn given_up() -> MoveError {
    MoveError("The migration was given up.".to_owned())
}

/// A thread whose name says what it is for.
pub(super) fn spawn(what: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("lh {what}")).spawn(run)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
