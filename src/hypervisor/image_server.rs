//! `qemu-nbd` (Debian: qemu-utils), which serves an image that no hypervisor has open. It has one client, and ends with it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::nbd::{NbdClient, NbdError};
use super::process::Process;
use super::qemu_img;
use crate::proto::disk::nbd::MetaContext;

/// Its name.
pub(crate) const PROGRAM: &str = "qemu-nbd";

/// Time for an image to be opened.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Time for an image to be closed: what is in the server's hands is written then.
pub(crate) const END_DEADLINE: Duration = Duration::from_secs(60);

/// Between two tries to connect.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// What it says of a failure, at most.
const SAID_BYTES: u64 = 4096;

/// What is done with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// A server that has its client.
#[derive(Debug)]
pub(crate) struct ImageServer {
    child: Child,
    has_client: bool,
}

/// It does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageServerError {
    /// There is none.
    #[error("{PROGRAM} is not installed (Debian: qemu-utils), which serves the images of a VM that is off")]
    NotInstalled,
    /// The system does not start it, or loses it.
    #[error("{PROGRAM} cannot be run: {0}")]
    NotRun(std::io::Error),
    /// In its own words.
    #[error("{0}")]
    Failed(String),
    /// It goes on without a client.
    #[error("{PROGRAM} does not close the image within {} s", .0.as_secs())]
    Late(Duration),
    /// It cannot be talked to.
    #[error(transparent)]
    Nbd(#[from] NbdError),
}

impl ImageServer {
    /// Serves an image, as `qemu-nbd` names it, at `socket` under a name for messages, and connects to it. The socket's file is gone then.
    ///
    /// # Errors
    /// [`ImageServerError`]
    pub(crate) async fn start(
        image: &str,
        name: &str,
        access: Access,
        socket: &Path,
    ) -> Result<(Self, NbdClient), ImageServerError> {
        let mut command = Command::new(PROGRAM);
        command
            .args(["--export-name", name, "--discard=unmap", "--socket"])
            .arg(socket);
        if access == Access::Read {
            command.arg("--read-only");
        }
        command
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => ImageServerError::NotInstalled,
            _ => ImageServerError::NotRun(error),
        })?;
        let mut server = Self {
            child,
            has_client: false,
        };
        let client = server.connect(name, socket).await?;
        server.has_client = true;
        // Nobody else needs to find it.
        let _ = std::fs::remove_file(socket);
        Ok((server, client))
    }

    async fn connect(&mut self, name: &str, socket: &Path) -> Result<NbdClient, ImageServerError> {
        let end = Instant::now() + START_DEADLINE;
        loop {
            let contexts = vec![MetaContext::Allocation];
            match NbdClient::connect(socket, name, contexts, START_DEADLINE).await {
                Ok(client) => return Ok(client),
                Err(NbdError::Connect { .. }) if Instant::now() < end => {}
                Err(error) => return Err(error.into()),
            }
            if self.child.try_wait().map_err(ImageServerError::NotRun)?.is_some() {
                return Err(ImageServerError::Failed(self.said().await));
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until the image is closed. Its client must be gone.
    ///
    /// # Errors
    /// [`ImageServerError`]: it may not have been.
    pub(crate) async fn end(mut self) -> Result<(), ImageServerError> {
        let ended = timeout(END_DEADLINE, self.child.wait()).await;
        let status = ended.map_err(|_| ImageServerError::Late(END_DEADLINE))?;
        match status.map_err(ImageServerError::NotRun)?.success() {
            true => Ok(()),
            false => Err(ImageServerError::Failed(self.said().await)),
        }
    }

    /// The words of one that has ended.
    async fn said(&mut self) -> String {
        let mut said = Vec::new();
        if let Some(stderr) = &mut self.child.stderr {
            let _ = stderr.take(SAID_BYTES).read_to_end(&mut said).await;
        }
        let said = String::from_utf8_lossy(&said);
        match said.trim() {
            "" => format!("{PROGRAM} has ended without a word"),
            said => qemu_img::one_line(said.strip_prefix("qemu-nbd: ").unwrap_or(said)),
        }
    }
}

/// Servers that an earlier process has started, with sockets in `folder`.
pub(crate) fn left_in(folder: &Path) -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_one = |process: &Process| {
        let arguments = process.arguments().unwrap_or_default();
        let is_server = arguments.first().is_some_and(|program| program.ends_with(PROGRAM));
        is_server
            && arguments
                .iter()
                .any(|argument| Path::new(argument).parent() == Some(folder))
    };
    pids.filter_map(|pid| Process::open(pid).ok()).filter(is_one).collect()
}

/// Ends them. One that had a client ends by itself, and writes what it has before that.
pub(crate) async fn end_left(servers: Vec<Process>) {
    if servers.is_empty() {
        return;
    }
    sleep(END_DEADLINE).await;
    for server in servers {
        if let Err(error) = server.kill(END_DEADLINE).await {
            tracing::warn!(
                pid = server.pid(),
                "a {PROGRAM} that nobody needs does not end: {error}"
            );
        }
    }
}

impl Drop for ImageServer {
    fn drop(&mut self) {
        // One with a client ends by itself, and writes what it has before that.
        if !self.has_client {
            let _ = self.child.start_kill();
        }
    }
}
