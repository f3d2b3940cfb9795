//! One case from the start of two fresh gateways to the end of everything they started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::Tools;
use super::case::{Case, Injection};
use super::copied::Pristine;
use super::disk::Disk;
use super::fault::Fault;
use super::moment::{Moment, Place, Step};
use super::observe::{Observer, Said, Seen, WallTime};
use super::site::Site;
use super::strike::{Strike, Target};
use super::trigger::{JournalWatch, Trigger};
use crate::api::{Outcome, Phase, ResolveRequest, Statement};
use crate::lab::clock::{self, Clock};
use crate::lab::error::LabError;
use crate::lab::gateway_file::{LinkSection, VM};
use crate::lab::heartbeat::{Heard, Heartbeat, HeartbeatError, Verified};
use crate::lab::monitor::Monitor;
use crate::lab::process::Process;
use crate::proto::page::MigrationId;
use crate::store::journal::read_only;

/// Everything that was seen of one case.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    /// From the start of the command to its end; `None`: it did not end.
    pub(super) command_seconds: Option<f64>,
    /// How `longhaul migrate` ended.
    pub(super) exit_code: Option<i32>,
    /// The last line that it said.
    pub(super) said: String,
    /// When the fault was made.
    pub(super) struck: Option<WallTime>,
    /// When all was well again: what was stopped, cut, or full was not so any more, and what was killed was started again, the last one
    /// of several. Where that cannot be: when the fault was made, or when a person had decided.
    pub(super) mended: Option<WallTime>,
    /// A person had to decide, and this was the advice.
    pub(super) advice: Option<String>,
    /// Records of the journals of the gateways that were killed or stopped, when they were.
    pub(super) victims_journal: Vec<Step>,
    /// Records of both journals at the end.
    pub(super) journals: [Vec<Step>; 2],
    pub(super) seen: [Seen; 2],
    /// Signs of life; `None` where no QEMU ever served them.
    pub(super) heard: [Option<Heard>; 2],
    pub(super) verified: Option<Verified>,
    /// What the gateways say of the migration at the end.
    pub(super) told: [Option<Told>; 2],
    /// Whether QEMU at A has the migration settings that it had before; `None` where the VM is not there any more.
    pub(super) settings_kept: Option<bool>,
    /// What had not come to rest when the lab stopped waiting.
    pub(super) restless: Option<String>,
    /// Processes and files that a migration has left behind.
    pub(super) leftovers: Vec<String>,
    /// What is wrong with a disk that went with the guest.
    pub(super) disk_problems: Vec<String>,
}

/// A gateway's answer to `longhaul status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Told {
    pub(super) outcome: Option<Outcome>,
    pub(super) reason: Option<String>,
    pub(super) advice: Option<String>,
}

/// Where a case runs.
#[derive(Debug)]
pub(super) struct Ground {
    /// Directory of this case alone. Its path is in the command line of every process of the case.
    pub(super) directory: PathBuf,
    pub(super) sites: [Site; 2],
    /// What the guest's disk holds, where it has one.
    pub(super) disk: Option<Pristine>,
    pub(super) link: LinkSection,
    /// `--rate` of the migration.
    pub(super) rate: Option<String>,
    /// The guest that goes on here; `None`: it is booted.
    pub(super) saved: Option<PathBuf>,
    /// Where the link's emulator listens.
    pub(super) link_control: Option<PathBuf>,
}

/// Runs the case. `usual` is how long an undisturbed migration takes, once that is known.
pub(super) async fn run(
    tools: &Tools,
    ground: &Ground,
    case: &Case,
    usual: Option<Duration>,
) -> Result<Finding, LabError> {
    let mut stage = Stage::set(tools, ground, case).await?;
    let found = stage.perform(tools, ground, case, usual).await;
    stage.strike().await;
    found
}

/// The processes and watchers of one case.
struct Stage {
    gateways: [Option<Process>; 2],
    /// How often the gateways were started.
    starts: u32,
    qemu: Process,
    trigger: Arc<Trigger>,
    watches: Vec<JournalWatch>,
    observers: [Observer; 2],
    beats_a: Heartbeat,
    beats_b: JoinHandle<Result<Heartbeat, HeartbeatError>>,
    /// Where a disk is to be full.
    disk: Option<Disk>,
    /// The clock that is to be moved, and whose.
    clock: Option<(Place, Clock)>,
}

impl Stage {
    /// Starts and pairs the gateways, and the guest at A.
    async fn set(tools: &Tools, ground: &Ground, case: &Case) -> Result<Self, LabError> {
        let [a, b] = &ground.sites;
        let thread = |source| LabError::Thread { source };
        // Before anything else: processes in a network namespace do not see what is mounted later.
        let disk = match case.fault() {
            Some(Fault::FullDisk(place)) => Some(Disk::mount(&ground.sites[place.index()].state()).await?),
            _ => None,
        };
        let trigger = Trigger::new();
        let qemu = a.boot(&tools.launch, ground.saved.as_deref())?;
        let fire = Arc::clone(&trigger);
        let moment = case.moment();
        let hear_a = move |said| match (said, moment) {
            (Said::Stopped, Some(Moment::Switchover)) => fire.fire(),
            // The pass that is about to begin is counted, from 1.
            (Said::Pass(2..), Some(Moment::LastPass)) => fire.fire(),
            _ => {}
        };
        let observers = [
            Observer::start(&a.watch, true, hear_a).map_err(thread)?,
            Observer::start(&b.watch, false, |_| {}).map_err(thread)?,
        ];
        let clock = match case.fault() {
            Some(Fault::MoveClock(place, _)) => {
                let directory = &ground.sites[place.index()].directory;
                let library = clock::library().ok_or(LabError::NoCase)?;
                let clock = Clock::right(library, directory).map_err(|source| LabError::file(directory, source))?;
                Some((place, clock))
            }
            _ => None,
        };
        let clock_of = |at: Place| clock.as_ref().filter(|(place, _)| *place == at).map(|(_, clock)| clock);
        a.configure(b, &tools.launch, &ground.link, case.again)?;
        b.configure(a, &tools.launch, &ground.link, case.again)?;
        let gateways = [
            Some(a.start_gateway(&tools.longhaul, 1, clock_of(Place::A)).await?),
            Some(b.start_gateway(&tools.longhaul, 1, clock_of(Place::B)).await?),
        ];
        a.pair(&tools.longhaul, b).await?;
        let mut beats_a = Heartbeat::connect(&a.files.heartbeat, SOON).await?;
        let some_work = |heard: &Heard| match (heard.first, heard.last) {
            (Some(first), Some(last)) => last.writes >= first.writes + tools.launch.dials.pages_per_second / 4,
            _ => false,
        };
        beats_a.wait_for("a moment of work", BOOT, some_work).await?;
        let path = b.files.heartbeat.clone();
        let beats_b = tokio::spawn(async move { Heartbeat::connect(&path, CASE).await });
        Ok(Self {
            gateways,
            starts: 1,
            qemu,
            trigger,
            watches: Vec::new(),
            observers,
            beats_a,
            beats_b,
            disk,
            clock,
        })
    }

    /// Prepares the fault, and watches for its moment where that is in a journal.
    fn prepare(&mut self, ground: &Ground, injection: Injection, command: &Process) -> Result<(), LabError> {
        let strike = self.strike_of(ground, injection.fault, command)?;
        self.trigger.arm(strike);
        if let Moment::Record { at, step } | Moment::CancelledRecord { at, step } = injection.moment {
            let fire = Arc::clone(&self.trigger);
            let journal = ground.sites[at.index()].journal();
            let watch = JournalWatch::start(&journal, step, move || fire.fire());
            self.watches.push(watch.map_err(|source| LabError::Thread { source })?);
        }
        Ok(())
    }

    fn strike_of(&self, ground: &Ground, fault: Fault, command: &Process) -> Result<Strike, LabError> {
        let there = |process: &Process| process.descriptor().map(Target::There);
        let gateways = |places: Vec<Place>| -> Result<Vec<Target>, LabError> {
            let processes = places.iter().filter_map(|place| self.gateways[place.index()].as_ref());
            Ok(processes.map(there).collect::<Result<_, _>>()?)
        };
        let hypervisor = |place: Place| Target::Coming(self.observers[place.index()].process());
        let (targets, signal) = match fault {
            Fault::KillGateway(victim) => (gateways(victim.places())?, Signal::KILL),
            Fault::StopGateway(place) => (gateways(vec![place])?, Signal::STOP),
            Fault::KillQemu(place) => (vec![hypervisor(place)], Signal::KILL),
            Fault::StopQemu => (vec![hypervisor(Place::B)], Signal::STOP),
            Fault::KillCommand => (vec![there(command)?], Signal::KILL),
            Fault::StopCommand => (vec![there(command)?], Signal::STOP),
            Fault::CutLink(directions) => {
                let control = ground.link_control.clone().ok_or(LabError::NoCase)?;
                return Ok(Strike::Cut { control, directions });
            }
            Fault::FullDisk(_) => return Ok(Strike::Fill(self.disk.clone().ok_or(LabError::NoCase)?)),
            Fault::MoveClock(_, jump) => {
                let (_, clock) = self.clock.clone().ok_or(LabError::NoCase)?;
                return Ok(Strike::Jump { clock, jump });
            }
        };
        Ok(Strike::Signal { targets, signal })
    }

    async fn perform(
        &mut self,
        tools: &Tools,
        ground: &Ground,
        case: &Case,
        usual: Option<Duration>,
    ) -> Result<Finding, LabError> {
        let [a, b] = &ground.sites;
        let mut arguments = vec!["migrate", VM, "--to", b.place.site()];
        if let Some(rate) = &ground.rate {
            arguments.extend(["--rate", rate]);
        }
        let settings = settings_of(a).await?;
        if let (Some(disk), Some(Fault::FullDisk(place))) = (&self.disk, case.fault()) {
            let journal = ground.sites[place.index()].journal();
            disk.prepare(&journal)
                .map_err(|source| LabError::file(&journal, source))?;
        }
        let log = a.directory.join("migrate.log");
        let argv = a.client(&tools.longhaul, &arguments);
        let begun = WallTime::now();
        let mut command = Process::spawn("longhaul migrate", a.namespace.as_deref(), &argv, &log)?;
        let mut ended = None;
        if let Some(injection) = case.injection {
            self.prepare(ground, injection, &command)?;
        }

        if case.is_cancelled() {
            self.cancel(a, &log).await?;
        }
        let share = match case.moment() {
            Some(Moment::Share(share)) => Some(usual.unwrap_or(ASSUMED).mul_f64(share)),
            _ => None,
        };
        let deadline = tokio::time::Instant::now() + MOMENT;
        let alarm = tokio::time::Instant::now() + share.unwrap_or(MOMENT);
        // Until the fault; or, where it does not come or none is wanted, until the command ends.
        while self.trigger.fired().is_none() && tokio::time::Instant::now() < deadline {
            if share.is_some() && tokio::time::Instant::now() >= alarm {
                let fire = Arc::clone(&self.trigger);
                let fired = tokio::task::spawn_blocking(move || fire.fire()).await;
                fired.expect("making a fault does not panic");
            }
            if command.check().is_err() {
                // A record that comes with the end of the migration is seen a moment later than the end.
                if ended.is_some_and(|end: WallTime| WallTime::now().seconds_since(end) > AFTER_THE_END) {
                    break;
                }
                ended.get_or_insert_with(WallTime::now);
            }
            tokio::time::sleep(LOOK).await;
        }

        let struck = self.trigger.fired();
        let mut mended = struck;
        let mut victims_journal = Vec::new();
        if let (Some(_), Some(fault)) = (struck, case.fault()) {
            mended = Some(self.mend(tools, ground, fault, case.away, &mut victims_journal).await?);
        }

        let mut migration = None;
        let mut advice = None;
        let mut restless = Some(String::new());
        let deadline = tokio::time::Instant::now() + REST;
        while restless.is_some() && tokio::time::Instant::now() < deadline {
            if command.check().is_err() {
                ended.get_or_insert_with(WallTime::now);
            }
            // A gateway that was stopped as the command began has not told it yet.
            migration = migration.or_else(|| id_in(&log));
            if advice.is_none()
                && let Some(migration) = migration
                && needs_person(case, ground)
                && let Ok(status) = b.api().status(migration).await
                && let Some(told) = status.advice
            {
                // The person has looked at B and seen no hypervisor.
                b.api().resolve(&lost_here()).await?;
                advice = Some(told);
                mended = Some(WallTime::now());
            }
            restless = self.restless(ground, case, ended.is_some()).await;
            tokio::time::sleep(LOOK).await;
        }
        // Whatever would start a second copy by mistake has this long to do so.
        tokio::time::sleep(LULL).await;

        let mut beats_b = match self.beats_b.is_finished() {
            // The QEMU that is there now need not be the first one.
            true if case.again => Heartbeat::connect(&b.files.heartbeat, SOON).await.ok(),
            true => (&mut self.beats_b).await.ok().and_then(Result::ok),
            false => None,
        };
        let running = Place::BOTH.map(|place| self.observers[place.index()].seen().is_running());
        let verified = match (running, &mut beats_b) {
            ([true, false], _) => self.beats_a.verify(VERIFY).await.ok(),
            ([false, true], Some(beats)) => beats.verify(VERIFY).await.ok(),
            _ => None,
        };
        let settings_kept = match running {
            [true, false] => Some(settings_of(a).await? == settings),
            _ => None,
        };
        let exit_code = match ended {
            Some(_) => command.wait().await?.code(),
            None => None,
        };
        let said = command.said().lines().last().unwrap_or_default().to_owned();
        command.kill().await;
        let mut told = [None, None];
        if let Some(migration) = last_of(a, migration).await {
            for (told, site) in told.iter_mut().zip(&ground.sites) {
                *told = site.api().status(migration).await.ok().map(|status| Told {
                    outcome: status.summary.outcome,
                    reason: status.report.map(|report| report.reason),
                    advice: status.advice,
                });
            }
        }
        // A disk that was full when nothing was written was no fault, nor a clock that nobody read.
        let struck = struck.filter(|_| match case.fault() {
            Some(Fault::FullDisk(place)) => ground.sites[place.index()].has_missed_a_record(),
            Some(Fault::MoveClock(place, jump)) => ground.sites[place.index()].clock_has_jumped(jump),
            _ => true,
        });
        let journals = journals_of(ground);
        let place = match (running, case.fault()) {
            ([true, false], _) => Some(Place::A),
            ([false, true], _) => Some(Place::B),
            (_, Some(Fault::KillQemu(place))) if is_lost(case, &journals) => Some(place),
            _ => None,
        };
        let disk_problems = match (&ground.disk, place) {
            (Some(disk), Some(place)) => disk.problems(&ground.sites, place).await?,
            _ => Vec::new(),
        };
        Ok(Finding {
            command_seconds: ended.map(|ended| ended.seconds_since(begun)),
            exit_code,
            said,
            struck,
            mended,
            advice,
            victims_journal,
            journals,
            seen: [self.observers[0].seen(), self.observers[1].seen()],
            heard: [
                Some(self.beats_a.heard()),
                // What is said to a second listener does not tell how it began.
                beats_b.filter(|_| !case.again).map(|beats| beats.heard()),
            ],
            verified,
            told,
            settings_kept,
            restless,
            leftovers: self.leftovers(ground, running),
            disk_problems,
        })
    }

    /// Waits as long as the fault lasts and takes it back. Returns when all was well again.
    async fn mend(
        &mut self,
        tools: &Tools,
        ground: &Ground,
        fault: Fault,
        away: Duration,
        victims_journal: &mut Vec<Step>,
    ) -> Result<WallTime, LabError> {
        let struck = self.trigger.fired().unwrap_or_else(WallTime::now);
        if let Fault::KillGateway(victim) = fault {
            for place in victim.places() {
                if let Some(mut gateway) = self.gateways[place.index()].take() {
                    gateway.wait().await?;
                }
            }
        }
        for place in fault.halted() {
            victims_journal.extend(steps_of(&ground.sites[place.index()].journal(), place));
        }
        if matches!(fault, Fault::KillQemu(_) | Fault::KillCommand | Fault::MoveClock(..)) {
            return Ok(struck);
        }
        if let Fault::FullDisk(place) = fault {
            // Nothing is written during pre-copy: it is noticed at the next record.
            let deadline = tokio::time::Instant::now() + NEXT_RECORD;
            while !ground.sites[place.index()].has_missed_a_record() && tokio::time::Instant::now() < deadline {
                tokio::time::sleep(LOOK).await;
            }
        }
        tokio::time::sleep(away).await;
        let mut mended = WallTime::now();
        if let Some(strike) = self.trigger.strike() {
            strike.mend().map_err(|source| LabError::Unmended { source })?;
        }
        for place in fault.restarted() {
            if let Some(gateway) = self.gateways[place.index()].take() {
                gateway.kill().await;
            }
            mended = WallTime::now();
            self.starts += 1;
            let site = &ground.sites[place.index()];
            self.gateways[place.index()] = Some(site.start_gateway(&tools.longhaul, self.starts, None).await?);
        }
        Ok(mended)
    }

    /// Cancels the migration once it copies.
    async fn cancel(&mut self, a: &Site, log: &Path) -> Result<(), LabError> {
        let deadline = tokio::time::Instant::now() + MOMENT;
        while !steps_of(&a.journal(), Place::A).contains(&Step::Started) {
            if tokio::time::Instant::now() > deadline {
                return Err(LabError::NotBegun);
            }
            tokio::time::sleep(LOOK).await;
        }
        tokio::time::sleep(BEFORE_CANCEL).await;
        let migration = id_in(log).ok_or(LabError::NotBegun)?;
        // The gateway may be killed before it has answered.
        let _ = a.api().cancel(migration).await;
        Ok(())
    }

    /// What is still on its way; `None`: exactly one copy runs, or none where the fault has killed the only one, nothing else is left, and
    /// everybody knows it.
    async fn restless(&self, ground: &Ground, case: &Case, command_ended: bool) -> Option<String> {
        let expected = usize::from(!is_lost(case, &journals_of(ground)));
        let running = self
            .observers
            .iter()
            .filter(|observer| observer.seen().is_running())
            .count();
        if running != expected {
            return Some(format!("{running} copies run"));
        }
        if !command_ended {
            return Some("longhaul migrate has not ended".to_owned());
        }
        let hypervisors = hypervisors_of(&ground.directory).len();
        if hypervisors != expected {
            return Some(format!("{hypervisors} QEMU processes are there"));
        }
        for site in &ground.sites {
            match site.api().list().await {
                Ok(known) => {
                    if let Some(open) = known.iter().find(|known| known.phase != Phase::Done) {
                        return Some(format!("the migration is {} at {}", open.phase, site.place));
                    }
                }
                Err(error) => return Some(error.to_string()),
            }
            if let Some(Step::Running | Step::Revert) = steps_of(&site.journal(), site.place).last() {
                return Some(format!(
                    "the gateway of {} has not heard that the other knows",
                    site.place
                ));
            }
        }
        None
    }

    /// Processes beside the gateways and the hypervisor of the guest, and files of a migration in the gateways' directories.
    fn leftovers(&self, ground: &Ground, running: [bool; 2]) -> Vec<String> {
        let gateways = self.gateways.iter().flatten().count();
        let guests = running.iter().filter(|runs| **runs).count();
        let processes = processes_of(&ground.directory, None).len();
        let mut left = Vec::new();
        if processes > gateways + guests {
            left.push(format!("{processes} processes, of which {gateways} are gateways"));
        }
        for site in &ground.sites {
            let entries = std::fs::read_dir(site.state()).into_iter().flatten().flatten();
            let of_a_migration = |name: &String| OF_A_MIGRATION.iter().any(|end| name.ends_with(end));
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            left.extend(
                names
                    .filter(of_a_migration)
                    .map(|name| format!("{name} at {}", site.place)),
            );
        }
        left
    }

    /// Ends everything that the case has started.
    async fn strike(self) {
        self.beats_b.abort();
        drop(self.watches);
        for gateway in self.gateways.into_iter().flatten() {
            let id = gateway.id();
            gateway.kill().await;
            if self.clock.is_some() {
                id.into_iter().for_each(clock::forget);
            }
        }
        self.qemu.kill().await;
    }
}

/// How names of files end that a migration has in a state directory, and nobody once it is over.
const OF_A_MIGRATION: [&str; 6] = [
    ".stream",
    ".launching",
    ".wanted",
    ".new",
    ".source-hook",
    ".destination-hook",
];

/// Whether the fault has killed the only copy that may run: that at A before PERMIT, or that at B after RUNNING.
pub(super) fn is_lost(case: &Case, journals: &[Vec<Step>; 2]) -> bool {
    match case.fault() {
        Some(Fault::KillQemu(Place::A)) => !journals[0].contains(&Step::Permit),
        Some(Fault::KillQemu(Place::B)) => journals[1].contains(&Step::Running),
        _ => false,
    }
}

/// Whether docs/ownership.md leaves it to a person: the hypervisor at B is dead, and nobody knows whether its guest has run.
fn needs_person(case: &Case, ground: &Ground) -> bool {
    let [_, at_b] = journals_of(ground);
    let is_undecided = at_b.last() == Some(&Step::Commit);
    case.fault() == Some(Fault::KillQemu(Place::B))
        && is_undecided
        && hypervisors_of(&ground.sites[1].directory).is_empty()
}

/// What a person says at B who has seen that no hypervisor is there.
fn lost_here() -> ResolveRequest {
    ResolveRequest {
        vm: VM.to_owned(),
        statement: Statement::LostHere,
    }
}

fn journals_of(ground: &Ground) -> [Vec<Step>; 2] {
    Place::BOTH.map(|place| steps_of(&ground.sites[place.index()].journal(), place))
}

/// Records of one side's journal, by name; none where there is no journal.
fn steps_of(journal: &Path, place: Place) -> Vec<Step> {
    let records = read_only(journal).map(|snapshot| snapshot.records).unwrap_or_default();
    let ours = records.iter().filter(|record| record.role == place.role());
    ours.map(|record| Step::of(&record.kind)).collect()
}

/// Capabilities and parameters of migration. The gateway leaves its monitor free between migrations.
async fn settings_of(site: &Site) -> Result<[Value; 2], LabError> {
    let mut monitor = Monitor::connect(&site.files.qmp, SOON).await?;
    let capabilities = monitor.execute("query-migrate-capabilities", Value::Null).await?;
    let parameters = monitor.execute("query-migrate-parameters", Value::Null).await?;
    Ok([capabilities, parameters])
}

/// The migration's id, which the command says at its start.
fn id_in(log: &Path) -> Option<MigrationId> {
    let said = std::fs::read_to_string(log).ok()?;
    let line = said.lines().find_map(|line| line.strip_prefix("migration "))?;
    line.split(' ').next()?.parse().ok()
}

/// The migration that was begun again last in the place of `migration`, as its source says.
async fn last_of(source: &Site, migration: Option<MigrationId>) -> Option<MigrationId> {
    let mut last = migration?;
    while let Ok(status) = source.api().status(last).await
        && let Some(next) = status.report.and_then(|report| report.continued_as)
    {
        last = next;
    }
    Some(last)
}

/// QEMU processes whose command line names `directory`.
pub(super) fn hypervisors_of(directory: &Path) -> Vec<i32> {
    processes_of(directory, Some("-qmp"))
}

/// Processes whose command line names `directory` and has the word `with`.
pub(super) fn processes_of(directory: &Path, with: Option<&str>) -> Vec<i32> {
    let directory = directory.display().to_string();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = i32::try_from(std::process::id()).ok();
    pids.filter(|pid| Some(*pid) != own)
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            line.contains(&directory) && with.is_none_or(|with| line.split('\0').any(|word| word == with))
        })
        .collect()
}

/// From the start of QEMU to a guest at work; some seconds under TCG, more on a machine that does other things too.
const BOOT: Duration = Duration::from_secs(180);
/// What should follow at once.
const SOON: Duration = Duration::from_secs(30);
/// Longer than any case.
const CASE: Duration = Duration::from_secs(600);
/// How long a moment may take to come.
const MOMENT: Duration = Duration::from_secs(90);
/// How long both gateways may take, once the killed one is back, until everything is at rest.
const REST: Duration = Duration::from_secs(40);
/// How long pre-copy lasts at most.
const NEXT_RECORD: Duration = Duration::from_secs(20);
/// See its use.
const LULL: Duration = Duration::from_millis(1500);
const VERIFY: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);
/// Seconds.
const AFTER_THE_END: f64 = 2.0;
/// Into pre-copy.
const BEFORE_CANCEL: Duration = Duration::from_millis(200);
/// Where no undisturbed migration was seen before.
const ASSUMED: Duration = Duration::from_secs(4);
