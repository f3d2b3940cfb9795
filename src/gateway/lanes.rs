//! Lanes of one bulk connection while they arrive: each is read in whatever order its packets come, and what a repair covers is
//! computed as soon as enough of it is there.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Core;
use super::inbound::Inbound;
use crate::proto::page::MigrationId;
use crate::proto::session::SessionError;
use crate::proto::session::tail::{Arriving, Covered, is_worth_trying, rebuild};
use crate::proto::wire::frame::HEADER_LEN;
use crate::proto::wire::repair::{RepairError, RepairHead};
use crate::proto::wire::{Frame, FrameError, FrameHeader, FrameKind, MAX_PAYLOAD};
use crate::transport::{LaneError, next_chunk};

/// Longest lane.
const LIMIT: usize = HEADER_LEN + MAX_PAYLOAD;

/// Repairs that wait for more of what they cover. At 10 Gbit/s and 150 ms 180 cover all that is in flight.
const MOST_REPAIRS: usize = 1024;

/// The lanes of one connection.
#[derive(Debug)]
pub(super) struct Lanes {
    peer: String,
    arriving: Mutex<HashMap<u64, Arc<Lane>>>,
    repairs: Mutex<Vec<Arc<Repair>>>,
    /// Bytes of lanes that are not whole and of repairs that wait.
    held_bytes: Arc<AtomicU64>,
}

/// What has come of a lane; counted while it exists.
#[derive(Debug)]
struct Lane {
    arriving: Mutex<Arriving>,
    bytes: AtomicU64,
    held_bytes: Arc<AtomicU64>,
}

/// A repair whose head has arrived.
#[derive(Debug)]
struct Repair {
    header: FrameHeader,
    head: RepairHead,
    lane: Arc<Lane>,
}

impl Lanes {
    pub(super) fn new(peer: String) -> Self {
        Self {
            peer,
            arriving: Mutex::default(),
            repairs: Mutex::default(),
            held_bytes: Arc::default(),
        }
    }

    /// A lane was opened. To be called in the order of their numbers, before a task takes it.
    pub(super) fn open(&self, number: u64) {
        let lane = Lane {
            arriving: Mutex::default(),
            bytes: AtomicU64::new(0),
            held_bytes: Arc::clone(&self.held_bytes),
        };
        locked(&self.arriving).insert(number, Arc::new(lane));
    }

    /// Reads a lane to its end and gives its frame to the migration.
    ///
    /// # Errors
    /// [`TakeError`]; [`TakeError::is_breach`] says whether the peer broke the protocol.
    pub(super) async fn take(&self, core: &Core, mut stream: quinn::RecvStream) -> Result<(), TakeError> {
        let number = stream.id().index();
        let Some(lane) = locked(&self.arriving).get(&number).cloned() else {
            return Ok(());
        };
        let taken = self.read(core, number, &lane, &mut stream).await;
        locked(&self.arriving).remove(&number);
        taken
    }

    async fn read(
        &self,
        core: &Core,
        number: u64,
        lane: &Arc<Lane>,
        stream: &mut quinn::RecvStream,
    ) -> Result<(), TakeError> {
        let mut header = None;
        let mut repair: Option<Arc<Repair>> = None;
        while let Some((offset, bytes)) = next_chunk(stream, LIMIT).await? {
            lane.put(offset, &bytes);
            self.check_held(core)?;
            if header.is_none() {
                header = lane.header()?;
            }
            if let (Some(header), None) = (header, &repair)
                && header.kind == FrameKind::Repair
                && let Some(head) = lane.repair_head()?
            {
                let lane = Arc::clone(lane);
                repair = self.keep(Repair { header, head, lane });
            }
            match &repair {
                Some(repair) => self.attempt(core, repair).await?,
                None => self.attempt_those_over(core, number).await?,
            }
        }
        if header.is_some_and(|header| header.kind == FrameKind::Repair) {
            return lane.check_repair(repair.as_deref());
        }
        // Whoever computes with it meanwhile finds it empty, and is asked again below.
        let frame = Frame::decode(std::mem::take(&mut *locked(&lane.arriving)).into_bytes())?;
        self.inbound(core, frame.header.migration)?.receive(frame)?;
        self.attempt_those_over(core, number).await
    }

    /// The agreed window bounds what a migration has in flight; a peer that leaves more lanes unfinished does not keep to it.
    fn check_held(&self, core: &Core) -> Result<(), TakeError> {
        let migrations = core.inbound.count_of(&self.peer).max(1) as u64;
        let limit = core.links.hello().limits.window_bytes.saturating_mul(2 * migrations);
        let held = self.held_bytes.load(Ordering::Relaxed);
        if held > limit {
            return Err(TakeError::TooMuchUnfinished { held, limit });
        }
        Ok(())
    }

    fn keep(&self, repair: Repair) -> Option<Arc<Repair>> {
        let mut repairs = locked(&self.repairs);
        if repairs.len() >= MOST_REPAIRS {
            return None;
        }
        let repair = Arc::new(repair);
        repairs.push(Arc::clone(&repair));
        Some(repair)
    }

    async fn attempt_those_over(&self, core: &Core, number: u64) -> Result<(), TakeError> {
        let over: Vec<Arc<Repair>> = locked(&self.repairs)
            .iter()
            .filter(|repair| repair.head.lanes.iter().any(|lane| lane.lane == number))
            .cloned()
            .collect();
        for repair in over {
            self.attempt(core, &repair).await?;
        }
        Ok(())
    }

    /// Computes what the repair allows by now, and forgets a repair that has nothing left to do.
    async fn attempt(&self, core: &Core, repair: &Arc<Repair>) -> Result<(), TakeError> {
        let Ok(inbound) = self.inbound(core, repair.header.migration) else {
            self.forget(repair);
            return Ok(());
        };
        let Some(frames) = inbound.frames_of(repair.header.epoch, repair.header.sequence, repair.head.lanes.len())
        else {
            self.forget(repair);
            return Ok(());
        };
        let coming: Vec<Option<Arc<Lane>>> = {
            let arriving = locked(&self.arriving);
            let lane = |number: &u64| arriving.get(number).cloned();
            repair.head.lanes.iter().map(|covered| lane(&covered.lane)).collect()
        };
        let parity_at = HEADER_LEN + repair.head.len();
        let parity_missing: Vec<Range<usize>> = locked(&repair.lane.arriving)
            .missing(parity_at + repair.head.parity_bytes())
            .into_iter()
            .filter(|range| range.end > parity_at)
            .map(|range| range.start.max(parity_at) - parity_at..range.end - parity_at)
            .collect();
        let mut missing = Vec::new();
        let mut start = 0;
        for ((covered, frame), lane) in repair.head.lanes.iter().zip(&frames).zip(&coming) {
            let len = covered.bytes as usize;
            if frame.is_none() {
                let of_lane = match lane {
                    Some(lane) => locked(&lane.arriving).missing(len),
                    None => Arriving::default().missing(len),
                };
                missing.extend(of_lane.into_iter().map(|range| start + range.start..start + range.end));
            }
            start += len;
        }
        if !is_worth_trying(&repair.head, &missing, &parity_missing) {
            return Ok(());
        }
        let repair = Arc::clone(repair);
        let computed = tokio::task::spawn_blocking(move || {
            let lanes: Vec<Covered> = frames
                .into_iter()
                .zip(coming)
                .map(|(frame, lane)| match (frame, lane) {
                    (Some(frame), _) => Covered::Whole(frame),
                    (None, Some(lane)) => Covered::Coming(locked(&lane.arriving).clone()),
                    (None, None) => Covered::Coming(Arriving::default()),
                })
                .collect();
            let arriving = locked(&repair.lane.arriving);
            let mut parity = arriving.bytes().get(parity_at..).unwrap_or_default().to_vec();
            drop(arriving);
            parity.resize(repair.head.parity_bytes(), 0);
            rebuild(&repair.head, &lanes, &parity, &parity_missing)
        });
        for lane in computed.await.expect("computing lanes does not panic") {
            // It was compared with the digest that its sender stated: a frame, or the sender's own fault.
            inbound.receive(Frame::decode(lane)?)?;
        }
        Ok(())
    }

    fn forget(&self, repair: &Arc<Repair>) {
        locked(&self.repairs).retain(|kept| !Arc::ptr_eq(kept, repair));
    }

    fn inbound(&self, core: &Core, migration: MigrationId) -> Result<Arc<Inbound>, TakeError> {
        core.inbound
            .get(migration, &self.peer)
            .ok_or(TakeError::NoMigration { migration })
    }
}

impl Lane {
    fn put(&self, offset: usize, bytes: &[u8]) {
        let mut arriving = locked(&self.arriving);
        arriving.put(offset, bytes);
        let now = arriving.bytes().len() as u64;
        let before = self.bytes.swap(now, Ordering::Relaxed);
        self.held_bytes.fetch_add(now - before, Ordering::Relaxed);
    }

    fn header(&self) -> Result<Option<FrameHeader>, FrameError> {
        let arriving = locked(&self.arriving);
        let front = arriving.prefix(HEADER_LEN).and_then(|front| front.first_chunk());
        Ok(front.map(FrameHeader::decode).transpose()?.map(|(header, _)| header))
    }

    /// A repair's lane has come to its end: it must be as long as its head says.
    fn check_repair(&self, repair: Option<&Repair>) -> Result<(), TakeError> {
        let found = locked(&self.arriving).bytes().len() - HEADER_LEN;
        // One that was not kept is of no use, and as long as it likes.
        let expected = repair.map_or(found, |repair| repair.head.len() + repair.head.parity_bytes());
        if found == expected {
            Ok(())
        } else {
            Err(RepairError::WrongLength { expected, found }.into())
        }
    }

    fn repair_head(&self) -> Result<Option<RepairHead>, RepairError> {
        let arriving = locked(&self.arriving);
        let there = arriving
            .missing(arriving.bytes().len())
            .first()
            .map_or(arriving.bytes().len(), |gap| gap.start);
        match arriving.prefix(there) {
            Some(front) if front.len() > HEADER_LEN => RepairHead::decode(&front[HEADER_LEN..]),
            _ => Ok(None),
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.held_bytes
            .fetch_sub(self.bytes.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A lane brings nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Repair(#[from] RepairError),
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
                    | SessionError::BeyondTheEnd { .. }
                    | SessionError::OutOfStep { .. }
            ),
            Self::Frame(_) | Self::Repair(_) | Self::TooMuchUnfinished { .. } => true,
            Self::NoMigration { .. } => false,
        }
    }
}
