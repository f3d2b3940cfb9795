//! Whole migrations over a path that is cut and comes back.

mod common;

use common::guest::Machine;
use common::process::Running;
use common::relay::Relay;
use common::site::free_port;
use common::{Rig, Site, need, qemu, until};

/// Two paired sites that reach each other only through relays.
fn apart(machine: Machine) -> (Rig, [Relay; 2]) {
    let mut relays = Vec::new();
    let rig = Rig::planned(&[("vm", machine)], |a, b| {
        for plan in [a, b] {
            let front = free_port();
            relays.push(Relay::start(front, plan.port));
            plan.settings = format!("advertise = \"127.0.0.1:{front}\"\n{}", plan.settings);
        }
    });
    let relays = relays.try_into().unwrap_or_else(|_| panic!("a relay for each site"));
    (rig, relays)
}

fn cut(relays: &[Relay; 2], cut: bool) {
    relays.iter().for_each(|relay| relay.cut(cut));
}

#[track_caller]
fn begin(site: &Site, rate: &str) -> Running {
    let client = site.begin(&["migrate", "vm", "--to", "b", "--rate", rate, "--output", "json"]);
    site.until_phase("precopy");
    client
}

#[test]
fn a_cut_while_memory_is_copied_is_waited_for_and_only_what_was_lost_is_sent_again() {
    need!(qemu());
    let (mut rig, relays) = apart(Machine::filled(48));
    rig.a.boot("vm");
    let client = begin(&rig.a, "40mbit");
    for times in 1..=2 {
        let percent = |site: &Site| {
            site.run(&["list", "--output", "json"]).json()[0]["percent"]
                .as_f64()
                .unwrap()
        };
        let reached = percent(&rig.a);
        until("some more is copied", || percent(&rig.a) > reached);
        cut(&relays, true);
        until("both have noticed", || {
            [&rig.a, &rig.b]
                .iter()
                .all(|site| site.log().matches("contact lost").count() >= times)
        });
        assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
        cut(&relays, false);
    }
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let report = moved.json();
    let (given, carried) = (
        report["vmm_bytes"].as_u64().unwrap(),
        report["wire_bytes"].as_u64().unwrap(),
    );
    // Random bytes cross once, with headers; all of them again would be twice as many.
    assert!(carried < given * 5 / 4, "{report}");
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);
}
