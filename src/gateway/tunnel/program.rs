//! Where programs are: on sockets of this host, or of one that it reaches.

use std::io::{Error, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use socket2::{SockRef, Socket as Socket2};
use tokio::io::{AsyncRead, AsyncWrite, split};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::config::Place;

/// How long a program may take to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Between attempts to accept where the system has no more room.
const NO_ROOM: Duration = Duration::from_millis(200);

/// What a program writes.
pub(super) type Reader = Box<dyn AsyncRead + Send + Unpin>;

/// What a program reads.
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A connection with a program.
pub(super) struct Program {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) hold: Hold,
}

/// Decides how a connection ends. A program must not take a stream that was cut off for one that has ended, also where this process is killed: over
/// TCP the connection is reset unless it is released. A socket of the file system knows no such end.
#[derive(Debug)]
pub(super) struct Hold(Option<Socket2>);

impl Hold {
    /// It ends as its programs have ended it.
    pub(super) fn release(&mut self) {
        if let Some(socket) = self.0.take() {
            // Where it fails the connection is reset: the program is told too much, not too little.
            let _ = socket.set_linger(None);
        }
    }
}

impl Program {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there, or does not accept in time.
    pub(super) async fn connect(place: &Place) -> std::io::Result<Self> {
        let connect = async {
            match place {
                Place::Unix(path) => Ok(UnixStream::connect(path).await?.into()),
                Place::Tcp(address) => TcpStream::connect(address).await.map(Self::from),
            }
        };
        tokio::time::timeout(CONNECT_DEADLINE, connect)
            .await
            .map_err(|_| Error::new(ErrorKind::TimedOut, "no connection within 10 s"))?
    }
}

impl From<UnixStream> for Program {
    fn from(stream: UnixStream) -> Self {
        let (reader, writer) = split(stream);
        Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            hold: Hold(None),
        }
    }
}

impl From<TcpStream> for Program {
    fn from(stream: TcpStream) -> Self {
        // What a program writes it has written for the other end: it is not waited for more. Without the option it is only later.
        let _ = stream.set_nodelay(true);
        let socket = SockRef::from(&stream);
        // One that has gone without a word is found out some time.
        let _ = socket.set_keepalive(true);
        let hold = socket
            .set_linger(Some(Duration::ZERO))
            .and_then(|()| socket.try_clone());
        // Halves of the stream's own would end what is written when they are dropped.
        let (reader, writer) = split(stream);
        Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            hold: Hold(hold.ok()),
        }
    }
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// A place where programs connect. A socket in the file system is removed with it.
#[derive(Debug)]
pub(super) struct Listener(Socket, Place);

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens, in the place of a process that has left its socket behind.
    ///
    /// # Errors
    /// The system's, and that of a place where somebody listens already.
    pub(super) async fn bind(place: &Place) -> std::io::Result<Self> {
        let socket = match place {
            Place::Tcp(address) => Socket::Tcp(TcpListener::bind(address).await?),
            Place::Unix(path) => {
                let bound = match UnixListener::bind(path) {
                    // Anything but a socket refuses a connection too.
                    Err(error) if error.kind() == ErrorKind::AddrInUse && !is_socket(path) => Err(Error::new(
                        ErrorKind::AlreadyExists,
                        "something else than a socket is there",
                    )),
                    Err(error) if error.kind() == ErrorKind::AddrInUse => match UnixStream::connect(path).await {
                        Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => {
                            std::fs::remove_file(path)?;
                            UnixListener::bind(path)
                        }
                        _ => Err(error),
                    },
                    bound => bound,
                };
                Socket::Unix(bound?)
            }
        };
        Ok(Self(socket, place.clone()))
    }

    /// The next program that connects.
    pub(super) async fn accept(&self) -> Program {
        loop {
            let accepted = match &self.0 {
                Socket::Unix(listener) => listener.accept().await.map(|(stream, _)| stream.into()),
                Socket::Tcp(listener) => listener.accept().await.map(|(stream, _)| stream.into()),
            };
            match accepted {
                Ok(program) => return program,
                Err(error) => {
                    tracing::warn!("nobody can connect at {}: {error}", self.1);
                    tokio::time::sleep(NO_ROOM).await;
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Place::Unix(path) = &self.1 {
            let _ = std::fs::remove_file(path);
        }
    }
}
