//! `qemu-img` (Debian: qemu-utils), which makes, copies and compares images.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::process::Process;

/// Its name.
pub(crate) const PROGRAM: &str = "qemu-img";

/// A process that is killed is gone, unless its storage does not answer.
const KILL_DEADLINE: Duration = Duration::from_secs(30);

/// It did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QemuImgError {
    /// There is none.
    #[error("{PROGRAM} is not installed (Debian: qemu-utils), which makes and copies images")]
    NotInstalled,
    /// The system does not start it.
    #[error("{PROGRAM} cannot be started: {0}")]
    NotStarted(io::Error),
    /// It was ended.
    #[error("{PROGRAM} was not done within {} s", .0.as_secs())]
    Late(Duration),
    /// In its own words.
    #[error("{0}")]
    Failed(String),
}

impl From<io::Error> for QemuImgError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotInstalled,
            _ => Self::NotStarted(error),
        }
    }
}

/// To be given arguments. It ends with whoever waits for it.
pub(crate) fn command() -> Command {
    let mut command = Command::new(PROGRAM);
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs it to its end, and gives what it says.
///
/// # Errors
/// [`QemuImgError`]
pub(crate) async fn run(mut command: Command, deadline: Duration) -> Result<Vec<u8>, QemuImgError> {
    let ended = tokio::time::timeout(deadline, command.output()).await;
    let ended = ended.map_err(|_| QemuImgError::Late(deadline))??;
    match ended.status.success() {
        true => Ok(ended.stdout),
        false => Err(QemuImgError::Failed(one_line(&String::from_utf8_lossy(&ended.stderr)))),
    }
}

/// Ends every one that an earlier process has started on an image.
pub(crate) async fn end_all_on(image: &Path) {
    let image = image.to_string_lossy();
    // As it is, and within JSON.
    let escaped = serde_json::json!(image).to_string();
    let names_it = |argument: &String| *argument == image || argument.contains(&escaped);
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(process) = pid.and_then(|pid| Process::open(pid).ok()) else {
            continue;
        };
        let arguments = process.arguments().unwrap_or_default();
        let is_it = arguments.first().is_some_and(|program| program.ends_with(PROGRAM));
        if is_it
            && arguments.iter().any(names_it)
            && let Err(error) = process.kill(KILL_DEADLINE).await
        {
            tracing::warn!(
                pid = process.pid(),
                image = %image,
                "a qemu-img of a move that is undone does not end: {error}"
            );
        }
    }
}

/// Its words as a part of a sentence.
pub(crate) fn one_line(said: &str) -> String {
    let said = said.trim().replace('\n', " ");
    said.strip_prefix("qemu-img: ").unwrap_or(&said).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_tool_become_one_line() {
        assert_eq!(one_line("qemu-img: a: b\nc\n"), "a: b c");
    }
}
