//! The VM is off: `qemu-img` copies its image, and compares the two, while nobody can start the VM from it.

use std::fs::File;
use std::process::Stdio;

use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use super::plan::Job;
use super::record::Record;
use super::{DiskMove, Ended, Stop, make, settle, words};
use crate::api::{MoveDiskOutcome, MoveDiskPhase, MoveDiskPlan};
use crate::gateway::Core;
use crate::gateway::disks::cold_image::ColdImage;
use crate::gateway::disks::{mark, volumes};
use crate::hypervisor::qemu_img::{self, QemuImgError};
use crate::proto::page::MigrationId;

/// What `qemu-img` says of a failure, at most.
const SAID_BYTES: u64 = 4096;

/// Moves the disk. The old image is not changed.
pub(super) async fn run(
    core: &Core,
    this: &DiskMove,
    id: MigrationId,
    shown: &MoveDiskPlan,
    job: &Job,
    source: &ColdImage,
) -> Ended {
    let record = Record {
        id,
        vm: shown.vm.clone(),
        disk: shown.disk.clone(),
        from: shown.from.clone(),
        to: shown.to.clone(),
        format: shown.format.clone(),
        remove_old: job.remove_old,
        live: None,
        is_done: false,
    };
    this.publish(MoveDiskPhase::Making, 0, shown.size_bytes);
    let (outcome, reason) = match copy(core, this, shown, job, source, &record).await {
        Ok(()) => (MoveDiskOutcome::Moved, None),
        Err(Stop::Cancelled) => (MoveDiskOutcome::Cancelled, None),
        Err(Stop::Failed(reason)) => (MoveDiskOutcome::Failed, Some(reason)),
    };
    if outcome != MoveDiskOutcome::Moved {
        this.publish(MoveDiskPhase::Undoing, 0, shown.size_bytes);
        settle::settle(core, &record, None, |text| this.notice(text)).await;
        return Ended {
            outcome,
            reason,
            old_removed: false,
            todo: Vec::new(),
        };
    }
    let done = Record {
        is_done: true,
        ..record
    };
    if let Err(reason) = done.write(&core.config.state_dir).await {
        tracing::warn!(vm = shown.vm, disk = shown.disk, "{reason}");
    }
    let record = done;
    mark::keep_one(&shown.to, id);
    let mut todo = words::todo(&job.vm, &shown.disk, shown.from.as_deref(), &shown.to, &shown.format);
    let removed = match job.remove_old {
        true => settle::remove_file(&source.path)
            .await
            .map_err(|reason| todo.push(reason))
            .is_ok(),
        false => false,
    };
    record.remove(&core.config.state_dir).await;
    Ended {
        outcome,
        reason: None,
        old_removed: removed,
        todo,
    }
}

async fn copy(
    core: &Core,
    this: &DiskMove,
    shown: &MoveDiskPlan,
    job: &Job,
    source: &ColdImage,
    record: &Record,
) -> Result<(), Stop> {
    make(core, this, shown, job, record, Some(source.owner)).await?;

    let mut convert = qemu_img::command();
    // It has just been made, so what is not written is zero.
    convert.args(["convert", "-p", "-n", "--target-is-zero", "-O", &shown.format]);
    if let Some(rate) = job.rate_bytes_per_second {
        convert.args(["-r", &rate.to_string()]);
    }
    convert.arg(source.unlocked()).arg(&shown.to);
    let failed = |error: String| Stop::Failed(words::failure(&error, &shown.to, None));
    follow(this, convert, MoveDiskPhase::Copying, shown.size_bytes)
        .await?
        .map_err(|(_, error)| failed(error))?;

    // It is flushed before it is relied on.
    let image = shown.to.clone();
    let flushed = tokio::task::spawn_blocking(move || File::open(&image)?.sync_all());
    let flushed = flushed.await.expect("flushing a file does not panic");
    flushed.map_err(|error| failed(error.to_string()))?;

    let mut compare = qemu_img::command();
    let file = json!({ "driver": "file", "filename": shown.to });
    let new = format!("json:{}", json!({ "driver": shown.format, "file": file }));
    compare.args(["compare", "-p", &source.unlocked(), &new]);
    let compared = follow(this, compare, MoveDiskPhase::Comparing, shown.size_bytes).await?;
    compared.map_err(|(code, error)| match code {
        // qemu-img(1), EXIT STATUS of compare.
        Some(1) => Stop::Failed(format!(
            "{} is not the same as the old image: look after the storage of both; it is removed again",
            shown.to.display()
        )),
        _ => Stop::Failed(format!(
            "the two images could not be compared: {error}; the new one is removed again"
        )),
    })?;
    if volumes::listens(&job.vm.qmp).await {
        let text = format!("{} was started meanwhile: what was copied is removed again", shown.vm);
        return Err(Stop::Failed(text));
    }
    if this.commit() { Ok(()) } else { Err(Stop::Cancelled) }
}

/// Runs `qemu-img` and tells how far it is. Its exit code and its words where it failed.
async fn follow(
    this: &DiskMove,
    mut command: Command,
    phase: MoveDiskPhase,
    size_bytes: u64,
) -> Result<Result<(), (Option<i32>, String)>, Stop> {
    let not_run = |error: std::io::Error| Stop::Failed(QemuImgError::from(error).to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(not_run)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let shows = async {
        let mut stdout = stdout.expect("it was asked for");
        let mut bytes = [0; 256];
        while let Ok(length @ 1..) = stdout.read(&mut bytes).await {
            if let Some(percent) = percent(&bytes[..length]) {
                this.publish(phase, (size_bytes as f64 * percent / 100.0) as u64, size_bytes);
            }
        }
    };
    let says = async {
        let mut said = String::new();
        let mut stderr = stderr.expect("it was asked for");
        let _ = (&mut stderr).take(SAID_BYTES).read_to_string(&mut said).await;
        // What nobody reads would keep it waiting.
        let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
        said
    };
    let ended = async { tokio::join!(shows, says, child.wait()) };
    let (said, status) = tokio::select! {
        ((), said, status) = ended => (said, status),
        () = this.cancelled() => {
            let _ = child.kill().await;
            return Err(Stop::Cancelled);
        }
    };
    let status = status.map_err(not_run)?;
    if status.success() {
        return Ok(Ok(()));
    }
    let said = if said.trim().is_empty() {
        status.to_string()
    } else {
        qemu_img::one_line(&said)
    };
    Ok(Err((status.code(), said)))
}

/// The newest of `    (12.50/100%)\r`, which is what `-p` writes.
fn percent(bytes: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (before, _) = text.rsplit_once("/100%)")?;
    before.rsplit_once('(')?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_percentage_is_the_one_that_counts() {
        assert_eq!(percent(b"    (0.00/100%)\r    (12.50/100%)\r"), Some(12.5));
        assert_eq!(percent(b"    (100.00/100%)\r    (1"), Some(100.0));
        assert_eq!(percent(b"Images are identical.\n"), None);
        assert_eq!(percent(b""), None);
    }
}
