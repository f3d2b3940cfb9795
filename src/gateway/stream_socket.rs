//! The socket that a source's vmm is told to migrate to.

use std::path::PathBuf;

use tokio::net::UnixListener;

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
