//! What the report says, in the order in which it is read: whether the guests are intact, how engines compare, why, with what.

use super::applications::{applications, emulated};
use super::aside::aside;
use super::charts;
use super::document::{Block, Document, Weight};
use super::overview::overview;
use super::results::results;
use super::setting::{dates, setting};
use super::standing::Standing;
use super::summary::{OURS, Summary};
use crate::lab::record::{Frontier, Outcome, Run};

/// The whole report.
pub(super) fn document(runs: &[Run], frontiers: &[Frontier]) -> Document {
    let summary = Summary::of(runs, frontiers);
    let mut blocks = opening(&summary, runs, frontiers);
    let mut section = |anchor, title, content: Vec<Block>| {
        if !content.is_empty() {
            blocks.push(Block::Section { anchor, title });
            blocks.extend(content);
        }
    };
    if !runs.is_empty() {
        section("overview", "Overview", overview(&summary));
    }
    section("links", "Time and downtime by link", by_link(&summary));
    if !runs.is_empty() {
        section("results", "Results", results(&summary));
    }
    section("wire", "On the wire", on_the_wire(&summary));
    section("frontier", "Convergence frontier", frontier(&summary, frontiers));
    section("timelines", "Time lines", timelines(&summary));
    section("applications", "Applications", applications(&summary));
    if !runs.is_empty() {
        section("aside", "Not in the figures", aside(runs));
        section("setting", "What was measured", setting(&summary, runs));
    }
    section("words", "Words", words());
    Document {
        title: "WAN lab report".to_owned(),
        blocks,
    }
}

/// What a reader who reads no further must know.
fn opening(summary: &Summary<'_>, runs: &[Run], frontiers: &[Frontier]) -> Vec<Block> {
    let count = |wanted: fn(&Standing<'_>) -> bool| runs.iter().filter(|run| wanted(&Standing::of(run))).count();
    let unusable = count(|standing| matches!(standing, Standing::Unusable(_)));
    let unavailable = count(|standing| matches!(standing, Standing::Unavailable));
    let made = runs.len() - unavailable;
    let distinct = |name: fn(&Run) -> &str| {
        let mut names: Vec<&str> = runs.iter().map(name).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    };
    let mut blocks = Vec::new();
    if runs.is_empty() {
        blocks.push(Block::Paragraph(format!(
            "{} of the convergence frontier; no runs.",
            several(frontiers.len(), "search", "searches")
        )));
        return blocks;
    }
    blocks.push(Block::Paragraph(format!(
        "{} of {} across {}: {}, {} of them usable. Begun {}.",
        several(distinct(|run| &run.guest), "guest", "guests"),
        several(summary.engines.len(), "engine", "engines"),
        several(distinct(|run| &run.profile), "link", "links"),
        several(made, "run", "runs"),
        made - unusable,
        dates(runs),
    )));
    blocks.push(integrity(summary));
    if unusable > 0 {
        blocks.push(Block::Notice(
            Weight::Known,
            format!("{unusable} of {made} runs are not usable. They are in no figure and are listed with their reasons under “Not in the figures”."),
        ));
    }
    if runs
        .iter()
        .any(|run| run.outcome != Outcome::Unavailable && emulated(run))
    {
        blocks.push(Block::Notice(
            Weight::Known,
            "The guest's CPU ran under TCG, that is in software: CPU figures are of this machine, and what a move costs an application is contention for CPU above all."
                .to_owned(),
        ));
    }
    blocks
}

fn integrity(summary: &Summary<'_>) -> Block {
    let integrity = summary.integrity();
    let asked = integrity.intact + integrity.damaged;
    let unknown = if integrity.unknown > 0 {
        format!(
            " {} arrived and was not checked.",
            several(integrity.unknown, "guest", "guests")
        )
    } else {
        String::new()
    };
    if integrity.damaged > 0 {
        let mut places: Vec<String> = Vec::new();
        for group in &summary.groups {
            for row in group.rows.iter().filter(|row| row.integrity.damaged > 0) {
                places.push(format!("{} on {}", row.engine, group.name()));
            }
        }
        let places = super::aside::first_few(&places);
        return Block::Notice(
            Weight::Grave,
            format!(
                "Memory was damaged in {} of {asked} guests that checked theirs: {places}.{unknown}",
                integrity.damaged
            ),
        );
    }
    if asked == 0 {
        return Block::Notice(
            Weight::Known,
            "No guest checked its memory: nothing proves that they arrived intact.".to_owned(),
        );
    }
    Block::Notice(
        Weight::Good,
        format!(
            "All {} that checked their memory found it intact, {} pages in all.{unknown}",
            several(asked, "guest", "guests"),
            super::quantity::grouped(integrity.pages_checked as f64),
        ),
    )
}

fn several(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn by_link(summary: &Summary<'_>) -> Vec<Block> {
    let figures: Vec<charts::Figure> = charts::round_trips(summary)
        .into_iter()
        .chain(charts::losses(summary))
        .collect();
    if figures.is_empty() {
        return Vec::new();
    }
    vec![
        Block::Paragraph(
            "Medians of the runs that arrived, the line across each its spread. Links are in order and evenly spaced, not to scale. Open markers above an \
             axis have no value: at least one run had not finished when it was stopped, or failed."
                .to_owned(),
        ),
        Block::Figures(figures),
    ]
}

fn on_the_wire(summary: &Summary<'_>) -> Vec<Block> {
    let mut blocks = Vec::new();
    let wire = charts::wire(summary);
    if !wire.is_empty() {
        blocks.push(Block::Paragraph(format!(
            "Medians of the runs that arrived, the line across each its spread. Hatched: had not finished when it was stopped, and would have sent \
             more. The frame around {OURS} is what the hypervisor gave to its gateway."
        )));
        blocks.push(Block::Figures(wire));
    }
    if let Some(encodings) = charts::encodings(summary) {
        blocks.push(Block::Figures(vec![encodings]));
    }
    blocks
}

fn frontier(summary: &Summary<'_>, frontiers: &[Frontier]) -> Vec<Block> {
    let figures = charts::frontiers(summary, frontiers);
    if figures.is_empty() {
        return Vec::new();
    }
    vec![
        Block::Paragraph(
            "How many pages a second the guest may rewrite so that an engine still gets it across in the time that the plan allows. Solid: it converged. \
             Hatched: not known, between the most at which it converged and the least at which it did not. An arrow: it converged at all that was \
             tried."
                .to_owned(),
        ),
        Block::Figures(figures),
        Block::List(frontiers.iter().map(|other| compared(other, frontiers)).collect()),
    ]
}

/// How far an engine's frontier is from ours, and why its search ended.
fn compared(frontier: &Frontier, all: &[Frontier]) -> String {
    let Frontier {
        engine, profile, guest, ..
    } = frontier;
    let mut text = format!(
        "{engine} moves {guest} across {profile}: {}",
        several(frontier.runs as usize, "move", "moves")
    );
    let ours = all
        .iter()
        .find(|ours| ours.engine == OURS && ours.profile == *profile && ours.guest == *guest);
    let rates = ours.and_then(|ours| {
        Some((
            ours,
            ours.converges_pages_per_second?,
            frontier.converges_pages_per_second?,
        ))
    });
    if let Some((ours, our_rate, rate)) = rates
        && *engine != OURS
        && rate > 0
    {
        let at_least = if ours.fails_pages_per_second.is_none() {
            "at least "
        } else {
            ""
        };
        text.push_str(&format!(
            "; {OURS} converges at {at_least}{:.1} times as many pages a second",
            our_rate as f64 / rate as f64
        ));
    }
    if let Some(limit) = &frontier.limit {
        text.push_str(&format!("; the search ended since {limit}"));
    }
    text
}

fn timelines(summary: &Summary<'_>) -> Vec<Block> {
    let timelines = charts::timelines(summary);
    if timelines.is_empty() {
        return Vec::new();
    }
    let mut blocks = vec![Block::Paragraph(
        "One run of each engine: of those that arrived the one in the middle by total time, else one that was stopped. Each has its own scale of \
         time. Shaded: the downtime. Lines through all panels: rounds begin."
            .to_owned(),
    )];
    for (name, figures) in timelines {
        blocks.push(Block::Heading(name));
        blocks.push(Block::Figures(figures));
    }
    blocks
}

fn words() -> Vec<Block> {
    let words = [
        "Total time: from the command to the first sign of life at the destination; until it was stopped where it did not finish.",
        "Downtime, from outside: from the last sign of life at the source to the first at the destination, on the host's clock.",
        "Blackout: the longest gap that a prober or an open TCP session outside the guest saw; only of guests with a network.",
        "On the wire: IP bytes that both sites put onto the link, headers and repairs included.",
        "Link use: share of the link's rate that was used from source to destination while the move lasted.",
        "CPU: seconds of hypervisor and gateway for each GiB of guest memory.",
        "Peak RSS: the most memory that a gateway had resident; engines without a gateway have none.",
        "Guest intact: the guest compared every page of its working set with what it had written. Counted in runs that are not usable too.",
    ];
    let mut words: Vec<String> = words.map(str::to_owned).into();
    words.push(format!(
        "Engines whose names do not begin with {OURS} have no gateways; what a column leaves open was not measured."
    ));
    vec![Block::List(words)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::report::samples;

    fn notices(runs: &[Run]) -> Vec<(Weight, String)> {
        let notice = |block: Block| match block {
            Block::Notice(weight, text) => Some((weight, text)),
            _ => None,
        };
        document(runs, &[]).blocks.into_iter().filter_map(notice).collect()
    }

    #[test]
    fn damage_is_said_first() {
        let mut runs = vec![samples::run(OURS, 1), samples::run("qemu", 1)];
        assert!(matches!(&notices(&runs)[0], (Weight::Good, text) if text.contains("2 guests")));
        runs[1].guest_intact = Some(false);
        runs[1].usable = false;
        let (weight, text) = &notices(&runs)[0];
        assert_eq!(*weight, Weight::Grave);
        assert!(
            text.contains("1 of 2 guests") && text.contains("qemu on intercontinental · small"),
            "{text}"
        );
    }

    #[test]
    fn what_nobody_checked_is_not_called_intact() {
        let mut run = samples::run(OURS, 1);
        run.guest_intact = None;
        assert!(matches!(&notices(&[run])[0], (Weight::Known, text) if text.starts_with("No guest checked")));
    }

    #[test]
    fn the_number_of_runs_that_are_not_usable_is_said_at_the_beginning() {
        let mut runs = vec![samples::run(OURS, 1), samples::run(OURS, 2)];
        runs[0].usable = false;
        assert!(notices(&runs).iter().any(|(_, text)| text.starts_with("1 of 2 runs")));
    }
}
