//! A sheet to draw on, in points of the finished picture.
//!
//! plotters draws on whole numbers; the sheet is [`FINE`] times as large as the picture and is shrunk by its view box, so that curves are
//! smooth. Where things go is decided by each chart: the library's own axes do not know whether their labels fit.

use plotters::backend::SVGBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea as _};
use plotters::element::{Circle, PathElement, Polygon, Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, FontStyle, IntoFont as _, ShapeStyle, TextStyle};

use super::palette::{Ink, dark_rules};
use crate::lab::report::escape;

/// A finished picture.
#[derive(Clone, Debug)]
pub(in crate::lab::report) struct Picture {
    width: f64,
    height: f64,
    body: String,
}

impl Picture {
    /// Draws a picture of this size.
    pub(super) fn draw(width: f64, height: f64, draw: impl FnOnce(&Canvas<'_>)) -> Self {
        let mut svg = String::new();
        {
            let backend = SVGBackend::with_string(&mut svg, (fine(width) as u32, fine(height) as u32));
            let canvas = Canvas {
                area: backend.into_drawing_area(),
            };
            draw(&canvas);
            canvas.area.present().expect(IN_MEMORY);
        }
        // What the library opens with has the size of the sheet and no name for those who cannot see it.
        let body = svg
            .split_once('>')
            .and_then(|(_, rest)| rest.rsplit_once("</svg>"))
            .map(|(body, _)| body.trim().to_owned())
            .expect("the library writes one svg element");
        Self { width, height, body }
    }

    /// As an element of a page that has [`dark_rules`].
    pub(in crate::lab::report) fn inline(&self, title: &str) -> String {
        let Self { body, .. } = self;
        format!(
            "<svg {} role=\"img\" aria-label=\"{}\">\n{body}\n</svg>",
            self.box_attributes(),
            escape::html(title)
        )
    }

    /// As a file of its own.
    pub(in crate::lab::report) fn file(&self, title: &str) -> String {
        let Self { body, .. } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" {}>\n<title>{}</title>\n<style>@media (prefers-color-scheme:dark){{\n{}}}</style>\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#FFFFFF\"/>\n{body}\n</svg>\n",
            self.box_attributes(),
            escape::html(title),
            dark_rules("svg"),
        )
    }

    /// It needs more room than a column of a page has.
    pub(in crate::lab::report) fn is_wide(&self) -> bool {
        self.width > super::WIDTH * 1.25
    }

    fn box_attributes(&self) -> String {
        let Self { width, height, .. } = self;
        format!(
            "viewBox=\"0 0 {} {}\" width=\"{width:.0}\" height=\"{height:.0}\"",
            fine(*width),
            fine(*height)
        )
    }
}

/// The sheet. The origin is above, to the left.
pub(super) struct Canvas<'a> {
    area: DrawingArea<SVGBackend<'a>, Shift>,
}

/// A place on the sheet: to the right, down.
pub(super) type Place = (f64, f64);

/// Which side of its place a text is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// It begins there.
    Right,
    /// It ends there.
    Left,
    /// It is centred there.
    Both,
}

/// How a text looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Letters {
    pub(super) size: f64,
    pub(super) ink: Ink,
    pub(super) bold: bool,
}

/// Text of the data.
pub(super) const LABEL: Letters = Letters {
    size: 12.0,
    ink: Ink::Text,
    bold: false,
};

/// Text of axes.
pub(super) const NOTE: Letters = Letters {
    size: 11.0,
    ink: Ink::Muted,
    bold: false,
};

/// Headings within a picture.
pub(super) const HEADING: Letters = Letters {
    size: 12.0,
    ink: Ink::Text,
    bold: true,
};

impl Letters {
    /// The same in another colour.
    pub(super) fn ink(self, ink: Ink) -> Self {
        Self { ink, ..self }
    }

    /// About how wide a text becomes. The reader's fonts are not known here: the widths are those of DejaVu Sans, the widest of the common ones.
    pub(super) fn width(self, text: &str) -> f64 {
        let em: f64 = text
            .chars()
            .map(|character| match character {
                'i' | 'j' | 'l' | '\'' | '|' | ' ' | '.' | ',' | ':' | ';' | '\u{a0}' | '\u{202f}' => 0.34,
                'f' | 't' | 'r' | '-' | '(' | ')' | '/' | 'I' => 0.42,
                'm' | 'w' | 'M' | 'W' | '%' | '×' => 0.92,
                character if character.is_ascii_uppercase() => 0.70,
                character if character.is_ascii() || character == '–' || character == 'µ' => 0.61,
                _ => 1.0,
            })
            .sum();
        em * self.size * if self.bold { 1.1 } else { 1.0 }
    }

    /// The text, or its beginning and its end where it is wider than `limit`: names of engines differ at their ends.
    pub(super) fn shorten(self, text: &str, limit: f64) -> String {
        let text = escape::plain(text);
        if self.width(&text) <= limit {
            return text;
        }
        let characters: Vec<char> = text.chars().collect();
        let shortened = |kept: usize| -> String {
            let head = kept.div_ceil(2);
            let tail = characters.len() - (kept - head);
            characters[..head]
                .iter()
                .chain(&['…'])
                .chain(&characters[tail..])
                .collect()
        };
        // Nothing that long can be seen anyway, and each try looks at the whole of it.
        let most = characters.len().min(200);
        (0..most)
            .rev()
            .map(shortened)
            .find(|text| self.width(text) <= limit)
            .unwrap_or_default()
    }
}

/// Shapes by the place of an engine, so that colour is never the only difference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marker {
    pub(super) place: usize,
    /// An open one stands for what has no value.
    pub(super) open: bool,
}

impl Canvas<'_> {
    pub(super) fn line(&self, from: Place, to: Place, ink: Ink, width: f64) {
        self.path(&[from, to], ink, width, 1.0);
    }

    pub(super) fn path(&self, places: &[Place], ink: Ink, width: f64, opacity: f64) {
        let style = stroke(ink, width, opacity);
        let places: Vec<(i32, i32)> = places.iter().copied().map(pixel).collect();
        self.area.draw(&PathElement::new(places, style)).expect(IN_MEMORY);
    }

    pub(super) fn area(&self, places: &[Place], ink: Ink, opacity: f64) {
        let places: Vec<(i32, i32)> = places.iter().copied().map(pixel).collect();
        let style = ink.colour().mix(opacity).filled();
        self.area.draw(&Polygon::new(places, style)).expect(IN_MEMORY);
    }

    pub(super) fn rectangle(&self, from: Place, to: Place, ink: Ink, opacity: f64) {
        let style = ink.colour().mix(opacity).filled();
        let corners = [pixel(from), pixel(to)];
        self.area.draw(&Rectangle::new(corners, style)).expect(IN_MEMORY);
    }

    pub(super) fn outline(&self, from: Place, to: Place, ink: Ink, width: f64) {
        let corners = [from, (to.0, from.1), to, (from.0, to.1), from];
        self.path(&corners, ink, width, 1.0);
    }

    /// Oblique lines, for what is not known.
    pub(super) fn hatch(&self, from: Place, to: Place, ink: Ink) {
        let (width, height) = (to.0 - from.0, to.1 - from.1);
        if width <= 0.0 || height <= 0.0 {
            return;
        }
        let mut start = -height;
        while start < width {
            let (begin, end) = (start.max(0.0), (start + height).min(width));
            if end > begin {
                self.path(
                    &[
                        (from.0 + begin, to.1 - (begin - start)),
                        (from.0 + end, to.1 - (end - start)),
                    ],
                    ink,
                    1.0,
                    0.7,
                );
            }
            start += HATCH_SPACING;
        }
        self.outline(from, to, ink, 1.0);
    }

    pub(super) fn marker(&self, at: Place, marker: Marker) {
        let ink = Ink::Engine(marker.place);
        let (x, y) = at;
        let r = 4.0;
        // Where colours begin again, shapes do not.
        let corners: &[Place] = match (marker.place + marker.place / 8) % 8 {
            0 => {
                let radius = fine(r) as i32;
                if marker.open {
                    let inside = Ink::Paper.colour().filled();
                    self.area
                        .draw(&Circle::new(pixel(at), radius, inside))
                        .expect(IN_MEMORY);
                }
                let style = if marker.open {
                    stroke(ink, 1.5, 1.0)
                } else {
                    ink.colour().filled()
                };
                self.area.draw(&Circle::new(pixel(at), radius, style)).expect(IN_MEMORY);
                return;
            }
            1 => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            2 => &[(0.0, -1.25), (1.15, 0.9), (-1.15, 0.9)],
            3 => &[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
            4 => &[(0.0, 1.25), (1.15, -0.9), (-1.15, -0.9)],
            5 => &[(-1.3, -0.6), (1.3, -0.6), (1.3, 0.6), (-1.3, 0.6)],
            6 => &[(-1.25, 0.0), (0.9, -1.15), (0.9, 1.15)],
            _ => &[(1.25, 0.0), (-0.9, -1.15), (-0.9, 1.15)],
        };
        let mut places: Vec<Place> = corners.iter().map(|(dx, dy)| (x + dx * r, y + dy * r)).collect();
        if marker.open {
            self.area(&places, Ink::Paper, 1.0);
            places.push(places[0]);
            places.push(places[1]);
            self.path(&places, ink, 1.5, 1.0);
        } else {
            self.area(&places, ink, 1.0);
        }
    }

    /// One line of text, centred on the height of its place.
    pub(super) fn text(&self, at: Place, side: Side, text: &str, letters: Letters) {
        let horizontal = match side {
            Side::Right => HPos::Left,
            Side::Left => HPos::Right,
            Side::Both => HPos::Center,
        };
        let style = if letters.bold {
            FontStyle::Bold
        } else {
            FontStyle::Normal
        };
        // The backend divides by this, to be like another backend.
        let font = ("sans-serif", fine(letters.size) * 1.24, style).into_font();
        let colour = letters.ink.colour();
        let style = TextStyle::from(font)
            .color(&colour)
            .pos(Pos::new(horizontal, VPos::Center));
        let text = escape::plain(text);
        self.area.draw(&Text::new(text, pixel(at), style)).expect(IN_MEMORY);
    }
}

fn stroke(ink: Ink, width: f64, opacity: f64) -> ShapeStyle {
    ink.colour().mix(opacity).stroke_width(fine(width) as u32)
}

fn pixel((x, y): Place) -> (i32, i32) {
    (fine(x) as i32, fine(y) as i32)
}

fn fine(points: f64) -> f64 {
    (points * FINE).round()
}

/// Eighths of a point are finer than any screen shows.
const FINE: f64 = 8.0;

const HATCH_SPACING: f64 = 5.0;

const IN_MEMORY: &str = "a picture in memory needs no file and no font";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_keeps_its_beginning_and_its_end() {
        let name = "qemu-tcp-bbr-tuned-multifd-zstd";
        let short = LABEL.shorten(name, 120.0);
        assert!(LABEL.width(&short) <= 120.0);
        assert!(
            short.starts_with("qemu-") && short.ends_with("zstd") && short.contains('…'),
            "{short}"
        );
        assert_eq!(LABEL.shorten("short", 120.0), "short");
        assert_eq!(LABEL.shorten("w", 0.0), "");
    }

    #[test]
    fn text_in_a_picture_is_no_markup() {
        let picture = Picture::draw(100.0, 20.0, |canvas| {
            canvas.text((0.0, 10.0), Side::Right, "<b>&\u{0}", LABEL);
        });
        let svg = picture.file("a <title>");
        assert!(
            svg.contains("&lt;b&gt;&amp;\u{fffd}") && svg.contains("a &lt;title&gt;"),
            "{svg}"
        );
    }
}
