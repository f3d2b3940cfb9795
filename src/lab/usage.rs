//! What the processes of an engine cost while a move lasts: CPU, memory, and how long they waited for a CPU.
//!
//! A process belongs to a site where its command line names the site's directory. Threads are looked at five times a second;
//! what one that ends did after the last look is not counted.
//!
//! The processes of a move wait for each other too: eight threads that compress on two processors wait three quarters of their
//! time. So what is held against the machine is the share of that time in which *others* had the processors: programs that are
//! no part of the measurement, and a host that ran something else (steal).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::record::Ends;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// Below this much work a process says nothing about how busy the machine was, in nanoseconds.
const WORTH_JUDGING: u64 = 50_000_000;

/// Looks on until [`Watch::stop`].
#[derive(Debug)]
pub(super) struct Watch {
    seen: Arc<Mutex<([Seen; 2], Machine)>>,
    task: AbortHandle,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Usage {
    /// CPU seconds at each end.
    pub(super) cpu_seconds: Ends<f64>,
    /// Most memory that each gateway had resident; of moves by gateways.
    pub(super) gateway_peak_rss_bytes: Option<Ends<u64>>,
    /// Of the time that the threads of a process could have run, the share in which they waited for a CPU: of the gateway or
    /// hypervisor that waited most, 0..=1.
    pub(super) run_delay_share: Option<f64>,
    /// Of the CPU time that was used on this machine, the share that others had, 0..=1.
    pub(super) others_share: Option<f64>,
}

/// What was seen of a site's processes.
#[derive(Clone, Debug, Default)]
struct Seen {
    processes: HashMap<u32, Process>,
}

/// CPU time of everything on this machine in ticks, at the first look and at the last. Not from the sums of `/proc/stat`, which
/// samples who runs at a tick: of guests that wake up by their own ticks it saw a quarter too much (2026-11-27).
#[derive(Clone, Debug, Default)]
struct Machine {
    /// Of the measurement's processes and the kernel's threads.
    own: HashMap<u32, [u64; 2]>,
    /// Of all other processes.
    others: HashMap<u32, [u64; 2]>,
    /// What the host took.
    steal: Option<[u64; 2]>,
}

impl Machine {
    fn others_share(&self) -> Option<f64> {
        let span = |[first, last]: &[u64; 2]| last.saturating_sub(*first);
        let own: u64 = self.own.values().map(span).sum();
        let others: u64 = self.others.values().chain(&self.steal).map(span).sum();
        (own + others > 0).then(|| others as f64 / (own + others) as f64)
    }
}

#[derive(Clone, Debug, Default)]
struct Process {
    is_gateway: bool,
    peak_rss_bytes: u64,
    threads: HashMap<u32, Thread>,
}

/// Nanoseconds since the first look at a thread, and at the first look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Thread {
    first: Schedule,
    last: Schedule,
}

/// `/proc/PID/task/TID/schedstat` (proc(5), Documentation/scheduler/sched-stats.rst), in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Schedule {
    ran: u64,
    waited: u64,
}

impl Watch {
    /// Watches the processes that name one of the directories: the source's and the destination's.
    pub(super) fn start(directories: [PathBuf; 2]) -> Self {
        let seen: Arc<Mutex<([Seen; 2], Machine)>> = Arc::default();
        let task = tokio::spawn({
            let seen = Arc::clone(&seen);
            async move {
                let mut first = true;
                loop {
                    {
                        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                        let (sites, machine) = &mut *seen;
                        look(&directories, sites, machine, first);
                    }
                    first = false;
                    tokio::time::sleep(LOOK).await;
                }
            }
        });
        Self {
            seen,
            task: task.abort_handle(),
        }
    }

    /// What was seen until now.
    pub(super) fn stop(self) -> Usage {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let ([source, destination], machine) = &*seen;
        Usage::of(source, destination, machine)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Usage {
    fn of(source: &Seen, destination: &Seen, machine: &Machine) -> Self {
        let both = |figure: fn(&Seen) -> f64| Ends {
            source: figure(source),
            destination: figure(destination),
        };
        let gateway = |seen: &Seen| {
            let gateways = seen.processes.values().filter(|process| process.is_gateway);
            gateways.map(|process| process.peak_rss_bytes).max()
        };
        let peaks = gateway(source).zip(gateway(destination));
        let processes = source.processes.values().chain(destination.processes.values());
        let shares = processes.filter_map(|process| {
            let Schedule { ran, waited } = process.total();
            (ran > WORTH_JUDGING).then(|| waited as f64 / (ran + waited) as f64)
        });
        Self {
            cpu_seconds: both(Seen::cpu_seconds),
            gateway_peak_rss_bytes: peaks.map(|(source, destination)| Ends { source, destination }),
            run_delay_share: shares.max_by(f64::total_cmp),
            others_share: machine.others_share(),
        }
    }

    /// Of the time that the process which waited most could have run, the share in which it waited and others ran.
    pub(super) fn waited_for_others(&self) -> Option<f64> {
        Some(self.run_delay_share? * self.others_share?)
    }
}

impl Seen {
    fn cpu_seconds(&self) -> f64 {
        let ran: u64 = self.processes.values().map(|process| process.total().ran).sum();
        ran as f64 / 1e9
    }
}

impl Process {
    fn total(&self) -> Schedule {
        let mut total = Schedule::default();
        for thread in self.threads.values() {
            total.ran += thread.last.ran.saturating_sub(thread.first.ran);
            total.waited += thread.last.waited.saturating_sub(thread.first.waited);
        }
        total
    }
}

/// Takes in what every process of the sites has done. What it did before the first look does not count; what one did that was
/// not there at the first look counts from its beginning.
fn look(directories: &[PathBuf; 2], seen: &mut [Seen; 2], machine: &mut Machine, is_first: bool) {
    let stat = std::fs::read_to_string("/proc/stat").ok();
    if let Some(steal) = stat.and_then(|text| steal_ticks(&text)) {
        machine.steal.get_or_insert([steal; 2])[1] = steal;
    }
    let processes = numbers_in(Path::new("/proc"));
    let family = Family::of(&processes);
    for process in processes {
        let of_process = PathBuf::from(format!("/proc/{process}"));
        let Ok(command_line) = std::fs::read(of_process.join("cmdline")) else {
            continue;
        };
        let command_line = String::from_utf8_lossy(&command_line);
        let names = |directory: &PathBuf| command_line.contains(&*directory.to_string_lossy());
        let site = directories.iter().position(names);
        // The kernel's threads have no command line, and the emulator no parent.
        let is_own = site.is_some()
            || command_line.is_empty()
            || command_line.contains("\0wan-emulator\0run\0")
            || family.descends_from(process, std::process::id());
        if let Some(ticks) = family.ticks(process) {
            let kin = if is_own { &mut machine.own } else { &mut machine.others };
            let first = if is_first { ticks } else { 0 };
            kin.entry(process).or_insert([first, ticks])[1] = ticks;
        }
        let Some(site) = site else {
            continue;
        };
        let known = seen[site].processes.entry(process).or_default();
        known.is_gateway = command_line.contains("\0gateway\0");
        if known.is_gateway
            && let Some(peak) = peak_rss_bytes(&of_process)
        {
            known.peak_rss_bytes = peak;
        }
        for thread in numbers_in(&of_process.join("task")) {
            let file = of_process.join(format!("task/{thread}/schedstat"));
            let Some(now) = std::fs::read_to_string(file).ok().and_then(|text| schedule(&text)) else {
                continue;
            };
            let known = known.threads.entry(thread).or_insert_with(|| Thread {
                first: if is_first { now } else { Schedule::default() },
                last: now,
            });
            known.last = now;
        }
    }
}

/// Parents and CPU times of processes (`/proc/PID/stat`, proc(5)).
#[derive(Debug, Default)]
struct Family {
    members: HashMap<u32, Member>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Member {
    parent: u32,
    /// In user and kernel mode, all threads, also those that have ended.
    ticks: u64,
}

impl Family {
    fn of(processes: &[u32]) -> Self {
        let member = |&process: &u32| {
            let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
            Some((process, member(&text)?))
        };
        Self {
            members: processes.iter().filter_map(member).collect(),
        }
    }

    fn ticks(&self, process: u32) -> Option<u64> {
        Some(self.members.get(&process)?.ticks)
    }

    fn descends_from(&self, process: u32, ancestor: u32) -> bool {
        let mut line = std::iter::successors(Some(process), |process| Some(self.members.get(process)?.parent));
        // A tree that changes while it is read could have a loop.
        line.by_ref()
            .take(self.members.len() + 1)
            .any(|process| process == ancestor)
    }
}

fn member(stat: &str) -> Option<Member> {
    // The command's name may hold anything; what follows its last parenthesis begins with the third field.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Member {
        parent: u32::try_from(field(4)?).ok()?,
        ticks: field(14)? + field(15)?,
    })
}

/// What the host took of all processors (`steal`, the eighth figure), in ticks.
fn steal_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    line.split_ascii_whitespace().nth(7)?.parse().ok()
}

fn numbers_in(directory: &Path) -> Vec<u32> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn schedule(text: &str) -> Option<Schedule> {
    let mut figures = text.split_ascii_whitespace();
    let mut figure = || figures.next()?.parse().ok();
    Some(Schedule {
        ran: figure()?,
        waited: figure()?,
    })
}

fn peak_rss_bytes(process: &Path) -> Option<u64> {
    let status = std::fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(threads: &[(u64, u64)], is_gateway: bool) -> Seen {
        let threads = threads.iter().enumerate().map(|(number, &(ran, waited))| {
            let last = Schedule { ran, waited };
            let first = Schedule::default();
            (number as u32, Thread { first, last })
        });
        let process = Process {
            is_gateway,
            peak_rss_bytes: 7,
            threads: threads.collect(),
        };
        Seen {
            processes: HashMap::from([(1, process)]),
        }
    }

    #[test]
    fn the_process_that_waited_most_is_judged_and_idle_ones_are_not() {
        let busy = seen(&[(300_000_000, 50_000_000), (100_000_000, 50_000_000)], true);
        let idle = seen(&[(1_000, 1_000_000_000)], true);
        let usage = Usage::of(&busy, &idle, &Machine::default());
        assert_eq!(usage.run_delay_share, Some(0.2));
        assert!((usage.cpu_seconds.source - 0.4).abs() < 1e-9);
        assert_eq!(
            usage.gateway_peak_rss_bytes,
            Some(Ends {
                source: 7,
                destination: 7
            })
        );
    }

    #[test]
    fn waiting_for_each_other_is_not_waiting_for_others() {
        let busy = seen(&[(100_000_000, 300_000_000)], true);
        let machine = |others: u64, steal: u64| Machine {
            own: HashMap::from([(1, [50, 150])]),
            others: HashMap::from([(2, [7, 7 + others])]),
            steal: Some([5, 5 + steal]),
        };
        let waited = |others, steal| {
            let usage = Usage::of(&busy, &Seen::default(), &machine(others, steal));
            (usage.run_delay_share, usage.waited_for_others())
        };
        assert_eq!(waited(0, 0), (Some(0.75), Some(0.0)));
        assert_eq!(waited(100, 0), (Some(0.75), Some(0.375)));
        assert_eq!(waited(50, 50), (Some(0.75), Some(0.375)));
    }

    #[test]
    fn parents_and_times_are_read_whatever_a_process_is_called() {
        let stat = "7 (a) b) S 3 7 7 0 -1 4194560 1 0 0 0 20 5 0 0 20 0 1 0 100 0 0";
        let expected = Member { parent: 3, ticks: 25 };
        assert_eq!(member(stat), Some(expected));
        assert_eq!(member("7 (a) S 3"), None);
        let members = HashMap::from([(7, expected), (3, Member { parent: 1, ticks: 0 })]);
        let family = Family { members };
        assert!(family.descends_from(7, 7) && family.descends_from(7, 1) && !family.descends_from(3, 7));
    }

    #[test]
    fn what_the_host_took_is_the_eighth_figure_of_all_processors() {
        let text = "cpu  10 20 30 4000 5000 6 7 8 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(steal_ticks(text), Some(8));
        assert_eq!(steal_ticks("cpu 1 2 3"), None);
    }

    #[test]
    fn a_move_without_gateways_has_no_memory_of_theirs() {
        let usage = Usage::of(&seen(&[(1, 1)], false), &seen(&[(1, 1)], true), &Machine::default());
        assert_eq!(usage.gateway_peak_rss_bytes, None);
        assert_eq!(usage.run_delay_share, None);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_process_is_found_by_the_directory_in_its_command_line() {
        let directory = std::env::temp_dir().join(format!("longhaul-usage-{}", std::process::id()));
        let mut child = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done", &directory.display().to_string()])
            .spawn()
            .unwrap();
        let watch = Watch::start([directory.clone(), PathBuf::from("/nowhere-at-all")]);
        let ran = || {
            let seen = watch.seen.lock().unwrap();
            seen.0[0].cpu_seconds()
        };
        let found = async {
            while ran() <= 0.0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), found).await.unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let usage = watch.stop();
        assert!(usage.cpu_seconds.source > 0.0);
        assert_eq!(usage.cpu_seconds.destination, 0.0);
    }
}
