//! The queue that stands at the bottleneck: how long it is, and how much less to send so that it drains.
//!
//! The queue is the least RTT of a round above the base, which is the least RTT ever. A capacity that is 1 % too high, which the headers
//! of another layer are enough for, fills any buffer in time; so while more than 4 ms stand and do not fall, the rate is trimmed by
//! another 1 % every other round, and once less than 2 ms are left, by half as much each round.
//!
//! A path may become longer, which looks like a queue but cannot be drained. So when the queue has not moved through eight rounds at the
//! largest trim, or three brakes, it is taken for distance: the base moves up. That is the only way up; a base that was forgotten
//! with time would grow by the standing queue each time.

use std::time::Duration;

/// See the head of this file.
#[derive(Clone, Debug)]
pub(super) struct StandingQueue {
    /// Round trip time with no queue; `None` before the first sample.
    base: Option<Duration>,
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

    /// The queue in a round with this least RTT.
    pub(super) fn length(&self, round: Duration) -> Duration {
        round.saturating_sub(self.base.unwrap_or(round))
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
const STEP: f64 = 0.01;
const MAX_TRIM: f64 = 0.25;
const UNMOVED_LIMIT: u32 = 9;
const BRAKE_WEIGHT: u32 = 3;
