//! Whom this site trusts: peers by the fingerprint of their public key, looked up live in every handshake.
//!
//! The fingerprint is SHA-256 over the DER of the SubjectPublicKeyInfo (RFC 5280, 4.1.2.7), as HTTP public key pins
//! were (RFC 7469, 2.4). It names the key, not the certificate, so trust survives the renewal of a certificate.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;

pub use crate::store::fingerprint::{Fingerprint, InvalidFingerprint};

/// The peers that are trusted at this moment. Handshakes read it without a lock; a change takes effect for the next one.
#[derive(Debug, Default)]
pub struct TrustAnchors(ArcSwap<HashMap<Fingerprint, String>>);

impl TrustAnchors {
    /// Trusts these keys under these peer names.
    #[must_use]
    pub fn new(peers: HashMap<Fingerprint, String>) -> Self {
        Self(ArcSwap::from_pointee(peers))
    }

    /// The peer who owns this key, if it is trusted.
    #[must_use]
    pub fn peer(&self, key: &Fingerprint) -> Option<String> {
        self.0.load().get(key).cloned()
    }

    /// Whether this key is trusted.
    #[must_use]
    pub fn contains(&self, key: &Fingerprint) -> bool {
        self.0.load().contains_key(key)
    }

    /// Trusts `key` as `peer`. A peer may have several keys while it moves to a new one.
    pub fn insert(&self, key: Fingerprint, peer: &str) {
        self.0.rcu(|current| {
            let mut next = HashMap::clone(current);
            next.insert(key, peer.to_owned());
            next
        });
    }

    /// Stops trusting every key of `peer`; says whether there was one. Connections that exist are closed by
    /// [`Transport::close_peer`](super::Transport::close_peer).
    pub fn remove(&self, peer: &str) -> bool {
        let before = self.0.rcu(|current| {
            let mut next = HashMap::clone(current);
            next.retain(|_, name| name != peer);
            next
        });
        before.values().any(|name| name == peer)
    }

    /// Trusts exactly these keys from now on.
    pub fn replace(&self, peers: HashMap<Fingerprint, String>) {
        self.0.store(Arc::new(peers));
    }

    /// Everything that is trusted now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<HashMap<Fingerprint, String>> {
        self.0.load_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removing_a_peer_removes_all_its_keys_and_nothing_else() {
        let trust = TrustAnchors::default();
        let [one, two, three] = [1, 2, 3].map(|byte| Fingerprint([byte; 32]));
        trust.insert(one, "tokyo");
        trust.insert(two, "tokyo");
        trust.insert(three, "oslo");
        assert!(trust.remove("tokyo"));
        assert!(!trust.remove("tokyo"));
        assert!(!trust.contains(&one) && !trust.contains(&two));
        assert_eq!(trust.peer(&three).as_deref(), Some("oslo"));
    }
}
