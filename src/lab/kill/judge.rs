//! What a finding means: was the promise kept?
//!
//! Never two copies at once. Before PERMIT the VM runs at the source, at the latest [`BACK_WITHIN`] seconds after all is well again; after
//! it exactly one copy runs, at the latest after [`ONE_WITHIN`]. The guest is whole, nothing else is left, and both gateways and
//! the command say where the VM is.
//!
//! A fault may ask for more, or leave less:
//!
//! | fault | what must be |
//! | --- | --- |
//! | a gateway killed or stopped, the link cut | the above |
//! | a gateway killed that begins again what was undone | and the VM runs at B |
//! | the source's hypervisor killed | before PERMIT the VM is dead and runs nowhere, and `longhaul migrate` says 3; after it, it runs at B |
//! | the destination's hypervisor killed | before COMMIT the VM runs at A; after RUNNING it is dead and A does not run it; between the two it runs at A once a person has said that it is lost at B |
//! | the command killed or stopped, a clock moved | the VM moves as if nothing had been |
//! | a journal that cannot be written | the above, once there is room and its gateway was started again; until then the command may end with 3 |

use std::time::Duration;

use super::case::Case;
use super::fault::Fault;
use super::moment::{Place, Step};
use super::observe::{Run, longest_standstill, most_at_once};
use super::run::{Finding, is_lost};
use crate::api::{Outcome, Where};
use crate::lab::heartbeat::Crossing;

/// Seconds until the VM runs at the source where no PERMIT was given.
pub(super) const BACK_WITHIN: f64 = 5.0;

/// Seconds until exactly one copy runs after PERMIT: a silent peer is noticed, called, and has fsynced its answer.
pub(super) const ONE_WITHIN: f64 = 5.0;

/// A source whose peer is silent for this long after PERMIT tells the command that it does not know, and goes on by itself.
const DOUBTED_AFTER: Duration = Duration::from_secs(30);

/// The judgement of one case.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Judgement {
    /// Where the VM runs; `None` where it is not exactly one place.
    pub(super) place: Option<Place>,
    pub(super) permitted: bool,
    pub(super) copies_at_once: usize,
    /// From when all was well again: the longest time during which no copy ran. `None` where none runs at the end.
    pub(super) one_after_seconds: Option<f64>,
    pub(super) intact: bool,
    /// The fault was never made, or the gateway had gone on when it was hit.
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
    let one_after_seconds = match (place, found.mended) {
        (None, _) => None,
        (Some(_), Some(mended)) => Some(longest_standstill(&runs, mended)),
        (Some(_), None) => Some(0.0),
    };
    let mut judgement = Judgement {
        place,
        permitted: found.journals[0].contains(&Step::Permit),
        copies_at_once: most_at_once(&runs),
        one_after_seconds,
        intact: found.verified.is_some_and(|verified| verified.is_intact()),
        missed: case.injection.is_some() && (found.struck.is_none() || case.is_missed(&found.victims_journal)),
        problems: Vec::new(),
    };
    if is_lost(case, &found.journals) {
        judgement.look_at_the_dead(case, found, &runs);
    } else {
        judgement.look_at_copies(case, found);
        judgement.look_at_answers(case, found);
    }
    judgement.look_at_beats(found);
    judgement.look_at_the_rest(case, found);
    judgement
}

impl Judgement {
    /// The fault has killed the only copy that may run.
    fn look_at_the_dead(&mut self, case: &Case, found: &Finding, runs: &[&[Run]]) {
        if let Some(place) = self.place {
            self.problems.push(format!("the VM runs at {place}, though it is dead"));
        }
        let (died_at, expected) = match case.fault() {
            Some(Fault::KillQemu(Place::B)) => (Place::B, Outcome::Completed),
            _ => (Place::A, Outcome::VmDied),
        };
        if died_at == Place::A && !runs[Place::B.index()].is_empty() {
            self.problems
                .push("the VM has run at B, but A has no record of a permit".to_owned());
        }
        // Where nothing had begun it may also say that nothing was touched.
        let is_untouched = found.journals[0].is_empty();
        let says_so = |code: i32| {
            let says = |place: Where| code == i32::from(place.exit_code());
            says(expected.vm_is()) || is_untouched && says(Where::Untouched)
        };
        if !found.exit_code.is_some_and(says_so) {
            self.problems.push(match found.exit_code {
                Some(code) => format!("longhaul migrate ended with {code}: {}", found.said),
                None => "longhaul migrate did not end".to_owned(),
            });
        }
        if !is_untouched {
            match found.told[0].as_ref().map(|told| told.outcome) {
                Some(Some(outcome)) if outcome == expected => {}
                Some(Some(outcome)) => self.problems.push(format!("the gateway of A says {outcome}")),
                _ => self
                    .problems
                    .push("the gateway of A does not say how it ended".to_owned()),
            }
        }
    }

    fn look_at_copies(&mut self, case: &Case, found: &Finding) {
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
                .push(format!("{what} only {seconds:.1} s after all was well again"));
        }
        if !self.permitted && place == Place::B {
            self.problems
                .push("the VM runs at B, but A has no record of a permit".to_owned());
        }
        let only_place = match case.fault() {
            _ if case.again => Some(Place::B),
            Some(Fault::KillQemu(Place::A) | Fault::KillCommand | Fault::StopCommand | Fault::MoveClock(..)) | None => {
                Some(Place::B)
            }
            Some(Fault::KillQemu(Place::B)) => Some(Place::A),
            _ => None,
        };
        if let Some(only) = only_place.filter(|only| *only != place && !case.is_cancelled()) {
            self.problems.push(format!("the VM runs at {place} and not at {only}"));
        }
        if found.settings_kept == Some(false) {
            self.problems
                .push("QEMU at A does not have its migration settings back".to_owned());
        }
        match found.verified {
            Some(verified) if verified.is_intact() => {}
            Some(verified) => self.problems.push(format!(
                "the guest found {} damaged pages of {}",
                verified.bad, verified.pages
            )),
            None => self.problems.push("the guest did not prove its memory".to_owned()),
        }
    }

    /// What holds whether the VM lives or not.
    fn look_at_the_rest(&mut self, case: &Case, found: &Finding) {
        if self.copies_at_once > 1 {
            self.problems
                .push(format!("{} copies ran at the same time", self.copies_at_once));
        }
        if found.seen.iter().any(|seen| seen.met_late) {
            self.problems.push("the copy at B ran before it was watched".to_owned());
        }
        if let Some(restless) = &found.restless {
            self.problems.push(format!("no rest: {restless}"));
        }
        if !found.leftovers.is_empty() {
            self.problems
                .push(format!("left behind: {}", found.leftovers.join(", ")));
        }
        self.problems.extend_from_slice(&found.disk_problems);
        // A person takes part only where that is what the fault does, and then the journal says so.
        if found.advice.is_some() && case.fault() != Some(Fault::KillQemu(Place::B)) {
            self.problems.push("a person had to decide".to_owned());
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
        // Where a person has said that the copy at B is lost, A goes on from where it was paused: what B did since is gone.
        if found.advice.is_some() {
            return;
        }
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
    fn look_at_answers(&mut self, case: &Case, found: &Finding) {
        let Some(place) = self.place else { return };
        let expected = match place {
            Place::A => Where::Source,
            Place::B => Where::Destination,
        };
        // Where nothing had begun it may also say that nothing was touched.
        let is_untouched = found.journals[0].is_empty() && expected == Where::Source;
        // The command need not wait for a person, for a disk, or for a peer that is away for long.
        let may_doubt =
            found.advice.is_some() || matches!(case.fault(), Some(Fault::FullDisk(_))) || case.away > DOUBTED_AFTER;
        let says_where = |code: i32| {
            let says = |place: Where| code == i32::from(place.exit_code());
            says(expected) || is_untouched && says(Where::Untouched) || may_doubt && says(Where::Unknown)
        };
        match found.exit_code {
            _ if case.fault() == Some(Fault::KillCommand) => {}
            Some(code) if says_where(code) => {}
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::heartbeat::Verified;
    use crate::lab::kill::matrix::Matrix;
    use crate::lab::kill::observe::{Seen, WallTime};
    use crate::lab::kill::run::Told;

    fn case(name: &str) -> Case {
        let mut cases = Matrix::of(1).cases.into_iter();
        cases.find(|case| case.name == name).unwrap()
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
            struck: Some(WallTime(11_000_000)),
            mended: Some(WallTime(20_000_000)),
            advice: None,
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
            settings_kept: None,
            restless: None,
            leftovers: vec![],
            disk_problems: vec![],
        }
    }

    /// The hypervisor of one site was killed and no copy runs.
    fn died(place: Place, exit_code: i32, outcome: Outcome) -> Finding {
        let mut found = moved(21_000_000);
        found.seen[1].runs.clear();
        found.mended = found.struck;
        found.exit_code = Some(exit_code);
        found.verified = None;
        if place == Place::A {
            found.journals = [vec![Step::Started, Step::Closed], vec![Step::Prepared, Step::Abort]];
        }
        for told in found.told.iter_mut().flatten() {
            told.outcome = Some(outcome);
        }
        found
    }

    #[test]
    fn a_vm_whose_hypervisor_was_killed_before_the_permit_is_dead_and_that_is_said() {
        let case = case("started-kill-qemu-a");
        let judgement = judge(&case, &died(Place::A, 3, Outcome::VmDied));
        assert_eq!(judgement.problems, Vec::<String>::new());
        assert_eq!(judgement.one_after_seconds, None);
        assert!(!judge(&case, &died(Place::A, 1, Outcome::VmDied)).problems.is_empty());
        assert!(!judge(&case, &died(Place::A, 3, Outcome::Failed)).problems.is_empty());
    }

    #[test]
    fn a_copy_that_died_at_b_after_running_is_not_replaced_by_that_of_a() {
        let case = case("running-kill-qemu-b");
        let mut found = died(Place::B, 0, Outcome::Completed);
        assert_eq!(judge(&case, &found).problems, Vec::<String>::new());
        found.seen[0].runs.push(ran(22_000_000, None));
        assert!(judge(&case, &found).problems[0].contains("though it is dead"));
    }

    #[test]
    fn a_person_is_asked_only_where_the_destination_has_died_undecided() {
        let mut found = moved(21_000_000);
        found.advice = Some("decide".to_owned());
        assert!(judge(&case("commit-stop-b-long"), &found).problems[0].contains("a person"));
        found.journals[1] = vec![Step::Prepared, Step::Commit, Step::Resolved, Step::Revert];
        found.seen[0].runs.push(ran(21_000_000, None));
        found.seen[1].runs.clear();
        found.exit_code = Some(3);
        for told in found.told.iter_mut().flatten() {
            told.outcome = Some(Outcome::Failed);
        }
        let judgement = judge(&case("commit-kill-qemu-b"), &found);
        assert_eq!(judgement.problems, Vec::<String>::new());
    }

    #[test]
    fn a_command_that_is_killed_does_not_take_the_migration_with_it() {
        let mut found = moved(21_000_000);
        found.exit_code = None;
        assert_eq!(
            judge(&case("permit-kill-command"), &found).problems,
            Vec::<String>::new()
        );
        found.journals[0] = vec![Step::Started, Step::Closed];
        assert!(!judge(&case("permit-kill-command"), &found).problems.is_empty());
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
        let says_so = |problem: &String| problem.contains("2 copies");
        assert!(judgement.problems.iter().any(says_so), "{judgement:?}");
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
            struck: None,
            mended: None,
            ..moved(21_000_000)
        };
        assert!(judge(&case("commit-kill-b"), &found).missed);
        assert!(!judge(&Case::undisturbed(), &found).missed);
    }
}
