//! Begins a migration again that the restart of a gateway has undone, at either end: the VM runs on at the source meanwhile, and
//! nobody has to look.
//!
//! It is a new migration with an id of its own, since each is decided once and for all. The report of the one that was undone names it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::registry::Entry;
use super::wanted::Wanted;
use super::{Core, clock};
use crate::api::{self, Report, StartRequest};
use crate::migrate;
use crate::proto::ownership::{AbortReason, JournalRecord, Outcome, RecordKind, Role, Standing, Verdict};
use crate::proto::page::MigrationId;

/// What begins in the place of a migration that has ended.
#[derive(Debug)]
pub(crate) struct Successor {
    pub(crate) migration: MigrationId,
    pub(crate) wanted: Wanted,
}

/// Whether it is the restart of a gateway that a destination gives as its reason.
pub(crate) fn is_restart(reason: AbortReason) -> bool {
    matches!(
        reason,
        AbortReason::Restarted | AbortReason::NeverPrepared | AbortReason::BytesLost
    )
}

/// What comes after a migration that has ended at its source, and why nothing does although a restart has undone it.
pub(crate) async fn successor(
    core: &Core,
    entry: &Entry,
    undone_by_restart: bool,
) -> Result<Successor, Option<String>> {
    let wanted = core.wanted.get(entry.migration).filter(|_| undone_by_restart);
    let next = match wanted {
        // The next process begins it.
        Some(wanted) if core.is_draining() && wanted.request.warm.is_some() => {
            return Err(Some(
                "this gateway is being stopped, and begins it again when it is started".to_owned(),
            ));
        }
        Some(_) if core.is_draining() => Err(Some("this gateway is being stopped and begins nothing".to_owned())),
        Some(wanted) => next(core, entry.migration, wanted).map_err(Some),
        None => Err(None),
    };
    match next {
        Ok(next) => {
            let is_wanted = core
                .wanted
                .replace(entry.migration, next.migration, next.wanted.clone())
                .await;
            if is_wanted { Ok(next) } else { Err(None) }
        }
        Err(why) => {
            core.wanted.forget(entry.migration).await;
            Err(why)
        }
    }
}

fn next(core: &Core, migration: MigrationId, wanted: Wanted) -> Result<Successor, String> {
    Ok(Successor {
        migration: MigrationId(super::random::bytes()),
        wanted: wanted.again(migration, core.config.migration.restarts, clock::unix_ms())?,
    })
}

/// What an earlier process was asked for, has not brought to an end, and no driver has in hand: found before any driver runs.
#[derive(Debug)]
pub(crate) struct Undone(Vec<(MigrationId, Wanted)>);

/// Looks at what an earlier process was asked for. What is done is forgotten.
pub(crate) async fn undone(core: &Core) -> Undone {
    let mut undone = Vec::new();
    for (migration, wanted) in core.wanted.all() {
        let mut records = core.journal.records_of(migration).await;
        records.retain(|record| record.role == Role::Source);
        let found = match wanted.journal == core.journal.id() {
            true => state_of(&records),
            false => Found::Over,
        };
        if found == Found::Over {
            core.wanted.forget(migration).await;
            continue;
        }
        for &earlier in &wanted.earlier {
            remember(core, earlier, &wanted, UNDONE.to_owned(), Some(migration));
        }
        if found == Found::Undone {
            undone.push((migration, wanted));
        }
    }
    // The newest of a VM first: there are two where the earlier process ended between a migration and its successor.
    undone.sort_by_key(|(_, wanted)| std::cmp::Reverse(wanted.restarts));
    Undone(undone)
}

/// Begins it again.
pub(crate) async fn take_up(core: &Arc<Core>, undone: Undone) {
    let mut begun: BTreeMap<String, Option<MigrationId>> = BTreeMap::new();
    for (migration, wanted) in undone.0 {
        if let Some(instead) = begun.get(&wanted.request.vm) {
            core.wanted.forget(migration).await;
            remember(core, migration, &wanted, UNDONE.to_owned(), *instead);
            continue;
        }
        let next = match next(core, migration, wanted.clone()) {
            Ok(next) => next,
            Err(why) => {
                core.wanted.forget(migration).await;
                remember(core, migration, &wanted, format!("{UNDONE}, and {why}"), None);
                begun.insert(wanted.request.vm, None);
                continue;
            }
        };
        core.wanted
            .replace(migration, next.migration, next.wanted.clone())
            .await;
        remember(core, migration, &wanted, UNDONE.to_owned(), Some(next.migration));
        begun.insert(wanted.request.vm, Some(next.migration));
        migrate::start_again(core, next).await;
    }
}

const UNDONE: &str = "this gateway was restarted in the middle of it";

fn remember(core: &Core, migration: MigrationId, wanted: &Wanted, reason: String, next: Option<MigrationId>) {
    let StartRequest { vm, peer, .. } = &wanted.request;
    let report = Report {
        continued_as: next,
        ..Report::without_figures(migration, vm, peer, api::Outcome::Failed, reason)
    };
    core.registry.remember(report, api::Role::Source, clock::now());
}

/// What the journal says of a migration that was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Its driver will come to an end with it.
    Open,
    /// The VM is here, as it was.
    Undone,
    /// It has arrived, or ended for another reason than a restart.
    Over,
}

fn state_of(records: &[JournalRecord]) -> Found {
    if records.is_empty() {
        // Not even begun.
        return Found::Undone;
    }
    if Standing::of(records.iter().map(|record| &record.kind)) == Standing::Open {
        return Found::Open;
    }
    if is_undone(records) { Found::Undone } else { Found::Over }
}

/// Whether the VM is at its source, or will be, for no other reason than that a gateway was restarted: by the source's records, once that gateway
/// was.
pub(crate) fn is_undone(records: &[JournalRecord]) -> bool {
    records.iter().all(|record| match &record.kind {
        RecordKind::Learnt(Verdict::Aborted(reason)) => is_restart(*reason),
        RecordKind::Learnt(Verdict::Running | Verdict::Reverted) | RecordKind::Resolved(_) => false,
        RecordKind::Closed(outcome) => *outcome == Outcome::RunsAtSource,
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::JournalId;

    fn records(kinds: &[RecordKind]) -> Vec<JournalRecord> {
        let record = |kind: &RecordKind| JournalRecord {
            migration: MigrationId([1; 16]),
            role: Role::Source,
            kind: kind.clone(),
            peer: "tokyo".to_owned(),
            peer_journal: JournalId([2; 16]),
            vm: "db-1".to_owned(),
            context: vec![],
            unix_ms: 0,
        };
        kinds.iter().map(record).collect()
    }

    #[test]
    fn only_what_a_restart_has_undone_is_begun_again() {
        let started = RecordKind::Started { was_running: true };
        let here = RecordKind::Closed(Outcome::RunsAtSource);
        let learnt = |reason| RecordKind::Learnt(Verdict::Aborted(reason));
        let found = |kinds: &[RecordKind]| state_of(&records(kinds));
        assert_eq!(found(&[]), Found::Undone);
        assert_eq!(found(std::slice::from_ref(&started)), Found::Open);
        assert_eq!(found(&[started.clone(), here.clone()]), Found::Undone);
        for (reason, expected) in [
            (AbortReason::Restarted, Found::Undone),
            (AbortReason::BytesLost, Found::Undone),
            (AbortReason::LoadFailed, Found::Over),
            (AbortReason::Cancelled, Found::Over),
        ] {
            assert_eq!(
                found(&[started.clone(), learnt(reason), here.clone()]),
                expected,
                "{reason}"
            );
        }
        for outcome in [Outcome::RunsAtDestination, Outcome::VmmDied] {
            assert_eq!(found(&[started.clone(), RecordKind::Closed(outcome)]), Found::Over);
        }
    }
}
