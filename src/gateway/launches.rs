//! Vmms that an earlier gateway started and did not live to record.
//!
//! A vmm is started before `Prepared` is recorded, since the record names its process. Between the two a marker lies in the state
//! directory. A marker without a record means a vmm that nobody would ever find again, and that has not been told to load
//! anything, and perhaps images that were made for it. It is known by its output, which goes to the log of the migration and to nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Core;
use super::disks::mark::{self, Rest};
use crate::hypervisor::process::Process;
use crate::proto::ownership::Role;
use crate::proto::page::MigrationId;

pub(crate) const MARKER_EXTENSION: &str = "launching";

pub(crate) const LOG_EXTENSION: &str = "log";

/// Time for a process to end after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Puts the marker down. From now on images may be made and a vmm started for the migration.
///
/// # Errors
/// A sentence; nothing may be started.
pub(crate) fn begin(core: &Core, migration: MigrationId) -> Result<(), String> {
    let marker = core.launch_marker(migration);
    std::fs::write(&marker, "").map_err(|error| format!("{} cannot be written: {error}", marker.display()))
}

/// The journal knows the vmm, or there is none any more.
pub(crate) fn end(core: &Core, migration: MigrationId) {
    // One that stays is removed at the next start, which finds the record, or nothing to end.
    let _ = std::fs::remove_file(core.launch_marker(migration));
}

/// Ends what an earlier gateway started and did not record.
pub(crate) async fn end_unrecorded(core: &Core) {
    for (migration, marker) in files_of(&core.config.state_dir, MARKER_EXTENSION) {
        let records = core.journal.records_of(migration).await;
        let log = core.vmm_log(migration);
        if !records.iter().any(|record| record.role == Role::Destination) {
            for process in writers_of(&log) {
                tracing::warn!(%migration, pid = process.pid(), "ending a hypervisor that was started for a migration that never began");
                if let Err(error) = process.kill(KILL_DEADLINE).await {
                    tracing::error!(%migration, "the hypervisor could not be ended: {error}");
                }
            }
            let _ = std::fs::remove_file(log);
            for vm in &core.config.vms {
                mark::discard(vm, migration, Rest::Untouched).await;
            }
        }
        let _ = std::fs::remove_file(marker);
    }
}

/// Removes the logs of vmms that have ended: what they said has been told. A vmm writes to its log for as long as it lives, long
/// after the migration that started it.
pub(crate) async fn remove_silent_logs(core: &Core) {
    let state_dir = core.config.state_dir.clone();
    let named = |extension| files_of(&state_dir, extension);
    let starting: Vec<MigrationId> = named(MARKER_EXTENSION)
        .into_iter()
        .map(|(migration, _)| migration)
        .collect();
    let open: Vec<MigrationId> = core.registry.open().iter().map(|entry| entry.migration).collect();
    let mut logs = named(LOG_EXTENSION);
    logs.retain(|(migration, _)| !starting.contains(migration) && !open.contains(migration));
    let removed = tokio::task::spawn_blocking(move || {
        for (_, log) in logs {
            if writers_of(&log).is_empty() {
                let _ = std::fs::remove_file(log);
            }
        }
    });
    removed.await.expect("looking at processes does not panic");
}

/// The files `vmm-MIGRATION.EXTENSION`.
pub(super) fn files_of(state_dir: &Path, extension: &str) -> Vec<(MigrationId, PathBuf)> {
    let entries = std::fs::read_dir(state_dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let path = entry.path();
            let name = path.file_name()?.to_str()?;
            let migration = name.strip_prefix("vmm-")?.strip_suffix(extension)?.strip_suffix('.')?;
            Some((migration.parse().ok()?, path))
        })
        .collect()
}

/// The processes whose standard output is `log`.
fn writers_of(log: &Path) -> Vec<Process> {
    // What `/proc` shows has no symbolic links in it.
    let Ok(log) = log.canonicalize() else { return Vec::new() };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let writes = |pid: &u32| std::fs::read_link(format!("/proc/{pid}/fd/1")).is_ok_and(|output| output == log);
    // Looked at once more when it is held, since ids are reused.
    pids.filter(writes)
        .filter_map(|pid| Process::open(pid).ok())
        .filter(|process| writes(&process.pid()))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_known_by_the_log_that_it_writes_to() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("vmm-1.log");
        let out = std::fs::File::create(&log).unwrap();
        let mut child = Command::new("sleep")
            .arg("60")
            .stdout(Stdio::from(out))
            .spawn()
            .unwrap();
        let found: Vec<u32> = writers_of(&log).iter().map(Process::pid).collect();
        let others = writers_of(&directory.path().join("vmm-2.log"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, [child.id()]);
        assert!(others.is_empty());
    }

    #[test]
    fn only_names_of_markers_are_markers() {
        let directory = tempfile::tempdir().unwrap();
        let migration = MigrationId([0xab; 16]);
        for name in [
            format!("vmm-{migration}.launching"),
            format!("vmm-{migration}.log"),
            "vmm-x.launching".to_owned(),
        ] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let found: Vec<_> = files_of(directory.path(), MARKER_EXTENSION)
            .into_iter()
            .map(|(migration, _)| migration)
            .collect();
        assert_eq!(found, [migration]);
    }
}
