//! Makes things go wrong in the middle of a migration, at every moment that matters, and looks on from outside.
//!
//! ```text
//!   QEMU at A ── gateway A ══ link ══ gateway B ── QEMU at B          ↑ killed, stopped, cut, full, set wrong
//!    │  │                                          │  │
//!    │  └ signs of life ─► one observer ◄──────────┘  │
//!    └──── STOP, RESUME ───────┘  └───────────────────┘
//! ```
//!
//! The gateways are the ones that are shipped: the moments are seen in their journals' files, on a monitor of QEMU that is the
//! lab's own, and on the clock. What must hold is told in [`judge`], the faults in [`fault`], how they are made in [`strike`], and the
//! cases in [`matrix`].

mod case;
mod copied;
mod disk;
mod fault;
mod judge;
mod matrix;
mod moment;
mod observe;
mod report;
mod run;
mod saved;
mod site;
mod strike;
mod trigger;
mod world;

use std::future::poll_fn;
use std::io::Write as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use clap::Args;

use self::case::Case;
use self::copied::Pristine;
use self::fault::{Fault, Means};
use self::judge::judge;
use self::matrix::Matrix;
use self::report::{Line, Table, Verdict};
use self::run::Ground;
use self::world::{MOST_LINKS, World};
use super::clock;
use super::error::LabError;
use super::gateway_file::LinkSection;
use super::guest::{Accelerator, GuestDials, Image, Launch};
use super::interrupt::interrupted;
use super::process;
use crate::wan::Profile;

/// Kills either gateway at every moment of a migration and checks that the VM runs in exactly one place; with --full it also kills and
/// stops everything else, cuts the link, fills disks and moves clocks.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct KillArgs {
    /// Chooses the seeded moments and how long a fault lasts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Every fault at every moment, and not only gateways that are killed. Run by root it has a link, see --profile.
    #[arg(long)]
    pub full: bool,
    /// Run only the case of this name, or those whose name contains it, whether --full is given or not; may be given several times.
    #[arg(long, value_name = "CASE")]
    pub only: Vec<String>,
    /// Print the names of the cases and do nothing.
    #[arg(long)]
    pub list: bool,
    /// The link between the gateways, by the name of its profile; none: this host's loopback device [default: none; metro with --full for
    /// root].
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// Cases at the same time, 1 to 9. Their guests share the host's processors: with more than there are, moments are missed.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=MOST_LINKS as u64))]
    pub jobs: u64,
    /// The guest has a disk that goes with it.
    #[arg(long)]
    pub disk: bool,
    /// Cap of each migration, so that pre-copy lasts long enough to be hit.
    #[arg(long, value_name = "RATE", default_value = "150mbit")]
    pub rate: String,
    /// Where each case goes as a line of JSON, beside the table on standard output.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the logs of cases that are not kept go, as QEMU/CASE/SITE/FILE; without it they are removed.
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
    /// The QEMU at both sites; where it is given several times, all cases are run with each.
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub qemu: Vec<String>,
    /// How the guest's CPU runs.
    #[arg(long, value_enum, default_value_t)]
    pub accelerator: Accelerator,
}

impl KillArgs {
    fn profile(&self) -> &str {
        match &self.profile {
            Some(profile) => profile,
            None if self.full && is_root() => FULL_PROFILE,
            None => NO_LINK,
        }
    }

    fn has_link(&self) -> bool {
        self.profile() != NO_LINK
    }
}

/// What every case with one QEMU uses.
struct Tools {
    /// The program that is killed, and its command line client.
    longhaul: String,
    launch: Launch,
    /// Of QEMU.
    version: String,
}

/// What came of the cases so far.
#[derive(Default)]
struct Results {
    /// By the case's place in the plan.
    lines: Mutex<Vec<(usize, Line)>>,
}

/// The cases of a run, in order.
struct Plan {
    cases: Vec<Case>,
    /// Those that cannot be run here, and why.
    skipped: Vec<(String, &'static str)>,
}

/// Runs the matrix and returns the exit code: 0 every promise was kept, 1 not so or a moment was missed, 2 nothing was begun.
pub async fn run(args: KillArgs) -> u8 {
    let plan = Plan::of(&args);
    if args.list {
        for case in &plan.cases {
            say_out(&case.name);
        }
        for (name, why) in &plan.skipped {
            say_out(&format!("{name} ({why})"));
        }
        return 0;
    }
    let (tools, world) = match prepare(&args, &plan).await {
        Ok(prepared) => prepared,
        Err(error) => {
            say(&error.to_string());
            return 2;
        }
    };
    let results = Results::default();
    let performed = tokio::select! {
        performed = perform(&args, &tools, &world, &plan, &results) => performed,
        name = interrupted() => Err(LabError::Interrupted { name }),
    };
    world.clean(say).await;
    let lines = results.in_order();
    say_out(&Table(&lines).to_string());
    for (name, why) in &plan.skipped {
        say_out(&format!("skipped: {name} {why}"));
    }
    if let Err(error) = &performed {
        say(&error.to_string());
    }
    let kept = lines.iter().all(|line| line.verdict == Verdict::Kept);
    u8::from(performed.is_err() || !kept || lines.is_empty())
}

impl Plan {
    /// The undisturbed migration comes first: without it nothing else means anything.
    fn of(args: &KillArgs) -> Self {
        let Matrix { cases: all, usual } = Matrix::of(args.seed);
        // A whole name means that case, and not also the longer names that begin like it.
        let means = |name: &str, case: &Case| match all.iter().any(|other| other.name == name) {
            true => case.name == name,
            false => case.name.contains(name),
        };
        let is_chosen = |(number, case): &(usize, &Case)| match args.only.is_empty() {
            true => args.full || *number < usual,
            false => args.only.iter().any(|name| means(name, case)),
        };
        let mut cases = vec![Case::undisturbed()];
        let mut skipped = Vec::new();
        for (_, case) in all.iter().enumerate().filter(is_chosen) {
            let means = Means {
                has_link: args.has_link(),
                is_root: is_root(),
                can_move_clocks: clock::library().is_some(),
            };
            let obstacle = |fault: Fault| fault.obstacle(means);
            match case.fault().and_then(obstacle) {
                Some(why) => skipped.push((case.name.clone(), why)),
                None => cases.push(case.clone()),
            }
        }
        Self { cases, skipped }
    }
}

impl Results {
    fn add(&self, number: usize, line: Line) {
        self.locked().push((number, line));
    }

    fn count(&self) -> usize {
        self.locked().len()
    }

    fn in_order(self) -> Vec<Line> {
        let mut lines = self.lines.into_inner().unwrap_or_else(PoisonError::into_inner);
        lines.sort_by_key(|(number, _)| *number);
        lines.into_iter().map(|(_, line)| line).collect()
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Vec<(usize, Line)>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn prepare(args: &KillArgs, plan: &Plan) -> Result<(Vec<Tools>, World), LabError> {
    for (name, why) in &plan.skipped {
        say(&format!("skipping {name}: {why}"));
    }
    if plan.cases.len() < 2 {
        return Err(LabError::NoCase);
    }
    if args.has_link() && !is_root() {
        return Err(LabError::NotRoot);
    }
    let section = match args.has_link() {
        false => LinkSection::loopback(),
        true => LinkSection::of(&Profile::find(&args.profiles, args.profile())?),
    };
    let image = Image::open(&std::path::absolute(&args.image).unwrap_or_else(|_| args.image.clone()))?;
    let longhaul = args
        .longhaul
        .clone()
        .map_or_else(std::env::current_exe, Ok)
        .map_err(LabError::Unnamed)?;
    let mut tools = Vec::new();
    for qemu in &args.qemu {
        let launch = Launch {
            qemu: qemu.clone(),
            accelerator: args.accelerator,
            ..Launch::new(image.clone(), dials())
        };
        tools.push(Tools {
            longhaul: longhaul.display().to_string(),
            launch,
            version: version_of(qemu).await?,
        });
    }
    if let Some(file) = &args.json {
        std::fs::write(file, "").map_err(|source| LabError::file(file, source))?;
    }
    let link_script = args.scripts.join("link");
    for (process, world) in World::of_dead_runs(&link_script, &section) {
        say(&format!("removing what the killed run {process} left"));
        world.clean(say).await;
    }
    let links = if args.has_link() { args.jobs as usize } else { 0 };
    let mut world = World::of(std::process::id(), &link_script, section, links);
    world.make()?;
    if args.disk {
        world.disk = Some(Pristine::make(&world.directory, args.seed).await?);
    }
    Ok((tools, world))
}

/// `7.2.22` of `QEMU emulator version 7.2.22 (Debian …)`.
async fn version_of(qemu: &str) -> Result<String, LabError> {
    let said = process::run(&[qemu, "--version"]).await?;
    let mut words = said.split_ascii_whitespace().skip_while(|word| *word != "version");
    Ok(words.nth(1).unwrap_or("?").to_owned())
}

/// A guest that moves in a moment.
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
    tools: &[Tools],
    world: &World,
    plan: &Plan,
    results: &Results,
) -> Result<(), LabError> {
    if args.has_link() {
        world.link_up(args.profile(), args.seed).await?;
    }
    for (number, tools) in tools.iter().enumerate() {
        let first = number * plan.cases.len();
        let directory = world.directory.join(format!("guest-{number}"));
        let saved = saved::save(&tools.launch, &directory, world.disk.as_ref()).await?;
        let mut series = Series {
            args,
            tools,
            world,
            saved,
            of: args.qemu.len() * plan.cases.len(),
            results,
            usual: None,
        };
        series.usual = series.perform(first, 0, &plan.cases[0]).await?;
        let next = AtomicUsize::new(1);
        let mut workers: Vec<Worker<'_>> = Vec::new();
        for link in 0..args.jobs as usize {
            let (series, next) = (&series, &next);
            workers.push(Box::pin(async move {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = plan.cases.get(at) else { return Ok(()) };
                    series.perform(first + at, link, case).await?;
                }
            }));
        }
        all(workers).await?;
    }
    Ok(())
}

type Worker<'a> = Pin<Box<dyn Future<Output = Result<(), LabError>> + 'a>>;

/// Waits until all are done, or until one fails; dropping it drops them all.
async fn all(mut workers: Vec<Worker<'_>>) -> Result<(), LabError> {
    poll_fn(move |context| {
        let mut failed = None;
        workers.retain_mut(|worker| match worker.as_mut().poll(context) {
            Poll::Pending => true,
            Poll::Ready(result) => {
                failed = result.err().or(failed.take());
                false
            }
        });
        match failed {
            Some(error) => Poll::Ready(Err(error)),
            None if workers.is_empty() => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    })
    .await
}

/// All cases with one QEMU.
struct Series<'a> {
    args: &'a KillArgs,
    tools: &'a Tools,
    world: &'a World,
    /// The guest, in a file.
    saved: PathBuf,
    /// Cases of the whole run.
    of: usize,
    results: &'a Results,
    /// How long an undisturbed migration takes, once that is known.
    usual: Option<Duration>,
}

impl Series<'_> {
    /// Runs a case until its moment was hit, a few times at most, and returns how long the migration took.
    async fn perform(&self, number: usize, link: usize, case: &Case) -> Result<Option<Duration>, LabError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let name = format!("{number}.{attempt}");
            let saved = Some(self.saved.clone());
            let ground = self.world.ground(&name, link, &self.args.rate, saved)?;
            let ran = run::run(self.tools, &ground, case, self.usual).await;
            let (seed, profile, version) = (self.args.seed, self.args.profile(), self.tools.version.as_str());
            let took = ran.as_ref().ok().and_then(|found| found.command_seconds);
            let line = match ran {
                Ok(found) => Line::new(case, seed, profile, version, attempt, &found, &judge(case, &found)),
                // The others can still be run, but nothing is without the first.
                Err(error) if case.injection.is_some() => {
                    Line::unfinished(case, seed, profile, version, attempt, &error)
                }
                Err(error) => {
                    self.keep_logs(&ground, &case.name);
                    return Err(error);
                }
            };
            if line.verdict != Verdict::Kept {
                self.keep_logs(&ground, &case.name);
            }
            self.world.sweep(&ground.directory).await?;
            let removed = std::fs::remove_dir_all(&ground.directory);
            removed.map_err(|source| LabError::file(&ground.directory, source))?;
            if line.verdict == Verdict::Missed && attempt < ATTEMPTS {
                continue;
            }
            self.tell(&line)?;
            self.results.add(number, line);
            return Ok(took.map(Duration::from_secs_f64));
        }
    }

    /// Says what came of a case as soon as it is known.
    fn tell(&self, line: &Line) -> Result<(), LabError> {
        let what = match line.verdict {
            Verdict::Kept => "kept".to_owned(),
            Verdict::Missed => "missed".to_owned(),
            Verdict::Broken => format!("BROKEN: {}", line.problems.join("; ")),
        };
        say(&format!(
            "{}/{} {}: {what}",
            self.results.count() + 1,
            self.of,
            line.case
        ));
        let Some(file) = &self.args.json else { return Ok(()) };
        let mut text = serde_json::to_string(line).expect("a line is plain data");
        text.push('\n');
        std::fs::OpenOptions::new()
            .append(true)
            .open(file)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|source| LabError::file(file, source))
    }

    /// Copies what the processes of a case said to `--logs`.
    fn keep_logs(&self, ground: &Ground, case: &str) {
        let Some(logs) = &self.args.logs else { return };
        let copy = || -> std::io::Result<()> {
            for site in &ground.sites {
                let kept = logs.join(&self.tools.version).join(case).join(site.place.to_string());
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
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Tells the user what is being done.
fn say(what: &str) {
    // A reader that has gone is no reason to stop.
    let _ = writeln!(std::io::stderr(), "kill: {what}");
}

fn say_out(what: &str) {
    let _ = writeln!(std::io::stdout(), "{what}");
}

/// The profile that stands for the loopback device.
const NO_LINK: &str = "none";
/// With all the faults, of which some need a link: one on which a migration is hardly longer.
const FULL_PROFILE: &str = "metro";
/// How often a moment is tried to be hit.
const ATTEMPTS: u32 = 3;
