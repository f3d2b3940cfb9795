//! The destination's data path: lanes → session → decoder → the vmm's socket, all but the held tail.
//!
//! Lanes arrive on tasks of their own and only sort their frame in. One *decoder* thread takes frames in order and restores
//! them; one *writer* task gives the bytes to the vmm. A vmm that reads slowly fills the queue between them, the decoder
//! stands still, acknowledgements stop and with them the source.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::leftover::{Leftover, LeftoverSlot};
use super::memory::Reservation;
use super::vmm_output::{Tail, VmmOutput};
use crate::metrics::{Stage, Waiting};
use crate::proto::reduce::{PageCounts, PageShelf, RestoreError, ShelfError};
use crate::proto::session::{DecodeError, Decoder, DestinationSession, SessionError, StreamSummary};
use crate::proto::wire::Frame;
use crate::proto::wire::message::Held;
use crate::store::pages::KnownShelf;

/// Restored frames between decoder and writer.
const RESTORED_AHEAD: usize = 4;

/// A shelf and the memory that is reserved for it.
#[derive(Debug)]
pub(crate) struct Shelf {
    pub(crate) shelf: KnownShelf,
    pub(crate) _memory: Reservation,
}

impl PageShelf for Shelf {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        self.shelf.put(slot, page)
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        self.shelf.get(slot, page)
    }
}

/// One migration's stream on its way from the peer.
#[derive(Debug)]
pub(crate) struct Inbound {
    shared: Arc<Shared>,
    release: Mutex<Option<oneshot::Sender<()>>>,
    outcome: watch::Receiver<Progress>,
}

/// How far the stream has come.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// Set once every frame is restored: what the destination computed, and how the pages came.
    pub(crate) restored: Option<(StreamSummary, PageCounts)>,
    /// Set once the vmm has taken everything, tail included.
    pub(crate) delivered: bool,
    /// Set where the stream cannot go on, with a sentence.
    pub(crate) failed: Option<String>,
    /// Because a page of the dictionary could not be read back.
    pub(crate) shelf_failed: bool,
}

#[derive(Debug)]
struct Shared {
    session: Mutex<Receiving>,
    arrived: Condvar,
    /// The decoder has moved on: an acknowledgement is due.
    acknowledge: Notify,
    stopped: AtomicBool,
    vmm_bytes: AtomicU64,
    /// Bytes of the frames that arrived, also again.
    frame_bytes: AtomicU64,
    /// Bytes of the frames that are restored and not yet given to the vmm.
    writing_bytes: AtomicU64,
    /// What the stream held, once all of it is restored.
    leftover: LeftoverSlot,
}

#[derive(Debug)]
struct Receiving {
    session: DestinationSession,
    /// Frames before this one are restored: what may be acknowledged.
    decoded: u64,
}

impl Inbound {
    /// Starts decoder and writer towards the vmm's socket. `keeps`: what the stream leaves is for the next one. `tail`: whether it waits for
    /// [`Self::release_tail`].
    pub(crate) fn start<S: PageShelf + Send + 'static>(
        vmm: UnixStream,
        window_bytes: u64,
        decoder: Decoder<S>,
        keeps: bool,
        tail: Tail,
    ) -> Self {
        let shared = Arc::new(Shared {
            session: Mutex::new(Receiving {
                session: DestinationSession::new(window_bytes),
                decoded: 0,
            }),
            arrived: Condvar::new(),
            acknowledge: Notify::new(),
            stopped: AtomicBool::new(false),
            vmm_bytes: AtomicU64::new(0),
            frame_bytes: AtomicU64::new(0),
            writing_bytes: AtomicU64::new(0),
            leftover: LeftoverSlot::default(),
        });
        let (progress, outcome) = watch::channel(Progress::default());
        let (release, released) = oneshot::channel();
        let (restored, to_write) = mpsc::channel(RESTORED_AHEAD);
        let progress = Arc::new(progress);

        let decoding = Arc::clone(&shared);
        let report = Arc::clone(&progress);
        let decoder = {
            let shared = Arc::clone(&shared);
            tokio::task::spawn_blocking(move || decode(&shared, decoder, &restored, keeps))
        };
        tokio::spawn(async move {
            let mut shelf_failed = false;
            let failed = match decoder.await {
                Ok(Ok(Some(summary))) => {
                    report.send_modify(|progress| progress.restored = Some(summary));
                    decoding.acknowledge.notify_one();
                    return;
                }
                Ok(Ok(None)) => return,
                Ok(Err(error)) => {
                    shelf_failed = matches!(
                        error,
                        InboundError::Decode(DecodeError::Restore(RestoreError::Shelf(_)))
                    );
                    error.to_string()
                }
                Err(error) => {
                    format!("this gateway's decoder ended: {error}: please report it, with the gateway's log")
                }
            };
            report.send_modify(|progress| {
                progress.failed = Some(failed);
                progress.shelf_failed = shelf_failed;
            });
        });

        let writing = Arc::clone(&shared);
        tokio::spawn(async move {
            match write(&writing, VmmOutput::new(vmm, tail), to_write, released).await {
                Ok(delivered) => progress.send_modify(|progress| progress.delivered = delivered),
                Err(error) => {
                    let text = format!("the destination's hypervisor stopped reading its migration stream: {error}");
                    progress.send_modify(|progress| progress.failed.get_or_insert(text).truncate(4096));
                }
            }
        });
        let inbound = Self {
            shared,
            release: Mutex::new(Some(release)),
            outcome,
        };
        if tail == Tail::Passed {
            inbound.release_tail();
        }
        inbound
    }

    /// Sorts a frame in.
    ///
    /// # Errors
    /// [`SessionError`]: [`SessionError::OldEpoch`] is harmless, anything else breaks the agreement.
    pub(crate) fn receive(&self, frame: Frame) -> Result<(), SessionError> {
        let bytes = frame.lane_bytes();
        self.shared.receiving().session.receive(frame)?;
        self.shared.frame_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shared.arrived.notify_one();
        Ok(())
    }

    /// Frames that a repair covers, those that have arrived; `None` where it has nothing to repair any more.
    pub(crate) fn frames_of(&self, epoch: u32, sequences: Range<u64>) -> Option<Vec<Option<Frame>>> {
        let receiving = self.shared.receiving();
        let session = &receiving.session;
        if session.epoch() != epoch || sequences.clone().all(|sequence| session.has(sequence)) {
            return None;
        }
        Some(sequences.map(|sequence| session.frame(sequence).cloned()).collect())
    }

    /// A new incarnation of the session begins: frames of older ones are refused. Returns what need not be sent again.
    ///
    /// # Errors
    /// [`SessionError::StaleEpoch`].
    pub(crate) fn resume(&self, epoch: u32) -> Result<Held, SessionError> {
        self.shared.receiving().session.resume(epoch)
    }

    /// Completes when the decoder has moved on since the last call.
    pub(crate) async fn acknowledge_due(&self) {
        self.shared.acknowledge.notified().await;
    }

    /// What the decoder has; frames that only wait for it are not in it.
    pub(crate) fn decoded(&self) -> Held {
        Held {
            next: self.shared.receiving().decoded,
            beyond: Vec::new(),
        }
    }

    /// Bytes of frames that wait for the decoder or, restored, for the vmm.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.shared.receiving().session.ready_bytes() + self.shared.writing_bytes.load(Ordering::Relaxed)
    }

    /// What waits on this side of the path.
    pub(crate) fn waiting(&self) -> Waiting {
        Waiting::default()
            .with(Stage::Restore, self.shared.receiving().session.ready_bytes())
            .with(Stage::Vmm, self.shared.writing_bytes.load(Ordering::Relaxed))
    }

    /// How far the stream has come; changes wake the receiver.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.outcome.clone()
    }

    /// Ownership has moved: the vmm is given the tail and the end of the stream. Only the first call does something.
    pub(crate) fn release_tail(&self) {
        if let Some(release) = self.release.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The writer is gone only where it has reported why.
            let _ = release.send(());
        }
    }

    /// Ends decoder and writer without delivering the tail.
    pub(crate) fn stop(&self) {
        drop(self.release.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.arrived.notify_all();
    }

    /// What the stream held, where all of it was restored and it is still there.
    pub(crate) fn take_leftover(&self) -> Option<Leftover> {
        self.shared.leftover.take()
    }

    /// Bytes that the vmm has taken.
    pub(crate) fn vmm_bytes(&self) -> u64 {
        self.shared.vmm_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of frames that arrived, also those that arrived again after a cut.
    pub(crate) fn frame_bytes(&self) -> u64 {
        self.shared.frame_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn receiving(&self) -> MutexGuard<'_, Receiving> {
        // The session is left consistent by every method, also where a caller panicked after it.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next frame in order; `None` once the stream is complete or stopped.
    fn next_frame(&self) -> Result<Option<Frame>, SessionError> {
        let mut receiving = self.receiving();
        loop {
            if self.stopped.load(Ordering::Acquire) {
                return Ok(None);
            }
            if let Some(frame) = receiving.session.poll_frame()? {
                return Ok(Some(frame));
            }
            if receiving.session.is_finished() {
                return Ok(None);
            }
            receiving = self.arrived.wait(receiving).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A frame on its way from the decoder to the writer.
struct Restored {
    bytes: Bytes,
    held: bool,
    last: bool,
    lane_bytes: u64,
}

/// The decoder's thread. The summary, where the stream was restored to its end.
fn decode<S: PageShelf + Send + 'static>(
    shared: &Shared,
    mut decoder: Decoder<S>,
    restored: &mpsc::Sender<Restored>,
    keeps: bool,
) -> Result<Option<(StreamSummary, PageCounts)>, InboundError> {
    while let Some(frame) = shared.next_frame()? {
        let bytes = decoder.restore(&frame)?;
        let lane_bytes = frame.lane_bytes();
        shared.writing_bytes.fetch_add(lane_bytes, Ordering::Relaxed);
        if restored
            .blocking_send(Restored {
                bytes,
                held: frame.header.held,
                last: frame.header.last,
                lane_bytes,
            })
            .is_err()
        {
            return Ok(None);
        }
        shared.receiving().decoded = frame.header.sequence + 1;
        shared.acknowledge.notify_one();
        if frame.header.last {
            let ended = (decoder.summary(), decoder.pages());
            shared.leftover.put(Leftover::of_decoder(decoder, keeps));
            return Ok(Some(ended));
        }
    }
    Ok(None)
}

/// The writer: everything but the tail as it comes; the tail when released. `true` where the vmm has it all.
async fn write(
    shared: &Shared,
    mut output: VmmOutput<UnixStream>,
    mut restored: mpsc::Receiver<Restored>,
    released: oneshot::Receiver<()>,
) -> std::io::Result<bool> {
    let mut is_whole = false;
    while let Some(Restored {
        bytes,
        held,
        last,
        lane_bytes,
    }) = restored.recv().await
    {
        is_whole = last;
        output.write(bytes, held).await?;
        shared.vmm_bytes.store(output.written(), Ordering::Relaxed);
        let writing = shared.writing_bytes.fetch_sub(lane_bytes, Ordering::Relaxed) - lane_bytes;
        if writing == 0 {
            // The newest acknowledgement told of a queue. Should the source wait for it to shrink, nothing else would tell it.
            shared.acknowledge.notify_one();
        }
    }
    // A decoder that has failed has not come to the end; the vmm hears of it after those who wait for a reason.
    if shared.stopped.load(Ordering::Acquire) || released.await.is_err() || !is_whole {
        return Ok(false);
    }
    output.release().await?;
    shared.vmm_bytes.store(output.written(), Ordering::Relaxed);
    output.end().await?;
    Ok(true)
}

#[derive(Debug, thiserror::Error)]
enum InboundError {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::MigrationId;
    use crate::proto::reduce::{DictionaryLimits, Reducer};
    use crate::proto::session::{EncodedFrame, Encoder, SourceSession};

    /// A shelf with a mistake in it.
    struct Broken;

    impl PageShelf for Broken {
        fn put(&mut self, slot: u32, _: &[u8]) -> Result<(), ShelfError> {
            panic!("no slot {slot}")
        }

        fn get(&mut self, slot: u32, _: &mut [u8]) -> Result<(), ShelfError> {
            panic!("no slot {slot}")
        }
    }

    /// A page that has to be put on the shelf.
    fn frames() -> Vec<EncodedFrame> {
        let mut stream = b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
        stream.extend((0x1000_u64 | 4).to_be_bytes());
        stream.extend(b"\x01r");
        stream.extend(0x1000_u64.to_be_bytes());
        stream.extend(0x10_u64.to_be_bytes());
        stream.extend(b"\x02\0\0\0\x02");
        stream.extend(8_u64.to_be_bytes());
        stream.extend(b"\x01r");
        stream.extend([7; 0x1000]);
        stream.extend(0x10_u64.to_be_bytes());
        let mut frames = Vec::new();
        let mut encoder = Encoder::new(Some(Reducer::new(DictionaryLimits::new(16, 4).unwrap(), 16)));
        encoder.feed(&stream, &mut frames);
        let (_, pages) = encoder.finish(&mut frames);
        assert_eq!(pages.literal + pages.raw, 1);
        frames
    }

    #[tokio::test]
    async fn a_decoder_that_panics_fails_its_migration() {
        let limits = DictionaryLimits::new(16, 4).unwrap();
        let (vmm, _other) = UnixStream::pair().unwrap();
        let inbound = Inbound::start(vmm, 1 << 20, Decoder::new(Some((limits, Broken))), false, Tail::Held);
        let mut source = SourceSession::new(MigrationId([1; 16]), 1 << 20);
        for frame in frames() {
            source.push(frame, false);
        }
        while let Some(frame) = source.poll_transmit(0) {
            inbound.receive(frame).unwrap();
        }
        let mut progress = inbound.progress();
        let failed = progress.wait_for(|progress| progress.failed.is_some()).await.unwrap();
        assert!(failed.failed.as_ref().unwrap().contains("panic"), "{failed:?}");
    }
}
