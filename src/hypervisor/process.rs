//! A hypervisor process, held so that it can never be mistaken for another one.
//!
//! A pid is reused; a pidfd is not. [`Process`] holds a pidfd for signals and for learning of the end, and an identity
//! (pid, start time, boot) that can be written down and recognised after our own restart.

use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, pidfd_send_signal, test_kill_process};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

/// What starts a program that is to end with whoever starts it. One that is killed cannot clean up; then the kernel ends it.
pub(crate) const WITH_ITS_PARENT: [&str; 4] = ["setpriv", "--pdeathsig", "KILL", "--"];

/// A process of this host that exists or existed.
#[derive(Debug)]
pub struct Process {
    identity: ProcessIdentity,
    pidfd: OwnedFd,
}

/// What tells one process from every other that this host has run or will run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub start_time_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// What went wrong with a process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It has ended.
    #[error("The process {pid} has ended.")]
    Gone {
        /// Its pid.
        pid: u32,
    },
    /// The operating system refused the access.
    #[error("The gateway may not {action} the process {pid}; it has to run as the same user or as root.")]
    NotPermitted {
        /// Its pid.
        pid: u32,
        /// What was tried: "signal", "look into".
        action: &'static str,
    },
    /// Another failure of the operating system.
    #[error("The process {pid} cannot be examined")]
    System {
        /// Its pid.
        pid: u32,
        /// The reason.
        source: std::io::Error,
    },
    /// `/proc` shows something that this kernel interface does not promise.
    #[error("What /proc tells about the process {pid} is not understood.")]
    Unreadable {
        /// Its pid.
        pid: u32,
    },
    /// It should be stopped, and is not.
    #[error("The process {pid} is not stopped although it should be; somebody has continued it.")]
    NotStopped {
        /// Its pid.
        pid: u32,
    },
    /// It did not stop after SIGSTOP; it has been continued.
    #[error("The process {pid} did not stop within {waited:?} after SIGSTOP, and was continued.")]
    DidNotStop {
        /// Its pid.
        pid: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// It is still stopped after SIGCONT.
    #[error("The process {pid} is still stopped {waited:?} after SIGCONT.")]
    DidNotContinue {
        /// Its pid.
        pid: u32,
        /// How long was waited.
        waited: Duration,
    },
    /// It still exists.
    #[error("The process {pid} still exists after {waited:?}.")]
    DidNotEnd {
        /// Its pid.
        pid: u32,
        /// How long was waited.
        waited: Duration,
    },
}

impl Process {
    /// Takes hold of the process that has `pid` now.
    ///
    /// # Errors
    /// [`ProcessError::Gone`] if there is none.
    pub fn open(pid: u32) -> Result<Process, ProcessError> {
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(ProcessError::Gone { pid })?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(|error| system_error(pid, "look into", error))?;
        let start_time_ticks = Stat::read(pid, None)?.start_time_ticks;
        let process = Process {
            identity: ProcessIdentity {
                pid,
                start_time_ticks,
                boot_id: boot_id(pid)?,
            },
            pidfd,
        };
        // The pidfd was opened first: alive now means that the start time was read from the same process.
        if process.is_alive() {
            Ok(process)
        } else {
            Err(ProcessError::Gone { pid })
        }
    }

    /// Takes hold of a process recorded earlier, also by an earlier gateway. `None`: it has ended, and if its pid
    /// exists it belongs to another process.
    ///
    /// # Errors
    /// Only failures to find out.
    pub fn reattach(identity: &ProcessIdentity) -> Result<Option<Process>, ProcessError> {
        if boot_id(identity.pid)? != identity.boot_id {
            return Ok(None);
        }
        match Process::open(identity.pid) {
            Ok(process) if process.identity == *identity => Ok(Some(process)),
            Ok(_) | Err(ProcessError::Gone { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A second hold on the same process.
    ///
    /// # Errors
    /// Only if file descriptors run out.
    pub fn try_clone(&self) -> Result<Process, ProcessError> {
        let pidfd = self.pidfd.try_clone().map_err(|source| ProcessError::System {
            pid: self.pid(),
            source,
        })?;
        Ok(Process {
            identity: self.identity.clone(),
            pidfd,
        })
    }

    /// What to record in order to find it again.
    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Whether it has not ended. An ended process runs no instruction any more and holds no file, reaped or not.
    pub fn is_alive(&self) -> bool {
        let mut descriptors = [PollFd::new(&self.pidfd, PollFlags::IN)];
        !matches!(poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(ready) if ready > 0)
    }

    /// Fails unless this gateway may signal it.
    ///
    /// # Errors
    /// [`ProcessError::NotPermitted`], [`ProcessError::Gone`].
    pub fn check_signal_permission(&self) -> Result<(), ProcessError> {
        let raw = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or(ProcessError::Gone { pid: self.pid() })?;
        test_kill_process(raw).map_err(|error| system_error(self.pid(), "signal", error))
    }

    /// Stops it with SIGSTOP and waits until its main thread and `threads` are seen stopped. Threads that the kernel
    /// runs on its behalf (vhost, io_uring) are not waited for: they execute no guest code.
    ///
    /// # Errors
    /// On an error it has been continued again (as far as it exists).
    pub async fn stop(&self, threads: &[u32], deadline: Duration) -> Result<(), ProcessError> {
        let outcome = async {
            self.signal(Signal::STOP)?;
            let end = Instant::now() + deadline;
            let mut looks = 0;
            loop {
                let mut all_stopped = self.is_stopped()?;
                for &thread in threads {
                    all_stopped &= match Stat::read(self.pid(), Some(thread)) {
                        Ok(stat) => stat.is_stopped(),
                        Err(ProcessError::Gone { .. }) => true,
                        Err(error) => return Err(error),
                    };
                }
                if all_stopped {
                    // A process that ended leaves no thread behind either; that is not "stopped".
                    return if self.is_alive() { Ok(()) } else { Err(self.gone()) };
                }
                if Instant::now() >= end {
                    return Err(ProcessError::DidNotStop {
                        pid: self.pid(),
                        waited: deadline,
                    });
                }
                // It usually takes well under a millisecond, and the guest is waiting.
                looks += 1;
                if looks < EAGER_LOOKS {
                    tokio::task::yield_now().await
                } else {
                    sleep(POLL_INTERVAL).await
                }
            }
        };
        let mut continue_on_failure = ContinueOnDrop(Some(self));
        let result = outcome.await;
        if result.is_ok() {
            continue_on_failure.0 = None;
        }
        result
    }

    /// Continues it with SIGCONT and waits until it is no longer stopped.
    ///
    /// # Errors
    /// [`ProcessError::Gone`], [`ProcessError::DidNotContinue`] (a debugger may hold it).
    pub async fn resume(&self, deadline: Duration) -> Result<(), ProcessError> {
        self.signal(Signal::CONT)?;
        let end = Instant::now() + deadline;
        while self.is_stopped()? {
            if Instant::now() >= end {
                return Err(ProcessError::DidNotContinue {
                    pid: self.pid(),
                    waited: deadline,
                });
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Continues it with SIGCONT without waiting, for places that cannot; one that has ended needs none.
    pub(super) fn resume_now(&self) {
        if let Err(error) = self.signal(Signal::CONT) {
            tracing::warn!(pid = self.pid(), %error, "a process could not be continued");
        }
    }

    /// Kills it and its process group without waiting, for places that cannot. For a process that leads its group.
    pub(super) fn kill_session(&self) {
        if self.is_alive() {
            // Alive, so its pid cannot name another group.
            let group = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
            let _ = group.map(|group| kill_process_group(group, Signal::KILL));
            let _ = self.signal(Signal::KILL);
        }
    }

    /// Ends it with SIGKILL and waits until it is really gone. Fine if it has ended already.
    ///
    /// # Errors
    /// [`ProcessError::DidNotEnd`]: the kernel still holds it (a disk that does not answer), and it must be treated as
    /// alive.
    pub async fn kill(&self, deadline: Duration) -> Result<(), ProcessError> {
        match self.signal(Signal::KILL) {
            Ok(()) | Err(ProcessError::Gone { .. }) => self.wait_gone(deadline).await,
            Err(error) => Err(error),
        }
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// [`ProcessError::DidNotEnd`].
    pub async fn wait_gone(&self, deadline: Duration) -> Result<(), ProcessError> {
        let end = Instant::now() + deadline;
        while self.is_alive() {
            if Instant::now() >= end {
                return Err(ProcessError::DidNotEnd {
                    pid: self.pid(),
                    waited: deadline,
                });
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Whether its main thread is stopped by a signal.
    ///
    /// # Errors
    /// [`ProcessError::Gone`].
    pub fn is_stopped(&self) -> Result<bool, ProcessError> {
        let stat = Stat::read(self.pid(), None)?;
        // Another start time: the pid was reused.
        if stat.start_time_ticks != self.identity.start_time_ticks || !self.is_alive() {
            return Err(self.gone());
        }
        Ok(stat.is_stopped())
    }

    /// The host's ids of threads that the process itself numbers `inner`; they differ inside a PID namespace. `None`
    /// where one of them is no thread of this process.
    ///
    /// # Errors
    /// Only failures to find out.
    pub fn host_threads(&self, inner: &[u32]) -> Result<Option<Vec<u32>>, ProcessError> {
        let pid = self.pid();
        let entries =
            fs::read_dir(format!("/proc/{pid}/task")).map_err(|error| io_system_error(pid, "look into", error))?;
        let mut numbers = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| io_system_error(pid, "look into", error))?;
            let Some(host) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            let innermost = line.and_then(|line| line.split_ascii_whitespace().next_back()?.parse().ok());
            numbers.push((innermost.unwrap_or(host), host));
        }
        let host_of = |wanted: u32| {
            numbers
                .iter()
                .find(|(inner, _)| *inner == wanted)
                .map(|&(_, host)| host)
        };
        Ok(inner.iter().map(|&thread| host_of(thread)).collect())
    }

    /// Its arguments, at most [`PROC_LIMIT`] bytes of them.
    ///
    /// # Errors
    /// Only failures to find out.
    pub fn arguments(&self) -> Result<Vec<String>, ProcessError> {
        let bytes = read_proc(self.pid(), "cmdline")?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.split_terminator('\0').map(str::to_owned).collect())
    }

    /// Its control groups, as `/proc/PID/cgroup` lists them.
    ///
    /// # Errors
    /// Only failures to find out.
    pub fn control_groups(&self) -> Result<String, ProcessError> {
        Ok(String::from_utf8_lossy(&read_proc(self.pid(), "cgroup")?).into_owned())
    }

    /// The session it belongs to: the pid of the process that called `setsid`.
    ///
    /// # Errors
    /// [`ProcessError::Gone`].
    pub fn session(&self) -> Result<u32, ProcessError> {
        Ok(Stat::read(self.pid(), None)?.session)
    }

    fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        pidfd_send_signal(&self.pidfd, signal).map_err(|error| system_error(self.pid(), "signal", error))
    }

    fn gone(&self) -> ProcessError {
        ProcessError::Gone { pid: self.pid() }
    }
}

/// Continues a process that was stopped by half, also when the caller is cancelled.
struct ContinueOnDrop<'a>(Option<&'a Process>);

impl Drop for ContinueOnDrop<'_> {
    fn drop(&mut self) {
        self.0.inspect(|process| process.resume_now());
    }
}

/// The fields of `/proc/PID/stat` that matter here (proc_pid_stat(5)).
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    session: u32,
    start_time_ticks: u64,
}

impl Stat {
    fn read(pid: u32, thread: Option<u32>) -> Result<Stat, ProcessError> {
        let name = thread.map_or_else(|| "stat".to_owned(), |thread| format!("task/{thread}/stat"));
        Stat::parse(&read_proc(pid, &name)?).ok_or(ProcessError::Unreadable { pid })
    }

    /// The second field is the program's name in parentheses, and may itself contain blanks and parentheses.
    fn parse(line: &[u8]) -> Option<Stat> {
        let name_end = line.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(line.get(name_end + 1..)?).ok()?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        Some(Stat {
            state: *fields.first()?.as_bytes().first()?,
            session: fields.get(3)?.parse().ok()?,
            start_time_ticks: fields.get(19)?.parse().ok()?,
        })
    }

    /// `T`: by a signal; `t`: by a tracer; `Z` and `X`: ended, it will not run either.
    fn is_stopped(&self) -> bool {
        matches!(self.state, b'T' | b't' | b'Z' | b'X')
    }
}

/// Whether the process that has `pid` now is stopped by a signal. For error texts only: the pid may have been reused.
pub(super) fn is_stopped_process(pid: u32) -> bool {
    Stat::read(pid, None).is_ok_and(|stat| stat.state == b'T')
}

fn boot_id(pid: u32) -> Result<String, ProcessError> {
    let text =
        fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(|source| ProcessError::System { pid, source })?;
    Ok(text.trim().to_owned())
}

fn read_proc(pid: u32, name: &str) -> Result<Vec<u8>, ProcessError> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(format!("/proc/{pid}/{name}"))
        .and_then(|file| file.take(PROC_LIMIT).read_to_end(&mut bytes))
        .map_err(|error| io_system_error(pid, "look into", error))?;
    Ok(bytes)
}

fn system_error(pid: u32, action: &'static str, error: Errno) -> ProcessError {
    io_system_error(pid, action, error.into())
}

fn io_system_error(pid: u32, action: &'static str, source: std::io::Error) -> ProcessError {
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::SRCH | Errno::NOENT) => ProcessError::Gone { pid },
        Some(Errno::PERM | Errno::ACCESS) => ProcessError::NotPermitted { pid, action },
        _ => ProcessError::System { pid, source },
    }
}

/// Bytes read of one file under `/proc`. A QEMU command line with hundreds of disks has about 100 KiB.
pub const PROC_LIMIT: u64 = 1 << 20;
/// Between two looks at a process. The kernel announces the end of a process on its pidfd, and nothing announces a stop of
/// one that is not our child; looking is enough for both.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Looks without a pause before looking at that interval; one takes some tens of microseconds.
const EAGER_LOOKS: u32 = 50;

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    const SOON: Duration = Duration::from_secs(10);

    /// A child that waits for ever and is ended with the test.
    struct Waiting(Child);

    impl Waiting {
        fn start() -> Waiting {
            Waiting(Command::new("sleep").arg("1000").spawn().unwrap())
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_program_name_with_parentheses_and_blanks_is_no_obstacle() {
        let line = b"42 (a) b (c) T 1 42 40 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 777 0 0\n";
        assert_eq!(
            Stat::parse(line),
            Some(Stat {
                state: b'T',
                session: 40,
                start_time_ticks: 777
            })
        );
        assert_eq!(Stat::parse(b"42 (a T 1 42"), None);
        assert_eq!(Stat::parse(b"42 (a) T 1 42"), None);
    }

    #[tokio::test]
    async fn a_process_is_stopped_continued_and_ended() {
        let child = Waiting::start();
        let process = Process::open(child.0.id()).unwrap();
        process.check_signal_permission().unwrap();
        process.stop(&[child.0.id()], SOON).await.unwrap();
        assert!(process.is_stopped().unwrap());
        assert!(is_stopped_process(process.pid()));
        process.resume(SOON).await.unwrap();
        assert!(!process.is_stopped().unwrap());
        assert!(matches!(
            process.wait_gone(Duration::ZERO).await,
            Err(ProcessError::DidNotEnd { .. })
        ));
        process.stop(&[], SOON).await.unwrap();
        process.kill(SOON).await.unwrap();
        assert!(!process.is_alive());
        process.kill(SOON).await.unwrap();
    }

    #[tokio::test]
    async fn a_recorded_process_is_found_again_and_never_confused_with_another() {
        let child = Waiting::start();
        let process = Process::open(child.0.id()).unwrap();
        let identity = process.identity().clone();
        assert_eq!(Process::reattach(&identity).unwrap().unwrap().identity(), &identity);
        let other_start = ProcessIdentity {
            start_time_ticks: identity.start_time_ticks + 1,
            ..identity.clone()
        };
        assert!(Process::reattach(&other_start).unwrap().is_none());
        let other_boot = ProcessIdentity {
            boot_id: "another".into(),
            ..identity.clone()
        };
        assert!(Process::reattach(&other_boot).unwrap().is_none());
        drop(child);
        assert!(Process::reattach(&identity).unwrap().is_none());
        assert!(matches!(process.stop(&[], SOON).await, Err(ProcessError::Gone { .. })));
        assert!(matches!(process.is_stopped(), Err(ProcessError::Gone { .. })));
    }

    #[test]
    fn own_threads_are_known_and_foreign_ones_are_not() {
        let process = Process::open(std::process::id()).unwrap();
        let own = rustix::thread::gettid().as_raw_pid().unsigned_abs();
        assert_eq!(process.host_threads(&[own]).unwrap(), Some(vec![own]));
        assert_eq!(process.host_threads(&[own, 1]).unwrap(), None);
        assert!(process.arguments().unwrap()[0].contains("longhaul"));
    }
}
