//! `longhaul link-test`: what a link is worth, measured between two running gateways without a VM.
//!
//! ```text
//! source: pings on the idle link ─▶ lanes that do not compress, for some seconds, and pings beside them ─▶ what came of it
//! sink:   counts what arrives and throws it away, says ten times a second how much
//! ```
//!
//! Lanes of a test are [`Background`](crate::proto::rate::Class::Background): beside migrations it measures what they leave.

mod findings;
pub(super) mod sink;
pub(super) mod source;
