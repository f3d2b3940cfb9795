//! How fast the destination turns frames into the vmm's bytes, known only while frames wait for it.
//!
//! Where pages are the same as both sites know them, a kilobyte of frames is a megabyte for the destination to restore and its vmm to take: the
//! path is empty, and what waits there is nothing by its frames and seconds by its content. So it is counted in time.
//!
//! What is read from the vmm now gets there a round trip after the newest acknowledgement left. What waited then has been restored meanwhile
//! unless more came than the destination takes: behind a lost packet a round trip's worth waits, and is gone long before a source that stopped
//! reading would be heard of again. So what counts is [what will wait](Restoring::wait), not what did. At 1 % loss and 150 ms a source that went
//! by what did wait stood still for a third of the time, and 0.2 s longer than needed with the guest stopped (2026-11-28).

use std::time::{Duration, Instant};

use crate::proto::page::ByteRate;

/// What waits at the destination, and what it takes.
#[derive(Debug, Default)]
pub struct Restoring {
    meter: Meter,
    /// When frames last waited for the destination.
    waited: Option<Instant>,
    /// The newest acknowledgement.
    newest: Option<Looked>,
}

/// What an acknowledgement says, and what the source knows beside it. In bytes of the vmm's stream.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// Restored so far.
    pub decoded_bytes: u64,
    /// Arrived, with nothing missing before it, and not yet with the vmm there.
    pub queued_bytes: u64,
    /// Taken by the vmm there, or kept from it until the stream has ended.
    pub taken_bytes: u64,
    /// Of the path.
    pub rtt: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Looked {
    at: Instant,
    report: Report,
}

/// More stream bytes than this wait at a destination that does not keep up: it works on some megabyte in any case.
const QUEUE: u64 = 2 << 20;

/// What is longer than this is for ever.
const LONGEST: Duration = Duration::from_secs(60);

/// Assumed until it is measured: what frames of a first pass are restored with. What waits for less than it takes to measure that is gone soon.
const UNMEASURED: ByteRate = ByteRate(128 << 20);

/// A destination that takes less is held back by what waits there alone: time between two reads must be short, since the end of the stream comes
/// behind it.
const LEAST: ByteRate = ByteRate(32 << 20);

/// What was measured so long ago says nothing of what the stream is now.
const MEMORY: Duration = Duration::from_secs(1);

/// It is given so much more than it was seen to take, to find out whether it takes more now.
const MORE: (u64, u64) = (4, 3);

impl Restoring {
    /// An acknowledgement came.
    pub fn observe(&mut self, now: Instant, report: Report) {
        let before = self.newest.map(|newest| newest.report);
        if self.is_forgotten(now) {
            self.meter = Meter::default();
        }
        let waits = report.queued_bytes > QUEUE;
        // It had work all the time since the last look: frames waited then and now, and more of them than it has restored.
        let worked = before.is_some_and(|before| {
            waits
                && before.queued_bytes > QUEUE
                && report.decoded_bytes.saturating_sub(before.decoded_bytes) <= before.queued_bytes
        });
        self.meter.observe(now, report.decoded_bytes, worked);
        if waits {
            self.waited = Some(now);
        }
        self.newest = Some(Looked { at: now, report });
    }

    /// Stream bytes a second that it may be given; `None` while it keeps up with what comes.
    #[must_use]
    pub fn rate(&self, now: Instant) -> Option<ByteRate> {
        let rate = self.meter.rate.filter(|_| !self.is_forgotten(now))?;
        Some(ByteRate((rate.0 / MORE.1).saturating_mul(MORE.0).max(LEAST.0)))
    }

    /// How long what is read now, behind `read` bytes, will wait there, if frames wait now.
    #[must_use]
    pub fn wait(&self, now: Instant, read: u64) -> Duration {
        if self.newest.is_some_and(|newest| newest.report.queued_bytes > QUEUE) {
            self.wait_at(self.meter.rate.unwrap_or(UNMEASURED), now, read)
        } else {
            Duration::ZERO
        }
    }

    /// How long what is read now, behind `read` bytes, will wait there, also for frames that wait for one before them and will be restored once that
    /// is there; zero while it is not known how fast.
    #[must_use]
    pub fn lag(&self, now: Instant, read: u64) -> Duration {
        self.meter
            .rate
            .map_or(Duration::ZERO, |rate| self.wait_at(rate, now, read))
    }

    fn wait_at(&self, rate: ByteRate, now: Instant, read: u64) -> Duration {
        let Some(Looked { at, report }) = self.newest else {
            return Duration::ZERO;
        };
        // Where nothing is heard for longer than the path holds up an acknowledgement, it is the destination that stands still.
        let held_up = report.rtt + report.rtt / 4 + Meter::HELD_UP;
        let passed = report.rtt + now.saturating_duration_since(at).min(held_up);
        let ahead = read.saturating_sub(report.taken_bytes);
        rate.time_for(ahead).saturating_sub(passed).min(LONGEST)
    }

    fn is_forgotten(&self, now: Instant) -> bool {
        self.waited
            .is_none_or(|waited| now.saturating_duration_since(waited) > MEMORY)
    }
}

/// Bytes a second that are restored while there is work, from acknowledgements that come while there is.
#[derive(Debug, Default)]
struct Meter {
    began: Option<(Instant, u64)>,
    /// Since when it has worked without a sample.
    unmeasured: Option<(Instant, u64)>,
    latest: Option<Instant>,
    rate: Option<ByteRate>,
}

impl Meter {
    const SPAN: Duration = Duration::from_millis(30);

    /// In so much work it is measured whatever comes between: what the path holds up weighs little then.
    const LONG_SPAN: Duration = Duration::from_millis(600);

    /// Acknowledgements that are further apart were held up by the path, or it is a slow destination, below 9 MB/s: it is heard of for each frame of
    /// 256 KiB.
    const HELD_UP: Duration = Duration::from_millis(30);

    /// Those that are closer were held up together: when what they tell of was so is not known.
    const TOGETHER: Duration = Duration::from_micros(200);

    fn observe(&mut self, now: Instant, decoded_bytes: u64, worked: bool) {
        let latest = self.latest.replace(now);
        let apart = latest.map_or(Duration::MAX, |latest| now.saturating_duration_since(latest));
        match self.unmeasured.filter(|_| worked) {
            None => self.unmeasured = Some((now, decoded_bytes)),
            Some(since) if now.saturating_duration_since(since.0) >= Self::LONG_SPAN => {
                // What was measured before is too old.
                self.rate = None;
                self.take_sample(now, decoded_bytes, since);
            }
            Some(_) => {}
        }
        let Some((began, before)) = self.began.filter(|_| worked && apart <= Self::HELD_UP) else {
            self.began = None;
            if apart > Self::TOGETHER && apart <= Self::HELD_UP {
                self.began = Some((now, decoded_bytes));
            }
            return;
        };
        if now.saturating_duration_since(began) >= Self::SPAN {
            self.take_sample(now, decoded_bytes, (began, before));
            self.began = Some((now, decoded_bytes));
        }
    }

    fn take_sample(&mut self, now: Instant, decoded_bytes: u64, (began, before): (Instant, u64)) {
        let took = now.saturating_duration_since(began);
        let sample = (decoded_bytes.saturating_sub(before) as f64 / took.as_secs_f64()) as u64;
        // Half of the newest: a change is followed within some spans, a hiccup is not mistaken for one.
        let rate = self.rate.map_or(sample, |rate| rate.0 / 2 + sample / 2).max(1);
        self.rate = Some(ByteRate(rate));
        self.unmeasured = Some((now, decoded_bytes));
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    const RTT: Duration = Duration::from_millis(150);

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn report(decoded: u64, queued: u64) -> Report {
        Report {
            decoded_bytes: decoded,
            queued_bytes: queued,
            taken_bytes: decoded,
            rtt: RTT,
        }
    }

    /// An acknowledgement each 5 ms for so long, of a destination that restores `rate` MiB a second with `queued` waiting and `in_flight` on the way.
    struct Destination {
        restoring: Restoring,
        now: Instant,
        decoded: u64,
        read: u64,
    }

    impl Destination {
        fn new() -> Self {
            Self {
                restoring: Restoring::default(),
                now: Instant::now(),
                decoded: 0,
                read: 0,
            }
        }

        fn works(&mut self, time: Duration, rate: u64, queued: u64, in_flight: u64) {
            self.works_in_steps(ms(5), time, rate, queued, in_flight);
        }

        fn works_in_steps(&mut self, step: Duration, time: Duration, rate: u64, queued: u64, in_flight: u64) {
            for _ in 0..time.as_millis() / step.as_millis() {
                self.now += step;
                self.decoded += (rate * MIB) * u64::try_from(step.as_millis()).unwrap() / 1000;
                self.restoring.observe(self.now, report(self.decoded, queued));
            }
            self.read = self.decoded + queued + in_flight;
        }

        /// What it did meanwhile is told all at once.
        fn is_silent(&mut self, time: Duration, rate: u64, queued: u64) {
            let steps = u64::try_from(time.as_millis()).unwrap() / 5;
            self.now += time;
            for _ in 0..steps {
                self.decoded += rate * MIB / 200;
                self.restoring.observe(self.now, report(self.decoded, queued));
            }
        }

        fn rate(&self) -> Option<u64> {
            self.restoring.rate(self.now).map(|rate| rate.0 / MIB)
        }

        fn lag(&self) -> Duration {
            self.restoring.lag(self.now, self.read)
        }

        fn wait(&self) -> Duration {
            self.restoring.wait(self.now, self.read)
        }
    }

    #[test]
    fn a_destination_that_keeps_up_has_no_rate_however_slow_the_stream_is() {
        let mut destination = Destination::new();
        destination.works(ms(3000), 1, 2 * MIB, 0);
        assert_eq!((destination.rate(), destination.wait()), (None, Duration::ZERO));
    }

    #[test]
    fn what_is_read_now_waits_for_what_is_ahead_of_it_less_a_round_trip() {
        let mut destination = Destination::new();
        destination.works(ms(1000), 100, 50 * MIB, 10 * MIB);
        let rate = destination.rate().expect("it does not keep up");
        assert!((130..=134).contains(&rate), "{rate}");
        // 600 ms of work are there or on the way.
        let wait = destination.wait().as_millis();
        assert!((445..=455).contains(&wait), "{wait}");
    }

    #[test]
    fn what_is_gone_before_anything_new_arrives_makes_nothing_wait() {
        let mut destination = Destination::new();
        // Behind a gap that was filled: a round trip's worth at 200 MiB a second, and as much on the way, at a destination that restores 500.
        destination.works(ms(60), 500, 30 * MIB, 30 * MIB);
        assert_eq!(destination.wait(), Duration::ZERO);
    }

    #[test]
    fn frames_that_wait_for_a_lost_one_make_the_destination_lag_but_nobody_wait() {
        let mut destination = Destination::new();
        destination.works(ms(500), 100, 20 * MIB, 0);
        destination.works(ms(5), 100, 0, 40 * MIB);
        assert_eq!(destination.wait(), Duration::ZERO);
        let lag = destination.lag().as_millis();
        assert!((245..=255).contains(&lag), "{lag}");
    }

    #[test]
    fn what_waits_becomes_less_while_an_acknowledgement_may_be_held_up_and_no_longer() {
        let mut destination = Destination::new();
        destination.works(ms(1000), 100, 80 * MIB, 0);
        let before = destination.wait();
        destination.now += ms(200);
        assert_eq!(destination.wait(), before - ms(200));
        destination.now += ms(5000);
        assert!(destination.wait() > before - ms(230), "the destination stands still");
    }

    #[test]
    fn what_waits_for_too_short_to_be_measured_holds_up_nothing_that_comes_a_round_trip_later() {
        let mut destination = Destination::new();
        // 100 Mbit/s, behind a gap: 5 MiB ready at once, as much on the way.
        destination.works(ms(15), 300, 5 * MIB, 5 * MIB);
        assert_eq!((destination.rate(), destination.wait()), (None, Duration::ZERO));
        // Nobody restores this within a round trip.
        destination.works(ms(5), 300, 50 * MIB, 5 * MIB);
        assert!(destination.wait() > ms(200));
    }

    #[test]
    fn what_is_read_while_nothing_is_heard_waits_behind_the_rest() {
        let mut destination = Destination::new();
        destination.works(ms(1000), 100, 50 * MIB, 0);
        let before = destination.wait().as_millis();
        destination.read += 10 * MIB;
        let after = destination.wait().as_millis();
        assert!((95..=105).contains(&(after - before)), "{before} {after}");
    }

    #[test]
    fn a_destination_that_restores_a_frame_in_50_ms_is_measured_too() {
        let mut destination = Destination::new();
        destination.works_in_steps(ms(50), ms(3000), 5, 3 * MIB, 0);
        let lag = destination.lag().as_millis();
        assert!((400..=500).contains(&lag), "600 ms of work less a round trip: {lag}");
    }

    #[test]
    fn a_destination_that_becomes_slow_at_once_is_not_taken_for_what_it_was() {
        let mut destination = Destination::new();
        destination.works(ms(1000), 200, 50 * MIB, 0);
        destination.works_in_steps(ms(50), ms(4000), 5, 3 * MIB, 0);
        assert!(destination.lag() > ms(300), "{:?}", destination.lag());
    }

    #[test]
    fn what_was_measured_is_forgotten_once_it_keeps_up() {
        let mut destination = Destination::new();
        destination.works(ms(1000), 100, 50 * MIB, 0);
        destination.works(ms(900), 1, 0, 0);
        assert!(destination.rate().is_some());
        assert_eq!(destination.wait(), Duration::ZERO);
        destination.works(ms(200), 1, 0, 0);
        assert_eq!((destination.rate(), destination.wait()), (None, Duration::ZERO));
    }

    #[test]
    fn acknowledgements_that_the_path_held_up_change_the_rate_by_nothing_much() {
        let mut destination = Destination::new();
        destination.works(ms(500), 100, 50 * MIB, 0);
        for _ in 0..10 {
            destination.is_silent(ms(175), 100, 50 * MIB);
            destination.works(ms(100), 100, 50 * MIB, 0);
            let rate = destination.rate().unwrap();
            assert!((125..=140).contains(&rate), "{rate}");
        }
    }

    #[test]
    fn silence_of_the_path_is_not_taken_for_a_slow_destination() {
        let (mut restoring, mut decoded) = (Restoring::default(), 0);
        let mut now = Instant::now();
        for burst in [3, 30, 3, 30] {
            restoring.observe(now, report(decoded, 0));
            now += ms(400);
            // A gap is filled: what came behind it is ready at once, and restored within some milliseconds.
            for step in 1..=burst {
                decoded += MIB;
                restoring.observe(now + ms(step), report(decoded, (burst - step) * MIB));
            }
            now += ms(burst);
            assert_eq!(restoring.rate(now), None);
        }
    }

    #[test]
    fn a_destination_that_becomes_faster_is_followed() {
        let mut destination = Destination::new();
        destination.works(ms(1000), 50, 20 * MIB, 0);
        for _ in 0..20 {
            let rate = destination.rate().unwrap();
            destination.works(ms(300), rate.min(200), 3 * MIB, 0);
        }
        assert!(destination.rate().unwrap() > 180);
    }
}
