//! What a link is worth, what a migration may take of it, and migrations over one that is cut and comes back.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::guest::Machine;
use common::process::Running;
use common::relay::Relay;
use common::site::free_port;
use common::{Rig, Site, need, qemu, until, until_some};
use rustix::process::Signal;

#[test]
fn a_link_is_tested_between_two_gateways_without_a_vm() {
    let rig = Rig::planned(&[], |a, _| {
        a.settings = "[link]\nrtt = \"10ms\"\nrate = \"100mbit\"\n".to_owned()
    });
    let arguments = [
        "link-test",
        "--to",
        "b",
        "--time",
        "2s",
        "--memory",
        "1gib",
        "--output",
        "json",
    ];
    let tested = rig.a.run(&arguments);
    assert_eq!(tested.code, Some(0), "{tested:?}");
    let test = tested.json();
    let of = |key: &str| test[key].as_f64().unwrap();
    assert_eq!(of("capacity_bytes_per_second"), 12_500_000.0);
    let (goodput, achievable) = (of("goodput_bytes_per_second"), of("achievable_bytes_per_second"));
    // The clocks of a busy machine allow for a little more than what the link carries.
    assert!(goodput > 0.0 && goodput <= 1.2 * achievable, "{test}");
    assert!(of("wire_bytes") >= goodput, "{test}");
    for trips in ["idle", "loaded"] {
        let least = test[trips]["least_seconds"].as_f64().unwrap();
        assert!(
            least > 0.0 && least <= test[trips]["p99_seconds"].as_f64().unwrap(),
            "{test}"
        );
    }
    assert_eq!(test["forecast"]["converges"], true, "{test}");
    until("the far end has thrown away what came", || {
        rig.b.log().contains("a link test ended")
    });
    let once_more = rig.b.run(&["link-test", "--to", "a", "--time", "1s"]);
    assert_eq!(once_more.code, Some(0), "{once_more:?}");
    assert!(once_more.stdout.contains("goodput"), "{once_more:?}");
    for (arguments, sentence) in [
        (["--to", "nowhere", "--time", "1s"], "no peer is called nowhere"),
        (["--to", "b", "--time", "100ms"], "for 1 to 600 s"),
    ] {
        let refused = rig.a.run(&[&["link-test"], &arguments[..]].concat());
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(sentence), "{refused:?}");
    }
}

#[test]
fn gateways_are_linked_before_anybody_asks_and_again_when_one_of_them_comes_back() {
    let mut rig = Rig::new(&[]);
    let linked = |site: &Site| site.log().matches(" linked ").count();
    until("both have linked after pairing", || {
        linked(&rig.a) == 1 && linked(&rig.b) == 1
    });
    rig.b.gateway().signal(Signal::KILL);
    rig.b.start();
    until("b has linked from its start on", || linked(&rig.b) == 1);
    until("a has linked again", || linked(&rig.a) == 2);
}

#[test]
fn a_migration_that_crawls_is_let_go_while_it_runs() {
    need!(qemu());
    let mut rig = Rig::planned(&[("vm", Machine::filled(48))], |_, _| ());
    rig.a.boot("vm");
    let client = rig.a.begin(&[
        "migrate",
        "vm",
        "--to",
        "b",
        "--rate",
        "1mbit",
        "--downtime-limit",
        "9s",
        "--output",
        "json",
    ]);
    rig.a.until_phase("precopy");
    let id = rig.a.run(&["list", "--output", "json"]).json()[0]["migration"]
        .as_str()
        .unwrap()
        .to_owned();
    let shown = rig.a.run(&["limit", &id]);
    assert_eq!(shown.stdout.trim(), "at most 1 Mbit/s, weight 1");
    let changed = rig
        .a
        .run(&["limit", &id, "--unlimited", "--weight", "3", "--output", "json"]);
    assert_eq!(changed.code, Some(0), "{changed:?}");
    assert_eq!(changed.json()["weight"], 3);
    assert!(changed.json()["rate_bytes_per_second"].is_null());
    let at_destination = rig.b.run(&["limit", &id, "--weight", "2"]);
    assert!(at_destination.stderr.contains("source gateway"), "{at_destination:?}");
    // At 1 Mbit/s its 48 MiB would take seven minutes, longer than a test waits for anything.
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let over = rig.a.run(&["limit", &id, "--weight", "2"]);
    assert_eq!(over.code, Some(2), "{over:?}");
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_vm_of_weight_3_that_starts_later_has_three_quarters_of_the_link_beside_one_of_weight_1() {
    need!(qemu());
    let vms = [("early", Machine::filled(96)), ("late", Machine::filled(96))];
    let mut rig = Rig::planned(&vms, |a, _| {
        a.settings = "[link]\nrtt = \"10ms\"\nrate = \"60mbit\"\n".to_owned()
    });
    rig.a.boot("early");
    rig.a.boot("late");
    let early = rig.a.begin(&["migrate", "early", "--to", "b", "--output", "json"]);
    rig.a.until_phase("precopy");
    let late = rig
        .a
        .begin(&["migrate", "late", "--to", "b", "--weight", "3", "--output", "json"]);
    // Both are looked at in one moment; their memory is of one size, so that percent compare.
    let percent = |late_has: f64| {
        until_some("the late one has come that far", || {
            let list = rig.a.run(&["list", "--output", "json"]).json();
            let of = |vm: &str| {
                let mut listed = list.as_array().unwrap().iter();
                Some(listed.find(|each| each["vm"] == vm)?["percent"].as_f64().unwrap())
            };
            let (early, late) = (of("early")?, of("late")?);
            (late >= late_has).then_some((early, late))
        })
    };
    let (begin, end) = (percent(10.0), percent(75.0));
    assert!(end.0 < 88.0, "the early one was still in its first pass: {end:?}");
    let share = (end.1 - begin.1) / (end.1 - begin.1 + end.0 - begin.0);
    println!("the late one of weight 3 beside 1: {share:.4}");
    assert!((share / 0.75 - 1.0).abs() <= 0.05, "{share}: from {begin:?} to {end:?}");
    for client in [early, late] {
        let moved = client.wait();
        assert_eq!(moved.code, Some(0), "{moved:?}");
    }
    rig.assert_only(&[(&rig.b, "early"), (&rig.b, "late")]);
}

/// Two paired sites that reach each other only through relays, and `settings` of both about the other.
fn apart(machine: Machine, settings: &str) -> (Rig, [Relay; 2]) {
    let mut relays = Vec::new();
    let rig = Rig::planned(&[("vm", machine)], |a, b| {
        for (plan, peer) in [(a, "b"), (b, "a")] {
            let front = free_port();
            relays.push(Relay::start(front, plan.port));
            plan.settings = format!(
                "advertise = \"127.0.0.1:{front}\"\n{}[[peer]]\nname = \"{peer}\"\n{settings}",
                plan.settings
            );
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
    moves_through_cuts("", 2);
}

#[test]
fn a_cut_of_a_link_of_three_bulk_connections_is_waited_for_just_as_well() {
    need!(qemu());
    let rig = moves_through_cuts("bulk_connections = \"3\"\n", 1);
    let linked = rig.a.log().matches("bulk_connections=3").count();
    assert!(linked >= 2, "before and after the cut: {}", rig.a.log());
}

#[test]
fn one_of_three_bulk_connections_that_dies_takes_the_link_with_it_and_the_vm_arrives_over_the_next() {
    need!(qemu());
    let (mut rig, [_before_a, before_b]) = apart(Machine::filled(48), "bulk_connections = \"3\"\n");
    rig.a.boot("vm");
    let client = begin(&rig.a, "40mbit");
    before_b.lose_newest();
    until("the link was given up and made anew", || {
        rig.a.log().matches("bulk_connections=3").count() >= 2
    });
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[track_caller]
fn moves_through_cuts(settings: &str, cuts: usize) -> Rig {
    let (mut rig, relays) = apart(Machine::filled(48), settings);
    rig.a.boot("vm");
    let client = begin(&rig.a, "40mbit");
    for times in 1..=cuts {
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
    // What flew when the path died, and what its window let fly after it.
    let resent = report["resent_bytes"].as_u64().unwrap();
    assert!(resent > 0 && resent < given / 4, "{report}");
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);
    rig
}

#[test]
fn a_second_way_is_taken_when_the_first_dies() {
    need!(qemu());
    let mut fronts = Vec::new();
    let mut rig = Rig::planned(&[("vm", Machine::filled(48))], |a, b| {
        let ports = [free_port(), free_port()];
        fronts.extend(ports.map(|port| Relay::start(port, b.port)));
        let [first, second] = ports;
        a.settings += &format!(
            "[[peer]]\nname = \"b\"\naddress = \"127.0.0.1:{first}\"\nsecond_address = \"127.0.0.1:{second}\"\n"
        );
    });
    rig.a.boot("vm");
    let client = begin(&rig.a, "40mbit");
    fronts[0].cut(true);
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(rig.a.log().contains("calling the second"), "{}", rig.a.log());
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_cut_that_lasts_longer_than_is_configured_leaves_the_vm_at_the_source_and_nothing_behind() {
    need!(qemu());
    let mut relays = Vec::new();
    let mut rig = Rig::planned(&[("vm", Machine::filled(48))], |a, b| {
        for plan in [a, b] {
            let front = free_port();
            relays.push(Relay::start(front, plan.port));
            plan.settings = format!(
                "advertise = \"127.0.0.1:{front}\"\n{}[migration]\nlongest_cut = \"1s\"\n",
                plan.settings
            );
        }
    });
    let relays = relays.try_into().unwrap_or_else(|_| panic!("a relay for each site"));
    rig.a.boot("vm");
    let client = begin(&rig.a, "8mbit");
    cut(&relays, true);
    let ended = client.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(
        ended.json()["reason"]
            .as_str()
            .unwrap()
            .contains("could not be reached for 1 s"),
        "{ended:?}"
    );
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    cut(&relays, false);
    until("the destination has given up its half too", || {
        rig.b.hypervisors("vm").is_empty()
    });
    rig.assert_only(&[(&rig.a, "vm")]);
}
