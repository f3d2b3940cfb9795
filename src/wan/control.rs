//! The emulator's control thread: a unix socket for commands, signals, and the way to the packet thread, which it wakes
//! but never holds up.
//!
//! A connection sends lines and gets one line of JSON for each: what was carried or is in force, `{"ok":true}`, or
//! `{"error":"…"}`.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use rustix::event::EventfdFlags;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::command::Command;
use super::model::LinkSettings;
use super::stats::LinkStats;

/// To the packet thread.
#[derive(Debug)]
pub(super) enum Request {
    /// Obey, and answer.
    Command(Command, oneshot::Sender<Answer>),
    /// Carry no more packets.
    Stop,
}

/// From the packet thread.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Stats(Box<LinkStats>),
    /// In force from A to B and from B to A.
    Settings(Box<[LinkSettings; 2]>),
    /// Nothing was changed, because of this.
    Refused(String),
}

/// The emulator cannot be controlled.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket cannot be made.
    #[error("the control socket {} cannot be opened", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The thread cannot be started.
    #[error("the control thread cannot be started")]
    Thread(#[source] io::Error),
    /// An emulator does not answer.
    #[error("the emulator at {} does not answer; the link may have ended", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens at `path` and for signals. Returns where requests come from and what becomes readable when there are some.
pub(super) fn start(path: &Path) -> Result<(Receiver<Request>, OwnedFd), ControlError> {
    let (sender, receiver) = mpsc::channel();
    let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
        .map_err(|error| ControlError::Thread(error.into()))?;
    let other = wake.try_clone().map_err(ControlError::Thread)?;
    let packets = Arc::new(Packets { sender, wake: other });
    let failed = |source| ControlError::Socket {
        path: path.to_owned(),
        source,
    };
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ControlError::Thread)?;
    let (started, start) = mpsc::channel();
    std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || runtime.block_on(serve(listener, packets, started)))
        .map_err(ControlError::Thread)?;
    // A signal that comes after this finds its handler.
    start
        .recv()
        .map_err(|_| ControlError::Thread(io::ErrorKind::BrokenPipe.into()))?
        .map_err(ControlError::Thread)?;
    Ok((receiver, wake))
}

/// Sends one command line to the emulator at `path` and returns its answer, a line of JSON.
///
/// # Errors
/// [`ControlError::Silent`] where nobody listens or the answer does not come within some seconds.
pub fn ask(path: &Path, line: &str) -> Result<String, ControlError> {
    let talk = || {
        let mut stream = std::os::unix::net::UnixStream::connect(path)?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        stream.write_all(format!("{}\n", line.trim_end()).as_bytes())?;
        let mut answer = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(stream), &mut answer)?;
        if answer.is_empty() {
            Err(io::ErrorKind::UnexpectedEof.into())
        } else {
            Ok(answer.trim_end().to_owned())
        }
    };
    talk().map_err(|source| ControlError::Silent {
        path: path.to_owned(),
        source,
    })
}

/// The way to the packet thread.
#[derive(Debug)]
struct Packets {
    sender: Sender<Request>,
    wake: OwnedFd,
}

impl Packets {
    fn send(&self, request: Request) {
        // A packet thread that has gone ends the process.
        if self.sender.send(request).is_ok() {
            let _ = rustix::io::write(self.wake.as_fd(), &1_u64.to_ne_bytes());
        }
    }

    /// The answer to one line, as JSON.
    async fn answer(&self, line: &str) -> serde_json::Value {
        let command = match Command::parse(line) {
            Ok(command) => command,
            Err(error) => return json!({ "error": error.to_string() }),
        };
        let (reply, answer) = oneshot::channel();
        self.send(Request::Command(command, reply));
        match answer.await {
            Ok(Answer::Done) => json!({ "ok": true }),
            Ok(Answer::Stats(stats)) => json!(stats),
            Ok(Answer::Settings(settings)) => json!(settings),
            Ok(Answer::Refused(reason)) => json!({ "error": reason }),
            Err(_) => json!({ "error": "the emulator is stopping" }),
        }
    }
}

async fn serve(listener: std::os::unix::net::UnixListener, packets: Arc<Packets>, started: Sender<io::Result<()>>) {
    let set_up = || {
        Ok((
            UnixListener::from_std(listener)?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::user_defined1())?,
        ))
    };
    let (listener, mut terminate, mut interrupt, mut report) = match set_up() {
        Ok(all) => all,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(()));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = report.recv() => {
                let stats = packets.answer("stats").await;
                let _ = writeln!(io::stdout(), "{stats}");
            }
            connection = listener.accept() => {
                if let Ok((stream, _)) = connection {
                    tokio::spawn(converse(stream, Arc::clone(&packets)));
                }
            }
        }
    }
    packets.send(Request::Stop);
}

/// Answers the lines of one connection until it ends, or sends one that is too long.
async fn converse(stream: UnixStream, packets: Arc<Packets>) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(length) if length > 0 && line.ends_with(b"\n") => {}
            _ => return,
        }
        let answer = packets.answer(&String::from_utf8_lossy(&line)).await;
        if writer.write_all(format!("{answer}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Settings in JSON, with a thousand ranges of lost datagrams.
const MAX_LINE_BYTES: u64 = 64 * 1024;
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
