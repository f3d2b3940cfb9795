//! A disk moves to another image at the same site, while its guest runs or while the VM is off.
//!
//! ```text
//! request ─▶ plan ─▶ live ─▶ QEMU's mirror job ─▶ settle: turned, or undone      (also for what an earlier process left)
//!               └──▶ cold ─▶ qemu-img convert, compare, under the image's locks
//! ```
//!
//! The new image is marked as ours until the disk is in it ([`volumes`](super::disks::volumes)), and a [`record`] names it before it is made: a
//! gateway that is killed anywhere finds both at its next start. The old image is never changed, and stays unless its removal was asked for.
//! While a disk moves, no migration of its VM begins, and the other way round: the [`Registry`](super::registry::Registry) has both.

mod cold;
mod following;
mod live;
mod plan;
mod record;
mod settle;
mod words;

use std::sync::Arc;

use tokio::sync::mpsc;

pub(crate) use self::following::DiskMove;
use self::plan::{How, Job, Plan};
use self::record::Record;
use super::disks::volumes;
use super::registry::Busy;
use super::{Core, clock, random};
use crate::api::{
    Cancellation, DiskOfVm, MoveDiskEvent, MoveDiskOutcome, MoveDiskPlan, MoveDiskReport, MoveDiskRequest, Refusal,
    RefusalKind,
};
use crate::hypervisor::qemu::short_name;
use crate::proto::page::MigrationId;

pub(crate) use self::settle::recover;

/// How a move ended, beside what was planned.
#[derive(Debug)]
struct Ended {
    outcome: MoveDiskOutcome,
    reason: Option<String>,
    old_removed: bool,
    todo: Vec<String>,
}

/// Why a copy did not get to its end.
#[derive(Debug)]
enum Stop {
    Cancelled,
    Failed(String),
}

/// Holds a VM for a move: it is free for others when this is dropped.
#[derive(Debug)]
struct Hold {
    core: Arc<Core>,
    this: Arc<DiskMove>,
}

impl Hold {
    fn take(core: &Arc<Core>, vm: &str, disk: &str) -> Result<Hold, Busy> {
        let this = Arc::new(DiskMove::new(vm, short_name(disk), clock::now()));
        core.registry.hold(&this)?;
        Ok(Hold {
            core: Arc::clone(core),
            this,
        })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.core.registry.release(&self.this);
    }
}

/// Makes every check, and begins.
///
/// # Errors
/// Why it is not begun: nothing was made or changed.
pub(crate) async fn start(
    core: &Arc<Core>,
    request: MoveDiskRequest,
) -> Result<mpsc::Receiver<MoveDiskEvent>, Refusal> {
    let (hold, plan) = planned(core, &request).await?;
    let events = hold.this.follow();
    tracing::info!(vm = plan.shown.vm, disk = plan.shown.disk, to = %plan.shown.to.display(), live = plan.shown.live, "a disk is moved");
    tokio::spawn(run(hold, plan));
    Ok(events)
}

/// Makes every check; nothing is made.
///
/// # Errors
/// Why it would not be begun.
pub(crate) async fn check(core: &Arc<Core>, request: MoveDiskRequest) -> Result<MoveDiskPlan, Refusal> {
    Ok(planned(core, &request).await?.1.shown)
}

async fn planned(core: &Arc<Core>, request: &MoveDiskRequest) -> Result<(Hold, Plan), Refusal> {
    if core.is_draining() {
        let text = "the gateway is being stopped and moves no disks";
        return Err(Refusal::new(RefusalKind::Unavailable, text));
    }
    // One that has just arrived here, or has just been undone.
    core.registry.gives_way(&request.vm, None).await;
    let hold = Hold::take(core, &request.vm, &request.disk)
        .map_err(|error| Refusal::new(RefusalKind::Conflict, error.to_string()))?;
    let plan = Plan::make(core, request).await?;
    Ok((hold, plan))
}

/// Looks on at a move, or at how the last one ended.
///
/// # Errors
/// There is none of this disk since the gateway was started.
pub(crate) fn follow(core: &Core, of: &DiskOfVm) -> Result<mpsc::Receiver<MoveDiskEvent>, Refusal> {
    let ended = core.registry.ended_disk_move(&of.vm);
    let ended = ended.filter(|this| this.disk == short_name(&of.disk) && this.has_report());
    match (under_way(core, of), ended) {
        (Ok(this), _) | (Err(_), Some(this)) => Ok(this.follow()),
        (Err(refusal), None) => Err(refusal),
    }
}

/// Cancels a move.
///
/// # Errors
/// There is none of this disk, or it cannot be undone any more.
pub(crate) fn cancel(core: &Core, of: &DiskOfVm) -> Result<Cancellation, Refusal> {
    under_way(core, of)?.request_cancel()
}

fn under_way(core: &Core, of: &DiskOfVm) -> Result<Arc<DiskMove>, Refusal> {
    let found = core.registry.disk_move(&of.vm);
    let found = found.filter(|this| this.disk == short_name(&of.disk));
    found.ok_or_else(|| {
        let text = format!("the disk {} of {} is not being moved", of.disk, of.vm);
        Refusal::new(RefusalKind::NotFound, text)
    })
}

async fn run(hold: Hold, plan: Plan) {
    let Hold { core, this } = &hold;
    let id = MigrationId(random::bytes());
    let Plan { shown, job, how } = plan;
    let ended = match how {
        How::Live { vm, disk } => live::run(core, this, id, &shown, &job, *vm, &disk).await,
        How::Cold(source) => cold::run(core, this, id, &shown, &job, &source).await,
    };
    let now = clock::now();
    match (&ended.outcome, &ended.reason) {
        (MoveDiskOutcome::Moved, _) => tracing::info!(vm = shown.vm, disk = shown.disk, "the disk is moved"),
        (outcome, reason) => {
            tracing::warn!(
                vm = shown.vm,
                disk = shown.disk,
                ?outcome,
                "{}",
                reason.as_deref().unwrap_or_default()
            );
        }
    }
    let new_bytes = std::fs::metadata(&shown.to).ok().map(|image| {
        use std::os::unix::fs::MetadataExt as _;
        image.blocks() * 512
    });
    let report = MoveDiskReport {
        outcome: ended.outcome,
        plan: shown,
        reason: ended.reason,
        total_seconds: now.saturating_duration_since(this.started).as_secs_f64(),
        new_bytes,
        old_removed: ended.old_removed,
        todo: ended.todo,
    };
    let this = Arc::clone(this);
    // Whoever hears of the end may ask for the next.
    drop(hold);
    this.finish(report);
}

/// Makes the new image, of which the record is written before. It belongs to whoever opens it, as far as that is known.
async fn make(
    core: &Core,
    this: &DiskMove,
    shown: &MoveDiskPlan,
    job: &Job,
    record: &Record,
    owner: Option<(u32, u32)>,
) -> Result<(), Stop> {
    record.write(&core.config.state_dir).await.map_err(Stop::Failed)?;
    let made = tokio::select! {
        made = volumes::make_new(&job.image, record.id, shown.size_bytes) => made,
        () = this.cancelled() => return Err(Stop::Cancelled),
    };
    made.map_err(Stop::Failed)?;
    if let Some((user, group)) = owner {
        // Where we may not give it away, QEMU says so when it opens it.
        if let Err(error) = std::os::unix::fs::chown(&shown.to, Some(user), Some(group)) {
            tracing::debug!(image = %shown.to.display(), user, group, "it keeps its owner: {error}");
        }
    }
    Ok(())
}
