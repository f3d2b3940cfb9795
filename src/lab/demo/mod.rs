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

mod report;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use self::report::{Baseline, Leg, Report};
use super::engine::gateways::Pair;
use super::engine::outside::Outside;
use super::engine::proof::Proof;
use super::engine::{Engine, qemu};
use super::error::LabError;
use super::gateway_file::LinkSection;
use super::guest::{Accelerator, GuestDials, Image, Launch};
use super::interrupt::interrupted;
use super::record::Outcome;
use super::site::Site;
use super::stage::Stage;
use super::table::median;
use crate::wan::Profile;

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
    /// The gateways keep what the guest leaves (`[store]`): from the second leg on only what has changed goes.
    #[arg(long)]
    pub store: bool,
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
        guest: Proof::default(),
        link_fault: None,
        problem: None,
    };
    let performed = tokio::select! {
        performed = perform(&args, &tools, &link, &stage, &mut report) => performed,
        name = interrupted() => Err(LabError::Interrupted { name }),
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
        say(&LabError::file(file, source).to_string());
        return 1;
    }
    u8::from(!report.guest.intact)
}

async fn prepare(args: &DemoArgs) -> Result<(Tools, LinkSection, Stage), LabError> {
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let mut link = LinkSection::of(&Profile::find(&args.profiles, &args.profile)?);
    link.keeps_pages = args.store;
    let image = Image::open(&std::path::absolute(&args.image).unwrap_or_else(|_| args.image.clone()))?;
    let longhaul = args
        .longhaul
        .clone()
        .map_or_else(std::env::current_exe, Ok)
        .map_err(LabError::Unnamed)?;
    let longhaul = longhaul.display().to_string();
    let launch = Launch {
        qemu: args.qemu.clone(),
        accelerator: args.accelerator,
        ..Launch::new(image, args.dials.clone())
    };
    let stage = Stage::new(&args.scripts.join("link"), say).await?;
    Ok((Tools { longhaul, launch }, link, stage))
}

async fn perform(
    args: &DemoArgs,
    tools: &Tools,
    section: &LinkSection,
    stage: &Stage,
    report: &mut Report,
) -> Result<(), LabError> {
    if args.repeat > 0 {
        report.floor_downtime_seconds = Some(floor(tools, stage, &mut report.guest).await?);
    }
    say(&format!("bringing up the link {}", args.profile));
    stage.link.up(&args.profile, SEED).await?;
    let sites = stage.sites()?;
    if args.repeat > 0 {
        say("booting the guest at site-a");
        let link = Some(stage.link.clone());
        let mut pair = Pair::start(
            &tools.longhaul,
            &tools.launch,
            sites.clone(),
            section,
            link,
            Outside::default(),
        )
        .await?;
        for number in 1..=args.repeat * 2 {
            say(&format!("leg {number} of {}", args.repeat * 2));
            leg(&mut pair, &mut report.guest, &mut report.legs).await?;
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

/// One leg; what was found is in `legs` also where the guest did not arrive.
async fn leg(pair: &mut Pair<'_>, proof: &mut Proof, legs: &mut Vec<Leg>) -> Result<(), LabError> {
    let direction = pair.direction();
    let moved = pair.leg(LEG, proof).await?;
    let (outcome, reason) = (moved.outcome, moved.reason.clone());
    legs.push(Leg {
        report: moved.report,
        downtime_outside_seconds: moved.downtime_seconds,
        wire_bytes_outside: moved.wire_bytes,
        direction,
    });
    if outcome == Outcome::Completed {
        return Ok(());
    }
    Err(LabError::NotMoved {
        direction,
        said: reason.unwrap_or_else(|| format!("it was stopped after {} s", LEG.as_secs())),
    })
}

/// Runs every baseline, each for at most ten times our time.
async fn baselines(
    args: &DemoArgs,
    tools: &Tools,
    stage: &Stage,
    [a, b]: &[Site; 2],
    report: &mut Report,
) -> Result<(), LabError> {
    let ours = report
        .median_total_seconds()
        .map(|seconds| Duration::from_secs_f64(seconds.clamp(0.1, 3600.0)));
    let limit = ours.map_or(BASELINE_ALONE, |ours| ours * 10);
    stage.allow_controls().await;
    for engine in BASELINES {
        // A link that one engine has driven out of its limits says so for ever; each gets a new one.
        stage.link.down().await?;
        stage.link.up(&args.profile, SEED).await?;
        say(&format!(
            "baseline {engine}, stopped after {:.0} s",
            limit.as_secs_f64()
        ));
        let baseline = qemu::Move {
            engine,
            launch: &tools.launch,
            a,
            b,
            link: &stage.link,
            limit,
            outside: Outside::default(),
        };
        let moved = baseline.run(&mut report.guest).await?;
        report.baselines.push(Baseline::new(engine, moved));
    }
    Ok(())
}

/// Median downtime of the same guest moved between two gateways on one loopback device.
async fn floor(tools: &Tools, stage: &Stage, proof: &mut Proof) -> Result<f64, LabError> {
    say("measuring the floor: the same moves with no link");
    stage.make_floor().await?;
    let section = LinkSection::loopback();
    let sites = stage.sites_without_link()?;
    let mut pair = Pair::start(
        &tools.longhaul,
        &tools.launch,
        sites,
        &section,
        None,
        Outside::default(),
    )
    .await?;
    let mut legs = Vec::new();
    for _ in 0..FLOOR_LEGS {
        leg(&mut pair, proof, &mut legs).await?;
    }
    pair.stop().await;
    stage.kill_all().await;
    median(legs.iter().filter_map(|leg| leg.downtime_outside_seconds)).ok_or(LabError::NeverHeard)
}

fn write_json(file: &Path, report: &Report) -> std::io::Result<()> {
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    std::fs::write(file, text)
}

/// Tells the user what is being done. A terminal that has gone is no reason to stop before everything is cleaned up.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "demo: {what}");
}

/// What is compared with, in order.
const BASELINES: [Engine; 3] = [
    Engine::QemuTcpCubicDefault,
    Engine::QemuTcpBbrTuned,
    Engine::QemuMultifdZstd,
];
/// Of the link's losses.
const SEED: u64 = 1;
/// How long a leg may take before the demo gives up.
const LEG: Duration = Duration::from_secs(900);
/// Enough for a median; each takes a second or two.
const FLOOR_LEGS: u32 = 4;
/// How long a baseline may take where there is no time of ours to compare with.
const BASELINE_ALONE: Duration = Duration::from_secs(60);
