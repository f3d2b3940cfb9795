//! Plugs the controllers of [`proto::rate`](crate::proto::rate) into quinn, and carries their rate to the paced socket.
//!
//! quinn's own pacer sends at `1.25 x window / rtt` and cannot be told a rate. The controllers' windows are wide enough that this
//! pacer never limits; the rate is kept one layer below, in [`PacedSocket`](super::paced_socket::PacedSocket), which reads it here.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use super::datagram_size::LargestDatagram;
use crate::proto::page::ByteRate;
use crate::proto::rate::{ControllerSettings, LinkController, Overdue, ProbeController, RoundTrip};

/// The rate of one connection: its capacity is set from outside, its present rate by the controller.
#[derive(Debug)]
pub(super) struct LinkRate {
    /// Whether an operator said what the link carries; otherwise the capacity is a cap, and none where nobody set one.
    configured: bool,
    capacity: AtomicU64,
    rate: AtomicU64,
    reach: AtomicU64,
}

impl LinkRate {
    pub(super) fn new(capacity: ByteRate) -> Self {
        Self {
            configured: true,
            capacity: AtomicU64::new(capacity.0),
            rate: AtomicU64::new(capacity.0),
            reach: AtomicU64::new(capacity.0),
        }
    }

    /// For a path of which only this is known, so far.
    pub(super) fn found(rate: ByteRate) -> Self {
        Self {
            configured: false,
            capacity: AtomicU64::new(u64::MAX),
            rate: AtomicU64::new(rate.0),
            reach: AtomicU64::new(rate.0),
        }
    }

    /// Whether an operator said what the link carries, rather than that the rate is being found.
    pub(super) fn is_configured(&self) -> bool {
        self.configured
    }

    /// The capacity, or the cap that was set where none is configured.
    pub(super) fn cap(&self) -> Option<ByteRate> {
        Some(self.capacity()).filter(|capacity| capacity.0 < u64::MAX)
    }

    pub(super) fn capacity(&self) -> ByteRate {
        ByteRate(self.capacity.load(Ordering::Relaxed))
    }

    /// Takes effect with the next packet; the controller follows with the next event. `None` lifts a cap, and leaves a capacity
    /// that was configured.
    pub(super) fn set_capacity(&self, capacity: Option<ByteRate>) {
        let Some(capacity) = capacity else {
            if !self.configured {
                self.capacity.store(u64::MAX, Ordering::Relaxed);
            }
            return;
        };
        let before = self.capacity.swap(capacity.0, Ordering::Relaxed);
        // An idle connection has no events, and its first burst must already know.
        let _ = self.rate.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |rate| {
            Some(if self.configured && rate == before {
                capacity.0
            } else {
                rate.min(capacity.0)
            })
        });
    }

    pub(super) fn rate(&self) -> ByteRate {
        ByteRate(self.rate.load(Ordering::Relaxed)).min(self.capacity())
    }

    /// What the rate may come to within a round trip.
    pub(super) fn reach(&self) -> ByteRate {
        ByteRate(self.reach.load(Ordering::Relaxed)).min(self.capacity())
    }
}

/// Builds a controller for each connection: to a link of this capacity, or to a path of which none is known.
#[derive(Debug)]
pub(super) struct LinkControllerFactory {
    pub(super) capacity: Option<ByteRate>,
    pub(super) rtt: Duration,
    /// Of the socket that the connections use.
    pub(super) largest: Arc<LargestDatagram>,
}

impl ControllerFactory for LinkControllerFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        self.largest.grow(current_mtu);
        let (steering, rate) = match self.capacity {
            Some(capacity) => {
                let settings = ControllerSettings::new(capacity, self.rtt);
                let controller = LinkController::new(settings, current_mtu, now);
                (Steering::Capacity(controller), LinkRate::new(capacity))
            }
            None => {
                let controller = ProbeController::new(self.rtt, current_mtu, now);
                let rate = LinkRate::found(controller.rate());
                (Steering::Probe(controller), rate)
            }
        };
        Box::new(LinkCongestion {
            steering,
            shared: Arc::new(rate),
            largest: self.largest.clone(),
            gap: ProbeGap::new(now),
            overdue: Overdue::default(),
            interrupted: false,
            rtt: self.rtt,
            mtu: current_mtu,
        })
    }
}

/// The rate that governs `connection` on its present path.
pub(super) fn rate_of(connection: &quinn::Connection) -> Option<Arc<LinkRate>> {
    let controller = connection
        .congestion_state()
        .into_any()
        .downcast::<LinkCongestion>()
        .ok()?;
    Some(controller.shared)
}

#[derive(Clone)]
struct LinkCongestion {
    steering: Steering,
    shared: Arc<LinkRate>,
    largest: Arc<LargestDatagram>,
    gap: ProbeGap,
    overdue: Overdue,
    /// Acknowledgements are overdue: nothing more goes into what may be a cut. quinn's loss probes are free of this, so that the first
    /// acknowledgement afterwards comes by itself.
    interrupted: bool,
    /// Of the latest packet that was acknowledged.
    rtt: Duration,
    mtu: u16,
}

/// What decides the rate.
#[derive(Clone)]
enum Steering {
    Capacity(LinkController),
    Probe(ProbeController),
}

/// quinn sends a probe for the path's MTU only when it finds nothing else to send. With lanes without end and a window that never limits
/// that moment never comes, and packets stay at 1200 bytes; so once a round trip the window is full for a single look. Only while
/// enough is in flight: acknowledgements make quinn look again at once.
struct ProbeGap {
    due: AtomicBool,
    next: Instant,
}

impl ProbeGap {
    fn new(now: Instant) -> Self {
        Self {
            due: AtomicBool::new(false),
            next: now,
        }
    }

    fn acknowledged(&mut self, now: Instant, in_flight: u64, app_limited: bool, round_trip: Duration) {
        let busy = in_flight >= PROBE_GAP_FROM && !app_limited;
        let due = busy && now >= self.next;
        if due {
            self.next = now + round_trip;
        }
        *self.due.get_mut() = due;
    }

    fn forget(&mut self) {
        *self.due.get_mut() = false;
    }

    fn take(&self) -> bool {
        self.due.load(Ordering::Relaxed) && self.due.swap(false, Ordering::Relaxed)
    }
}

impl Clone for ProbeGap {
    fn clone(&self) -> Self {
        Self::new(self.next)
    }
}

/// Bytes in flight, several acknowledgements' worth.
const PROBE_GAP_FROM: u64 = 256 * 1024;

impl LinkCongestion {
    fn follow_capacity(&mut self) {
        let capacity = self.shared.capacity();
        match &mut self.steering {
            Steering::Capacity(controller) => controller.set_capacity(capacity),
            Steering::Probe(controller) => controller.set_cap(capacity),
        }
    }

    fn publish(&self) {
        let (rate, reach) = match &self.steering {
            Steering::Capacity(controller) => (controller.rate(), controller.rate()),
            Steering::Probe(controller) => (controller.rate(), controller.reach()),
        };
        self.shared.rate.store(rate.0, Ordering::Relaxed);
        self.shared.reach.store(reach.0, Ordering::Relaxed);
    }

    fn whole_window(&self) -> u64 {
        match &self.steering {
            Steering::Capacity(controller) => controller.window(),
            Steering::Probe(controller) => controller.window(),
        }
    }

    fn rate(&self) -> ByteRate {
        match &self.steering {
            Steering::Capacity(controller) => controller.rate(),
            Steering::Probe(controller) => controller.rate(),
        }
    }

    fn least_rtt(&self) -> Duration {
        match &self.steering {
            Steering::Capacity(controller) => controller.least_rtt(),
            Steering::Probe(controller) => controller.least_rtt(),
        }
    }

    fn acknowledged(&mut self, trip: RoundTrip, bytes: u64) {
        self.overdue.on_ack(trip.sent);
        self.rtt = trip.now.saturating_duration_since(trip.sent);
        match &mut self.steering {
            Steering::Capacity(controller) => controller.on_ack(trip, bytes),
            Steering::Probe(controller) => controller.on_ack(trip, bytes),
        }
    }
}

impl Controller for LinkCongestion {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        // Acknowledgements alone are far smaller, and are not acknowledged.
        if bytes >= u64::from(self.mtu) {
            let rtt = self.rtt.max(self.least_rtt());
            self.interrupted = self.overdue.is_overdue(now, rtt);
            self.overdue.on_sent(now, rtt);
        }
        if let Steering::Probe(controller) = &mut self.steering {
            controller.on_sent(now);
        }
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.acknowledged(RoundTrip { sent, now }, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest: Option<u64>) {
        self.interrupted = false;
        self.gap.acknowledged(now, in_flight, app_limited, self.least_rtt());
        self.follow_capacity();
        if let Steering::Probe(controller) = &mut self.steering {
            controller.on_end_acks(now, in_flight, app_limited);
        }
        self.publish();
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost_bytes: u64) {
        let trip = RoundTrip { sent, now };
        self.gap.forget();
        self.follow_capacity();
        match &mut self.steering {
            Steering::Capacity(controller) if is_persistent => controller.on_persistent_congestion(now),
            Steering::Capacity(controller) if lost_bytes == 0 => controller.on_ecn(trip),
            Steering::Capacity(controller) => controller.on_loss(trip, lost_bytes),
            Steering::Probe(controller) if is_persistent => controller.on_persistent_congestion(now),
            Steering::Probe(controller) if lost_bytes == 0 => controller.on_ecn(trip),
            Steering::Probe(controller) => controller.on_loss(trip, lost_bytes),
        }
        self.publish();
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        match &mut self.steering {
            Steering::Capacity(controller) => controller.set_mtu(new_mtu),
            Steering::Probe(controller) => controller.set_mtu(new_mtu),
        }
        self.largest.grow(new_mtu);
        self.mtu = new_mtu;
    }

    fn window(&self) -> u64 {
        if self.interrupted || self.gap.take() {
            1
        } else {
            self.whole_window()
        }
    }

    fn initial_window(&self) -> u64 {
        self.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.whole_window();
        metrics.pacing_rate = Some(self.rate().0.saturating_mul(8));
        metrics
    }

    /// For another path, on which nothing has been sent yet.
    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            overdue: Overdue::default(),
            interrupted: false,
            ..self.clone()
        })
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

    fn link(capacity: Option<ByteRate>) -> LinkCongestion {
        let factory = Arc::new(LinkControllerFactory {
            capacity,
            rtt: Duration::from_millis(150),
            largest: Arc::default(),
        });
        *factory
            .build(origin(), 1200)
            .into_any()
            .downcast()
            .expect("the factory builds this")
    }

    #[test]
    fn nothing_takes_the_window_of_a_path_of_unknown_capacity_below_its_floor() {
        let start = origin();
        let mut probe = link(None);
        for second in 0..100 {
            let sent = start + Duration::from_secs(second);
            probe.on_congestion_event(sent + Duration::from_millis(150), sent, second % 10 == 0, 1200);
            probe.on_end_acks(sent + Duration::from_millis(150), 0, false, None);
        }
        assert_eq!(probe.window(), 32 * 1200);
        probe.on_mtu_update(1452);
        assert_eq!(probe.window(), 32 * 1452);
    }

    #[test]
    fn a_cap_holds_a_path_of_unknown_capacity_and_lifted_it_leaves_the_rate_to_the_controller() {
        let mut probe = link(None);
        let free = probe.shared.rate();
        probe.shared.set_capacity(Some(ByteRate(free.0 / 2)));
        assert_eq!(probe.shared.rate(), ByteRate(free.0 / 2));
        probe.on_end_acks(origin(), 0, false, None);
        assert_eq!(probe.rate(), ByteRate(free.0 / 2));
        probe.shared.set_capacity(Some(ByteRate(1_000_000_000)));
        assert_eq!(probe.shared.rate(), ByteRate(free.0 / 2), "until the next event");
        probe.shared.set_capacity(None);
        probe.on_end_acks(origin(), 0, false, None);
        assert_eq!(probe.shared.rate(), free);
        assert!(!probe.shared.is_configured());
    }

    #[test]
    fn the_socket_learns_a_larger_mtu_from_either_controller_before_a_packet_has_it() {
        let largest = Arc::<LargestDatagram>::default();
        let factory = Arc::new(LinkControllerFactory {
            capacity: Some(ByteRate(1_000_000)),
            rtt: Duration::from_millis(150),
            largest: largest.clone(),
        });
        factory.build(origin(), 1200).on_mtu_update(3000);
        assert_eq!(largest.bytes(), 3000);
        let probing = Arc::new(LinkControllerFactory {
            capacity: None,
            rtt: Duration::from_millis(150),
            largest: largest.clone(),
        });
        probing.build(origin(), 1200).on_mtu_update(8952);
        assert_eq!(largest.bytes(), 8952);
    }

    #[test]
    fn once_a_round_trip_a_busy_connection_has_a_moment_for_an_mtu_probe_and_an_idle_one_is_never_held_up() {
        let mut congestion = link(Some(ByteRate(12_500_000)));
        let full = congestion.window();
        let (start, ms) = (origin(), Duration::from_millis);
        congestion.on_end_acks(start + ms(1), PROBE_GAP_FROM - 1, false, None);
        assert_eq!(congestion.window(), full, "nothing would end the gap");
        congestion.on_end_acks(start + ms(2), PROBE_GAP_FROM, true, None);
        assert_eq!(congestion.window(), full, "quinn finds nothing to send anyway");
        congestion.on_end_acks(start + ms(3), PROBE_GAP_FROM, false, None);
        assert_eq!((congestion.window(), congestion.window()), (1, full));
        congestion.on_end_acks(start + ms(152), PROBE_GAP_FROM, false, None);
        assert_eq!(congestion.window(), full);
        congestion.on_end_acks(start + ms(153), PROBE_GAP_FROM, false, None);
        congestion.on_end_acks(start + ms(154), 0, false, None);
        assert_eq!(congestion.window(), full, "what flew has landed meanwhile");
    }

    #[test]
    fn a_window_closes_in_a_cut_and_an_acknowledgement_opens_it() {
        let (start, ms) = (origin(), Duration::from_millis);
        let mut congestion = link(Some(ByteRate(12_500_000)));
        let full = congestion.window();
        let trip = |sent, now| RoundTrip {
            sent: start + ms(sent),
            now: start + ms(now),
        };
        for now in 0..300 {
            congestion.on_sent(start + ms(now), 12_500, now);
            if now >= 150 {
                congestion.acknowledged(trip(now - 150, now), 12_500);
            }
            assert!(congestion.window() > 1, "{now}");
        }
        congestion.on_sent(start + ms(360), 12_500, 360);
        assert_eq!(congestion.window(), 1);
        assert_eq!(congestion.clone_box().window(), full, "another path is open");
        congestion.acknowledged(trip(750, 900), 1200);
        congestion.on_end_acks(start + ms(900), 0, false, None);
        assert_eq!(congestion.window(), full);
    }

    #[test]
    fn a_connection_that_only_acknowledges_is_never_closed() {
        let (start, ms) = (origin(), Duration::from_millis);
        let mut congestion = link(Some(ByteRate(12_500_000)));
        for now in 0..3000 {
            congestion.on_sent(start + ms(now), 300, now);
        }
        assert!(congestion.window() > 1);
    }

    #[test]
    fn a_clone_shares_the_rate_so_that_the_socket_follows_the_connection() {
        let mut congestion = link(Some(ByteRate(1_000_000)));
        let seen = congestion
            .clone_box()
            .into_any()
            .downcast::<LinkCongestion>()
            .map(|clone| clone.shared)
            .unwrap();
        let now = origin();
        congestion.on_congestion_event(now + Duration::from_secs(1), now, true, 1200);
        assert_eq!(seen.rate(), congestion.rate());
        assert!(seen.rate() < ByteRate(1_000_000));
    }

    #[test]
    fn a_capacity_set_from_outside_holds_before_the_next_event_and_after_it() {
        let mut congestion = link(Some(ByteRate(1_000_000)));
        congestion.shared.set_capacity(Some(ByteRate(400_000)));
        assert_eq!(congestion.shared.rate(), ByteRate(400_000));
        congestion.on_end_acks(origin(), 0, false, None);
        assert_eq!(
            (congestion.shared.rate(), congestion.rate()),
            (ByteRate(400_000), ByteRate(400_000))
        );
        congestion.shared.set_capacity(Some(ByteRate(2_000_000)));
        assert_eq!(
            congestion.shared.rate(),
            ByteRate(2_000_000),
            "a link that was full stays full"
        );
    }
}
