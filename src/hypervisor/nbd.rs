//! A client of one NBD export over a unix socket: how a QEMU's disks are read and written from outside.
//!
//! ```text
//! connect → handshake → read … write … block_status …        (one task reads, one writes; requests overlap)
//! ```
//!
//! [`proto::disk::nbd`](crate::proto::disk::nbd) speaks; this moves the bytes and pairs answers with who waits for them. Requests
//! are given as they come and answered in any order. What they hold is bounded by [`IN_FLIGHT_BYTES`]: who comes when that is used
//! up waits. A request whose future is dropped is still carried out, and holds its share until its answer came.
//!
//! Only the handshake has a deadline. A disk may take its time, and how much of it is too much is the caller's knowledge.
//!
//! What whoever copies a disk has to know of QEMU (7.2.22 and 10.0.2, raw and qcow2; pinned by `tests/nbd`):
//!
//! - A bitmap that still records is not shown by a read-only export: `transaction [block-dirty-bitmap-add NEXT,
//!   block-dirty-bitmap-disable NOW]` freezes it. An export's bitmaps are fixed and busy while it is there, so each round has an export of its own.
//! - A sparse read that fails ends the connection; one that is asked for in one piece fails alone. Holes are told by `base:allocation`.
//! - With `pause-before-switchover` all of this works in `pre-switchover`, while the guest stands.
//! - A loaded and paused destination still takes writes. `cont` succeeds although a writable export is there, with nothing but a line on
//!   standard error, and then two may write: flush, close, `block-export-del`, and only then `cont`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::proto::disk::extents::Extents;
use crate::proto::disk::nbd::{
    Answer, Command, Connection, ConnectionError, Cookie, Event, Export, Failure, MAX_IN_FLIGHT, MetaContext, Piece,
    Reading, RequestError, Zeroing,
};

/// A connected export. Dropping it closes the connection at once; what was not flushed may not be durable.
#[derive(Debug)]
pub struct NbdClient {
    shared: Arc<Shared>,
    export: Export,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

/// What went wrong between us and an export.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket cannot be connected to.
    #[error("The NBD socket {} cannot be opened: is QEMU's NBD server started?", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The server does not finish the handshake.
    #[error("The NBD server at {} did not open the export {export:?} within {waited:?}.", path.display())]
    Deadline {
        /// The export's name.
        export: String,
        /// The socket's path.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// The handshake ended without the export.
    #[error("The export {export:?} at {} cannot be used: {source}.", path.display())]
    Handshake {
        /// The export's name.
        export: String,
        /// The socket's path.
        path: PathBuf,
        /// Who refused what, or the breach of the protocol.
        source: ConnectionError,
    },
    /// The request was not sent.
    #[error("The export {export:?} cannot be asked for this: {source}.")]
    Request {
        /// The export's name.
        export: String,
        /// Why not.
        source: RequestError,
    },
    /// The server could not do it. The connection goes on.
    #[error("The export {export:?} could not {what}: {failure}.")]
    Failed {
        /// The export's name.
        export: String,
        /// What, with its range.
        what: String,
        /// What the server says.
        failure: Failure,
    },
    /// A range has more extents than are held at once.
    #[error("Bytes {}..{} of the export {export:?} have more than {EXTENTS_LIMIT} extents: ask for less at once.", range.start, range.end)]
    TooManyExtents {
        /// The export's name.
        export: String,
        /// The range asked for.
        range: Range<u64>,
    },
    /// The connection is over. Requests that were open may have been carried out.
    #[error("The connection to the export {export:?} at {} is lost: {reason}.", path.display())]
    Lost {
        /// The export's name.
        export: String,
        /// The socket's path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl NbdClient {
    /// Opens `export` at the unix socket `path`, with these metadata contexts for [`NbdClient::block_status`]. `deadline` bounds all
    /// of it.
    ///
    /// # Errors
    /// Those of [`NbdError`] up to `Handshake`, `Lost` where the server closes the socket instead of answering, and `Request` for
    /// names that cannot be said.
    pub async fn connect(
        path: &Path,
        export: &str,
        contexts: Vec<MetaContext>,
        deadline: Duration,
    ) -> Result<NbdClient, NbdError> {
        let shaking = Self::establish(path, export, contexts);
        timeout(deadline, shaking).await.unwrap_or_else(|_| {
            Err(NbdError::Deadline {
                export: export.to_owned(),
                path: path.to_owned(),
                waited: deadline,
            })
        })
    }

    async fn establish(path: &Path, export: &str, contexts: Vec<MetaContext>) -> Result<NbdClient, NbdError> {
        let mut machine = Connection::new(export, contexts).map_err(|source| NbdError::Request {
            export: export.to_owned(),
            source,
        })?;
        let stream = UnixStream::connect(path).await.map_err(|source| NbdError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let (mut reading, mut writing) = stream.into_split();
        let name = Name {
            export: export.to_owned(),
            path: path.to_owned(),
        };
        let ready = name.shake_hands(&mut machine, &mut reading, &mut writing).await?;
        let shared = Arc::new(Shared {
            name,
            state: Mutex::new(State {
                machine,
                waiting: BTreeMap::new(),
                lost: None,
            }),
            budget: Arc::new(Semaphore::new(IN_FLIGHT_BYTES as usize)),
            outgoing: Notify::new(),
        });
        Ok(NbdClient {
            reader: tokio::spawn(read(Arc::clone(&shared), reading)),
            writer: tokio::spawn(write(Arc::clone(&shared), writing)),
            shared,
            export: ready,
        })
    }

    /// What was agreed on.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Most bytes that one [`NbdClient::read`] or [`NbdClient::write`] may have.
    pub fn request_limit(&self) -> u32 {
        self.export.block_sizes.maximum.min(REQUEST_LIMIT)
    }

    /// Reads `length` bytes from `offset` on: pieces in order and without a gap. With [`Reading::Sparse`], an error on the disk costs
    /// the connection; what may fail is read with [`Reading::Whole`].
    ///
    /// # Errors
    /// [`NbdError::Request`], [`NbdError::Failed`], [`NbdError::Lost`].
    pub async fn read(&self, offset: u64, length: u32, reading: Reading) -> Result<Vec<Piece>, NbdError> {
        self.check_limit(u64::from(length))?;
        let command = Command::Read {
            offset,
            length,
            reading,
        };
        match self.request(command, length).await? {
            Answer::Read(pieces) => Ok(pieces),
            Answer::Done | Answer::Status(_) => unreachable!("a read is answered with its bytes"),
        }
    }

    /// Writes `data` at `offset`. It is durable after a [`NbdClient::flush`] that begins when this has ended.
    ///
    /// # Errors
    /// As [`NbdClient::read`].
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), NbdError> {
        self.check_limit(data.len() as u64)?;
        let weight = u32::try_from(data.len()).expect("it is within the limit");
        self.request(Command::Write { offset, data }, weight).await.map(drop)
    }

    /// Makes the bytes of `range` zeroes, of any length, without sending them.
    ///
    /// # Errors
    /// As [`NbdClient::read`]. A part may have been done.
    pub async fn write_zeroes(&self, range: Range<u64>, zeroing: Zeroing) -> Result<(), NbdError> {
        for step in Extents::uniform(range, ()).pieces(STEP) {
            let command = Command::WriteZeroes {
                offset: step.start,
                length: step.len(),
                zeroing,
            };
            self.request(command, LEAST_WEIGHT).await?;
        }
        Ok(())
    }

    /// Says that nobody needs the bytes of `range`, of any length. What they read as afterwards is not promised.
    ///
    /// # Errors
    /// As [`NbdClient::read`]. A part may have been done.
    pub async fn trim(&self, range: Range<u64>) -> Result<(), NbdError> {
        for step in Extents::uniform(range, ()).pieces(STEP) {
            let command = Command::Trim {
                offset: step.start,
                length: step.len(),
            };
            self.request(command, LEAST_WEIGHT).await?;
        }
        Ok(())
    }

    /// Makes durable what was written: everything whose answer came before this begins.
    ///
    /// # Errors
    /// As [`NbdClient::read`]. Nothing is known to be durable then.
    pub async fn flush(&self) -> Result<(), NbdError> {
        self.request(Command::Flush, LEAST_WEIGHT).await.map(drop)
    }

    /// What each context says about all bytes of `range`, in the order in which the contexts were given: see
    /// [`Allocation::from_flags`](crate::proto::disk::extents::Allocation::from_flags) and
    /// [`Dirtiness::from_flags`](crate::proto::disk::extents::Dirtiness::from_flags).
    ///
    /// # Errors
    /// As [`NbdClient::read`], and [`NbdError::TooManyExtents`].
    pub async fn block_status(&self, range: Range<u64>) -> Result<Vec<Extents<u64>>, NbdError> {
        let mut told: Vec<Extents<u64>> = Vec::new();
        let mut from = range.start;
        loop {
            let (offset, length) = (from, range.end.saturating_sub(from).min(STEP));
            let statuses = match self
                .request(Command::BlockStatus { offset, length }, STATUS_WEIGHT)
                .await?
            {
                Answer::Status(statuses) => statuses,
                Answer::Done | Answer::Read(_) => unreachable!("block status is answered with extents"),
            };
            if told.is_empty() {
                told.resize(statuses.len(), Extents::new(range.start));
            }
            // A server tells of each context as much as it likes. What is not told of all is asked for again.
            let end = statuses.iter().map(Extents::end).min().unwrap_or(range.end);
            for (whole, next) in told.iter_mut().zip(&statuses) {
                whole
                    .append(&next.within(offset..end))
                    .expect("each answer begins where the last one ended");
                if whole.count() > EXTENTS_LIMIT {
                    return Err(NbdError::TooManyExtents {
                        export: self.shared.name.export.clone(),
                        range,
                    });
                }
            }
            from = end;
            if from >= range.end {
                return Ok(told);
            }
        }
    }

    /// Why the connection is over, if it is.
    pub fn lost_reason(&self) -> Option<String> {
        self.shared.state().lost.clone()
    }

    /// Ends the connection politely: waits for open requests, says goodbye, and waits until the server has closed its side.
    ///
    /// # Errors
    /// [`NbdError::Deadline`]; [`NbdError::Lost`] where the connection was over before.
    pub async fn close(mut self, deadline: Duration) -> Result<(), NbdError> {
        if let Some(reason) = self.lost_reason() {
            return Err(self.shared.name.lost(reason));
        }
        self.shared.state().machine.close();
        self.shared.outgoing.notify_one();
        match timeout(deadline, &mut self.reader).await {
            Ok(_) => Ok(()),
            Err(_) => Err(NbdError::Deadline {
                export: self.shared.name.export.clone(),
                path: self.shared.name.path.clone(),
                waited: deadline,
            }),
        }
    }

    fn check_limit(&self, length: u64) -> Result<(), NbdError> {
        let most = u64::from(self.request_limit());
        if length > most {
            return Err(self.shared.name.request(RequestError::TooLong { length, most }));
        }
        Ok(())
    }

    /// Gives one command and waits for its answer. `weight` is what it holds meanwhile, in bytes.
    async fn request(&self, command: Command, weight: u32) -> Result<Answer, NbdError> {
        let shared = &self.shared;
        let what = what(&command);
        let weight = weight.clamp(LEAST_WEIGHT, IN_FLIGHT_BYTES);
        let Ok(share) = Arc::clone(&shared.budget).acquire_many_owned(weight).await else {
            return Err(shared.lost_now());
        };
        let answer = shared.submit(command, share)?;
        // Who gave it up did so because the connection is over.
        let result = answer.await.map_err(|_| shared.lost_now())?;
        result.map_err(|failure| NbdError::Failed {
            export: shared.name.export.clone(),
            what,
            failure,
        })
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

/// What all errors name.
#[derive(Debug)]
struct Name {
    export: String,
    path: PathBuf,
}

impl Name {
    fn lost(&self, reason: String) -> NbdError {
        NbdError::Lost {
            export: self.export.clone(),
            path: self.path.clone(),
            reason,
        }
    }

    fn request(&self, source: RequestError) -> NbdError {
        NbdError::Request {
            export: self.export.clone(),
            source,
        }
    }

    async fn shake_hands(
        &self,
        machine: &mut Connection,
        reading: &mut OwnedReadHalf,
        writing: &mut OwnedWriteHalf,
    ) -> Result<Export, NbdError> {
        let broken = |error: std::io::Error| self.lost(error.to_string());
        let mut buffer = [0; HANDSHAKE_BYTES];
        let mut events = Vec::new();
        loop {
            while let Some(bytes) = machine.take_outgoing() {
                writing.write_all(&bytes).await.map_err(broken)?;
            }
            if let Some(Event::Ready(export)) = events.pop() {
                return Ok(export);
            }
            match reading.read(&mut buffer).await.map_err(broken)? {
                0 => return Err(self.lost("the server closed it during the handshake".into())),
                length => machine
                    .feed(&buffer[..length], &mut events)
                    .map_err(|source| NbdError::Handshake {
                        export: self.export.clone(),
                        path: self.path.clone(),
                        source,
                    })?,
            }
        }
    }
}

/// Shared by the client and its tasks. The lock is never held across an await.
#[derive(Debug)]
struct Shared {
    name: Name,
    state: Mutex<State>,
    /// Bytes that requests may hold.
    budget: Arc<Semaphore>,
    /// There is something to send.
    outgoing: Notify,
}

#[derive(Debug)]
struct State {
    machine: Connection,
    waiting: BTreeMap<Cookie, Waiting>,
    lost: Option<String>,
}

/// Who waits for an answer, and its share of the budget.
#[derive(Debug)]
struct Waiting {
    answer: oneshot::Sender<Result<Answer, Failure>>,
    _share: OwnedSemaphorePermit,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(
        &self,
        command: Command,
        share: OwnedSemaphorePermit,
    ) -> Result<oneshot::Receiver<Result<Answer, Failure>>, NbdError> {
        let mut state = self.state();
        if let Some(reason) = &state.lost {
            return Err(self.name.lost(reason.clone()));
        }
        let cookie = state
            .machine
            .submit(command)
            .map_err(|source| self.name.request(source))?;
        let (answer, receiver) = oneshot::channel();
        let waiting = Waiting { answer, _share: share };
        state.waiting.insert(cookie, waiting);
        self.outgoing.notify_one();
        Ok(receiver)
    }

    fn lost_now(&self) -> NbdError {
        let reason = self.state().lost.clone();
        self.name.lost(reason.unwrap_or_else(|| "it was closed".into()))
    }

    /// Ends everything that waits on this connection; the first reason stays.
    fn lose(&self, reason: String) {
        let mut state = self.state();
        if state.lost.is_none() {
            tracing::debug!(export = %self.name.export, %reason, "connection to an export ended");
            state.lost = Some(reason);
        }
        state.waiting.clear();
        self.budget.close();
        // The writer looks, and ends.
        self.outgoing.notify_one();
    }

    /// Takes what the server sent.
    fn take(&self, bytes: &[u8]) -> Result<(), String> {
        let mut state = self.state();
        let mut events = Vec::new();
        let result = state.machine.feed(bytes, &mut events);
        for event in events {
            if let Event::Finished(cookie, result) = event
                && let Some(waiting) = state.waiting.remove(&cookie)
            {
                // Who was dropped needs no answer.
                let _ = waiting.answer.send(result);
            }
        }
        self.outgoing.notify_one();
        result.map_err(|error| error.to_string())
    }

    /// The end of the server's side.
    fn closed(&self) -> String {
        match self.state().waiting.len() {
            0 => "the server closed it".into(),
            open => format!(
                "the server closed it with {open} request(s) open; a QEMU does so when it ends, when the export is removed, and when \
                 a sparse read fails"
            ),
        }
    }
}

/// Reads the socket until the connection ends.
async fn read(shared: Arc<Shared>, mut reading: OwnedReadHalf) {
    let mut buffer = vec![0; READ_BYTES];
    let reason = loop {
        match reading.read(&mut buffer).await {
            Ok(0) => break shared.closed(),
            Ok(length) => {
                if let Err(reason) = shared.take(&buffer[..length]) {
                    break reason;
                }
            }
            Err(error) => break error.to_string(),
        }
    };
    shared.lose(reason);
}

/// Writes what waits to be sent until the connection ends.
async fn write(shared: Arc<Shared>, mut writing: OwnedWriteHalf) {
    loop {
        let next = {
            let mut state = shared.state();
            if state.lost.is_some() {
                return;
            }
            state.machine.take_outgoing()
        };
        match next {
            Some(bytes) => {
                if let Err(error) = writing.write_all(&bytes).await {
                    return shared.lose(error.to_string());
                }
            }
            None => shared.outgoing.notified().await,
        }
    }
}

/// A command in an error's text.
fn what(command: &Command) -> String {
    match command {
        Command::Read { offset, length, .. } => format!("read {length} bytes at byte {offset}"),
        Command::Write { offset, data } => format!("write {} bytes at byte {offset}", data.len()),
        Command::WriteZeroes { offset, length, .. } => format!("zero {length} bytes at byte {offset}"),
        Command::Trim { offset, length } => format!("trim {length} bytes at byte {offset}"),
        Command::Flush => "flush".into(),
        Command::BlockStatus { offset, length } => format!("tell the status of {length} bytes at byte {offset}"),
    }
}

/// What requests of one connection may hold: eight of the largest, of which QEMU works on 16 at a time.
pub const IN_FLIGHT_BYTES: u32 = 16 << 20;
/// Largest read or write. A local socket gains nothing from more.
pub const REQUEST_LIMIT: u32 = 2 << 20;
/// Most extents of one context that are held at once, of 16 bytes each. A terabyte whose every second cluster of 64 KiB is dirty has four times
/// as many.
pub const EXTENTS_LIMIT: usize = 1 << 22;
/// What the smallest request counts, so that no more requests are open than may be.
const LEAST_WEIGHT: u32 = IN_FLIGHT_BYTES / MAX_IN_FLIGHT as u32;
/// What block status may hold: [`MAX_DESCRIPTORS`](crate::proto::disk::nbd::MAX_DESCRIPTORS) of 16 bytes.
const STATUS_WEIGHT: u32 = 2 << 20;
/// Bytes that one request without data is about. QEMU looks a file's holes up in its main loop, beside the guest's own requests.
const STEP: u64 = 1 << 30;
/// Bytes read at once.
const READ_BYTES: usize = 256 << 10;
/// Bytes read at once during the handshake.
const HANDSHAKE_BYTES: usize = 4096;
