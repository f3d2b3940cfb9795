//! The VM runs: its QEMU copies, and turns the guest to the new image.

use std::time::Duration;

use super::record::{InQemu, Record};
use super::settle::{self, Settled};
use super::{DiskMove, Ended, Stop, make, plan::Job, words};
use crate::api::{MoveDiskOutcome, MoveDiskPhase, MoveDiskPlan};
use crate::config::Preallocation;
use crate::gateway::Core;
use crate::hypervisor::qemu::{MirrorError, MirrorJob, MirrorVm, MovableDisk, Target};
use crate::hypervisor::qmp::Events;
use crate::proto::page::MigrationId;

/// Between two looks at the job.
const POLL: Duration = Duration::from_millis(200);

impl From<MirrorError> for Stop {
    fn from(error: MirrorError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Moves the disk. Whatever happens, the guest's disk is one of the two images in the end, and the other one is closed.
pub(super) async fn run(
    core: &Core,
    this: &DiskMove,
    id: MigrationId,
    shown: &MoveDiskPlan,
    job: &Job,
    vm: MirrorVm,
    disk: &MovableDisk,
) -> Ended {
    let mut record = Record {
        id,
        vm: shown.vm.clone(),
        disk: shown.disk.clone(),
        from: shown.from.clone(),
        to: shown.to.clone(),
        format: shown.format.clone(),
        remove_old: job.remove_old,
        live: Some(InQemu {
            qmp: job.vm.qmp.clone(),
            process: vm.identity().clone(),
            disk: disk.name.clone(),
            old_node: disk.node.clone(),
            new_node: format!("longhaul-move-{}", &id.to_string()[..12]),
            old_file: disk.node_file.clone(),
            turning: false,
        }),
        is_done: false,
    };
    this.publish(MoveDiskPhase::Making, 0, shown.size_bytes);
    let stop = copy(core, this, shown, job, &vm, disk, &mut record).await;
    if stop.is_err() {
        this.publish(MoveDiskPhase::Undoing, 0, shown.size_bytes);
    }
    let settled = settle::settle(core, &record, Some(vm), |text| this.notice(text)).await;
    let (outcome, reason) = match (&settled, stop) {
        (Settled::Turned { .. }, _) => (MoveDiskOutcome::Moved, None),
        (Settled::InDoubt(advice), _) => (MoveDiskOutcome::Unknown, Some(advice.clone())),
        (Settled::Undone, Err(Stop::Cancelled)) => (MoveDiskOutcome::Cancelled, None),
        (Settled::Undone, Err(Stop::Failed(reason))) => (MoveDiskOutcome::Failed, Some(reason)),
        (Settled::Undone, Ok(())) => {
            let reason = "QEMU says that it has completed, and yet its disk is the old image";
            (MoveDiskOutcome::Failed, Some(reason.to_owned()))
        }
    };
    let (old_removed, mut todo) = match settled {
        Settled::Turned { old_removed, advice } => (old_removed, advice.into_iter().collect()),
        Settled::Undone | Settled::InDoubt(_) => (false, Vec::new()),
    };
    if outcome == MoveDiskOutcome::Moved {
        let said = words::todo(&job.vm, &shown.disk, shown.from.as_deref(), &shown.to, &shown.format);
        todo.splice(0..0, said);
    }
    Ended {
        outcome,
        reason,
        old_removed,
        todo,
    }
}

async fn copy(
    core: &Core,
    this: &DiskMove,
    shown: &MoveDiskPlan,
    job: &Job,
    vm: &MirrorVm,
    disk: &MovableDisk,
    record: &mut Record,
) -> Result<(), Stop> {
    let state_dir = &core.config.state_dir;
    make(core, this, shown, job, record, vm.user()).await?;
    let node = record
        .live
        .as_ref()
        .map(|live| live.new_node.clone())
        .unwrap_or_default();
    let target = Target {
        node: &node,
        path: &shown.to,
        format: &shown.format,
        // What was allocated beforehand is to stay so.
        discards: matches!(job.image.preallocation, Preallocation::Off | Preallocation::Metadata),
    };
    let mut events = vm.events();
    vm.attach(disk, &target).await?;
    vm.begin(disk, &target, job.rate_bytes_per_second).await?;
    let mut operation = None;
    let mut is_turning = false;
    loop {
        tokio::select! {
            // Also while it turns, which may take long where the guest writes much: what the disk is then, QEMU tells.
            () = this.cancelled() => return Err(Stop::Cancelled),
            failed = failed_operation(&mut events, &node) => operation = Some(failed),
            () = tokio::time::sleep(POLL) => {}
        }
        match vm.job(&node).await? {
            None => return Err(Stop::Failed("somebody else has ended its job in QEMU".to_owned())),
            Some(MirrorJob::Ended(None)) => return Ok(()),
            Some(MirrorJob::Ended(Some(error))) => {
                return Err(Stop::Failed(words::failure(&error, &shown.to, operation.as_deref())));
            }
            Some(MirrorJob::Runs { .. }) if is_turning => {}
            Some(MirrorJob::Runs {
                done_bytes,
                total_bytes,
            }) => {
                this.publish(MoveDiskPhase::Copying, done_bytes, total_bytes.max(shown.size_bytes));
            }
            Some(MirrorJob::Ready) if is_turning => {}
            Some(MirrorJob::Ready) => {
                is_turning = true;
                this.publish(MoveDiskPhase::Turning, shown.size_bytes, shown.size_bytes);
                if let Some(live) = &mut record.live {
                    live.turning = true;
                }
                record.write(state_dir).await.map_err(Stop::Failed)?;
                vm.complete(&node).await?;
            }
        }
    }
}

/// What the job failed at, `read` or `write`, once it has. Only one that follows tells; without it the error alone is told.
async fn failed_operation(events: &mut Events, node: &str) -> String {
    while let Ok(event) = events.next().await {
        if event.name == "BLOCK_JOB_ERROR" && event.data["device"] == node {
            return event.data["operation"].as_str().unwrap_or_default().to_owned();
        }
    }
    std::future::pending().await
}
