//! `longhaul lab plan`: a small plan measured for real, and plans that cannot be.
//!
//! Needs root, QEMU, and the network at the first run, for the guest's kernel. Without them a test prints why it did nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use longhaul::lab::guest::Image;
use serde_json::Value;
use tempfile::TempDir;

/// Two engines move a small guest once across a link that is fast and near.
const PLAN: &str = r#"
title = "A test"
profiles = ["metro"]
engines = ["longhaul", "qemu-tls"]
qemu = ["QEMU"]
time_limit = "60s"

[guest.small]
memory_mb = 128
working_set_mb = 16
pages_per_second = 200
"#;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn qemu() -> String {
    std::env::var("LONGHAUL_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

/// Why nothing can be measured here.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    let script = root().join("netem-scripts/link");
    for (program, argument) in [
        (qemu().as_str(), "--version"),
        ("ip", "-V"),
        ("setpriv", "--version"),
        (&*script.to_string_lossy(), "--help"),
    ] {
        let found = Command::new(program).arg(argument).stdout(Stdio::null()).status();
        if let Err(error) = found {
            return Some(format!("{program} cannot be run: {error}"));
        }
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("there is no /dev/net/tun".to_owned());
    }
    let image = Image::build(&root().join("netem-scripts/guest"), &root().join("target/guest"));
    image.err().map(|error| error.to_string())
}

fn plan_in(directory: &TempDir, text: &str) -> PathBuf {
    let plan = directory.path().join("test.toml");
    std::fs::write(&plan, text.replace("QEMU", &qemu())).unwrap();
    plan
}

fn lab(plan: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .current_dir(root())
        .args(["lab", "plan"])
        .arg(plan)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_move_of_a_plan_is_a_line_with_its_figures_and_the_report_shows_them() {
    if let Some(reason) = missing() {
        println!("skipped: {reason}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let plan = plan_in(&directory, PLAN);
    let [json, report] = ["runs.jsonl", "report"].map(|name| directory.path().join(name).display().to_string());
    let output = lab(&plan, &["--json", &json, "--report", &report]);
    let said = format!("{}\n{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}");

    let lines = std::fs::read_to_string(&json).unwrap();
    let runs: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let engines: Vec<_> = runs.iter().map(|run| run["engine"].as_str().unwrap()).collect();
    assert_eq!(engines, ["longhaul", "qemu-tls"], "{said}");
    for run in &runs {
        // A QEMU that was built without TLS says so.
        if run["outcome"] == "unavailable" && run["engine"] == "qemu-tls" {
            println!("skipped: {}", run["reason"]);
            continue;
        }
        assert_eq!(run["outcome"], "completed", "{run}");
        assert_eq!(run["guest_intact"], true, "{run}");
        for figure in [
            "total_seconds",
            "downtime_seconds",
            "wire_bytes",
            "link_use",
            "rounds",
            "run_delay_share",
        ] {
            assert!(run[figure].as_f64().unwrap() > 0.0, "{figure}: {run}");
        }
        assert!((0.0..=1.0).contains(&run["others_share"].as_f64().unwrap()), "{run}");
        for end in ["source", "destination"] {
            assert!(run["cpu_seconds_per_gib"][end].as_f64().unwrap() > 0.0, "{run}");
        }
        assert_eq!(run["peak_rss_bytes"].is_object(), run["engine"] == "longhaul", "{run}");
        assert!(run["setting"]["tcp"]["tcp_congestion_control"].is_string(), "{run}");
        assert!(run["usable"].is_boolean(), "{run}");
        assert!(!run["timeline"].as_array().unwrap().is_empty(), "{run}");
    }
    let page = std::fs::read_to_string(Path::new(&report).join("index.html")).unwrap();
    for engine in engines {
        assert!(page.contains(engine), "{engine} is not in the report");
    }
}

#[test]
fn a_plan_with_mistakes_begins_nothing_and_names_them_all() {
    let directory = tempfile::tempdir().unwrap();
    let plan = plan_in(
        &directory,
        &PLAN
            .replace("metro", "moon")
            .replace("60s", "soon")
            .replace("memory_mb = 128", "memory_mb = 32"),
    );
    let output = lab(&plan, &[]);
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    for word in ["moon", "time_limit", "working_set_mb"] {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn a_plan_can_be_looked_at_without_measuring() {
    let directory = tempfile::tempdir().unwrap();
    let output = lab(&plan_in(&directory, PLAN), &["--list"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let listed = text(&output.stdout);
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(listed.contains("longhaul moves small across metro"), "{listed}");
}
