//! A path between two gateways that can be cut: UDP, both ports, on loopback.

use std::collections::HashMap;
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
    /// Who called the second port last.
    newest: Mutex<Option<SocketAddr>>,
    lost: Mutex<Option<SocketAddr>>,
}

impl Relay {
    /// Passes on what comes to `front` and the next port to `back` and its next, and the answers.
    pub(crate) fn start(front: u16, back: u16) -> Self {
        let switches = Arc::new(Switches::default());
        let threads = (0..2)
            .map(|port| pass_on(front + port, back + port, port == 1, &switches))
            .collect();
        Self { switches, threads }
    }

    /// Drops from now on what goes to and from the caller that called the second port last.
    pub(crate) fn lose_newest(&self) {
        *self.switches.lost.lock().unwrap() = *self.switches.newest.lock().unwrap();
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

/// Each caller has a port of its own at the back too: that is how the answers find it.
fn pass_on(front: u16, back: u16, is_second: bool, switches: &Arc<Switches>) -> JoinHandle<()> {
    let before = Arc::new(socket(front));
    let switches = switches.clone();
    std::thread::spawn(move || {
        let mut callers: HashMap<SocketAddr, (Arc<UdpSocket>, JoinHandle<()>)> = HashMap::new();
        carry(&switches, &before, |packet, caller| {
            let (behind, _) = callers.entry(caller).or_insert_with(|| {
                if is_second {
                    *switches.newest.lock().unwrap() = Some(caller);
                }
                let behind = Arc::new(socket(0));
                behind.connect(("127.0.0.1", back)).unwrap();
                let (before, switches, answers) = (before.clone(), switches.clone(), behind.clone());
                let answering = move || {
                    carry(&switches, &answers, |packet, _| {
                        if !switches.is_lost(caller) {
                            let _ = before.send_to(packet, caller);
                        }
                    });
                };
                (behind, std::thread::spawn(answering))
            });
            if !switches.is_lost(caller) {
                let _ = behind.send(packet);
            }
        });
        for (_, answering) in callers.into_values() {
            let _ = answering.join();
        }
    })
}

impl Switches {
    fn is_lost(&self, caller: SocketAddr) -> bool {
        *self.lost.lock().unwrap() == Some(caller)
    }
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
