//! After a restart: every migration that the journal leaves open is taken up where it stood.
//!
//! Nothing is guessed. The journal says what was recorded, the hypervisor what its guest does, the peer what it decided; the
//! same ownership machines as during a migration draw the conclusions.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::destination::{Attachment, DestinationDriver, DestinationStart};
use super::destination_vmm::DestinationVmm;
use super::registry::Entry;
use super::source::{SourceDriver, SourceStart};
use super::source_vmm::SourceVmm;
use super::vm_context::VmContext;
use super::{Core, again};
use crate::api::{self, Phase};
use crate::migrate;
use crate::proto::ownership::{
    Destination, DestinationTerms, JournalRecord, RecordKind, Role, Source, Standing, VmmFact,
};
use crate::proto::page::MigrationId;

/// Takes up what an earlier process left open. A hypervisor that does not answer holds up nothing but its own migration.
pub(crate) async fn recover_all(core: &Arc<Core>, open: Vec<(MigrationId, Role)>) {
    let mut recovering = JoinSet::new();
    for (migration, role) in open {
        recovering.spawn(recover(Arc::clone(core), migration, role));
    }
    recovering.join_all().await;
}

async fn recover(core: Arc<Core>, migration: MigrationId, role: Role) {
    let mut records = core.journal.records_of(migration).await;
    records.retain(|record| record.role == role);
    let recovered = match role {
        Role::Source => source(&core, migration, &records).await,
        Role::Destination => destination(&core, migration, &records, None).await,
    };
    if let (Err(reason), Some(first)) = (recovered, records.first()) {
        let role = match role {
            Role::Source => api::Role::Source,
            Role::Destination => api::Role::Destination,
        };
        let now = super::clock::now();
        let (entry, _) = core
            .registry
            .add_recovered(migration, &first.vm, &first.peer, role, now);
        entry.advise(&format!(
            "{}: what the journal says of this migration cannot be taken up ({reason}); find out where the VM runs before you \
             start or stop it anywhere",
            first.vm
        ));
    }
}

/// The migrations that ended here, and of which the source has not said that it knows: its word was lost.
pub(crate) fn owed(records: &[JournalRecord]) -> Vec<MigrationId> {
    let mut kinds: BTreeMap<MigrationId, Vec<&RecordKind>> = BTreeMap::new();
    for record in records.iter().filter(|record| record.role == Role::Destination) {
        kinds.entry(record.migration).or_default().push(&record.kind);
    }
    // What a person decided is kept for ever, closed or not.
    kinds.retain(|_, kinds| {
        matches!(kinds.last(), Some(RecordKind::Running | RecordKind::Revert))
            && Standing::of(kinds.iter().copied()) == Standing::Owed
    });
    kinds.into_keys().collect()
}

/// Asks the sources of migrations that are [`owed`]. One that has closed the migration needs no answer any more.
pub(crate) async fn settle_owed(core: &Arc<Core>, owed: Vec<MigrationId>) {
    for migration in owed {
        let mut records = core.journal.records_of(migration).await;
        records.retain(|record| record.role == Role::Destination);
        let Some(first) = records.first() else { continue };
        // The verdict stands, whatever has become of the vmm since.
        match Destination::recover(&records, core.journal.id(), VmmFact::Unreachable) {
            Ok((machine, effects)) => {
                // The earlier process may have ended before it announced the VM.
                let vmm = newest_context(&records)
                    .map(|context| DestinationVmm::of_earlier(context, core.vmm_log(migration)));
                let start = DestinationStart {
                    machine,
                    effects,
                    vmm,
                    source_journal: first.peer_journal,
                    decoder: None,
                    image: None,
                    keeps: false,
                    window_bytes: 0,
                    disks: Vec::new(),
                };
                start_destination(core, migration, &first.peer, &first.vm, start);
            }
            Err(error) => tracing::error!(%migration, "{error}"),
        }
    }
}

async fn source(core: &Arc<Core>, migration: MigrationId, records: &[JournalRecord]) -> Result<(), String> {
    let first = &records[0];
    let was_running = records
        .iter()
        .find_map(|record| match record.kind {
            RecordKind::Started { was_running } => Some(was_running),
            _ => None,
        })
        .unwrap_or(true);
    let context = newest_context(records).ok_or("the journal does not say where the hypervisor is")?;
    let (vmm, fact) = SourceVmm::find(context, was_running).await;
    let (machine, effects) = Source::recover(records, fact).map_err(|error| error.to_string())?;
    tracing::info!(%migration, vm = first.vm, peer = first.peer, state = machine.state().name(), ?fact, "recovering");
    let (entry, orders) = core
        .registry
        .add(
            migration,
            &first.vm,
            &first.peer,
            api::Role::Source,
            super::clock::now(),
        )
        .map_err(|busy| format!("{} has migration {migration} open in the journal, and {busy}", first.vm))?;
    entry.set_phase(Phase::Committing);
    let peer_journal = first.peer_journal;
    let undone_by_restart = again::is_undone(records);
    let start = SourceStart {
        vmm,
        machine,
        effects,
        peer_journal,
        copying: None,
        disks: Vec::new(),
        images: None,
        disk_rate: None,
        undone_by_restart,
    };
    let mut driver = SourceDriver::new(Arc::clone(core), Arc::clone(&entry), orders, start);
    driver.look_for_peer();
    let core = Arc::clone(core);
    tokio::spawn(async move {
        let mut end = driver.run(None).await;
        let restarted = "this gateway was restarted in the middle of it";
        end.reason.get_or_insert_with(|| restarted.to_owned());
        migrate::finish(&core, &entry, end).await;
    });
    Ok(())
}

async fn destination(
    core: &Arc<Core>,
    migration: MigrationId,
    records: &[JournalRecord],
    expected_peer: Option<&str>,
) -> Result<(), String> {
    let first = &records[0];
    if expected_peer.is_some_and(|peer| peer != first.peer) {
        return Err(format!("migration {migration} belongs to another peer"));
    }
    let context = newest_context(records);
    let (vmm, fact) = match context {
        Some(context) => {
            let (vmm, fact) = DestinationVmm::find(context, core.vmm_log(migration)).await;
            (Some(vmm), fact)
        }
        None => (None, VmmFact::Dead),
    };
    let own_journal = core.journal.id();
    let (machine, effects) = Destination::recover(records, own_journal, fact).map_err(|error| error.to_string())?;
    tracing::info!(%migration, vm = first.vm, peer = first.peer, state = machine.state().name(), ?fact, "recovering");
    start_destination(
        core,
        migration,
        &first.peer,
        &first.vm,
        DestinationStart {
            machine,
            effects,
            vmm,
            source_journal: first.peer_journal,
            decoder: None,
            image: None,
            keeps: false,
            window_bytes: 0,
            disks: Vec::new(),
        },
    );
    Ok(())
}

/// A driver for a migration that a source asks about and no driver serves: from the journal, or, where that knows nothing,
/// one that makes sure that nothing will ever come of it.
pub(crate) async fn answer_for(
    core: &Arc<Core>,
    peer: &str,
    migration: MigrationId,
    attachment: &mut Attachment,
) -> Result<(), String> {
    let records: Vec<JournalRecord> = core
        .journal
        .records_of(migration)
        .await
        .into_iter()
        .filter(|record| record.role == Role::Destination)
        .collect();
    if !records.is_empty() {
        return destination(core, migration, &records, Some(peer)).await;
    }
    let machine = Destination::new(DestinationTerms {
        own_journal: core.journal.id(),
        source_journal: attachment.peer_journal,
        barriers: 0,
    });
    start_destination(
        core,
        migration,
        peer,
        "",
        DestinationStart {
            machine,
            effects: Vec::new(),
            vmm: None,
            source_journal: attachment.peer_journal,
            decoder: None,
            image: None,
            keeps: false,
            window_bytes: 0,
            disks: Vec::new(),
        },
    );
    Ok(())
}

/// Whether a migration to `peer` is still under way at its source, which is here. One of which nothing is known is over: a source
/// records that it begins before it lets its vmm begin, and an entry is there before the destination is asked at all.
pub(crate) async fn drives(core: &Core, peer: &str, migration: MigrationId) -> bool {
    if core.entrances.get(migration, peer).is_some() {
        return true;
    }
    let is_entry = |entry: &Entry| entry.role == api::Role::Source && entry.peer == peer && !entry.has_ended();
    if core.registry.get(migration).is_some_and(|entry| is_entry(&entry)) {
        return true;
    }
    let records = core.journal.records_of(migration).await;
    let mut records = records
        .iter()
        .filter(|record| record.role == Role::Source && record.peer == peer)
        .peekable();
    records.peek().is_some() && Standing::of(records.map(|record| &record.kind)) == Standing::Open
}

/// Whether a migration to `peer` that is over was begun again, or is likely to be: nothing but a cut was the matter.
pub(crate) fn is_followed(core: &Core, peer: &str, migration: MigrationId) -> bool {
    let entry = core.registry.get(migration);
    let entry = entry.filter(|entry| entry.role == api::Role::Source && entry.peer == peer);
    entry.is_some_and(|entry| entry.successor().is_some() || entry.was_cut())
}

fn start_destination(core: &Arc<Core>, migration: MigrationId, peer: &str, vm: &str, start: DestinationStart) {
    let (entry, orders) = core
        .registry
        .add_recovered(migration, vm, peer, api::Role::Destination, super::clock::now());
    let (attach, attachments) = mpsc::channel(4);
    core.drivers.insert(migration, peer, attach);
    let driver = DestinationDriver::new(Arc::clone(core), entry, orders, attachments, start);
    tokio::spawn(driver.run(None));
}

fn newest_context(records: &[JournalRecord]) -> Option<VmContext> {
    records
        .iter()
        .rev()
        .find_map(|record| VmContext::from_bytes(&record.context))
}
