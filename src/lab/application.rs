//! What the guest's application did, by the host's clock.
//!
//! The load inside the guest says about four times a second how many operations it has done and how long each took
//! (`netem-scripts/guest-src/application/`). A window begins where the one before was heard and ends where it was heard itself, so that the time in
//! which the guest did not run belongs to the window in which it fell. The time of a single operation is the guest's own: it stands still
//! with the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use self::histogram::Histogram;
use super::guest::Workload;
use super::record::{Application, Work};

#[path = "../../netem-scripts/guest-src/histogram.rs"]
mod histogram;

/// What was done between two reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its number: grows by one, for ever.
    pub number: u64,
    /// When the host heard of it (CLOCK_MONOTONIC).
    pub heard: Instant,
    /// How long it was by the guest's clock.
    pub length: Duration,
    operations: Histogram,
}

impl Window {
    /// Reads `NUMBER MICROSECONDS CLASS:COUNT …`.
    pub(super) fn parse(text: &str, heard: Instant) -> Option<Self> {
        let mut words = text.split(' ');
        let number = words.next()?.parse().ok()?;
        let length = Duration::from_micros(words.next()?.parse().ok()?);
        let operations = Histogram::from_words(words)?;
        Some(Self {
            number,
            heard,
            length,
            operations,
        })
    }

    /// Operations that ended in it.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations.operations()
    }
}

/// Windows in the order of their numbers. Cheap to clone.
#[derive(Clone, Default)]
pub struct Windows(Arc<Vec<Window>>);

impl std::fmt::Debug for Windows {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numbers = self.0.first().zip(self.0.last());
        formatter
            .debug_tuple("Windows")
            .field(&numbers.map(|(first, last)| first.number..=last.number))
            .finish()
    }
}

impl Windows {
    pub(super) fn push(&mut self, window: Window) {
        // Whoever has looked keeps what he saw.
        Arc::make_mut(&mut self.0).push(window);
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Window> {
        self.0.iter()
    }

    /// What was heard at the source, and then at the destination, as one course. A window that was cut in flight is missing; its time goes to
    /// the next one, its operations are lost.
    #[must_use]
    pub fn joined(&self, destination: &Self) -> Self {
        let last = self.0.last().map(|window| window.number);
        let later = destination
            .iter()
            .filter(|window| last.is_none_or(|last| window.number > last));
        Self(Arc::new(self.iter().chain(later).cloned().collect()))
    }

    /// What was done from `from` to `to`: of a window that lies across an end, the share of its operations that is the share of its time.
    /// The p99 is of all operations of the windows that lie there at least in part. `None` where there is no such window.
    #[must_use]
    pub fn work(&self, from: Instant, to: Instant) -> Option<Work> {
        let mut operations = 0.0;
        let mut covered = Duration::ZERO;
        let mut lengths = Histogram::default();
        let mut previous = None;
        for window in self.iter() {
            let began = previous.or_else(|| window.heard.checked_sub(window.length));
            previous = Some(window.heard);
            let Some(began) = began else { continue };
            let inside = window.heard.min(to).saturating_duration_since(began.max(from));
            let whole = window.heard.saturating_duration_since(began);
            if inside.is_zero() || whole.is_zero() {
                continue;
            }
            operations += window.operations() as f64 * inside.div_duration_f64(whole);
            covered += inside;
            lengths.add(&window.operations);
        }
        let p99 = Duration::from_micros(lengths.percentile(99)?);
        Some(Work {
            operations_per_second: operations / covered.as_secs_f64(),
            p99_seconds: p99.as_secs_f64(),
        })
    }

    /// The application around a move that was asked for at `command` and had arrived at `arrival`. `None` where a part was not heard.
    #[must_use]
    pub fn around(&self, application: Workload, command: Instant, arrival: Instant) -> Option<Application> {
        let (first, last) = (self.0.first()?, self.0.last()?);
        let began = first.heard.checked_sub(first.length)?;
        Some(Application {
            name: application.name().to_owned(),
            before: self.work(began, command)?,
            during: self.work(command, arrival)?,
            after: self.work(arrival, last.heard)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUARTER: Duration = Duration::from_millis(250);

    fn epoch() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    /// A window of 250 ms of the guest's time.
    fn window(number: u64, heard: Instant, words: &str) -> Window {
        Window::parse(&format!("{number} 250000 {words}"), heard).unwrap()
    }

    #[test]
    fn what_the_guest_counts_is_what_the_lab_reads() {
        let mut counted = Histogram::default();
        for (microseconds, times) in [(0, 3), (15, 1), (16, 2), (1000, 5), (u64::MAX, 1)] {
            (0..times).for_each(|_| counted.count(microseconds));
        }
        let words = counted.to_words();
        assert_eq!(Histogram::from_words(words.split(' ')), Some(counted.clone()));
        assert_eq!(counted.operations(), 12);
        assert_eq!(counted.percentile(25), Some(0));
        assert_eq!(counted.percentile(26), Some(15));
        assert_eq!(counted.percentile(100), Some(u64::MAX));
        assert_eq!(Histogram::default().percentile(99), None);
        for wrong in ["976:1", "-1:1", "1", "1:", "1:x"] {
            assert_eq!(Histogram::from_words([wrong].into_iter()), None, "{wrong}");
        }
        assert!(Histogram::from_words(["975:1"].into_iter()).is_some());
    }

    #[test]
    fn a_percentile_is_at_most_a_sixteenth_above_the_length() {
        for microseconds in (0..100_000).chain((0..44).map(|power| (1 << power) + 12_345)) {
            let mut one = Histogram::default();
            one.count(microseconds);
            let told = one.percentile(99).unwrap();
            assert!(
                told >= microseconds && told - microseconds <= microseconds / 16,
                "{microseconds}: {told}"
            );
        }
    }

    #[test]
    fn a_time_in_which_the_guest_stood_still_counts_where_it_fell() {
        let start = epoch();
        let mut windows = Windows::default();
        // 100 operations a quarter of a second; the third window holds a pause of a quarter.
        for (number, quarters) in [(0, 1), (1, 2), (2, 4), (3, 5)] {
            windows.push(window(number, start + QUARTER * quarters, "100:99 200:1"));
        }
        let work = |from, to| windows.work(start + QUARTER * from, start + QUARTER * to).unwrap();
        assert_eq!(work(0, 2).operations_per_second, 400.0);
        assert_eq!(work(2, 4).operations_per_second, 200.0);
        assert_eq!(
            work(2, 3).operations_per_second,
            200.0,
            "half of a window's time has half of its operations"
        );
        assert_eq!(work(0, 5).operations_per_second, 320.0);
        assert_eq!(work(0, 2).p99_seconds, work(2, 3).p99_seconds);
        assert!(windows.work(start + QUARTER * 6, start + QUARTER * 7).is_none());

        let application = windows
            .around(Workload::Redis, start + QUARTER * 2, start + QUARTER * 4)
            .unwrap();
        assert_eq!(application.name, "redis");
        assert_eq!(application.before.operations_per_second, 400.0);
        assert_eq!(application.during.operations_per_second, 200.0);
        assert_eq!(application.after.operations_per_second, 400.0);
    }

    #[test]
    fn windows_of_both_sites_are_one_course() {
        let start = epoch();
        let (mut source, mut destination) = (Windows::default(), Windows::default());
        source.push(window(0, start + QUARTER, "50:10"));
        source.push(window(1, start + QUARTER * 2, "50:10"));
        // The last one may have been told twice.
        destination.push(window(1, start + QUARTER * 4, "50:10"));
        destination.push(window(2, start + QUARTER * 4, "50:10"));
        let numbers: Vec<u64> = source.joined(&destination).iter().map(|window| window.number).collect();
        assert_eq!(numbers, [0, 1, 2]);
        let work = source
            .joined(&destination)
            .work(start + QUARTER * 2, start + QUARTER * 4);
        assert_eq!(work.unwrap().operations_per_second, 20.0);
    }
}
