//! How a fault is made, and how it is mended: signals to processes, words to the link's emulator, a disk that is filled, a clock that is set.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::process::{Signal, pidfd_send_signal};

use super::disk::Disk;
use crate::lab::clock::{Clock, Jump};
use crate::wan::{Directions, ask};

/// A fault as it is made on this host.
#[derive(Debug)]
pub(super) enum Strike {
    /// A signal to processes.
    Signal { targets: Vec<Target>, signal: Signal },
    /// No packet passes the emulator, whose control socket this is.
    Cut { control: PathBuf, directions: Directions },
    /// There is no room for another record.
    Fill(Disk),
    /// A gateway's wall clock is wrong from now on.
    Jump { clock: Clock, jump: Jump },
}

/// A process, known by a descriptor, which never means another one.
#[derive(Debug)]
pub(super) enum Target {
    /// Is there already.
    There(OwnedFd),
    /// A hypervisor that somebody starts soon.
    Coming(Arc<OnceLock<OwnedFd>>),
}

impl Strike {
    /// Makes the fault, and says whether it could. Blocks where a process is hit that is only about to start.
    pub(super) fn make(&self) -> bool {
        match self {
            Self::Signal { targets, signal } => {
                // Whether it came in time is seen in the journals.
                send(targets, *signal);
                true
            }
            Self::Cut { control, directions } => {
                ask(control, &format!("down {directions} {}", show(LONGEST_CUT))).is_ok()
            }
            Self::Fill(disk) => disk.fill().is_ok(),
            Self::Jump { clock, jump } => clock.jump(*jump).is_ok(),
        }
    }

    /// Takes it back, as far as the lab does that: a gateway that has to be started again is its caller's.
    pub(super) fn mend(&self) -> std::io::Result<()> {
        match self {
            Self::Signal { targets, signal } if *signal == Signal::STOP => send(targets, Signal::CONT),
            Self::Signal { .. } | Self::Jump { .. } => {}
            Self::Cut { control, directions } => {
                ask(control, &format!("up {directions}")).map_err(std::io::Error::other)?;
            }
            Self::Fill(disk) => disk.free()?,
        }
        Ok(())
    }
}

fn send(targets: &[Target], signal: Signal) {
    for target in targets {
        let process = match target {
            Target::There(process) => Some(process),
            Target::Coming(process) => wait_for(process),
        };
        if let Some(process) = process {
            // One that has ended by itself is found out by whoever holds it.
            let _ = pidfd_send_signal(process, signal);
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own waits for a hypervisor to appear"
)]
fn wait_for(process: &OnceLock<OwnedFd>) -> Option<&OwnedFd> {
    for _ in 0..LOOKS {
        if process.get().is_some() {
            break;
        }
        std::thread::sleep(LOOK);
    }
    process.get()
}

fn show(time: Duration) -> String {
    format!("{}s", time.as_secs())
}

const LOOK: Duration = Duration::from_millis(1);
/// Five seconds: a hypervisor is started within a fraction of one.
const LOOKS: u32 = 5_000;
/// Longer than any case; the lab ends the cut before.
const LONGEST_CUT: Duration = Duration::from_secs(600);
