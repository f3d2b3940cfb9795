//! What a plan found, in a table for the terminal. The report has the rest.

use std::collections::BTreeMap;
use std::fmt;

use crate::lab::record::{Frontier, Outcome, Run};
use crate::lab::table::{Table, median, megabytes, milliseconds, or_dash, seconds};

/// Medians of the runs that can be used, by link, guest, QEMU and engine.
pub(super) struct Summary<'a> {
    pub(super) runs: &'a [Run],
    pub(super) frontiers: &'a [Frontier],
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In the order in which they were first measured.
        let mut order = Vec::new();
        let mut groups: BTreeMap<[&str; 4], Vec<&Run>> = BTreeMap::new();
        for run in self.runs {
            let key = [&*run.profile, &*run.guest, &*run.setting.qemu, &*run.engine];
            let group = groups.entry(key).or_default();
            if group.is_empty() {
                order.push(key);
            }
            group.push(run);
        }
        let mut table = Table::new(&[
            "link",
            "guest",
            "QEMU",
            "engine",
            "completed",
            "usable",
            "total",
            "on the wire",
            "downtime from outside",
        ]);
        for key in order {
            let runs = &groups[&key];
            let usable: Vec<&&Run> = runs.iter().filter(|run| run.usable).collect();
            let completed: Vec<&&&Run> = usable.iter().filter(|run| run.outcome == Outcome::Completed).collect();
            let middle = |figure: fn(&Run) -> Option<f64>| median(completed.iter().filter_map(|run| figure(run)));
            let [profile, guest, qemu, engine] = key.map(str::to_owned);
            table.row([
                profile,
                guest,
                qemu,
                engine,
                format!(
                    "{}/{}",
                    runs.iter().filter(|run| run.outcome == Outcome::Completed).count(),
                    runs.len()
                ),
                usable.len().to_string(),
                or_dash(middle(|run| run.total_seconds), seconds),
                or_dash(middle(|run| run.wire_bytes.map(|bytes| bytes as f64)), megabytes),
                or_dash(middle(|run| run.downtime_seconds), milliseconds),
            ]);
        }
        write!(f, "{table}")?;
        for frontier in self.frontiers {
            let engine = &frontier.engine;
            match (frontier.converges_pages_per_second, frontier.fails_pages_per_second) {
                (Some(low), Some(high)) => writeln!(f, "{engine} converges at {low} pages/s and not at {high}")?,
                (Some(low), None) => writeln!(f, "{engine} converges at {low} pages/s, the most that was tried")?,
                (None, Some(high)) => writeln!(
                    f,
                    "{engine} does not converge at {high} pages/s, the least that was tried"
                )?,
                (None, None) => writeln!(f, "{engine} was not tried")?,
            }
            if let Some(limit) = &frontier.limit {
                writeln!(f, "  {limit}")?;
            }
        }
        Ok(())
    }
}
