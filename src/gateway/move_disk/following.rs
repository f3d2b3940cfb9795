//! One move of a disk: what those who look on see of it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::clock;
use crate::api::{Cancellation, MoveDiskEvent, MoveDiskPhase, MoveDiskProgress, MoveDiskReport, Refusal, RefusalKind};

/// Events that a watcher may lag behind before it misses looks at the progress.
const WATCHER_QUEUE: usize = 64;

/// A move that is under way.
#[derive(Debug)]
pub(crate) struct DiskMove {
    pub(crate) vm: String,
    /// As people call it.
    pub(crate) disk: String,
    pub(super) started: Instant,
    cancel: CancellationToken,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    progress: Option<MoveDiskProgress>,
    /// The new image is the disk: nobody can cancel any more.
    committed: bool,
    notice: Option<String>,
    report: Option<Box<MoveDiskReport>>,
    watchers: Vec<mpsc::Sender<MoveDiskEvent>>,
}

impl DiskMove {
    pub(super) fn new(vm: &str, disk: &str, now: Instant) -> Self {
        Self {
            vm: vm.to_owned(),
            disk: disk.to_owned(),
            started: now,
            cancel: CancellationToken::new(),
            state: Mutex::default(),
        }
    }

    /// Completes when somebody wants it to end.
    pub(super) async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    /// Whether the new image may be the disk from now on; then it cannot be cancelled.
    pub(super) fn commit(&self) -> bool {
        let mut state = self.state();
        state.committed = !self.cancel.is_cancelled();
        state.committed
    }

    /// Asks for its end.
    pub(super) fn request_cancel(&self) -> Result<Cancellation, Refusal> {
        let state = self.state();
        if state.committed {
            let text = format!(
                "the move of {} of {} cannot be cancelled any more: it is about to be over",
                self.disk, self.vm
            );
            return Err(Refusal::new(RefusalKind::Conflict, text));
        }
        if self.cancel.is_cancelled() {
            return Ok(Cancellation::AlreadyRequested);
        }
        self.cancel.cancel();
        Ok(Cancellation::Requested)
    }

    /// A look at it.
    pub(super) fn publish(&self, phase: MoveDiskPhase, done_bytes: u64, total_bytes: u64) {
        let elapsed = clock::now().saturating_duration_since(self.started);
        let progress = MoveDiskProgress {
            phase,
            done_bytes: done_bytes.min(total_bytes),
            total_bytes,
            elapsed_seconds: elapsed.as_secs_f64(),
        };
        let mut state = self.state();
        state.progress = Some(progress);
        // A watcher that lags misses a look; the next one is as good.
        state.watchers.retain(|watcher| {
            let sent = watcher.try_send(MoveDiskEvent::Progress(progress));
            !matches!(sent, Err(mpsc::error::TrySendError::Closed(_)))
        });
    }

    /// A sentence that the operator should read, also one who looks on later.
    pub(super) fn notice(&self, text: &str) {
        tracing::warn!(vm = self.vm, disk = self.disk, "{text}");
        let mut state = self.state();
        let notice = || MoveDiskEvent::Notice(text.to_owned());
        state.watchers.retain(|watcher| watcher.try_send(notice()).is_ok());
        state.notice = Some(text.to_owned());
    }

    /// It is over.
    pub(super) fn finish(&self, report: MoveDiskReport) {
        let mut state = self.state();
        let report = Box::new(report);
        for watcher in state.watchers.drain(..) {
            // The queue may be full of looks; the report is worth a task that waits for room.
            let event = MoveDiskEvent::Report(report.clone());
            tokio::spawn(async move { watcher.send(event).await });
        }
        state.report = Some(report);
    }

    /// Whether it came to an end that can be told.
    pub(super) fn has_report(&self) -> bool {
        self.state().report.is_some()
    }

    /// Looks on until it is over.
    pub(super) fn follow(&self) -> mpsc::Receiver<MoveDiskEvent> {
        let (watcher, events) = mpsc::channel(WATCHER_QUEUE);
        let mut state = self.state();
        // A new queue has room for these.
        let known = state.progress.map(MoveDiskEvent::Progress).into_iter();
        let known = known.chain(state.notice.clone().map(MoveDiskEvent::Notice));
        let known = known.chain(state.report.clone().map(MoveDiskEvent::Report));
        for event in known {
            let _ = watcher.try_send(event);
        }
        if state.report.is_none() {
            state.watchers.push(watcher);
        }
        events
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
