//! How fast disks are read while the guest uses them: slower where its own requests take longer than it is used to.
//!
//! Reads, writes and flushes are compared with their own kind, so that a guest that flushes more often is not taken for one that is slowed down. Where
//! reading slowly does not help, reading is not the cause: then what is seen is what the guest is used to from now on.

use std::time::Duration;

use crate::proto::page::ByteRate;

/// Between two looks, which is what the numbers here are made for.
pub const LOOK: Duration = Duration::from_secs(1);

/// Requests by which is judged, of all kinds together.
const FEW: u64 = 8;

/// A guest that asks for less than [`FEW`] in so many looks is not slowed down.
const IDLE_LOOKS: u32 = 5;

/// So many times what it is used to is too much,
const SLOW: f64 = 2.0;

/// where it is so much more: nobody notices a tenth of a millisecond that becomes two.
const NOTICED_NANOS: f64 = 1e6;

/// Disks are read no slower for the guest's sake: a migration has to end.
const LOWEST: f64 = 4e6;

/// What is hardly faster than the lowest rate.
const NEAR_LOWEST: f64 = LOWEST * 2.0;

/// Looks at which the guest is slow at the lowest rate, or near it, after which reading is not the cause.
const PATIENCE: u32 = 5;

/// So slow a read is not the cause either.
const NOTHING: f64 = LOWEST / 4.0;

/// What a look that finds nothing adds: three of them more than make up for one that halves.
const GROWTH: f64 = 1.3;

/// Requests that have ended, and the time that they took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// How many.
    pub requests: u64,
    /// Nanoseconds, of all of them together.
    pub nanos: u64,
}

/// What a guest has asked its disks for since its hypervisor began, all of them together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestIo {
    /// Requests to read.
    pub reads: Served,
    /// Requests to write.
    pub writes: Served,
    /// Requests to make durable.
    pub flushes: Served,
}

/// Keeps the rate at which the disks of a guest are read.
#[derive(Debug)]
pub struct ReadPace {
    most: Option<ByteRate>,
    /// What a request of each kind takes when nobody else reads, nanoseconds.
    usual: [Option<f64>; 3],
    last: GuestIo,
    looks: u32,
    limit: Option<f64>,
    looks_at_lowest: u32,
    seen: Seen,
}

/// Requests of the guest meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    /// Those of which it is known how long they take as a rule.
    pub requests: u64,
    /// What they took, nanoseconds.
    pub nanos: f64,
    /// What they take as a rule.
    pub usual_nanos: f64,
}

impl Served {
    fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(before.requests),
            nanos: self.nanos.saturating_sub(before.nanos),
        }
    }

    fn mean(self) -> Option<f64> {
        (self.requests >= FEW).then(|| self.nanos as f64 / self.requests as f64)
    }
}

impl GuestIo {
    fn kinds(self) -> [Served; 3] {
        [self.reads, self.writes, self.flushes]
    }
}

impl Seen {
    fn is_slow(self) -> bool {
        let more = self.nanos - self.usual_nanos;
        self.nanos > self.usual_nanos * SLOW && more > self.requests as f64 * NOTICED_NANOS
    }
}

impl ReadPace {
    /// Begins before anything is read: what the guest has asked for until then took what it is used to. Never faster than `most`.
    #[must_use]
    pub fn new(before: GuestIo, most: Option<ByteRate>) -> Self {
        Self {
            most,
            usual: before.kinds().map(Served::mean),
            last: before,
            looks: 0,
            limit: None,
            looks_at_lowest: 0,
            seen: Seen::default(),
        }
    }

    /// Takes in a look, [`LOOK`] after the one before, at which `read` was what was read meanwhile. How fast to go on; `None`: as fast as it goes.
    pub fn look(&mut self, now: GuestIo, read: ByteRate) -> Option<ByteRate> {
        self.looks += 1;
        let kinds = now.kinds();
        let since: [Served; 3] = std::array::from_fn(|kind| kinds[kind].since(self.last.kinds()[kind]));
        let judged = self.judged(&since);
        if judged.requests >= FEW || self.looks >= IDLE_LOOKS {
            self.last = now;
            self.looks = 0;
            self.seen.requests += judged.requests;
            self.seen.nanos += judged.nanos;
            self.seen.usual_nanos += judged.usual_nanos;
            match judged.requests >= FEW && judged.is_slow() && read.0 as f64 > NOTHING {
                true => self.slow_down(read, &since),
                false => self.speed_up(read),
            }
            for (usual, since) in self.usual.iter_mut().zip(since) {
                *usual = usual.or_else(|| since.mean());
            }
        }
        let limit = self.limit.map(|limit| ByteRate(limit as u64));
        limit.into_iter().chain(self.most).min()
    }

    /// What the guest has seen until now.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.seen
    }

    fn judged(&self, since: &[Served; 3]) -> Seen {
        let mut judged = Seen::default();
        for (usual, since) in self.usual.iter().zip(since) {
            if let Some(usual) = usual {
                judged.requests += since.requests;
                judged.nanos += since.nanos as f64;
                judged.usual_nanos += usual * since.requests as f64;
            }
        }
        judged
    }

    fn slow_down(&mut self, read: ByteRate, since: &[Served; 3]) {
        let now = self.limit.map_or(read.0 as f64, |limit| limit.min(read.0 as f64));
        self.limit = Some((now / 2.0).max(LOWEST));
        self.looks_at_lowest += u32::from(now <= NEAR_LOWEST);
        if self.looks_at_lowest < PATIENCE {
            return;
        }
        self.looks_at_lowest = 0;
        for (usual, since) in self.usual.iter_mut().zip(since) {
            *usual = since.mean().or(*usual);
        }
    }

    fn speed_up(&mut self, read: ByteRate) {
        let grown = self.limit.map(|limit| limit * GROWTH);
        // Something else is what keeps it from being faster.
        self.limit = grown.filter(|limit| read.0 == 0 || *limit <= read.0 as f64 * 2.0);
        // A guest that is slow now and then must not keep it at the lowest for ever.
        if self.limit.is_none_or(|limit| limit > NEAR_LOWEST) {
            self.looks_at_lowest = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that reads so often in a second, each time for so long.
    struct Guest(GuestIo);

    impl Guest {
        fn new() -> Self {
            let reads = Served {
                requests: 1_000,
                nanos: 1_000 * 500_000,
            };
            Self(GuestIo {
                reads,
                ..GuestIo::default()
            })
        }

        fn second(&mut self, requests: u64, micros: u64) -> GuestIo {
            self.0.reads.requests += requests;
            self.0.reads.nanos += requests * micros * 1_000;
            self.0
        }
    }

    const LINK: ByteRate = ByteRate(100_000_000);

    #[test]
    fn a_guest_that_notices_nothing_is_read_as_fast_as_it_goes() {
        let mut guest = Guest::new();
        let mut pace = ReadPace::new(guest.0, None);
        for micros in [500, 600, 900, 1_200, 400] {
            assert_eq!(pace.look(guest.second(100, micros), LINK), None, "{micros}");
        }
        let seen = pace.seen();
        assert_eq!(seen.requests, 500);
        assert!((seen.usual_nanos - 500.0 * 500_000.0).abs() < 1.0, "{seen:?}");
        assert!((seen.nanos - 100.0 * 3_600_000.0).abs() < 1.0, "{seen:?}");
    }

    #[test]
    fn a_guest_that_suffers_is_read_slower_until_it_does_not_and_then_faster_again() {
        let mut guest = Guest::new();
        let mut pace = ReadPace::new(guest.0, None);
        assert_eq!(pace.look(guest.second(100, 5_000), LINK), Some(ByteRate(50_000_000)));
        let slower = pace.look(guest.second(100, 3_000), ByteRate(50_000_000));
        assert_eq!(slower, Some(ByteRate(25_000_000)));
        let mut rate = slower;
        for _ in 0..10 {
            let Some(now) = rate else { break };
            // The limit is what it is read at, up to what the link takes.
            rate = pace.look(guest.second(100, 600), ByteRate(now.0.min(LINK.0 / 3)));
        }
        assert_eq!(rate, None, "the link is slower than what the guest bears");
    }

    #[test]
    fn where_reading_is_not_the_cause_it_is_not_slow_for_ever() {
        let mut guest = Guest::new();
        let mut pace = ReadPace::new(guest.0, None);
        let mut rate = LINK;
        let mut lowest = 0;
        for _ in 0..60 {
            let limit = pace.look(guest.second(50, 20_000), rate);
            rate = limit.unwrap_or(LINK).min(LINK);
            lowest += u32::from(rate.0 == LOWEST as u64);
        }
        assert!(lowest <= PATIENCE, "{lowest}");
        assert_eq!(rate, LINK);
    }

    #[test]
    fn a_guest_that_is_slow_now_and_then_by_itself_does_not_keep_it_slow() {
        let mut guest = Guest::new();
        let mut pace = ReadPace::new(guest.0, None);
        let mut rate = LINK;
        let mut after_a_while = 0;
        for second in 0..240 {
            let micros = if second % 2 == 0 { 30_000 } else { 500 };
            let limit = pace.look(guest.second(50, micros), rate);
            rate = limit.unwrap_or(LINK).min(LINK);
            after_a_while += if second >= 120 { rate.0 } else { 0 };
        }
        assert!(after_a_while > 120 * LINK.0 * 9 / 10, "{after_a_while}");
    }

    #[test]
    fn a_guest_that_is_slow_while_hardly_anything_is_read_is_not_slowed_down_by_that() {
        let mut guest = Guest::new();
        let mut pace = ReadPace::new(guest.0, None);
        assert_eq!(pace.look(guest.second(100, 50_000), ByteRate(0)), None);
        assert_eq!(pace.look(guest.second(100, 50_000), ByteRate(500_000)), None);
    }

    #[test]
    fn requests_that_hardly_end_any_more_are_noticed_and_none_at_all_are_not_waited_for() {
        let mut guest = Guest::new();
        let mut pace = ReadPace::new(guest.0, Some(LINK));
        for _ in 0..3 {
            assert_eq!(pace.look(guest.second(2, 900_000), LINK), Some(LINK));
        }
        assert_eq!(pace.look(guest.second(2, 900_000), LINK), Some(ByteRate(LINK.0 / 2)));
        let mut rate = LINK;
        for _ in 0..40 {
            rate = pace.look(guest.0, ByteRate(rate.0.min(LINK.0 / 4))).unwrap();
        }
        assert_eq!(rate, LINK, "what was asked for at most holds");
    }

    #[test]
    fn kinds_are_compared_with_their_own_kind() {
        let fast_writes = Served {
            requests: 10_000,
            nanos: 10_000 * 50_000,
        };
        let slow_flushes = Served {
            requests: 100,
            nanos: 100 * 8_000_000,
        };
        let mut io = GuestIo {
            writes: fast_writes,
            flushes: slow_flushes,
            ..GuestIo::default()
        };
        let mut pace = ReadPace::new(io, None);
        // A database begins to commit.
        io.flushes.requests += 500;
        io.flushes.nanos += 500 * 8_000_000;
        io.writes.requests += 500;
        io.writes.nanos += 500 * 60_000;
        // Of reads nothing was known: the first of them say what they take.
        io.reads.requests += 500;
        io.reads.nanos += 500 * 90_000_000;
        assert_eq!(pace.look(io, LINK), None);
        assert_eq!(pace.seen().requests, 1_000);
        io.reads.requests += 500;
        io.reads.nanos += 500 * 90_000_000;
        assert_eq!(pace.look(io, LINK), None);
        assert_eq!(pace.seen().requests, 1_500);
    }
}
