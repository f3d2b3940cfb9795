//! Bulk connections that were dialled together, and how the other end knows them.
//!
//! One task drives a connection, so one core does. Where a link carries more than that, several connections share it, each from a port of
//! its own, which is also what routers spread flows by. They name their bundle where TLS has the name of a server (RFC 6066, 3), readable by
//! anybody on the path: a random number that means nothing elsewhere, and how many they are.
//!
//! ```text
//! 0123456789abcdef.3.bulk.invalid
//! ```

use crate::proto::page::ByteRate;
use crate::transport::tuning::MOST_BULK_CONNECTIONS;

/// What connections with a bundle's name speak. Another protocol than that of a single one: a gateway that knows no bundles would let each
/// of them end the one before it.
pub(super) const ALPN: &[u8] = b"longhaul-bulk/2";

const SUFFIX: &str = ".bulk.invalid";

/// Which connections lanes are spread over together; never equal for connections of two dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bundle {
    id: u64,
    connections: u8,
}

impl Bundle {
    /// A new one of so many connections.
    ///
    /// # Panics
    /// Where the kernel has no randomness to give: then no connection can be made either.
    pub(super) fn of(connections: u8) -> Self {
        Self {
            id: getrandom::u64().expect("the kernel gives random bytes"),
            connections,
        }
    }

    /// A single connection.
    pub(super) fn alone() -> Self {
        Self::of(1)
    }

    /// How many connections it has, at the most: 1 to [`MOST_BULK_CONNECTIONS`].
    #[must_use]
    pub fn connections(self) -> u8 {
        self.connections
    }

    pub(super) fn is_alone(self) -> bool {
        self.connections == 1
    }

    /// What one connection has of what all of them have together.
    pub(super) fn part(self, of_all: u64) -> u64 {
        of_all / u64::from(self.connections)
    }

    /// What one connection may send where all of them may send `rate`.
    pub(super) fn share(self, rate: ByteRate) -> ByteRate {
        ByteRate(self.part(rate.0))
    }

    /// As it is in the handshake.
    pub(super) fn name(self) -> String {
        format!("{:016x}.{}{SUFFIX}", self.id, self.connections)
    }

    /// `None` for what is no bundle's name.
    pub(super) fn named(name: &str) -> Option<Self> {
        let (id, connections) = name.strip_suffix(SUFFIX)?.split_once('.')?;
        let bundle = Self {
            id: u64::from_str_radix(id, 16).ok()?,
            connections: connections.parse().ok()?,
        };
        // One way to write it, so that two names are two bundles.
        let is_allowed = (2..=MOST_BULK_CONNECTIONS).contains(&bundle.connections);
        (is_allowed && bundle.name() == name).then_some(bundle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_known_by_its_name_and_nothing_else_is_one() {
        for connections in 2..=MOST_BULK_CONNECTIONS {
            let bundle = Bundle::of(connections);
            assert_eq!(Bundle::named(&bundle.name()), Some(bundle));
            assert_ne!(Bundle::of(connections), bundle);
        }
        let name = |id: &str, connections: &str| format!("{id}.{connections}{SUFFIX}");
        let id = "0123456789abcdef";
        assert!(Bundle::named(&name(id, "8")).is_some());
        for (id, connections) in [
            (id, "0"),
            (id, "1"),
            (id, "9"),
            (id, "03"),
            (id, ""),
            ("1", "3"),
            ("g", "3"),
            ("", "3"),
        ] {
            assert_eq!(Bundle::named(&name(id, connections)), None, "{id} {connections}");
        }
        for other in ["", "gateway.invalid", SUFFIX] {
            assert_eq!(Bundle::named(other), None, "{other}");
        }
    }

    #[test]
    fn the_shares_of_a_bundle_never_come_to_more_than_the_whole() {
        let bundle = Bundle::of(3);
        assert_eq!(bundle.share(ByteRate(100)), ByteRate(33));
        assert_eq!(Bundle::alone().share(ByteRate(100)), ByteRate(100));
    }
}
