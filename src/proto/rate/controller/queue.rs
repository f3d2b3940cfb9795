//! The queue that stands at the bottleneck: how long it is, and how much less to send so that it drains.
//!
//! The queue is the least RTT of a round above the base, which is the least RTT ever. A capacity that is 1 % too high, which the headers
//! of another layer are enough for, fills any buffer in time; so while more than 4 ms stand and do not fall, the rate is trimmed by
//! another 1 % every other round, and once less than 2 ms are left, by half as much each round.
//!
//! A path may become longer, which looks like a queue but cannot be drained. So when the queue has not moved through eight rounds at the
//! largest trim, or three brakes, it is taken for distance: the base moves up. That is the only way up; a base that was forgotten
//! with time would grow by the standing queue each time.
//!
//! Jitter looks like a queue too, since the base is the least of all that it ever made. But a queue grows and falls steadily, and jitter
//! goes up and down: what a round differs from the line through the two before it is noise, and four times its mean is not
//! counted as queue.
//!
//! At a low rate, packets wait for each other in the sender's own pacer, and that wait is part of their round trip: a packet takes 12 ms at
//! 1 Mbit/s. The time of a few of them is not counted either.

use std::time::Duration;

/// See the head of this file.
#[derive(Clone, Debug)]
pub(super) struct StandingQueue {
    /// Round trip time with no queue; `None` before the first sample.
    base: Option<Duration>,
    /// The two rounds before.
    before: [Option<Duration>; 2],
    noise: Duration,
    /// What a few packets take at the capacity, beyond what is passed over at any rate. At the rate, each brake would make a queue look shorter.
    paced: Duration,
    last: Duration,
    trim: f64,
    /// The trim changed in the last round, and its effect shows a round trip later.
    changed: bool,
    /// How often the queue did not fall although it should have.
    unmoved: u32,
}

impl StandingQueue {
    pub(super) fn new() -> Self {
        Self {
            base: None,
            before: [None; 2],
            noise: Duration::ZERO,
            paced: Duration::ZERO,
            last: Duration::ZERO,
            trim: 0.0,
            changed: false,
            unmoved: 0,
        }
    }

    pub(super) fn sample(&mut self, rtt: Duration) {
        self.base = Some(self.base.map_or(rtt, |base| base.min(rtt)));
    }

    pub(super) fn base(&self) -> Option<Duration> {
        self.base
    }

    /// The share of the rate to hold back, 0..=0.25.
    pub(super) fn trim(&self) -> f64 {
        self.trim
    }

    /// A round is over. A packet takes so long at the capacity.
    pub(super) fn observe(&mut self, round: Duration, packet: Duration) {
        self.paced = (PACED_PACKETS * packet).saturating_sub(PUSH_ABOVE);
        if let [Some(first), Some(second)] = self.before {
            // Half of the second difference has the deviation of the rounds themselves. A step is no noise.
            let off = (round + first).abs_diff(2 * second) / 2;
            self.noise = (7 * self.noise + off.min(MOST_NOISE)) / 8;
        }
        self.before = [self.before[1], Some(round)];
    }

    /// The queue in a round with this least RTT.
    pub(super) fn length(&self, round: Duration) -> Duration {
        round.saturating_sub(self.base.unwrap_or(round) + 4 * self.noise + self.paced)
    }

    /// Adapts the trim after a round that was not braked for.
    pub(super) fn adapt(&mut self, round: Duration) {
        let queue = self.length(round);
        if queue > PUSH_ABOVE {
            let falling = queue + MOVED_BY < self.last;
            if self.trim >= MAX_TRIM {
                self.judge_movement(queue, round, 1);
            } else if !falling && !self.changed {
                self.trim = (self.trim + STEP).min(MAX_TRIM);
                self.changed = true;
            } else {
                self.changed = false;
            }
        } else {
            self.unmoved = 0;
            self.changed = false;
            if queue < RELEASE_BELOW {
                self.trim = if self.trim < STEP { 0.0 } else { self.trim / 2.0 };
            }
        }
        self.last = queue;
    }

    /// A brake for a queue, which takes the place of the trim. Says whether the queue was taken for distance.
    pub(super) fn braked(&mut self, round: Duration) -> bool {
        let queue = self.length(round);
        self.trim = 0.0;
        let distance = self.judge_movement(queue, round, BRAKE_WEIGHT);
        self.last = self.length(round);
        distance
    }

    /// Starts the trim anew, when the rate was lowered for another reason.
    pub(super) fn reset_trim(&mut self) {
        self.trim = 0.0;
    }

    fn judge_movement(&mut self, queue: Duration, round: Duration, weight: u32) -> bool {
        let fell = queue < self.last.mul_f64(MOVED_TO);
        self.unmoved = if fell { 0 } else { self.unmoved + weight };
        let distance = self.unmoved >= UNMOVED_LIMIT;
        if distance {
            self.base = Some(round);
            self.trim = 0.0;
            self.unmoved = 0;
        }
        distance
    }
}

pub(super) const PUSH_ABOVE: Duration = Duration::from_millis(4);
const RELEASE_BELOW: Duration = Duration::from_millis(2);
const MOVED_BY: Duration = Duration::from_micros(500);
const MOVED_TO: f64 = 0.95;
/// Those of the link's other connections, and acknowledgements: 42 ms were seen at 1 Mbit/s on loopback (2026-11-28).
const PACED_PACKETS: u32 = 4;
const MOST_NOISE: Duration = Duration::from_millis(4);
const STEP: f64 = 0.01;
const MAX_TRIM: f64 = 0.25;
const UNMOVED_LIMIT: u32 = 9;
const BRAKE_WEIGHT: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(queue: &mut StandingQueue, lengths: impl Iterator<Item = u64>) -> f64 {
        let mut most = 0.0_f64;
        for length in lengths {
            let round = Duration::from_micros(150_000 + length);
            queue.sample(round);
            queue.observe(round, Duration::ZERO);
            queue.adapt(round);
            most = most.max(queue.trim());
        }
        most
    }

    #[test]
    fn delay_that_goes_up_and_down_is_no_queue_and_delay_that_grows_is_one() {
        let mut jitter = StandingQueue::new();
        let most = rounds(
            &mut jitter,
            [0, 9_000, 3_000, 12_000, 6_000, 11_000, 2_000]
                .into_iter()
                .cycle()
                .take(200),
        );
        assert!(most <= 2.0 * STEP, "{most}");

        let mut growing = StandingQueue::new();
        let most = rounds(&mut growing, (0..20).map(|round| round * 1_500));
        assert!(most >= 5.0 * STEP, "{most}");
    }
}
