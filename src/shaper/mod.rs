//! Who may send how much and when, above QUIC.
//!
//! ```text
//! migration's limit ─▶ link's turns (class, weight) ─▶ link's limit ─▶ lanes → QUIC → paced socket, which counts headers and repairs
//! ```
//!
//! One frame is on its way from a flow into QUIC at a time, and only once there is credit for it; so what is not admitted yet can still be
//! overtaken, and next to nothing unsent sits in QUIC.

mod limit;
mod turns;

pub use limit::Shaper;
pub use turns::{Flow, Terms, Turn, Turns};
