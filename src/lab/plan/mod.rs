//! A plan: a matrix of links, guests, engines and seeds, measured one move after the other, every result kept.
//!
//! ```text
//! plan.toml ─▶ matrix (who moves what when) ─▶ measure (one move, empty stage to empty stage) ─▶ a line of JSON ─▶ report
//!          └─▶ frontier (which dirty rate next) ─┘
//! ```

mod file;
mod frontier;
mod matrix;
mod measure;
mod summary;

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

pub(super) use self::file::PlanError;
use self::file::{FrontierPlan, Plan};
use self::frontier::Search;
use self::matrix::{Cell, cells};
use self::measure::Bench;
use self::summary::Summary;
use super::engine::Engine;
use super::error::LabError;
use super::guest::{Accelerator, GuestDials, Image, Launch, Workload};
use super::interrupt::interrupted;
use super::process::run as run_process;
use super::record::{Frontier, Outcome, Run, Setting, append};
use super::report;
use super::stage::Stage;

/// Measures what a plan says: links, guests, engines and seeds, one move after the other.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct PlanArgs {
    /// The plan: a name of config/lab, or a file that ends in .toml.
    pub plan: String,
    /// Where each run goes as a line of JSON, as soon as it is known. Runs that are in the file already are kept.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the report goes: index.html, report.md and pictures.
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// Print what would be measured, and do nothing.
    #[arg(long)]
    pub list: bool,
    /// Longest share of its time that a process may wait for a CPU which others have, in percent; above it a run is not usable.
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0)]
    pub longest_run_delay: f64,
    /// What the results say was measured, beside this program's version.
    #[arg(long, value_name = "TEXT")]
    pub commit: Option<String>,
    /// Where the logs of QEMU and the gateways of the last move are kept; without it they are removed.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// The program whose gateways are measured; without it this one.
    #[arg(long, value_name = "PROGRAM")]
    pub longhaul: Option<PathBuf>,
    /// Directory of the scripts that make the link and find QEMU.
    #[arg(long, value_name = "DIR", default_value = "netem-scripts")]
    pub scripts: PathBuf,
    /// Directory of the plans, and in profiles/ of the links.
    #[arg(long, value_name = "DIR", default_value = "config/lab")]
    pub plans: PathBuf,
    /// Directory of the guest's image, as netem-scripts/guest makes it.
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    pub image: PathBuf,
    /// Directory of the images with applications; made where they lack.
    #[arg(long, value_name = "DIR", default_value = "target/guest-applications")]
    pub application_images: PathBuf,
    /// How the guest's CPU runs.
    #[arg(long, value_enum, default_value_t)]
    pub accelerator: Accelerator,
}

/// A QEMU that a plan names.
struct Qemu {
    program: String,
    version: String,
}

/// Runs a plan and returns its exit code: 0 every move was made and every guest that arrived is intact, 1 not so, 2 nothing was
/// begun.
pub async fn run(args: PlanArgs) -> u8 {
    match prepare(&args).await {
        Ok(Some(prepared)) => carry_out(&args, prepared).await,
        Ok(None) => 0,
        Err(error) => {
            say(&error.to_string());
            2
        }
    }
}

struct Prepared {
    plan: Plan,
    images: HashMap<Workload, Image>,
    qemus: HashMap<String, Result<Qemu, String>>,
    longhaul: String,
    setting: Setting,
    stage: Stage,
}

async fn prepare(args: &PlanArgs) -> Result<Option<Prepared>, LabError> {
    let file = if args.plan.ends_with(".toml") {
        PathBuf::from(&args.plan)
    } else {
        args.plans.join(format!("{}.toml", args.plan))
    };
    let plan = Plan::read(&file, &args.plans.join("profiles"))?;
    if args.list {
        list(&plan);
        return Ok(None);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    if let Some(json) = &args.json {
        // Told now, not after the first move.
        append(json, "")?;
    }
    let images = find_images(args, &plan)?;
    let longhaul = args
        .longhaul
        .clone()
        .map_or_else(std::env::current_exe, Ok)
        .map_err(LabError::Unnamed)?;
    let mut qemus = HashMap::new();
    for name in &plan.qemus {
        qemus.insert(name.clone(), find_qemu(&args.scripts, name).await);
    }
    let setting = Setting {
        kernel: run_process(&["uname", "-r"]).await?.trim().to_owned(),
        cpus: std::thread::available_parallelism().map_or(0, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
        accelerator: match args.accelerator {
            Accelerator::Tcg => "tcg",
            Accelerator::Kvm => "kvm",
        }
        .to_owned(),
        longhaul: match &args.commit {
            Some(commit) => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
            None => env!("CARGO_PKG_VERSION").to_owned(),
        },
        ..Setting::default()
    };
    let stage = Stage::new(&args.scripts.join("link"), say).await?;
    Ok(Some(Prepared {
        plan,
        images,
        qemus,
        longhaul: longhaul.display().to_string(),
        setting,
        stage,
    }))
}

/// The image of every guest; those with an application are built now, which the first time takes a while.
fn find_images(args: &PlanArgs, plan: &Plan) -> Result<HashMap<Workload, Image>, LabError> {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut images = HashMap::new();
    for dials in plan.guests.values() {
        let application = dials.application;
        if images.contains_key(&application) {
            continue;
        }
        let image = match application {
            Workload::None => Image::open(&absolute(&args.image))?,
            _ => {
                say(&format!("building the guest with {}", application.name()));
                let directory = absolute(&args.application_images).join(application.name());
                Image::build_with(&absolute(&args.scripts).join("guest"), &directory, application)?
            }
        };
        images.insert(application, image);
    }
    Ok(images)
}

/// The program of a QEMU, and which version it says it is.
async fn find_qemu(scripts: &Path, name: &str) -> Result<Qemu, String> {
    let program = match name {
        "stable" | "backports" => {
            let script = scripts.join("qemu").display().to_string();
            let found = run_process(&[&script, name]).await.map_err(|error| error.to_string())?;
            found.trim().to_owned()
        }
        program => program.to_owned(),
    };
    let said = run_process(&[&program, "--version"])
        .await
        .map_err(|error| error.to_string())?;
    // QEMU emulator version 7.2.22 (Debian …)
    let version = said
        .split_ascii_whitespace()
        .skip_while(|word| *word != "version")
        .nth(1);
    match version {
        Some(version) => Ok(Qemu {
            version: version.to_owned(),
            program,
        }),
        None => Err(format!("{program} does not say which version it is")),
    }
}

async fn carry_out(args: &PlanArgs, prepared: Prepared) -> u8 {
    let Prepared {
        plan,
        images,
        qemus,
        longhaul,
        setting,
        stage,
    } = prepared;
    stage.allow_controls().await;
    let bench = Bench {
        longhaul,
        stage: &stage,
        time_limit: plan.time_limit,
        setting,
        longest_run_delay: args.longest_run_delay / 100.0,
    };
    let mut notes = Notes {
        json: args.json.clone(),
        runs: Vec::new(),
        frontiers: Vec::new(),
    };
    let course = Course {
        args,
        plan: &plan,
        bench: &bench,
        images: &images,
        qemus: &qemus,
    };
    let performed = tokio::select! {
        performed = course.run(&mut notes) => performed,
        name = interrupted() => Err(LabError::Interrupted { name }),
    };
    stage.clean(args.logs.as_deref()).await;
    if let Err(error) = &performed {
        say(&error.to_string());
    }
    // What was measured until then is worth a report all the same.
    let reported = match &args.report {
        Some(directory) => report::write(&notes.runs, &notes.frontiers, directory),
        None => Ok(()),
    };
    if let Err(error) = &reported {
        say(&error.to_string());
    }
    let summary = Summary {
        runs: &notes.runs,
        frontiers: &notes.frontiers,
    };
    let _ = writeln!(std::io::stdout(), "{}\n\n{summary}", plan.title);
    let is_whole = notes.runs.iter().all(|run| run.guest_intact != Some(false));
    u8::from(performed.is_err() || reported.is_err() || !is_whole)
}

/// Results, each written down as soon as it is known.
struct Notes {
    json: Option<PathBuf>,
    runs: Vec<Run>,
    frontiers: Vec<Frontier>,
}

impl Notes {
    fn add_run(&mut self, run: Run) -> Result<(), LabError> {
        self.write(&run)?;
        self.runs.push(run);
        Ok(())
    }

    fn add_frontier(&mut self, frontier: Frontier) -> Result<(), LabError> {
        self.write(&frontier)?;
        self.frontiers.push(frontier);
        Ok(())
    }

    fn write(&self, record: &impl Serialize) -> Result<(), LabError> {
        let Some(file) = &self.json else { return Ok(()) };
        let mut text = serde_json::to_string(record).expect("a record is plain data");
        text.push('\n');
        append(file, &text)
    }
}

/// Everything a plan's moves need.
struct Course<'a> {
    args: &'a PlanArgs,
    plan: &'a Plan,
    bench: &'a Bench<'a>,
    images: &'a HashMap<Workload, Image>,
    qemus: &'a HashMap<String, Result<Qemu, String>>,
}

impl Course<'_> {
    async fn run(&self, notes: &mut Notes) -> Result<(), LabError> {
        let cells = cells(self.plan);
        for (number, cell) in cells.iter().enumerate() {
            say(&format!("{}/{} {}", number + 1, cells.len(), name_of(cell)));
            let run = self.measure(cell).await?;
            notes.add_run(run)?;
        }
        match &self.plan.frontier {
            Some(frontier) => self.search(frontier, notes).await,
            None => Ok(()),
        }
    }

    async fn measure(&self, cell: &Cell) -> Result<Run, LabError> {
        let qemu = match &self.qemus[&cell.qemu] {
            Ok(qemu) => qemu,
            Err(reason) => return Ok(self.bench.unavailable(cell, reason)),
        };
        let is_native = cell.engine == Engine::LonghaulKvm;
        if is_native && let Some(reason) = not_native(&cell.dials) {
            return Ok(self.bench.unavailable(cell, reason));
        }
        let launch = Launch {
            qemu: qemu.program.clone(),
            accelerator: self.args.accelerator,
            native: is_native.then(|| self.bench.longhaul.clone()),
            ..Launch::new(self.images[&cell.dials.application].clone(), cell.dials.clone())
        };
        let run = self.bench.measure(cell, &launch, &qemu.version).await?;
        say(&format!("  {}", in_a_sentence(&run)));
        Ok(run)
    }

    /// The frontier of every engine. Each rate that is tried is a run of its own.
    async fn search(&self, plan: &FrontierPlan, notes: &mut Notes) -> Result<(), LabError> {
        let (guest, dials) = &plan.guest;
        for &engine in &plan.engines {
            let mut search = Search::new(plan.from_pages_per_second, plan.to_pages_per_second, plan.factor);
            let mut runs = 0;
            let mut limit = None;
            while let Some(rate) = search.next() {
                runs += 1;
                let cell = Cell {
                    link: plan.link.clone(),
                    guest: format!("{guest}, {rate} pages/s"),
                    dials: GuestDials {
                        pages_per_second: rate,
                        ..dials.clone()
                    },
                    qemu: self.plan.qemus[0].clone(),
                    engine,
                    seed: self.plan.seeds[0],
                    repetition: 1,
                };
                say(&format!("frontier of {engine}: {rate} pages/s"));
                let run = self.measure(&cell).await?;
                let (outcome, wrote) = (run.outcome, run.guest_pages_per_second);
                notes.add_run(run)?;
                if outcome == Outcome::Unavailable {
                    break;
                }
                search.tell(rate, outcome == Outcome::Completed);
                // A guest that cannot write as fast as it should says nothing about higher rates.
                if let Some(wrote) =
                    wrote.filter(|&wrote| outcome == Outcome::Completed && wrote < rate as f64 * REACHED)
                {
                    limit = Some(format!(
                        "the guest wrote {wrote:.0} pages/s, and could not write {rate}"
                    ));
                    break;
                }
            }
            notes.add_frontier(Frontier {
                engine: engine.name().to_owned(),
                profile: plan.link.profile.name.clone(),
                guest: guest.clone(),
                converges_pages_per_second: search.converges(),
                fails_pages_per_second: search.fails(),
                limit,
                runs,
            })?;
        }
        Ok(())
    }
}

/// Why there is no such guest under the native engine here.
fn not_native(dials: &GuestDials) -> Option<&'static str> {
    let usual = GuestDials::default();
    let is_known = dials.application == Workload::None
        && dials.address.is_none()
        && (dials.zero_percent, dials.duplicated_percent) == (0, 0)
        && dials.hot_pages_percent == usual.hot_pages_percent;
    match (Path::new("/dev/kvm").exists(), is_known) {
        (false, _) => Some("there is no /dev/kvm here"),
        (true, false) => {
            Some("its guest has no application, no network, no pages that are zero or alike, and a hot tenth")
        }
        (true, true) => None,
    }
}

fn list(plan: &Plan) {
    let cells = cells(plan);
    say(&format!("{}: {} moves", plan.title, cells.len()));
    for cell in &cells {
        let _ = writeln!(std::io::stdout(), "{}", name_of(cell));
    }
    if let Some(frontier) = &plan.frontier {
        for engine in &frontier.engines {
            let _ = writeln!(
                std::io::stdout(),
                "frontier of {engine} at {}: {} to {} pages/s",
                frontier.link.profile.name,
                frontier.from_pages_per_second,
                frontier.to_pages_per_second
            );
        }
    }
}

fn name_of(cell: &Cell) -> String {
    format!(
        "{} moves {} across {} (QEMU {}, seed {}, repetition {})",
        cell.engine, cell.guest, cell.link.profile.name, cell.qemu, cell.seed, cell.repetition
    )
}

fn in_a_sentence(run: &Run) -> String {
    let mut text = match run.outcome {
        Outcome::Completed => "completed".to_owned(),
        Outcome::NotFinished => "not finished".to_owned(),
        Outcome::Failed => "failed".to_owned(),
        Outcome::Unavailable => "unavailable".to_owned(),
    };
    if let Some(seconds) = run.total_seconds {
        text.push_str(&format!(", {seconds:.2} s"));
    }
    if let Some(bytes) = run.wire_bytes {
        text.push_str(&format!(", {:.1} MB on the wire", bytes as f64 / 1e6));
    }
    if let Some(seconds) = run.downtime_seconds {
        text.push_str(&format!(", downtime {:.0} ms", seconds * 1e3));
    }
    if let Some(share) = run.run_delay_share {
        text.push_str(&format!(", waited for a CPU {:.0} %", share * 100.0));
    }
    if let Some(share) = run.others_share {
        text.push_str(&format!(", others used {:.0} % of the CPU time", share * 100.0));
    }
    if !run.usable {
        text.push_str(", NOT USABLE");
    }
    if let Some(reason) = run.reason.as_deref().and_then(|reason| reason.lines().next()) {
        text.push_str(&format!(": {reason}"));
    }
    text
}

/// Tells the user what is being done. A terminal that has gone is no reason to stop before everything is cleaned up.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "lab: {what}");
}

/// Share of the rate that was asked for which a guest must reach.
const REACHED: f64 = 0.9;
