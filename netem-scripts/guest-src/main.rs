//! The load inside the lab's guest: memory that changes at a known rate and proves by itself that it is intact.
//!
//! The program fills a working set with pages that it can recognise, rewrites a few bytes of some of them at a steady
//! rate, re-reads them all the time, and says so on a virtio port:
//!
//! ```text
//! ready PAGES                                once, when the working set is filled
//! beat SEQUENCE WRITES CHECKED BAD           every few milliseconds; SEQUENCE grows by one, for ever
//! verified TOKEN PAGES BAD WRITES            the answer to "verify TOKEN": every page was read again
//! work NUMBER MICROSECONDS CLASS:COUNT …     what the application did in the window of that number (see application/)
//! told TOKEN ok|failed WORDS                 the application's answer to "tell TOKEN WORD"
//! ```
//!
//! A page (512 little-endian words) carries its number, its version and a checksum over everything else:
//!
//! ```text
//! word  0       1        2         3 .................. 511
//!       number  version  checksum  text or random words
//! ```
//!
//! The versions are also kept in a table apart from the pages. A page that was lost, swapped, torn or *left behind in an
//! older state* is therefore found: the older state has a right checksum, but not the version of the table. Pages of zeroes and
//! copies have no version: they are never rewritten (see working_set.rs).
//!
//! Beside that it answers probes from outside, where it has an address (echo.rs), and runs one application under load, where the image
//! has it (application/).
//!
//! The dials come from the kernel command line as `longhaul.NAME=VALUE`; see [`Dials`]. The program needs nothing but
//! the standard library and is linked statically, so that it can stand alone in an initramfs.

mod application;
mod content;
mod echo;
mod histogram;
mod sql;
mod working_set;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{ChildStdin, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use application::Application;
use working_set::{CONTENT, PAGE_BYTES, PAGE_WORDS, WorkingSet};

/// What the guest does, from the kernel command line. Every dial has a default, so that a bare kernel boots too.
#[derive(Clone, Debug)]
struct Dials {
    /// `longhaul.working_set_mb`: MiB of pages that are filled, rewritten and checked.
    working_set_mb: u64,
    /// `longhaul.pages_per_second`: pages rewritten a second.
    pages_per_second: u64,
    /// `longhaul.bytes_per_page`: bytes that change in a rewritten page, its version and checksum (16 bytes) included.
    bytes_per_page: u64,
    /// `longhaul.incompressible_percent`: share of the pages that hold random words; what no share claims holds words of text.
    incompressible_percent: u64,
    /// `longhaul.zero_percent`: share of the pages that hold zeroes, always.
    zero_percent: u64,
    /// `longhaul.duplicated_percent`: share of the pages that hold the same text as seven others, always.
    duplicated_percent: u64,
    /// `longhaul.hot_pages_percent`: the first pages of the working set, which get `hot_writes_percent` of the writes.
    hot_pages_percent: u64,
    /// `longhaul.hot_writes_percent`: share of the writes that go to the hot pages. 0 spreads all writes evenly.
    hot_writes_percent: u64,
    /// `longhaul.checks_per_second`: pages verified a second in the background.
    checks_per_second: u64,
    /// `longhaul.beat_us`: microseconds between two signs of life.
    beat_us: u64,
    /// `longhaul.seed`: the same seed gives the same pages.
    seed: u64,
    /// `longhaul.address`: the IPv4 address of eth0, which init sets; `none` answers no probes.
    has_address: bool,
    /// `longhaul.application`: what runs under load beside the working set: `none`, `redis`, `nginx`, `postgres` or `compile`.
    application: Option<Application>,
}

impl Default for Dials {
    fn default() -> Self {
        Self {
            working_set_mb: 200,
            pages_per_second: 2_000,
            bytes_per_page: 64,
            incompressible_percent: 25,
            zero_percent: 0,
            duplicated_percent: 0,
            hot_pages_percent: 10,
            hot_writes_percent: 0,
            checks_per_second: 1_000,
            beat_us: 5_000,
            seed: 1,
            has_address: false,
            application: None,
        }
    }
}

impl Dials {
    /// # Errors
    /// An unknown dial, a value that it cannot have, or shares of more than everything.
    fn parse(command_line: &str) -> Result<Self, String> {
        let mut dials = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let Some((name, value)) = word.strip_prefix("longhaul.").and_then(|dial| dial.split_once('=')) else {
                continue;
            };
            let number = match name {
                "working_set_mb" => &mut dials.working_set_mb,
                "pages_per_second" => &mut dials.pages_per_second,
                "bytes_per_page" => &mut dials.bytes_per_page,
                "incompressible_percent" => &mut dials.incompressible_percent,
                "zero_percent" => &mut dials.zero_percent,
                "duplicated_percent" => &mut dials.duplicated_percent,
                "hot_pages_percent" => &mut dials.hot_pages_percent,
                "hot_writes_percent" => &mut dials.hot_writes_percent,
                "checks_per_second" => &mut dials.checks_per_second,
                "beat_us" => &mut dials.beat_us,
                "seed" => &mut dials.seed,
                "address" => {
                    dials.has_address = value != "none";
                    continue;
                }
                "application" => {
                    dials.application = Application::named(value)?;
                    continue;
                }
                _ => return Err(format!("there is no dial named {name}")),
            };
            *number = value
                .parse()
                .map_err(|_| format!("the dial {name} has the value {value}, which is not a number"))?;
        }
        let shares = [
            dials.incompressible_percent,
            dials.zero_percent,
            dials.duplicated_percent,
        ];
        if shares
            .iter()
            .try_fold(0_u64, |sum, share| sum.checked_add(*share))
            .is_none_or(|sum| sum > 100)
        {
            return Err("the shares of incompressible, zero and duplicated pages are more than 100 percent".to_owned());
        }
        dials.working_set_mb = dials.working_set_mb.max(1);
        dials.beat_us = dials.beat_us.max(100);
        Ok(dials)
    }

    fn pages(&self) -> usize {
        self.working_set_mb as usize * (1 << 20) / PAGE_BYTES
    }

    /// Words of content that a rewrite changes beside the version and the checksum.
    fn words_per_rewrite(&self) -> usize {
        (self.bytes_per_page.saturating_sub(16) as usize / 8).min(PAGE_WORDS - CONTENT)
    }
}

/// What the worker has done, for the heartbeat to tell.
#[derive(Default)]
struct Progress {
    writes: AtomicU64,
    checked: AtomicU64,
    bad: AtomicU64,
}

/// A pass over every page that a `verify` asked for.
struct Pass {
    token: u64,
    next: usize,
    bad: u64,
}

/// Rewrites and checks pages for ever, in ticks; answers each `verify` when its pass is through.
fn work(mut set: WorkingSet, progress: &Progress, commands: &mpsc::Receiver<u64>, answers: &mpsc::Sender<String>) {
    let pages = set.pages();
    let mut writes_due = Due::new(set.dials.pages_per_second);
    let mut checks_due = Due::new(set.dials.checks_per_second);
    let mut background = 0;
    let mut pass: Option<Pass> = None;
    let mut tick = Instant::now();
    loop {
        for _ in 0..writes_due.in_tick() {
            progress.writes.fetch_add(u64::from(set.rewrite()), Ordering::Relaxed);
        }
        for _ in 0..checks_due.in_tick() {
            check(&set, background, progress);
            background = (background + 1) % pages;
        }
        if pass.is_none() {
            pass = commands.try_recv().ok().map(|token| Pass { token, next: 0, bad: 0 });
        }
        tick += TICK;
        while let Some(current) = pass.as_mut().filter(|_| Instant::now() < tick) {
            let end = (current.next + 32).min(pages);
            for number in current.next..end {
                current.bad += u64::from(!check(&set, number, progress));
            }
            current.next = end;
            if end == pages {
                // A table of versions that lost a write agrees with a page that lost the same one, but not with the count.
                let writes = progress.writes.load(Ordering::Relaxed);
                let bad = current.bad + u64::from(set.versions_total() != writes);
                let _ = answers.send(format!("verified {} {pages} {bad} {writes}\n", current.token));
                pass = None;
            }
        }
        let now = Instant::now();
        if tick > now {
            thread::sleep(tick - now);
        } else if now - tick > LATEST {
            // A guest that was held up does not make up for it in one burst.
            tick = now;
        }
    }
}

fn check(set: &WorkingSet, number: usize, progress: &Progress) -> bool {
    let intact = set.is_intact(number);
    progress.checked.fetch_add(1, Ordering::Relaxed);
    if !intact {
        progress.bad.fetch_add(1, Ordering::Relaxed);
        eprintln!("page {number} is damaged: {}", set.describe(number));
    }
    intact
}

/// Spreads a rate per second over ticks without rounding it away.
struct Due {
    per_second: u64,
    remainder: u64,
}

impl Due {
    fn new(per_second: u64) -> Self {
        Self {
            per_second,
            remainder: 0,
        }
    }

    fn in_tick(&mut self) -> u64 {
        let ticks_per_second = 1_000_000 / TICK.as_micros() as u64;
        let owed = self.remainder + self.per_second;
        self.remainder = owed % ticks_per_second;
        owed / ticks_per_second
    }
}

/// Writes a sign of life per period, and the answers between them. One thread writes, so that lines stay whole.
fn beat(
    mut port: File,
    period: Duration,
    progress: &Progress,
    answers: &mpsc::Receiver<String>,
) -> std::io::Result<()> {
    let mut next = Instant::now();
    for sequence in 0_u64.. {
        while let Ok(answer) = answers.try_recv() {
            port.write_all(answer.as_bytes())?;
        }
        let line = format!(
            "beat {sequence} {} {} {}\n",
            progress.writes.load(Ordering::Relaxed),
            progress.checked.load(Ordering::Relaxed),
            progress.bad.load(Ordering::Relaxed)
        );
        port.write_all(line.as_bytes())?;
        next = (next + period).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// Reads `verify TOKEN` lines from the port, and `tell TOKEN WORD`, which are for the application.
fn listen(mut port: File, commands: &mpsc::Sender<u64>, mut application: Option<ChildStdin>) {
    let mut line = Vec::new();
    let mut buffer = [0; 256];
    loop {
        let length = port.read(&mut buffer).unwrap_or(0);
        if length == 0 {
            // Nobody is connected on the host's side; the port does not wait for that.
            thread::sleep(TICK);
            continue;
        }
        for byte in &buffer[..length] {
            if *byte != b'\n' {
                line.push(*byte);
                line.truncate(64);
                continue;
            }
            let text = String::from_utf8_lossy(&line);
            let token = text.strip_prefix("verify ").and_then(|token| token.trim().parse().ok());
            match (token, text.strip_prefix("tell "), &mut application) {
                (Some(token), ..) => {
                    let _ = commands.send(token);
                }
                (None, Some(told), Some(application)) => {
                    let _ = writeln!(application, "{told}");
                }
                _ => eprintln!("not a command: {text}"),
            }
            line.clear();
        }
    }
}

/// Opens the virtio port, which appears a moment after its driver was loaded.
fn open_port() -> Result<File, String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match File::options().read(true).write(true).open(PORT) {
            Ok(port) => return Ok(port),
            Err(error) if Instant::now() > deadline => return Err(format!("{PORT} cannot be opened: {error}")),
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

fn run() -> Result<(), String> {
    let command_line = std::fs::read_to_string("/proc/cmdline").map_err(|error| format!("/proc/cmdline: {error}"))?;
    let dials = Dials::parse(&command_line)?;
    let mut port = open_port()?;
    let listener = port.try_clone().map_err(|error| format!("{PORT}: {error}"))?;
    let period = Duration::from_micros(dials.beat_us);
    let application = dials.application;
    if dials.has_address {
        echo::serve().map_err(|error| format!("the echo service cannot be had: {error}"))?;
    }
    let set = WorkingSet::filled(dials);
    port.write_all(format!("ready {}\n", set.pages()).as_bytes())
        .map_err(|error| format!("{PORT}: {error}"))?;

    let progress = Arc::new(Progress::default());
    let (commands, requests) = mpsc::channel();
    let (answers, replies) = mpsc::channel();
    let told = match application {
        Some(application) => Some(start(application, answers.clone())?),
        None => None,
    };
    let workers_progress = Arc::clone(&progress);
    thread::spawn(move || work(set, &workers_progress, &requests, &answers));
    thread::spawn(move || listen(listener, &commands, told));
    beat(port, period, &progress, &replies).map_err(|error| format!("{PORT}: {error}"))
}

/// Runs the application's load as a process of its own, behind the signs of life in the order of the scheduler, and passes on the
/// lines that it prints. What goes wrong there is said on the console; the memory's proof goes on. Returns where it can be told something.
fn start(application: Application, lines: mpsc::Sender<String>) -> Result<ChildStdin, String> {
    let unstarted = |error| format!("the application cannot be started: {error}");
    let mut load = Command::new("/bin/busybox")
        .args([
            "sh",
            "-c",
            "/bin/busybox renice -n 10 $$ && exec /guest \"$0\"",
            application.name(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(unstarted)?;
    let input = load.stdin.take().expect("the input is a pipe");
    let output = BufReader::new(load.stdout.take().expect("the output is a pipe"));
    thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            let _ = lines.send(format!("{line}\n"));
        }
        let ended = load.wait();
        eprintln!("longhaul guest: the load of {} ended: {ended:?}", application.name());
    });
    Ok(input)
}

fn main() -> ExitCode {
    let done = match std::env::args().nth(1) {
        Some(name) => application::run(&name),
        None => run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("longhaul guest: {problem}");
            ExitCode::FAILURE
        }
    }
}

const TICK: Duration = Duration::from_millis(5);
/// How far the work may fall behind its schedule before the rest is given up.
const LATEST: Duration = Duration::from_millis(100);
const PORT: &str = "/dev/vport0p1";
