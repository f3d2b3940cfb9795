//! Runs in the order in which they are compared: by profile and guest, then by engine.

use super::quantity::Quantity;
use super::standing::Standing;
use super::statistics::Spread;
use crate::lab::record::{Frontier, Outcome, Run};

/// The engine that the others are compared with.
pub(super) const OURS: &str = "longhaul";

/// Everything that was measured, sorted.
#[derive(Debug)]
pub(super) struct Summary<'a> {
    /// Ours first, the others as they were met; an engine's place is its colour and its shape in every picture.
    pub(super) engines: Vec<&'a str>,
    /// By profile, then by guest, both as they were met: the order of the plan.
    pub(super) groups: Vec<Group<'a>>,
}

/// One guest on one link.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub(super) profile: &'a str,
    pub(super) guest: &'a str,
    pub(super) link: Link,
    /// In the order of [`Summary::engines`]; only those that this group has a run of.
    pub(super) rows: Vec<Row<'a>>,
}

/// What a profile asks of the link, as far as the runs say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Link {
    pub(super) rtt_seconds: Option<f64>,
    pub(super) rate_bits_per_second: Option<f64>,
    pub(super) loss_fraction: Option<f64>,
}

/// One engine's runs in a group.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub(super) engine: &'a str,
    /// Usable runs that arrived: those of which there are figures.
    pub(super) completed: Vec<&'a Run>,
    /// Usable runs that were stopped.
    pub(super) not_finished: Vec<&'a Run>,
    /// Usable runs that broke.
    pub(super) failed: Vec<&'a Run>,
    pub(super) unusable: usize,
    pub(super) unavailable: usize,
    pub(super) integrity: Integrity,
}

/// What guests said of their memory, in runs that cannot be used too: a slow machine excuses no damage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Integrity {
    pub(super) intact: usize,
    pub(super) damaged: usize,
    /// Guests that arrived and were not asked.
    pub(super) unknown: usize,
    pub(super) pages_checked: u64,
}

impl<'a> Summary<'a> {
    pub(super) fn of(runs: &'a [Run], frontiers: &'a [Frontier]) -> Self {
        let mut engines = Vec::new();
        let mut profiles = Vec::new();
        let mut groups: Vec<Group<'a>> = Vec::new();
        for engine in runs
            .iter()
            .map(|run| &run.engine)
            .chain(frontiers.iter().map(|frontier| &frontier.engine))
        {
            remember(&mut engines, engine);
        }
        if let Some(ours) = engines.iter().position(|&engine| engine == OURS) {
            engines[..=ours].rotate_right(1);
        }
        for run in runs {
            remember(&mut profiles, &run.profile);
            let same = |group: &Group<'_>| group.profile == run.profile && group.guest == run.guest;
            let group = match groups.iter().position(same) {
                Some(index) => &mut groups[index],
                None => {
                    groups.push(Group {
                        profile: &run.profile,
                        guest: &run.guest,
                        link: Link::default(),
                        rows: Vec::new(),
                    });
                    let last = groups.len() - 1;
                    &mut groups[last]
                }
            };
            group.link.learn(run);
            group.add(run);
        }
        for group in &mut groups {
            group
                .rows
                .sort_by_key(|row| engines.iter().position(|&engine| engine == row.engine));
        }
        groups.sort_by_key(|group| profiles.iter().position(|&profile| profile == group.profile));
        Self { engines, groups }
    }

    /// An engine's place among all.
    pub(super) fn place(&self, engine: &str) -> usize {
        self.engines.iter().position(|&known| known == engine).unwrap_or(0)
    }

    /// Over all runs.
    pub(super) fn integrity(&self) -> Integrity {
        let mut all = Integrity::default();
        for row in self.groups.iter().flat_map(|group| &group.rows) {
            all.intact += row.integrity.intact;
            all.damaged += row.integrity.damaged;
            all.unknown += row.integrity.unknown;
            all.pages_checked = all.pages_checked.saturating_add(row.integrity.pages_checked);
        }
        all
    }
}

fn remember<'a>(known: &mut Vec<&'a str>, name: &'a str) {
    if !known.contains(&name) {
        known.push(name);
    }
}

impl Link {
    fn learn(&mut self, run: &Run) {
        let sane = |value: Option<f64>| value.filter(|value| (0.0..=1e15).contains(value));
        let setting = &run.setting;
        self.rtt_seconds = self.rtt_seconds.or(sane(setting.link_rtt_seconds));
        self.rate_bits_per_second = self.rate_bits_per_second.or(sane(setting.link_rate_bits_per_second));
        self.loss_fraction = self.loss_fraction.or(sane(setting.link_loss_fraction));
    }

    /// `150 ms RTT, 1.00 Gbit/s, 0.100 % loss`; nothing where the runs do not say.
    pub(super) fn text(&self) -> Option<String> {
        let parts = [
            self.rtt_seconds
                .map(|rtt| format!("{} RTT", Quantity::Seconds.tick(rtt))),
            self.rate_bits_per_second.map(|rate| Quantity::BitsPerSecond.tick(rate)),
            self.loss_fraction
                .map(|loss| format!("{} loss", Quantity::Share.tick(loss))),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

impl<'a> Group<'a> {
    /// For headings: `lossy · redis`.
    pub(super) fn name(&self) -> String {
        format!("{} · {}", self.profile, self.guest)
    }

    pub(super) fn ours(&self) -> Option<&Row<'a>> {
        self.rows.iter().find(|row| row.engine == OURS)
    }

    fn add(&mut self, run: &'a Run) {
        let row = match self.rows.iter().position(|row| row.engine == run.engine) {
            Some(index) => &mut self.rows[index],
            None => {
                self.rows.push(Row::new(&run.engine));
                let last = self.rows.len() - 1;
                &mut self.rows[last]
            }
        };
        row.add(run);
    }
}

impl<'a> Row<'a> {
    fn new(engine: &'a str) -> Self {
        Self {
            engine,
            completed: Vec::new(),
            not_finished: Vec::new(),
            failed: Vec::new(),
            unusable: 0,
            unavailable: 0,
            integrity: Integrity::default(),
        }
    }

    fn add(&mut self, run: &'a Run) {
        self.integrity.learn(run);
        match Standing::of(run) {
            Standing::Completed => self.completed.push(run),
            Standing::NotFinished => self.not_finished.push(run),
            Standing::Failed => self.failed.push(run),
            Standing::Unusable(_) => self.unusable += 1,
            Standing::Unavailable => self.unavailable += 1,
        }
    }

    /// Runs that count for something.
    pub(super) fn usable(&self) -> usize {
        self.completed.len() + self.not_finished.len() + self.failed.len()
    }

    /// Of the runs that arrived.
    pub(super) fn spread(&self, measure: Measure) -> Option<Spread> {
        Spread::of(self.completed.iter().filter_map(|run| measure.of(run)))
    }

    /// Of the runs that were stopped: what they had reached by then.
    pub(super) fn reached(&self, measure: Measure) -> Option<Spread> {
        Spread::of(self.not_finished.iter().filter_map(|run| measure.of(run)))
    }

    /// The run that stands for the others: of those that arrived the one in the middle by total time, else the first that was stopped.
    /// Only runs whose course was recorded.
    pub(super) fn representative(&self) -> Option<&'a Run> {
        let mut arrived: Vec<&'a Run> = self.completed.iter().copied().filter(|run| has_course(run)).collect();
        let total = |run: &Run| run.total_seconds.unwrap_or(f64::INFINITY);
        arrived.sort_by(|one, other| total(one).total_cmp(&total(other)));
        let stopped = || self.not_finished.iter().copied().find(|run| has_course(run));
        let middle = arrived.len().saturating_sub(1) / 2;
        arrived.get(middle).copied().or_else(stopped)
    }

    /// How many of the runs that arrived have a course.
    pub(super) fn courses(&self) -> usize {
        self.completed.iter().filter(|run| has_course(run)).count()
    }
}

/// One moment is no course.
fn has_course(run: &Run) -> bool {
    run.timeline.len() > 1
}

impl Integrity {
    fn learn(&mut self, run: &Run) {
        match run.guest_intact {
            Some(true) => self.intact += 1,
            Some(false) => self.damaged += 1,
            None if run.outcome == Outcome::Completed => self.unknown += 1,
            None => {}
        }
        if run.guest_intact.is_some() {
            self.pages_checked = self.pages_checked.saturating_add(run.pages_checked.unwrap_or(0));
        }
    }
}

/// A figure of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    Total,
    Downtime,
    Blackout,
    Wire,
    Rounds,
    LinkUse,
    CpuSource,
    CpuDestination,
    RssSource,
    RssDestination,
}

impl Measure {
    pub(super) const ALL: [Self; 10] = [
        Self::Total,
        Self::Downtime,
        Self::Blackout,
        Self::Wire,
        Self::Rounds,
        Self::LinkUse,
        Self::CpuSource,
        Self::CpuDestination,
        Self::RssSource,
        Self::RssDestination,
    ];

    pub(super) fn of(self, run: &Run) -> Option<f64> {
        match self {
            Self::Total => run.total_seconds,
            Self::Downtime => run.downtime_seconds,
            Self::Blackout => run.blackout_seconds,
            Self::Wire => run.wire_bytes.map(|bytes| bytes as f64),
            Self::Rounds => run.rounds.map(|rounds| rounds as f64),
            Self::LinkUse => run.link_use,
            Self::CpuSource => run.cpu_seconds_per_gib.map(|ends| ends.source),
            Self::CpuDestination => run.cpu_seconds_per_gib.map(|ends| ends.destination),
            Self::RssSource => run.peak_rss_bytes.map(|ends| ends.source as f64),
            Self::RssDestination => run.peak_rss_bytes.map(|ends| ends.destination as f64),
        }
    }

    pub(super) fn quantity(self) -> Quantity {
        match self {
            Self::Total | Self::Downtime | Self::Blackout => Quantity::Seconds,
            Self::Wire | Self::RssSource | Self::RssDestination => Quantity::Bytes,
            Self::Rounds => Quantity::Count,
            Self::LinkUse => Quantity::Share,
            Self::CpuSource | Self::CpuDestination => Quantity::CpuPerGib,
        }
    }

    /// Head of a column, with the unit where the numbers have none.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Total => "Total time",
            Self::Downtime => "Downtime, from outside",
            Self::Blackout => "Blackout",
            Self::Wire => "On the wire",
            Self::Rounds => "Rounds",
            Self::LinkUse => "Link use",
            Self::CpuSource => "CPU at source, s/GiB",
            Self::CpuDestination => "CPU at destination, s/GiB",
            Self::RssSource => "Peak RSS at source",
            Self::RssDestination => "Peak RSS at destination",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::report::samples;

    #[test]
    fn unusable_runs_are_not_in_a_median() {
        let mut runs: Vec<Run> = (1..=3).map(|repetition| samples::run(OURS, repetition)).collect();
        runs[0].total_seconds = Some(1.0);
        runs[1].total_seconds = Some(3.0);
        runs[2].total_seconds = Some(1_000.0);
        runs[2].usable = false;
        let summary = Summary::of(&runs, &[]);
        let row = &summary.groups[0].rows[0];
        let spread = row.spread(Measure::Total).unwrap();
        assert_eq!((spread.median, spread.count), (2.0, 2));
        assert_eq!((row.usable(), row.unusable), (2, 1));
    }

    #[test]
    fn a_run_that_was_stopped_is_never_a_value() {
        let mut runs = vec![samples::run("qemu", 1), samples::run("qemu", 2)];
        runs[1].outcome = Outcome::NotFinished;
        runs[1].total_seconds = Some(150.0);
        let summary = Summary::of(&runs, &[]);
        let row = &summary.groups[0].rows[0];
        assert_eq!(row.spread(Measure::Total).unwrap().count, 1);
        assert_eq!(row.reached(Measure::Total).unwrap().median, 150.0);
    }

    #[test]
    fn damage_counts_in_runs_that_cannot_be_used_too() {
        let mut runs = vec![samples::run(OURS, 1), samples::run(OURS, 2)];
        runs[1].usable = false;
        runs[1].guest_intact = Some(false);
        let integrity = Summary::of(&runs, &[]).integrity();
        assert_eq!((integrity.intact, integrity.damaged), (1, 1));
    }

    #[test]
    fn ours_comes_first_and_the_rest_as_the_plan_had_it() {
        let runs: Vec<Run> = ["qemu-z", OURS, "qemu-a"]
            .iter()
            .map(|engine| samples::run(engine, 1))
            .collect();
        let summary = Summary::of(&runs, &[]);
        assert_eq!(summary.engines, [OURS, "qemu-z", "qemu-a"]);
        let rows: Vec<&str> = summary.groups[0].rows.iter().map(|row| row.engine).collect();
        assert_eq!(rows, [OURS, "qemu-z", "qemu-a"]);
    }

    #[test]
    fn the_run_in_the_middle_stands_for_the_others() {
        let mut runs: Vec<Run> = (1..=3).map(|repetition| samples::run(OURS, repetition)).collect();
        for (run, total) in runs.iter_mut().zip([9.0, 1.0, 5.0]) {
            run.total_seconds = Some(total);
        }
        let summary = Summary::of(&runs, &[]);
        let run = summary.groups[0].rows[0].representative().unwrap();
        assert_eq!(run.total_seconds, Some(5.0));
    }
}
