//! A database that moves with its disk: PostgreSQL under pgbench's transactions crosses an emulated ocean and comes back, and nothing that was
//! committed is lost.
//!
//! ```text
//! the guest works at A ─▶ to B and back ─▶ it rests ─▶ to B, the images are compared, and back, and again ─▶ it wakes ─▶ everything is read
//!        └── a client outside commits, and logs ──┘                                                                 └── the log is compared
//! ```
//!
//! While the guest works its images differ at every moment, so what they hold is judged by what is in them: the database is stopped, its
//! disk taken away and given back, so that nothing comes from memory, and then every checksum, index, balance and logged number is
//! checked. While it rests nothing writes, and the image that is left at the source has to be that at the destination, byte by byte.
//!
//! With `--disks both` each turn does the same with a guest whose disk is shared and stays where it is: what copying costs. Whatever
//! happens, also Ctrl-C, nothing is left behind.

pub(super) mod image;
mod ledger;
mod report;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use self::ledger::Ledger;
use self::report::{Checksums, Comparison, Move, Report, Turn};
use super::engine::gateways::Pair;
use super::engine::outside::{Client, Outside};
use super::error::LabError;
use super::gateway_file::LinkSection;
use super::guest::{Accelerator, GuestDials, GuestDisk, Image, Launch, Workload};
use super::interrupt::interrupted;
use super::network::GUEST_ADDRESS;
use super::record::Outcome;
use super::site::Site;
use super::stage::Stage;
use crate::wan::Profile;

pub use self::ledger::CommitsArgs;
pub(super) use self::ledger::run as run_commits;

/// Moves a guest with PostgreSQL on its disk across an emulated link and back under load, and checks that nothing is lost.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct DisksArgs {
    /// The link, by the name of its profile.
    #[arg(long, default_value = "intercontinental")]
    pub profile: String,
    /// Whose disk goes with it, whose is shared by both sites, or one after the other.
    #[arg(long, value_enum, default_value_t)]
    pub disks: Kinds,
    /// How many guests go there and back, of each kind.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub repeat: u32,
    /// Size of the disk, in MiB.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub disk_mb: u64,
    /// Incompressible bytes on it beside the database, in MiB.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub fill_mb: u64,
    /// Where the report goes as JSON, beside the tables on standard output.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the logs of QEMU and the gateways are kept, a directory for each guest; without it they are removed.
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
    /// Directory of the image of a guest with PostgreSQL, as netem-scripts/guest makes it.
    #[arg(long, value_name = "DIR", default_value = "target/guest-applications/postgres")]
    pub image: PathBuf,
    /// The QEMU at both sites.
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub qemu: String,
    /// How the guest's CPU runs.
    #[arg(long, value_enum, default_value_t)]
    pub accelerator: Accelerator,
}

/// What is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Kinds {
    /// Disks that go with the guest.
    #[default]
    Copied,
    /// Disks that both sites have.
    Shared,
    /// A guest with the one, then a guest with the other.
    Both,
}

impl Kinds {
    /// Whether a turn's guest has a shared disk, for each guest of a turn.
    fn are_shared(self) -> &'static [bool] {
        match self {
            Self::Copied => &[false],
            Self::Shared => &[true],
            Self::Both => &[false, true],
        }
    }
}

/// What every turn uses.
struct Bench<'a> {
    args: &'a DisksArgs,
    /// This program.
    longhaul: String,
    launch: Launch,
    section: LinkSection,
    stage: Stage,
}

/// Runs `longhaul lab disks`. Exit code 0: every move arrived and nothing is lost or damaged; 1: not so; 2: nothing was begun.
pub async fn run(args: DisksArgs) -> u8 {
    let bench = match prepare(&args).await {
        Ok(bench) => bench,
        Err(error) => {
            say(&error.to_string());
            return 2;
        }
    };
    let mut report = Report::new(&args.profile);
    let performed = tokio::select! {
        performed = bench.perform(&mut report) => performed,
        name = interrupted() => Err(LabError::Interrupted { name }),
    };
    bench.stage.clean(args.logs.as_deref()).await;
    report.problem = performed.err().map(|error| error.to_string());
    // A reader that has gone must not keep the exit code from being right.
    let _ = writeln!(std::io::stdout(), "{report}");
    if let Some(file) = &args.json
        && let Err(source) = report.write_json(file)
    {
        say(&LabError::file(file, source).to_string());
        return 1;
    }
    u8::from(!report.is_right())
}

async fn prepare(args: &DisksArgs) -> Result<Bench<'_>, LabError> {
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let section = LinkSection::of(&Profile::find(&args.profiles, &args.profile)?);
    let image = Image::open(&std::path::absolute(&args.image).unwrap_or_else(|_| args.image.clone()))?;
    let longhaul = args
        .longhaul
        .clone()
        .map_or_else(std::env::current_exe, Ok)
        .map_err(LabError::Unnamed)?;
    let dials = GuestDials {
        address: Some(GUEST_ADDRESS),
        ..GuestDials::with_application(Workload::Postgres)
    };
    Ok(Bench {
        args,
        longhaul: longhaul.display().to_string(),
        launch: Launch {
            qemu: args.qemu.clone(),
            accelerator: args.accelerator,
            ..Launch::new(image, dials)
        },
        section,
        stage: Stage::new(&args.scripts.join("link"), say).await?,
    })
}

impl Bench<'_> {
    /// Every turn; what was found is in `report` also where one did not end.
    async fn perform(&self, report: &mut Report) -> Result<(), LabError> {
        let kinds = self.args.disks.are_shared();
        let count = kinds.len() * self.args.repeat as usize;
        let guests = kinds.iter().cycle().take(count);
        for (number, &is_shared) in guests.enumerate() {
            let number = number + 1;
            let kind = if is_shared { "shared" } else { "copied" };
            say(&format!("guest {number} of {count}, disk {kind}"));
            report.turns.push(Turn::new(kind));
            let turn = report.turns.last_mut().expect("one was added");
            self.turn(number, is_shared, turn).await?;
        }
        Ok(())
    }

    /// One guest, from an empty stage to an empty stage.
    async fn turn(&self, number: usize, is_shared: bool, turn: &mut Turn) -> Result<(), LabError> {
        let stage = &self.stage;
        stage.link.up(&self.args.profile, SEED).await?;
        let mut sites = stage.sites()?;
        stage.network.up().await?;
        for (site, tap) in sites.iter_mut().zip(stage.network.taps()) {
            site.files = site.files.clone().on_tap(tap);
        }
        self.place_disks(&mut sites, is_shared).await?;
        let mut pair = Pair::start(
            &self.longhaul,
            &self.launch,
            sites.clone(),
            &self.section,
            Some(stage.link.clone()),
            self.outside(),
        )
        .await?;
        self.visit(&mut pair, &sites, is_shared, turn).await?;
        pair.stop().await;
        stage.kill_all().await;
        turn.link_fault = stage.link.carried().await?.fault;
        if let Some(logs) = &self.args.logs {
            stage.keep_logs(&logs.join(format!("guest-{number}")));
        }
        stage.network.down().await?;
        stage.link.down().await?;
        stage.remove_sites(&sites);
        Ok(())
    }

    /// Says where each site has the disk, and makes it at the first one. Raw at one and qcow2 at the other: what the guest sees is the same.
    async fn place_disks(&self, [a, b]: &mut [Site; 2], is_shared: bool) -> Result<(), LabError> {
        let disk = |site: &Site, format| GuestDisk {
            image: site.directory.join(format!("disk.{format}")),
            format,
            is_shared,
            base: None,
        };
        let at_a = disk(a, "raw");
        image::make(&at_a.image, self.args.disk_mb, self.args.fill_mb).await?;
        b.files.disk = Some(if is_shared { at_a.clone() } else { disk(b, "qcow2") });
        a.files.disk = Some(at_a);
        Ok(())
    }

    fn outside(&self) -> Outside {
        let client = Client {
            longhaul: self.longhaul.clone(),
            namespace: self.stage.network.client().to_owned(),
            guest: GUEST_ADDRESS,
        };
        Outside {
            client: Some(client),
            application: Workload::Postgres,
            events: None,
        }
    }

    /// There and back under load, there and back at rest, and everything is checked.
    async fn visit(
        &self,
        pair: &mut Pair<'_>,
        sites: &[Site; 2],
        is_shared: bool,
        turn: &mut Turn,
    ) -> Result<(), LabError> {
        say("filling the database");
        pair.guest()
            .wait_for("the first transaction", FILL, |heard| {
                heard.windows.iter().next().is_some()
            })
            .await?;
        let log = self.stage.directory.join("acknowledged");
        let client = self.stage.network.client();
        let ledger = Ledger::begin(&self.longhaul, client, GUEST_ADDRESS, &log).await?;
        for _ in 0..2 {
            self.leg(pair, true, turn).await?;
        }
        let committed = ledger.end().await?;
        turn.longest_pause_seconds = Some(committed.longest_pause_seconds);
        say("the guest is told to rest");
        let said = pair.guest().tell("rest", REST).await?;
        turn.transactions = number_after(&said, "transactions");
        if !is_shared {
            pair.look_on(Outside::default());
            for _ in 0..2 {
                self.leg(pair, false, turn).await?;
                turn.comparisons
                    .push(Comparison::of(image::compare_sites(sites).await?));
            }
        }
        say("the guest is told to wake, and everything is read");
        let said = pair.guest().tell("wake", REST).await?;
        turn.checksums = Checksums::parse(&said);
        turn.database = Some(Ledger::check(&self.longhaul, client, GUEST_ADDRESS, &log).await?);
        pair.guest().tell("rest", REST).await?;
        pair.guest().tell_the_end("end").await?;
        pair.guest().ended(REST).await?;
        // It is at A again, where the image is raw.
        turn.file_system = Some(image::check(&sites[0]).await?);
        turn.proof.intact = turn.proof.pages_checked > 0;
        Ok(())
    }

    async fn leg(&self, pair: &mut Pair<'_>, works: bool, turn: &mut Turn) -> Result<(), LabError> {
        let direction = pair.direction();
        say(&format!("{direction}, {}", if works { "at work" } else { "at rest" }));
        let moved = pair.leg(LEG, &mut turn.proof).await?;
        let (outcome, reason) = (moved.outcome, moved.reason.clone());
        let mut found = Move::new(direction, works, moved);
        let has_arrived = outcome == Outcome::Completed;
        if has_arrived {
            found.longest_pause_seconds = Some(pair.guest().heard().longest_pause.as_secs_f64());
        }
        turn.moves.push(found);
        if has_arrived {
            return Ok(());
        }
        Err(LabError::NotMoved {
            direction,
            said: reason.unwrap_or_else(|| format!("it was stopped after {} s", LEG.as_secs())),
        })
    }
}

/// The number behind a word.
fn number_after(said: &str, name: &str) -> Option<u64> {
    let mut words = said.split(' ').skip_while(|word| *word != name);
    words.nth(1)?.parse().ok()
}

/// Tells the user what is being done. A terminal that has gone is no reason to stop before everything is cleaned up.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "disks: {what}");
}

/// Of the link's losses.
const SEED: u64 = 1;
/// How long a move may take before the lab gives up.
const LEG: Duration = Duration::from_secs(900);
/// pgbench fills its tables within half a minute under TCG, more on a busy machine.
const FILL: Duration = Duration::from_secs(600);
/// A database that stops writes what it has in memory; one that starts has all its checksums read before.
const REST: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_behind_its_word_or_there_is_none() {
        assert_eq!(number_after("blocks 12 bad 0", "bad"), Some(0));
        assert_eq!(number_after("blocks 12 bad", "bad"), None);
        assert_eq!(number_after("", "bad"), None);
    }
}
