//! Whom this site trusts: peers by the fingerprint of their public key, looked up live in every handshake.
//!
//! The fingerprint is SHA-256 over the DER of the SubjectPublicKeyInfo (RFC 5280, 4.1.2.7), as HTTP public key pins
//! were (RFC 7469, 2.4). It names the key, not the certificate, so trust survives the renewal of a certificate.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::proto::page::{hex, unhex};

/// Names a gateway by its public key. Shown as `sha256:` and eight groups of eight hexadecimal digits, which two people can
/// read to each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a public key, given as the DER of its SubjectPublicKeyInfo.
    #[must_use]
    pub fn of_public_key(spki: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, spki).as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        for (index, group) in self.0.chunks(4).enumerate() {
            let separator = if index == 0 { "" } else { "-" };
            write!(f, "{separator}{}", hex(group))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Reads what [`Display`](fmt::Display) shows; upper case, missing or other separators (`-`, `:`, blanks) are accepted,
/// since people type it.
impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let text = text.trim();
        // 64 digits, each with a separator, is the longest that a person would type.
        if text.len() > 160 {
            return Err(InvalidFingerprint);
        }
        let digits = text
            .split_at_checked(7)
            .filter(|(prefix, _)| prefix.eq_ignore_ascii_case("sha256:"))
            .map_or(text, |(_, digits)| digits);
        let digits: String = digits.chars().filter(|c| !matches!(c, '-' | ':' | ' ')).collect();
        unhex(&digits).map(Self).map_err(|_| InvalidFingerprint)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A text is not a fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is sha256: and 64 hexadecimal digits")]
pub struct InvalidFingerprint;

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
    fn a_fingerprint_survives_its_text_however_it_is_typed() {
        let key = Fingerprint::of_public_key(b"key");
        let shown = key.to_string();
        assert_eq!(shown.len(), "sha256:".len() + 64 + 7);
        let bare = shown.trim_start_matches("sha256:").replace('-', "");
        for typed in [
            shown.clone(),
            shown.to_uppercase(),
            bare.clone(),
            format!("  {shown} "),
            bare.replace("00", "00:"),
        ] {
            assert_eq!(typed.parse(), Ok(key), "{typed}");
        }
        for bad in [
            "",
            "sha256:",
            &bare[1..],
            &format!("{bare}0"),
            &"é".repeat(32),
            &"-".repeat(500),
            "sha512:00",
        ] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(InvalidFingerprint), "{bad}");
        }
    }

    #[test]
    fn the_fingerprint_is_plain_sha_256() {
        // FIPS 180-4, the example "abc".
        let expected = "ba7816bf-8f01cfea-414140de-5dae2223-b00361a3-96177a9c-b410ff61-f20015ad";
        assert_eq!(
            Fingerprint::of_public_key(b"abc").to_string(),
            format!("sha256:{expected}")
        );
    }

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
