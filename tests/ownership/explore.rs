//! Walks through every reachable state of the world, and shows that the walk finds a broken rule.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::rc::Rc;

use crate::world::{Faults, Mutation, Rules, World};

const CALM: Faults = Faults {
    was_running: true,
    barriers: 0,
    crashes: true,
    vmm_trouble: false,
    source_vmm_dies: false,
    third_party: false,
    cancels: false,
    chatty: false,
    journal_fails: false,
    people: false,
    restores: false,
};

/// Multiplies and rotates, as rustc's own: the states are not hostile, and there are many.
#[derive(Default)]
struct FastHasher(u64);

impl Hasher for FastHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What an exploration has seen.
struct Explored {
    states: usize,
    steps: usize,
    good: usize,
    violation: Option<String>,
}

/// Breadth first, so that a violation comes with one of its shortest histories.
fn explore(faults: Faults, mutation: Mutation) -> Explored {
    let mut rules = Rules::new(faults, mutation);
    let start = Rc::new(rules.start());
    let mut numbers: HashMap<Rc<World>, u32, BuildHasherDefault<FastHasher>> = HashMap::default();
    numbers.insert(Rc::clone(&start), 0);
    let mut worlds = vec![start];
    let mut origins: Vec<(u32, String)> = vec![(0, "start".into())];
    // Who leads here by a healthy step.
    let mut healthy: Vec<Vec<u32>> = vec![vec![]];
    let mut steps = 0;
    let mut at = 0;
    while at < worlds.len() {
        let world = Rc::clone(&worlds[at]);
        if let Some(violation) = world.violation() {
            let story = story(&origins, at);
            return Explored {
                states: worlds.len(),
                steps,
                good: 0,
                violation: Some(format!("{violation}\n{story}")),
            };
        }
        for next in rules.next(&world) {
            steps += 1;
            let after = Rc::new(next.world);
            let number = *numbers.entry(Rc::clone(&after)).or_insert_with(|| {
                worlds.push(after);
                origins.push((at as u32, next.what));
                healthy.push(vec![]);
                worlds.len() as u32 - 1
            });
            if next.healthy {
                healthy[number as usize].push(at as u32);
            }
        }
        at += 1;
    }

    // Backwards from the good ends along healthy steps: from which states can it end well once faults stop?
    let mut reaches = vec![false; worlds.len()];
    let mut front: Vec<u32> = vec![];
    for (number, world) in worlds.iter().enumerate() {
        if world.is_good(faults.was_running) {
            reaches[number] = true;
            front.push(number as u32);
        }
    }
    let good = front.len();
    while let Some(number) = front.pop() {
        for &before in &healthy[number as usize] {
            if !reaches[before as usize] {
                reaches[before as usize] = true;
                front.push(before);
            }
        }
    }
    let violation = worlds
        .iter()
        .enumerate()
        .find(|(number, world)| !reaches[*number] && !world.may_need_a_person())
        .map(|(number, world)| format!("it can never end well\n{}\n{world:#?}", story(&origins, number)));
    Explored {
        states: worlds.len(),
        steps,
        good,
        violation,
    }
}

fn story(origins: &[(u32, String)], mut at: usize) -> String {
    let mut lines = vec![];
    while at != 0 {
        lines.push(origins[at].1.clone());
        at = origins[at].0 as usize;
    }
    lines.reverse();
    lines.join("\n")
}

#[track_caller]
fn holds(name: &str, faults: Faults) {
    let seen = explore(faults, Mutation::None);
    println!(
        "{name}: {} states, {} steps, {} good ends",
        seen.states, seen.steps, seen.good
    );
    if let Some(violation) = seen.violation {
        panic!("{name}: {violation}");
    }
    assert!(seen.good > 0, "{name}: it never ends well");
}

#[test]
fn one_side_runs_whatever_crashes() {
    holds(
        "crashes",
        Faults {
            cancels: true,
            chatty: true,
            ..CALM
        },
    );
}

#[test]
fn one_side_owns_a_guest_that_was_paused() {
    holds(
        "paused guest",
        Faults {
            was_running: false,
            vmm_trouble: true,
            ..CALM
        },
    );
}

#[test]
fn one_side_runs_whatever_the_vmms_do() {
    holds(
        "vmm trouble",
        Faults {
            vmm_trouble: true,
            third_party: true,
            cancels: true,
            barriers: 1,
            ..CALM
        },
    );
}

#[test]
fn nothing_runs_twice_when_the_source_vmm_dies() {
    holds(
        "source vmm dies",
        Faults {
            source_vmm_dies: true,
            ..CALM
        },
    );
}

#[test]
fn one_side_runs_when_journals_fail() {
    holds(
        "journals fail",
        Faults {
            journal_fails: true,
            ..CALM
        },
    );
}

#[test]
fn one_side_runs_when_people_decide_and_a_journal_is_lost() {
    holds("people", Faults { people: true, ..CALM });
}

#[test]
fn one_side_runs_when_journals_are_restored_from_backups() {
    holds("restored journals", Faults { restores: true, ..CALM });
}

#[track_caller]
fn catches(mutation: Mutation, faults: Faults, violation: &str) {
    let seen = explore(faults, mutation);
    let found = seen
        .violation
        .unwrap_or_else(|| panic!("{mutation:?} is not noticed in {} states", seen.states));
    println!("{mutation:?}, after {} states:\n{found}\n", seen.states);
    assert!(
        found.starts_with(violation),
        "{mutation:?} is noticed as something else: {found}"
    );
}

#[test]
fn a_source_that_breaks_a_rule_is_caught() {
    let both = "the guest runs at both sides";
    catches(Mutation::SourceResumesWhenContactIsLost, CALM, both);
    catches(
        Mutation::SourceDiscardsOnCommit,
        Faults { chatty: true, ..CALM },
        "the source was ended and the destination does not own the VM",
    );
    catches(
        Mutation::SourceSkipsTheFreeze,
        Faults {
            third_party: true,
            ..CALM
        },
        both,
    );
    catches(
        Mutation::OldJournalIsOpened,
        Faults { restores: true, ..CALM },
        "an ABORT is recorded and the vmm lives",
    );
    catches(
        Mutation::PermitIsSentBeforeItIsRecorded,
        CALM,
        "the tail was released and no permit is recorded",
    );
}

#[test]
fn a_destination_that_breaks_a_rule_is_caught() {
    let both = "the guest runs at both sides";
    let trouble = Faults {
        vmm_trouble: true,
        ..CALM
    };
    catches(
        Mutation::AbortWithoutConfirmedDeath,
        CALM,
        "an ABORT is recorded and the vmm lives",
    );
    catches(
        Mutation::RevertWithoutConfirmedDeath,
        trouble,
        "a REVERT is recorded and the vmm lives",
    );
    catches(
        Mutation::CommitIsActedOnBeforeItIsRecorded,
        CALM,
        "the guest is continued and no commit is recorded",
    );
    catches(Mutation::UnknownIsAnsweredWithoutRecord, CALM, both);
    catches(
        Mutation::LateCommitAfterAbort,
        CALM,
        "an ABORT is recorded and the vmm lives",
    );
    catches(
        Mutation::UnknownIsAnsweredWhateverTheJournal,
        Faults { people: true, ..CALM },
        both,
    );
    catches(
        Mutation::DeadVmmAfterCommitIsGuessedReverted,
        trouble,
        "the guest ran at the destination and runs again from its old state at the source",
    );
    catches(
        Mutation::PermitIsBelievedForAnyStream,
        trouble,
        "a different stream was committed",
    );
}
