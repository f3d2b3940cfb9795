//! The source's data path: a vmm's socket → encoder → session → lanes.
//!
//! Three parties share one [`SourceSession`]: the *reader* takes bytes off the vmm's socket while the backlog is within its bound,
//! the *encoder* (a thread of its own: it hashes and compresses) turns them into frames, the *sender* puts frames on lanes as the
//! shapers admit them. When the path slows down, frames pile up unsent, the reader stops, the vmm's socket fills and the vmm
//! sees a slower link: that is the only back-pressure there is, and it is the true one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::metrics::{Stage, Waiting};
use crate::proto::page::MigrationId;
use crate::proto::precopy::rounds::Totals;
use crate::proto::reduce::PageCounts;
use crate::proto::session::tail::{Protection, repair_frame};
use crate::proto::session::{EncodedFrame, Encoder, SessionError, SourceSession, StreamSummary};
use crate::proto::wire::message::Held;
use crate::shaper::Shaper;
use crate::transport::{LaneError, send_lane};

/// Most bytes that are read from a vmm at once; one batch of the encoder.
const READ_BYTES: usize = 256 << 10;

/// Chunks between reader and encoder: what the encoder is given next while it works.
const CHUNKS_AHEAD: usize = 2;

/// The least backlog: below it a lane would go out half empty.
pub(crate) const LEAST_BACKLOG: u64 = 128 << 10;

/// One migration's stream on its way to the peer.
#[derive(Debug)]
pub(crate) struct Outbound {
    shared: Arc<Shared>,
}

/// How a stream ended at the source.
#[derive(Debug)]
pub(crate) enum StreamEnd {
    /// The vmm closed its socket after this stream. Whether that was success, the vmm has to be asked.
    Eof(StreamSummary),
    /// The vmm's socket failed.
    Failed(std::io::Error),
    /// The migration was given up before.
    Stopped,
}

#[derive(Debug)]
struct Shared {
    session: Mutex<SourceSession>,
    /// Something to send may exist.
    to_send: Notify,
    /// The backlog may have shrunk.
    to_read: Notify,
    stopped: AtomicBool,
    backlog_limit: AtomicU64,
    /// The sender found nothing to send since this was last asked.
    ran_dry: AtomicBool,
    /// Bytes of the vmm stream between the socket and a frame.
    encoding_bytes: AtomicU64,
    vmm_bytes: AtomicU64,
    frame_bytes: AtomicU64,
    pages: Mutex<PageCounts>,
    queued_at_peer: AtomicU64,
    sent_bytes: AtomicU64,
}

impl Outbound {
    /// Starts reader and encoder on the vmm's socket. The receiver learns how the stream ended.
    pub(crate) fn start(
        vmm: UnixStream,
        migration: MigrationId,
        window_bytes: u64,
        encoder: Encoder,
    ) -> (Self, oneshot::Receiver<StreamEnd>) {
        let shared = Arc::new(Shared {
            session: Mutex::new(SourceSession::new(migration, window_bytes)),
            to_send: Notify::new(),
            to_read: Notify::new(),
            stopped: AtomicBool::new(false),
            backlog_limit: AtomicU64::new(LEAST_BACKLOG),
            ran_dry: AtomicBool::new(true),
            encoding_bytes: AtomicU64::new(0),
            vmm_bytes: AtomicU64::new(0),
            frame_bytes: AtomicU64::new(0),
            pages: Mutex::default(),
            queued_at_peer: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        });
        let (chunks, to_encode) = mpsc::channel(CHUNKS_AHEAD);
        let (ended, end) = oneshot::channel();
        let encoding = Arc::clone(&shared);
        let worker = tokio::task::spawn_blocking(move || encode(&encoding, to_encode, encoder));
        let reading = Arc::clone(&shared);
        tokio::spawn(async move {
            let read = read(&reading, vmm, chunks).await;
            let summary = worker.await;
            let _ = ended.send(match (read, summary) {
                (Ok(true), Ok(summary)) => StreamEnd::Eof(summary),
                (Err(error), _) => StreamEnd::Failed(error),
                (Ok(false), _) | (_, Err(_)) => StreamEnd::Stopped,
            });
        });
        (Self { shared }, end)
    }

    /// Sends frames over `connection` until everything is sent, the connection fails or the migration stops. After a failure
    /// [`resume`](Self::resume) and call it again with a new connection. `protects_tail`: what is in flight when the stream ends is
    /// followed by parity.
    ///
    /// # Errors
    /// The connection's, as text for the operator.
    pub(crate) async fn send(
        &self,
        connection: &quinn::Connection,
        shapers: &[Arc<Shaper>],
        protects_tail: bool,
    ) -> Result<(), LaneError> {
        let shared = &self.shared;
        loop {
            if shared.stopped.load(Ordering::Acquire) {
                return Ok(());
            }
            let notified = shared.to_send.notified();
            let next = shared.session().poll_transmit();
            let Some(frame) = next else {
                if shared.session().unsent_bytes() == 0 {
                    shared.ran_dry.store(true, Ordering::Relaxed);
                }
                notified.await;
                continue;
            };
            let bytes = frame.lane_bytes();
            for shaper in shapers {
                shaper.admit(bytes).await;
            }
            let sequence = frame.header.sequence;
            let lane = send_lane(connection, &mut [frame.encode_header(), frame.payload]).await?;
            shared.session().sent_on(sequence, lane.id().index());
            shared.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
            shared.to_read.notify_one();
            if protects_tail {
                self.protect_tail(connection, shapers).await?;
            }
        }
    }

    /// Once the stream has ended and everything has left: parity over what is in flight.
    async fn protect_tail(&self, connection: &quinn::Connection, shapers: &[Arc<Shaper>]) -> Result<(), LaneError> {
        let tail = self.shared.session().tail();
        if tail.is_empty() {
            return Ok(());
        }
        let path = connection.stats().path;
        // What was not seen among so many packets is rarer than one of them.
        let loss = path.lost_packets.max(1) as f64 / path.sent_packets.max(1) as f64;
        let protection = Protection::against(loss, path.current_mtu);
        for run in tail {
            let repair = tokio::task::spawn_blocking(move || repair_frame(&run, protection));
            let repair = repair.await.expect("computing parity does not panic");
            for shaper in shapers {
                shaper.admit(repair.lane_bytes()).await;
            }
            send_lane(connection, &mut [repair.encode_header(), repair.payload]).await?;
        }
        Ok(())
    }

    /// The destination's decoder has these frames.
    ///
    /// # Errors
    /// The peer acknowledged what does not exist.
    pub(crate) fn on_ack(&self, held: &Held) -> Result<(), SessionError> {
        self.shared.session().on_ack(held)?;
        self.shared.to_send.notify_one();
        Ok(())
    }

    /// A new incarnation of the session, on a new connection.
    ///
    /// # Errors
    /// The peer's account of what it holds cannot be.
    pub(crate) fn resume(&self, epoch: u32, held: &Held) -> Result<(), SessionError> {
        self.shared.session().resume(epoch, held)?;
        self.shared.to_send.notify_one();
        Ok(())
    }

    /// Ends all three parties; the vmm's socket is closed.
    pub(crate) fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.to_send.notify_one();
        self.shared.to_read.notify_one();
    }

    /// Bytes that may wait unsent before the vmm is made to wait.
    pub(crate) fn set_backlog_limit(&self, bytes: u64) {
        self.shared
            .backlog_limit
            .store(bytes.max(LEAST_BACKLOG), Ordering::Relaxed);
        self.shared.to_read.notify_one();
    }

    /// What waits at the destination for its decoder or vmm, by the newest acknowledgement.
    pub(crate) fn set_queued_at_peer(&self, bytes: u64) {
        self.shared.queued_at_peer.store(bytes, Ordering::Relaxed);
        self.shared.to_read.notify_one();
    }

    /// Whether frames have been waiting for the path all the time since the last call.
    pub(crate) fn was_saturated(&self) -> bool {
        let waiting = self.shared.session().unsent_bytes() > 0;
        !self.shared.ran_dry.swap(!waiting, Ordering::Relaxed) && waiting
    }

    /// Frame bytes that the far decoder has acknowledged.
    pub(crate) fn acknowledged_bytes(&self) -> u64 {
        let outstanding = self.shared.session().outstanding_bytes();
        self.shared
            .sent_bytes
            .load(Ordering::Relaxed)
            .saturating_sub(outstanding)
    }

    /// What waits on this side of the path.
    pub(crate) fn waiting(&self) -> Waiting {
        let session = self.shared.session();
        Waiting::default()
            .with(Stage::Reduce, self.shared.encoding_bytes.load(Ordering::Relaxed))
            .with(Stage::Frames, session.unsent_bytes())
            .with(Stage::Transport, session.outstanding_bytes())
    }

    /// Pages so far, by how they were encoded.
    pub(crate) fn pages(&self) -> PageCounts {
        *self.shared.pages()
    }

    /// Bytes so far.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            vmm_bytes: self.shared.vmm_bytes.load(Ordering::Relaxed),
            wire_bytes: self.shared.frame_bytes.load(Ordering::Relaxed),
        }
    }

    /// The incarnation that is current.
    pub(crate) fn epoch(&self) -> u32 {
        self.shared.session().epoch()
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn session(&self) -> MutexGuard<'_, SourceSession> {
        // The session is left consistent by every method, also where a caller panicked after it.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pages(&self) -> MutexGuard<'_, PageCounts> {
        // Plain numbers, always consistent.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn backlog(&self) -> u64 {
        self.session().unsent_bytes()
            + self.encoding_bytes.load(Ordering::Relaxed)
            + self.queued_at_peer.load(Ordering::Relaxed)
    }
}

/// Reads until the vmm ends its stream (`true`) or the migration is stopped (`false`).
async fn read(shared: &Shared, mut vmm: UnixStream, chunks: mpsc::Sender<Bytes>) -> std::io::Result<bool> {
    let mut buffer = BytesMut::new();
    loop {
        loop {
            let notified = shared.to_read.notified();
            if shared.stopped.load(Ordering::Acquire) {
                return Ok(false);
            }
            if shared.backlog() <= shared.backlog_limit.load(Ordering::Relaxed) {
                break;
            }
            notified.await;
        }
        buffer.reserve(READ_BYTES);
        let stop = async {
            loop {
                let notified = shared.to_read.notified();
                if shared.stopped.load(Ordering::Acquire) {
                    break;
                }
                notified.await;
            }
        };
        let first = tokio::select! {
            read = vmm.read_buf(&mut buffer) => read?,
            () = stop => return Ok(false),
        };
        if first == 0 {
            return Ok(true);
        }
        // What is there already goes into the same batch: larger groups reduce better and cost fewer lanes.
        while buffer.len() < READ_BYTES {
            match vmm.try_read_buf(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let chunk = buffer.split().freeze();
        let len = chunk.len() as u64;
        shared.encoding_bytes.fetch_add(len, Ordering::Relaxed);
        shared.vmm_bytes.fetch_add(len, Ordering::Relaxed);
        if chunks.send(chunk).await.is_err() {
            return Ok(false);
        }
    }
}

/// The encoder's thread: until the reader has ended.
fn encode(shared: &Shared, mut chunks: mpsc::Receiver<Bytes>, mut encoder: Encoder) -> StreamSummary {
    let mut frames = Vec::new();
    while let Some(chunk) = chunks.blocking_recv() {
        encoder.feed(&chunk, &mut frames);
        *shared.pages() = encoder.pages();
        shared.push(&mut frames, false);
        shared.encoding_bytes.fetch_sub(chunk.len() as u64, Ordering::Relaxed);
        shared.to_read.notify_one();
    }
    let (summary, pages) = encoder.finish(&mut frames);
    *shared.pages() = pages;
    shared.push(&mut frames, true);
    summary
}

impl Shared {
    fn push(&self, frames: &mut Vec<EncodedFrame>, end: bool) {
        let count = frames.len();
        let mut session = self.session();
        for (at, frame) in frames.drain(..).enumerate() {
            self.frame_bytes.fetch_add(frame.lane_bytes(), Ordering::Relaxed);
            session.push(frame, end && at + 1 == count);
        }
        drop(session);
        self.to_send.notify_one();
    }
}
