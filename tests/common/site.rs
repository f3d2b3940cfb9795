//! One site: its gateway, its configuration and its VMs.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::guest::Machine;
use super::process::{Ended, Running, processes_of, send};
use super::{qmp, until};

/// How a site is set up.
#[derive(Clone, Debug)]
pub(crate) struct SitePlan {
    name: String,
    pub(crate) folder: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) vms: BTreeMap<String, VmPlan>,
    /// TOML of the sections that are not about VMs.
    pub(crate) settings: String,
    pub(crate) memory_budget: String,
    pub(crate) port: u16,
    pub(crate) metrics: bool,
    /// Of the gateway, beside the test's own.
    pub(crate) environment: Vec<(&'static str, String)>,
}

/// How a VM is configured at a site.
#[derive(Clone, Debug)]
pub(crate) struct VmPlan {
    pub(crate) machine: Machine,
    pub(crate) qmp: PathBuf,
    /// TOML of its section beside name and QMP socket.
    pub(crate) settings: String,
    /// TOML of the tables in its section.
    pub(crate) tables: String,
    /// How the gateway starts a hypervisor for it; `None`: one waits already.
    pub(crate) command: Option<Vec<String>>,
}

impl SitePlan {
    pub(crate) fn new(name: &str, rig: &Path, vms: &[(&str, Machine)]) -> Self {
        let folder = rig.join(name);
        std::fs::create_dir(&folder).unwrap();
        let vms = vms.iter().map(|(vm, machine)| {
            let mut command = machine.command(&folder, "{qmp}");
            command.extend(["--incoming", "defer", "-S"].map(str::to_owned));
            let plan = VmPlan {
                machine: machine.clone(),
                qmp: folder.join(format!("{vm}.qmp")),
                settings: String::new(),
                tables: String::new(),
                command: Some(command),
            };
            ((*vm).to_owned(), plan)
        });
        Self {
            name: name.to_owned(),
            state_dir: folder.join("state"),
            vms: vms.collect(),
            settings: "[link]\nrtt = \"10ms\"\nrate = \"1gbit\"\n".to_owned(),
            memory_budget: "512mib".to_owned(),
            port: free_port(),
            metrics: false,
            environment: Vec::new(),
            folder,
        }
    }

    pub(crate) fn vm(&mut self, name: &str) -> &mut VmPlan {
        self.vms.get_mut(name).unwrap()
    }

    fn toml(&self) -> String {
        let Self {
            name,
            port,
            memory_budget,
            settings,
            ..
        } = self;
        let state_dir = self.state_dir.display();
        // The pair of ports is this site's alone, so the metrics may have the TCP port of the same number.
        let metrics = if self.metrics {
            format!("127.0.0.1:{port}")
        } else {
            "off".to_owned()
        };
        let mut text = format!(
            "site = \"{name}\"\nstate_dir = \"{state_dir}\"\nlisten = \"127.0.0.1:{port}\"\n\
             memory_budget = \"{memory_budget}\"\n{settings}\n[metrics]\nlisten = \"{metrics}\"\n[log]\nlevel = \"debug\"\n"
        );
        for (vm, plan) in &self.vms {
            text += &format!(
                "[[vm]]\nname = \"{vm}\"\nqmp = {}\n{}\n",
                json!(plan.qmp),
                plan.settings
            );
            if let Some(command) = &plan.command {
                text += &format!("command = {}\n", json!(command));
            }
            text += &plan.tables;
        }
        text
    }
}

/// A site and whatever runs there.
pub(crate) struct Site {
    plan: SitePlan,
    gateway: Option<Running>,
    /// Hypervisors that the test started.
    guests: Vec<Running>,
}

impl Site {
    pub(crate) fn new(plan: SitePlan) -> Self {
        Self {
            plan,
            gateway: None,
            guests: Vec::new(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.plan.name
    }

    pub(crate) fn plan(&mut self) -> &mut SitePlan {
        &mut self.plan
    }

    pub(crate) fn vms(&self) -> impl Iterator<Item = &str> {
        self.plan.vms.keys().map(String::as_str)
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.plan.state_dir
    }

    pub(crate) fn port(&self) -> u16 {
        self.plan.port
    }

    /// The program, with nothing of our own environment in its way.
    fn program() -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LONGHAUL_")) {
            command.env_remove(name);
        }
        command
    }

    /// `longhaul ARGS`, for this site's gateway.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Self::program();
        command
            .args(args)
            .arg("--socket")
            .arg(self.plan.state_dir.join("control.sock"));
        command
    }

    /// `longhaul gateway` with this site's plan.
    pub(crate) fn gateway_command(&self) -> Command {
        let config = self.plan.folder.join("gateway.toml");
        std::fs::write(&config, self.plan.toml()).unwrap();
        let mut command = Self::program();
        command.arg("gateway").arg("--config").arg(config);
        command.envs(self.plan.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts the gateway and waits until it serves.
    #[track_caller]
    pub(crate) fn start(&mut self) {
        let gateway = Running::start(self.gateway_command(), &self.plan.folder);
        let gateway = self.gateway.insert(gateway);
        until("the gateway is ready", || {
            assert!(!gateway.has_ended(), "{}", gateway.stderr());
            gateway.stderr().contains("ready control=")
        });
    }

    pub(crate) fn gateway(&mut self) -> &mut Running {
        self.gateway.as_mut().unwrap()
    }

    /// The gateway's process, which is not this site's any more.
    pub(crate) fn take_gateway(&mut self) -> Running {
        self.gateway.take().unwrap()
    }

    /// What the gateway has said.
    pub(crate) fn log(&self) -> String {
        self.gateway.as_ref().map(Running::stderr).unwrap_or_default()
    }

    /// Starts `longhaul ARGS` with this site's gateway.
    pub(crate) fn begin(&self, args: &[&str]) -> Running {
        Running::start(self.command(args), &self.plan.folder)
    }

    /// Runs `longhaul ARGS` with this site's gateway to its end.
    #[track_caller]
    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        self.begin(args).wait()
    }

    /// Waits until the newest migration that the gateway lists is in this phase.
    #[track_caller]
    pub(crate) fn until_phase(&self, phase: &str) {
        until(
            &format!("the newest migration is in {phase} at {}", self.name()),
            || self.run(&["list", "--output", "json"]).json()[0]["phase"] == phase,
        );
    }

    /// Boots a VM here and waits until its guest is up.
    #[track_caller]
    pub(crate) fn boot(&mut self, vm: &str) {
        let machine = self.plan.vms[vm].machine.clone();
        self.launch(vm, &machine, &[]);
        self.wait_for_guest(vm);
    }

    /// Starts a hypervisor of `machine` on the QMP socket of `vm`.
    #[track_caller]
    pub(crate) fn launch(&mut self, vm: &str, machine: &Machine, more: &[&str]) {
        let qmp = &self.plan.vms[vm].qmp;
        let mut words = machine.command(&self.plan.folder, qmp.to_str().unwrap());
        words.extend(more.iter().map(|word| (*word).to_owned()));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        let mut running = Running::start(command, &self.plan.folder);
        until("the hypervisor answers", || {
            assert!(!running.has_ended(), "{}", running.stderr());
            self.state(vm).is_some()
        });
        self.guests.push(running);
    }

    fn wait_for_guest(&self, vm: &str) {
        if !self.plan.vms[vm].machine.says_ready() {
            // The firmware has to have set up its memory, or there would be nothing to migrate.
            return until("the guest runs", || self.state(vm).as_deref() == Some("running"));
        }
        let says = format!("{}.says", self.plan.vms[vm].qmp.display());
        until("the guest has filled its memory", || {
            std::fs::read(&says).is_ok_and(|said| said.contains(&b'R'))
        });
    }

    /// Run state of a VM here; `None` where no hypervisor answers.
    pub(crate) fn state(&self, vm: &str) -> Option<String> {
        let status = self.qmp(vm, "query-status", &json!({}))?;
        status["status"].as_str().map(str::to_owned)
    }

    /// A command on the second monitor of a VM.
    pub(crate) fn qmp(&self, vm: &str, command: &str, arguments: &Value) -> Option<Value> {
        let socket = format!("{}.test", self.plan.vms[vm].qmp.display());
        qmp::ask(Path::new(&socket), command, arguments)
    }

    /// Ids of the hypervisors of a VM here.
    pub(crate) fn hypervisors(&self, vm: &str) -> Vec<u32> {
        processes_of(&self.plan.vms[vm].qmp)
            .into_iter()
            .map(|(id, _)| id)
            .collect()
    }

    /// Kills the hypervisors of a VM here.
    pub(crate) fn kill_hypervisors(&self, vm: &str) {
        for id in self.hypervisors(vm) {
            send(id, Signal::KILL);
        }
    }

    /// Where its files are.
    pub(crate) fn folder(&self) -> &Path {
        &self.plan.folder
    }

    /// What is in the state directory and does not have to outlive a migration.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.plan.state_dir) else {
            return Vec::new();
        };
        let names = entries
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned());
        let (logs, others): (Vec<String>, Vec<String>) = names
            .filter(|name| !DURABLE.contains(&name.as_str()))
            .partition(|name| name.starts_with("vmm-") && name.ends_with(".log"));
        // What a hypervisor says is kept for as long as it runs.
        let running = self.vms().map(|vm| self.hypervisors(vm).len()).sum();
        others.into_iter().chain(logs.into_iter().skip(running)).collect()
    }

    /// Kills the gateway and everything that the test started here.
    pub(crate) fn kill(&mut self) {
        self.gateway = None;
        self.guests.clear();
    }

    /// Everything that was said here, for a person who looks at a failed test.
    pub(crate) fn everything_said(&self) -> String {
        let mut text = format!("==== site {}\n{}\n", self.plan.name, self.plan.toml());
        let mut files: Vec<PathBuf> = [&self.plan.folder, &self.plan.state_dir]
            .into_iter()
            .filter_map(|folder| std::fs::read_dir(folder).ok())
            .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|kind| ["out", "err", "log"].iter().any(|known| kind == *known))
            })
            .collect();
        files.sort();
        for file in files {
            let said = std::fs::read(&file).unwrap_or_default();
            if !said.is_empty() {
                text += &format!("---- {}\n{}\n", file.display(), String::from_utf8_lossy(&said));
            }
        }
        text
    }
}

/// What stays in a state directory.
const DURABLE: [&str; 7] = [
    "control.sock",
    "control.sock.lock",
    "identity.key",
    "identity.crt",
    "trust.json",
    "journal",
    "store",
];

/// A port that is free together with the next one, over UDP and TCP on loopback.
pub(crate) fn free_port() -> u16 {
    // Tests of one process take turns; other processes start elsewhere.
    static TURN: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 6000).unwrap() * 4;
    loop {
        let turn = TURN.fetch_add(2, Ordering::Relaxed);
        let port = 20_000 + (start.wrapping_add(turn)) % 24_000;
        let free = |port: u16| UdpSocket::bind(("127.0.0.1", port)).is_ok();
        if free(port) && free(port + 1) && std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
