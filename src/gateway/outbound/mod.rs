//! The source's data path: a vmm's socket → encoder → session → lanes.
//!
//! Three parties share one [`SourceSession`]: the *reader* takes bytes off the vmm's socket while the backlog is within its bound,
//! the *encoder* ([`encoding`]: threads of its own, since it hashes and compresses) turns them into frames, the *sender* puts frames on lanes as the
//! migration's limit and its turns on the link admit them. When the path slows down, frames pile up unsent, the reader stops, the vmm's socket fills and the vmm
//! sees a slower link: that is the only back-pressure there is, and it is the true one.

mod encoding;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::AbortHandle;

use super::clock;
use super::leftover::{Leftover, LeftoverSlot};
use super::links::Link;
use super::share::Share;
use super::source::LEAST_PAGE_BYTES;
use super::vmm_input::VmmInput;
use super::vmm_output::HELD_TAIL;
use crate::metrics::{Stage, Waiting};
use crate::proto::page::{ByteRate, MigrationId};
use crate::proto::precopy::rounds::Totals;
use crate::proto::precopy::{Backlog, Report, Restoring};
use crate::proto::reduce::{Effort, PageCounts};
use crate::proto::session::tail::{Protection, repair_frame};
use crate::proto::session::{EncodedFrame, Encoder, SessionError, SourceSession, StreamSummary, connection_of};
use crate::proto::wire::message::Held;
use crate::shaper::{Flow, Shaper};
use crate::transport::{Bulk, LaneError, send_lane};

pub(crate) use self::encoding::coders;

/// Chunks between reader and encoder: what the encoder is given next while it works.
const CHUNKS_AHEAD: usize = 2;

/// Waits are not shorter: the timer's step.
const PACING_STEP: Duration = Duration::from_millis(1);

/// What timers overshoot is made up for, up to this.
const CREDIT: Duration = Duration::from_millis(2);

/// Between looks at what waits, while the vmm is made to wait.
const WAITS_LOOK: Duration = Duration::from_millis(5);

/// Assumed until a rate is measured or configured.
pub(crate) const UNKNOWN_RATE: ByteRate = ByteRate(12_500_000);

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
    /// The vmm's socket failed, or the encoder.
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
    /// [`Backlog`], as three numbers.
    backlog_limit: AtomicU64,
    read_bytes: AtomicU64,
    ratio: AtomicU64,
    /// Bytes of the frame that is out of the session and not yet in QUIC: it waits for its turn or the window.
    leaving_bytes: AtomicU64,
    /// The sender found nothing to send since this was last asked.
    ran_dry: AtomicBool,
    /// The same, since the encoder last looked.
    starved: AtomicBool,
    /// Vmm bytes a second that the encoder takes while it works; 0 is unknown.
    encoder_rate: AtomicU64,
    /// Lane bytes that QUIC was given in this incarnation.
    given_bytes: AtomicU64,
    /// Of what the peer did not have after cuts, what QUIC had not sent before them.
    never_left_bytes: AtomicU64,
    /// Bytes of the vmm stream between the socket and a frame.
    encoding_bytes: AtomicU64,
    vmm_bytes: AtomicU64,
    /// Pages of the frames so far.
    counted_pages: AtomicU64,
    /// Where so many may have been read, nothing more is.
    hold_at: AtomicU64,
    frame_bytes: AtomicU64,
    pages: Mutex<PageCounts>,
    /// What the stream held, once it has ended.
    leftover: LeftoverSlot,
    restoring: Mutex<Restoring>,
    /// Frame bytes a second that the path takes.
    goodput: AtomicU64,
    /// Of the path.
    rtt_micros: AtomicU64,
    guest_stands: AtomicBool,
}

impl Outbound {
    /// Starts reader and encoder on the vmm's socket, with this effort at first and so many coders. The receiver learns how the stream ended.
    pub(crate) fn start(
        vmm: impl Into<VmmInput>,
        migration: MigrationId,
        window_bytes: u64,
        encoder: Encoder,
        effort: Effort,
        coders: usize,
    ) -> (Self, oneshot::Receiver<StreamEnd>) {
        let backlog = Backlog::at(UNKNOWN_RATE, 1.0);
        let shared = Arc::new(Shared {
            session: Mutex::new(SourceSession::new(migration, window_bytes)),
            to_send: Notify::new(),
            to_read: Notify::new(),
            stopped: AtomicBool::new(false),
            backlog_limit: AtomicU64::new(backlog.limit_bytes),
            read_bytes: AtomicU64::new(backlog.read_bytes),
            ratio: AtomicU64::new(backlog.ratio),
            leaving_bytes: AtomicU64::new(0),
            ran_dry: AtomicBool::new(true),
            starved: AtomicBool::new(false),
            encoder_rate: AtomicU64::new(0),
            given_bytes: AtomicU64::new(0),
            never_left_bytes: AtomicU64::new(0),
            encoding_bytes: AtomicU64::new(0),
            vmm_bytes: AtomicU64::new(0),
            counted_pages: AtomicU64::new(0),
            hold_at: AtomicU64::new(u64::MAX),
            frame_bytes: AtomicU64::new(0),
            pages: Mutex::default(),
            leftover: LeftoverSlot::default(),
            restoring: Mutex::default(),
            goodput: AtomicU64::new(UNKNOWN_RATE.0),
            rtt_micros: AtomicU64::new(0),
            guest_stands: AtomicBool::new(false),
        });
        let (chunks, to_encode) = mpsc::channel(CHUNKS_AHEAD);
        let (ended, end) = oneshot::channel();
        let encoding_shared = Arc::clone(&shared);
        let worker =
            tokio::task::spawn_blocking(move || encoding::encode(&encoding_shared, to_encode, encoder, effort, coders));
        let (reading, vmm) = (Arc::clone(&shared), vmm.into());
        tokio::spawn(async move {
            let read = read(&reading, vmm, chunks).await;
            let summary = worker.await;
            let _ = ended.send(match (read, summary) {
                (Ok(true), Ok(summary)) => StreamEnd::Eof(summary),
                (Err(error), _) => StreamEnd::Failed(error),
                (_, Err(error)) => StreamEnd::Failed(std::io::Error::other(error)),
                (Ok(false), Ok(_)) => StreamEnd::Stopped,
            });
        });
        (Self { shared }, end)
    }

    /// Sends the frames of this incarnation over `bulk` until one of its connections fails, the migration stops or the next incarnation
    /// begins. After a failure [`resume`](Self::resume) and call it again with new connections. `protects_tail`: what is in flight when the stream ends is
    /// followed by parity. `epoch`: the incarnation that goes over these connections; with the next one this ends.
    ///
    /// # Errors
    /// The connection's, as text for the operator.
    pub(crate) async fn send(
        &self,
        bulk: &Bulk,
        limit: &Shaper,
        mut flow: Flow,
        protects_tail: bool,
        epoch: u32,
    ) -> Result<(), LaneError> {
        let shared = &self.shared;
        loop {
            // Also of a frame that an earlier sender was about to send: it is among the unsent again.
            shared.leaving_bytes.store(0, Ordering::Relaxed);
            if shared.stopped.load(Ordering::Acquire) {
                return Ok(());
            }
            let notified = shared.to_send.notified();
            let (next, current) = {
                let mut session = shared.session();
                (session.poll_transmit(epoch), session.epoch())
            };
            if current != epoch {
                // What woke this sender is meant for its successor.
                shared.to_send.notify_one();
                return Ok(());
            }
            let Some(frame) = next else {
                if shared.session().unsent_bytes() == 0 {
                    shared.ran_dry.store(true, Ordering::Relaxed);
                    shared.starved.store(true, Ordering::Relaxed);
                }
                notified.await;
                continue;
            };
            let bytes = frame.lane_bytes();
            shared.leaving_bytes.store(bytes, Ordering::Relaxed);
            limit.admit(bytes).await;
            let turn = flow.turn(bytes).await;
            let sequence = frame.header.sequence;
            let connection = &bulk[connection_of(sequence, bulk.len())];
            let lane = send_lane(connection, &mut [frame.encode_header(), frame.payload]).await?;
            drop(turn);
            shared.given_bytes.fetch_add(bytes, Ordering::Relaxed);
            shared.session().sent_on(epoch, sequence, lane.id().index());
            shared.leaving_bytes.store(0, Ordering::Relaxed);
            shared.to_read.notify_one();
            if protects_tail {
                self.protect_tail(bulk, &mut flow).await?;
            }
        }
    }

    /// [`Self::send`] over a link, in a task of its own, as a share of it allows. A link that fails is closed, which ends the channel of whoever uses it.
    pub(crate) fn send_over(self: &Arc<Self>, link: &Arc<Link>, share: &Arc<Share>) -> AbortHandle {
        let (outbound, link, share) = (Arc::clone(self), Arc::clone(link), Arc::clone(share));
        let epoch = outbound.epoch();
        let flow = share.join(link.turns());
        let task = tokio::spawn(async move {
            let bulk = link.bulk();
            let sent = tokio::select! {
                sent = outbound.send(bulk, share.limit(), flow, link.protects_tail(), epoch) => sent,
                // Perhaps one to which nothing more is given, and which has not delivered what it was given.
                error = bulk.broken() => Err(LaneError::Connection(error)),
            };
            if let Err(error) = sent {
                // The control connection tells the driver: closed too, or lost over the same path.
                link.close_broken(&error.to_string());
            }
        });
        task.abort_handle()
    }

    /// Once the stream has ended and everything has left: parity over what is in flight.
    async fn protect_tail(&self, bulk: &Bulk, flow: &mut Flow) -> Result<(), LaneError> {
        let tail = self.shared.session().tail();
        for run in tail {
            if self.shared.stopped.load(Ordering::Acquire) || self.shared.session().is_finished() {
                break;
            }
            let first = run.frames.first().expect("a run has frames").0.header.sequence;
            let connection = &bulk[connection_of(first, bulk.len())];
            let protection = Protection::against(connection.loss_at_most(), connection.stats().mtu);
            let repair = tokio::task::spawn_blocking(move || repair_frame(&run, protection));
            let repair = repair.await.expect("computing parity does not panic");
            let _turn = flow.turn(repair.lane_bytes()).await;
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

    /// A new incarnation of the session, on a new connection. `left`: stream bytes that the one before it has sent.
    ///
    /// # Errors
    /// The peer's account of what it holds cannot be.
    pub(crate) fn resume(&self, epoch: u32, held: &Held, left: u64) -> Result<(), SessionError> {
        self.shared.session().resume(epoch, held)?;
        // What waited there may have been restored during the cut, and is told with the next acknowledgement.
        *self.shared.restoring() = Restoring::default();
        self.shared.to_read.notify_one();
        let never_left = self.shared.given_bytes.swap(0, Ordering::Relaxed).saturating_sub(left);
        self.shared.never_left_bytes.fetch_add(never_left, Ordering::Relaxed);
        self.shared.to_send.notify_one();
        Ok(())
    }

    /// Ends all three parties; the vmm's socket is closed.
    pub(crate) fn stop(&self) {
        self.shared.stop();
    }

    /// What may wait before the vmm is made to wait, on a path of this goodput and round trip time.
    pub(crate) fn set_backlog(&self, backlog: Backlog, goodput: ByteRate, rtt: Duration) {
        let rtt = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        self.shared.rtt_micros.store(rtt, Ordering::Relaxed);
        self.shared.goodput.store(goodput.0, Ordering::Relaxed);
        self.shared.backlog_limit.store(backlog.limit_bytes, Ordering::Relaxed);
        self.shared.read_bytes.store(backlog.read_bytes, Ordering::Relaxed);
        self.shared.ratio.store(backlog.ratio, Ordering::Relaxed);
        self.shared.to_read.notify_one();
    }

    /// The newest acknowledgement: so many bytes of frames wait at the destination for its decoder or vmm, and so many of the stream its vmm has taken.
    pub(crate) fn on_report(&self, bytes: u64, taken: u64) {
        let report = {
            let session = self.shared.session();
            Report {
                decoded_bytes: session.decoded_bytes(),
                queued_bytes: session.stream_bytes_waiting(bytes, taken),
                taken_bytes: taken.saturating_add(HELD_TAIL as u64),
                rtt: Duration::from_micros(self.shared.rtt_micros.load(Ordering::Relaxed)),
            }
        };
        self.shared.restoring().observe(clock::now(), report);
        self.shared.to_read.notify_one();
    }

    /// Whether the guest stands still. Its vmm is then not made to wait for what waits at the peer: nothing but the rest of the stream follows.
    pub(crate) fn set_guest_stands(&self, stands: bool) {
        self.shared.guest_stands.store(stands, Ordering::Relaxed);
        self.shared.to_read.notify_one();
    }

    /// Pages of the stream that have become frames.
    pub(crate) fn counted_pages(&self) -> u64 {
        self.shared.counted_pages.load(Ordering::Acquire)
    }

    /// From now on the vmm is made to wait where so many pages may have been read, but for one read more.
    pub(crate) fn hold_at(&self, pages: u64) {
        self.shared.hold_at.store(pages, Ordering::Relaxed);
        self.shared.to_read.notify_one();
    }

    /// The vmm is not made to wait for that any more.
    pub(crate) fn release(&self) {
        self.hold_at(u64::MAX);
    }

    /// Frame bytes that have been taken from the vmm and wait: here for the path, or there for the decoder.
    pub(crate) fn backlog_bytes(&self) -> u64 {
        self.shared.backlog()
    }

    /// Whether frames have been waiting for the path all the time since the last call.
    pub(crate) fn was_saturated(&self) -> bool {
        let waiting = self.shared.session().unsent_bytes() + self.shared.leaving_bytes.load(Ordering::Relaxed) > 0;
        !self.shared.ran_dry.swap(!waiting, Ordering::Relaxed) && waiting
    }

    /// Vmm bytes a second that the encoder takes while it works, once that is known.
    pub(crate) fn encoder_rate(&self) -> Option<ByteRate> {
        Some(ByteRate(self.shared.encoder_rate.load(Ordering::Relaxed))).filter(|rate| rate.0 > 0)
    }

    /// Vmm bytes a second that the far decoder takes, where it does not keep up.
    pub(crate) fn restorer_rate(&self) -> Option<ByteRate> {
        self.shared.restoring().rate(clock::now())
    }

    /// How long the far decoder will be busy with what is ahead of what is read now, once that gets there.
    pub(crate) fn lag(&self) -> Duration {
        let read = self.shared.vmm_bytes.load(Ordering::Relaxed);
        self.shared.restoring().lag(clock::now(), read)
    }

    /// Bytes sent and not yet acknowledged by the far decoder.
    pub(crate) fn outstanding_bytes(&self) -> u64 {
        self.shared.session().outstanding_bytes()
    }

    /// Frame bytes that the far decoder has acknowledged: those that exist and are not kept any more, whatever is sent again.
    pub(crate) fn acknowledged_bytes(&self) -> u64 {
        // Frames are counted under the session's lock.
        let session = self.shared.session();
        let kept = session.outstanding_bytes() + session.unsent_bytes();
        self.shared.frame_bytes.load(Ordering::Relaxed).saturating_sub(kept)
    }

    /// Frame bytes that had left, were lost with a path, and were sent again. Where other migrations share the link, at most this.
    pub(crate) fn resent_bytes(&self) -> u64 {
        let again = self.shared.session().resent_bytes();
        again.saturating_sub(self.shared.never_left_bytes.load(Ordering::Relaxed))
    }

    /// What waits on this side of the path. `unsent_in_quic`: of what QUIC was given, what it has not sent yet.
    pub(crate) fn waiting(&self, unsent_in_quic: u64) -> Waiting {
        let session = self.shared.session();
        // A frame that is held back counts as sent in the session.
        let held = self.shared.leaving_bytes.load(Ordering::Relaxed) + unsent_in_quic;
        Waiting::default()
            .with(Stage::Reduce, self.shared.encoding_bytes.load(Ordering::Relaxed))
            .with(Stage::Frames, session.unsent_bytes() + held)
            .with(Stage::Transport, session.outstanding_bytes().saturating_sub(held))
    }

    /// Pages so far, by how they were encoded.
    pub(crate) fn pages(&self) -> PageCounts {
        *self.shared.pages()
    }

    /// What the stream held, where it has ended and it is still there.
    pub(crate) fn take_leftover(&self) -> Option<Leftover> {
        self.shared.leftover.take()
    }

    /// Bytes so far.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            vmm_bytes: self.shared.vmm_bytes.load(Ordering::Relaxed),
            wire_bytes: self.shared.frame_bytes.load(Ordering::Relaxed),
        }
    }

    /// Whether the stream has ended and the far decoder has all of it.
    pub(crate) fn is_finished(&self) -> bool {
        self.shared.session().is_finished()
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

    fn restoring(&self) -> MutexGuard<'_, Restoring> {
        // Plain numbers, always consistent.
        self.restoring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pages(&self) -> MutexGuard<'_, PageCounts> {
        // Plain numbers, always consistent.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream goes on with `frame`; `last`: and ends.
    fn push(&self, frame: EncodedFrame, last: bool) {
        let stream_bytes = u64::from(frame.stream_bytes);
        let mut session = self.session();
        self.frame_bytes.fetch_add(frame.lane_bytes(), Ordering::Relaxed);
        session.push(frame, last);
        drop(session);
        // After its pages were counted: `is_held` may see both, and never neither.
        self.encoding_bytes.fetch_sub(stream_bytes, Ordering::Release);
        self.to_send.notify_one();
        self.to_read.notify_one();
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.to_send.notify_one();
        self.to_read.notify_one();
    }

    fn backlog(&self) -> u64 {
        self.waits_here() + self.waits_at_peer()
    }

    /// Whether the vmm is made to wait.
    fn is_full(&self) -> bool {
        let waits = if self.guest_stands.load(Ordering::Relaxed) {
            self.waits_here()
        } else {
            self.backlog()
        };
        waits > self.backlog_limit.load(Ordering::Relaxed) || self.is_held()
    }

    fn is_held(&self) -> bool {
        // What becomes a frame between the two is counted twice.
        let uncounted = self.encoding_bytes.load(Ordering::Acquire) / LEAST_PAGE_BYTES;
        let counted = self.counted_pages.load(Ordering::Acquire);
        counted + uncounted >= self.hold_at.load(Ordering::Relaxed)
    }

    fn waits_here(&self) -> u64 {
        self.session().unsent_bytes()
            + self.leaving_bytes.load(Ordering::Relaxed)
            + self.encoding_bytes.load(Ordering::Relaxed) / self.ratio.load(Ordering::Relaxed)
    }

    /// What is carried in the time for which what is read now will wait at the peer.
    fn waits_at_peer(&self) -> u64 {
        let read = self.vmm_bytes.load(Ordering::Relaxed);
        let wait = self.restoring().wait(clock::now(), read);
        ByteRate(self.goodput.load(Ordering::Relaxed)).bytes_in(wait)
    }
}

/// Reads until the vmm ends its stream (`true`) or the migration is stopped (`false`).
async fn read(shared: &Shared, mut vmm: VmmInput, chunks: mpsc::Sender<Bytes>) -> std::io::Result<bool> {
    let mut next = clock::now();
    loop {
        loop {
            let notified = shared.to_read.notified();
            if shared.stopped.load(Ordering::Acquire) {
                return Ok(false);
            }
            if !shared.is_full() {
                break;
            }
            // What waits at the peer becomes less by itself.
            let _ = tokio::time::timeout(WAITS_LOOK, notified).await;
        }
        let most = shared.read_bytes.load(Ordering::Relaxed) as usize;
        let stop = async {
            loop {
                let notified = shared.to_read.notified();
                if shared.stopped.load(Ordering::Acquire) {
                    break;
                }
                notified.await;
            }
        };
        let chunk = tokio::select! {
            read = vmm.read(most) => read?,
            () = stop => return Ok(false),
        };
        if chunk.is_empty() {
            return Ok(true);
        }
        let len = chunk.len() as u64;
        let now = clock::now();
        // A destination that does not keep up is given what it takes, rather than a queue.
        let stands = shared.guest_stands.load(Ordering::Relaxed);
        if let Some(rate) = shared.restoring().rate(now).filter(|_| !stands) {
            next = next.max(now.checked_sub(CREDIT).unwrap_or(now)) + rate.time_for(len);
        }
        shared.encoding_bytes.fetch_add(len, Ordering::Relaxed);
        shared.vmm_bytes.fetch_add(len, Ordering::Relaxed);
        if chunks.send(chunk).await.is_err() {
            return Ok(false);
        }
        if next > now + PACING_STEP {
            let stopped = async {
                while !shared.stopped.load(Ordering::Acquire) {
                    shared.to_read.notified().await;
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = stopped => return Ok(false),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    use super::*;

    const WINDOW: u64 = 8 << 20;

    /// An outbound stream with `frames` frames of plain bytes, and the vmm's end of its socket.
    async fn with_frames(frames: u64) -> (Outbound, UnixStream) {
        let (mut vmm, ours) = UnixStream::pair().unwrap();
        let (outbound, _) = Outbound::start(ours, MigrationId([7; 16]), WINDOW, Encoder::new(None), Effort::LEAST, 1);
        for frame in 1..=frames {
            vmm.write_all(&[1; 1000]).await.unwrap();
            let encoded = async {
                while outbound.shared.session().frames() < frame {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), encoded)
                .await
                .expect("what is written becomes a frame");
        }
        (outbound, vmm)
    }

    fn held(next: u64) -> Held {
        Held {
            next,
            beyond: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_vmm_waits_for_what_waits_at_the_peer_unless_its_guest_stands_still() {
        let (outbound, mut vmm) = with_frames(1).await;
        assert!(!outbound.shared.is_full());
        let report = Report {
            decoded_bytes: 0,
            queued_bytes: 1 << 30,
            taken_bytes: 0,
            rtt: Duration::ZERO,
        };
        outbound.shared.restoring().observe(clock::now(), report);
        // As if so much had been read.
        outbound.shared.vmm_bytes.store(1 << 30, Ordering::Relaxed);
        assert!(outbound.shared.is_full());
        outbound.set_guest_stands(true);
        assert!(!outbound.shared.is_full());
        vmm.write_all(&[1; 1000]).await.unwrap();
        vmm.write_all(&[1; 1000]).await.unwrap();
        let read = async {
            while outbound.totals().vmm_bytes < (1 << 30) + 2000 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), read)
            .await
            .expect("all of it is read");
    }

    #[tokio::test]
    async fn a_queue_that_a_peer_makes_up_is_no_more_than_what_was_sent() {
        let (outbound, _vmm) = with_frames(1).await;
        let before = outbound.backlog_bytes();
        outbound.on_report(u64::MAX, 0);
        assert_eq!(outbound.backlog_bytes(), before);
        outbound.on_report(u64::MAX, u64::MAX);
        assert_eq!(outbound.backlog_bytes(), before);
    }

    #[tokio::test]
    async fn more_than_the_backlog_allows_is_never_taken_from_the_vmm() {
        let (mut vmm, ours) = UnixStream::pair().unwrap();
        let (outbound, _) = Outbound::start(ours, MigrationId([7; 16]), WINDOW, Encoder::new(None), Effort::LEAST, 1);
        let backlog = Backlog::at(ByteRate(5_000_000), 1.0);
        outbound.set_backlog(backlog, ByteRate(5_000_000), Duration::ZERO);
        let most = backlog.limit_bytes + backlog.read_bytes;
        let feeding = tokio::spawn(async move { vmm.write_all(&[1; 4 << 20]).await });
        let full = async {
            while outbound.backlog_bytes() <= backlog.limit_bytes {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), full)
            .await
            .expect("the vmm has more than is taken");
        // Frames have headers of their own.
        assert!(
            outbound.totals().vmm_bytes <= most,
            "{} of {most}",
            outbound.totals().vmm_bytes
        );
        outbound.stop();
        feeding.abort();
    }

    #[tokio::test]
    async fn what_is_sent_again_after_a_cut_is_not_acknowledged() {
        let (outbound, _vmm) = with_frames(4).await;
        let epoch = outbound.epoch();
        let sent = std::iter::from_fn(|| outbound.shared.session().poll_transmit(epoch)).count();
        assert_eq!((sent, outbound.acknowledged_bytes()), (4, 0));
        outbound.on_ack(&held(1)).unwrap();
        let one = outbound.acknowledged_bytes();
        assert_eq!(one, outbound.totals().wire_bytes / 4);
        outbound.resume(1, &held(1), 0).unwrap();
        assert_eq!(outbound.acknowledged_bytes(), one);
        // The decoder went on while the source did not hear of it.
        outbound.resume(2, &held(3), 0).unwrap();
        assert_eq!(outbound.acknowledged_bytes(), 3 * one);
    }
}
