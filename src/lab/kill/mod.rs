//! Kills a gateway in the middle of a migration, at every moment that matters, and looks on from outside.
//!
//! ```text
//!   QEMU at A ── gateway A ═══════ gateway B ── QEMU at B
//!    │  │            ↑ SIGKILL ↑                 │  │
//!    │  └ signs of life ─► one observer ◄────────┘  │
//!    └──── STOP, RESUME ───────┘  └─────────────────┘
//! ```
//!
//! The gateways are the ones that are shipped: the moments are seen in their journals' files, on a monitor of QEMU that is the
//! lab's own, and on the clock. What must hold is told in [`judge`], the cases in [`case`].

mod case;
mod judge;
mod observe;
mod report;
mod run;
mod site;
mod trigger;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use self::case::{Case, Place, matrix};
use self::judge::judge;
use self::report::{Line, Table, Verdict};
use self::run::{Ground, processes_of};
use self::site::Site;
use super::error::LabError;
use super::gateway_file::LinkSection;
use super::guest::{Accelerator, GuestDials, Image, Launch};
use super::interrupt::interrupted;
use super::link::{ADDRESS_A, ADDRESS_B, Link};
use crate::wan::Profile;

/// Kills either gateway at every moment of a migration and checks that the VM runs in exactly one place.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct KillArgs {
    /// Chooses the seeded moments and how long a killed gateway stays away.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Run only the case of this name, or those whose name contains it; may be given several times.
    #[arg(long, value_name = "CASE")]
    pub only: Vec<String>,
    /// Print the names of the cases and do nothing.
    #[arg(long)]
    pub list: bool,
    /// The link between the gateways, by the name of its profile; none: this host's loopback device.
    #[arg(long, value_name = "NAME", default_value = "none")]
    pub profile: String,
    /// Cap of each migration, so that pre-copy lasts long enough to be hit.
    #[arg(long, value_name = "RATE", default_value = "150mbit")]
    pub rate: String,
    /// Where each case goes as a line of JSON, beside the table on standard output.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the logs of cases that are not kept go; without it they are removed.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// The program whose gateways are killed; without it this one.
    #[arg(long, value_name = "PROGRAM")]
    pub longhaul: Option<PathBuf>,
    /// Directory of the script that makes the link.
    #[arg(long, value_name = "DIR", default_value = "netem-scripts")]
    pub scripts: PathBuf,
    /// Directory of the link profiles.
    #[arg(long, value_name = "DIR", default_value = "config/lab/profiles")]
    pub profiles: PathBuf,
    /// Directory of the guest's image, as netem-scripts/guest makes it.
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    pub image: PathBuf,
    /// The QEMU at both sites.
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub qemu: String,
    /// How the guest's CPU runs.
    #[arg(long, value_enum, default_value_t)]
    pub accelerator: Accelerator,
}

/// What every case uses.
struct Tools {
    /// The program that is killed, and its command line client.
    longhaul: String,
    launch: Launch,
}

/// What a run makes on the host, named after the process.
struct World {
    directory: PathBuf,
    link: Link,
    section: LinkSection,
    is_loopback: bool,
}

/// Runs the matrix and returns the exit code: 0 every promise was kept, 1 not so or a moment was missed, 2 nothing was begun.
pub async fn run(args: KillArgs) -> u8 {
    let cases = chosen(&args);
    if args.list {
        for case in &cases {
            say_out(&case.name);
        }
        return 0;
    }
    let (tools, world) = match prepare(&args, &cases).await {
        Ok(prepared) => prepared,
        Err(error) => {
            say(&error.to_string());
            return 2;
        }
    };
    let mut lines = Vec::new();
    let performed = tokio::select! {
        performed = perform(&args, &tools, &world, &cases, &mut lines) => performed,
        name = interrupted() => Err(LabError::Interrupted { name }),
    };
    world.clean().await;
    say_out(&Table(&lines).to_string());
    if let Err(error) = &performed {
        say(&error.to_string());
    }
    let kept = lines.iter().all(|line| line.verdict == Verdict::Kept);
    u8::from(performed.is_err() || !kept || lines.is_empty())
}

/// The undisturbed migration comes first: without it nothing else means anything.
fn chosen(args: &KillArgs) -> Vec<Case> {
    let all = matrix(args.seed);
    // A whole name means that case, and not also the longer names that begin like it.
    let means = |name: &str, case: &Case| match all.iter().any(|other| other.name == name) {
        true => case.name == name,
        false => case.name.contains(name),
    };
    let is_chosen = |case: &&Case| args.only.is_empty() || args.only.iter().any(|name| means(name, case));
    let mut cases = vec![Case::undisturbed()];
    cases.extend(all.iter().filter(is_chosen).cloned());
    cases
}

async fn prepare(args: &KillArgs, cases: &[Case]) -> Result<(Tools, World), LabError> {
    if cases.len() < 2 {
        return Err(LabError::NoCase);
    }
    let is_loopback = args.profile == "none";
    if !is_loopback && !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let section = if is_loopback {
        LinkSection::loopback()
    } else {
        LinkSection::of(&Profile::find(&args.profiles, &args.profile)?)
    };
    let image = Image::open(&std::path::absolute(&args.image).unwrap_or_else(|_| args.image.clone()))?;
    let longhaul = args
        .longhaul
        .clone()
        .map_or_else(std::env::current_exe, Ok)
        .map_err(LabError::Unnamed)?;
    let launch = Launch {
        qemu: args.qemu.clone(),
        accelerator: args.accelerator,
        ..Launch::new(image, dials())
    };
    if let Some(file) = &args.json {
        std::fs::write(file, "").map_err(|source| LabError::file(file, source))?;
    }
    let link_script = args.scripts.join("link");
    for process in dead_runs() {
        say(&format!("removing what the killed run {process} left"));
        World::of(process, &link_script, section.clone(), is_loopback)
            .clean()
            .await;
    }
    let world = World::of(std::process::id(), &link_script, section, is_loopback);
    let made = std::fs::DirBuilder::new().mode(0o700).create(&world.directory);
    made.map_err(|source| LabError::file(&world.directory, source))?;
    let longhaul = longhaul.display().to_string();
    Ok((Tools { longhaul, launch }, world))
}

/// A guest that boots in seconds and moves in one.
fn dials() -> GuestDials {
    GuestDials {
        memory_mb: 128,
        working_set_mb: 8,
        pages_per_second: 200,
        ..GuestDials::default()
    }
}

async fn perform(
    args: &KillArgs,
    tools: &Tools,
    world: &World,
    cases: &[Case],
    lines: &mut Vec<Line>,
) -> Result<(), LabError> {
    if !world.is_loopback {
        world.link.up(&args.profile, args.seed).await?;
    }
    let mut usual = None;
    for (number, case) in cases.iter().enumerate() {
        for attempt in 1..=ATTEMPTS {
            let ground = world.ground(&format!("{number}.{attempt}"), &args.rate)?;
            let ran = run::run(tools, &ground, case, usual).await;
            world.sweep(&ground.directory).await;
            let found = ran.inspect_err(|_| keep_logs(args, &ground, &case.name))?;
            let judgement = judge(case, &found);
            if case.kill.is_none() {
                usual = found.command_seconds.map(Duration::from_secs_f64);
            }
            let line = Line::new(case, args.seed, &args.profile, attempt, &found, &judgement);
            if line.verdict != Verdict::Kept {
                keep_logs(args, &ground, &case.name);
            }
            let removed = std::fs::remove_dir_all(&ground.directory);
            removed.map_err(|source| LabError::file(&ground.directory, source))?;
            if line.verdict == Verdict::Missed && attempt < ATTEMPTS {
                continue;
            }
            tell(args, number + 1, cases.len(), &line)?;
            lines.push(line);
            break;
        }
    }
    Ok(())
}

/// Says what came of a case as soon as it is known.
fn tell(args: &KillArgs, number: usize, of: usize, line: &Line) -> Result<(), LabError> {
    let what = match line.verdict {
        Verdict::Kept => "kept".to_owned(),
        Verdict::Missed => "missed".to_owned(),
        Verdict::Broken => format!("BROKEN: {}", line.problems.join("; ")),
    };
    say(&format!("{number}/{of} {}: {what}", line.case));
    let Some(file) = &args.json else { return Ok(()) };
    let mut text = serde_json::to_string(line).expect("a line is plain data");
    text.push('\n');
    std::fs::OpenOptions::new()
        .append(true)
        .open(file)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|source| LabError::file(file, source))
}

impl World {
    fn of(process: u32, link_script: &Path, section: LinkSection, is_loopback: bool) -> Self {
        Self {
            // Not the user's own directory for temporary files: paths of sockets are short.
            directory: PathBuf::from(format!("{DIRECTORY}{process}")),
            link: Link::named(link_script, &format!("k{process}")),
            section,
            is_loopback,
        }
    }

    /// A fresh directory and two sites in it.
    fn ground(&self, name: &str, rate: &str) -> Result<Ground, LabError> {
        let directory = self.directory.join(name);
        std::fs::create_dir(&directory).map_err(|source| LabError::file(&directory, source))?;
        let site = |place, namespace, listen| Site::new(&directory, place, namespace, listen);
        let sites = if self.is_loopback {
            let [at_a, at_b] = free_addresses()?;
            [site(Place::A, None, at_a)?, site(Place::B, None, at_b)?]
        } else {
            [
                site(Place::A, Some(self.link.namespace_a()), (ADDRESS_A, PORT).into())?,
                site(Place::B, Some(self.link.namespace_b()), (ADDRESS_B, PORT).into())?,
            ]
        };
        Ok(Ground {
            directory,
            sites,
            link: self.section.clone(),
            rate: Some(rate.to_owned()),
        })
    }

    /// Kills every process that names the directory, and waits until they are gone.
    async fn sweep(&self, directory: &Path) {
        for _ in 0..500 {
            let left = processes_of(directory, None);
            if left.is_empty() {
                return;
            }
            for process in left.into_iter().filter_map(Pid::from_raw) {
                // One that has ended meanwhile needs nothing.
                let _ = kill_process(process, Signal::KILL);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Removes everything. Problems are told and do not stop the rest.
    async fn clean(&self) {
        self.sweep(&self.directory).await;
        if self.link.is_there()
            && let Err(error) = self.link.down().await
        {
            say(&format!("while cleaning up: {error}"));
        }
        if self.directory.exists()
            && let Err(error) = std::fs::remove_dir_all(&self.directory)
        {
            say(&format!("while cleaning up: {error}"));
        }
    }
}

/// Copies what the processes of a case said to `--logs`, as `CASE/SITE/FILE`.
fn keep_logs(args: &KillArgs, ground: &Ground, case: &str) {
    let Some(logs) = &args.logs else { return };
    let copy = || -> std::io::Result<()> {
        for site in &ground.sites {
            let kept = logs.join(case).join(site.place.to_string());
            std::fs::create_dir_all(&kept)?;
            for entry in std::fs::read_dir(&site.directory)?.flatten() {
                if entry.file_type()?.is_file() {
                    std::fs::copy(entry.path(), kept.join(entry.file_name()))?;
                }
            }
            if site.journal().exists() {
                std::fs::copy(site.journal(), kept.join("journal"))?;
            }
        }
        Ok(())
    };
    if let Err(error) = copy() {
        say(&format!("the logs of {case} were not kept: {error}"));
    }
}

/// Two addresses of the loopback device on which a gateway finds both its ports free.
fn free_addresses() -> Result<[SocketAddr; 2], LabError> {
    let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
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

/// Tells the user what is being done.
fn say(what: &str) {
    // A reader that has gone is no reason to stop.
    let _ = writeln!(std::io::stderr(), "kill: {what}");
}

fn say_out(what: &str) {
    let _ = writeln!(std::io::stdout(), "{what}");
}

const PORT: u16 = 4646;
/// How often a moment is tried to be hit.
const ATTEMPTS: u32 = 3;
const DIRECTORY: &str = "/tmp/longhaul-kill-";
