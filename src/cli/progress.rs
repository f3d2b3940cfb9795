//! Shows how a migration goes: a bar on a terminal, plain lines elsewhere. The percentage shown never runs backwards.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{bytes, note, seconds, wire_rate};
use crate::api::{Phase, Progress};

/// A bar on a terminal, lines elsewhere.
#[derive(Debug)]
pub(super) struct Bar(Option<ProgressBar>);

impl Bar {
    pub(super) fn on_stderr() -> Self {
        Self(std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {msg}").expect("the template is constant and valid");
            ProgressBar::new(BAR_STEPS).with_style(style)
        }))
    }

    /// Shows how it goes; elsewhere than on a terminal only what is worth a line.
    pub(super) fn show(&self, percent: f64, line: &str, is_worth_a_line: bool) {
        match &self.0 {
            Some(bar) => {
                bar.set_position((percent / 100.0 * BAR_STEPS as f64) as u64);
                bar.set_message(line.to_owned());
            }
            None if is_worth_a_line => note(line),
            None => {}
        }
    }

    pub(super) fn notice(&self, text: &str) {
        match &self.0 {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    /// Takes the bar away, so that what follows is not mixed with it.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Where the progress of a migration is shown.
#[derive(Debug)]
pub(super) struct Display {
    bar: Bar,
    percent: Percent,
    shown: Option<Shown>,
}

/// What the last plain line showed.
#[derive(Debug)]
struct Shown {
    phase: Phase,
    round: u32,
    elapsed_seconds: f64,
}

impl Display {
    pub(super) fn on_stderr() -> Self {
        Self {
            bar: Bar::on_stderr(),
            percent: Percent::default(),
            shown: None,
        }
    }

    pub(super) fn progress(&mut self, progress: &Progress) {
        let percent = self.percent.shown(progress.percent);
        let is_worth_a_line = self.is_worth_a_line(progress);
        self.bar.show(percent, &line(progress, percent), is_worth_a_line);
        if is_worth_a_line {
            let Progress {
                phase,
                round,
                elapsed_seconds,
                ..
            } = *progress;
            self.shown = Some(Shown {
                phase,
                round,
                elapsed_seconds,
            });
        }
    }

    /// What comes from now on is of another migration.
    pub(super) fn begin_again(&mut self) {
        (self.percent, self.shown) = (Percent::default(), None);
    }

    pub(super) fn notice(&self, text: &str) {
        self.bar.notice(text);
    }

    /// Takes the bar away, so that what follows is not mixed with it.
    pub(super) fn clear(&self) {
        self.bar.clear();
    }

    /// A log is readable when it has a line for each phase and round, and one now and then in long rounds.
    fn is_worth_a_line(&self, progress: &Progress) -> bool {
        self.shown.as_ref().is_none_or(|shown| {
            (shown.phase, shown.round) != (progress.phase, progress.round)
                || progress.elapsed_seconds - shown.elapsed_seconds >= SECONDS_BETWEEN_LINES
        })
    }
}

/// A percentage that never runs backwards and never leaves 0 to 100.
#[derive(Debug, Default)]
struct Percent(f64);

impl Percent {
    fn shown(&mut self, percent: f64) -> f64 {
        // `max` also gets rid of NaN.
        self.0 = self.0.max(percent).clamp(0.0, 100.0);
        self.0
    }
}

/// One line that says how it goes.
fn line(progress: &Progress, percent: f64) -> String {
    let phase = match progress.phase {
        Phase::Precopy => format!("precopy round {}", progress.round),
        phase => phase.word().replace('_', "-"),
    };
    format!(
        "{phase}  {percent:.0} %  {}  reduction {:.1}  dirty {}/s  {}",
        wire_rate(progress.wire_bytes_per_second),
        progress.reduction_ratio,
        bytes(progress.dirty_bytes_per_second.max(0.0) as u64),
        eta(progress),
    )
}

/// When it will be over, and what there is to explain.
pub(super) fn eta(progress: &Progress) -> String {
    match (progress.eta_seconds, progress.converging, &progress.eta_reason) {
        (Some(eta), _, None) => format!("ETA {}", seconds(eta)),
        (Some(eta), _, Some(reason)) => format!("ETA {}, longer than it was: {reason}", seconds(eta)),
        (None, false, Some(reason)) => format!("not converging: {reason}"),
        (None, false, None) => "not converging".to_owned(),
        (None, true, Some(reason)) => format!("ETA unknown: {reason}"),
        (None, true, None) => "ETA unknown".to_owned(),
    }
}

const BAR_STEPS: u64 = 1000;

const SECONDS_BETWEEN_LINES: f64 = 5.0;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::MigrationId;

    fn progress() -> Progress {
        Progress {
            migration: MigrationId([1; 16]),
            vm: "db-1".into(),
            peer: "tokyo".into(),
            phase: Phase::Precopy,
            round: 3,
            percent: 62.4,
            elapsed_seconds: 9.0,
            wire_bytes_per_second: 93_125_000.0,
            reduction_ratio: 4.21,
            dirty_bytes_per_second: 8_100_000.0,
            remaining_bytes: 1,
            backlog_bytes: 0,
            expected_downtime_seconds: 0.2,
            eta_seconds: Some(12.0),
            eta_reason: None,
            converging: true,
        }
    }

    #[test]
    fn a_line_says_how_far_how_fast_and_until_when() {
        let progress = progress();
        assert_eq!(
            line(&progress, 62.4),
            "precopy round 3  62 %  745 Mbit/s  reduction 4.2  dirty 8.1 MB/s  ETA 12.0 s"
        );
        let grew = Progress {
            eta_reason: Some("the dirty rate doubled".into()),
            ..progress.clone()
        };
        assert!(line(&grew, 62.4).ends_with("ETA 12.0 s, longer than it was: the dirty rate doubled"));
        let diverges = Progress {
            eta_seconds: None,
            converging: false,
            eta_reason: Some("the guest dirties 90 MB/s, the link carries 60".into()),
            ..progress
        };
        assert!(line(&diverges, 62.4).ends_with("not converging: the guest dirties 90 MB/s, the link carries 60"));
    }

    #[test]
    fn the_percentage_never_runs_backwards_whatever_comes() {
        let mut percent = Percent::default();
        let shown: Vec<f64> = [10.0, 5.0, f64::NAN, 60.0, -1.0, 300.0, 20.0]
            .map(|value| percent.shown(value))
            .into();
        assert_eq!(shown, [10.0, 10.0, 10.0, 60.0, 60.0, 100.0, 100.0]);
    }

    #[test]
    fn plain_lines_come_with_phases_rounds_and_every_few_seconds() {
        let mut display = Display {
            bar: Bar(None),
            percent: Percent::default(),
            shown: None,
        };
        let first = progress();
        assert!(display.is_worth_a_line(&first));
        display.shown = Some(Shown {
            phase: first.phase,
            round: first.round,
            elapsed_seconds: first.elapsed_seconds,
        });
        assert!(!display.is_worth_a_line(&Progress {
            elapsed_seconds: 13.9,
            ..first.clone()
        }));
        assert!(display.is_worth_a_line(&Progress {
            elapsed_seconds: 14.0,
            ..first.clone()
        }));
        assert!(display.is_worth_a_line(&Progress {
            round: 4,
            ..first.clone()
        }));
        assert!(display.is_worth_a_line(&Progress {
            phase: Phase::Switchover,
            ..first
        }));
    }
}
