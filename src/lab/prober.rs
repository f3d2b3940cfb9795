//! Looks at the guest from outside, as whoever uses it would: is it there?
//!
//! Every [`INTERVAL`] a datagram goes to the guest's echo service, and a line on one TCP session that stays open. The blackout is the longest time
//! between two answers or between two echoed lines. Both count from answer to answer, when they are
//! received: an answer to a question that waited at a paused guest is an answer. Since questions are [`INTERVAL`] apart, a gap is longer than
//! the guest's absence by at most that, and by what the network and the guest need to answer.
//!
//! The client has to be in the client's namespace ([`Network`](super::network::Network)), which a process can only be as a whole. So
//! [`Prober`] starts this program again in there, as `longhaul lab probe`, and reads what it prints: a line of JSON when both the datagrams and the session are
//! answered, and a last one with what it saw when its standard input ends.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::hypervisor::process::WITH_ITS_PARENT;

/// Asks the lab's guest every few milliseconds whether it is there, until its own standard input ends; prints what it saw.
#[derive(Clone, Debug, clap::Args)]
pub struct ProbeArgs {
    /// Address of the guest.
    #[arg(long, value_name = "IPV4")]
    pub address: Ipv4Addr,
    /// End after so many seconds; without it, when standard input ends. SIGTERM ends it too.
    #[arg(long, value_name = "N")]
    pub seconds: Option<u64>,
}

/// What a prober saw, from its first answer on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probed {
    /// Between two questions.
    pub interval_seconds: f64,
    /// Datagrams that were sent.
    pub sent: u64,
    /// Of them, how many were answered, once or more.
    pub answered: u64,
    /// Times between two answers that were longer than two intervals.
    pub gaps: Vec<Gap>,
    /// The TCP session.
    pub session: Session,
    /// The longest time that the prober itself was late to ask. Where it is not much shorter than a gap, the gap is the machine's.
    pub late_seconds: f64,
}

/// What happened to one TCP session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// It was open at the end, and every line had come back, in order.
    pub survived: bool,
    /// Why it did not survive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Lines that came back.
    pub lines: u64,
    /// Times between two lines that were longer than two intervals.
    pub stalls: Vec<Gap>,
}

/// A time without an answer. Seconds of CLOCK_MONOTONIC, which is the same in all namespaces of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// The last answer before.
    pub began_seconds: f64,
    /// The first answer after; where there was none, the end of the probing.
    pub ended_seconds: f64,
    /// There was no answer after it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_open: bool,
}

impl Gap {
    /// How long it was.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.ended_seconds - self.began_seconds
    }
}

impl Probed {
    /// The longer of [`Probed::gap_seconds`] and [`Probed::stall_seconds`].
    #[must_use]
    pub fn blackout_seconds(&self, since: Duration) -> Option<f64> {
        Some(self.gap_seconds(since)?.max(self.stall_seconds(since)?))
    }

    /// The longest time without an answer to a datagram that ended after `since` ([`monotonic`]). Where the guest was never away for more than two
    /// intervals, those two; `None` where it never answered.
    #[must_use]
    pub fn gap_seconds(&self, since: Duration) -> Option<f64> {
        (self.answered > 0).then(|| self.longest(&self.gaps, since))
    }

    /// As [`Probed::gap_seconds`], of the TCP session.
    #[must_use]
    pub fn stall_seconds(&self, since: Duration) -> Option<f64> {
        (self.session.lines > 0).then(|| self.longest(&self.session.stalls, since))
    }

    fn longest(&self, gaps: &[Gap], since: Duration) -> f64 {
        let later = gaps.iter().filter(|gap| gap.ended_seconds > since.as_secs_f64());
        later.map(Gap::seconds).fold(2.0 * self.interval_seconds, f64::max)
    }
}

/// The clock of gaps.
#[must_use]
pub fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // The clock counts from the boot: neither part is negative.
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// A prober at work in the client's namespace. Killed when dropped.
#[derive(Debug)]
pub struct Prober {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Prober {
    /// Starts `longhaul` (a path of this program) as a prober of `address` in `namespace`.
    ///
    /// # Errors
    /// [`ProberError::Unstarted`].
    pub fn start(longhaul: &str, namespace: &str, address: Ipv4Addr) -> Result<Self, ProberError> {
        let mut child = Command::new("ip")
            .args(["netns", "exec", namespace])
            .args(WITH_ITS_PARENT)
            .args([longhaul, "lab", "probe", "--address", &address.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the lab, which then ends it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(ProberError::Unstarted)?;
        let input = child.stdin.take().expect("the input is a pipe");
        let output = child.stdout.take().expect("the output is a pipe");
        Ok(Self {
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    /// Waits until the guest answers datagrams and lines.
    ///
    /// # Errors
    /// [`ProberError::Silent`] where it did not within `patience`.
    pub async fn ready(&mut self, patience: Duration) -> Result<(), ProberError> {
        match self.line(patience).await? {
            Line::Ready => Ok(()),
            Line::Summary(probed) => Err(ProberError::Over { probed }),
        }
    }

    /// Ends the probing and returns what was seen. Waits some seconds for lines of the session that are still to come back.
    ///
    /// # Errors
    /// [`ProberError`] where the prober did not say it.
    pub async fn finish(mut self) -> Result<Probed, ProberError> {
        drop(self.input);
        let probed = loop {
            if let Line::Summary(probed) = next(&mut self.output, CATCH_UP + SOON).await? {
                break probed;
            }
        };
        self.child.wait().await.map_err(ProberError::Unstarted)?;
        Ok(*probed)
    }

    async fn line(&mut self, patience: Duration) -> Result<Line, ProberError> {
        next(&mut self.output, patience).await
    }
}

async fn next(output: &mut Lines<BufReader<ChildStdout>>, patience: Duration) -> Result<Line, ProberError> {
    let line = timeout(patience, output.next_line()).await;
    let line = line.map_err(|_| ProberError::Silent { patience })?;
    let line = line.map_err(ProberError::Unstarted)?.ok_or(ProberError::Ended)?;
    serde_json::from_str(&line).map_err(|_| ProberError::Unreadable { line })
}

/// What the prober prints.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line {
    /// Both kinds of question are answered.
    Ready,
    /// The end.
    Summary(Box<Probed>),
}

/// `longhaul lab probe`. Exit code 0: something answered; 1: nothing did; 2: it could not begin.
pub(super) async fn run(args: ProbeArgs) -> u8 {
    let over = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&over);
    if let Ok(mut terminated) = signal(SignalKind::terminate()) {
        tokio::spawn(async move {
            terminated.recv().await;
            told.store(true, Ordering::Relaxed);
        });
    }
    let probing = tokio::task::spawn_blocking(move || probe(&args, &over)).await;
    match probing {
        Ok(Ok(probed)) => {
            let has_answered = probed.answered > 0;
            print(&Line::Summary(Box::new(probed)));
            u8::from(!has_answered)
        }
        Ok(Err(error)) => {
            eprintln!("longhaul: the guest cannot be probed: {error}");
            2
        }
        Err(error) => {
            eprintln!("longhaul: {error}");
            2
        }
    }
}

fn print(line: &Line) {
    let text = serde_json::to_string(line).expect("a line of the prober is JSON");
    // A reader that has gone is no reason to end otherwise.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Asks until `over`, the end of the time, or the end of standard input.
fn probe(args: &ProbeArgs, over: &AtomicBool) -> std::io::Result<Probed> {
    let guest = SocketAddr::from((args.address, PORT));
    let deadline = args.seconds.map(|seconds| monotonic() + Duration::from_secs(seconds));
    let mut input = std::io::stdin();
    let is_over = |input: &mut std::io::Stdin| {
        over.load(Ordering::Relaxed)
            || match deadline {
                Some(deadline) => monotonic() >= deadline,
                None => has_ended(input),
            }
    };
    let mut session = None;
    while session.is_none() && !is_over(&mut input) {
        session = Open::connect(guest).ok();
    }
    let mut session = session.ok_or_else(|| std::io::Error::from(ErrorKind::ConnectionRefused))?;
    let mut datagrams = Datagrams::new(guest)?;
    let mut late = Duration::ZERO;
    let mut due = monotonic();
    let mut is_ready = false;
    while !is_over(&mut input) {
        let now = monotonic();
        if let Some(lateness) = now.checked_sub(due) {
            late = late.max(lateness);
            datagrams.ask();
            session.ask();
            // Questions that were missed are not asked all at once.
            due = (due + INTERVAL).max(now);
        }
        wait(&datagrams.socket, session.stream(), due.saturating_sub(monotonic()));
        datagrams.hear();
        session.hear();
        if !is_ready && datagrams.answered > 0 && session.lines > 0 {
            is_ready = true;
            print(&Line::Ready);
        }
    }
    datagrams.gaps.end(monotonic());
    let patience = monotonic() + CATCH_UP;
    while session.is_behind() && monotonic() < patience {
        wait(&datagrams.socket, session.stream(), INTERVAL);
        // What comes now was asked before and answered too late to be counted; it must not keep the wait from being one.
        datagrams.drop_all();
        session.flush();
        session.hear();
    }
    Ok(Probed {
        interval_seconds: INTERVAL.as_secs_f64(),
        sent: datagrams.next,
        answered: datagrams.answered,
        gaps: datagrams.gaps.found,
        session: session.end(),
        late_seconds: late.as_secs_f64(),
    })
}

/// Whether standard input is at its end. What comes before that is not looked at.
fn has_ended(input: &mut std::io::Stdin) -> bool {
    let mut descriptors = [PollFd::new(&*input, PollFlags::IN)];
    let is_readable = poll(&mut descriptors, Some(&Timespec::default())).is_ok_and(|ready| ready > 0);
    is_readable && !matches!(input.read(&mut [0; 64]), Ok(1..))
}

/// Waits until one of the sockets can be read, at most `patience`.
fn wait(datagrams: &UdpSocket, session: Option<&TcpStream>, patience: Duration) {
    let mut descriptors = vec![PollFd::new(datagrams, PollFlags::IN)];
    descriptors.extend(session.map(|session| PollFd::new(session, PollFlags::IN)));
    let patience = Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    // One that was interrupted is followed by another.
    let _ = poll(&mut descriptors, Some(&patience));
}

/// The questions by datagram: eight bytes that name the prober and eight with the number of the question.
struct Datagrams {
    socket: UdpSocket,
    name: u64,
    next: u64,
    unanswered: BTreeSet<u64>,
    answered: u64,
    gaps: Gaps,
}

impl Datagrams {
    fn new(guest: SocketAddr) -> std::io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(guest)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            name: u64::from(std::process::id()),
            next: 0,
            unanswered: BTreeSet::new(),
            answered: 0,
            gaps: Gaps::default(),
        })
    }

    fn ask(&mut self) {
        let mut question = [0; 16];
        question[..8].copy_from_slice(&self.name.to_be_bytes());
        question[8..].copy_from_slice(&self.next.to_be_bytes());
        // One that cannot be sent, for example since nobody has the address, will not be answered.
        let _ = self.socket.send(&question);
        self.unanswered.insert(self.next);
        self.next += 1;
        if self.unanswered.len() > UNANSWERED {
            self.unanswered.pop_first();
        }
    }

    fn hear(&mut self) {
        while let Some(answer) = self.receive() {
            let number = answer.strip_prefix(&self.name.to_be_bytes());
            let number = number.and_then(|number| Some(u64::from_be_bytes(number.try_into().ok()?)));
            if number.is_some_and(|number| self.unanswered.remove(&number)) {
                self.answered += 1;
                self.gaps.hear(monotonic());
            }
        }
    }

    fn drop_all(&mut self) {
        while self.receive().is_some() {}
    }

    /// The next datagram that is there. A refusal that a router or the guest sent is passed over.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let mut buffer = [0; 64];
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(length) => return Some(buffer[..length].to_vec()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(_) => {}
            }
        }
    }
}

/// The TCP session, as long as it is one: numbered lines, and their echo.
struct Open {
    stream: Result<TcpStream, String>,
    next: u64,
    /// Bytes of lines that the socket has not taken yet.
    unsent: Vec<u8>,
    /// Bytes of an echo that has no line feed yet.
    partial: Vec<u8>,
    lines: u64,
    stalls: Gaps,
}

impl Open {
    fn connect(guest: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&guest, CONNECT).inspect_err(|error| {
            // A refusal comes at once; the next attempt must not.
            if error.kind() != ErrorKind::TimedOut {
                let _ = poll(
                    &mut [],
                    Some(&Timespec {
                        tv_sec: 0,
                        tv_nsec: 20_000_000,
                    }),
                );
            }
        })?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: Ok(stream),
            next: 0,
            unsent: Vec::new(),
            partial: Vec::new(),
            lines: 0,
            stalls: Gaps::default(),
        })
    }

    fn stream(&self) -> Option<&TcpStream> {
        self.stream.as_ref().ok()
    }

    /// Sends the next line, unless the socket has not yet taken all of the one before.
    fn ask(&mut self) {
        if self.unsent.is_empty() && self.stream.is_ok() {
            self.unsent = format!("{}\n", self.next).into_bytes();
            self.next += 1;
        }
        self.flush();
    }

    fn flush(&mut self) {
        let Ok(stream) = &mut self.stream else { return };
        while !self.unsent.is_empty() {
            match stream.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.stream = Err(error.to_string());
                    return;
                }
            }
        }
    }

    fn hear(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(stream) = &mut self.stream {
            match stream.read(&mut buffer) {
                Ok(0) => self.stream = Err("the guest closed it".to_owned()),
                Ok(length) => self.note(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => self.stream = Err(error.to_string()),
            }
        }
    }

    fn note(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.partial.push(*byte);
                continue;
            }
            if self.partial != self.lines.to_string().as_bytes() {
                let line = String::from_utf8_lossy(&self.partial).into_owned();
                self.stream = Err(format!("in place of line {} came {line}", self.lines));
                return;
            }
            self.partial.clear();
            self.lines += 1;
            self.stalls.hear(monotonic());
        }
        if self.partial.len() > LINE_BYTES {
            self.stream = Err("what came back is no line".to_owned());
        }
    }

    /// Whether lines are still to come back.
    fn is_behind(&self) -> bool {
        self.stream.is_ok() && self.lines < self.next
    }

    fn end(mut self) -> Session {
        if self.lines < self.next {
            self.stalls.end(monotonic());
        }
        let missing = self.next - self.lines;
        let reason = match self.stream {
            Err(reason) => Some(reason),
            Ok(_) if missing > 0 => Some(format!("{missing} lines did not come back")),
            Ok(_) => None,
        };
        Session {
            survived: reason.is_none(),
            reason,
            lines: self.lines,
            stalls: self.stalls.found,
        }
    }
}

/// Times without an answer that are worth to be noted.
#[derive(Debug, Default)]
struct Gaps {
    last: Option<Duration>,
    found: Vec<Gap>,
}

impl Gaps {
    fn hear(&mut self, at: Duration) {
        if let Some(last) = self.last {
            self.note(last, at, false);
        }
        self.last = Some(at);
    }

    fn end(&mut self, at: Duration) {
        if let Some(last) = self.last {
            self.note(last, at, true);
        }
    }

    fn note(&mut self, last: Duration, at: Duration, is_open: bool) {
        if at.saturating_sub(last) <= 2 * INTERVAL {
            return;
        }
        let gap = Gap {
            began_seconds: last.as_secs_f64(),
            ended_seconds: at.as_secs_f64(),
            is_open,
        };
        if self.found.len() < GAPS {
            self.found.push(gap);
        } else if let Some(shortest) = self.found.iter_mut().min_by(|a, b| a.seconds().total_cmp(&b.seconds()))
            && shortest.seconds() < gap.seconds()
        {
            *shortest = gap;
        }
    }
}

/// Between two questions.
pub const INTERVAL: Duration = Duration::from_millis(10);
/// Echo (RFC 862), as the guest serves it.
const PORT: u16 = 7;
/// How long one attempt to open the session may take.
const CONNECT: Duration = Duration::from_secs(1);
/// A session that stood still for some seconds goes on when TCP tries again, which it does at doubled times.
const CATCH_UP: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_secs(20);
/// A question that is older than so many others is not expected to be answered: a quarter of an hour.
const UNANSWERED: usize = 90_000;
/// Gaps that are kept: the longest.
const GAPS: usize = 1_000;
const LINE_BYTES: usize = 64;

/// The guest cannot be looked at from outside.
#[derive(Debug, thiserror::Error)]
pub enum ProberError {
    /// The prober cannot be started or heard.
    #[error("the prober cannot be run: {0}")]
    Unstarted(std::io::Error),
    /// The prober says nothing.
    #[error("the guest did not answer the prober within {patience:?}")]
    Silent {
        /// How long was waited.
        patience: Duration,
    },
    /// The prober ended before it should, and said why on standard error.
    #[error("the prober ended")]
    Ended,
    /// The prober ended before the guest answered.
    #[error("the prober ended before the guest answered: {probed:?}")]
    Over {
        /// What it saw.
        probed: Box<Probed>,
    },
    /// The prober said something else.
    #[error("the prober said: {line}")]
    Unreadable {
        /// What.
        line: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn probed(gaps: Gaps) -> Probed {
        Probed {
            interval_seconds: INTERVAL.as_secs_f64(),
            sent: 1,
            answered: 1,
            gaps: gaps.found,
            session: Session {
                survived: true,
                reason: None,
                lines: 0,
                stalls: Vec::new(),
            },
            late_seconds: 0.0,
        }
    }

    #[test]
    fn a_gap_is_from_answer_to_answer_and_longer_than_two_intervals() {
        let mut gaps = Gaps::default();
        for ms in [1000, 1020, 1041, 1341] {
            gaps.hear(at(ms));
        }
        gaps.end(at(1361));
        let found: Vec<(f64, f64)> = gaps
            .found
            .iter()
            .map(|gap| (gap.began_seconds, gap.ended_seconds))
            .collect();
        assert_eq!(found, [(1.02, 1.041), (1.041, 1.341)]);
    }

    #[test]
    fn the_gap_of_a_move_is_the_longest_that_ended_after_the_move_began() {
        let mut gaps = Gaps::default();
        for ms in [0, 900, 1000, 1250, 1300] {
            gaps.hear(at(ms));
        }
        let probed = probed(gaps);
        let rounded = |since| (probed.gap_seconds(at(since)).unwrap() * 1000.0).round();
        assert_eq!(rounded(800), 900.0, "a gap that lies across the beginning counts whole");
        assert_eq!(rounded(900), 250.0);
        assert_eq!(rounded(1300), 20.0, "nothing longer was seen");
        assert_eq!(
            probed.stall_seconds(at(0)),
            None,
            "a session without a line has no stall"
        );
    }

    #[test]
    fn a_guest_that_does_not_come_back_leaves_an_open_gap() {
        let mut gaps = Gaps::default();
        gaps.end(at(1));
        assert!(gaps.found.is_empty(), "one that never answered has none");
        gaps.hear(at(100));
        gaps.end(at(5100));
        assert!(gaps.found[0].is_open);
        assert_eq!(probed(gaps).gap_seconds(at(0)), Some(5.0));
    }

    #[test]
    fn of_many_gaps_the_longest_are_kept() {
        let mut gaps = Gaps::default();
        let mut now = Duration::ZERO;
        for number in 0..GAPS as u64 + 10 {
            gaps.hear(now);
            now += at(21 + number);
        }
        gaps.hear(now);
        assert_eq!(gaps.found.len(), GAPS);
        let shortest = gaps.found.iter().map(Gap::seconds).fold(f64::MAX, f64::min);
        assert_eq!((shortest * 1000.0).round(), 31.0);
    }

    #[test]
    fn what_a_prober_prints_is_what_the_lab_reads() {
        for line in [Line::Ready, Line::Summary(Box::new(probed(Gaps::default())))] {
            let text = serde_json::to_string(&line).unwrap();
            let read: Line = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
        }
    }
}
