//! Gateways whose wall clocks are set wrong while they run.

mod common;

use common::guest::Machine;
use common::{Rig, need, qemu};
use longhaul::lab::clock::{self, Clock, Jump, PRELOAD};
use rustix::process::Signal;

/// What a clock of a killed process leaves is removed with the test.
struct Forgotten(Vec<u32>);

impl Drop for Forgotten {
    fn drop(&mut self) {
        self.0.iter().copied().for_each(clock::forget);
    }
}

fn library() -> Result<std::path::PathBuf, String> {
    clock::library().ok_or_else(|| "libfaketime is not installed (Debian package faketime)".to_owned())
}

#[test]
fn gateways_whose_clocks_are_set_two_days_apart_find_each_other_again_and_move_a_vm() {
    need!(qemu(), library());
    let library = library().unwrap();
    let mut clocks = Vec::new();
    let mut started = Forgotten(Vec::new());
    let mut rig = Rig::planned(&[("vm", Machine::filled(24))], |a, b| {
        for plan in [a, &mut *b] {
            let clock = Clock::right(library.clone(), &plan.folder).unwrap();
            plan.environment = clock.environment().into();
            clocks.push(clock);
        }
        // Its hypervisor has the host's clock.
        b.vm("vm")
            .command
            .as_mut()
            .unwrap()
            .splice(0..0, ["env", "-u", PRELOAD].map(str::to_owned));
    });
    started.0.extend([rig.a.gateway().id(), rig.b.gateway().id()]);
    rig.a.boot("vm");
    clocks[0].jump(Jump::Ahead).unwrap();
    clocks[1].jump(Jump::Back).unwrap();
    // A connection that is made anew checks certificates by the new time.
    let before = rig.b.log();
    rig.b.gateway().signal(Signal::KILL);
    rig.b.start();
    started.0.push(rig.b.gateway().id());
    let moved = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    rig.assert_only(&[(&rig.b, "vm")]);
    let report = moved.json();
    let (total, downtime) = (&report["total_seconds"], &report["downtime_seconds"]);
    // A day is not among what was measured.
    for seconds in [total, downtime] {
        assert!((0.0..3600.0).contains(&seconds.as_f64().unwrap()), "{report}");
    }
    assert!(
        clock::has_jumped(&rig.a.log(), Jump::Ahead),
        "the clock of a was not moved"
    );
    assert!(
        clock::has_jumped(&(before + &rig.b.log()), Jump::Back),
        "the clock of b was not moved"
    );
    let back = rig.b.run(&["migrate", "vm", "--to", "a"]);
    assert_eq!(back.code, Some(0), "{back:?}");
}
