//! How people write quantities and names: durations and sizes with their unit, site and VM names, addresses of
//! gateways.
//!
//! A bare number is refused everywhere, since nobody can tell milliseconds from seconds or megabytes from mebibytes.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// UDP port on which a gateway listens and is called when nothing else is said.
pub const DEFAULT_PORT: u16 = 4646;

/// The duration that `text` states: a number with `us`, `ms`, `s`, `m` or `h`.
///
/// # Errors
/// [`InvalidDuration`] without a unit, for zero, and for more than 10 000 hours.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidDuration> {
    let seconds = quantity(
        text,
        &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)],
    );
    seconds
        .filter(|seconds| *seconds <= 3.6e7)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or(InvalidDuration)
}

/// The largest unit in which `duration` is a whole number: `500ms`, `30m`. Anything below a microsecond is dropped.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    for (unit, size) in [("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000)] {
        if micros >= size && micros.is_multiple_of(size) {
            return format!("{}{unit}", micros / size);
        }
    }
    format!("{micros}us")
}

/// The bytes that `text` states: a number with `b`, `kib`, `mib`, `gib`, `tib` (powers of 1024) or `kb`, `mb`, `gb`,
/// `tb` (powers of 1000).
///
/// # Errors
/// [`InvalidSize`] without a unit, below one byte, and for 2^53 bytes or more.
pub fn parse_size(text: &str) -> Result<u64, InvalidSize> {
    const UNITS: [(&str, f64); 9] = [
        ("kib", 1024.0),
        ("mib", 1_048_576.0),
        ("gib", 1_073_741_824.0),
        ("tib", 1_099_511_627_776.0),
        ("kb", 1e3),
        ("mb", 1e6),
        ("gb", 1e9),
        ("tb", 1e12),
        ("b", 1.0),
    ];
    let bytes = quantity(&text.to_ascii_lowercase(), &UNITS).ok_or(InvalidSize)?;
    if !(1.0..9_007_199_254_740_992.0).contains(&bytes) {
        return Err(InvalidSize);
    }
    Ok(bytes as u64)
}

/// `bytes` in the largest binary unit that gives a whole number: `512mib`.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    for (unit, shift) in [("tib", 40), ("gib", 30), ("mib", 20), ("kib", 10)] {
        if bytes >= 1 << shift && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes}b")
}

/// The value of a decimal number followed by one of `units`, in the base unit. Exponents, signs and bare numbers are
/// refused.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let (_, size) = units.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<f64>().ok().map(|number| number * size)
}

/// The name of a site, a peer or a VM: 1 to 63 of `A-Z a-z 0-9 . _ -`, the first a letter or digit. It goes into file
/// names, metric labels and argument vectors, where such a name needs no quoting.
///
/// # Errors
/// [`InvalidName`] for anything else.
pub fn parse_name(text: &str) -> Result<String, InvalidName> {
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if first && rest && text.len() <= 63 {
        Ok(text.to_owned())
    } else {
        Err(InvalidName)
    }
}

/// Where a gateway is called: a host name or IP address and its UDP port. Bulk data uses the port after it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerAddress {
    /// DNS name, IPv4 address, or IPv6 address without brackets.
    pub host: String,
    /// UDP port of the control connection, 1 to 65534.
    pub port: u16,
}

impl FromStr for PeerAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, port) = rest.split_once(']').ok_or(InvalidAddress)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| InvalidAddress)?;
            (
                host,
                if port.is_empty() {
                    None
                } else {
                    Some(port.strip_prefix(':').ok_or(InvalidAddress)?)
                },
            )
        } else if text.parse::<std::net::Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        let port = match port {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().map_err(|_| InvalidAddress)?
            }
            Some(_) => return Err(InvalidAddress),
            None => DEFAULT_PORT,
        };
        let is_host = |host: &str| {
            let name = host
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
            (1..=253).contains(&host.len()) && (name || host.parse::<std::net::Ipv6Addr>().is_ok())
        };
        if !is_host(host) || port == 0 || port == u16::MAX {
            return Err(InvalidAddress);
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl TryFrom<String> for PeerAddress {
    type Error = InvalidAddress;

    fn try_from(text: String) -> Result<Self, InvalidAddress> {
        text.parse()
    }
}

impl From<PeerAddress> for String {
    fn from(address: PeerAddress) -> Self {
        address.to_string()
    }
}

/// A text is not a duration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a duration with its unit, for example 500ms, 90s, 30m or 2h")]
pub struct InvalidDuration;

/// A text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a size with its unit, for example 512mib or 4gib")]
pub struct InvalidSize;

/// A text is not a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to 63 letters, digits, dots, underscores or hyphens and starts with a letter or digit")]
pub struct InvalidName;

/// A text is not the address of a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a host and a UDP port from 1 to 65534, for example gw.example.net:4646 or [2001:db8::7]:4646")]
pub struct InvalidAddress;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_duration_needs_its_unit_and_is_shown_as_it_was_written() {
        for text in ["500ms", "90s", "30m", "2h", "250us", "1s"] {
            assert_eq!(parse_duration(text).map(show_duration).as_deref(), Ok(text));
        }
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        for bad in [
            "",
            "5",
            "ms",
            "-1s",
            "0s",
            "1e3s",
            "5 minutes",
            "nans",
            "20000h",
            "1..5s",
            "é",
        ] {
            assert_eq!(parse_duration(bad), Err(InvalidDuration), "{bad}");
        }
    }

    #[test]
    fn a_size_needs_its_unit_and_is_shown_in_binary_units() {
        for (text, bytes, shown) in [
            ("512mib", 512 << 20, "512mib"),
            ("4GiB", 4 << 30, "4gib"),
            ("1kb", 1000, "1000b"),
        ] {
            assert_eq!(parse_size(text), Ok(bytes));
            assert_eq!(show_size(bytes), shown);
        }
        for bad in ["", "512", "512m", "-1mib", "0b", "99999tib", "1e3kb"] {
            assert_eq!(parse_size(bad), Err(InvalidSize), "{bad}");
        }
    }

    #[test]
    fn a_name_needs_no_quoting_anywhere() {
        assert_eq!(parse_name("db-1.tokyo_a"), Ok("db-1.tokyo_a".to_owned()));
        assert!(parse_name(&"x".repeat(63)).is_ok());
        for bad in ["", "-rf", ".hidden", "a b", "a/b", "ü", "a\n", &"x".repeat(64)] {
            assert_eq!(parse_name(bad), Err(InvalidName), "{bad:?}");
        }
    }

    #[test]
    fn an_address_is_a_host_with_a_port_or_the_default_port() {
        for (text, shown) in [
            ("gw.example.net", "gw.example.net:4646"),
            ("198.51.100.7:5000", "198.51.100.7:5000"),
            ("2001:db8::7", "[2001:db8::7]:4646"),
            ("[2001:db8::7]:5000", "[2001:db8::7]:5000"),
        ] {
            assert_eq!(
                text.parse::<PeerAddress>()
                    .map(|address| address.to_string())
                    .as_deref(),
                Ok(shown)
            );
        }
        for bad in [
            "",
            ":4646",
            "host:",
            "host:0",
            "host:65535",
            "host:65536",
            "host:+1",
            "a b:1",
            "[host]:1",
            "[::1",
            "a:1:2",
        ] {
            assert_eq!(bad.parse::<PeerAddress>(), Err(InvalidAddress), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_unit_parser_panic(text in ".{0,40}") {
            let _ = (parse_duration(&text), parse_size(&text), parse_name(&text), text.parse::<PeerAddress>());
        }
    }
}
