//! What migrations that were cut short have left of disks: the next one goes on with it, and where none comes it is removed.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use super::mark;
use crate::config::Vm;
use crate::gateway::channel::Channel;
use crate::gateway::{Core, clock};
use crate::proto::ownership::{JournalRecord, RecordKind, Role};
use crate::proto::page::MigrationId;
use crate::proto::wire::Request;
use crate::proto::wire::message::Reply;

/// How long the source is asked.
const ASK_FOR: Duration = Duration::from_secs(60);

/// Until it is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(300);

/// Between two looks for what nobody has gone on with.
const EXPIRY: Duration = Duration::from_secs(600);

/// How long that is kept after it was written last.
const UNFINISHED_FOR: Duration = Duration::from_secs(24 * 3600);

/// Asks the source whether it begins the migration again, and removes what there is of it where it does not. Where the source does not answer, it may
/// still do so.
pub(crate) async fn settle(core: Arc<Core>, vm: String, peer: String, migration: MigrationId) {
    let asked = async {
        while let Some(vm) = core.config.vm(&vm).filter(|vm| mark::is_unfinished(vm, migration)) {
            match ask(&core, &peer, migration).await {
                Some(Reply::Followed) => return,
                Some(Reply::Drives(false)) => {
                    return mark::remove_unfinished(vm, |of, is_over, _| is_over && of == migration).await;
                }
                _ => tokio::time::sleep(ASK_AGAIN).await,
            }
        }
    };
    if tokio::time::timeout(ASK_FOR, asked).await.is_err() {
        tracing::info!(%migration, vm, peer, "what has arrived of its disks is kept for a day: whether it is begun again was not said");
    }
}

/// An image whose VM is here by the journal is its disk, whatever became of its mark: power may have failed just after that was changed.
async fn keep_arrived(core: &Core, vm: &Vm) {
    for migration in mark::written_in(vm) {
        let records = core.journal.records_of(migration).await;
        let is_here = |record: &JournalRecord| record.role == Role::Destination && record.kind == RecordKind::Running;
        if records.iter().any(is_here) {
            mark::keep(vm, migration);
        }
    }
}

async fn ask(core: &Core, peer: &str, migration: MigrationId) -> Option<Reply> {
    let link = core.links.link(peer).await.ok()?;
    Channel::ask(link.control(), &Request::Drives { migration }).await.ok()
}

/// Removes, for ever, what has been left for too long.
pub(crate) async fn expire(core: Arc<Core>) {
    // A gateway may have been killed before it put something away.
    let is_open = |migration| core.registry.get(migration).is_some_and(|entry| !entry.has_ended());
    let is_old = |migration, is_over: bool, file: &File| {
        let modified = file.metadata().and_then(|metadata| metadata.modified());
        let age = modified
            .ok()
            .and_then(|modified| clock::wall().duration_since(modified).ok());
        age.is_some_and(|age| age > UNFINISHED_FOR) && (is_over || !is_open(migration))
    };
    let mut looks = tokio::time::interval(EXPIRY);
    loop {
        looks.tick().await;
        for vm in &core.config.vms {
            keep_arrived(&core, vm).await;
            mark::remove_unfinished(vm, is_old).await;
        }
    }
}
