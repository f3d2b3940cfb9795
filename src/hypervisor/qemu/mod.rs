//! One virtual machine under QEMU.
//!
//! ```text
//! source.rs       SourceVm: prepare → migrate → progress → permit conditions → freeze → end, or undo
//! destination.rs  DestinationVm: launch or connect → prepare → wait until loaded → start, or kill
//! inventory.rs    what the machine consists of          compare.rs    whether two are the same machine
//! condition.rs    whether this one may be migrated      settings.rs   capabilities and parameters, and the old ones
//! permit.rs       whether everything is sent            freeze.rs     a source that nobody can resume
//! template.rs     an operator's command line            launch.rs     the process it starts, output.rs what that prints
//! owner.rs        which process a monitor belongs to    block.rs      disks, exports of them, dirty bitmaps
//! progress.rs     query-migrate                         state.rs      QEMU's names of states
//! mirror.rs       MirrorVm: a disk becomes another image while the guest runs
//! ```
//!
//! The order of the steps, and what each may leave behind, is the callers' business: they keep the journal. Here each step
//! says in its documentation where the guest is afterwards, also when it fails.

mod block;
mod compare;
mod condition;
mod destination;
mod freeze;
mod inventory;
mod launch;
mod mirror;
mod output;
mod owner;
mod permit;
mod progress;
mod settings;
mod source;
mod state;
mod template;

pub use block::{Access, BlockError, BlockLayer, GRANULARITY, GuestDisk, PREFIX, short_name};
pub use compare::{Mismatch, Severity, compare};
pub use condition::{Condition, Refusal, WritableDisk};
pub use destination::{DestinationError, DestinationVm, Loaded};
pub use freeze::{FreezeError, Frozen};
pub use inventory::{
    CpuModel, Device, Disk, FeatureWord, InventoryTooLarge, MemoryDevice, PciDevice, RamBlock, Register, VmInventory,
};
pub use launch::{Launch, LaunchError};
pub use mirror::{MirrorError, MirrorJob, MirrorVm, MovableDisk, Target};
pub use owner::OwnerError;
pub use permit::PermitConditions;
pub use progress::{MigrationProgress, RamProgress};
pub use settings::{Capability, Multifd, ParameterValue, RememberedSettings};
pub use source::{DirtyRate, DirtyRateSample, SourceError, SourceVm, SwitchoverBandwidth, Undone};
pub use state::{MigrationStatus, RunState};
pub use template::{LaunchTemplate, LaunchValues, TemplateError};

use std::path::Path;
use std::time::Duration;

use crate::hypervisor::image_lock;
use crate::hypervisor::process::{Process, ProcessError};
use crate::hypervisor::qmp::{QmpClient, QmpError};

/// QEMU said no to `cont`: the guest has not run.
#[derive(Debug, thiserror::Error)]
#[error("{error}{}", lock.as_ref().map(|lock| format!(". {lock}")).unwrap_or_default())]
pub struct ContRefusal {
    /// QEMU's words.
    pub error: QmpError,
    /// Where it was for the lock of an image: who holds that, and what to do.
    pub lock: Option<String>,
}

impl ContRefusal {
    /// `process`: the QEMU that refused.
    async fn explained(error: QmpError, process: &Process) -> ContRefusal {
        let lock = image_lock::explain(&error.to_string(), Some(process)).await;
        ContRefusal { error, lock }
    }
}

/// State of the guest now.
async fn query_run_state(qmp: &QmpClient) -> Result<RunState, QmpError> {
    let answer = qmp.execute("query-status", serde_json::json!({})).await?;
    match answer["status"].as_str() {
        Some(name) => Ok(RunState::from_name(name)),
        None => Err(QmpError::Answer {
            command: "query-status".into(),
            detail: "it names no status".into(),
        }),
    }
}

/// Says `quit` and waits until the process is gone; kills it if it is not by then. Both waits are `deadline` long.
async fn quit(qmp: &QmpClient, process: &Process, deadline: Duration) -> Result<(), ProcessError> {
    // QEMU may close the connection before it answers, and one that does not answer is killed.
    if let Err(error) = qmp.execute_within("quit", serde_json::json!({}), deadline).await {
        tracing::debug!(%error, "quit was not answered");
    }
    match process.wait_gone(deadline).await {
        Ok(()) => Ok(()),
        Err(_) => process.kill(deadline).await,
    }
}

/// QEMU's address of a unix socket, for a path that fits one.
fn socket_uri(path: &Path) -> Option<String> {
    socket_path(path).map(|text| format!("unix:{text}"))
}

/// The path of a unix socket as text, where it fits one.
fn socket_path(path: &Path) -> Option<&str> {
    path.to_str()
        .filter(|text| text.len() <= SOCKET_PATH_LIMIT && !text.contains('\0') && path.is_absolute())
}

/// Longest path of a unix socket, in bytes (`sun_path` without its final zero, unix(7)).
const SOCKET_PATH_LIMIT: usize = 107;
