//! One direction of the emulator: frames in, the model's verdict on each datagram, runs of survivors out. No device and
//! no clock.
//!
//! ```text
//! receive(now, read) → arena ─ segment by segment → model → run (due, slot, segments) ─ … ─ emit(now, write)
//! ```
//!
//! Survivors that follow each other within a quantum of line time leave as one run, due when its last datagram is: nothing
//! arrives before it could, and a train of ten costs one read and one write.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::arena::{Arena, MAX_FRAME_BYTES, Slot};
use super::model::{DropCause, LinkModel, LinkSettings, Verdict};
use super::segments::{MAX_SEGMENTS, Train};
use super::stats::{DirectionStats, Drops};

/// Packets from one site to the other.
#[derive(Debug)]
pub(super) struct Direction {
    model: LinkModel,
    arena: Arena,
    runs: VecDeque<Run>,
    /// Takes what finds the arena full, so that it can be counted.
    spill: Box<[u8]>,
    quantum: Duration,
    /// What the arena was made for.
    capacity_bytes: u64,
    stats: DirectionStats,
}

/// Consecutive datagrams of one frame that leave together.
#[derive(Clone, Debug)]
struct Run {
    due: Instant,
    slot: Slot,
    train: Train,
    segments: Range<u32>,
    /// The frame's slot is free after this run.
    last_of_frame: bool,
}

/// The settings need more room than the emulator took at its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this needs room for {needed} bytes in flight and the emulator has taken {room}; start the link with a profile of that \
     rate and RTT"
)]
pub(super) struct NoRoom {
    needed: u64,
    room: u64,
}

impl Direction {
    /// A direction with room for twice what `settings` can have in flight, taken and touched.
    pub(super) fn new(settings: LinkSettings, seed: u64, stream: u64, now: Instant) -> Self {
        let capacity_bytes = (in_flight_bytes(&settings) * HEADROOM).max(MIN_CAPACITY_BYTES);
        let run_limit = usize::try_from(capacity_bytes / SMALL_FRAME_BYTES)
            .unwrap_or(usize::MAX)
            .max(MIN_RUNS);
        let idle = Run {
            due: now,
            slot: Slot::default(),
            train: Train::default(),
            segments: 0..0,
            last_of_frame: false,
        };
        // Filled once, so that its pages are touched.
        let mut runs = VecDeque::from(vec![idle; run_limit]);
        runs.clear();
        Self {
            quantum: quantum(&settings),
            model: LinkModel::new(settings, seed, stream, now),
            arena: Arena::new(usize::try_from(capacity_bytes).unwrap_or(usize::MAX)),
            runs,
            spill: vec![0xa5; MAX_FRAME_BYTES].into_boxed_slice(),
            capacity_bytes,
            stats: DirectionStats::default(),
        }
    }

    /// Lets `read` write one frame to the room it is given and return its length; judges the datagrams in it.
    ///
    /// # Errors
    /// What `read` returns.
    pub(super) fn receive(
        &mut self,
        now: Instant,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        // A frame becomes at most as many runs as it has segments.
        let runs_left = self.runs.capacity() - self.runs.len();
        let vacant = if runs_left < MAX_SEGMENTS as usize {
            None
        } else {
            self.arena.vacant()
        };
        match vacant {
            Some(room) => {
                let length = read(room)?;
                match Train::parse(self.arena.written(length)) {
                    Ok(train) => self.judge(now, length, &train),
                    Err(_) => self.stats.dropped.ingress.add(1, length as u64),
                }
            }
            None => {
                let length = read(&mut self.spill)?;
                if let Ok(train) = Train::parse(&self.spill[..length]) {
                    let bytes = train.run_bytes(&(0..train.segments()));
                    let packets = u64::from(train.segments());
                    self.stats.offered.packets += packets;
                    self.stats.offered.bytes += bytes;
                    self.stats.dropped.overrun.add(packets, bytes);
                }
            }
        }
        Ok(())
    }

    fn judge(&mut self, now: Instant, length: usize, train: &Train) {
        let mut slot = None;
        let mut open: Option<(Instant, Range<u32>, Instant)> = None;
        for index in 0..train.segments() {
            let bytes = train.segment_bytes(index);
            self.stats.offered.add(u64::from(bytes));
            match self.model.offer(now, bytes) {
                Verdict::Deliver { at } => {
                    self.stats.in_flight_bytes += u64::from(bytes);
                    open = match open {
                        Some((first, segments, _)) if segments.end == index && at - first <= self.quantum => {
                            Some((first, segments.start..index + 1, at))
                        }
                        closed => {
                            self.close(closed, &mut slot, length, train);
                            Some((at, index..index + 1, at))
                        }
                    };
                }
                Verdict::Drop(cause) => of_cause(&mut self.stats.dropped, cause).add(1, u64::from(bytes)),
            }
        }
        self.close(open, &mut slot, length, train);
        if slot.is_some()
            && let Some(last) = self.runs.back_mut()
        {
            last.last_of_frame = true;
        }
    }

    fn close(
        &mut self,
        open: Option<(Instant, Range<u32>, Instant)>,
        slot: &mut Option<Slot>,
        length: usize,
        train: &Train,
    ) {
        if let Some((_, segments, due)) = open {
            let slot = *slot.get_or_insert_with(|| self.arena.keep(length));
            self.runs.push_back(Run {
                due,
                slot,
                train: *train,
                segments,
                last_of_frame: false,
            });
        }
    }

    /// When the next run is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.runs.front().map(|run| run.due)
    }

    /// Hands the next run to `write` if it is due, and says by how much it was late.
    pub(super) fn emit(
        &mut self,
        now: Instant,
        write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> Option<Duration> {
        if self.next_due()? > now {
            return None;
        }
        let run = self.runs.pop_front()?;
        let packets = u64::from(run.segments.end - run.segments.start);
        let bytes = run.train.run_bytes(&run.segments);
        self.stats.in_flight_bytes -= bytes;
        match run.train.write_run(self.arena.frame(run.slot), run.segments, write) {
            Ok(_) => {
                self.stats.delivered.packets += packets;
                self.stats.delivered.bytes += bytes;
            }
            Err(_) => self.stats.dropped.egress.add(packets, bytes),
        }
        if run.last_of_frame {
            self.arena.release(run.slot);
        }
        Some(now - run.due)
    }

    /// Whether packets under `settings` find room.
    ///
    /// # Errors
    /// [`NoRoom`] where they would overrun it.
    pub(super) fn has_room_for(&self, settings: &LinkSettings) -> Result<(), NoRoom> {
        let needed = in_flight_bytes(settings);
        if needed > self.capacity_bytes {
            return Err(NoRoom {
                needed,
                room: self.capacity_bytes,
            });
        }
        Ok(())
    }

    /// Goes on with other settings.
    pub(super) fn change(&mut self, settings: LinkSettings) {
        self.quantum = quantum(&settings);
        self.model.change(settings);
    }

    /// The settings in force.
    pub(super) fn settings(&self) -> &LinkSettings {
        self.model.settings()
    }

    /// Lets nothing enter from `start` for `length`.
    pub(super) fn cut(&mut self, start: Instant, length: Duration) {
        self.model.cut(start, length);
    }

    /// Ends all cuts.
    pub(super) fn restore(&mut self) {
        self.model.restore();
    }

    /// What has been carried.
    pub(super) fn stats(&self) -> DirectionStats {
        self.stats
    }
}

fn of_cause(drops: &mut Drops, cause: DropCause) -> &mut super::stats::Dropped {
    match cause {
        DropCause::Outage => &mut drops.outage,
        DropCause::Mtu => &mut drops.mtu,
        DropCause::Loss => &mut drops.loss,
        DropCause::Queue => &mut drops.queue,
    }
}

/// Bytes that are queued or delayed at most: rate x (delay + four deviations) and the queue.
fn in_flight_bytes(settings: &LinkSettings) -> u64 {
    let deviation = settings.jitter.map_or(Duration::ZERO, |jitter| jitter.deviation);
    settings
        .rate
        .bytes_in(settings.one_way_delay + 4 * deviation)
        .saturating_add(settings.queue_bytes)
}

/// Line time of a run. A quarter of the delay bounds what a run adds to a short one.
fn quantum(settings: &LinkSettings) -> Duration {
    MAX_QUANTUM.min(settings.one_way_delay / 4)
}

const MAX_QUANTUM: Duration = Duration::from_micros(100);
/// Room for twice the rate or the RTT, so that both may be raised while the link is up.
const HEADROOM: u64 = 2;
const MIN_CAPACITY_BYTES: u64 = 8 << 20;
/// Runs are counted as if frames had this length on average; beyond, floods of small packets overrun the emulator anyway.
const SMALL_FRAME_BYTES: u64 = 512;
/// 220 000 small packets a second, what one core reads, for 0.3 s.
const MIN_RUNS: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::ByteRate;
    use crate::wan::loss::Loss;
    use crate::wan::model::ETHERNET_OVERHEAD;
    use crate::wan::random::Probability;

    const MS: Duration = Duration::from_millis(1);

    fn settings() -> LinkSettings {
        LinkSettings {
            one_way_delay: 75 * MS,
            rate: ByteRate::from_bits_per_second(1_000_000_000),
            queue_bytes: 6_250_000,
            overhead_bytes: ETHERNET_OVERHEAD,
            mtu_bytes: 1500,
            loss: Loss::None,
            jitter: None,
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "an Instant has no other source; the tests only add to it"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    /// A UDP train over IPv4 with `segments` of 1000 bytes, each filled with its number.
    fn train(segments: u8) -> Vec<u8> {
        let payload: Vec<u8> = (0..segments).flat_map(|number| [number; 1000]).collect();
        let mut frame = vec![1, 5, 28, 0, 0xe8, 0x03, 20, 0, 6, 0];
        let mut packet = vec![0; 28];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&((28 + payload.len()) as u16).to_be_bytes());
        packet[9] = 17;
        frame.extend(packet);
        frame.extend(payload);
        frame
    }

    fn send(direction: &mut Direction, now: Instant, frame: &[u8]) {
        direction
            .receive(now, |room| {
                room[..frame.len()].copy_from_slice(frame);
                Ok(frame.len())
            })
            .expect("a copy");
    }

    /// All that is due at `now`: the numbers of the segments in each run, and its lateness.
    fn drain(direction: &mut Direction, now: Instant) -> Vec<(Vec<u8>, Duration)> {
        let mut runs = Vec::new();
        loop {
            let mut bytes = Vec::new();
            let late = direction.emit(now, |parts| {
                bytes = parts.iter().flat_map(|part| part.iter().copied()).collect();
                Ok(bytes.len())
            });
            let Some(late) = late else { return runs };
            runs.push((bytes[38..].chunks(1000).map(|segment| segment[0]).collect(), late));
        }
    }

    #[test]
    fn a_train_leaves_in_runs_of_a_quantum_when_their_last_datagram_is_due() {
        let begin = start();
        let mut link = Direction::new(settings(), 1, 0, begin);
        send(&mut link, begin, &train(20));
        // A datagram takes 1042 x 8 ns = 8.336 us, and 100 us hold eleven intervals: runs of 12 and 8.
        let first = begin + 75 * MS + Duration::from_nanos(12 * 8336);
        assert_eq!(link.next_due(), Some(first));
        assert!(drain(&mut link, first - Duration::from_nanos(1)).is_empty());
        let (numbers, late) = drain(&mut link, first + MS).remove(0);
        assert_eq!((numbers, late), ((0..12).collect(), MS));
        assert_eq!(
            link.stats().delivered,
            super::super::stats::Traffic {
                packets: 20,
                bytes: 20 * 1028
            }
        );
        assert_eq!(link.stats().in_flight_bytes, 0);
    }

    #[test]
    fn single_segments_of_a_train_are_lost_and_the_others_arrive_in_order() {
        let begin = start();
        let loss = Loss::Bernoulli(Probability::new(0.3).expect("a probability"));
        let mut link = Direction::new(LinkSettings { loss, ..settings() }, 3, 0, begin);
        let (mut arrived, mut partial) = (0, 0);
        for round in 0..100 {
            let now = begin + round * 10 * MS;
            send(&mut link, now, &train(10));
            let numbers: Vec<u8> = drain(&mut link, now + 80 * MS)
                .into_iter()
                .flat_map(|(numbers, _)| numbers)
                .collect();
            assert!(numbers.is_sorted() && numbers.iter().all(|number| *number < 10));
            arrived += numbers.len() as u64;
            partial += u32::from((1..10).contains(&numbers.len()));
        }
        let stats = link.stats();
        assert!(partial > 90, "{partial} of 100 trains lost some and not all");
        assert_eq!(stats.offered.packets, 1000);
        assert_eq!(
            (stats.delivered.packets, stats.dropped.loss.packets),
            (arrived, 1000 - arrived)
        );
        assert_eq!(
            stats.offered.bytes,
            stats.delivered.bytes + stats.dropped.loss.bytes.expect("counted")
        );
    }

    #[test]
    fn what_finds_the_memory_full_is_counted_and_the_rest_still_arrives() {
        let begin = start();
        // Nothing leaves for an hour, and the queue is larger than the arena.
        let settings = LinkSettings {
            rate: ByteRate(1_000_000),
            queue_bytes: 1 << 20,
            ..settings()
        };
        let mut link = Direction::new(settings.clone(), 1, 0, begin);
        link.change(LinkSettings {
            one_way_delay: Duration::from_secs(3600),
            queue_bytes: 1 << 30,
            ..settings
        });
        for _ in 0..400 {
            send(&mut link, begin, &train(30));
        }
        let stats = link.stats();
        assert_eq!(stats.offered.packets, 12_000);
        assert!(stats.dropped.overrun.packets > 0);
        assert_eq!(
            stats.in_flight_bytes,
            stats.offered.bytes - stats.dropped.overrun.bytes.expect("counted")
        );
        let arrived: usize = drain(&mut link, begin + Duration::from_secs(7200))
            .iter()
            .map(|(numbers, _)| numbers.len())
            .sum();
        assert_eq!(arrived as u64, 12_000 - stats.dropped.overrun.packets);
    }

    #[test]
    fn a_frame_of_which_nothing_survives_takes_no_room() {
        let begin = start();
        let loss = Loss::Bernoulli(Probability::ALWAYS);
        let rate = ByteRate(1_000_000);
        let mut link = Direction::new(
            LinkSettings {
                loss,
                rate,
                ..settings()
            },
            1,
            0,
            begin,
        );
        // More than the arena holds.
        for _ in 0..800 {
            send(&mut link, begin, &train(30));
        }
        assert_eq!(link.stats().dropped.loss.packets, 24_000);
        assert_eq!(link.stats().dropped.overrun.packets, 0);
        assert_eq!(link.next_due(), None);
    }

    #[test]
    fn a_refused_write_is_counted() {
        let begin = start();
        let mut link = Direction::new(settings(), 1, 0, begin);
        send(&mut link, begin, &train(10));
        let late = link.emit(begin + 100 * MS, |_| Err(io::ErrorKind::InvalidInput.into()));
        assert!(late.is_some());
        assert_eq!(
            (link.stats().dropped.egress.packets, link.stats().delivered.packets),
            (10, 0)
        );
    }

    #[test]
    fn twice_the_delay_has_room_and_four_times_is_refused() {
        let link = Direction::new(settings(), 1, 0, start());
        assert_eq!(
            link.has_room_for(&LinkSettings {
                one_way_delay: 150 * MS,
                ..settings()
            }),
            Ok(())
        );
        assert!(
            link.has_room_for(&LinkSettings {
                one_way_delay: 300 * MS,
                ..settings()
            })
            .is_err()
        );
    }

    #[test]
    fn a_cut_counts_what_it_takes() {
        let begin = start();
        let mut link = Direction::new(settings(), 1, 0, begin);
        link.cut(begin, MS);
        send(&mut link, begin, &train(10));
        assert_eq!(link.stats().dropped.outage.packets, 10);
        link.restore();
        send(&mut link, begin, &train(10));
        assert_eq!(link.stats().dropped.outage.packets, 10);
    }
}
