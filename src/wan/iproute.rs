//! Runs `ip` and `tc`.

use std::io;
use std::process::Command;

/// `ip` or `tc` did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum IprouteError {
    /// It cannot be run.
    #[error("{command} cannot be run; install iproute2")]
    Unstarted {
        /// The command line.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// It failed.
    #[error("{command} failed: {message}")]
    Failed {
        /// The command line.
        command: String,
        /// Its words.
        message: String,
    },
}

/// Runs a command of plain words to its end and returns what it printed.
pub(super) fn run(command: &str) -> Result<Vec<u8>, IprouteError> {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .output()
        .map_err(|source| IprouteError::Unstarted {
            command: command.to_owned(),
            source,
        })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(IprouteError::Failed {
        command: command.to_owned(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
