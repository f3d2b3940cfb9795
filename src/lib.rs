//! longhaul: a long-distance WAN migration gateway.
//!
//! ```text
//! vmm socket → vmm_stream (bytes → records) → reduce (→ payloads) → wire (→ frames) → session → shaper → transport (QUIC)
//! QUIC → session → wire → reduce (restore) → vmm socket
//! ```
//!
//! `proto` is pure: it takes bytes, events and `now`, and gives back bytes, events and the next deadline. Everything that
//! touches a socket, a file, a clock or a hypervisor is an edge around it.

pub mod api;
pub mod cli;
pub mod config;
pub mod gateway;
pub mod hypervisor;
pub mod lab;
pub mod metrics;
pub mod migrate;
pub mod proto;
pub mod shaper;
pub mod store;
pub mod transport;
pub mod wan;
