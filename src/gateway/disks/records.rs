//! What is told of disks, as records in the stream, and counted.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::watch;

use super::compare::{Compared, Found};
use super::pull::State;
use crate::hypervisor::qemu::GRANULARITY;
use crate::proto::disk::nbd::{Content, Piece};
use crate::proto::disk::stream::Writer;

/// The source's end of the stream.
pub(super) struct Records {
    stream: OwnedWriteHalf,
    writer: Writer,
    tell: Arc<watch::Sender<State>>,
}

impl Records {
    pub(super) fn new(stream: OwnedWriteHalf, tell: Arc<watch::Sender<State>>) -> Self {
        Self {
            stream,
            writer: Writer::default(),
            tell,
        }
    }

    /// Asks what the destination's disks hold.
    pub(super) async fn ask(&mut self) -> io::Result<()> {
        let question = self.writer.ask();
        self.stream.write_all(&question).await
    }

    /// A round is over.
    pub(super) async fn round(&mut self) -> io::Result<()> {
        let end = self.writer.round();
        self.stream.write_all(&end).await?;
        self.tell.send_modify(|state| state.figures.rounds += 1);
        Ok(())
    }

    /// Nothing follows. The digest of everything.
    pub(super) async fn end(&mut self) -> io::Result<[u8; 32]> {
        let (end, digest) = std::mem::take(&mut self.writer).end();
        self.stream.write_all(&end).await?;
        self.stream.shutdown().await?;
        Ok(digest)
    }

    /// What was read from `start` on. Where the destination has zeroes already, they are not told.
    pub(super) async fn pieces(
        &mut self,
        disk: u16,
        start: u64,
        pieces: Vec<Piece>,
        has_zeroes: bool,
    ) -> io::Result<()> {
        let mut offset = start;
        for piece in pieces {
            match piece.content {
                Content::Data(data) => {
                    self.count(data.len() as u64);
                    self.data(disk, offset, data.clone(), has_zeroes).await?;
                    offset += data.len() as u64;
                }
                Content::Hole(length) => {
                    self.zeroes(disk, offset..offset + length, has_zeroes).await?;
                    offset += length;
                }
            }
        }
        Ok(())
    }

    /// What was compared from `start` on.
    pub(super) async fn compared(&mut self, disk: u16, start: u64, compared: Vec<Compared>) -> io::Result<()> {
        let mut offset = start;
        for Compared { length, found } in compared {
            match found {
                Found::Same(digests) => {
                    let record = self.writer.same(disk, offset, length, &digests);
                    self.stream.write_all(&record).await?;
                    self.tell.send_modify(|state| state.figures.same_bytes += length);
                }
                Found::Zeroes => self.zeroes(disk, offset..offset + length, false).await?,
                Found::Data(data) => self.put(disk, offset, &data).await?,
            }
            offset += length;
        }
        Ok(())
    }

    /// So much was read.
    pub(super) fn count(&self, read_bytes: u64) {
        self.tell.send_modify(|state| {
            state.figures.read_bytes += read_bytes;
            state.figures.last_round_bytes += read_bytes;
        });
    }

    /// Runs of zeroes that are as long as a cluster are told, not sent.
    async fn data(&mut self, disk: u16, offset: u64, data: Bytes, has_zeroes: bool) -> io::Result<()> {
        let cluster = usize::try_from(GRANULARITY).expect("a cluster is short");
        let mut at = 0;
        while at < data.len() {
            let is_zero = |at: usize| data[at..data.len().min(at + cluster)].iter().all(|byte| *byte == 0);
            let zero = is_zero(at);
            let mut end = data.len().min(at + cluster);
            while end < data.len() && is_zero(end) == zero {
                end = data.len().min(end + cluster);
            }
            let start = offset + at as u64;
            if zero {
                self.zeroes(disk, start..offset + end as u64, has_zeroes).await?;
            } else {
                self.put(disk, start, &data.slice(at..end)).await?;
            }
            at = end;
        }
        Ok(())
    }

    async fn put(&mut self, disk: u16, offset: u64, data: &Bytes) -> io::Result<()> {
        let header = self.writer.data(disk, offset, data);
        self.stream.write_all(&header).await?;
        self.stream.write_all(data).await?;
        Ok(())
    }

    /// Tells of zeroes, where they are not there.
    pub(super) async fn zeroes(&mut self, disk: u16, range: Range<u64>, are_there: bool) -> io::Result<()> {
        let length = range.end - range.start;
        if !are_there {
            let record = self.writer.zeroes(disk, range.start, length);
            self.stream.write_all(&record).await?;
        }
        self.tell.send_modify(|state| state.figures.zero_bytes += length);
        Ok(())
    }
}
