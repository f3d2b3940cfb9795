//! How long a thread was ready to run and did not: the second number of `/proc/PID/schedstat`, nanoseconds.
//!
//! The emulator's lateness shows only that packets left late. This shows why, also for the probes, whose figures are wrong
//! when they did not run in time themselves. Of virtual machines it does not show what their host takes.
//!
//! Each wake-up costs some 10 to 20 us of it on any machine, and a probe of 1 Gbit/s wakes up thousands of times a second: its
//! sum says little. A thread is starved while it waits for more than half of the time, and [`Watch`] adds up such times only.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

/// Of the main thread of process `pid` since its start. Nothing where the process has gone or the kernel does not count.
pub(super) fn of_process(pid: u32) -> Option<Duration> {
    read(&format!("/proc/{pid}/task/{pid}/schedstat"))
}

/// The calling thread, as it sees itself.
#[derive(Debug)]
pub(super) struct Watch {
    /// Kept open, since opening it takes some 70 us when it is not in the caches, and reading it 5 (2026-11-27).
    schedstat: Option<File>,
    /// When the present window began, and the run delay then.
    window: (Instant, Option<Duration>),
    starved: Duration,
}

impl Watch {
    /// Of a thread that has something to do from `now` on.
    pub(super) fn new(now: Instant) -> Self {
        let schedstat = File::open("/proc/thread-self/schedstat").ok();
        Self {
            window: (now, waited(schedstat.as_ref())),
            schedstat,
            starved: Duration::ZERO,
        }
    }

    /// To be called often, when there is time for it.
    pub(super) fn look(&mut self, now: Instant) {
        if now.saturating_duration_since(self.window.0) >= WINDOW {
            self.close(now, waited(self.schedstat.as_ref()));
        }
    }

    /// How long the thread was starved. Nothing where the kernel does not count.
    pub(super) fn end(mut self, now: Instant) -> Option<Duration> {
        let waited = waited(self.schedstat.as_ref());
        self.close(now, waited);
        waited.map(|_| self.starved)
    }

    fn close(&mut self, now: Instant, waited: Option<Duration>) {
        let (begin, before) = self.window;
        if let Some(delay) = since(before, waited)
            && 2 * delay > now.saturating_duration_since(begin)
        {
            self.starved += delay;
        }
        self.window = (now, waited);
    }
}

/// What was added since `before`.
pub(super) fn since(before: Option<Duration>, now: Option<Duration>) -> Option<Duration> {
    Some(now?.saturating_sub(before?))
}

/// Of the thread whose file it is since its start. Nothing where the kernel does not count.
fn waited(schedstat: Option<&File>) -> Option<Duration> {
    let mut text = [0; 128];
    let length = schedstat?.read_at(&mut text, 0).ok()?;
    parse(std::str::from_utf8(&text[..length]).ok()?)
}

fn read(path: &str) -> Option<Duration> {
    parse(&std::fs::read_to_string(path).ok()?)
}

fn parse(text: &str) -> Option<Duration> {
    let waited = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(waited))
}

const WINDOW: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::clock;

    #[test]
    fn many_short_waits_are_no_starvation_and_one_long_one_is() {
        let begin = clock::now();
        let ms = Duration::from_millis;
        let mut watch = Watch {
            schedstat: None,
            window: (begin, Some(ms(100))),
            starved: Duration::ZERO,
        };
        watch.close(begin + ms(10), Some(ms(105)));
        assert_eq!(watch.starved, ms(0), "half of the time");
        watch.close(begin + ms(60), Some(ms(150)));
        assert_eq!(watch.starved, ms(45));
        watch.close(begin + ms(70), Some(ms(151)));
        assert_eq!(watch.starved, ms(45));
    }

    #[test]
    fn a_thread_that_runs_is_not_starved_by_itself() {
        let now = clock::now();
        let watch = Watch::new(now);
        // Nothing waits for so much as half an hour.
        assert_eq!(
            watch.end(now + Duration::from_secs(3600)).unwrap_or_default(),
            Duration::ZERO
        );
    }

    #[test]
    fn the_second_number_is_the_time_waited() {
        assert_eq!(
            parse("157482526 28019601 580\n"),
            Some(Duration::from_nanos(28_019_601))
        );
        for bad in ["", "1", "1 x 2"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_thread_that_has_gone_has_no_figure() {
        assert_eq!(of_process(u32::MAX), None);
        assert_eq!(since(Some(Duration::from_secs(1)), None), None);
        assert_eq!(
            since(Some(Duration::from_secs(1)), Some(Duration::from_secs(3))),
            Some(Duration::from_secs(2))
        );
    }
}
