//! What of the operator's downtime limit is left for moving bytes.
//!
//! ```text
//! budget = limit - (one-way delay + backlog + syncs + load + one retransmission)
//! ```
//!
//! Worked example at 150 ms RTT and 1 Gbit/s: limit 500 ms - (75 one way + 15 backlog + 20 syncs + 30 load + 150 retransmission) =
//! 210 ms, which is 26 MB on the wire.

use std::time::Duration;

use crate::proto::page::ByteRate;

/// What may wait unsent in the gateway, in time at the path's goodput: the vmm believes that it has been carried, and the guest
/// stands still until it is. Enough for the encoder to be a few batches ahead of a gigabit (256 KiB in 2 ms), while
/// one is being admitted and one or two wait at the peer for its vmm.
pub const BACKLOG: Duration = Duration::from_millis(15);

/// What may wait while the guest is not about to be stopped: enough for every thread on the way to wait for a CPU now and then, and the path to
/// be busy all the same.
const AMPLE: Duration = Duration::from_millis(100);

/// That is no more than this, unless [`BACKLOG`] is: it is memory.
const MOST_AMPLE: u64 = 4 << 20;

/// A vmm that finds only pages of zeroes goes through its memory as fast as this.
const THROUGH_ZEROES: ByteRate = ByteRate(2_000_000_000);

/// Between looks at the vmm while the guest runs.
pub const LOOK: Duration = Duration::from_millis(100);

/// Most bytes taken from a vmm at once, one batch of the encoder: two of the groups that it compresses as a whole.
const MOST_READ: u64 = 256 << 10;

/// The ratio is counted on up to this: what comes next may reduce worse, and is on its way then.
const MOST_RATIO: u64 = 8;

/// The least: less would go out in lanes that are half empty.
const LEAST_READ: u64 = 64 << 10;

/// What may wait in the gateway on its way from the vmm to the path, in bytes.
///
/// While more than the limit waits, nothing is read; so at most the limit and one read wait, together
/// `max(BACKLOG x goodput, 3 x read)`: 15 ms on links from 110 Mbit/s on, 17 ms at 100 Mbit/s, 167 ms at 10 Mbit/s. Two reads below the
/// limit: one frame is admitted while the next is ready, or the path would stand still between them.
///
/// What is not encoded yet counts as what it will become. Counted as it is, 190 KB were in the encoder and almost nothing on the path, once pages
/// went as what changed in them: a guest that wrote 75 MB/s was taken 45 MB/s of at 100 Mbit/s, on two busy cores (2026-11-27).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes that are read from the vmm at once.
    pub read_bytes: u64,
    /// While more frame bytes than this wait, nothing is read.
    pub limit_bytes: u64,
    /// Vmm bytes that count as one frame byte, at least 1.
    pub ratio: u64,
}

impl Backlog {
    /// On a path that takes `goodput`, of a stream that shrinks to a part in `ratio` at least.
    #[must_use]
    pub fn at(goodput: ByteRate, ratio: f64) -> Self {
        Self::of(goodput.bytes_in(BACKLOG), ratio)
    }

    /// The same while `to_go` bytes of memory have to be gone through before the vmm may stop the guest: more may wait where that will be gone by then.
    #[must_use]
    pub fn before_the_stop(goodput: ByteRate, ratio: f64, to_go: u64) -> Self {
        let time = THROUGH_ZEROES.time_for(to_go).saturating_sub(LOOK).min(AMPLE);
        let ample = goodput.bytes_in(time).min(MOST_AMPLE);
        Self::of(goodput.bytes_in(BACKLOG).max(ample), ratio)
    }

    fn of(bytes: u64, ratio: f64) -> Self {
        let ratio = (ratio as u64).clamp(1, MOST_RATIO);
        let read_bytes = (bytes.saturating_mul(ratio) / 3).clamp(LEAST_READ, MOST_READ);
        let read_as_frames = read_bytes / ratio;
        Self {
            read_bytes,
            limit_bytes: bytes.saturating_sub(read_as_frames).max(2 * read_as_frames),
            ratio,
        }
    }

    /// How long all of it takes at `goodput`.
    #[must_use]
    pub fn time_at(&self, goodput: ByteRate) -> Duration {
        goodput.time_for(self.limit_bytes + self.read_bytes / self.ratio)
    }
}

/// What a switchover costs whatever the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedCosts {
    /// From the source's last byte to the destination: half the RTT.
    pub one_way: Duration,
    /// What may wait unsent in the gateway when the guest stops.
    pub backlog: Duration,
    /// Journal records that are synced while the guest stands: PERMIT and COMMIT.
    pub syncs: Duration,
    /// The destination's vmm reads the device state.
    pub load: Duration,
    /// A lost packet at the tail is noticed and repaired: about one RTT.
    pub retransmission: Duration,
}

impl FixedCosts {
    /// The costs on a path of this RTT that takes `goodput`, where that is known beforehand. The other figures are as measured with QEMU 7.2
    /// and 10.0 (2026-11): device state loads in 5-30 ms, two records sync in 2-20 ms.
    #[must_use]
    pub fn on_path(rtt: Duration, goodput: Option<ByteRate>) -> Self {
        let backlog = goodput.map_or(BACKLOG, |goodput| Backlog::at(goodput, 1.0).time_at(goodput));
        Self {
            one_way: rtt / 2,
            backlog: backlog.max(BACKLOG),
            syncs: Duration::from_millis(20),
            load: Duration::from_millis(30),
            retransmission: rtt,
        }
    }

    /// Their sum: the least limit that can be promised.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.one_way + self.backlog + self.syncs + self.load + self.retransmission
    }
}

/// The operator's limit with the fixed costs taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// What the operator allows from pause to resume.
    pub limit: Duration,
    /// What of it is left for moving bytes; never zero.
    pub transfer: Duration,
}

impl Budget {
    /// # Errors
    /// [`BudgetError`] where the fixed costs alone reach the limit: said before anything moves.
    pub fn new(limit: Duration, costs: &FixedCosts) -> Result<Self, BudgetError> {
        match limit.checked_sub(costs.total()) {
            Some(transfer) if transfer >= Duration::from_millis(1) => Ok(Self { limit, transfer }),
            _ => Err(BudgetError {
                limit_ms: limit.as_millis(),
                fixed_ms: costs.total().as_millis(),
                one_way_ms: costs.one_way.as_millis(),
                retransmission_ms: costs.retransmission.as_millis(),
            }),
        }
    }
}

/// The limit cannot be promised on this path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a downtime of {limit_ms} ms cannot be promised on this path: {fixed_ms} ms pass whatever the guest does \
     ({one_way_ms} ms one way, {retransmission_ms} ms for one lost packet, the rest syncs, load and backlog); \
     allow more with --downtime-limit"
)]
pub struct BudgetError {
    /// What was asked for.
    pub limit_ms: u128,
    /// What passes in any case.
    pub fixed_ms: u128,
    /// Half the RTT.
    pub one_way_ms: u128,
    /// One repair.
    pub retransmission_ms: u128,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn half_a_second_at_150_ms_and_a_gigabit_leaves_210_ms_for_bytes() {
        let gigabit = Some(ByteRate(118_000_000));
        let budget = Budget::new(MS(500), &FixedCosts::on_path(MS(150), gigabit)).unwrap();
        assert_eq!(budget.transfer, MS(500 - 75 - 15 - 20 - 30 - 150));
    }

    #[test]
    fn a_slow_path_costs_the_time_of_the_least_backlog() {
        let backlog = |bytes_per_second| FixedCosts::on_path(MS(150), Some(ByteRate(bytes_per_second))).backlog;
        assert_eq!(backlog(1_180_000_000), MS(15));
        assert_eq!(backlog(118_000_000), MS(15));
        assert_eq!(backlog(3 * LEAST_READ * 100), MS(15));
        assert_eq!(backlog(3 * LEAST_READ * 50), MS(20));
        assert_eq!(backlog(3 * LEAST_READ * 10), MS(100));
        assert!(backlog(0) > MS(1_000_000));
    }

    #[test]
    fn a_stream_that_shrinks_waits_no_longer_for_being_read_in_larger_pieces() {
        for goodput in [1_250_000, 12_500_000, 118_000_000, 1_180_000_000].map(ByteRate) {
            let plain = Backlog::at(goodput, 1.0);
            for ratio in [0.5, 1.9, 4.0, 8.0, 100.0] {
                let reduced = Backlog::at(goodput, ratio);
                assert!(reduced.time_at(goodput) <= plain.time_at(goodput), "{goodput} {ratio}");
                assert!(reduced.read_bytes >= plain.read_bytes);
                assert!(reduced.ratio >= 1);
            }
        }
        let hot = Backlog::at(ByteRate(12_500_000), 100.0);
        assert_eq!((hot.read_bytes, hot.ratio), (MOST_READ, 8));
    }

    #[test]
    fn what_may_wait_is_gone_before_the_guest_can_be_stopped() {
        let waits = |bytes_per_second, to_go| {
            let goodput = ByteRate(bytes_per_second);
            let backlog = Backlog::before_the_stop(goodput, 2.0, to_go);
            assert!(backlog.limit_bytes >= Backlog::at(goodput, 2.0).limit_bytes);
            backlog.time_at(goodput)
        };
        assert_eq!(waits(12_500_000, 2 << 30), MS(100));
        assert_eq!(waits(12_500_000, 300_000_000), MS(50));
        let least = Backlog::at(ByteRate(12_500_000), 2.0).time_at(ByteRate(12_500_000));
        assert_eq!(waits(12_500_000, 200_000_000), least);
        assert_eq!(waits(12_500_000, 0), least);
        assert!(waits(118_000_000, 2 << 30) < MS(36), "memory bounds it on a fast path");
        assert_eq!(waits(1_180_000_000, 2 << 30), MS(15));
    }

    #[test]
    fn a_limit_at_the_fixed_costs_is_refused_and_one_just_above_is_not() {
        let costs = FixedCosts::on_path(MS(150), None);
        assert!(Budget::new(costs.total(), &costs).is_err());
        assert!(Budget::new(costs.total() + MS(1), &costs).is_ok());
    }
}
