//! How fast a guest may write so that an engine still gets it across.

use super::Figure;
use super::bars::{self, Bar};
use super::palette::Ink;
use crate::lab::record::Frontier;
use crate::lab::report::escape;
use crate::lab::report::quantity::{Quantity, grouped};
use crate::lab::report::summary::Summary;

/// One picture for each guest on each link that has been searched.
pub(in crate::lab::report) fn frontiers(summary: &Summary<'_>, frontiers: &[Frontier]) -> Vec<Figure> {
    let mut groups: Vec<(&str, &str)> = Vec::new();
    for frontier in frontiers {
        let group = (frontier.profile.as_str(), frontier.guest.as_str());
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    groups
        .into_iter()
        .map(|(profile, guest)| {
            let mut of_group: Vec<&Frontier> = frontiers
                .iter()
                .filter(|frontier| frontier.profile == profile && frontier.guest == guest)
                .collect();
            of_group.sort_by_key(|frontier| summary.place(&frontier.engine));
            let most = of_group.iter().copied().filter_map(ceiling).max().unwrap_or(1);
            let bars: Vec<Bar> = of_group
                .iter()
                .map(|frontier| bar(frontier, most, summary.place(&frontier.engine)))
                .collect();
            let runs: u64 = of_group.iter().map(|frontier| u64::from(frontier.runs)).sum();
            Figure {
                name: format!("frontier-{}", escape::slug(&format!("{profile} {guest}"))),
                title: format!("Convergence frontier: {profile} · {guest}"),
                caption: format!("Found by {runs} runs."),
                picture: bars::draw(
                    &bars,
                    Quantity::PagesPerSecond,
                    "Pages of 4 KiB that the guest rewrites",
                ),
            }
        })
        .collect()
}

/// The highest rate that a search says something about.
fn ceiling(frontier: &Frontier) -> Option<u64> {
    frontier.fails_pages_per_second.max(frontier.converges_pages_per_second)
}

fn bar(frontier: &Frontier, most: u64, place: usize) -> Bar {
    let rate = |pages: u64| grouped(pages as f64);
    let (text, solid, hatched) = match (frontier.converges_pages_per_second, frontier.fails_pages_per_second) {
        // Writes that fail below others that converge: a search over something that does not grow evenly.
        (Some(converges), Some(fails)) if fails <= converges => (
            format!("up to {}, but not at {}", rate(converges), rate(fails)),
            None,
            Some((fails as f64, converges as f64)),
        ),
        (Some(converges), Some(fails)) => (
            format!("{} to {} pages/s", rate(converges), rate(fails)),
            Some(converges as f64),
            Some((converges as f64, fails as f64)),
        ),
        (Some(converges), None) => (
            format!("at least {} pages/s", rate(converges)),
            Some(converges as f64),
            None,
        ),
        (None, Some(fails)) => (
            format!("not even {} pages/s", rate(fails)),
            None,
            Some((0.0, fails as f64)),
        ),
        (None, None) => ("not known".to_owned(), None, Some((0.0, most as f64))),
    };
    Bar {
        label: frontier.engine.clone(),
        text,
        ink: Ink::Engine(place),
        solid,
        hatched,
        whisker: None,
        outline: None,
        endless: frontier.fails_pages_per_second.is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frontier(converges: Option<u64>, fails: Option<u64>) -> Bar {
        let frontier = Frontier {
            engine: "longhaul".to_owned(),
            profile: "lossy".to_owned(),
            guest: "busy".to_owned(),
            converges_pages_per_second: converges,
            fails_pages_per_second: fails,
            limit: None,
            runs: 3,
        };
        bar(&frontier, 64_000, 0)
    }

    #[test]
    fn only_what_converged_is_drawn_solid() {
        let known = frontier(Some(8_000), Some(16_000));
        assert_eq!((known.solid, known.hatched), (Some(8_000.0), Some((8_000.0, 16_000.0))));
        let never = frontier(None, Some(1_000));
        assert_eq!(
            (never.solid, never.hatched, never.text.as_str()),
            (None, Some((0.0, 1_000.0)), "not even 1000 pages/s")
        );
        let always = frontier(Some(64_000), None);
        assert!(always.endless && always.hatched.is_none());
        assert_eq!(frontier(None, None).text, "not known");
    }
}
