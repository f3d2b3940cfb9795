//! QUIC between gateways: who the other end is, how fast packets leave, and connections to send lanes over.
//!
//! ```text
//! lane ──▶ quinn connection ──▶ paced socket ──▶ UDP
//!              │    ▲               ▲
//!              ▼    │ window        │ rate
//!          acknowledgements ──▶ link controller (proto/rate)
//! ```
//!
//! Which layer owns what: the [`shaper`](crate::shaper) admits data above QUIC, so that little waits unsent; the link controller
//! decides the rate of a connection; the paced socket keeps that rate, the peer's and the link's, headers included. quinn's
//! own pacer and windows are set wide enough never to decide anything. Where no capacity is configured, the link controller finds the rate
//! by probing; nothing is admitted by a rate then, since that would hold the probes back, and a connection for lanes keeps its send window
//! a little above what flies. Several bulk connections of a link have equal shares of its rate, and its peer's bucket keeps the whole of it.
//!
//! This folder does not know what a page or a migration is.

mod accept;
mod bulk;
mod bundle;
mod congestion;
mod datagram_size;
mod dial;
mod endpoint;
mod identity;
mod lane;
mod link;
mod network;
mod paced_socket;
mod roaming;
mod tls;
mod trust;
pub mod tuning;
mod udp;

pub use accept::Incoming;
pub use bulk::Bulk;
pub use bundle::Bundle;
pub use dial::{DialCause, DialError, PeerTarget};
pub use endpoint::{BindError, Transport, TransportSettings};
pub use identity::{CERTIFICATE_LIFETIME, Identity, IdentityError, RENEW_BEFORE_EXPIRY};
pub use lane::{LaneError, next_chunk, read_lane, send_lane};
pub use link::{CloseCode, ConnectionMeasures, Doubling, LinkMeasures, PeerConnection, PeerLink};
pub use network::{Network, Udp};
pub use tls::ConnectionKind;
pub use trust::{Fingerprint, InvalidFingerprint, TrustAnchors};
