//! `qemu-img` (Debian: qemu-utils), which makes, copies and compares images.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// Its name.
pub(crate) const PROGRAM: &str = "qemu-img";

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
