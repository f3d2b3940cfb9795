//! Processes of a test: commands with what they said, and everybody who has the rig's folder in the command line.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Pid, Signal, kill_process};

use super::{until, until_some};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A process whose output goes to files. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    what: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// What a process left.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Running {
    pub(crate) fn start(mut command: Command, folder: &Path) -> Self {
        let what = format!("{command:?}");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let stdout = folder.join(format!("{number}.out"));
        let stderr = folder.join(format!("{number}.err"));
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        Self {
            child,
            what,
            stdout,
            stderr,
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn stdout(&self) -> String {
        std::fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(self.child.id(), signal);
    }

    /// Waits for its end; what it said is in the answer and nowhere else any more.
    #[track_caller]
    pub(crate) fn wait(mut self) -> Ended {
        let what = format!("{} ends", self.what);
        let status = until_some(&what, || self.child.try_wait().unwrap());
        Ended {
            code: status.code(),
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended needs nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Its standard output as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends a signal to a process that still runs or has just ended.
pub(crate) fn send(process: u32, signal: Signal) {
    let id = Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    let _ = kill_process(id, signal);
}

/// Ids and command lines of processes with `marker` in the command line, but this one.
pub(crate) fn processes_of(marker: &Path) -> Vec<(u32, String)> {
    let marker = marker.to_str().unwrap();
    let own = std::process::id();
    let ids = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| *id != own)
        .filter_map(|id: u32| {
            let bytes = std::fs::read(format!("/proc/{id}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
            line.contains(marker).then_some((id, line))
        })
        .collect()
}

/// Kills everybody with `marker` in the command line and waits until they are gone.
pub(crate) fn kill_all(marker: &Path) {
    for (id, _) in processes_of(marker) {
        send(id, Signal::KILL);
    }
    if !std::thread::panicking() {
        until("killed processes are gone", || processes_of(marker).is_empty());
    }
}
