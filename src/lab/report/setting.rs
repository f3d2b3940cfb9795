//! What was measured, where and with what: without it no figure can be repeated.

use serde_json::Value;

use super::aside::first_few;
use super::document::{Block, Cell, Kind, Table};
use super::quantity::grouped;
use super::summary::Summary;
use crate::lab::guest::GuestDials;
use crate::lab::record::{Outcome, Run};

/// Machine, links, guests and TCP settings of all runs.
pub(super) fn setting(summary: &Summary<'_>, runs: &[Run]) -> Vec<Block> {
    let mut blocks = vec![Block::Table(machine(runs))];
    blocks.push(Block::Heading("Links".to_owned()));
    blocks.push(Block::Table(links(summary, runs)));
    blocks.push(Block::Heading("Guests".to_owned()));
    blocks.push(Block::Table(guests(runs)));
    let tcp = tcp(runs);
    if !tcp.rows.is_empty() {
        blocks.push(Block::Heading("TCP settings of the sites".to_owned()));
        blocks.push(Block::Table(tcp));
    }
    blocks
}

/// Distinct values in the order in which they were met, with the number of runs of each.
#[derive(Default)]
struct Distinct(Vec<(String, usize)>);

impl Distinct {
    fn of(values: impl IntoIterator<Item = String>) -> Self {
        let mut distinct = Self::default();
        for value in values {
            distinct.add(value);
        }
        distinct
    }

    fn add(&mut self, value: String) {
        match self.0.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => self.0.push((value, 1)),
        }
    }

    /// The value; where there are several, of how many runs each is.
    fn text(&self) -> String {
        match &self.0[..] {
            [] => "–".to_owned(),
            [(value, _)] => value.clone(),
            several => {
                let several: Vec<String> = several
                    .iter()
                    .map(|(value, count)| format!("{value} ({count} {})", if *count == 1 { "run" } else { "runs" }))
                    .collect();
                first_few(&several)
            }
        }
    }
}

fn machine(runs: &[Run]) -> Table {
    let mut table = Table::new([("Setting", Kind::Words), ("Value", Kind::Words)]);
    let mut row = |name: &str, value: String| table.rows.push(vec![Cell::new(name), Cell::new(value)]);
    let settings = || runs.iter().map(|run| &run.setting);
    let or_unknown = |text: &str| {
        if text.is_empty() {
            "not recorded".to_owned()
        } else {
            text.to_owned()
        }
    };
    row("Begun", dates(runs));
    row(
        "longhaul",
        Distinct::of(settings().map(|setting| or_unknown(&setting.longhaul))).text(),
    );
    row(
        "QEMU",
        Distinct::of(settings().map(|setting| or_unknown(&setting.qemu))).text(),
    );
    row(
        "Guest's CPU",
        Distinct::of(settings().map(|setting| or_unknown(&setting.accelerator))).text(),
    );
    row(
        "Kernel",
        Distinct::of(settings().map(|setting| or_unknown(&setting.kernel))).text(),
    );
    row(
        "CPUs",
        Distinct::of(settings().map(|setting| setting.cpus.to_string())).text(),
    );
    row(
        "Link made by",
        Distinct::of(settings().map(|setting| or_unknown(&setting.link_backend))).text(),
    );
    row("Seeds", seeds(runs));
    row(
        "Repetitions",
        runs.iter().map(|run| run.repetition).max().unwrap_or(0).to_string(),
    );
    table
}

fn seeds(runs: &[Run]) -> String {
    let mut seeds: Vec<u64> = runs.iter().map(|run| run.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let texts: Vec<String> = seeds.iter().map(u64::to_string).collect();
    first_few(&texts)
}

/// The first and the last minute, or one where they are the same.
pub(super) fn dates(runs: &[Run]) -> String {
    let minute = |seconds: Option<u64>| {
        let stamp = jiff::Timestamp::from_second(i64::try_from(seconds?).ok()?).ok()?;
        Some(stamp.strftime("%Y-%m-%d %H:%M").to_string())
    };
    let began = || runs.iter().map(|run| run.setting.started_unix_seconds);
    match (minute(began().min()), minute(began().max())) {
        (Some(first), Some(last)) if first == last => format!("{first} UTC"),
        (Some(first), Some(last)) => format!("{first} to {last} UTC"),
        _ => "not recorded".to_owned(),
    }
}

fn links(summary: &Summary<'_>, runs: &[Run]) -> Table {
    let mut table = Table::new([
        ("Profile", Kind::Words),
        ("Link", Kind::Words),
        ("Made by", Kind::Words),
        ("Checked against its profile", Kind::Words),
    ]);
    let mut profiles: Vec<&str> = summary.groups.iter().map(|group| group.profile).collect();
    profiles.dedup();
    for profile in profiles {
        let of_profile: Vec<&Run> = runs
            .iter()
            .filter(|run| run.profile == profile && run.outcome != Outcome::Unavailable)
            .collect();
        let link = summary
            .groups
            .iter()
            .filter(|group| group.profile == profile)
            .find_map(|group| group.link.text());
        let faults = Distinct::of(of_profile.iter().filter_map(|run| run.setting.link_fault.clone()));
        let off: usize = faults.0.iter().map(|(_, count)| count).sum();
        let verdict = match (of_profile.len(), off) {
            (0, _) => Cell::nothing(),
            (all, 0) => Cell::new(format!("as it says in all {all} runs")),
            (all, off) => Cell::new(format!("off in {off} of {all} runs")).small(Some(faults.text())),
        };
        table.rows.push(vec![
            Cell::new(profile),
            link.map_or_else(Cell::nothing, Cell::new),
            Cell::new(Distinct::of(of_profile.iter().map(|run| run.setting.link_backend.clone())).text()),
            verdict,
        ]);
    }
    table
}

fn guests(runs: &[Run]) -> Table {
    let mut table = Table::new([("Guest", Kind::Words), ("Dials", Kind::Words)]);
    let mut names: Vec<&str> = Vec::new();
    for run in runs {
        if !names.contains(&run.guest.as_str()) {
            names.push(&run.guest);
        }
    }
    for name in names {
        let dials = Distinct::of(runs.iter().filter(|run| run.guest == name).map(|run| dials(&run.dials)));
        table.rows.push(vec![Cell::new(name), Cell::new(dials.text())]);
    }
    table
}

fn dials(dials: &GuestDials) -> String {
    let mut text = format!(
        "{} MiB of memory, {} MiB in use; {} pages/s rewritten, {} bytes of each; {} % of the pages incompressible",
        grouped(dials.memory_mb as f64),
        grouped(dials.working_set_mb as f64),
        grouped(dials.pages_per_second as f64),
        dials.bytes_per_page,
        dials.incompressible_percent,
    );
    if dials.hot_writes_percent > 0 {
        text.push_str(&format!(
            "; {} % of the writes to {} % of the pages",
            dials.hot_writes_percent, dials.hot_pages_percent
        ));
    }
    text
}

fn tcp(runs: &[Run]) -> Table {
    let mut table = Table::new([("Engines", Kind::Words), ("Settings", Kind::Words)]);
    let mut settings: Vec<(String, Vec<String>)> = Vec::new();
    for run in runs.iter().filter(|run| !run.setting.tcp.is_empty()) {
        let pairs: Vec<String> = run
            .setting
            .tcp
            .iter()
            .map(|(name, value)| match value {
                Value::String(text) => format!("{name} = {}", text.trim()),
                other => format!("{name} = {other}"),
            })
            .collect();
        let text = pairs.join("; ");
        match settings.iter_mut().find(|(known, _)| *known == text) {
            Some((_, engines)) if engines.contains(&run.engine) => {}
            Some((_, engines)) => engines.push(run.engine.clone()),
            None => settings.push((text, vec![run.engine.clone()])),
        }
    }
    for (text, engines) in settings {
        table.rows.push(vec![Cell::new(first_few(&engines)), Cell::new(text)]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::report::samples;

    #[test]
    fn values_that_differ_between_runs_are_all_told() {
        let mut runs = vec![
            samples::run("longhaul", 1),
            samples::run("longhaul", 2),
            samples::run("longhaul", 3),
        ];
        runs[2].setting.qemu = "7.2.22".to_owned();
        let table = machine(&runs);
        let qemu = table.rows.iter().find(|row| row[0].text == "QEMU").unwrap();
        assert_eq!(qemu[1].text, "10.0.2 (2 runs), 7.2.22 (1 run)");
    }

    #[test]
    fn a_link_that_was_off_is_told_with_its_fault() {
        let mut runs = vec![samples::run("longhaul", 1), samples::run("longhaul", 2)];
        runs[1].setting.link_fault = Some("RTT 171 ms instead of 150 ms".to_owned());
        let table = links(&Summary::of(&runs, &[]), &runs);
        assert_eq!(table.rows[0][3].text, "off in 1 of 2 runs");
        assert_eq!(table.rows[0][3].small.as_deref(), Some("RTT 171 ms instead of 150 ms"));
    }

    #[test]
    fn a_time_beyond_all_calendars_is_no_panic() {
        let mut run = samples::run("longhaul", 1);
        run.setting.started_unix_seconds = u64::MAX;
        assert_eq!(dates(&[run]), "not recorded");
        assert_eq!(dates(&[]), "not recorded");
    }
}
