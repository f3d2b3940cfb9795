//! What a migration would take, said before it starts.
//!
//! First pass: `used bytes / (rate x ratio)`. Then rounds: each leaves what the guest writes during it, so with
//! `q = dirty rate / vmm rate` the bytes shrink by `q` a round until they fit the transfer that the downtime budget allows.
//!
//! Disks that are copied come before, as they are: what of them the destination has, or can be reduced, is not known.
//!
//! Worked example: 400 MB in use, ratio 2, 1 Gbit/s (119 MB/s of frames, 238 MB/s of memory), the guest writes 8 MB/s: 1.7 s for the
//! first pass, 13 MB dirty then, 0.06 s more.

use std::time::Duration;

use super::budget::{Budget, FixedCosts};
use crate::proto::page::ByteRate;

/// What is known beforehand.
#[derive(Clone, Copy, Debug)]
pub struct ForecastInput {
    /// Memory that has been written since the guest started, in bytes; all of it where nothing better is known.
    pub used_bytes: u64,
    /// Memory of the guest, in bytes.
    pub total_bytes: u64,
    /// What its disks take that are copied with it, in bytes.
    pub disk_bytes: u64,
    /// What the guest writes, from a sample.
    pub dirty_rate: ByteRate,
    /// Frames' bytes per second that the path takes.
    pub goodput: ByteRate,
    /// RTT of the path.
    pub rtt: Duration,
    /// Expected vmm bytes per frame byte on the first pass.
    pub first_pass_ratio: f64,
    /// Expected vmm bytes per frame byte on later rounds.
    pub resend_ratio: f64,
    /// What the operator allows.
    pub budget: Budget,
}

/// The forecast.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// From request to the VM running at the destination.
    pub total: Duration,
    /// Frames' bytes.
    pub wire_bytes: u64,
    /// From pause to resume.
    pub downtime: Duration,
    /// Whether pre-copy ends within the budget.
    pub converges: bool,
    /// In words, where it does not.
    pub reason: Option<String>,
}

/// Rounds after which a forecast calls the guest not converging.
const MAX_ROUNDS: u32 = 50;

/// Start of the destination's vmm and the agreement between the gateways, as measured with QEMU 7.2 and 10.0 (2026-11).
const SETUP: Duration = Duration::from_secs(1);

impl Forecast {
    /// The forecast for `input`.
    #[must_use]
    pub fn of(input: &ForecastInput) -> Self {
        let costs = FixedCosts::on_path(input.rtt, Some(input.goodput));
        let fixed = costs.one_way + costs.syncs + costs.load;
        let frames = input.goodput.0.max(1) as f64;
        // A zero page costs 9 bytes of the vmm stream, and next to nothing on the wire.
        let mut remaining = input.used_bytes as f64 / input.first_pass_ratio.max(0.5);
        let mut wire = input.disk_bytes as f64 + remaining;
        let mut seconds = wire / frames;
        let dirty = input.dirty_rate.0 as f64 / input.resend_ratio.max(0.5);
        let allowed = input.budget.transfer.as_secs_f64();
        let first_goal = super::policy::FIRST_TRANSFER.as_secs_f64().min(allowed);
        let cap = input.total_bytes as f64 / input.resend_ratio.max(0.5);

        for round in 0..MAX_ROUNDS {
            remaining = (dirty * (remaining / frames).max(0.05)).min(cap);
            let goal = if round < 5 { first_goal } else { allowed };
            if remaining / frames <= goal {
                let stop = remaining / frames;
                return Self {
                    total: SETUP + Duration::from_secs_f64(seconds + stop) + fixed,
                    wire_bytes: (wire + remaining) as u64,
                    downtime: Duration::from_secs_f64(stop) + fixed,
                    converges: true,
                    reason: None,
                };
            }
            wire += remaining;
            seconds += remaining / frames;
        }
        let stop = remaining / frames;
        Self {
            total: SETUP + Duration::from_secs_f64(seconds) + fixed,
            wire_bytes: wire as u64,
            downtime: Duration::from_secs_f64(stop) + fixed,
            converges: false,
            reason: Some(format!(
                "the guest writes {:.1} MB/s and the link carries {:.1} MB/s of its memory; a stop of {:.0} ms would be needed, \
                 {:.0} ms are allowed: slow the guest down, raise the rate, or allow more with --downtime-limit",
                input.dirty_rate.0 as f64 / 1e6,
                frames * input.resend_ratio / 1e6,
                (stop * 1e3) + fixed.as_secs_f64() * 1e3,
                input.budget.limit.as_secs_f64() * 1e3
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(dirty: u64) -> ForecastInput {
        let rtt = Duration::from_millis(150);
        ForecastInput {
            used_bytes: 400_000_000,
            total_bytes: 512 << 20,
            disk_bytes: 0,
            dirty_rate: ByteRate(dirty),
            goodput: ByteRate(119_000_000),
            rtt,
            first_pass_ratio: 2.0,
            resend_ratio: 1.5,
            budget: Budget::new(Duration::from_millis(500), &FixedCosts::on_path(rtt, None)).unwrap(),
        }
    }

    #[test]
    fn a_quiet_guest_is_forecast_to_move_in_one_pass_and_stop_for_one_way() {
        let forecast = Forecast::of(&input(0));
        assert!(forecast.converges);
        assert_eq!(forecast.wire_bytes, 200_000_000);
        assert_eq!(forecast.downtime, Duration::from_millis(75 + 20 + 30));
    }

    #[test]
    fn disks_take_their_time_before_and_nothing_of_the_downtime() {
        let with_disks = ForecastInput {
            disk_bytes: 1_190_000_000,
            ..input(0)
        };
        let (with_disks, without) = (Forecast::of(&with_disks), Forecast::of(&input(0)));
        assert_eq!(with_disks.wire_bytes, without.wire_bytes + 1_190_000_000);
        assert_eq!(with_disks.total, without.total + Duration::from_secs(10));
        assert_eq!(with_disks.downtime, without.downtime);
    }

    #[test]
    fn a_guest_that_writes_more_than_the_link_carries_is_forecast_not_to_converge_and_why() {
        let forecast = Forecast::of(&input(400_000_000));
        assert!(!forecast.converges);
        assert!(forecast.reason.unwrap().contains("writes 400.0 MB/s"));
    }

    #[test]
    fn more_writing_never_makes_a_forecast_better() {
        let mut before = Forecast::of(&input(0));
        for dirty in (0..300).map(|step| step * 1_000_000) {
            let forecast = Forecast::of(&input(dirty));
            assert!(forecast.wire_bytes >= before.wire_bytes || !before.converges, "{dirty}");
            assert!(!forecast.converges || before.converges, "{dirty}");
            before = forecast;
        }
    }
}
