//! Whether everything was sent and the guest is stopped for good, as far as QEMU is concerned.

use super::progress::MigrationProgress;
use super::query_run_state;
use super::state::{MigrationStatus, RunState};
use crate::hypervisor::qmp::{QmpClient, QmpError};

/// Whether PERMIT may be given as far as QEMU is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PermitConditions {
    /// `query-migrate` says completed and `query-status` says postmigrate.
    Met,
    /// Not yet.
    NotYet {
        /// Status of the migration.
        status: MigrationStatus,
        /// State of the guest.
        run_state: RunState,
    },
    /// They will not be met: the migration has failed or was cancelled, and QEMU restarts a guest that was running.
    Failed {
        /// Status of the migration.
        status: MigrationStatus,
        /// QEMU's reason, if it gave one.
        error: Option<String>,
    },
    /// The migration completed, and then somebody resumed the guest or changed its state.
    Disturbed {
        /// State of the guest.
        run_state: RunState,
    },
}

impl PermitConditions {
    /// Asks QEMU both at once, to save a round trip of downtime. QEMU answers in order, so what it says of the guest is at
    /// least as new as what it says of the migration.
    pub(super) async fn query(qmp: &QmpClient) -> Result<PermitConditions, QmpError> {
        let (progress, run_state) = tokio::try_join!(biased; MigrationProgress::query(qmp), query_run_state(qmp))?;
        Ok(PermitConditions::from_states(progress, run_state))
    }

    fn from_states(progress: MigrationProgress, run_state: RunState) -> PermitConditions {
        let status = progress.status;
        match (&status, &run_state) {
            (MigrationStatus::Completed, RunState::PostMigrate) => PermitConditions::Met,
            // QEMU reports `completed` before it changes the guest's state.
            (MigrationStatus::Completed, RunState::FinishMigrate) => PermitConditions::NotYet { status, run_state },
            (MigrationStatus::Completed, _) => PermitConditions::Disturbed { run_state },
            _ if status.is_under_way() => PermitConditions::NotYet { status, run_state },
            _ => PermitConditions::Failed {
                status,
                error: progress.error,
            },
        }
    }
}

impl std::fmt::Display for PermitConditions {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PermitConditions::Met => write!(out, "everything is sent and the guest is stopped"),
            PermitConditions::NotYet { status, run_state } => {
                write!(out, "its migration is {status} and its state {run_state}")
            }
            PermitConditions::Failed {
                status,
                error: Some(error),
            } => write!(out, "its migration is {status} ({error})"),
            PermitConditions::Failed { status, error: None } => write!(out, "its migration is {status}"),
            PermitConditions::Disturbed { run_state } => {
                write!(
                    out,
                    "its migration completed, but somebody has brought the guest into the state {run_state}"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: Option<&str>, run_state: &str) -> PermitConditions {
        let progress = MigrationProgress::of_status(MigrationStatus::from_name(status));
        PermitConditions::from_states(progress, RunState::from_name(run_state))
    }

    #[test]
    fn only_completed_and_postmigrate_together_permit() {
        let statuses = [
            "setup",
            "active",
            "pre-switchover",
            "device",
            "completed",
            "failed",
            "cancelling",
            "cancelled",
            "colo",
        ];
        let states = [
            "running",
            "paused",
            "prelaunch",
            "inmigrate",
            "finish-migrate",
            "postmigrate",
            "suspended",
            "io-error",
        ];
        for status in statuses.map(Some).into_iter().chain([None]) {
            for state in states {
                let is_met = of(status, state) == PermitConditions::Met;
                assert_eq!(
                    is_met,
                    status == Some("completed") && state == "postmigrate",
                    "{status:?} {state}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_come_true_any_more_is_not_waited_for() {
        assert!(matches!(
            of(Some("completed"), "finish-migrate"),
            PermitConditions::NotYet { .. }
        ));
        assert!(matches!(of(Some("active"), "running"), PermitConditions::NotYet { .. }));
        assert!(matches!(
            of(Some("completed"), "running"),
            PermitConditions::Disturbed { .. }
        ));
        assert!(matches!(
            of(Some("completed"), "paused"),
            PermitConditions::Disturbed { .. }
        ));
        for status in [None, Some("failed"), Some("cancelled")] {
            assert!(matches!(of(status, "postmigrate"), PermitConditions::Failed { .. }));
        }
    }
}
