//! Makes a fault at its moment. The moment is seen from outside: in a journal file, by a monitor of QEMU, on the clock.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use super::moment::Step;
use super::observe::WallTime;
use super::strike::Strike;
use crate::store::journal::Follower;

/// A fault that is prepared: whoever sees the moment first makes it.
#[derive(Debug)]
pub(super) struct Trigger {
    strike: OnceLock<Strike>,
    /// `None` inside: it could not be made.
    fired: OnceLock<Option<WallTime>>,
}

impl Trigger {
    /// A trigger that does nothing until [`Trigger::arm`].
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            strike: OnceLock::new(),
            fired: OnceLock::new(),
        })
    }

    /// From now on firing does this. Only the first call does something.
    pub(super) fn arm(&self, strike: Strike) {
        // A trigger that is armed stays as it is.
        let _ = self.strike.set(strike);
    }

    /// Makes the fault. Only the first call does something. Blocks as [`Strike::make`].
    pub(super) fn fire(&self) {
        if let Some(strike) = self.strike.get() {
            self.fired.get_or_init(|| strike.make().then(WallTime::now));
        }
    }

    /// When it fired.
    pub(super) fn fired(&self) -> Option<WallTime> {
        self.fired.get().copied().flatten()
    }

    /// What was, or will be, done.
    pub(super) fn strike(&self) -> Option<&Strike> {
        self.strike.get()
    }
}

/// A thread that looks at a journal every half millisecond and does something at a record.
pub(super) struct JournalWatch {
    leaving: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl JournalWatch {
    /// Calls `act` as soon as `step` has been written to the journal at `path`, which need not exist yet.
    pub(super) fn start(path: &Path, step: Step, act: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let leaving = Arc::new(AtomicBool::new(false));
        let path = path.to_owned();
        let is_leaving = Arc::clone(&leaving);
        let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
            if wait_for(&path, step, &is_leaving) {
                act();
            }
        })?;
        Ok(Self {
            leaving,
            thread: Some(thread),
        })
    }
}

impl Drop for JournalWatch {
    fn drop(&mut self) {
        self.leaving.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It looks at `leaving` at every step; a panic there was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

/// Whether the record came before the caller left.
fn wait_for(path: &Path, step: Step, leaving: &AtomicBool) -> bool {
    let mut follower = None;
    while !leaving.load(Ordering::Relaxed) {
        if follower.is_none() {
            follower = Follower::open(path).ok();
        }
        let record = follower.as_mut().and_then(|follower| follower.poll().ok().flatten());
        match record {
            Some(record) if Step::of(&record.kind) == step => return true,
            Some(_) => {}
            None => pause(LOOK),
        }
    }
    false
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own looks at a file again and again"
)]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// A journal step takes an fsync, a message a trip: this is shorter than either.
const LOOK: Duration = Duration::from_micros(500);
