//! Others at the same bottleneck, as arithmetic: their datagrams pass the link's model, and nothing of them arrives anywhere.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use longhaul::proto::page::ByteRate;
use tokio::time::Instant;

use super::link::SimulatedLink;

/// IP bytes of their datagrams, and what the bottleneck counts.
const IP_BYTES: u32 = 1500;
const LINK_BYTES: u64 = IP_BYTES as u64 + 14;

const TICK: Duration = Duration::from_millis(1);

/// Datagrams at a constant rate for so long, whatever becomes of them.
pub(crate) async fn constant(link: Arc<SimulatedLink>, rate: ByteRate, time: Duration) {
    let begin = Instant::now();
    let mut sent = 0;
    while begin.elapsed() < time {
        while sent < rate.bytes_in(begin.elapsed()) {
            link.pass(0, IP_BYTES);
            sent += LINK_BYTES;
        }
        tokio::time::sleep(TICK).await;
    }
}

/// A TCP flow with endless data under CUBIC (RFC 9438), for as long as the runtime lives. Its bytes that arrived are counted as the bottleneck
/// does. It knows a loss when the acknowledgements behind it come, repairs nothing, and paces as Linux does in congestion avoidance.
pub(crate) fn cubic(link: Arc<SimulatedLink>, rtt: Duration) -> Arc<AtomicU64> {
    let delivered = Arc::new(AtomicU64::new(0));
    tokio::spawn(run(link, rtt, delivered.clone()));
    delivered
}

struct Cubic {
    /// In packets.
    window: f64,
    /// The window before the last cut, and when that was.
    cut: Option<(f64, Instant)>,
    rtt: Duration,
}

async fn run(link: Arc<SimulatedLink>, rtt: Duration, delivered: Arc<AtomicU64>) {
    let mut flow = Cubic {
        window: 10.0,
        cut: None,
        rtt,
    };
    // When each was sent, when what happened to it is known, and whether it arrived.
    let mut flying: VecDeque<(Instant, Instant, bool)> = VecDeque::new();
    let mut allowed = 0.0;
    loop {
        let now = Instant::now();
        while let Some(&(sent, known, arrived)) = flying.front()
            && known <= now
        {
            flying.pop_front();
            if arrived {
                delivered.fetch_add(LINK_BYTES, Ordering::Relaxed);
                flow.acknowledged(sent, now);
            } else {
                flow.lost(sent, now);
            }
        }
        allowed = (allowed + 1.2 * flow.window * TICK.as_secs_f64() / flow.rtt.as_secs_f64()).min(flow.window);
        while allowed >= 1.0 && (flying.len() as f64) < flow.window {
            allowed -= 1.0;
            let arrives = link.pass(0, IP_BYTES);
            let known = arrives.map_or(now + flow.rtt, |at| Instant::from_std(at) + rtt / 2);
            let known = flying.back().map_or(known, |(_, last, _)| known.max(*last));
            flying.push_back((now, known, arrives.is_some()));
        }
        tokio::time::sleep(TICK).await;
    }
}

impl Cubic {
    fn acknowledged(&mut self, sent: Instant, now: Instant) {
        self.rtt = (self.rtt * 7 + (now - sent)) / 8;
        let Some((before, at)) = self.cut else {
            self.window += 1.0;
            return;
        };
        let rtt = self.rtt.as_secs_f64();
        let time = (now - at).as_secs_f64() + rtt;
        let cubic = 0.4 * (time - (before * 0.3 / 0.4).cbrt()).powi(3) + before;
        let reno = 0.7 * before + 0.53 * time / rtt;
        let target = cubic.max(reno).min(1.5 * self.window);
        self.window += (target - self.window).max(0.0) / self.window;
    }

    fn lost(&mut self, sent: Instant, now: Instant) {
        if self.cut.is_none_or(|(_, at)| sent >= at) {
            self.cut = Some((self.window, now));
            self.window = (0.7 * self.window).max(2.0);
        }
    }
}
