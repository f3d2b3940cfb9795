//! What the path takes and how much the reduction saves, from running totals.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::rounds::Totals;
use crate::proto::page::ByteRate;

/// Bytes per second that the far decoder acknowledges.
///
/// What arrives may be little because the guest sends little, so the estimate is the best [`Self::SPAN`]-long stretch of the last
/// [`Self::MEMORY`], not the latest.
#[derive(Debug, Default)]
pub struct GoodputMeter {
    /// (when, bytes acknowledged until then), ascending, apart by at least [`Self::STEP`].
    marks: VecDeque<(Instant, u64)>,
}

impl GoodputMeter {
    const STEP: Duration = Duration::from_millis(50);
    const SPAN: Duration = Duration::from_millis(400);
    const MEMORY: Duration = Duration::from_secs(10);

    /// `acknowledged_bytes` have arrived until `now`.
    pub fn observe(&mut self, now: Instant, acknowledged_bytes: u64) {
        if let Some(&(last, _)) = self.marks.back()
            && now.saturating_duration_since(last) < Self::STEP
        {
            return;
        }
        self.marks.push_back((now, acknowledged_bytes));
        while self
            .marks
            .front()
            .is_some_and(|&(at, _)| now.saturating_duration_since(at) > Self::MEMORY)
        {
            self.marks.pop_front();
        }
    }

    /// The best stretch; `None` before one has passed.
    #[must_use]
    pub fn best(&self) -> Option<ByteRate> {
        let mut from = 0;
        let mut best = None;
        for (end, &(at, bytes)) in self.marks.iter().enumerate() {
            while from < end && at.duration_since(self.marks[from + 1].0) >= Self::SPAN {
                from += 1;
            }
            let (began, before) = self.marks[from];
            let took = at.duration_since(began);
            if took >= Self::SPAN {
                let rate = ByteRate(((bytes - before) as f64 / took.as_secs_f64()) as u64);
                best = best.max(Some(rate));
            }
        }
        best
    }
}

/// What the path really takes, known only while there is more to send than it takes: a configured capacity is a promise, and
/// a busy host or a slower link breaks it. Queues are sized by this, never by the promise.
#[derive(Debug, Default)]
pub struct PathMeter {
    began: Option<(Instant, u64)>,
    rate: Option<f64>,
}

impl PathMeter {
    const SPAN: Duration = Duration::from_millis(250);

    /// `acknowledged_bytes` have arrived until `now`; `saturated`: bytes have been waiting for the path all the time since the
    /// last call.
    pub fn observe(&mut self, now: Instant, acknowledged_bytes: u64, saturated: bool) {
        // The first round trip brings nothing back and says nothing.
        let Some((began, before)) = self.began.filter(|_| saturated && acknowledged_bytes > 0) else {
            self.began = Some((now, acknowledged_bytes));
            return;
        };
        let took = now.saturating_duration_since(began);
        if took >= Self::SPAN {
            let sample = acknowledged_bytes.saturating_sub(before) as f64 / took.as_secs_f64();
            // Half of the newest: a step of the path is followed within a second, a hiccup is not mistaken for one.
            self.rate = Some(self.rate.map_or(sample, |rate| (rate + sample) / 2.0));
            self.began = Some((now, acknowledged_bytes));
        }
    }

    /// The rate; `None` before the path was saturated for long enough.
    #[must_use]
    pub fn rate(&self) -> Option<ByteRate> {
        self.rate.map(|rate| ByteRate(rate as u64))
    }
}

/// Vmm bytes per second that the encoder takes while it works: what limits once almost nothing has to cross.
#[derive(Debug, Default)]
pub struct EncoderMeter {
    bytes: u64,
    took: Duration,
    rate: Option<f64>,
}

impl EncoderMeter {
    /// Vmm bytes of one sample.
    const WINDOW: u64 = 1 << 20;

    /// The encoder took `bytes` in `took`. Its rate; `None` before enough of them.
    pub fn observe(&mut self, bytes: u64, took: Duration) -> Option<ByteRate> {
        self.bytes += bytes;
        self.took += took;
        if self.bytes >= Self::WINDOW {
            let sample = self.bytes as f64 / self.took.max(Duration::from_micros(1)).as_secs_f64();
            self.rate = Some(self.rate.map_or(sample, |rate| (3.0 * rate + sample) / 4.0));
            (self.bytes, self.took) = (0, Duration::ZERO);
        }
        self.rate.map(|rate| ByteRate(rate as u64))
    }
}

/// The ratio that a path of this goodput can make use of, where the encoder takes no more than `encoder` and pages that were sent again moved at
/// `re_sent`. A third of the encoder's rate is left for what else is to be done with each byte; on a busy machine that is more, and only what was
/// seen counts: by the encoder alone, a guest that was rewritten 40 000 pages a second stood still for 1.0 s where 0.5 were allowed (2026-11-27).
#[must_use]
pub fn usable_ratio(ratio: f64, goodput: ByteRate, encoder: Option<ByteRate>, re_sent: Option<ByteRate>) -> f64 {
    let of_goodput = |rate: f64| rate / goodput.0.max(1) as f64;
    let encoder = encoder.map_or(f64::INFINITY, |rate| of_goodput(rate.0 as f64 * 2.0 / 3.0));
    let seen = re_sent.map_or(f64::INFINITY, |rate| of_goodput(rate.0 as f64));
    ratio.min(encoder).min(seen).max(LEAST_RATIO)
}

/// Ratios are never below this.
const LEAST_RATIO: f64 = 0.01;

/// Vmm bytes per frame byte, of late and pessimistic: the worst of the last [`Self::WINDOWS`] windows.
///
/// Hot pages reduce worst and are what the last round is made of.
#[derive(Debug, Default)]
pub struct RatioMeter {
    windows: VecDeque<f64>,
    began: Totals,
}

impl RatioMeter {
    /// Vmm bytes of one window.
    const WINDOW: u64 = 2 << 20;
    const WINDOWS: usize = 6;
    /// A stretch of nothing but zero pages says nothing about hot pages.
    const HIGHEST: f64 = 100.0;

    /// Running totals stand at `totals`.
    pub fn observe(&mut self, totals: Totals) {
        let vmm_bytes = totals.vmm_bytes.saturating_sub(self.began.vmm_bytes);
        if vmm_bytes < Self::WINDOW {
            return;
        }
        let wire_bytes = totals.wire_bytes.saturating_sub(self.began.wire_bytes).max(1);
        self.windows
            .push_back((vmm_bytes as f64 / wire_bytes as f64).min(Self::HIGHEST));
        if self.windows.len() > Self::WINDOWS {
            self.windows.pop_front();
        }
        self.began = totals;
    }

    /// The ratio; 1 before anything is known.
    #[must_use]
    pub fn pessimistic(&self) -> f64 {
        self.windows.iter().copied().reduce(f64::min).unwrap_or(1.0)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
mod tests {
    use super::*;

    #[test]
    fn a_pause_of_the_guest_does_not_look_like_a_slow_path() {
        let start = Instant::now();
        let mut meter = GoodputMeter::default();
        let mut bytes = 0;
        for step in 0..100u32 {
            if step < 40 {
                bytes += 5_000_000;
            }
            meter.observe(start + Duration::from_millis(50) * step, bytes);
        }
        let rate = meter.best().unwrap().0;
        assert!((95_000_000..=105_000_000).contains(&rate), "{rate}");
    }

    #[test]
    fn a_ratio_beyond_what_the_encoder_does_is_of_no_use() {
        let mut meter = EncoderMeter::default();
        assert_eq!(meter.observe(1 << 19, Duration::from_millis(1)), None);
        let encoder = meter.observe(1 << 19, Duration::from_millis(1));
        assert_eq!(encoder, Some(ByteRate((1 << 20) * 500)));
        let goodput = ByteRate(100_000_000);
        assert_eq!(usable_ratio(2.0, goodput, encoder, None), 2.0);
        let usable = usable_ratio(20.0, goodput, encoder, None);
        assert!((3.49..3.50).contains(&usable), "{usable}");
        assert_eq!(usable_ratio(20.0, goodput, None, None), 20.0);
        assert_eq!(usable_ratio(20.0, goodput, encoder, Some(ByteRate(150_000_000))), 1.5);
    }

    #[test]
    fn nothing_is_claimed_before_a_stretch_has_passed() {
        let mut meter = GoodputMeter::default();
        assert_eq!(meter.best(), None);
        let start = Instant::now();
        meter.observe(start, 0);
        meter.observe(start + GoodputMeter::SPAN - Duration::from_millis(1), 1 << 20);
        assert_eq!(meter.best(), None);
        meter.observe(start + GoodputMeter::SPAN + GoodputMeter::STEP, 1 << 20);
        assert!(meter.best().is_some());
    }

    #[test]
    fn a_path_that_is_slower_than_promised_is_found_out_within_a_second() {
        let start = Instant::now();
        let mut meter = PathMeter::default();
        let mut bytes = 0;
        for step in 0..40u32 {
            bytes += if step < 20 { 10_000_000 } else { 5_000_000 };
            meter.observe(start + Duration::from_millis(100) * step, bytes, true);
        }
        let rate = meter.rate().unwrap().0;
        assert!((49_000_000..=56_000_000).contains(&rate), "{rate}");
    }

    #[test]
    fn a_guest_that_sends_little_says_nothing_about_the_path() {
        let start = Instant::now();
        let mut meter = PathMeter::default();
        for step in 0..40u32 {
            meter.observe(
                start + Duration::from_millis(100) * step,
                u64::from(step),
                step % 2 == 0,
            );
        }
        assert_eq!(meter.rate(), None);
    }

    #[test]
    fn the_worst_of_the_last_windows_counts() {
        let mut meter = RatioMeter::default();
        assert_eq!(meter.pessimistic(), 1.0);
        let mut totals = Totals::default();
        for ratio in [10, 2, 8, 8, 8, 8, 8] {
            totals.vmm_bytes += RatioMeter::WINDOW;
            totals.wire_bytes += RatioMeter::WINDOW / ratio;
            meter.observe(totals);
        }
        assert_eq!(meter.pessimistic(), 2.0);
        for _ in 0..2 {
            totals.vmm_bytes += RatioMeter::WINDOW;
            totals.wire_bytes += RatioMeter::WINDOW / 8;
            meter.observe(totals);
        }
        assert_eq!(meter.pessimistic(), 8.0);
    }
}
