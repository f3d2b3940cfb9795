//! How a person ends the lab.

use tokio::signal::unix::{SignalKind, signal};

/// Waits for a signal that asks the lab to end, and names it.
pub(super) async fn interrupted() -> &'static str {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            // Without a handler the signal keeps its default, which is to end the process.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::interrupt()) => "SIGINT",
        () = wait(SignalKind::terminate()) => "SIGTERM",
        () = wait(SignalKind::hangup()) => "SIGHUP",
    }
}
