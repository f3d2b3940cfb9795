//! A source that nobody can resume.
//!
//! QEMU resumes a guest for anyone who says `cont` on any of its monitors, and after PERMIT that would be a second running
//! copy. So before PERMIT the whole process is stopped (SIGSTOP through a pidfd), and then everything it had said until
//! then is read: without a `RESUME` among it, no vCPU has run since the migration stopped them, because QEMU sends `RESUME`
//! before it starts any (`vm_prepare_start`). A frozen process stays frozen when the gateway ends; its identity is enough to
//! take hold of it again.
//!
//! It is ended by SIGKILL, not by `quit`: to say `quit` it would have to be continued first, and then another monitor's
//! `cont` that already waits in a socket could be served before it. Nothing is lost, for QEMU hands over its disks (flushed
//! and inactive) before it reports that a migration has completed.

use std::time::Duration;

use super::permit::PermitConditions;
use super::source::SourceError;
use crate::hypervisor::process::{Process, ProcessError, ProcessIdentity};
use crate::hypervisor::qmp::{QmpClient, QmpError, RunHistory};

/// A stopped source process. Dropping it changes nothing: the process stays stopped.
#[must_use = "a frozen source has to be thawed or ended by somebody"]
#[derive(Debug)]
pub struct Frozen {
    process: Process,
}

/// Why a source could not be frozen. It has been continued in every case, so the guest is where QEMU left it.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The migration is not complete, or not any more.
    #[error("The source is not ready to hand over its guest: {0}.")]
    NotReady(PermitConditions),
    /// Somebody resumed it.
    #[error("Somebody resumed the guest at the source after the migration had stopped it; it may be running there.")]
    Resumed,
    /// It stopped in the middle of saying something, which might have been that the guest runs.
    #[error("QEMU stopped in the middle of a message, so it is not certain that the guest was not resumed.")]
    CutMessage,
    /// The questions asked beforehand.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Stops `process` and makes sure that the guest has not run since `mark`, which was taken before the permit conditions
/// were seen to hold. `vcpu_threads` are the host's thread ids.
pub(super) async fn freeze(
    qmp: &QmpClient,
    process: &Process,
    vcpu_threads: &[u32],
    mark: RunHistory,
) -> Result<Frozen, FreezeError> {
    let mut guard = ThawOnDrop {
        process: Some(process.try_clone()?),
    };
    process.stop(vcpu_threads, STOP_DEADLINE).await?;
    let drained = qmp.drain().await?;
    if drained.is_partial {
        return Err(FreezeError::CutMessage);
    }
    if drained.history.resumes != mark.resumes || drained.history.resumed_last {
        return Err(FreezeError::Resumed);
    }
    let process = guard
        .process
        .take()
        .expect("the guard holds the process until this line");
    Ok(Frozen { process })
}

impl Frozen {
    /// Takes hold of a source that an earlier gateway froze. `None` if that process has ended.
    ///
    /// # Errors
    /// [`ProcessError::NotStopped`] if somebody has continued it since: then the guest may run.
    pub fn reattach(identity: &ProcessIdentity) -> Result<Option<Frozen>, ProcessError> {
        match Process::reattach(identity)? {
            Some(process) if process.is_stopped()? => Ok(Some(Frozen { process })),
            Some(process) => Err(ProcessError::NotStopped { pid: process.pid() }),
            None => Ok(None),
        }
    }

    /// Which process it is.
    pub fn identity(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    /// Whether it is still stopped; somebody may have sent SIGCONT.
    ///
    /// # Errors
    /// [`ProcessError::Gone`].
    pub fn is_still_frozen(&self) -> Result<bool, ProcessError> {
        self.process.is_stopped()
    }

    /// Continues the process (SIGCONT). The guest stays paused in `postmigrate` until somebody says `cont`. Only for a
    /// migration whose ABORT or REVERT is known.
    ///
    /// # Errors
    /// With [`ProcessError::DidNotContinue`] it is still stopped, and taking hold of it again with
    /// [`Frozen::reattach`] and thawing it may work later.
    pub async fn thaw(self) -> Result<(), ProcessError> {
        self.process.resume(STOP_DEADLINE).await
    }

    /// Ends the process (SIGKILL) without letting it run again, and waits until it is gone. Only for a migration whose
    /// RUNNING is known.
    ///
    /// # Errors
    /// [`ProcessError::DidNotEnd`]: try again.
    pub async fn kill(&self, deadline: Duration) -> Result<(), ProcessError> {
        self.process.kill(deadline).await
    }
}

/// Continues the process unless freezing succeeded, also when the caller is cancelled in between.
struct ThawOnDrop {
    process: Option<Process>,
}

impl Drop for ThawOnDrop {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            process.resume_now();
        }
    }
}

/// Time for a signal to take effect on all threads; a main loop in the middle of a disk flush cannot stop at once.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::qmp::test_monitor;
    use std::process::{Child, Command};
    use tokio::io::AsyncWriteExt;

    /// A process in the place of QEMU.
    struct Stand(Child);

    impl Drop for Stand {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Freezes a process whose monitor has `said` something that nobody has read yet.
    async fn freeze_after(said: &[u8], mark: RunHistory) -> (Stand, Process, Result<Frozen, FreezeError>) {
        let stand = Stand(Command::new("sleep").arg("1000").spawn().unwrap());
        let process = Process::open(stand.0.id()).unwrap();
        let (_directory, client, mut monitor) = test_monitor().await;
        monitor.write_all(said).await.unwrap();
        let result = freeze(&client, &process, &[stand.0.id()], mark).await;
        (stand, process, result)
    }

    #[tokio::test]
    async fn a_silent_guest_is_frozen_and_thawed() {
        let said = b"{\"event\": \"STOP\"} {\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}";
        let (_stand, process, result) = freeze_after(said, RunHistory::default()).await;
        let frozen = result.unwrap();
        assert!(process.is_stopped().unwrap() && frozen.is_still_frozen().unwrap());
        frozen.thaw().await.unwrap();
        assert!(!process.is_stopped().unwrap());
    }

    #[tokio::test]
    async fn a_resume_that_nobody_had_read_yet_prevents_the_freeze_and_the_process_goes_on() {
        for said in [
            &b"{\"event\": \"RESUME\"}"[..],
            b"{\"event\": \"RESUME\"} {\"event\": \"STOP\"}",
        ] {
            let (_stand, process, result) = freeze_after(said, RunHistory::default()).await;
            assert!(matches!(result, Err(FreezeError::Resumed)), "{result:?}");
            process.resume(STOP_DEADLINE).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_resume_before_the_migration_stopped_the_guest_is_no_obstacle() {
        let said = b"{\"event\": \"RESUME\"} {\"event\": \"STOP\"}";
        let mark = RunHistory {
            stops: 1,
            resumes: 1,
            resumed_last: false,
        };
        let (_stand, _process, result) = freeze_after(said, mark).await;
        result.unwrap().thaw().await.unwrap();
    }

    #[tokio::test]
    async fn a_message_cut_in_the_middle_prevents_the_freeze() {
        let (_stand, process, result) = freeze_after(b"{\"event\": \"RES", RunHistory::default()).await;
        assert!(matches!(result, Err(FreezeError::CutMessage)), "{result:?}");
        process.resume(STOP_DEADLINE).await.unwrap();
    }
}
