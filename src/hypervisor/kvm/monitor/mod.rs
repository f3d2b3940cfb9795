//! The monitor of a VMM that embeds the engine: the part of QMP that a gateway uses, on unix sockets.
//!
//! ```text
//! listener.rs   sockets                               session.rs    one client: greeting, commands in order
//! hub.rs        answers to one, events to all         commands.rs   commands by name
//! states/       what may follow what                  control.rs    the one place where the guest stops and starts
//! settings.rs   capabilities and parameters           inventory.rs  what the machine consists of
//! ```
//!
//! A gateway takes it for a QEMU whose return path is off. What it relies on: a failed or cancelled migration lets a
//! guest run again that ran, a completed one leaves it in `postmigrate` until somebody says `cont`, and `RESUME` is in
//! every client's socket before a vCPU runs. While a guest is waited for or loaded nothing runs.
//!
//! Every socket serves several clients, each on a thread of its own. None of them can hold up the guest or another one.

mod commands;
mod control;
mod hub;
mod inventory;
pub(super) mod listener;
mod session;
mod settings;
mod states;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::memory::GuestRam;
use super::mover::Mover;
use super::vmm::{Vmm, VmmError};
use control::{Control, spawn};
use inventory::Machine;
use listener::{ListenError, Listener};

pub use inventory::{CpuFeature, CpuRegister};
pub use states::RunState;

/// What a monitor is told by its VMM.
#[derive(Clone, Debug)]
pub struct MonitorConfig {
    /// Its sockets; at least one.
    pub paths: Vec<PathBuf>,
    /// The guest's name; empty if it has none.
    pub name: String,
    /// The guest's UUID, as it sees it.
    pub uuid: Option<String>,
    /// What the guest may use of its CPU. A destination that lacks some of it is refused.
    pub cpu_features: Vec<CpuFeature>,
    /// What becomes of the guest, which stands.
    pub start: Start,
}

/// What becomes of a guest when its monitor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It runs.
    Running,
    /// It stands until somebody says `cont`.
    Paused,
    /// There is none: it comes from elsewhere.
    Incoming,
}

/// A monitor. Dropping it ends a migration that is under way, all sessions, and removes the sockets. A guest that runs
/// runs on, and one that stood for the last part of a migration runs again.
pub struct Monitor {
    control: Arc<Control>,
    acceptors: Vec<(Arc<Listener>, JoinHandle<()>)>,
}

/// Why there is no monitor. The guest stands.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// None was named.
    #[error("A monitor needs the path of a socket.")]
    NoPath,
    /// A socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The operating system has no thread for it.
    #[error("A monitor needs a thread: {0}.")]
    Thread(std::io::Error),
    /// The guest was to run.
    #[error("The guest could not be started: {0}")]
    Start(VmmError),
}

impl Monitor {
    /// Listens, and starts the guest of `machine` if it is to run.
    ///
    /// # Errors
    /// [`MonitorError`].
    pub fn serve(config: MonitorConfig, machine: Arc<super::Machine>) -> Result<Self, MonitorError> {
        let (vmm, ram) = (Arc::clone(&machine.vmm), machine.ram.clone());
        Self::serve_moved_by(config, vmm, &ram, machine)
    }

    /// The same, of a guest that `mover` moves.
    fn serve_moved_by(
        config: MonitorConfig,
        vmm: Arc<dyn Vmm>,
        ram: &GuestRam,
        mover: Arc<dyn Mover>,
    ) -> Result<Self, MonitorError> {
        if config.paths.is_empty() {
            return Err(MonitorError::NoPath);
        }
        let run = match config.start {
            Start::Running | Start::Paused => RunState::Paused,
            Start::Incoming => RunState::InMigrate,
        };
        let machine = Machine::new(config.name, config.uuid, config.cpu_features, ram);
        let mut monitor = Self {
            control: Arc::new(Control::new(vmm, mover, machine, run)),
            acceptors: Vec::new(),
        };
        let listeners: Result<Vec<_>, _> = config.paths.iter().map(|path| Listener::new(path)).collect();
        let listeners = listeners?;
        if config.start == Start::Running {
            monitor.control.start().map_err(MonitorError::Start)?;
        }
        for listener in listeners {
            if let Err(error) = monitor.accept(Arc::new(listener)) {
                monitor.control.stand();
                return Err(MonitorError::Thread(error));
            }
        }
        Ok(monitor)
    }

    fn accept(&mut self, listener: Arc<Listener>) -> std::io::Result<()> {
        let (control, accepting) = (Arc::clone(&self.control), Arc::clone(&listener));
        let thread = spawn("monitor", move || accept(&control, &accepting))?;
        self.acceptors.push((listener, thread));
        Ok(())
    }

    /// Where the guest is. Not to be asked from within a call of [`Vmm`], nor by a thread that one waits for, such as a vCPU's: that is in the midst of changing
    /// it.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        self.control.run_state()
    }

    /// The guest has shut itself down: a migration of it comes to nothing, and its vCPUs are stopped. Returns at once,
    /// so a vCPU's own thread may call it, which is to be done before that thread says that it stands.
    pub fn guest_shut_down(&self) {
        if !self.control.note_shut_down() {
            return;
        }
        let control = Arc::clone(&self.control);
        if let Err(error) = spawn("shutdown", move || control.settle_shut_down()) {
            tracing::error!(%error, "the guest has shut down, and its monitor does not say so");
        }
    }
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Monitor")
            .field("run_state", &self.run_state())
            .finish_non_exhaustive()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.control.close();
        for (listener, thread) in self.acceptors.drain(..) {
            listener.close();
            // It only accepts: it ends with its listener.
            let _ = thread.join();
        }
    }
}

/// Takes clients in until the listener is closed.
fn accept(control: &Arc<Control>, listener: &Listener) {
    while !control.is_closed() {
        let Ok(socket) = listener.accept() else {
            // There may be no descriptor left for a while.
            std::thread::park_timeout(ACCEPT_PAUSE);
            continue;
        };
        let socket = Arc::new(socket);
        let Some(member) = control.hub.join(&socket) else {
            tracing::warn!("a monitor has as many clients as it may have, and turned one away");
            continue;
        };
        let (serving, id) = (Arc::clone(control), member.id);
        if let Err(error) = spawn("session", move || session::serve(&serving, &socket, &member)) {
            tracing::warn!(%error, "a monitor has no thread for a client");
            control.hub.leave(id);
        }
    }
}

/// After a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests;
