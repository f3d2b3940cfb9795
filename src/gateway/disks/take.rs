//! The destination's half: records are written through exports of the hypervisor that will own the disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::hypervisor::nbd::{NbdClient, NbdError};
use crate::hypervisor::qemu::{Access, BlockError, BlockLayer, GuestDisk, PREFIX, short_name};
use crate::proto::disk::nbd::Zeroing;
use crate::proto::disk::stream::{HEADER_LEN, MAX_DATA, Reader, Record, StreamError};
use crate::proto::wire::message::OfferedDisk;

/// Time for an export to be opened or closed.
const DEADLINE: Duration = Duration::from_secs(10);

/// Requests that are open at once. Their bytes are bounded by the client.
const OPEN_REQUESTS: usize = 64;

/// Why disks are not as they should be.
#[derive(Debug, thiserror::Error)]
enum TakeError {
    #[error("the disk {disk} cannot be written: {error}")]
    Write { disk: String, error: NbdError },
    #[error("the disks cannot be written: {0}")]
    Block(#[from] BlockError),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error("the stream of disks broke off")]
    BrokenOff,
    #[error("the stream of disks cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

/// How the writing of disks has ended.
#[derive(Debug)]
pub(crate) struct Taken {
    /// Everything is on disk, and nobody but the hypervisor can write any more; or a sentence.
    pub(crate) result: Result<(), String>,
    /// Once this is dropped, whoever fills the stream learns that it has ended.
    pub(crate) stream: UnixStream,
}

/// Opens the disks for writing and begins to write what is put into the socket that is returned. Where the images are new, what the first round tells
/// to be zero is so already: not every image gives back what is overwritten with zeroes (`discard = unmap`).
///
/// # Errors
/// A sentence.
pub(crate) async fn begin(
    block: BlockLayer,
    socket: PathBuf,
    offered: &[OfferedDisk],
    are_new: bool,
) -> Result<(UnixStream, AbortOnDropHandle<Taken>), String> {
    let own = block.disks().await.map_err(|error| error.to_string())?;
    let disks = offered.iter().map(|disk| counterpart(&own, disk));
    let disks = disks.collect::<Result<Vec<_>, String>>()?;
    block.clean_up().await;
    block.serve(&socket).await.map_err(|error| error.to_string())?;
    let opened = open(&block, &socket, &disks).await;
    // Nobody else needs to find it.
    let _ = std::fs::remove_file(&socket);
    let targets = opened.map_err(|error| error.to_string())?;
    let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
    let task = tokio::spawn(async move {
        let mut stream = ours;
        let result = take(&block, targets, are_new, &mut stream).await;
        Taken {
            result: result.map_err(|error| error.to_string()),
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
    if found.size_bytes != offered.size_bytes {
        return Err(format!(
            "the disk {name} has {} bytes at the source and {} at the destination",
            offered.size_bytes, found.size_bytes
        ));
    }
    Ok(found.clone())
}

/// A disk that is open for writing.
struct Target {
    name: String,
    size_bytes: u64,
    export: String,
    client: Arc<NbdClient>,
}

impl Target {
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

async fn open(block: &BlockLayer, socket: &Path, disks: &[GuestDisk]) -> Result<Vec<Target>, TakeError> {
    let mut targets = Vec::new();
    for (number, disk) in disks.iter().enumerate() {
        let export = format!("{PREFIX}{number}-write");
        block.export(&export, &disk.node, Access::Write).await?;
        let name = disk.short_name().to_owned();
        let client = NbdClient::connect(socket, &export, Vec::new(), DEADLINE).await;
        let client = client.map_err(|error| TakeError::Write {
            disk: name.clone(),
            error,
        })?;
        targets.push(Target {
            name,
            size_bytes: disk.size_bytes,
            export,
            client: Arc::new(client),
        });
    }
    Ok(targets)
}

async fn take(
    block: &BlockLayer,
    targets: Vec<Target>,
    are_new: bool,
    stream: &mut UnixStream,
) -> Result<(), TakeError> {
    let mut is_empty = are_new;
    let mut records = Reader::new(targets.iter().map(|target| target.size_bytes).collect());
    let mut received = BytesMut::with_capacity(HEADER_LEN + MAX_DATA);
    let mut open: JoinSet<Result<(), TakeError>> = JoinSet::new();
    while !records.has_ended() {
        while let Some(record) = records.next(&mut received)? {
            match record {
                Record::Data { disk, offset, data } => {
                    let target = &targets[usize::from(disk)];
                    open.spawn(target.ask(move |disk| async move { disk.write(offset, data).await }));
                }
                Record::Zeroes { .. } if is_empty => {}
                Record::Zeroes { disk, offset, length } => {
                    let range = offset..offset + length;
                    let target = &targets[usize::from(disk)];
                    open.spawn(
                        target.ask(move |disk| async move { disk.write_zeroes(range, Zeroing::MayBeHole).await }),
                    );
                }
                // The next round may write the same bytes again.
                Record::Round => {
                    is_empty = false;
                    settle(&mut open, 0).await?;
                }
                Record::End { .. } => {}
            }
            settle(&mut open, OPEN_REQUESTS).await?;
        }
        if !records.has_ended() && stream.read_buf(&mut received).await? == 0 {
            return Err(TakeError::BrokenOff);
        }
    }
    settle(&mut open, 0).await?;
    for target in &targets {
        open.spawn(target.ask(|disk| async move { disk.flush().await }));
    }
    settle(&mut open, 0).await?;
    // A guest that is continued while somebody else may write its disk would not be told.
    for target in &targets {
        block.end_export(&target.export).await?;
    }
    block.stop_serving().await?;
    Ok(())
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
