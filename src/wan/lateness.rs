//! How late the emulator hands over what is due: its own proof of accuracy.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Each power of two of nanoseconds is divided into this many buckets, so a quantile is at most 1/8 too high.
const STEPS: u32 = 8;
const BUCKETS: usize = 64 * STEPS as usize;

/// A histogram of delays, of fixed size.
#[derive(Clone, Debug)]
pub(super) struct Lateness {
    buckets: Box<[u64; BUCKETS]>,
    samples: u64,
    max: Duration,
}

/// What a histogram says, in microseconds. Quantiles are upper bounds, at most 1/8 too high.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatenessSummary {
    /// How many were measured.
    pub samples: u64,
    /// Half were no later.
    pub p50_us: f64,
    /// 99 % were no later.
    pub p99_us: f64,
    /// 99.9 % were no later.
    pub p999_us: f64,
    /// The latest.
    pub max_us: f64,
}

impl Default for Lateness {
    fn default() -> Self {
        Self {
            buckets: Box::new([0; BUCKETS]),
            samples: 0,
            max: Duration::ZERO,
        }
    }
}

impl Lateness {
    /// Counts one sample.
    pub(super) fn record(&mut self, late: Duration) {
        let nanos = u64::try_from(late.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)] += 1;
        self.samples += 1;
        self.max = self.max.max(late);
    }

    /// The delay that a share `quantile` of the samples did not exceed.
    pub(super) fn quantile(&self, quantile: f64) -> Duration {
        let rank = ((self.samples as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper_bound(index)).min(self.max);
            }
        }
        self.max
    }

    /// The figures that are reported.
    pub(super) fn summary(&self) -> LatenessSummary {
        let us = |duration: Duration| (duration.as_nanos() as f64 / 100.0).round() / 10.0;
        LatenessSummary {
            samples: self.samples,
            p50_us: us(self.quantile(0.5)),
            p99_us: us(self.quantile(0.99)),
            p999_us: us(self.quantile(0.999)),
            max_us: us(self.max),
        }
    }
}

fn bucket(nanos: u64) -> usize {
    if nanos < u64::from(STEPS) {
        return nanos as usize;
    }
    let power = nanos.ilog2();
    let step = (nanos >> (power - STEPS.ilog2())) as u32 - STEPS;
    ((power - STEPS.ilog2() + 1) * STEPS + step) as usize
}

/// The largest number in bucket `index`.
fn upper_bound(index: usize) -> u64 {
    let (octave, step) = (index as u32 / STEPS, u64::from(index as u32 % STEPS));
    if octave == 0 {
        step
    } else {
        ((u64::from(STEPS) + step + 1) << (octave - 1)).wrapping_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_bound_their_numbers_from_above() {
        let mut last = 0;
        for nanos in (0..2_000).chain((10..63).flat_map(|power| [(1 << power) - 1, 1 << power, (1 << power) + 1])) {
            let index = bucket(nanos);
            assert!(index >= last || nanos < 2_000);
            assert!(
                upper_bound(index) >= nanos && (index == 0 || upper_bound(index - 1) < nanos),
                "{nanos}"
            );
            last = index;
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles_are_at_most_an_eighth_too_high() {
        let mut histogram = Lateness::default();
        for us in 1..=1000 {
            histogram.record(Duration::from_micros(us));
        }
        for (quantile, exact) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let seen = histogram.quantile(quantile).as_nanos() as f64 / 1000.0;
            assert!(seen >= exact && seen <= exact * 1.125, "{quantile}: {seen}");
        }
        assert_eq!(histogram.summary().samples, 1000);
        assert_eq!(histogram.summary().max_us, 1000.0);
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        assert_eq!(Lateness::default().summary(), LatenessSummary::default());
    }
}
