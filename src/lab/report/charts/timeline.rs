//! The course of a migration: how fast it sends and the guest writes, what is still to be sent, what waits in the gateway.

use super::axis::Axis;
use super::canvas::{Canvas, HEADING, LABEL, NOTE, Picture, Place, Side};
use super::palette::Ink;
use super::{Figure, WIDTH};
use crate::lab::record::{Moment, Outcome, Run};
use crate::lab::report::escape;
use crate::lab::report::quantity::{Quantity, short};
use crate::lab::report::summary::{Group, Row, Summary};

/// The links with the courses of every engine that has one. Of each link only one guest is shown: the one that most engines have a
/// course of, and of those the one that writes most.
pub(in crate::lab::report) fn timelines(summary: &Summary<'_>) -> Vec<(String, Vec<Figure>)> {
    let mut profiles: Vec<&Group<'_>> = Vec::new();
    for group in summary.groups.iter().filter(|group| interest(group).0 > 0) {
        match profiles.iter_mut().find(|chosen| chosen.profile == group.profile) {
            Some(chosen) if interest(chosen) < interest(group) => *chosen = group,
            Some(_) => {}
            None => profiles.push(group),
        }
    }
    profiles
        .into_iter()
        .map(|group| (group.name(), of_group(summary, group)))
        .collect()
}

/// Engines with a course, and the pages that the guest rewrites a second.
fn interest(group: &Group<'_>) -> (usize, u64) {
    let runs = || group.rows.iter().filter_map(|row| row.representative());
    let writes = runs().map(|run| run.dials.pages_per_second).max();
    (runs().count(), writes.unwrap_or(0))
}

fn of_group(summary: &Summary<'_>, group: &Group<'_>) -> Vec<Figure> {
    let figure = |run: &Run| {
        let mut course = run.timeline.clone();
        thin(&mut course);
        let chart = Chart::new(
            run,
            &course,
            group.link.rate_bits_per_second,
            summary.place(&run.engine),
        );
        Figure {
            name: format!("timeline-{}", escape::slug(&format!("{} {}", group.name(), run.engine))),
            title: run.engine.clone(),
            caption: caption(run, group, &chart),
            picture: Picture::draw(WIDTH, chart.height(), |canvas| chart.draw(canvas)),
        }
    };
    group
        .rows
        .iter()
        .filter_map(|row| row.representative())
        .map(figure)
        .collect()
}

fn caption(run: &Run, group: &Group<'_>, chart: &Chart<'_>) -> String {
    let time = run
        .total_seconds
        .map_or_else(|| "an unknown time".to_owned(), |total| Quantity::Seconds.show(total));
    let how = match run.outcome {
        Outcome::Completed => format!("Arrived after {time}"),
        _ => format!("Not finished when it was stopped after {time}"),
    };
    let downtime = run.downtime_seconds.map_or_else(String::new, |downtime| {
        format!(", downtime {}", Quantity::Seconds.show(downtime))
    });
    let row = group.rows.iter().find(|row| row.engine == run.engine);
    let arrived = row.map_or(0, Row::courses);
    let middle = match (run.outcome, arrived) {
        (Outcome::Completed, 2..) => format!(", the one in the middle of {arrived}"),
        _ => String::new(),
    };
    let beyond = match (group.link.rate_bits_per_second, chart.link_rate) {
        (Some(rate), None) => format!(
            " The link's {} are beyond the picture.",
            Quantity::BitsPerSecond.tick(rate)
        ),
        _ => String::new(),
    };
    format!(
        "{how}{downtime}. Run {}, seed {}{middle}.{beyond}",
        run.repetition, run.seed
    )
}

/// Keeps as many moments as a picture can show. Rates are averaged over what is left out, so that areas stay what they were; of the rest
/// the last is kept, and the most that waited.
pub(in crate::lab::report) fn thin(course: &mut Vec<Moment>) {
    if course.len() <= MOST_MOMENTS {
        return;
    }
    let several = course.len().div_ceil(MOST_MOMENTS);
    *course = course.chunks(several).filter_map(joined).collect();
}

fn joined(moments: &[Moment]) -> Option<Moment> {
    let mut moment = moments.last()?.clone();
    let mean = |rate: fn(&Moment) -> f64| moments.iter().map(rate).sum::<f64>() / moments.len() as f64;
    moment.wire_bytes_per_second = mean(|moment| moment.wire_bytes_per_second);
    moment.dirty_bytes_per_second = mean(|moment| moment.dirty_bytes_per_second);
    moment.backlog_bytes = moments.iter().filter_map(|moment| moment.backlog_bytes).max();
    Some(moment)
}

/// What is needed to draw one course.
struct Chart<'a> {
    run: &'a Run,
    course: &'a [Moment],
    link_rate: Option<f64>,
    ink: Ink,
    /// Seconds from the command to the end of the picture.
    end: f64,
    time: Axis,
    panels: Vec<Panel>,
}

/// Values over time, under a heading.
struct Panel {
    heading: String,
    unit_size: f64,
    axis: Axis,
    top: f64,
    height: f64,
    shows: Shows,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shows {
    Rates,
    Remaining,
    Backlog,
}

impl<'a> Chart<'a> {
    fn new(run: &'a Run, course: &'a [Moment], link_rate: Option<f64>, place: usize) -> Self {
        let last = course.last().map_or(0.0, |moment| moment.at_seconds);
        let end = run.total_seconds.unwrap_or(0.0).max(sane(last));
        let most = |value: fn(&Moment) -> f64| course.iter().map(value).map(sane).fold(0.0, f64::max);
        let mut panels = Vec::new();
        let mut top = TOP;
        let mut add = |shows, most: f64, quantity: Quantity, height: f64, heading: &dyn Fn(&str) -> String| {
            let axis = Axis::linear(most, 3);
            let unit = quantity.unit(axis.ticks.last().copied().unwrap_or(1.0));
            panels.push(Panel {
                heading: heading(unit.name),
                unit_size: unit.size,
                axis,
                top: top + HEAD,
                height,
                shows,
            });
            top += HEAD + height + GAP;
        };
        let rates = most(|moment| moment.wire_bytes_per_second).max(most(|moment| moment.dirty_bytes_per_second)) * 8.0;
        let shown_link = link_rate.filter(|rate| *rate <= rates * MOST_ABOVE);
        add(
            Shows::Rates,
            rates.max(shown_link.unwrap_or(0.0)),
            Quantity::BitsPerSecond,
            92.0,
            &|unit| format!("Wire rate (area), writes (line), {unit}"),
        );
        add(
            Shows::Remaining,
            most(|moment| moment.remaining_bytes as f64),
            Quantity::Bytes,
            70.0,
            &|unit| format!("Memory still to be sent, {unit}"),
        );
        if course.iter().any(|moment| moment.backlog_bytes.is_some()) {
            add(
                Shows::Backlog,
                most(|moment| moment.backlog_bytes.unwrap_or(0) as f64),
                Quantity::Bytes,
                44.0,
                &|unit| format!("Backlog in the gateway, {unit}"),
            );
        }
        Self {
            run,
            course,
            link_rate: shown_link,
            ink: Ink::Engine(place),
            end,
            time: Axis::up_to(end, 6),
            panels,
        }
    }

    fn bottom(&self) -> f64 {
        self.panels.last().map_or(TOP, |panel| panel.top + panel.height)
    }

    fn height(&self) -> f64 {
        self.bottom() + 36.0
    }

    fn x(&self, seconds: f64) -> f64 {
        LEFT + self.time.at(seconds) * (RIGHT - LEFT)
    }

    fn draw(&self, canvas: &Canvas<'_>) {
        self.draw_phases(canvas);
        self.draw_downtime(canvas);
        self.draw_rounds(canvas);
        for panel in &self.panels {
            self.draw_panel(canvas, panel);
        }
        self.draw_time(canvas);
    }

    /// The engine's own words for where it is, as a band.
    fn draw_phases(&self, canvas: &Canvas<'_>) {
        let mut begin = 0.0;
        let mut light = false;
        for (index, moment) in self.course.iter().enumerate() {
            let next = self.course.get(index + 1);
            if next.is_some_and(|next| next.phase == moment.phase) {
                continue;
            }
            let end = match next {
                Some(_) => sane(moment.at_seconds),
                None => self.end,
            };
            let (left, right) = (self.x(begin), self.x(end));
            light = !light;
            let ink = if light { Ink::Shade } else { Ink::Grid };
            canvas.rectangle((left, 2.0), (right, 18.0), ink, 1.0);
            if right - left > 34.0 {
                let name = NOTE.shorten(&moment.phase, right - left - 6.0);
                let letters = NOTE.ink(Ink::Text);
                canvas.text(((left + right) / 2.0, 10.0), Side::Both, &name, letters);
            }
            begin = end;
        }
        canvas.text((LEFT - 6.0, 10.0), Side::Left, "phase", NOTE);
    }

    /// The move ends with the first sign of life at the destination, and so does the downtime.
    fn draw_downtime(&self, canvas: &Canvas<'_>) {
        if let (Some(total), Some(downtime)) = (self.run.total_seconds, self.run.downtime_seconds) {
            let (left, right) = (self.x(total - downtime), self.x(total));
            for panel in &self.panels {
                let bottom = panel.top + panel.height;
                canvas.rectangle((left, panel.top), (right.max(left + 1.0), bottom), Ink::Grid, 1.0);
            }
        }
    }

    fn draw_rounds(&self, canvas: &Canvas<'_>) {
        canvas.text((LEFT - 6.0, 26.0), Side::Left, "round", NOTE);
        let mut round = None;
        let mut free = LEFT;
        let mut before = 0.0;
        for moment in self.course {
            if round != Some(moment.round) {
                let x = self.x(before);
                if round.is_some() {
                    for panel in &self.panels {
                        let bottom = panel.top + panel.height;
                        canvas.path(&[(x, panel.top), (x, bottom)], Ink::Muted, 0.75, 0.55);
                    }
                }
                let number = moment.round.to_string();
                if x >= free && x + NOTE.width(&number) < RIGHT {
                    canvas.text((x + 2.0, 26.0), Side::Right, &number, NOTE);
                    free = x + NOTE.width(&number) + 6.0;
                }
                round = Some(moment.round);
            }
            before = sane(moment.at_seconds);
        }
    }

    fn draw_panel(&self, canvas: &Canvas<'_>, panel: &Panel) {
        let bottom = panel.top + panel.height;
        let y = |value: f64| bottom - panel.axis.at(value) * panel.height;
        canvas.text((LEFT, panel.top - 11.0), Side::Right, &panel.heading, HEADING);
        for tick in &panel.axis.ticks {
            canvas.line((LEFT, y(*tick)), (RIGHT, y(*tick)), Ink::Grid, 0.75);
            let text = short(*tick / panel.unit_size);
            canvas.text((LEFT - 6.0, y(*tick)), Side::Left, &text, NOTE);
        }
        match panel.shows {
            Shows::Rates => {
                let wire = self.steps(|moment| y(sane(moment.wire_bytes_per_second) * 8.0));
                self.fill(canvas, &wire, bottom);
                canvas.path(&wire, self.ink, 1.25, 1.0);
                let writes = self.steps(|moment| y(sane(moment.dirty_bytes_per_second) * 8.0));
                canvas.path(&writes, Ink::Text, 1.0, 1.0);
                if let Some(rate) = self.link_rate {
                    canvas.line((LEFT, y(rate)), (RIGHT, y(rate)), Ink::Muted, 1.25);
                    let text = format!("link {}", Quantity::BitsPerSecond.tick(rate));
                    // At the upper end it stands in the line of the heading.
                    let height = if y(rate) < panel.top + 8.0 {
                        panel.top - 11.0
                    } else {
                        y(rate) - 7.0
                    };
                    canvas.text((RIGHT, height), Side::Left, &text, NOTE);
                }
            }
            Shows::Remaining => {
                let line: Vec<Place> = self
                    .course
                    .iter()
                    .map(|moment| (self.x(sane(moment.at_seconds)), y(moment.remaining_bytes as f64)))
                    .collect();
                self.fill(canvas, &line, bottom);
                canvas.path(&line, self.ink, 1.25, 1.0);
            }
            Shows::Backlog => {
                let steps = self.steps(|moment| y(moment.backlog_bytes.unwrap_or(0) as f64));
                self.fill(canvas, &steps, bottom);
                canvas.path(&steps, self.ink, 1.25, 1.0);
            }
        }
    }

    fn fill(&self, canvas: &Canvas<'_>, line: &[Place], bottom: f64) {
        if let (Some(first), Some(last)) = (line.first(), line.last()) {
            let mut places = line.to_vec();
            places.extend([(last.0, bottom), (first.0, bottom)]);
            canvas.area(&places, self.ink, 0.22);
        }
    }

    /// A value holds since the moment before.
    fn steps(&self, height: impl Fn(&Moment) -> f64) -> Vec<Place> {
        let mut places = Vec::with_capacity(self.course.len() * 2);
        let mut before = 0.0;
        for moment in self.course {
            let y = height(moment);
            places.push((self.x(before), y));
            before = sane(moment.at_seconds);
            places.push((self.x(before), y));
        }
        places
    }

    fn draw_time(&self, canvas: &Canvas<'_>) {
        let bottom = self.bottom();
        canvas.line((LEFT, bottom), (RIGHT, bottom), Ink::Muted, 1.0);
        let unit = Quantity::Seconds.unit(self.time.ticks.last().copied().unwrap_or(1.0));
        for tick in &self.time.ticks {
            let x = self.x(*tick);
            canvas.line((x, bottom), (x, bottom + 4.0), Ink::Muted, 1.0);
            canvas.text((x, bottom + 12.0), Side::Both, &short(*tick / unit.size), NOTE);
        }
        let name = format!("Time since the command, {}", unit.name);
        canvas.text((LEFT, bottom + 27.0), Side::Right, &name, NOTE);
        if self.run.outcome == Outcome::NotFinished {
            canvas.text((RIGHT, bottom + 27.0), Side::Left, "stopped here, not finished", LABEL);
        }
    }
}

/// A course is drawn as far as it makes sense, and never kept from being drawn.
fn sane(value: f64) -> f64 {
    if value.is_finite() { value.max(0.0) } else { 0.0 }
}

/// A link that is hardly used would press the curves to the ground: where it has more than so many times what they reach, it is only named.
const MOST_ABOVE: f64 = 6.0;

/// About one for each point of the picture's width.
const MOST_MOMENTS: usize = 300;

const LEFT: f64 = 52.0;
const RIGHT: f64 = WIDTH - 14.0;
/// Below the phases and the numbers of the rounds.
const TOP: f64 = 34.0;
/// Of a panel's heading.
const HEAD: f64 = 22.0;
const GAP: f64 = 10.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::report::samples;

    #[test]
    fn a_long_course_is_thinned_and_keeps_its_bytes_and_its_worst_backlog() {
        let mut course: Vec<Moment> = (0..10_000)
            .map(|index| samples::moment(f64::from(index) * 0.1))
            .collect();
        course[777].backlog_bytes = Some(99_000_000);
        let mean =
            |course: &[Moment]| course.iter().map(|m| m.wire_bytes_per_second).sum::<f64>() / course.len() as f64;
        let (before, last) = (mean(&course), course.last().unwrap().at_seconds);
        thin(&mut course);
        assert!(course.len() <= MOST_MOMENTS);
        assert!((mean(&course) / before - 1.0).abs() < 0.01);
        assert_eq!(
            course.iter().filter_map(|moment| moment.backlog_bytes).max(),
            Some(99_000_000)
        );
        assert_eq!(course.last().unwrap().at_seconds, last);
    }

    #[test]
    fn absurd_moments_are_drawn_without_a_panic() {
        let mut run = samples::run("longhaul", 1);
        for (moment, value) in run.timeline.iter_mut().zip([-1.0, 1e300, f64::MAX, 0.0, f64::NAN]) {
            moment.at_seconds = value;
            moment.wire_bytes_per_second = value;
            moment.dirty_bytes_per_second = value;
            moment.remaining_bytes = u64::MAX;
        }
        let chart = Chart::new(&run, &run.timeline, Some(1e9), 0);
        Picture::draw(WIDTH, chart.height(), |canvas| chart.draw(canvas));
    }
}
