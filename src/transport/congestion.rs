//! Plugs [`LinkController`] into quinn, and carries its rate to the paced socket.
//!
//! quinn's own pacer sends at `1.25 x window / rtt` and cannot be told a rate. The controller's window is wide enough that this
//! pacer never limits; the rate is kept one layer below, in [`PacedSocket`](super::paced_socket::PacedSocket), which reads it here.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

use crate::proto::page::ByteRate;
use crate::proto::rate::{ControllerSettings, LinkController, RoundTrip};

/// The rate of one connection: its capacity is set from outside, its present rate by the controller.
#[derive(Debug)]
pub(super) struct LinkRate {
    capacity: AtomicU64,
    rate: AtomicU64,
}

impl LinkRate {
    pub(super) fn new(capacity: ByteRate) -> Self {
        Self {
            capacity: AtomicU64::new(capacity.0),
            rate: AtomicU64::new(capacity.0),
        }
    }

    pub(super) fn capacity(&self) -> ByteRate {
        ByteRate(self.capacity.load(Ordering::Relaxed))
    }

    /// Takes effect with the next packet; the controller follows with the next event.
    pub(super) fn set_capacity(&self, capacity: ByteRate) {
        let before = self.capacity.swap(capacity.0, Ordering::Relaxed);
        // An idle connection has no events, and its first burst must already know.
        let _ = self.rate.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |rate| {
            Some(if rate == before {
                capacity.0
            } else {
                rate.min(capacity.0)
            })
        });
    }

    pub(super) fn rate(&self) -> ByteRate {
        ByteRate(
            self.rate
                .load(Ordering::Relaxed)
                .min(self.capacity.load(Ordering::Relaxed)),
        )
    }
}

/// Builds a controller for each connection to a link of configured capacity.
#[derive(Debug)]
pub(super) struct LinkControllerFactory {
    pub(super) capacity: ByteRate,
    pub(super) rtt: Duration,
}

impl ControllerFactory for LinkControllerFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let settings = ControllerSettings::new(self.capacity, self.rtt);
        let controller = LinkController::new(settings, current_mtu, now);
        Box::new(LinkCongestion {
            controller,
            shared: Arc::new(LinkRate::new(self.capacity)),
        })
    }
}

/// The rate that governs `connection`, or `None` where no capacity is configured and quinn's CUBIC governs it.
pub(super) fn rate_of(connection: &quinn::Connection) -> Option<Arc<LinkRate>> {
    let controller = connection
        .congestion_state()
        .into_any()
        .downcast::<LinkCongestion>()
        .ok()?;
    Some(controller.shared)
}

/// Builds quinn's CUBIC with a floor, for links whose capacity nobody stated.
#[derive(Debug, Default)]
pub(super) struct CubicFactory(Arc<CubicConfig>);

impl ControllerFactory for CubicFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = self.0.clone().build(now, current_mtu);
        Box::new(FlooredCubic {
            cubic,
            floor: FLOOR_PACKETS * u64::from(current_mtu),
        })
    }
}

/// CUBIC falls to two packets a round trip on a lossy path. The side that only receives data would then often not be allowed to send
/// its next window update, and while one waits, quinn sends no acknowledgement either: the sender saw gaps of
/// 10 000 packets between them, at 1 Gbit/s and 1 % loss (2026-11-23). Three times the initial window of RFC 6928 is still polite.
const FLOOR_PACKETS: u64 = 32;

struct FlooredCubic {
    cubic: Box<dyn Controller>,
    floor: u64,
}

impl Controller for FlooredCubic {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, is_persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.floor = FLOOR_PACKETS * u64::from(new_mtu);
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().max(self.floor)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.cubic.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            cubic: self.cubic.clone_box(),
            floor: self.floor,
        })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window().max(self.floor)
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[derive(Clone)]
struct LinkCongestion {
    controller: LinkController,
    shared: Arc<LinkRate>,
}

impl LinkCongestion {
    fn follow_capacity(&mut self) {
        let capacity = self.shared.capacity();
        self.controller.set_capacity(capacity);
    }

    fn publish(&self) {
        self.shared.rate.store(self.controller.rate().0, Ordering::Relaxed);
    }
}

impl Controller for LinkCongestion {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.controller.on_ack(RoundTrip { sent, now }, bytes);
    }

    fn on_end_acks(&mut self, _now: Instant, _in_flight: u64, _app_limited: bool, _largest: Option<u64>) {
        self.follow_capacity();
        self.publish();
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost_bytes: u64) {
        let trip = RoundTrip { sent, now };
        self.follow_capacity();
        if is_persistent {
            self.controller.on_persistent_congestion(now);
        } else if lost_bytes == 0 {
            self.controller.on_ecn(trip);
        } else {
            self.controller.on_loss(trip, lost_bytes);
        }
        self.publish();
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.controller.set_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.controller.window()
    }

    fn initial_window(&self) -> u64 {
        self.controller.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window();
        metrics.pacing_rate = Some(self.controller.rate().0.saturating_mul(8));
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any origin of time will do")]
    fn origin() -> Instant {
        Instant::now()
    }

    fn link(capacity: ByteRate) -> LinkCongestion {
        let factory = Arc::new(LinkControllerFactory {
            capacity,
            rtt: Duration::from_millis(150),
        });
        *factory
            .build(origin(), 1200)
            .into_any()
            .downcast()
            .expect("the factory builds this")
    }

    #[test]
    fn a_lossy_path_never_takes_cubic_below_its_floor() {
        let start = origin();
        let mut cubic = Arc::new(CubicFactory::default()).build(start, 1200);
        for second in 0..100 {
            let sent = start + Duration::from_secs(second);
            cubic.on_congestion_event(sent + Duration::from_millis(150), sent, second % 10 == 0, 1200);
        }
        assert_eq!(cubic.window(), 32 * 1200);
        cubic.on_mtu_update(1452);
        assert_eq!(cubic.window(), 32 * 1452);
    }

    #[test]
    fn a_clone_shares_the_rate_so_that_the_socket_follows_the_connection() {
        let mut congestion = link(ByteRate(1_000_000));
        let seen = congestion
            .clone_box()
            .into_any()
            .downcast::<LinkCongestion>()
            .map(|clone| clone.shared)
            .unwrap();
        let now = origin();
        congestion.on_congestion_event(now + Duration::from_secs(1), now, true, 1200);
        assert_eq!(seen.rate(), congestion.controller.rate());
        assert!(seen.rate() < ByteRate(1_000_000));
    }

    #[test]
    fn a_capacity_set_from_outside_holds_before_the_next_event_and_after_it() {
        let mut congestion = link(ByteRate(1_000_000));
        congestion.shared.set_capacity(ByteRate(400_000));
        assert_eq!(congestion.shared.rate(), ByteRate(400_000));
        congestion.on_end_acks(origin(), 0, false, None);
        assert_eq!(
            (congestion.shared.rate(), congestion.controller.rate()),
            (ByteRate(400_000), ByteRate(400_000))
        );
        congestion.shared.set_capacity(ByteRate(2_000_000));
        assert_eq!(
            congestion.shared.rate(),
            ByteRate(2_000_000),
            "a link that was full stays full"
        );
    }
}
