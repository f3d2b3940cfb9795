//! The share of packets that a path loses, of late.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Loss over the last [`Self::SPAN`], and over at least the last [`Self::LEAST_PACKETS`]: a connection lives for days, and what it lost
/// yesterday says nothing about the path of today.
#[derive(Debug, Default)]
pub struct LossMeter {
    /// Ascending, apart by at least [`Self::STEP`]; the first is where the stretch begins.
    marks: VecDeque<Mark>,
    latest: Counts,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Instant,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    sent: u64,
    lost: u64,
}

impl LossMeter {
    const SPAN: Duration = Duration::from_secs(10);
    const STEP: Duration = Duration::from_millis(250);
    /// Less says little: one lost packet of these is 0.1 %.
    const LEAST_PACKETS: u64 = 1000;

    /// Packets sent and found lost, since the connection began, stand at these.
    pub fn observe(&mut self, now: Instant, sent: u64, lost: u64) {
        self.latest = Counts { sent, lost };
        // At most a mark for each packet: those of a quiet connection are bounded too.
        let due = |mark: &Mark| sent > mark.counts.sent && now.saturating_duration_since(mark.at) >= Self::STEP;
        if self.marks.back().is_none_or(due) {
            let counts = if self.marks.is_empty() {
                Counts::default()
            } else {
                self.latest
            };
            self.marks.push_back(Mark { at: now, counts });
        }
        while let Some(second) = self.marks.get(1)
            && now.saturating_duration_since(second.at) >= Self::SPAN
            && sent.saturating_sub(second.counts.sent) >= Self::LEAST_PACKETS
        {
            self.marks.pop_front();
        }
    }

    /// Share of packets lost, 0 to 1.
    #[must_use]
    pub fn share(&self) -> f64 {
        let Counts { sent, lost } = self.stretch();
        lost.min(sent) as f64 / sent.max(1) as f64
    }

    /// The same, and never 0: what was not seen among so many packets is rarer than one of them.
    #[must_use]
    pub fn share_at_most(&self) -> f64 {
        let Counts { sent, lost } = self.stretch();
        lost.clamp(1, sent.max(1)) as f64 / sent.max(1) as f64
    }

    fn stretch(&self) -> Counts {
        let from = self.marks.front().map_or(Counts::default(), |mark| mark.counts);
        Counts {
            sent: self.latest.sent.saturating_sub(from.sent),
            lost: self.latest.lost.saturating_sub(from.lost),
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_yesterday_is_forgotten_and_what_is_lost_now_counts() {
        let start = Instant::now();
        let mut meter = LossMeter::default();
        meter.observe(start, 1_000_000, 20_000);
        assert_eq!(meter.share(), 0.02);
        let (mut sent, mut lost) = (1_000_000, 20_000);
        let day = start + Duration::from_secs(86_400);
        for step in 0..=60 {
            (sent, lost) = (sent + 1000, lost + 1);
            meter.observe(day + LossMeter::STEP * step, sent, lost);
        }
        assert_eq!(meter.share(), 0.001);
    }

    #[test]
    fn a_quiet_connection_is_judged_by_its_last_thousand_packets_however_old() {
        let start = Instant::now();
        let mut meter = LossMeter::default();
        meter.observe(start, 0, 0);
        for second in 1..=600u32 {
            // Ten packets a second, of which one is lost.
            meter.observe(
                start + Duration::from_secs(second.into()),
                (second * 10).into(),
                second.into(),
            );
        }
        assert_eq!(meter.share(), 0.1);
        assert_eq!(meter.stretch().sent, LossMeter::LEAST_PACKETS);
    }

    #[test]
    fn no_loss_seen_is_less_than_one_packet() {
        let mut meter = LossMeter::default();
        assert_eq!((meter.share(), meter.share_at_most()), (0.0, 1.0));
        meter.observe(Instant::now(), 10_000, 0);
        assert_eq!((meter.share(), meter.share_at_most()), (0.0, 1e-4));
    }
}
