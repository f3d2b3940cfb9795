//! Answers whoever asks from outside: every datagram and every line of TCP is sent back as it came. This is what a prober takes for the
//! service, so it does nothing else and holds nothing back.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;

/// Serves [`PORT`] on every address of the guest, in threads of its own.
///
/// # Errors
/// The port cannot be had.
pub(crate) fn serve() -> std::io::Result<()> {
    let datagrams = UdpSocket::bind(("0.0.0.0", PORT))?;
    let sessions = TcpListener::bind(("0.0.0.0", PORT))?;
    thread::spawn(move || answer(&datagrams));
    thread::spawn(move || {
        for session in sessions.incoming().flatten() {
            thread::spawn(move || repeat(session));
        }
    });
    Ok(())
}

fn answer(datagrams: &UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        // What cannot be sent is lost, as on any network; the next datagram is tried again.
        if let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(&buffer[..length], from);
        }
    }
}

fn repeat(mut session: TcpStream) {
    let _ = session.set_nodelay(true);
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = session.read(&mut buffer) {
        if session.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// The port of the echo service of the internet (RFC 862).
const PORT: u16 = 7;
