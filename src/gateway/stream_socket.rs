//! The socket that a source's vmm is told to migrate to.

use std::path::PathBuf;
use std::time::Duration;

use tokio::net::UnixListener;

/// How long a vmm may take to connect to the socket it was told to migrate to, and to make all its connections from the first on.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// A listening socket that is removed again.
#[derive(Debug)]
pub(super) struct StreamSocket {
    pub(super) path: PathBuf,
    pub(super) listener: UnixListener,
}

impl StreamSocket {
    /// The directory is the gateway's own (0700), so nobody else can connect first.
    pub(super) fn bind(path: PathBuf) -> std::io::Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        Ok(Self { path, listener })
    }
}

impl Drop for StreamSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
