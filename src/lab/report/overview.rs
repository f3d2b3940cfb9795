//! All links, guests and engines in one table.

use super::document::{Block, Cell, Kind, Table};
use super::summary::{Measure, Row, Summary};

/// The table, and how to read it.
pub(super) fn overview(summary: &Summary<'_>) -> Vec<Block> {
    let engines = summary.engines.iter().map(|&engine| (engine, Kind::Number));
    let mut table = Table::new([("Link · guest", Kind::Words)].into_iter().chain(engines));
    for group in &summary.groups {
        let mut cells = vec![Cell::new(group.name())];
        for engine in &summary.engines {
            let row = group.rows.iter().find(|row| row.engine == *engine);
            cells.push(row.map_or_else(Cell::nothing, cell));
        }
        table.rows.push(cells);
    }
    vec![
        Block::Paragraph("Median total time, and below it the median downtime from outside.".to_owned()),
        Block::Table(table),
    ]
}

fn cell(row: &Row<'_>) -> Cell {
    let show = |measure: Measure| row.spread(measure).map(|spread| measure.quantity().show(spread.median));
    let without_end = match (row.not_finished.len(), row.failed.len()) {
        (0, 0) => None,
        (0, failed) => Some(format!("{failed} failed")),
        (stopped, 0) => Some(format!("{stopped} not finished")),
        (stopped, failed) => Some(format!("{stopped} not finished, {failed} failed")),
    };
    if let Some(total) = show(Measure::Total) {
        let small: Vec<String> = show(Measure::Downtime).into_iter().chain(without_end).collect();
        return Cell::new(total).small((!small.is_empty()).then(|| small.join(", ")));
    }
    let total = match row.reached(Measure::Total) {
        Some(reached) => Cell::new(format!("> {}", Measure::Total.quantity().show(reached.median))),
        None => Cell::nothing(),
    };
    let why_nothing = match (row.completed.len(), row.unusable) {
        (1.., _) => None,
        (0, 1..) => Some("not usable".to_owned()),
        (0, 0) => Some("unavailable".to_owned()),
    };
    total.small(without_end.or(why_nothing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::record::{Outcome, Run};
    use crate::lab::report::samples;

    fn only_cell(runs: &[Run]) -> (String, String) {
        let summary = Summary::of(runs, &[]);
        let cell = cell(&summary.groups[0].rows[0]);
        let plain = |text: &str| text.replace('\u{a0}', " ");
        (plain(&cell.text), plain(&cell.small.unwrap_or_default()))
    }

    #[test]
    fn a_cell_says_what_became_of_runs_that_have_no_figures() {
        let mut runs = vec![samples::run("qemu", 1), samples::run("qemu", 2)];
        let is =
            |runs: &[Run], text: &str, small: &str| assert_eq!(only_cell(runs), (text.to_owned(), small.to_owned()));
        is(&runs, "2.65 s", "187 ms");
        runs[1].outcome = Outcome::NotFinished;
        is(&runs, "2.60 s", "187 ms, 1 not finished");
        is(&runs[1..], "> 2.70 s", "1 not finished");
        runs[1].outcome = Outcome::Failed;
        is(&runs[1..], "–", "1 failed");
        runs[1].usable = false;
        is(&runs[1..], "–", "not usable");
        runs[1].outcome = Outcome::Unavailable;
        is(&runs[1..], "–", "unavailable");
    }
}
