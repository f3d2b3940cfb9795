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
    for (direction, wanted, granted) in [
        (Direction::Receive, receive_buffer, socket.recv_buffer_size()? / 2),
        (Direction::Send, send_buffer, socket.send_buffer_size()? / 2),
    ] {
        if let Some(advice) = shortfall(direction, wanted, granted) {
            tracing::warn!(%address, wanted_bytes = wanted, granted_bytes = granted, "{advice}");
        }
    }
    Ok(socket.into())
}

#[derive(Clone, Copy, Debug)]
enum Direction {
    Receive,
    Send,
}

/// What to tell an operator whose kernel grants more than a tenth less than what the link needs.
fn shortfall(direction: Direction, wanted: usize, granted: usize) -> Option<String> {
    let (buffer, consequence, sysctl) = match direction {
        Direction::Receive => ("receive", "bursts will be lost", "rmem_max"),
        Direction::Send => ("send", "the link is not filled", "wmem_max"),
    };
    (granted < wanted - wanted / 10).then(|| {
        format!(
            "the UDP {buffer} buffer is {granted} bytes where the link needs {wanted}, so {consequence}; \
             run: sysctl -w net.core.{sysctl}={wanted}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_falls_short_is_reported_with_the_sysctl_that_helps() {
        for (direction, sysctl) in [(Direction::Receive, "rmem_max"), (Direction::Send, "wmem_max")] {
            assert_eq!(shortfall(direction, 2_500_000, 2_500_000), None);
            assert_eq!(shortfall(direction, 2_500_000, 2_250_000), None);
            let advice = shortfall(direction, 2_500_000, 212_992).unwrap();
            assert!(
                advice.ends_with(&format!("sysctl -w net.core.{sysctl}=2500000")),
                "{advice}"
            );
        }
    }

    #[test]
    fn a_port_in_use_is_an_error_and_not_shared() {
        let first = bind("127.0.0.1:0".parse().unwrap(), 65_536, 65_536).unwrap();
        let second = bind(first.local_addr().unwrap(), 65_536, 65_536);
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
