//! Numbered lanes from one end of a link to the other, whose every byte is checked.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use longhaul::proto::session::connection_of;
use longhaul::transport::tuning::LANE_BYTES;
use longhaul::transport::{LaneError, PeerConnection, next_chunk, send_lane};
use quinn::RecvStream;
use tokio::time::Instant;

/// What is sent, and what became of it.
pub(crate) struct Bulk(Arc<State>);

struct State {
    since: Instant,
    /// Lanes that QUIC has taken.
    sent: AtomicU64,
    no_more: AtomicBool,
    /// While set, nobody reads.
    paused: tokio::sync::watch::Sender<bool>,
    /// Stream bytes that have arrived, and when.
    arrived: Mutex<Vec<(Instant, u64)>>,
    /// Lanes that have arrived whole.
    lanes: Mutex<HashSet<u64>>,
}

/// A lane is its number and this: bytes that do not compress.
static CONTENT: LazyLock<Bytes> = LazyLock::new(|| {
    let mut content = vec![0; LANE_BYTES - NUMBER_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut content);
    content.into()
});

const NUMBER_BYTES: usize = 8;

impl Bulk {
    /// Sends as fast as it goes, from now on, spread over all connections as a gateway does it.
    pub(crate) fn start(from: &[PeerConnection], to: &[PeerConnection]) -> Self {
        let state = Arc::new(State {
            since: Instant::now(),
            sent: AtomicU64::new(0),
            no_more: AtomicBool::new(false),
            paused: tokio::sync::watch::Sender::new(false),
            arrived: Mutex::default(),
            lanes: Mutex::default(),
        });
        tokio::spawn(send(state.clone(), from.to_vec()));
        for connection in to {
            tokio::spawn(accept(state.clone(), connection.clone()));
        }
        Self(state)
    }

    /// Stream bytes that have arrived in this time since the start.
    pub(crate) fn arrived_between(&self, begin: Duration, end: Duration) -> u64 {
        let window = self.0.since + begin..self.0.since + end;
        let arrived = self.0.arrived.lock().unwrap();
        let within = arrived.iter().filter(|(at, _)| window.contains(at));
        within.map(|(_, bytes)| bytes).sum()
    }

    /// Stream bytes that QUIC holds, at one end or the other, or that are on their way.
    pub(crate) fn held(&self) -> u64 {
        let arrived: u64 = self.0.arrived.lock().unwrap().iter().map(|(_, bytes)| bytes).sum();
        (self.0.sent.load(Ordering::Relaxed) * LANE_BYTES as u64).saturating_sub(arrived)
    }

    /// The receiver stops to read, or goes on.
    pub(crate) fn pause(&self, pause: bool) {
        self.0.paused.send_replace(pause);
    }

    /// Sends no more, and waits until every lane has arrived whole and once.
    pub(crate) async fn complete(self) {
        self.0.no_more.store(true, Ordering::Relaxed);
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let arrived = self.0.lanes.lock().unwrap().len() as u64;
            let sent = self.0.sent.load(Ordering::Relaxed);
            if arrived == sent {
                return;
            }
            assert!(Instant::now() < until, "{arrived} lanes of {sent} have arrived");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn send(state: Arc<State>, connections: Vec<PeerConnection>) {
    while !state.no_more.load(Ordering::Relaxed) {
        let number = state.sent.load(Ordering::Relaxed);
        let connection = &connections[connection_of(number, connections.len())];
        let number = Bytes::copy_from_slice(&number.to_be_bytes());
        if send_lane(connection, &mut [number, CONTENT.clone()]).await.is_err() {
            return;
        }
        state.sent.fetch_add(1, Ordering::Relaxed);
    }
}

async fn accept(state: Arc<State>, connection: PeerConnection) {
    while let Ok(lane) = connection.accept_uni().await {
        tokio::spawn(receive(state.clone(), lane));
    }
}

async fn receive(state: Arc<State>, mut lane: RecvStream) {
    let mut number = [0; NUMBER_BYTES];
    let mut length = 0;
    let mut paused = state.paused.subscribe();
    loop {
        if paused.wait_for(|paused| !paused).await.is_err() {
            return;
        }
        let (offset, chunk) = match next_chunk(&mut lane, LANE_BYTES).await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break,
            // The simulation is over.
            Err(LaneError::Connection(_)) => return,
            Err(error) => panic!("{error}"),
        };
        let (head, rest) = chunk.split_at(NUMBER_BYTES.saturating_sub(offset).min(chunk.len()));
        number[offset.min(NUMBER_BYTES)..][..head.len()].copy_from_slice(head);
        let begin = offset.saturating_sub(NUMBER_BYTES);
        assert!(CONTENT[begin..][..rest.len()] == *rest, "a lane arrived altered");
        length += chunk.len();
        state.arrived.lock().unwrap().push((Instant::now(), chunk.len() as u64));
    }
    assert_eq!(length, LANE_BYTES, "a lane is not whole");
    let number = u64::from_be_bytes(number);
    assert!(state.lanes.lock().unwrap().insert(number), "lane {number} came twice");
}
