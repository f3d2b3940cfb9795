//! What a run makes on the host: a directory, namespaces, settings. Everything is named after the process, so that a later
//! run finds and removes what a killed one left.

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::engine::hosts::{allow_controls, restore_controls};
use super::error::LabError;
use super::link::{ADDRESS_A, ADDRESS_B, Link};
use super::network::Network;
use super::process::{kill_in_namespace, run};
use super::site::Site;

/// Everything to be removed again, by [`Stage::clean`].
#[derive(Debug)]
pub(super) struct Stage {
    /// Sockets, states and logs. Its path is in the command line of every process of the run.
    pub(super) directory: PathBuf,
    /// The emulated link.
    pub(super) link: Link,
    /// The network of guests that have one.
    pub(super) network: Network,
    /// The namespace that has no link.
    pub(super) floor: String,
    /// Tells the user.
    say: fn(&str),
}

impl Stage {
    /// Makes the directory, and removes what killed runs have left.
    pub(super) async fn new(link_script: &Path, say: fn(&str)) -> Result<Self, LabError> {
        for process in dead_runs() {
            say(&format!("removing what the killed run {process} left"));
            Self::of(process, link_script, say).clean(None).await;
        }
        let stage = Self::of(std::process::id(), link_script, say);
        let failed = |source| LabError::file(&stage.directory, source);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&stage.directory)
            .map_err(failed)?;
        Ok(stage)
    }

    fn of(process: u32, link_script: &Path, say: fn(&str)) -> Self {
        let name = run_name(process);
        let link = Link::named(link_script, &name);
        Self {
            // Not the user's own directory for temporary files: paths of sockets are short.
            directory: Path::new("/tmp").join(format!("longhaul-{name}")),
            floor: format!("{name}-floor"),
            network: Network::named(&name, [&link.namespace_a(), &link.namespace_b()]),
            link,
            say,
        }
    }

    /// Makes the namespace without a link, with its loopback device up.
    pub(super) async fn make_floor(&self) -> Result<(), LabError> {
        run(&["ip", "netns", "add", &self.floor]).await?;
        run(&["ip", "-n", &self.floor, "link", "set", "lo", "up"]).await?;
        Ok(())
    }

    /// Two sites on the link, each with a directory of its own.
    pub(super) fn sites(&self) -> Result<[Site; 2], LabError> {
        Ok([
            Site::new(
                &self.directory,
                "site-a",
                self.link.namespace_a(),
                (ADDRESS_A, PORT).into(),
            )?,
            Site::new(
                &self.directory,
                "site-b",
                self.link.namespace_b(),
                (ADDRESS_B, PORT).into(),
            )?,
        ])
    }

    /// Two sites without a link between them: both on one loopback device.
    pub(super) fn sites_without_link(&self) -> Result<[Site; 2], LabError> {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let site = |name, port| Site::new(&self.directory, name, self.floor.clone(), (loopback, port).into());
        Ok([site("site-a", PORT)?, site("site-b", PORT + 10)?])
    }

    /// Removes the directories of sites whose processes are gone.
    pub(super) fn remove_sites(&self, sites: &[Site; 2]) {
        for site in sites {
            self.tell(std::fs::remove_dir_all(&site.directory));
        }
    }

    /// Lets the baselines use their congestion controls, until [`Stage::clean`].
    pub(super) async fn allow_controls(&self) {
        self.tell(allow_controls(&self.controls_note()).await);
    }

    /// Copies what the processes have said so far to `logs`.
    pub(super) fn keep_logs(&self, logs: &Path) {
        self.tell(copy_logs(&self.directory, logs));
    }

    fn tell<T, E: std::fmt::Display>(&self, result: Result<T, E>) {
        if let Err(error) = result {
            (self.say)(&format!("preparing or cleaning up: {error}"));
        }
    }

    fn controls_note(&self) -> PathBuf {
        self.directory.join("allowed-controls")
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
    pub(super) async fn clean(&self, logs: Option<&Path>) {
        self.kill_all().await;
        if self.network.is_there() {
            self.tell(self.network.down().await);
        }
        if self.link.is_there() {
            self.tell(self.link.down().await);
        }
        if exists(&self.floor) {
            self.tell(run(&["ip", "netns", "delete", &self.floor]).await);
        }
        self.tell(restore_controls(&self.controls_note()));
        if let Some(logs) = logs {
            self.keep_logs(logs);
        }
        if self.directory.exists() {
            self.tell(std::fs::remove_dir_all(&self.directory));
        }
    }
}

/// Copies what the processes said to `logs`, as `SITE/FILE`.
fn copy_logs(directory: &Path, logs: &Path) -> std::io::Result<()> {
    for site in std::fs::read_dir(directory)? {
        let site = site?;
        if !site.file_type()?.is_dir() {
            continue;
        }
        let kept = logs.join(site.file_name());
        std::fs::create_dir_all(&kept)?;
        for name in [
            "gateway.log",
            "gateway-killed.log",
            "gateway.toml",
            "qemu.log",
            "vm.console",
        ] {
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

/// The name of a process's link; names of links have at most 8 characters, so the number is written in 36 digits.
fn run_name(process: u32) -> String {
    let mut digits = Vec::new();
    let mut rest = process;
    while rest > 0 {
        digits.extend(char::from_digit(rest % 36, 36));
        rest /= 36;
    }
    PREFIX.chars().chain(digits.into_iter().rev()).collect()
}

/// The process in the name of a namespace (`lhdNUMBER-…`) or directory (`longhaul-lhdNUMBER`).
fn run_of(name: &str) -> Option<u32> {
    let name = name.strip_prefix("longhaul-").unwrap_or(name);
    let number = name.strip_prefix(PREFIX)?.split('-').next()?;
    let process = u32::from_str_radix(number, 36).ok()?;
    (run_name(process).strip_prefix(PREFIX) == Some(number)).then_some(process)
}

fn exists(namespace: &str) -> bool {
    Path::new(NAMESPACES).join(namespace).exists()
}

/// Where gateways listen.
const PORT: u16 = 4646;
const PREFIX: &str = "lhd";
const NAMESPACES: &str = "/run/netns";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_found_by_the_names_of_what_it_made() {
        // The largest number of a process that Linux gives (PID_MAX_LIMIT) is 2^22.
        for process in [1, 4711, 1 << 22] {
            let stage = Stage::of(process, Path::new("link"), |_| {});
            assert!(run_name(process).len() <= 8, "{}", run_name(process));
            let namespaces = [
                &stage.link.namespace_a(),
                &stage.link.namespace_b(),
                stage.network.client(),
            ];
            for name in namespaces.into_iter().chain([stage.floor.as_str()]) {
                assert_eq!(run_of(name), Some(process), "{name}");
            }
            let directory = stage.directory.file_name().unwrap().to_string_lossy().into_owned();
            assert_eq!(run_of(&directory), Some(process));
        }
        for other in ["lhd-a", "lhd+1-a", "lhd01-a", "lh4711-a", "other4711-a"] {
            assert_eq!(run_of(other), None, "{other}");
        }
    }
}
