//! A guest that was booted once and saved while it ran: each case goes on from there, which takes a fraction of a second.
//!
//! QEMU saves and loads it by its own migration, to a file and from it. What begins a case is a VM that has been migrated before,
//! as many are.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::copied::Pristine;
use super::moment::Place;
use super::run::processes_of;
use super::site::Site;
use crate::lab::error::LabError;
use crate::lab::guest::Launch;
use crate::lab::heartbeat::Heartbeat;
use crate::lab::monitor::Monitor;

/// Boots the guest in `directory`, which is made, and returns the file in which it is saved. `disk`: what it has.
pub(super) async fn save(launch: &Launch, directory: &Path, disk: Option<&Pristine>) -> Result<PathBuf, LabError> {
    std::fs::create_dir(directory).map_err(|source| LabError::file(directory, source))?;
    // It has no gateway.
    let mut site = Site::new(directory, Place::A, None, ([127, 0, 0, 1], 0).into())?;
    if let Some(disk) = disk {
        disk.lay(&mut site)?;
    }
    let mut qemu = site.boot(launch, None)?;
    let mut beats = Heartbeat::connect(&site.files.heartbeat, BOOT).await?;
    let settled = launch.dials.pages_per_second / 2;
    let booted = beats.wait_for("half a second of work", BOOT, |heard| {
        heard.last.is_some_and(|beat| beat.writes >= settled)
    });
    tokio::select! {
        booted = booted => booted?,
        error = qemu.ended() => return Err(error.into()),
    };
    let file = directory.join("guest");
    let mut monitor = Monitor::connect(&site.files.qmp, BOOT).await?;
    let uri = format!("exec:cat > {}", file.display());
    monitor.execute("migrate", json!({ "uri": uri })).await?;
    loop {
        let told = monitor.execute("query-migrate", Value::Null).await?;
        match told["status"].as_str() {
            Some("completed") => break,
            Some(status @ ("failed" | "cancelled")) => {
                return Err(LabError::Unsaved {
                    status: status.to_owned(),
                });
            }
            _ => tokio::time::sleep(LOOK).await,
        }
    }
    qemu.kill().await;
    // The shell that writes the file ends when it has written everything.
    while !processes_of(directory, None).is_empty() {
        tokio::time::sleep(LOOK).await;
    }
    Ok(file)
}

/// From the start of QEMU to a guest at work; some seconds under TCG, more on a machine that does other things too.
const BOOT: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_millis(20);
