//! What peers open: control channels and lanes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;

use super::Core;
use super::channel::{Channel, ChannelError};
use super::destination::Attachment;
use super::lanes::{LaneMemory, Lanes};
use super::link_test::sink;
use super::offer::Offered;
use super::{offer, recovery, tunnel};
use crate::proto::page::{JournalId, MigrationId};
use crate::proto::wire::Request;
use crate::proto::wire::hello::{self, Agreement, Hello};
use crate::proto::wire::message::{DiskPlace, Placeable, Reply};
use crate::transport::{Bundle, CloseCode, PeerConnection};

/// How long a peer may take to say what it opened a channel for.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// What a peer said, and what follows from it and from its answer.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) journal: JournalId,
    agreement: Mutex<Agreement>,
}

impl Known {
    /// What sessions that the peer opens now go by: the peer opens none while it says hello again.
    pub(super) fn agreement(&self) -> Agreement {
        *self.agreement.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a peer's control connection until it closes.
pub(crate) async fn control(core: Arc<Core>, peer: String, connection: PeerConnection) {
    let mut known: Option<Arc<Known>> = None;
    loop {
        let channel = match connection.accept_bi().await {
            Ok((sender, receiver)) => Channel::new(&connection, sender, receiver),
            Err(error) => {
                tracing::debug!(peer, "control connection closed: {error}");
                return;
            }
        };
        if let Some(known) = &known {
            let (core, peer) = (Arc::clone(&core), peer.clone());
            let (known, connection) = (Arc::clone(known), connection.clone());
            // A request whose first packet is lost holds up no other; how many there are is bounded by the limit on open channels.
            tokio::spawn(async move {
                if let Err(error) = serve(&core, &peer, &known, channel).await {
                    complain(&peer, &connection, &error);
                }
            });
            continue;
        }
        match greet(&core, &peer, channel).await {
            Ok(greeted) => known = greeted.map(Arc::new),
            Err(error) => complain(&peer, &connection, &error),
        }
    }
}

/// What is no message ends the connection, anything else only its channel.
fn complain(peer: &str, connection: &PeerConnection, error: &ChannelError) {
    tracing::warn!(peer, "{error}");
    if matches!(error, ChannelError::Message(_)) {
        connection.close_with(CloseCode::Protocol, &error.to_string());
    }
}

/// The first request must be a hello; `None` where it was not, or nothing could be agreed on.
async fn greet(core: &Core, peer: &str, mut channel: Channel) -> Result<Option<Known>, ChannelError> {
    let Request::Hello(theirs) = request(&mut channel).await? else {
        reply(channel, Reply::Refused("a hello comes first".to_owned())).await?;
        return Ok(None);
    };
    let ours = core.links.answer().await;
    match ours.agree(&theirs) {
        Ok(agreement) => {
            tracing::info!(
                peer,
                site = theirs.site,
                software = theirs.software,
                version = agreement.version,
                "a peer connected"
            );
            reply(channel, Reply::Hello(ours)).await?;
            Ok(Some(Known {
                journal: theirs.journal,
                agreement: Mutex::new(agreement),
            }))
        }
        Err(error) => {
            reply(channel, Reply::Refused(error.to_string())).await?;
            Ok(None)
        }
    }
}

/// What was agreed may be old: from the answer on what follows from both hellos of now holds.
async fn greet_again(core: &Core, known: &Known, theirs: &Hello, channel: Channel) -> Result<(), ChannelError> {
    if known.agreement().version < hello::HELLO_AGAIN {
        return reply(channel, Reply::Refused("the hello came twice".to_owned())).await;
    }
    if theirs.journal != known.journal {
        return reply(channel, Reply::Refused("another gateway says hello here".to_owned())).await;
    }
    let ours = core.links.answer().await;
    match ours.agree(theirs) {
        Ok(agreement) if agreement.version != known.agreement().version => {
            reply(
                channel,
                Reply::Refused("the hello has other versions than before".to_owned()),
            )
            .await
        }
        Ok(agreement) => {
            *known.agreement.lock().unwrap_or_else(PoisonError::into_inner) = agreement;
            reply(channel, Reply::Hello(ours)).await
        }
        Err(error) => reply(channel, Reply::Refused(error.to_string())).await,
    }
}

async fn request(channel: &mut Channel) -> Result<Request, ChannelError> {
    tokio::time::timeout(REQUEST_DEADLINE, channel.receiver.receive())
        .await
        .map_err(|_| ChannelError::Closed)??
        .ok_or(ChannelError::Closed)
}

async fn serve(core: &Arc<Core>, peer: &str, known: &Arc<Known>, mut channel: Channel) -> Result<(), ChannelError> {
    let request = request(&mut channel).await?;
    let unplaced = |request, channel| offered(core, peer, known, request, vec![], channel);
    match request {
        Request::Hello(theirs) => greet_again(core, known, &theirs, channel).await,
        Request::Ping(number) => reply(channel, Reply::Pong(number)).await,
        Request::Drives { migration } => {
            let knows = known.agreement().version >= hello::HELD_DISKS;
            let answer = match recovery::drives(core, peer, migration).await {
                false if knows && recovery::is_followed(core, peer, migration) => Reply::Followed,
                drives => Reply::Drives(drives),
            };
            reply(channel, answer).await
        }
        Request::Check(offer) => unplaced(Placeable::Check { offer, disks: vec![] }, channel).await,
        Request::CheckWithDisks { offer, disks } => unplaced(Placeable::Check { offer, disks }, channel).await,
        Request::Open(offer) => {
            let (images, disks) = (vec![], vec![]);
            unplaced(Placeable::Open { offer, images, disks }, channel).await
        }
        Request::OpenKnowing { offer, images } => {
            let disks = vec![];
            unplaced(Placeable::Open { offer, images, disks }, channel).await
        }
        Request::OpenWithDisks { offer, images, disks } => {
            unplaced(Placeable::Open { offer, images, disks }, channel).await
        }
        Request::CheckCold(offer) => unplaced(Placeable::CheckCold(offer), channel).await,
        Request::OpenCold(offer) => unplaced(Placeable::OpenCold(offer), channel).await,
        Request::Placed { request, places } => offered(core, peer, known, request, places, channel).await,
        Request::Disks { migration, stream } => {
            tunnel::open_disks(Arc::clone(core), peer.to_owned(), known, migration, stream, channel).await;
            Ok(())
        }
        Request::Tunnel(offered) => {
            tunnel::open(Arc::clone(core), peer.to_owned(), known, offered, channel).await;
            Ok(())
        }
        Request::AttachTunnel { stream, epoch } => {
            let attachment = Attachment {
                channel,
                epoch: Some(epoch),
                peer_journal: known.journal,
            };
            tunnel::attach(core, peer, stream, attachment).await;
            Ok(())
        }
        Request::Test { test } => sink::serve(core, peer, test, channel).await,
        Request::Attach { migration, epoch } => {
            let attachment = Attachment {
                channel,
                epoch,
                peer_journal: known.journal,
            };
            attach(Arc::clone(core), peer.to_owned(), migration, attachment).await;
            Ok(())
        }
    }
}

/// A VM is offered, or asked about, with its disks where they come with it, some of them for places of their own.
async fn offered(
    core: &Arc<Core>,
    peer: &str,
    known: &Known,
    request: Placeable,
    places: Vec<DiskPlace>,
    channel: Channel,
) -> Result<(), ChannelError> {
    let against = match request {
        Placeable::Check { offer, disks } => {
            let offered = Offered {
                offer,
                images: vec![],
                disks,
                places,
            };
            offer::check(core, peer, known.agreement().limits, &offered).await
        }
        Placeable::CheckCold(offer) => offer::cold::check(core, peer, &offer, &places).await,
        Placeable::Open { offer, images, disks } => {
            let offered = Offered {
                offer,
                images,
                disks,
                places,
            };
            offer::open(Arc::clone(core), peer.to_owned(), known, offered, channel).await;
            return Ok(());
        }
        Placeable::OpenCold(offer) => {
            offer::cold::open(Arc::clone(core), peer.to_owned(), known, (offer, places), channel).await;
            return Ok(());
        }
    };
    reply(channel, Reply::Checked(against)).await
}

async fn reply(mut channel: Channel, reply: Reply) -> Result<(), ChannelError> {
    channel.sender.send(&reply).await?;
    channel.sender.finish();
    Ok(())
}

/// Hands a channel to the driver of its migration, which is started where only the journal knows of it.
async fn attach(core: Arc<Core>, peer: String, migration: MigrationId, attachment: Attachment) {
    let mut attachment = attachment;
    // One at a time, so that two channels for one migration do not start two drivers.
    let starting = core.starting_drivers.lock().await;
    if let Some(driver) = core.drivers.get(migration, &peer) {
        match driver.try_send(attachment) {
            Ok(()) => return,
            // It ended this moment: what it left in the journal answers.
            Err(TrySendError::Closed(back)) => attachment = back,
            Err(TrySendError::Full(back)) => {
                return back.refuse("it has other channels to look at first".to_owned()).await;
            }
        }
    }
    if let Err(reason) = recovery::answer_for(&core, &peer, migration, &mut attachment).await {
        tracing::warn!(%migration, peer, "{reason}");
        return attachment.refuse(reason).await;
    }
    drop(starting);
    if let Some(driver) = core.drivers.get(migration, &peer) {
        let _ = driver.send(attachment).await;
    }
}

/// The bulk connections on which each peer may open lanes: those of the newest link that it made. What lanes may hold is bounded for a link, so a
/// peer has one. Those that this gateway dialled are not among them: no lanes are taken from them.
#[derive(Debug, Default)]
pub(crate) struct BulkConnections(Mutex<HashMap<String, Newest>>);

#[derive(Debug)]
struct Newest {
    bundle: Bundle,
    connections: Vec<PeerConnection>,
    memory: Arc<LaneMemory>,
}

impl BulkConnections {
    /// Lanes come on this connection from now on, and count in the account that is returned. Those of the link before are closed: the peer gave
    /// it up, or breaks the rule. `None` where the link has all the connections that it may have.
    fn take(&self, peer: &str, connection: &PeerConnection) -> Option<Arc<LaneMemory>> {
        let mut links = self.links();
        let bundle = connection.bundle();
        if links.get(peer).is_none_or(|newest| newest.bundle != bundle) {
            let newest = Newest {
                bundle,
                connections: Vec::new(),
                memory: Arc::default(),
            };
            let before = links.insert(peer.to_owned(), newest);
            for older in before.iter().flat_map(|link| &link.connections) {
                older.close_with(CloseCode::Replaced, "a newer bulk connection of yours took over");
            }
        }
        let newest = links.get_mut(peer)?;
        if newest.connections.len() == usize::from(bundle.connections()) {
            return None;
        }
        newest.connections.push(connection.clone());
        Some(Arc::clone(&newest.memory))
    }

    /// This one is closed.
    fn remove(&self, peer: &str, connection: &PeerConnection) {
        let mut links = self.links();
        let Some(newest) = links.get_mut(peer) else { return };
        newest
            .connections
            .retain(|kept| kept.stable_id() != connection.stable_id());
        if newest.connections.is_empty() {
            links.remove(peer);
        }
    }

    fn links(&self) -> MutexGuard<'_, HashMap<String, Newest>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes lanes off a peer's bulk connection until it closes. To be called in the order in which connections come.
pub(crate) fn bulk(core: Arc<Core>, peer: String, connection: PeerConnection) {
    let Some(memory) = core.bulk.take(&peer, &connection) else {
        tracing::warn!(peer, "refusing a bulk connection: the link has all that it may have");
        return connection.close_with(CloseCode::Refused, "the link has all its bulk connections");
    };
    let lanes = Lanes::new(peer.clone(), connection.bundle().connections(), memory);
    tokio::spawn(async move {
        take_lanes(&core, &peer, &connection, Arc::new(lanes)).await;
        core.bulk.remove(&peer, &connection);
    });
}

async fn take_lanes(core: &Arc<Core>, peer: &str, connection: &PeerConnection, lanes: Arc<Lanes>) {
    loop {
        let stream = match connection.accept_uni().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(peer, "bulk connection closed: {error}");
                return;
            }
        };
        lanes.open(stream.id().index());
        let (core, peer) = (Arc::clone(core), peer.to_owned());
        let (lanes, connection) = (Arc::clone(&lanes), connection.clone());
        // Lanes are read side by side; how many there are is bounded by the limit on open lanes, their bytes by the window.
        tokio::spawn(async move {
            match lanes.take(&core, stream).await {
                Err(error) if error.is_breach() => {
                    tracing::warn!(peer, "closing the connection: {error}");
                    connection.close_with(CloseCode::Protocol, &error.to_string());
                }
                Err(error) => tracing::debug!(peer, "a lane was dropped: {error}"),
                Ok(()) => {}
            }
        });
    }
}
