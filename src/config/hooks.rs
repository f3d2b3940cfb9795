//! Programs of the operator that run when a migration gets somewhere.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::parse_absolute;
use super::section::Section;
use super::units::{parse_duration, show_duration};

/// When a program of the operator runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// Before anything is touched, as one more check.
    PreCheck,
    /// At the source, while the guest still runs and before it can be stopped.
    BeforeSwitchover,
    /// Once the VM runs at the destination.
    AfterActivation,
    /// Once a migration that had begun has not led there.
    AfterFailure,
}

impl Hook {
    /// Every hook, in the order in which they run.
    pub const ALL: [Self; 4] = [
        Self::PreCheck,
        Self::BeforeSwitchover,
        Self::AfterActivation,
        Self::AfterFailure,
    ];

    /// Its key in the configuration, and its word in metrics and in its own environment.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::PreCheck => "pre_check",
            Self::BeforeSwitchover => "before_switchover",
            Self::AfterActivation => "after_activation",
            Self::AfterFailure => "after_failure",
        }
    }
}

impl std::fmt::Display for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}

/// What operators have run when a migration gets somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// The executables, by absolute path.
    pub programs: BTreeMap<Hook, PathBuf>,
    /// The longest that each may take; then it is killed, and has failed.
    pub time_limit: Duration,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            programs: BTreeMap::new(),
            time_limit: Duration::from_secs(10),
        }
    }
}

impl Hooks {
    /// Whether one is to run once a migration is over.
    #[must_use]
    pub fn has_after(&self) -> bool {
        [Hook::AfterActivation, Hook::AfterFailure]
            .iter()
            .any(|hook| self.programs.contains_key(hook))
    }
}

pub(super) fn read(mut section: Section<'_>) -> Hooks {
    let mut hooks = Hooks::default();
    for hook in Hook::ALL {
        if let Some(program) = section.value(hook.word(), parse_absolute) {
            hooks.programs.insert(hook, program);
        }
    }
    if let Some(limit) = section.value("time_limit", parse_time_limit) {
        hooks.time_limit = limit;
    }
    section.finish();
    hooks
}

fn parse_time_limit(text: &str) -> Result<Duration, String> {
    let limit = parse_duration(text).map_err(|error| error.to_string())?;
    if limit > LONGEST {
        return Err(format!(
            "the peer waits for a check, so a hook may take {} at most",
            show_duration(LONGEST)
        ));
    }
    Ok(limit)
}

/// The source waits for 90 s until the destination has agreed; an earlier migration may take 20 s of them to be tidied up, and a hypervisor 30 s to
/// start.
const LONGEST: Duration = Duration::from_secs(25);
