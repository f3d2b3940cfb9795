//! The end of a stream where it leaves for its program.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::UnixStream;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::super::accept::Known;
use super::super::channel::Channel;
use super::super::contact::{Contact, ContactEvent};
use super::super::destination::Attachment;
use super::super::disks::stream_of;
use super::super::inbound::{Inbound, Progress, Shelf};
use super::super::memory::Need;
use super::super::offer;
use super::super::vmm_output::Tail;
use super::super::{Core, clock};
use super::answers::{Answers, LONGEST};
use super::program::{Hold, Program, Reader, Writer};
use super::{MOST_CHUNKS, STREAMS};
use crate::api::Role;
use crate::config::Place;
use crate::config::units::parse_name;
use crate::metrics::{Carries, Direction, TunnelStream};
use crate::proto::page::MigrationId;
use crate::proto::reduce::DictionaryLimits;
use crate::proto::session::Decoder;
use crate::proto::wire::SessionMessage;
use crate::proto::wire::hello::MIN_WINDOW;
use crate::proto::wire::message::{Held, TunnelOffer};

/// Between looks at the clock.
const LOOK: Duration = Duration::from_millis(500);

/// Later than the entrance, so that it is the entrance that gives up first and says so.
const LONGER_THAN_THE_ENTRANCE: Duration = Duration::from_secs(30);

/// Takes a stream to its program and sees it through to its end, or refuses it with one sentence.
pub(in crate::gateway) async fn open(
    core: Arc<Core>,
    peer: String,
    known: &Known,
    offer: TunnelOffer,
    channel: Channel,
) {
    let opening = match place(&core, &peer, &offer.tunnel) {
        Ok(place) => {
            let (site, tunnel) = (&core.config.site, &offer.tunnel);
            let program = async {
                let connected = Program::connect(place).await;
                connected.map_err(|error| format!("{site} cannot reach {place}, where {tunnel} ends: {error}"))
            };
            Opening::begin(&core, &peer, known, &offer, program).await
        }
        Err(reason) => Err(reason),
    };
    carry(Arc::clone(&core), peer, offer, None, opening, channel).await;
}

/// Takes the disks of a migration to the task that writes them, which waits for them, or refuses them.
pub(in crate::gateway) async fn open_disks(
    core: Arc<Core>,
    peer: String,
    known: &Known,
    migration: MigrationId,
    offer: TunnelOffer,
    channel: Channel,
) {
    let offer = TunnelOffer {
        tunnel: format!("disks of {migration}"),
        ..offer
    };
    let waiting = core.disk_ends.get(migration, &peer);
    let end = waiting.and_then(|end| end.lock().unwrap_or_else(PoisonError::into_inner).take());
    let opening = match end {
        Some(end) if offer.stream == stream_of(migration) => {
            Opening::begin(&core, &peer, known, &offer, async { Ok(end.into()) }).await
        }
        _ => Err(format!("{} waits for no disks of {migration}", core.config.site)),
    };
    carry(Arc::clone(&core), peer, offer, Some(migration), opening, channel).await;
}

async fn carry(
    core: Arc<Core>,
    peer: String,
    offer: TunnelOffer,
    disks_of: Option<MigrationId>,
    opening: Result<Opening, String>,
    mut channel: Channel,
) {
    let TunnelOffer { stream, tunnel, .. } = &offer;
    match opening {
        Ok(opening) => {
            tracing::info!(tunnel, peer, %stream, "a stream arrives");
            let mut exit = Exit::new(core, &peer, &offer, disks_of, opening);
            let ended = exit.run(channel).await;
            exit.finish(ended).await;
        }
        Err(reason) => {
            tracing::warn!(tunnel, peer, %stream, "refused: {reason}");
            let _ = channel.sender.send(&SessionMessage::Refused { reason }).await;
            channel.sender.finish();
        }
    }
}

/// Where a tunnel ends.
fn place<'a>(core: &'a Core, peer: &str, tunnel: &str) -> Result<&'a Place, String> {
    let site = &core.config.site;
    if core.is_draining() {
        return Err(format!("{site} is being stopped"));
    }
    if parse_name(tunnel).is_err() {
        return Err("that is no name of a tunnel".to_owned());
    }
    let exit = core.config.exits.iter().find(|exit| exit.name == *tunnel);
    let exit = exit.ok_or_else(|| {
        format!("{site} has no [[tunnel]] {tunnel} with a place to connect to: add it to its configuration")
    })?;
    if exit
        .from
        .as_ref()
        .is_some_and(|from| !from.iter().any(|name| name == peer))
    {
        return Err(format!("{site} takes no streams of {tunnel} from here"));
    }
    Ok(&exit.connect)
}

/// Hands a channel to the stream that it goes on with, or refuses it.
pub(in crate::gateway) async fn attach(core: &Core, peer: &str, stream: MigrationId, attachment: Attachment) {
    let mut attachment = attachment;
    if let Some(exit) = core.exits.get(stream, peer) {
        match exit.try_send(attachment) {
            Ok(()) => return,
            // It ended this moment, or is called more often than it can hear.
            Err(TrySendError::Closed(back) | TrySendError::Full(back)) => attachment = back,
        }
    }
    let reason = format!("{} has no stream {stream} that is open", core.config.site);
    attachment.refuse(reason).await;
}

/// What a stream begins with.
struct Opening {
    program: Program,
    decoder: Decoder<Shelf>,
    pair: (UnixStream, UnixStream),
    attachments: mpsc::Receiver<Attachment>,
}

impl Opening {
    async fn begin(
        core: &Arc<Core>,
        peer: &str,
        known: &Known,
        offer: &TunnelOffer,
        program: impl Future<Output = Result<Program, String>>,
    ) -> Result<Self, String> {
        let site = &core.config.site;
        let agreed = known.agreement().limits;
        if offer.dictionary_pages > agreed.dictionary_pages.min(MOST_CHUNKS)
            || !(MIN_WINDOW..=agreed.window_bytes).contains(&offer.window_bytes)
        {
            return Err("another size of window or dictionary was agreed".to_owned());
        }
        let limits = DictionaryLimits::new(offer.dictionary_pages, 0).map_err(|error| error.to_string())?;
        let need = Need::at_exit(offer.window_bytes, limits);
        let memory = core.memory.reserve_for_stream(need);
        let memory = memory.map_err(|error| format!("{site}: {error}"))?;
        let program = program.await?;
        let pair = UnixStream::pair().map_err(|error| format!("{site}: {error}"))?;
        let (decoder, _, _) = offer::shelf(core, limits, memory, None).await?;
        let (attach, attachments) = mpsc::channel(4);
        if core.exits.count_of(peer) >= STREAMS {
            return Err(format!("{STREAMS} streams from there are open at {site} already"));
        }
        if !core.exits.claim(offer.stream, peer, attach) {
            return Err(format!("{} is the name of a stream that is open", offer.stream));
        }
        Ok(Self {
            program,
            decoder,
            pair,
            attachments,
        })
    }
}

/// One stream.
struct Exit {
    core: Arc<Core>,
    tunnel: String,
    peer: String,
    stream: MigrationId,
    began: Instant,
    inbound: Arc<Inbound>,
    progress: watch::Receiver<Progress>,
    contact: Contact,
    contact_events: mpsc::Receiver<ContactEvent>,
    attachments: mpsc::Receiver<Attachment>,
    last_contact: Instant,
    answers: Answers,
    /// What the program writes; no bytes: it has ended.
    said: mpsc::Receiver<Bytes>,
    /// Between the program and us.
    pumps: JoinSet<std::io::Result<Option<Writer>>>,
    /// Where everything has been written that arrived. It is shut only where that was all.
    writer: Option<Writer>,
    written: bool,
    given: bool,
    /// The entrance has heard that, or does not carry the stream any more.
    left: bool,
    hold: Hold,
    metrics: TunnelStream,
    /// Of this migration, where it is not a tunnel's.
    disks_of: Option<MigrationId>,
}

impl Exit {
    fn new(core: Arc<Core>, peer: &str, offer: &TunnelOffer, disks_of: Option<MigrationId>, opening: Opening) -> Self {
        let Opening {
            program,
            decoder,
            pair: (ours, mut theirs),
            attachments,
        } = opening;
        let Program {
            reader,
            mut writer,
            hold,
        } = program;
        let carries = if disks_of.is_some() {
            Carries::Disks
        } else {
            Carries::Program
        };
        let inbound = Arc::new(Inbound::start(ours, offer.window_bytes, decoder, false, Tail::Passed));
        core.inbound.insert(offer.stream, peer, Arc::clone(&inbound));
        let mut pumps = JoinSet::new();
        pumps.spawn(async move {
            copy(&mut theirs, &mut writer).await?;
            Ok(Some(writer))
        });
        let (say, said) = mpsc::channel(1);
        pumps.spawn(read(reader, say));
        let (events, contact_events) = mpsc::channel(64);
        Self {
            tunnel: offer.tunnel.clone(),
            peer: peer.to_owned(),
            stream: offer.stream,
            began: clock::now(),
            progress: inbound.progress(),
            inbound,
            contact: Contact::new(events),
            contact_events,
            attachments,
            last_contact: clock::now(),
            answers: Answers::default(),
            said,
            pumps,
            writer: None,
            written: false,
            given: false,
            left: false,
            hold,
            metrics: core.metrics.tunnel_stream(Role::Destination, carries),
            disks_of,
            core,
        }
    }

    /// Until both ways have ended, or it cannot go on.
    async fn run(&mut self, channel: Channel) -> Result<(), String> {
        channel.sender.wait_for_others();
        self.contact.adopt(channel);
        let accepted = SessionMessage::Accepted { held: Held::default() };
        self.contact.send(&accepted).await;
        let mut looks = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                biased;
                Some(pumped) = self.pumps.join_next() => {
                    let ended = pumped.unwrap_or_else(|error| Err(std::io::Error::other(error)));
                    self.writer = ended.map_err(gone)?.or(self.writer.take());
                }
                Ok(()) = self.progress.changed() => {
                    if let Some(reason) = self.progress.borrow_and_update().failed.clone() {
                        return Err(reason);
                    }
                }
                Some(event) = self.contact_events.recv() => self.on_contact(event)?,
                Some(attachment) = self.attachments.recv() => self.on_attachment(attachment).await,
                Some(bytes) = self.said.recv(), if self.answers.has_room() => {
                    let answer = self.answers.say(bytes);
                    self.contact.send(&answer).await;
                }
                _ = looks.tick() => self.look()?,
                () = self.inbound.acknowledge_due() => self.acknowledge().await,
            }
            if self.progress.borrow().delivered
                && let Some(mut writer) = self.writer.take()
            {
                writer.shutdown().await.map_err(gone)?;
                self.written = true;
            }
            if !self.given && self.written && self.answers.are_over() {
                self.give().await;
            }
            if self.left {
                return Ok(());
            }
        }
    }

    /// The program has been given everything, and has had its answers taken: it is let go. The entrance is told, as often as it comes back, until
    /// it has heard.
    async fn give(&mut self) {
        self.given = true;
        self.hold.release();
        self.pumps = JoinSet::new();
        self.acknowledge().await;
        self.contact.send(&SessionMessage::Loaded).await;
    }

    fn look(&mut self) -> Result<(), String> {
        self.metrics.said(Direction::Out, self.inbound.vmm_bytes());
        self.metrics.frames(Direction::In, self.inbound.frame_bytes());
        self.metrics.answered(Direction::In, self.answers.bytes());
        let longest = self.core.config.migration.longest_cut + LONGER_THAN_THE_ENTRANCE;
        let silent = clock::now().saturating_duration_since(self.last_contact);
        let is_awaited = match self.disks_of {
            None => silent <= longest,
            // It is the migration that knows how long to wait.
            Some(migration) => self.core.disk_ends.get(migration, &self.peer).is_some(),
        };
        if !self.contact.is_made() && !is_awaited {
            return self.leave(format!("the entrance has not come back for {} s", silent.as_secs()));
        }
        Ok(())
    }

    fn on_contact(&mut self, event: ContactEvent) -> Result<(), String> {
        match event {
            ContactEvent::Message { channel, message } if self.contact.is_current(channel) => match message {
                SessionMessage::AnswersTaken { until } => {
                    self.answers.taken(until).map_err(|error| error.to_string())?;
                }
                SessionMessage::Cancel { reason } => return Err(reason),
                other => tracing::debug!(stream = %self.stream, ?other, "not a message of an entrance"),
            },
            ContactEvent::Lost { channel, reason, ended }
                if self.contact.is_current(channel) || !self.contact.is_made() =>
            {
                self.contact.drop_channel();
                // The entrance ends the channel of a stream that was given when it has heard that.
                self.left = self.given && ended;
                self.last_contact = clock::now();
                tracing::debug!(stream = %self.stream, "contact lost: {reason}");
                // It is the entrance that comes back. One that has ended, or was started anew, does not.
                let links = Arc::clone(&self.core.links);
                self.contact.enquire(links, self.peer.clone(), self.stream);
            }
            ContactEvent::GivenUp { .. } if !self.contact.is_made() => {
                return self.leave("the entrance does not carry the stream any more".to_owned());
            }
            _ => {}
        }
        Ok(())
    }

    /// Nobody is there to tell any more, which is no matter where everything was given.
    fn leave(&mut self, reason: String) -> Result<(), String> {
        self.left = true;
        if self.given { Ok(()) } else { Err(reason) }
    }

    /// The entrance is back.
    async fn on_attachment(&mut self, attachment: Attachment) {
        let Attachment { mut channel, epoch, .. } = attachment;
        let held = match self.inbound.resume(epoch.unwrap_or_default()) {
            Ok(held) => held,
            Err(error) => {
                let reason = error.to_string();
                let _ = channel.sender.send(&SessionMessage::Refused { reason }).await;
                return;
            }
        };
        if channel.sender.send(&SessionMessage::Accepted { held }).await.is_err() {
            return;
        }
        self.last_contact = clock::now();
        channel.sender.wait_for_others();
        self.contact.adopt(channel);
        self.acknowledge().await;
        for answer in self.answers.again() {
            self.contact.send(&answer).await;
        }
        if self.given {
            self.contact.send(&SessionMessage::Loaded).await;
        }
    }

    async fn acknowledge(&mut self) {
        let ack = SessionMessage::Ack {
            held: self.inbound.decoded(),
            vmm_bytes: self.inbound.vmm_bytes(),
            queued_bytes: self.inbound.queued_bytes(),
        };
        self.contact.send(&ack).await;
    }

    async fn finish(mut self, ended: Result<(), String>) {
        let _ = self.look();
        self.core.inbound.remove(self.stream);
        self.core.exits.remove(self.stream);
        let (tunnel, peer) = (&self.tunnel, &self.peer);
        let (stream, bytes) = (self.stream, self.inbound.vmm_bytes());
        let seconds = clock::now().saturating_duration_since(self.began).as_secs_f64();
        match ended {
            Ok(()) => {
                tracing::info!(tunnel, peer, %stream, bytes, seconds, "a stream has ended");
            }
            Err(reason) => {
                tracing::warn!(tunnel, peer, %stream, bytes, seconds, "a stream has failed: {reason}");
                self.contact.send(&SessionMessage::Failed { reason }).await;
            }
        }
        self.inbound.stop();
    }
}

/// Takes what a program writes, piece by piece as it is asked for; the last one is empty.
async fn read(mut reader: Reader, say: mpsc::Sender<Bytes>) -> std::io::Result<Option<Writer>> {
    loop {
        let mut piece = BytesMut::with_capacity(LONGEST);
        reader.read_buf(&mut piece).await?;
        let ends = piece.is_empty();
        if say.send(piece.freeze()).await.is_err() || ends {
            return Ok(None);
        }
    }
}

fn gone(error: std::io::Error) -> String {
    format!("the program at the exit is gone: {error}")
}
