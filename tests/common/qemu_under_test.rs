//! The QEMU that `LONGHAUL_TEST_QEMU` names, or the system's.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// It, or `None` after printing why there is none.
pub(crate) fn qemu() -> Option<PathBuf> {
    let name = std::env::var_os("LONGHAUL_TEST_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
    let works = Command::new(&name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if works.is_ok_and(|status| status.success()) {
        return Some(name.into());
    }
    eprintln!(
        "SKIP {} does not run; install qemu-system-x86 or set LONGHAUL_TEST_QEMU",
        name.display()
    );
    None
}
