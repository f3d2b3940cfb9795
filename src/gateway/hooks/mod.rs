//! Programs of the operator at named points of a migration: what they are told, and those that are owed after a crash.
//!
//! | hook | runs | where it fails |
//! |---|---|---|
//! | `pre_check` | either site, before anything is touched (`migrate`, `offer`) | refused |
//! | `before_switchover` | source, before the guest can be stopped (`source::before_switchover`) | cancelled |
//! | `after_activation`, `after_failure` | either site, once it is over there ([`after`]) | told |
//!
//! Those that run after a migration run at least once: a mark lies in the state directory from before anything is begun until they have ended, and a
//! gateway that finds one runs what it is a mark of.

mod program;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use self::program::printable;
use super::Core;
use super::launches::files_of;
use super::registry::Entry;
use crate::api::{Outcome, Report, Role};
use crate::config::Hook;
use crate::proto::ownership;
use crate::proto::page::MigrationId;

/// What a hook is told.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) migration: MigrationId,
    pub(crate) vm: String,
    pub(crate) peer: String,
    pub(crate) role: Role,
    /// How it ended and why, once it has.
    pub(crate) end: Option<(Outcome, String)>,
}

impl Facts {
    /// Of a migration that is not over.
    pub(crate) fn new(migration: MigrationId, vm: &str, peer: &str, role: Role) -> Self {
        Self {
            migration,
            vm: vm.to_owned(),
            peer: peer.to_owned(),
            role,
            end: None,
        }
    }

    fn environment(&self, core: &Core, hook: Hook) -> Vec<(&'static str, OsString)> {
        let mut environment: Vec<(&'static str, OsString)> = vec![
            ("LONGHAUL_HOOK", hook.word().into()),
            ("LONGHAUL_VM", (&self.vm).into()),
            ("LONGHAUL_MIGRATION", self.migration.to_string().into()),
            ("LONGHAUL_SITE", (&core.config.site).into()),
            ("LONGHAUL_PEER", (&self.peer).into()),
            ("LONGHAUL_ROLE", self.role.word().into()),
        ];
        if let Some((outcome, reason)) = &self.end {
            environment.push(("LONGHAUL_OUTCOME", outcome.word().into()));
            environment.push(("LONGHAUL_REASON", printable(reason).into()));
        }
        let monitor = core.config.vm(&self.vm).map(|vm| &vm.qmp);
        if let Some(monitor) = monitor.filter(|path| path.exists()) {
            environment.push(("LONGHAUL_QMP", monitor.into()));
        }
        environment
    }
}

/// Runs a hook to its end; nothing where none is configured. Killed where this is dropped.
///
/// # Errors
/// A sentence for the operator.
pub(crate) async fn run(core: &Core, hook: Hook, facts: &Facts) -> Result<(), String> {
    let hooks = &core.config.hooks;
    let Some(program) = hooks.programs.get(&hook) else {
        return Ok(());
    };
    tracing::info!(migration = %facts.migration, vm = facts.vm, %hook, "running a hook");
    let ended = program::run(program, &facts.environment(core, hook), hooks.time_limit).await;
    core.metrics.count_hook(hook, ended.is_ok());
    ended.map_err(|error| {
        format!(
            "the hook {hook} at {} ({}) {error}",
            core.config.site,
            program.display()
        )
    })
}

/// Whether there is such a hook.
pub(crate) fn is_configured(core: &Core, hook: Hook) -> bool {
    core.config.hooks.programs.contains_key(&hook)
}

/// From now on a hook is owed once the migration is over here, whatever becomes of this process.
///
/// # Errors
/// A sentence; nothing may be begun.
pub(crate) fn owe(core: &Core, migration: MigrationId, role: Role) -> Result<(), String> {
    if !core.config.hooks.has_after() {
        return Ok(());
    }
    let mark = mark(core, migration, role);
    std::fs::write(&mark, "").map_err(|error| format!("{} cannot be written: {error}", mark.display()))
}

/// None is owed: nothing has begun, or it has run.
pub(crate) fn forget(core: &Core, migration: MigrationId, role: Role) {
    let _ = std::fs::remove_file(mark(core, migration, role));
}

/// The migration is over here: what is owed runs, in a task of its own. Where it fails the VM stays where it is, and people are told.
pub(crate) fn after(core: &Arc<Core>, entry: &Arc<Entry>, outcome: Outcome, reason: &str) {
    if !mark(core, entry.migration, entry.role).exists() {
        return;
    }
    let hook = match outcome {
        Outcome::Completed => Hook::AfterActivation,
        _ => Hook::AfterFailure,
    };
    let facts = Facts {
        end: Some((outcome, reason.to_owned())),
        ..Facts::new(entry.migration, &entry.vm, &entry.peer, entry.role)
    };
    let (running, entry) = (Arc::clone(core), Arc::clone(entry));
    core.after_hooks.spawn(async move {
        if let Err(reason) = run(&running, hook, &facts).await {
            entry.notice(&reason);
        }
        forget(&running, facts.migration, facts.role);
    });
}

/// Runs what an earlier process owes for migrations that are over, which the registry has by now. Those that are taken up see to theirs.
pub(crate) fn settle(core: &Arc<Core>, ended: &[(Role, Report)], taken_up: &[(MigrationId, ownership::Role)]) {
    for role in [Role::Source, Role::Destination] {
        let of_ownership = match role {
            Role::Source => ownership::Role::Source,
            Role::Destination => ownership::Role::Destination,
        };
        for (migration, mark) in files_of(&core.config.state_dir, extension(role)) {
            if taken_up.contains(&(migration, of_ownership)) {
                continue;
            }
            let report = ended
                .iter()
                .find(|(at, report)| *at == role && report.migration == migration);
            match (report, core.registry.get(migration)) {
                (Some((_, report)), Some(entry)) => after(core, &entry, report.outcome, &report.reason),
                // It never began.
                _ => {
                    let _ = std::fs::remove_file(mark);
                }
            }
        }
    }
}

fn mark(core: &Core, migration: MigrationId, role: Role) -> PathBuf {
    let name = format!("vmm-{migration}.{}", extension(role));
    core.config.state_dir.join(name)
}

fn extension(role: Role) -> &'static str {
    match role {
        Role::Source => "source-hook",
        Role::Destination => "destination-hook",
    }
}
