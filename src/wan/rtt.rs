//! The RTT of a link that carries nothing else: small datagrams there and back, each way timed by one clock.
//!
//! One thread has a socket in both sites. It knows when a datagram is about to arrive, wakes up before, and looks for it
//! until it is there: so its own wake-up, 30 to 80 us on an idle virtual machine, is not measured with the link. Not so on
//! a single processor, where looking would keep what carries the packets from running. What comes to B is sent back at
//! once; the time in between is left out.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use serde::Serialize;

use super::link::{Link, Site, enter_namespace};
use super::probe::{ProbeError, quantile_ms};
use super::starvation::Watch;
use super::{clock, schedule};

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RttReport {
    /// Datagrams that were sent from A.
    pub sent: u64,
    /// Those that came back.
    pub returned: u64,
    /// Half took no longer.
    pub p50_ms: f64,
    /// 99 % took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// From A to B, half took no longer.
    pub ab_p50_ms: f64,
    /// From B to A, half took no longer.
    pub ba_p50_ms: f64,
    /// How long the thread was ready and mostly did not run. Nothing where the kernel does not count.
    pub starved_seconds: Option<f64>,
}

/// Sends `count` datagrams, one in each `spacing`, and times their way there and back.
///
/// # Errors
/// [`ProbeError`], also where none comes back.
pub fn measure_rtt(link: &Link, count: u64, spacing: Duration) -> Result<RttReport, ProbeError> {
    std::thread::scope(|scope| {
        // A thread of its own, since it ends in another namespace and runs in real time.
        let measuring = scope.spawn(|| Measurement::start(link)?.run(count, spacing));
        measuring.join().map_err(|_| ProbeError::Ended)?
    })
}

#[derive(Debug)]
struct Measurement<'a> {
    link: &'a Link,
    /// In A and in B.
    sockets: [UdpSocket; 2],
    target: SocketAddr,
    one_way: Duration,
    /// How long before an arrival it wakes up.
    wake_up: Duration,
    /// When the next datagrams should arrive.
    expected: VecDeque<Instant>,
}

impl<'a> Measurement<'a> {
    fn start(link: &'a Link) -> Result<Self, ProbeError> {
        // Refused, the figures still stand on an idle machine.
        let _ = schedule::in_real_time(PRIORITY);
        let open = |site| {
            enter_namespace(&link.name.site(site))?;
            let socket = || {
                let socket = UdpSocket::bind(SocketAddr::from((link.address(site), 0)))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            };
            socket().map_err(|source| failed(link, site, source))
        };
        let sockets = [open(Site::A)?, open(Site::B)?];
        let target = sockets[1]
            .local_addr()
            .map_err(|source| failed(link, Site::B, source))?;
        Ok(Self {
            link,
            sockets,
            target,
            one_way: link.profile.one_way_delay(),
            wake_up: match std::thread::available_parallelism() {
                Ok(processors) if processors.get() > 1 => WAKE_UP,
                _ => Duration::ZERO,
            },
            expected: VecDeque::new(),
        })
    }

    fn run(mut self, count: u64, spacing: Duration) -> Result<RttReport, ProbeError> {
        let mut watch = Watch::new(clock::now());
        let mut trips = vec![Trip::default(); usize::try_from(count).unwrap_or(0)];
        let jitter = self
            .link
            .profile
            .jitter
            .map_or(Duration::ZERO, |jitter| 4 * jitter.deviation);
        let patience = 2 * (self.one_way + jitter) + Duration::from_millis(200);
        let start = clock::now();
        let mut sent = 0;
        loop {
            let now = clock::now();
            let next_send = start + spacing * u32::try_from(sent).unwrap_or(u32::MAX);
            if sent < count && now >= next_send {
                self.send(sent, &mut trips)?;
                sent += 1;
                continue;
            }
            if self.receive(&mut trips)? {
                continue;
            }
            if sent == count && (now > next_send + patience || trips.iter().all(|trip| trip.back.is_some())) {
                break;
            }
            while self.expected.front().is_some_and(|at| *at + OVERDUE < now) {
                self.expected.pop_front();
            }
            let due = self.expected.front().copied();
            let due = if sent < count {
                Some(due.map_or(next_send, |due| due.min(next_send)))
            } else {
                due
            };
            if due.is_none_or(|due| due > now + SLACK) {
                watch.look(now);
            }
            self.wait(now, due);
        }
        evaluate(&trips, watch.end(clock::now()))
    }

    fn send(&mut self, number: u64, trips: &mut [Trip]) -> Result<(), ProbeError> {
        let mut datagram = [0x5a; DATAGRAM_BYTES];
        datagram[..8].copy_from_slice(&number.to_le_bytes());
        let at = clock::now();
        self.transmit(Site::A, &datagram, self.target)?;
        if let Some(trip) = trips.get_mut(number as usize) {
            trip.sent = Some(at);
        }
        self.expected.push_back(at + self.one_way);
        Ok(())
    }

    /// Takes in what has arrived at either site. Returns whether something had.
    fn receive(&mut self, trips: &mut [Trip]) -> Result<bool, ProbeError> {
        let mut any = false;
        for site in [Site::B, Site::A] {
            let mut datagram = [0; DATAGRAM_BYTES];
            let (length, from) = match self.socket(site).recv_from(&mut datagram) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(source) => return Err(failed(self.link, site, source)),
            };
            let at = clock::now();
            any = true;
            self.expected.pop_front();
            let number = datagram.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
            let Some(trip) = number.and_then(|number| trips.get_mut(usize::try_from(number).ok()?)) else {
                continue;
            };
            match site {
                // The first of two copies counts.
                Site::B if length == DATAGRAM_BYTES && trip.there.is_none() => {
                    trip.there = Some(at);
                    let turned = clock::now();
                    self.transmit(Site::B, &datagram, from)?;
                    trip.turned = Some(turned);
                    self.expected.push_back(turned + self.one_way);
                }
                Site::A if trip.back.is_none() => trip.back = Some(at),
                _ => {}
            }
        }
        Ok(any)
    }

    /// Waits for a datagram, or until shortly before `due`; not at all when that is now.
    fn wait(&self, now: Instant, due: Option<Instant>) {
        let time = due.map_or(IDLE, |due| due.saturating_duration_since(now)).min(IDLE);
        let alone = self.wake_up.is_zero();
        if time <= self.wake_up && !alone {
            return;
        }
        // A datagram that is late is waited for too, rather than looked for.
        let time = if alone { time.max(OVERDUE) } else { time - self.wake_up };
        let mut events = self.sockets.each_ref().map(|socket| PollFd::new(socket, PollFlags::IN));
        let _ = rustix::event::poll(&mut events, Some(&clock::timespec(time)));
    }

    fn transmit(&self, site: Site, datagram: &[u8], to: SocketAddr) -> Result<(), ProbeError> {
        match self.socket(site).send_to(datagram, to) {
            Ok(_) => Ok(()),
            Err(source) => Err(failed(self.link, site, source)),
        }
    }

    fn socket(&self, site: Site) -> &UdpSocket {
        match site {
            Site::A => &self.sockets[0],
            Site::B => &self.sockets[1],
        }
    }
}

/// When one datagram was where.
#[derive(Clone, Copy, Debug, Default)]
struct Trip {
    sent: Option<Instant>,
    there: Option<Instant>,
    turned: Option<Instant>,
    back: Option<Instant>,
}

impl Trip {
    /// The time of each way, where it came back.
    fn ways(&self) -> Option<(Duration, Duration)> {
        Some((self.there? - self.sent?, self.back? - self.turned?))
    }
}

fn evaluate(trips: &[Trip], starved: Option<Duration>) -> Result<RttReport, ProbeError> {
    let ways: Vec<_> = trips.iter().filter_map(Trip::ways).collect();
    if ways.is_empty() {
        return Err(ProbeError::Silence(trips.len() as u64));
    }
    let sorted = |time: fn(&(Duration, Duration)) -> Duration| {
        let mut times: Vec<_> = ways.iter().map(time).collect();
        times.sort_unstable();
        times
    };
    let both = sorted(|(there, back)| *there + *back);
    Ok(RttReport {
        sent: trips.len() as u64,
        returned: ways.len() as u64,
        p50_ms: quantile_ms(&both, 0.5),
        p99_ms: quantile_ms(&both, 0.99),
        max_ms: quantile_ms(&both, 1.0),
        ab_p50_ms: quantile_ms(&sorted(|(there, _)| *there), 0.5),
        ba_p50_ms: quantile_ms(&sorted(|(_, back)| *back), 0.5),
        starved_seconds: starved.map(|starved| starved.as_secs_f64()),
    })
}

fn failed(link: &Link, site: Site, source: io::Error) -> ProbeError {
    ProbeError::Socket {
        side: "timing",
        namespace: link.name.site(site),
        source,
    }
}

/// As much as `ping` sends.
const DATAGRAM_BYTES: usize = 56;
/// Below the emulator's.
const PRIORITY: i32 = 5;
/// Twice what an idle virtual machine takes to run a thread whose time has come.
const WAKE_UP: Duration = Duration::from_micros(150);
/// What has not come a millisecond after its time is not worth looking at the clock for.
const OVERDUE: Duration = Duration::from_millis(1);
/// Time for what has nothing to do with a datagram.
const SLACK: Duration = Duration::from_millis(1);
const IDLE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn trip(there_ms: u32, turn_ms: u32, back_ms: u32) -> Trip {
        let sent = clock::now();
        let there = sent + there_ms * MS;
        let turned = there + turn_ms * MS;
        Trip {
            sent: Some(sent),
            there: Some(there),
            turned: Some(turned),
            back: Some(turned + back_ms * MS),
        }
    }

    #[test]
    fn the_time_at_the_far_end_is_no_part_of_the_rtt() {
        let report = evaluate(&[trip(75, 20, 76)], None).expect("one came back");
        assert_eq!((report.p50_ms, report.ab_p50_ms, report.ba_p50_ms), (151.0, 75.0, 76.0));
    }

    #[test]
    fn what_did_not_come_back_is_counted_and_not_timed() {
        let lost = Trip {
            back: None,
            ..trip(75, 0, 75)
        };
        let report = evaluate(&[trip(75, 0, 75), lost], Some(MS)).expect("one came back");
        assert_eq!((report.sent, report.returned, report.max_ms), (2, 1, 150.0));
        assert_eq!(report.starved_seconds, Some(0.001));
        assert!(matches!(evaluate(&[lost], None), Err(ProbeError::Silence(1))));
    }
}
