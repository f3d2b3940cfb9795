//! What a move does to the work of an application inside the guest.

use super::document::{Block, Cell, Kind, Table, Weight};
use super::quantity::Quantity;
use super::statistics::Spread;
use super::summary::{Group, Row, Summary};
use crate::lab::record::{Application, Run};

/// Tables of all groups with applications.
pub(super) fn applications(summary: &Summary<'_>) -> Vec<Block> {
    let mut blocks = Vec::new();
    for group in &summary.groups {
        for name in names(group) {
            let table = table(group, name);
            if !table.rows.is_empty() {
                blocks.push(Block::Heading(format!("{name}: {}", group.name())));
                blocks.push(Block::Table(table));
            }
        }
    }
    if blocks.is_empty() {
        return blocks;
    }
    let mut head = vec![Block::Paragraph(
        "Medians of usable runs that arrived, with their spread. During: from the command to the arrival. p99: 99 of 100 operations took at most \
         this long; a pause shorter than a hundredth of the operations' time is not in it."
            .to_owned(),
    )];
    if summary
        .groups
        .iter()
        .flat_map(|group| &group.rows)
        .flat_map(|row| &row.completed)
        .any(|run| emulated(run))
    {
        head.push(Block::Notice(Weight::Known, UNDER_TCG.to_owned()));
    }
    head.extend(blocks);
    head
}

/// A guest whose CPU is emulated competes with the engine for the host's.
pub(super) fn emulated(run: &Run) -> bool {
    run.setting.accelerator == "tcg"
}

const UNDER_TCG: &str = "Under TCG this measures contention for CPU: guest, hypervisor and gateways share the CPUs of one machine, and the guest needs most of them.";

fn names<'a>(group: &Group<'a>) -> Vec<&'a str> {
    let mut names = Vec::new();
    let runs = group.rows.iter().flat_map(|row| &row.completed);
    for application in runs.filter_map(|run| run.application.as_ref()) {
        if !names.contains(&application.name.as_str()) {
            names.push(&application.name);
        }
    }
    names
}

fn table(group: &Group<'_>, name: &str) -> Table {
    let mut table = Table::new([
        ("Engine", Kind::Words),
        ("Accelerator", Kind::Words),
        ("Operations before", Kind::Number),
        ("during", Kind::Number),
        ("after", Kind::Number),
        ("during / before", Kind::Number),
        ("p99 before", Kind::Number),
        ("during", Kind::Number),
        ("after", Kind::Number),
    ]);
    for row in &group.rows {
        table.rows.extend(cells(row, name));
    }
    table
}

fn cells(row: &Row<'_>, name: &str) -> Option<Vec<Cell>> {
    let runs: Vec<(&Run, &Application)> = row
        .completed
        .iter()
        .filter_map(|run| Some((*run, run.application.as_ref()?)))
        .filter(|(_, application)| application.name == name)
        .collect();
    let figure = |quantity: Quantity, of: fn(&Application) -> f64| {
        let values = runs
            .iter()
            .map(|(_, application)| of(application))
            .filter(|value| value.is_finite());
        Spread::of(values).map_or_else(Cell::nothing, |spread| {
            Cell::new(quantity.show(spread.median)).small(spread.ends(quantity))
        })
    };
    let mut accelerators: Vec<&str> = runs.iter().map(|(run, _)| run.setting.accelerator.as_str()).collect();
    accelerators.sort_unstable();
    accelerators.dedup();
    (!runs.is_empty()).then(|| {
        vec![
            Cell::new(row.engine),
            Cell::new(accelerators.join(", ")),
            figure(Quantity::OperationsPerSecond, |work| work.before.operations_per_second),
            figure(Quantity::OperationsPerSecond, |work| work.during.operations_per_second),
            figure(Quantity::OperationsPerSecond, |work| work.after.operations_per_second),
            figure(Quantity::Share, |work| {
                work.during.operations_per_second / work.before.operations_per_second
            }),
            figure(Quantity::Seconds, |work| work.before.p99_seconds),
            figure(Quantity::Seconds, |work| work.during.p99_seconds),
            figure(Quantity::Seconds, |work| work.after.p99_seconds),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::record::Work;
    use crate::lab::report::samples;

    #[test]
    fn slowdown_under_tcg_is_called_contention_for_cpu() {
        let work = |operations_per_second| Work {
            operations_per_second,
            p99_seconds: 0.002,
        };
        let mut run = samples::run("longhaul", 1);
        run.application = Some(Application {
            name: "redis".to_owned(),
            before: work(1_000.0),
            during: work(250.0),
            after: work(0.0),
        });
        let says = |run: &Run| {
            let blocks = applications(&Summary::of(std::slice::from_ref(run), &[]));
            blocks
                .iter()
                .any(|block| matches!(block, Block::Notice(_, text) if text.contains("contention for CPU")))
        };
        run.setting.accelerator = "tcg".to_owned();
        assert!(says(&run));
        run.setting.accelerator = "kvm".to_owned();
        assert!(!says(&run));
        let runs = [run];
        let summary = Summary::of(&runs, &[]);
        let cells = cells(&summary.groups[0].rows[0], "redis").unwrap();
        assert_eq!(cells[5].text, "25.0\u{a0}%");
    }

    #[test]
    fn guests_without_an_application_have_no_section() {
        let runs = [samples::run("longhaul", 1)];
        assert!(applications(&Summary::of(&runs, &[])).is_empty());
    }
}
