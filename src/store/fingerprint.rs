//! How a gateway is named by its public key: SHA-256 over the DER of the SubjectPublicKeyInfo (RFC 5280, 4.1.2.7). It
//! names the key, not the certificate, so that trust survives a renewal.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::proto::page::{hex, unhex};

/// SHA-256 of a public key. Shown as `sha256:` and eight groups of eight hexadecimal digits, which two people can
/// compare.
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
        let groups: Vec<String> = self.0.chunks(4).map(hex).collect();
        write!(f, "sha256:{}", groups.join("-"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Reads what is shown, in either case, with or without `sha256:` and any of `-`, `:` and blanks between digits, since
/// people type it.
impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        if text.len() > MAX_TYPED_BYTES {
            return Err(InvalidFingerprint);
        }
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower
            .strip_prefix("sha256:")
            .unwrap_or(&lower)
            .replace(['-', ':', ' '], "");
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

/// 64 digits with a separator after each, the prefix, and blanks.
const MAX_TYPED_BYTES: usize = 160;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_survives_its_text_however_it_is_typed() {
        let fingerprint = Fingerprint(std::array::from_fn(|index| index as u8 * 7));
        let shown = fingerprint.to_string();
        let bare = shown.trim_start_matches("sha256:").replace('-', "");
        for typed in [
            shown.clone(),
            shown.to_uppercase(),
            bare.clone(),
            format!(" {} ", shown.replace('-', ":")),
        ] {
            assert_eq!(typed.parse(), Ok(fingerprint), "{typed}");
        }
        for bad in [
            "",
            "sha256:",
            &bare[1..],
            &format!("{bare}0"),
            &"é".repeat(32),
            &"-".repeat(500),
            "md5:00",
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
}
