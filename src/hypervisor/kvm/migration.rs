//! A migration under way, as the monitor and the engine share it: what the one asks for, and how far the other is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a gateway asks for while a migration runs. Every value may change at any time.
#[derive(Debug)]
pub struct Guidance {
    downtime_limit_ms: AtomicU64,
    switchover_bandwidth: AtomicU64,
    is_cancelled: AtomicBool,
    progress: Mutex<Progress>,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Passes over the dirty set that have begun; the first is 1.
    pub rounds: u64,
    /// Bytes of the stream that the socket has taken.
    pub transferred_bytes: u64,
    /// Bytes of pages that are dirty, or have not been sent yet.
    pub remaining_bytes: u64,
    /// Bytes of the guest's memory.
    pub total_bytes: u64,
    /// Pages that were sent with their content.
    pub normal_pages: u64,
    /// Pages that were sent as zero.
    pub zero_pages: u64,
    /// Pages that the guest has dirtied in a second of the last round.
    pub dirty_pages_per_second: u64,
    /// Bytes of the stream that the socket takes in a second.
    pub bytes_per_second: f64,
    /// How long the guest would stand if it was stopped now.
    pub expected_downtime: Duration,
}

impl Guidance {
    /// With a limit for the time that the guest stands, and no bandwidth: then the engine goes by what the socket takes.
    #[must_use]
    pub fn new(downtime_limit: Duration) -> Self {
        Self {
            downtime_limit_ms: AtomicU64::new(millis(downtime_limit)),
            switchover_bandwidth: AtomicU64::new(0),
            is_cancelled: AtomicBool::new(false),
            progress: Mutex::default(),
        }
    }

    /// Longest time that the transfer of the last pages may take.
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.downtime_limit_ms.load(Ordering::Relaxed))
    }

    /// Changes it.
    pub fn set_downtime_limit(&self, limit: Duration) {
        self.downtime_limit_ms.store(millis(limit), Ordering::Relaxed);
    }

    /// Stream bytes per second with which the rest will be taken; `None`: whatever the socket takes.
    pub fn switchover_bandwidth(&self) -> Option<u64> {
        Some(self.switchover_bandwidth.load(Ordering::Relaxed)).filter(|&rate| rate > 0)
    }

    /// Changes it; 0: nobody knows.
    pub fn set_switchover_bandwidth(&self, bytes_per_second: u64) {
        self.switchover_bandwidth.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Nobody wants it any more.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether nobody wants it any more.
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how far it is.
    pub fn set_progress(&self, progress: Progress) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
