//! A gateway as the lab sets one up: its configuration file, and the command line of its clients.

use std::net::SocketAddr;
use std::path::Path;

use serde::Serialize;

use super::error::LabError;
use super::guest::GuestDisk;
use crate::config::units::show_duration;
use crate::wan::Profile;

/// What both gateways are told about the link.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LinkSection {
    pub(super) rate: String,
    pub(super) rtt: String,
    /// Gateways on it keep what VMs leave.
    #[serde(skip)]
    pub(super) keeps_pages: bool,
}

impl LinkSection {
    /// Of gateways on one loopback device.
    pub(super) fn loopback() -> Self {
        Self {
            rate: "10gbit".to_owned(),
            rtt: "1ms".to_owned(),
            keeps_pages: false,
        }
    }

    /// What an operator with a link like `profile` would write.
    pub(super) fn of(profile: &Profile) -> Self {
        Self {
            rate: profile.rate.to_string(),
            rtt: show_duration(profile.rtt),
            keeps_pages: false,
        }
    }
}

/// What the configuration of a gateway says, with one peer and at most one VM.
pub(super) struct GatewayFile<'a> {
    pub(super) site: &'a str,
    pub(super) state_dir: &'a Path,
    pub(super) listen: SocketAddr,
    pub(super) link: &'a LinkSection,
    /// `None`: as the gateway has it.
    pub(super) log_level: Option<&'static str>,
    /// Name and address.
    pub(super) peer: (&'a str, SocketAddr),
    /// How often it begins a migration again by itself; `None`: as the gateway has it.
    pub(super) restarts: Option<&'static str>,
    /// The VM: its QMP socket where it leaves, QEMU where it arrives.
    pub(super) vm: Option<(&'a Path, Vec<String>)>,
    /// Its disk.
    pub(super) disk: Option<&'a GuestDisk>,
}

impl GatewayFile<'_> {
    /// As TOML.
    pub(super) fn text(self) -> Result<String, LabError> {
        let config = Gateway {
            site: self.site,
            state_dir: self.state_dir,
            listen: self.listen,
            link: self.link,
            metrics: Metrics { listen: "off" },
            migration: self.restarts.map(|restarts| Migration { restarts }),
            store: self.link.keeps_pages.then_some(Store { size: "8gib" }),
            log: self.log_level.map(|level| Log { level }),
            peer: [Peer {
                name: self.peer.0,
                address: self.peer.1,
            }],
            vm: self
                .vm
                .map(|(qmp, command)| Vm {
                    name: VM,
                    qmp,
                    command,
                    disks: self.disk.map(|disk| if disk.is_shared { "shared" } else { "copied" }),
                    image: self
                        .disk
                        .filter(|disk| !disk.is_shared)
                        .map(VmImage::of)
                        .into_iter()
                        .collect(),
                })
                .into_iter()
                .collect(),
        };
        toml::to_string(&config).map_err(LabError::Configuration)
    }
}

#[derive(Serialize)]
struct Gateway<'a> {
    site: &'a str,
    state_dir: &'a Path,
    listen: SocketAddr,
    link: &'a LinkSection,
    metrics: Metrics,
    #[serde(skip_serializing_if = "Option::is_none")]
    migration: Option<Migration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<Store>,
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<Log>,
    peer: [Peer<'a>; 1],
    vm: Vec<Vm<'a>>,
}

#[derive(Serialize)]
struct Metrics {
    listen: &'static str,
}

#[derive(Serialize)]
struct Migration {
    restarts: &'static str,
}

#[derive(Serialize)]
struct Store {
    size: &'static str,
}

#[derive(Serialize)]
struct Log {
    level: &'static str,
}

#[derive(Serialize)]
struct Peer<'a> {
    name: &'a str,
    address: SocketAddr,
}

#[derive(Serialize)]
struct Vm<'a> {
    name: &'a str,
    qmp: &'a Path,
    command: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disks: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    image: Vec<VmImage<'a>>,
}

#[derive(Serialize)]
struct VmImage<'a> {
    disk: &'static str,
    path: &'a Path,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<&'a Path>,
    #[serde(rename = "base-format", skip_serializing_if = "Option::is_none")]
    base_format: Option<&'static str>,
}

impl<'a> VmImage<'a> {
    fn of(disk: &'a GuestDisk) -> Self {
        Self {
            disk: GuestDisk::ID,
            path: &disk.image,
            format: disk.format,
            base: disk.base.as_deref(),
            base_format: disk.base.as_ref().map(|_| "raw"),
        }
    }
}

/// The command line of a client of the gateway on `socket`.
pub(super) fn client(longhaul: &str, arguments: &[&str], socket: &Path) -> Vec<String> {
    std::iter::once(longhaul)
        .chain(arguments.iter().copied())
        .chain(["--socket", &socket.display().to_string()])
        .map(str::to_owned)
        .collect()
}

/// A command line as the functions that run one take it.
pub(super) fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}

/// The VM's name in the gateways' configurations.
pub(super) const VM: &str = "demo";
