//! Rounds: what each pass over the dirty set took.

use std::time::{Duration, Instant};

use crate::proto::page::ByteRate;

/// One pass over the dirty set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// From 1: the first pass is over all memory.
    pub number: u32,
    /// How long it took.
    pub duration: Duration,
    /// Bytes of the vmm stream in it.
    pub vmm_bytes: u64,
    /// Bytes of frames in it.
    pub wire_bytes: u64,
    /// What was left for the next pass: dirtied meanwhile, as QEMU said at the first look at the next round; after the last
    /// round, what it said at the last look.
    pub dirty_bytes: u64,
}

/// Running totals at the edge of a round, as the gateway counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes of the vmm stream so far.
    pub vmm_bytes: u64,
    /// Bytes of frames so far.
    pub wire_bytes: u64,
}

/// Cuts the running totals into rounds by QEMU's `dirty-sync-count`.
#[derive(Debug)]
pub struct Rounds {
    finished: Vec<Round>,
    current: u32,
    began: Instant,
    at_begin: Totals,
    remaining_bytes: u64,
    dropped: u64,
}

/// Rounds that are kept one by one; a migration that never converges makes thousands. The first and the newest are kept.
pub const MAX_ROUNDS: usize = 500;

/// A round of less is over before its rate means anything.
const TELLING_BYTES: u64 = 4 << 20;

impl Rounds {
    /// Before the first round.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            finished: Vec::new(),
            current: 0,
            began: now,
            at_begin: Totals::default(),
            remaining_bytes: 0,
            dropped: 0,
        }
    }

    /// QEMU is in round `number` (`dirty-sync-count`) with `remaining_bytes` to go. Returns the round that this ended.
    pub fn observe(&mut self, now: Instant, number: u32, totals: Totals, remaining_bytes: u64) -> Option<Round> {
        self.remaining_bytes = remaining_bytes;
        if number <= self.current {
            return None;
        }
        let ended = self.end(now, totals);
        self.current = number;
        self.began = now;
        self.at_begin = totals;
        ended
    }

    /// The stream has ended: closes the round that was running.
    pub fn finish(&mut self, now: Instant, totals: Totals) -> Option<Round> {
        let ended = self.end(now, totals);
        self.current = 0;
        ended
    }

    /// Rounds so far, oldest first; where there were more than [`MAX_ROUNDS`], those in the middle are gone.
    #[must_use]
    pub fn finished(&self) -> &[Round] {
        &self.finished
    }

    /// How many rounds have ended, kept or not.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.finished.len() as u64 + self.dropped
    }

    /// Vmm bytes a second of pages that are sent again, as it was of late: the best of three rounds that were long enough to tell.
    #[must_use]
    pub fn re_send_rate(&self) -> Option<ByteRate> {
        let telling = self.finished.iter().rev().take_while(|round| round.number > 1);
        let rates = telling
            .filter(|round| round.vmm_bytes >= TELLING_BYTES && !round.duration.is_zero())
            .map(|round| ByteRate((round.vmm_bytes as f64 / round.duration.as_secs_f64()) as u64));
        rates.take(3).max()
    }

    fn end(&mut self, now: Instant, totals: Totals) -> Option<Round> {
        if self.current == 0 {
            return None;
        }
        let round = Round {
            number: self.current,
            duration: now.saturating_duration_since(self.began),
            vmm_bytes: totals.vmm_bytes.saturating_sub(self.at_begin.vmm_bytes),
            wire_bytes: totals.wire_bytes.saturating_sub(self.at_begin.wire_bytes),
            dirty_bytes: self.remaining_bytes,
        };
        if self.finished.len() == MAX_ROUNDS {
            self.finished.remove(MAX_ROUNDS / 2);
            self.dropped += 1;
        }
        self.finished.push(round);
        Some(round)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
mod tests {
    use super::*;

    #[test]
    fn rounds_share_out_the_totals_without_gap() {
        let start = Instant::now();
        let mut rounds = Rounds::new(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        let totals = |vmm_bytes| Totals {
            vmm_bytes,
            wire_bytes: vmm_bytes / 2,
        };
        assert_eq!(rounds.observe(at(0), 1, totals(0), 900), None);
        assert_eq!(rounds.observe(at(1), 1, totals(500), 400), None);
        let first = rounds.observe(at(4), 2, totals(1000), 80).unwrap();
        assert_eq!(
            (first.number, first.vmm_bytes, first.wire_bytes, first.dirty_bytes),
            (1, 1000, 500, 80)
        );
        assert_eq!(first.duration, Duration::from_secs(4));
        assert_eq!(rounds.observe(at(5), 2, totals(1050), 60), None);
        let last = rounds.finish(at(5), totals(1100)).unwrap();
        assert_eq!((last.number, last.vmm_bytes, last.dirty_bytes), (2, 100, 60));
        assert_eq!(rounds.count(), 2);
    }

    #[test]
    fn pages_that_are_sent_again_move_as_fast_as_they_did_and_short_rounds_tell_nothing() {
        let start = Instant::now();
        let mut rounds = Rounds::new(start);
        let mut vmm_bytes = 0;
        let mut now = start;
        for (number, megabytes, seconds) in [(1, 400, 20), (2, 80, 1), (3, 90, 1), (4, 70, 1), (5, 60, 1), (6, 2, 1)] {
            rounds.observe(
                now,
                number,
                Totals {
                    vmm_bytes,
                    wire_bytes: 0,
                },
                0,
            );
            assert_eq!(rounds.re_send_rate().is_some(), number > 2, "{number}");
            now += Duration::from_secs(seconds);
            vmm_bytes += megabytes * 1_000_000;
        }
        rounds.finish(
            now,
            Totals {
                vmm_bytes,
                wire_bytes: 0,
            },
        );
        assert_eq!(rounds.re_send_rate(), Some(ByteRate(90_000_000)));
    }

    #[test]
    fn a_migration_that_never_converges_keeps_a_bounded_list() {
        let start = Instant::now();
        let mut rounds = Rounds::new(start);
        for number in 1..=2000 {
            rounds.observe(start, number, Totals::default(), 0);
        }
        assert_eq!(rounds.finished().len(), MAX_ROUNDS);
        assert_eq!(rounds.count(), 1999);
        assert_eq!(rounds.finished()[0].number, 1);
        assert_eq!(rounds.finished().last().unwrap().number, 1999);
    }
}
