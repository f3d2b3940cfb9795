//! Gateways that are killed with SIGKILL in the middle of a migration: a short selection of `longhaul lab kill`, on loopback.
//!
//! Needs QEMU, and the network at the first run, for the guest's kernel. Without them the test prints why it did nothing.

use std::path::Path;
use std::process::{Command, Stdio};

use longhaul::lab::guest::Image;
use serde_json::Value;

/// One for each way in which a migration can go on: undone by its source, undone by its destination, finished by either.
const CASES: [&str; 4] = ["started-kill-a", "permit-kill-b", "commit-kill-b", "learnt-kill-a"];

/// The hypervisor of the tests: `LONGHAUL_TEST_QEMU`, or the system's.
fn qemu() -> String {
    std::env::var("LONGHAUL_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

/// Why the cases cannot run here.
fn missing(root: &Path) -> Option<String> {
    for program in [qemu().as_str(), "setpriv", "setsid"] {
        let found = Command::new(program).arg("--version").stdout(Stdio::null()).status();
        if let Err(error) = found {
            return Some(format!("{program} cannot be run: {error}"));
        }
    }
    let image = Image::build(&root.join("netem-scripts/guest"), &root.join("target/guest"));
    image.err().map(|error| error.to_string())
}

#[test]
fn a_gateway_that_is_killed_leaves_the_vm_running_in_exactly_one_place() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if let Some(reason) = missing(root) {
        println!("skipped: {reason}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("cases.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_longhaul"));
    command
        .args(["lab", "kill", "--json"])
        .arg(&json)
        .arg("--image")
        .arg(root.join("target/guest"))
        .args(["--qemu", &qemu()]);
    for case in CASES {
        command.args(["--only", case]);
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let told = std::fs::read_to_string(&json).unwrap();
    let lines: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let places: Vec<_> = lines
        .iter()
        .map(|line| (line["case"].as_str(), line["runs_at"].as_str()))
        .collect();
    // The undisturbed migration comes first; what was not committed is undone, what was is finished.
    assert_eq!(
        places,
        [
            (Some("undisturbed"), Some("B")),
            (Some("started-kill-a"), Some("A")),
            (Some("permit-kill-b"), Some("A")),
            (Some("commit-kill-b"), Some("B")),
            (Some("learnt-kill-a"), Some("B")),
        ]
    );
    for line in &lines {
        assert_eq!(line["copies_at_once"], 1, "{line}");
        assert_eq!(line["intact"], true, "{line}");
    }
}
