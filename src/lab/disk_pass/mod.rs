//! The first pass over a disk that is copied with its VM, across an emulated ocean: how fast it is, what a base image saves, and what is sent twice
//! where a gateway is killed meanwhile.
//!
//! ```text
//! rate   in turn: gateways (a link test, then the disk) │ QEMU's own mirror over TCP with tuned hosts
//! base   B has the image from which the disk was made; a share of its clusters is otherwise
//! cold   the VM is off, a fifth of its disk is in use, and the disk becomes another format
//! kill   kill -9 of either gateway at a moment of the pass, a new one soon after; what the link carried beside that of a pass that nobody disturbed
//! ```
//!
//! Nothing on the disks can be compressed, and the guest writes nothing to them, so that what is there is known: after each pass the guest is
//! moved, and both images are compared. Every pass has a link and gateways of its own. Whatever happens, also Ctrl-C, nothing is left behind.

mod base;
mod cold;
pub(super) mod content;
mod course;
mod kill;
mod mirror;
mod rate;
mod report;
mod scene;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use self::report::Report;
use super::error::LabError;
use super::gateway_file::LinkSection;
use super::guest::{Accelerator, GuestDials, GuestDisk, Image, Launch};
use super::interrupt::interrupted;
use super::stage::Stage;
use crate::config::units::parse_duration;
use crate::wan::Profile;

/// Measures the first pass over a disk that is copied: its rate beside that of the link and of QEMU's mirror, what a base image saves, and what is
/// sent twice where a gateway is killed.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct DiskPassArgs {
    /// The link, by the name of its profile.
    #[arg(long, default_value = "intercontinental")]
    pub profile: String,
    /// What is measured.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = What::ALL)]
    pub what: Vec<What>,
    /// How often the rate is measured, by the gateways and by QEMU's mirror in turn, and what a base saves.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,
    /// How often each of both gateways is killed.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub kills: u32,
    /// Size of the disk, in MiB; of that which is off, what is in use.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(16..))]
    pub disk_mb: u64,
    /// What of the disk is otherwise than its base, in percent of its clusters of 64 KiB.
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, value_parser = percent)]
    pub changed_percent: f64,
    /// What the image at the destination is.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// How long the link test lasts that a pass is compared with.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "5s")]
    pub test: Duration,
    /// Of the content, the moments and the link's losses.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where the report goes as JSON, beside the tables on standard output.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Where the logs of QEMU and the gateways are kept where something goes wrong; without it they are removed.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// The program whose gateways are measured; without it this one.
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

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// How fast the pass is.
    Rate,
    /// What a base image at the destination saves.
    Base,
    /// A disk of a VM that is off, from raw to qcow2 and from that to vmdk.
    Cold,
    /// What is sent twice where a gateway is killed.
    Kill,
}

impl What {
    const ALL: [Self; 4] = [Self::Rate, Self::Base, Self::Cold, Self::Kill];
}

/// What an image is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As most are.
    #[default]
    Qcow2,
    /// A file of the disk's bytes.
    Raw,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

fn percent(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=100.0).contains(share));
    share.ok_or_else(|| "is a number from 0 to 100".to_owned())
}

/// What every pass uses.
struct Bench<'a> {
    args: &'a DiskPassArgs,
    longhaul: String,
    launch: Launch,
    section: LinkSection,
    stage: Stage,
}

/// Runs `longhaul lab disk-pass`. Exit code 0: everything was measured, and each image is what the other was; 1: not so; 2: nothing was begun.
pub async fn run(args: DiskPassArgs) -> u8 {
    let bench = match prepare(&args).await {
        Ok(bench) => bench,
        Err(error) => {
            say(&error.to_string());
            return 2;
        }
    };
    bench.stage.allow_controls().await;
    let mut report = Report::new(&args);
    let performed = tokio::select! {
        performed = bench.perform(&mut report) => performed,
        name = interrupted() => Err(LabError::Interrupted { name }),
    };
    let logs = args.logs.as_deref().filter(|_| performed.is_err());
    bench.stage.clean(logs).await;
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

async fn prepare(args: &DiskPassArgs) -> Result<Bench<'_>, LabError> {
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
    // It takes no time from what is measured.
    let dials = GuestDials {
        pages_per_second: 10,
        checks_per_second: 10,
        beat_us: 50_000,
        ..GuestDials::small()
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
    /// Every part; what was found is in `report` also where one did not end.
    async fn perform(&self, report: &mut Report) -> Result<(), LabError> {
        let is_asked = |what| self.args.what.contains(&what);
        say("making the disk");
        let [at_a, _] = self.disks(None);
        content::make(&at_a.image, self.disk_bytes(), self.args.seed).await?;
        if is_asked(What::Rate) {
            rate::measure(self, &mut report.passes).await?;
        }
        if is_asked(What::Cold) {
            cold::measure(self, &mut report.cold).await?;
        }
        if is_asked(What::Kill) {
            kill::measure(self, report).await?;
        }
        // The last one, since it changes the disk.
        if is_asked(What::Base) {
            base::measure(self, &mut report.on_base).await?;
        }
        Ok(())
    }

    fn disk_bytes(&self) -> u64 {
        self.args.disk_mb << 20
    }

    /// The disk where it is, raw, and where it goes, which may be on top of a base.
    fn disks(&self, base: Option<PathBuf>) -> [GuestDisk; 2] {
        let disk = |name: &str, format, base| GuestDisk {
            image: self.stage.directory.join(format!("{name}.{format}")),
            format,
            is_shared: false,
            base,
        };
        [
            disk("disk", "raw", None),
            disk("arrived", self.args.format.name(), base),
        ]
    }

    /// Removes the image at the destination: the disk goes there again.
    fn remove_arrived(&self) {
        let [_, at_b] = self.disks(None);
        match std::fs::remove_file(&at_b.image) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                say(&LabError::file(&at_b.image, error).to_string());
            }
            _ => {}
        }
    }
}

/// Tells the user what is being done. A terminal that has gone is no reason to stop before everything is cleaned up.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "disk-pass: {what}");
}
