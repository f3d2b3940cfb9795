//! The end of the path: restored bytes into the destination's vmm, all but a tail.
//!
//! QEMU runs a guest whose stream is complete but for its last byte as soon as that byte, or the end of the socket, is there:
//! a stream that is cut inside the closing description still reports `completed`. So everything from the device state on, and
//! never less than [`HELD_TAIL`], waits here until ownership has moved.

use std::collections::VecDeque;

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};

/// Bytes at the end of what has arrived that are always held back: more than EOF and the closing description take (46 KiB
/// with 33 devices on QEMU 10.0).
pub(crate) const HELD_TAIL: usize = 256 << 10;

/// Most bytes that are held back from the device state on. Beyond it the oldest are passed on: the tail stays held.
const HELD_LIMIT: usize = 32 << 20;

/// Most pieces that are held back: each costs some hundred bytes beside its own, and is a byte long at least, so that as many are never
/// less than the tail. QEMU's device state is a few hundred pieces.
const HELD_PIECES: usize = HELD_TAIL;

/// Whether the end of a stream waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Until ownership has moved.
    Held,
    /// It passes like the rest: the stream is none of a VM that we move.
    Passed,
}

/// Restored bytes on their way into a vmm.
#[derive(Debug)]
pub(crate) struct VmmOutput<W> {
    vmm: W,
    tail: Tail,
    queue: VecDeque<Bytes>,
    queued: usize,
    device_state: bool,
    written: u64,
}

impl<W: AsyncWrite + Unpin> VmmOutput<W> {
    pub(crate) fn new(vmm: W, tail: Tail) -> Self {
        Self {
            vmm,
            tail,
            queue: VecDeque::new(),
            queued: 0,
            device_state: false,
            written: 0,
        }
    }

    /// Appends bytes and writes what need not be held. `device_state`: from these bytes on everything is held.
    ///
    /// # Errors
    /// The vmm does not read any more.
    pub(crate) async fn write(&mut self, bytes: Bytes, device_state: bool) -> std::io::Result<()> {
        self.device_state |= device_state;
        if bytes.is_empty() {
            return Ok(());
        }
        self.queued += bytes.len();
        self.queue.push_back(bytes);
        match (self.tail, self.device_state) {
            (Tail::Held, true) => self.drain_to(HELD_LIMIT).await,
            (Tail::Held, false) => self.drain_to(HELD_TAIL).await,
            (Tail::Passed, _) => self.release().await,
        }
    }

    /// Ownership has moved: writes everything that was held.
    ///
    /// # Errors
    /// The vmm does not read any more.
    pub(crate) async fn release(&mut self) -> std::io::Result<()> {
        self.drain_to(0).await?;
        self.vmm.flush().await
    }

    /// Nothing follows what was released.
    ///
    /// # Errors
    /// The vmm does not read any more.
    pub(crate) async fn end(mut self) -> std::io::Result<()> {
        self.vmm.shutdown().await
    }

    /// Bytes that the vmm has taken.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    async fn drain_to(&mut self, keep: usize) -> std::io::Result<()> {
        while self.queued > keep || self.queue.len() > HELD_PIECES {
            let front = self.queue.front_mut().expect("queued bytes are in the queue");
            let now = match self.queued.saturating_sub(keep) {
                0 => front.len(),
                over => front.len().min(over),
            };
            self.vmm.write_all(&front[..now]).await?;
            self.written += now as u64;
            self.queued -= now;
            if now == front.len() {
                self.queue.pop_front();
            } else {
                let _ = front.split_to(now);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(len: usize, fill: u8) -> Bytes {
        Bytes::from(vec![fill; len])
    }

    #[tokio::test]
    async fn the_last_quarter_megabyte_waits_until_it_is_released() {
        let mut taken = Vec::new();
        let mut output = VmmOutput::new(&mut taken, Tail::Held);
        output.write(block(HELD_TAIL, 1), false).await.unwrap();
        assert_eq!(output.written(), 0);
        output.write(block(10, 2), false).await.unwrap();
        assert_eq!(output.written(), 10);
        output.release().await.unwrap();
        assert_eq!(taken.len(), HELD_TAIL + 10);
        assert_eq!(taken[HELD_TAIL..], [2; 10]);
    }

    #[tokio::test]
    async fn from_the_device_state_on_nothing_passes() {
        let mut taken = Vec::new();
        let mut output = VmmOutput::new(&mut taken, Tail::Held);
        output.write(block(HELD_TAIL + 5, 1), false).await.unwrap();
        output.write(block(4 * HELD_TAIL, 2), true).await.unwrap();
        assert_eq!(output.written(), 5);
        output.release().await.unwrap();
        assert_eq!(taken.len(), 5 * HELD_TAIL + 5);
    }

    #[tokio::test]
    async fn what_is_held_stays_bounded_and_the_tail_is_held_all_the_same() {
        let mut taken = Vec::new();
        let mut output = VmmOutput::new(&mut taken, Tail::Held);
        for _ in 0..40 {
            output.write(block(1 << 20, 3), true).await.unwrap();
        }
        assert_eq!(output.written() as usize, (40 << 20) - HELD_LIMIT);
    }

    #[tokio::test]
    async fn pieces_that_are_held_are_bounded_too_and_never_less_than_the_tail() {
        let mut taken = Vec::new();
        let mut output = VmmOutput::new(&mut taken, Tail::Held);
        for _ in 0..HELD_PIECES {
            output.write(block(1, 4), true).await.unwrap();
            output.write(Bytes::new(), true).await.unwrap();
        }
        assert_eq!((output.written(), output.queue.len()), (0, HELD_PIECES));
        output.write(block(7, 5), true).await.unwrap();
        assert_eq!((output.written(), output.queue.len()), (1, HELD_PIECES));
        assert!(output.queued >= HELD_TAIL);
    }
}
