//! The destination says what its disks hold already, so that it need not come again: see [`held`](crate::proto::disk::held).

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::compare::read;
use super::take::{TakeError, Target};
use crate::hypervisor::nbd::NbdError;
use crate::proto::disk::extents::{Allocation, Extents};
use crate::proto::disk::held::{self, BlockKey, Digest, MOST_OPEN, Open, REGION};

/// Regions that are read at once.
const READS_AHEAD: usize = 4;

/// Bytes of a disk whose blocks are asked about at once: of whole regions.
const STEP: u64 = 1 << 30;

/// It is being said. Dropping it ends that.
pub(super) struct Telling {
    told: Arc<Told>,
    task: AbortOnDropHandle<Result<OwnedWriteHalf, TakeError>>,
    /// Everything has been said.
    ended: Option<OwnedWriteHalf>,
}

/// What was told of blocks and is not answered.
struct Told {
    open: Mutex<Open>,
    room: Semaphore,
}

/// Begins to say it.
pub(super) fn tell(targets: &Arc<Vec<Target>>, key: BlockKey, stream: OwnedWriteHalf) -> Telling {
    let told = Arc::new(Told {
        open: Mutex::default(),
        room: Semaphore::new(MOST_OPEN),
    });
    let teller = Teller {
        key,
        stream,
        told: Arc::clone(&told),
        zeroes: 0,
        reads: VecDeque::new(),
    };
    Telling {
        told,
        task: AbortOnDropHandle::new(tokio::spawn(teller.run(Arc::clone(targets)))),
        ended: None,
    }
}

impl Telling {
    /// What was said of these blocks.
    pub(super) fn digests(&self, disk: u16, range: Range<u64>) -> Option<Vec<Digest>> {
        let open = self.told.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.digests(disk, range).map(<[Digest]>::to_vec)
    }

    /// The source has answered up to here.
    pub(super) fn close(&self, disk: u16, end: u64) {
        let mut open = self.told.open.lock().unwrap_or_else(PoisonError::into_inner);
        self.told.room.add_permits(open.close(disk, end));
    }

    /// What another future gives, or why it cannot be said any more. The other is cancelled then.
    pub(super) async fn beside<T>(
        &mut self,
        other: impl Future<Output = Result<T, TakeError>>,
    ) -> Result<T, TakeError> {
        let mut other = std::pin::pin!(other);
        if self.ended.is_none() {
            tokio::select! {
                biased;
                told = &mut self.task => self.ended = Some(told.unwrap_or(Err(TakeError::BrokenOff))?),
                result = &mut other => return result,
            }
        }
        other.await
    }

    /// Until everything has been said: the source has answered all of it.
    pub(super) async fn end(self) -> Result<OwnedWriteHalf, TakeError> {
        match self.ended {
            Some(stream) => Ok(stream),
            None => self.task.await.unwrap_or(Err(TakeError::BrokenOff)),
        }
    }
}

/// The task's own.
struct Teller {
    key: BlockKey,
    stream: OwnedWriteHalf,
    told: Arc<Told>,
    /// Zeroes that have not been told.
    zeroes: u64,
    reads: VecDeque<(u16, Range<u64>, Read)>,
}

/// The digests of a region that is being read, if it is not all zeroes.
type Read = AbortOnDropHandle<Result<Option<Vec<Digest>>, NbdError>>;

impl Teller {
    async fn run(mut self, targets: Arc<Vec<Target>>) -> Result<OwnedWriteHalf, TakeError> {
        for (number, target) in (0_u16..).zip(&*targets) {
            let mut start = 0;
            while start < target.size_bytes {
                let end = target.size_bytes.min(start + STEP);
                let status = target.client.block_status(start..end).await;
                let status = status.map_err(|error| cannot_read(target, error))?;
                let regions = status[0].map(|flags| Allocation::from_flags(flags) == Allocation::Data);
                self.part(number, target, &regions).await?;
                start = end;
            }
            self.settle(target, 0).await?;
            self.tell_zeroes().await?;
        }
        Ok(self.stream)
    }

    /// A part of a disk, where it is known what of it has to be read.
    async fn part(&mut self, number: u16, target: &Target, has_data: &Extents<bool>) -> Result<(), TakeError> {
        for extent in regions(has_data).iter() {
            if !extent.state {
                self.settle(target, 0).await?;
                self.zeroes += extent.len();
                continue;
            }
            for region in Extents::uniform(extent.start..extent.end, ()).pieces(REGION) {
                // Given back when the source answers.
                let room = self.told.room.acquire().await.expect("it is never closed");
                room.forget();
                let (client, key) = (Arc::clone(&target.client), self.key.clone());
                let range = region.start..region.end;
                let read = async move {
                    let bytes = read(&client, range, true).await?;
                    let digests = tokio::task::spawn_blocking(move || {
                        let is_zero = bytes.iter().all(|byte| *byte == 0);
                        (!is_zero).then(|| key.digests(&bytes))
                    });
                    Ok(digests.await.expect("digesting does not panic"))
                };
                let read = AbortOnDropHandle::new(tokio::spawn(read));
                self.reads.push_back((number, region.start..region.end, read));
                self.settle(target, READS_AHEAD - 1).await?;
            }
        }
        Ok(())
    }

    /// Tells until no more than so many reads are open.
    async fn settle(&mut self, target: &Target, most: usize) -> Result<(), TakeError> {
        while self.reads.len() > most {
            let Some((number, range, read)) = self.reads.pop_front() else {
                break;
            };
            let digests = read.await.map_err(|_| TakeError::BrokenOff)?;
            let length = range.end - range.start;
            match digests.map_err(|error| cannot_read(target, error))? {
                None => {
                    self.told.room.add_permits(1);
                    self.zeroes += length;
                }
                Some(digests) => {
                    self.tell_zeroes().await?;
                    let part = held::blocks(length, &digests);
                    let open = |told: &Told| {
                        let mut open = told.open.lock().unwrap_or_else(PoisonError::into_inner);
                        open.push(number, range, digests);
                    };
                    open(&self.told);
                    self.stream.write_all(&part).await?;
                }
            }
        }
        Ok(())
    }

    async fn tell_zeroes(&mut self) -> Result<(), TakeError> {
        if self.zeroes > 0 {
            self.stream.write_all(&held::zeroes(self.zeroes)).await?;
            self.zeroes = 0;
        }
        Ok(())
    }
}

fn cannot_read(target: &Target, error: NbdError) -> TakeError {
    TakeError::Look {
        disk: target.name.clone(),
        error,
    }
}

/// Whole regions, with data where any of their bytes have. The range begins with one.
fn regions(has_data: &Extents<bool>) -> Extents<bool> {
    let mut regions = Extents::new(has_data.start());
    for extent in has_data.iter() {
        let end = match extent.state {
            true => extent.end.next_multiple_of(REGION).min(has_data.end()),
            false => extent.end / REGION * REGION,
        };
        regions.extend_to(end, extent.state);
    }
    regions.extend_to(has_data.end(), false);
    regions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_with_any_data_is_read_as_a_whole() {
        let mut has_data = Extents::new(0);
        for (end, state) in [
            (REGION / 2, false),
            (REGION / 2 + 1, true),
            (REGION + 5, false),
            (REGION + 6, true),
            (4 * REGION + 1, false),
            (4 * REGION + 2, true),
            (4 * REGION + 3, false),
        ] {
            has_data.extend_to(end, state);
        }
        let told: Vec<_> = regions(&has_data)
            .iter()
            .map(|extent| (extent.end, extent.state))
            .collect();
        assert_eq!(told, [(2 * REGION, true), (4 * REGION, false), (4 * REGION + 3, true)]);
        let empty = Extents::uniform(0..3 * REGION + 9, false);
        assert_eq!(regions(&empty), empty);
    }
}
