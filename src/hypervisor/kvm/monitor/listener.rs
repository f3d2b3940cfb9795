//! Unix sockets that this process listens on.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, chmod};
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// A listening socket. Dropping it removes its file, unless that is another one by now.
#[derive(Debug)]
pub(in crate::hypervisor::kvm) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens.
    #[error("The socket {} is in use by another process.", path.display())]
    InUse {
        /// Its path.
        path: PathBuf,
    },
    /// Something else has that name.
    #[error("There is something at {} that is no socket; it is not replaced.", path.display())]
    NoSocket {
        /// Its path.
        path: PathBuf,
    },
    /// The operating system refuses.
    #[error("The socket {} cannot be listened on: {source}.", path.display())]
    System {
        /// Its path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

impl Listener {
    /// Listens on `path`, for the user of this process alone. The socket of a process that has ended is replaced.
    pub(in crate::hypervisor::kvm) fn new(path: &Path) -> Result<Self, ListenError> {
        remove_stale(path)?;
        match Self::listen(path) {
            Ok((listener, file)) => Ok(Self {
                listener,
                path: path.to_owned(),
                file,
            }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(ListenError::InUse { path: path.to_owned() }),
            Err(source) => Err(ListenError::System {
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn listen(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &address)?;
        // Before `listen` nobody can connect, so nobody else gets in between.
        chmod(path, Mode::RUSR | Mode::WUSR)?;
        let file = identity(path)?;
        listen(&socket, BACKLOG)?;
        Ok((UnixListener::from(socket), file))
    }

    /// The next connection.
    pub(in crate::hypervisor::kvm) fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept()?.0)
    }

    /// Makes [`Listener::accept`] fail from now on, also one that waits.
    pub(in crate::hypervisor::kvm) fn close(&self) {
        // It fails where it was closed already.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "a socket's file could not be removed");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let file = std::fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

/// Removes the socket of a process that has ended.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let system = |source| ListenError::System {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => return Err(ListenError::NoSocket { path: path.to_owned() }),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(error)),
    }
    match is_listened_on(path) {
        Ok(false) => std::fs::remove_file(path).map_err(system),
        Ok(true) => Err(ListenError::InUse { path: path.to_owned() }),
        Err(error) => Err(system(error)),
    }
}

/// Whether a process listens on the socket at `path`.
fn is_listened_on(path: &Path) -> io::Result<bool> {
    match connect(path) {
        Ok(_) => Ok(true),
        Err(error) => match error.kind() {
            // Its backlog is full.
            io::ErrorKind::WouldBlock => Ok(true),
            io::ErrorKind::ConnectionRefused => Ok(false),
            _ => Err(error),
        },
    }
}

/// Connects to the socket at `path`, and fails where that would have to wait: nobody could end the waiting.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_the_socket_of_a_process_that_has_ended_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::new(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(Listener::new(&path), Err(ListenError::InUse { .. })));
        drop(listener);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Listener::new(&path).unwrap());
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(Listener::new(&path), Err(ListenError::NoSocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_file_that_somebody_else_has_put_there_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::new(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = Listener::new(&path).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn closing_ends_an_accept_that_waits() {
        let directory = tempfile::tempdir().unwrap();
        let listener = Listener::new(&directory.path().join("socket")).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.accept());
            listener.close();
            assert!(waiting.join().unwrap().is_err());
        });
        assert!(listener.accept().is_err());
    }
}
