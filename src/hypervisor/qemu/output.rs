//! What a destination process prints, and how it ended.
//!
//! Its output goes straight into a file, because it has to go somewhere when the gateway is restarted. A task cuts the file
//! when a guest makes QEMU talk too much.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::hypervisor::process::Process;

/// What is known of the end of a process that we started, or found again.
#[derive(Debug)]
pub(super) struct Output {
    log: Option<PathBuf>,
    exit: Option<watch::Receiver<Option<ExitStatus>>>,
}

impl Output {
    /// Of our child. It is reaped when it ends.
    pub(super) fn of_child(mut child: Child, log: PathBuf) -> Output {
        let (exit_sender, exit) = watch::channel(None);
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                exit_sender.send_replace(Some(status));
            }
        });
        Output {
            log: Some(log),
            exit: Some(exit),
        }
    }

    /// Of a process that an earlier gateway started, or somebody else.
    pub(super) fn of_other(log: Option<PathBuf>) -> Output {
        Output { log, exit: None }
    }

    /// How the process ended and what it said last. For a process that has ended.
    pub(super) async fn ending(&self) -> String {
        let status = match self.exit.clone() {
            // The process has ended, so its status is known as soon as the task that waits for it has run.
            Some(mut exit) => exit.wait_for(Option::is_some).await.ok().and_then(|status| *status),
            None => None,
        };
        let status = status.map_or_else(|| "its exit status is unknown".to_owned(), |status| status.to_string());
        format!("{status}; {}", self.describe())
    }

    /// The last lines of the log, as a clause.
    pub(super) fn describe(&self) -> String {
        match self.log.as_deref().map(log_tail) {
            Some(tail) if !tail.is_empty() => format!("its last output: {tail}"),
            Some(_) => "it printed nothing".to_owned(),
            None => "its output is not known".to_owned(),
        }
    }
}

/// Creates or empties a log file.
pub(super) fn create_log(path: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    // Appending keeps writers right when the file is cut beneath them.
    file.set_len(0)?;
    Ok(file)
}

/// The last lines, printable and bounded.
fn log_tail(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let shown = lines[lines.len().saturating_sub(TAIL_LINES)..].join(" | ");
    shown
        .chars()
        .map(|character| if character.is_control() { '?' } else { character })
        .collect()
}

/// Cuts the log whenever it has grown beyond the limit, for as long as the process lives. A guest can make QEMU talk.
pub(super) async fn keep_log_bounded(path: PathBuf, process: Process) {
    while process.is_alive() {
        if std::fs::metadata(&path).is_ok_and(|file| file.len() > LOG_LIMIT) {
            let tail = log_tail(&path);
            let cut = OpenOptions::new().append(true).open(&path).and_then(|mut file| {
                file.set_len(0)?;
                writeln!(file, "[cut at {LOG_LIMIT} bytes] {tail}")
            });
            if let Err(error) = cut {
                tracing::warn!(path = %path.display(), %error, "the destination's log could not be cut");
            }
        }
        sleep(LOG_CHECK_INTERVAL).await;
    }
}

/// Size at which a log file is cut, in bytes; it can be exceeded by what is written in [`LOG_CHECK_INTERVAL`].
const LOG_LIMIT: u64 = 1 << 20;
/// How often the size is looked at.
const LOG_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Bytes of the log that are read for an error text.
const TAIL_BYTES: u64 = 2048;
/// Lines of it.
const TAIL_LINES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_printable_and_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        std::fs::write(&path, format!("{}\nlast\x1b[31m but\n\none", "x".repeat(100_000))).unwrap();
        let tail = log_tail(&path);
        assert!(tail.ends_with("last?[31m but | one"), "{tail}");
        assert!(tail.len() < 3000);
        assert_eq!(log_tail(&path.with_extension("no")), "");
    }
}
