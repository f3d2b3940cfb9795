//! A client of the NBD protocol, without its socket.
//!
//! ```text
//!            bytes in ──► connection.rs ──► events (ready, finished)      bytes to send out ◄── connection.rs ◄── commands
//!                          │        │
//!     handshake.rs, option.rs    transmission.rs ── chunk.rs (replies) ── answer.rs (one request's chunks put together)
//!     haggling, up to NBD_OPT_GO         └───────── request.rs (commands, checked and encoded)
//! ```
//!
//! The protocol is `doc/proto.md` of the NetworkBlockDevice project; section names in these files are its. As much of it is spoken
//! as a QEMU needs: the fixed newstyle handshake, extended headers or structured replies where they are offered, metadata contexts
//! for allocation and dirty bitmaps; no TLS, as the socket is local, no old handshake, no resize, no cache requests.
//!
//! **What a server sends is not trusted.** Every length is compared with what was asked for, or with a limit below, before anything is
//! allocated; a read counts only once its chunks cover it, each byte once. A breach of the protocol ends the connection
//! ([`Breach`]); an error that a server reports ends one request ([`Failure`]).

mod answer;
mod breach;
mod chunk;
mod connection;
mod context;
mod export;
mod failure;
mod handshake;
mod numbers;
mod option;
mod request;
mod transmission;

pub use answer::{Answer, Content, Piece};
pub use breach::Breach;
pub use connection::{Connection, ConnectionError, Event};
pub use context::MetaContext;
pub use export::{BlockSizes, Export, Headers, TransmissionFlags};
pub use failure::{ErrorNumber, Failure};
pub use handshake::Refusal;
pub use request::{Command, Reading, RequestError, Zeroing};
pub use transmission::Cookie;

/// Longest string of the protocol, in bytes (section *Conventions*).
pub const MAX_STRING: usize = 4096;

/// Metadata contexts of one connection. A disk needs two.
pub const MAX_CONTEXTS: usize = 8;

/// Requests whose answers are not there yet. QEMU works on 16 for one client (`MAX_NBD_REQUESTS`) and leaves the rest in the socket.
pub const MAX_IN_FLIGHT: usize = 256;

/// Most bytes that one read or write may have: QEMU's limit (`NBD_MAX_BUFFER_SIZE`), which is also what the protocol lets a client
/// assume (section *Block sizes*).
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Most descriptors in one chunk of block status: QEMU sends no more (`NBD_MAX_BLOCK_STATUS_EXTENTS`, 1 MiB of 8 bytes each).
pub const MAX_DESCRIPTORS: usize = 1 << 17;

#[cfg(test)]
mod tests;
