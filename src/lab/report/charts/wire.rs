//! What each engine sent over the link.

use super::Figure;
use super::bars::{self, Bar};
use super::palette::Ink;
use crate::lab::report::escape;
use crate::lab::report::quantity::Quantity;
use crate::lab::report::statistics::Spread;
use crate::lab::report::summary::{Group, Measure, Row, Summary};

/// One picture for each guest on each link.
pub(in crate::lab::report) fn wire(summary: &Summary<'_>) -> Vec<Figure> {
    summary
        .groups
        .iter()
        .filter_map(|group| figure(summary, group))
        .collect()
}

fn figure(summary: &Summary<'_>, group: &Group<'_>) -> Option<Figure> {
    let bars: Vec<Bar> = group
        .rows
        .iter()
        .filter_map(|row| bar(row, summary.place(row.engine)))
        .collect();
    if bars.is_empty() {
        return None;
    }
    Some(Figure {
        name: format!("wire-{}", escape::slug(&group.name())),
        title: format!("Bytes on the wire: {}", group.name()),
        caption: String::new(),
        picture: bars::draw(&bars, Quantity::Bytes, "IP bytes of both directions"),
    })
}

fn bar(row: &Row<'_>, place: usize) -> Option<Bar> {
    let mut bar = Bar {
        label: row.engine.to_owned(),
        text: String::new(),
        ink: Ink::Engine(place),
        solid: None,
        hatched: None,
        whisker: None,
        outline: given(row),
        endless: false,
    };
    if let Some(spread) = row.spread(Measure::Wire) {
        bar.text = Quantity::Bytes.show(spread.median);
        if let Some(given) = bar.outline {
            bar.text = format!("{} of {}", bar.text, Quantity::Bytes.show(given));
        }
        bar.solid = Some(spread.median);
        bar.whisker = (spread.count > 1).then_some((spread.low, spread.high));
    } else {
        let reached = row.reached(Measure::Wire)?;
        bar.text = format!("not finished after {}", Quantity::Bytes.show(reached.median));
        bar.hatched = Some((0.0, reached.median));
    }
    Some(bar)
}

/// Median of what the hypervisor gave to the gateway. Only our own report tells it.
fn given(row: &Row<'_>) -> Option<f64> {
    let bytes = |run: &&crate::lab::record::Run| run.report.get("vmm_bytes")?.as_u64().map(|bytes| bytes as f64);
    Spread::of(row.completed.iter().filter_map(bytes)).map(|spread| spread.median)
}
