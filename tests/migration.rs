//! Whole migrations: real gateways, real hypervisors, on loopback.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;

use common::guest::Machine;
use common::process::Running;
use common::{Rig, Site, need, program, qemu, until, until_some};
use longhaul::api::Phase;
use longhaul::metrics::SERIES;
use rustix::process::Signal;
use serde_json::{Value, json};

/// Slow enough that a guest full of random bytes is in pre-copy for minutes.
const CRAWL: &str = "4mbit";

/// The id of the newest migration of a VM that a gateway knows, once it is in this phase.
#[track_caller]
fn in_phase(site: &Site, vm: &str, phase: &str) -> String {
    until_some(&format!("{vm} is in {phase} at {}", site.name()), || {
        let known = site.run(&["list", "--output", "json"]).json();
        let newest = known
            .as_array()?
            .iter()
            .find(|migration| migration["vm"] == vm)?
            .clone();
        (newest["phase"] == phase).then(|| newest["migration"].as_str().unwrap().to_owned())
    })
}

/// A migration that has begun to copy, and its id.
#[track_caller]
fn copying(site: &Site, args: &[&str]) -> (Running, String) {
    let mut command = vec!["migrate"];
    command.extend(args);
    let client = site.begin(&command);
    let id = in_phase(site, args[0], "precopy");
    (client, id)
}

/// Checks everything that the contract says about the report of a migration that arrived.
#[track_caller]
fn check_report(report: &Value, vm: &str, peer: &str, memory_mb: u64) {
    let fields: Vec<&str> = report.as_object().unwrap().keys().map(String::as_str).collect();
    for field in [
        "vm",
        "peer",
        "outcome",
        "reason",
        "total_seconds",
        "downtime_seconds",
        "rounds",
        "vmm_bytes",
        "wire_bytes",
        "resent_bytes",
        "reduction_ratio",
        "pages",
        "known_pages",
        "stream_digest",
        "forecast",
    ] {
        assert!(fields.contains(&field), "{field} is not in {report}");
    }
    let number = |value: &Value| {
        value
            .as_f64()
            .unwrap_or_else(|| panic!("not a number: {value} in {report}"))
    };
    assert_eq!(
        (&report["vm"], &report["peer"], &report["outcome"]),
        (&json!(vm), &json!(peer), &json!("completed"))
    );
    assert_eq!(report["reason"], format!("{vm} runs at {peer}"));
    let (total, downtime) = (number(&report["total_seconds"]), number(&report["downtime_seconds"]));
    assert!(downtime > 0.0 && downtime < total, "{report}");

    let rounds = report["rounds"].as_array().unwrap();
    let numbers: Vec<u64> = rounds.iter().map(|round| round["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers.first(), Some(&1), "{report}");
    assert!(numbers.is_sorted_by(|a, b| a < b), "{report}");
    let sum = |field: &str| rounds.iter().map(|round| round[field].as_u64().unwrap()).sum::<u64>();
    let (vmm_bytes, wire_bytes) = (
        report["vmm_bytes"].as_u64().unwrap(),
        report["wire_bytes"].as_u64().unwrap(),
    );
    assert!(rounds[0]["vmm_bytes"].as_u64().unwrap() > 0, "{report}");
    assert!(sum("vmm_bytes") <= vmm_bytes, "{report}");
    assert!(wire_bytes > 0, "{report}");
    assert!(number(&report["reduction_ratio"]) >= 1.0, "{report}");

    let pages = report["pages"].as_object().unwrap();
    let mut kinds: Vec<&str> = pages.keys().map(String::as_str).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["delta", "literal", "raw", "reference", "same", "zero"]);
    let pages: u64 = pages.values().map(|count| count.as_u64().unwrap()).sum();
    assert!(pages >= memory_mb * 256, "{report}");

    let digest = report["stream_digest"].as_str().unwrap();
    assert!(
        digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{report}"
    );
    for field in [
        "total_seconds",
        "wire_bytes",
        "downtime_seconds",
        "dirty_bytes_per_second",
    ] {
        number(&report["forecast"][field]);
    }
    assert!(
        report["forecast"]["converges"].is_boolean() && report["forecast"]["reason"].is_string(),
        "{report}"
    );
}

/// Switches multifd on at a VM's hypervisor.
#[track_caller]
fn switch_multifd_on(site: &Site, vm: &str, compression: &str) {
    let capabilities = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    let parameters = json!({ "multifd-channels": 3, "multifd-compression": compression });
    site.qmp(vm, "migrate-set-capabilities", &capabilities).unwrap();
    site.qmp(vm, "migrate-set-parameters", &parameters).unwrap();
}

#[track_caller]
fn has_multifd_on(site: &Site, vm: &str) -> bool {
    let capabilities = site.qmp(vm, "query-migrate-capabilities", &json!({})).unwrap();
    let multifd = json!({ "capability": "multifd", "state": true });
    capabilities.as_array().unwrap().contains(&multifd)
}

/// Guest memory from 16 MiB on, where the restless guest has what it filled it with.
#[track_caller]
fn filled_memory(rig: &Rig, site: &Site, vm: &str) -> Vec<u8> {
    let file = rig.file("memory");
    let dump = json!({ "val": 16 << 20, "size": 12 << 20, "filename": file });
    site.qmp(vm, "pmemsave", &dump).unwrap();
    std::fs::read(&file).unwrap()
}

#[test]
fn a_vm_whose_hypervisor_sends_over_several_connections_arrives_with_its_memory() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::restless(32, 4096))]);
    rig.a.boot("vm");
    switch_multifd_on(&rig.a, "vm", "none");
    let before = filled_memory(&rig, &rig.a, "vm");
    assert!(before.iter().any(|&byte| byte != 0));
    let there = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(there.code, Some(0), "{there:?}");
    check_report(&there.json(), "vm", "b", 32);
    rig.assert_only(&[(&rig.b, "vm")]);
    assert!(filled_memory(&rig, &rig.b, "vm") == before);

    let back = rig.b.run(&["migrate", "vm", "--to", "a", "--output", "json"]);
    assert_eq!(back.code, Some(0), "{back:?}");
    rig.assert_only(&[(&rig.a, "vm")]);
    assert!(filled_memory(&rig, &rig.a, "vm") == before);
}

#[test]
fn a_cancelled_migration_over_several_connections_leaves_them_switched_on() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    switch_multifd_on(&rig.a, "vm", "none");
    let (client, id) = copying(&rig.a, &["vm", "--to", "b", "--rate", CRAWL]);
    until("the channels carry something", || {
        let progress = rig.a.qmp("vm", "query-migrate", &json!({})).unwrap();
        progress["ram"]["multifd-bytes"].as_u64() > Some(0)
    });
    let cancelled = rig.a.run(&["cancel", &id]);
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    assert_eq!(client.wait().code, Some(1));
    rig.assert_only(&[(&rig.a, "vm")]);
    assert!(has_multifd_on(&rig.a, "vm"));
    let parameters = rig.a.qmp("vm", "query-migrate-parameters", &json!({})).unwrap();
    assert_eq!(parameters["multifd-channels"], 3);
}

#[test]
fn channels_that_compress_pages_are_refused_with_the_setting_to_change() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::firmware())]);
    rig.a.boot("vm");
    switch_multifd_on(&rig.a, "vm", "zlib");
    let refused = rig.a.run(&["migrate", "vm", "--to", "b"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.stdout.contains("Set multifd-compression to none"),
        "{refused:?}"
    );
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_vm_that_writes_moves_to_the_other_site_and_back() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::restless(32, 256))]);
    rig.a.boot("vm");
    let there = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(there.code, Some(0), "{there:?}");
    check_report(&there.json(), "vm", "b", 32);
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);

    let back = rig.b.run(&["migrate", "vm", "--to", "a", "--output", "json"]);
    assert_eq!(back.code, Some(0), "{back:?}");
    check_report(&back.json(), "vm", "a", 32);
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_migration_of_several_rounds_reports_each_of_them() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::restless(32, 4096))]);
    rig.a.boot("vm");
    // 4 MiB that change all the time do not fit into the first allowance of 20 ms at this rate.
    let moved = rig
        .a
        .run(&["migrate", "vm", "--to", "b", "--output", "json", "--rate", "100mbit"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let report = moved.json();
    check_report(&report, "vm", "b", 32);
    let rounds = report["rounds"].as_array().unwrap();
    assert!(rounds.len() >= 2, "{report}");
    // The first passes over all 32 MiB; what the guest writes meanwhile is in 4 of them.
    assert!(rounds[0]["dirty_bytes"].as_u64().unwrap() < 8 << 20, "{report}");
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
}

#[test]
fn an_idle_firmware_moves_on_q35_and_the_report_for_people_says_where_it_is() {
    need!(qemu());
    let mut rig = Rig::new(&[(
        "vm",
        Machine {
            machine: "q35",
            ..Machine::firmware()
        },
    )]);
    rig.a.boot("vm");
    let moved = rig.a.run(&["migrate", "vm", "--to", "b"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(moved.stdout.contains("vm is at b"), "{moved:?}");
    assert!(moved.stdout.contains("downtime"), "{moved:?}");
    let id = in_phase(&rig.a, "vm", "done");
    let report = rig.a.run(&["status", &id, "--output", "json"]).json()["report"].clone();
    check_report(&report, "vm", "b", 64);
}

#[test]
fn a_detached_migration_is_listed_followed_and_reported() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(24))]);
    rig.a.boot("vm");
    let started = rig
        .a
        .run(&["migrate", "vm", "--to", "b", "--rate", "60mbit", "--detach"]);
    assert_eq!(started.code, Some(0), "{started:?}");
    let id = started.stdout.trim();
    assert_eq!(in_phase(&rig.a, "vm", "precopy"), id);
    // The destination knows it by the same name.
    assert_eq!(in_phase(&rig.b, "vm", "precopy"), id);
    let status = rig.a.run(&["status", id, "--output", "json"]);
    assert_eq!(
        (status.code, &status.json()["summary"]["role"]),
        (Some(0), &json!("source")),
        "{status:?}"
    );

    let attached = rig.a.run(&["attach", id, "--output", "json"]);
    assert_eq!(attached.code, Some(0), "{attached:?}");
    check_report(&attached.json(), "vm", "b", 24);
    let listed = rig.a.run(&["list", "--output", "json"]).json();
    assert_eq!(
        (&listed[0]["outcome"], &listed[0]["phase"]),
        (&json!("completed"), &json!("done")),
        "{listed}"
    );
    // Who comes later sees the same.
    assert_eq!(rig.a.run(&["attach", id, "--output", "json"]).json(), attached.json());
}

#[test]
fn a_cancelled_migration_leaves_the_vm_where_it_was_and_nothing_else() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    let (client, id) = copying(&rig.a, &["vm", "--to", "b", "--rate", CRAWL, "--output", "json"]);
    until("a hypervisor waits at b", || rig.b.hypervisors("vm").len() == 1);
    until("some memory was sent", || {
        let status = rig.a.run(&["status", &id, "--output", "json"]).json();
        status["progress"]["percent"]
            .as_f64()
            .is_some_and(|percent| percent > 0.0)
    });
    let cancelled = rig.a.run(&["cancel", &id]);
    assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
    let ended = client.wait();
    assert_eq!(
        (ended.code, &ended.json()["outcome"]),
        (Some(1), &json!("cancelled")),
        "{ended:?}"
    );
    let pages = ended.json()["pages"].clone();
    let sent: u64 = pages.as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert!(sent > 0, "what was sent before is known: {pages}");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);

    // Nothing of the attempt stands in the way of the next.
    let moved = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let late = rig.a.run(&["cancel", &id]);
    assert_eq!(late.code, Some(2), "{late:?}");
    assert!(late.stderr.contains("it is over"), "{late:?}");
}

#[test]
fn ctrl_c_cancels() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    let (client, _) = copying(&rig.a, &["vm", "--to", "b", "--rate", CRAWL]);
    client.signal(Signal::INT);
    let ended = client.wait();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_client_that_is_lost_does_not_stop_its_migration() {
    need!(qemu());
    let vms = [("hung", Machine::filled(24)), ("killed", Machine::filled(24))];
    let mut rig = Rig::new(&vms);
    for (vm, signal, code) in [("hung", Signal::HUP, Some(3)), ("killed", Signal::KILL, None)] {
        rig.a.boot(vm);
        let (client, id) = copying(&rig.a, &[vm, "--to", "b", "--rate", "40mbit"]);
        client.signal(signal);
        let ended = client.wait();
        assert_eq!(ended.code, code, "{ended:?}");
        if code.is_some() {
            assert!(ended.stderr.contains(&format!("longhaul attach {id}")), "{ended:?}");
        }
        assert_eq!(in_phase(&rig.a, vm, "done"), id);
        assert_eq!(rig.b.state(vm).as_deref(), Some("running"));
    }
    rig.assert_only(&[(&rig.b, "hung"), (&rig.b, "killed")]);
}

#[test]
fn two_vms_move_at_the_same_time() {
    need!(qemu());
    let mut rig = Rig::new(&[("one", Machine::filled(24)), ("two", Machine::restless(24, 64))]);
    rig.a.boot("one");
    rig.a.boot("two");
    let (one, _) = copying(&rig.a, &["one", "--to", "b", "--rate", "20mbit", "--output", "json"]);
    let (two, _) = copying(&rig.a, &["two", "--to", "b", "--rate", "20mbit", "--output", "json"]);
    in_phase(&rig.a, "one", "precopy");
    let (one, two) = (one.wait(), two.wait());
    assert_eq!((one.code, two.code), (Some(0), Some(0)), "{one:?} {two:?}");
    check_report(&one.json(), "one", "b", 24);
    check_report(&two.json(), "two", "b", 24);
    assert_eq!(rig.b.state("one").as_deref(), Some("running"));
    assert_eq!(rig.b.state("two").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "one"), (&rig.b, "two")]);
}

#[test]
fn a_paused_vm_arrives_paused_with_every_byte_of_its_memory() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(24))]);
    rig.a.boot("vm");
    rig.a.qmp("vm", "stop", &json!({})).unwrap();
    let memory = |site: &Site, file: &str| {
        let file = rig_file(&rig, file);
        // Below 640 KiB and above 1 MiB is plain memory; between is what the machine type puts there.
        for (part, (from, size)) in [(0_u64, 0xa_0000_u64), (1 << 20, 23 << 20)].into_iter().enumerate() {
            let file = format!("{file}.{part}");
            site.qmp(
                "vm",
                "pmemsave",
                &json!({ "val": from, "size": size, "filename": file }),
            )
            .unwrap();
        }
        [0, 1].map(|part| std::fs::read(format!("{file}.{part}")).unwrap())
    };
    let before = memory(&rig.a, "before");
    let moved = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert_eq!(moved.json()["outcome"], "completed");
    assert_eq!(rig.b.state("vm").as_deref(), Some("paused"));
    assert!(memory(&rig.b, "after") == before, "memory differs");
    rig.assert_only(&[(&rig.b, "vm")]);
}

fn rig_file(rig: &Rig, name: &str) -> String {
    rig.file(name).display().to_string()
}

#[test]
fn a_deadline_that_passes_leaves_the_vm_here_and_says_what_would_help() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(64))]);
    rig.a.boot("vm");
    let args = [
        "migrate",
        "vm",
        "--to",
        "b",
        "--rate",
        CRAWL,
        "--deadline",
        "2s",
        "--output",
        "json",
    ];
    let ended = rig.a.run(&args);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "failed");
    assert!(
        report["reason"].as_str().unwrap().contains("deadline has passed"),
        "{report}"
    );
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn what_cannot_be_promised_is_refused_and_nothing_is_touched() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::firmware())]);
    rig.a.boot("vm");
    let ended = rig.a.run(&[
        "migrate",
        "vm",
        "--to",
        "b",
        "--downtime-limit",
        "1ms",
        "--output",
        "json",
    ]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["outcome"], "refused");
    let reason = report["reason"].as_str().unwrap();
    assert!(
        reason.contains("1 ms cannot be promised") && reason.contains("--downtime-limit"),
        "{report}"
    );
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_dry_run_says_yes_or_no_with_a_forecast_and_touches_nothing() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(160))]);
    rig.a.boot("vm");
    let yes = rig
        .a
        .run(&["migrate", "vm", "--to", "b", "--dry-run", "--output", "json"]);
    assert_eq!(yes.code, Some(0), "{yes:?}");
    let answer = yes.json();
    assert!(
        answer["checks"]
            .as_array()
            .unwrap()
            .iter()
            .all(|check| check["ok"] == true),
        "{answer}"
    );
    assert!(answer["forecast"]["total_seconds"].as_f64().unwrap() > 0.0, "{answer}");
    assert!(answer["forecast"]["wire_bytes"].as_u64().unwrap() > 0, "{answer}");

    let no = rig.a.run(&[
        "migrate",
        "vm",
        "--to",
        "b",
        "--dry-run",
        "--output",
        "json",
        "--downtime-limit",
        "1ms",
    ]);
    assert_eq!(no.code, Some(2), "{no:?}");
    let failed: Vec<Value> = no.json()["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|check| check["ok"] == false)
        .cloned()
        .collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(failed[0]["name"], "downtime limit");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm")]);
}

#[test]
fn a_site_that_leaves_its_old_process_keeps_it_paused() {
    need!(qemu());
    let mut rig = Rig::planned(&[("vm", Machine::firmware())], |a, _| {
        a.vm("vm").settings = "after_success = \"leave\"".to_owned();
    });
    rig.a.boot("vm");
    let moved = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert_eq!(rig.a.state("vm").as_deref(), Some("postmigrate"));
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.a, "vm"), (&rig.b, "vm")]);
}

#[test]
fn a_gateway_that_is_stopped_finishes_its_migration_first() {
    need!(qemu());
    let mut rig = Rig::new(&[("vm", Machine::filled(24)), ("other", Machine::firmware())]);
    rig.a.boot("vm");
    rig.a.boot("other");
    let (client, _) = copying(&rig.a, &["vm", "--to", "b", "--rate", "40mbit", "--output", "json"]);
    let gateway = rig.a.take_gateway();
    gateway.signal(Signal::TERM);
    until("it drains", || gateway.stderr().contains("draining"));
    let refused = rig.a.run(&["migrate", "other", "--to", "b"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("being stopped"), "{refused:?}");
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    check_report(&moved.json(), "vm", "b", 24);
    let stopped = gateway.wait();
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    assert!(!rig.a.state_dir().join("control.sock").exists());
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    assert_eq!(rig.a.state("other").as_deref(), Some("running"));
}

#[test]
fn metrics_move_while_a_migration_runs() {
    need!(qemu());
    let mut rig = Rig::planned(&[("vm", Machine::filled(24))], |a, b| {
        (a.metrics, b.metrics) = (true, true)
    });
    rig.a.boot("vm");
    assert_eq!(scrape(&rig.a, "/ready").0, 200);
    let (client, _) = copying(&rig.a, &["vm", "--to", "b", "--rate", "20mbit", "--output", "json"]);
    let value = |site: &Site, series: &str| -> f64 {
        let (_, text) = scrape(site, "/metrics");
        let lines = text.lines().filter_map(|line| line.strip_prefix(series));
        lines.filter_map(|rest| rest.trim().parse::<f64>().ok()).sum()
    };
    for series in [
        "longhaul_vmm_bytes_total{direction=\"in\"}",
        "longhaul_frame_bytes_total{direction=\"out\"}",
        "longhaul_wan_bytes_total{peer=\"b\",direction=\"out\"}",
    ] {
        let before = value(&rig.a, series);
        until(&format!("{series} grows beyond {before}"), || {
            value(&rig.a, series) > before
        });
    }
    for series in [
        "longhaul_vmm_bytes_total{direction=\"out\"}",
        "longhaul_frame_bytes_total{direction=\"in\"}",
        "longhaul_wan_bytes_total{peer=\"a\",direction=\"in\"}",
    ] {
        let before = value(&rig.b, series);
        until(&format!("{series} grows beyond {before} at b"), || {
            value(&rig.b, series) > before
        });
    }
    for site in [&rig.a, &rig.b] {
        promtool(&scrape(site, "/metrics").1, &rig);
    }
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let report = moved.json();
    let ended = "longhaul_migrations_total{role=\"source\",outcome=\"completed\"}";
    assert_eq!(value(&rig.a, ended), 1.0);
    // The source hears of it before the destination has put its own hypervisor in order and counts it.
    let arrived = "longhaul_migrations_total{role=\"destination\",outcome=\"completed\"}";
    until("b has counted its end", || value(&rig.b, arrived) == 1.0);
    let given = value(&rig.a, "longhaul_vmm_bytes_total{direction=\"in\"}");
    assert_eq!(given, report["vmm_bytes"].as_f64().unwrap());
    until("b has counted all of it", || {
        value(&rig.b, "longhaul_vmm_bytes_total{direction=\"out\"}") == given
    });
    let pages = value(&rig.a, "longhaul_pages_total{encoding=\"raw\"}")
        + value(&rig.a, "longhaul_pages_total{encoding=\"literal\"}");
    assert!(pages >= 22.0 * 256.0, "{}", scrape(&rig.a, "/metrics").1);
}

/// What only trouble moves, or something else than the first move of a VM.
const OF_OTHERS: [&str; 10] = [
    "longhaul_migrations_in_doubt",
    "longhaul_journal_errors_total",
    "longhaul_packets_lost_total",
    // Of a VM that moves again: tests/page_store.rs.
    "longhaul_known_pages_total",
    // Of programs of the operator: tests/hooks.rs.
    "longhaul_hooks_total",
    // Of other programs: tests/tunnel.rs.
    "longhaul_tunnel_streams",
    "longhaul_tunnel_bytes_total",
    "longhaul_tunnel_frame_bytes_total",
    // Of a VM whose disks are copied: tests/disks.rs.
    "longhaul_disk_bytes_total",
    "longhaul_disk_frame_bytes_total",
];

#[test]
fn every_series_moves_when_a_vm_does() {
    need!(qemu());
    // Of several rounds: what the guest dirties is known from the second on.
    let vms = [("vm", Machine::restless(32, 4096)), ("strange", Machine::firmware())];
    let mut rig = Rig::planned(&vms, |a, b| {
        (a.metrics, b.metrics) = (true, true);
        a.settings.push_str("[store]\nsize = \"1gib\"\n");
        // b does not know it.
        b.vms.remove("strange");
    });
    rig.a.boot("vm");
    rig.a.boot("strange");
    let mut still: BTreeSet<String> = SERIES
        .iter()
        .map(|series| series.name.to_owned())
        .filter(|name| !OF_OTHERS.contains(&name.as_str()))
        .collect();
    // Its disk is not copied.
    for phase in Phase::ALL
        .into_iter()
        .filter(|phase| ![Phase::Done, Phase::Disks].contains(phase))
    {
        still.insert(format!("longhaul_phase_seconds_total{{phase=\"{phase}\"}}"));
    }
    for (role, outcome) in [
        ("source", "completed"),
        ("destination", "completed"),
        ("source", "refused"),
        ("destination", "refused"),
    ] {
        still.insert(format!(
            "longhaul_migrations_total{{role=\"{role}\",outcome=\"{outcome}\"}}"
        ));
    }
    let refused = rig.a.run(&["migrate", "strange", "--to", "b"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    let client = rig.a.begin(&["migrate", "vm", "--to", "b", "--rate", "100mbit"]);
    let mut before = still.len();
    until_some("every series has moved", || {
        for site in [&rig.a, &rig.b] {
            for line in scrape(site, "/metrics").1.lines().filter(|line| !line.starts_with('#')) {
                let (series, value) = line.rsplit_once(' ').unwrap();
                if value.parse::<f64>().unwrap() > 0.0 {
                    still.retain(|name| !series.starts_with(name.as_str()));
                }
            }
        }
        if still.len() < before {
            before = still.len();
            println!("have not moved yet: {still:?}");
        }
        still.is_empty().then_some(())
    });
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
}

#[test]
fn a_peer_that_is_not_reached_after_a_restart_is_shown_as_such() {
    let mut rig = Rig::planned(&[], |a, _| a.metrics = true);
    let shown = |site: &Site, line: &str| scrape(site, "/metrics").1.lines().any(|shown| shown == line);
    drop(rig.a.take_gateway());
    drop(rig.b.take_gateway());
    rig.a.start();
    until("b is shown as not connected", || {
        shown(&rig.a, "longhaul_peer_connected{peer=\"b\"} 0")
    });
    assert!(shown(&rig.a, "longhaul_peer_open_migrations{peer=\"b\"} 0"));
    let unpaired = rig.a.run(&["unpair", "b"]);
    assert_eq!(unpaired.code, Some(0), "{unpaired:?}");
    until("b is not shown any more", || {
        !scrape(&rig.a, "/metrics").1.contains("peer=\"b\"")
    });
}

fn scrape(site: &Site, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", site.port())).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

fn promtool(text: &str, rig: &Rig) {
    let name = std::env::var("PROMTOOL").unwrap_or_else(|_| "promtool".to_owned());
    if let Err(reason) = program(&name) {
        println!("SKIP: {reason}");
        return;
    }
    let file = rig.file("scrape");
    std::fs::write(&file, text).unwrap();
    let mut command = std::process::Command::new(&name);
    command
        .args(["check", "metrics"])
        .stdin(std::fs::File::open(file).unwrap());
    let checked = command.output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn a_guest_four_times_the_memory_budget_moves_within_the_budget() {
    need!(qemu());
    const BUDGET_MIB: u64 = 64;
    let mut rig = Rig::planned(&[("vm", Machine::restless(256, 256))], |a, b| {
        for plan in [a, b] {
            plan.memory_budget = format!("{BUDGET_MIB}mib");
        }
    });
    rig.a.boot("vm");
    let moved = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    check_report(&moved.json(), "vm", "b", 256);
    let peaks = [
        ("a", peak_mib(rig.a.gateway().id())),
        ("b", peak_mib(rig.b.gateway().id())),
    ];
    println!("peak of resident memory, MiB: {peaks:?}; {}", moved.stdout);
    for (site, peak) in peaks {
        assert!(peak <= BUDGET_MIB + 64, "{site} took {peak} MiB");
    }
    rig.assert_only(&[(&rig.b, "vm")]);
}

/// Most memory that was ever resident.
fn peak_mib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}
