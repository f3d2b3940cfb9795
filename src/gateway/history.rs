//! What the journal remembers of migrations that were over before this process began: for `longhaul list` and `status`, and for
//! commands that waited while the gateway was away.

use std::collections::BTreeMap;

use super::destination::outcome_of;
use crate::api::{self, Report};
use crate::proto::ownership::{Claim, JournalRecord, Outcome, RecordKind, Role, Standing, Verdict};

/// A report on each migration that needs nothing more, those that ended last at the end.
pub(crate) fn reports(records: &[JournalRecord], site: &str) -> Vec<(api::Role, Report)> {
    let mut migrations: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (at, record) in records.iter().enumerate() {
        migrations.entry((record.migration, record.role)).or_default().push(at);
    }
    let mut ended: Vec<_> = migrations.into_values().collect();
    ended.sort_by_key(|at| at.last().copied());
    ended
        .into_iter()
        .filter_map(|at| {
            let of_one: Vec<&JournalRecord> = at.into_iter().map(|at| &records[at]).collect();
            report(&of_one, site)
        })
        .collect()
}

/// `None` where the migration is open, or one that this side never took part in.
fn report(records: &[&JournalRecord], site: &str) -> Option<(api::Role, Report)> {
    let (first, last) = (records.first()?, records.last()?);
    if first.vm.is_empty() || Standing::of(records.iter().map(|record| &record.kind)) == Standing::Open {
        return None;
    }
    let (role, (outcome, reason)) = match first.role {
        Role::Source => (api::Role::Source, at_source(records, first)?),
        Role::Destination => (api::Role::Destination, at_destination(records, first, site)?),
    };
    let report = Report {
        total_seconds: last.unix_ms.saturating_sub(first.unix_ms) as f64 / 1e3,
        ..Report::without_figures(first.migration, &first.vm, &first.peer, outcome, reason)
    };
    Some((role, report))
}

fn at_source(records: &[&JournalRecord], first: &JournalRecord) -> Option<(api::Outcome, String)> {
    let (vm, peer) = (&first.vm, &first.peer);
    let learnt = records.iter().find_map(|record| match &record.kind {
        RecordKind::Learnt(verdict) => Some(*verdict),
        _ => None,
    });
    let closed = records.iter().find_map(|record| match &record.kind {
        RecordKind::Closed(outcome) => Some(*outcome),
        _ => None,
    })?;
    Some(match (closed, learnt) {
        (Outcome::RunsAtDestination, _) => (api::Outcome::Completed, format!("{vm} runs at {peer}")),
        (Outcome::RunsAtSource, Some(verdict)) => outcome_of(verdict, vm, peer),
        (Outcome::RunsAtSource, None) => {
            let reason = format!("it was given up before {vm} was handed over to {peer}");
            (api::Outcome::Failed, reason)
        }
        (Outcome::VmmDied, _) => (api::Outcome::VmDied, vm_died(vm)),
    })
}

/// What is to be done about a VM whose hypervisor died under way.
pub(crate) fn vm_died(vm: &str) -> String {
    format!(
        "the hypervisor of {vm} at the source died, and the destination has not got the whole VM: start {vm} at the source"
    )
}

fn at_destination(records: &[&JournalRecord], first: &JournalRecord, site: &str) -> Option<(api::Outcome, String)> {
    let verdict = records.iter().rev().find_map(|record| match &record.kind {
        RecordKind::Running => Some(Verdict::Running),
        RecordKind::Abort(reason) => Some(Verdict::Aborted(*reason)),
        RecordKind::Revert => Some(Verdict::Reverted),
        RecordKind::Resolved(resolution) => Some(match resolution.claim {
            Claim::PeerIsFenced => Verdict::Running,
            Claim::PeerOwns => Verdict::Reverted,
        }),
        _ => None,
    })?;
    Some(outcome_of(verdict, &first.vm, site))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ownership::{AbortReason, Permit, StreamSum};
    use crate::proto::page::{JournalId, MigrationId, StreamDigest};

    fn record(migration: u8, role: Role, kind: RecordKind, unix_ms: u64) -> JournalRecord {
        JournalRecord {
            migration: MigrationId([migration; 16]),
            role,
            kind,
            peer: "site-b".to_owned(),
            peer_journal: JournalId([2; 16]),
            vm: "web".to_owned(),
            context: vec![],
            unix_ms,
        }
    }

    fn permit() -> Permit {
        Permit {
            stream: StreamSum {
                digest: StreamDigest([7; 32]),
                length: 1,
            },
            was_running: true,
            destination_journal: JournalId([2; 16]),
        }
    }

    #[test]
    fn a_migration_that_is_over_is_told_with_its_outcome_and_an_open_one_is_not() {
        let started = RecordKind::Started { was_running: true };
        let records = [
            record(1, Role::Source, started.clone(), 1_000),
            record(2, Role::Destination, RecordKind::Prepared, 1_500),
            record(3, Role::Source, started, 1_600),
            record(1, Role::Source, RecordKind::Permit(permit()), 2_000),
            record(2, Role::Destination, RecordKind::Abort(AbortReason::Restarted), 2_500),
            record(1, Role::Source, RecordKind::Learnt(Verdict::Running), 3_000),
            record(1, Role::Source, RecordKind::Closed(Outcome::RunsAtDestination), 4_500),
        ];
        let told = reports(&records, "site-a");
        let told: Vec<_> = told
            .iter()
            .map(|(role, report)| (*role, report.migration.0[0], report.outcome, report.total_seconds))
            .collect();
        assert_eq!(
            told,
            [
                (api::Role::Destination, 2, api::Outcome::Failed, 1.0),
                (api::Role::Source, 1, api::Outcome::Completed, 3.5),
            ]
        );
    }

    #[test]
    fn a_vm_that_runs_here_is_told_so_before_the_source_has_confirmed_it() {
        let records = [
            record(1, Role::Destination, RecordKind::Prepared, 0),
            record(1, Role::Destination, RecordKind::Commit(permit()), 0),
            record(1, Role::Destination, RecordKind::Running, 0),
        ];
        let told = reports(&records, "site-a");
        assert_eq!(told[0].1.outcome, api::Outcome::Completed);
        assert_eq!(told[0].1.reason, "web is at site-a");
    }
}
