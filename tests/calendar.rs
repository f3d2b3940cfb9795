//! A calendar of rates and a migration that runs when it changes. The shortest time that a calendar knows is a minute.

mod common;

use common::guest::Machine;
use common::{Rig, need, qemu};

#[test]
#[expect(clippy::disallowed_methods, reason = "the calendar goes by the real clock")]
fn a_migration_goes_faster_from_the_minute_on_at_which_the_calendar_says_so() {
    need!(qemu());
    let mut rig = Rig::apart(&[("vm", Machine::filled(48))], |_, _| ());
    rig.b.start();
    rig.a.boot("vm");
    // Far enough away that the migration has begun by then.
    let now = jiff::Timestamp::now();
    let change = jiff::Timestamp::from_second((now.as_second() + 30) / 60 * 60 + 60).unwrap();
    let [from, to] = [now, change].map(|at| at.strftime("%H:%M").to_string());
    rig.a.plan().settings +=
        &format!("[[link.calendar]]\ndays = \"daily\"\nhours = \"{from}-{to}\"\nrate = \"1mbit\"\n");
    rig.a.start();
    rig.pair();
    let client = rig.a.begin(&[
        "migrate",
        "vm",
        "--to",
        "b",
        "--downtime-limit",
        "9s",
        "--output",
        "json",
    ]);
    rig.a.until_phase("precopy");
    assert!(jiff::Timestamp::now() < change, "the machine is too busy for this test");
    // At 1 Mbit/s its 48 MiB would take seven minutes, longer than a test waits for anything.
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(jiff::Timestamp::now() >= change, "{moved:?}");
    let said = rig.a.log();
    assert!(said.contains("the link has another rate by its calendar"), "{said}");
    rig.assert_only(&[(&rig.b, "vm")]);
}
