//! What the run of the matrix is told as: a table, and one JSON object a case.

use std::fmt;

use serde::Serialize;

use super::case::{Case, Place, Step};
use super::judge::Judgement;
use super::run::{Finding, Told};

/// One case, judged.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Line {
    pub(super) case: String,
    pub(super) seed: u64,
    pub(super) profile: String,
    /// `kept`, `broken`, or `missed`.
    pub(super) verdict: Verdict,
    pub(super) killed: Option<String>,
    pub(super) moment: Option<String>,
    pub(super) away_seconds: f64,
    pub(super) attempts: u32,
    pub(super) permitted: bool,
    pub(super) runs_at: Option<String>,
    pub(super) one_after_seconds: Option<f64>,
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
    /// The gateway was killed at the moment, and the promise was kept.
    Kept,
    /// It was not.
    Broken,
    /// The gateway could not be killed at the moment; what was seen proves nothing.
    Missed,
}

impl Line {
    pub(super) fn new(
        case: &Case,
        seed: u64,
        profile: &str,
        attempts: u32,
        found: &Finding,
        judgement: &Judgement,
    ) -> Self {
        let verdict = match (judgement.problems.is_empty(), judgement.missed) {
            (false, _) => Verdict::Broken,
            (true, true) => Verdict::Missed,
            (true, false) => Verdict::Kept,
        };
        let steps = |place: Place| found.journals[place.index()].iter().map(|step| name(*step)).collect();
        Self {
            case: case.name.clone(),
            seed,
            profile: profile.to_owned(),
            verdict,
            killed: case.kill.map(|(victim, _)| victim.to_string()),
            moment: case.kill.map(|(_, moment)| moment.to_string()),
            away_seconds: case.away.as_secs_f64(),
            attempts,
            permitted: judgement.permitted,
            runs_at: judgement.place.map(|place| place.to_string()),
            one_after_seconds: judgement.one_after_seconds,
            copies_at_once: judgement.copies_at_once,
            intact: judgement.intact,
            exit_code: found.exit_code,
            total_seconds: found.command_seconds,
            journal_a: steps(Place::A),
            journal_b: steps(Place::B),
            told_at_a: found.told[0].clone(),
            told_at_b: found.told[1].clone(),
            problems: judgement.problems.clone(),
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
            "{:<24} {:<6} {:<28} {:>7} {:>7} {:>7} {:>10} {:>7}  verdict",
            "case", "killed", "at", "permit", "runs at", "one by", "copies max", "intact"
        )?;
        for line in self.0 {
            let yes = |yes: bool| if yes { "yes" } else { "no" };
            writeln!(
                f,
                "{:<24} {:<6} {:<28} {:>7} {:>7} {:>7} {:>10} {:>7}  {}",
                line.case,
                line.killed.as_deref().unwrap_or("-"),
                line.moment.as_deref().unwrap_or("-"),
                yes(line.permitted),
                line.runs_at.as_deref().unwrap_or("?"),
                line.one_after_seconds
                    .map_or("-".to_owned(), |seconds| format!("{seconds:.1} s")),
                line.copies_at_once,
                yes(line.intact),
                match line.verdict {
                    Verdict::Kept => "kept",
                    Verdict::Broken => "BROKEN",
                    Verdict::Missed => "missed",
                },
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
        for line in self.0 {
            for problem in &line.problems {
                writeln!(f, "{}: {problem}", line.case)?;
            }
        }
        Ok(())
    }
}
