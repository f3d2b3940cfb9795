//! A guest that shows whether a migration keeps every page, and the small VMM that runs it: what `longhaul guest` is.
//!
//! The guest writes to its working set and checks each page before it writes to it again; once a second it says over
//! its serial port how often it has done that, and how many pages were not what it had written. It needs no firmware,
//! kernel or disk.

mod check;
mod content;
mod dials;
mod heartbeat;
mod layout;
mod machine;
mod payload;
mod serial;
mod vmm;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use super::memory::RamError;
use super::monitor::listener::ListenError;

pub use check::{CheckError, Counters, VcpuCounters, verify};
pub use dials::{Content, DialError, Dials};
pub use layout::{LARGEST_MEMORY, MOST_VCPUS, SMALLEST_MEMORY};
pub use vmm::DemoVmm;

/// A machine for the demo guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DemoConfig {
    /// Bytes of memory, whole pages, [`SMALLEST_MEMORY`] to [`LARGEST_MEMORY`].
    pub memory_bytes: u64,
    /// vCPUs, 1 to [`MOST_VCPUS`].
    pub vcpus: usize,
    /// With KVM's PIT. The guest does not use it; both ends of a migration have it, or none has.
    pub has_pit: bool,
    /// The guest that is loaded. `None`: none, as one is to arrive by migration.
    pub guest: Option<Dials>,
    /// Where the lines go that the guest writes to its serial port.
    pub serial: SerialOutput,
    /// The socket on which its signs of life are told.
    pub heartbeat: Option<PathBuf>,
}

/// Where the guest's lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialOutput {
    /// This process's standard output. Where nobody takes them, some are lost.
    Stdout,
    /// The end of a file, which is created where there is none.
    File(PathBuf),
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// This host has none that can be used.
    #[error(
        "/dev/kvm cannot be opened ({0}). Load kvm_intel or kvm_amd (in a VM: with nested virtualisation), \
         and run as root or in the group kvm."
    )]
    NoKvm(kvm_ioctls::Error),
    /// KVM refused a part of it.
    #[error("KVM refuses {what}: {error}")]
    Kvm {
        /// The part.
        what: &'static str,
        /// Its answer.
        error: kvm_ioctls::Error,
    },
    /// Too many or none.
    #[error("{0} vCPUs are not possible; 1 to {MOST_VCPUS} are.")]
    Vcpus(usize),
    /// Too large, too small, or not whole pages.
    #[error(
        "{0} bytes of memory are not possible; whole pages of 4 KiB \
         from {SMALLEST_MEMORY} to {LARGEST_MEMORY} bytes are."
    )]
    MemorySize(u64),
    /// The host does not give it.
    #[error("The guest's memory cannot be mapped: {0}")]
    Memory(String),
    /// It cannot be migrated.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// A dial is out of its range.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The file for its lines.
    #[error("{path} cannot be opened for the guest's lines: {source}")]
    Serial {
        /// Its path.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The socket for its signs of life.
    #[error(transparent)]
    Heartbeat(#[from] ListenError),
    /// A thread for a vCPU.
    #[error("A thread for a vCPU cannot be started: {0}")]
    Thread(std::io::Error),
}
