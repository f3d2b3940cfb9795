//! The load inside the lab's guest: memory that changes at a known rate and proves by itself that it is intact.
//!
//! The program fills a working set with pages that it can recognise, rewrites a few bytes of some of them at a steady
//! rate, re-reads them all the time, and says so on a virtio port:
//!
//! ```text
//! ready PAGES                                once, when the working set is filled
//! beat SEQUENCE WRITES CHECKED BAD           every few milliseconds; SEQUENCE grows by one, for ever
//! verified TOKEN PAGES BAD WRITES            the answer to "verify TOKEN": every page was read again
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
//! older state* is therefore found: the older state has a right checksum, but not the version of the table.
//!
//! The dials come from the kernel command line as `longhaul.NAME=NUMBER`; see [`Dials`]. The program needs nothing but
//! the standard library and is linked statically, so that it can stand alone in an initramfs.

use std::fs::File;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// What the guest does, from the kernel command line. Every dial has a default, so that a bare kernel boots too.
#[derive(Clone, Debug)]
struct Dials {
    /// `longhaul.working_set_mb`: MiB of pages that are filled, rewritten and checked.
    working_set_mb: u64,
    /// `longhaul.pages_per_second`: pages rewritten a second.
    pages_per_second: u64,
    /// `longhaul.bytes_per_page`: bytes that change in a rewritten page, its version and checksum (16 bytes) included.
    bytes_per_page: u64,
    /// `longhaul.incompressible_percent`: share of the pages that hold random words; the others hold words of text.
    incompressible_percent: u64,
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
}

impl Default for Dials {
    fn default() -> Self {
        Self {
            working_set_mb: 200,
            pages_per_second: 2_000,
            bytes_per_page: 64,
            incompressible_percent: 25,
            hot_pages_percent: 10,
            hot_writes_percent: 0,
            checks_per_second: 1_000,
            beat_us: 5_000,
            seed: 1,
        }
    }
}

impl Dials {
    /// # Errors
    /// An unknown dial, or a value that is not a number.
    fn parse(command_line: &str) -> Result<Self, String> {
        let mut dials = Self::default();
        for word in command_line.split_ascii_whitespace() {
            let Some((name, value)) = word.strip_prefix("longhaul.").and_then(|dial| dial.split_once('=')) else {
                continue;
            };
            let value: u64 = value
                .parse()
                .map_err(|_| format!("the dial {name} has the value {value}, which is not a number"))?;
            *match name {
                "working_set_mb" => &mut dials.working_set_mb,
                "pages_per_second" => &mut dials.pages_per_second,
                "bytes_per_page" => &mut dials.bytes_per_page,
                "incompressible_percent" => &mut dials.incompressible_percent,
                "hot_pages_percent" => &mut dials.hot_pages_percent,
                "hot_writes_percent" => &mut dials.hot_writes_percent,
                "checks_per_second" => &mut dials.checks_per_second,
                "beat_us" => &mut dials.beat_us,
                "seed" => &mut dials.seed,
                _ => return Err(format!("there is no dial named {name}")),
            } = value;
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

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u64; PAGE_WORDS]);

/// The pages, what each of them must be, and the words that text is made of.
struct WorkingSet {
    dials: Dials,
    pages: Vec<Page>,
    versions: Vec<u32>,
    vocabulary: Vec<[u8; 16]>,
    random: Random,
}

impl WorkingSet {
    fn filled(dials: Dials) -> Self {
        let mut random = Random(dials.seed);
        let vocabulary = (0..(1 << VOCABULARY_OCTAVES) - 1)
            .map(|_| word_of_text(&mut random))
            .collect();
        let pages = vec![Page([0; PAGE_WORDS]); dials.pages()];
        let versions = vec![0; pages.len()];
        let mut set = Self {
            dials,
            pages,
            versions,
            vocabulary,
            random,
        };
        for number in 0..set.pages.len() {
            let mut content = [0; PAGE_WORDS - CONTENT];
            set.compose(number, &mut content);
            let page = &mut set.pages[number].0;
            page[NUMBER] = number as u64;
            page[CONTENT..].copy_from_slice(&content);
            page[CHECKSUM] = checksum(page);
        }
        set
    }

    /// Fills `content` with what belongs into page `number`.
    fn compose(&mut self, number: usize, content: &mut [u64]) {
        if mix(number as u64 ^ self.dials.seed) % 100 < self.dials.incompressible_percent {
            content.fill_with(|| self.random.next());
            return;
        }
        // Each word is copied whole and the next one overwrites its padding: one fixed-size copy a word.
        let mut text = [0; PAGE_BYTES + 16];
        let (mut length, bytes) = (0, content.len() * 8);
        while length < bytes {
            // Zipf's law, as in a language: each octave of ranks is drawn as often as any other.
            let draw = self.random.next();
            let octave = 1 << (draw % VOCABULARY_OCTAVES);
            let rank = octave - 1 + (draw >> 32 & (octave - 1));
            let word = self.vocabulary[rank as usize];
            text[length..length + 16].copy_from_slice(&word);
            length += usize::from(word[15]);
        }
        for (word, bytes) in content.iter_mut().zip(text.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes"));
        }
    }

    /// Changes a run of words, the version and the checksum of one page, and nothing else of it.
    fn rewrite(&mut self) {
        let hot = (self.pages.len() as u64 * self.dials.hot_pages_percent / 100).max(1);
        let is_hot = self.random.below(100) < self.dials.hot_writes_percent;
        let number = self.random.below(if is_hot { hot } else { self.pages.len() as u64 }) as usize;
        let words = self.dials.words_per_rewrite();
        let first = CONTENT + self.random.below((PAGE_WORDS - CONTENT - words + 1) as u64) as usize;
        let mut fresh = [0; PAGE_WORDS - CONTENT];
        self.compose(number, &mut fresh[..words]);

        self.versions[number] = self.versions[number].wrapping_add(1);
        let page = &mut self.pages[number].0;
        let version = u64::from(self.versions[number]);
        let mut sum = page[CHECKSUM];
        for (place, word) in (first..).zip(&fresh[..words]).chain([(VERSION, &version)]) {
            sum = sum
                .wrapping_sub(weight(place, page[place]))
                .wrapping_add(weight(place, *word));
            page[place] = *word;
        }
        page[CHECKSUM] = sum;
    }

    fn is_intact(&self, number: usize) -> bool {
        let page = &self.pages[number].0;
        page[NUMBER] == number as u64
            && page[VERSION] == u64::from(self.versions[number])
            && page[CHECKSUM] == checksum(page)
    }

    /// Rewrites so far, according to the table of versions.
    fn versions_total(&self) -> u64 {
        self.versions.iter().map(|version| u64::from(*version)).sum()
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
    let pages = set.pages.len();
    let mut writes_due = Due::new(set.dials.pages_per_second);
    let mut checks_due = Due::new(set.dials.checks_per_second);
    let mut background = 0;
    let mut pass: Option<Pass> = None;
    let mut tick = Instant::now();
    loop {
        for _ in 0..writes_due.in_tick() {
            set.rewrite();
            progress.writes.fetch_add(1, Ordering::Relaxed);
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
        let page = &set.pages[number].0;
        eprintln!(
            "page {number} is damaged: number {} version {} (must be {}) checksum {:016x} (must be {:016x})",
            page[NUMBER],
            page[VERSION],
            set.versions[number],
            page[CHECKSUM],
            checksum(page)
        );
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

/// Reads `verify TOKEN` lines from the port.
fn listen(mut port: File, commands: &mpsc::Sender<u64>) {
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
            match text.strip_prefix("verify ").and_then(|token| token.trim().parse().ok()) {
                Some(token) => {
                    let _ = commands.send(token);
                }
                None => eprintln!("not a command: {text}"),
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
    let set = WorkingSet::filled(dials);
    port.write_all(format!("ready {}\n", set.pages.len()).as_bytes())
        .map_err(|error| format!("{PORT}: {error}"))?;

    let progress = Arc::new(Progress::default());
    let (commands, requests) = mpsc::channel();
    let (answers, replies) = mpsc::channel();
    let workers_progress = Arc::clone(&progress);
    thread::spawn(move || work(set, &workers_progress, &requests, &answers));
    thread::spawn(move || listen(listener, &commands));
    beat(port, period, &progress, &replies).map_err(|error| format!("{PORT}: {error}"))
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("longhaul guest: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `0..limit`; the bias for limits far below 2^64 does not matter here.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// What one word adds to its page's checksum. It depends on the place, and a word that changes always changes it.
fn weight(place: usize, word: u64) -> u64 {
    let keyed = word ^ (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (keyed ^ keyed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

fn checksum(page: &[u64; PAGE_WORDS]) -> u64 {
    let head = weight(NUMBER, page[NUMBER]).wrapping_add(weight(VERSION, page[VERSION]));
    page.iter()
        .enumerate()
        .skip(CONTENT)
        .fold(head, |sum, (place, word)| sum.wrapping_add(weight(place, *word)))
}

/// A word of 4 to 12 letters and a space, padded; the last byte tells the length.
fn word_of_text(random: &mut Random) -> [u8; 16] {
    let mut word = [b' '; 16];
    let letters = 4 + random.below(9) as usize;
    word[..letters].fill_with(|| b"etaoinshrdlucmfwypvb"[random.below(20) as usize]);
    word[15] = letters as u8 + 1;
    word
}

const PAGE_BYTES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / 8;
const NUMBER: usize = 0;
const VERSION: usize = 1;
const CHECKSUM: usize = 2;
const CONTENT: usize = 3;
/// The words have the ranks below 2^9 - 1. Such text shrinks 3.0 times by lz4 and 4.6 times by zstd.
const VOCABULARY_OCTAVES: u64 = 9;
const TICK: Duration = Duration::from_millis(5);
/// How far the work may fall behind its schedule before the rest is given up.
const LATEST: Duration = Duration::from_millis(100);
const PORT: &str = "/dev/vport0p1";
