//! Starting a destination QEMU from an argv template of the operator.
//!
//! No shell is involved, and of what comes from the peer only the VM's name enters, which is validated. The process gets a
//! session of its own (`setsid` of util-linux, so that its pid stays ours to watch), no input, and a log file for its output:
//! it survives the gateway and is found again by its identity. Under systemd the gateway's unit needs `KillMode=process`.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use super::output::{Output, create_log, keep_log_bounded};
use super::owner::{OwnerError, owner};
use super::template::{LaunchTemplate, LaunchValues};
use crate::hypervisor::image_lock;
use crate::hypervisor::process::{Process, ProcessError};
use crate::hypervisor::qmp::{QmpClient, QmpError};

/// Everything needed to start a destination.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The command.
    pub template: LaunchTemplate,
    /// Its values.
    pub values: LaunchValues,
    /// Where its output goes; replaced if it exists, created with mode 0600, cut whenever it exceeds 1 MiB.
    pub log: PathBuf,
    /// How long it may take until its monitor answers.
    pub ready_within: Duration,
}

/// Why a destination did not come up. Nothing of it is left running.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Something answers on the path already.
    #[error("The monitor socket {} is in use by another process; is the VM running here already?", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The log file.
    #[error("The log file {} cannot be written: {source}.", path.display())]
    Log {
        /// The path.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The process could not be created at all.
    #[error("The destination's command cannot be started (it needs `setsid` of util-linux): {source}.")]
    Spawn {
        /// The reason.
        source: std::io::Error,
    },
    /// It ended before its monitor answered.
    #[error(
        "The destination's command {program} ended before its monitor answered ({ending}).{}",
        lock.as_ref().map(|lock| format!(" {lock}")).unwrap_or_default()
    )]
    Ended {
        /// Its program.
        program: String,
        /// Exit status and the end of its output.
        ending: String,
        /// Where it was for the lock of an image: who holds that, and what to do.
        lock: Option<String>,
    },
    /// Its monitor does not answer.
    #[error(
        "The destination's command {program} runs, but its monitor did not answer within {waited:?}: {last} {output}"
    )]
    NotReady {
        /// Its program.
        program: String,
        /// How long was waited.
        waited: Duration,
        /// What was wrong with the monitor at last.
        last: String,
        /// The end of its output.
        output: String,
    },
    /// Another process answers.
    #[error("The monitor {} is answered by the process {pid}, which the destination's command did not start.", path.display())]
    ForeignProcess {
        /// The path.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// The process behind the monitor.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// A started destination whose monitor answers.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) qmp: QmpClient,
    pub(super) process: Process,
    pub(super) output: Output,
}

/// Starts the command and waits until its monitor answers.
pub(super) async fn launch(launch: &Launch) -> Result<Launched, LaunchError> {
    let qmp_path = &launch.values.qmp;
    if is_in_use(qmp_path).await {
        return Err(LaunchError::SocketInUse { path: qmp_path.clone() });
    }
    let log_error = |source| LaunchError::Log {
        path: launch.log.clone(),
        source,
    };
    let log = create_log(&launch.log).map_err(log_error)?;
    let errors = log.try_clone().map_err(log_error)?;
    // `setsid` without a process group of its own calls setsid() and becomes the program, with the same pid.
    let mut child = Command::new("setsid")
        .args(launch.template.arguments(&launch.values).iter().map(OsStr::new))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .kill_on_drop(false)
        .spawn()
        .map_err(|source| LaunchError::Spawn { source })?;
    // The child is not reaped before it is handed over below, so this pid is still its own.
    let started = match child.id().map(Process::open) {
        Some(Ok(process)) => Some(process),
        Some(Err(ProcessError::Gone { .. })) | None => None,
        Some(Err(error)) => {
            // Only for an error that is about the process already; the child is ended in any case.
            let _ = child.kill().await;
            return Err(error.into());
        }
    };
    let output = Output::of_child(child, launch.log.clone());
    let Some(started) = started else {
        return Err(ended(launch, &output).await);
    };
    tokio::spawn(keep_log_bounded(launch.log.clone(), started.try_clone()?));

    let mut guard = KillOnDrop(Some(&started));
    match wait_for_monitor(launch, &started, &output).await {
        Ok((qmp, process)) => {
            guard.0 = None;
            Ok(Launched { qmp, process, output })
        }
        Err(error) => {
            drop(guard);
            started.wait_gone(KILL_DEADLINE).await?;
            remove_stale_socket(qmp_path).await;
            Err(error)
        }
    }
}

/// Waits until the monitor answers, and gives the process that answers.
async fn wait_for_monitor(
    launch: &Launch,
    started: &Process,
    output: &Output,
) -> Result<(QmpClient, Process), LaunchError> {
    let qmp_path = &launch.values.qmp;
    let end = Instant::now() + launch.ready_within;
    let mut last = QmpError::NoSocket { path: qmp_path.clone() };
    let qmp = loop {
        if !started.is_alive() {
            return Err(ended(launch, output).await);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LaunchError::NotReady {
                program: launch.template.program().to_owned(),
                waited: launch.ready_within,
                last: last.to_string(),
                output: output.describe(),
            });
        }
        match QmpClient::connect(qmp_path, left).await {
            Ok(qmp) => break qmp,
            Err(error) => last = error,
        }
        sleep(CONNECT_INTERVAL).await;
    };
    // The command may be a wrapper that starts QEMU; whatever answers must have come from it.
    let process = owner(&qmp).await?;
    if process.session()? != started.pid() {
        return Err(LaunchError::ForeignProcess {
            path: qmp_path.clone(),
            pid: process.pid(),
        });
    }
    Ok((qmp, process))
}

async fn ended(launch: &Launch, output: &Output) -> LaunchError {
    let ending = output.ending().await;
    LaunchError::Ended {
        program: launch.template.program().to_owned(),
        lock: image_lock::explain(&ending, None).await,
        ending,
    }
}

/// Ends what was started unless launching succeeded, also when the caller is cancelled in between.
struct KillOnDrop<'a>(Option<&'a Process>);

impl Drop for KillOnDrop<'_> {
    fn drop(&mut self) {
        self.0.inspect(|process| process.kill_session());
    }
}

/// Whether something listens on the path.
async fn is_in_use(path: &Path) -> bool {
    match UnixStream::connect(path).await {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// Removes the socket file of a process that was killed, unless somebody listens on it again.
pub(super) async fn remove_stale_socket(path: &Path) {
    let is_stale =
        matches!(UnixStream::connect(path).await, Err(error) if error.kind() == ErrorKind::ConnectionRefused);
    if is_stale && let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "a stale monitor socket could not be removed");
    }
}

/// Between two attempts to reach a monitor that is not there yet.
const CONNECT_INTERVAL: Duration = Duration::from_millis(10);

/// How long a killed process may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
