//! A client of the QEMU Machine Protocol over a unix socket.
//!
//! ```text
//! connect → greeting → qmp_capabilities → execute … execute        (one task reads, one writes)
//!                                         events → listeners
//! ```
//!
//! One client owns one monitor: QEMU's socket serves one connection at a time, and the next in line hears nothing, which
//! is how a busy monitor is recognised. Every command has a deadline. What QEMU sends is bounded by [`MESSAGE_LIMIT`]
//! and never trusted. The peer's process id comes from the socket's credentials, not from anything QEMU says.
//!
//! Protocol: QEMU `docs/interop/qmp-spec.rst`.

mod connection;
mod events;
mod scanner;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::hypervisor::process::is_stopped_process;
use connection::{Greeting, Pending, Shared};

pub use events::{DATA_LIMIT, Event, Events, EventsEnd, NAME_LIMIT, RunHistory};

/// A connected monitor in command mode. Dropping it closes the connection; the guest is not touched by that.
#[derive(Debug)]
pub struct QmpClient {
    path: PathBuf,
    version: QemuVersion,
    peer_pid: u32,
    shared: Arc<Shared>,
    next_id: AtomicU64,
    outgoing: mpsc::Sender<Vec<u8>>,
    drains: mpsc::Sender<oneshot::Sender<Drained>>,
    tasks: [JoinHandle<()>; 2],
}

/// QEMU's version as its greeting tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion {
    /// 10 in 10.0.2.
    pub major: u32,
    /// 0 in 10.0.2.
    pub minor: u32,
    /// 2 in 10.0.2.
    pub micro: u32,
}

/// What a drain found once the socket was empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// All `STOP` and `RESUME` events that had been sent by then.
    pub history: RunHistory,
    /// Whether the last message was cut: its sender stopped in the middle of it.
    pub is_partial: bool,
}

/// What went wrong between us and a monitor.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The path does not exist.
    #[error(
        "There is no QMP socket at {}: the hypervisor does not run, or the VM's definition names the wrong path.",
        path.display()
    )]
    NoSocket {
        /// The socket's path.
        path: PathBuf,
    },
    /// The path exists, and nobody listens.
    #[error(
        "Nobody listens on the QMP socket {}: the hypervisor that created it has ended, or the path is no listening socket.",
        path.display()
    )]
    NotListening {
        /// The socket's path.
        path: PathBuf,
    },
    /// The operating system refused the connection for another reason.
    #[error("The QMP socket {} cannot be opened", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Connected, but no greeting came.
    #[error(
        "The QMP socket {} sent no greeting within {waited:?}: another client most likely holds this monitor. \
         Give longhaul a monitor of its own (a second -qmp option).",
        path.display()
    )]
    Busy {
        /// The socket's path.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// The process behind the socket is stopped by a signal and cannot answer.
    #[error("The process {pid} behind the QMP socket {} is stopped by a signal and cannot answer.", path.display())]
    ProcessStopped {
        /// The socket's path.
        path: PathBuf,
        /// The process, from the socket's credentials.
        pid: u32,
    },
    /// Something answered that is no QMP monitor.
    #[error("What answers on {} does not speak QMP: {detail}.", path.display())]
    NotQmp {
        /// The socket's path.
        path: PathBuf,
        /// What was seen instead.
        detail: String,
    },
    /// The socket's credentials name no process that this process can see.
    #[error(
        "The process behind the QMP socket {} cannot be identified; it probably runs in another PID namespace.",
        path.display()
    )]
    NoPeerProcess {
        /// The socket's path.
        path: PathBuf,
    },
    /// QEMU refused the command.
    #[error("QEMU refused `{command}`: {description}")]
    Command {
        /// The command.
        command: String,
        /// QEMU's error class, usually `GenericError`.
        class: String,
        /// QEMU's text.
        description: String,
    },
    /// No answer came in time. The command may still be carried out.
    #[error("QEMU did not answer `{command}` within {waited:?}.")]
    Deadline {
        /// The command.
        command: String,
        /// How long was waited.
        waited: Duration,
    },
    /// QEMU's answer has another shape than its schema says.
    #[error("QEMU's answer to `{command}` is not understood: {detail}.")]
    Answer {
        /// The command.
        command: String,
        /// What is missing or wrong.
        detail: String,
    },
    /// The connection has ended, or broke the protocol. A command under way may have been carried out.
    #[error("The monitor connection to {} is lost: {reason}.", path.display())]
    Lost {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl QmpClient {
    /// Connects, reads the greeting, and enters command mode. `deadline` bounds all of it.
    ///
    /// # Errors
    /// Those of [`QmpError`] that name a path. The guest is not touched in any case.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<QmpClient, QmpError> {
        let mut peer_pid = None;
        match timeout(deadline, Self::establish(path, &mut peer_pid)).await {
            Ok(result) => result,
            Err(_) => Err(match peer_pid {
                Some(pid) if is_stopped_process(pid) => QmpError::ProcessStopped {
                    path: path.to_owned(),
                    pid,
                },
                _ => QmpError::Busy {
                    path: path.to_owned(),
                    waited: deadline,
                },
            }),
        }
    }

    async fn establish(path: &Path, seen_pid: &mut Option<u32>) -> Result<QmpClient, QmpError> {
        let path = path.to_owned();
        let stream = match UnixStream::connect(&path).await {
            Ok(stream) => stream,
            Err(error) => return Err(connect_error(path, error)),
        };
        let pid = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
        let Some(peer_pid) = pid.and_then(|pid| u32::try_from(pid).ok()).filter(|&pid| pid > 0) else {
            return Err(QmpError::NoPeerProcess { path });
        };
        *seen_pid = Some(peer_pid);

        let stream = Arc::new(stream);
        let shared = Arc::new(Shared::default());
        let (greeting_sender, greeting) = oneshot::channel();
        let (outgoing, outgoing_queue) = mpsc::channel(OUTGOING_MESSAGES);
        let (drains, drain_queue) = mpsc::channel(1);
        let reader = connection::Reader::new(Arc::clone(&stream), Arc::clone(&shared), greeting_sender);
        let tasks = [
            tokio::spawn(reader.run(drain_queue)),
            tokio::spawn(connection::write(stream, Arc::clone(&shared), outgoing_queue)),
        ];
        let mut client = QmpClient {
            path,
            version: QemuVersion {
                major: 0,
                minor: 0,
                micro: 0,
            },
            peer_pid,
            shared,
            next_id: AtomicU64::new(1),
            outgoing,
            drains,
            tasks,
        };
        client.version = match greeting.await {
            Ok(Greeting(version)) => version,
            Err(_) => {
                let detail = client
                    .shared
                    .lost_reason()
                    .unwrap_or_else(|| "it closed the connection".into());
                return Err(QmpError::NotQmp {
                    path: client.path.clone(),
                    detail,
                });
            }
        };
        client.execute("qmp_capabilities", json!({})).await?;
        Ok(client)
    }

    /// Runs `command` with `arguments` (a JSON object) and gives back what it returns; waits [`COMMAND_DEADLINE`].
    ///
    /// # Errors
    /// [`QmpError::Command`] if QEMU refused it. After [`QmpError::Deadline`] and [`QmpError::Lost`] it is not known
    /// whether the command was carried out.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_DEADLINE).await
    }

    /// [`QmpClient::execute`] with another deadline.
    ///
    /// # Errors
    /// As [`QmpClient::execute`].
    pub async fn execute_within(&self, command: &str, arguments: Value, deadline: Duration) -> Result<Value, QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "execute": command, "arguments": arguments, "id": id })
            .to_string()
            .into_bytes();
        message.push(b'\n');
        let exchange = async {
            let reply = Pending::register(&self.shared, id).map_err(|reason| self.lost(reason))?;
            if self.outgoing.send(message).await.is_err() {
                return Err(self.lost_now());
            }
            reply.await.ok_or_else(|| self.lost_now())
        };
        let reply = match timeout(deadline, exchange).await {
            Ok(reply) => reply?,
            Err(_) if is_stopped_process(self.peer_pid) => {
                return Err(QmpError::ProcessStopped {
                    path: self.path.clone(),
                    pid: self.peer_pid,
                });
            }
            Err(_) => {
                return Err(QmpError::Deadline {
                    command: command.to_owned(),
                    waited: deadline,
                });
            }
        };
        reply.map_err(|refusal| QmpError::Command {
            command: command.to_owned(),
            class: refusal.class,
            description: refusal.description,
        })
    }

    /// [`QmpClient::execute`], with the answer as a type.
    ///
    /// # Errors
    /// As [`QmpClient::execute`], and [`QmpError::Answer`].
    pub async fn query<T: serde::de::DeserializeOwned>(&self, command: &str, arguments: Value) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::Answer {
            command: command.to_owned(),
            detail: error.to_string(),
        })
    }

    /// Everything the monitor tells from now on.
    pub fn events(&self) -> Events {
        self.shared.subscribe()
    }

    /// `STOP` and `RESUME` so far. What the socket still holds is not counted: see [`QmpClient::drain`].
    pub fn run_history(&self) -> RunHistory {
        self.shared.history()
    }

    /// Reads whatever the socket holds at this moment, and then tells what the monitor has said about the vCPUs. With
    /// the process stopped, that is all it ever said.
    ///
    /// # Errors
    /// [`QmpError::Lost`], [`QmpError::Deadline`].
    pub async fn drain(&self) -> Result<Drained, QmpError> {
        let (sender, drained) = oneshot::channel();
        let exchange = async {
            self.drains.send(sender).await.map_err(|_| self.lost_now())?;
            drained.await.map_err(|_| self.lost_now())
        };
        timeout(COMMAND_DEADLINE, exchange)
            .await
            .map_err(|_| QmpError::Deadline {
                command: "drain".into(),
                waited: COMMAND_DEADLINE,
            })?
    }

    /// QEMU's version.
    pub fn version(&self) -> QemuVersion {
        self.version
    }

    /// The process that listens on the socket, from its credentials (`SO_PEERCRED`).
    pub fn peer_pid(&self) -> u32 {
        self.peer_pid
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why the connection has ended, if it has.
    pub fn lost_reason(&self) -> Option<String> {
        self.shared.lost_reason()
    }

    fn lost(&self, reason: String) -> QmpError {
        QmpError::Lost {
            path: self.path.clone(),
            reason,
        }
    }

    fn lost_now(&self) -> QmpError {
        self.lost(self.shared.lost_reason().unwrap_or_else(|| "it was closed".into()))
    }
}

impl Drop for QmpClient {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl QmpError {
    /// Whether it is certain that the command was not carried out.
    pub fn is_refusal(&self) -> bool {
        matches!(self, QmpError::Command { .. })
    }
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

fn connect_error(path: PathBuf, error: std::io::Error) -> QmpError {
    match error.kind() {
        std::io::ErrorKind::NotFound => QmpError::NoSocket { path },
        std::io::ErrorKind::ConnectionRefused => QmpError::NotListening { path },
        // A unix socket answers so when its backlog is full: somebody holds the monitor, others already wait.
        std::io::ErrorKind::WouldBlock => QmpError::Busy {
            path,
            waited: Duration::ZERO,
        },
        _ => QmpError::Connect { path, source: error },
    }
}

/// Default time for a command. QEMU answers from its main loop, which disk flushes can hold up for seconds.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Longest message accepted, in bytes. The longest in ordinary use, the schema, has about 250 KiB.
pub const MESSAGE_LIMIT: usize = 4 << 20;
/// Commands that may wait to be written; each waits for its answer anyway.
const OUTGOING_MESSAGES: usize = 16;

/// Commands under way, by id.
type Replies = HashMap<u64, oneshot::Sender<connection::Reply>>;

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(super) use tests::connected as test_monitor;
