//! The source's half: the disks are read through exports of the hypervisor that runs the guest, in rounds over dirty bitmaps; or, of a VM that is off,
//! from their images, once.
//!
//! ```text
//! bitmap 1 begins; round 1 reads everything that is allocated
//! bitmap n begins and n-1 ends, at one moment on all disks; round n reads what n-1 has             … until the guest stands; then once more
//! ```
//!
//! In round 1 the destination says what its disks hold already ([`held`](crate::proto::disk::held)); what is equal is read and not sent.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::cold_image::ColdImage;
use super::compare::{self, Compared, Told, ToldError};
use super::records::Records;
use super::watch::{GuestWatch, Watched};
use crate::api::DiskFigures;
use crate::gateway::registry::Entry;
use crate::gateway::{Core, clock, tunnel};
use crate::hypervisor::image_server::{self, ImageServer, ImageServerError};
use crate::hypervisor::nbd::{NbdClient, NbdError};
use crate::hypervisor::qemu::{Access, BlockError, BlockLayer, GuestDisk, PREFIX};
use crate::proto::disk::extents::{Allocation, Dirtiness, Extents, Transfer, transfers};
use crate::proto::disk::held::{BlockKey, Part};
use crate::proto::disk::nbd::{MetaContext, Piece, Reading};
use crate::proto::page::ByteRate;
use crate::proto::precopy::DiskRounds;
use crate::proto::wire::hello;
use crate::shaper::Shaper;

/// Time for an export to be opened.
const DEADLINE: Duration = Duration::from_secs(10);

/// Between two rounds while memory is copied: what the guest writes in it is read while the guest stands, where that is when it stops.
const ROUND_PAUSE: Duration = Duration::from_millis(500);

/// The same where much is written in it.
const BUSY_ROUND_PAUSE: Duration = Duration::from_millis(100);

/// Bytes of a round that are much.
const BUSY: u64 = 1 << 20;

/// The same while nothing else is copied.
const WARM_ROUND_PAUSE: Duration = Duration::from_secs(5);

/// Bytes of one read: of whole clusters.
const PIECE: u64 = 512 << 10;

/// Reads that are open at once.
const READS_AHEAD: usize = 8;

/// Bytes of a disk that are begun at once: the rate may change any time.
const PACED: u64 = 1 << 20;

/// Bytes of a disk whose blocks are asked about at once.
const STEP: u64 = 1 << 30;

/// Where disks are read.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// In the hypervisor that runs the guest.
    Running(BlockLayer),
    /// In images that nobody writes, one for each disk.
    Off(Vec<ColdImage>),
}

/// What the driver is told.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct State {
    /// Everything that is allocated has been read once.
    pub(crate) is_bulk_done: bool,
    /// The last round has been read.
    pub(crate) is_complete: bool,
    /// Of a VM that is off: the destination has everything on its disks, and what went there has this digest.
    pub(crate) digest: Option<[u8; 32]>,
    /// It cannot go on.
    pub(crate) failed: Option<Failure>,
    pub(crate) figures: DiskFigures,
    /// Read in the last one over what the guest wrote.
    dirty_bytes: Option<u64>,
}

/// Why disks are not copied any more: a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// They cannot be read.
    Here(String),
    /// They cannot be brought to the peer, which may have a better reason of its own, and says it where the migration is driven.
    OnTheWay(String),
}

/// The disks of a migration on their way. Dropping it ends that; what is left in the hypervisor is the driver's to clean up.
#[derive(Debug)]
pub(crate) struct Pull {
    last: watch::Sender<bool>,
    state: watch::Receiver<State>,
    /// What the driver has taken in.
    seen: Standing,
    _task: AbortOnDropHandle<()>,
}

impl Pull {
    /// Begins with the first round.
    pub(crate) fn begin(
        core: &Arc<Core>,
        entry: &Arc<Entry>,
        origin: Origin,
        disks: Vec<GuestDisk>,
        most: Option<ByteRate>,
    ) -> Self {
        let (last, ordered) = watch::channel(false);
        let allocated_bytes = disks.iter().map(|disk| disk.allocated_bytes).sum();
        let (tell, state) = watch::channel(State {
            figures: DiskFigures {
                allocated_bytes,
                ..DiskFigures::default()
            },
            ..State::default()
        });
        let tell = Arc::new(tell);
        let (core, entry) = (Arc::clone(core), Arc::clone(entry));
        let task = tokio::spawn(async move {
            let site = core.config.site.clone();
            let reader = Arc::clone(&tell);
            let run = async {
                let (ours, theirs) = UnixStream::pair().map_err(|error| Failure::Here(error.to_string()))?;
                let (told, stream) = ours.into_split();
                let socket = core.disk_socket(entry.migration);
                let link = core.links.link(&entry.peer).await;
                let link = link.map_err(|error| Failure::OnTheWay(error.to_string()))?;
                let asks = link.agreement().version >= hello::HELD_DISKS;
                drop(link);
                let carried = tunnel::carry_disks(&core, &entry, theirs, |wire_bytes| {
                    reader.send_modify(|state| state.figures.wire_bytes = wire_bytes);
                });
                let rounds = Rounds {
                    entry: Arc::clone(&entry),
                    origin,
                    key: BlockKey::of(entry.migration.0),
                    told: Told::new(told, &disks),
                    asks,
                    disks,
                    socket,
                    site,
                    records: Records::new(stream, Arc::clone(&tell)),
                    tell: Arc::clone(&tell),
                    ordered,
                    pace: Arc::new(Shaper::new(most)),
                    most,
                };
                let carried = async { carried.await.map_err(Failure::OnTheWay) };
                tokio::try_join!(carried, rounds.run()).map(|_| ())
            };
            if let Err(failure) = run.await {
                tell.send_modify(|state| state.failed = Some(failure));
            }
        });
        Self {
            last,
            state,
            seen: Standing::default(),
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// The guest stands: one more round, and no other.
    pub(crate) fn finish(&self) {
        self.last.send_replace(true);
    }

    /// Whether that has been said.
    pub(crate) fn is_finishing(&self) -> bool {
        *self.last.borrow()
    }

    pub(crate) fn figures(&self) -> DiskFigures {
        self.state.borrow().figures
    }

    /// What is known of the rounds over what the guest wrote.
    pub(crate) fn rounds(&self) -> DiskRounds {
        let state = self.state.borrow();
        let figures = &state.figures;
        DiskRounds {
            last_bytes: state.dirty_bytes,
            sent_bytes: figures.read_bytes.saturating_sub(figures.same_bytes),
            frame_bytes: figures.wire_bytes,
        }
    }

    /// How it stands, taken in: what is told of it is told once.
    pub(crate) fn take_state(&mut self) -> State {
        let state = self.state.borrow().clone();
        self.seen = Standing::of(&state);
        state
    }

    /// Until something else than figures is not as it was taken in. Cancel-safe, whenever it changes.
    pub(crate) async fn changed(&mut self) {
        let seen = self.seen;
        let changed = self.state.wait_for(|state| Standing::of(state) != seen).await.is_ok();
        if !changed {
            std::future::pending::<()>().await;
        }
    }
}

/// What of a state is not a figure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Standing {
    is_bulk_done: bool,
    is_complete: bool,
    has_digest: bool,
    has_failed: bool,
}

impl Standing {
    fn of(state: &State) -> Self {
        Self {
            is_bulk_done: state.is_bulk_done,
            is_complete: state.is_complete,
            has_digest: state.digest.is_some(),
            has_failed: state.failed.is_some(),
        }
    }
}

/// The task's own.
struct Rounds {
    entry: Arc<Entry>,
    origin: Origin,
    disks: Vec<GuestDisk>,
    socket: PathBuf,
    site: String,
    records: Records,
    /// What the destination says.
    told: Told,
    /// It can.
    asks: bool,
    key: BlockKey,
    tell: Arc<watch::Sender<State>>,
    ordered: watch::Receiver<bool>,
    /// Of reads while the guest runs.
    pace: Arc<Shaper>,
    /// It is no faster, whatever the guest bears.
    most: Option<ByteRate>,
}

/// Something to tell, once everything before it has been told.
enum Open {
    Zeroes {
        range: Range<u64>,
        are_there: bool,
    },
    Read {
        start: u64,
        /// The destination has zeroes there.
        has_zeroes: bool,
        read: AbortOnDropHandle<Result<Vec<Piece>, NbdError>>,
    },
    /// To be told as far as the destination has it otherwise.
    Compared {
        start: u64,
        /// That are not known to be zero.
        read_bytes: u64,
        compared: AbortOnDropHandle<Result<Vec<Compared>, NbdError>>,
    },
}

/// By what a disk is read in one round.
enum OpenDisk {
    Export(String),
    Served(ImageServer),
}

/// What is known of bytes at the destination.
enum Held {
    Nothing,
    Zeroes,
    Blocks(Arc<[u64]>),
}

/// Where the disks are not read any more.
#[derive(Debug, thiserror::Error)]
enum PullError {
    #[error("the disk {disk} cannot be read at {site}: {error}")]
    Read {
        disk: String,
        site: String,
        error: NbdError,
    },
    #[error("the disk {disk} cannot be read at {site}: {error}")]
    Serve {
        disk: String,
        site: String,
        error: ImageServerError,
    },
    #[error("the disks cannot be read: {0}")]
    Block(#[from] BlockError),
    #[error("the stream of disks cannot be written: {0}")]
    Stream(#[from] std::io::Error),
    #[error(transparent)]
    Told(#[from] ToldError),
    #[error("the disk {disk} is {now} bytes long now and was {before}: it must not be resized while it is copied")]
    Resized { disk: String, before: u64, now: u64 },
}

impl Rounds {
    async fn run(mut self) -> Result<(), Failure> {
        let copied = self.copy().await;
        copied.map_err(|error| match error {
            PullError::Stream(_) | PullError::Told(_) => Failure::OnTheWay(error.to_string()),
            _ => Failure::Here(error.to_string()),
        })
    }

    async fn copy(&mut self) -> Result<(), PullError> {
        match &self.origin {
            Origin::Running(block) => {
                let block = block.clone();
                self.copy_running(&block).await
            }
            Origin::Off(_) => self.copy_off().await,
        }
    }

    async fn copy_off(&mut self) -> Result<(), PullError> {
        self.records.ask().await?;
        self.round(None).await?;
        // The last part: that has been written.
        self.told.next().await?;
        let digest = self.records.end().await?;
        // The destination closes it once it has everything.
        self.told.end().await?;
        self.tell.send_modify(|state| state.digest = Some(digest));
        Ok(())
    }

    async fn copy_running(&mut self, block: &BlockLayer) -> Result<(), PullError> {
        // An earlier gateway may have left something.
        block.clean_up().await;
        let mut number = 1;
        // Before the server, which is known as ours by it.
        self.next_bitmap(block, None, number).await?;
        block.serve(&self.socket).await?;
        if self.asks {
            self.records.ask().await?;
        }
        let watch = GuestWatch::begin(Watched {
            migration: self.entry.migration,
            block: block.clone(),
            disks: self.disks.clone(),
            pace: Arc::clone(&self.pace),
            most: self.most,
            tell: Arc::clone(&self.tell),
        });
        let watch = watch.await;
        self.round(None).await?;
        watch.end().await;
        self.pace.set_rate(self.most);
        if self.asks {
            // The last part: the guest must not stand until that has been written.
            self.told.next().await?;
        }
        self.tell.send_modify(|state| state.is_bulk_done = true);
        loop {
            let is_last = self.await_next().await;
            let dirty = block.dirty_bytes(&bitmap(number)).await?;
            let mut read_bytes = 0;
            if dirty > 0 {
                self.next_bitmap(block, Some(number), number + 1).await?;
                self.round(Some(number)).await?;
                read_bytes = self.tell.borrow().figures.last_round_bytes;
                if !is_last {
                    self.forget(block, number).await?;
                }
                number += 1;
            }
            if is_last {
                break;
            }
            self.tell.send_modify(|state| state.dirty_bytes = Some(read_bytes));
        }
        self.records.end().await?;
        self.tell.send_modify(|state| state.is_complete = true);
        // The destination closes it once it has everything.
        self.told.end().await?;
        Ok(())
    }

    /// Until the next round is due; whether it is the last.
    async fn await_next(&mut self) -> bool {
        let last_bytes = self.tell.borrow().dirty_bytes;
        let pause = match (self.entry.waits(clock::unix_ms()), last_bytes) {
            (true, _) => WARM_ROUND_PAUSE,
            // The guest cannot be stopped before it is over.
            (false, None) => Duration::ZERO,
            (false, Some(BUSY..)) => BUSY_ROUND_PAUSE,
            (false, Some(_)) => ROUND_PAUSE,
        };
        let ordered = tokio::time::timeout(pause, self.ordered.wait_for(|last| *last)).await;
        matches!(ordered, Ok(Ok(_)))
    }

    async fn next_bitmap(&self, block: &BlockLayer, now: Option<u32>, next: u32) -> Result<(), PullError> {
        let nodes: Vec<&str> = self.disks.iter().map(|disk| disk.node.as_str()).collect();
        let now = now.map(bitmap);
        block.next_round(&nodes, now.as_deref(), &bitmap(next)).await?;
        Ok(())
    }

    /// Reads everything, or what the bitmap of this number has.
    async fn round(&mut self, dirty: Option<u32>) -> Result<(), PullError> {
        self.tell.send_modify(|state| state.figures.last_round_bytes = 0);
        for number in 0..self.disks.len() {
            self.read_disk(number, dirty.map(bitmap)).await?;
        }
        self.records.round().await?;
        Ok(())
    }

    async fn forget(&self, block: &BlockLayer, number: u32) -> Result<(), PullError> {
        for disk in &self.disks {
            block.remove_bitmap(&disk.node, &bitmap(number)).await?;
        }
        Ok(())
    }

    async fn read_disk(&mut self, number: usize, dirty: Option<String>) -> Result<(), PullError> {
        let disk = self.disks[number].clone();
        let (client, open_disk) = self.open(number, &disk, dirty.as_deref()).await?;
        let now = client.export().size_bytes;
        if now != disk.size_bytes {
            return Err(PullError::Resized {
                disk: disk.short_name().to_owned(),
                before: disk.size_bytes,
                now,
            });
        }
        let client = Arc::new(client);
        let asks = self.asks && dirty.is_none();
        let (mut round, mut open) = (Extents::new(0), VecDeque::new());
        let mut start = 0;
        while start < disk.size_bytes {
            let (end, held) = match asks {
                true => self.held(number, &disk, &mut open).await?,
                false => (disk.size_bytes, Held::Nothing),
            };
            while start < end {
                if round.end() <= start {
                    round = self.transfers(&disk, &client, start).await?;
                }
                let most = match (&held, round.at(start)) {
                    // What is told of a region is compared as one.
                    (Held::Blocks(_), _) => end,
                    (_, Some(run)) if run.state != Transfer::Read => run.end,
                    _ => start + PACED,
                };
                let part = start..end.min(round.end()).min(most);
                start = part.end;
                let part = round.within(part);
                self.keep_pace(&part).await;
                self.begin(&client, &part, &held, &mut open);
                self.settle(number, &disk, &mut open, READS_AHEAD).await?;
            }
        }
        self.settle(number, &disk, &mut open, 0).await?;
        drop(client);
        self.close(&disk, open_disk).await
    }

    /// A guest that stands still does not wait.
    async fn keep_pace(&mut self, part: &Extents<Transfer>) {
        let bytes = part.bytes_of(Transfer::Read);
        if bytes == 0 || self.pace.rate().is_none() {
            return;
        }
        let mut ordered = self.ordered.clone();
        tokio::select! {
            () = self.pace.admit(bytes) => {}
            _ = ordered.wait_for(|last| *last) => self.pace.set_rate(None),
        }
        let waited = self.pace.take_waited().as_secs_f64();
        self.tell.send_modify(|state| state.figures.held_back_seconds += waited);
    }

    async fn open(
        &self,
        number: usize,
        disk: &GuestDisk,
        dirty: Option<&str>,
    ) -> Result<(NbdClient, OpenDisk), PullError> {
        match &self.origin {
            Origin::Running(block) => {
                let export = format!("{PREFIX}{number}-read");
                let access = Access::Read { bitmap: dirty };
                block.export(&export, &disk.node, access).await?;
                let client = connect(&self.socket, &export, dirty.map(str::to_owned)).await;
                let client = client.map_err(|error| self.cannot_read(disk, error))?;
                Ok((client, OpenDisk::Export(export)))
            }
            Origin::Off(images) => {
                let image = images[number].unlocked();
                let access = image_server::Access::Read;
                let served = ImageServer::start(&image, disk.short_name(), access, &self.socket).await;
                let (server, client) = served.map_err(|error| self.cannot_serve(disk, error))?;
                Ok((client, OpenDisk::Served(server)))
            }
        }
    }

    async fn close(&self, disk: &GuestDisk, open: OpenDisk) -> Result<(), PullError> {
        match (open, &self.origin) {
            (OpenDisk::Export(export), Origin::Running(block)) => block.end_export(&export).await?,
            (OpenDisk::Served(server), _) => {
                let ended = server.end().await;
                ended.map_err(|error| self.cannot_serve(disk, error))?;
            }
            (OpenDisk::Export(_), Origin::Off(_)) => {}
        }
        Ok(())
    }

    /// What the destination has of the bytes that follow, and up to where.
    async fn held(
        &mut self,
        number: usize,
        disk: &GuestDisk,
        open: &mut VecDeque<Open>,
    ) -> Result<(u64, Held), PullError> {
        if !self.told.is_there()? {
            // It may wait for what is read already.
            self.settle(number, disk, open, 0).await?;
        }
        let (range, part) = self.told.next().await?;
        let held = match part {
            Part::Zeroes => Held::Zeroes,
            Part::Blocks(digests) => Held::Blocks(digests.into()),
            // Not before the last disk has been told.
            Part::Flushed => Held::Nothing,
        };
        Ok((range.end, held))
    }

    /// What the round has of the disk from `start` on: of a part of it.
    async fn transfers(
        &self,
        disk: &GuestDisk,
        client: &NbdClient,
        start: u64,
    ) -> Result<Extents<Transfer>, PullError> {
        let end = disk.size_bytes.min(start + STEP);
        let told = client.block_status(start..end).await;
        let told = told.map_err(|error| self.cannot_read(disk, error))?;
        let allocation = told[0].map(Allocation::from_flags);
        Ok(match told.get(1) {
            Some(dirty) => transfers(&dirty.map(Dirtiness::from_flags), &allocation),
            None => transfers(&Extents::uniform(start..end, Dirtiness::Dirty), &allocation),
        })
    }

    /// Begins to read what a round has of a part of a disk.
    fn begin(&self, client: &Arc<NbdClient>, part: &Extents<Transfer>, held: &Held, open: &mut VecDeque<Open>) {
        if let Held::Blocks(digests) = held {
            let read_bytes = part.bytes_of(Transfer::Read);
            let (client, key, digests) = (Arc::clone(client), self.key.clone(), Arc::clone(digests));
            let range = part.start()..part.end();
            let compared = async move { compare::region(&client, range, read_bytes > 0, key, digests).await };
            open.push_back(Open::Compared {
                start: part.start(),
                read_bytes,
                compared: AbortOnDropHandle::new(tokio::spawn(compared)),
            });
            return;
        }
        let has_zeroes = matches!(held, Held::Zeroes);
        for extent in part.iter() {
            match extent.state {
                Transfer::Skip => {}
                Transfer::Zeroes => open.push_back(Open::Zeroes {
                    range: extent.start..extent.end,
                    are_there: has_zeroes,
                }),
                Transfer::Read => {
                    for piece in Extents::uniform(extent.start..extent.end, ()).pieces(PIECE) {
                        let length = u32::try_from(piece.len()).expect("a piece is short");
                        let client = Arc::clone(client);
                        let read = async move { client.read(piece.start, length, Reading::Whole).await };
                        open.push_back(Open::Read {
                            start: piece.start,
                            has_zeroes,
                            read: AbortOnDropHandle::new(tokio::spawn(read)),
                        });
                    }
                }
            }
        }
    }

    /// Tells until no more than so many are open.
    async fn settle(
        &mut self,
        number: usize,
        disk: &GuestDisk,
        open: &mut VecDeque<Open>,
        most: usize,
    ) -> Result<(), PullError> {
        let id = u16::try_from(number).expect("an offer has few disks");
        while open.len() > most {
            match open.pop_front() {
                Some(Open::Zeroes { range, are_there }) => self.records.zeroes(id, range, are_there).await?,
                Some(Open::Read {
                    start,
                    has_zeroes,
                    read,
                }) => {
                    let pieces = read.await.map_err(std::io::Error::other)?;
                    let pieces = pieces.map_err(|error| self.cannot_read(disk, error))?;
                    self.records.pieces(id, start, pieces, has_zeroes).await?;
                }
                Some(Open::Compared {
                    start,
                    read_bytes,
                    compared,
                }) => {
                    let compared = compared.await.map_err(std::io::Error::other)?;
                    let compared = compared.map_err(|error| self.cannot_read(disk, error))?;
                    self.records.count(read_bytes);
                    self.records.compared(id, start, compared).await?;
                }
                None => {}
            }
        }
        Ok(())
    }

    fn cannot_serve(&self, disk: &GuestDisk, error: ImageServerError) -> PullError {
        PullError::Serve {
            disk: disk.short_name().to_owned(),
            site: self.site.clone(),
            error,
        }
    }

    fn cannot_read(&self, disk: &GuestDisk, error: NbdError) -> PullError {
        PullError::Read {
            disk: disk.short_name().to_owned(),
            site: self.site.clone(),
            error,
        }
    }
}

impl Drop for Rounds {
    fn drop(&mut self) {
        // QEMU removes it with its server; one that is killed does not.
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn connect(socket: &Path, export: &str, dirty: Option<String>) -> Result<NbdClient, NbdError> {
    let mut contexts = vec![MetaContext::Allocation];
    contexts.extend(dirty.map(MetaContext::DirtyBitmap));
    NbdClient::connect(socket, export, contexts, DEADLINE).await
}

fn bitmap(number: u32) -> String {
    format!("{PREFIX}{number}")
}
