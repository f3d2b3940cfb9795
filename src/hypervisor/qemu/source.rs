//! The virtual machine that leaves.
//!
//! ```text
//! connect → prepare → migrate → progress … → permit conditions → freeze ──┬→ Frozen::kill          (it runs there)
//!     └────────── undo: cancel, restart the guest, put settings back ─────┴→ Frozen::thaw → undo   (it stays here)
//! ```
//!
//! With `return-path` off (see `settings.rs`) QEMU never restarts the guest by itself once everything is sent: it ends in
//! `completed` / `postmigrate` and waits for a `cont`. Before that, a failed or cancelled migration makes QEMU restart a
//! guest that was running.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::block::BlockLayer;
use super::condition::Condition;
use super::freeze::{self, FreezeError, Frozen};
use super::inventory::VmInventory;
use super::owner::{OwnerError, owner, vcpu_threads};
use super::permit::PermitConditions;
use super::progress::MigrationProgress;
use super::settings::{PAUSE_BEFORE_SWITCHOVER, RememberedSettings, Side, query_capabilities, query_multifd};
use super::state::{MigrationStatus, RunState};
use super::{ContRefusal, query_run_state, socket_uri};
use crate::hypervisor::process::{Process, ProcessError, ProcessIdentity};
use crate::hypervisor::qmp::{Events, QemuVersion, QmpClient, QmpError};

/// A QEMU whose guest is to be migrated away. Dropping it closes the monitor and changes nothing else.
#[derive(Debug)]
pub struct SourceVm {
    qmp: Arc<QmpClient>,
    process: Process,
    was_running: bool,
    remembered: Option<RememberedSettings>,
}

/// Where a source guest is after a migration was undone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undone {
    /// It runs.
    Running,
    /// It is paused as it was before the migration.
    PausedAsBefore,
    /// It ran before, and is now in a state that this migration did not bring about (an I/O error, a `stop` by somebody).
    Stopped(RunState),
}

/// How fast a guest writes to its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRate {
    /// Bytes per second; QEMU rounds to whole MiB.
    pub bytes_per_second: u64,
    /// Bytes of memory that were sampled. QEMU leaves out blocks below 128 MiB: 0 says that the rate is unknown.
    pub sampled_bytes: u64,
}

/// A sample of the dirty rate that QEMU has begun.
#[derive(Clone, Copy, Debug)]
pub struct DirtyRateSample {
    /// Bytes of memory that are looked at.
    sampled_bytes: u64,
    /// Before this there is nothing to be asked.
    ready_at: Instant,
}

impl DirtyRateSample {
    /// Whether it is worth asking for.
    #[must_use]
    pub fn is_due(&self, now: std::time::Instant) -> bool {
        now >= self.ready_at.into_std()
    }
}

/// Whether this QEMU can be told a bandwidth for the switchover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwitchoverBandwidth {
    /// It was told.
    Set,
    /// It cannot (QEMU before 8.2): it estimates from what the socket accepts, so adjust the downtime limit instead.
    NotSupported,
}

/// What went wrong at the source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The guest is in a state in which it cannot be migrated.
    #[error("The VM at {path} cannot be migrated: {obstacle} (its state is {state}).")]
    NotMigratable {
        /// The monitor.
        path: String,
        /// Its state.
        state: RunState,
        /// Why not.
        obstacle: &'static str,
    },
    /// The process behind the monitor.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The process behind the monitor is not the recorded one.
    #[error("The monitor {path} belongs to another process than the one recorded; the recorded source has ended.")]
    AnotherProcess {
        /// The monitor.
        path: String,
    },
    /// Everything had been sent before the cancel.
    #[error("The migration had completed before it could be cancelled; the guest is paused at the source.")]
    CancelTooLate,
    /// A state did not come in time.
    #[error("The VM did not become {expected} within {waited:?}; its state is {state}, its migration {status}.")]
    NotInTime {
        /// What was waited for.
        expected: &'static str,
        /// State of the guest.
        state: RunState,
        /// Status of the migration.
        status: MigrationStatus,
        /// How long was waited.
        waited: Duration,
    },
    /// A value that QEMU does not accept.
    #[error("{what} must be {bounds}.")]
    OutOfRange {
        /// Which value.
        what: &'static str,
        /// What it may be.
        bounds: &'static str,
    },
    /// A socket's path that QEMU cannot use.
    #[error(
        "The socket path {0:?} cannot be given to QEMU: it must be absolute, valid UTF-8 and at most 107 bytes long."
    )]
    SocketPath(String),
    /// The guest stands as before.
    #[error(transparent)]
    ContRefused(#[from] ContRefusal),
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl SourceVm {
    /// Connects to a QEMU whose guest runs or is paused. Remembers which, and does not touch it.
    ///
    /// # Errors
    /// [`SourceError::NotMigratable`] for any other state; [`SourceError::Owner`] where stopping the process would hit
    /// another one.
    pub async fn connect(qmp_path: &Path, deadline: Duration) -> Result<SourceVm, SourceError> {
        let qmp = Arc::new(QmpClient::connect(qmp_path, deadline).await?);
        let process = owner(&qmp).await?;
        let state = query_run_state(&qmp).await?;
        if let Some(obstacle) = state.source_obstacle() {
            return Err(SourceError::NotMigratable {
                path: qmp_path.display().to_string(),
                state,
                obstacle,
            });
        }
        Ok(SourceVm {
            qmp,
            process,
            was_running: state == RunState::Running,
            remembered: None,
        })
    }

    /// Connects to the source of a migration that an earlier gateway began, whatever state it is in. What that gateway
    /// recorded is given: the process, whether the guest ran, and the settings to put back. The guest is not touched.
    ///
    /// A frozen source does not answer ([`QmpError::ProcessStopped`]): see [`Frozen::reattach`].
    ///
    /// # Errors
    /// [`SourceError::AnotherProcess`].
    pub async fn reattach(
        qmp_path: &Path,
        identity: &ProcessIdentity,
        was_running: bool,
        remembered: Option<RememberedSettings>,
        deadline: Duration,
    ) -> Result<SourceVm, SourceError> {
        let qmp = Arc::new(QmpClient::connect(qmp_path, deadline).await?);
        let process = owner(&qmp).await?;
        if process.identity() != identity {
            return Err(SourceError::AnotherProcess {
                path: qmp_path.display().to_string(),
            });
        }
        Ok(SourceVm {
            qmp,
            process,
            was_running,
            remembered,
        })
    }

    /// What the machine consists of. The guest is not touched.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn inventory(&self) -> Result<VmInventory, SourceError> {
        Ok(VmInventory::collect(&self.qmp).await?)
    }

    /// Whether it may be migrated now. The guest is not touched.
    ///
    /// # Errors
    /// Those of the monitor and of `/proc`.
    pub async fn condition(&self) -> Result<Condition, SourceError> {
        Condition::collect(&self.qmp, &self.process).await
    }

    /// Looks once more whether the guest runs, and notes the settings that [`SourceVm::prepare`] is going to change: what
    /// to record before anything is changed. Nothing is touched.
    ///
    /// # Errors
    /// [`SourceError::NotMigratable`] where somebody has brought the guest into another state since.
    pub async fn note_state(&mut self) -> Result<(), SourceError> {
        let state = query_run_state(&self.qmp).await?;
        if let Some(obstacle) = state.source_obstacle() {
            return Err(SourceError::NotMigratable {
                path: self.qmp.path().display().to_string(),
                state,
                obstacle,
            });
        }
        self.was_running = state == RunState::Running;
        self.remembered = Some(RememberedSettings::read(&self.qmp).await?);
        Ok(())
    }

    /// Sets capabilities and parameters for a migration and gives back what they were. The guest runs on.
    ///
    /// # Errors
    /// On an error some settings may have changed; [`SourceVm::restore_settings`] puts them back.
    pub async fn prepare(&mut self, downtime_limit: Duration) -> Result<&RememberedSettings, SourceError> {
        let limit_ms = downtime_limit_ms(downtime_limit)?;
        let now = RememberedSettings::read(&self.qmp).await?;
        let wanted = now.for_migration(Side::Source, limit_ms);
        // What was noted before must not give way to our own settings.
        let remembered = self.remembered.get_or_insert_with(|| now.clone());
        wanted.apply(&self.qmp, &now).await?;
        Ok(remembered)
    }

    /// Puts back what [`SourceVm::prepare`] changed; nothing to do without it. Not possible while a migration is under
    /// way. The guest is not touched.
    ///
    /// # Errors
    /// Those of the monitor; may be called again.
    pub async fn restore_settings(&mut self) -> Result<(), SourceError> {
        if let Some(before) = &self.remembered {
            before
                .apply(&self.qmp, &RememberedSettings::read(&self.qmp).await?)
                .await?;
            self.remembered = None;
        }
        Ok(())
    }

    /// Sets the longest pause that QEMU may plan for, also while a migration runs.
    ///
    /// # Errors
    /// [`SourceError::OutOfRange`] outside of 1 ms to 2000 s, QEMU's own bound.
    pub async fn set_downtime_limit(&self, limit: Duration) -> Result<(), SourceError> {
        let limit_ms = downtime_limit_ms(limit)?;
        self.qmp
            .execute("migrate-set-parameters", json!({ "downtime-limit": limit_ms }))
            .await?;
        Ok(())
    }

    /// Tells QEMU the rate at which the rest will be taken once the guest is stopped, in bytes of the vmm stream per
    /// second; 0 lets it estimate again. Possible while a migration runs.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn set_switchover_bandwidth(&self, bytes_per_second: u64) -> Result<SwitchoverBandwidth, SourceError> {
        let parameters = super::settings::query_parameters(&self.qmp).await?;
        if !parameters.contains_key("avail-switchover-bandwidth") {
            return Ok(SwitchoverBandwidth::NotSupported);
        }
        let arguments = json!({ "avail-switchover-bandwidth": bytes_per_second });
        self.qmp.execute("migrate-set-parameters", arguments).await?;
        Ok(SwitchoverBandwidth::Set)
    }

    /// Begins to sample how fast the guest writes to its memory, over `period` (rounded up to seconds, at most 60). It costs
    /// the guest almost nothing (QEMU hashes 512 pages per GiB twice), but is meant for a forecast, not for a gauge. A migration
    /// may begin meanwhile: the two do not touch each other.
    ///
    /// # Errors
    /// Those of the monitor, for example where a sample is under way already.
    pub async fn begin_dirty_rate_sample(&self, period: Duration) -> Result<DirtyRateSample, SourceError> {
        let seconds = period.as_secs_f64().ceil().clamp(1.0, 60.0);
        let blocks = VmInventory::ram_blocks(&self.qmp).await?;
        let sizes = blocks.iter().map(|block| block.used_bytes);
        let sampled_bytes = sizes.filter(|&bytes| bytes >= SMALLEST_SAMPLED_BLOCK).sum();
        self.qmp
            .execute("calc-dirty-rate", json!({ "calc-time": seconds as u64 }))
            .await?;
        Ok(DirtyRateSample {
            sampled_bytes,
            ready_at: Instant::now() + Duration::from_secs_f64(seconds),
        })
    }

    /// What the sample came to; `None` while QEMU is still at it, which for much memory takes seconds longer than the period.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn dirty_rate(&self, sample: DirtyRateSample) -> Result<Option<DirtyRate>, SourceError> {
        let answer = self.qmp.execute("query-dirty-rate", json!({})).await?;
        let mebibytes = answer["dirty-rate"].as_u64();
        Ok(mebibytes
            .filter(|_| answer["status"] == "measured")
            .map(|mebibytes| DirtyRate {
                bytes_per_second: mebibytes.saturating_mul(1 << 20),
                sampled_bytes: sample.sampled_bytes,
            }))
    }

    /// A sample from its beginning to its end.
    ///
    /// # Errors
    /// Those of the monitor, and a sample that does not end.
    pub async fn dirty_rate_sample(&self, period: Duration) -> Result<DirtyRate, SourceError> {
        let sample = self.begin_dirty_rate_sample(period).await?;
        sleep(sample.ready_at.saturating_duration_since(Instant::now())).await;
        loop {
            if let Some(rate) = self.dirty_rate(sample).await? {
                return Ok(rate);
            }
            if Instant::now() >= sample.ready_at + SAMPLE_GRACE {
                return Err(QmpError::Answer {
                    command: "query-dirty-rate".into(),
                    detail: "the sample was not finished in time".into(),
                }
                .into());
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// How many connections beside the main one the migration is going to make; `None` without multifd.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn multifd_channels(&self) -> Result<Option<u8>, SourceError> {
        let capabilities = query_capabilities(&self.qmp).await?;
        let multifd = query_multifd(&self.qmp, &capabilities).await?;
        Ok(multifd.map(|multifd| multifd.channels))
    }

    /// Starts the migration into a listening unix socket. From now on the guest may be paused at any moment, when QEMU
    /// decides to switch over. A connection that fails shows as [`MigrationStatus::Failed`], with the guest running.
    ///
    /// # Errors
    /// The guest runs on as before.
    pub async fn migrate(&self, socket: &Path) -> Result<(), SourceError> {
        let uri = socket_uri(socket).ok_or_else(|| SourceError::SocketPath(socket.display().to_string()))?;
        self.qmp.execute("migrate", json!({ "uri": uri })).await?;
        Ok(())
    }

    /// Makes QEMU wait, once it has stopped its guest for the last part, in [`MigrationStatus::PreSwitchover`] for
    /// [`SourceVm::continue_switchover`]. That state may be told while the vCPUs still run: that they stand is told by the event `STOP`. To be
    /// called after [`SourceVm::prepare`], and put back like its settings.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn wait_before_switchover(&self) -> Result<(), SourceError> {
        let waits = json!([{ "capability": PAUSE_BEFORE_SWITCHOVER, "state": true }]);
        self.qmp
            .execute("migrate-set-capabilities", json!({ "capabilities": waits }))
            .await?;
        Ok(())
    }

    /// Lets a QEMU that stopped its guest and waits send the rest.
    ///
    /// # Errors
    /// It does not wait.
    pub async fn continue_switchover(&self) -> Result<(), SourceError> {
        let state = json!({ "state": "pre-switchover" });
        self.qmp.execute("migrate-continue", state).await?;
        Ok(())
    }

    /// Its disks.
    pub fn block_layer(&self) -> BlockLayer {
        BlockLayer::new(Arc::clone(&self.qmp))
    }

    /// How far the migration is.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn progress(&self) -> Result<MigrationProgress, SourceError> {
        Ok(MigrationProgress::query(&self.qmp).await?)
    }

    /// Cancels the migration and waits until QEMU has dealt with it. Fine if there is none. Afterwards the guest is as it
    /// was before: QEMU itself restarts one that was running.
    ///
    /// # Errors
    /// [`SourceError::CancelTooLate`]: it completed first, and the guest is paused in `postmigrate`.
    /// [`SourceError::NotInTime`]: not known yet; call again.
    pub async fn cancel(&self, deadline: Duration) -> Result<(), SourceError> {
        let end = Instant::now() + deadline;
        if self.progress().await?.status.is_under_way() {
            self.qmp.execute("migrate_cancel", json!({})).await?;
        }
        loop {
            let status = self.progress().await?.status;
            if status == MigrationStatus::Completed {
                return Err(SourceError::CancelTooLate);
            }
            let state = query_run_state(&self.qmp).await?;
            // QEMU reports the end of a migration shortly before it restarts the guest.
            if !status.is_under_way() && state != RunState::FinishMigrate {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(SourceError::NotInTime {
                    expected: "free of the migration",
                    state,
                    status,
                    waited: deadline,
                });
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Brings the guest back to what it was before the migration, whatever point that has reached: cancels what is under
    /// way, and resumes a guest that ran before and is now in `postmigrate`. May be called at any time and again. **Never
    /// after PERMIT, unless ABORT or REVERT is known.** Settings are left to [`SourceVm::restore_settings`].
    ///
    /// # Errors
    /// The guest may be paused; call again.
    pub async fn undo(&self, deadline: Duration) -> Result<Undone, SourceError> {
        match self.cancel(deadline).await {
            Ok(()) | Err(SourceError::CancelTooLate) => {}
            Err(error) => return Err(error),
        }
        match (self.was_running, self.wait_until_stable(deadline).await?) {
            (true, RunState::PostMigrate) => {
                self.resume(deadline).await?;
                Ok(Undone::Running)
            }
            (_, RunState::Running) => Ok(Undone::Running),
            (true, state) => Ok(Undone::Stopped(state)),
            (false, _) => Ok(Undone::PausedAsBefore),
        }
    }

    /// Says `cont` and waits until the guest runs. For a guest in `postmigrate` whose ABORT or REVERT is known.
    ///
    /// # Errors
    /// The guest may be paused or running.
    pub async fn resume(&self, deadline: Duration) -> Result<(), SourceError> {
        match self.qmp.execute("cont", json!({})).await {
            Ok(_) => {}
            Err(error) if error.is_refusal() => return Err(ContRefusal::explained(error, &self.process).await.into()),
            Err(error) => return Err(error.into()),
        }
        let end = Instant::now() + deadline;
        loop {
            let state = query_run_state(&self.qmp).await?;
            if state == RunState::Running {
                return Ok(());
            }
            if Instant::now() >= end {
                let status = self.progress().await?.status;
                return Err(SourceError::NotInTime {
                    expected: "running",
                    state,
                    status,
                    waited: deadline,
                });
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Whether everything was sent and the guest is stopped for good, as far as QEMU is concerned. An EOF on the stream
    /// alone says neither.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn permit_conditions(&self) -> Result<PermitConditions, SourceError> {
        Ok(PermitConditions::query(&self.qmp).await?)
    }

    /// [`SourceVm::permit_conditions`], waiting while they are not met yet. Meant for after the stream's EOF.
    ///
    /// # Errors
    /// Those of the monitor. At the deadline it gives back the last answer.
    pub async fn wait_for_permit_conditions(&self, deadline: Duration) -> Result<PermitConditions, SourceError> {
        let end = Instant::now() + deadline;
        loop {
            let conditions = self.permit_conditions().await?;
            if !matches!(conditions, PermitConditions::NotYet { .. }) || Instant::now() >= end {
                return Ok(conditions);
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Checks the permit conditions once more, stops the process, and makes sure that nobody has resumed the guest in the
    /// meantime. Then no vCPU of it runs until somebody continues the process. The monitor stays connected but does not
    /// answer until then.
    ///
    /// # Errors
    /// The process has been continued: the guest is in `postmigrate`, or runs if somebody resumed it
    /// ([`FreezeError::Resumed`]). PERMIT must not be given.
    pub async fn freeze(&self) -> Result<Frozen, FreezeError> {
        let mark = self.qmp.run_history();
        // One round trip for all three questions: the guest is waiting.
        let threads = async { Ok(vcpu_threads(&self.qmp, &self.process).await?) };
        let (conditions, threads) = tokio::try_join!(biased; self.permit_conditions(), threads)?;
        match conditions {
            PermitConditions::Met => freeze::freeze(&self.qmp, &self.process, &threads, mark).await,
            other => Err(FreezeError::NotReady(other)),
        }
    }

    /// Ends a source that is not frozen, and waits until its process is gone: `quit`, and SIGKILL if that does not do in
    /// `deadline`. A frozen one is ended with [`Frozen::kill`].
    ///
    /// # Errors
    /// [`ProcessError::DidNotEnd`]: try again.
    pub async fn quit(self, deadline: Duration) -> Result<(), SourceError> {
        Ok(super::quit(&self.qmp, &self.process, deadline).await?)
    }

    /// Everything the monitor tells from now on.
    pub fn events(&self) -> Events {
        self.qmp.events()
    }

    /// Whether the guest ran before the migration.
    pub fn was_running(&self) -> bool {
        self.was_running
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

    /// What [`SourceVm::prepare`] has changed and [`SourceVm::restore_settings`] has not put back: what to record for
    /// [`SourceVm::reattach`].
    pub fn changed_settings(&self) -> Option<RememberedSettings> {
        let remembered = self.remembered.as_ref();
        remembered.map(|settings| settings.changed_by_migration(Side::Source))
    }

    /// State of the guest now.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn run_state(&self) -> Result<RunState, SourceError> {
        Ok(query_run_state(&self.qmp).await?)
    }

    async fn wait_until_stable(&self, deadline: Duration) -> Result<RunState, SourceError> {
        let end = Instant::now() + deadline;
        loop {
            let state = query_run_state(&self.qmp).await?;
            if state != RunState::FinishMigrate || Instant::now() >= end {
                return Ok(state);
            }
            sleep(POLL_INTERVAL).await;
        }
    }
}

fn downtime_limit_ms(limit: Duration) -> Result<u64, SourceError> {
    match u64::try_from(limit.as_millis()) {
        Ok(limit_ms @ 1..=2_000_000) => Ok(limit_ms),
        _ => Err(SourceError::OutOfRange {
            what: "The downtime limit",
            bounds: "between 1 ms and 2000 s",
        }),
    }
}

/// QEMU samples no smaller RAM block (`migration/dirtyrate.h`, MIN_RAMBLOCK_SIZE, in bytes; the same in 7.2 and 10.0).
const SMALLEST_SAMPLED_BLOCK: u64 = 128 << 20;
/// How much later than asked a sample may end: hashing big memory takes seconds.
const SAMPLE_GRACE: Duration = Duration::from_secs(30);
/// Between two questions about a state whose change is awaited during downtime.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
