//! How large the datagrams of a socket become, and so how many of them fit into one `sendmsg`.
//!
//! Linux takes at most 65507 bytes at a time, however many datagrams they are, and quinn takes its refusal for a lost packet: ten
//! segments of a jumbo path would never leave. quinn finds each connection's MTU and tells its controller before it sends a packet of
//! that size. A socket may serve many connections, and one whose address changed may return to what its former path took; so
//! what counts is the largest that any of them ever had.

use std::sync::atomic::{AtomicU16, Ordering};

use super::tuning::COMMON_UDP_PAYLOAD;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct LargestDatagram(AtomicU16);

impl LargestDatagram {
    /// A connection may send UDP payloads of this size from now on.
    pub(super) fn grow(&self, mtu: u16) {
        self.0.fetch_max(mtu, Ordering::Relaxed);
    }

    /// Bytes of UDP payload.
    pub(super) fn bytes(&self) -> u16 {
        self.0.load(Ordering::Relaxed)
    }

    /// Datagrams of this size that one `sendmsg` takes.
    pub(super) fn segments(&self) -> usize {
        MAX_SEND_BYTES / usize::from(self.bytes())
    }
}

impl Default for LargestDatagram {
    fn default() -> Self {
        Self(COMMON_UDP_PAYLOAD.into())
    }
}

/// What the length field of IPv4 leaves of 65535 bytes.
const MAX_SEND_BYTES: usize = 65_535 - 28;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::tuning::MAX_UDP_PAYLOAD;

    #[test]
    fn a_train_never_exceeds_what_one_send_takes_and_common_paths_keep_quinns_ten() {
        const QUINNS_MOST: usize = 10;
        let largest = LargestDatagram::default();
        assert!(largest.segments() >= QUINNS_MOST);
        for (mtu, segments) in [(6550, 10), (6551, 9), (MAX_UDP_PAYLOAD, 7)] {
            largest.grow(mtu);
            assert_eq!(largest.segments(), segments);
            assert!(largest.segments() * usize::from(mtu) <= 65_507);
        }
        largest.grow(1200);
        assert_eq!(
            largest.bytes(),
            MAX_UDP_PAYLOAD,
            "another connection still sends jumbo frames"
        );
    }
}
