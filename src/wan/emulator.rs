//! The emulator's thread: two TUN devices, two [`Direction`]s, one loop.
//!
//! ```text
//! site A: wan0 ⇄ read/write ⇄ [A to B: model, arena, runs] [B to A: …] ⇄ read/write ⇄ wan0 :site B
//! ```
//!
//! While packets flow the loop sleeps on a fixed tick rather than wait for each of them, because a wake-up costs about
//! 10 us of CPU on a virtual machine: at 950 Mbit/s a tick of 50 us took 33 % of a core, 250 us 20 % (2026-11-23). When
//! little flows it waits for devices and due times themselves, and is exact to some 50 us, which is how long a machine that
//! idles takes to wake up. When next to nothing flows, as under `ping`, it wakes up that much earlier and looks at the
//! clock until the time has come, and goes on looking for a moment afterwards, since what arrives is answered: at a packet
//! a second this costs nothing, and at two in each millisecond at most half a core. What it sleeps through before a packet
//! that wakes it is not the link's delay, and is taken off (see `wake_up`).

use std::io::{self, Write as _};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::change::Directions;
use super::command::Command;
use super::control::{self, Answer, ControlError, Request};
use super::direction::{Direction, in_flight_bytes};
use super::lateness::Lateness;
use super::link::{LinkError, LinkName, SITE_DEVICE, Site, enter_namespace};
use super::model::LinkSettings;
use super::profile::Profile;
use super::stats::{Backend, EmulatorStats, LinkStats, Scheduling};
use super::tun::{self, Tun};
use super::wake_up::WakeUps;
use super::{clock, schedule};

/// What an emulator is to be.
#[derive(Clone, Debug)]
pub(super) struct EmulatorSettings {
    /// The link whose namespaces hold the devices.
    pub(super) name: LinkName,
    pub(super) profile: Profile,
    pub(super) seed: u64,
    /// Where to listen for commands.
    pub(super) control: PathBuf,
    /// Is told `READY` once packets pass.
    pub(super) ready: Option<PathBuf>,
}

/// The emulator cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// A site's namespace cannot be entered.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The TUN device cannot be used.
    #[error(
        "the device {SITE_DEVICE} in {namespace} cannot be used as a TUN device with offloads (Linux 6.2, root and /dev/net/tun are needed)"
    )]
    Device {
        /// Where the device is.
        namespace: String,
        /// Why.
        source: io::Error,
    },
    /// Commands cannot be received.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Nobody can be told that the link is up.
    #[error("{} cannot be told that the link is up", path.display())]
    Ready {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses to wait for packets.
    #[error("waiting for packets failed")]
    Wait(#[source] io::Error),
}

/// Carries packets until it is told to stop by SIGTERM or SIGINT, then prints what it has carried.
pub(super) fn run(settings: EmulatorSettings) -> Result<(), EmulatorError> {
    let ports = [attach(&settings.name, Site::A)?, attach(&settings.name, Site::B)?];
    // The router's namespace names this process as what joins the sites, and keeps it off the host's network.
    enter_namespace(&settings.name.router())?;
    let (requests, wake) = control::start(&settings.control)?;
    let now = clock::now();
    // Room for what the time line may do, also when all of it is never played.
    let most = settings.profile.states().iter().map(in_flight_bytes).max().unwrap_or(0);
    let direction = |stream| Direction::new(settings.profile.direction(), most, settings.seed, stream, now);
    let scheduling = take_priority();
    let mut emulator = Emulator {
        directions: [direction(0), direction(1)],
        ports,
        wake,
        requests,
        tick: tick(settings.profile.one_way_delay()),
        lateness: Lateness::default(),
        wake_ups: WakeUps::learn(),
        came: [None; 2],
        started: now,
        scheduling,
        settings,
    };
    if let Some(path) = &emulator.settings.ready {
        announce(path)?;
    }
    let result = emulator.carry();
    print_stats(&emulator.stats());
    let _ = std::fs::remove_file(&emulator.settings.control);
    result
}

/// Prints `stats` as a line of JSON. A closed output is nobody's loss.
fn print_stats(stats: &LinkStats) {
    if let Ok(line) = serde_json::to_string(stats) {
        let _ = writeln!(io::stdout(), "{line}");
    }
}

#[derive(Debug)]
struct Emulator {
    settings: EmulatorSettings,
    ports: [Tun; 2],
    /// From A to B, from B to A.
    directions: [Direction; 2],
    requests: Receiver<Request>,
    wake: OwnedFd,
    tick: Duration,
    lateness: Lateness,
    wake_ups: WakeUps,
    /// Of each port, when that came which ended the last sleep.
    came: [Option<Instant>; 2],
    scheduling: Scheduling,
    started: Instant,
}

impl Emulator {
    /// Carries packets until it is told to stop.
    fn carry(&mut self) -> Result<(), EmulatorError> {
        let mut traffic = Density::default();
        let mut last_frame = clock::now();
        loop {
            let (handled, more) = self.turn()?;
            let now = clock::now();
            if handled > 0 {
                last_frame = now;
            }
            let flow = traffic.flow(now, handled);
            if !self.answer(now) {
                return Ok(());
            }
            if more {
                continue;
            }
            match flow {
                Flow::Dense => clock::sleep(self.tick),
                Flow::Light => self.wait(now, Duration::ZERO)?,
                Flow::Sparse if now - last_frame < ANSWER => {}
                Flow::Sparse => self.wait(now, WAKE_UP)?,
            }
        }
    }

    /// Takes in what waits at the devices and hands out what is due, up to a budget each. Returns how many frames that were,
    /// and whether the budget ended it.
    fn turn(&mut self) -> Result<(usize, bool), EmulatorError> {
        let (mut handled, mut more) = (0, false);
        for index in [0, 1] {
            let direction = &mut self.directions[index];
            let (from, to) = (&self.ports[index], &self.ports[1 - index]);
            for count in 1..=BUDGET {
                let at = self.came[index].take().unwrap_or_else(clock::now);
                match direction.receive(at, |room| from.read(room)) {
                    Ok(()) => handled += 1,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(source) => {
                        let site = if index == 0 { Site::A } else { Site::B };
                        return Err(EmulatorError::Device {
                            namespace: self.settings.name.site(site),
                            source,
                        });
                    }
                }
                more |= count == BUDGET;
            }
            for count in 1..=BUDGET {
                match direction.emit(clock::now(), |parts| to.write(parts)) {
                    Some(late) => self.lateness.record(late),
                    None => break,
                }
                handled += 1;
                more |= count == BUDGET;
            }
        }
        Ok((handled, more))
    }

    /// Waits for a packet, a command, or until something is due in the time `ahead`; not at all, where it is already.
    fn wait(&mut self, now: Instant, ahead: Duration) -> Result<(), EmulatorError> {
        let due = self.directions.iter().filter_map(Direction::next_due).min();
        let time = due.map(|due| due.saturating_duration_since(now));
        if time.is_some_and(|time| time <= ahead) {
            return Ok(());
        }
        // What never sleeps until a time does not learn how long it takes to wake up.
        let time = time.map_or(IDLE, |time| (time - ahead).min(IDLE));
        let mut events = [
            PollFd::new(&self.ports[0], PollFlags::IN),
            PollFd::new(&self.ports[1], PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        let ready = match rustix::event::poll(&mut events, Some(&clock::timespec(time))) {
            Ok(ready) => ready,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(EmulatorError::Wait(error.into())),
        };
        let woke = clock::now();
        let came = |event: &PollFd<'_>| (!event.revents().is_empty()).then(|| self.wake_ups.came(now, woke));
        self.came = [came(&events[0]), came(&events[1])];
        if ready == 0 {
            self.wake_ups.record(now, now + time, woke);
        }
        Ok(())
    }

    /// Answers commands. Returns false when one was to stop.
    fn answer(&mut self, now: Instant) -> bool {
        loop {
            match self.requests.try_recv() {
                Ok(Request::Command(command, reply)) => {
                    // The one who asked may have gone.
                    let _ = reply.send(self.obey(&command, now));
                }
                Ok(Request::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => break,
            }
        }
        let mut count = [0; 8];
        // Not ready means that nothing was asked since.
        let _ = rustix::io::read(&self.wake, &mut count);
        true
    }

    fn obey(&mut self, command: &Command, now: Instant) -> Answer {
        match command {
            Command::Stats => return Answer::Stats(Box::new(self.stats())),
            Command::Settings => {
                let settings = |index: usize| self.directions[index].settings().clone();
                return Answer::Settings(Box::new([settings(0), settings(1)]));
            }
            Command::Reset => self.lateness = Lateness::default(),
            Command::Set { directions, change } => return self.change(*directions, |settings| change.apply(settings)),
            Command::Replace { directions, settings } => return self.change(*directions, |_| (**settings).clone()),
            Command::Lose { directions, datagrams } => {
                for index in directions.indices() {
                    self.directions[index].lose(*datagrams);
                }
            }
            Command::Down {
                directions,
                length,
                after,
            } => {
                for index in directions.indices() {
                    self.directions[index].cut(now + *after, *length);
                }
            }
            Command::Up { directions } => {
                for index in directions.indices() {
                    self.directions[index].restore();
                }
            }
        }
        Answer::Done
    }

    /// Changes the settings of both directions that are meant, or of none.
    fn change(&mut self, directions: Directions, new: impl Fn(&LinkSettings) -> LinkSettings) -> Answer {
        for index in directions.indices() {
            let direction = &self.directions[index];
            if let Err(refusal) = direction.has_room_for(&new(direction.settings())) {
                return Answer::Refused(refusal.to_string());
            }
        }
        for index in directions.indices() {
            let direction = &mut self.directions[index];
            direction.change(new(direction.settings()));
        }
        let delays = self
            .directions
            .iter()
            .map(|direction| direction.settings().one_way_delay);
        self.tick = tick(delays.min().unwrap_or_default());
        Answer::Done
    }

    fn stats(&self) -> LinkStats {
        let [ab, ba] = [self.directions[0].stats(), self.directions[1].stats()];
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let mut stats = LinkStats {
            name: self.settings.name.to_string(),
            profile: self.settings.profile.name.clone(),
            backend: Backend::Emulator,
            seed: Some(self.settings.seed),
            ab,
            ba,
            emulator: Some(EmulatorStats {
                lateness: self.lateness.summary(),
                cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
                wall_seconds: (clock::now() - self.started).as_secs_f64(),
                scheduling: self.scheduling,
            }),
            fault: None,
        };
        stats.fault = stats.judge(self.settings.profile.rtt);
        stats
    }
}

/// How much flows, counted per millisecond.
#[derive(Debug, Default)]
struct Density {
    window: Option<Instant>,
    frames: usize,
    before: usize,
}

/// What is the cheapest way to be in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// So much that a fixed tick is cheaper than waiting for each packet.
    Dense,
    /// Between.
    Light,
    /// So little that looking at the clock before each is no cost.
    Sparse,
}

impl Density {
    fn flow(&mut self, now: Instant, frames: usize) -> Flow {
        let since = now - *self.window.get_or_insert(now);
        if since >= DENSITY_WINDOW {
            self.before = if since < 2 * DENSITY_WINDOW { self.frames } else { 0 };
            self.frames = 0;
            self.window = Some(now);
        }
        self.frames += frames;
        match self.frames.max(self.before) {
            FLOWING_FRAMES.. => Flow::Dense,
            5.. => Flow::Light,
            // A packet and its answer are two frames in and two out.
            _ => Flow::Sparse,
        }
    }
}

fn attach(name: &LinkName, site: Site) -> Result<Tun, EmulatorError> {
    let namespace = name.site(site);
    enter_namespace(&namespace)?;
    Tun::attach(SITE_DEVICE)
        .and_then(|tun| tun::set_up(SITE_DEVICE).map(|()| tun))
        .map_err(|source| EmulatorError::Device { namespace, source })
}

/// On a busy machine lateness at p99 is 128 us with SCHED_FIFO and 4 ms at nice -20 (2 cores, 900 Mbit/s, 2026-11-23).
fn take_priority() -> Scheduling {
    // Refused only for a value that no thread may have.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    if schedule::in_real_time(REAL_TIME_PRIORITY).is_ok() {
        Scheduling::Fifo
    } else if rustix::process::setpriority_process(None, -20).is_ok() {
        Scheduling::Nice
    } else {
        Scheduling::Ordinary
    }
}

fn announce(path: &Path) -> Result<(), EmulatorError> {
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .and_then(|mut file| file.write_all(b"READY\n"))
        .map_err(|source| EmulatorError::Ready {
            path: path.to_owned(),
            source,
        })
}

/// A three-hundredth of the delay is below what a measurement of it shows.
fn tick(one_way_delay: Duration) -> Duration {
    (one_way_delay / 300).clamp(Duration::from_micros(20), Duration::from_micros(250))
}

/// Frames of one direction before the other gets its turn.
const BUDGET: usize = 64;
const DENSITY_WINDOW: Duration = Duration::from_millis(1);
/// Waiting for 16 frames costs about 160 us of CPU in a millisecond, a tick of 50 us as much.
const FLOWING_FRAMES: usize = 16;
/// An idle virtual machine takes 30 to 80 us to run a thread whose time has come.
const WAKE_UP: Duration = Duration::from_micros(100);
/// A program that waits for a packet takes as long until it answers.
const ANSWER: Duration = Duration::from_micros(150);
/// At two thousandths of a processor.
const IDLE: Duration = Duration::from_millis(25);
/// Below the kernel's own threads at 50.
const REAL_TIME_PRIORITY: i32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tick_follows_the_delay_within_its_bounds() {
        for (delay_us, tick_us) in [(100, 20), (6_000, 20), (15_000, 50), (75_000, 250), (300_000, 250)] {
            assert_eq!(tick(Duration::from_micros(delay_us)), Duration::from_micros(tick_us));
        }
    }

    #[test]
    fn a_ping_is_sparse_and_a_train_of_packets_is_dense() {
        let mut density = Density::default();
        let mut now = clock::now();
        for _ in 0..100 {
            now += Duration::from_millis(10);
            assert_eq!(density.flow(now, 1), Flow::Sparse);
        }
        for _ in 0..10 {
            now += Duration::from_micros(50);
            density.flow(now, 4);
        }
        assert_eq!(density.flow(now, 0), Flow::Dense);
        assert_eq!(density.flow(now + Duration::from_millis(2), 0), Flow::Sparse);
    }

    #[test]
    fn a_few_packets_a_millisecond_are_not_worth_looking_at_the_clock_for() {
        let mut density = Density::default();
        let mut now = clock::now();
        for _ in 0..100 {
            now += Duration::from_micros(150);
            density.flow(now, 1);
        }
        assert_eq!(density.flow(now, 0), Flow::Light);
    }
}
