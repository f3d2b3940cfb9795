//! Where sockets come from: the machine's UDP, or what stands in for it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{AsyncUdpSocket, Runtime as _, TokioRuntime};

use super::udp;

/// Makes the sockets of a [`Transport`](super::Transport). Everything above it, pacing and congestion control too, is the
/// same on any network, and reads tokio's clock.
pub trait Network: fmt::Debug + Send + Sync {
    /// A socket at `address`, port 0 being any, that holds about so many bytes that were not read and not sent.
    ///
    /// # Errors
    /// Those of the operating system; [`io::ErrorKind::AddrInUse`] where another socket is there.
    fn bind(
        &self,
        address: SocketAddr,
        receive_buffer: usize,
        send_buffer: usize,
    ) -> io::Result<Arc<dyn AsyncUdpSocket>>;
}

/// UDP of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Udp;

impl Network for Udp {
    fn bind(
        &self,
        address: SocketAddr,
        receive_buffer: usize,
        send_buffer: usize,
    ) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(udp::bind(address, receive_buffer, send_buffer)?)
    }
}
