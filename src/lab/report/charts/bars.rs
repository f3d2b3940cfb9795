//! Lying bars from zero, each under its own words: nothing can collide, and a telephone is wide enough.

use super::WIDTH;
use super::axis::Axis;
use super::canvas::{Canvas, HEADING, LABEL, NOTE, Picture, Side};
use super::palette::Ink;
use crate::lab::report::quantity::Quantity;

/// One bar.
#[derive(Debug)]
pub(super) struct Bar {
    pub(super) label: String,
    /// The value in words, at the other end of the line.
    pub(super) text: String,
    pub(super) ink: Ink,
    /// What is known: from zero to here.
    pub(super) solid: Option<f64>,
    /// What is not known: from the first to the second.
    pub(super) hatched: Option<(f64, f64)>,
    /// How far several values lie apart.
    pub(super) whisker: Option<(f64, f64)>,
    /// Something to compare it with: an empty bar from zero to here.
    pub(super) outline: Option<f64>,
    /// Goes on beyond the end of the axis.
    pub(super) endless: bool,
}

impl Bar {
    fn most(&self) -> f64 {
        let hatched = self.hatched.map(|(_, end)| end);
        let whisker = self.whisker.map(|(_, end)| end);
        [self.solid, hatched, whisker, self.outline]
            .into_iter()
            .flatten()
            .fold(0.0, f64::max)
    }

    fn draw(&self, canvas: &Canvas<'_>, top: f64, axis: &Axis) {
        let x = |value: f64| LEFT + axis.at(value) * (RIGHT - LEFT);
        let text_width = LABEL.width(&self.text);
        let label = HEADING.shorten(&self.label, RIGHT - LEFT - text_width - 16.0);
        canvas.text((LEFT, top + 8.0), Side::Right, &label, HEADING);
        canvas.text((RIGHT, top + 8.0), Side::Left, &self.text, LABEL);
        let (upper, lower) = (top + 17.0, top + 17.0 + THICKNESS);
        let middle = (upper + lower) / 2.0;
        if let Some(value) = self.outline {
            canvas.rectangle((LEFT, upper), (x(value), lower), Ink::Shade, 1.0);
            canvas.outline((LEFT, upper), (x(value), lower), Ink::Muted, 1.0);
        }
        if let Some((from, to)) = self.hatched {
            canvas.hatch((x(from), upper), (x(to), lower), self.ink);
        }
        if let Some(value) = self.solid {
            // What is not zero is seen.
            let end = if value > 0.0 { x(value).max(LEFT + 1.0) } else { LEFT };
            let tip = if self.endless { end + THICKNESS * 0.7 } else { end };
            let corners = [(LEFT, upper), (end, upper), (tip, middle), (end, lower), (LEFT, lower)];
            canvas.area(&corners, self.ink, 1.0);
        }
        if let Some((low, high)) = self.whisker {
            // Light within the bar and dark beyond it: seen on both.
            canvas.line((x(low), middle), (x(high), middle), Ink::Paper, 3.0);
            canvas.line((x(low), middle), (x(high), middle), Ink::Text, 1.25);
            for end in [x(low), x(high)] {
                canvas.line((end, middle - 3.0), (end, middle + 3.0), Ink::Text, 1.25);
            }
        }
    }
}

/// Draws bars over one axis, which is called `title`.
pub(super) fn draw(bars: &[Bar], quantity: Quantity, title: &str) -> Picture {
    let axis = Axis::linear(bars.iter().map(Bar::most).fold(0.0, f64::max), 4);
    let bottom = TOP + bars.len() as f64 * ROW;
    Picture::draw(WIDTH, bottom + 38.0, |canvas| {
        let unit = quantity.unit(axis.ticks.last().copied().unwrap_or(1.0));
        for tick in &axis.ticks {
            let x = LEFT + axis.at(*tick) * (RIGHT - LEFT);
            canvas.line((x, bottom), (x, bottom + 4.0), Ink::Muted, 1.0);
            let text = super::super::quantity::short(*tick / unit.size);
            if x + NOTE.width(&text) / 2.0 < WIDTH {
                canvas.text((x, bottom + 12.0), Side::Both, &text, NOTE);
            } else {
                canvas.text((WIDTH - 1.0, bottom + 12.0), Side::Left, &text, NOTE);
            }
        }
        canvas.line((LEFT, bottom), (RIGHT, bottom), Ink::Muted, 1.0);
        canvas.text(
            (LEFT, bottom + 28.0),
            Side::Right,
            &format!("{title}, {}", unit.name),
            NOTE,
        );
        for (index, bar) in bars.iter().enumerate() {
            bar.draw(canvas, TOP + index as f64 * ROW, &axis);
        }
    })
}

const LEFT: f64 = 10.0;
/// Leaves room for half of the last number of the axis and for an arrow.
const RIGHT: f64 = WIDTH - 24.0;
const TOP: f64 = 4.0;
const ROW: f64 = 40.0;
const THICKNESS: f64 = 13.0;
