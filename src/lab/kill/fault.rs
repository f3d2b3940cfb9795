//! What befalls a migration: who is hit, and how.

use std::fmt;

use super::moment::Place;
use crate::lab::clock::Jump;
use crate::wan::Directions;

/// One thing that goes wrong. Everything but a hypervisor or a command that is dead is healed after a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// SIGKILL of gateways, which are started again.
    KillGateway(Victim),
    /// SIGKILL of the hypervisor of one site.
    KillQemu(Place),
    /// SIGKILL of `longhaul migrate`.
    KillCommand,
    /// SIGSTOP of a gateway, and SIGCONT later.
    StopGateway(Place),
    /// SIGSTOP of the hypervisor at B, and SIGCONT later. That of A is stopped by its gateway in every migration.
    StopQemu,
    /// SIGSTOP of `longhaul migrate`, and SIGCONT later.
    StopCommand,
    /// Nothing crosses the link in these directions, and nobody is told.
    CutLink(Directions),
    /// The disk of a gateway's journal is full, and the space that the journal had in advance is not there, as on a disk that is thinly
    /// provisioned. Later there is room and the gateway is started again, which is what an operator is told to do.
    FullDisk(Place),
    /// The wall clock of a gateway is set wrong by a day, and stays so.
    MoveClock(Place, Jump),
}

/// What the lab has here to make faults with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Means {
    pub(super) has_link: bool,
    pub(super) is_root: bool,
    pub(super) can_move_clocks: bool,
}

impl Fault {
    /// Its name in the names of cases.
    pub(super) fn name(self) -> String {
        match self {
            Self::KillGateway(victim) => format!("kill-{victim}"),
            Self::KillQemu(place) => format!("kill-qemu-{place}"),
            Self::KillCommand => "kill-command".to_owned(),
            Self::StopGateway(place) => format!("stop-{place}"),
            Self::StopQemu => "stop-qemu-b".to_owned(),
            Self::StopCommand => "stop-command".to_owned(),
            Self::CutLink(directions) => format!("cut-{directions}"),
            Self::FullDisk(place) => format!("full-disk-{place}"),
            Self::MoveClock(place, jump) => format!("clock-{jump}-{place}"),
        }
        .to_lowercase()
    }

    /// Gateways that are started again when it is over.
    pub(super) fn restarted(self) -> Vec<Place> {
        match self {
            Self::KillGateway(victim) => victim.places(),
            Self::FullDisk(place) => vec![place],
            _ => vec![],
        }
    }

    /// Places whose journals say whether the fault came at its moment: of whoever cannot go on because of it.
    pub(super) fn halted(self) -> Vec<Place> {
        match self {
            Self::KillGateway(victim) => victim.places(),
            Self::StopGateway(place) => vec![place],
            _ => vec![],
        }
    }

    /// Why it cannot be made here; `None`: it can.
    pub(super) fn obstacle(self, means: Means) -> Option<&'static str> {
        match self {
            Self::CutLink(_) if !means.has_link => Some("needs a link that can be cut (--profile NAME)"),
            Self::FullDisk(_) if !means.is_root => Some("needs root, to mount a small disk"),
            Self::MoveClock(..) if !means.can_move_clocks => Some("needs libfaketime (Debian package faketime)"),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name().replace('-', " "))
    }
}

/// Whose gateway is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Victim {
    One(Place),
    /// Both at the same time, as when the lab's power fails.
    Both,
}

impl Victim {
    pub(super) fn places(self) -> Vec<Place> {
        match self {
            Self::One(place) => vec![place],
            Self::Both => Place::BOTH.to_vec(),
        }
    }
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(place) => place.fmt(f),
            Self::Both => f.pad("both"),
        }
    }
}
