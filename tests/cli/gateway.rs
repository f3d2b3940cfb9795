//! A gateway that answers as a test says, on a real control socket, and the command that talks to it.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use longhaul::api::{self, ControlSocket, Event, Forecast, Outcome, Pages, Phase, Progress, Report, Round};
use longhaul::proto::page::MigrationId;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Anything that takes longer has hung.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) const ID: MigrationId = MigrationId([0x5a; 16]);

/// A control socket behind which `script` answers every command. Dropping it is the death of the gateway.
pub(crate) struct Gateway {
    runtime: Option<tokio::runtime::Runtime>,
    socket: PathBuf,
}

impl Gateway {
    pub(crate) fn on(directory: &TempDir, mut script: impl FnMut(api::Command) + Send + 'static) -> Self {
        let socket = directory.path().join("control.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let bound = runtime.block_on(async { ControlSocket::bind(&socket) }).unwrap();
        let (commands, mut requests) = tokio::sync::mpsc::channel(8);
        runtime.spawn(api::serve(bound, commands, std::future::pending()));
        runtime.spawn(async move {
            while let Some(command) = requests.recv().await {
                script(command);
            }
        });
        Self {
            runtime: Some(runtime),
            socket,
        }
    }

    /// Output of `longhaul ARGS` against this gateway.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        longhaul(args, &self.socket).stdin(Stdio::null()).output().unwrap()
    }

    /// `longhaul ARGS` against this gateway, while it runs.
    pub(crate) fn start(&self, args: &[&str]) -> Running {
        Running::new(longhaul(args, &self.socket))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // Waits for the tasks, so that the lock on the socket is free afterwards.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(DEADLINE);
        }
    }
}

pub(crate) fn longhaul(args: &[&str], socket: &Path) -> Command {
    let mut command = plain(args);
    command.arg("--socket").arg(socket);
    command
}

/// `longhaul ARGS` with nothing of our own environment in its way.
pub(crate) fn plain(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command.args(args);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LONGHAUL_")) {
        command.env_remove(name);
    }
    command
}

/// A command whose stderr is read while it runs. Killed when dropped.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Running {
    fn new(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it is built");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// Waits for a line of stderr that contains `text`.
    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) {
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(line) if line.contains(text) => return,
                Ok(line) => seen.push(line),
                Err(error) => panic!("{text:?} was not said ({error}), but: {seen:#?}"),
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Exit code and what is left of stderr.
    pub(crate) fn finish(mut self) -> (Option<i32>, String) {
        // The end of stderr is the end of the process; only then it is waited for, so this cannot hang.
        let mut rest = String::new();
        loop {
            match self.lines.recv_timeout(DEADLINE) {
                Ok(line) => {
                    rest.push_str(&line);
                    rest.push('\n');
                }
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("it does not end; it said: {rest}"),
            }
        }
        (self.child.wait().unwrap().code(), rest)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn progress(phase: Phase, round: u32, percent: f64) -> Event {
    Event::Progress(Progress {
        migration: ID,
        vm: "db-1".into(),
        peer: "tokyo".into(),
        phase,
        round,
        percent,
        elapsed_seconds: 1.0,
        wire_bytes_per_second: 93_125_000.0,
        reduction_ratio: 4.2,
        dirty_bytes_per_second: 8_100_000.0,
        remaining_bytes: 1 << 20,
        backlog_bytes: 0,
        expected_downtime_seconds: 0.2,
        eta_seconds: Some(12.0),
        eta_reason: None,
        converging: true,
    })
}

pub(crate) fn report(outcome: Outcome) -> Event {
    Event::Report(Box::new(Report {
        migration: ID,
        vm: "db-1".into(),
        peer: "tokyo".into(),
        outcome,
        reason: "because the test says so".into(),
        total_seconds: 12.3,
        downtime_seconds: (outcome == Outcome::Completed).then_some(0.21),
        rounds: vec![Round {
            number: 1,
            seconds: 3.0,
            vmm_bytes: 1000,
            wire_bytes: 100,
            dirty_bytes: 10,
        }],
        vmm_bytes: 1_020_000_000,
        wire_bytes: 91_200_000,
        resent_bytes: 0,
        reduction_ratio: 11.2,
        known_pages: 0,
        disks: None,
        pages: Pages {
            zero: 1,
            same: 2,
            reference: 3,
            delta: 4,
            literal: 5,
            raw: 6,
        },
        stream_digest: Some("ab".repeat(32)),
        continued_as: None,
        forecast: Some(forecast(true)),
    }))
}

pub(crate) fn forecast(converges: bool) -> Forecast {
    Forecast {
        total_seconds: 11.9,
        wire_bytes: 90_000_000,
        downtime_seconds: 0.23,
        dirty_bytes_per_second: 8_000_000.0,
        dirty_rate_known: true,
        converges,
        reason: "the link carries ten times what the guest dirties".into(),
    }
}
