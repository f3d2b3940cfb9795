//! One site of a run: its namespace, its gateway, and where its QEMU's sockets are.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tokio::net::UnixStream;

use super::error::LabError;
use super::guest::{GuestFiles, Launch, Start};
use super::process::{Process, run};
use crate::config::units::show_duration;
use crate::wan::Profile;

/// A place where a gateway and at most one QEMU run.
#[derive(Clone, Debug)]
pub(super) struct Site {
    /// Its name in the gateways' configurations.
    pub(super) name: &'static str,
    /// The network namespace of its processes.
    pub(super) namespace: String,
    /// Where its gateway listens.
    pub(super) listen: SocketAddr,
    /// Its QEMU's sockets and files.
    pub(super) files: GuestFiles,
    /// Everything of the site is in here.
    pub(super) directory: PathBuf,
}

/// What both gateways are told about the link.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LinkSection {
    pub(super) rate: String,
    pub(super) rtt: String,
}

impl LinkSection {
    /// What an operator with a link like `profile` would write.
    pub(super) fn of(profile: &Profile) -> Self {
        Self {
            rate: profile.rate.to_string(),
            rtt: show_duration(profile.rtt),
        }
    }
}

impl Site {
    /// A site that has its own directory in `stage`, and no process yet.
    pub(super) fn new(
        stage: &Path,
        name: &'static str,
        namespace: String,
        listen: SocketAddr,
    ) -> Result<Self, LabError> {
        let directory = stage.join(format!("{namespace}.{name}"));
        std::fs::create_dir(&directory).map_err(|source| LabError::file(&directory, source))?;
        let files = GuestFiles::named(&directory, "vm");
        Ok(Self {
            name,
            namespace,
            listen,
            files,
            directory,
        })
    }

    /// Starts a QEMU here.
    pub(super) fn start_qemu(&self, launch: &Launch, start: Start) -> Result<Process, LabError> {
        let log = self.directory.join("qemu.log");
        let name = format!("QEMU at {}", self.name);
        Ok(Process::spawn(
            &name,
            Some(&self.namespace),
            &launch.command(&self.files, start),
            &log,
        )?)
    }

    /// Starts the gateway, whose peer is `other`, and waits until it serves its control socket.
    pub(super) async fn start_gateway(
        &self,
        longhaul: &str,
        other: &Self,
        launch: &Launch,
        link: &LinkSection,
    ) -> Result<Process, LabError> {
        let config = self.directory.join("gateway.toml");
        let text = self.configuration(other, launch, link)?;
        std::fs::write(&config, text).map_err(|source| LabError::file(&config, source))?;
        let argv = [longhaul, "gateway", "--config", &config.display().to_string()].map(str::to_owned);
        let log = self.directory.join("gateway.log");
        let mut gateway = Process::spawn(
            &format!("the gateway of {}", self.name),
            Some(&self.namespace),
            &argv,
            &log,
        )?;
        let deadline = tokio::time::Instant::now() + GATEWAY_START;
        while UnixStream::connect(self.control_socket()).await.is_err() {
            gateway.check()?;
            if tokio::time::Instant::now() > deadline {
                return Err(LabError::GatewayMute {
                    site: self.name,
                    said: gateway.said(),
                });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(gateway)
    }

    /// The command line of a client of this site's gateway.
    pub(super) fn client<'a>(&self, longhaul: &'a str, arguments: &[&'a str]) -> Vec<String> {
        let socket = self.control_socket().display().to_string();
        std::iter::once(longhaul)
            .chain(arguments.iter().copied())
            .map(str::to_owned)
            .chain(["--socket".to_owned(), socket])
            .collect()
    }

    /// Makes this site's gateway and that of `other` trust each other.
    pub(super) async fn pair(&self, longhaul: &str, other: &Self) -> Result<(), LabError> {
        let invite = self.client(longhaul, &["pair", "--invite"]);
        let code = run(&words(&invite)).await?;
        let accept = other.client(longhaul, &["pair", code.trim()]);
        run(&words(&accept)).await?;
        Ok(())
    }

    fn configuration(&self, other: &Self, launch: &Launch, link: &LinkSection) -> Result<String, LabError> {
        // The gateway fills in its own QMP socket.
        let files = GuestFiles {
            qmp: "{qmp}".into(),
            ..self.files.clone()
        };
        let config = Gateway {
            site: self.name,
            state_dir: self.state(),
            listen: self.listen,
            link,
            metrics: Metrics { listen: "off" },
            peer: [Peer {
                name: other.name,
                address: other.listen,
            }],
            vm: [Vm {
                name: VM,
                qmp: &self.files.qmp,
                command: launch.command(&files, Start::ReceivePaused),
            }],
        };
        toml::to_string(&config).map_err(LabError::Configuration)
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Where its gateway takes commands.
    pub(super) fn control_socket(&self) -> PathBuf {
        self.state().join("control.sock")
    }
}

/// A command line as the functions that run one take it.
pub(super) fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}

/// The configuration file of a gateway, as far as the lab needs it.
#[derive(Serialize)]
struct Gateway<'a> {
    site: &'a str,
    state_dir: PathBuf,
    listen: SocketAddr,
    link: &'a LinkSection,
    metrics: Metrics,
    peer: [Peer<'a>; 1],
    vm: [Vm<'a>; 1],
}

#[derive(Serialize)]
struct Metrics {
    listen: &'static str,
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
}

/// The VM's name in the gateways' configurations.
pub(super) const VM: &str = "demo";
/// A gateway makes its keys at its first start.
const GATEWAY_START: Duration = Duration::from_secs(20);
