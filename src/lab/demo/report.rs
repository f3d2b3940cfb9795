//! What the demo found: for programs as JSON, for people as tables.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::lab::engine::proof::Proof;
use crate::lab::engine::{Engine, Moved};
use crate::lab::record::Outcome;
use crate::lab::table::{Table, median, megabytes, milliseconds, or_dash, seconds};

/// Everything that one run found. Its JSON is a stable interface.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// The link.
    pub(super) profile: String,
    /// Median downtime from outside of the same guest moved with no link. Absent where no leg was run.
    pub(super) floor_downtime_seconds: Option<f64>,
    /// Every move by the gateways, in order.
    pub(super) legs: Vec<Leg>,
    /// The same move by plain QEMU.
    pub(super) baselines: Vec<Baseline>,
    /// The guest's own word.
    pub(super) guest: Proof,
    /// As that of a baseline, for the legs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_fault: Option<String>,
    /// Why the run ended early; absent where it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
}

/// One move by the gateways.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Leg {
    /// What `longhaul migrate` reported.
    #[serde(flatten)]
    pub(super) report: Map<String, Value>,
    /// From the last sign of life at the source to the first at the destination, on the host's clock.
    pub(super) downtime_outside_seconds: Option<f64>,
    /// IP bytes of both directions that the link counted.
    pub(super) wire_bytes_outside: Option<u64>,
    /// Which way it went.
    pub(super) direction: &'static str,
}

/// One move by plain QEMU.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Baseline {
    pub(super) engine: Engine,
    #[serde(serialize_with = "words")]
    pub(super) outcome: Outcome,
    /// From the command to the first sign of life at the destination; until it was stopped where it did not finish.
    pub(super) total_seconds: Option<f64>,
    /// IP bytes of both directions that the link counted.
    pub(super) wire_bytes: Option<u64>,
    /// Downtime from outside.
    pub(super) downtime_seconds: Option<f64>,
    /// Why it failed or is unavailable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    /// Why the emulated link was not what its profile says, so that these figures are not to be used; absent where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_fault: Option<String>,
}

impl Baseline {
    pub(super) fn new(engine: Engine, moved: Moved) -> Self {
        Self {
            engine,
            outcome: moved.outcome,
            total_seconds: moved.total_seconds,
            wire_bytes: moved.wire_bytes,
            downtime_seconds: moved.downtime_seconds,
            reason: moved.reason,
            link_fault: moved.link_fault,
        }
    }
}

/// An outcome as the demo's JSON, whose names are older than those of the lab's runs, writes it.
fn words<S: Serializer>(outcome: &Outcome, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(in_words(*outcome))
}

fn in_words(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Completed => "completed",
        Outcome::NotFinished => "not finished",
        Outcome::Failed => "failed",
        Outcome::Unavailable => "unavailable",
    }
}

impl Leg {
    /// A number of the migrate command's report.
    pub(super) fn number(&self, name: &str) -> Option<f64> {
        self.report.get(name).and_then(Value::as_f64)
    }

    fn rounds(&self) -> Option<usize> {
        self.report.get("rounds").and_then(Value::as_array).map(Vec::len)
    }
}

impl Report {
    /// The legs' median total time.
    pub(super) fn median_total_seconds(&self) -> Option<f64> {
        median(self.legs.iter().filter_map(|leg| leg.number("total_seconds")))
    }

    fn downtimes(&self) -> impl Iterator<Item = f64> {
        self.legs.iter().filter_map(|leg| leg.downtime_outside_seconds)
    }

    fn write_legs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&[
            "leg",
            "way",
            "rounds",
            "total",
            "guest's bytes",
            "on the wire",
            "reduction",
            "downtime",
            "from outside",
        ]);
        for (number, leg) in self.legs.iter().enumerate() {
            table.row([
                (number + 1).to_string(),
                leg.direction.to_owned(),
                or_dash(leg.rounds(), |rounds| rounds.to_string()),
                or_dash(leg.number("total_seconds"), seconds),
                or_dash(leg.number("vmm_bytes"), megabytes),
                or_dash(leg.number("wire_bytes"), megabytes),
                or_dash(leg.number("reduction_ratio"), |ratio| format!("{ratio:.1}")),
                or_dash(leg.number("downtime_seconds"), milliseconds),
                or_dash(leg.downtime_outside_seconds, milliseconds),
            ]);
        }
        write!(f, "\n{table}")?;
        write_fault(f, "longhaul", self.link_fault.as_deref())?;
        let Some(floor) = self.floor_downtime_seconds else {
            return Ok(());
        };
        let Some(middle) = median(self.downtimes()) else {
            return Ok(());
        };
        let worst = self.downtimes().fold(0.0, f64::max);
        writeln!(
            f,
            "Downtime from outside: median {}, worst {}. With no link {}: the link adds {} (median), {} (worst).",
            milliseconds(middle),
            milliseconds(worst),
            milliseconds(floor),
            milliseconds(middle - floor),
            milliseconds(worst - floor),
        )
    }

    fn write_baselines(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["engine", "outcome", "total", "on the wire", "downtime from outside"]);
        if !self.legs.is_empty() {
            table.row([
                "longhaul (median)".to_owned(),
                if self.problem.is_none() { "completed" } else { "failed" }.to_owned(),
                or_dash(self.median_total_seconds(), seconds),
                or_dash(
                    median(self.legs.iter().filter_map(|leg| leg.number("wire_bytes"))),
                    megabytes,
                ),
                or_dash(median(self.downtimes()), milliseconds),
            ]);
        }
        for baseline in &self.baselines {
            let stopped = if baseline.outcome == Outcome::NotFinished {
                "> "
            } else {
                ""
            };
            table.row([
                baseline.engine.to_string(),
                in_words(baseline.outcome).to_owned(),
                or_dash(baseline.total_seconds, |total| format!("{stopped}{}", seconds(total))),
                or_dash(baseline.wire_bytes, |bytes| megabytes(bytes as f64)),
                or_dash(baseline.downtime_seconds, milliseconds),
            ]);
        }
        write!(f, "\n{table}")?;
        for baseline in &self.baselines {
            if let Some(reason) = &baseline.reason {
                writeln!(f, "{}: {reason}", baseline.engine)?;
            }
            write_fault(f, baseline.engine.name(), baseline.link_fault.as_deref())?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Link: {}", self.profile)?;
        if !self.legs.is_empty() {
            self.write_legs(f)?;
        }
        if !self.baselines.is_empty() {
            self.write_baselines(f)?;
        }
        if let Some(problem) = &self.problem {
            writeln!(f, "\nThe run ended early: {problem}")?;
        }
        let verdict = if self.guest.intact {
            "intact"
        } else {
            "NOT PROVEN INTACT"
        };
        write!(f, "\nGuest: {verdict}, {} pages checked.", self.guest.pages_checked)
    }
}

fn write_fault(f: &mut fmt::Formatter<'_>, engine: &str, fault: Option<&str>) -> fmt::Result {
    match fault {
        Some(fault) => writeln!(f, "The figures of {engine} are not to be used: {fault}."),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let leg = |direction, downtime| {
            Leg {
            report: serde_json::json!({
                "vm": "demo", "outcome": "completed", "total_seconds": 2.5, "downtime_seconds": 0.18, "rounds": [{}, {}],
                "vmm_bytes": 300_000_000_u64, "wire_bytes": 80_000_000_u64, "reduction_ratio": 3.75,
            })
            .as_object()
            .unwrap()
            .clone(),
            downtime_outside_seconds: Some(downtime),
            wire_bytes_outside: Some(81_000_000),
            direction,
        }
        };
        let baseline = Baseline {
            engine: Engine::QemuTcpCubicDefault,
            outcome: Outcome::NotFinished,
            total_seconds: Some(25.0),
            wire_bytes: Some(31_000_000),
            downtime_seconds: None,
            reason: None,
            link_fault: None,
        };
        Report {
            profile: "intercontinental".to_owned(),
            floor_downtime_seconds: Some(0.012),
            legs: vec![leg("A to B", 0.187), leg("B to A", 0.2)],
            baselines: vec![baseline],
            guest: Proof {
                intact: true,
                pages_checked: 102_400,
            },
            link_fault: None,
            problem: None,
        }
    }

    #[test]
    fn the_json_keeps_its_names() {
        let json = serde_json::to_value(report()).unwrap();
        let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(
            names(&json),
            ["baselines", "floor_downtime_seconds", "guest", "legs", "profile"]
        );
        assert_eq!(names(&json["guest"]), ["intact", "pages_checked"]);
        assert_eq!(
            names(&json["baselines"][0]),
            ["downtime_seconds", "engine", "outcome", "total_seconds", "wire_bytes"]
        );
        assert_eq!(json["baselines"][0]["outcome"], "not finished");
        assert_eq!(json["legs"][1]["outcome"], "completed");
        assert_eq!(json["legs"][1]["downtime_outside_seconds"], 0.2);
    }

    #[test]
    fn the_tables_show_what_the_link_adds_to_the_downtime() {
        insta::assert_snapshot!(report().to_string(), @r"
        Link: intercontinental

        leg      way   rounds    total   guest's bytes   on the wire   reduction   downtime   from outside
        1     A to B        2   2.50 s        300.0 MB       80.0 MB         3.8     180 ms         187 ms
        2     B to A        2   2.50 s        300.0 MB       80.0 MB         3.8     180 ms         200 ms
        Downtime from outside: median 194 ms, worst 200 ms. With no link 12 ms: the link adds 182 ms (median), 188 ms (worst).

        engine                        outcome       total   on the wire   downtime from outside
        longhaul (median)           completed      2.50 s       80.0 MB                  194 ms
        qemu-tcp-cubic-default   not finished   > 25.00 s       31.0 MB                       -

        Guest: intact, 102400 pages checked.
        ");
    }
}
