//! Two files of runs side by side: before and after a change, or the same plan twice.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;

use super::record::{Outcome, Run};
use super::report::{ReadError, read};
use super::table::{Table, median, or_dash, seconds};

/// Compares the medians of two files of runs, cell by cell.
#[derive(Clone, Debug, Args)]
pub struct CompareArgs {
    /// Lines of the lab, as --json wrote them.
    #[arg(value_name = "BEFORE.jsonl")]
    pub before: PathBuf,
    /// The same of another run.
    #[arg(value_name = "AFTER.jsonl")]
    pub after: PathBuf,
    /// Total times agree where neither is more than this much above the other, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 25.0)]
    pub within: f64,
}

/// Link, guest, QEMU and engine.
type Cell = [String; 4];

/// What a cell of the matrix came to, by its usable runs.
#[derive(Clone, Debug, Default, PartialEq)]
struct Found {
    completed: usize,
    not_completed: usize,
    total_seconds: Option<f64>,
    wire_bytes: Option<f64>,
    downtime_seconds: Option<f64>,
}

/// How a cell of two files compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Agree,
    Differ,
    /// One file has no usable run of it.
    Unknown,
}

impl CompareArgs {
    /// Prints the comparison and returns the exit code: 0 every cell agrees, 1 one does not, 2 the files cannot be read.
    pub(super) fn run(&self) -> u8 {
        match self.compare() {
            Ok((text, agrees)) => {
                // A reader that has gone must not keep the exit code from being right.
                let _ = write!(std::io::stdout(), "{text}");
                u8::from(!agrees)
            }
            Err(error) => {
                eprintln!("longhaul: {error}");
                2
            }
        }
    }

    fn compare(&self) -> Result<(String, bool), ReadError> {
        let before = cells(&read(&self.before)?.runs);
        let after = cells(&read(&self.after)?.runs);
        let mut table = Table::new(&[
            "link",
            "guest",
            "QEMU",
            "engine",
            "total before",
            "after",
            "ratio",
            "wire bytes",
            "downtime",
            "",
        ]);
        let mut agrees = true;
        for (cell, before) in &before {
            let Some(after) = after.get(cell) else { continue };
            let verdict = judge(before, after, self.within / 100.0);
            agrees &= verdict != Verdict::Differ;
            let ratio = |figure: fn(&Found) -> Option<f64>| {
                or_dash(figure(before).zip(figure(after)), |(before, after)| {
                    format!("x {:.2}", after / before.max(f64::MIN_POSITIVE))
                })
            };
            let [link, guest, qemu, engine] = cell.clone();
            table.row([
                link,
                guest,
                qemu,
                engine,
                or_dash(before.total_seconds, seconds),
                or_dash(after.total_seconds, seconds),
                ratio(|found| found.total_seconds),
                ratio(|found| found.wire_bytes),
                ratio(|found| found.downtime_seconds),
                match verdict {
                    Verdict::Agree => "agree",
                    Verdict::Differ => "DIFFER",
                    Verdict::Unknown => "no usable run",
                }
                .to_owned(),
            ]);
        }
        Ok((table.to_string(), agrees))
    }
}

fn cells(runs: &[Run]) -> BTreeMap<Cell, Found> {
    let mut groups: BTreeMap<Cell, Vec<&Run>> = BTreeMap::new();
    for run in runs.iter().filter(|run| run.outcome != Outcome::Unavailable) {
        let cell = [&run.profile, &run.guest, &run.setting.qemu, &run.engine].map(Clone::clone);
        let group = groups.entry(cell).or_default();
        if run.usable {
            group.push(run);
        }
    }
    groups
        .into_iter()
        .map(|(cell, runs)| (cell, Found::of(&runs)))
        .collect()
}

impl Found {
    fn of(runs: &[&Run]) -> Self {
        let completed: Vec<&&Run> = runs.iter().filter(|run| run.outcome == Outcome::Completed).collect();
        let middle = |figure: fn(&Run) -> Option<f64>| median(completed.iter().filter_map(|run| figure(run)));
        Self {
            completed: completed.len(),
            not_completed: runs.len() - completed.len(),
            total_seconds: middle(|run| run.total_seconds),
            wire_bytes: middle(|run| run.wire_bytes.map(|bytes| bytes as f64)),
            downtime_seconds: middle(|run| run.downtime_seconds),
        }
    }
}

/// Cells agree where most runs ended alike and those that completed took as long.
fn judge(before: &Found, after: &Found, within: f64) -> Verdict {
    let usable = |found: &Found| found.completed + found.not_completed;
    if usable(before) == 0 || usable(after) == 0 {
        return Verdict::Unknown;
    }
    let completes = |found: &Found| found.completed > found.not_completed;
    let alike = match (before.total_seconds, after.total_seconds) {
        (Some(before), Some(after)) => before.max(after) <= before.min(after) * (1.0 + within),
        _ => true,
    };
    if completes(before) == completes(after) && (alike || !completes(before)) {
        Verdict::Agree
    } else {
        Verdict::Differ
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(completed: usize, not_completed: usize, total_seconds: f64) -> Found {
        Found {
            completed,
            not_completed,
            total_seconds: (completed > 0).then_some(total_seconds),
            ..Found::default()
        }
    }

    #[test]
    fn a_quarter_more_agrees_and_a_little_above_it_does_not() {
        assert_eq!(judge(&found(3, 0, 4.0), &found(3, 0, 5.0), 0.25), Verdict::Agree);
        assert_eq!(judge(&found(3, 0, 5.0), &found(3, 0, 4.0), 0.25), Verdict::Agree);
        assert_eq!(judge(&found(3, 0, 4.0), &found(3, 0, 5.01), 0.25), Verdict::Differ);
    }

    #[test]
    fn an_engine_that_does_not_finish_any_more_differs_and_one_that_never_did_agrees() {
        assert_eq!(judge(&found(3, 0, 4.0), &found(0, 3, 0.0), 0.25), Verdict::Differ);
        assert_eq!(judge(&found(0, 3, 0.0), &found(0, 3, 0.0), 0.25), Verdict::Agree);
    }

    #[test]
    fn nothing_is_said_of_a_cell_without_a_usable_run() {
        assert_eq!(judge(&found(0, 0, 0.0), &found(3, 0, 4.0), 0.25), Verdict::Unknown);
    }
}
