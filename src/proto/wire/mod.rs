//! Stage 3: what gateways say to each other. `docs/wire-format.md` describes the same from outside.
//!
//! Two kinds of carriage:
//!
//! - **Lanes**: one QUIC stream in one direction each, on a bulk connection. A lane holds exactly one [`Frame`]: a
//!   fixed header and a payload ([`frame`]); the payload of a repair is described in [`repair`].
//! - **Channels**: QUIC streams in both directions on the control connection. A channel holds [`message`]s, each with a
//!   length in front.
//!
//! Numbers in headers are little-endian. Zero is never a valid kind, so a zeroed buffer means nothing. Every length is
//! compared with a limit before anything is allocated.

pub mod frame;
pub mod hello;
pub mod message;
pub mod repair;

pub use frame::{Frame, FrameError, FrameHeader, FrameKind, MAX_PAYLOAD};
pub use hello::{Hello, HelloError, Limits, VERSION};
pub use message::{MessageError, Offer, Request, SessionMessage, TestMessage};
