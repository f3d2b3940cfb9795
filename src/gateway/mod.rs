//! The gateway of a site: accepts peers and commands, drives migrations, recovers what an earlier process left open.
//!
//! ```text
//! commands (api) ─▶ commands ─▶ migrate ─▶ source ──── contact, outbound ──▶ peer
//!                                            │
//!                       registry, journal, wanted, hooks, memory, links ◀── standing
//!                                            │
//! peer ──▶ accept ─▶ offer ─▶ destination ── contact, inbound ──▶ vmm
//!             ├────▶ link_test            disk of a VM ─▶ move_disk ─▶ another image
//! program ─▶ tunnel ─┘  (either end)            disks of a VM ─▶ disks ─▶ tunnel  (either end)
//! ```
//!
//! Drivers (`source`, `destination`) only route: what may be done is decided by `proto::ownership`, when to switch over by
//! `proto::precopy`, what goes on the wire by `proto::session`.

mod accept;
pub(crate) mod again;
pub(crate) mod channel;
pub(crate) mod clock;
mod commands;
mod contact;
pub(crate) mod copying;
mod destination;
mod destination_vmm;
mod directory;
pub(crate) mod disks;
pub(crate) mod forecasting;
pub(crate) mod history;
pub(crate) mod hooks;
mod inbound;
mod journal;
pub(crate) mod keeping;
mod lanes;
pub(crate) mod launches;
mod leftover;
mod link_test;
pub(crate) mod links;
pub(crate) mod memory;
mod move_disk;
mod offer;
pub(crate) mod outbound;
pub mod pairing;
pub(crate) mod random;
mod rates;
mod recovery;
pub(crate) mod registry;
pub(crate) mod share;
pub(crate) mod source;
pub(crate) mod source_vmm;
pub(crate) mod standing;
mod stream_socket;
mod tunnel;
pub(crate) mod vm_context;
mod vmm_input;
mod vmm_output;
pub(crate) mod wanted;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::accept::BulkConnections;
use self::destination::Attachment;
use self::directory::Directory;
use self::disks::rest;
use self::inbound::Inbound;
use self::journal::JournalHandle;
use self::launches::LOG_EXTENSION;
use self::link_test::sink::Sink;
use self::links::Links;
use self::memory::MemoryBudget;
use self::pairing::exchange::Invitations;
use self::rates::Rates;
use self::registry::Registry;
use self::tunnel::{Entrances, ListenError};
use self::wanted::WantedFiles;
use crate::api::Command;
use crate::config::Config;
use crate::hypervisor::image_server;
use crate::metrics::Metrics;
use crate::proto::ownership::Role;
use crate::proto::page::MigrationId;
use crate::store::journal::{Journal, JournalError};
use crate::store::pages::PageStore;
use crate::store::trust::{TrustError, TrustStore};
use crate::transport::{
    BindError, CloseCode, ConnectionKind, Identity, IdentityError, Transport, TransportSettings, TrustAnchors,
};

/// Without a packet from the peer for this long a connection is given up: the path is dead. QUIC waits for three of its probes in any
/// case, so that a longer path has more time (RFC 9000, 10.1).
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two looks at links for metrics, and at calendars.
const MEASURE: Duration = Duration::from_secs(1);

/// What every part of the gateway shares.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Arc<Config>,
    pub(crate) links: Arc<Links>,
    pub(crate) transport: Arc<Transport>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) anchors: Arc<TrustAnchors>,
    pub(crate) trust: Arc<TrustStore>,
    pub(crate) invitations: Mutex<Invitations>,
    pub(crate) journal: JournalHandle,
    pub(crate) registry: Registry,
    /// What was asked for here and is not over.
    pub(crate) wanted: WantedFiles,
    pub(crate) drivers: Directory<mpsc::Sender<Attachment>>,
    /// Held while a driver is started for a migration that only the journal knows.
    pub(crate) starting_drivers: tokio::sync::Mutex<()>,
    pub(crate) inbound: Directory<Arc<Inbound>>,
    /// Streams of tunnels that begin here, and those that end here.
    entrances: Directory<()>,
    exits: Directory<mpsc::Sender<Attachment>>,
    /// Where the disks of migrations that arrive are to be put: taken by the stream that brings them, and there for as long as they are awaited.
    disk_ends: Directory<Arc<Mutex<Option<UnixStream>>>>,
    /// Link tests of which this is the far end.
    tests: Directory<Arc<Sink>>,
    pub(crate) bulk: BulkConnections,
    pub(crate) memory: MemoryBudget,
    /// Where migrations leave what the next ones begin with, if anywhere.
    pub(crate) store: Option<Arc<PageStore>>,
    pub(crate) metrics: Arc<Metrics>,
    /// Hooks that run once a migration is over.
    pub(crate) after_hooks: TaskTracker,
    draining: CancellationToken,
}

/// Runs the gateway until `drain` is cancelled and the migrations that were open then are over.
///
/// # Errors
/// [`GatewayError`] where it cannot start; nothing has been touched then.
pub async fn run(
    config: Arc<Config>,
    commands: mpsc::Receiver<Command>,
    metrics: Arc<Metrics>,
    drain: CancellationToken,
) -> Result<(), GatewayError> {
    let now = clock::unix_ms();
    let journal_path = config.state_dir.join("journal");
    let journal = tokio::task::spawn_blocking(move || Journal::open(&journal_path, now))
        .await
        .expect("opening a journal does not panic")?;
    let open = journal.open_migrations();
    let owed = recovery::owed(journal.records());
    let ended = history::reports(journal.records(), &config.site);
    let journal = JournalHandle::spawn(journal, Arc::clone(&metrics));
    remove_left_over_sockets(&config);
    let wanted = WantedFiles::load(&config.state_dir);

    let store = keeping::open(&config).await;
    let identity = Identity::load_or_create(&config.state_dir, clock::wall())?;
    let trust = TrustStore::load(&config.state_dir)?;
    let anchors = Arc::new(TrustAnchors::default());
    for (name, peer) in trust.peers() {
        anchors.insert(peer.fingerprint, &name);
    }
    let trust = Arc::new(trust);
    let memory = MemoryBudget::new(config.memory_budget);
    let limits = memory.limits(&config);
    let farthest = config.peers.iter().filter_map(|peer| peer.rtt).max();
    let settings = TransportSettings {
        bulk_address: Some(config.bulk_listen()),
        link: config.link.rate,
        rtt: config.link.rtt.max(farthest.unwrap_or_default()),
        idle_timeout: IDLE_TIMEOUT,
        window_budget: limits.window_bytes,
        ..TransportSettings::new(config.listen)
    };
    let entrances = Entrances::bind(&config).await?;
    let transport = Arc::new(Transport::bind(settings, Arc::clone(&identity), Arc::clone(&anchors))?);
    let mut rates = Rates::default();
    rates.apply(&config, &transport, &trust, clock::timestamp());
    let links = Links::new(
        Arc::clone(&config),
        Arc::clone(&transport),
        Arc::clone(&trust),
        journal.id(),
        limits,
    );
    let core = Arc::new(Core {
        config,
        links: Arc::new(links),
        transport,
        identity,
        anchors,
        trust,
        invitations: Mutex::default(),
        journal,
        registry: Registry::default(),
        wanted,
        drivers: Directory::default(),
        starting_drivers: tokio::sync::Mutex::default(),
        inbound: Directory::default(),
        entrances: Directory::default(),
        exits: Directory::default(),
        disk_ends: Directory::default(),
        tests: Directory::default(),
        bulk: BulkConnections::default(),
        memory,
        store,
        metrics,
        after_hooks: TaskTracker::new(),
        draining: drain.clone(),
    });

    // Before any other is started.
    tokio::spawn(image_server::end_left(image_server::left_in(&core.config.state_dir)));
    launches::end_unrecorded(&core).await;
    launches::remove_silent_logs(&core).await;
    for (role, report) in &ended {
        core.registry.remember(report.clone(), *role, clock::now());
    }
    let owed_too = owed.iter().map(|migration| (*migration, Role::Destination));
    let taken_up: Vec<_> = open.iter().copied().chain(owed_too).collect();
    hooks::settle(&core, &ended, &taken_up);
    let undone = again::undone(&core).await;
    recovery::recover_all(&core, open).await;
    recovery::settle_owed(&core, owed).await;
    move_disk::recover(&core);
    again::take_up(&core, undone).await;
    let serving = [
        tokio::spawn(accept_peers(Arc::clone(&core))),
        tokio::spawn(commands::serve(Arc::clone(&core), commands)),
        tokio::spawn(commands::measure(Arc::clone(&core), MEASURE)),
        tokio::spawn(rates::follow(Arc::clone(&core), rates, MEASURE)),
        tokio::spawn(keeping::watch(Arc::clone(&core))),
        tokio::spawn(rest::expire(Arc::clone(&core))),
    ];
    let standing = tokio::spawn(standing::keep(Arc::clone(&core)));
    let entrances = tokio::spawn(entrances.serve(Arc::clone(&core)));
    core.metrics.set_ready(true);
    tracing::info!(control = %core.transport.control_address(), bulk = %core.transport.bulk_address(),
        fingerprint = %core.identity.fingerprint(), "ready");

    drain.cancelled().await;
    core.metrics.set_ready(false);
    entrances.abort();
    core.wait_for_open_migrations().await;
    core.after_hooks.close();
    if !core.after_hooks.is_empty() {
        tracing::info!(hooks = core.after_hooks.len(), "draining: waiting for hooks to end");
    }
    core.after_hooks.wait().await;
    standing.abort();
    core.transport
        .shutdown(CloseCode::Draining, "the gateway is being stopped")
        .await;
    for task in serving {
        task.abort();
    }
    Ok(())
}

/// Takes what peers open until the transport is shut down.
async fn accept_peers(core: Arc<Core>) {
    while let Some(incoming) = core.transport.accept().await {
        let core = Arc::clone(&core);
        match (incoming.kind, incoming.peer) {
            (ConnectionKind::Control, Some(peer)) => {
                tokio::spawn(accept::control(core, peer, incoming.connection));
            }
            (ConnectionKind::Bulk, Some(peer)) => {
                accept::bulk(core, peer, incoming.connection);
            }
            (ConnectionKind::Pairing, _) => {
                tokio::spawn(commands::answer_pairing(
                    core,
                    incoming.connection,
                    incoming.fingerprint,
                ));
            }
            (_, None) => incoming
                .connection
                .close_with(CloseCode::Unpaired, "the gateways are not paired"),
        }
    }
}

impl Core {
    /// Whether the gateway is being stopped.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// The socket of a migration's stream: short, since the kernel takes 107 bytes.
    pub(crate) fn stream_socket(&self, migration: MigrationId) -> PathBuf {
        let id = migration.to_string();
        self.config.state_dir.join(format!("{}.{SOCKET_EXTENSION}", &id[..12]))
    }

    /// The socket on which a migration's hypervisor serves its disks: as short as the stream's, and no hexadecimal number as that is.
    pub(crate) fn disk_socket(&self, migration: MigrationId) -> PathBuf {
        let id = migration.to_string();
        self.config.state_dir.join(format!("{}x.{SOCKET_EXTENSION}", &id[..11]))
    }

    /// Where a vmm that this gateway starts writes its output.
    pub(crate) fn vmm_log(&self, migration: MigrationId) -> PathBuf {
        self.config.state_dir.join(format!("vmm-{migration}.{LOG_EXTENSION}"))
    }

    /// Says, while it exists, that a vmm is being started for a migration that the journal does not know yet.
    pub(crate) fn launch_marker(&self, migration: MigrationId) -> PathBuf {
        self.config
            .state_dir
            .join(format!("vmm-{migration}.{}", launches::MARKER_EXTENSION))
    }

    /// Migrations that only wait for the peer, a person, or to be told to switch over are left to the next process: the journal has them, or what was
    /// asked for.
    /// Disks that move get to their end: whoever cannot wait cancels them.
    async fn wait_for_open_migrations(&self) {
        loop {
            let open = self.registry.open();
            let now = clock::unix_ms();
            let is_busy = |entry: &&Arc<registry::Entry>| !entry.needs_person() && !entry.waits(now);
            let busy = open.iter().filter(is_busy).count();
            let moves = self.registry.disk_moves();
            if busy == 0 && moves == 0 {
                return;
            }
            tracing::info!(
                migrations = busy,
                disk_moves = moves,
                "draining: waiting for migrations and moves of disks to end"
            );
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Sockets of streams that an earlier process left: nobody will ever connect to them.
fn remove_left_over_sockets(config: &Config) {
    let Ok(entries) = std::fs::read_dir(&config.state_dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == SOCKET_EXTENSION) {
            let _ = std::fs::remove_file(path);
        }
    }
}

const SOCKET_EXTENSION: &str = "stream";

/// The gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The ownership journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The site's key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Whom to trust.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// Where to listen.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Where programs connect.
    #[error(transparent)]
    Listen(#[from] ListenError),
}
