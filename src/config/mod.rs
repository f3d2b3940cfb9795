//! What an operator states about one gateway: TOML, under flags and the environment, read once into [`Config`].
//!
//! Asked for is what an operator knows (rate and RTT of the link, memory, where a VM's QMP socket is); windows, buffers
//! and timers are derived from it elsewhere. Flag > environment > file > default. Who is trusted is not here but in the
//! trust store, which pairing writes.

/// Gives an enum its words, for the file, the command line and for showing it.
macro_rules! words {
    ($type:ident { $($word:literal => $variant:ident),+ $(,)? }) => {
        impl FromStr for $type {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(format!("write one of {}", [$($word),+].join(", "))),
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$variant => $word,)+ })
            }
        }
    };
}

mod calendar;
mod hooks;
mod image;
mod pool;
mod section;
mod tunnel;
pub mod units;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

pub use self::hooks::{Hook, Hooks};
pub use self::image::{ImageFormat, Preallocation, VmImage};
pub use self::pool::Pool;
pub use self::section::{Overrides, Problem};
use self::section::{Section, Source};
pub use self::tunnel::{Entrance, Exit, Place};
pub use self::units::PeerAddress;
use self::units::{DEFAULT_PORT, parse_duration, parse_name, parse_size};
use crate::hypervisor::qemu::{LaunchTemplate, LaunchValues, TemplateError};
use crate::proto::page::ByteRate;
use crate::proto::rate::Calendar;
use crate::transport::tuning::MOST_BULK_CONNECTIONS;

/// Where the configuration is when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/longhaul/gateway.toml";

/// `state_dir` when nothing else is said.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/longhaul";

/// Everything a gateway is told. Defaults are in [`Config::for_site`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this site, as other sites see it. No default: two sites of one name could not be told apart.
    pub site: String,
    /// Directory of everything that outlives the process: identity, trust, journal, control socket; and of spilled pages.
    pub state_dir: PathBuf,
    /// UDP address of the control connection; bulk data uses the port after it.
    pub listen: SocketAddr,
    /// Address under which other sites reach this gateway. Needed in invitations where `listen` is a wildcard or behind
    /// NAT.
    pub advertise: Option<PeerAddress>,
    /// Bytes of memory that page caches, dictionaries and queues may use together.
    pub memory_budget: u64,
    /// The site's link towards the WAN.
    pub link: Link,
    /// Where metrics are served.
    pub metrics: Metrics,
    /// What is kept of VMs that have moved.
    pub store: Store,
    /// How migrations run when the command does not say.
    pub migration: Migration,
    /// What operators have run when a migration gets somewhere.
    pub hooks: Hooks,
    /// Gateways of other sites, in the order of the file.
    pub peers: Vec<Peer>,
    /// VMs that may leave or arrive here, in the order of the file.
    pub vms: Vec<Vm>,
    /// Folders into which disks that arrive may be put.
    pub pools: Vec<Pool>,
    /// Tunnels that begin here, in the order of the file.
    pub entrances: Vec<Entrance>,
    /// Tunnels that end here, in the order of the file.
    pub exits: Vec<Exit>,
    /// What is logged.
    pub log: Log,
}

/// The link of the site towards the WAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Capacity, headers included: the most that the link may ever carry, which windows are made for. Absent: found by probing.
    pub rate: Option<ByteRate>,
    /// When less than that holds.
    pub calendar: Calendar,
    /// RTT to the farthest peer. Sizes windows before anything is measured.
    pub rtt: Duration,
}

/// Where `/metrics`, `/live` and `/ready` are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics {
    /// TCP address; `None` (`"off"` in the file) serves none.
    pub listen: Option<SocketAddr>,
}

/// What is kept of VMs that have moved, for the next time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Store {
    /// The most that it may take on the disk. Absent: nothing is kept.
    pub size: Option<u64>,
    /// Where it is. Absent: `store` in `state_dir`.
    pub dir: Option<PathBuf>,
}

/// How migrations run when the command does not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// Longest downtime that is accepted.
    pub downtime_limit: Duration,
    /// What becomes of the source's VM process once the VM runs at the destination.
    pub after_success: AfterSuccess,
    /// Longest time from start to switchover; a migration that takes longer is cancelled. Absent: no limit.
    pub deadline: Option<Duration>,
    /// How long pre-copy waits for a peer that cannot be reached; then the migration is cancelled.
    pub longest_cut: Duration,
    /// How often a migration that the restart of a gateway has undone is begun again.
    pub restarts: u32,
    /// Cap of each migration. Absent: the link's rate.
    pub rate: Option<ByteRate>,
    /// How often a VM that runs at the destination is announced to its network.
    pub announce_rounds: u32,
}

/// The gateway of another site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The site's name, as in `--to`.
    pub name: String,
    /// Where it is called. Absent: the address learnt in pairing.
    pub address: Option<PeerAddress>,
    /// Where it is called where the first address does not answer: another way to the same gateway.
    pub second_address: Option<PeerAddress>,
    /// Cap towards this peer. Absent: `link.rate`.
    pub rate: Option<ByteRate>,
    /// When less than that holds, by the clocks of the link's calendar.
    pub calendar: Calendar,
    /// RTT to this peer. Absent: `link.rtt`.
    pub rtt: Option<Duration>,
    /// Connections over which lanes to this peer are spread. Absent: one for each 2.5 Gbit/s of the rate.
    pub bulk_connections: Option<u8>,
}

/// A VM that may leave or arrive here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Its name, the same at both sites.
    pub name: String,
    /// QMP socket: where the running VM listens, and where one started by `command` will.
    pub qmp: PathBuf,
    /// What starts the process that receives the VM; without it a process already waits on `qmp`.
    pub command: Option<LaunchTemplate>,
    /// Where its disks are.
    pub disks: Disks,
    /// Images that `command` opens and that are made here when the VM arrives with its disks.
    pub images: Vec<VmImage>,
    /// For this VM instead of `migration.after_success`.
    pub after_success: Option<AfterSuccess>,
    /// Whose it is: what is kept of it serves VMs of the same tenant only. Empty: of nobody in particular.
    pub tenant: String,
}

/// What becomes of the source's VM process once the VM runs at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterSuccess {
    /// It is ended by QMP `quit`.
    Quit,
    /// It stays, paused; starting it again is the operator's mistake to avoid.
    Leave,
}

/// Where a VM's writable disks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disks {
    /// It has none. A VM that has one is refused.
    None,
    /// On storage that both sites reach under the same names.
    Shared,
    /// On storage of each site: they are copied with the VM.
    Copied,
}

/// What is logged, on stderr.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Least severe level.
    pub level: LogLevel,
    /// Shape of a line.
    pub format: LogFormat,
}

/// Least severe level that is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is its own word")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// Shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `key=value`, for people and journald.
    Text,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// The defaults.
    ///
    /// | key | default | reason |
    /// |---|---|---|
    /// | `state_dir` | `/var/lib/longhaul` | the place that the file hierarchy standard gives to state |
    /// | `listen` | `0.0.0.0:4646` | every interface; one port for control, the next for bulk |
    /// | `memory_budget` | `512mib` | the dictionary of a 100 GiB guest's digests fits, and a hypervisor host has it to spare |
    /// | `link.time_zone` | `UTC` | the host's own may be set to anything, and a calendar must not change with it |
    /// | `link.rtt` | `150ms` | one ocean; on a shorter path windows are merely larger than used |
    /// | `metrics.listen` | `127.0.0.1:9646` | metrics name peers, so nobody else reads them unasked |
    /// | `migration.downtime_limit` | `500ms` | one ocean crossing, one retransmission and the load of the last pages |
    /// | `migration.after_success` | `quit` | a paused copy that stays is a second VM waiting for a mistake |
    /// | `migration.longest_cut` | `10m` | a cable is not mended faster, but routes change within minutes |
    /// | `migration.restarts` | `5` | an upgrade takes one or two; a migration that ends a gateway each time must not do so for ever |
    /// | `migration.announce_rounds` | `5` | QEMU's own, over the first second: one lost frame does not leave a switch in error |
    /// | `hooks.time_limit` | `10s` | a route or a name is moved within it, and a VM that waits is not forgotten |
    /// | `vm.disks` | `none` | a writable disk must never be forgotten silently |
    /// | `log.level`, `log.format` | `info`, `text` | one line a phase and a round |
    #[must_use]
    pub fn for_site(site: &str) -> Self {
        Self {
            site: site.to_owned(),
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, DEFAULT_PORT)),
            advertise: None,
            memory_budget: 512 << 20,
            link: Link {
                rate: None,
                calendar: Calendar::default(),
                rtt: Duration::from_millis(150),
            },
            metrics: Metrics {
                listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9646))),
            },
            store: Store::default(),
            migration: Migration {
                downtime_limit: Duration::from_millis(500),
                after_success: AfterSuccess::Quit,
                deadline: None,
                longest_cut: Duration::from_secs(600),
                restarts: 5,
                rate: None,
                announce_rounds: 5,
            },
            hooks: Hooks::default(),
            peers: Vec::new(),
            vms: Vec::new(),
            pools: Vec::new(),
            entrances: Vec::new(),
            exits: Vec::new(),
            log: Log {
                level: LogLevel::Info,
                format: LogFormat::Text,
            },
        }
    }

    /// Reads the file at `path` under `overrides`.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`] where the file cannot be read, [`ConfigError::Invalid`] with every mistake in it.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, ConfigError> {
        Self::parse(&read_file(path)?, overrides).map_err(|problems| ConfigError::Invalid {
            path: path.to_owned(),
            problems,
        })
    }

    /// Reads `text` under `overrides`.
    ///
    /// # Errors
    /// Every mistake, in the order of the file.
    pub fn parse(text: &str, overrides: &Overrides) -> Result<Self, Vec<Problem>> {
        let source = Source::new(text, overrides);
        let config = Self::read(source.top()?);
        let problems = source.into_problems();
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// The control socket of the gateway.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        control_socket_in(&self.state_dir)
    }

    /// Where the page store is.
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        self.store.dir.clone().unwrap_or_else(|| self.state_dir.join("store"))
    }

    /// UDP address of bulk data: the port after `listen`.
    #[must_use]
    pub fn bulk_listen(&self) -> SocketAddr {
        SocketAddr::new(self.listen.ip(), self.listen.port().saturating_add(1))
    }

    /// The peer of that name.
    #[must_use]
    pub fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// The rate of the link that holds at `at`; `None` where no rate is configured.
    #[must_use]
    pub fn link_rate_at(&self, at: Timestamp) -> Option<ByteRate> {
        self.link.calendar.rate_at(at).or(self.link.rate)
    }

    /// The cap towards the peer of that name that holds at `at`: its own, and never above the link's. `None` where neither is
    /// configured.
    #[must_use]
    pub fn peer_rate_at(&self, name: &str, at: Timestamp) -> Option<ByteRate> {
        let own = self.peer(name).and_then(|peer| peer.calendar.rate_at(at).or(peer.rate));
        own.into_iter().chain(self.link_rate_at(at)).min()
    }

    /// Whether any rate changes with the time.
    #[must_use]
    pub fn has_calendar(&self) -> bool {
        !self.link.calendar.is_empty() || self.peers.iter().any(|peer| !peer.calendar.is_empty())
    }

    /// The VM of that name.
    #[must_use]
    pub fn vm(&self, name: &str) -> Option<&Vm> {
        self.vms.iter().find(|vm| vm.name == name)
    }

    /// What becomes of the source process of `vm`.
    #[must_use]
    pub fn after_success(&self, vm: &Vm) -> AfterSuccess {
        vm.after_success.unwrap_or(self.migration.after_success)
    }

    /// Values that are wrong or missing keep their default here; the caller discards the result when there are
    /// problems.
    fn read(mut top: Section<'_>) -> Self {
        let mut config = Self::for_site("");
        set(&mut config.site, top.required("site", parse_name));
        set(&mut config.state_dir, top.value("state_dir", parse_absolute));
        set(&mut config.listen, top.value("listen", parse_listen));
        config.advertise = top.value("advertise", parse_advertise);
        set(&mut config.memory_budget, top.value("memory_budget", parse_budget));
        if config.control_socket().as_os_str().len() > MAX_SOCKET_PATH_BYTES {
            top.mistake(
                "state_dir",
                format!("a control socket in it has a path of more than {MAX_SOCKET_PATH_BYTES} bytes"),
            );
        }

        let mut link = top.section("link");
        config.link.rate = link.value("rate", ByteRate::from_str);
        set(&mut config.link.rtt, link.value("rtt", parse_rtt));
        let zone = link.value("time_zone", calendar::parse_zone).unwrap_or(TimeZone::UTC);
        config.link.calendar = calendar::read(&mut link, &zone, config.link.rate, "link.rate");
        link.finish();

        let mut metrics = top.section("metrics");
        set(
            &mut config.metrics.listen,
            metrics.value("listen", parse_metrics_listen),
        );
        metrics.finish();

        let mut store = top.section("store");
        config.store.size = store.value("size", parse_size);
        config.store.dir = store.value("dir", parse_absolute);
        if config.store.dir.is_some() && config.store.size.is_none() {
            store.mistake("dir", "without a size nothing is kept: state store.size".to_owned());
        }
        store.finish();

        let mut migration = top.section("migration");
        set(
            &mut config.migration.downtime_limit,
            migration.value("downtime_limit", parse_duration),
        );
        set(
            &mut config.migration.after_success,
            migration.value("after_success", AfterSuccess::from_str),
        );
        config.migration.deadline = migration.value("deadline", parse_duration);
        set(
            &mut config.migration.longest_cut,
            migration.value("longest_cut", parse_duration),
        );
        set(
            &mut config.migration.restarts,
            migration.value("restarts", parse_restarts),
        );
        config.migration.rate = migration.value("rate", ByteRate::from_str);
        set(
            &mut config.migration.announce_rounds,
            migration.value("announce_rounds", parse_announce_rounds),
        );
        migration.finish();

        config.hooks = hooks::read(top.section("hooks"));

        let mut log = top.section("log");
        set(&mut config.log.level, log.value("level", LogLevel::from_str));
        set(&mut config.log.format, log.value("format", LogFormat::from_str));
        log.finish();

        for mut section in top.sections("peer") {
            let mut peer = Peer {
                name: section.required("name", parse_name).unwrap_or_default(),
                address: section.value("address", PeerAddress::from_str),
                second_address: section.value("second_address", PeerAddress::from_str),
                rate: section.value("rate", ByteRate::from_str),
                calendar: Calendar::default(),
                rtt: section.value("rtt", parse_rtt),
                bulk_connections: section.value("bulk_connections", parse_bulk_connections),
            };
            let most = peer.rate.or(config.link.rate);
            let bounded_by = if peer.rate.is_some() {
                "the peer's rate"
            } else {
                "link.rate"
            };
            peer.calendar = calendar::read(&mut section, &zone, most, bounded_by);
            if !peer.name.is_empty() && config.peer(&peer.name).is_some() {
                section.mistake("name", format!("the peer {:?} is there already", peer.name));
            }
            if !peer.name.is_empty() && peer.name == config.site {
                section.mistake("name", format!("{:?} is this site itself", peer.name));
            }
            section.finish();
            config.peers.push(peer);
        }

        for section in top.sections("pool") {
            pool::read(section, &mut config);
        }

        for mut section in top.sections("vm") {
            let mut vm = Vm {
                name: section.required("name", parse_name).unwrap_or_default(),
                qmp: section.required("qmp", parse_socket_path).unwrap_or_default(),
                command: None,
                disks: section.value("disks", Disks::from_str).unwrap_or(Disks::None),
                after_success: section.value("after_success", AfterSuccess::from_str),
                tenant: section.value("tenant", parse_name).unwrap_or_default(),
                images: section.sections("image").into_iter().map(image::read).collect(),
            };
            image::check(&vm, &config.vms, &section);
            if !vm.name.is_empty() && config.vm(&vm.name).is_some() {
                section.mistake("name", format!("the VM {:?} is there already", vm.name));
            }
            if let Some(other) = config
                .vms
                .iter()
                .find(|other| other.qmp == vm.qmp && !vm.qmp.as_os_str().is_empty())
            {
                section.mistake("qmp", format!("is the socket of the VM {:?} too", other.name));
            }
            if let Some(words) = section.texts("command") {
                match read_command(words, &vm.name, &vm.qmp) {
                    Ok(template) => vm.command = Some(template),
                    Err(mistakes) => mistakes
                        .iter()
                        .for_each(|mistake| section.mistake("command", mistake.to_string())),
                }
            }
            section.finish();
            config.vms.push(vm);
        }

        for section in top.sections("tunnel") {
            tunnel::read(section, &mut config.entrances, &mut config.exits);
        }
        top.finish();
        config
    }
}

/// The control socket of the gateway whose `state_dir` this is.
#[must_use]
pub fn control_socket_in(state_dir: &Path) -> PathBuf {
    state_dir.join("control.sock")
}

/// The `state_dir` that the file at `path` states. For who asks the gateway that runs: whatever else is wrong in the file must
/// not keep anybody from it.
///
/// # Errors
/// The file cannot be read, or its `state_dir` cannot be used.
pub fn stated_state_dir(path: &Path) -> Result<Option<PathBuf>, ConfigError> {
    let text = read_file(path)?;
    let stated = section::stated_text(&text, "state_dir");
    stated.map(|text| parse_absolute(&text)).transpose().map_err(|message| {
        let problem = Problem {
            line: None,
            key: "state_dir".to_owned(),
            message: message.to_owned(),
        };
        ConfigError::Invalid {
            path: path.to_owned(),
            problems: vec![problem],
        }
    })
}

fn read_file(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if bytes > MAX_FILE_BYTES {
        let message = format!("the file has {bytes} bytes; a configuration has at most {MAX_FILE_BYTES}");
        let problem = Problem {
            line: None,
            key: String::new(),
            message,
        };
        return Err(ConfigError::Invalid {
            path: path.to_owned(),
            problems: vec![problem],
        });
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// Reads the command of the VM `name`, whose QMP socket is `qmp`.
///
/// # Errors
/// Every mistake in it, and in what is put in the place of its placeholders.
fn read_command(words: Vec<String>, name: &str, qmp: &Path) -> Result<LaunchTemplate, Vec<TemplateError>> {
    let template = LaunchTemplate::parse(words);
    // A name or socket that is missing or wrong has been blamed already. The migration's socket is the gateway's own.
    let known = !name.is_empty() && !qmp.as_os_str().is_empty();
    let unusable = if known {
        LaunchValues::new(name, qmp, qmp).err()
    } else {
        None
    };
    match (template, unusable) {
        (Ok(template), None) => Ok(template),
        (template, unusable) => Err(template.err().into_iter().flatten().chain(unusable).collect()),
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

fn parse_listen(text: &str) -> Result<SocketAddr, &'static str> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "write an IP address and a port, for example 0.0.0.0:4646")?;
    match address.port() {
        0 | u16::MAX => Err("use a port from 1 to 65534, since bulk data takes the next one"),
        _ => Ok(address),
    }
}

fn parse_metrics_listen(text: &str) -> Result<Option<SocketAddr>, &'static str> {
    if text == "off" {
        return Ok(None);
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() > 0 => Ok(Some(address)),
        Ok(_) => Err("use a port from 1 to 65535, so that it is known where to scrape"),
        Err(_) => Err("write an IP address and a port, for example 127.0.0.1:9646, or off"),
    }
}

fn parse_advertise(text: &str) -> Result<PeerAddress, String> {
    let address: PeerAddress = text.parse().map_err(|error: units::InvalidAddress| error.to_string())?;
    if address.host.parse::<IpAddr>().is_ok_and(|host| host.is_unspecified()) {
        return Err(
            "other sites cannot call every address; write the one under which they reach this gateway".to_owned(),
        );
    }
    Ok(address)
}

fn parse_rtt(text: &str) -> Result<Duration, String> {
    let rtt = parse_duration(text).map_err(|error| error.to_string())?;
    if rtt > MAX_RTT {
        return Err(format!("no path has an RTT above {}", units::show_duration(MAX_RTT)));
    }
    Ok(rtt)
}

fn parse_bulk_connections(text: &str) -> Result<u8, String> {
    text.parse()
        .ok()
        .filter(|connections| (1..=MOST_BULK_CONNECTIONS).contains(connections))
        .ok_or_else(|| format!("expected a number from 1 to {MOST_BULK_CONNECTIONS}"))
}

fn parse_restarts(text: &str) -> Result<u32, &'static str> {
    text.parse().map_err(|_| "expected a number, 0 for never")
}

fn parse_announce_rounds(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|rounds| *rounds <= MOST_ANNOUNCE_ROUNDS)
        .ok_or_else(|| format!("expected a number from 0 to {MOST_ANNOUNCE_ROUNDS}"))
}

fn parse_absolute(text: &str) -> Result<PathBuf, &'static str> {
    if text.starts_with('/') && !text.contains('\0') {
        Ok(PathBuf::from(text))
    } else {
        Err("write an absolute path")
    }
}

fn parse_socket_path(text: &str) -> Result<PathBuf, String> {
    if text.len() > MAX_SOCKET_PATH_BYTES {
        return Err(format!(
            "the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes"
        ));
    }
    Ok(parse_absolute(text)?)
}

fn parse_budget(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    if bytes < MIN_MEMORY_BUDGET {
        return Err("a gateway needs at least 64mib".to_owned());
    }
    Ok(bytes)
}

words!(AfterSuccess { "quit" => Quit, "leave" => Leave });
words!(Disks { "none" => None, "shared" => Shared, "copied" => Copied });
words!(LogLevel { "error" => Error, "warn" => Warn, "info" => Info, "debug" => Debug, "trace" => Trace });
words!(LogFormat { "text" => Text, "json" => Json });

/// A configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file, a flag or the environment has mistakes.
    #[error("the configuration {} has {}:{}", path.display(), count(problems), list(problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Every mistake.
        problems: Vec<Problem>,
    },
}

fn count(problems: &[Problem]) -> String {
    if problems.len() == 1 {
        "1 mistake".to_owned()
    } else {
        format!("{} mistakes", problems.len())
    }
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

/// Thousands of VMs fit; anything larger is another file by mistake.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// `sun_path` has 108 bytes, the last of them zero (unix(7)).
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// QEMU's own bound of `announce-rounds` (`migration/options.c`).
const MOST_ANNOUNCE_ROUNDS: u32 = 1000;

/// Sixteen times that of a geostationary satellite.
const MAX_RTT: Duration = Duration::from_secs(10);

/// Queues and the smallest useful dictionary.
const MIN_MEMORY_BUDGET: u64 = 64 << 20;
