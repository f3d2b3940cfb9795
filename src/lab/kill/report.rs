//! What the run of the matrix is told as: a table, and one JSON object a case.

use std::fmt;

use serde::Serialize;

use super::case::Case;
use super::judge::Judgement;
use super::moment::{Place, Step};
use super::run::{Finding, Told};
use crate::lab::error::LabError;

/// One case, judged.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Line {
    pub(super) case: String,
    pub(super) seed: u64,
    pub(super) profile: String,
    /// `kept`, `broken`, or `missed`.
    pub(super) verdict: Verdict,
    /// Version of QEMU at both sites.
    pub(super) qemu: String,
    pub(super) fault: Option<String>,
    pub(super) moment: Option<String>,
    pub(super) away_seconds: f64,
    pub(super) attempts: u32,
    pub(super) permitted: bool,
    pub(super) runs_at: Option<String>,
    /// From when all was well again: the longest time during which no copy ran.
    pub(super) one_after_seconds: Option<f64>,
    /// What the gateway of B advised, where a person had to decide.
    pub(super) advice: Option<String>,
    pub(super) copies_at_once: usize,
    pub(super) intact: bool,
    pub(super) exit_code: Option<i32>,
    pub(super) total_seconds: Option<f64>,
    pub(super) journal_a: Vec<String>,
    pub(super) journal_b: Vec<String>,
    pub(super) told_at_a: Option<Told>,
    pub(super) told_at_b: Option<Told>,
    pub(super) problems: Vec<String>,
}

/// What came of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// The fault was made at the moment, and the promise was kept.
    Kept,
    /// It was not.
    Broken,
    /// The fault could not be made at the moment; what was seen proves nothing.
    Missed,
}

impl Line {
    pub(super) fn new(
        case: &Case,
        seed: u64,
        profile: &str,
        qemu: &str,
        attempts: u32,
        found: &Finding,
        judgement: &Judgement,
    ) -> Self {
        let verdict = match (judgement.problems.is_empty(), judgement.missed) {
            (false, _) => Verdict::Broken,
            (true, true) => Verdict::Missed,
            (true, false) => Verdict::Kept,
        };
        let told = |place: Place| found.told[place.index()].clone();
        let steps = |place: Place| found.journals[place.index()].iter().map(|step| name(*step)).collect();
        Self {
            case: case.name.clone(),
            seed,
            profile: profile.to_owned(),
            verdict,
            qemu: qemu.to_owned(),
            fault: case.fault().map(|fault| fault.to_string()),
            moment: case.moment().map(|moment| moment.to_string()),
            away_seconds: case.away.as_secs_f64(),
            attempts,
            permitted: judgement.permitted,
            runs_at: judgement.place.map(|place| place.to_string()),
            one_after_seconds: judgement.one_after_seconds,
            advice: found.advice.clone(),
            copies_at_once: judgement.copies_at_once,
            intact: judgement.intact,
            exit_code: found.exit_code,
            total_seconds: found.command_seconds,
            journal_a: steps(Place::A),
            journal_b: steps(Place::B),
            told_at_a: told(Place::A),
            told_at_b: told(Place::B),
            problems: judgement.problems.clone(),
        }
    }
}

impl Line {
    /// A case that the lab could not bring to its end.
    pub(super) fn unfinished(
        case: &Case,
        seed: u64,
        profile: &str,
        qemu: &str,
        attempts: u32,
        error: &LabError,
    ) -> Self {
        Self {
            case: case.name.clone(),
            seed,
            profile: profile.to_owned(),
            verdict: Verdict::Broken,
            qemu: qemu.to_owned(),
            fault: case.fault().map(|fault| fault.to_string()),
            moment: case.moment().map(|moment| moment.to_string()),
            away_seconds: case.away.as_secs_f64(),
            attempts,
            permitted: false,
            runs_at: None,
            one_after_seconds: None,
            advice: None,
            copies_at_once: 0,
            intact: false,
            exit_code: None,
            total_seconds: None,
            journal_a: vec![],
            journal_b: vec![],
            told_at_a: None,
            told_at_b: None,
            problems: vec![format!("the case could not be brought to its end: {error}")],
        }
    }
}

fn name(step: Step) -> String {
    format!("{step:?}").to_lowercase()
}

/// The table of all cases, and what broke the promise.
pub(super) struct Table<'a>(pub(super) &'a [Line]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<28} {:<9} {:<14} {:<28} {:>6} {:>6} {:>7} {:>7} {:>10} {:>6}  verdict",
            "case", "QEMU", "fault", "at", "for", "permit", "runs at", "one by", "copies max", "intact"
        )?;
        for line in self.0 {
            let yes = |yes: bool| if yes { "yes" } else { "no" };
            writeln!(
                f,
                "{:<28} {:<9} {:<14} {:<28} {:>6} {:>6} {:>7} {:>7} {:>10} {:>6}  {}{}",
                line.case,
                line.qemu,
                line.fault.as_deref().unwrap_or("-"),
                line.moment.as_deref().unwrap_or("-"),
                format!("{:.1} s", line.away_seconds),
                yes(line.permitted),
                line.runs_at.as_deref().unwrap_or("-"),
                line.one_after_seconds
                    .map_or("-".to_owned(), |seconds| format!("{seconds:.1} s")),
                line.copies_at_once,
                line.runs_at.as_ref().map_or("dead", |_| yes(line.intact)),
                match line.verdict {
                    Verdict::Kept => "kept",
                    Verdict::Broken => "BROKEN",
                    Verdict::Missed => "missed",
                },
                line.advice.as_ref().map_or("", |_| ", a person decided"),
            )?;
        }
        let count = |verdict| self.0.iter().filter(|line| line.verdict == verdict).count();
        writeln!(
            f,
            "\n{} cases: {} kept, {} broken, {} missed",
            self.0.len(),
            count(Verdict::Kept),
            count(Verdict::Broken),
            count(Verdict::Missed)
        )?;
        if let Some(doubt) = Doubt::of(self.0) {
            writeln!(f, "{doubt}")?;
        }
        for line in self.0 {
            for problem in &line.problems {
                writeln!(f, "{}: {problem}", line.case)?;
            }
        }
        Ok(())
    }
}

/// How long no copy ran once all was well again, over all cases with a fault after which the VM lives.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Doubt {
    cases: usize,
    p50: f64,
    p99: f64,
    max: f64,
}

impl Doubt {
    /// `None` where there is no such case.
    fn of(lines: &[Line]) -> Option<Self> {
        let disturbed = lines.iter().filter(|line| line.fault.is_some());
        Self::over(disturbed.filter_map(|line| line.one_after_seconds).collect())
    }

    fn over(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        // The smallest value that is not exceeded by this share of all (nearest rank).
        let rank = |share: f64| (share * seconds.len() as f64).ceil() as usize;
        let quantile = |share: f64| seconds.get(rank(share).saturating_sub(1)).copied();
        Some(Self {
            cases: seconds.len(),
            p50: quantile(0.5)?,
            p99: quantile(0.99)?,
            max: *seconds.last()?,
        })
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "in doubt once all was well again: p50 {:.2} s, p99 {:.2} s, at most {:.2} s ({} cases)",
            self.p50, self.p99, self.max, self.cases
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_hundred_cases_the_second_longest_is_the_99th_percentile() {
        let doubt = Doubt::over((1..=100).rev().map(f64::from).collect()).unwrap();
        assert_eq!((doubt.cases, doubt.p50, doubt.p99, doubt.max), (100, 50.0, 99.0, 100.0));
        assert_eq!(Doubt::over(vec![]), None);
        assert_eq!(Doubt::over(vec![2.0]).unwrap().p99, 2.0);
    }
}
