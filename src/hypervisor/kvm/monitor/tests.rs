//! A monitor on real sockets, driven by the gateway's own client code. The VMM and the engine are played by the test.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::hypervisor::kvm::migration::{Guidance, Progress};
use crate::hypervisor::kvm::mover::MoveError;
use crate::hypervisor::kvm::vmm::Visit;
use crate::hypervisor::qemu::{
    self, DestinationError, DestinationVm, FreezeError, MigrationStatus, PermitConditions, SourceError, SourceVm,
    Undone,
};
use crate::hypervisor::qmp::QmpClient;

const SOON: Duration = Duration::from_secs(60);
const DOWNTIME: Duration = Duration::from_millis(40);

/// A VMM of one vCPU, which is the thread that made it.
#[derive(Debug)]
struct StandIn {
    thread: u32,
    runs: AtomicBool,
    /// What it was told, in order.
    told: Mutex<Vec<&'static str>>,
    quits: Mutex<mpsc::Sender<()>>,
    /// Fails whatever it is told to.
    is_stuck: AtomicBool,
}

impl StandIn {
    fn new() -> (Arc<Self>, mpsc::Receiver<()>) {
        let (quits, quit) = mpsc::channel();
        let vmm = Self {
            thread: rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs(),
            runs: AtomicBool::new(false),
            told: Mutex::default(),
            quits: Mutex::new(quits),
            is_stuck: AtomicBool::new(false),
        };
        (Arc::new(vmm), quit)
    }

    fn tell(&self, what: &'static str, runs: bool) -> Result<(), VmmError> {
        if self.is_stuck.load(Ordering::SeqCst) {
            return Err(VmmError("The vCPU is stuck.".to_owned()));
        }
        self.told.lock().unwrap().push(what);
        self.runs.store(runs, Ordering::SeqCst);
        Ok(())
    }

    fn runs(&self) -> bool {
        self.runs.load(Ordering::SeqCst)
    }
}

impl Vmm for StandIn {
    fn pause(&self) -> Result<(), VmmError> {
        self.tell("pause", false)
    }

    fn resume(&self) -> Result<(), VmmError> {
        self.tell("resume", true)
    }

    fn visit_vcpus(&self, _visit: &mut Visit<'_>) -> Result<(), VmmError> {
        unreachable!("the engine is played by the test")
    }

    fn take_device_writes(&self, _written: &mut dyn FnMut(u64, u64)) {}

    fn vcpu_threads(&self) -> Vec<u32> {
        vec![self.thread]
    }

    fn save_devices(&self) -> Result<Vec<u8>, VmmError> {
        unreachable!("the engine is played by the test")
    }

    fn load_devices(&self, _state: &[u8]) -> Result<(), VmmError> {
        unreachable!("the engine is played by the test")
    }

    fn announce(&self) {
        self.told.lock().unwrap().push("announce");
    }

    fn quit(&self) {
        self.quits.lock().unwrap().send(()).unwrap();
    }
}

/// An engine whose guest becomes small enough when the test says so.
#[derive(Debug, Default)]
struct Engine {
    may_finish: AtomicBool,
    panics: AtomicBool,
}

const ROUND: &[u8] = b"round ";
const REST: &[u8] = b"rest";

impl Mover for Engine {
    fn send(
        &self,
        mut stream: &UnixStream,
        guidance: &Guidance,
        stop: &mut dyn FnMut() -> Result<(), MoveError>,
    ) -> Result<(), MoveError> {
        let broken = |error: std::io::Error| MoveError(format!("The stream broke: {error}."));
        let mut progress = Progress {
            total_bytes: 1 << 20,
            remaining_bytes: 4096,
            bytes_per_second: f64::NAN,
            ..Progress::default()
        };
        while !self.may_finish.load(Ordering::SeqCst) {
            if guidance.is_cancelled() {
                return Err(MoveError("Nobody wants it.".to_owned()));
            }
            stream.write_all(ROUND).map_err(broken)?;
            progress.rounds += 1;
            guidance.set_progress(progress);
            std::thread::park_timeout(Duration::from_millis(1));
        }
        stop()?;
        assert!(!self.panics.load(Ordering::SeqCst), "as the test wants it");
        stream.write_all(REST).map_err(broken)?;
        stream.shutdown(std::net::Shutdown::Write).map_err(broken)
    }

    fn receive(&self, mut stream: &UnixStream) -> Result<(), MoveError> {
        let mut all = Vec::new();
        stream
            .read_to_end(&mut all)
            .map_err(|error| MoveError(error.to_string()))?;
        all.ends_with(REST)
            .then_some(())
            .ok_or_else(|| MoveError("It is of another machine.".to_owned()))
    }

    fn dirty_rate(&self, _period: Duration) -> Result<Option<u64>, MoveError> {
        Ok(Some(3 << 20))
    }
}

/// A VMM with its monitor, on two sockets in a directory of its own.
struct Site {
    monitor: Monitor,
    vmm: Arc<StandIn>,
    engine: Arc<Engine>,
    quit: mpsc::Receiver<()>,
    directory: tempfile::TempDir,
}

impl Site {
    fn new(start: Start) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (vmm, quit) = StandIn::new();
        let engine = Arc::new(Engine::default());
        let paths = ["qmp", "second"].map(|name| directory.path().join(name));
        let monitor = serve(start, paths.to_vec(), &vmm, &engine).unwrap();
        Self {
            monitor,
            vmm,
            engine,
            quit,
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn source(&self) -> SourceVm {
        SourceVm::connect(&self.path("qmp"), SOON).await.unwrap()
    }

    async fn destination(&self) -> DestinationVm {
        DestinationVm::connect(&self.path("qmp"), SOON).await.unwrap()
    }

    /// What a gateway does until memory is on its way; gives its end of the stream.
    async fn leave(&self, vm: &mut SourceVm) -> UnixStream {
        let listener = std::os::unix::net::UnixListener::bind(self.path("stream")).unwrap();
        vm.note_state().await.unwrap();
        vm.prepare(DOWNTIME).await.unwrap();
        vm.migrate(&self.path("stream")).await.unwrap();
        let (stream, _) = listener.accept().unwrap();
        until(async || {
            let progress = vm.progress().await.unwrap();
            progress.status == MigrationStatus::Active && progress.ram.is_some_and(|ram| ram.rounds > 0)
        })
        .await;
        stream
    }

    fn let_finish(&self) {
        self.engine.may_finish.store(true, Ordering::SeqCst);
    }
}

fn serve(start: Start, paths: Vec<PathBuf>, vmm: &Arc<StandIn>, engine: &Arc<Engine>) -> Result<Monitor, MonitorError> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16), (GuestAddress(1 << 20), 1 << 12)]).unwrap();
    let ram = GuestRam::new(memory, &[0, 1]).unwrap();
    let config = MonitorConfig {
        paths,
        name: "demo".to_owned(),
        uuid: Some("5a1d1c70-27a8-4b0f-8b5f-3f4d0a3f3c11".to_owned()),
        cpu_features: vec![CpuFeature {
            leaf: 1,
            subleaf: 0,
            register: CpuRegister::Edx,
            bits: 0x178b_fbff,
        }],
        start,
    };
    let (vmm, engine) = (Arc::clone(vmm), Arc::clone(engine));
    Monitor::serve_moved_by(config, vmm, &ram, engine)
}

async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(SOON, wait).await.expect("in time");
}

fn read_all(mut stream: UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.read_to_end(&mut all).unwrap();
    all
}

#[tokio::test]
async fn a_running_guest_is_handed_over_by_the_gateways_own_steps() {
    let (here, there) = (Site::new(Start::Running), Site::new(Start::Incoming));
    let (mut source, mut destination) = (here.source().await, there.destination().await);
    destination.check_waits().await.unwrap();
    let (left, right) = (
        source.inventory().await.unwrap(),
        destination.inventory().await.unwrap(),
    );
    assert_eq!(qemu::compare(&left, &right), []);
    left.check_limits().unwrap();
    assert_eq!(
        (left.machine.as_str(), left.accelerator.as_str()),
        ("longhaul-kvm", "kvm")
    );
    assert_eq!((left.name.as_deref(), left.vcpus), (Some("demo"), 1));
    assert_eq!((left.base_memory_bytes, left.ram_blocks.len()), (0x11000, 2));
    assert_eq!(
        (left.ram_blocks[0].name.as_str(), left.ram_blocks[0].used_bytes),
        ("ram0", 0x10000)
    );
    assert_eq!(left.cpu.features[0].bits, 0x178b_fbff);
    assert_eq!(source.condition().await.unwrap().refusals(false), []);
    source.block_layer().clean_up().await;
    destination.prepare(&there.path("stream")).await.unwrap();

    let stream = here.leave(&mut source).await;
    source.set_downtime_limit(DOWNTIME * 2).await.unwrap();
    source.set_switchover_bandwidth(1_000_000).await.unwrap();
    assert!(here.vmm.runs());
    here.let_finish();
    let bytes = read_all(stream);
    assert_eq!(
        source.wait_for_permit_conditions(SOON).await.unwrap(),
        PermitConditions::Met
    );
    assert!(!here.vmm.runs());
    assert_eq!(here.monitor.run_state(), RunState::PostMigrate);
    let progress = source.progress().await.unwrap();
    assert!(progress.downtime.is_some() && progress.ram.unwrap().page_size_bytes == 4096);

    let mut into = UnixStream::connect(there.path("stream")).unwrap();
    into.write_all(&bytes).unwrap();
    drop(into);
    let loaded = destination.wait_loaded(SOON).await.unwrap();
    assert_eq!(*loaded.run_state(), qemu::RunState::Paused);
    assert!(!there.vmm.runs() && !there.path("stream").exists());
    destination.cont(&loaded, SOON).await.unwrap();
    assert!(there.vmm.runs());
    destination.announce_self(3).await.unwrap();
    until(async || {
        there
            .vmm
            .told
            .lock()
            .unwrap()
            .iter()
            .filter(|told| **told == "announce")
            .count()
            == 3
    })
    .await;
    destination.restore_settings().await.unwrap();
    assert_eq!(here.vmm.told.lock().unwrap()[..], ["resume", "pause"]);
}

#[tokio::test]
async fn a_migration_that_is_undone_leaves_a_running_guest_running_and_a_paused_one_paused() {
    for (start, undone) in [
        (Start::Running, Undone::Running),
        (Start::Paused, Undone::PausedAsBefore),
    ] {
        let site = Site::new(start);
        let mut vm = site.source().await;
        let stream = site.leave(&mut vm).await;
        assert_eq!(vm.undo(SOON).await.unwrap(), undone);
        assert_eq!(site.vmm.runs(), start == Start::Running);
        assert_eq!(vm.progress().await.unwrap().status, MigrationStatus::Cancelled);
        vm.restore_settings().await.unwrap();
        drop(stream);
        std::fs::remove_file(site.path("stream")).unwrap();
        // And again, to the end and back.
        let stream = site.leave(&mut vm).await;
        site.let_finish();
        read_all(stream);
        assert_eq!(
            vm.wait_for_permit_conditions(SOON).await.unwrap(),
            PermitConditions::Met
        );
        assert!(matches!(vm.cancel(SOON).await, Err(SourceError::CancelTooLate)));
        assert_eq!(vm.undo(SOON).await.unwrap(), undone);
        assert_eq!(site.vmm.runs(), start == Start::Running);
    }
}

#[tokio::test]
async fn a_broken_stream_is_told_with_its_reason_and_the_guest_runs_on() {
    let site = Site::new(Start::Running);
    let mut vm = site.source().await;
    drop(site.leave(&mut vm).await);
    let conditions = vm.wait_for_permit_conditions(SOON).await.unwrap();
    assert!(
        matches!(&conditions, PermitConditions::Failed { error: Some(error), .. } if error.contains("broke")),
        "{conditions}"
    );
    assert!(site.vmm.runs());
    vm.migrate(&site.path("nowhere")).await.unwrap();
    let conditions = vm.wait_for_permit_conditions(SOON).await.unwrap();
    assert!(conditions.to_string().contains("nowhere"), "{conditions}");
    assert_eq!(site.vmm.told.lock().unwrap()[..], ["resume"]);
}

#[tokio::test]
async fn a_guest_that_stands_for_an_engine_that_panics_runs_again() {
    let site = Site::new(Start::Running);
    let mut vm = site.source().await;
    site.engine.panics.store(true, Ordering::SeqCst);
    let stream = site.leave(&mut vm).await;
    site.let_finish();
    read_all(stream);
    let conditions = vm.wait_for_permit_conditions(SOON).await.unwrap();
    assert!(matches!(conditions, PermitConditions::Failed { .. }), "{conditions}");
    assert_eq!(site.vmm.told.lock().unwrap()[..], ["resume", "pause", "resume"]);
}

#[tokio::test]
async fn a_gateway_that_wants_to_be_asked_is_waited_for_with_the_guest_standing() {
    for goes_on in [true, false] {
        let site = Site::new(Start::Running);
        let mut vm = site.source().await;
        let mut events = vm.events();
        vm.note_state().await.unwrap();
        vm.prepare(DOWNTIME).await.unwrap();
        vm.wait_before_switchover().await.unwrap();
        let listener = std::os::unix::net::UnixListener::bind(site.path("stream")).unwrap();
        vm.migrate(&site.path("stream")).await.unwrap();
        let (stream, _) = listener.accept().unwrap();
        site.let_finish();
        let mut heard = Vec::new();
        while heard.last().is_none_or(|last| last != "pre-switchover") {
            let event = events.next().await.unwrap();
            heard.push(event.data["status"].as_str().unwrap_or(&event.name).to_owned());
        }
        assert_eq!(heard, ["setup", "active", "STOP", "pre-switchover"]);
        assert_eq!(site.monitor.run_state(), RunState::FinishMigrate);
        let second = QmpClient::connect(&site.path("second"), SOON).await.unwrap();
        assert!(second.execute("cont", json!({})).await.unwrap_err().is_refusal());
        if goes_on {
            vm.continue_switchover().await.unwrap();
            assert!(read_all(stream).ends_with(REST));
            assert_eq!(
                vm.wait_for_permit_conditions(SOON).await.unwrap(),
                PermitConditions::Met
            );
        } else {
            vm.cancel(SOON).await.unwrap();
            assert!(!read_all(stream).ends_with(REST));
            assert!(site.vmm.runs());
        }
    }
}

#[tokio::test]
async fn a_guest_that_cannot_be_loaded_never_runs() {
    let site = Site::new(Start::Incoming);
    let mut vm = site.destination().await;
    vm.prepare(&site.path("stream")).await.unwrap();
    UnixStream::connect(site.path("stream"))
        .unwrap()
        .write_all(b"of somebody else")
        .unwrap();
    let error = vm.wait_loaded(SOON).await.unwrap_err();
    assert!(
        matches!(&error, DestinationError::LoadFailed { reason } if reason == "It is of another machine."),
        "{error}"
    );
    let second = QmpClient::connect(&site.path("second"), SOON).await.unwrap();
    assert!(second.execute("cont", json!({})).await.unwrap_err().is_refusal());
    assert_eq!(site.monitor.run_state(), RunState::InMigrate);
    assert!(site.vmm.told.lock().unwrap().is_empty());
    let again = vm.prepare(&site.path("stream")).await.unwrap_err();
    assert!(matches!(again, DestinationError::NotDeferred { .. }), "{again}");
}

#[tokio::test]
async fn a_start_that_somebody_has_said_too_early_is_cleared_by_the_gateway_and_else_runs_the_guest_when_it_is_loaded()
{
    for is_late in [false, true] {
        let site = Site::new(Start::Incoming);
        let mut vm = site.destination().await;
        let second = QmpClient::connect(&site.path("second"), SOON).await.unwrap();
        if !is_late {
            second.execute("cont", json!({})).await.unwrap();
        }
        vm.prepare(&site.path("stream")).await.unwrap();
        if is_late {
            second.execute("cont", json!({})).await.unwrap();
        }
        assert!(!site.vmm.runs());
        UnixStream::connect(site.path("stream"))
            .unwrap()
            .write_all(REST)
            .unwrap();
        let loaded = vm.wait_loaded(SOON).await;
        assert_eq!(
            matches!(loaded, Err(DestinationError::StartedByItself)),
            is_late,
            "{loaded:?}"
        );
        assert_eq!(site.vmm.runs(), is_late);
    }
}

#[tokio::test]
async fn the_dirty_rate_is_measured_and_not_while_a_migration_is_under_way() {
    let site = Site::new(Start::Running);
    let mut vm = site.source().await;
    let sample = vm.begin_dirty_rate_sample(Duration::from_secs(1)).await.unwrap();
    let mut rate = None;
    until(async || {
        rate = vm.dirty_rate(sample).await.unwrap();
        rate.is_some()
    })
    .await;
    assert_eq!(rate.unwrap().bytes_per_second, 3 << 20);
    let _stream = site.leave(&mut vm).await;
    assert!(vm.begin_dirty_rate_sample(SOON).await.is_err());
}

#[tokio::test]
async fn a_guest_that_shuts_down_is_told_and_its_migration_fails() {
    let site = Site::new(Start::Running);
    let mut vm = site.source().await;
    let mut events = vm.events();
    let _stream = site.leave(&mut vm).await;
    site.monitor.guest_shut_down();
    site.monitor.guest_shut_down();
    let conditions = vm.wait_for_permit_conditions(SOON).await.unwrap();
    assert!(
        conditions.to_string().contains("The guest has shut down."),
        "{conditions}"
    );
    assert_eq!(site.monitor.run_state(), RunState::Shutdown);
    while events.next().await.unwrap().name != "SHUTDOWN" {}
    assert_eq!(events.next().await.unwrap().name, "STOP");
    assert!(vm.resume(SOON).await.is_err());
    assert!(!site.vmm.runs());
}

#[tokio::test]
async fn a_vcpu_that_is_stuck_is_told_to_whoever_asked_and_the_state_stays_true() {
    let site = Site::new(Start::Running);
    let client = QmpClient::connect(&site.path("qmp"), SOON).await.unwrap();
    site.vmm.is_stuck.store(true, Ordering::SeqCst);
    let error = client.execute("stop", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("The vCPU is stuck."), "{error}");
    assert_eq!(site.monitor.run_state(), RunState::Running);
    site.vmm.is_stuck.store(false, Ordering::SeqCst);
    client.execute("stop", json!({})).await.unwrap();
    site.vmm.is_stuck.store(true, Ordering::SeqCst);
    assert!(client.execute("cont", json!({})).await.unwrap_err().is_refusal());
    assert_eq!(site.monitor.run_state(), RunState::Paused);
    let history = client.drain().await.unwrap().history;
    assert_eq!((history.stops, history.resumes, history.resumed_last), (2, 1, false));
}

#[test]
fn a_guest_that_cannot_be_started_has_no_monitor() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let (vmm, _quit) = StandIn::new();
    vmm.is_stuck.store(true, Ordering::SeqCst);
    let error = serve(Start::Running, vec![path.clone()], &vmm, &Arc::default()).unwrap_err();
    assert_eq!(error.to_string(), "The guest could not be started: The vCPU is stuck.");
    assert!(!path.exists());
}

#[tokio::test]
async fn quit_is_answered_before_the_vmm_ends() {
    let site = Site::new(Start::Running);
    let client = QmpClient::connect(&site.path("qmp"), SOON).await.unwrap();
    let second = QmpClient::connect(&site.path("second"), SOON).await.unwrap();
    client.execute("quit", json!({})).await.unwrap();
    site.quit.recv_timeout(SOON).unwrap();
    second.execute("query-status", json!({})).await.unwrap();
    assert!(site.quit.try_recv().is_err());
}

/// A client that says what it likes.
struct Raw {
    socket: UnixStream,
    said: Vec<u8>,
}

impl Raw {
    fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        let mut raw = Self {
            socket,
            said: Vec::new(),
        };
        assert!(raw.next().unwrap()["QMP"]["version"]["qemu"]["major"].is_number());
        raw
    }

    /// The next message; `None` at the end.
    fn next(&mut self) -> Option<Value> {
        while !self.said.contains(&b'\n') {
            let mut buffer = [0; 4096];
            match self.socket.read(&mut buffer) {
                Ok(0) => return None,
                Ok(length) => self.said.extend(&buffer[..length]),
                // What was not read when the session ended.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
        let end = self.said.iter().position(|byte| *byte == b'\n').unwrap();
        let line: Vec<u8> = self.said.drain(..=end).collect();
        Some(serde_json::from_slice(&line).unwrap())
    }

    fn ask(&mut self, text: &str) -> Value {
        self.socket.write_all(text.as_bytes()).unwrap();
        self.next().unwrap()
    }

    fn negotiated(path: &Path) -> Self {
        let mut raw = Self::connect(path);
        assert_eq!(raw.ask(r#"{"execute": "qmp_capabilities"}"#), json!({ "return": {} }));
        raw
    }
}

#[test]
fn commands_are_negotiated_first_and_answered_in_order_with_their_ids() {
    let site = Site::new(Start::Paused);
    let mut raw = Raw::connect(&site.path("qmp"));
    let refused = |answer: &Value| answer["error"]["class"].as_str().map(str::to_owned);
    let early = raw.ask(r#"{"execute": "query-status", "id": "early"}"#);
    assert_eq!(
        (refused(&early).as_deref(), &early["id"]),
        (Some("CommandNotFound"), &json!("early"))
    );
    raw.ask(r#"{"execute": "qmp_capabilities", "arguments": {"enable": []}}"#);
    let late = raw.ask(r#"{"execute": "qmp_capabilities"}"#);
    assert_eq!(refused(&late).as_deref(), Some("CommandNotFound"));
    let status = raw.ask("  {\"execute\":\n\"query-status\", \"id\": {\"a\": [1]}} {\"execute\": \"query-version\"}{");
    assert_eq!(
        status,
        json!({ "return": { "status": "paused", "running": false }, "id": { "a": [1] } })
    );
    assert!(
        raw.next().unwrap()["return"]["package"]
            .as_str()
            .unwrap()
            .contains("longhaul")
    );
    let unknown = raw.ask(r#""execute": "blockdev-add", "id": 1}"#);
    assert_eq!(
        (refused(&unknown).as_deref(), &unknown["id"]),
        (Some("CommandNotFound"), &json!(1))
    );
    for (text, part) in [
        (r#"{"execute": "stop", "arguments": {"now": true}}"#, "now"),
        (
            r#"{"execute": "migrate", "arguments": {"uri": "tcp:0:1"}}"#,
            "unix:PATH",
        ),
        (
            r#"{"execute": "migrate-incoming", "arguments": {"uri": "unix:/x"}}"#,
            "wait for one",
        ),
        (
            r#"{"execute": "migrate-continue", "arguments": {"state": "pre-switchover"}}"#,
            "pre-switchover",
        ),
        (
            r#"{"execute": "calc-dirty-rate", "arguments": {"calc-time": 61}}"#,
            "60",
        ),
        (
            r#"{"execute": "qom-get", "arguments": {"path": "/machine", "property": "x"}}"#,
            "no property",
        ),
        (r#"{"exec-oob": "stop"}"#, "execute"),
        (r#"{"execute": "stop", "more": 1}"#, "only"),
    ] {
        let answer = raw.ask(text);
        assert_eq!(refused(&answer).as_deref(), Some("GenericError"), "{answer}");
        assert!(answer["error"]["desc"].as_str().unwrap().contains(part), "{answer}");
    }
}

#[test]
fn what_is_no_command_ends_that_session_alone() {
    let site = Site::new(Start::Running);
    let mut other = Raw::negotiated(&site.path("qmp"));
    let endless = format!("{{\"execute\": \"{}", "x".repeat(2 << 20));
    let deep = "[".repeat(1000);
    for text in ["}", "{]", "\u{7f}", &endless, &deep] {
        let mut raw = Raw::negotiated(&site.path("second"));
        // It may have ended before all was said.
        let _ = raw.socket.write_all(text.as_bytes());
        if let Some(answer) = raw.next() {
            assert_eq!(answer["error"]["class"], "GenericError", "{answer}");
            assert_eq!(raw.next(), None);
        }
    }
    assert_eq!(other.ask(r#"{"execute": "query-status"}"#)["return"]["running"], true);
}

#[test]
fn every_session_hears_events_in_order_and_one_that_does_not_read_holds_up_nobody() {
    let site = Site::new(Start::Running);
    let mut clients = [
        Raw::negotiated(&site.path("qmp")),
        Raw::negotiated(&site.path("second")),
    ];
    let idle = Raw::negotiated(&site.path("qmp"));
    let mut busy = Raw::negotiated(&site.path("qmp"));
    for _ in 0..2000 {
        for (command, event) in [("stop", "STOP"), ("cont", "RESUME")] {
            let told = busy.ask(&format!("{{\"execute\": \"{command}\"}}"));
            assert_eq!(told["event"], event);
            assert!(told["timestamp"]["seconds"].is_u64());
            assert_eq!(busy.next().unwrap(), json!({ "return": {} }));
            for client in &mut clients {
                assert_eq!(client.next().unwrap()["event"], event);
            }
        }
    }
    assert!(site.vmm.runs());
    // What it could not be told in time was told to it by its end.
    let mut idle = idle;
    let heard = std::iter::from_fn(|| idle.next()).count();
    assert!((1..4000).contains(&heard), "{heard}");
}

#[test]
fn dropping_it_ends_sessions_and_a_migration_and_removes_the_sockets() {
    let site = Site::new(Start::Running);
    let mut raw = Raw::negotiated(&site.path("qmp"));
    let listener = std::os::unix::net::UnixListener::bind(site.path("stream")).unwrap();
    let uri = format!("unix:{}", site.path("stream").display());
    raw.ask(&json!({ "execute": "migrate", "arguments": { "uri": uri } }).to_string());
    let (stream, _) = listener.accept().unwrap();
    site.let_finish();
    let paths = ["qmp", "second"].map(|name| site.path(name));
    let Site {
        monitor,
        vmm,
        directory,
        ..
    } = site;
    let again = serve(Start::Paused, paths.to_vec(), &vmm, &Arc::new(Engine::default()));
    assert!(
        matches!(again, Err(MonitorError::Listen(ListenError::InUse { .. }))),
        "{again:?}"
    );
    drop(monitor);
    while raw.next().is_some() {}
    drop(stream);
    assert!(paths.iter().all(|path| !path.exists()));
    drop(directory);
}

#[test]
fn dropping_it_ends_the_waiting_for_a_guest() {
    let waits = Site::new(Start::Incoming);
    let mut raw = Raw::negotiated(&waits.path("qmp"));
    let uri = format!("unix:{}", waits.path("stream").display());
    raw.ask(&json!({ "execute": "migrate-incoming", "arguments": { "uri": uri } }).to_string());
    drop(waits);
}

/// A VMM in a process of its own, which a test can freeze.
struct Elsewhere(Child);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const ELSEWHERE: &str = "LONGHAUL_TEST_MONITOR";

impl Elsewhere {
    async fn new(directory: &Path) -> Self {
        let name = module_path!().split_once("::").unwrap().1;
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("{name}::a_vmm_for_another_test")])
            .env(ELSEWHERE, directory)
            .stdout(Stdio::null())
            // Whoever waits for the end of these tests' output does not wait for it.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        until(async || UnixStream::connect(directory.join("second")).is_ok()).await;
        Self(child)
    }
}

#[test]
fn a_vmm_for_another_test() {
    let Some(directory) = std::env::var_os(ELSEWHERE).map(PathBuf::from) else {
        return;
    };
    let (vmm, quit) = StandIn::new();
    let engine = Arc::new(Engine::default());
    engine.may_finish.store(true, Ordering::SeqCst);
    let paths = ["qmp", "second"].map(|name| directory.join(name));
    let monitor = serve(Start::Running, paths.to_vec(), &vmm, &engine).unwrap();
    // Not for ever: the other test may have been killed.
    quit.recv_timeout(2 * SOON).unwrap();
    drop(monitor);
}

/// Sends the guest of a process of its own away.
async fn handed_over(directory: &Path) -> (Elsewhere, SourceVm) {
    let process = Elsewhere::new(directory).await;
    let mut vm = SourceVm::connect(&directory.join("qmp"), SOON).await.unwrap();
    let listener = std::os::unix::net::UnixListener::bind(directory.join("stream")).unwrap();
    vm.note_state().await.unwrap();
    vm.prepare(DOWNTIME).await.unwrap();
    vm.migrate(&directory.join("stream")).await.unwrap();
    read_all(listener.accept().unwrap().0);
    assert_eq!(
        vm.wait_for_permit_conditions(SOON).await.unwrap(),
        PermitConditions::Met
    );
    (process, vm)
}

#[tokio::test]
async fn a_source_is_frozen_thawed_and_runs_again_or_quits() {
    let directory = tempfile::tempdir().unwrap();
    let (mut process, vm) = handed_over(directory.path()).await;
    let frozen = vm.freeze().await.unwrap();
    assert!(frozen.is_still_frozen().unwrap());
    frozen.thaw().await.unwrap();
    assert_eq!(vm.run_state().await.unwrap(), qemu::RunState::PostMigrate);
    assert_eq!(vm.undo(SOON).await.unwrap(), Undone::Running);
    vm.quit(SOON).await.unwrap();
    assert!(process.0.wait().unwrap().success());
    assert!(!directory.path().join("qmp").exists());
}

#[tokio::test]
async fn a_source_that_somebody_else_resumes_is_never_frozen() {
    let mut frozen = 0;
    for delay in 0..32 {
        let directory = tempfile::tempdir().unwrap();
        let (_process, vm) = handed_over(directory.path()).await;
        let second = QmpClient::connect(&directory.path().join("second"), SOON)
            .await
            .unwrap();
        let resume = tokio::spawn(async move {
            for _ in 0..delay {
                tokio::task::yield_now().await;
            }
            second.execute("cont", json!({})).await
        });
        match vm.freeze().await {
            // It came too late, and waits in the socket of a process that stands.
            Ok(freezer) => {
                assert!(freezer.is_still_frozen().unwrap() && !resume.is_finished());
                resume.abort();
                frozen += 1;
            }
            Err(FreezeError::Resumed | FreezeError::NotReady(PermitConditions::Disturbed { .. })) => {
                resume.await.unwrap().unwrap();
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    eprintln!("{frozen} of 32 were frozen before somebody resumed them");
}
