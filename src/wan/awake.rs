//! Keeps this machine's processors from going to sleep while something is timed.
//!
//! A virtual processor that has nothing to do is given back to its host, which takes its time to run it again when a packet
//! or a timer wants it: on a busy host, more than the tolerance of the RTT. Alternated on such a host (2026-11-27, p50 and
//! p99 of the RTT): 150.245 and 150.97, 150.306 and 151.72 ms as it was; 150.106 and 150.26, 150.095 and 150.15 ms with this.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::schedule;

/// While this lives, each processor runs a thread of the idle class, which gives way to all others at once.
#[derive(Debug)]
pub(super) struct Awake {
    enough: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Awake {
    /// Begins. A single processor is left to those who have work for it.
    pub(super) fn keep() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let enough = Arc::new(AtomicBool::new(false));
        // The kernel spreads them: there is one for each.
        let threads = (0..if processors > 1 { processors } else { 0 })
            .map(|_| {
                let enough = Arc::clone(&enough);
                std::thread::spawn(move || {
                    // In the ordinary class it would take processors away from what is measured.
                    if schedule::when_idle().is_ok() {
                        while !enough.load(Ordering::Relaxed) {
                            std::hint::spin_loop();
                        }
                    }
                })
            })
            .collect();
        Self { enough, threads }
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // They do nothing that could fail.
            let _ = thread.join();
        }
    }
}
