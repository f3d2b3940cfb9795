//! The bulk connections of a link as one: what they carry together, and what they measured.

use std::future::poll_fn;
use std::ops::Deref;
use std::sync::Arc;
use std::task::Poll;

use quinn::ConnectionError;

use super::link::{ConnectionMeasures, PeerConnection};
use crate::proto::page::ByteRate;

/// The connections of a link that lanes are spread over, one or several. Derefs to them; each takes an equal part of the lanes.
#[derive(Clone, Debug)]
pub struct Bulk(Arc<[PeerConnection]>);

impl Bulk {
    /// # Panics
    /// Where there are none.
    pub(super) fn new(connections: Vec<PeerConnection>) -> Self {
        assert!(!connections.is_empty(), "a link has a bulk connection");
        Self(connections.into())
    }

    /// What they measured: sums, but the longest smoothed and the least round trip, and the least MTU.
    #[must_use]
    pub fn stats(&self) -> ConnectionMeasures {
        let measures = self.iter().map(PeerConnection::stats);
        measures.reduce(ConnectionMeasures::beside).unwrap_or_default()
    }

    /// Bytes of streams that have left so far and were not found lost, about.
    #[must_use]
    pub fn stream_bytes_sent(&self) -> u64 {
        self.iter().map(PeerConnection::stream_bytes_sent).sum()
    }

    /// Bytes of IP and UDP headers of each packet: 28 or 48.
    #[must_use]
    pub fn header_bytes(&self) -> u64 {
        self[0].header_bytes()
    }

    /// Whether all of them are up: lanes go over every one.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.iter().all(|connection| connection.close_reason().is_none())
    }

    /// Waits until one of them is closed.
    pub async fn broken(&self) -> ConnectionError {
        let mut closed: Vec<_> = self.iter().map(|connection| Box::pin(connection.closed())).collect();
        poll_fn(|cx| {
            let mut polled = closed.iter_mut().map(|closed| closed.as_mut().poll(cx));
            polled.find(Poll::is_ready).unwrap_or(Poll::Pending)
        })
        .await
    }

    /// The capacity that holds now; `None` where none is configured.
    pub(super) fn capacity(&self) -> Option<ByteRate> {
        let shares = self.iter().map(|connection| Some(connection.capacity()?.0));
        shares.sum::<Option<u64>>().map(ByteRate)
    }

    /// Each takes an equal part, so the slowest decides what all of them carry.
    pub(super) fn goodput(&self) -> Option<ByteRate> {
        let slowest = self.iter().filter_map(PeerConnection::goodput).min()?;
        Some(ByteRate(slowest.0 * self.len() as u64))
    }
}

impl Deref for Bulk {
    type Target = [PeerConnection];

    fn deref(&self) -> &[PeerConnection] {
        &self.0
    }
}
