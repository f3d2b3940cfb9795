//! Records the vmm stream of a real guest, for measuring what becomes of it (`cargo bench --bench streams`).
//!
//! QEMU migrates the guest to a file's writer at a bounded rate. The guest runs on meanwhile, and QEMU is never content with what is left, so that
//! round follows round.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::error::LabError;
use super::guest::{Accelerator, GuestDials, GuestFiles, Image, Launch, Start};
use super::heartbeat::Heartbeat;
use super::interrupt::interrupted;
use super::monitor::Monitor;
use super::process::Process;
use crate::config::units::parse_duration;
use crate::proto::page::ByteRate;

/// Records the vmm stream of the lab's guest into a file.
#[derive(Clone, Debug, Args)]
pub struct RecordArgs {
    /// Where the stream goes.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Rounds of pre-copy that are recorded, the first pass among them.
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Rate at which QEMU sends: the slower, the more the guest writes between two rounds.
    #[arg(long, value_name = "RATE", default_value = "400mbit")]
    pub rate: ByteRate,
    /// How long the guest works before it is recorded, from its first sign of life on.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "20s")]
    pub settle: Duration,
    /// Directory of the guest's image, as netem-scripts/guest makes it; with --application, of the image that has it.
    #[arg(long, value_name = "DIR", default_value = "target/guest")]
    pub image: PathBuf,
    /// The program.
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    pub qemu: String,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a comment here would become help text of the whole group")]
    pub dials: GuestDials,
}

/// Records and returns the exit code: 0 recorded, 1 not so, 2 nothing was begun.
pub async fn run(args: RecordArgs) -> u8 {
    let image = match Image::open(&args.image) {
        Ok(image) => image,
        Err(error) => {
            eprintln!("longhaul: {error}");
            return 2;
        }
    };
    let folder = match make_folder() {
        Ok(folder) => folder,
        Err(error) => {
            eprintln!("longhaul: {error}");
            return 2;
        }
    };
    let recorded = tokio::select! {
        recorded = record(&args, image, &folder) => recorded,
        name = interrupted() => Err(LabError::Interrupted { name }),
    };
    // Whatever is left in it tells nothing.
    let _ = std::fs::remove_dir_all(&folder);
    match recorded {
        Ok(bytes) => {
            eprintln!("lab: {} has {bytes} bytes of stream", args.out.display());
            0
        }
        Err(error) => {
            eprintln!("longhaul: {error}");
            // Half a recording is none.
            let _ = std::fs::remove_file(&args.out);
            1
        }
    }
}

async fn record(args: &RecordArgs, image: Image, folder: &Path) -> Result<u64, LabError> {
    let files = GuestFiles::named(folder, "vm");
    let launch = Launch {
        qemu: args.qemu.clone(),
        machine: "pc".to_owned(),
        accelerator: Accelerator::Tcg,
        image,
        dials: args.dials.clone(),
        native: None,
    };
    let log = folder.join("vm.log");
    let mut guest = Process::spawn("QEMU", None, &launch.command(&files, Start::Boot), &log)?;
    let recorded = async {
        let mut heartbeat = Heartbeat::connect(&files.heartbeat, PATIENCE).await?;
        heartbeat.first(PATIENCE).await?;
        tokio::time::sleep(args.settle).await;
        let mut monitor = Monitor::connect(&files.qmp, PATIENCE).await?;
        let rate = json!({ "max-bandwidth": args.rate.0, "downtime-limit": 0 });
        monitor.execute("migrate-set-parameters", rate).await?;
        let socket = folder.join("stream");
        let listener = UnixListener::bind(&socket).map_err(|source| LabError::file(&socket, source))?;
        let uri = json!({ "uri": format!("unix:{}", socket.display()) });
        monitor.execute("migrate", uri).await?;
        let (stream, _) = listener
            .accept()
            .await
            .map_err(|source| LabError::file(&socket, source))?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let counting = async {
            let counted = count_rounds(&mut monitor, args.rounds).await;
            let _ = stop.send(());
            counted
        };
        let (written, counted) = tokio::join!(write(stream, &args.out, stopped), counting);
        counted?;
        written
    };
    let recorded = tokio::select! {
        recorded = recorded => recorded,
        ended = guest.ended() => Err(ended.into()),
    };
    guest.kill().await;
    recorded
}

/// Until QEMU ends the stream, or enough is written.
async fn write(
    mut stream: UnixStream,
    out: &Path,
    mut enough: tokio::sync::oneshot::Receiver<()>,
) -> Result<u64, LabError> {
    let copied = async {
        let mut file = tokio::fs::File::create(out).await?;
        let mut buffer = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            let read = tokio::select! {
                read = stream.read(&mut buffer) => read?,
                _ = &mut enough => 0,
            };
            if read == 0 {
                file.flush().await?;
                return Ok(bytes);
            }
            file.write_all(&buffer[..read]).await?;
            bytes += read as u64;
        }
    };
    copied.await.map_err(|source| LabError::file(out, source))
}

/// Until round `rounds` is over, or QEMU is done before.
async fn count_rounds(monitor: &mut Monitor, rounds: u32) -> Result<(), LabError> {
    let mut said = 0;
    loop {
        let answer = monitor.execute("query-migrate", json!({})).await?;
        let round = answer["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        if round > said {
            eprintln!("lab: round {round}");
            said = round;
        }
        let status = answer["status"].as_str().unwrap_or_default();
        if round > rounds.into() || status == "completed" {
            return Ok(());
        }
        if matches!(status, "failed" | "cancelled") {
            return Err(LabError::NoFigures {
                tool: "QEMU",
                said: format!("the migration {status}"),
            });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A folder for sockets, whose paths must be short.
fn make_folder() -> Result<PathBuf, LabError> {
    let folder = std::env::temp_dir().join(format!("longhaul-record-{}", std::process::id()));
    std::fs::create_dir(&folder).map_err(|source| LabError::file(&folder, source))?;
    Ok(folder)
}

const PATIENCE: Duration = Duration::from_secs(300);
