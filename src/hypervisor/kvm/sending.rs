//! Sends a guest: passes over what it has written, until the rest is small enough, then the rest and what is not memory.
//!
//! Each pass is in the order of addresses. What the guest writes again and again is held back ([`Heat`]) as long as it fits into the last part, since every
//! other time would be for nothing.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::clock;
use super::dirty::DirtyLog;
use super::machine::Machine;
use super::migration::{Guidance, Progress};
use super::mover::MoveError;
use super::page_map::{PageMap, set_bits};
use super::state::MachineState;
use super::stream::Writer;
use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::precopy::{Heat, Held};

/// Bytes of a page in the stream, its header with it.
const RECORD: u64 = PAGE_SIZE as u64 + 8;

/// Words of a map that are protected and sent at a time: 64 MiB of memory.
const SPAN: usize = 256;

/// Fewer bytes may still be in the socket's buffer (208 KiB, Linux's `net.core.wmem_default`), and say nothing of what takes them out of it.
const LEAST_MEASURED: u64 = 1 << 20;

/// The log is not read more often: a pass of a few pages costs as much as one of many.
const LEAST_PASS: Duration = Duration::from_millis(20);

/// Over so long is measured what the socket takes.
const RATE_WINDOW: Duration = Duration::from_millis(200);

/// Sends the guest of `machine` into `stream`, and ends that.
pub(super) fn send(
    machine: &Machine,
    log: &DirtyLog,
    stream: &UnixStream,
    guidance: &Guidance,
    stop: &mut dyn FnMut() -> Result<(), MoveError>,
) -> Result<(), MoveError> {
    let mut sender = Sender::begin(machine, log, stream, guidance)?;
    while !sender.is_small_enough() {
        sender.pass()?;
        sender.look()?;
    }
    stop()?;
    sender.finish()?;
    stream.shutdown(std::net::Shutdown::Write).map_err(broken)
}

struct Sender<'a> {
    machine: &'a Machine,
    log: &'a DirtyLog,
    guidance: &'a Guidance,
    writer: Writer<&'a UnixStream>,
    dirty: PageMap,
    heat: Heat,
    last_look: Instant,
    rate: Rate,
    progress: Progress,
    content: Box<[u8; PAGE_SIZE]>,
}

impl<'a> Sender<'a> {
    fn begin(
        machine: &'a Machine,
        log: &'a DirtyLog,
        stream: &'a UnixStream,
        guidance: &'a Guidance,
    ) -> Result<Self, MoveError> {
        let blocks = machine.ram.blocks();
        let now = clock::now();
        Ok(Self {
            machine,
            log,
            guidance,
            writer: Writer::begin(stream, blocks).map_err(broken)?,
            dirty: PageMap::full(blocks),
            heat: Heat::new(blocks.iter().map(super::memory::Block::pages)),
            last_look: now,
            rate: Rate::new(now),
            progress: Progress {
                total_bytes: machine.ram.len(),
                ..Progress::default()
            },
            content: Box::new([0; PAGE_SIZE]),
        })
    }

    /// Pages that may be left when the guest is stopped; `None`: not known yet.
    fn allowed(&self) -> Option<u64> {
        let bandwidth = self.guidance.switchover_bandwidth().map(|rate| rate as f64);
        let bandwidth = bandwidth.or(self.rate.bytes_per_second)?;
        Some((bandwidth * self.guidance.downtime_limit().as_secs_f64()) as u64 / RECORD)
    }

    /// Whether the rest may be sent while the guest stands. Not before every page was sent once.
    fn is_small_enough(&self) -> bool {
        self.progress.rounds > 0 && self.allowed().is_some_and(|allowed| self.dirty.count() <= allowed)
    }

    /// Sends what is dirty and not held back.
    fn pass(&mut self) -> Result<(), MoveError> {
        self.progress.rounds += 1;
        let held = self.heat.held(self.allowed().unwrap_or(0));
        self.send_pages(false, Some(held))?;
        clock::wait_until(self.last_look + LEAST_PASS);
        Ok(())
    }

    /// What the guest has written since the last look.
    fn written(&self) -> Result<PageMap, MoveError> {
        self.check_cancelled()?;
        let mut written = PageMap::empty(self.machine.ram.blocks());
        self.log.sync(&mut written)?;
        self.machine.add_device_writes(&mut written);
        Ok(written)
    }

    /// Takes in what the guest has written since the last look.
    fn look(&mut self) -> Result<(), MoveError> {
        let written = self.written()?;
        for block in 0..self.machine.ram.blocks().len() {
            for word in 0..written.words(block) {
                let bits = written.word(block, word);
                self.heat.look(block, word, bits);
                self.dirty.add_word(block, word, bits);
            }
        }
        let now = clock::now();
        let seconds = now.saturating_duration_since(self.last_look).as_secs_f64().max(1e-3);
        self.last_look = now;
        self.progress.dirty_pages_per_second = (written.count() as f64 / seconds) as u64;
        self.tell();
        Ok(())
    }

    /// The rest, of a guest that stands.
    fn finish(mut self) -> Result<(), MoveError> {
        let Machine { kvm, vm, vmm, ram, .. } = self.machine;
        // Before the last look: a device may still store something in the guest's memory.
        let devices = vmm.save_devices()?;
        let state = MachineState::save(kvm, vm, &**vmm, clock::wall())?.encode();
        let written = self.written()?;
        for block in 0..ram.blocks().len() {
            self.dirty.add(block, written.span(block, 0, usize::MAX));
        }
        self.progress.rounds += 1;
        self.send_pages(true, None)?;
        self.check_cancelled()?;
        self.progress.transferred_bytes = self.writer.finish(&state, &devices).map_err(broken)?;
        self.guidance.set_progress(self.progress);
        Ok(())
    }

    fn send_pages(&mut self, is_last: bool, held: Option<Held>) -> Result<(), MoveError> {
        self.rate.begin(clock::now(), self.writer.written());
        self.writer.begin_pass(is_last);
        for block in 0..self.machine.ram.blocks().len() {
            for word in 0..self.dirty.words(block) {
                let span = self.dirty.span(block, word, SPAN);
                // What is held back as well, so that the next look tells whether it was written again. Of a guest that stands nobody looks again.
                if word % SPAN == 0 && !is_last && span.iter().any(|&bits| bits != 0) {
                    self.log.protect(block, word, span)?;
                }
                let dirty = self.dirty.word(block, word);
                if dirty == 0 {
                    continue;
                }
                self.check_cancelled()?;
                let held = held.map_or(0, |held| self.heat.held_of(held, block, word));
                let bits = dirty & !held;
                self.dirty.remove(block, word, bits);
                for bit in set_bits(bits) {
                    self.send_page(block, word as u64 * 64 + bit)?;
                }
                self.tell();
            }
        }
        self.writer.end_pass().map_err(broken)?;
        self.tell();
        self.rate.end(clock::now(), self.writer.written());
        Ok(())
    }

    fn send_page(&mut self, block: usize, page: u64) -> Result<(), MoveError> {
        self.machine.ram.read(block, page, &mut self.content);
        let is_zero = *self.content == [0; PAGE_SIZE];
        match is_zero {
            true => self.progress.zero_pages += 1,
            false => self.progress.normal_pages += 1,
        }
        let at = PageAddress {
            block: block as u16,
            page,
        };
        let content = (!is_zero).then_some(&*self.content);
        self.writer.page(at, content).map_err(broken)
    }

    fn tell(&mut self) {
        let written = self.writer.written();
        self.rate.look(clock::now(), written);
        self.progress.transferred_bytes = written;
        self.progress.remaining_bytes = self.dirty.count() * PAGE_SIZE as u64;
        self.progress.bytes_per_second = self.rate.bytes_per_second.unwrap_or(0.0);
        let bandwidth = self.guidance.switchover_bandwidth().map(|rate| rate as f64);
        let bandwidth = bandwidth.unwrap_or(self.progress.bytes_per_second).max(1.0);
        let seconds = self.progress.remaining_bytes as f64 / bandwidth;
        self.progress.expected_downtime = Duration::from_secs_f64(seconds.min(1e6));
        self.guidance.set_progress(self.progress);
    }

    fn check_cancelled(&self) -> Result<(), MoveError> {
        match self.guidance.is_cancelled() {
            true => Err(MoveError("the migration was cancelled".to_owned())),
            false => Ok(()),
        }
    }
}

/// What the socket takes, as far as passes were long enough to tell.
#[derive(Debug)]
struct Rate {
    since: Instant,
    bytes: u64,
    bytes_per_second: Option<f64>,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            bytes: 0,
            bytes_per_second: None,
        }
    }

    /// A pass begins, when so many bytes were taken.
    fn begin(&mut self, now: Instant, bytes: u64) {
        (self.since, self.bytes) = (now, bytes);
    }

    /// The pass goes on.
    fn look(&mut self, now: Instant, bytes: u64) {
        let time = now.saturating_duration_since(self.since);
        if time < RATE_WINDOW || bytes < self.bytes + LEAST_MEASURED {
            return;
        }
        self.bytes_per_second = Some((bytes - self.bytes) as f64 / time.as_secs_f64());
        self.begin(now, bytes);
    }

    /// The pass is over. Where nothing is known yet, it has to do, however short.
    fn end(&mut self, now: Instant, bytes: u64) {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64().max(1e-6);
        if self.bytes_per_second.is_none() {
            self.bytes_per_second = Some((bytes - self.bytes) as f64 / seconds);
        }
        self.begin(now, bytes);
    }
}

fn broken(error: io::Error) -> MoveError {
    MoveError(format!("the stream broke: {error}"))
}
