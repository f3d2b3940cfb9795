//! The destination's half: records are written through exports of the hypervisor that will own the disks, or, of a VM that is off, to their images.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::tell::{Telling, tell};
use super::volumes;
use crate::config::{ImageFormat, VmImage};
use crate::gateway::clock;
use crate::hypervisor::image_server::{self, ImageServer, ImageServerError};
use crate::hypervisor::nbd::{NbdClient, NbdError};
use crate::hypervisor::qemu::{Access, BlockError, BlockLayer, GuestDisk, PREFIX, short_name};
use crate::proto::disk::held::{self, BlockKey};
use crate::proto::disk::nbd::{MetaContext, Zeroing};
use crate::proto::disk::stream::{HEADER_LEN, MAX_DATA, Reader, Record, StreamError};
use crate::proto::wire::message::OfferedDisk;

/// Time for an export to be opened or closed.
const DEADLINE: Duration = Duration::from_secs(10);

/// Requests that are open at once. Their bytes are bounded by the client.
const OPEN_REQUESTS: usize = 64;

/// Bytes after which the disks are flushed, beside what is written further. What is not flushed is lost with the hypervisor, which ends with its gateway
/// (of 1 GiB at 0.3 Gbit/s: 2 to 6 % with 64 MiB and 1 s, 2026-11-29), and is written while the guest stands where it is when that is stopped.
const FLUSH_AFTER: u64 = 8 << 20;

/// Time after which they are, however little was written.
const FLUSH_EVERY: Duration = Duration::from_millis(250);

/// Bytes that may be written and not flushed: a disk that takes less than the link brings holds that up.
const MOST_UNFLUSHED: u64 = 256 << 20;

/// Where disks are written.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// In the hypervisor that will own them.
    Running(BlockLayer),
    /// In images that no hypervisor has open: those of the VM, at this site.
    Off { site: String, images: Vec<VmImage> },
}

/// Why disks are not as they should be.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error("the disk {disk} cannot be written: {error}")]
    Write { disk: String, error: NbdError },
    #[error("what the disk {disk} holds cannot be read: {error}")]
    Look { disk: String, error: NbdError },
    #[error(
        "the stream of disks says of {length} bytes at {offset} of disk {disk} that they are the same, which was not asked"
    )]
    NotTold { disk: u16, offset: u64, length: u64 },
    #[error("the disk {disk} cannot be written: {error}")]
    Serve { disk: String, error: ImageServerError },
    #[error("the disks cannot be written: {0}")]
    Block(#[from] BlockError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the stream of disks broke off")]
    Cut,
    #[error("what writes the disks has ended")]
    BrokenOff,
    #[error("the stream of disks cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

/// How the writing of disks has ended.
#[derive(Debug)]
pub(crate) struct Taken {
    /// Everything is on disk, and nobody but the hypervisor can write any more: the digest of what was sent.
    pub(crate) result: Result<[u8; 32], NotTaken>,
    /// Once this is dropped, whoever fills the stream learns that it has ended.
    pub(crate) stream: Stream,
}

/// Why not everything was written.
#[derive(Debug)]
pub(crate) struct NotTaken {
    /// A sentence.
    pub(crate) reason: String,
    /// Nothing is wrong with what was: more did not come.
    pub(crate) is_cut: bool,
}

/// The two ways of a stream that was written to disks.
#[derive(Debug)]
pub(crate) struct Stream {
    read: OwnedReadHalf,
    /// None while it is told what the disks hold.
    write: Option<OwnedWriteHalf>,
}

/// Opens the disks for writing and begins to write what is put into the socket that is returned. Where the images are new and the source is of an older
/// release, which does not ask, what the first round tells to be zero is so already: not every image gives back what is overwritten with zeroes
/// (`discard = unmap`).
///
/// # Errors
/// A sentence.
pub(crate) async fn begin(
    place: Place,
    socket: PathBuf,
    offered: &[OfferedDisk],
    are_new: bool,
    key: BlockKey,
) -> Result<(UnixStream, AbortOnDropHandle<Taken>), String> {
    let targets = match &place {
        Place::Running(block) => open_exports(block, &socket, offered).await?,
        Place::Off { site, images } => open_images(site, images, &socket, offered).await?,
    };
    let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
    let task = tokio::spawn(async move {
        let (read, write) = ours.into_split();
        let mut stream = Stream {
            read,
            write: Some(write),
        };
        let result = take(&place, targets, are_new, &mut stream, key).await;
        Taken {
            result: result.map_err(|error| NotTaken {
                reason: error.to_string(),
                is_cut: matches!(error, TakeError::Cut),
            }),
            stream,
        }
    });
    Ok((theirs, AbortOnDropHandle::new(task)))
}

/// The disk here that takes the bytes of one there.
fn counterpart(own: &[GuestDisk], offered: &OfferedDisk) -> Result<GuestDisk, String> {
    let name = short_name(&offered.name);
    let found = own.iter().find(|disk| disk.name == offered.name);
    let found = found.ok_or_else(|| format!("the destination's hypervisor has no writable disk {name}"))?;
    check_size(offered, found.size_bytes)?;
    Ok(found.clone())
}

fn check_size(offered: &OfferedDisk, size_bytes: u64) -> Result<(), String> {
    if size_bytes == offered.size_bytes {
        return Ok(());
    }
    Err(format!(
        "the disk {} has {} bytes at the source and {size_bytes} at the destination",
        short_name(&offered.name),
        offered.size_bytes
    ))
}

/// A disk that is open for writing.
pub(super) struct Target {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    has_backing: bool,
    open: OpenDisk,
    pub(super) client: Arc<NbdClient>,
}

/// By what a disk is written.
enum OpenDisk {
    Export(String),
    Served(ImageServer),
}

/// The largest cluster of an image, qcow2's.
const LARGEST_CLUSTER: u64 = 2 << 20;

impl Target {
    /// Whether zeroes must not be written beside anything else. QEMU loses them where it writes them to a part of a cluster while it allocates the
    /// same cluster for another write, and the image has a backing file: the cluster then has that one's bytes there (seen with 10.0.2, 2026-11-29).
    fn zeroes_alone(&self, range: &Range<u64>) -> bool {
        let is_edge = |at: u64| at.is_multiple_of(LARGEST_CLUSTER) || at == self.size_bytes;
        self.has_backing && !(is_edge(range.start) && is_edge(range.end))
    }

    /// A request, for a task of its own.
    fn ask<F, R>(&self, request: F) -> impl Future<Output = Result<(), TakeError>> + use<F, R>
    where
        F: FnOnce(Arc<NbdClient>) -> R,
        R: Future<Output = Result<(), NbdError>>,
    {
        let (request, disk) = (request(Arc::clone(&self.client)), self.name.clone());
        async move { request.await.map_err(|error| TakeError::Write { disk, error }) }
    }
}

async fn open_exports(block: &BlockLayer, socket: &Path, offered: &[OfferedDisk]) -> Result<Vec<Target>, String> {
    let own = block.disks().await.map_err(|error| error.to_string())?;
    let disks = offered.iter().map(|disk| counterpart(&own, disk));
    let disks = disks.collect::<Result<Vec<_>, String>>()?;
    block.clean_up().await;
    block.serve(socket).await.map_err(|error| error.to_string())?;
    let opened = open(block, socket, &disks).await;
    // Nobody else needs to find it.
    let _ = std::fs::remove_file(socket);
    opened.map_err(|error| error.to_string())
}

async fn open_images(
    site: &str,
    images: &[VmImage],
    socket: &Path,
    offered: &[OfferedDisk],
) -> Result<Vec<Target>, String> {
    let mut targets = Vec::new();
    for disk in offered {
        let image = volumes::image_of(site, images, disk)?;
        let name = short_name(&disk.name).to_owned();
        let served =
            json!({ "driver": image.format.to_string(), "file": { "driver": "file", "filename": image.path } });
        let access = image_server::Access::Write;
        let started = ImageServer::start(&format!("json:{served}"), &name, access, socket).await;
        let (server, client) = started.map_err(|error| {
            TakeError::Serve {
                disk: name.clone(),
                error,
            }
            .to_string()
        })?;
        let size_bytes = client.export().size_bytes;
        check_size(disk, size_bytes)?;
        targets.push(Target {
            name,
            size_bytes,
            has_backing: image.base.is_some() && image.format == ImageFormat::Qcow2,
            open: OpenDisk::Served(server),
            client: Arc::new(client),
        });
    }
    Ok(targets)
}

async fn open(block: &BlockLayer, socket: &Path, disks: &[GuestDisk]) -> Result<Vec<Target>, TakeError> {
    let mut targets = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let export = format!("{PREFIX}{number}-write");
        block.export(&export, &disk.node, Access::Write).await?;
        let name = disk.short_name().to_owned();
        let contexts = vec![MetaContext::Allocation];
        let client = NbdClient::connect(socket, &export, contexts, DEADLINE).await;
        let client = client.map_err(|error| TakeError::Write {
            disk: name.clone(),
            error,
        })?;
        targets.push(Target {
            name,
            size_bytes: disk.size_bytes,
            has_backing: disk.has_backing,
            open: OpenDisk::Export(export),
            client: Arc::new(client),
        });
    }
    Ok(targets)
}

async fn take(
    place: &Place,
    targets: Vec<Target>,
    are_new: bool,
    stream: &mut Stream,
    key: BlockKey,
) -> Result<[u8; 32], TakeError> {
    let mut is_empty = are_new;
    let mut digest = [0; 32];
    let targets = Arc::new(targets);
    let mut telling: Option<Telling> = None;
    let mut records = Reader::new(targets.iter().map(|target| target.size_bytes).collect());
    let mut received = BytesMut::with_capacity(HEADER_LEN + MAX_DATA);
    let mut open: JoinSet<Result<(), TakeError>> = JoinSet::new();
    let mut flushes = Flushes::new(&targets);
    while !records.has_ended() {
        while let Some(record) = records.next(&mut received)? {
            let mut done = None;
            match record {
                Record::Ask => {
                    is_empty = false;
                    telling = stream.write.take().map(|write| tell(&targets, key.clone(), write));
                }
                Record::Data { disk, offset, data } => {
                    done = Some((disk, offset + data.len() as u64));
                    flushes.wrote(data.len() as u64).await?;
                    let target = &targets[usize::from(disk)];
                    open.spawn(target.ask(move |disk| async move { disk.write(offset, data).await }));
                }
                Record::Zeroes { .. } if is_empty => {}
                Record::Zeroes { disk, offset, length } => {
                    let range = offset..offset + length;
                    done = Some((disk, range.end));
                    let target = &targets[usize::from(disk)];
                    let is_alone = target.zeroes_alone(&range);
                    if is_alone {
                        settle(&mut open, 0).await?;
                    }
                    open.spawn(
                        target.ask(move |disk| async move { disk.write_zeroes(range, Zeroing::MayBeHole).await }),
                    );
                    if is_alone {
                        settle(&mut open, 0).await?;
                    }
                }
                Record::Same { disk, offset, length } => {
                    let range = offset..offset + length;
                    done = Some((disk, range.end));
                    let digests = telling.as_ref().and_then(|telling| telling.digests(disk, range));
                    let digests = digests.ok_or(TakeError::NotTold { disk, offset, length })?;
                    records.confirm(&digests);
                }
                // The next round may write the same bytes again.
                Record::Round => {
                    is_empty = false;
                    settle(&mut open, 0).await?;
                    match telling.take() {
                        Some(telling) => {
                            flushes.all().await?;
                            let mut write = telling.end().await?;
                            write.write_all(&held::flushed()).await?;
                            stream.write = Some(write);
                        }
                        None => flushes.begin()?,
                    }
                }
                Record::End { digest: of_all } => digest = of_all,
            }
            if let (Some((disk, end)), Some(telling)) = (done, &telling) {
                telling.close(disk, end);
            }
            settle(&mut open, OPEN_REQUESTS).await?;
        }
        if records.has_ended() {
            break;
        }
        let read = async { Ok::<_, TakeError>(stream.read.read_buf(&mut received).await?) };
        let read = match &mut telling {
            Some(telling) => telling.beside(read).await?,
            None => read.await?,
        };
        if read == 0 {
            return Err(TakeError::Cut);
        }
    }
    settle(&mut open, 0).await?;
    flushes.all().await?;
    drop(flushes);
    let targets = Arc::into_inner(targets).ok_or(TakeError::BrokenOff)?;
    close(place, targets).await?;
    Ok(digest)
}

/// Nobody writes through us any more.
async fn close(place: &Place, targets: Vec<Target>) -> Result<(), TakeError> {
    for target in targets {
        drop(target.client);
        match (target.open, place) {
            // A guest that is continued while somebody else may write its disk would not be told.
            (OpenDisk::Export(export), Place::Running(block)) => block.end_export(&export).await?,
            (OpenDisk::Served(server), _) => {
                let ended = server.end().await;
                ended.map_err(|error| TakeError::Serve {
                    disk: target.name,
                    error,
                })?;
            }
            (OpenDisk::Export(_), Place::Off { .. }) => {}
        }
    }
    if let Place::Running(block) = place {
        block.stop_serving().await?;
    }
    Ok(())
}

/// What makes writes durable while more is written.
struct Flushes<'a> {
    targets: &'a [Target],
    open: JoinSet<Result<(), TakeError>>,
    /// Bytes since the last one began.
    unflushed: u64,
    began: Instant,
}

impl<'a> Flushes<'a> {
    fn new(targets: &'a [Target]) -> Self {
        Self {
            targets,
            open: JoinSet::new(),
            unflushed: 0,
            began: clock::now(),
        }
    }

    /// So much more is written.
    async fn wrote(&mut self, bytes: u64) -> Result<(), TakeError> {
        self.unflushed += bytes;
        if self.unflushed >= MOST_UNFLUSHED {
            settle(&mut self.open, 0).await?;
        }
        if self.unflushed >= FLUSH_AFTER || clock::now().saturating_duration_since(self.began) >= FLUSH_EVERY {
            self.begin()?;
        }
        Ok(())
    }

    /// Begins one, where none is under way.
    #[expect(
        clippy::result_large_err,
        reason = "as large as that of everything around it, and seldom there"
    )]
    fn begin(&mut self) -> Result<(), TakeError> {
        while let Some(flushed) = self.open.try_join_next() {
            flushed.unwrap_or(Err(TakeError::BrokenOff))?;
        }
        if self.open.is_empty() && self.unflushed > 0 {
            self.flush();
        }
        Ok(())
    }

    /// Makes durable what was written before.
    async fn all(&mut self) -> Result<(), TakeError> {
        settle(&mut self.open, 0).await?;
        self.flush();
        settle(&mut self.open, 0).await
    }

    fn flush(&mut self) {
        self.unflushed = 0;
        self.began = clock::now();
        for target in self.targets {
            self.open.spawn(target.ask(|disk| async move { disk.flush().await }));
        }
    }
}

/// Waits until no more than so many requests are open.
async fn settle(open: &mut JoinSet<Result<(), TakeError>>, most: usize) -> Result<(), TakeError> {
    while open.len() > most {
        if let Some(written) = open.join_next().await {
            written.unwrap_or(Err(TakeError::BrokenOff))?;
        }
    }
    Ok(())
}
