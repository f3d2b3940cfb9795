//! The virtual machine that arrives.
//!
//! ```text
//! launch or connect → prepare → (stream) → wait_loaded ──┬→ cont → announce_self     it runs here
//!                        └───────── kill ────────────────┴→ kill                     it never ran here
//! ```
//!
//! The guest must not run before COMMIT. QEMU starts it by itself after loading unless it was started with `-S`, and
//! anybody's `cont` before that arms the same, so `prepare` says `stop` before it lets the stream in: that clears both.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::block::BlockLayer;
use super::inventory::VmInventory;
use super::launch::{Launch, LaunchError, launch, remove_stale_socket};
use super::output::{Output, keep_log_bounded};
use super::owner::{OwnerError, owner};
use super::progress::MigrationProgress;
use super::settings::{RememberedSettings, Side};
use super::state::{MigrationStatus, RunState};
use super::{ContRefusal, query_run_state, socket_uri};
use crate::hypervisor::process::{Process, ProcessError, ProcessIdentity};
use crate::hypervisor::qmp::{Events, QemuVersion, QmpClient, QmpError};

/// A QEMU that takes a guest in. Dropping it closes the monitor and leaves the process alone.
#[derive(Debug)]
pub struct DestinationVm {
    qmp: Arc<QmpClient>,
    process: Process,
    output: Output,
    remembered: Option<RememberedSettings>,
}

/// The guest is loaded and paused: what [`DestinationVm::cont`] needs to be shown.
#[must_use = "a loaded guest has to be started or killed by somebody"]
#[derive(Debug)]
pub struct Loaded {
    run_state: RunState,
}

/// What went wrong at the destination.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// It is not waiting for a migration.
    #[error(
        "The QEMU at {path} does not wait for a migration (its state is {state}); start it with -incoming defer and -S."
    )]
    NotIncoming {
        /// The monitor.
        path: String,
        /// Its state.
        state: RunState,
    },
    /// It was started with another `-incoming`, or somebody has told it what to load.
    #[error("The QEMU at {path} expects its migration from elsewhere ({reason}); start it with -incoming defer.")]
    NotDeferred {
        /// The monitor.
        path: String,
        /// How that is known.
        reason: String,
    },
    /// The process ended.
    #[error("The destination's QEMU ended ({ending}). The guest did not run there.")]
    Ended {
        /// Exit status and the end of its output, as far as known.
        ending: String,
    },
    /// QEMU could not load the guest.
    #[error("The destination's QEMU could not load the guest: {reason}")]
    LoadFailed {
        /// QEMU's words, or the end of its output.
        reason: String,
    },
    /// The guest runs without having been told to. It must be killed, and the source must not be resumed until it is.
    #[error("The guest started at the destination without being told to.")]
    StartedByItself,
    /// Loading takes too long.
    #[error("The guest was not loaded within {waited:?}; the migration is {status}.")]
    NotLoadedInTime {
        /// Status of the incoming migration.
        status: MigrationStatus,
        /// How long was waited.
        waited: Duration,
    },
    /// QEMU refused `cont`: the guest has not run.
    #[error("The destination's QEMU refused to start the guest: {0}")]
    ContRefused(ContRefusal),
    /// It is not known whether the guest has run. Never to be taken for "it has not".
    #[error("It is not certain whether the guest runs at the destination: {0}")]
    ContUncertain(String),
    /// A socket's path that QEMU cannot use.
    #[error(
        "The socket path {0:?} cannot be given to QEMU: it must be absolute, valid UTF-8 and at most 107 bytes long."
    )]
    SocketPath(String),
    /// The recorded process has ended, or another one answers.
    #[error("The recorded destination process {pid} has ended.")]
    RecordedProcessGone {
        /// Its pid.
        pid: u32,
    },
    /// The process behind the monitor.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// Starting it.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl DestinationVm {
    /// Starts a QEMU and connects to it.
    ///
    /// # Errors
    /// Nothing is left running.
    pub async fn launch(how: &Launch) -> Result<DestinationVm, DestinationError> {
        let launched = launch(how).await?;
        Ok(DestinationVm {
            qmp: Arc::new(launched.qmp),
            process: launched.process,
            output: launched.output,
            remembered: None,
        })
    }

    /// Connects to a QEMU that somebody has started with `-incoming defer -S`. Whether it waits is told by
    /// [`DestinationVm::check_waits`].
    ///
    /// # Errors
    /// Those of the monitor and the process.
    pub async fn connect(qmp_path: &Path, deadline: Duration) -> Result<DestinationVm, DestinationError> {
        let qmp = Arc::new(QmpClient::connect(qmp_path, deadline).await?);
        let process = owner(&qmp).await?;
        Ok(DestinationVm {
            qmp,
            process,
            output: Output::of_other(None),
            remembered: None,
        })
    }

    /// Connects to a destination of an earlier gateway, whatever state it is in. `remembered`: the settings to put back, as that
    /// gateway recorded them.
    ///
    /// # Errors
    /// [`DestinationError::RecordedProcessGone`]: confirmed dead. If the process lives and does not answer, the monitor's
    /// error; it can still be ended by [`Process::reattach`] and [`Process::kill`].
    pub async fn reattach(
        qmp_path: &Path,
        identity: &ProcessIdentity,
        remembered: Option<RememberedSettings>,
        log: Option<PathBuf>,
        deadline: Duration,
    ) -> Result<DestinationVm, DestinationError> {
        let gone = || DestinationError::RecordedProcessGone { pid: identity.pid };
        let process = Process::reattach(identity)?.ok_or_else(gone)?;
        let qmp = Arc::new(QmpClient::connect(qmp_path, deadline).await?);
        if qmp.peer_pid() != process.pid() {
            return Err(LaunchError::ForeignProcess {
                path: qmp_path.to_owned(),
                pid: qmp.peer_pid(),
            }
            .into());
        }
        if let Some(log) = &log {
            tokio::spawn(keep_log_bounded(log.clone(), process.try_clone()?));
        }
        Ok(DestinationVm {
            qmp,
            process,
            output: Output::of_other(log),
            remembered,
        })
    }

    /// What the machine consists of; complete before anything is loaded.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn inventory(&self) -> Result<VmInventory, DestinationError> {
        Ok(VmInventory::collect(&self.qmp).await?)
    }

    /// Makes QEMU listen on `socket` for the stream: checks that it waits, says `stop` (which clears an armed start), sets
    /// capabilities and parameters, and gives `migrate-incoming`. The guest does not exist yet.
    ///
    /// # Errors
    /// The process is left as it is; [`DestinationVm::kill`] it.
    pub async fn prepare(&mut self, socket: &Path) -> Result<(), DestinationError> {
        let uri = socket_uri(socket).ok_or_else(|| DestinationError::SocketPath(socket.display().to_string()))?;
        self.check_waits().await?;
        self.qmp.execute("stop", json!({})).await?;
        let now = RememberedSettings::read(&self.qmp).await?;
        now.for_migration(Side::Destination, 0).apply(&self.qmp, &now).await?;
        self.remembered.get_or_insert(now);
        let mut arguments = json!({ "uri": uri });
        if self.qmp.version() >= EXIT_ON_ERROR_SINCE {
            // QEMU then stays and says why loading failed, instead of ending.
            arguments["exit-on-error"] = json!(false);
        }
        match self.qmp.execute("migrate-incoming", arguments).await {
            Ok(_) => Ok(()),
            Err(QmpError::Command { description, .. }) => Err(DestinationError::NotDeferred {
                path: self.qmp.path().display().to_string(),
                reason: description,
            }),
            Err(error) => Err(error.into()),
        }
    }

    /// Notes the settings that [`DestinationVm::prepare`] is going to change, and gives back those: what to record, so that a
    /// restarted gateway can put them back too.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn remember_settings(&mut self) -> Result<RememberedSettings, DestinationError> {
        let now = RememberedSettings::read(&self.qmp).await?;
        let changed = now.changed_by_migration(Side::Destination);
        self.remembered = Some(changed.clone());
        Ok(changed)
    }

    /// Fails unless QEMU waits to be told what to load: whatever else is there is somebody's VM. Nothing is touched.
    ///
    /// # Errors
    /// [`DestinationError::NotIncoming`], [`DestinationError::NotDeferred`], and those of the monitor.
    pub async fn check_waits(&self) -> Result<(), DestinationError> {
        let path = || self.qmp.path().display().to_string();
        let state = query_run_state(&self.qmp).await?;
        if state != RunState::InMigrate {
            return Err(DestinationError::NotIncoming { path: path(), state });
        }
        let status = MigrationProgress::query(&self.qmp).await?.status;
        if status != MigrationStatus::None {
            return Err(DestinationError::NotDeferred {
                path: path(),
                reason: format!("its migration is {status}"),
            });
        }
        Ok(())
    }

    /// Its disks.
    pub fn block_layer(&self) -> BlockLayer {
        BlockLayer::new(Arc::clone(&self.qmp))
    }

    /// Waits until the guest is loaded and paused.
    ///
    /// # Errors
    /// [`DestinationError::LoadFailed`], [`DestinationError::Ended`]: it will not be loaded here.
    /// [`DestinationError::StartedByItself`]: kill it. [`DestinationError::NotLoadedInTime`]: may be called again.
    /// In every case but `StartedByItself` the guest has not run.
    pub async fn wait_loaded(&self, deadline: Duration) -> Result<Loaded, DestinationError> {
        let end = Instant::now() + deadline;
        loop {
            let progress = match MigrationProgress::query(&self.qmp).await {
                Ok(progress) => progress,
                Err(error) => return Err(self.lost(error).await),
            };
            match progress.status {
                MigrationStatus::Completed => match query_run_state(&self.qmp).await? {
                    RunState::Running => return Err(DestinationError::StartedByItself),
                    // The last step of loading is under way.
                    RunState::InMigrate => {}
                    run_state => return Ok(Loaded { run_state }),
                },
                MigrationStatus::Failed | MigrationStatus::Cancelled => {
                    let reason = progress.error.unwrap_or_else(|| self.output.describe());
                    return Err(DestinationError::LoadFailed { reason });
                }
                _ => {}
            }
            if Instant::now() >= end {
                return Err(DestinationError::NotLoadedInTime {
                    status: progress.status,
                    waited: deadline,
                });
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Starts the guest and waits until it runs. **Only after COMMIT.**
    ///
    /// # Errors
    /// [`DestinationError::ContRefused`]: it has not run, and once it is killed REVERT may be recorded. Any other: it may
    /// have run.
    pub async fn cont(&self, loaded: &Loaded, deadline: Duration) -> Result<(), DestinationError> {
        tracing::debug!(state = %loaded.run_state, "starting the guest");
        match self.qmp.execute_within("cont", json!({}), deadline).await {
            Ok(_) => {}
            Err(error) if error.is_refusal() => {
                let refusal = ContRefusal::explained(error, &self.process).await;
                return Err(DestinationError::ContRefused(refusal));
            }
            Err(error) => return Err(DestinationError::ContUncertain(error.to_string())),
        }
        match query_run_state(&self.qmp).await {
            Ok(RunState::Running) => Ok(()),
            Ok(state) => Err(DestinationError::ContUncertain(format!(
                "its state is {state} after it was started"
            ))),
            Err(error) => Err(DestinationError::ContUncertain(error.to_string())),
        }
    }

    /// Lets QEMU tell the network where the guest is now, so many times: five are over within a second. For a guest that runs.
    ///
    /// # Errors
    /// Those of the monitor; the guest runs on.
    pub async fn announce_self(&self, rounds: u32) -> Result<(), DestinationError> {
        if rounds == 0 {
            return Ok(());
        }
        // QEMU's own defaults for the end of a migration (migration/options.c).
        let arguments = json!({ "initial": 50, "max": 550, "rounds": rounds, "step": 100 });
        self.qmp.execute("announce-self", arguments).await?;
        Ok(())
    }

    /// Puts back what [`DestinationVm::prepare`] changed, for whoever migrates this VM next.
    ///
    /// # Errors
    /// Those of the monitor; the guest is not touched.
    pub async fn restore_settings(&mut self) -> Result<(), DestinationError> {
        if let Some(before) = &self.remembered {
            before
                .apply(&self.qmp, &RememberedSettings::read(&self.qmp).await?)
                .await?;
            self.remembered = None;
        }
        Ok(())
    }

    /// Lets it end by itself, so that its images are as they were written, and kills it if it does not. Its guest, which has not run, is lost.
    ///
    /// # Errors
    /// As [`DestinationVm::kill`].
    pub async fn quit(&self, deadline: Duration) -> Result<(), DestinationError> {
        Ok(super::quit(&self.qmp, &self.process, deadline).await?)
    }

    /// Ends the process and waits until it is really gone: SIGKILL, through a descriptor that cannot mean another process.
    /// Nothing of the guest is lost that the source does not have. Only then may ABORT be recorded. The monitor's socket file
    /// is removed; QEMU cannot do that any more.
    ///
    /// # Errors
    /// [`ProcessError::DidNotEnd`]: it must be treated as alive; try again.
    pub async fn kill(&self, deadline: Duration) -> Result<(), DestinationError> {
        self.process.kill(deadline).await?;
        remove_stale_socket(self.qmp.path()).await;
        Ok(())
    }

    /// Everything the monitor tells from now on.
    pub fn events(&self) -> Events {
        self.qmp.events()
    }

    /// Whether the monitor's connection has ended: every command would say so.
    pub fn is_lost(&self) -> bool {
        self.qmp.lost_reason().is_some()
    }

    /// What to record in order to find the process again.
    pub fn identity(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    /// QEMU's version.
    pub fn version(&self) -> QemuVersion {
        self.qmp.version()
    }

    /// State of the guest now.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn run_state(&self) -> Result<RunState, DestinationError> {
        Ok(query_run_state(&self.qmp).await?)
    }

    /// How far the incoming migration is.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn progress(&self) -> Result<MigrationProgress, DestinationError> {
        Ok(MigrationProgress::query(&self.qmp).await?)
    }

    /// Tells the end of the process apart from a mere loss of the monitor.
    async fn lost(&self, error: QmpError) -> DestinationError {
        match self.process.wait_gone(END_GRACE).await {
            Ok(()) => DestinationError::Ended {
                ending: self.output.ending().await,
            },
            Err(_) => error.into(),
        }
    }
}

impl Loaded {
    /// The state in which the guest waits: `paused`, or the one it had at the source if it did not run there.
    pub fn run_state(&self) -> &RunState {
        &self.run_state
    }
}

/// `migrate-incoming` knows `exit-on-error` since 9.1 (QEMU `qapi/migration.json`).
const EXIT_ON_ERROR_SINCE: QemuVersion = QemuVersion {
    major: 9,
    minor: 1,
    micro: 0,
};
/// Between two questions about a state whose change is awaited during downtime.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// How long a process may take to end after it has closed its monitor.
const END_GRACE: Duration = Duration::from_secs(2);
