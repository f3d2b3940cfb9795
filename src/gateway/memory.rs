//! The memory budget, shared out to the migrations that are open.
//!
//! Half of the budget is for what is on the way (windows of sessions and of QUIC, at both ends), the other half for the pages
//! that dictionaries keep in memory. A migration that finds too little left is refused before anything moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::proto::page::{ByteRate, PAGE_SIZE};
use crate::proto::wire::Limits;
use crate::proto::wire::hello::MIN_WINDOW;

/// Rate that windows are made for where none is configured.
const ASSUMED_RATE: ByteRate = ByteRate::from_bits_per_second(1_000_000_000);

/// Most pages in a session dictionary: 4 GiB in memory and spill file together.
const MOST_DICTIONARY_PAGES: u64 = 1 << 20;

/// Least pages in memory that a dictionary is worth having with: 4 MiB.
const LEAST_PAGES: u64 = 1 << 10;

/// What is left of the budget for dictionaries' pages.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    total: u64,
    left: Arc<AtomicU64>,
}

/// Memory that one migration holds until this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    bytes: u64,
    left: Arc<AtomicU64>,
}

impl MemoryBudget {
    pub(crate) fn new(total: u64) -> Self {
        Self {
            total,
            left: Arc::new(AtomicU64::new(total / 2)),
        }
    }

    /// What this gateway can hold for one migration on a link of this rate and RTT: a window of 4 BDP, since a lost packet is
    /// repaired two round trips after it was first sent and what is behind it waits, within an eighth of the budget, which the
    /// session and QUIC each take at both ends.
    pub(crate) fn limits(&self, rate: Option<ByteRate>, rtt: Duration) -> Limits {
        let wanted = rate.unwrap_or(ASSUMED_RATE).bytes_in(rtt).saturating_mul(4);
        Limits {
            window_bytes: wanted.clamp(MIN_WINDOW, (self.total / 8).max(MIN_WINDOW)),
            dictionary_pages: u32::try_from(MOST_DICTIONARY_PAGES).expect("2^20 fits"),
        }
    }

    /// Memory for a dictionary of up to `pages` pages: all of it, or half of what is left.
    pub(crate) fn reserve_pages(&self, pages: u32) -> Option<Reservation> {
        let mut reserved = 0;
        self.left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| {
                let bytes = (u64::from(pages) * PAGE_SIZE as u64).min(left / 2);
                reserved = bytes;
                (bytes >= LEAST_PAGES * PAGE_SIZE as u64 || bytes == u64::from(pages) * PAGE_SIZE as u64)
                    .then_some(left - bytes)
            })
            .ok()
            .map(|_| Reservation {
                bytes: reserved,
                left: Arc::clone(&self.left),
            })
    }
}

impl Reservation {
    /// Pages that may be kept in memory.
    pub(crate) fn pages(&self) -> u32 {
        u32::try_from(self.bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.left.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_migrations_hold_never_exceeds_the_budget_and_comes_back() {
        let budget = MemoryBudget::new(512 << 20);
        let mut held = Vec::new();
        while let Some(reservation) = budget.reserve_pages(1 << 20) {
            held.push(reservation);
        }
        let sum: u64 = held.iter().map(|reservation| reservation.bytes).sum();
        assert!(held.len() > 3 && sum <= 256 << 20, "{} {sum}", held.len());
        drop(held);
        assert_eq!(budget.left.load(Ordering::Relaxed), 256 << 20);
    }

    #[test]
    fn a_gigabit_at_150_ms_gets_four_bdp_unless_the_budget_is_small() {
        let limits = |budget| {
            MemoryBudget::new(budget)
                .limits(None, Duration::from_millis(150))
                .window_bytes
        };
        assert_eq!(limits(1 << 30), 75_000_000);
        assert_eq!(limits(512 << 20), 64 << 20);
        assert_eq!(limits(1 << 20), MIN_WINDOW);
    }
}
