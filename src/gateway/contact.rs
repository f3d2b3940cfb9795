//! Contact with the peer about one migration: a channel while there is one, and a task that looks for the next.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::channel::{Channel, ChannelError, ChannelSender};
use super::links::{Link, LinkError, Links};
use super::outbound::Outbound;
use crate::proto::page::{JournalId, MigrationId};
use crate::proto::wire::hello;
use crate::proto::wire::message::{Held, Reply};
use crate::proto::wire::{Request, SessionMessage};

/// First and longest pause between attempts to reach the peer.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_millis(500);

/// A peer that reads takes a message in a round trip. One whose link is dead is found out sooner.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// Datagrams that go twice from a message about ownership on: it, and QUIC's own that may leave before it. The guest stands still until it is
/// there; where it was lost (1 % of packets, 150 ms) it came 225 ms later (2026-11-28).
const AROUND_OWNERSHIP: u32 = 8;

/// The same for other messages. Acknowledgements are most of them: one that is lost holds up those behind it for more than a round trip, so that at
/// 1 % of loss the source heard nothing for half of the time (2026-11-28).
const AROUND_OTHERS: u32 = 2;

/// What a driver hears from its channel.
#[derive(Debug)]
pub(crate) enum ContactEvent {
    /// A channel is there: the link it runs over, and what the peer holds of the stream.
    Made {
        link: Arc<Link>,
        channel: Channel,
        held: Held,
    },
    /// The peer says something on the channel of this number. Acknowledgements go to the stream and are not told.
    Message { channel: u64, message: SessionMessage },
    /// The peer acknowledged what it cannot have.
    Impossible { reason: String },
    /// The channel of this number is gone. `ended`: the peer has finished it.
    Lost { channel: u64, reason: String, ended: bool },
    /// The peer does not take the stream on: told where that is final.
    Refused { reason: String },
    /// The source has been asked and does not drive the migration any more; its journal is this one.
    GivenUp { journal: JournalId },
}

/// What a new channel is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Search {
    /// A migration, and the incarnation of its stream, where it has one. Where the peer says no it is asked again: its journal knows the migration.
    Migration(Option<u32>),
    /// The next incarnation of a tunnel's stream. Where the peer says no, nothing is left there to go on with.
    Tunnel(u32),
}

/// The sending half of the current channel, if there is one.
#[derive(Debug)]
pub(crate) struct Contact {
    events: mpsc::Sender<ContactEvent>,
    /// What the peer acknowledges; empty where nothing is sent.
    stream: Arc<OnceLock<Arc<Outbound>>>,
    sender: Option<ChannelSender>,
    channel: u64,
    reader: Option<AbortHandle>,
    search: Option<AbortHandle>,
}

impl Contact {
    pub(crate) fn new(events: mpsc::Sender<ContactEvent>) -> Self {
        Self {
            events,
            stream: Arc::default(),
            sender: None,
            channel: 0,
            reader: None,
            search: None,
        }
    }

    /// Acknowledgements are of this stream. They go to it and not through the driver: a driver that waits for its hypervisor would
    /// hold up the stream for which that hypervisor waits, since QEMU answers nobody while it sends what is left of a paused guest.
    pub(crate) fn acknowledges(&mut self, stream: Arc<Outbound>) {
        // A migration has one stream.
        let _ = self.stream.set(stream);
    }

    /// Uses this channel from now on; what an older one still delivers is not heard any more.
    pub(crate) fn adopt(&mut self, channel: Channel) {
        let Channel { sender, receiver } = channel;
        self.drop_channel();
        self.stop_search();
        self.channel += 1;
        self.sender = Some(sender);
        let number = self.channel;
        let events = self.events.clone();
        let stream = Arc::clone(&self.stream);
        let mut receiver = receiver;
        let task = tokio::spawn(async move {
            loop {
                let event = match receiver.receive::<SessionMessage>().await {
                    Ok(Some(SessionMessage::Ack {
                        held,
                        vmm_bytes,
                        queued_bytes,
                    })) => {
                        let Some(outbound) = stream.get() else { continue };
                        match outbound.on_ack(&held) {
                            Ok(()) => {
                                outbound.on_report(queued_bytes, vmm_bytes);
                                continue;
                            }
                            Err(error) => ContactEvent::Impossible {
                                reason: error.to_string(),
                            },
                        }
                    }
                    Ok(Some(message)) => ContactEvent::Message {
                        channel: number,
                        message,
                    },
                    Ok(None) => ContactEvent::Lost {
                        channel: number,
                        reason: "the peer ended the channel".to_owned(),
                        ended: true,
                    },
                    Err(error) => ContactEvent::Lost {
                        channel: number,
                        reason: error.to_string(),
                        ended: false,
                    },
                };
                let lost = matches!(event, ContactEvent::Lost { .. });
                if events.send(event).await.is_err() || lost {
                    return;
                }
            }
        });
        self.reader = Some(task.abort_handle());
    }

    /// Whether an event is of the channel that is in use.
    pub(crate) fn is_current(&self, channel: u64) -> bool {
        channel == self.channel && self.sender.is_some()
    }

    /// Whether there is a channel.
    pub(crate) fn is_made(&self) -> bool {
        self.sender.is_some()
    }

    /// Says something, if there is a channel. A message may be lost; a channel that fails, or on which the peer does not let us speak, is given up.
    pub(crate) async fn send(&mut self, message: &SessionMessage) {
        let Some(sender) = &mut self.sender else { return };
        match message {
            // Bulk of its own.
            SessionMessage::Answer { .. } => {}
            SessionMessage::Ownership(_) => sender.doubling().of_next(AROUND_OWNERSHIP),
            _ if sender.doubling().is_far() => sender.doubling().of_next(AROUND_OTHERS),
            _ => {}
        }
        let sent = tokio::time::timeout(SEND_DEADLINE, sender.send(message)).await;
        if let Err(error) = sent.unwrap_or(Err(ChannelError::NotRead)) {
            tracing::debug!("a message to the peer was lost: {error}");
            let channel = self.channel;
            self.drop_channel();
            // The queue may be full of messages of the same channel; the driver reads them first.
            let events = self.events.clone();
            tokio::spawn(async move {
                events
                    .send(ContactEvent::Lost {
                        channel,
                        reason: error.to_string(),
                        ended: false,
                    })
                    .await
            });
        }
    }

    /// Gives up the channel without a word to the driver.
    pub(crate) fn drop_channel(&mut self) {
        if let Some(mut sender) = self.sender.take() {
            sender.finish();
        }
        if let Some(reader) = self.reader.take() {
            reader.abort();
        }
    }

    /// Looks for the peer until there is a channel again, which comes as [`ContactEvent::Made`] and is not yet adopted.
    pub(crate) fn search(&mut self, links: Arc<Links>, peer: String, migration: MigrationId, search: Search) {
        self.stop_search();
        let events = self.events.clone();
        let task = tokio::spawn(async move {
            let attempt = || async {
                match (attach(&links, &peer, migration, search).await, search) {
                    (Err(AttachError::Refused { reason }), Search::Tunnel(_)) => Ok(ContactEvent::Refused { reason }),
                    (attached, _) => attached,
                }
            };
            let made = repeat(&links, &peer, migration, attempt).await;
            let _ = events.send(made).await;
        });
        self.search = Some(task.abort_handle());
    }

    /// Asks a source that has gone, until there is a channel again, whether it still drives the migration. Where it does not,
    /// that comes as [`ContactEvent::GivenUp`].
    pub(crate) fn enquire(&mut self, links: Arc<Links>, peer: String, migration: MigrationId) {
        self.stop_search();
        let events = self.events.clone();
        let task = tokio::spawn(async move {
            let attempt = || ask(&links, &peer, migration);
            let given_up = repeat(&links, &peer, migration, attempt).await;
            let _ = events.send(given_up).await;
        });
        self.search = Some(task.abort_handle());
    }

    fn stop_search(&mut self) {
        if let Some(search) = self.search.take() {
            search.abort();
        }
    }
}

impl Drop for Contact {
    fn drop(&mut self) {
        self.drop_channel();
        self.stop_search();
    }
}

/// Attempts until one succeeds. Each has its time: a peer that was away when an attempt began is called anew rather than
/// waited for, since QUIC doubles the pauses between its calls.
async fn repeat<F: Future<Output = Result<ContactEvent, AttachError>>>(
    links: &Links,
    peer: &str,
    migration: MigrationId,
    attempt: impl Fn() -> F,
) -> ContactEvent {
    let mut pause = RETRY_FIRST;
    loop {
        match tokio::time::timeout(links.patience(peer), attempt()).await {
            Ok(Ok(event)) => return event,
            Ok(Err(error)) => tracing::debug!(%migration, peer, "no contact: {error}"),
            Err(_) => tracing::debug!(%migration, peer, "no contact: no answer in time"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

async fn ask(links: &Links, peer: &str, migration: MigrationId) -> Result<ContactEvent, AttachError> {
    let link = links.link(peer).await?;
    match Channel::ask(link.control(), &Request::Drives { migration }).await? {
        Reply::Drives(false) | Reply::Followed => Ok(ContactEvent::GivenUp {
            journal: link.peer_journal(),
        }),
        Reply::Drives(true) => Err(AttachError::StillDriven),
        _ => Err(ChannelError::Closed.into()),
    }
}

async fn attach(
    links: &Links,
    peer: &str,
    migration: MigrationId,
    search: Search,
) -> Result<ContactEvent, AttachError> {
    let link = links.link(peer).await?;
    let request = match search {
        Search::Migration(epoch) => Request::Attach { migration, epoch },
        Search::Tunnel(epoch) => Request::AttachTunnel {
            stream: migration,
            epoch,
        },
    };
    if matches!(search, Search::Tunnel(_)) && link.agreement().version < hello::TUNNELS {
        return Err(AttachError::Refused {
            reason: format!("{peer} has an older release now, which knows no tunnels"),
        });
    }
    let mut channel = Channel::open(link.control(), &request).await?;
    match channel.receiver.receive::<SessionMessage>().await? {
        Some(SessionMessage::Accepted { held }) => Ok(ContactEvent::Made { link, channel, held }),
        Some(SessionMessage::Refused { reason }) => Err(AttachError::Refused { reason }),
        Some(_) | None => Err(ChannelError::Closed.into()),
    }
}

#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the peer refused: {reason}")]
    Refused { reason: String },
    #[error("the peer still drives the migration")]
    StillDriven,
}
