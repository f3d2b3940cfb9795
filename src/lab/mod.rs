//! The lab: real guests on an emulated link, measured from outside.
//!
//! ```text
//! stage (namespaces, link) ─▶ site (gateway, QEMU) ─▶ engine (who moves the guest) ─▶ record (what was found) ─▶ report
//! ```
//!
//! [`guest`] is the VM that proves its own memory and gives signs of life, [`heartbeat`] hears them, [`application`]
//! is what else it does. [`network`] joins the sites' guests and a client, [`prober`] is that client. [`plan`] measures a matrix of
//! links, guests and engines, [`demo`] shows one of its cells, [`disks`] moves a database with its disk,
//! [`disk_pass`] measures how a disk is read for the first time, [`kill`] kills the gateways that move, [`goodput`] fills
//! links without a guest, [`recording`] keeps what a hypervisor sends, [`clock`] is a wall clock that can be set wrong. [`record`] is what one
//! measured run found, [`report`] shows many of them, [`compare`] two files of them. The link itself is made by `netem-scripts/link`.

pub mod application;
pub mod clock;
pub mod compare;
pub mod demo;
pub mod disk_pass;
pub mod disks;
mod engine;
mod error;
mod gateway_file;
pub mod goodput;
pub mod guest;
pub mod heartbeat;
mod interrupt;
pub mod kill;
pub mod link;
pub mod monitor;
pub mod network;
pub mod plan;
pub mod prober;
pub mod process;
mod random;
pub mod record;
pub mod recording;
pub mod report;
mod site;
mod stage;
mod table;
mod usage;

use std::path::PathBuf;

use clap::{Args, Subcommand};

pub use self::compare::CompareArgs;
pub use self::demo::DemoArgs;
pub use self::disk_pass::DiskPassArgs;
pub use self::disks::{CommitsArgs, DisksArgs};
pub use self::goodput::GoodputArgs;
use self::guest::{Accelerator, GuestDials, GuestFiles, Image, Launch, Start};
pub use self::kill::KillArgs;
pub use self::plan::PlanArgs;
pub use self::prober::ProbeArgs;
pub use self::recording::RecordArgs;
pub use self::report::ReportArgs;

/// `longhaul lab …`: measurements and demonstrations on this machine.
#[derive(Clone, Debug, Subcommand)]
pub enum LabCommand {
    /// Moves a Linux guest across an emulated link and back, beside plain QEMU, and reports.
    Demo(Box<DemoArgs>),
    /// Moves a guest with PostgreSQL on its disk across an emulated link and back under load, and checks that nothing is lost.
    Disks(Box<DisksArgs>),
    /// Measures the first pass over a disk that is copied: its rate beside that of the link and of QEMU's mirror, what a base image saves, and what is
    /// sent twice where a gateway is killed.
    DiskPass(Box<DiskPassArgs>),
    /// Kills either gateway at every moment of a migration and checks that the VM runs in exactly one place.
    Kill(Box<KillArgs>),
    /// Measures what a plan says: links, guests, engines and seeds, one move after the other.
    Plan(Box<PlanArgs>),
    /// Fills links by two gateways and by the kernel's TCP, one after the other, and shows what arrives.
    Goodput(GoodputArgs),
    /// Records the vmm stream of the lab's guest into a file, for cargo bench --bench streams.
    Record(Box<RecordArgs>),
    /// Makes a report of what the lab measured: DIR/index.html, and DIR/report.md with its pictures.
    Report(ReportArgs),
    /// Compares the medians of two files of runs, cell by cell.
    Compare(CompareArgs),
    /// Prints the QEMU command line of the lab's guest, one argument a line.
    Guest(Box<GuestArgs>),
    /// Asks the lab's guest every few milliseconds whether it is there, until its own standard input ends; prints what it saw.
    Probe(ProbeArgs),
    /// Commits numbered rows in the guest's database until its own standard input ends, and logs which were acknowledged; or checks that log
    /// against the database.
    Commits(CommitsArgs),
}

impl LabCommand {
    /// Runs the verb to its end and returns its exit code.
    pub async fn run(self) -> u8 {
        match self {
            Self::Demo(args) => demo::run(*args).await,
            Self::Disks(args) => disks::run(*args).await,
            Self::DiskPass(args) => disk_pass::run(*args).await,
            Self::Kill(args) => kill::run(*args).await,
            Self::Plan(args) => plan::run(*args).await,
            Self::Goodput(args) => goodput::run(args).await,
            Self::Record(args) => recording::run(*args).await,
            Self::Report(args) => args.run(),
            Self::Compare(args) => args.run(),
            Self::Guest(args) => args.run(),
            Self::Probe(args) => prober::run(args).await,
            Self::Commits(args) => disks::run_commits(args).await,
        }
    }
}

/// Prints the QEMU command line of the lab's guest, one argument a line.
#[derive(Clone, Debug, Args)]
pub struct GuestArgs {
    /// Directory of the guest's image, as netem-scripts/guest makes it.
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    pub image: PathBuf,
    /// Directory of QEMU's sockets and of the console's text.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub directory: PathBuf,
    /// Tap device of the guest's network.
    #[arg(long, value_name = "DEVICE")]
    pub tap: Option<String>,
    /// Wait, paused, for a guest that comes from elsewhere.
    #[arg(long)]
    pub incoming: bool,
    /// The program.
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub qemu: String,
    /// Machine type.
    #[arg(long, default_value = "pc")]
    pub machine: String,
    /// How the guest's CPU runs.
    #[arg(long, value_enum, default_value_t)]
    pub accelerator: Accelerator,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a comment here would become help text of the whole group")]
    pub dials: GuestDials,
}

impl GuestArgs {
    fn run(self) -> u8 {
        let image = match Image::open(&self.image) {
            Ok(image) => image,
            Err(error) => {
                eprintln!("longhaul: {error}");
                return 2;
            }
        };
        let launch = Launch {
            qemu: self.qemu,
            machine: self.machine,
            accelerator: self.accelerator,
            image,
            dials: self.dials,
            native: None,
        };
        let start = if self.incoming {
            Start::ReceivePaused
        } else {
            Start::Boot
        };
        let files = GuestFiles {
            tap: self.tap,
            ..GuestFiles::named(&self.directory, "vm")
        };
        for argument in launch.command(&files, start) {
            println!("{argument}");
        }
        0
    }
}
