//! Decides, sample by sample, what QEMU is told and whether to go on.
//!
//! Shortest stop first: the policy begins by allowing [`FIRST_TRANSFER`] for the last bytes. While rounds shrink it waits; where
//! the dirty set has stopped shrinking it doubles the allowance, up to the budget. A guest that writes slowly is thus stopped for
//! little more than the trip across; one that writes fast still moves, within the operator's limit. While the destination has more to do than it
//! will have done when new bytes get there, the guest would stand still for that as well: it takes from the allowance. What is left of disks is read
//! while the guest stands, and takes from the budget; where it leaves nothing, the guest is kept running as far as a limit can do that.

use std::time::{Duration, Instant};

use super::budget::{BACKLOG, Budget};
use crate::proto::page::ByteRate;

/// What the first rounds are allowed for the transfer of the last bytes. Below it rounds are so short that their fixed cost
/// (a bitmap sync and QEMU's 100 ms rate window) weighs more than the bytes.
pub const FIRST_TRANSFER: Duration = Duration::from_millis(20);

/// Rounds in a row without shrinking before the allowance is doubled.
pub const STALLED_ROUNDS: u32 = 2;

/// Time without a smaller remainder that counts as a stalled round where rounds are long.
pub const STALLED_TIME: Duration = Duration::from_secs(3);

/// What is known at one instant.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When.
    pub now: Instant,
    /// Round that runs, from 1 (`dirty-sync-count`).
    pub round: u32,
    /// Bytes of memory that QEMU still has to send.
    pub remaining_bytes: u64,
    /// What the guest writes, as QEMU measured it in the last round.
    pub dirty_rate: ByteRate,
    /// Frames' bytes per second that the path takes.
    pub goodput: ByteRate,
    /// Vmm bytes per frame byte of late, pessimistic (hot pages reduce worst); at least a little above 0.
    pub reduction_ratio: f64,
    /// How long the destination will be busy with earlier bytes when the next ones get there.
    pub lag: Duration,
    /// How long the rest of the guest's disks will take while it stands; `None`: that is not known yet.
    pub disks: Option<Duration>,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Go on with these settings.
    Continue(Settings),
    /// Stop here, the VM stays at the source; the reason is for the operator.
    GiveUp {
        /// In words.
        reason: String,
    },
}

/// What QEMU is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `downtime-limit`.
    pub downtime_limit: Duration,
    /// `avail-switchover-bandwidth`, in vmm bytes per second.
    pub switchover_bandwidth: ByteRate,
}

impl Settings {
    /// For a vmm that cannot be told a bandwidth and believes in one of its own: it stops the guest at `remaining <= believed x limit`,
    /// so the limit is shortened until that means `remaining <= bandwidth x limit` as it was. Never lengthened: what it believes changes
    /// between two looks.
    #[must_use]
    pub fn for_believed(self, believed: ByteRate) -> Self {
        let share = self.switchover_bandwidth.0 as f64 / believed.0.max(1) as f64;
        if share >= 1.0 {
            return self;
        }
        Self {
            downtime_limit: self.downtime_limit.mul_f64(share).max(LEAST_LIMIT),
            ..self
        }
    }

    /// For a vmm that is to keep its guest running as long as it can.
    #[must_use]
    pub fn held(self) -> Self {
        Self {
            downtime_limit: LEAST_LIMIT,
            ..self
        }
    }
}

/// The shortest `downtime-limit` that a vmm is given: its own unit.
const LEAST_LIMIT: Duration = Duration::from_millis(1);

/// The policy of one migration.
#[derive(Debug)]
pub struct Policy {
    budget: Budget,
    deadline: Option<Instant>,
    allowed: Duration,
    round: u32,
    smallest_remaining: u64,
    smallest_since: Instant,
    smallest_in_round: u64,
    stalled_rounds: u32,
    /// Since when the disks have left nothing of the budget.
    in_the_way: Option<Instant>,
    is_held_by_disks: bool,
}

impl Policy {
    /// A migration that begins `now` and must be over before `deadline`.
    #[must_use]
    pub fn new(now: Instant, budget: Budget, deadline: Option<Instant>) -> Self {
        Self {
            budget,
            deadline,
            allowed: FIRST_TRANSFER.min(budget.transfer),
            round: 0,
            smallest_remaining: u64::MAX,
            smallest_since: now,
            smallest_in_round: u64::MAX,
            stalled_rounds: 0,
            in_the_way: None,
            is_held_by_disks: false,
        }
    }

    /// What to do, given how things stand. Call at every sample and at every new round.
    pub fn decide(&mut self, sample: &Sample) -> Decision {
        self.watch_for_a_stall(sample);
        self.watch_disks(sample);
        if self.is_late(sample.now) {
            return Decision::GiveUp {
                reason: self.why_not_in_time(sample),
            };
        }
        let settings = self.settings(sample.goodput, sample.reduction_ratio);
        // Where the guest cannot be stopped otherwise, the destination is not waited for. What waits here is in the budget already.
        let lag = if self.is_stuck() {
            Duration::ZERO
        } else {
            sample.lag.saturating_sub(BACKLOG)
        };
        let lag = whole_millis(lag);
        let disks = sample.disks.unwrap_or(self.budget.transfer);
        let room = whole_millis(self.budget.transfer.saturating_sub(disks));
        Decision::Continue(Settings {
            downtime_limit: settings.downtime_limit.min(room).saturating_sub(lag).max(LEAST_LIMIT),
            ..settings
        })
    }

    /// It must be over before then.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// Whether the deadline has passed.
    #[must_use]
    pub fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }

    /// Settings for a path of this goodput and a stream of this reduction ratio.
    #[must_use]
    pub fn settings(&self, goodput: ByteRate, reduction_ratio: f64) -> Settings {
        Settings {
            downtime_limit: self.allowed,
            switchover_bandwidth: ByteRate(vmm_rate(goodput, reduction_ratio)),
        }
    }

    /// Whether everything the budget allows is in use and the dirty set still does not shrink.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.allowed == self.budget.transfer && self.stalled_rounds >= STALLED_ROUNDS
    }

    /// Whether what the guest writes to its disks has kept it from being stopped for a while.
    #[must_use]
    pub fn is_held_by_disks(&self) -> bool {
        self.is_held_by_disks
    }

    /// What the last bytes are allowed at the moment.
    #[must_use]
    pub fn allowed_transfer(&self) -> Duration {
        self.allowed
    }

    fn watch_disks(&mut self, sample: &Sample) {
        let is_in_the_way = sample.disks.is_none_or(|disks| disks >= self.budget.transfer);
        let since = is_in_the_way.then(|| self.in_the_way.unwrap_or(sample.now));
        self.in_the_way = since;
        self.is_held_by_disks = since.is_some_and(|since| sample.now.saturating_duration_since(since) >= STALLED_TIME);
    }

    fn watch_for_a_stall(&mut self, sample: &Sample) {
        if sample.remaining_bytes < self.smallest_remaining {
            self.smallest_remaining = sample.remaining_bytes;
            self.smallest_since = sample.now;
        }
        let new_round = sample.round > self.round;
        // A round in which the guest is kept running for the destination's sake says nothing by itself.
        let judged = new_round && sample.lag < FIRST_TRANSFER;
        let stalled = if judged {
            // What is left in the round that ended is compared with the best of all before it: a dirty set that still
            // shrinks by a tenth a round is on its way.
            let before = self.smallest_in_round;
            self.round >= 2 && self.smallest_remaining >= before.saturating_sub(before / 10)
        } else {
            self.round >= 2 && sample.now.saturating_duration_since(self.smallest_since) >= STALLED_TIME
        };
        if new_round {
            self.smallest_in_round = self.smallest_remaining;
            self.round = sample.round;
        }
        if stalled && !judged {
            self.smallest_since = sample.now;
        }
        if stalled {
            self.stalled_rounds += 1;
            if self.stalled_rounds >= STALLED_ROUNDS && self.allowed < self.budget.transfer {
                self.allowed = (self.allowed * 2).min(self.budget.transfer);
                self.stalled_rounds = 0;
            }
        } else if judged {
            self.stalled_rounds = 0;
        }
    }

    fn why_not_in_time(&self, sample: &Sample) -> String {
        let rate = vmm_rate(sample.goodput, sample.reduction_ratio);
        if self.is_held_by_disks {
            format!(
                "the deadline has passed: {} ms would be needed for what the guest writes to its disks, and {} ms of its downtime limit are left for \
                 that: let it write less meanwhile, or allow more with --downtime-limit",
                sample.disks.unwrap_or_default().as_millis(),
                self.budget.transfer.as_millis()
            )
        } else if sample.dirty_rate.0 > rate {
            format!(
                "the deadline has passed: the guest writes {:.1} MB/s and the link carries {:.1} MB/s of its memory, so the \
                 dirty set does not shrink",
                megabytes(sample.dirty_rate.0),
                megabytes(rate)
            )
        } else {
            format!(
                "the deadline has passed with {:.1} MB to go at {:.1} MB/s of memory: allow more time with --deadline",
                megabytes(sample.remaining_bytes),
                megabytes(rate)
            )
        }
    }
}

/// Vmm bytes per second that a path of this goodput takes.
#[must_use]
pub fn vmm_rate(goodput: ByteRate, reduction_ratio: f64) -> u64 {
    (goodput.0 as f64 * reduction_ratio.max(0.5)) as u64
}

/// As a vmm is told: it is told again where it changes.
fn whole_millis(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto::precopy::FixedCosts;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn budget() -> Budget {
        Budget::new(MS(500), &FixedCosts::on_path(MS(150), None)).unwrap()
    }

    fn sample(now: Instant, round: u32, remaining_bytes: u64) -> Sample {
        Sample {
            now,
            round,
            remaining_bytes,
            dirty_rate: ByteRate(8_000_000),
            goodput: ByteRate(100_000_000),
            reduction_ratio: 2.0,
            lag: Duration::ZERO,
            disks: Some(Duration::ZERO),
        }
    }

    fn allowance_after(remaining: impl Fn(u32) -> u64, rounds: u32) -> Duration {
        let start = Instant::now();
        let mut policy = Policy::new(start, budget(), None);
        for round in 1..=rounds {
            policy.decide(&sample(start + MS(100) * round, round, remaining(round)));
        }
        policy.allowed_transfer()
    }

    #[test]
    fn a_dirty_set_that_shrinks_keeps_the_shortest_stop() {
        assert_eq!(allowance_after(|round| 1_000_000_000 >> round, 12), FIRST_TRANSFER);
    }

    #[test]
    fn a_dirty_set_that_stands_still_is_given_the_whole_budget_and_no_more() {
        assert_eq!(allowance_after(|_| 50_000_000, 40), budget().transfer);
    }

    #[test]
    fn a_guest_that_oscillates_is_not_taken_for_one_that_converges() {
        assert_eq!(
            allowance_after(|round| if round % 2 == 0 { 50_000_000 } else { 70_000_000 }, 40),
            budget().transfer
        );
    }

    #[test]
    fn what_the_destination_lags_behind_is_taken_from_the_allowance() {
        let start = Instant::now();
        let mut policy = Policy::new(start, budget(), None);
        let mut limit = |lag| {
            let sample = Sample {
                lag,
                ..sample(start, 2, 50_000_000)
            };
            match policy.decide(&sample) {
                Decision::Continue(settings) => settings.downtime_limit,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(limit(MS(0)), FIRST_TRANSFER);
        assert_eq!(limit(BACKLOG), FIRST_TRANSFER);
        assert_eq!(limit(BACKLOG + MS(5)), FIRST_TRANSFER - MS(5));
        assert_eq!(limit(MS(500)), LEAST_LIMIT);
    }

    #[test]
    fn what_disks_leave_of_the_budget_is_for_memory_and_a_guest_for_which_they_leave_nothing_is_not_stopped() {
        let start = Instant::now();
        let mut policy = Policy::new(start, budget(), None);
        let mut at = |seconds, disks| {
            let sample = Sample {
                disks,
                ..sample(start + Duration::from_secs(seconds), 2, 50_000_000)
            };
            match policy.decide(&sample) {
                Decision::Continue(settings) => (settings.downtime_limit, policy.is_held_by_disks()),
                other => panic!("{other:?}"),
            }
        };
        let transfer = whole_millis(budget().transfer);
        assert_eq!(at(0, Some(MS(30))), (FIRST_TRANSFER, false));
        assert_eq!(at(1, Some(transfer - MS(7))), (MS(7), false));
        assert_eq!(at(2, Some(transfer + MS(7))), (LEAST_LIMIT, false));
        assert_eq!(at(3, None), (LEAST_LIMIT, false));
        assert_eq!(at(6, Some(transfer + MS(7))), (LEAST_LIMIT, true));
        let (limit, is_held) = at(7, Some(MS(1)));
        assert!(limit >= FIRST_TRANSFER && !is_held);
    }

    #[test]
    fn a_destination_that_always_lags_behind_does_not_keep_a_vm_from_moving() {
        let start = Instant::now();
        let mut policy = Policy::new(start, budget(), None);
        let mut limits = Vec::new();
        for step in 0..600 {
            let sample = Sample {
                lag: MS(5000),
                ..sample(start + MS(100) * step, step, 50_000_000)
            };
            match policy.decide(&sample) {
                Decision::Continue(settings) => limits.push(settings.downtime_limit),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(limits[100], LEAST_LIMIT, "it is waited for");
        assert_eq!(limits[599], budget().transfer, "and not for ever");
    }

    #[test]
    fn a_vmm_that_overrates_the_path_is_given_a_shorter_limit_for_the_same_bytes() {
        let settings = Settings {
            downtime_limit: MS(200),
            switchover_bandwidth: ByteRate(100_000_000),
        };
        let limit = |believed| settings.for_believed(ByteRate(believed)).downtime_limit;
        assert_eq!(limit(400_000_000), MS(50));
        assert_eq!(limit(100_000_001).as_millis(), 199);
        assert_eq!(limit(u64::MAX), LEAST_LIMIT);
        for believed in [0, 1, 50_000_000, 100_000_000] {
            assert_eq!(limit(believed), MS(200), "nothing is known, or the path is underrated");
        }
    }

    #[test]
    fn at_the_deadline_the_policy_gives_up_and_says_why() {
        let start = Instant::now();
        let mut policy = Policy::new(start, budget(), Some(start + MS(1000)));
        assert!(matches!(
            policy.decide(&sample(start + MS(999), 1, 1 << 30)),
            Decision::Continue(_)
        ));
        let mut late = sample(start + MS(1000), 1, 1 << 30);
        late.dirty_rate = ByteRate(900_000_000);
        match policy.decide(&late) {
            Decision::GiveUp { reason } => assert!(reason.contains("900.0 MB/s"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn the_allowance_never_leaves_the_budget(remaining in proptest::collection::vec(0u64..1 << 34, 1..200)) {
            let start = Instant::now();
            let mut policy = Policy::new(start, budget(), None);
            for (at, bytes) in remaining.iter().enumerate() {
                let at = u32::try_from(at).unwrap();
                let decision = policy.decide(&sample(start + MS(700) * at, at / 2, *bytes));
                let Decision::Continue(settings) = decision else { panic!("no deadline was set") };
                prop_assert!(settings.downtime_limit >= FIRST_TRANSFER.min(budget().transfer));
                prop_assert!(settings.downtime_limit <= budget().transfer);
            }
        }
    }
}
