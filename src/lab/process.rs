//! Processes of the lab: started in a network namespace, ended by id, none left behind.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tokio::process::{Child, Command};

use crate::hypervisor::process::WITH_ITS_PARENT;

/// A process that runs beside the lab and is killed with it.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `argv` in `namespace` (`None`: the host's), what it says going to `log`.
    pub(super) fn spawn(
        name: &str,
        namespace: Option<&str>,
        argv: &[String],
        log: &Path,
    ) -> Result<Self, ProcessError> {
        let failed = |source| ProcessError::Unstarted {
            name: name.to_owned(),
            source,
        };
        let out = std::fs::File::create(log).map_err(failed)?;
        let errors = out.try_clone().map_err(failed)?;
        let mut words: Vec<&str> = match namespace {
            Some(namespace) => vec!["ip", "netns", "exec", namespace],
            None => vec![],
        };
        words.extend(WITH_ITS_PARENT);
        words.extend(argv.iter().map(String::as_str));
        let child = Command::new(words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(errors)
            // Ctrl-C is for the lab, which then ends them in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            child,
        })
    }

    /// Fails where the process has ended, with the last lines that it said.
    pub(super) fn check(&mut self) -> Result<(), ProcessError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.ended_with(status)),
            Err(source) => Err(ProcessError::Unstarted {
                name: self.name.clone(),
                source,
            }),
        }
    }

    /// Waits until the process has ended, which it should not: with the last lines that it said.
    pub(super) async fn ended(&mut self) -> ProcessError {
        match self.wait().await {
            Ok(status) => self.ended_with(status),
            Err(error) => error,
        }
    }

    fn ended_with(&self, status: ExitStatus) -> ProcessError {
        ProcessError::Ended {
            name: self.name.clone(),
            status,
            said: self.said(),
        }
    }

    /// Its process id, as long as it has not been waited for.
    pub(super) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// A descriptor of the process, which means no other one even when this one has ended.
    pub(super) fn descriptor(&self) -> Result<OwnedFd, ProcessError> {
        let failed = |source| ProcessError::Unstarted {
            name: self.name.clone(),
            source,
        };
        let pid = self.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let pid = pid.ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.into()))
    }

    /// Waits until the process has ended.
    pub(super) async fn wait(&mut self) -> Result<ExitStatus, ProcessError> {
        self.child.wait().await.map_err(|source| ProcessError::Unstarted {
            name: self.name.clone(),
            source,
        })
    }

    /// The last lines that the process said.
    pub(super) fn said(&self) -> String {
        last_lines(&self.log)
    }

    /// Kills the process where it still runs, and waits until it is gone.
    pub(super) async fn kill(mut self) {
        // Fails only for a process that has been waited for.
        let _ = self.child.kill().await;
    }
}

/// Runs `argv` on the host to its end and returns its standard output.
pub(super) async fn run(argv: &[&str]) -> Result<String, ProcessError> {
    let output = output(argv).await?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    Err(ProcessError::Ended {
        name: argv.join(" "),
        status: output.status,
        said,
    })
}

/// Runs `argv` on the host to its end, whatever that is. It is killed where the caller gives up waiting.
pub(super) async fn output(argv: &[&str]) -> Result<std::process::Output, ProcessError> {
    let name = argv.first().copied().unwrap_or_default();
    Command::new(WITH_ITS_PARENT[0])
        .args(&WITH_ITS_PARENT[1..])
        .args(argv)
        .stdin(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| ProcessError::Unstarted {
            name: name.to_owned(),
            source,
        })
}

/// Kills the processes of a namespace whose command line contains `marker`, and waits until they are gone. Those that a
/// gateway started are nobody's children here.
pub(super) async fn kill_in_namespace(namespace: &str, marker: &str) {
    for _ in 0..200 {
        let Ok(listed) = run(&["ip", "netns", "pids", namespace]).await else {
            return;
        };
        let ours: Vec<i32> = listed
            .split_ascii_whitespace()
            .filter_map(|word| word.parse().ok())
            .filter(|process: &i32| {
                let command_line = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&command_line).contains(marker)
            })
            .collect();
        if ours.is_empty() {
            return;
        }
        for process in ours.into_iter().filter_map(Pid::from_raw) {
            // One that has ended meanwhile needs nothing.
            let _ = kill_process(process, Signal::KILL);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

const LAST_LINES: usize = 20;

/// A process did not do what it was started for.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("cannot run {name}: {source}")]
    Unstarted {
        /// The program.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It ended, and should not have, or not so.
    #[error("{name} ended ({status}): {said}")]
    Ended {
        /// The program or its role.
        name: String,
        /// How.
        status: ExitStatus,
        /// Its last words.
        said: String,
    },
}
