//! The end of a stream where it begins.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, copy};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use super::super::channel::{Channel, ChannelError};
use super::super::contact::{Contact, ContactEvent, Search};
use super::super::disks::stream_of;
use super::super::links::Link;
use super::super::memory::{Need, Reservation};
use super::super::outbound::{Outbound, StreamEnd, UNKNOWN_RATE};
use super::super::registry::Entry;
use super::super::share::Share;
use super::super::{Core, clock, random};
use super::answers::{MESSAGES_AHEAD, OutOfTurn, fresh};
use super::program::{Hold, Program, Writer};
use super::{MOST_CHUNKS, STREAMS, WINDOW};
use crate::api::Role;
use crate::metrics::{Carries, Direction, TunnelStream};
use crate::proto::page::{ByteRate, MigrationId};
use crate::proto::precopy::{Backlog, GoodputMeter, PathMeter};
use crate::proto::reduce::{DictionaryLimits, Effort, Reducer};
use crate::proto::session::Encoder;
use crate::proto::wire::hello;
use crate::proto::wire::message::TunnelOffer;
use crate::proto::wire::{Request, SessionMessage};

/// Between looks at the path.
const LOOK: Duration = Duration::from_millis(50);

/// How long a program waits until it is connected: the exit has 10 s to reach the other one.
const OPEN_DEADLINE: Duration = Duration::from_secs(30);

/// Carries what a program says, and what it is answered, until both have ended or it cannot go on.
pub(super) async fn carry(
    core: Arc<Core>,
    tunnel: String,
    peer: String,
    program: Program,
    opening: OwnedSemaphorePermit,
) {
    let stream = MigrationId(random::bytes());
    let _known = KnownHere::new(&core, &peer, stream);
    let whose = Whose {
        of: Of::Tunnel(tunnel.clone()),
        peer: peer.clone(),
        stream,
    };
    let begun = tokio::time::timeout(OPEN_DEADLINE, Opening::begin(&core, &whose)).await;
    let begun = begun.unwrap_or_else(|_| Err(format!("{peer} does not answer within {} s", OPEN_DEADLINE.as_secs())));
    drop(opening);
    match begun {
        Ok(opening) => {
            tracing::info!(tunnel, peer, %stream, "a stream begins");
            let share = Arc::new(Share::default());
            share.set_rate(core.config.migration.rate);
            let mut entrance = Entrance::new(Arc::clone(&core), whose, opening, program, share);
            let ended = entrance.run(|_| ()).await;
            entrance.finish(&ended).await;
        }
        Err(reason) => tracing::warn!(tunnel, peer, "a program's connection is closed: {reason}"),
    }
}

/// Carries the stream of a migration's disks, and says from time to time how many bytes of frames it has come to. Where this is dropped the stream is
/// stopped. It waits for the peer for as long as the migration does.
///
/// # Errors
/// A sentence.
pub(in crate::gateway) async fn carry_disks(
    core: &Arc<Core>,
    entry: &Entry,
    disks: UnixStream,
    tell: impl Fn(u64),
) -> Result<(), String> {
    let whose = Whose {
        of: Of::Migration(entry.migration),
        peer: entry.peer.clone(),
        stream: stream_of(entry.migration),
    };
    let _known = KnownHere::new(core, &whose.peer, whose.stream);
    let begun = tokio::time::timeout(OPEN_DEADLINE, Opening::begin(core, &whose)).await;
    let begun = begun.unwrap_or_else(|_| {
        let seconds = OPEN_DEADLINE.as_secs();
        Err(format!("{} does not answer within {seconds} s", entry.peer))
    });
    let opening = begun.map_err(|reason| format!("the disks cannot be sent: {reason}"))?;
    let share = Arc::clone(&entry.share);
    let mut entrance = Entrance::new(Arc::clone(core), whose, opening, disks.into(), share);
    let ended = entrance.run(tell).await;
    entrance.finish(&ended).await;
    ended
}

/// Says, while it exists, that a stream is carried from here: its exit asks where it has lost contact.
struct KnownHere<'a> {
    core: &'a Core,
    stream: MigrationId,
}

impl<'a> KnownHere<'a> {
    fn new(core: &'a Core, peer: &str, stream: MigrationId) -> Self {
        core.entrances.insert(stream, peer, ());
        Self { core, stream }
    }
}

impl Drop for KnownHere<'_> {
    fn drop(&mut self) {
        self.core.entrances.remove(self.stream);
    }
}

/// What a stream begins with.
struct Opening {
    link: Arc<Link>,
    channel: Channel,
    window_bytes: u64,
    limits: DictionaryLimits,
    memory: Reservation,
    /// Between the program and what is sent.
    pair: (UnixStream, UnixStream),
}

/// Which stream it is.
struct Whose {
    of: Of,
    peer: String,
    stream: MigrationId,
}

/// What a stream belongs to.
enum Of {
    /// The tunnel of this name.
    Tunnel(String),
    /// The disks of this migration.
    Migration(MigrationId),
}

impl Of {
    fn carries(&self) -> Carries {
        match self {
            Self::Tunnel(_) => Carries::Program,
            Self::Migration(_) => Carries::Disks,
        }
    }
}

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tunnel(name) => f.write_str(name),
            Self::Migration(migration) => write!(f, "disks of {migration}"),
        }
    }
}

impl Opening {
    async fn begin(core: &Core, whose: &Whose) -> Result<Self, String> {
        let Whose { of, peer, stream } = whose;
        let (first, what) = match of {
            Of::Tunnel(_) => (hello::TUNNELS, "tunnels"),
            Of::Migration(_) => (hello::DISKS, "disks"),
        };
        if matches!(of, Of::Tunnel(_)) && core.is_draining() {
            return Err("the gateway is being stopped".to_owned());
        }
        // Itself among them.
        if core.entrances.count_of(peer) > STREAMS {
            return Err(format!("{STREAMS} streams to {peer} are open already"));
        }
        let link = core.links.link(peer).await.map_err(|error| error.to_string())?;
        let _held = link.hold_agreement().await;
        let agreement = link.agreement();
        if agreement.version < first {
            return Err(format!(
                "{peer} has an older release, which knows no {what}: upgrade it"
            ));
        }
        let slots = agreement.limits.dictionary_pages.min(MOST_CHUNKS);
        let limits = DictionaryLimits::new(slots, 0).map_err(|error| error.to_string())?;
        let window_bytes = agreement.limits.window_bytes.min(WINDOW);
        let need = Need::at_entrance(window_bytes, limits);
        let memory = core
            .memory
            .reserve_for_stream(need)
            .map_err(|error| error.to_string())?;
        let pair = UnixStream::pair().map_err(|error| error.to_string())?;
        let offer = |tunnel| TunnelOffer {
            stream: *stream,
            tunnel,
            window_bytes,
            dictionary_pages: slots,
        };
        let request = match of {
            Of::Tunnel(name) => Request::Tunnel(offer(name.clone())),
            Of::Migration(migration) => Request::Disks {
                migration: *migration,
                stream: offer(String::new()),
            },
        };
        let open = async {
            let mut channel = Channel::open(link.control(), &request).await?;
            let first = channel.receiver.receive::<SessionMessage>().await?;
            Ok((channel, first))
        };
        match open.await.map_err(|error: ChannelError| error.to_string())? {
            (channel, Some(SessionMessage::Accepted { .. })) => Ok(Self {
                link,
                channel,
                window_bytes,
                limits,
                memory,
                pair,
            }),
            (_, Some(SessionMessage::Refused { reason })) => Err(reason),
            _ => Err(format!("{peer} does not say whether it takes the stream")),
        }
    }
}

/// One stream.
struct Entrance {
    core: Arc<Core>,
    whose: Whose,
    began: Instant,
    link: Arc<Link>,
    left_before: u64,
    outbound: Arc<Outbound>,
    end: Option<oneshot::Receiver<StreamEnd>>,
    sender: Option<AbortHandle>,
    share: Arc<Share>,
    goodput: GoodputMeter,
    path: PathMeter,
    contact: Contact,
    contact_events: mpsc::Receiver<ContactEvent>,
    lost_contact: Option<Instant>,
    /// Answers that have come, with the end's number.
    heard: u64,
    /// Of those, what the program has taken.
    written: watch::Receiver<u64>,
    /// To the program; none once their end has come.
    answers: Option<mpsc::Sender<Bytes>>,
    /// The exit says that its program has everything, and that ours has all the answers.
    given: bool,
    /// Between the program and us.
    pumps: JoinSet<Result<(), Gone>>,
    gone: Option<Gone>,
    hold: Hold,
    metrics: TunnelStream,
    _memory: Reservation,
}

impl Entrance {
    fn new(core: Arc<Core>, whose: Whose, opening: Opening, program: Program, share: Arc<Share>) -> Self {
        let Opening {
            link,
            channel,
            window_bytes,
            limits,
            memory,
            pair: (ours, mut theirs),
        } = opening;
        let encoder = Encoder::of_opaque(Reducer::new(limits, 0));
        let effort = Effort::for_link(link.capacity(), 1);
        let (outbound, end) = Outbound::start(ours, whose.stream, window_bytes, encoder, effort, 1);
        let outbound = Arc::new(outbound);
        let (events, contact_events) = mpsc::channel(64);
        let mut contact = Contact::new(events);
        contact.acknowledges(Arc::clone(&outbound));
        contact.adopt(channel);
        let (answers, to_write) = mpsc::channel(MESSAGES_AHEAD + 1);
        let (wrote, written) = watch::channel(0);
        let mut pumps = JoinSet::new();
        let Program {
            mut reader,
            writer,
            hold,
        } = program;
        pumps.spawn(async move {
            let copied = match copy(&mut reader, &mut theirs).await {
                Ok(_) => theirs.shutdown().await,
                Err(error) => Err(error),
            };
            copied.map_err(|error| Gone {
                error,
                _open: Some(theirs),
            })
        });
        pumps.spawn(write(writer, to_write, wrote));
        let metrics = core.metrics.tunnel_stream(Role::Source, whose.of.carries());
        let mut entrance = Self {
            core,
            whose,
            began: clock::now(),
            left_before: 0,
            outbound,
            end: Some(end),
            sender: None,
            share,
            goodput: GoodputMeter::default(),
            path: PathMeter::default(),
            contact,
            contact_events,
            lost_contact: None,
            heard: 0,
            given: false,
            written,
            answers: Some(answers),
            pumps,
            gone: None,
            hold,
            metrics,
            _memory: memory,
            link: Arc::clone(&link),
        };
        entrance.start_sending(link);
        entrance
    }

    /// Until both ways have ended, or it cannot go on.
    async fn run(&mut self, tell: impl Fn(u64)) -> Result<(), String> {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                Some(pumped) = self.pumps.join_next() => {
                    let ended = pumped.unwrap_or_else(|error| Err(std::io::Error::other(error).into()));
                    if let Err(gone) = ended {
                        let reason = format!("the program at the entrance is gone: {}", gone.error);
                        self.gone = Some(gone);
                        return Err(reason);
                    }
                }
                Some(event) = self.contact_events.recv() => self.on_contact(event)?,
                Ok(()) = self.written.changed() => self.tell().await,
                ended = ended(&mut self.end) => {
                    self.end = None;
                    if let StreamEnd::Failed(error) = ended {
                        return Err(error.to_string());
                    }
                }
                _ = looks.tick() => {
                    self.look()?;
                    tell(self.outbound.totals().wire_bytes);
                }
            }
            if self.given {
                tell(self.outbound.totals().wire_bytes);
                return Ok(());
            }
        }
    }

    fn look(&mut self) -> Result<(), String> {
        let now = clock::now();
        let acknowledged = self.outbound.acknowledged_bytes();
        self.goodput.observe(now, acknowledged);
        let saturated = self.outbound.was_saturated();
        self.path.observe(now, acknowledged, saturated);
        let found = self.goodput.best().unwrap_or(UNKNOWN_RATE).max(UNKNOWN_RATE);
        let promised = self.link.goodput().unwrap_or(found);
        // As for a migration: a third above what is measured leaves room to find that more goes.
        let measured = self.path.rate().map(|rate| ByteRate(rate.0 / 3 * 4).max(UNKNOWN_RATE));
        let rates = [measured, self.share.limit().rate()].into_iter().flatten();
        let goodput = rates.fold(promised, ByteRate::min);
        self.outbound
            .set_backlog(Backlog::at(goodput, 1.0), goodput, self.link.rtt());
        // An idle stream asks for nothing.
        if self.outbound.outstanding_bytes() > 0 || self.outbound.backlog_bytes() > 0 {
            self.link.ask(now, self.whose.stream, goodput);
        }
        let totals = self.outbound.totals();
        self.metrics.said(Direction::In, totals.vmm_bytes);
        self.metrics.frames(Direction::Out, totals.wire_bytes);
        let longest = self.core.config.migration.longest_cut;
        let cut = self.lost_contact.map(|lost| now.saturating_duration_since(lost));
        // A migration knows by itself when it has waited for too long, and when it must go on waiting.
        if matches!(self.whose.of, Of::Tunnel(_)) && cut.is_some_and(|cut| cut > longest) {
            return Err(format!(
                "{} cannot be reached for {} s",
                self.whose.peer,
                longest.as_secs()
            ));
        }
        Ok(())
    }

    fn on_contact(&mut self, event: ContactEvent) -> Result<(), String> {
        match event {
            ContactEvent::Made { link, channel, held } => {
                self.lost_contact = None;
                let left = self.link.bulk_left().saturating_sub(self.left_before);
                let epoch = self.outbound.epoch() + 1;
                self.outbound
                    .resume(epoch, &held, left)
                    .map_err(|error| format!("the stream cannot go on after the cut: {error}"))?;
                self.contact.adopt(channel);
                // What was told before may be lost.
                self.written.mark_changed();
                self.start_sending(link);
            }
            ContactEvent::Message { channel, message } if self.contact.is_current(channel) => {
                return self.on_message(message);
            }
            ContactEvent::Lost { channel, reason, .. }
                if self.contact.is_current(channel) || !self.contact.is_made() =>
            {
                self.contact.drop_channel();
                if self.lost_contact.is_none() {
                    tracing::warn!(tunnel = %self.whose.of, peer = self.whose.peer, stream = %self.whose.stream,
                        "contact lost: {reason}");
                    self.lost_contact = Some(clock::now());
                    self.contact.search(
                        Arc::clone(&self.core.links),
                        self.whose.peer.clone(),
                        self.whose.stream,
                        Search::Tunnel(self.outbound.epoch() + 1),
                    );
                }
            }
            ContactEvent::Impossible { reason } | ContactEvent::Refused { reason } => return Err(reason),
            ContactEvent::Message { .. } | ContactEvent::Lost { .. } | ContactEvent::GivenUp { .. } => {}
        }
        Ok(())
    }

    fn on_message(&mut self, message: SessionMessage) -> Result<(), String> {
        match message {
            SessionMessage::Answer { offset, bytes } => {
                let taken = *self.written.borrow();
                let fresh = fresh(self.heard, taken, offset, bytes.into()).map_err(|error| error.to_string())?;
                let Some(bytes) = fresh else { return Ok(()) };
                let out_of_turn = || OutOfTurn.to_string();
                let answers = self.answers.as_ref().ok_or_else(out_of_turn)?;
                self.heard += (bytes.len() as u64).max(1);
                self.metrics
                    .answered(Direction::Out, self.heard - u64::from(bytes.is_empty()));
                let ends = bytes.is_empty();
                answers.try_send(bytes).map_err(|_| out_of_turn())?;
                if ends {
                    self.answers = None;
                }
                Ok(())
            }
            SessionMessage::Failed { reason } => Err(reason),
            SessionMessage::Loaded => {
                // All of it, answers and acknowledgements, has come before.
                self.given = self.answers.is_none() && self.outbound.is_finished();
                let sentence = || format!("{} says that a stream has ended which has not", self.whose.peer);
                self.given.then_some(()).ok_or_else(sentence)
            }
            other => {
                tracing::debug!(stream = %self.whose.stream, ?other, "not a message of an exit");
                Ok(())
            }
        }
    }

    /// The program has taken answers.
    async fn tell(&mut self) {
        let until = *self.written.borrow_and_update();
        self.contact.send(&SessionMessage::AnswersTaken { until }).await;
    }

    fn start_sending(&mut self, link: Arc<Link>) {
        if let Some(sender) = self.sender.take() {
            sender.abort();
        }
        self.left_before = link.bulk_left();
        self.sender = Some(self.outbound.send_over(&link, &self.share));
        self.link = link;
    }

    async fn finish(mut self, ended: &Result<(), String>) {
        let _ = self.look();
        if let Err(reason) = ended {
            let cancel = SessionMessage::Cancel { reason: reason.clone() };
            self.contact.send(&cancel).await;
        }
        let Whose { of, peer, stream } = &self.whose;
        let totals = self.outbound.totals();
        let seconds = clock::now().saturating_duration_since(self.began).as_secs_f64();
        let (bytes, frame_bytes) = (totals.vmm_bytes, totals.wire_bytes);
        match ended {
            Ok(()) => {
                self.hold.release();
                tracing::info!(tunnel = %of, peer, %stream, bytes, frame_bytes, seconds, "a stream has ended");
            }
            Err(reason) => {
                tracing::warn!(tunnel = %of, peer, %stream, bytes, frame_bytes, seconds, "a stream has failed: {reason}");
            }
        }
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        self.outbound.stop();
        if let Some(sender) = self.sender.take() {
            sender.abort();
        }
    }
}

async fn ended(end: &mut Option<oneshot::Receiver<StreamEnd>>) -> StreamEnd {
    match end {
        Some(end) => end.await.unwrap_or(StreamEnd::Stopped),
        None => std::future::pending().await,
    }
}

/// A program cannot be read or written any more.
struct Gone {
    error: std::io::Error,
    /// What it said is cut off, and must not look as if it had ended: open until the stream is stopped.
    _open: Option<UnixStream>,
}

impl From<std::io::Error> for Gone {
    fn from(error: std::io::Error) -> Self {
        Self { error, _open: None }
    }
}

/// Gives a program its answers, and says how much of them it has taken. The end is an answer without bytes; without it they are cut off.
async fn write(mut writer: Writer, mut answers: mpsc::Receiver<Bytes>, wrote: watch::Sender<u64>) -> Result<(), Gone> {
    while let Some(bytes) = answers.recv().await {
        if bytes.is_empty() {
            writer.shutdown().await?;
            wrote.send_modify(|written| *written += 1);
            break;
        }
        writer.write_all(&bytes).await?;
        wrote.send_modify(|written| *written += bytes.len() as u64);
    }
    Ok(())
}
