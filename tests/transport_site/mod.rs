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
        }
    }
}

/// The two connections that a peer's dial makes, in whatever order they came.
pub(crate) fn link_of(one: Incoming, two: Incoming) -> PeerLink {
    let (control, bulk) = if one.kind == ConnectionKind::Control {
        (one, two)
    } else {
        (two, one)
    };
    assert_eq!(
        (control.kind, bulk.kind),
        (ConnectionKind::Control, ConnectionKind::Bulk)
    );
    PeerLink::new(control.connection, bulk.connection)
}
