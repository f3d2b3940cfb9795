//! Progress that never runs backwards and an ETA that says why it grew.

use std::time::Duration;

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
    last_eta: Option<Duration>,
}

/// An ETA that grew by less than this is not worth a word.
const WORTH_A_WORD: Duration = Duration::from_secs(2);

impl ProgressTracker {
    /// The outlook with `sample`. `stuck`: the policy has nothing left to give. `bandwidth` below in vmm bytes per second.
    ///
    /// While the first pass runs the percentage is the share of memory that has been passed over, up to 90; the rest is the
    /// re-sending, by how close the remainder is to what a switchover may carry.
    pub fn update(&mut self, sample: &Sample, total_bytes: u64, allowed: Duration, stuck: bool) -> Outlook {
        let rate = vmm_rate(sample.goodput, sample.reduction_ratio);
        let switchover_bytes = (rate as f64 * allowed.as_secs_f64()).max(1.0);
        let raw = if sample.round <= 1 {
            let passed = total_bytes.saturating_sub(sample.remaining_bytes) as f64;
            90.0 * passed / (total_bytes.max(1) as f64)
        } else {
            90.0 + 9.0 * (switchover_bytes / (sample.remaining_bytes as f64).max(switchover_bytes))
        };
        self.percent = self.percent.max(raw.clamp(0.0, 99.0));

        let (eta, note) = Self::eta(sample, rate, switchover_bytes, stuck);
        let note = note.or_else(|| {
            let (before, after) = (self.last_eta?, eta?);
            (after > before + WORTH_A_WORD).then(|| {
                format!(
                    "the guest writes {:.1} MB/s, the link carries {:.1} MB/s of its memory",
                    sample.dirty_rate.0 as f64 / 1e6,
                    rate as f64 / 1e6
                )
            })
        });
        self.last_eta = eta;
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

    /// Each round leaves what the guest wrote during it: with q = dirty rate / rate < 1 the rounds form a geometric series that
    /// sums to `remaining / (rate - dirty rate)`. With q >= 1 it has no end.
    fn eta(sample: &Sample, rate: u64, switchover_bytes: f64, stuck: bool) -> (Option<Duration>, Option<String>) {
        let remaining = sample.remaining_bytes as f64;
        if rate == 0 {
            return (None, Some("the link carries nothing at the moment".to_owned()));
        }
        if remaining <= switchover_bytes {
            return (Some(Duration::from_secs_f64(remaining / rate as f64)), None);
        }
        let dirty = if sample.round <= 1 { 0 } else { sample.dirty_rate.0 };
        if dirty >= rate {
            let stuck = if stuck { "not converging: " } else { "" };
            let note = format!(
                "{stuck}the guest writes {:.1} MB/s and the link carries {:.1} MB/s of its memory",
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
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::proto::page::ByteRate;

    fn sample(round: u32, remaining_bytes: u64, dirty: u64) -> Sample {
        Sample {
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
        let outlook = tracker.update(
            &sample(3, 500_000_000, 120_000_000),
            1 << 30,
            Duration::from_millis(20),
            true,
        );
        assert_eq!(outlook.eta, None);
        assert!(outlook.note.unwrap().starts_with("not converging"));
    }

    #[test]
    fn an_eta_that_grows_says_why() {
        let mut tracker = ProgressTracker::default();
        let allowed = Duration::from_millis(20);
        assert_eq!(
            tracker
                .update(&sample(2, 100_000_000, 1_000_000), 1 << 30, allowed, false)
                .note,
            None
        );
        let grown = tracker.update(&sample(3, 900_000_000, 50_000_000), 1 << 30, allowed, false);
        assert!(grown.note.unwrap().contains("the guest writes 50.0 MB/s"));
    }

    proptest! {
        #[test]
        fn percent_never_runs_backwards(samples in proptest::collection::vec((0u32..9, 0u64..1 << 33, 0u64..1 << 30), 1..100)) {
            let mut tracker = ProgressTracker::default();
            let mut before = 0.0;
            for (round, remaining, dirty) in samples {
                let outlook = tracker.update(&sample(round, remaining, dirty), 1 << 32, Duration::from_millis(20), false);
                prop_assert!(outlook.percent >= before && outlook.percent <= 99.0);
                before = outlook.percent;
            }
        }
    }
}
