//! What travels over the control socket about a link test, with the promises of [`types`](super::types).

use serde::{Deserialize, Serialize};

use super::types::Forecast;

/// Measures the link to a peer, without a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkTestRequest {
    /// Name of the peer.
    pub peer: String,
    /// How long the link is filled.
    pub seconds: f64,
    /// Memory of a guest for which to say what its migration would take.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// What that guest writes.
    #[serde(default)]
    pub dirty_bytes_per_second: u64,
}

/// What a link is worth, in the direction from this site to the peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkTest {
    /// Name of the peer.
    pub peer: String,
    /// How long the link was filled.
    pub seconds: f64,
    /// Round trips of messages before the link was filled.
    pub idle: RoundTrips,
    /// Round trips of messages while it was filled.
    pub loaded: RoundTrips,
    /// Share of packets that were lost on the way there, 0 to 1.
    pub lost_share: f64,
    /// UDP payload of a full packet.
    pub mtu_bytes: u16,
    /// Capacity as it is configured; `None`: the gateway probes for it.
    pub capacity_bytes_per_second: Option<u64>,
    /// At which the controller sent at the end; `None` where none has a rate.
    pub rate_bytes_per_second: Option<u64>,
    /// What arrived of lanes once the link was full: without headers and repairs.
    pub goodput_bytes_per_second: u64,
    /// What a link of this capacity, loss and MTU carries of lanes at most; `None` where no capacity is configured.
    pub achievable_bytes_per_second: Option<u64>,
    /// IP bytes that the test sent.
    pub wire_bytes: u64,
    /// What is not as it should be, in sentences that say what to do.
    pub findings: Vec<String>,
    /// What a migration would take, where a guest was described.
    pub forecast: Option<Forecast>,
}

/// Times there and back of messages on the control connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundTrips {
    /// The shortest.
    pub least_seconds: f64,
    /// Half are shorter.
    pub median_seconds: f64,
    /// One of a hundred is longer.
    pub p99_seconds: f64,
    /// Mean difference between one and the next.
    pub jitter_seconds: f64,
}
