//! What was found: for programs as JSON, for people as tables.

use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::ledger::Verdict;
use super::number_after;
use crate::lab::engine::Moved;
use crate::lab::engine::proof::Proof;
use crate::lab::record::{Application, Work};
use crate::lab::table::{Table, median, megabytes, milliseconds, or_dash, seconds};

/// Everything that one run found.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// The link.
    pub(super) profile: String,
    /// A guest each, in order.
    pub(super) turns: Vec<Turn>,
    /// Why the run ended early; absent where it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
}

/// One guest that went there and back.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Turn {
    /// `copied` or `shared`.
    pub(super) disks: &'static str,
    pub(super) moves: Vec<Move>,
    /// Of the images of both sites, after each move of the guest at rest.
    pub(super) comparisons: Vec<Comparison>,
    /// Transactions of pgbench that the load in the guest had acknowledged.
    pub(super) transactions: Option<u64>,
    /// The longest time that the client outside waited for an acknowledgement.
    pub(super) longest_pause_seconds: Option<f64>,
    /// What pg_checksums found.
    pub(super) checksums: Option<Checksums>,
    /// The client's log and the database.
    pub(super) database: Option<Verdict>,
    /// What e2fsck says of the file system.
    #[serde(serialize_with = "outcome")]
    pub(super) file_system: Option<Result<(), String>>,
    /// The guest's memory, by its own word.
    pub(super) proof: Proof,
    /// Why the emulated link was not what its profile says, so that the times are not to be used; absent where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_fault: Option<String>,
}

/// One move.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Move {
    /// Which way it went.
    pub(super) direction: &'static str,
    /// The guest was at work.
    pub(super) works: bool,
    /// From the command to the first sign of life at the destination.
    pub(super) total_seconds: Option<f64>,
    /// From the last sign of life at the source to the first at the destination, on the host's clock.
    pub(super) downtime_seconds: Option<f64>,
    /// Longest time between two signs of life at the destination, until the guest had worked and proved its memory there.
    pub(super) longest_pause_seconds: Option<f64>,
    /// How long a client had no answer.
    pub(super) blackout_seconds: Option<f64>,
    /// IP bytes of both directions that the link counted.
    pub(super) wire_bytes: Option<u64>,
    /// pgbench's transactions before, during and after.
    pub(super) application: Option<Application>,
    /// What `longhaul migrate` reported.
    pub(super) report: Map<String, Value>,
}

/// The images of both sites.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Comparison {
    /// A guest sees the same in both.
    pub(super) is_equal: bool,
    /// What differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) difference: Option<String>,
}

/// What pg_checksums found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Checksums {
    pub(super) blocks: u64,
    pub(super) bad: u64,
}

fn outcome<S: serde::Serializer>(found: &Option<Result<(), String>>, serializer: S) -> Result<S::Ok, S::Error> {
    match found {
        None => serializer.serialize_none(),
        Some(Ok(())) => serializer.serialize_str("clean"),
        Some(Err(said)) => serializer.serialize_str(said),
    }
}

impl Checksums {
    /// Reads the guest's answer.
    pub(super) fn parse(said: &str) -> Option<Self> {
        Some(Self {
            blocks: number_after(said, "blocks")?,
            bad: number_after(said, "bad")?,
        })
    }
}

impl Comparison {
    pub(super) fn of(compared: Result<(), String>) -> Self {
        Self {
            is_equal: compared.is_ok(),
            difference: compared.err(),
        }
    }
}

impl Move {
    pub(super) fn new(direction: &'static str, works: bool, moved: Moved) -> Self {
        Self {
            direction,
            works,
            total_seconds: moved.total_seconds,
            downtime_seconds: moved.downtime_seconds,
            longest_pause_seconds: None,
            blackout_seconds: moved.blackout_seconds,
            wire_bytes: moved.wire_bytes,
            application: moved.application,
            report: moved.report,
        }
    }

    /// A figure of the disks that were copied.
    fn of_disks(&self, name: &str) -> Option<f64> {
        self.report.get("disks")?.get(name)?.as_f64()
    }

    fn rate(&self, part: impl Fn(&Application) -> Work) -> String {
        or_dash(self.application.as_ref(), |application| {
            format!("{:.0}", part(application).operations_per_second)
        })
    }
}

impl Turn {
    pub(super) fn new(disks: &'static str) -> Self {
        Self {
            disks,
            moves: Vec::new(),
            comparisons: Vec::new(),
            transactions: None,
            longest_pause_seconds: None,
            checksums: None,
            database: None,
            file_system: None,
            proof: Proof::default(),
            link_fault: None,
        }
    }

    /// What is not as it must be, a sentence each. A turn that did not get so far has not shown it.
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut must = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        let wanted = if self.disks == "copied" { 2 } else { 0 };
        must(
            self.comparisons.len() == wanted,
            format!("{} of {wanted} comparisons were made", self.comparisons.len()),
        );
        for comparison in &self.comparisons {
            let difference = comparison.difference.as_deref().unwrap_or_default();
            must(comparison.is_equal, format!("the images differ: {difference}"));
        }
        match self.checksums {
            Some(Checksums { blocks, bad }) => {
                must(
                    blocks > 0 && bad == 0,
                    format!("{bad} of {blocks} blocks have a wrong checksum"),
                );
            }
            None => must(false, "no checksums were read".to_owned()),
        }
        match &self.database {
            Some(verdict) => {
                must(verdict.acknowledged > 0, "nothing was acknowledged".to_owned());
                must(
                    verdict.lost == 0,
                    format!("{} acknowledged commits are lost", verdict.lost),
                );
                must(
                    verdict.unacknowledged <= 1,
                    format!("{} rows are there that nobody committed", verdict.unacknowledged),
                );
                must(
                    verdict.is_balanced(),
                    format!("the balances differ: {:?}", verdict.balances),
                );
                must(
                    self.transactions == Some(verdict.history),
                    format!(
                        "pgbench's history has {} transactions, and {} were acknowledged",
                        verdict.history,
                        or_dash(self.transactions, |number| number.to_string())
                    ),
                );
                must(verdict.indexes > 0, "no index was checked".to_owned());
                must(
                    verdict.bad_rows == 0,
                    format!("amcheck finds {} bad rows", verdict.bad_rows),
                );
            }
            None => must(false, "the database was not checked".to_owned()),
        }
        match &self.file_system {
            Some(checked) => {
                let said = checked.as_ref().err().map_or("", String::as_str);
                must(checked.is_ok(), format!("e2fsck says: {said}"));
            }
            None => must(false, "the file system was not checked".to_owned()),
        }
        faults
    }

    /// Moves of a guest at work.
    fn at_work(&self) -> impl Iterator<Item = &Move> {
        self.moves.iter().filter(|each| each.works)
    }
}

impl Report {
    pub(super) fn new(profile: &str) -> Self {
        Self {
            profile: profile.to_owned(),
            turns: Vec::new(),
            problem: None,
        }
    }

    /// Every move arrived, and nothing is lost or damaged.
    pub(super) fn is_right(&self) -> bool {
        self.problem.is_none() && !self.turns.is_empty() && self.turns.iter().all(|turn| turn.faults().is_empty())
    }

    pub(super) fn write_json(&self, file: &Path) -> std::io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        std::fs::write(file, text)
    }

    fn write_moves(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&[
            "guest",
            "disk",
            "way",
            "it is",
            "total",
            "downtime",
            "pause after",
            "blackout",
            "disk read",
            "disk on wire",
            "rounds",
            "all on wire",
            "tps before",
            "during",
            "after",
        ]);
        for (number, turn) in self.turns.iter().enumerate() {
            for each in &turn.moves {
                table.row([
                    (number + 1).to_string(),
                    turn.disks.to_owned(),
                    each.direction.to_owned(),
                    if each.works { "at work" } else { "at rest" }.to_owned(),
                    or_dash(each.total_seconds, seconds),
                    or_dash(each.downtime_seconds, milliseconds),
                    or_dash(each.longest_pause_seconds, milliseconds),
                    or_dash(each.blackout_seconds, milliseconds),
                    or_dash(each.of_disks("read_bytes"), megabytes),
                    or_dash(each.of_disks("wire_bytes"), megabytes),
                    or_dash(each.of_disks("rounds"), |rounds| format!("{rounds:.0}")),
                    or_dash(each.wire_bytes, |bytes| megabytes(bytes as f64)),
                    each.rate(|application| application.before),
                    each.rate(|application| application.during),
                    each.rate(|application| application.after),
                ]);
            }
        }
        write!(f, "\n{table}")
    }

    fn write_checks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&[
            "guest",
            "acknowledged",
            "lost",
            "longest wait",
            "transactions",
            "checksums bad",
            "of blocks",
            "indexes right",
            "bad rows",
            "images equal",
            "file system",
        ]);
        for (number, turn) in self.turns.iter().enumerate() {
            let verdict = turn.database.as_ref();
            let of_database = |part: fn(&Verdict) -> u64| or_dash(verdict, |verdict| part(verdict).to_string());
            let equal = turn.comparisons.iter().filter(|each| each.is_equal).count();
            table.row([
                (number + 1).to_string(),
                of_database(|verdict| verdict.acknowledged),
                of_database(|verdict| verdict.lost),
                or_dash(turn.longest_pause_seconds, seconds),
                or_dash(turn.transactions, |number| number.to_string()),
                or_dash(turn.checksums, |checksums| checksums.bad.to_string()),
                or_dash(turn.checksums, |checksums| checksums.blocks.to_string()),
                of_database(|verdict| verdict.indexes),
                of_database(|verdict| verdict.bad_rows),
                if turn.disks == "copied" {
                    format!("{equal} of {}", turn.comparisons.len())
                } else {
                    "-".to_owned()
                },
                or_dash(turn.file_system.as_ref(), |checked| {
                    if checked.is_ok() { "clean" } else { "damaged" }.to_owned()
                }),
            ]);
        }
        write!(f, "\n{table}")
    }

    /// Median downtimes at work of each kind.
    fn write_downtimes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for disks in ["copied", "shared"] {
            let moves = || {
                self.turns
                    .iter()
                    .filter(|turn| turn.disks == disks)
                    .flat_map(Turn::at_work)
            };
            let downtimes = || moves().filter_map(|each| each.downtime_seconds);
            if let Some(middle) = median(downtimes()) {
                writeln!(
                    f,
                    "downtime at work, disk {disks}: median {}, worst {}, of {} moves",
                    milliseconds(middle),
                    milliseconds(downtimes().fold(0.0, f64::max)),
                    downtimes().count()
                )?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "PostgreSQL under pgbench's transactions, moved across {}",
            self.profile
        )?;
        self.write_moves(f)?;
        self.write_checks(f)?;
        writeln!(f)?;
        self.write_downtimes(f)?;
        for (number, turn) in self.turns.iter().enumerate() {
            if let Some(fault) = &turn.link_fault {
                writeln!(f, "guest {}: the times are not to be used, since {fault}", number + 1)?;
            }
            // Where the run ended early, what was not looked at is no finding.
            if self.problem.is_none() {
                for fault in turn.faults() {
                    writeln!(f, "guest {}: {fault}", number + 1)?;
                }
            }
        }
        match &self.problem {
            Some(problem) => write!(f, "\nended early: {problem}"),
            None if self.is_right() => write!(f, "\nnothing is lost, and every check is good"),
            None => write!(f, "\nNOT right"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Turn {
        let mut turn = Turn::new("copied");
        turn.comparisons = vec![Comparison::of(Ok(())); 2];
        turn.transactions = Some(7);
        turn.checksums = Checksums::parse("blocks 12 bad 0");
        turn.database = Some(Verdict {
            acknowledged: 9,
            lost: 0,
            unacknowledged: 1,
            balances: [-4; 4],
            history: 7,
            indexes: 3,
            bad_rows: 0,
        });
        turn.file_system = Some(Ok(()));
        turn
    }

    #[test]
    fn a_turn_is_right_where_everything_was_checked_and_good() {
        assert_eq!(good().faults(), Vec::<String>::new());
        let mut report = Report::new("lan");
        assert!(!report.is_right(), "nothing was done");
        report.turns.push(good());
        assert!(report.is_right());
        report.problem = Some("stopped".to_owned());
        assert!(!report.is_right());
    }

    #[test]
    fn each_thing_that_is_wrong_or_was_not_looked_at_is_a_fault() {
        type Harm = fn(&mut Turn);
        let harms: [(&str, Harm); 12] = [
            ("images differ", |turn| {
                turn.comparisons[0] = Comparison::of(Err("at 4096".to_owned()))
            }),
            ("comparisons", |turn| turn.comparisons.truncate(1)),
            ("checksum", |turn| turn.checksums = Checksums::parse("blocks 12 bad 1")),
            ("no checksums", |turn| turn.checksums = None),
            ("lost", |turn| turn.database.as_mut().unwrap().lost = 1),
            ("nobody committed", |turn| {
                turn.database.as_mut().unwrap().unacknowledged = 2
            }),
            ("balances", |turn| turn.database.as_mut().unwrap().balances[3] = 0),
            ("history", |turn| turn.database.as_mut().unwrap().history = 6),
            ("bad rows", |turn| turn.database.as_mut().unwrap().bad_rows = 1),
            ("not checked", |turn| turn.database = None),
            ("e2fsck", |turn| turn.file_system = Some(Err("clean?".to_owned()))),
            ("file system", |turn| turn.file_system = None),
        ];
        for (name, harm) in harms {
            let mut turn = good();
            harm(&mut turn);
            let faults = turn.faults();
            assert!(faults.len() == 1 && faults[0].contains(name), "{name}: {faults:?}");
        }
    }
}
