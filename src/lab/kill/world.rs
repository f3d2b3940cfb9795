//! Where the cases run: a directory, and a link for each case that runs at the same time.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::copied::Pristine;
use super::disk::unmount_below;
use super::moment::Place;
use super::run::{Ground, processes_of};
use super::site::Site;
use crate::lab::clock;
use crate::lab::error::LabError;
use crate::lab::gateway_file::LinkSection;
use crate::lab::link::{ADDRESS_A, ADDRESS_B, Link};

/// What a run makes on the host, named after the process.
pub(super) struct World {
    pub(super) directory: PathBuf,
    /// One for each case at the same time; none: the cases run on the loopback device.
    links: Vec<Link>,
    section: LinkSection,
    /// What goes with each guest.
    pub(super) disk: Option<Pristine>,
}

impl World {
    /// What the run of `process` makes, whether it is there or not.
    pub(super) fn of(process: u32, link_script: &Path, section: LinkSection, links: usize) -> Self {
        // At most eight characters: a process id has at most 22 bits.
        let link = |number| Link::named(link_script, &format!("k{process:x}{number}"));
        Self {
            // Not the user's own directory for temporary files: paths of sockets are short.
            directory: PathBuf::from(format!("{DIRECTORY}{process}")),
            links: (0..links).map(link).collect(),
            section,
            disk: None,
        }
    }

    /// What runs have left that were killed, by their process.
    pub(super) fn of_dead_runs(link_script: &Path, section: &LinkSection) -> Vec<(u32, Self)> {
        let left = |process| (process, Self::of(process, link_script, section.clone(), MOST_LINKS));
        dead_runs().into_iter().map(left).collect()
    }

    /// Makes the directory.
    pub(super) fn make(&self) -> Result<(), LabError> {
        let made = std::fs::DirBuilder::new().mode(0o700).create(&self.directory);
        made.map_err(|source| LabError::file(&self.directory, source))
    }

    /// Makes the links.
    pub(super) async fn link_up(&self, profile: &str, seed: u64) -> Result<(), LabError> {
        for link in &self.links {
            link.up_emulated(profile, seed).await?;
        }
        Ok(())
    }

    /// A fresh directory and two sites in it, for one of the cases that run at the same time: on the link of its number, or on an
    /// address of its own, so that none takes a port of which another's gateway is just being started again.
    pub(super) fn ground(
        &self,
        name: &str,
        number: usize,
        rate: &str,
        saved: Option<PathBuf>,
    ) -> Result<Ground, LabError> {
        let directory = self.directory.join(name);
        std::fs::create_dir(&directory).map_err(|source| LabError::file(&directory, source))?;
        let site = |place, namespace, listen| Site::new(&directory, place, namespace, listen);
        let link = self.links.get(number);
        let mut sites = match link {
            None => {
                let [at_a, at_b] = free_addresses(number)?;
                [site(Place::A, None, at_a)?, site(Place::B, None, at_b)?]
            }
            Some(link) => [
                site(Place::A, Some(link.namespace_a()), (ADDRESS_A, PORT).into())?,
                site(Place::B, Some(link.namespace_b()), (ADDRESS_B, PORT).into())?,
            ],
        };
        if let Some(disk) = &self.disk {
            for site in &mut sites {
                disk.lay(site)?;
            }
        }
        Ok(Ground {
            directory,
            disk: self.disk.clone(),
            sites,
            link: self.section.clone(),
            rate: Some(rate.to_owned()),
            saved,
            link_control: link.map(Link::control),
        })
    }

    /// Kills every process that names the directory, waits until they are gone, and unmounts what was mounted there.
    pub(super) async fn sweep(&self, directory: &Path) -> Result<(), LabError> {
        for _ in 0..500 {
            let left = processes_of(directory, None);
            if left.is_empty() {
                break;
            }
            for process in left.into_iter().filter_map(Pid::from_raw) {
                // One that has ended meanwhile needs nothing.
                let _ = kill_process(process, Signal::KILL);
                clock::forget(process.as_raw_pid().unsigned_abs());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        unmount_below(directory).await?;
        Ok(())
    }

    /// Removes everything. Problems are told and do not stop the rest.
    pub(super) async fn clean(&self, say: impl Fn(&str)) {
        if let Err(error) = self.sweep(&self.directory).await {
            say(&format!("while cleaning up: {error}"));
        }
        for link in self.links.iter().filter(|link| link.is_there()) {
            if let Err(error) = link.down().await {
                say(&format!("while cleaning up: {error}"));
            }
        }
        if self.directory.exists()
            && let Err(error) = std::fs::remove_dir_all(&self.directory)
        {
            say(&format!("while cleaning up: {error}"));
        }
    }
}

/// Two ports of the loopback device's address of this number on which a gateway finds both its ports free.
fn free_addresses(number: usize) -> Result<[SocketAddr; 2], LabError> {
    // At most nine cases run at the same time.
    let loopback = IpAddr::from(Ipv4Addr::new(127, 0, 0, 1 + u8::try_from(number).unwrap_or_default()));
    let mut held = Vec::new();
    let mut found = Vec::new();
    while found.len() < 2 {
        let control = UdpSocket::bind((loopback, 0)).map_err(LabError::NoPort)?;
        let address = control.local_addr().map_err(LabError::NoPort)?;
        // A gateway takes the next port too.
        if let Some(next) = address.port().checked_add(1)
            && let Ok(bulk) = UdpSocket::bind((loopback, next))
        {
            found.push(address);
            held.push(bulk);
        }
        held.push(control);
        if held.len() > 64 {
            return Err(LabError::NoPort(std::io::ErrorKind::AddrInUse.into()));
        }
    }
    Ok([found[0], found[1]])
}

/// Processes that made a directory of a run and are gone.
fn dead_runs() -> Vec<u32> {
    let parent = Path::new(DIRECTORY).parent().unwrap_or(Path::new("/"));
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.path().to_str()?.strip_prefix(DIRECTORY)?.parse().ok())
        .filter(|process: &u32| !Path::new(&format!("/proc/{process}")).exists())
        .collect()
}

/// Links of one run at most: their number is one digit of their name.
pub(super) const MOST_LINKS: usize = 9;
const PORT: u16 = 4646;
const DIRECTORY: &str = "/tmp/longhaul-kill-";
