//! What the monitor asks of the engine, and whoever moves a guest without one.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::migration::Guidance;

/// Why a guest was not moved: a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct MoveError(pub String);

/// Moves the guest of this process. Every call blocks, and has a thread of its own.
pub trait Mover: Send + Sync + 'static {
    /// Sends the guest into `stream`, and ends that when everything is sent. `stop` is called once, when the rest is small enough: it makes the guest stand,
    /// tells whoever listens, and returns when the rest may be sent.
    ///
    /// # Errors
    /// The stream broke, nobody wants it any more, or the guest cannot be moved. Whoever calls lets the guest run again. To end it early, shut `stream` down
    /// beside [`Guidance::cancel`]: it may be waiting for somebody to read.
    fn send(
        &self,
        stream: &UnixStream,
        guidance: &Guidance,
        stop: &mut dyn FnMut() -> Result<(), MoveError>,
    ) -> Result<(), MoveError>;

    /// Takes a guest in from `stream`, until that ends. The guest stands, before and after.
    ///
    /// # Errors
    /// There is no guest here: the stream is no good, or is of another machine. To end it early, shut `stream` down.
    fn receive(&self, stream: &UnixStream) -> Result<(), MoveError>;

    /// Bytes that the guest dirties in a second, counted over `period`. `None` while it is moved, which counts the same pages, or where a migration has begun meanwhile.
    ///
    /// # Errors
    /// KVM does not say.
    fn dirty_rate(&self, period: Duration) -> Result<Option<u64>, MoveError>;
}
