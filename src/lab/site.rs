//! One site of a run: its namespace, its gateway, and where its QEMU's sockets are.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixStream;

use super::error::LabError;
use super::gateway_file::{GatewayFile, LinkSection, client, words};
use super::guest::{GuestFiles, Launch, Start};
use super::process::{Process, run};
use crate::config::units::show_duration;

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

    /// Starts the gateway, whose peer is `other` and whose VM `launch` starts, and waits until it serves its control socket.
    pub(super) async fn start_gateway(
        &self,
        longhaul: &str,
        other: &Self,
        launch: Option<&Launch>,
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
    pub(super) fn client(&self, longhaul: &str, arguments: &[&str]) -> Vec<String> {
        client(longhaul, arguments, &self.control_socket())
    }

    /// Makes this site's gateway and that of `other` trust each other.
    pub(super) async fn pair(&self, longhaul: &str, other: &Self) -> Result<(), LabError> {
        let invite = self.client(longhaul, &["pair", "--invite"]);
        let code = run(&words(&invite)).await?;
        let accept = other.client(longhaul, &["pair", code.trim()]);
        run(&words(&accept)).await?;
        Ok(())
    }

    /// Bytes of payload a second that a link test to `other` gets across for so long.
    pub(super) async fn test_link(&self, longhaul: &str, other: &Self, time: Duration) -> Result<f64, LabError> {
        let time = show_duration(time);
        let arguments = ["link-test", "--to", other.name, "--time", &time, "--output", "json"];
        let said = run(&words(&self.client(longhaul, &arguments))).await?;
        let test: Value = serde_json::from_str(&said).unwrap_or_default();
        let goodput = test["goodput_bytes_per_second"].as_f64();
        goodput.ok_or(LabError::NoFigures {
            tool: "longhaul link-test",
            said,
        })
    }

    fn configuration(&self, other: &Self, launch: Option<&Launch>, link: &LinkSection) -> Result<String, LabError> {
        // The gateway fills in its own QMP socket.
        let files = GuestFiles {
            qmp: "{qmp}".into(),
            ..self.files.clone()
        };
        GatewayFile {
            site: self.name,
            state_dir: &self.state(),
            listen: self.listen,
            link,
            log_level: None,
            restarts: None,
            peer: (other.name, other.listen),
            vm: launch.map(|launch| (self.files.qmp.as_path(), launch.command(&files, Start::ReceivePaused))),
            disk: self.files.disk.as_ref(),
        }
        .text()
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Where its gateway takes commands.
    pub(super) fn control_socket(&self) -> PathBuf {
        self.state().join("control.sock")
    }
}

/// A gateway makes its keys at its first start.
const GATEWAY_START: Duration = Duration::from_secs(20);
