//! Total time and downtime by what the link is like: by RTT, and by loss.
//!
//! Links stand beside each other in order and not to scale: from 0.2 ms to 600 ms there is no scale on which each can be read. What
//! differs beside the quantity of the axis is written below it.

use std::fmt::Write as _;

use super::axis::Axis;
use super::canvas::{Canvas, LABEL, Marker, NOTE, Picture, Place, Side};
use super::palette::Ink;
use super::{Figure, neighbours};
use crate::lab::report::escape;
use crate::lab::report::quantity::Quantity;
use crate::lab::report::statistics::Spread;
use crate::lab::report::summary::{Group, Link, Measure, Row, Summary};

/// By RTT: links of the same rate. Of several with the same RTT the one with the least loss is drawn.
pub(in crate::lab::report) fn round_trips(summary: &Summary<'_>) -> Vec<Figure> {
    let by = Order {
        word: "RTT",
        slug: "rtt",
        value: |link| link.rtt_seconds,
        quantity: Quantity::Seconds,
        other_word: "loss",
        other: |link| link.loss_fraction,
        other_quantity: Quantity::Share,
        same: |link| (link.rate_bits_per_second.map(f64::to_bits), None),
    };
    by.figures(summary)
}

/// By loss: links of the same rate and the same RTT.
pub(in crate::lab::report) fn losses(summary: &Summary<'_>) -> Vec<Figure> {
    let by = Order {
        word: "Loss",
        slug: "loss",
        value: |link| link.loss_fraction,
        quantity: Quantity::Share,
        other_word: "RTT",
        other: |link| link.rtt_seconds,
        other_quantity: Quantity::Seconds,
        same: |link| {
            (
                link.rate_bits_per_second.map(f64::to_bits),
                link.rtt_seconds.map(f64::to_bits),
            )
        },
    };
    by.figures(summary)
}

/// By what links are put in order, and what they must have in common.
struct Order {
    word: &'static str,
    slug: &'static str,
    value: fn(&Link) -> Option<f64>,
    quantity: Quantity,
    other_word: &'static str,
    other: fn(&Link) -> Option<f64>,
    other_quantity: Quantity,
    same: fn(&Link) -> (Option<u64>, Option<u64>),
}

impl Order {
    fn figures(&self, summary: &Summary<'_>) -> Vec<Figure> {
        let mut figures = Vec::new();
        for family in self.families(summary) {
            let (stops, aside) = self.stops(&family);
            if stops.len() < 2 {
                continue;
            }
            for measure in [Measure::Total, Measure::Downtime] {
                figures.extend(self.figure(summary, &stops, &aside, measure));
            }
        }
        figures
    }

    /// Groups that may be compared with each other.
    fn families<'s>(&self, summary: &'s Summary<'s>) -> Vec<Vec<&'s Group<'s>>> {
        let mut families: Vec<Vec<&Group<'_>>> = Vec::new();
        for group in &summary.groups {
            let like =
                |other: &Group<'_>| other.guest == group.guest && (self.same)(&other.link) == (self.same)(&group.link);
            if (self.value)(&group.link).is_none() {
                continue;
            }
            match families
                .iter_mut()
                .find(|family| family.first().is_some_and(|first| like(first)))
            {
                Some(family) => family.push(group),
                None => families.push(vec![group]),
            }
        }
        families
    }

    /// The links of a picture from left to right, and those that have no place of their own.
    fn stops<'s>(&self, family: &[&'s Group<'s>]) -> (Vec<&'s Group<'s>>, Vec<&'s str>) {
        let key = |group: &Group<'_>| (self.value)(&group.link).unwrap_or(0.0);
        let other = |group: &Group<'_>| (self.other)(&group.link).unwrap_or(0.0);
        let mut stops = family.to_vec();
        // Stable: what is alike in all stays in the order of the plan.
        stops.sort_by(|one, two| key(one).total_cmp(&key(two)).then(other(one).total_cmp(&other(two))));
        let mut aside = Vec::new();
        let mut before = None;
        stops.retain(|group| {
            let new = before != Some(key(group));
            before = Some(key(group));
            if !new {
                aside.push(group.profile);
            }
            new
        });
        (stops, aside)
    }

    fn figure(&self, summary: &Summary<'_>, stops: &[&Group<'_>], aside: &[&str], measure: Measure) -> Option<Figure> {
        let first = stops.first()?;
        let series = Series::all(summary, stops, measure);
        if series.is_empty() {
            return None;
        }
        let word = match measure {
            Measure::Downtime => "Downtime",
            _ => "Total time",
        };
        let ticks: Vec<[String; 2]> = stops
            .iter()
            .map(|group| {
                let tick = |value: Option<f64>, quantity: Quantity| {
                    value.map_or_else(String::new, |value| quantity.tick(value))
                };
                [
                    tick((self.value)(&group.link), self.quantity),
                    tick((self.other)(&group.link), self.other_quantity),
                ]
            })
            .collect();
        // What is the same everywhere is in the title.
        let differs = ticks.iter().any(|tick| tick[1] != ticks[0][1]);
        let words = [self.word, if differs { self.other_word } else { "" }];
        let chart = Chart::new(series, ticks, measure, words);
        let rate = first
            .link
            .rate_bits_per_second
            .map(|rate| Quantity::BitsPerSecond.tick(rate));
        let mut of = vec![first.guest.to_owned()];
        of.extend(rate);
        if self.word == "Loss" {
            of.extend(
                first
                    .link
                    .rtt_seconds
                    .map(|rtt| format!("{} RTT", Quantity::Seconds.tick(rtt))),
            );
        } else if !differs {
            of.extend(
                first
                    .link
                    .loss_fraction
                    .map(|loss| format!("{} loss", Quantity::Share.tick(loss))),
            );
        }
        let of = of.join(", ");
        Some(Figure {
            name: format!("{}-by-{}-{}", escape::slug(word), self.slug, escape::slug(&of)),
            title: format!("{word} by {}: {of}", if self.word == "RTT" { "RTT" } else { "loss" }),
            caption: caption(&chart, stops, aside, summary, measure),
            picture: chart.picture(),
        })
    }
}

fn caption(chart: &Chart<'_>, stops: &[&Group<'_>], aside: &[&str], summary: &Summary<'_>, measure: Measure) -> String {
    let profiles: Vec<&str> = stops.iter().map(|group| group.profile).collect();
    let mut caption = format!("From the left: {}.", profiles.join(", "));
    let rows = || stops.iter().flat_map(|group| &group.rows);
    let limits = rows()
        .filter_map(|row| row.reached(Measure::Total))
        .map(|spread| spread.high);
    let limit = limits.fold(0.0, f64::max);
    if limit > 0.0 && measure == Measure::Total {
        let _ = write!(
            caption,
            " What had not finished was stopped after {}.",
            Quantity::Seconds.show(limit)
        );
    }
    if !aside.is_empty() {
        let _ = write!(
            caption,
            " Not drawn, because another has the same place: {}.",
            aside.join(", ")
        );
    }
    let drawn = |engine: &str| chart.series.iter().any(|series| series.engine == engine);
    let present = |engine: &str| rows().any(|row| row.engine == engine);
    let engines = summary.engines.iter().copied();
    let missing: Vec<&str> = engines.filter(|engine| present(engine) && !drawn(engine)).collect();
    if !missing.is_empty() {
        let _ = write!(caption, " No usable run of: {}.", missing.join(", "));
    }
    caption
}

/// One engine over all links of a picture.
struct Series<'a> {
    engine: &'a str,
    place: usize,
    points: Vec<Point>,
}

#[derive(Clone, Copy, Default)]
struct Point {
    spread: Option<Spread>,
    /// Runs that did not arrive.
    without_end: bool,
}

impl<'a> Series<'a> {
    /// Of every engine that has something to be drawn.
    fn all(summary: &Summary<'a>, stops: &[&Group<'_>], measure: Measure) -> Vec<Self> {
        let point = |row: &Row<'_>| Point {
            spread: row.spread(measure),
            without_end: !row.not_finished.is_empty() || !row.failed.is_empty(),
        };
        let series = summary.engines.iter().enumerate().map(|(place, &engine)| Series {
            engine,
            place,
            points: stops
                .iter()
                .map(|group| {
                    group
                        .rows
                        .iter()
                        .find(|row| row.engine == engine)
                        .map(point)
                        .unwrap_or_default()
                })
                .collect(),
        });
        series
            .filter(|series| {
                series
                    .points
                    .iter()
                    .any(|point| point.spread.is_some() || point.without_end)
            })
            .collect()
    }
}

/// Where everything is.
struct Chart<'a> {
    series: Vec<Series<'a>>,
    ticks: Vec<[String; 2]>,
    measure: Measure,
    words: [&'static str; 2],
    axis: Axis,
    /// Of the band for what has no value; none where it is not needed.
    strip: f64,
    plot_width: f64,
    plot_height: f64,
    gutter: f64,
}

impl<'a> Chart<'a> {
    fn new(series: Vec<Series<'a>>, ticks: Vec<[String; 2]>, measure: Measure, words: [&'static str; 2]) -> Self {
        let spreads = || {
            series
                .iter()
                .flat_map(|series| &series.points)
                .filter_map(|point| point.spread)
        };
        let axis = Axis::of_magnitudes(spreads().flat_map(|spread| [spread.low, spread.high]));
        let endless = series
            .iter()
            .flat_map(|series| &series.points)
            .any(|point| point.without_end);
        let widest = series
            .iter()
            .map(|series| LABEL.width(series.engine))
            .fold(0.0, f64::max);
        let gutter = widest.min(MOST_GUTTER) + LEADER + SYMBOL;
        let room = super::WIDTH - LEFT - gutter;
        let tick = ticks.iter().flatten().map(|text| NOTE.width(text)).fold(0.0, f64::max) + 6.0;
        Self {
            axis,
            strip: if endless { 26.0 } else { 0.0 },
            plot_width: room.max(ticks.len() as f64 * tick),
            plot_height: (series.len() as f64 * LINE).max(200.0),
            gutter,
            series,
            ticks,
            measure,
            words,
        }
    }

    fn has_strip(&self) -> bool {
        self.strip > 0.0
    }

    fn picture(&self) -> Picture {
        let width = LEFT + self.plot_width + self.gutter;
        Picture::draw(
            width,
            self.bottom() + if self.words[1].is_empty() { 24.0 } else { 38.0 },
            |canvas| {
                self.draw_axes(canvas);
                for series in &self.series {
                    self.draw_series(canvas, series);
                }
                self.draw_labels(canvas);
            },
        )
    }

    fn top(&self) -> f64 {
        TOP + self.strip + if self.has_strip() { 10.0 } else { 0.0 }
    }

    fn bottom(&self) -> f64 {
        self.top() + self.plot_height
    }

    fn right(&self) -> f64 {
        LEFT + self.plot_width
    }

    fn x(&self, stop: usize) -> f64 {
        LEFT + (stop as f64 + 0.5) * self.step()
    }

    fn step(&self) -> f64 {
        self.plot_width / self.ticks.len().max(1) as f64
    }

    fn y(&self, value: f64) -> f64 {
        self.bottom() - self.axis.at(value) * self.plot_height
    }

    /// Beside each other, so that engines that are alike do not cover each other.
    fn aside(&self, series: &Series<'_>) -> f64 {
        let count = self.series.len();
        let index = self
            .series
            .iter()
            .position(|other| other.place == series.place)
            .unwrap_or(0);
        let each = (self.step() * 0.7 / count.max(1) as f64).min(10.0);
        (index as f64 - (count as f64 - 1.0) / 2.0) * each
    }

    fn draw_axes(&self, canvas: &Canvas<'_>) {
        let quantity = self.measure.quantity();
        let scale = if self.axis.logarithmic { " (logarithmic)" } else { "" };
        let title = match self.measure {
            Measure::Downtime => "Downtime, from outside",
            _ => "Total time",
        };
        canvas.text((8.0, 9.0), Side::Right, &format!("{title}{scale}"), NOTE);
        for tick in &self.axis.ticks {
            canvas.line((LEFT, self.y(*tick)), (self.right(), self.y(*tick)), Ink::Grid, 0.75);
            canvas.text((LEFT - 6.0, self.y(*tick)), Side::Left, &quantity.tick(*tick), NOTE);
        }
        if self.has_strip() {
            canvas.rectangle((LEFT, TOP), (self.right(), TOP + self.strip), Ink::Shade, 1.0);
            for (line, text) in ["not", "finished"].iter().enumerate() {
                canvas.text((LEFT - 6.0, TOP + 7.0 + line as f64 * 12.0), Side::Left, text, NOTE);
            }
        }
        canvas.line((LEFT, self.bottom()), (self.right(), self.bottom()), Ink::Muted, 1.0);
        let [word, second] = self.words;
        for (stop, [value, other]) in self.ticks.iter().enumerate() {
            let x = self.x(stop);
            canvas.line((x, self.bottom()), (x, self.bottom() + 4.0), Ink::Muted, 1.0);
            canvas.text((x, self.bottom() + 13.0), Side::Both, value, NOTE.ink(Ink::Text));
            if !second.is_empty() {
                canvas.text((x, self.bottom() + 28.0), Side::Both, other, NOTE);
            }
        }
        canvas.text(
            (LEFT - 6.0, self.bottom() + 13.0),
            Side::Left,
            word,
            NOTE.ink(Ink::Text),
        );
        canvas.text((LEFT - 6.0, self.bottom() + 28.0), Side::Left, second, NOTE);
    }

    fn draw_series(&self, canvas: &Canvas<'_>, series: &Series<'_>) {
        let ink = Ink::Engine(series.place);
        let aside = self.aside(series);
        let mut before: Option<(usize, Place)> = None;
        for (stop, point) in series.points.iter().enumerate() {
            let Some(spread) = point.spread else { continue };
            let at = (self.x(stop) + aside, self.y(spread.median));
            // A gap is not bridged: nothing is known there.
            if let Some((_, from)) = before.filter(|(last, _)| last + 1 == stop) {
                canvas.path(&[from, at], ink, 1.0, 0.45);
            }
            before = Some((stop, at));
        }
        for (stop, point) in series.points.iter().enumerate() {
            let x = self.x(stop) + aside;
            if let Some(spread) = point.spread {
                canvas.line((x, self.y(spread.low)), (x, self.y(spread.high)), ink, 1.5);
                let marker = Marker {
                    place: series.place,
                    open: false,
                };
                canvas.marker((x, self.y(spread.median)), marker);
            }
            if point.without_end {
                let marker = Marker {
                    place: series.place,
                    open: true,
                };
                canvas.marker((x, self.strip_middle()), marker);
            }
        }
    }

    fn strip_middle(&self) -> f64 {
        TOP + self.strip / 2.0
    }

    /// Names at the right end of what they name.
    fn draw_labels(&self, canvas: &Canvas<'_>) {
        let ends: Vec<Place> = self.series.iter().map(|series| self.end(series)).collect();
        let mut heights: Vec<f64> = ends.iter().map(|(_, y)| *y).collect();
        neighbours::spread(&mut heights, LINE, TOP + 6.0, self.bottom() - 4.0);
        for ((series, (x, y)), height) in self.series.iter().zip(ends).zip(heights) {
            let ink = Ink::Engine(series.place);
            let begin = self.right() + LEADER;
            canvas.path(
                &[(x + 7.0, y), (self.right() + 2.0, y), (begin - 3.0, height)],
                ink,
                0.75,
                0.5,
            );
            let marker = Marker {
                place: series.place,
                open: false,
            };
            canvas.marker((begin + 3.0, height), marker);
            let name = LABEL.shorten(series.engine, MOST_GUTTER);
            canvas.text((begin + SYMBOL, height), Side::Right, &name, LABEL);
        }
    }

    /// Where an engine is seen last.
    fn end(&self, series: &Series<'_>) -> Place {
        let last = series.points.iter().enumerate().rev().find_map(|(stop, point)| {
            let x = self.x(stop) + self.aside(series);
            match point.spread {
                Some(spread) => Some((x, self.y(spread.median))),
                None => point.without_end.then(|| (x, self.strip_middle())),
            }
        });
        last.unwrap_or((self.right(), self.bottom()))
    }
}

const LEFT: f64 = 58.0;
/// Below the axis' name.
const TOP: f64 = 22.0;
/// From the plot to the names.
const LEADER: f64 = 20.0;
/// For an engine's shape before its name.
const SYMBOL: f64 = 12.0;
const MOST_GUTTER: f64 = 176.0;
/// Of names.
const LINE: f64 = 15.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::record::{Outcome, Run};
    use crate::lab::report::samples;

    fn at(profile: &str, rtt: f64, loss: f64) -> Run {
        let mut run = samples::run("longhaul", 1);
        run.profile = profile.to_owned();
        run.setting.link_rtt_seconds = Some(rtt);
        run.setting.link_rate_bits_per_second = Some(1e9);
        run.setting.link_loss_fraction = Some(loss);
        run
    }

    #[test]
    fn links_stand_in_the_order_of_their_rtt_and_a_second_one_is_named() {
        let runs = [at("far", 0.15, 0.001), at("lossy", 0.15, 0.01), at("near", 0.01, 0.0)];
        let figures = round_trips(&Summary::of(&runs, &[]));
        assert_eq!(figures.len(), 2);
        assert!(figures[0].caption.contains("near, far."), "{}", figures[0].caption);
        assert!(
            figures[0].caption.contains("another has the same place: lossy"),
            "{}",
            figures[0].caption
        );
    }

    #[test]
    fn only_links_of_one_rtt_are_compared_by_loss() {
        let runs = [at("far", 0.15, 0.001), at("lossy", 0.15, 0.01), at("near", 0.01, 0.02)];
        let figures = losses(&Summary::of(&runs, &[]));
        assert!(figures[0].caption.contains("far, lossy."), "{}", figures[0].caption);
    }

    #[test]
    fn one_link_is_no_row_of_links() {
        assert!(round_trips(&Summary::of(&[at("far", 0.15, 0.001)], &[])).is_empty());
        let silent = samples::run("longhaul", 1);
        assert!(round_trips(&Summary::of(&[silent], &[])).is_empty());
    }

    #[test]
    fn what_did_not_finish_has_no_height_of_its_own() {
        let mut runs = [at("far", 0.15, 0.001), at("near", 0.01, 0.001)];
        runs[0].outcome = Outcome::NotFinished;
        let summary = Summary::of(&runs, &[]);
        let stops: Vec<&Group<'_>> = summary.groups.iter().collect();
        let series = Series::all(&summary, &stops, Measure::Total);
        assert!(series[0].points[0].spread.is_none() && series[0].points[0].without_end);
        let caption = &round_trips(&summary)[0].caption;
        assert!(caption.contains("was stopped after 2.60"), "{caption}");
    }
}
