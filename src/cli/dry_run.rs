//! The answer to a dry run as people read it.

use std::fmt::Write as _;

use super::output::{bytes, seconds};
use crate::api::DryRun;

pub(super) fn text(answer: &DryRun) -> String {
    let mut text = String::new();
    for check in &answer.checks {
        let _ = writeln!(
            text,
            "{}  {}: {}",
            if check.ok { "ok " } else { "NO " },
            check.name,
            check.detail
        );
    }
    if let Some(forecast) = &answer.forecast {
        let _ = writeln!(
            text,
            "forecast: {} in total, {} after reduction, downtime {}, while the guest dirties {}",
            seconds(forecast.total_seconds),
            bytes(forecast.wire_bytes),
            seconds(forecast.downtime_seconds),
            if forecast.dirty_rate_known {
                format!("{}/s", bytes(forecast.dirty_bytes_per_second.max(0.0) as u64))
            } else {
                "an unknown amount".to_owned()
            }
        );
        let verdict = match (forecast.converges, forecast.dirty_rate_known) {
            (true, true) => "it converges",
            (true, false) => "whether it converges is not known",
            (false, _) => "it does NOT converge",
        };
        let _ = writeln!(text, "{verdict}: {}", forecast.reason);
    }
    let verdict = if answer.is_yes() {
        "can be moved"
    } else {
        "cannot be moved as things are"
    };
    let _ = writeln!(text, "{} {verdict} to {}; nothing was touched", answer.vm, answer.peer);
    text
}
