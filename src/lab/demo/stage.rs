//! What a run makes on the host: a directory, namespaces, settings. Everything is named after the process, so that a later
//! run finds and removes what a killed one left.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::baseline::AllowedControls;
use super::{DemoError, say};
use crate::lab::link::Link;
use crate::lab::process::{kill_in_namespace, run};

/// Everything to be removed again, by [`Stage::clean`].
#[derive(Debug)]
pub(super) struct Stage {
    /// Sockets, states and logs. Its path is in the command line of every process of the run.
    pub(super) directory: PathBuf,
    /// The emulated link.
    pub(super) link: Link,
    /// The namespace that has no link.
    pub(super) floor: String,
    /// The host's list of congestion controls.
    pub(super) controls: AllowedControls,
}

impl Stage {
    /// Makes the directory, and removes what killed runs have left.
    pub(super) async fn new(link_script: &Path) -> Result<Self, DemoError> {
        for process in dead_runs() {
            say(&format!("removing what the killed run {process} left"));
            Self::of(process, link_script).clean(None).await;
        }
        let stage = Self::of(std::process::id(), link_script);
        let failed = |source| DemoError::File {
            path: stage.directory.clone(),
            source,
        };
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&stage.directory)
            .map_err(failed)?;
        Ok(stage)
    }

    fn of(process: u32, link_script: &Path) -> Self {
        let name = format!("{PREFIX}{process}");
        Self {
            // Not the user's own directory for temporary files: paths of sockets are short.
            directory: Path::new("/tmp").join(format!("longhaul-{name}")),
            floor: format!("{name}-floor"),
            link: Link::named(link_script, &name),
            controls: AllowedControls::default(),
        }
    }

    /// Makes the namespace without a link, with its loopback device up.
    pub(super) async fn make_floor(&self) -> Result<(), DemoError> {
        run(&["ip", "netns", "add", &self.floor]).await?;
        run(&["ip", "-n", &self.floor, "link", "set", "lo", "up"]).await?;
        Ok(())
    }

    /// Kills every process of the run in its namespaces.
    pub(super) async fn kill_all(&self) {
        let marker = self.directory.display().to_string();
        for namespace in [&self.floor, &self.link.namespace_a(), &self.link.namespace_b()] {
            if exists(namespace) {
                kill_in_namespace(namespace, &marker).await;
            }
        }
    }

    /// Removes everything; logs are copied to `logs` before. Problems are told and do not stop the rest.
    pub(super) async fn clean(&mut self, logs: Option<&Path>) {
        self.kill_all().await;
        if exists(&self.link.namespace_a()) || exists(&self.link.namespace_b()) {
            tell(self.link.down().await);
        }
        if exists(&self.floor) {
            tell(run(&["ip", "netns", "delete", &self.floor]).await);
        }
        self.controls.restore();
        if let Some(logs) = logs {
            tell(keep_logs(&self.directory, logs));
        }
        if self.directory.exists() {
            tell(std::fs::remove_dir_all(&self.directory));
        }
    }
}

/// Copies what the processes said to `logs`, as `SITE/FILE`.
fn keep_logs(directory: &Path, logs: &Path) -> std::io::Result<()> {
    for site in std::fs::read_dir(directory)? {
        let site = site?;
        let kept = logs.join(site.file_name());
        std::fs::create_dir_all(&kept)?;
        for name in ["gateway.log", "gateway.toml", "qemu.log", "vm.console"] {
            let file = site.path().join(name);
            if file.exists() {
                std::fs::copy(file, kept.join(name))?;
            }
        }
    }
    Ok(())
}

/// Processes that made namespaces or directories of a run and are gone.
fn dead_runs() -> Vec<u32> {
    let names = |directory: &str| {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect::<Vec<_>>()
    };
    let mut processes: Vec<u32> = names(NAMESPACES)
        .iter()
        .chain(&names("/tmp"))
        .filter_map(|name| run_of(name))
        .filter(|process| !Path::new(&format!("/proc/{process}")).exists())
        .collect();
    processes.sort_unstable();
    processes.dedup();
    processes
}

/// The process in the name of a namespace (`lhdemoPID-…`) or directory (`longhaul-lhdemoPID`).
fn run_of(name: &str) -> Option<u32> {
    let name = name.strip_prefix("longhaul-").unwrap_or(name);
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

fn exists(namespace: &str) -> bool {
    Path::new(NAMESPACES).join(namespace).exists()
}

fn tell<T, E: std::fmt::Display>(result: Result<T, E>) {
    if let Err(error) = result {
        eprintln!("demo: while cleaning up: {error}");
    }
}

const PREFIX: &str = "lhdemo";
const NAMESPACES: &str = "/run/netns";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_found_by_the_names_of_what_it_made() {
        let stage = Stage::of(4711, Path::new("link"));
        for name in [&stage.floor, &stage.link.namespace_a(), &stage.link.namespace_b()] {
            assert_eq!(run_of(name), Some(4711), "{name}");
        }
        let directory = stage.directory.file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(run_of(&directory), Some(4711));
        assert_eq!(run_of("lhdemo-a"), None);
        assert_eq!(run_of("other4711-a"), None);
    }
}
