//! One site's transport, for tests of the transport alone.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use longhaul::proto::page::ByteRate;
use longhaul::transport::{
    ConnectionKind, Identity, Incoming, Network, PeerLink, PeerTarget, Transport, TransportSettings, TrustAnchors,
};

pub(crate) struct Site {
    _state_dir: tempfile::TempDir,
    pub(crate) identity: Arc<Identity>,
    pub(crate) trust: Arc<TrustAnchors>,
    pub(crate) transport: Transport,
}

impl Site {
    pub(crate) fn on(network: Arc<dyn Network>, created: SystemTime, settings: TransportSettings) -> Self {
        let state_dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(state_dir.path(), created).unwrap();
        let trust = Arc::new(TrustAnchors::default());
        let transport = Transport::bind_on(network, settings, identity.clone(), trust.clone()).unwrap();
        Self {
            _state_dir: state_dir,
            identity,
            trust,
            transport,
        }
    }

    pub(crate) fn trusts(&self, peer: &Site, name: &str) {
        self.trust.insert(peer.identity.fingerprint(), name);
    }

    pub(crate) fn as_target(&self, name: &str, rate: Option<ByteRate>, rtt: Duration) -> PeerTarget {
        PeerTarget {
            name: name.to_owned(),
            control_address: self.transport.control_address(),
            bulk_address: Some(self.transport.bulk_address()),
            fingerprint: self.identity.fingerprint(),
            rate,
            rate_now: None,
            rtt,
            bulk_connections: None,
        }
    }
}

/// The link that a peer dials with so many bulk connections, in whatever order they come.
pub(crate) async fn accept_link(transport: &Transport, bulk_connections: u8) -> PeerLink {
    let mut incoming = Vec::new();
    for _ in 0..=bulk_connections {
        incoming.push(transport.accept().await.expect("the transport runs"));
    }
    let (control, bulk): (Vec<Incoming>, Vec<Incoming>) = incoming
        .into_iter()
        .partition(|incoming| incoming.kind == ConnectionKind::Control);
    assert!(control.len() == 1 && bulk.iter().all(|incoming| incoming.kind == ConnectionKind::Bulk));
    let bulk = bulk.into_iter().map(|incoming| incoming.connection).collect();
    PeerLink::new(control[0].connection.clone(), bulk)
}
