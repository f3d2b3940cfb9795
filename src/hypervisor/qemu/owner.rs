//! Which process a monitor belongs to.
//!
//! A unix socket's credentials name the process that called `listen` last. That is QEMU, also for a socket that it was
//! handed, because it calls `listen` itself; but with a relay in front of the monitor it is the relay, and stopping or killing
//! that one would hit a bystander. QEMU tells the thread ids of its vCPUs, and these prove the owner.

use serde_json::{Value, json};

use crate::hypervisor::process::{Process, ProcessError};
use crate::hypervisor::qmp::{QmpClient, QmpError};

/// Why the process behind a monitor cannot be taken hold of.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The socket's credentials name a process that is not this QEMU.
    #[error(
        "The process {pid} that listens on the monitor {path} is not the QEMU that answers there (the vCPU threads are not \
         its own), so the gateway could not stop that QEMU safely. Name the socket on which QEMU itself listens."
    )]
    Foreign {
        /// The monitor.
        path: String,
        /// The process.
        pid: u32,
    },
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Takes hold of the process behind a monitor, and makes sure that it is that QEMU and may be signalled.
pub(super) async fn owner(qmp: &QmpClient) -> Result<Process, OwnerError> {
    let process = Process::open(qmp.peer_pid())?;
    vcpu_threads(qmp, &process).await?;
    process.check_signal_permission()?;
    Ok(process)
}

/// The host's ids of the vCPU threads.
///
/// # Errors
/// [`OwnerError::Foreign`] if the process has no such threads.
pub(super) async fn vcpu_threads(qmp: &QmpClient, process: &Process) -> Result<Vec<u32>, OwnerError> {
    let cpus: Vec<Value> = qmp.query("query-cpus-fast", json!({})).await?;
    let inner = cpus
        .iter()
        .filter_map(|cpu| u32::try_from(cpu["thread-id"].as_u64()?).ok());
    match process.host_threads(&inner.collect::<Vec<u32>>())? {
        Some(threads) if !threads.is_empty() => Ok(threads),
        _ => Err(OwnerError::Foreign {
            path: qmp.path().display().to_string(),
            pid: process.pid(),
        }),
    }
}
