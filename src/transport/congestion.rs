//! Plugs [`LinkController`] into quinn, and carries its rate to the paced socket.
//!
//! quinn's own pacer sends at `1.25 x window / rtt` and cannot be told a rate. The controller's window is wide enough that this
//! pacer never limits; the rate is kept one layer below, in [`PacedSocket`](super::paced_socket::PacedSocket), which reads it here.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
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
