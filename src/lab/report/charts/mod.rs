//! The pictures. Each says in its caption what a reader must know, so that it can be taken out of the report.

mod axis;
mod bars;
mod canvas;
mod encodings;
mod frontier;
mod neighbours;
mod palette;
mod sweep;
mod timeline;
mod wire;

pub(super) use self::canvas::Picture;
pub(super) use self::encodings::encodings;
pub(super) use self::frontier::frontiers;
pub(super) use self::palette::dark_rules;
pub(super) use self::sweep::{losses, round_trips};
pub(super) use self::timeline::{thin, timelines};
pub(super) use self::wire::wire;

/// A picture with its words.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    /// Begins the name of its file.
    pub(super) name: String,
    pub(super) title: String,
    pub(super) caption: String,
    pub(super) picture: Picture,
}

/// Width of a picture: two stand side by side on a screen, and on a telephone the text of one can still be read.
const WIDTH: f64 = 430.0;
