//! The end of a move, whoever began it: the disk is one of its two images, and nothing is left of the other one that is ours.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::plan::MONITOR_DEADLINE;
use super::record::{InQemu, Record};
use super::{Hold, words};
use crate::gateway::Core;
use crate::gateway::disks::{mark, volumes};
use crate::hypervisor::qemu::{MirrorError, MirrorJob, MirrorVm};
use crate::hypervisor::qemu_img;
use crate::hypervisor::qmp::QmpError;

/// Between two tries to reach a QEMU.
const RETRY: Duration = Duration::from_secs(1);

/// Between two looks at a job that ends: the guest may stand still meanwhile.
const POLL: Duration = Duration::from_millis(20);

/// How it ended.
#[derive(Debug)]
pub(super) enum Settled {
    /// The disk is the new image. What is to be said beside that, if anything.
    Turned { old_removed: bool, advice: Option<String> },
    /// It is the old one.
    Undone,
    /// QEMU ended, or the device was unplugged, while the guest turned: what a person has to do.
    InDoubt(String),
}

/// A QEMU that could be asked, or not.
enum Reached {
    It(Box<MirrorVm>),
    /// The process that moved the disk is not there any more.
    Ended,
    NotNow(String),
}

/// Brings a move to its end: lets it be where the guest has turned to the new image, and undoes it everywhere else. `vm`: where it is
/// connected already. Goes on until QEMU answers or has ended.
pub(super) async fn settle(
    core: &Core,
    record: &Record,
    mut vm: Option<MirrorVm>,
    mut notice: impl FnMut(&str),
) -> Settled {
    let mut has_told = false;
    let settled = loop {
        let Some(live) = &record.live else {
            break match record.is_done {
                // The old image is looked after by hand from here on.
                true => Settled::Turned {
                    old_removed: false,
                    advice: None,
                },
                false => Settled::Undone,
            };
        };
        let reached = match vm.take() {
            Some(vm) => Reached::It(Box::new(vm)),
            None => reach(live).await,
        };
        let error = match reached {
            Reached::It(vm) => match end_job(&vm, live).await {
                Ok(Disk::New) => break turned(&vm, record, live).await,
                Ok(Disk::Old) => break Settled::Undone,
                // The device was unplugged just then.
                Ok(Disk::Gone) => break Settled::InDoubt(in_doubt(record)),
                Err(error) => error.to_string(),
            },
            Reached::Ended if live.turning => break Settled::InDoubt(in_doubt(record)),
            Reached::Ended => break Settled::Undone,
            Reached::NotNow(error) => error,
        };
        if !std::mem::replace(&mut has_told, true) {
            let text = format!(
                "what is left of the move of {} of {} cannot be taken out of its QEMU yet, and is tried until it can: {error}",
                record.disk, record.vm
            );
            notice(&text);
        }
        tokio::time::sleep(RETRY).await;
    };
    match &settled {
        Settled::Undone => {
            // One that allocates or copies outlives the process that started it, and an image that is removed.
            qemu_img::end_all_on(&record.to).await;
            mark::discard_one(&record.to, record.id).await;
        }
        Settled::Turned { .. } | Settled::InDoubt(_) => mark::keep_one(&record.to, record.id),
    }
    record.remove(&core.config.state_dir).await;
    settled
}

async fn reach(live: &InQemu) -> Reached {
    match MirrorVm::connect(&live.qmp, MONITOR_DEADLINE).await {
        Ok(vm) if *vm.identity() == live.process => Reached::It(Box::new(vm)),
        Ok(_) => Reached::Ended,
        Err(MirrorError::Qmp(QmpError::NoSocket { .. } | QmpError::NotListening { .. })) => Reached::Ended,
        Err(error) => Reached::NotNow(error.to_string()),
    }
}

/// What a disk is.
enum Disk {
    New,
    Old,
    /// It may have turned, and is not there any more.
    Gone,
}

/// Ends the job, if there is one, and the node of the new image where that is not the disk.
async fn end_job(vm: &MirrorVm, live: &InQemu) -> Result<Disk, MirrorError> {
    loop {
        match vm.job(&live.new_node).await? {
            None => break,
            Some(MirrorJob::Ended(_)) => {
                vm.dismiss(&live.new_node).await?;
                break;
            }
            Some(MirrorJob::Runs { .. } | MirrorJob::Ready) => match vm.cancel(&live.new_node).await {
                // It ends by itself already.
                Err(MirrorError::Qmp(error)) if error.is_refusal() => {}
                cancelled => cancelled?,
            },
        }
        tokio::time::sleep(POLL).await;
    }
    match vm.node_of(&live.disk).await? {
        Some(node) if node == live.new_node => return Ok(Disk::New),
        None if live.turning => return Ok(Disk::Gone),
        Some(_) | None => {}
    }
    vm.remove_node(&live.new_node).await?;
    Ok(Disk::Old)
}

/// Closes the old image, and removes it where that is wanted and nobody has it.
async fn turned(vm: &MirrorVm, record: &Record, live: &InQemu) -> Settled {
    let _ = vm.remove_node(&live.old_node).await;
    let is_closed = vm.close_file(&live.old_file).await.unwrap_or(false);
    let Some(from) = &record.from else {
        let advice = (!is_closed).then(|| "QEMU keeps the old image open until it ends".to_owned());
        return Settled::Turned {
            old_removed: false,
            advice,
        };
    };
    let (old_removed, advice) = match (is_closed, record.remove_old) {
        (true, true) => match remove_old(from).await {
            Ok(()) => (true, None),
            Err(reason) => (false, Some(reason)),
        },
        (true, false) => (false, None),
        (false, _) => {
            let text = format!(
                "QEMU keeps {} open until it ends: do not remove it before",
                from.display()
            );
            (false, Some(text))
        }
    };
    Settled::Turned { old_removed, advice }
}

/// Removes an image that is not a disk any more, unless somebody uses it.
async fn remove_old(image: &Path) -> Result<(), String> {
    // Another VM may stand on it.
    if File::open(image).is_ok_and(|file| volumes::is_used(&file)) {
        return Err(format!(
            "{} was not removed: somebody else holds its lock",
            image.display()
        ));
    }
    remove_file(image).await
}

/// Removes an image that is held, or that nobody uses. It is not opened, by which a lock of ours would be lost.
///
/// # Errors
/// A sentence: it stays.
pub(super) async fn remove_file(image: &Path) -> Result<(), String> {
    let stays = |why: &dyn std::fmt::Display| format!("{} was not removed: {why}", image.display());
    match std::fs::symlink_metadata(image) {
        Ok(file) if file.is_file() => {}
        Ok(_) => return Err(stays(&"it is no file of its own")),
        Err(error) => return Err(stays(&error)),
    }
    tokio::fs::remove_file(image).await.map_err(|error| stays(&error))
}

fn in_doubt(record: &Record) -> String {
    let from = record
        .from
        .as_ref()
        .map_or("the old image".to_owned(), |from| from.display().to_string());
    format!(
        "the QEMU of {} ended, or lost the device, in the moment in which its disk {} turned from {from} to {}, so that either may have the guest's last writes: both \
         were complete then and both are kept; start the VM from the one that was changed last, and remove the other",
        record.vm,
        record.disk,
        record.to.display()
    )
}

/// Ends what an earlier process left. The VMs are held until that is done, so that no migration of theirs begins.
pub(crate) fn recover(core: &Arc<Core>) {
    for record in Record::load_all(&core.config.state_dir) {
        let hold = match Hold::take(core, &record.vm, &record.disk) {
            Ok(hold) => hold,
            Err(busy) => {
                tracing::error!("a move that an earlier process began is not ended, as {busy}");
                continue;
            }
        };
        tokio::spawn(async move {
            let Hold { core, this } = &hold;
            let (vm, disk) = (record.vm.as_str(), record.disk.as_str());
            match settle(core, &record, None, |text| this.notice(text)).await {
                Settled::Undone => tracing::info!(vm, disk, to = %record.to.display(),
                    "a move of a disk was under way when the gateway ended, and is undone: the disk is the image that it was"),
                Settled::InDoubt(advice) => tracing::error!(vm, disk, "{advice}"),
                Settled::Turned { advice, .. } => {
                    tracing::info!(vm, disk, to = %record.to.display(), "the disk had been moved when the gateway ended");
                    let said = core
                        .config
                        .vm(vm)
                        .map(|vm| words::todo(vm, disk, record.from.as_deref(), &record.to, &record.format));
                    for text in said.into_iter().flatten().chain(advice) {
                        tracing::warn!(vm, disk, "{text}");
                    }
                }
            }
        });
    }
}
