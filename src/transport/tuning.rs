//! Everything that follows from a link's rate and round trip time.
//!
//! quinn's defaults are for 100 Mbit/s x 100 ms: 1.25 MB a stream is 67 Mbit/s at 150 ms, and its 10 MB send window is
//! 533 Mbit/s. Derived here instead, with 1 Gbit/s x 150 ms as the worked example:
//!
//! ```text
//! BDP               = rate x rtt                                       18.75 MB
//! window            = 4 BDP, at least 4 MiB, at most the budget        75 MB
//! stream window     = 16 lanes                                         8 MiB
//! lanes             = window / 64 KiB, at least 1024                   1145
//! packets a second  = rate / 1494                                      83668
//! reported at once  = 2 ms of packets, within 16..=128                 128
//! ack threshold     = 0.5 ms of packets, within 2..=64                 41
//! receive buffer    = 64 ms of bytes, within 1..=32 MiB                8 MB
//! send buffer       = 2 ms of bytes, within 256 KiB..=32 MiB           262 kB
//! ```
//!
//! Why 4 BDP: a lost packet is repaired one round trip after its loss is seen, two round trips after it was first sent, and
//! three if the repair is lost as well. Until then the sender keeps, and the receiver buffers, everything behind it.
//!
//! Why a stream's window is many lanes: quinn's receiver raises it each time an eighth was read. Such frames count as congestion
//! controlled, and while quinn may not send one, it sends no acknowledgement either.
//!
//! Why no number of packets behind one makes it lost, where RFC 9002 takes 3: one packet that overtakes the others would have all of them
//! sent again, and look like a loss that calls for a brake. With 2 ms of packets, 1 % of them 10 ms ahead left 21 % of 100 Mbit/s,
//! and with time alone (9/8 of the round trip, 6.1.2) 99 % (2026-11-27). A repair waits 17 ms longer at 150 ms. A gap is still reported
//! at once when it is 2 ms old, so that acknowledgements do not wait. The limit is a ninth of the round trip: quinn takes the round trip
//! time of the foremost packets, and those which are further ahead make the others look late.
//!
//! Why the receive buffer is so long: it covers the time in which the receiver is not scheduled. With 20 ms a busy machine of two cores
//! dropped a few thousand packets at a time (2026-11-23), more than the link lost.
//!
//! Why the ack threshold is below 64: quinn's receiver remembers 64 ranges (`MAX_ACK_BLOCKS`). At 2 % loss 64 packets make 1.3
//! gaps, so a lost ACK is still covered by dozens that follow.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::ControllerFactory;
use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::tls::ConnectionKind;
use crate::proto::page::ByteRate;

/// Bytes that one lane carries at most. quinn closes a connection whose stream has more than 1024 gaps ("too many gaps in
/// stream buffer"), which takes at least 2 x 1024 packets, so 2.5 MB; this leaves a factor of five.
pub const LANE_BYTES: usize = 512 * 1024;

/// The largest UDP payload that path MTU discovery tries, and that is received: a jumbo frame of 9000 bytes, minus 40 for IPv6 and 8 for UDP.
pub const MAX_UDP_PAYLOAD: u16 = 8952;

/// The same of a frame of 1500 bytes, which is what most paths take. What follows from packets a second is derived for it.
pub const COMMON_UDP_PAYLOAD: u16 = 1452;

/// Bytes of a full packet that are not stream data: a short header (1 + 8 connection id + 4 packet number), the AEAD tag
/// (16), and a STREAM frame header (1 + up to 4 stream id + up to 4 offset + 2 length).
pub const STREAM_OVERHEAD: u64 = 40;

/// On a shorter path QUIC's own repair of what was lost takes no longer than what could be sent beside it.
pub const PROTECTED_RTT: Duration = Duration::from_millis(5);

/// What a full packet takes of a common link's rate, as `tc` counts it: IPv4, UDP and Ethernet headers included.
pub const LINK_BYTES_PER_PACKET: u64 = COMMON_UDP_PAYLOAD as u64 + 28 + ETHERNET_HEADER;

/// Two addresses and a type.
pub const ETHERNET_HEADER: u64 = 14;

/// What waits unsent in QUIC at most where no capacity is configured, in time at the rate that was found: enough that the controller
/// never finds nothing to send while lanes are written. With a capacity, lanes are admitted as they leave.
pub const UNSENT: Duration = Duration::from_millis(35);

/// The least of it. A lane is held whole while one of its packets is repaired; with less room than one, the link would stand still meanwhile.
const LEAST_UNSENT: u64 = 128 * 1024;

/// Bulk connections that a link may have: as many as 20 Gbit/s need. Each may have so many lanes open as a single one.
pub const MOST_BULK_CONNECTIONS: u8 = 8;

/// What is expected of one connection, which a single task drives: less than half of what one carries over loopback, where a packet has 9000
/// bytes and the whole machine serves it (docs/transport.md).
const CONNECTION_RATE: ByteRate = ByteRate::from_bits_per_second(2_500_000_000);

/// What the windows are made for where no rate is configured.
const ASSUMED_RATE: ByteRate = ByteRate::from_bits_per_second(1_000_000_000);

const LONGEST_RTT: Duration = Duration::from_secs(60);
const MIN_WINDOW: u64 = 4 * 1024 * 1024;
const MAX_SOCKET_BUFFER: u64 = 32 * 1024 * 1024;
const MIN_LANES: u64 = 1024;
const IDLE_LANE_BYTES: u64 = 64 * 1024;
/// Keep-alives in an idle timeout: with 5 % loss all of them are lost once in three million times.
const KEEP_ALIVES: u32 = 5;
const MAX_ACK_DELAY: Duration = Duration::from_millis(5);

/// The send window where the rate is being found and comes to `rate` at most within a round trip: what flies then, what is held until
/// its lost packets are repaired, and [`UNSENT`].
///
/// A lane of some 370 packets waits a round trip more if one of them is lost, and another if one of the repairs is: at a `loss` of 1 %
/// 2.0 round trips, at 0.1 % 1.3.
#[must_use]
pub fn window_of_flight(rate: ByteRate, rtt: Duration, loss: f64) -> u64 {
    const LANE_PACKETS: f64 = (LANE_BYTES / (COMMON_UDP_PAYLOAD as usize - STREAM_OVERHEAD as usize)) as f64;
    let any_of_a_lane = |share: f64| 1.0 - (1.0 - share).powf(LANE_PACKETS);
    let loss = loss.clamp(0.0, 1.0);
    let trips = 1.0 + any_of_a_lane(loss) + any_of_a_lane(loss * loss);
    let held = rate.bytes_in(rtt.min(LONGEST_RTT).mul_f64(trips));
    held.saturating_add(rate.bytes_in(UNSENT).max(LEAST_UNSENT))
}

/// Stream bytes a second in packets of `mtu` bytes of UDP payload, each with `header` bytes of IP and UDP, on a link of this `rate` of
/// which it loses the share `loss`.
#[must_use]
pub fn stream_rate(rate: ByteRate, mtu: u16, header: u64, loss: f64) -> ByteRate {
    let mtu = u64::from(mtu);
    let share = mtu.saturating_sub(STREAM_OVERHEAD) as f64 / (mtu + header + ETHERNET_HEADER) as f64;
    ByteRate((rate.0 as f64 * share * (1.0 - loss)) as u64)
}

/// Bulk connections that a link of this capacity needs: 1 up to 2.5 Gbit/s, and where none is known.
#[must_use]
pub fn bulk_connections(rate: Option<ByteRate>) -> u8 {
    let needed = rate.map_or(1, |rate| rate.0.div_ceil(CONNECTION_RATE.0));
    u8::try_from(needed).unwrap_or(u8::MAX).clamp(1, MOST_BULK_CONNECTIONS)
}

/// Quantities derived from one path; see the head of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Round trip time of the path without queues, as configured.
    pub rtt: Duration,
    /// Bytes in flight when the path is full.
    pub bdp: u64,
    /// Bytes that either end of a connection buffers at most.
    pub window: u64,
    /// Bytes that one lane's receiver buffers at most.
    pub stream_window: u64,
    /// Lanes that may be open at a time.
    pub lanes: u64,
    /// Packets that must have arrived behind one before the receiver reports that it is missing.
    pub reported_from: u32,
    /// Packets that the receiver may leave unacknowledged.
    pub ack_threshold: u32,
    /// Bytes of the socket's receive buffer.
    pub receive_buffer: usize,
    /// Bytes of the socket's send buffer: small, since it is a queue that nobody controls.
    pub send_buffer: usize,
    /// After this long without a packet the connection is given up.
    pub idle_timeout: Duration,
}

impl Tuning {
    /// Tunes for a path of this `rate` (`None`: not known) and `rtt`. No connection buffers more than `budget` bytes.
    #[must_use]
    pub fn derive(rate: Option<ByteRate>, rtt: Duration, budget: u64, idle_timeout: Duration) -> Self {
        let rate = rate.unwrap_or(ASSUMED_RATE);
        let rtt = rtt.max(Duration::from_micros(100));
        let bdp = rate.bytes_in(rtt);
        let window = bdp.saturating_mul(4).max(MIN_WINDOW).min(budget.max(MIN_WINDOW));
        let packets_in =
            |time: Duration| u32::try_from(rate.bytes_in(time) / LINK_BYTES_PER_PACKET).unwrap_or(u32::MAX);
        let buffer = |time: Duration, least: u64| {
            usize::try_from(rate.bytes_in(time).clamp(least, MAX_SOCKET_BUFFER)).unwrap_or(usize::MAX)
        };
        Self {
            rtt,
            bdp,
            window,
            stream_window: 16 * LANE_BYTES as u64,
            lanes: (window / IDLE_LANE_BYTES).max(MIN_LANES),
            reported_from: packets_in(Duration::from_millis(2)).clamp(16, 128),
            ack_threshold: packets_in(Duration::from_micros(500)).clamp(2, 64),
            receive_buffer: buffer(Duration::from_millis(64), 1024 * 1024),
            send_buffer: buffer(Duration::from_millis(2), 256 * 1024),
            idle_timeout,
        }
    }

    /// quinn's configuration for a connection on this path, steered by `controller`.
    #[must_use]
    pub fn transport_config(
        &self,
        controller: Arc<dyn ControllerFactory + Send + Sync>,
        kind: ConnectionKind,
    ) -> TransportConfig {
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(self.ack_threshold))
            .max_ack_delay(Some(MAX_ACK_DELAY))
            .reordering_threshold(VarInt::from_u32(self.reported_from - 1));
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(MAX_UDP_PAYLOAD);

        // What nobody takes off a connection would stay in QUIC, beyond every account.
        let (lanes, channels) = if kind == ConnectionKind::Bulk {
            (self.lanes, 0)
        } else {
            (0, 64)
        };
        let mut config = TransportConfig::default();
        config
            .congestion_controller_factory(controller)
            .initial_rtt(self.rtt)
            .send_window(self.window)
            .receive_window(var_int(self.window))
            .stream_receive_window(var_int(self.stream_window))
            .max_concurrent_uni_streams(var_int(lanes))
            .max_concurrent_bidi_streams(VarInt::from_u32(channels))
            .send_fairness(false)
            .packet_threshold(u32::MAX)
            .ack_frequency_config(Some(acks))
            .mtu_discovery_config(Some(mtu))
            .keep_alive_interval(Some(self.idle_timeout / KEEP_ALIVES))
            .max_idle_timeout(IdleTimeout::try_from(self.idle_timeout).ok())
            .datagram_receive_buffer_size(None)
            .enable_segmentation_offload(true);
        config
    }
}

fn var_int(value: u64) -> VarInt {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: u64 = 256 * 1024 * 1024;

    fn tuned(bits: u64, rtt_ms: u64, budget: u64) -> Tuning {
        let rate = ByteRate::from_bits_per_second(bits);
        Tuning::derive(
            Some(rate),
            Duration::from_millis(rtt_ms),
            budget,
            Duration::from_secs(10),
        )
    }

    #[test]
    fn the_worked_example_of_the_head_comment_holds() {
        assert_eq!(
            tuned(1_000_000_000, 150, BUDGET),
            Tuning {
                rtt: Duration::from_millis(150),
                bdp: 18_750_000,
                window: 75_000_000,
                stream_window: 8_388_608,
                lanes: 1144,
                reported_from: 128,
                ack_threshold: 41,
                receive_buffer: 8_000_000,
                send_buffer: 262_144,
                idle_timeout: Duration::from_secs(10),
            }
        );
    }

    #[test]
    fn what_waits_unsent_in_quic_is_35_ms_of_the_rate_beside_what_flies_and_what_is_repaired() {
        let (gigabit, rtt) = (ByteRate(125_000_000), Duration::from_millis(150));
        let flying = 18_750_000;
        assert_eq!(window_of_flight(gigabit, rtt, 0.0), flying + 4_375_000);
        let repaired = |loss| (window_of_flight(gigabit, rtt, loss) - 4_375_000) as f64 / flying as f64;
        assert!((1.29..1.33).contains(&repaired(0.001)), "{}", repaired(0.001));
        assert!((1.98..2.05).contains(&repaired(0.01)), "{}", repaired(0.01));
        assert!(repaired(1.0) <= 3.0);
        assert_eq!(
            window_of_flight(ByteRate(310_000), rtt, 0.0),
            46_500 + LEAST_UNSENT,
            "room for a lane in repair"
        );
        assert_eq!(window_of_flight(ByteRate(u64::MAX), Duration::MAX, 0.0), u64::MAX);
    }

    #[test]
    fn goodput_follows_from_the_packets_that_the_path_takes() {
        let gigabit = ByteRate(125_000_000);
        let share = |mtu, header, loss| stream_rate(gigabit, mtu, header, loss).0;
        assert_eq!(share(1452, 28, 0.0), 125_000_000 * 1412 / 1494);
        assert_eq!(share(1452, 48, 0.0), 125_000_000 * 1412 / 1514);
        assert_eq!(share(1200, 28, 0.0), 125_000_000 * 1160 / 1242);
        assert_eq!(share(1452, 28, 0.5), 125_000_000 * 706 / 1494);
        assert_eq!(share(1452, 28, 1.0), 0);
    }

    #[test]
    fn a_link_has_as_many_bulk_connections_as_its_capacity_needs() {
        let of = |bits| bulk_connections(Some(ByteRate::from_bits_per_second(bits)));
        assert_eq!([0, 1_000_000_000, 2_500_000_000].map(of), [1; 3]);
        assert_eq!([2_500_000_008, 5_000_000_000].map(of), [2; 2]);
        assert_eq!([10_000_000_000, 20_000_000_000, 20_000_000_008].map(of), [4, 8, 8]);
        assert_eq!(bulk_connections(Some(ByteRate(u64::MAX))), MOST_BULK_CONNECTIONS);
        assert_eq!(bulk_connections(None), 1);
    }

    #[test]
    fn a_slow_link_and_a_short_one_stay_above_the_floors() {
        let slow = tuned(100_000_000, 150, BUDGET);
        assert_eq!(
            (slow.bdp, slow.window, slow.reported_from, slow.ack_threshold),
            (1_875_000, 7_500_000, 16, 4)
        );
        let short = tuned(1_000_000_000, 0, BUDGET);
        assert_eq!((short.window, short.lanes), (MIN_WINDOW, MIN_LANES));
    }

    #[test]
    fn the_budget_bounds_the_window_whatever_the_link() {
        assert_eq!(tuned(10_000_000_000, 150, BUDGET).window, BUDGET);
        assert_eq!(tuned(u64::MAX, 600_000, BUDGET).window, BUDGET);
        assert_eq!(tuned(10_000_000_000, 150, 0).window, MIN_WINDOW);
    }

    #[test]
    fn the_lanes_cover_the_window_and_a_lane_never_waits_for_its_own_window() {
        for bits in [50_000_000, 100_000_000, 1_000_000_000, 10_000_000_000] {
            let tuning = tuned(bits, 150, u64::MAX);
            assert!(tuning.lanes * IDLE_LANE_BYTES + IDLE_LANE_BYTES > tuning.window);
            assert!(
                tuning.stream_window / 8 > LANE_BYTES as u64,
                "a lane needs no window update"
            );
        }
    }
}
