//! Follows peers whose address changes: behind a NAT that forgot them, or with another uplink.
//!
//! quinn takes up a connection from wherever its packets come, proves the new address (RFC 9000, 9) and tells nobody. The paced
//! socket notices first, as it has no route for that destination; then each connection looks whether it is its peer that has moved.
//! From another IP address, and always over IPv6, quinn starts anew with the round trip time, the MTU and a controller from the factory,
//! whose rate the route must read from then on.
//!
//! What others can do with it: a peer that keeps moving is sent what quinn's pacer and the strangers' bucket let pass for the first
//! [`PAUSE`] at each address, and before it answers from there at most three times what it sent (RFC 9000, 8.1). Who replays a peer's
//! packets from elsewhere without being able to answer there holds the connection up for three probe timeouts, after which quinn
//! returns to the old address. Strangers' handshakes make every connection look once in a [`PAUSE`].

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::link::Inner;

/// Lets the route of `connection`, whose peer was at `listed`, follow it for as long as it is open. `strange` tells of packets without a route.
pub(super) async fn follow(connection: Weak<Inner>, mut listed: SocketAddr, strange: Arc<Notify>) {
    loop {
        tokio::select! {
            () = strange.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
        let Some(inner) = connection.upgrade().filter(|inner| !inner.is_closed()) else {
            return;
        };
        listed = inner.follow(listed);
        drop(inner);
        tokio::time::sleep(PAUSE).await;
    }
}

/// Between two looks, however many packets go to strangers.
const PAUSE: Duration = Duration::from_millis(20);

/// A look that nobody asked for: the peer may have moved to where another's route still is.
const LOOK: Duration = Duration::from_secs(1);
