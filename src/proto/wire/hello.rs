//! What gateways agree on when a control connection opens, before any migration is named.

use serde::{Deserialize, Serialize};

use crate::proto::page::JournalId;

/// Newest version of the wire format that this gateway speaks.
pub const VERSION: u16 = 12;

/// First version in which a stream's end is protected by [`super::repair`]s.
pub const REPAIRS: u16 = 2;

/// First version in which links can be tested without a migration.
pub const LINK_TESTS: u16 = 3;

/// First version in which payloads may have deltas and zstd.
pub const DELTAS: u16 = 4;

/// First version in which a session may begin with what an earlier migration left at both sites.
pub const IMAGES: u16 = 5;

/// First version in which several coders may make the payloads of a session.
pub const CODERS: u16 = 6;

/// First version in which a hello may come again: what was agreed on a link is made anew.
pub const HELLO_AGAIN: u16 = 7;

/// First version in which other programs' streams are carried.
pub const TUNNELS: u16 = 8;

/// First version in which a VM's disks are copied with it.
pub const DISKS: u16 = 9;

/// First version in which a destination says, asked, what its disks hold already.
pub const HELD_DISKS: u16 = 10;

/// First version in which a VM that is off moves, which is its disks.
pub const COLD: u16 = 11;

/// First version in which the source says where disks are put.
pub const PLACES: u16 = 12;

/// Oldest version that this gateway still speaks.
pub const OLDEST_VERSION: u16 = 1;

/// First message of both sides on a control connection, and again when a link has been standing for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest wire version spoken.
    pub oldest_version: u16,
    /// Newest wire version spoken.
    pub newest_version: u16,
    /// Name of the site, for the other side's log.
    pub site: String,
    /// Release of the software, for the other side's log.
    pub software: String,
    /// The ownership journal behind this gateway. A peer whose journal changed while a migration is open is in doubt.
    pub journal: JournalId,
    /// What this gateway can hold.
    pub limits: Limits,
}

/// What a gateway can hold for one migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of frames that the other side may have on the way: sent and not acknowledged by the decoder.
    pub window_bytes: u64,
    /// Pages that the session dictionary may hold.
    pub dictionary_pages: u32,
}

/// What both sides speak from here on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Wire version.
    pub version: u16,
    /// The smaller of both sides' limits.
    pub limits: Limits,
}

impl Hello {
    /// The hello of this software.
    #[must_use]
    pub fn new(site: String, journal: JournalId, limits: Limits) -> Self {
        Self {
            oldest_version: OLDEST_VERSION,
            newest_version: VERSION,
            site,
            software: concat!("longhaul ", env!("CARGO_PKG_VERSION")).to_owned(),
            journal,
            limits,
        }
    }

    /// The highest version that both speak, and the smaller limits. Symmetric: both sides come to the same agreement.
    ///
    /// # Errors
    /// [`HelloError`] where no version is common or the peer's limits cannot carry a single frame.
    pub fn agree(&self, peer: &Self) -> Result<Agreement, HelloError> {
        let version = self.newest_version.min(peer.newest_version);
        if version < self.oldest_version.max(peer.oldest_version) {
            return Err(HelloError::NoCommonVersion {
                ours: (self.oldest_version, self.newest_version),
                theirs: (peer.oldest_version, peer.newest_version),
            });
        }
        let limits = Limits {
            window_bytes: self.limits.window_bytes.min(peer.limits.window_bytes),
            dictionary_pages: self.limits.dictionary_pages.min(peer.limits.dictionary_pages),
        };
        if limits.window_bytes < MIN_WINDOW {
            return Err(HelloError::WindowTooSmall {
                window_bytes: limits.window_bytes,
            });
        }
        Ok(Agreement { version, limits })
    }
}

/// Two of the largest frames: less could not keep a lane busy.
pub const MIN_WINDOW: u64 = 2 * (super::frame::MAX_PAYLOAD + super::frame::HEADER_LEN) as u64;

/// The gateways cannot work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// One is too old for the other.
    #[error("this gateway speaks wire versions {}-{}, the peer {}-{}: upgrade the older one", ours.0, ours.1, theirs.0, theirs.1)]
    NoCommonVersion {
        /// Oldest and newest version here.
        ours: (u16, u16),
        /// Oldest and newest version at the peer.
        theirs: (u16, u16),
    },
    /// The agreed window could not hold two frames.
    #[error("a window of {window_bytes} bytes is too small to carry frames: raise memory_budget")]
    WindowTooSmall {
        /// The smaller window of both sides.
        window_bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(oldest: u16, newest: u16, window: u64) -> Hello {
        let limits = Limits {
            window_bytes: window,
            dictionary_pages: 7,
        };
        Hello {
            oldest_version: oldest,
            newest_version: newest,
            ..Hello::new("a".into(), JournalId([1; 16]), limits)
        }
    }

    #[test]
    fn both_sides_come_to_the_same_agreement() {
        let (a, b) = (hello(1, 3, MIN_WINDOW), hello(2, 5, MIN_WINDOW + 9));
        assert_eq!(a.agree(&b), b.agree(&a));
        assert_eq!(a.agree(&b).map(|agreement| agreement.version), Ok(3));
    }

    #[test]
    fn versions_that_touch_agree_and_versions_that_do_not_are_refused() {
        assert!(hello(1, 2, MIN_WINDOW).agree(&hello(2, 3, MIN_WINDOW)).is_ok());
        assert!(hello(1, 1, MIN_WINDOW).agree(&hello(2, 3, MIN_WINDOW)).is_err());
        assert!(hello(1, 1, MIN_WINDOW).agree(&hello(1, 1, MIN_WINDOW - 1)).is_err());
    }
}
