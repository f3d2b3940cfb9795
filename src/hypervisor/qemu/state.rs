//! QEMU's run states and migration states as types.

use serde::{Deserialize, Serialize};

/// `query-status`, field `status` (QEMU `qapi/run-state.json`, RunState).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    /// The vCPUs run.
    Running,
    /// Stopped by a user.
    Paused,
    /// Started with `-S`, never run.
    Prelaunch,
    /// Waits for an incoming migration, or loads it.
    InMigrate,
    /// Stopped for the last part of an outgoing migration.
    FinishMigrate,
    /// Stopped, and everything has been sent elsewhere.
    PostMigrate,
    /// The guest sleeps (ACPI S3).
    Suspended,
    /// Any other, by QEMU's name; the vCPUs do not run.
    Other(String),
}

impl RunState {
    /// From QEMU's name.
    pub fn from_name(name: &str) -> RunState {
        match name {
            "running" => RunState::Running,
            "paused" => RunState::Paused,
            "prelaunch" => RunState::Prelaunch,
            "inmigrate" => RunState::InMigrate,
            "finish-migrate" => RunState::FinishMigrate,
            "postmigrate" => RunState::PostMigrate,
            "suspended" => RunState::Suspended,
            other => RunState::Other(other.chars().take(NAME_CHARACTERS).collect()),
        }
    }

    /// QEMU's name.
    pub fn name(&self) -> &str {
        match self {
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::Prelaunch => "prelaunch",
            RunState::InMigrate => "inmigrate",
            RunState::FinishMigrate => "finish-migrate",
            RunState::PostMigrate => "postmigrate",
            RunState::Suspended => "suspended",
            RunState::Other(name) => name,
        }
    }

    /// Why a guest in this state cannot be the source of a migration; `None` if it can.
    pub fn source_obstacle(&self) -> Option<&'static str> {
        match self {
            RunState::Running | RunState::Paused | RunState::Prelaunch => None,
            RunState::InMigrate => Some("it waits for an incoming migration itself, so there is no guest in it yet"),
            RunState::FinishMigrate => Some("another migration is about to finish"),
            RunState::PostMigrate => Some("it has been migrated away already, and its guest may run elsewhere"),
            RunState::Suspended => Some("the guest sleeps (ACPI S3); wake it up first"),
            RunState::Other(name) => Some(match name.as_str() {
                "shutdown" => "the guest has shut down",
                "io-error" => "the guest was stopped by an I/O error of a disk",
                "guest-panicked" => "the guest has panicked",
                "internal-error" => "QEMU stopped the guest after an internal error",
                "save-vm" | "restore-vm" => "a snapshot is being saved or restored",
                _ => "the guest neither runs nor is it simply paused",
            }),
        }
    }
}

impl std::fmt::Display for RunState {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(self.name())
    }
}

/// `query-migrate`, field `status` (QEMU `qapi/migration.json`, MigrationStatus), of an outgoing or incoming migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationStatus {
    /// There has been none in this process.
    None,
    /// Connecting, or waiting for a connection.
    Setup,
    /// Rounds of memory are on their way.
    Active,
    /// Stopped for `pause-before-switchover`.
    PreSwitchover,
    /// The guest is stopped and device state is on its way.
    Device,
    /// Everything has been sent, or loaded.
    Completed,
    /// Failed.
    Failed,
    /// Being cancelled.
    Cancelling,
    /// Cancelled.
    Cancelled,
    /// Any other, by QEMU's name; none of them occurs with the settings of `settings.rs`.
    Other(String),
}

impl MigrationStatus {
    /// From QEMU's name; `None` is what `query-migrate` says by leaving the field out.
    pub fn from_name(name: Option<&str>) -> MigrationStatus {
        match name {
            None | Some("none") => MigrationStatus::None,
            Some("setup") => MigrationStatus::Setup,
            Some("active") => MigrationStatus::Active,
            Some("pre-switchover") => MigrationStatus::PreSwitchover,
            Some("device") => MigrationStatus::Device,
            Some("completed") => MigrationStatus::Completed,
            Some("failed") => MigrationStatus::Failed,
            Some("cancelling") => MigrationStatus::Cancelling,
            Some("cancelled") => MigrationStatus::Cancelled,
            Some(other) => MigrationStatus::Other(other.chars().take(NAME_CHARACTERS).collect()),
        }
    }

    /// Whether a migration is under way: it may still complete.
    pub fn is_under_way(&self) -> bool {
        use MigrationStatus as S;
        !matches!(self, S::None | S::Completed | S::Failed | S::Cancelled)
    }

    /// QEMU's name.
    pub fn name(&self) -> &str {
        match self {
            MigrationStatus::None => "none",
            MigrationStatus::Setup => "setup",
            MigrationStatus::Active => "active",
            MigrationStatus::PreSwitchover => "pre-switchover",
            MigrationStatus::Device => "device",
            MigrationStatus::Completed => "completed",
            MigrationStatus::Failed => "failed",
            MigrationStatus::Cancelling => "cancelling",
            MigrationStatus::Cancelled => "cancelled",
            MigrationStatus::Other(name) => name,
        }
    }
}

impl std::fmt::Display for MigrationStatus {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(self.name())
    }
}

/// Longest unknown name kept, in characters.
const NAME_CHARACTERS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_way_through_the_types() {
        for name in [
            "running",
            "paused",
            "prelaunch",
            "inmigrate",
            "finish-migrate",
            "postmigrate",
            "suspended",
            "io-error",
        ] {
            assert_eq!(RunState::from_name(name).name(), name);
        }
        for name in [
            "none",
            "setup",
            "active",
            "pre-switchover",
            "device",
            "completed",
            "failed",
            "cancelling",
            "cancelled",
            "postcopy-active",
        ] {
            assert_eq!(MigrationStatus::from_name(Some(name)).name(), name);
        }
    }

    #[test]
    fn only_a_running_or_simply_paused_guest_can_be_a_source() {
        for name in ["running", "paused", "prelaunch"] {
            assert_eq!(RunState::from_name(name).source_obstacle(), None);
        }
        for name in [
            "inmigrate",
            "finish-migrate",
            "postmigrate",
            "suspended",
            "io-error",
            "never heard of",
        ] {
            assert!(RunState::from_name(name).source_obstacle().is_some(), "{name}");
        }
    }

    #[test]
    fn an_unknown_status_counts_as_under_way() {
        assert!(MigrationStatus::from_name(Some("wait-unplug")).is_under_way());
        assert!(!MigrationStatus::from_name(None).is_under_way());
    }
}
