//! Gateways that are killed while memory is copied: the VM runs on at the source, and the migration is begun again by itself.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use common::guest::Machine;
use common::process::{Ended, Running};
use common::{Rig, Site, need, qemu, until};
use rustix::process::Signal;
use serde_json::Value;

/// The guest is across after some seconds.
const SLOWLY: &str = "20mbit";

/// A VM at A that is on its way to B, and the id of its migration.
fn on_its_way(settings: &str) -> (Rig, Running, String) {
    let mut rig = Rig::planned(&[("vm", Machine::filled(24))], |a, b| {
        a.settings += settings;
        b.settings += settings;
    });
    rig.a.boot("vm");
    let client = rig
        .a
        .begin(&["migrate", "vm", "--to", "b", "--rate", SLOWLY, "--output", "json"]);
    rig.a.until_phase("precopy");
    until("a hypervisor waits at b", || rig.b.hypervisors("vm").len() == 1);
    let id = known(&rig.a)[0]["migration"].as_str().unwrap().to_owned();
    (rig, client, id)
}

/// Its VMs live on.
fn kill_gateway(site: &mut Site) {
    site.gateway().signal(Signal::KILL);
    until("the gateway is dead", || site.gateway().has_ended());
}

/// The migrations that a gateway lists, the newest first.
fn known(site: &Site) -> Vec<Value> {
    let listed = site.run(&["list", "--output", "json"]).json();
    listed.as_array().unwrap().clone()
}

/// The command that was there from the beginning ends with the migration that took the place of `first`.
#[track_caller]
fn assert_begun_again(rig: &Rig, ended: &Ended, first: &str) {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "completed", "{report}");
    let earlier = rig.a.run(&["status", first, "--output", "json"]).json();
    assert_eq!(earlier["report"]["outcome"], "failed", "{earlier}");
    assert!(ended.stderr.contains("begun again as migration"), "{ended:?}");
    assert!(!earlier["report"]["continued_as"].is_null(), "{earlier}");
    // Whoever asks for the first one is led to the last.
    let attached = rig.a.run(&["attach", first, "--output", "json"]);
    assert_eq!(attached.code, Some(0), "{attached:?}");
    assert_eq!(attached.json()["migration"], report["migration"]);
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_migration_whose_source_gateway_is_killed_twice_is_begun_again_and_arrives() {
    need!(qemu());
    let (mut rig, client, first) = on_its_way("");
    for _ in 0..2 {
        rig.a.until_phase("precopy");
        kill_gateway(&mut rig.a);
        assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
        rig.a.start();
    }
    let ended = client.wait();
    assert_begun_again(&rig, &ended, &first);
}

#[test]
fn a_migration_whose_destination_gateway_is_killed_is_begun_again_and_arrives() {
    need!(qemu());
    let (mut rig, client, first) = on_its_way("");
    kill_gateway(&mut rig.b);
    rig.b.start();
    let ended = client.wait();
    assert_begun_again(&rig, &ended, &first);
}

#[test]
fn a_source_that_is_back_before_its_peer_waits_for_it_and_begins_again() {
    need!(qemu());
    let (mut rig, client, first) = on_its_way("");
    for site in [&mut rig.b, &mut rig.a] {
        kill_gateway(site);
    }
    rig.a.start();
    until("the next one waits", || known(&rig.a)[0]["phase"] == "checking");
    let next = known(&rig.a)[0]["migration"].as_str().unwrap().to_owned();
    assert_ne!(next, first);
    until("it has called in vain", || rig.a.log().contains("not back yet"));
    rig.b.start();
    let ended = client.wait();
    assert_begun_again(&rig, &ended, &first);
    assert_eq!(ended.json()["migration"], next);
}

#[test]
fn a_migration_that_was_cancelled_is_not_begun_again_by_a_gateway_that_was_killed_then() {
    need!(qemu());
    let (mut rig, client, first) = on_its_way("");
    let cancelled = rig.a.run(&["cancel", &first]);
    kill_gateway(&mut rig.a);
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    rig.a.start();
    assert_eq!(client.wait().code, Some(1));
    until("it is over", || known(&rig.a).iter().all(|one| one["phase"] == "done"));
    assert_eq!(known(&rig.a).len(), 1);
    until("vm runs at a", || rig.a.state("vm").as_deref() == Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn where_nothing_is_to_be_begun_again_the_report_says_so() {
    need!(qemu());
    let (mut rig, client, _) = on_its_way("[migration]\nrestarts = \"0\"\n");
    kill_gateway(&mut rig.b);
    rig.b.start();
    let ended = client.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let report = ended.json();
    let reason = report["reason"].as_str().unwrap();
    assert!(
        reason.contains("restarted") && reason.contains("migration.restarts = 0"),
        "{reason}"
    );
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}
