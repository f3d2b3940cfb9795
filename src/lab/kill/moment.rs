//! When a fault strikes: a place in the journals, in the life of the source's QEMU, or on the clock.

use std::fmt;

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

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Moment {
    /// As soon as the gateway of `at` has written this record.
    Record { at: Place, step: Step },
    /// The same in a migration that the operator cancels during pre-copy.
    CancelledRecord { at: Place, step: Step },
    /// As soon as the source's QEMU begins to send dirty pages once more, the first time after everything: the vCPUs are stopped soon.
    LastPass,
    /// As soon as the source's QEMU says that the vCPUs stand.
    Switchover,
    /// After this share of the time that a migration takes which nobody disturbs.
    Share(f64),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record { at, step } => write!(f, "{step:?} written at {at}"),
            Self::CancelledRecord { at, step } => write!(f, "cancelled, {step:?} written at {at}"),
            Self::LastPass => f.write_str("second pass begun at A"),
            Self::Switchover => f.write_str("vCPUs stopped at A"),
            Self::Share(share) => write!(f, "after {:.0} % of the time", share * 100.0),
        }
    }
}
