//! What is in no figure, and why: nothing is left out unsaid.

use super::document::{Block, Cell, Kind, Table};
use super::standing::Standing;
use crate::lab::record::Run;

/// Runs that cannot be used, that broke, that were stopped, and engines that this machine cannot run.
pub(super) fn aside(runs: &[Run]) -> Vec<Block> {
    let mut unusable = Reasons::default();
    let mut failed = Reasons::default();
    let mut stopped = Reasons::default();
    let mut unavailable = Reasons::default();
    for run in runs {
        let reason = run.reason.as_deref().unwrap_or(UNSAID);
        match Standing::of(run) {
            Standing::Completed => {}
            Standing::NotFinished => stopped.add(run, reason),
            Standing::Failed => failed.add(run, reason),
            Standing::Unusable(reason) => unusable.add(run, &reason),
            Standing::Unavailable => unavailable.add(run, reason),
        }
    }
    let mut blocks = Vec::new();
    for (title, words, reasons) in [
        (
            "Not usable",
            "Runs whose link was not what its profile says, or whose processes were starved of CPU. They are in no median and in no picture.",
            unusable,
        ),
        (
            "Unavailable",
            "What this machine cannot run. It says nothing about the engine.",
            unavailable,
        ),
        ("Failed", "The engine gave up or broke.", failed),
        (
            "Not finished",
            "Had not converged when the time that the plan allows was over. They are bounds, never values.",
            stopped,
        ),
    ] {
        if !reasons.rows.is_empty() {
            blocks.push(Block::Heading(title.to_owned()));
            blocks.push(Block::Paragraph(words.to_owned()));
            blocks.push(Block::Table(reasons.table()));
        }
    }
    if blocks.is_empty() {
        blocks.push(Block::Paragraph("Every run is in the figures.".to_owned()));
    }
    blocks
}

/// Runs of one engine with one reason, together.
#[derive(Default)]
struct Reasons {
    rows: Vec<Reason>,
}

struct Reason {
    engine: String,
    reason: String,
    wheres: Vec<String>,
    runs: Vec<String>,
}

impl Reasons {
    fn add(&mut self, run: &Run, reason: &str) {
        let place = format!("{} · {}", run.profile, run.guest);
        let number = format!("{} (seed {})", run.repetition, run.seed);
        let same = |row: &Reason| row.engine == run.engine && row.reason == reason;
        if let Some(row) = self.rows.iter_mut().find(|row| same(row)) {
            if !row.wheres.contains(&place) {
                row.wheres.push(place);
            }
            row.runs.push(number);
            return;
        }
        self.rows.push(Reason {
            engine: run.engine.clone(),
            reason: reason.to_owned(),
            wheres: vec![place],
            runs: vec![number],
        });
    }

    fn table(self) -> Table {
        let mut table = Table::new([
            ("Engine", Kind::Words),
            ("Reason", Kind::Words),
            ("Runs", Kind::Number),
            ("Link · guest", Kind::Words),
            ("Repetition", Kind::Words),
        ]);
        for row in self.rows {
            table.rows.push(vec![
                Cell::new(row.engine),
                Cell::new(row.reason),
                Cell::new(row.runs.len().to_string()),
                Cell::new(first_few(&row.wheres)),
                Cell::new(first_few(&row.runs)),
            ]);
        }
        table
    }
}

/// A list that stays readable; the file has the rest.
pub(super) fn first_few(items: &[String]) -> String {
    const FEW: usize = 8;
    let shown = items[..items.len().min(FEW)].join(", ");
    match items.len().checked_sub(FEW) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}

const UNSAID: &str = "no reason was recorded";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::record::Outcome;
    use crate::lab::report::samples;

    #[test]
    fn a_run_that_is_not_usable_is_listed_with_its_reason() {
        let mut runs = vec![samples::run("longhaul", 1), samples::run("longhaul", 2)];
        for run in &mut runs {
            run.usable = false;
            run.reason = Some("longhaul waited 61 % of a second for a CPU".to_owned());
        }
        let blocks = aside(&runs);
        let [Block::Heading(title), _, Block::Table(table)] = &blocks[..] else {
            panic!("{blocks:?}");
        };
        assert_eq!(title, "Not usable");
        let texts: Vec<&str> = table.rows[0].iter().map(|cell| cell.text.as_str()).collect();
        assert_eq!(
            texts[..3],
            ["longhaul", "longhaul waited 61 % of a second for a CPU", "2"]
        );
        assert_eq!(texts[4], "1 (seed 1), 2 (seed 2)");
    }

    #[test]
    fn an_engine_that_is_unavailable_is_listed_with_its_reason() {
        let mut run = samples::run("cloud-hypervisor", 1);
        run.outcome = Outcome::Unavailable;
        run.reason = Some("needs /dev/kvm".to_owned());
        let blocks = aside(&[run]);
        assert!(matches!(&blocks[0], Block::Heading(title) if title == "Unavailable"));
        assert!(matches!(&blocks[2], Block::Table(table) if table.rows[0][1].text == "needs /dev/kvm"));
    }

    #[test]
    fn a_long_list_is_cut_and_says_so() {
        let items: Vec<String> = (1..=11).map(|number| number.to_string()).collect();
        assert_eq!(first_few(&items), "1, 2, 3, 4, 5, 6, 7, 8 and 3 more");
        assert_eq!(first_few(&items[..2]), "1, 2");
    }
}
