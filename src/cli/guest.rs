//! `longhaul guest`: a small guest of KVM that counts and checks its own memory, under the native engine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config::units::{parse_duration, parse_size};
use crate::hypervisor::kvm::demo::{Content, DemoConfig, DemoVmm, Dials, SerialOutput};
use crate::hypervisor::kvm::{Monitor, MonitorConfig, Start, Vmm};

use super::{Failure, YES, with_causes};

/// Runs a small guest of KVM that writes to its memory and checks it, to be moved by the gateways.
///
/// It stands for a VM in tests, in the lab and for first steps: no image, no kernel, up in a moment. What it writes is
/// set by its dials, and a page that was lost, torn or is of another time is counted as an error. A gateway knows it
/// by the socket that it answers on, as it knows a QEMU.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Args {
    /// Socket of its monitor, which answers as QEMU's does; `qmp` of its [[vm]]. May be given several times.
    #[arg(long, value_name = "SOCKET", required = true)]
    qmp: Vec<PathBuf>,

    /// Its name.
    #[arg(long, value_name = "NAME", default_value = "")]
    name: String,

    /// Its memory, 32 MiB to 3 GiB.
    #[arg(long, value_name = "SIZE", default_value = "64mib", value_parser = parse_size)]
    memory: u64,

    /// Its vCPUs, 1 to 16.
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: usize,

    /// Memory that it writes to and checks, at most its memory less 16 MiB.
    #[arg(long, value_name = "SIZE", default_value = "16mib", value_parser = parse_size)]
    working_set: u64,

    /// Pages that it writes a second, its vCPUs together; 0: as many as it can.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pages_per_second: u64,

    /// Bytes that change in a page that it writes, 8 to 4096.
    #[arg(long, value_name = "N", default_value_t = 64)]
    bytes_per_page: u64,

    /// Share of the writes that go to the first tenth of the pages, in percent; 0: each page in turn.
    #[arg(long, value_name = "PERCENT", default_value_t = 0)]
    skew: u64,

    /// What the pages begin as: zero, text or random.
    #[arg(long, value_name = "KIND", default_value = "text")]
    content: Content,

    /// Share of the pages that hold random bytes instead, in percent; with text only.
    #[arg(long, value_name = "PERCENT", default_value_t = 0)]
    random_percent: u64,

    /// Another seed makes other pages.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// The file that gets a line a second from the guest; standard output without it.
    #[arg(long, value_name = "FILE")]
    serial: Option<PathBuf>,

    /// A socket on which the guest's signs of life are told, and on which it can be asked whether its memory is right.
    #[arg(long, value_name = "SOCKET")]
    heartbeat: Option<PathBuf>,

    /// Time between two signs of life, at least 1 ms; 0s: none.
    #[arg(long, value_name = "TIME", default_value = "10ms", value_parser = parse_duration)]
    beat: Duration,

    /// `defer`: there is no guest yet, it comes from another site. It brings its own dials, and those given here are ignored.
    #[arg(long, value_name = "defer")]
    incoming: Option<Incoming>,

    /// The guest stands until somebody says that it may run.
    #[arg(short = 'S')]
    stands: bool,
}

/// When a guest that comes from elsewhere is received.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Incoming {
    /// When the gateway says so.
    Defer,
}

pub(super) fn run(args: Args) -> Result<u8, Failure> {
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
    debug_assert!(log.is_ok(), "nothing else logs in this process");
    let dials = Dials {
        working_set_bytes: args.working_set,
        pages_per_second: args.pages_per_second.div_ceil(args.vcpus.max(1) as u64),
        skew_percent: args.skew,
        bytes_per_page: args.bytes_per_page,
        content: args.content,
        random_percent: args.random_percent,
        beat: args.beat,
        seed: args.seed,
    };
    let config = DemoConfig {
        memory_bytes: args.memory,
        vcpus: args.vcpus,
        has_pit: true,
        guest: args.incoming.is_none().then_some(dials),
        serial: args.serial.map_or(SerialOutput::Stdout, SerialOutput::File),
        heartbeat: args.heartbeat,
    };
    let no = |error: &dyn std::error::Error| Failure::no(with_causes(error));
    let vmm = DemoVmm::new(config).map_err(|error| no(&error))?;
    let machine = vmm.movable().map_err(|error| no(&error))?;
    let start = match (args.incoming, args.stands) {
        (Some(Incoming::Defer), _) => Start::Incoming,
        (None, true) => Start::Paused,
        (None, false) => Start::Running,
    };
    let monitor = MonitorConfig {
        paths: args.qmp,
        name: args.name,
        uuid: None,
        cpu_features: machine.cpu_features().map_err(|error| no(&error))?,
        start,
    };
    let monitor = Arc::new(Monitor::serve(monitor, Arc::new(machine)).map_err(|error| no(&error))?);
    let told = Arc::downgrade(&monitor);
    vmm.when_failed(move || {
        if let Some(monitor) = told.upgrade() {
            monitor.guest_shut_down();
        }
    });
    let told = Arc::clone(&vmm);
    let signals = std::thread::Builder::new().name("signals".to_owned());
    let signals = signals.spawn(move || quit_when_told(&*told));
    signals.map_err(|error| Failure::no(format!("cannot start: {error}")))?;
    let ended = vmm.wait();
    drop(monitor);
    ended.map(|()| YES).map_err(|error| no(&error))
}

/// Ends the guest on SIGINT and SIGTERM, so that its sockets go with it.
fn quit_when_told(vmm: &dyn Vmm) {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let told = runtime.map(|runtime| {
        runtime.block_on(async {
            let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            Ok::<(), std::io::Error>(())
        })
    });
    match told {
        Ok(Ok(())) => vmm.quit(),
        Ok(Err(error)) | Err(error) => tracing::warn!(%error, "signals end this process at once"),
    }
}

const HELP: &str = "Examples:

  A guest here, and the [[vm]] of the gateway at this site:
    longhaul guest --qmp /run/longhaul/demo.qmp --name demo
      [[vm]]
      name = \"demo\"
      qmp = \"/run/longhaul/demo.qmp\"

  How the gateway of the other site starts the one that it arrives in:
      command = [\"longhaul\", \"guest\", \"--qmp\", \"{qmp}\", \"--incoming\", \"defer\", \"-S\"]

  A guest that writes 64 bytes into each of 20000 pages a second:
    longhaul guest --qmp demo.qmp --memory 512mib --working-set 200mib --vcpus 4 --pages-per-second 20000

Memory and vCPUs have to be the same at both sites. It needs /dev/kvm, on x86-64.";
