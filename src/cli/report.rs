//! The report of a migration as people read it.

use std::fmt::Write as _;

use super::output::{bytes, seconds};
use crate::api::{Outcome, Report};

pub(super) fn text(report: &Report) -> String {
    let Report { vm, peer, reason, .. } = report;
    let total = seconds(report.total_seconds);
    let mut text = match report.outcome {
        Outcome::Completed => format!("{vm} is at {peer}: completed in {total}"),
        Outcome::Failed => format!("{vm} is at the source: failed after {total}: {reason}"),
        Outcome::Cancelled => format!("{vm} is at the source: cancelled after {total}: {reason}"),
        Outcome::Refused => format!("{vm} was not touched: {reason}"),
        Outcome::InDoubt => format!("{vm} needs you: where it may run is not known after {total}: {reason}"),
        Outcome::VmDied => format!("{vm} needs you: it runs nowhere after {total}: {reason}"),
    };
    if let Some(downtime) = report.downtime_seconds {
        let _ = write!(text, ", downtime {}", seconds(downtime));
    }
    text.push('\n');
    if report.vmm_bytes > 0 {
        let _ = writeln!(
            text,
            "  {} from the hypervisor, {} on the wire, reduction {:.1}, {} rounds",
            bytes(report.vmm_bytes),
            bytes(report.wire_bytes),
            report.reduction_ratio,
            report.rounds.len()
        );
        let pages = report.pages;
        let _ = writeln!(
            text,
            "  pages: {} zero, {} same, {} reference, {} delta, {} literal, {} raw",
            pages.zero, pages.same, pages.reference, pages.delta, pages.literal, pages.raw
        );
    }
    if let Some(disks) = &report.disks {
        let _ = writeln!(
            text,
            "  disks: {} read in {} rounds, {} of them there already, {} zero, {} after reduction",
            bytes(disks.read_bytes),
            disks.rounds,
            bytes(disks.same_bytes),
            bytes(disks.zero_bytes),
            bytes(disks.wire_bytes)
        );
        if let (Some(seen), Some(usual)) = (disks.guest_io_seconds, disks.guest_io_usual_seconds) {
            let _ = writeln!(
                text,
                "  the guest's requests to them took {:.1} ms each meanwhile, {:.1} ms before; reading waited {} for that and --disk-rate",
                seen * 1e3,
                usual * 1e3,
                seconds(disks.held_back_seconds)
            );
        }
    }
    if let Some(forecast) = &report.forecast {
        let _ = writeln!(
            text,
            "  forecast was: {}, {} after reduction, downtime {}",
            seconds(forecast.total_seconds),
            bytes(forecast.wire_bytes),
            seconds(forecast.downtime_seconds)
        );
    }
    if let Some(digest) = &report.stream_digest {
        let _ = writeln!(text, "  stream digest {digest}, equal at both ends");
    }
    let _ = writeln!(text, "  migration {}", report.migration);
    if let Some(next) = report.continued_as {
        let _ = writeln!(text, "  begun again as migration {next}");
    }
    text
}
