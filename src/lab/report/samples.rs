//! Records for tests: one run that is as it should be, for each test to change.

use serde_json::json;

use crate::lab::guest::GuestDials;
use crate::lab::record::{Ends, Frontier, Moment, Outcome, Run, Setting};

/// A run that arrived.
pub(in crate::lab) fn run(engine: &str, repetition: u32) -> Run {
    let report = json!({
        "vmm_bytes": 300_000_000_u64,
        "pages": { "zero": 78_000, "same": 1_000, "reference": 9_000, "delta": 12_000, "literal": 31_000, "raw": 10 },
    });
    Run {
        engine: engine.to_owned(),
        profile: "intercontinental".to_owned(),
        guest: "small".to_owned(),
        seed: u64::from(repetition),
        repetition,
        outcome: Outcome::Completed,
        reason: None,
        usable: true,
        total_seconds: Some(2.5 + 0.1 * f64::from(repetition)),
        downtime_seconds: Some(0.187),
        blackout_seconds: None,
        wire_bytes: Some(81_000_000),
        link_use: Some(0.91),
        rounds: Some(4),
        cpu_seconds_per_gib: Some(Ends {
            source: 3.1,
            destination: 1.9,
        }),
        peak_rss_bytes: None,
        run_delay_share: Some(0.02),
        others_share: Some(0.01),
        guest_pages_per_second: None,
        guest_intact: Some(true),
        pages_checked: Some(51_200),
        application: None,
        timeline: (0..25).map(|index| moment(f64::from(index) * 0.1)).collect(),
        report: report.as_object().cloned().unwrap_or_default(),
        dials: GuestDials::default(),
        setting: Setting {
            started_unix_seconds: 1_790_000_000,
            kernel: "6.12.57".to_owned(),
            cpus: 2,
            qemu: "10.0.2".to_owned(),
            accelerator: "tcg".to_owned(),
            longhaul: "0.1.0 (0123456)".to_owned(),
            link_backend: "netem".to_owned(),
            ..Setting::default()
        },
    }
}

/// A moment of its course.
pub(in crate::lab) fn moment(at_seconds: f64) -> Moment {
    Moment {
        at_seconds,
        phase: if at_seconds < 2.2 { "copying" } else { "stop-and-copy" }.to_owned(),
        round: 1 + (at_seconds * 1.7) as u64,
        remaining_bytes: (300e6 - 120e6 * at_seconds).max(0.0) as u64,
        dirty_bytes_per_second: 8e6,
        wire_bytes_per_second: 100e6 + 10e6 * (at_seconds * 9.0).sin(),
        backlog_bytes: Some((4e6 + 1e6 * (at_seconds * 5.0).cos()) as u64),
    }
}

/// A search that came to an end.
pub(in crate::lab) fn frontier(engine: &str) -> Frontier {
    Frontier {
        engine: engine.to_owned(),
        profile: "intercontinental".to_owned(),
        guest: "small".to_owned(),
        converges_pages_per_second: Some(16_000),
        fails_pages_per_second: Some(32_000),
        limit: None,
        runs: 6,
    }
}
