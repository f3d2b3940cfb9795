//! Runs a program of the operator to its end, or to that of its time.

use std::ffi::OsString;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, Command};

use crate::hypervisor::process::WITH_ITS_PARENT;

/// Bytes kept of what a program writes, its newest.
const KEPT: usize = 64 << 10;

/// Reads of what is left once it has ended: more than a pipe holds, whoever goes on writing to it.
const READS_AT_THE_END: usize = 64;

/// Characters of its last line that are told.
const LINE: usize = 300;

/// Where there is none to inherit.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that did not succeed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramError {
    #[error("could not be run: {0}")]
    NotRun(#[from] std::io::Error),
    #[error("failed ({status}){}", said(.line))]
    Failed {
        status: ExitStatus,
        /// The last that it wrote to stderr, printable; empty where it wrote nothing.
        line: String,
    },
    #[error("was killed, as it had not ended within {} s", .0.as_secs_f64())]
    TimedOut(Duration),
}

fn said(line: &str) -> String {
    match line {
        "" => " without a word on stderr".to_owned(),
        line => format!(": {line}"),
    }
}

/// A program with all that it has started. Killed when it is dropped: the caller has given it up, or this process ends.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        // Not reaped yet, so its id cannot name another group.
        let leader = self.0.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(leader) = leader {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Runs `program` with this environment, and PATH, to its end. It is killed with its process group where that takes longer than `limit`, and where
/// this is dropped.
///
/// # Errors
/// Anything but exit code 0 in time.
pub(super) async fn run(
    program: &Path,
    environment: &[(&'static str, OsString)],
    limit: Duration,
) -> Result<(), ProgramError> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| PATH.into());
    let mut child = Command::new(WITH_ITS_PARENT[0])
        .args(&WITH_ITS_PARENT[1..])
        .arg(program)
        .env_clear()
        .env("PATH", path)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let stderr = child.stderr.take();
    let mut group = Group(child);
    let ended = tokio::time::timeout(limit, to_the_end(&mut group.0, stderr)).await;
    let (status, said) = ended.map_err(|_| ProgramError::TimedOut(limit))??;
    if status.success() {
        return Ok(());
    }
    let line = last_line(&said);
    Err(ProgramError::Failed { status, line })
}

/// Its exit status, and the end of what it has written to `stderr`, which others that it has started may hold open.
async fn to_the_end(child: &mut Child, mut stderr: Option<ChildStderr>) -> std::io::Result<(ExitStatus, Vec<u8>)> {
    let mut said = Vec::new();
    let mut bytes = [0; 4096];
    let status = loop {
        let read = async {
            match &mut stderr {
                Some(stderr) => stderr.read(&mut bytes).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            status = child.wait() => break status?,
            read = read => match read {
                Ok(read @ 1..) => keep(&mut said, &bytes[..read]),
                Ok(0) | Err(_) => stderr = None,
            },
        }
    };
    if let Some(stderr) = stderr {
        // It does not block: what is there is there, whether or not the runtime has heard of it.
        for _ in 0..READS_AT_THE_END {
            match rustix::io::read(&stderr, &mut bytes) {
                Ok(read @ 1..) => keep(&mut said, &bytes[..read]),
                Ok(0) | Err(_) => break,
            }
        }
    }
    Ok((status, said))
}

fn keep(said: &mut Vec<u8>, bytes: &[u8]) {
    said.extend_from_slice(bytes);
    if said.len() > KEPT {
        said.drain(..said.len() - KEPT);
    }
}

/// The last line that has something in it.
fn last_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    printable(line.unwrap_or_default())
}

/// Bounded, and without control characters.
pub(super) fn printable(text: &str) -> String {
    let shown = |character: char| if character.is_control() { '?' } else { character };
    text.chars().take(LINE).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// Longer than any test may take.
    const LONG: Duration = Duration::from_secs(120);

    /// Written by another process: what another test starts meanwhile would inherit our open file for a moment, and a file that is open for
    /// writing cannot be executed.
    fn script(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join("hook");
        let written = std::process::Command::new("sh")
            .args([
                "-c",
                r#"printf '#!/bin/sh\n%s\n' "$1" >"$2" && chmod 755 "$2""#,
                "sh",
                text,
            ])
            .arg(&path)
            .status();
        assert!(written.unwrap().success());
        path
    }

    #[tokio::test]
    async fn a_program_has_its_facts_and_nothing_else_in_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        // What the shell sets by itself aside.
        let text = format!("env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= | sort > {}", out.display());
        let program = script(directory.path(), &text);
        run(&program, &[("LONGHAUL_VM", "db-1".into())], LONG).await.unwrap();
        let seen = std::fs::read_to_string(&out).unwrap();
        let names: Vec<&str> = seen.lines().map(|line| line.split('=').next().unwrap()).collect();
        assert_eq!(names, ["LONGHAUL_VM", "PATH"], "{seen}");
        assert!(seen.contains("LONGHAUL_VM=db-1\n"), "{seen}");
    }

    #[tokio::test]
    async fn the_last_line_that_a_failing_program_writes_is_told_without_control_characters() {
        let directory = tempfile::tempdir().unwrap();
        let program = script(
            directory.path(),
            "echo out\necho first >&2\nprintf 'no \\033route\\n\\n' >&2\nexit 3",
        );
        let error = run(&program, &[], LONG).await.unwrap_err().to_string();
        assert_eq!(error, "failed (exit status: 3): no ?route");
        let program = script(directory.path(), "exit 1");
        let error = run(&program, &[], LONG).await.unwrap_err().to_string();
        assert_eq!(error, "failed (exit status: 1) without a word on stderr");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_told_of() {
        let error = run(Path::new("/no/such/hook"), &[], LONG)
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/such/hook"), "{error}");
    }

    #[tokio::test]
    async fn the_time_limit_ends_a_program_with_what_it_has_started() {
        let directory = tempfile::tempdir().unwrap();
        // Its reader sees the end when nobody has it open any more: the program and its child are both gone.
        let held = directory.path().join("held");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &held,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let text = format!("exec 9> {}\necho up >&9\nsleep 1000 &\nsleep 1000", held.display());
        let program = script(directory.path(), &text);
        let reading = tokio::task::spawn_blocking(move || std::fs::read_to_string(held).unwrap());
        let error = run(&program, &[], Duration::from_secs(2))
            .await
            .unwrap_err()
            .to_string();
        assert_eq!(error, "was killed, as it had not ended within 2 s");
        let read = tokio::time::timeout(LONG, reading).await;
        assert_eq!(read.expect("both were killed").unwrap(), "up\n");
    }

    #[tokio::test]
    async fn of_endless_output_the_end_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let program = script(
            directory.path(),
            "head -c 3000000 /dev/zero | tr '\\0' 'x' >&2\necho >&2\necho the end >&2\nexit 1",
        );
        let error = run(&program, &[], LONG).await.unwrap_err().to_string();
        assert_eq!(error, "failed (exit status: 1): the end");
        let mut said = Vec::new();
        for _ in 0..100 {
            keep(&mut said, &[b'x'; 4096]);
        }
        assert_eq!(said.len(), KEPT);
    }

    #[tokio::test]
    async fn a_child_that_goes_on_with_the_output_does_not_hold_up_a_program_that_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let program = script(
            directory.path(),
            &format!("sleep 1000 &\necho $! > {}\nexit 0", pid.display()),
        );
        run(&program, &[], LONG).await.unwrap();
        let left = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(Pid::from_raw(left).unwrap(), Signal::KILL).unwrap();
    }
}
