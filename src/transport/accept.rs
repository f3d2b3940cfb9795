//! Connections that peers open: handshakes under limits, and nothing kept for those who fail them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use quinn::VarInt;
use tokio::sync::{Semaphore, mpsc};

use super::congestion;
use super::endpoint::{Listener, Shared};
use super::link::{CloseCode, Path, PeerConnection};
use super::paced_socket::{Priority, Route};
use super::roaming;
use super::tls::{ConnectionKind, peer_fingerprint};
use super::trust::Fingerprint;

/// Handshakes that run at a time, on each socket; further ones are refused.
pub(super) const MAX_HANDSHAKES: usize = 64;

/// From this many on, a client must first show that its address is its own (a Retry, one more round trip).
const RETRY_FROM: usize = 8;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that a peer opened.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// What it is for.
    pub kind: ConnectionKind,
    /// The key that the peer proved to hold.
    pub fingerprint: Fingerprint,
    /// The peer's name here; `None` only for [`ConnectionKind::Pairing`] with a gateway that is not known yet.
    pub peer: Option<String>,
    /// The connection.
    pub connection: PeerConnection,
}

/// Takes connections from `listener` until it is closed.
pub(super) async fn run(shared: Arc<Shared>, listener: Listener, accepted: mpsc::Sender<Incoming>) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = listener.endpoint.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let running = MAX_HANDSHAKES - handshakes.available_permits();
        if running > RETRY_FROM && !incoming.remote_address_validated() && incoming.may_retry() {
            // Fails only where a retry is not possible, which was just asked.
            let _ = incoming.retry();
            continue;
        }
        let (shared, listener, accepted) = (shared.clone(), listener.clone(), accepted.clone());
        tokio::spawn(async move {
            if let Some(incoming) = handshake(&shared, &listener, incoming).await {
                // The permit is held until the gateway takes the connection, so that a busy gateway refuses new ones.
                let _ = accepted.send(incoming).await;
            }
            drop(permit);
        });
    }
}

async fn handshake(shared: &Shared, listener: &Listener, incoming: quinn::Incoming) -> Option<Incoming> {
    let address = incoming.remote_address();
    let connecting = match incoming.accept() {
        Ok(connecting) => connecting,
        Err(error) => {
            tracing::debug!(%address, %error, "a connection attempt was malformed");
            return None;
        }
    };
    let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::info!(%address, %error, "a handshake failed");
            return None;
        }
        Err(_) => {
            tracing::info!(%address, "a handshake did not end in time");
            return None;
        }
    };
    let (kind, bundle) = ConnectionKind::of_handshake(connection.handshake_data())?;
    let fingerprint = peer_fingerprint(connection.peer_identity())?;
    let peer = shared.trust.peer(&fingerprint);
    let budget = match &peer {
        Some(name) => shared.budget(name),
        None => Arc::default(),
    };
    let priority = if kind == ConnectionKind::Bulk {
        Priority::Bulk
    } else {
        Priority::Control
    };
    let rate = congestion::rate_of(&connection);
    let route = Arc::new(Route::new(priority, rate, budget.clone(), shared.link.clone()));
    let address = connection.remote_address();
    listener.socket.add_route(address, &route);
    let window = bundle.part(listener.window);
    if window < listener.window {
        // What it was granted in the handshake and sends before it is read comes on top, once.
        connection.set_receive_window(VarInt::from_u64(window).unwrap_or(VarInt::MAX));
    }
    let path = Path {
        route,
        budget,
        socket: listener.socket.clone(),
        window,
        endpoint: None,
        bundle,
    };
    let connection = PeerConnection::new(connection, peer.clone(), fingerprint, kind, path);
    shared.register(&connection);
    tokio::spawn(roaming::follow(
        Arc::downgrade(connection.inner()),
        address,
        listener.socket.strange(),
    ));

    // Trust may have been withdrawn during the handshake; from here on close_peer finds the connection.
    let allowed = match kind {
        ConnectionKind::Pairing => peer.is_some() || shared.invitation.load(Ordering::Acquire),
        ConnectionKind::Control | ConnectionKind::Bulk => shared.trust.contains(&fingerprint),
    };
    if !allowed {
        connection.close_with(CloseCode::Unpaired, "this gateway does not trust your key");
        return None;
    }
    Some(Incoming {
        kind,
        fingerprint,
        peer,
        connection,
    })
}
