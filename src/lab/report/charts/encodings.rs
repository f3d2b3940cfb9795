//! How the gateways carried the guest's pages.

use super::canvas::{Canvas, HEADING, LABEL, NOTE, Picture, Side};
use super::palette::Ink;
use super::{Figure, WIDTH};
use crate::lab::record::Run;
use crate::lab::report::quantity::{Quantity, grouped};
use crate::lab::report::summary::{OURS, Summary};

/// What a page can be on the wire, the cheapest first: the names of our report.
const ENCODINGS: [&str; 6] = ["zero", "same", "reference", "delta", "literal", "raw"];

/// One picture of all guests and links that our engine moved.
pub(in crate::lab::report) fn encodings(summary: &Summary<'_>) -> Option<Figure> {
    let bars: Vec<Pages> = summary
        .groups
        .iter()
        .filter_map(|group| Pages::of(group.name(), &group.ours()?.completed))
        .collect();
    if bars.is_empty() {
        return None;
    }
    let bottom = TOP + bars.len() as f64 * ROW;
    Some(Figure {
        name: "encodings".to_owned(),
        title: "Pages by encoding".to_owned(),
        caption: format!(
            "How {OURS} carried the pages that the hypervisor gave to it, over all runs that arrived. Counts of pages, not of bytes: only \
             literal and raw pages cost most of their 4 KiB."
        ),
        picture: Picture::draw(WIDTH, bottom + 4.0, |canvas| {
            key(canvas);
            for (index, bar) in bars.iter().enumerate() {
                bar.draw(canvas, TOP + index as f64 * ROW);
            }
        }),
    })
}

/// The pages of one guest on one link.
struct Pages {
    name: String,
    counts: [f64; ENCODINGS.len()],
    runs: usize,
}

impl Pages {
    fn of(name: String, runs: &[&Run]) -> Option<Self> {
        let mut counts = [0.0; ENCODINGS.len()];
        let mut with_pages = 0;
        for pages in runs.iter().filter_map(|run| run.report.get("pages")) {
            with_pages += 1;
            for (count, encoding) in counts.iter_mut().zip(ENCODINGS) {
                *count += pages.get(encoding).and_then(serde_json::Value::as_u64).unwrap_or(0) as f64;
            }
        }
        let pages = Self {
            name,
            counts,
            runs: with_pages,
        };
        (pages.total() > 0.0).then_some(pages)
    }

    fn total(&self) -> f64 {
        self.counts.iter().sum()
    }

    fn draw(&self, canvas: &Canvas<'_>, top: f64) {
        let pages = format!(
            "{} pages a run",
            grouped((self.total() / self.runs.max(1) as f64).round())
        );
        let room = RIGHT - LEFT - LABEL.width(&pages) - 16.0;
        canvas.text(
            (LEFT, top + 8.0),
            Side::Right,
            &HEADING.shorten(&self.name, room),
            HEADING,
        );
        canvas.text((RIGHT, top + 8.0), Side::Left, &pages, LABEL);
        let mut left = LEFT;
        for (place, count) in self.counts.iter().enumerate() {
            let share = count / self.total();
            let right = left + share * (RIGHT - LEFT);
            let (upper, lower) = (top + 17.0, top + 33.0);
            if right > left {
                canvas.rectangle((left, upper), (right, lower), Ink::Encoding(place), 1.0);
                // A gap, so that neighbours of like colour are two.
                canvas.line((right, upper), (right, lower), Ink::Paper, 1.0);
            }
            let text = Quantity::Share.tick((share * 100.0).round() / 100.0);
            if LABEL.width(&text) + 6.0 < right - left {
                let letters = LABEL.ink(on(place));
                canvas.text(((left + right) / 2.0, top + 25.0), Side::Both, &text, letters);
            }
            left = right;
        }
    }
}

/// Text on a colour.
fn on(place: usize) -> Ink {
    if place < 3 { Ink::Text } else { Ink::Paper }
}

/// Names of the colours, in the order in which they lie beside each other.
fn key(canvas: &Canvas<'_>) {
    let mut left = LEFT;
    for (place, name) in ENCODINGS.iter().enumerate() {
        canvas.rectangle((left, 6.0), (left + 12.0, 18.0), Ink::Encoding(place), 1.0);
        canvas.outline((left, 6.0), (left + 12.0, 18.0), Ink::Muted, 0.5);
        canvas.text((left + 16.0, 12.0), Side::Right, name, LABEL);
        left += 16.0 + LABEL.width(name) + 12.0;
    }
    canvas.text((LEFT, 30.0), Side::Right, "cheapest on the wire first", NOTE);
}

const LEFT: f64 = 10.0;
const RIGHT: f64 = WIDTH - 10.0;
const TOP: f64 = 44.0;
const ROW: f64 = 42.0;
