//! Colours by what they mean, on light paper and on dark.
//!
//! A picture is drawn with the colours for light paper. A style sheet exchanges each for its counterpart where the reader prefers dark,
//! by the attribute itself, so that programs that know no style sheets still show it as drawn.
//!
//! Engines differ in shape as well as in colour and are labelled where they are drawn; the colours are chosen in the manner of Okabe and Ito
//! (2008), darkened to a contrast of at least 3 on white (WCAG 2.2, 1.4.11).

use std::fmt::Write as _;

use plotters::style::RGBColor;

/// What a stroke or an area is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ink {
    Text,
    /// Text and lines that explain.
    Muted,
    /// Lines behind the data.
    Grid,
    Paper,
    /// Areas behind the data.
    Shade,
    /// By its place among all engines; more than there are colours begin again.
    Engine(usize),
    /// By its place in the order of cost: the dearer on the wire, the stronger.
    Encoding(usize),
}

type Pair = (RGBColor, &'static str);

const TEXT: Pair = (RGBColor(0x1f, 0x23, 0x28), "#E6E9ED");
const MUTED: Pair = (RGBColor(0x5a, 0x64, 0x6e), "#9CA7B3");
const GRID: Pair = (RGBColor(0xd8, 0xdd, 0xe2), "#39424B");
const PAPER: Pair = (RGBColor(0xff, 0xff, 0xff), "#14181D");
const SHADE: Pair = (RGBColor(0xee, 0xf1, 0xf4), "#222930");
const ENGINES: [Pair; 8] = [
    (RGBColor(0x00, 0x72, 0xb2), "#56B4E9"),
    (RGBColor(0xd5, 0x5e, 0x00), "#FF9452"),
    (RGBColor(0x00, 0x8f, 0x68), "#2FD6A3"),
    (RGBColor(0xaa, 0x44, 0x99), "#E39AD4"),
    (RGBColor(0x8a, 0x6d, 0x00), "#E6C229"),
    (RGBColor(0x6b, 0x6b, 0x6b), "#C4C4C4"),
    (RGBColor(0x88, 0x22, 0x55), "#FF7FA8"),
    (RGBColor(0x33, 0x22, 0x88), "#A99CFF"),
];
const ENCODINGS: [Pair; 6] = [
    (RGBColor(0xde, 0xe8, 0xf1), "#243240"),
    (RGBColor(0xb9, 0xd3, 0xe8), "#2F4A63"),
    (RGBColor(0x8a, 0xb7, 0xdb), "#3C678C"),
    (RGBColor(0x4d, 0x8f, 0xc2), "#5C94C6"),
    (RGBColor(0x1e, 0x67, 0xa3), "#8FC1EA"),
    (RGBColor(0x0a, 0x3a, 0x66), "#D3E8FA"),
];

impl Ink {
    fn pair(self) -> Pair {
        match self {
            Self::Text => TEXT,
            Self::Muted => MUTED,
            Self::Grid => GRID,
            Self::Paper => PAPER,
            Self::Shade => SHADE,
            Self::Engine(place) => ENGINES[place % ENGINES.len()],
            Self::Encoding(place) => ENCODINGS[place % ENCODINGS.len()],
        }
    }

    pub(super) fn colour(self) -> RGBColor {
        self.pair().0
    }
}

/// Rules for pictures within `scope`, to stand in a media query for dark paper.
pub(in crate::lab::report) fn dark_rules(scope: &str) -> String {
    let mut rules = String::new();
    let all = [TEXT, MUTED, GRID, PAPER, SHADE];
    for (RGBColor(red, green, blue), dark) in all.into_iter().chain(ENGINES).chain(ENCODINGS) {
        // As the drawing library writes it: attributes are compared letter by letter.
        let light = format!("#{red:02X}{green:02X}{blue:02X}");
        let _ = writeln!(
            rules,
            "{scope} [fill=\"{light}\"]{{fill:{dark}}}{scope} [stroke=\"{light}\"]{{stroke:{dark}}}"
        );
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_colour_can_be_told_from_the_others_by_its_attribute() {
        let all = [TEXT, MUTED, GRID, PAPER, SHADE]
            .into_iter()
            .chain(ENGINES)
            .chain(ENCODINGS);
        let mut light: Vec<_> = all.map(|(RGBColor(r, g, b), _)| (r, g, b)).collect();
        let count = light.len();
        light.sort_unstable();
        light.dedup();
        assert_eq!(light.len(), count);
    }

    #[test]
    fn engines_and_text_stand_out_from_light_and_from_dark_paper() {
        fn luminance((red, green, blue): (u8, u8, u8)) -> f64 {
            let linear = |channel: u8| {
                let share = f64::from(channel) / 255.0;
                if share <= 0.040_45 {
                    share / 12.92
                } else {
                    ((share + 0.055) / 1.055).powf(2.4)
                }
            };
            0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
        }
        fn contrast(one: (u8, u8, u8), other: (u8, u8, u8)) -> f64 {
            let (one, other) = (luminance(one), luminance(other));
            (one.max(other) + 0.05) / (one.min(other) + 0.05)
        }
        fn light((RGBColor(red, green, blue), _): Pair) -> (u8, u8, u8) {
            (red, green, blue)
        }
        fn dark((_, hex): Pair) -> (u8, u8, u8) {
            let channel = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            (channel(1), channel(3), channel(5))
        }
        for engine in ENGINES {
            assert!(contrast(light(engine), light(PAPER)) >= 3.0, "{engine:?}");
            assert!(contrast(dark(engine), dark(PAPER)) >= 3.0, "{engine:?}");
        }
        for text in [TEXT, MUTED] {
            assert!(contrast(light(text), light(SHADE)) >= 4.5, "{text:?}");
            assert!(contrast(dark(text), dark(SHADE)) >= 4.5, "{text:?}");
        }
    }
}
