//! One site of a case: its gateway, which is killed and started again, and where its QEMU's sockets are.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::moment::Place;
use crate::api::Client;
use crate::lab::clock::{Clock, Jump, PRELOAD, has_jumped};
use crate::lab::error::LabError;
use crate::lab::gateway_file::{GatewayFile, LinkSection, client, words};
use crate::lab::guest::{GuestFiles, Launch, Start};
use crate::lab::process::{Process, run};

/// A place where a gateway and at most one QEMU run.
#[derive(Clone, Debug)]
pub(super) struct Site {
    pub(super) place: Place,
    /// The network namespace of its processes; `None`: the host's.
    pub(super) namespace: Option<String>,
    /// Where its gateway listens.
    pub(super) listen: SocketAddr,
    /// Its QEMU's sockets and files.
    pub(super) files: GuestFiles,
    /// A second monitor of its QEMU, which is the lab's own.
    pub(super) watch: PathBuf,
    /// Everything of the site is in here.
    pub(super) directory: PathBuf,
}

impl Site {
    /// A site that has its own directory below `parent`, and no process yet.
    pub(super) fn new(
        parent: &Path,
        place: Place,
        namespace: Option<String>,
        listen: SocketAddr,
    ) -> Result<Self, LabError> {
        let directory = parent.join(place.to_string().to_lowercase());
        std::fs::create_dir(&directory).map_err(|source| LabError::file(&directory, source))?;
        Ok(Self {
            place,
            namespace,
            listen,
            files: GuestFiles::named(&directory, "vm"),
            watch: directory.join("vm.watch"),
            directory,
        })
    }

    /// Boots the guest here, or goes on with one that was saved.
    pub(super) fn boot(&self, launch: &Launch, saved: Option<&Path>) -> Result<Process, LabError> {
        let log = self.directory.join("qemu.log");
        let mut argv = self.qemu(launch, &self.files, Start::Boot);
        if let Some(saved) = saved {
            argv.extend(["-incoming".to_owned(), format!("exec:cat {}", saved.display())]);
        }
        Ok(Process::spawn("QEMU at A", self.namespace.as_deref(), &argv, &log)?)
    }

    /// Writes the configuration of the gateway, whose peer is `other`. `again`: it begins again what a restart has undone.
    pub(super) fn configure(
        &self,
        other: &Self,
        launch: &Launch,
        link: &LinkSection,
        again: bool,
    ) -> Result<(), LabError> {
        // The gateway fills in its own QMP socket.
        let files = GuestFiles {
            qmp: "{qmp}".into(),
            ..self.files.clone()
        };
        let text = GatewayFile {
            site: self.place.site(),
            state_dir: &self.state(),
            listen: self.listen,
            link,
            log_level: Some("debug"),
            restarts: (!again).then_some("0"),
            peer: (other.place.site(), other.listen),
            // By the host's clock, whatever its gateway goes by: times of its events are compared.
            vm: Some((
                &self.files.qmp,
                ["env", "-u", PRELOAD]
                    .map(str::to_owned)
                    .into_iter()
                    .chain(self.qemu(launch, &files, Start::ReceivePaused))
                    .collect(),
            )),
            disk: self.files.disk.as_ref(),
        }
        .text()?;
        let file = self.config();
        std::fs::write(&file, text).map_err(|source| LabError::file(&file, source))
    }

    /// Starts the gateway for the `time`th time and waits until it answers on its control socket. `clock`: what it goes by, if it is not the
    /// host's.
    pub(super) async fn start_gateway(
        &self,
        longhaul: &str,
        time: u32,
        clock: Option<&Clock>,
    ) -> Result<Process, LabError> {
        let mut argv = Vec::new();
        if let Some(clock) = clock {
            argv.push("env".to_owned());
            argv.extend(clock.environment().map(|(name, value)| format!("{name}={value}")));
        }
        argv.extend([longhaul, "gateway", "--config", &self.config().display().to_string()].map(str::to_owned));
        let log = self.directory.join(format!("gateway-{time}.log"));
        let name = format!("the gateway of {}", self.place);
        let mut gateway = Process::spawn(&name, self.namespace.as_deref(), &argv, &log)?;
        let deadline = tokio::time::Instant::now() + GATEWAY_START;
        let client = self.api();
        while client.identity().await.is_err() {
            gateway.check()?;
            if tokio::time::Instant::now() > deadline {
                return Err(LabError::GatewayMute {
                    site: self.place.site(),
                    said: gateway.said(),
                });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(gateway)
    }

    /// Whether the gateway that was started first has said that it could not write to its journal.
    pub(super) fn has_missed_a_record(&self) -> bool {
        let said = std::fs::read_to_string(self.directory.join("gateway-1.log")).unwrap_or_default();
        let failed = |line: &str| {
            line.contains("journal") && (line.contains("could not be written") || line.contains("is full"))
        };
        said.lines().any(failed)
    }

    /// Whether the clock of the gateway that was started first has moved, by what it wrote beside its words.
    pub(super) fn clock_has_jumped(&self, jump: Jump) -> bool {
        let said = std::fs::read_to_string(self.directory.join("gateway-1.log")).unwrap_or_default();
        has_jumped(&said, jump)
    }

    /// The command line of a client of this site's gateway.
    pub(super) fn client(&self, longhaul: &str, arguments: &[&str]) -> Vec<String> {
        client(longhaul, arguments, &self.control_socket())
    }

    /// A client of this site's gateway in this process.
    pub(super) fn api(&self) -> Client {
        Client::new(&self.control_socket())
    }

    /// Makes this site's gateway and that of `other` trust each other.
    pub(super) async fn pair(&self, longhaul: &str, other: &Self) -> Result<(), LabError> {
        let address = self.listen.to_string();
        let invite = self.client(longhaul, &["pair", "--invite", "--address", &address]);
        let code = run(&words(&invite)).await?;
        let accept = other.client(longhaul, &["pair", code.trim()]);
        run(&words(&accept)).await?;
        Ok(())
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.state().join("journal")
    }

    fn qemu(&self, launch: &Launch, files: &GuestFiles, start: Start) -> Vec<String> {
        let mut argv = launch.command(files, start);
        let watch = format!("unix:{},server=on,wait=off", self.watch.display());
        argv.extend(["-qmp".to_owned(), watch]);
        argv
    }

    fn config(&self) -> PathBuf {
        self.directory.join("gateway.toml")
    }

    /// The gateway's state directory.
    pub(super) fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn control_socket(&self) -> PathBuf {
        self.state().join("control.sock")
    }
}

/// A gateway makes its keys at its first start.
const GATEWAY_START: Duration = Duration::from_secs(20);
