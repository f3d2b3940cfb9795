//! What a finding means: was the promise kept?
//!
//! Never two copies at once. Before PERMIT the VM runs at the source, at the latest [`BACK_WITHIN`] seconds after the killed
//! gateway is back; after it exactly one copy runs once both are back. The guest is whole, nothing else is left, and both
//! gateways and the command say where the VM is.

use super::case::{Case, Place, Step};
use super::observe::{Run, WallTime, most_at_once};
use super::run::Finding;
use crate::api::Where;
use crate::lab::heartbeat::Crossing;

/// Seconds until the VM runs at the source where no PERMIT was given.
pub(super) const BACK_WITHIN: f64 = 5.0;

/// Seconds until exactly one copy runs after PERMIT: a silent peer is noticed, called, and has fsynced its answer.
pub(super) const ONE_WITHIN: f64 = 15.0;

/// The judgement of one case.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Judgement {
    /// Where the VM runs; `None` where it is not exactly one place.
    pub(super) place: Option<Place>,
    pub(super) permitted: bool,
    pub(super) copies_at_once: usize,
    /// From the restart until exactly one copy ran, and went on to.
    pub(super) one_after_seconds: Option<f64>,
    pub(super) intact: bool,
    /// The gateway had gone on when it was killed, or was not killed at all.
    pub(super) missed: bool,
    /// What broke the promise, in sentences.
    pub(super) problems: Vec<String>,
}

pub(super) fn judge(case: &Case, found: &Finding) -> Judgement {
    let runs = [&found.seen[0].runs[..], &found.seen[1].runs[..]];
    let running = Place::BOTH.map(|place| found.seen[place.index()].is_running());
    let place = match running {
        [true, false] => Some(Place::A),
        [false, true] => Some(Place::B),
        _ => None,
    };
    let permitted = found.journals[0].contains(&Step::Permit);
    let copies_at_once = most_at_once(&runs);
    let one_after_seconds = place.map(|place| one_after(runs[place.index()], runs, found.back));
    let intact = found.verified.is_some_and(|verified| verified.is_intact());
    let missed = case.kill.is_some() && (found.killed.is_none() || case.is_missed(&found.victims_journal));
    let mut judgement = Judgement {
        place,
        permitted,
        copies_at_once,
        one_after_seconds,
        intact,
        missed,
        problems: Vec::new(),
    };
    judgement.look_at_copies(found);
    judgement.look_at_beats(found);
    judgement.look_at_answers(found);
    judgement
}

impl Judgement {
    fn look_at_copies(&mut self, found: &Finding) {
        if self.copies_at_once > 1 {
            self.problems
                .push(format!("{} copies ran at the same time", self.copies_at_once));
        }
        if found.seen.iter().any(|seen| seen.met_late) {
            self.problems.push("the copy at B ran before it was watched".to_owned());
        }
        let Some(place) = self.place else {
            self.problems
                .push("the VM does not run in exactly one place".to_owned());
            return;
        };
        let (limit, what) = if self.permitted {
            (ONE_WITHIN, "exactly one copy ran")
        } else {
            (BACK_WITHIN, "the VM ran at the source")
        };
        if let Some(seconds) = self.one_after_seconds.filter(|seconds| *seconds > limit) {
            self.problems
                .push(format!("{what} only {seconds:.1} s after the gateway was back"));
        }
        if !self.permitted && place == Place::B {
            self.problems
                .push("the VM runs at B, but A has no record of a permit".to_owned());
        }
        if let Some(restless) = &found.restless {
            self.problems.push(format!("no rest: {restless}"));
        }
        if !self.intact {
            self.problems.push("the guest did not prove its memory".to_owned());
        }
    }

    fn look_at_beats(&mut self, found: &Finding) {
        let [at_a, at_b] = &found.heard;
        let jumps: u64 = found.heard.iter().flatten().map(|heard| heard.out_of_order).sum();
        if jumps > 0 {
            self.problems
                .push(format!("signs of life were out of order {jumps} times"));
        }
        let last = at_a.as_ref().and_then(|heard| heard.last);
        let first = at_b.as_ref().and_then(|heard| heard.first);
        if let (Some(last), Some(first)) = (last, first) {
            match Crossing::between(last, first) {
                Some(crossing) if crossing.is_seamless() => {}
                Some(_) => self.problems.push(format!(
                    "after sign of life {} at A came {} at B: the guest forked",
                    last.sequence, first.sequence
                )),
                None => self.problems.push("A gave signs of life after B had".to_owned()),
            }
        }
    }

    /// Command and gateways must say where the VM is.
    fn look_at_answers(&mut self, found: &Finding) {
        let Some(place) = self.place else { return };
        let expected = match place {
            Place::A => Where::Source,
            Place::B => Where::Destination,
        };
        // A gateway that was killed before it had recorded anything cannot tell that it was ever asked.
        let recorded = !found.journals[0].is_empty();
        let codes = match (expected, recorded) {
            (Where::Source, false) => vec![1, 2, 3],
            (place, _) => vec![i32::from(place.exit_code())],
        };
        match found.exit_code {
            Some(code) if codes.contains(&code) => {}
            Some(code) => self
                .problems
                .push(format!("longhaul migrate ended with {code}: {}", found.said)),
            None => self.problems.push("longhaul migrate did not end".to_owned()),
        }
        for place in Place::BOTH {
            if found.journals[place.index()].is_empty() {
                continue;
            }
            match &found.told[place.index()] {
                None => self
                    .problems
                    .push(format!("the gateway of {place} does not know the migration any more")),
                Some(told) => match told.outcome {
                    Some(outcome) if outcome.vm_is() == expected => {}
                    Some(outcome) => self.problems.push(format!("the gateway of {place} says {outcome}")),
                    None => self
                        .problems
                        .push(format!("the gateway of {place} does not say how it ended")),
                },
            }
        }
    }
}

/// Seconds after `back` from which the copy ran that runs at the end, and no other did.
fn one_after(runs: &[Run], all: [&[Run]; 2], back: Option<WallTime>) -> f64 {
    let Some(back) = back else { return 0.0 };
    let since = runs.last().map_or(back, |run| run.from);
    let others_end = all
        .iter()
        .flat_map(|runs| runs.iter())
        .filter_map(|run| run.until)
        .max()
        .unwrap_or(since);
    since.max(others_end).seconds_since(back)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::api::Outcome;
    use crate::lab::heartbeat::Verified;
    use crate::lab::kill::case::matrix;
    use crate::lab::kill::observe::Seen;
    use crate::lab::kill::run::Told;

    fn case(name: &str) -> Case {
        matrix(1).into_iter().find(|case| case.name == name).unwrap()
    }

    fn ran(from: u64, until: Option<u64>) -> Run {
        Run {
            from: WallTime(from),
            until: until.map(WallTime),
        }
    }

    /// The destination gateway was killed at COMMIT and is back at 20 s; the guest stands at A from 10 s and runs at B from
    /// `resumed`.
    fn moved(resumed: u64) -> Finding {
        let told = Some(Told {
            outcome: Some(Outcome::Completed),
            reason: None,
            advice: None,
        });
        Finding {
            command_seconds: Some(30.0),
            exit_code: Some(0),
            said: String::new(),
            killed: Some(WallTime(11_000_000)),
            back: Some(WallTime(20_000_000)),
            victims_journal: vec![Step::Prepared, Step::Commit],
            journals: [
                vec![Step::Started, Step::Permit, Step::Learnt, Step::Closed],
                vec![Step::Prepared, Step::Commit, Step::Running, Step::Closed],
            ],
            seen: [
                Seen {
                    runs: vec![ran(1, Some(10_000_000))],
                    met: true,
                    ended: true,
                    met_late: false,
                },
                Seen {
                    runs: vec![ran(resumed, None)],
                    met: true,
                    ended: false,
                    met_late: false,
                },
            ],
            heard: [None, None],
            verified: Some(Verified {
                pages: 9,
                bad: 0,
                writes: 1,
            }),
            told: [told.clone(), told],
            restless: None,
        }
    }

    #[test]
    fn a_vm_that_moved_after_the_restart_is_right() {
        let judgement = judge(&case("commit-kill-b"), &moved(21_500_000));
        assert_eq!(judgement.problems, Vec::<String>::new());
        assert_eq!((judgement.place, judgement.copies_at_once), (Some(Place::B), 1));
        assert_eq!(judgement.one_after_seconds, Some(1.5));
        assert!(judgement.permitted && judgement.intact && !judgement.missed);
    }

    #[test]
    fn two_copies_at_once_are_wrong_whatever_comes_of_them() {
        let judgement = judge(&case("commit-kill-b"), &moved(9_999_999));
        assert_eq!(judgement.copies_at_once, 2);
        assert!(judgement.problems[0].contains("2 copies"), "{judgement:?}");
    }

    #[test]
    fn a_vm_that_comes_back_late_is_wrong_and_just_in_time_is_right() {
        for (resumed, is_right) in [(25_000_000, true), (25_000_001, false)] {
            let mut found = moved(1);
            found.journals[0] = vec![Step::Started, Step::Closed];
            found.journals[1] = vec![Step::Prepared, Step::Abort];
            found.seen[0].runs.push(ran(resumed, None));
            found.seen[1].runs.clear();
            found.exit_code = Some(1);
            for told in found.told.iter_mut().flatten() {
                told.outcome = Some(Outcome::Failed);
            }
            let judgement = judge(&case("switchover-kill-b"), &found);
            assert_eq!(judgement.problems.is_empty(), is_right, "{judgement:?}");
        }
    }

    #[test]
    fn an_exit_code_or_a_gateway_that_says_otherwise_is_wrong() {
        let mut found = moved(21_000_000);
        found.exit_code = Some(3);
        found.told[1] = None;
        let judgement = judge(&case("commit-kill-b"), &found);
        assert_eq!(judgement.problems.len(), 2, "{judgement:?}");
    }

    #[test]
    fn a_gateway_that_was_never_killed_is_a_miss() {
        let found = Finding {
            killed: None,
            back: None,
            ..moved(21_000_000)
        };
        assert!(judge(&case("commit-kill-b"), &found).missed);
        let undisturbed = Case {
            name: "undisturbed".to_owned(),
            kill: None,
            away: Duration::ZERO,
        };
        assert!(!judge(&undisturbed, &found).missed);
    }
}
