//! A UDP blaster through a link: what rate arrives, how long a datagram takes one way, which ones are lost and in what runs.
//!
//! One process sends in one site's namespace and receives in the other's, so both ends share a clock and the one-way delay
//! is a true one. Each datagram carries its number and the time it was sent (16 bytes); trains are sent with GSO, each
//! segment with a number of its own.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use rustix::event::{PollFd, PollFlags};
use serde::Serialize;

use super::link::{Link, LinkError, Site, enter_namespace};
use super::model::ETHERNET_OVERHEAD;
use super::random::Probability;
use super::starvation::Watch;
use super::{clock, schedule};
use crate::proto::page::ByteRate;

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct ProbeSettings {
    /// Where from.
    pub from: Site,
    /// At this rate, Ethernet framing included, as the link counts.
    pub rate: ByteRate,
    /// Datagrams in a train, 1 to 64.
    pub segments: usize,
    /// For so long.
    pub duration: Duration,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProbeReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that arrived.
    pub received: u64,
    /// Datagrams that did not.
    pub lost: u64,
    /// Groups of consecutive lost datagrams.
    pub loss_runs: u64,
    /// Datagrams that arrived after a later one.
    pub reordered: u64,
    /// Datagrams that arrived before an earlier one: those that overtook.
    pub overtook: u64,
    /// Copies of datagrams that had arrived before.
    pub duplicates: u64,
    /// UDP payload of a datagram.
    pub payload_bytes: u64,
    /// How long sending took.
    pub send_seconds: f64,
    /// UDP payload that arrived in the second half of the time in which any did, bits per second.
    pub payload_bits_per_second: f64,
    /// Of all that arrived.
    pub one_way: OneWayDelay,
    /// In the second half, when a bottleneck's queue has found its length.
    pub one_way_second_half: OneWayDelay,
    /// How long both threads together were ready and mostly did not run. Nothing where the kernel does not count.
    pub starved_seconds: Option<f64>,
}

/// One-way delays, milliseconds, exact quantiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OneWayDelay {
    /// The shortest.
    pub min_ms: f64,
    /// Half took no longer.
    pub p50_ms: f64,
    /// 99 % took no longer.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

/// A probe cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A site's namespace cannot be entered.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// It would not fit into memory.
    #[error("a probe of {0} datagrams is too long; at most {MAX_DATAGRAMS} are recorded")]
    TooLong(u64),
    /// Trains have 1 to 64 segments, and at most 64 KiB.
    #[error("{0} datagrams of {1} bytes make no train; take 1 to 64 of them and at most 65000 bytes")]
    Train(usize, usize),
    /// A socket refused.
    #[error("the probe's {side} socket in {namespace} failed")]
    Socket {
        /// Sending or receiving.
        side: &'static str,
        /// Where it is.
        namespace: String,
        /// Why.
        source: io::Error,
    },
    /// Nothing arrived at all.
    #[error("none of {0} datagrams arrived; the link is cut, or not up")]
    Silence(u64),
    /// The other end stopped without a word.
    #[error("the probe's other thread ended early")]
    Ended,
}

/// Sends through `link` and says what arrived. Takes the duration, the delay and half a second.
///
/// # Errors
/// [`ProbeError`], also where nothing arrived.
pub fn probe(link: &Link, settings: ProbeSettings) -> Result<ProbeReport, ProbeError> {
    let plan = &Plan::new(link, settings)?;
    let (address_sender, address) = mpsc::channel();
    let (end_sender, end) = mpsc::channel();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(plan, address_sender, &end));
        let sender = scope.spawn(move || match address.recv() {
            Ok(address) => send(plan, address).inspect(|sent| {
                // A receiver that failed says so itself.
                let _ = end_sender.send(*sent);
            }),
            Err(_) => Err(ProbeError::Ended),
        });
        let arrivals = receiver.join().map_err(|_| ProbeError::Ended)?;
        let sent = sender.join().map_err(|_| ProbeError::Ended)?;
        // The receiver ends without a cause of its own when the sender fails.
        match (arrivals, sent) {
            (Ok((arrivals, starved)), Ok(sent)) => {
                let mut report = evaluate(plan.payload, sent, &arrivals)?;
                let both = starved.zip(sent.starved).map(|(one, other)| one + other);
                report.starved_seconds = both.map(|both| both.as_secs_f64());
                Ok(report)
            }
            (Err(ProbeError::Ended), Err(error)) | (Err(error), _) | (_, Err(error)) => Err(error),
        }
    })
}

/// What both threads know.
#[derive(Clone, Copy, Debug)]
struct Plan<'a> {
    link: &'a Link,
    settings: ProbeSettings,
    payload: usize,
    datagrams: u64,
    epoch: Instant,
}

/// How many datagrams were sent, and in what time.
#[derive(Clone, Copy, Debug)]
struct Sent {
    datagrams: u64,
    elapsed: Duration,
    /// How long the thread was ready and mostly did not run.
    starved: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    number: u64,
    at: Duration,
    one_way: Duration,
}

impl<'a> Plan<'a> {
    fn new(link: &'a Link, settings: ProbeSettings) -> Result<Self, ProbeError> {
        let payload = link.profile.mtu_bytes as usize - UDP_IP_HEADERS;
        if !(1..=64).contains(&settings.segments) || settings.segments * payload > 65_000 && settings.segments > 1 {
            return Err(ProbeError::Train(settings.segments, payload));
        }
        let wire = link.profile.mtu_bytes + ETHERNET_OVERHEAD;
        let trains = settings
            .rate
            .bytes_in(settings.duration)
            .div_ceil(u64::from(wire) * settings.segments as u64);
        let datagrams = trains.max(1) * settings.segments as u64;
        if datagrams > MAX_DATAGRAMS {
            return Err(ProbeError::TooLong(datagrams));
        }
        Ok(Self {
            link,
            settings,
            payload: payload.min(65_000),
            datagrams,
            epoch: clock::now(),
        })
    }

    fn namespace(&self, site: Site) -> String {
        self.link.name.site(site)
    }

    fn socket(&self, site: Site, side: &'static str) -> Result<(UdpSocket, UdpSocketState), ProbeError> {
        enter_namespace(&self.namespace(site))?;
        // The link is measured, not the load of the machine. Refused, the figures still stand on an idle one.
        let _ = schedule::in_real_time(PRIORITY);
        let open = || {
            let socket = UdpSocket::bind(SocketAddr::from((self.link.address(site), 0)))?;
            let state = UdpSocketState::new((&socket).into())?;
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
            let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES);
            Ok((socket, state))
        };
        open().map_err(|source| ProbeError::Socket {
            side,
            namespace: self.namespace(site),
            source,
        })
    }
}

fn send(plan: &Plan<'_>, destination: SocketAddr) -> Result<Sent, ProbeError> {
    let site = plan.settings.from;
    let (socket, state) = plan.socket(site, "sending")?;
    let failed = |source| ProbeError::Socket {
        side: "sending",
        namespace: plan.namespace(site),
        source,
    };
    let segments = plan.settings.segments;
    let wire = (plan.payload + UDP_IP_HEADERS) as u64 + u64::from(ETHERNET_OVERHEAD);
    let mut train = vec![0x5a; plan.payload * segments];
    let start = clock::now();
    let mut watch = Watch::new(start);
    let mut skipped = Duration::ZERO;
    let mut number = 0;
    while number < plan.datagrams {
        let due = start + skipped + plan.settings.rate.time_for(number * wire);
        let now = clock::now();
        watch.look(now);
        if due > now + WORTH_SLEEPING {
            clock::sleep(due - now);
        } else if now > due + LONGEST_LAG {
            // What was missed is not made up for by a burst, which would measure the queue.
            skipped += now - due;
        }
        let stamp = (clock::now() - plan.epoch).as_nanos() as u64;
        for (index, datagram) in train.chunks_mut(plan.payload).enumerate() {
            datagram[..8].copy_from_slice(&(number + index as u64).to_le_bytes());
            datagram[8..16].copy_from_slice(&stamp.to_le_bytes());
        }
        let transmit = Transmit {
            destination,
            ecn: None,
            contents: &train,
            segment_size: (segments > 1).then_some(plan.payload),
            src_ip: None,
        };
        loop {
            match state.try_send((&socket).into(), &transmit) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut events = [PollFd::new(&socket, PollFlags::OUT)];
                    let _ = rustix::event::poll(&mut events, Some(&clock::timespec(Duration::from_secs(1))));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        number += segments as u64;
    }
    let end = clock::now();
    Ok(Sent {
        datagrams: number,
        elapsed: end - start,
        starved: watch.end(end),
    })
}

fn receive(
    plan: &Plan<'_>,
    address: mpsc::Sender<SocketAddr>,
    end: &Receiver<Sent>,
) -> Result<(Vec<Arrival>, Option<Duration>), ProbeError> {
    let site = plan.settings.from.peer();
    let (socket, state) = plan.socket(site, "receiving")?;
    let failed = |source| ProbeError::Socket {
        side: "receiving",
        namespace: plan.namespace(site),
        source,
    };
    let mut watch = Watch::new(clock::now());
    let mut arrivals = Vec::with_capacity(plan.datagrams as usize);
    let mut room = vec![0; 64 * 1024 * RECEIVE_BATCH];
    address
        .send(socket.local_addr().map_err(failed)?)
        .map_err(|_| ProbeError::Ended)?;
    let mut sent: Option<(Sent, Instant)> = None;
    let profile = &plan.link.profile;
    // Copies are counted, so the last of them are waited for.
    let countable = profile.duplication == Probability::NEVER;
    let jitter = profile.jitter.map_or(Duration::ZERO, |jitter| 4 * jitter.deviation);
    let patience = profile.one_way_delay() + profile.queue + jitter + Duration::from_millis(300);
    loop {
        let mut meta = [RecvMeta::default(); RECEIVE_BATCH];
        let mut parts: Vec<_> = room.chunks_mut(64 * 1024).map(IoSliceMut::new).collect();
        match state.recv((&socket).into(), &mut parts, &mut meta) {
            Ok(count) => {
                let now = clock::now();
                watch.look(now);
                let at = now - plan.epoch;
                for (meta, part) in meta.iter().take(count).zip(&parts) {
                    for datagram in part[..meta.len].chunks(meta.stride.max(1)) {
                        if arrivals.len() < MAX_DATAGRAMS as usize {
                            arrivals.extend(Arrival::read(datagram, at));
                        }
                    }
                }
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error)),
        }
        let now = clock::now();
        watch.look(now);
        match (sent, end.try_recv()) {
            (Some((sent, since)), _)
                if countable && arrivals.len() as u64 >= sent.datagrams || now > since + patience =>
            {
                return Ok((arrivals, watch.end(now)));
            }
            (None, Ok(all)) => sent = Some((all, now)),
            (None, Err(TryRecvError::Disconnected)) => return Err(ProbeError::Ended),
            _ => {}
        }
        let mut events = [PollFd::new(&socket, PollFlags::IN)];
        let _ = rustix::event::poll(&mut events, Some(&clock::timespec(Duration::from_millis(20))));
    }
}

impl Arrival {
    fn read(datagram: &[u8], at: Duration) -> Option<Self> {
        let (number, rest) = datagram.split_first_chunk()?;
        let (stamp, _) = rest.split_first_chunk()?;
        let stamp = Duration::from_nanos(u64::from_le_bytes(*stamp));
        Some(Self {
            number: u64::from_le_bytes(*number),
            at,
            one_way: at.checked_sub(stamp)?,
        })
    }
}

/// What `arrivals`, in the order in which they came, say about `sent`.
fn evaluate(payload: usize, sent: Sent, arrivals: &[Arrival]) -> Result<ProbeReport, ProbeError> {
    let (Some(first), Some(last)) = (arrivals.first(), arrivals.last()) else {
        return Err(ProbeError::Silence(sent.datagrams));
    };
    let mut seen = vec![false; sent.datagrams as usize];
    let (mut reordered, mut highest, mut duplicates) = (0, 0, 0);
    for arrival in arrivals {
        if let Some(seen) = usize::try_from(arrival.number)
            .ok()
            .and_then(|number| seen.get_mut(number))
        {
            duplicates += u64::from(*seen);
            *seen = true;
        }
        reordered += u64::from(arrival.number < highest);
        highest = highest.max(arrival.number);
    }
    let (mut overtook, mut lowest_behind) = (0, u64::MAX);
    for arrival in arrivals.iter().rev() {
        overtook += u64::from(arrival.number > lowest_behind);
        lowest_behind = lowest_behind.min(arrival.number);
    }
    let received = seen.iter().filter(|seen| **seen).count() as u64;
    let loss_runs = seen.chunk_by(|one, next| one == next).filter(|run| !run[0]).count() as u64;
    let middle = first.at + (last.at - first.at) / 2;
    let half: Vec<_> = arrivals
        .iter()
        .filter(|arrival| arrival.at >= middle)
        .copied()
        .collect();
    // Those that came with the first of the half mark its begin and are not carried in it.
    let begin = half.first().map_or(last.at, |arrival| arrival.at);
    let carried = half.iter().filter(|arrival| arrival.at > begin).count();
    let seconds = (last.at - begin).as_secs_f64();
    let bits = carried as f64 * payload as f64 * 8.0;
    Ok(ProbeReport {
        sent: sent.datagrams,
        received,
        lost: sent.datagrams - received,
        loss_runs,
        reordered,
        overtook,
        duplicates,
        payload_bytes: payload as u64,
        send_seconds: sent.elapsed.as_secs_f64(),
        payload_bits_per_second: if seconds > 0.0 { bits / seconds } else { 0.0 },
        one_way: OneWayDelay::of(arrivals),
        one_way_second_half: OneWayDelay::of(&half),
        starved_seconds: None,
    })
}

impl OneWayDelay {
    fn of(arrivals: &[Arrival]) -> Self {
        let mut delays: Vec<_> = arrivals.iter().map(|arrival| arrival.one_way).collect();
        delays.sort_unstable();
        let ms = |quantile| quantile_ms(&delays, quantile);
        Self {
            min_ms: ms(0.0),
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
            max_ms: ms(1.0),
        }
    }
}

/// The time in `sorted` that a share `quantile` does not exceed, by the nearest rank; 0 of none.
pub(super) fn quantile_ms(sorted: &[Duration], quantile: f64) -> f64 {
    let rank = (sorted.len() as f64 * quantile).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .map_or(0.0, |time| time.as_secs_f64() * 1e3)
}

/// IPv4 and UDP.
const UDP_IP_HEADERS: usize = 28;
/// 24 bytes each in memory.
const MAX_DATAGRAMS: u64 = 8_000_000;
const RECEIVE_BATCH: usize = 16;
/// 50 ms at 10 Gbit/s with the kernel's own bookkeeping.
const SOCKET_BUFFER_BYTES: usize = 64 << 20;
/// Below the emulator's.
const PRIORITY: i32 = 5;
const WORTH_SLEEPING: Duration = Duration::from_micros(20);
const LONGEST_LAG: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sent(datagrams: u64) -> Sent {
        Sent {
            datagrams,
            elapsed: Duration::from_secs(1),
            starved: None,
        }
    }

    /// One datagram each millisecond, which takes 75 ms, unless it is lost.
    fn arrivals(count: u64, lost: &[u64]) -> Vec<Arrival> {
        let numbers = (0..count).filter(|number| !lost.contains(number));
        numbers
            .map(|number| Arrival {
                number,
                at: number as u32 * MS + 75 * MS,
                one_way: 75 * MS,
            })
            .collect()
    }

    #[test]
    fn losses_are_counted_and_grouped_into_runs() {
        let lost = [0, 1, 5, 7, 8, 9, 99];
        let report = evaluate(1472, sent(100), &arrivals(100, &lost)).expect("some arrived");
        assert_eq!(
            (report.sent, report.received, report.lost, report.loss_runs),
            (100, 93, 7, 4)
        );
        assert_eq!(report.reordered, 0);
    }

    #[test]
    fn the_rate_is_that_of_the_second_half() {
        // The first half comes at 1 kHz, the second at 500 Hz.
        let all: Vec<_> = (0..300_u32)
            .map(|number| {
                let at = if number < 200 {
                    number * MS
                } else {
                    202 * MS + (number - 200) * 2 * MS
                };
                Arrival {
                    number: u64::from(number),
                    at,
                    one_way: if number < 200 { MS } else { 3 * MS },
                }
            })
            .collect();
        let report = evaluate(1000, sent(300), &all).expect("all arrived");
        assert!(
            (report.payload_bits_per_second / (500.0 * 8000.0) - 1.0).abs() < 0.01,
            "{report:?}"
        );
        assert_eq!((report.one_way.p50_ms, report.one_way.p99_ms), (1.0, 3.0));
        assert_eq!(report.one_way_second_half.min_ms, 3.0);
    }

    #[test]
    fn late_ones_are_reordered_and_doubles_count_once() {
        let mut all = arrivals(10, &[]);
        all.swap(3, 4);
        let double = all[9];
        all.push(double);
        let report = evaluate(1472, sent(10), &all).expect("all arrived");
        assert_eq!((report.received, report.lost, report.reordered), (10, 0, 1));
        assert_eq!(report.duplicates, 1);
    }

    #[test]
    fn one_that_overtakes_many_counts_once_and_those_behind_it_each() {
        let mut all = arrivals(10, &[]);
        let early = all.remove(8);
        all.insert(2, early);
        let report = evaluate(1472, sent(10), &all).expect("all arrived");
        assert_eq!((report.overtook, report.reordered, report.duplicates), (1, 6, 0));
    }

    #[test]
    fn silence_is_an_error_and_one_arrival_is_not() {
        assert!(matches!(evaluate(1472, sent(10), &[]), Err(ProbeError::Silence(10))));
        let report = evaluate(1472, sent(10), &arrivals(1, &[])).expect("one arrived");
        assert_eq!(
            (report.received, report.loss_runs, report.payload_bits_per_second),
            (1, 1, 0.0)
        );
    }

    #[test]
    fn a_datagram_that_is_not_the_probes_is_ignored() {
        assert!(Arrival::read(&[0; 15], MS).is_none());
        assert!(Arrival::read(&[0xff; 16], MS).is_none(), "sent after it arrived");
        assert!(Arrival::read(&[0; 16], MS).is_some());
    }
}
