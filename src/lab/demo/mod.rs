//! The demo: a running VM crosses an emulated ocean and comes back, and proves that it arrived whole.
//!
//! ```text
//! namespace X-a                    link (netem-scripts/link)                   namespace X-b
//! QEMU ── gateway site-a ═══════════════════════════════════════════ gateway site-b ── QEMU
//!    └── signs of life ──► this process, one clock ◄── signs of life ──┘
//! ```
//!
//! In the same run the same guest is moved with no link (the floor of its downtime) and by plain QEMU across the same
//! link (the baselines). Whatever happens, also Ctrl-C, nothing is left behind.

mod baseline;
mod legs;
mod report;
mod site;
mod stage;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use self::legs::Pair;
use self::report::{Proof, Report, median};
use self::site::{LinkSection, Site};
use self::stage::Stage;
use super::guest::{Accelerator, GuestDials, Image, ImageError, Launch};
use super::heartbeat::HeartbeatError;
use super::link::{ADDRESS_A, ADDRESS_B, LinkError};
use super::monitor::MonitorError;
use super::process::ProcessError;

/// Moves a Linux guest across an emulated link and back, beside plain QEMU, and reports.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct DemoArgs {
    /// The link, by the name of its profile.
    #[arg(long, default_value = "intercontinental")]
    pub profile: String,
    /// How often the guest goes there and back; 0 runs the baselines alone.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub repeat: u32,
    /// Where the report goes as JSON, beside the tables on standard output.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Leave out the moves by plain QEMU.
    #[arg(long)]
    pub no_baselines: bool,
    /// Where the logs of QEMU and the gateways are kept; without it they are removed.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// The program whose gateways are shown; without it this one.
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
    #[command(flatten)]
    #[expect(missing_docs, reason = "a comment here would become help text of the whole group")]
    pub dials: GuestDials,
}

/// What every step uses.
struct Tools {
    /// This program.
    longhaul: String,
    launch: Launch,
}

/// Runs the demo and returns its exit code: 0 every leg arrived and the guest is intact, 1 not so, 2 nothing was begun.
pub async fn run(args: DemoArgs) -> u8 {
    let (tools, link, stage) = match prepare(&args).await {
        Ok(prepared) => prepared,
        Err(error) => {
            say(&error.to_string());
            return 2;
        }
    };
    let mut report = Report {
        profile: args.profile.clone(),
        floor_downtime_seconds: None,
        legs: Vec::new(),
        baselines: Vec::new(),
        guest: Proof {
            intact: false,
            pages_checked: 0,
        },
        link_fault: None,
        problem: None,
    };
    let performed = tokio::select! {
        performed = perform(&args, &tools, &link, &stage, &mut report) => performed,
        name = interrupted() => Err(DemoError::Interrupted { name }),
    };
    stage.clean(args.logs.as_deref()).await;
    match performed {
        Ok(()) => report.guest.intact = report.guest.pages_checked > 0,
        Err(error) => report.problem = Some(error.to_string()),
    }
    // A reader that has gone must not keep the exit code from being right.
    let _ = writeln!(std::io::stdout(), "{report}");
    if let Some(file) = &args.json
        && let Err(source) = write_json(file, &report)
    {
        eprintln!(
            "demo: {}",
            DemoError::File {
                path: file.clone(),
                source
            }
        );
        return 1;
    }
    u8::from(!report.guest.intact)
}

async fn prepare(args: &DemoArgs) -> Result<(Tools, LinkSection, Stage), DemoError> {
    if !rustix::process::geteuid().is_root() {
        return Err(DemoError::NotRoot);
    }
    let link = read_profile(&args.profiles, &args.profile)?;
    let image = Image::open(&std::path::absolute(&args.image).unwrap_or_else(|_| args.image.clone()))?;
    let longhaul = args
        .longhaul
        .clone()
        .map_or_else(std::env::current_exe, Ok)
        .map_err(DemoError::Unnamed)?;
    let longhaul = longhaul.display().to_string();
    let launch = Launch {
        qemu: args.qemu.clone(),
        accelerator: args.accelerator,
        ..Launch::new(image, args.dials.clone())
    };
    let stage = Stage::new(&args.scripts.join("link")).await?;
    Ok((Tools { longhaul, launch }, link, stage))
}

async fn perform(
    args: &DemoArgs,
    tools: &Tools,
    section: &LinkSection,
    stage: &Stage,
    report: &mut Report,
) -> Result<(), DemoError> {
    if args.repeat > 0 {
        report.floor_downtime_seconds = Some(floor(tools, stage, &mut report.guest).await?);
    }
    say(&format!("bringing up the link {}", args.profile));
    stage.link.up(&args.profile).await?;
    let sites = [
        Site::new(
            &stage.directory,
            "site-a",
            stage.link.namespace_a(),
            (ADDRESS_A, PORT).into(),
        )?,
        Site::new(
            &stage.directory,
            "site-b",
            stage.link.namespace_b(),
            (ADDRESS_B, PORT).into(),
        )?,
    ];
    if args.repeat > 0 {
        let mut pair = Pair::start(tools, sites.clone(), section, Some(stage.link.clone())).await?;
        for number in 1..=args.repeat * 2 {
            say(&format!("leg {number} of {}", args.repeat * 2));
            pair.leg(&mut report.guest, &mut report.legs).await?;
        }
        pair.stop().await;
        stage.kill_all().await;
    }
    report.link_fault = stage.link.carried().await?.fault;
    if args.no_baselines {
        Ok(())
    } else {
        baselines(args, tools, stage, &sites, report).await
    }
}

/// Runs every baseline, each for at most ten times our time.
async fn baselines(
    args: &DemoArgs,
    tools: &Tools,
    stage: &Stage,
    [a, b]: &[Site; 2],
    report: &mut Report,
) -> Result<(), DemoError> {
    let ours = report
        .median_total_seconds()
        .map(|seconds| Duration::from_secs_f64(seconds.clamp(0.1, 3600.0)));
    let limit = ours.map_or(BASELINE_ALONE, |ours| ours * 10);
    stage.allow_controls().await;
    for engine in baseline::ENGINES {
        // A link that one engine has driven out of its limits says so for ever; each gets a new one.
        stage.link.down().await?;
        stage.link.up(&args.profile).await?;
        let found = baseline::measure(tools, engine, [a, b], &stage.link, limit, &mut report.guest).await?;
        report.baselines.push(found);
    }
    Ok(())
}

/// Median downtime of the same guest moved between two gateways on one loopback device.
async fn floor(tools: &Tools, stage: &Stage, proof: &mut Proof) -> Result<f64, DemoError> {
    say("measuring the floor: the same moves with no link");
    stage.make_floor().await?;
    let section = LinkSection {
        rate: "10gbit".to_owned(),
        rtt: "1ms".to_owned(),
    };
    let loopback = std::net::IpAddr::from(std::net::Ipv4Addr::LOCALHOST);
    let sites = [
        Site::new(&stage.directory, "site-a", stage.floor.clone(), (loopback, PORT).into())?,
        Site::new(
            &stage.directory,
            "site-b",
            stage.floor.clone(),
            (loopback, PORT + 10).into(),
        )?,
    ];
    let mut pair = Pair::start(tools, sites, &section, None).await?;
    let mut legs = Vec::new();
    for _ in 0..FLOOR_LEGS {
        pair.leg(proof, &mut legs).await?;
    }
    pair.stop().await;
    stage.kill_all().await;
    median(legs.iter().filter_map(|leg| leg.downtime_outside_seconds)).ok_or(DemoError::NeverHeard)
}

/// What a profile says of its link, as the gateways' configuration wants it.
fn read_profile(directory: &Path, name: &str) -> Result<LinkSection, DemoError> {
    let path = directory.join(format!("{name}.toml"));
    let text = std::fs::read_to_string(&path).map_err(|source| DemoError::File {
        path: path.clone(),
        source,
    })?;
    let table: toml::Table = text.parse().map_err(|_| DemoError::Profile { path: path.clone() })?;
    let value = |key: &str| table.get(key)?.as_str().map(str::to_owned);
    match (value("rate"), value("rtt")) {
        (Some(rate), Some(rtt)) => Ok(LinkSection { rate, rtt }),
        _ => Err(DemoError::Profile { path }),
    }
}

fn write_json(file: &Path, report: &Report) -> std::io::Result<()> {
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    std::fs::write(file, text)
}

/// Waits for a signal that asks the demo to end, and names it.
async fn interrupted() -> &'static str {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            // Without a handler the signal keeps its default, which is to end the process.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::interrupt()) => "SIGINT",
        () = wait(SignalKind::terminate()) => "SIGTERM",
        () = wait(SignalKind::hangup()) => "SIGHUP",
    }
}

/// Tells the user what is being done. A terminal that has gone is no reason to stop before everything is cleaned up.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "demo: {what}");
}

/// The VM's name in the gateways' configurations.
const VM: &str = "demo";
const PORT: u16 = 4646;
/// Enough for a median; each takes a second or two.
const FLOOR_LEGS: u32 = 4;
/// How long a baseline may take where there is no time of ours to compare with.
const BASELINE_ALONE: Duration = Duration::from_secs(60);

/// The demo could not be run to its end, or found what must not be.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Namespaces need root.
    #[error("making network namespaces needs root; netem-scripts/demo asks sudo for it")]
    NotRoot,
    /// The path of this program is unknown.
    #[error("cannot find the path of this program: {0}")]
    Unnamed(std::io::Error),
    /// A file cannot be read or written.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A profile lacks what the gateways need to know.
    #[error("the profile {} states no rate and rtt", path.display())]
    Profile {
        /// The profile.
        path: PathBuf,
    },
    /// A gateway's configuration cannot be written as TOML.
    #[error("cannot write a gateway's configuration: {0}")]
    Configuration(toml::ser::Error),
    /// The guest's image is not to be had.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A process did not do what it should.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The link cannot be used.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The guest cannot be heard.
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
    /// A QEMU cannot be driven.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// A gateway runs but serves no control socket.
    #[error("the gateway of {site} serves no control socket; it said: {said}")]
    GatewayMute {
        /// Its site.
        site: &'static str,
        /// Its last words.
        said: String,
    },
    /// A leg failed.
    #[error("the guest was not moved from {direction} ({status}): {said}")]
    NotMoved {
        /// Which way it should have gone.
        direction: &'static str,
        /// How the command ended.
        status: ExitStatus,
        /// What the command and the gateways said.
        said: String,
    },
    /// The guest gave no sign of life where it ran.
    #[error("the guest gave no sign of life where it should have run")]
    NeverHeard,
    /// Memory of the guest is not as it must be.
    #[error("the guest found {bad} damaged pages of {pages}")]
    Damaged {
        /// Damaged pages.
        bad: u64,
        /// Checked pages.
        pages: u64,
    },
    /// The guest's count went back or jumped at one site.
    #[error("the guest's signs of life were out of order {jumps} times")]
    OutOfOrder {
        /// How often.
        jumps: u64,
    },
    /// The guest did not go on at the destination where it was stopped at the source.
    #[error(
        "after sign of life {last} at the source came {first} at the destination ({direction}): the guest ran twice"
    )]
    RanTwice {
        /// Which way it went.
        direction: &'static str,
        /// The last number at the source.
        last: u64,
        /// The first number at the destination.
        first: u64,
    },
    /// Someone asked the demo to end.
    #[error("stopped by {name}")]
    Interrupted {
        /// The signal.
        name: &'static str,
    },
}
