//! Progress that never runs backwards and an ETA that says why it grew.

use std::time::{Duration, Instant};

use super::policy::{Sample, vmm_rate};

/// What the operator is told at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    /// 0 to 100, never smaller than before.
    pub percent: f64,
    /// Time to switchover, where one is in sight.
    pub eta: Option<Duration>,
    /// Why the ETA grew, or why there is none.
    pub note: Option<String>,
}

/// Percent and ETA of one migration.
#[derive(Debug, Default)]
pub struct ProgressTracker {
    percent: f64,
    /// The lowest ETA of late, and when it was.
    lowest: Option<(Duration, Instant)>,
    /// Until when the operator is told that the ETA grew.
    explained_until: Option<Instant>,
}

/// An ETA that grew by less than this is not worth a word.
const WORTH_A_WORD: Duration = Duration::from_secs(2);

/// What an ETA is compared with: samples come ten times a second, and it grows over many of them.
const RECENT: Duration = Duration::from_secs(10);

/// Long enough to be read, also by those who are shown a line every few seconds.
const HELD: Duration = Duration::from_secs(6);

impl ProgressTracker {
    /// The outlook with `sample`.
    ///
    /// While the first pass runs the percentage is the share of memory that has been passed over, up to 90; the rest is the
    /// re-sending, by how close the remainder is to what a switchover may carry.
    pub fn update(&mut self, sample: &Sample, total_bytes: u64, allowed: Duration) -> Outlook {
        let rate = vmm_rate(sample.goodput, sample.reduction_ratio);
        let switchover_bytes = (rate as f64 * allowed.as_secs_f64()).max(1.0);
        let raw = if sample.round <= 1 {
            let passed = total_bytes.saturating_sub(sample.remaining_bytes) as f64;
            90.0 * passed / (total_bytes.max(1) as f64)
        } else {
            90.0 + 9.0 * (switchover_bytes / (sample.remaining_bytes as f64).max(switchover_bytes))
        };
        self.percent = self.percent.max(raw.clamp(0.0, 99.0));

        let (eta, note) = Self::eta(sample, rate, switchover_bytes);
        if let Some(eta) = eta {
            self.compare(sample.now, eta);
        }
        let explains = eta.is_some() && self.explained_until.is_some_and(|until| sample.now < until);
        let note = note.or_else(|| {
            explains.then(|| {
                format!(
                    "the guest writes {:.1} MB/s, the link carries {:.1} MB/s of its memory",
                    sample.dirty_rate.0 as f64 / 1e6,
                    rate as f64 / 1e6
                )
            })
        });
        Outlook {
            percent: self.percent,
            eta,
            note,
        }
    }

    /// The VM runs at the destination.
    pub fn finish(&mut self) -> Outlook {
        self.percent = 100.0;
        Outlook {
            percent: 100.0,
            eta: Some(Duration::ZERO),
            note: None,
        }
    }

    fn compare(&mut self, now: Instant, eta: Duration) {
        let lowest = self
            .lowest
            .filter(|(lowest, at)| *lowest < eta && now.saturating_duration_since(*at) < RECENT);
        match lowest {
            Some((lowest, _)) if eta > lowest + WORTH_A_WORD => {
                self.explained_until = Some(now + HELD);
                self.lowest = Some((eta, now));
            }
            Some(_) => {}
            None => self.lowest = Some((eta, now)),
        }
    }

    /// Each round leaves what the guest wrote during it: with q = dirty rate / rate < 1 the rounds form a geometric series that
    /// sums to `remaining / (rate - dirty rate)`. With q >= 1 it has no end.
    fn eta(sample: &Sample, rate: u64, switchover_bytes: f64) -> (Option<Duration>, Option<String>) {
        let remaining = sample.remaining_bytes as f64;
        if rate == 0 {
            return (None, Some("the link carries nothing at the moment".to_owned()));
        }
        if remaining <= switchover_bytes {
            return (Some(Duration::from_secs_f64(remaining / rate as f64)), None);
        }
        let dirty = if sample.round <= 1 { 0 } else { sample.dirty_rate.0 };
        if dirty >= rate {
            let note = format!(
                "the guest writes {:.1} MB/s and the link carries {:.1} MB/s of its memory",
                dirty as f64 / 1e6,
                rate as f64 / 1e6
            );
            return (None, Some(note));
        }
        (
            Some(Duration::from_secs_f64((remaining / (rate - dirty) as f64).min(1e7))),
            None,
        )
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::page::ByteRate;

    const ALLOWED: Duration = Duration::from_millis(20);

    fn sample(round: u32, remaining_bytes: u64, dirty: u64) -> Sample {
        Sample {
            lag: Duration::ZERO,
            disks: Some(Duration::ZERO),
            now: Instant::now(),
            round,
            remaining_bytes,
            dirty_rate: ByteRate(dirty),
            goodput: ByteRate(100_000_000),
            reduction_ratio: 1.0,
        }
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_has_no_eta_and_a_reason() {
        let mut tracker = ProgressTracker::default();
        let outlook = tracker.update(&sample(3, 500_000_000, 120_000_000), 1 << 30, ALLOWED);
        assert_eq!(outlook.eta, None);
        assert!(outlook.note.unwrap().starts_with("the guest writes 120.0 MB/s"));
    }

    #[test]
    fn an_eta_that_grows_in_small_steps_says_why_for_a_while() {
        let mut tracker = ProgressTracker::default();
        let start = Instant::now();
        let at = |tenths: u32, remaining_bytes: u64| Sample {
            now: start + Duration::from_millis(100) * tenths,
            ..sample(3, remaining_bytes, 50_000_000)
        };
        // 100 ms of ETA more with each sample: 1 s at first, 2 s more than that after twenty.
        let mut notes = (0..=21).map(|step| {
            let remaining = 50_000_000 + u64::from(step) * 5_000_000;
            tracker.update(&at(step, remaining), 1 << 30, ALLOWED).note
        });
        assert!(notes.by_ref().take(21).all(|note| note.is_none()));
        assert!(notes.next().unwrap().unwrap().contains("the guest writes 50.0 MB/s"));
        drop(notes);
        let remaining = 155_000_000;
        assert!(tracker.update(&at(80, remaining), 1 << 30, ALLOWED).note.is_some());
        assert!(tracker.update(&at(81, remaining), 1 << 30, ALLOWED).note.is_none());
    }

    #[test]
    fn an_eta_that_shrinks_needs_no_word() {
        let mut tracker = ProgressTracker::default();
        for remaining in (1..50).rev() {
            let outlook = tracker.update(&sample(2, remaining * 10_000_000, 1_000_000), 1 << 30, ALLOWED);
            assert_eq!(outlook.note, None);
        }
    }

    proptest! {
        #[test]
        fn percent_never_runs_backwards(samples in proptest::collection::vec((0u32..9, 0u64..1 << 33, 0u64..1 << 30), 1..100)) {
            let mut tracker = ProgressTracker::default();
            let mut before = 0.0;
            for (round, remaining, dirty) in samples {
                let outlook = tracker.update(&sample(round, remaining, dirty), 1 << 32, ALLOWED);
                prop_assert!(outlook.percent >= before && outlook.percent <= 99.0);
                before = outlook.percent;
            }
        }
    }
}
