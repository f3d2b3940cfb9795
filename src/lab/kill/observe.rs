//! The outside observer of the QEMU at one site: when its vCPUs ran, by the events of a monitor that is the lab's own.
//!
//! QEMU sends `RESUME` before it starts a vCPU and `STOP` after it has stopped all of them, each with the host's time, so what
//! lies between is never shorter than what ran. A QEMU whose process has ended runs nothing.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::Value;

/// Microseconds since the Unix epoch, of this host's one clock: what QEMU puts on its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct WallTime(pub(super) u64);

impl WallTime {
    #[expect(clippy::disallowed_methods, reason = "the lab measures real time")]
    pub(super) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    /// Seconds since `earlier`; 0 where it is not earlier.
    pub(super) fn seconds_since(self, earlier: Self) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 / 1e6
    }
}

/// A time during which vCPUs ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) from: WallTime,
    /// `None`: they still run.
    pub(super) until: Option<WallTime>,
}

/// What was seen of the QEMUs of one site.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Every time their vCPUs ran, in order.
    pub(super) runs: Vec<Run>,
    /// A QEMU has answered.
    pub(super) met: bool,
    /// The last one was there and has gone.
    pub(super) ended: bool,
    /// One ran before it was watched: from then on is not all there was.
    pub(super) met_late: bool,
}

impl Seen {
    /// Whether vCPUs run now, as far as QEMU has said.
    pub(super) fn is_running(&self) -> bool {
        self.runs.last().is_some_and(|run| run.until.is_none())
    }

    fn resume(&mut self, at: WallTime) {
        if !self.is_running() {
            self.runs.push(Run { from: at, until: None });
        }
    }

    fn stop(&mut self, at: WallTime) {
        if let Some(run) = self.runs.last_mut() {
            run.until.get_or_insert(at);
        }
    }
}

/// Watches each QEMU that will serve a socket, one after the other. Stops watching when dropped.
pub(super) struct Observer {
    seen: Arc<Mutex<Seen>>,
    process: Arc<OnceLock<OwnedFd>>,
    leaving: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What a QEMU has said and somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The vCPUs stand.
    Stopped,
    /// The dirty pages are sent for this time; the first time it is all pages.
    Pass(u64),
}

impl Observer {
    /// Watches from a thread of its own, so that nothing waits for other tasks. `boots`: the guest runs from the start.
    /// `hear` is called with what QEMU says, at once.
    pub(super) fn start(socket: &Path, boots: bool, hear: impl Fn(Said) + Send + 'static) -> std::io::Result<Self> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let process = Arc::new(OnceLock::new());
        let leaving = Arc::new(AtomicBool::new(false));
        let watcher = Watcher {
            socket: socket.to_owned(),
            boots,
            seen: Arc::clone(&seen),
            process: Arc::clone(&process),
            leaving: Arc::clone(&leaving),
        };
        let thread = std::thread::Builder::new()
            .name("observer".to_owned())
            .spawn(move || watcher.watch(&hear))?;
        Ok(Self {
            seen,
            process,
            leaving,
            thread: Some(thread),
        })
    }

    /// What was seen so far.
    pub(super) fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// The first process that is watched, once there is one.
    pub(super) fn process(&self) -> Arc<OnceLock<OwnedFd>> {
        Arc::clone(&self.process)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.leaving.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It looks at `leaving` ten times a second; a panic there was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

struct Watcher {
    socket: PathBuf,
    boots: bool,
    seen: Arc<Mutex<Seen>>,
    process: Arc<OnceLock<OwnedFd>>,
    leaving: Arc<AtomicBool>,
}

impl Watcher {
    fn watch(&self, hear: &dyn Fn(Said)) {
        while !self.is_leaving() {
            match UnixStream::connect(&self.socket) {
                // One that closes before it has said anything was not ready, or is the socket of one that is ending.
                Ok(stream) => {
                    let _ = self.listen(stream, hear);
                    let mut seen = lock(&self.seen);
                    if seen.met {
                        seen.ended = true;
                        seen.stop(WallTime::now());
                    }
                }
                Err(_) => pause(Duration::from_millis(1)),
            }
        }
    }

    /// Follows one connection to its end.
    fn listen(&self, stream: UnixStream, hear: &dyn Fn(Said)) -> std::io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        // While it is connected its id is its own.
        let pid = socket_peercred(&stream)?.pid;
        let mut process = Some(pidfd_open(pid, PidfdFlags::empty())?);
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while !self.is_leaving() {
            match reader.read_line(&mut line) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // What came before the timeout stays in `line`.
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error),
            }
            let message: Value = serde_json::from_str(&line)?;
            line.clear();
            if message.get("QMP").is_some() {
                writer.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\"}\n")?;
            } else if let Some(running) = message["return"]["running"].as_bool() {
                let mut seen = lock(&self.seen);
                seen.met = true;
                seen.ended = false;
                if let Some(process) = process.take() {
                    let _ = self.process.set(process);
                }
                if running && !seen.is_running() {
                    seen.met_late |= !self.boots;
                    seen.resume(WallTime::now());
                }
            } else if let Some(name) = message["event"].as_str() {
                let at = time_of(&message).unwrap_or_else(WallTime::now);
                match name {
                    "RESUME" => lock(&self.seen).resume(at),
                    "STOP" => {
                        hear(Said::Stopped);
                        lock(&self.seen).stop(at);
                    }
                    "MIGRATION_PASS" => hear(Said::Pass(message["data"]["pass"].as_u64().unwrap_or_default())),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }
}

fn time_of(event: &Value) -> Option<WallTime> {
    let seconds = event["timestamp"]["seconds"].as_u64()?;
    let microseconds = event["timestamp"]["microseconds"].as_u64()?;
    Some(WallTime(seconds.checked_mul(1_000_000)?.checked_add(microseconds)?))
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own waits for a socket to appear"
)]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most copies that ran at the same time: 1 is what is promised.
pub(super) fn most_at_once(copies: &[&[Run]]) -> usize {
    let runs = copies.iter().flat_map(|runs| runs.iter());
    let mut steps: Vec<(WallTime, bool)> = Vec::new();
    for run in runs {
        steps.push((run.from, true));
        if let Some(until) = run.until {
            steps.push((until, false));
        }
    }
    // At one and the same microsecond an end comes before a beginning: false sorts before true.
    steps.sort();
    let (mut now, mut most) = (0_usize, 0);
    for (_, begins) in steps {
        now = if begins { now + 1 } else { now.saturating_sub(1) };
        most = most.max(now);
    }
    most
}

/// The longest time from `from` on during which no copy ran, and after which one did.
pub(super) fn longest_standstill(copies: &[&[Run]], from: WallTime) -> f64 {
    let mut runs: Vec<&Run> = copies.iter().flat_map(|runs| runs.iter()).collect();
    runs.sort_by_key(|run| run.from);
    let mut stood_from = from;
    let mut longest: f64 = 0.0;
    for run in runs {
        longest = longest.max(run.from.seconds_since(stood_from));
        match run.until {
            Some(until) => stood_from = stood_from.max(until),
            None => break,
        }
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(from: u64, until: Option<u64>) -> Run {
        Run {
            from: WallTime(from),
            until: until.map(WallTime),
        }
    }

    #[test]
    fn copies_that_follow_each_other_are_one_and_copies_that_overlap_are_two() {
        assert_eq!(most_at_once(&[&[], &[]]), 0);
        assert_eq!(most_at_once(&[&[run(1, Some(5))], &[run(5, None)]]), 1);
        assert_eq!(most_at_once(&[&[run(1, Some(6))], &[run(5, None)]]), 2);
        assert_eq!(most_at_once(&[&[run(1, Some(4)), run(8, None)], &[run(5, Some(9))]]), 2);
        assert_eq!(most_at_once(&[&[run(1, None)], &[run(5, Some(6))]]), 2);
    }

    #[test]
    fn a_guest_stands_still_from_when_all_is_well_again_until_a_copy_runs() {
        let second = |at: f64| WallTime((at * 1e6) as u64);
        let run = |from, until: Option<f64>| Run {
            from: second(from),
            until: until.map(second),
        };
        let stood = |copies: &[&[Run]], from| longest_standstill(copies, second(from));
        // It ran all the time; it came back after a second; it came back before and moved later in half a second.
        assert_eq!(stood(&[&[run(1.0, None)], &[]], 5.0), 0.0);
        assert_eq!(stood(&[&[run(1.0, Some(4.0)), run(6.0, None)], &[]], 5.0), 1.0);
        assert_eq!(stood(&[&[run(1.0, Some(7.0))], &[run(7.5, None)]], 5.0), 0.5);
    }

    #[test]
    fn an_observer_notes_what_a_monitor_tells_and_calls_at_once_when_the_guest_stands() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let stopped = Arc::new(AtomicBool::new(false));
        let seen_stop = Arc::clone(&stopped);
        let observer = Observer::start(&path, true, move |said| {
            assert_eq!(said, Said::Stopped);
            seen_stop.store(true, Ordering::SeqCst);
        })
        .unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut writer = stream.try_clone().unwrap();
        let mut lines = BufReader::new(stream).lines();
        writeln!(writer, "{{\"QMP\": {{}}}}").unwrap();
        assert!(lines.next().unwrap().unwrap().contains("qmp_capabilities"));
        assert!(lines.next().unwrap().unwrap().contains("query-status"));
        writeln!(writer, "{{\"return\": {{}}}}\n{{\"return\": {{\"running\": true}}}}").unwrap();
        writeln!(
            writer,
            "{{\"event\": \"STOP\", \"timestamp\": {{\"seconds\": 9999999999, \"microseconds\": 7}}}}"
        )
        .unwrap();
        drop((writer, lines, listener));
        while !observer.seen().ended {
            std::thread::yield_now();
        }
        let seen = observer.seen();
        assert!(stopped.load(Ordering::SeqCst));
        assert!(seen.met && !seen.met_late && !seen.is_running());
        assert_eq!(seen.runs.len(), 1);
        assert_eq!(seen.runs[0].until, Some(WallTime(9_999_999_999_000_007)));
    }
}
