//! Lanes of one bulk connection while they arrive: each is read in whatever order its packets come. What repairs make of them is decided by
//! [`Reassembly`]; here it is computed, beside the tasks that read.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Core;
use super::inbound::Inbound;
use super::link_test::sink::Sink;
use crate::proto::page::MigrationId;
use crate::proto::session::SessionError;
use crate::proto::session::tail::{Computation, Reassembly, ReassemblyError};
use crate::proto::wire::MAX_PAYLOAD;
use crate::proto::wire::frame::HEADER_LEN;
use crate::transport::{LaneError, next_chunk};

/// Longest lane.
const LIMIT: usize = HEADER_LEN + MAX_PAYLOAD;

/// The lanes of one connection.
#[derive(Debug)]
pub(super) struct Lanes {
    peer: String,
    reassembly: Mutex<Reassembly>,
    memory: Arc<LaneMemory>,
}

/// Bytes that the lanes of all bulk connections of a link hold together.
#[derive(Debug, Default)]
pub(super) struct LaneMemory(AtomicUsize);

impl Lanes {
    /// Of one of so many connections, whose lanes count in one account.
    pub(super) fn new(peer: String, connections: u8, memory: Arc<LaneMemory>) -> Self {
        Self {
            peer,
            reassembly: Mutex::new(Reassembly::one_of(connections.into())),
            memory,
        }
    }

    /// A lane was opened. To be called in the order of their numbers, before a task takes it.
    pub(super) fn open(&self, number: u64) {
        self.reassembly().open(number);
    }

    /// Reads a lane to its end and gives its frame to the migration.
    ///
    /// # Errors
    /// [`TakeError`]; [`TakeError::is_breach`] says whether the peer broke the protocol.
    pub(super) async fn take(
        self: &Arc<Self>,
        core: &Arc<Core>,
        mut stream: quinn::RecvStream,
    ) -> Result<(), TakeError> {
        let number = stream.id().index();
        let taken = self.read(core, number, &mut stream).await;
        if taken.is_err() {
            self.reassembly().abandon(number);
        }
        taken
    }

    async fn read(
        self: &Arc<Self>,
        core: &Arc<Core>,
        number: u64,
        stream: &mut quinn::RecvStream,
    ) -> Result<(), TakeError> {
        while let Some((offset, bytes)) = next_chunk(stream, LIMIT).await? {
            let header = self.reassembly().put(number, offset, &bytes)?;
            if let Some(header) = header {
                self.taker(core, header.migration)?;
            }
            self.check_held(core)?;
            self.compute_due(core, number);
        }
        let Some(frame) = self.reassembly().finish(number)? else {
            return Ok(());
        };
        match self.taker(core, frame.header.migration)? {
            Taker::Migration(inbound) => inbound.receive(frame)?,
            Taker::Test(sink) => sink.take(frame.lane_bytes()),
        }
        self.reassembly().delivered(number);
        self.compute_due(core, number);
        Ok(())
    }

    /// The agreed window bounds what a migration has in flight; a peer that leaves more lanes unfinished does not keep to it. Twice the
    /// window has room for repairs and for what is not known of lanes without a header, once more for a migration that just ended.
    fn check_held(&self, core: &Core) -> Result<(), TakeError> {
        let held = self.memory.0.load(Ordering::Relaxed) as u64;
        let window = core.links.hello().limits.window_bytes;
        if held <= window {
            return Ok(());
        }
        let migrations = core.inbound.count_of(&self.peer).max(1) as u64;
        let limit = window.saturating_mul(2 * migrations + 1);
        if held > limit {
            return Err(TakeError::TooMuchUnfinished { held, limit });
        }
        Ok(())
    }

    /// Computes what can be now that more of this lane has come. Whatever comes of it is the repair's fault, and not this lane's.
    fn compute_due(self: &Arc<Self>, core: &Arc<Core>, number: u64) {
        let Some(due) = self.reassembly().due(number) else {
            return;
        };
        let (lanes, core) = (Arc::clone(self), Arc::clone(core));
        tokio::task::spawn_blocking(move || {
            let mut next = Some(due);
            while let Some(due) = next {
                let repair = due.repair();
                let inbound = lanes.inbound(&core, due.migration()).ok();
                let made = inbound.and_then(|inbound| compute(due, &inbound));
                next = lanes.reassembly().done(repair, made.as_deref());
            }
        });
    }

    fn taker(&self, core: &Core, migration: MigrationId) -> Result<Taker, TakeError> {
        match core.tests.get(migration, &self.peer) {
            Some(sink) => Ok(Taker::Test(sink)),
            None => self.inbound(core, migration).map(Taker::Migration),
        }
    }

    fn inbound(&self, core: &Core, migration: MigrationId) -> Result<Arc<Inbound>, TakeError> {
        core.inbound
            .get(migration, &self.peer)
            .ok_or(TakeError::NoMigration { migration })
    }

    fn reassembly(&self) -> Accounted<'_> {
        // What is guarded is whole after every statement.
        let reassembly = self.reassembly.lock().unwrap_or_else(PoisonError::into_inner);
        Accounted {
            before: reassembly.memory_bytes(),
            reassembly,
            memory: &self.memory,
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        let left = self.reassembly().memory_bytes();
        self.memory.0.fetch_sub(left, Ordering::Relaxed);
    }
}

/// A reassembly that is being changed. What it holds more or less afterwards goes to the account.
struct Accounted<'a> {
    reassembly: MutexGuard<'a, Reassembly>,
    before: usize,
    memory: &'a LaneMemory,
}

impl Deref for Accounted<'_> {
    type Target = Reassembly;

    fn deref(&self) -> &Reassembly {
        &self.reassembly
    }
}

impl DerefMut for Accounted<'_> {
    fn deref_mut(&mut self) -> &mut Reassembly {
        &mut self.reassembly
    }
}

impl Drop for Accounted<'_> {
    fn drop(&mut self) {
        // Modulo 2^64, so that less is a difference too.
        let more = self.reassembly.memory_bytes().wrapping_sub(self.before);
        self.memory.0.fetch_add(more, Ordering::Relaxed);
    }
}

/// What a lane's frame is for.
enum Taker {
    Migration(Arc<Inbound>),
    Test(Arc<Sink>),
}

/// Gives the session what comes of a repair: the covered lanes that are whole with it, or `None` where the repair is of no use.
fn compute(due: Computation, inbound: &Inbound) -> Option<Vec<usize>> {
    let frames = inbound.frames_of(due.epoch(), due.sequences())?;
    let computed = due.run(&frames)?;
    for frame in computed.frames {
        inbound.receive(frame).ok()?;
    }
    Some(computed.made)
}

/// A lane brings nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error(transparent)]
    Reassembly(#[from] ReassemblyError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the peer leaves {held} bytes of lanes unfinished, {limit} were agreed")]
    TooMuchUnfinished { held: u64, limit: u64 },
    #[error("no migration {migration} of this peer is being received")]
    NoMigration { migration: MigrationId },
}

impl TakeError {
    /// The peer broke the protocol. Anything else happens when connections and migrations end.
    pub(super) fn is_breach(&self) -> bool {
        match self {
            Self::Lane(error) => matches!(error, LaneError::TooLong { .. }),
            Self::Session(error) => matches!(
                error,
                SessionError::WindowExceeded { .. }
                    | SessionError::TooManyFrames { .. }
                    | SessionError::BeyondTheEnd { .. }
            ),
            Self::Reassembly(_) | Self::TooMuchUnfinished { .. } => true,
            Self::NoMigration { .. } => false,
        }
    }
}
