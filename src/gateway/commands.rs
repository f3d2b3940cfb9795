//! Commands of the control API, and the look at connections that metrics need.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::pairing::{self, InviteCode, Local, exchange};
use super::registry::Entry;
use super::{Core, clock, link_test, move_disk};
use crate::api::{
    AcceptInvite, Command, Identity, Invitation, InviteRequest, PairByFingerprint, Paired, PeerStatus, Refusal,
    RefusalKind, Resolution, ResolveRequest, Role, Statement, Switchover, Trust,
};
use crate::config::PeerAddress;
use crate::metrics::{Direction, PeerMetrics};
use crate::migrate;
use crate::proto::ownership::{self, Claim};
use crate::proto::page::{ByteRate, MigrationId};
use crate::store::trust::Fingerprint;
use crate::transport::{Bundle, CloseCode, ConnectionKind, ConnectionMeasures, PeerConnection};

/// Answers commands until the last asker is gone.
pub(crate) async fn serve(core: Arc<Core>, mut commands: mpsc::Receiver<Command>) {
    while let Some(command) = commands.recv().await {
        answer(&core, command);
    }
}

/// What takes time is done on a task of its own: no command waits for another.
fn answer(core: &Arc<Core>, command: Command) {
    match command {
        Command::Start { request, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(migrate::start(&core, request).await) });
        }
        Command::Check { request, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(migrate::dry_run(&core, request).await) });
        }
        Command::List { reply } => {
            let now = clock::now();
            let known = core.registry.all();
            reply.send(Ok(known
                .iter()
                .filter(|entry| !entry.vm.is_empty())
                .map(|entry| entry.summary(now))
                .collect()));
        }
        Command::Status { migration, reply } => {
            reply.send(entry(core, migration).map(|entry| entry.status(clock::now())));
        }
        Command::Follow { migration, reply } => reply.send(entry(core, migration).map(|entry| entry.follow())),
        Command::Cancel { migration, reply } => {
            let requested = entry(core, migration).and_then(|entry| entry.request_cancel());
            let core = Arc::clone(core);
            tokio::spawn(async move {
                if requested.is_ok() {
                    // Not even a gateway that is killed now begins it again.
                    core.wanted.cancel(migration).await;
                }
                reply.send(requested);
            });
        }
        Command::SwitchOver { migration, reply } => {
            let ordered = entry(core, migration).and_then(|entry| entry.order_switchover(clock::unix_ms()));
            let core = Arc::clone(core);
            tokio::spawn(async move {
                if ordered == Ok(Switchover::Ordered) {
                    core.wanted.waits_no_more(migration, clock::unix_ms()).await;
                }
                reply.send(ordered);
            });
        }
        Command::Adjust {
            migration,
            adjustment,
            reply,
        } => {
            let adjusted = entry(core, migration).and_then(|entry| entry.adjust(&adjustment));
            let core = Arc::clone(core);
            tokio::spawn(async move {
                if adjusted.is_ok() {
                    core.wanted.adjust(migration, &adjustment).await;
                }
                reply.send(adjusted);
            });
        }
        Command::Resolve { request, by, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(resolve(&core, request, by).await) });
        }
        Command::TestLink { request, mut reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move {
                // Nobody waits for the figures any more: the link is free again at once.
                let tested = tokio::select! {
                    tested = link_test::source::run(&core, &request) => tested,
                    () = reply.abandoned() => return,
                };
                reply.send(tested);
            });
        }
        Command::MoveDisk { request, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(move_disk::start(&core, request).await) });
        }
        Command::CheckMoveDisk { request, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(move_disk::check(&core, request).await) });
        }
        Command::FollowMoveDisk { of, reply } => reply.send(move_disk::follow(core, &of)),
        Command::CancelMoveDisk { of, reply } => reply.send(move_disk::cancel(core, &of)),
        Command::Peers { reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(Ok(peers(&core).await)) });
        }
        Command::Invite { request, reply } => reply.send(invite(core, &request)),
        Command::AcceptInvite { request, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(accept_invite(&core, &request).await) });
        }
        Command::PairByFingerprint { request, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(pair_by_fingerprint(&core, request).await) });
        }
        Command::Unpair { peer, reply } => {
            let core = Arc::clone(core);
            tokio::spawn(async move { reply.send(unpair(&core, &peer).await) });
        }
        Command::Identity { reply } => reply.send(Ok(Identity {
            site: core.config.site.clone(),
            fingerprint: core.identity.fingerprint(),
            address: core.config.advertise.as_ref().map(ToString::to_string),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })),
    }
}

fn entry(core: &Core, migration: MigrationId) -> Result<Arc<Entry>, Refusal> {
    core.registry.get(migration).ok_or_else(|| {
        Refusal::new(
            RefusalKind::NotFound,
            format!("this gateway knows no migration {migration}; longhaul list shows those it knows"),
        )
    })
}

async fn resolve(core: &Core, request: ResolveRequest, by: String) -> Result<Resolution, Refusal> {
    let open = core.registry.open_for_vm(&request.vm).ok_or_else(|| {
        Refusal::new(
            RefusalKind::NotFound,
            format!(
                "no migration of {} is open here: there is nothing to resolve",
                request.vm
            ),
        )
    })?;
    let claim = match (request.statement, open.role) {
        (Statement::PeerIsFenced, _) => Claim::PeerIsFenced,
        (Statement::RunsAtPeer, Role::Source) | (Statement::LostHere, Role::Destination) => Claim::PeerOwns,
        (Statement::RunsAtPeer, Role::Destination) => {
            return Err(Refusal::new(
                RefusalKind::Conflict,
                format!(
                    "{} was to come here from {}: --runs-at-peer is said at the source; if the copy here is dead, say --lost-here",
                    request.vm, open.peer
                ),
            ));
        }
        (Statement::LostHere, Role::Source) => {
            return Err(Refusal::new(
                RefusalKind::Conflict,
                format!(
                    "{} was handed over from here, and its copy here is the one that is left if {} has none: --lost-here is said at \
                     the destination; if you see it run at {}, say --runs-at-peer",
                    request.vm, open.peer, open.peer
                ),
            ));
        }
    };
    let resolution = ownership::Resolution { claim, by };
    match open.resolve(resolution).await {
        Ok(result) => Ok(Resolution {
            migration: open.migration,
            result,
        }),
        Err(reason) => Err(Refusal::new(RefusalKind::Conflict, reason)),
    }
}

async fn peers(core: &Core) -> Vec<PeerStatus> {
    let mut trusted = core.trust.peers();
    let mut known: Vec<PeerStatus> = Vec::new();
    for configured in &core.config.peers {
        let paired = trusted.remove(&configured.name);
        let address = configured.address.clone().or_else(|| paired.as_ref()?.address.clone());
        known.push(peer_status(core, &configured.name, address, paired.map(|peer| peer.fingerprint)).await);
    }
    for (name, peer) in trusted {
        known.push(peer_status(core, &name, peer.address, Some(peer.fingerprint)).await);
    }
    known
}

async fn peer_status(
    core: &Core,
    name: &str,
    address: Option<PeerAddress>,
    fingerprint: Option<Fingerprint>,
) -> PeerStatus {
    // Somebody looks: a link that is not there is tried, shortly, so that the answer is of now.
    let second = core.config.peer(name).and_then(|peer| peer.second_address.as_ref());
    let link = match (fingerprint, address.as_ref().or(second)) {
        (Some(_), Some(_)) => tokio::time::timeout(LOOK_DEADLINE, core.links.link(name))
            .await
            .ok()
            .and_then(Result::ok),
        _ => None,
    };
    PeerStatus {
        name: name.to_owned(),
        address: address.map(|address| address.to_string()),
        trust: if fingerprint.is_some() {
            Trust::Paired
        } else {
            Trust::Unpaired
        },
        connected: link.is_some(),
        rtt_seconds: link.map(|link| link.rtt().as_secs_f64()),
        rate_bytes_per_second: core.config.peer_rate_at(name, clock::timestamp()).map(|rate| rate.0),
        fingerprint,
    }
}

const LOOK_DEADLINE: Duration = Duration::from_secs(3);

fn local(core: &Core) -> Local {
    Local {
        site: core.config.site.clone(),
        fingerprint: core.identity.fingerprint(),
        address: core
            .config
            .advertise
            .clone()
            .or_else(|| listen_address(core.transport.control_address())),
    }
}

/// The address that this gateway listens on, where that is one and not all.
fn listen_address(address: SocketAddr) -> Option<PeerAddress> {
    (!address.ip().is_unspecified()).then(|| PeerAddress {
        host: address.ip().to_string(),
        port: address.port(),
    })
}

fn invite(core: &Arc<Core>, request: &InviteRequest) -> Result<Invitation, Refusal> {
    let invalid = |message: String| Refusal::new(RefusalKind::Invalid, message);
    let local = local(core);
    let address = match &request.address {
        Some(text) => text.parse::<PeerAddress>().map_err(|error| invalid(format!("{text}: {error}")))?,
        None => local.address.clone().ok_or_else(|| {
            invalid(
                "the other site has to know where this gateway is: set `advertise` in its configuration, or give --address"
                    .to_owned(),
            )
        })?,
    };
    let valid_for = match request.valid_for_seconds {
        Some(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| invalid(error.to_string()))?,
        None => exchange::DEFAULT_VALIDITY,
    };
    let code = pairing::invite(&core.invitations, &local, address, valid_for).map_err(|error| {
        let kind = match error {
            pairing::InviteError::TooLong => RefusalKind::Invalid,
            _ => RefusalKind::Conflict,
        };
        Refusal::new(kind, error.to_string())
    })?;
    watch_invitations(core);
    Ok(Invitation {
        code: code.to_string(),
        valid_for_seconds: valid_for.as_secs_f64(),
    })
}

/// Unknown gateways may knock only while there is an invitation.
fn watch_invitations(core: &Arc<Core>) {
    core.transport.set_invitation(true);
    let core = Arc::clone(core);
    tokio::spawn(async move {
        while let Some(until) = open_until(&core) {
            tokio::time::sleep(until.saturating_duration_since(clock::now()) + Duration::from_millis(10)).await;
        }
        core.transport.set_invitation(false);
    });
}

fn open_until(core: &Core) -> Option<Instant> {
    core.invitations
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .open_until(clock::now())
}

async fn accept_invite(core: &Core, request: &AcceptInvite) -> Result<Paired, Refusal> {
    let code: InviteCode = request
        .code
        .trim()
        .parse()
        .map_err(|error: pairing::InvalidCode| Refusal::new(RefusalKind::Invalid, error.to_string()))?;
    let unavailable = |message: String| Refusal::new(RefusalKind::Unavailable, message);
    let address = super::links::resolve_address(&code.address)
        .await
        .map_err(unavailable)?;
    let connection = core
        .transport
        .dial_to_pair(address, code.fingerprint)
        .await
        .map_err(|error| unavailable(error.to_string()))?;
    let theirs = connection.fingerprint();
    let paired = pairing::join(&connection, &code, &local(core), theirs, &core.trust)
        .await
        .map_err(|error| Refusal::new(RefusalKind::Refused, error.to_string()))?;
    core.anchors.insert(paired.fingerprint, &paired.peer);
    tracing::info!(peer = paired.peer, fingerprint = %paired.fingerprint, "paired");
    Ok(paired)
}

/// A gateway with an unknown key knocks while an invitation is open.
pub(crate) async fn answer_pairing(core: Arc<Core>, connection: PeerConnection, theirs: Fingerprint) {
    match pairing::answer(&connection, &core.invitations, &local(&core), theirs, &core.trust).await {
        Ok(paired) => {
            core.anchors.insert(paired.fingerprint, &paired.peer);
            tracing::info!(peer = paired.peer, fingerprint = %paired.fingerprint, "paired");
        }
        Err(error) => tracing::warn!(fingerprint = %theirs, "{error}"),
    }
    if open_until(&core).is_none() {
        core.transport.set_invitation(false);
    }
}

async fn pair_by_fingerprint(core: &Core, request: PairByFingerprint) -> Result<Paired, Refusal> {
    let address = request
        .address
        .parse::<PeerAddress>()
        .map_err(|error| Refusal::new(RefusalKind::Invalid, format!("{}: {error}", request.address)))?;
    if request.fingerprint == core.identity.fingerprint() {
        return Err(Refusal::new(
            RefusalKind::Invalid,
            "that is the fingerprint of this gateway itself",
        ));
    }
    let paired = pairing::trust_by_fingerprint(&core.trust, &request.peer, request.fingerprint, Some(address))
        .await
        .map_err(|error| Refusal::new(RefusalKind::Conflict, error.to_string()))?;
    core.anchors.insert(paired.fingerprint, &paired.peer);
    tracing::info!(peer = paired.peer, fingerprint = %paired.fingerprint, "paired");
    Ok(paired)
}

async fn unpair(core: &Arc<Core>, peer: &str) -> Result<(), Refusal> {
    if let Some(open) = core.registry.open().iter().find(|entry| entry.peer == peer) {
        return Err(Refusal::new(
            RefusalKind::Conflict,
            format!(
                "{peer} takes part in migration {} of {}: let it end, cancel it or resolve it first",
                open.migration, open.vm
            ),
        ));
    }
    let trust = Arc::clone(&core.trust);
    let name = peer.to_owned();
    let removed = tokio::task::spawn_blocking(move || trust.remove(&name))
        .await
        .expect("removing trust does not panic")
        .map_err(|error| Refusal::new(RefusalKind::Internal, error.to_string()))?;
    let Some(removed) = removed else {
        return Err(Refusal::new(
            RefusalKind::NotFound,
            format!("{peer} is not paired; longhaul peers shows who is"),
        ));
    };
    core.invitations
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .withdraw(&removed.fingerprint);
    core.anchors.remove(peer);
    let reason = "the gateways are not paired any more";
    core.transport.close_peer(peer, CloseCode::Unpaired, reason);
    core.metrics.forget_peer(peer);
    tracing::info!(peer, "unpaired");
    Ok(())
}

/// Looks at every peer and connection from time to time, whoever opened it, and tells the metrics what has been added.
pub(crate) async fn measure(core: Arc<Core>, every: Duration) {
    let mut seen: HashMap<usize, ConnectionMeasures> = HashMap::new();
    let mut connected: HashSet<String> = HashSet::new();
    let mut shown: BTreeSet<String> = BTreeSet::new();
    loop {
        // Every trusted peer has its series from the start, reached or not, and loses them with the trust.
        let trusted: BTreeSet<String> = core.trust.peers().into_keys().collect();
        for peer in shown.difference(&trusted) {
            core.metrics.forget_peer(peer);
        }
        let unfinished = core.registry.open();
        let count = |matches: &dyn Fn(&Entry) -> bool| {
            let migrations = unfinished.iter().filter(|entry| matches(entry)).count();
            u32::try_from(migrations).unwrap_or(u32::MAX)
        };
        let time = clock::timestamp();
        let link_rate = core.config.link_rate_at(time);
        core.metrics.set_link_rate(link_rate.unwrap_or_default());
        for peer in &trusted {
            let metrics = core.metrics.peer(peer);
            metrics.set_open_migrations(count(&|entry| entry.peer == *peer));
            let rate = core.config.peer_rate_at(peer, time);
            metrics.set_rate(rate.unwrap_or_default());
        }
        core.metrics.set_in_doubt(count(&Entry::needs_person));
        core.metrics.add_shaper_wait(core.links.take_waited().await);

        let mut open: HashMap<usize, ConnectionMeasures> = HashMap::new();
        let mut reached: HashSet<String> = HashSet::new();
        // Of each link, in the order in which links were made.
        let mut controllers: Vec<(Bundle, PeerMetrics, bool, ByteRate)> = Vec::new();
        for connection in core.transport.open_connections() {
            let Some(peer) = connection.peer().filter(|peer| trusted.contains(*peer)) else {
                continue;
            };
            let now = connection.stats();
            let before = seen.get(&connection.stable_id()).copied().unwrap_or_default();
            let metrics = core.metrics.peer(peer);
            add(&metrics, &before, &now);
            core.metrics
                .add_shaper_wait(now.shaper_wait.saturating_sub(before.shaper_wait));
            open.insert(connection.stable_id(), now);
            match (connection.kind(), now.rate) {
                (ConnectionKind::Control, _) => {
                    metrics.set_rtt(now.rtt);
                    reached.insert(peer.to_owned());
                }
                (ConnectionKind::Bulk | ConnectionKind::Pairing, Some(rate)) => {
                    let bundle = connection.bundle();
                    match controllers.iter_mut().find(|(known, ..)| *known == bundle) {
                        Some((.., all)) => all.0 = all.0.saturating_add(rate.0),
                        None => controllers.push((bundle, metrics, connection.is_dialled(), rate)),
                    }
                }
                (ConnectionKind::Bulk | ConnectionKind::Pairing, None) => {}
            }
        }
        // The last one that is set stays: where there is one, of a link that was made from here, on which VMs go.
        controllers.sort_by_key(|(_, _, is_dialled, _)| *is_dialled);
        for (.., metrics, _, rate) in controllers {
            metrics.set_controller_rate(rate);
        }
        for peer in reached.difference(&connected) {
            core.metrics.peer(peer).connected();
        }
        for peer in connected.difference(&reached).filter(|peer| trusted.contains(*peer)) {
            core.metrics.peer(peer).disconnected();
        }
        (seen, connected, shown) = (open, reached, trusted);
        tokio::time::sleep(every).await;
    }
}

fn add(metrics: &PeerMetrics, before: &ConnectionMeasures, now: &ConnectionMeasures) {
    metrics.add_wan_bytes(
        Direction::Out,
        now.wire_bytes_sent.saturating_sub(before.wire_bytes_sent),
    );
    metrics.add_wan_bytes(
        Direction::In,
        now.wire_bytes_received.saturating_sub(before.wire_bytes_received),
    );
    metrics.add_packets(
        now.sent_packets.saturating_sub(before.sent_packets),
        now.lost_packets.saturating_sub(before.lost_packets),
    );
}
