//! Admits bytes at a rate: the limit of a link or of one migration.
//!
//! The rate limiter is governor's GCRA. It keeps its interval per cell in whole nanoseconds, so cells of one byte would turn
//! 3 Gbit/s into 4 and 10 into 8; cells of 1 KiB are within 0.03 % up to 10 Gbit/s. Bytes that do not fill a cell are carried over to the
//! next admission. The depth is 5 ms of rate, and what is larger passes in pieces of half of that, so that a wake-up may be 2.5 ms late
//! without losing rate.
//!
//! governor's own waiting reads the system's clock and wakes everybody at once; here callers queue, first come first served, on
//! tokio's clock.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;

use crate::proto::page::ByteRate;

/// Bytes in one cell of the rate limiter.
const CELL: u64 = 1024;

const BURST: Duration = Duration::from_millis(5);

/// At low rates a cell takes longer than [`BURST`]; without room for more than one, each late wake-up would lose rate.
const MIN_BURST_CELLS: u32 = 4;

/// Admits bytes at a rate that can change at any time, or all at once where there is none.
#[derive(Debug)]
pub struct Shaper {
    limit: ArcSwapOption<Limit>,
    changed: Notify,
    clock: TokioClock,
    /// Bytes admitted that have not filled a cell yet. Its holder is the one who waits.
    turn: Mutex<u64>,
    waited_nanos: AtomicU64,
}

#[derive(Debug)]
struct Limit {
    rate: ByteRate,
    limiter: RateLimiter<NotKeyed, InMemoryState, TokioClock, NoOpMiddleware<Duration>>,
    /// Cells that it holds when full.
    burst: NonZeroU32,
    /// Cells that pass at once.
    piece: NonZeroU32,
}

impl Shaper {
    /// A shaper whose first burst (5 ms of `rate`) passes at once. A rate of zero admits one cell a second.
    #[must_use]
    pub fn new(rate: Option<ByteRate>) -> Self {
        let clock = TokioClock { origin: Instant::now() };
        Self {
            limit: ArcSwapOption::from_pointee(rate.map(|rate| Limit::new(rate, clock))),
            changed: Notify::new(),
            clock,
            turn: Mutex::new(0),
            waited_nanos: AtomicU64::new(0),
        }
    }

    /// Returns once `bytes` may be sent; callers pass in the order in which they came. Where the caller gives up before,
    /// what was counted so far is lost to the others, at most `bytes`.
    pub async fn admit(&self, bytes: u64) {
        let mut carried = self.turn.lock().await;
        let total = carried.saturating_add(bytes);
        let mut cells = total / CELL;
        *carried = total % CELL;
        while cells > 0 {
            // Registered before the limit is read, so that no change is missed.
            let changed = self.changed.notified();
            let Some(limit) = self.limit.load_full() else { return };
            let piece =
                NonZeroU32::new(u32::try_from(cells).unwrap_or(u32::MAX)).map_or(limit.piece, |n| n.min(limit.piece));
            let verdict = limit
                .limiter
                .check_n(piece)
                .expect("a piece is never larger than the burst");
            let Err(not_yet) = verdict else {
                cells -= u64::from(piece.get());
                continue;
            };
            let began = self.clock.now();
            let wait = not_yet.wait_time_from(began);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
            let waited = self.clock.now().saturating_sub(began);
            self.waited_nanos
                .fetch_add(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
    }

    /// Admits at `rate` from now on; who waits is reckoned anew. What was earned at the old rate stays and nothing is added, so that
    /// frequent changes cost nothing either way.
    pub fn set_rate(&self, rate: Option<ByteRate>) {
        let before = self.limit.load_full();
        if before.as_ref().map(|before| before.rate) == rate {
            return;
        }
        let limit = rate.map(|rate| Limit::new(rate, self.clock));
        if let (Some(limit), Some(before)) = (&limit, before) {
            limit.begin_with(before.take_all());
        }
        self.limit.store(limit.map(Into::into));
        self.changed.notify_waiters();
    }

    /// The rate at which bytes are admitted.
    #[must_use]
    pub fn rate(&self) -> Option<ByteRate> {
        self.limit.load().as_ref().map(|limit| limit.rate)
    }

    /// Time for which admissions were held back since this was last asked, of one caller at a time.
    #[must_use]
    pub fn take_waited(&self) -> Duration {
        Duration::from_nanos(self.waited_nanos.swap(0, Ordering::Relaxed))
    }
}

impl Limit {
    fn new(rate: ByteRate, clock: TokioClock) -> Self {
        let interval = rate
            .time_for(CELL)
            .clamp(Duration::from_nanos(1), Duration::from_secs(1));
        let burst = u32::try_from(rate.bytes_in(BURST) / CELL)
            .unwrap_or(u32::MAX)
            .max(MIN_BURST_CELLS);
        let burst = NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::with_period(interval)
            .expect("the interval is at least 1 ns")
            .allow_burst(burst);
        let piece = NonZeroU32::new(burst.get() / 2).unwrap_or(NonZeroU32::MIN);
        Self {
            rate,
            limiter: RateLimiter::direct_with_clock(quota, clock),
            burst,
            piece,
        }
    }

    /// Leaves a new limiter, which is full, no more than so many cells.
    fn begin_with(&self, cells: u32) {
        if let Some(unearned) = NonZeroU32::new(self.burst.get().saturating_sub(cells)) {
            let passed = self.limiter.check_n(unearned);
            debug_assert!(matches!(passed, Ok(Ok(()))), "a new limiter is full");
        }
    }

    /// Empties the limiter; the cells that it held.
    fn take_all(&self) -> u32 {
        let mut taken = 0;
        let mut step = self.burst.get();
        while let Some(cells) = NonZeroU32::new(step) {
            match self.limiter.check_n(cells) {
                Ok(Ok(())) => taken += step,
                _ => step /= 2,
            }
        }
        taken
    }
}

/// tokio's clock, which tests can stop; governor counts from an origin.
#[derive(Clone, Copy, Debug)]
struct TokioClock {
    origin: Instant,
}

impl Clock for TokioClock {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn megabit(value: u64) -> ByteRate {
        ByteRate::from_bits_per_second(value * 1_000_000)
    }

    /// Bytes admitted in pieces of `size` in ten seconds of stopped time.
    async fn in_ten_seconds(shaper: &Shaper, size: u64) -> u64 {
        let end = Instant::now() + Duration::from_secs(10);
        let mut bytes = 0;
        while Instant::now() < end {
            shaper.admit(size).await;
            bytes += size;
        }
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn the_average_is_the_rate_for_pieces_of_any_size_and_any_rate() {
        for (rate, size) in [
            (megabit(1), 100),
            (megabit(1), 70_000),
            (megabit(100), 1_023),
            (megabit(100), 5_000_000),
            (megabit(1_000), 262_144),
            (megabit(1_000), 300_001),
            (megabit(10_000), 1_048_576),
        ] {
            let admitted = in_ten_seconds(&Shaper::new(Some(rate)), size).await;
            let fair = rate.bytes_in(Duration::from_secs(10));
            let burst = rate.bytes_in(BURST).max(u64::from(MIN_BURST_CELLS) * CELL) + CELL;
            assert!(
                admitted <= fair + fair / 1000 + size + burst,
                "{rate} by {size}: {admitted}"
            );
            assert!(
                admitted + fair / 200 >= fair,
                "{rate} by {size}: only {admitted} of {fair}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_smaller_than_a_cell_is_not_free() {
        let shaper = Shaper::new(Some(ByteRate(10 * CELL)));
        shaper.admit(u64::from(MIN_BURST_CELLS) * CELL).await;
        let before = Instant::now();
        for _ in 0..100 * CELL {
            shaper.admit(1).await;
        }
        let took = before.elapsed();
        assert!(
            took >= Duration::from_millis(9_900) && took <= Duration::from_millis(10_100),
            "{took:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_at_once_and_the_wait_behind_it_is_counted() {
        let shaper = Shaper::new(Some(megabit(800)));
        let before = Instant::now();
        shaper.admit(480_000).await;
        assert_eq!(
            (before.elapsed(), shaper.take_waited()),
            (Duration::ZERO, Duration::ZERO),
            "5 ms are 500 kB"
        );
        shaper.admit(1_000_000).await;
        assert!(before.elapsed() >= Duration::from_millis(9), "{:?}", before.elapsed());
        assert_eq!(shaper.take_waited(), before.elapsed());
        assert_eq!(shaper.take_waited(), Duration::ZERO, "it is counted once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_rate_frees_who_waits_for_the_old_one() {
        let shaper = Arc::new(Shaper::new(Some(ByteRate(1024))));
        let waiting = tokio::spawn({
            let shaper = shaper.clone();
            async move { shaper.admit(1_000_000).await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = Instant::now();
        shaper.set_rate(Some(megabit(800)));
        waiting.await.unwrap();
        assert!(before.elapsed() <= Duration::from_millis(20), "{:?}", before.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn changing_the_rate_often_admits_nothing_extra_and_loses_nothing() {
        let shaper = Arc::new(Shaper::new(Some(megabit(100))));
        let changes = tokio::spawn({
            let shaper = shaper.clone();
            async move {
                for step in 0..u64::MAX {
                    tokio::time::sleep(Duration::from_millis(7)).await;
                    shaper.set_rate(Some(ByteRate(megabit(100).0 - step % 2)));
                }
            }
        });
        let admitted = in_ten_seconds(&shaper, 50_000).await;
        changes.abort();
        let fair = megabit(100).bytes_in(Duration::from_secs(10));
        assert!(
            admitted <= fair + 200_000 && admitted >= fair * 9 / 10,
            "{admitted} of {fair}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn callers_pass_in_the_order_in_which_they_came() {
        let shaper = Arc::new(Shaper::new(Some(megabit(1))));
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut callers = tokio::task::JoinSet::new();
        for number in 0..20 {
            let (shaper, order) = (shaper.clone(), order.clone());
            callers.spawn(async move {
                shaper.admit(if number % 2 == 0 { 100_000 } else { 2_000 }).await;
                order.lock().unwrap().push(number);
            });
            tokio::task::yield_now().await;
        }
        callers.join_all().await;
        assert!(order.lock().unwrap().is_sorted());
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_everything_passes_and_a_rate_that_comes_later_holds() {
        let shaper = Shaper::new(None);
        let before = Instant::now();
        shaper.admit(u64::MAX).await;
        assert_eq!(before.elapsed(), Duration::ZERO);
        shaper.set_rate(Some(megabit(100)));
        let admitted = in_ten_seconds(&shaper, 50_000).await;
        let fair = megabit(100).bytes_in(Duration::from_secs(10));
        assert!(admitted <= fair + 200_000, "{admitted} of {fair}");
        let waiting = async {
            shaper.admit(1_000_000_000).await;
        };
        let lifted = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            shaper.set_rate(None);
        };
        let before = Instant::now();
        tokio::join!(waiting, lifted);
        assert!(before.elapsed() < Duration::from_secs(2));
    }
}
