//! One case from the start of two fresh gateways to the end of everything they started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::task::JoinHandle;

use super::Tools;
use super::case::{Case, Moment, Place, Step};
use super::observe::{Observer, Seen, WallTime};
use super::site::Site;
use super::trigger::{JournalWatch, Trigger};
use crate::api::{Outcome, Phase};
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
    pub(super) killed: Option<WallTime>,
    /// When the killed gateway was started again; the last one, where both were killed.
    pub(super) back: Option<WallTime>,
    /// Records of the victim's journal when it was dead; where both are, of both.
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
    pub(super) link: LinkSection,
    /// `--rate` of the migration.
    pub(super) rate: Option<String>,
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
    qemu: Process,
    trigger: Arc<Trigger>,
    watches: Vec<JournalWatch>,
    observers: [Observer; 2],
    beats_a: Heartbeat,
    beats_b: JoinHandle<Result<Heartbeat, HeartbeatError>>,
}

impl Stage {
    /// Starts and pairs the gateways, boots the guest at A, and prepares to kill.
    async fn set(tools: &Tools, ground: &Ground, case: &Case) -> Result<Self, LabError> {
        let [a, b] = &ground.sites;
        let thread = |source| LabError::Thread { source };
        let trigger = Trigger::new();
        let qemu = a.boot(&tools.launch)?;
        let at_stop = Arc::clone(&trigger);
        let is_switchover = matches!(case.kill, Some((_, Moment::Switchover)));
        let observe_a = move || {
            if is_switchover {
                at_stop.fire();
            }
        };
        let observers = [
            Observer::start(&a.watch, true, observe_a).map_err(thread)?,
            Observer::start(&b.watch, false, || {}).map_err(thread)?,
        ];
        a.configure(b, &tools.launch, &ground.link)?;
        b.configure(a, &tools.launch, &ground.link)?;
        let gateways = [
            Some(a.start_gateway(&tools.longhaul, 1).await?),
            Some(b.start_gateway(&tools.longhaul, 1).await?),
        ];
        a.pair(&tools.longhaul, b).await?;
        let mut beats_a = Heartbeat::connect(&a.files.heartbeat, SOON).await?;
        let settled = tools.launch.dials.pages_per_second / 2;
        beats_a
            .wait_for("half a second of work", BOOT, |heard| {
                heard.last.is_some_and(|beat| beat.writes >= settled)
            })
            .await?;
        let path = b.files.heartbeat.clone();
        let beats_b = tokio::spawn(async move { Heartbeat::connect(&path, CASE).await });

        let mut watches = Vec::new();
        if let Some((victim, moment)) = case.kill {
            let places = victim.places().into_iter();
            trigger.aim(places.filter_map(|place| gateways[place.index()].as_ref().and_then(Process::id)));
            if let Moment::Record { at, step } | Moment::CancelledRecord { at, step } = moment {
                let fire = Arc::clone(&trigger);
                let journal = ground.sites[at.index()].journal();
                watches.push(JournalWatch::start(&journal, step, move || fire.fire()).map_err(thread)?);
            }
        }
        Ok(Self {
            gateways,
            qemu,
            trigger,
            watches,
            observers,
            beats_a,
            beats_b,
        })
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
        let log = a.directory.join("migrate.log");
        let argv = a.client(&tools.longhaul, &arguments);
        let begun = WallTime::now();
        let mut command = Process::spawn("longhaul migrate", a.namespace.as_deref(), &argv, &log)?;
        let mut ended = None;

        if case.is_cancelled() {
            self.cancel(a, &log).await?;
        }
        let share = match case.kill {
            Some((_, Moment::Share(share))) => Some(usual.unwrap_or(ASSUMED).mul_f64(share)),
            _ => None,
        };
        let deadline = tokio::time::Instant::now() + MOMENT;
        let alarm = tokio::time::Instant::now() + share.unwrap_or(MOMENT);
        // Until the kill; or, where it does not come or none is wanted, until the command ends.
        while self.trigger.fired().is_none() && tokio::time::Instant::now() < deadline {
            if share.is_some() && tokio::time::Instant::now() >= alarm {
                self.trigger.fire();
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

        let killed = self.trigger.fired();
        let mut back = None;
        let mut victims_journal = Vec::new();
        if let (Some(_), Some((victim, _))) = (killed, case.kill) {
            for place in victim.places() {
                if let Some(mut gateway) = self.gateways[place.index()].take() {
                    gateway.wait().await?;
                }
                victims_journal.extend(steps_of(&ground.sites[place.index()].journal(), place));
            }
            tokio::time::sleep(case.away).await;
            for place in victim.places() {
                let site = &ground.sites[place.index()];
                back = Some(WallTime::now());
                self.gateways[place.index()] = Some(site.start_gateway(&tools.longhaul, 2).await?);
            }
        }

        let migration = id_in(&log);
        let mut restless = Some(String::new());
        let deadline = tokio::time::Instant::now() + REST;
        while restless.is_some() && tokio::time::Instant::now() < deadline {
            if command.check().is_err() {
                ended.get_or_insert_with(WallTime::now);
            }
            restless = self.restless(ground, ended.is_some()).await;
            tokio::time::sleep(LOOK).await;
        }
        // Whatever would start a second copy by mistake has this long to do so.
        tokio::time::sleep(LULL).await;

        let mut beats_b = match self.beats_b.is_finished() {
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
        if let Some(migration) = migration {
            for (told, site) in told.iter_mut().zip(&ground.sites) {
                *told = site.api().status(migration).await.ok().map(|status| Told {
                    outcome: status.summary.outcome,
                    reason: status.report.map(|report| report.reason),
                    advice: status.advice,
                });
            }
        }
        Ok(Finding {
            command_seconds: ended.map(|ended| ended.seconds_since(begun)),
            exit_code,
            said,
            killed,
            back,
            victims_journal,
            journals: Place::BOTH.map(|place| steps_of(&ground.sites[place.index()].journal(), place)),
            seen: [self.observers[0].seen(), self.observers[1].seen()],
            heard: [Some(self.beats_a.heard()), beats_b.map(|beats| beats.heard())],
            verified,
            told,
            settings_kept,
            restless,
        })
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

    /// What is still on its way; `None`: exactly one copy runs, nothing else is left, and everybody knows it.
    async fn restless(&self, ground: &Ground, command_ended: bool) -> Option<String> {
        let running = self
            .observers
            .iter()
            .filter(|observer| observer.seen().is_running())
            .count();
        if running != 1 {
            return Some(format!("{running} copies run"));
        }
        if !command_ended {
            return Some("longhaul migrate has not ended".to_owned());
        }
        let hypervisors = hypervisors_of(&ground.directory).len();
        if hypervisors != 1 {
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

    /// Ends everything that the case has started.
    async fn strike(self) {
        self.beats_b.abort();
        drop(self.watches);
        for gateway in self.gateways.into_iter().flatten() {
            gateway.kill().await;
        }
        self.qemu.kill().await;
    }
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
