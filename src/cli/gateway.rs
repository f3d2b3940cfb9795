//! `longhaul gateway`: the daemon of a site.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::LevelFilter;

use super::settings::Settings;
use super::{Failure, YES};
use crate::api::{self, ControlSocket};
use crate::config::{Config, DEFAULT_PATH, Log, LogFormat, LogLevel};
use crate::gateway;
use crate::metrics::{self, Metrics};

/// Runs the gateway of this site in the foreground.
///
/// SIGTERM and SIGINT drain: nothing new is taken, migrations that run are finished, then it ends. A second signal ends
/// it at once; the journal then says how to go on after the next start.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Args {
    /// Configuration file.
    #[arg(long, value_name = "FILE", env = "LONGHAUL_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,

    #[command(flatten)]
    settings: Settings,
}

pub(super) fn run(args: &Args) -> Result<u8, Failure> {
    let config =
        Config::load(&args.config, &args.settings.overrides()).map_err(|error| Failure::no(error.to_string()))?;
    log_to_stderr(&config.log);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::no(format!("cannot start the threads of the gateway: {error}")))?;
    let served = runtime.block_on(serve(Arc::new(config)));
    // What is still written to the page store is written again after the VM's next move.
    runtime.shutdown_timeout(LONGEST_GOODBYE);
    served
}

/// How long work in the background may take once everything else has ended.
const LONGEST_GOODBYE: Duration = Duration::from_secs(10);

/// Opens everything that the gateway listens on locally, runs it, and closes in the opposite order.
async fn serve(config: Arc<Config>) -> Result<u8, Failure> {
    create_private(&config.state_dir)?;
    let socket = ControlSocket::bind(&config.control_socket()).map_err(|error| Failure::no(error.to_string()))?;
    let metrics = Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")));
    let listener =
        match config.metrics.listen {
            Some(address) => Some(TcpListener::bind(address).await.map_err(|error| {
                Failure::no(format!("cannot serve metrics on {address} (metrics.listen): {error}"))
            })?),
            None => None,
        };
    let drain = CancellationToken::new();
    drain_on_signals(&drain)?;

    let closing = CancellationToken::new();
    let (commands, requests) = mpsc::channel(COMMANDS_WAITING);
    let api = tokio::spawn(api::serve(socket, commands, closing.clone().cancelled_owned()));
    let scrapes = listener.map(|listener| {
        tokio::spawn(metrics::serve(
            listener,
            metrics.clone(),
            closing.clone().cancelled_owned(),
        ))
    });
    tracing::info!(site = config.site, state_dir = %config.state_dir.display(), "gateway started");

    let served = gateway::run(Arc::clone(&config), requests, Arc::clone(&metrics), drain).await;

    closing.cancel();
    // A client that does not read its answer must not keep the gateway from ending.
    let _ = tokio::time::timeout(CLOSING_DEADLINE, api).await;
    if let Some(scrapes) = scrapes {
        scrapes.abort();
    }
    served.map_err(|error| Failure::no(error.to_string()))?;
    tracing::info!("gateway stopped");
    Ok(YES)
}

fn create_private(directory: &Path) -> Result<(), Failure> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|error| {
            Failure::no(format!(
                "cannot create the directory {} (state_dir): {error}",
                directory.display()
            ))
        })
}

/// The first signal drains, the second ends the process as it is; the journal says how to go on.
fn drain_on_signals(drain: &CancellationToken) -> Result<(), Failure> {
    let listen = |kind| signal(kind).map_err(|error| Failure::no(format!("cannot listen to signals: {error}")));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let drain = drain.clone();
    tokio::spawn(async move {
        for signals in 0_u32.. {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if signals > 0 {
                tracing::warn!("ended by a second signal; migrations are taken up again at the next start");
                std::process::exit(1);
            }
            tracing::info!("draining: nothing new is taken, migrations that run are finished");
            drain.cancel();
        }
    });
    Ok(())
}

fn log_to_stderr(log: &Log) {
    let level = match log.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let lines = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr);
    // The first subscriber stays; a second call can only come from a program that has set its own.
    let _ = match log.format {
        LogFormat::Text => lines.with_ansi(false).try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
}

/// Requests of clients that may wait for the gateway; each waits for its answer, so this bounds nothing but memory.
const COMMANDS_WAITING: usize = 64;

/// Answers under way take no longer to be read.
const CLOSING_DEADLINE: Duration = Duration::from_secs(5);

const HELP: &str = "\
Examples:
  longhaul gateway
  longhaul gateway --config /etc/longhaul/gateway.toml --log-level debug
  LONGHAUL_LINK_RATE=500mbit longhaul gateway

Exit codes: 0 drained and ended, 1 ended by a second signal, 2 could not start: the configuration has mistakes, or a
port or the control socket is in use.";
