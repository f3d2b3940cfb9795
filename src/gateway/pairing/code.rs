//! The invitation code: one line that carries everything the other site needs to call and to prove that it was invited.
//!
//! ```text
//! lh1.BASE64URL( postcard(site, address, fingerprint, secret, expires) ‖ first 4 bytes of their BLAKE3 )
//! ```
//!
//! The checksum is for people: a code that lost a character in a chat is told from one that was never valid.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use crate::config::units::{PeerAddress, parse_name};
use crate::store::trust::Fingerprint;

/// What proves that a gateway was invited: 256 random bits. Never shown but in the code itself.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// An invitation of the gateway at `site`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InviteCode {
    /// Name of the site that invites.
    pub site: String,
    /// Where its gateway is called.
    pub address: PeerAddress,
    /// Of its public key: whoever answers with another key is not it.
    pub fingerprint: Fingerprint,
    /// Shared by the two sites only.
    pub secret: Secret,
    /// When it expires, in seconds since 1970 UTC, for people; the gateway that invites judges by its own clock.
    pub expires_at: u64,
}

/// The code as bytes. Fields are in the order of the wire.
#[derive(Serialize, Deserialize)]
struct Contents<'a> {
    site: &'a str,
    host: &'a str,
    port: u16,
    fingerprint: [u8; 32],
    secret: [u8; 32],
    expires_at: u64,
}

impl fmt::Display for InviteCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let contents = Contents {
            site: &self.site,
            host: &self.address.host,
            port: self.address.port,
            fingerprint: self.fingerprint.0,
            secret: self.secret.0,
            expires_at: self.expires_at,
        };
        let mut bytes = postcard::to_stdvec(&contents).map_err(|_| fmt::Error)?;
        bytes.extend_from_slice(&checksum(&bytes));
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for InviteCode {
    type Err = InvalidCode;

    fn from_str(text: &str) -> Result<Self, InvalidCode> {
        let text = text.trim();
        if text.len() > MAX_CODE_BYTES {
            return Err(InvalidCode::Damaged);
        }
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            let other_version = text.strip_prefix("lh").and_then(|rest| rest.split_once('.'));
            return Err(match other_version {
                Some((version, _)) if version.parse::<u32>().is_ok() => InvalidCode::OtherVersion,
                _ => InvalidCode::NoCode,
            });
        };
        let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| InvalidCode::Damaged)?;
        let (bytes, sum) = bytes.split_last_chunk::<4>().ok_or(InvalidCode::Damaged)?;
        if checksum(bytes) != *sum {
            return Err(InvalidCode::Damaged);
        }
        let (contents, rest) = postcard::take_from_bytes::<Contents<'_>>(bytes).map_err(|_| InvalidCode::Damaged)?;
        if !rest.is_empty() {
            return Err(InvalidCode::Damaged);
        }
        // The text form checks host and port.
        let address = PeerAddress {
            host: contents.host.to_owned(),
            port: contents.port,
        };
        Ok(Self {
            site: parse_name(contents.site).map_err(|_| InvalidCode::Damaged)?,
            address: address.to_string().parse().map_err(|_| InvalidCode::Damaged)?,
            fingerprint: Fingerprint(contents.fingerprint),
            secret: Secret(contents.secret),
            expires_at: contents.expires_at,
        })
    }
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut sum = [0; 4];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..4]);
    sum
}

/// A text is not an invitation that can be used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCode {
    /// It does not look like one.
    #[error(
        "this is not an invitation code; `longhaul pair --invite` at the other site prints one, starting with lh1."
    )]
    NoCode,
    /// Another version made it.
    #[error("another version of longhaul made this invitation code; run the same version at both sites")]
    OtherVersion,
    /// It was changed on its way.
    #[error("the invitation code is damaged: copy the whole line again, or ask for a new one")]
    Damaged,
}

const PREFIX: &str = "lh1.";

/// With the longest site (63 bytes) and host (253 bytes) a code has 537 characters.
const MAX_CODE_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn code() -> InviteCode {
        InviteCode {
            site: "frankfurt".into(),
            address: "gw.frankfurt.example.net:4646".parse().unwrap(),
            fingerprint: Fingerprint([1; 32]),
            secret: Secret([2; 32]),
            expires_at: 1_800_000_000,
        }
    }

    #[test]
    fn a_code_is_one_line_that_survives_a_chat() {
        let text = code().to_string();
        assert!(
            text.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)),
            "{text}"
        );
        assert_eq!(text.parse(), Ok(code()));
        assert_eq!(format!("  {text}\n").parse(), Ok(code()));
        let longest = InviteCode {
            site: "s".repeat(63),
            address: PeerAddress {
                host: "h".repeat(253),
                port: 65534,
            },
            expires_at: u64::MAX,
            ..code()
        };
        let text = longest.to_string();
        assert!(text.len() <= MAX_CODE_BYTES, "{}", text.len());
        assert_eq!(text.parse(), Ok(longest));
    }

    #[test]
    fn a_code_that_lost_or_changed_a_character_is_damaged() {
        let text = code().to_string();
        for index in PREFIX.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[index] = if changed[index] == b'A' { b'B' } else { b'A' };
            assert_eq!(
                String::from_utf8(changed).unwrap().parse::<InviteCode>(),
                Err(InvalidCode::Damaged)
            );
            let shorter = format!("{}{}", &text[..index], &text[index + 1..]);
            assert_eq!(shorter.parse::<InviteCode>(), Err(InvalidCode::Damaged));
        }
        assert_eq!("hello".parse::<InviteCode>(), Err(InvalidCode::NoCode));
        assert_eq!(
            text.replace("lh1.", "lh2.").parse::<InviteCode>(),
            Err(InvalidCode::OtherVersion)
        );
    }

    #[test]
    fn the_secret_is_never_in_what_is_logged() {
        assert!(!format!("{:?}", code()).contains("2, 2"));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,80}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = text.parse::<InviteCode>();
            let mut summed = bytes.clone();
            summed.extend_from_slice(&checksum(&bytes));
            let _ = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(summed)).parse::<InviteCode>();
        }
    }
}
