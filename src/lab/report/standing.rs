//! Which runs may be in a figure. Everything else of the report asks here.

use std::borrow::Cow;

use crate::lab::record::{Outcome, Run};

/// What a run counts for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing<'a> {
    /// Its figures are in the medians.
    Completed,
    /// Known to take longer than it was given: a bound, never a value.
    NotFinished,
    /// The engine gave up or broke.
    Failed,
    /// Not to be compared with anything, and why.
    Unusable(Cow<'a, str>),
    /// The machine cannot run it.
    Unavailable,
}

impl<'a> Standing<'a> {
    pub(super) fn of(run: &'a Run) -> Self {
        if run.outcome == Outcome::Unavailable {
            return Self::Unavailable;
        }
        if !run.usable {
            let fault = run.reason.as_deref().or(run.setting.link_fault.as_deref());
            return Self::Unusable(Cow::Borrowed(fault.unwrap_or("no reason was recorded")));
        }
        if let Some(fault) = &run.setting.link_fault {
            return Self::Unusable(Cow::Owned(format!("the link was not what its profile says: {fault}")));
        }
        if let Some(problem) = impossible(run) {
            return Self::Unusable(Cow::Owned(problem));
        }
        match run.outcome {
            Outcome::Completed => Self::Completed,
            Outcome::NotFinished => Self::NotFinished,
            Outcome::Failed => Self::Failed,
            Outcome::Unavailable => Self::Unavailable,
        }
    }
}

/// A figure that no measurement can have: one such in a median would make the whole report wrong, silently.
fn impossible(run: &Run) -> Option<String> {
    let application = run.application.as_ref();
    let works = application.map(|application| [application.before, application.during, application.after]);
    let figures = [
        ("total_seconds", run.total_seconds),
        ("downtime_seconds", run.downtime_seconds),
        ("blackout_seconds", run.blackout_seconds),
        ("link_use", run.link_use),
        ("cpu_seconds_per_gib", run.cpu_seconds_per_gib.map(|ends| ends.source)),
        (
            "cpu_seconds_per_gib",
            run.cpu_seconds_per_gib.map(|ends| ends.destination),
        ),
    ];
    let work = works.iter().flatten().flat_map(|work| {
        [
            ("operations_per_second", Some(work.operations_per_second)),
            ("p99_seconds", Some(work.p99_seconds)),
        ]
    });
    figures.into_iter().chain(work).find_map(|(name, value)| {
        let value = value?;
        (!(0.0..=MOST).contains(&value)).then(|| format!("its {name} of {value} cannot be"))
    })
}

/// Thirty thousand years, or operations of a machine that does not exist.
const MOST: f64 = 1e12;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::report::samples;

    #[test]
    fn a_run_over_a_link_that_was_off_is_not_usable_whatever_it_says() {
        let mut run = samples::run("longhaul", 1);
        assert_eq!(Standing::of(&run), Standing::Completed);
        run.setting.link_fault = Some("RTT 171 ms".to_owned());
        assert!(matches!(Standing::of(&run), Standing::Unusable(reason) if reason.contains("171 ms")));
    }

    #[test]
    fn a_figure_that_cannot_be_makes_a_run_unusable() {
        for wrong in [-0.1, 1e300] {
            let mut run = samples::run("longhaul", 1);
            run.downtime_seconds = Some(wrong);
            assert!(matches!(Standing::of(&run), Standing::Unusable(reason) if reason.contains("downtime_seconds")));
        }
        let mut run = samples::run("longhaul", 1);
        run.downtime_seconds = Some(0.0);
        assert_eq!(Standing::of(&run), Standing::Completed);
    }

    #[test]
    fn what_this_machine_cannot_run_is_no_unusable_run() {
        let mut run = samples::run("qemu-multifd-zstd", 1);
        run.outcome = Outcome::Unavailable;
        run.usable = false;
        assert_eq!(Standing::of(&run), Standing::Unavailable);
    }
}
