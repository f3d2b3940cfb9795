//! A path between two gateways that can be cut: UDP, both ports, on loopback.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Stands before one gateway.
pub(crate) struct Relay {
    switches: Arc<Switches>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Switches {
    cut: AtomicBool,
    ended: AtomicBool,
}

impl Relay {
    /// Passes on what comes to `front` and the next port to `back` and its next, and the answers.
    pub(crate) fn start(front: u16, back: u16) -> Self {
        let switches = Arc::new(Switches::default());
        let threads = (0..2)
            .flat_map(|port| pass_on(front + port, back + port, &switches))
            .collect();
        Self { switches, threads }
    }

    /// Whether everything is dropped from now on.
    pub(crate) fn cut(&self, cut: bool) {
        self.switches.cut.store(cut, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.switches.ended.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn pass_on(front: u16, back: u16, switches: &Arc<Switches>) -> [JoinHandle<()>; 2] {
    let before = Arc::new(socket(front));
    let behind = Arc::new(socket(0));
    behind.connect(("127.0.0.1", back)).unwrap();
    let caller: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
    let there = {
        let (before, behind, caller, switches) = (before.clone(), behind.clone(), caller.clone(), switches.clone());
        move || {
            carry(&switches, &before, |packet, from| {
                *caller.lock().unwrap() = Some(from);
                let _ = behind.send(packet);
            });
        }
    };
    let switches = switches.clone();
    let and_back = move || {
        carry(&switches, &behind, |packet, _| {
            if let Some(caller) = *caller.lock().unwrap() {
                let _ = before.send_to(packet, caller);
            }
        });
    };
    [std::thread::spawn(there), std::thread::spawn(and_back)]
}

fn carry(switches: &Switches, from: &UdpSocket, mut to: impl FnMut(&[u8], SocketAddr)) {
    let mut packet = vec![0; 65_536];
    while !switches.ended.load(Ordering::SeqCst) {
        // A read that timed out, or a port at which nobody listens yet: the next packet may pass.
        let Ok((len, sender)) = from.recv_from(&mut packet) else {
            continue;
        };
        if !switches.cut.load(Ordering::SeqCst) {
            to(&packet[..len], sender);
        }
    }
}

fn socket(port: u16) -> UdpSocket {
    let socket = UdpSocket::bind(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    socket
}
