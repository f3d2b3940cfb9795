//! Every case that there is: which fault, at which moment, for how long.

use std::time::Duration;

use super::case::{Case, Injection};
use super::fault::{Fault, Victim};
use super::moment::{Moment, Place, Step};
use crate::lab::clock::Jump;
use crate::lab::random::Random;
use crate::wan::Directions;

/// Every case; the same seed gives the same. Those that are run unless more is asked for come first: gateways that are killed.
pub(super) struct Matrix {
    pub(super) cases: Vec<Case>,
    /// How many of them are the short selection.
    pub(super) usual: usize,
}

impl Matrix {
    pub(super) fn of(seed: u64) -> Self {
        let mut random = Random(seed);
        let mut cases = gateways_killed(&mut random);
        let usual = cases.len();
        cases.extend(everything_else(&mut random));
        Self { cases, usual }
    }
}

fn gateways_killed(random: &mut Random) -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, moment) in steps() {
        let both = BOTH_AT.contains(&name).then_some(Victim::Both);
        for victim in Place::BOTH.map(Victim::One).into_iter().chain(both) {
            cases.push(case(name, Fault::KillGateway(victim), moment, random.between(AWAY)));
        }
    }
    for number in 1..=SEEDED_MOMENTS {
        let moment = Moment::Share(random.unit());
        for victim in Place::BOTH.map(Victim::One) {
            let name = format!("seeded-{number}");
            cases.push(case(&name, Fault::KillGateway(victim), moment, random.between(AWAY)));
        }
    }
    cases
}

fn everything_else(random: &mut Random) -> Vec<Case> {
    let mut cases = Vec::new();
    for victim in [Victim::One(Place::A), Victim::One(Place::B), Victim::Both] {
        let fault = Fault::KillGateway(victim);
        cases.push(case("last-pass", fault, Moment::LastPass, random.between(AWAY)));
    }
    for (name, moment) in [
        (
            "permit",
            Moment::Record {
                at: Place::A,
                step: Step::Permit,
            },
        ),
        (
            "commit",
            Moment::Record {
                at: Place::B,
                step: Step::Commit,
            },
        ),
    ] {
        cases.push(case(name, Fault::CutLink(Directions::Both), moment, MINUTE).named("minute"));
    }
    cases.extend(begun_again(random));
    for fault in faults() {
        for (name, moment) in moments() {
            if fault_lasts(fault) {
                let short = case(name, fault, moment, random.between(SHORT));
                let long = case(name, fault, moment, random.between(long(fault, moment)));
                cases.push(short.named("short"));
                cases.push(long.named("long"));
            } else {
                cases.push(case(name, fault, moment, random.between(AWAY)));
            }
        }
        for number in 1..=FEWER_SEEDED_MOMENTS {
            let (name, moment) = (format!("seeded-{number}"), Moment::Share(random.unit()));
            cases.push(case(&name, fault, moment, random.between(AWAY)));
        }
    }
    cases.extend(clocks_moved());
    cases
}

/// A clock is wrong for the rest of the migration, so only what comes after the moment matters.
fn clocks_moved() -> Vec<Case> {
    let mut cases = Vec::new();
    let moments = steps();
    for (name, moment) in moments.into_iter().filter(|(name, _)| CLOCK_MOVED_AT.contains(name)) {
        for place in Place::BOTH {
            for jump in Jump::BOTH {
                cases.push(case(name, Fault::MoveClock(place, jump), moment, Duration::ZERO));
            }
        }
    }
    cases
}

/// Gateways that are killed while the source may still change its mind, and bring the VM across all the same.
fn begun_again(random: &mut Random) -> Vec<Case> {
    let is_before_the_permit = |(name, _): &(&str, Moment)| ["started", "last-pass", "switchover"].contains(name);
    let mut moments: Vec<_> = moments().into_iter().filter(is_before_the_permit).collect();
    moments.push(("seeded", Moment::Share(random.unit())));
    let mut cases = Vec::new();
    for (name, moment) in moments {
        for victim in [Victim::One(Place::A), Victim::One(Place::B), Victim::Both] {
            let case = case(name, Fault::KillGateway(victim), moment, random.between(AWAY));
            cases.push(case.begun_again());
        }
    }
    cases
}

fn case(name: &str, fault: Fault, moment: Moment, away: Duration) -> Case {
    Case {
        name: format!("{name}-{}", fault.name()),
        injection: Some(Injection { fault, moment }),
        away,
        again: false,
    }
}

/// All but the killed gateways and the clocks.
fn faults() -> Vec<Fault> {
    vec![
        Fault::KillQemu(Place::A),
        Fault::KillQemu(Place::B),
        Fault::KillCommand,
        Fault::StopGateway(Place::A),
        Fault::StopGateway(Place::B),
        Fault::StopQemu,
        Fault::StopCommand,
        Fault::CutLink(Directions::Both),
        Fault::CutLink(Directions::Ab),
        Fault::CutLink(Directions::Ba),
        Fault::FullDisk(Place::A),
        Fault::FullDisk(Place::B),
    ]
}

/// Whether it matters how long it lasts: on both sides of the times after which somebody is given up.
fn fault_lasts(fault: Fault) -> bool {
    matches!(fault, Fault::StopGateway(_) | Fault::StopQemu | Fault::CutLink(_))
}

/// Where the guest stands still meanwhile, a process that sleeps does so for longer than its peer has patience with it.
fn long(fault: Fault, moment: Moment) -> [Duration; 2] {
    let stands = match moment {
        Moment::LastPass | Moment::Switchover => true,
        Moment::Record { step, .. } => matches!(step, Step::Permit | Step::Commit),
        _ => false,
    };
    match fault {
        Fault::StopGateway(_) | Fault::StopQemu if stands => LONGER,
        _ => LONG,
    }
}

/// The moments of an undisturbed migration, in the order in which they come.
fn moments() -> Vec<(&'static str, Moment)> {
    let of_a_whole_one = |(_, moment): &(&str, Moment)| match moment {
        Moment::Record { step, .. } => *step != Step::Closed,
        Moment::Switchover => true,
        _ => false,
    };
    let mut moments: Vec<_> = steps().into_iter().filter(of_a_whole_one).collect();
    moments.insert(2, ("last-pass", Moment::LastPass));
    moments
}

/// The moments that have a name, in the order in which they come.
fn steps() -> Vec<(&'static str, Moment)> {
    let record = |at, step| Moment::Record { at, step };
    let cancelled = |at, step| Moment::CancelledRecord { at, step };
    vec![
        ("prepared", record(Place::B, Step::Prepared)),
        ("started", record(Place::A, Step::Started)),
        ("switchover", Moment::Switchover),
        ("permit", record(Place::A, Step::Permit)),
        ("commit", record(Place::B, Step::Commit)),
        ("running", record(Place::B, Step::Running)),
        ("learnt", record(Place::A, Step::Learnt)),
        ("closed-at-b", record(Place::B, Step::Closed)),
        ("closed-at-a", record(Place::A, Step::Closed)),
        ("cancelled-closed", cancelled(Place::A, Step::Closed)),
        ("cancelled-abort", cancelled(Place::B, Step::Abort)),
    ]
}

/// Moments at which both gateways are killed, too: from the last at which the source may change its mind to the first at which
/// everything is decided.
const BOTH_AT: [&str; 5] = ["switchover", "permit", "commit", "running", "learnt"];
/// Before it copies, at each record that decides, and while the other side is still to hear of it.
const CLOCK_MOVED_AT: [&str; 4] = ["prepared", "permit", "commit", "running"];
const SEEDED_MOMENTS: u32 = 5;
/// For each fault but killed gateways.
const FEWER_SEEDED_MOMENTS: u32 = 3;
/// On both sides of the time after which a silent peer is given up, 2 s.
const AWAY: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(6)];
/// Shorter than that.
const SHORT: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(1800)];
/// Longer than that.
const LONG: [Duration; 2] = [Duration::from_millis(2500), Duration::from_secs(8)];
/// Longer than a source keeps silent about a destination that is.
const MINUTE: Duration = Duration::from_secs(60);
/// Longer than a source waits for a destination that takes nothing, 15 s.
const LONGER: [Duration; 2] = [Duration::from_secs(16), Duration::from_secs(20)];

#[cfg(test)]
mod tests {
    use super::*;

    fn count(cases: &[Case], is_meant: impl Fn(Fault) -> bool) -> usize {
        let faults = cases.iter().filter_map(|case| Some(case.injection?.fault));
        faults.filter(|fault| is_meant(*fault)).count()
    }

    #[test]
    fn every_moment_kills_either_gateway_and_a_seed_gives_the_same_cases() {
        let Matrix { cases, usual } = Matrix::of(7);
        assert_eq!(cases, Matrix::of(7).cases);
        assert_ne!(cases, Matrix::of(8).cases);
        for place in Place::BOTH {
            let kills = count(&cases[..usual], |fault| fault == Fault::KillGateway(Victim::One(place)));
            assert_eq!(kills, steps().len() + SEEDED_MOMENTS as usize);
        }
        let both = count(&cases[..usual], |fault| fault == Fault::KillGateway(Victim::Both));
        assert_eq!(both, BOTH_AT.len());
        let mut names: Vec<_> = cases.iter().map(|case| &case.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cases.len());
    }

    #[test]
    fn every_fault_comes_at_every_moment_and_the_whole_matrix_has_more_than_two_hundred() {
        let cases = Matrix::of(1).cases;
        assert!(cases.len() > 200, "{}", cases.len());
        assert_eq!(moments().len(), 8);
        for fault in faults() {
            let each = if fault_lasts(fault) { 2 } else { 1 };
            let minutes = if fault == Fault::CutLink(Directions::Both) {
                2
            } else {
                0
            };
            let expected = each * moments().len() + FEWER_SEEDED_MOMENTS as usize + minutes;
            assert_eq!(count(&cases, |other| other == fault), expected, "{fault}");
        }
    }

    #[test]
    fn either_clock_is_moved_either_way_before_and_after_each_decision() {
        let cases = Matrix::of(1).cases;
        for place in Place::BOTH {
            for jump in Jump::BOTH {
                let fault = Fault::MoveClock(place, jump);
                assert_eq!(count(&cases, |other| other == fault), CLOCK_MOVED_AT.len(), "{fault}");
            }
        }
    }
}
