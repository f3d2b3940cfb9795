//! Gateways, hypervisors and commands that are killed or stopped in the middle of a migration: a short selection of `longhaul lab kill`,
//! on loopback.
//!
//! Needs QEMU, and the network at the first run, for the guest's kernel. Without them the test prints why it did nothing.

use std::path::Path;
use std::process::{Command, Stdio};

use longhaul::lab::guest::Image;
use serde_json::Value;

/// Where the guest runs at the end: one case for each way in which a migration can go on. It is undone by its source, by its destination,
/// finished by either; goes on without the command; is given back by a person, or by itself, where the destination's QEMU has died; and
/// the source's gateway sleeps from before the guest is stopped until long after its peer has lost patience.
const CASES: [(&str, &[&str]); 8] = [
    ("started-kill-a", &["A"]),
    ("permit-kill-b", &["A"]),
    ("commit-kill-b", &["B"]),
    ("learnt-kill-a", &["B"]),
    ("started-kill-command", &["B"]),
    ("prepared-kill-qemu-b", &["A"]),
    ("commit-kill-qemu-b", &["A", "nowhere"]),
    ("last-pass-stop-a-long", &["A", "B"]),
];

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
fn whoever_is_killed_or_stopped_leaves_the_vm_running_in_exactly_one_place() {
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
    for (case, _) in CASES {
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
    assert_eq!(lines.len(), 1 + CASES.len());
    // The undisturbed migration comes first; the others come in the order of the matrix.
    assert_eq!(
        (&lines[0]["case"], &lines[0]["runs_at"]),
        (&"undisturbed".into(), &"B".into())
    );
    for (case, places) in CASES {
        let line = lines.iter().find(|line| line["case"] == case).unwrap();
        let place = line["runs_at"].as_str().unwrap_or("nowhere");
        assert!(places.contains(&place), "{line}");
    }
    for line in &lines {
        assert_eq!(line["copies_at_once"], 1, "{line}");
        assert!(line["intact"] == true || line["runs_at"].is_null(), "{line}");
    }
}
