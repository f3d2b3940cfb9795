//! Two gateways as real processes on loopback, the VMs they move, and an end that leaves nothing behind.
//!
//! Everything lives under one temporary folder, whose path is in every command line: that is how processes are found again, also
//! those that a gateway started. When a test fails, everything that was said is printed.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]
#![allow(dead_code, reason = "no test file needs all of it")]

pub(crate) mod disk_guest;
pub(crate) mod guest;
pub(crate) mod process;
pub(crate) mod qmp;
pub(crate) mod relay;
pub(crate) mod site;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use self::guest::Machine;
use self::process::processes_of;
pub(crate) use self::site::{Site, SitePlan};

/// Time for anything that happens soon on an idle machine; CI machines are not idle.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Ends the test early, with the reason, where a program or a permission is missing.
macro_rules! need {
    ($($what:expr),+) => {
        $(if let Err(reason) = $what {
            println!("SKIP: {reason}");
            return;
        })+
    };
}
pub(crate) use need;

/// A program of the system.
pub(crate) fn program(name: &str) -> Result<(), String> {
    let found = std::process::Command::new(name)
        .arg("--version")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    found
        .map(drop)
        .map_err(|error| format!("{name} cannot be run: {error}"))
}

/// Bytes that nothing makes shorter, the same for the same seed.
pub(crate) fn noise(len: usize, mut state: u64) -> Vec<u8> {
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// The hypervisor.
pub(crate) fn qemu() -> Result<(), String> {
    program(&guest::qemu_program())
}

/// Sites `a` and `b`.
pub(crate) struct Rig {
    pub(crate) a: Site,
    pub(crate) b: Site,
    folder: TempDir,
}

impl Rig {
    /// Two running, paired gateways that know the same VMs; none runs yet.
    pub(crate) fn new(vms: &[(&str, Machine)]) -> Self {
        Self::planned(vms, |_, _| {})
    }

    /// The same with changes to the plans of `a` and `b`.
    pub(crate) fn planned(vms: &[(&str, Machine)], change: impl FnOnce(&mut SitePlan, &mut SitePlan)) -> Self {
        let mut rig = Self::apart(vms, change);
        rig.a.start();
        rig.b.start();
        rig.pair();
        rig
    }

    /// Two sites whose gateways have not been started.
    pub(crate) fn apart(vms: &[(&str, Machine)], change: impl FnOnce(&mut SitePlan, &mut SitePlan)) -> Self {
        // Paths of sockets have at most 107 bytes, so not below the target folder.
        let folder = tempfile::Builder::new().prefix("lh").tempdir().unwrap();
        let mut a = SitePlan::new("a", folder.path(), vms);
        let mut b = SitePlan::new("b", folder.path(), vms);
        change(&mut a, &mut b);
        let (a, b) = (Site::new(a), Site::new(b));
        Self { a, b, folder }
    }

    /// Both trust each other from now on.
    pub(crate) fn pair(&self) {
        let invited = self.a.run(&["pair", "--invite"]);
        assert_eq!(invited.code, Some(0), "{invited:?}");
        let paired = self.b.run(&["pair", invited.stdout.trim()]);
        assert_eq!(paired.code, Some(0), "{paired:?}");
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A path in the rig's folder.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Nothing of a migration is left: no hypervisor but those named (site, VM), and nothing but durable files.
    #[track_caller]
    pub(crate) fn assert_only(&self, running: &[(&Site, &str)]) {
        for site in [&self.a, &self.b] {
            for vm in site.vms() {
                let wanted = running
                    .iter()
                    .filter(|(at, name)| at.name() == site.name() && *name == vm)
                    .count();
                let what = format!("{wanted} hypervisor(s) of {vm} at {}", site.name());
                until(&what, || site.hypervisors(vm).len() == wanted);
            }
            until(
                &format!("nothing but durable files at {}: {:?}", site.name(), site.leftovers()),
                || site.leftovers().is_empty(),
            );
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for site in [&self.a, &self.b] {
                eprintln!("{}", site.everything_said());
            }
        }
        self.a.kill();
        self.b.kill();
        process::kill_all(self.folder.path());
        let left = processes_of(self.folder.path());
        if !left.is_empty() && !std::thread::panicking() {
            panic!("processes are left: {left:?}");
        }
    }
}

/// Waits for a condition, with a deadline.
#[track_caller]
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    until_some(what, || condition().then_some(()));
}

/// Waits until there is a value, with a deadline.
#[track_caller]
#[expect(
    clippy::disallowed_methods,
    reason = "a real clock bounds the wait for real processes"
)]
pub(crate) fn until_some<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let begun = std::time::Instant::now();
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
