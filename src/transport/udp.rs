//! UDP sockets with buffers that fit the link.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

/// A socket on `address` (dual-stack where it is an IPv6 wildcard), whose buffers are as large as asked or as the kernel permits.
pub(super) fn bind(address: SocketAddr, receive_buffer: usize, send_buffer: usize) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    // The kernel counts its own bookkeeping against the buffer and therefore doubles what is asked for (socket(7)).
    // Beyond the sysctl only CAP_NET_ADMIN may go.
    if sockopt::set_socket_recv_buffer_size_force(&socket, receive_buffer).is_err() {
        socket.set_recv_buffer_size(receive_buffer)?;
    }
    if sockopt::set_socket_send_buffer_size_force(&socket, send_buffer).is_err() {
        socket.set_send_buffer_size(send_buffer)?;
    }
    let granted = socket.recv_buffer_size()? / 2;
    if let Some(advice) = shortfall(receive_buffer, granted) {
        tracing::warn!(%address, wanted_bytes = receive_buffer, granted_bytes = granted, "{advice}");
    }
    Ok(socket.into())
}

/// What to tell an operator whose kernel grants less than a tenth short of what the link needs.
fn shortfall(wanted: usize, granted: usize) -> Option<String> {
    (granted < wanted - wanted / 10).then(|| {
        format!(
            "the UDP receive buffer is {granted} bytes where the link needs {wanted}, so bursts will be lost; \
             run: sysctl -w net.core.rmem_max={wanted}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_falls_short_is_reported_with_the_sysctl_that_helps() {
        assert_eq!(shortfall(2_500_000, 2_500_000), None);
        assert_eq!(shortfall(2_500_000, 2_250_000), None);
        let advice = shortfall(2_500_000, 212_992).unwrap();
        assert!(advice.ends_with("sysctl -w net.core.rmem_max=2500000"), "{advice}");
    }

    #[test]
    fn a_port_in_use_is_an_error_and_not_shared() {
        let first = bind("127.0.0.1:0".parse().unwrap(), 65_536, 65_536).unwrap();
        let second = bind(first.local_addr().unwrap(), 65_536, 65_536);
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
