//! The figures of each guest on each link, and how other engines compare with ours.

use super::document::{Block, Cell, Kind, Table};
use super::quantity::Quantity;
use super::statistics::{Extent, Spread};
use super::summary::{Group, Integrity, Measure, OURS, Row, Summary};

/// Tables of all groups.
pub(super) fn results(summary: &Summary<'_>) -> Vec<Block> {
    let mut blocks = vec![Block::Paragraph(
        "Figures are medians of usable runs that arrived. Below each is its spread: lowest to highest of two or three runs, first to third \
         quartile of four or more; a single run has none. A column that is missing was not measured."
            .to_owned(),
    )];
    if summary.groups.iter().any(|group| group.ours().is_some()) {
        blocks.push(Block::Paragraph(format!(
            "The second table of each has the median of an engine divided by that of {OURS}: above 1 the engine takes more than {OURS}, below 1 less. \
             With > or ≥ it takes more than that, because runs of it had not finished when they were stopped; with ≤ the same is true of {OURS}."
        )));
    }
    for group in &summary.groups {
        blocks.push(Block::Heading(group.name()));
        if let Some(link) = group.link.text() {
            blocks.push(Block::Paragraph(format!("{link}.")));
        }
        blocks.push(Block::Table(figures(group)));
        blocks.extend(ratios(group).map(Block::Table));
    }
    blocks
}

fn figures(group: &Group<'_>) -> Table {
    let head = [("Engine", Kind::Words), ("Runs", Kind::Words)].into_iter();
    let measures = Measure::ALL.map(|measure| (measure.title(), Kind::Number));
    let mut table = Table::new(head.chain(measures).chain([("Guest intact", Kind::Number)]));
    for row in &group.rows {
        let mut cells = vec![Cell::new(row.engine), runs(row)];
        cells.extend(Measure::ALL.map(|measure| figure(row, measure)));
        cells.push(intact(&row.integrity));
        table.rows.push(cells);
    }
    table.without_empty_columns()
}

/// How the runs ended.
fn runs(row: &Row<'_>) -> Cell {
    let parts: Vec<String> = [
        (row.completed.len(), "completed"),
        (row.not_finished.len(), "not finished"),
        (row.failed.len(), "failed"),
        (row.unusable, "not usable"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, word)| format!("{count} {word}"))
    .collect();
    if parts.is_empty() {
        return Cell::new("unavailable");
    }
    let spread = match Extent::of(row.completed.len()) {
        Extent::Single => None,
        Extent::Range => Some("spread: lowest to highest".to_owned()),
        Extent::Quartiles => Some("spread: quartiles".to_owned()),
    };
    Cell::new(parts.join(", ")).small(spread)
}

fn figure(row: &Row<'_>, measure: Measure) -> Cell {
    let quantity = measure.quantity();
    if let Some(spread) = row.spread(measure) {
        return Cell::new(quantity.show(spread.median)).small(ends(&spread, quantity, row.completed.len()));
    }
    match measure {
        // It would have become more.
        Measure::Total | Measure::Wire if row.completed.is_empty() => match row.reached(measure) {
            Some(reached) => {
                Cell::new(format!("> {}", quantity.show(reached.median))).small(Some("not finished".to_owned()))
            }
            None => Cell::nothing(),
        },
        _ => Cell::nothing(),
    }
}

/// The ends of a spread; of how many runs it is, where it is not of all.
fn ends(spread: &Spread, quantity: Quantity, runs: usize) -> Option<String> {
    let ends = spread.ends(quantity);
    if spread.count == runs {
        return ends;
    }
    let of = format!("of {}", spread.count);
    Some(ends.map_or(of.clone(), |ends| format!("{ends} {of}")))
}

fn intact(integrity: &Integrity) -> Cell {
    let asked = integrity.intact + integrity.damaged;
    if asked == 0 {
        return Cell::nothing();
    }
    Cell {
        text: format!("{} of {asked}", integrity.intact),
        small: (integrity.unknown > 0).then(|| format!("{} not asked", integrity.unknown)),
        grave: integrity.damaged > 0,
    }
}

/// What others need for each of ours; nothing where there are no others or none of ours.
fn ratios(group: &Group<'_>) -> Option<Table> {
    const MEASURES: [Measure; 5] = [
        Measure::Total,
        Measure::Downtime,
        Measure::Wire,
        Measure::CpuSource,
        Measure::CpuDestination,
    ];
    let ours = group.ours()?;
    let title = |measure: Measure| match measure {
        Measure::CpuSource => "CPU at source",
        Measure::CpuDestination => "CPU at destination",
        other => other.title(),
    };
    let head = (format!("Compared with {OURS}"), Kind::Words);
    let columns = MEASURES.map(|measure| (title(measure).to_owned(), Kind::Number));
    let mut table = Table::new(std::iter::once(head).chain(columns));
    for row in group.rows.iter().filter(|row| row.engine != OURS && row.usable() > 0) {
        let mut cells = vec![Cell::new(row.engine)];
        cells.extend(MEASURES.map(|measure| ratio(ours, row, measure).map_or_else(Cell::nothing, Cell::new)));
        table.rows.push(cells);
    }
    let said = table.rows.iter().flatten().any(|cell| cell.text.ends_with('×'));
    said.then(|| table.without_empty_columns())
}

fn ratio(ours: &Row<'_>, other: &Row<'_>, measure: Measure) -> Option<String> {
    let unit = ours.spread(measure)?.median;
    if unit <= 0.0 {
        return None;
    }
    // A run that was stopped had taken longer than each that arrived; of other figures the like is not known.
    let stopped = |row: &Row<'_>| measure == Measure::Total && !row.not_finished.is_empty();
    let times = |value: f64| Quantity::Times.show(value / unit);
    let Some(spread) = other.spread(measure) else {
        let bounded = matches!(measure, Measure::Total | Measure::Wire) && other.completed.is_empty() && !stopped(ours);
        return bounded
            .then(|| other.reached(measure))
            .flatten()
            // That it takes more than a part of ours says nothing.
            .filter(|reached| reached.median > unit)
            .map(|reached| format!("> {}", times(reached.median)));
    };
    match (stopped(ours), stopped(other)) {
        (false, false) => Some(times(spread.median)),
        (false, true) => Some(format!("≥ {}", times(spread.median))),
        (true, false) => Some(format!("≤ {}", times(spread.median))),
        (true, true) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::record::{Outcome, Run};
    use crate::lab::report::samples;

    fn run(engine: &str, total: f64, outcome: Outcome) -> Run {
        let mut run = samples::run(engine, 1);
        run.total_seconds = Some(total);
        run.outcome = outcome;
        run
    }

    fn total_ratio(runs: &[Run]) -> Option<String> {
        let summary = Summary::of(runs, &[]);
        let rows = &summary.groups[0].rows;
        ratio(&rows[0], &rows[1], Measure::Total)
    }

    #[test]
    fn a_ratio_is_a_bound_where_runs_were_stopped() {
        let ours = || run(OURS, 2.0, Outcome::Completed);
        let other = || run("qemu", 9.0, Outcome::Completed);
        let stopped = |engine| run(engine, 150.0, Outcome::NotFinished);
        assert_eq!(total_ratio(&[ours(), other()]).as_deref(), Some("4.50×"));
        assert_eq!(total_ratio(&[ours(), stopped("qemu")]).as_deref(), Some("> 75.0×"));
        assert_eq!(
            total_ratio(&[ours(), other(), stopped("qemu")]).as_deref(),
            Some("≥ 4.50×")
        );
        assert_eq!(
            total_ratio(&[ours(), stopped(OURS), other()]).as_deref(),
            Some("≤ 4.50×")
        );
        assert_eq!(total_ratio(&[ours(), stopped(OURS), other(), stopped("qemu")]), None);
    }

    #[test]
    fn there_is_no_ratio_to_nothing() {
        assert_eq!(
            total_ratio(&[run(OURS, 0.0, Outcome::Completed), run("qemu", 9.0, Outcome::Completed)]),
            None
        );
        assert_eq!(
            total_ratio(&[run(OURS, 2.0, Outcome::Failed), run("qemu", 9.0, Outcome::Completed)]),
            None
        );
    }

    #[test]
    fn what_was_stopped_is_shown_as_more_than_its_limit() {
        let runs = [run("qemu", 150.0, Outcome::NotFinished)];
        let summary = Summary::of(&runs, &[]);
        let cell = figure(&summary.groups[0].rows[0], Measure::Total);
        assert_eq!(
            (cell.text.as_str(), cell.small.as_deref()),
            ("> 150\u{a0}s", Some("not finished"))
        );
    }

    #[test]
    fn damage_is_grave() {
        let mut damaged = run(OURS, 2.0, Outcome::Completed);
        damaged.guest_intact = Some(false);
        let runs = [run(OURS, 2.0, Outcome::Completed), damaged];
        let cell = intact(&Summary::of(&runs, &[]).integrity());
        assert!(cell.grave && cell.text == "1 of 2", "{cell:?}");
    }
}
