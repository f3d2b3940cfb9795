//! One run of the matrix: a fault at a moment of a migration.

use std::time::Duration;

use super::fault::{Fault, Victim};
use super::moment::{Moment, Place, Step};

/// One run. Without a fault: to see that the lab is sound, and how long a migration takes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) injection: Option<Injection>,
    /// From the fault until it is healed.
    pub(super) away: Duration,
    /// Whether what the fault undoes is begun again. Elsewhere one migration is looked at, to its end.
    pub(super) again: bool,
}

/// What is done to a migration, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Injection {
    pub(super) fault: Fault,
    pub(super) moment: Moment,
}

impl Case {
    /// The undisturbed migration.
    pub(super) fn undisturbed() -> Self {
        Self {
            name: "undisturbed".to_owned(),
            injection: None,
            away: Duration::ZERO,
            again: false,
        }
    }

    /// The same with one more word in its name.
    pub(super) fn named(self, word: &str) -> Self {
        Self {
            name: format!("{}-{word}", self.name),
            ..self
        }
    }

    /// The same with gateways that begin again what a restart has undone.
    pub(super) fn begun_again(self) -> Self {
        Self {
            again: true,
            ..self.named("again")
        }
    }

    pub(super) fn fault(&self) -> Option<Fault> {
        Some(self.injection?.fault)
    }

    pub(super) fn moment(&self) -> Option<Moment> {
        Some(self.injection?.moment)
    }

    pub(super) fn is_cancelled(&self) -> bool {
        matches!(self.moment(), Some(Moment::CancelledRecord { .. }))
    }

    /// Whether the gateway was hit too late: its own journal shows what comes after the moment. Where both are killed at once
    /// there is nobody who could have gone on, and where no gateway is hit all go on.
    pub(super) fn is_missed(&self, victims_journal: &[Step]) -> bool {
        let has = |step| victims_journal.contains(&step);
        let Some(Injection { fault, moment }) = self.injection else {
            return false;
        };
        let (Fault::KillGateway(Victim::One(victim)) | Fault::StopGateway(victim)) = fault else {
            return false;
        };
        let at = match moment {
            Moment::Share(_) => return has(Step::Closed),
            Moment::LastPass | Moment::Switchover => {
                return match victim {
                    Place::A => has(Step::Permit),
                    Place::B => has(Step::Commit),
                };
            }
            // The source closes as soon as it has given up, whatever the destination does.
            Moment::CancelledRecord { .. } => return false,
            Moment::Record { at, step } => (at, step),
        };
        match (victim, at) {
            (Place::A, (Place::A, Step::Started)) => has(Step::Permit),
            (Place::A, (Place::A, Step::Permit)) => has(Step::Learnt),
            (Place::A, (Place::A, Step::Learnt)) => has(Step::Closed),
            (Place::A, (Place::B, Step::Prepared)) => has(Step::Permit),
            (Place::A, (Place::B, Step::Commit | Step::Running)) => has(Step::Learnt),
            (Place::B, (Place::A, Step::Started | Step::Permit)) => has(Step::Commit),
            (Place::B, (Place::A, Step::Learnt)) => has(Step::Closed),
            (Place::B, (Place::B, Step::Prepared)) => has(Step::Commit),
            (Place::B, (Place::B, Step::Commit)) => has(Step::Running),
            (Place::B, (Place::B, Step::Running)) => has(Step::Closed),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::kill::matrix::Matrix;

    #[test]
    fn a_gateway_that_has_gone_on_was_hit_too_late() {
        let case = |name: &str| Matrix::of(1).cases.into_iter().find(|case| case.name == name).unwrap();
        for permit in [case("permit-kill-a"), case("permit-stop-a-long")] {
            assert!(!permit.is_missed(&[Step::Started, Step::Permit]));
            assert!(permit.is_missed(&[Step::Started, Step::Permit, Step::Learnt]));
        }
        let commit = case("commit-kill-b");
        assert!(!commit.is_missed(&[Step::Prepared, Step::Commit]));
        assert!(commit.is_missed(&[Step::Prepared, Step::Commit, Step::Running]));
    }
}
