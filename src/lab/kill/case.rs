//! The matrix: which gateway is killed, and at which moment of a migration.

use std::fmt;
use std::time::Duration;

use crate::proto::ownership::{RecordKind, Role};

/// One of the two sites. Every migration of the lab goes from A to B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    A,
    B,
}

impl Place {
    pub(super) const BOTH: [Self; 2] = [Self::A, Self::B];

    pub(super) fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }

    pub(super) fn site(self) -> &'static str {
        match self {
            Self::A => "site-a",
            Self::B => "site-b",
        }
    }

    pub(super) fn role(self) -> Role {
        match self {
            Self::A => Role::Source,
            Self::B => Role::Destination,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::A => "A",
            Self::B => "B",
        })
    }
}

/// A journal record, by its name alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Started,
    Prepared,
    Permit,
    Commit,
    Running,
    Abort,
    Revert,
    Learnt,
    Resolved,
    Closed,
}

impl Step {
    pub(super) fn of(kind: &RecordKind) -> Self {
        match kind {
            RecordKind::Started { .. } => Self::Started,
            RecordKind::Prepared => Self::Prepared,
            RecordKind::Permit(_) => Self::Permit,
            RecordKind::Commit(_) => Self::Commit,
            RecordKind::Abort(_) => Self::Abort,
            RecordKind::Running => Self::Running,
            RecordKind::Revert => Self::Revert,
            RecordKind::Learnt(_) => Self::Learnt,
            RecordKind::Resolved(_) => Self::Resolved,
            RecordKind::Closed(_) => Self::Closed,
        }
    }
}

/// When a gateway is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Moment {
    /// As soon as the gateway of `at` has written this record.
    Record { at: Place, step: Step },
    /// The same in a migration that the operator cancels during pre-copy.
    CancelledRecord { at: Place, step: Step },
    /// As soon as the source's QEMU says that the vCPUs stand.
    Switchover,
    /// After this share of the time that a migration takes which nobody disturbs.
    Share(f64),
}

/// One run: who is killed, and when. Nobody: to see that the lab is sound, and how long a migration takes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) kill: Option<(Place, Moment)>,
    /// From the kill to the gateway's next start.
    pub(super) away: Duration,
}

impl Case {
    /// The undisturbed migration.
    pub(super) fn undisturbed() -> Self {
        Self {
            name: "undisturbed".to_owned(),
            kill: None,
            away: Duration::ZERO,
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        matches!(self.kill, Some((_, Moment::CancelledRecord { .. })))
    }

    /// Whether the gateway was killed too late: its own journal shows what comes after the moment.
    pub(super) fn is_missed(&self, victims_journal: &[Step]) -> bool {
        let has = |step| victims_journal.contains(&step);
        let Some((victim, moment)) = self.kill else {
            return false;
        };
        let at = match moment {
            Moment::Share(_) => return has(Step::Closed),
            Moment::Switchover => {
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

/// Every case of the matrix, and the seeded ones; the same seed gives the same.
pub(super) fn matrix(seed: u64) -> Vec<Case> {
    let mut random = Random(seed);
    let mut cases = Vec::new();
    for (name, moment) in steps() {
        for victim in Place::BOTH {
            cases.push(Case {
                name: format!("{name}-kill-{}", victim.to_string().to_lowercase()),
                kill: Some((victim, moment)),
                away: random.away(),
            });
        }
    }
    for number in 1..=SEEDED_MOMENTS {
        let share = random.unit();
        for victim in Place::BOTH {
            cases.push(Case {
                name: format!("seeded-{number}-kill-{}", victim.to_string().to_lowercase()),
                kill: Some((victim, Moment::Share(share))),
                away: random.away(),
            });
        }
    }
    cases
}

/// The moments that have a name, in the order in which they come.
fn steps() -> Vec<(&'static str, Moment)> {
    let record = |at, step| Moment::Record { at, step };
    let cancelled = |at, step| Moment::CancelledRecord { at, step };
    vec![
        ("prepared", record(Place::B, Step::Prepared)),
        ("started", record(Place::A, Step::Started)),
        ("switchover", Moment::Switchover),
        ("permit", record(Place::A, Step::Permit)),
        ("commit", record(Place::B, Step::Commit)),
        ("running", record(Place::B, Step::Running)),
        ("learnt", record(Place::A, Step::Learnt)),
        ("closed-at-b", record(Place::B, Step::Closed)),
        ("closed-at-a", record(Place::A, Step::Closed)),
        ("cancelled-closed", cancelled(Place::A, Step::Closed)),
        ("cancelled-abort", cancelled(Place::B, Step::Abort)),
    ]
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record { at, step } => write!(f, "{step:?} written at {at}"),
            Self::CancelledRecord { at, step } => write!(f, "cancelled, {step:?} written at {at}"),
            Self::Switchover => write!(f, "vCPUs stopped at A"),
            Self::Share(share) => write!(f, "after {:.0} % of the time", share * 100.0),
        }
    }
}

/// A small seeded generator (splitmix64, Vigna 2015): the moments of a seed never change.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// On both sides of the time after which a silent peer is given up.
    fn away(&mut self) -> Duration {
        let span = LONGEST_AWAY - SHORTEST_AWAY;
        SHORTEST_AWAY + span.mul_f64(self.unit())
    }
}

const SEEDED_MOMENTS: u32 = 5;
const SHORTEST_AWAY: Duration = Duration::from_millis(200);
const LONGEST_AWAY: Duration = Duration::from_secs(6);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_moment_kills_either_gateway_and_a_seed_gives_the_same_cases() {
        let cases = matrix(7);
        assert_eq!(cases, matrix(7));
        assert_ne!(cases, matrix(8));
        for victim in Place::BOTH {
            let of_victim = cases
                .iter()
                .filter(|case| case.kill.is_some_and(|(killed, _)| killed == victim));
            assert_eq!(of_victim.count(), steps().len() + SEEDED_MOMENTS as usize);
        }
        let mut names: Vec<_> = cases.iter().map(|case| &case.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cases.len());
    }

    #[test]
    fn a_gateway_that_has_gone_on_was_killed_too_late() {
        let case = |name: &str| matrix(1).into_iter().find(|case| case.name == name).unwrap();
        let permit = case("permit-kill-a");
        assert!(!permit.is_missed(&[Step::Started, Step::Permit]));
        assert!(permit.is_missed(&[Step::Started, Step::Permit, Step::Learnt]));
        let commit = case("commit-kill-b");
        assert!(!commit.is_missed(&[Step::Prepared, Step::Commit]));
        assert!(commit.is_missed(&[Step::Prepared, Step::Commit, Step::Running]));
    }
}
