//! Ordered, resumable carriage of one migration's frames over many short lanes.
//!
//! ```text
//! source:       payloads ─▶ [unsent] ─▶ lanes ─▶ [sent, kept until the decoder acknowledged] ─▶ forgotten
//! destination:  lanes ─▶ [arrived out of order, bounded] ─▶ in sequence ─▶ decoder ─▶ Ack
//! ```
//!
//! Lanes overtake each other; frames are decoded strictly in encode order. After a cut both sides raise the epoch, the
//! destination says what it holds and the source sends exactly the rest, the identical frames. What is in flight when the stream ends
//! is protected by parity ([`tail`]). This module knows neither
//! sockets nor what a payload means.

mod decoder;
mod destination;
mod encoder;
mod source;
mod stripe;
pub mod tail;

pub use decoder::{DecodeError, Decoder};
pub use destination::DestinationSession;
pub use encoder::{EncodedFrame, Encoder, FrameDraft, StreamSummary};
pub use source::SourceSession;
pub use stripe::connection_of;

/// A frame that this session cannot take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// Of a session's earlier incarnation: a half-dead connection still delivers.
    #[error("a frame of epoch {found} arrived in epoch {current}")]
    OldEpoch {
        /// Epoch of the frame.
        found: u32,
        /// Epoch of the session.
        current: u32,
    },
    /// More bytes out of order than was agreed.
    #[error("the peer sent {buffered_bytes} bytes ahead of a missing frame, {limit_bytes} were agreed")]
    WindowExceeded {
        /// Bytes waiting with this frame.
        buffered_bytes: u64,
        /// The agreed window.
        limit_bytes: u64,
    },
    /// More frames out of order than are ever sent unacknowledged.
    #[error("the peer sent frame {sequence} while {limit} frames wait already, the most there may be")]
    TooManyFrames {
        /// Its sequence.
        sequence: u64,
        /// Frames that may wait.
        limit: usize,
    },
    /// A frame behind the one that was marked as the last, or two different last ones.
    #[error("frame {sequence} lies beyond the end of the stream")]
    BeyondTheEnd {
        /// Its sequence.
        sequence: u64,
    },
    /// The frames do not cover the stream without gap or overlap.
    #[error("frame {sequence} continues the stream at {found}, expected at {expected}")]
    OutOfStep {
        /// Its sequence.
        sequence: u64,
        /// Stream offset that it states.
        found: u64,
        /// Where the stream stands.
        expected: u64,
    },
    /// The peer acknowledged what was never sent.
    #[error("the peer acknowledged frame {acknowledged}, {sent} were sent")]
    AckBeyondSent {
        /// First frame that it says is missing.
        acknowledged: u64,
        /// Frames that exist.
        sent: u64,
    },
    /// The epoch of a resume does not follow.
    #[error("epoch {found} does not follow epoch {current}")]
    StaleEpoch {
        /// Epoch asked for.
        found: u32,
        /// Epoch of the session.
        current: u32,
    },
}
