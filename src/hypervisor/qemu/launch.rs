//! Starting a destination QEMU from an argv template of the operator.
//!
//! No shell is involved, and of what comes from the peer only the VM's name enters, which is validated. The process gets a
//! session of its own (`setsid` of util-linux, so that its pid stays ours to watch), no input, and a log file for its output:
//! it survives the gateway and is found again by its identity. Under systemd the gateway's unit needs `KillMode=process`.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::SOCKET_PATH_LIMIT;
use crate::hypervisor::process::{Process, ProcessError};
use crate::hypervisor::qmp::{QmpClient, QmpError};

/// An operator's command line with placeholders `{qmp}`, `{vm}` and `{migration}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchTemplate {
    arguments: Vec<String>,
}

/// What is put in the place of the placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchValues {
    vm: String,
    qmp: PathBuf,
    migration: PathBuf,
}

/// Everything needed to start a destination.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The command.
    pub template: LaunchTemplate,
    /// Its values.
    pub values: LaunchValues,
    /// Where its output goes; replaced if it exists, created with mode 0600, cut whenever it exceeds 1 MiB.
    pub log: PathBuf,
    /// How long it may take until its monitor answers.
    pub ready_within: Duration,
}

/// A mistake in a template or its values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Nothing to run.
    #[error("The command is empty.")]
    Empty,
    /// The program's name comes from a placeholder or looks like an option.
    #[error("The command's first word must be a program, not {0:?}.")]
    Program(String),
    /// A placeholder that does not exist.
    #[error("The command contains {{{0}}}; the placeholders are {{qmp}}, {{vm}} and {{migration}}.")]
    UnknownPlaceholder(String),
    /// A zero byte.
    #[error("The command contains a zero byte.")]
    ZeroByte,
    /// Without it the process could not be talked to.
    #[error("The command does not contain {{qmp}}, so its QEMU could not be controlled.")]
    NoMonitor,
    /// A VM name that could be taken for something else.
    #[error(
        "The VM name {0:?} cannot be used in a command: it must have 1 to 64 letters, digits, '.', '_' or '-', and begin \
         with a letter or digit."
    )]
    VmName(String),
    /// A path that QEMU or the kernel would take for something else.
    #[error(
        "The path {0:?} cannot be used in a command: it must be absolute, at most 107 bytes long, and consist of letters, \
         digits and \"/._-+@\"."
    )]
    SocketPath(String),
}

/// Why a destination did not come up. Nothing of it is left running.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Something answers on the path already.
    #[error("The monitor socket {} is in use by another process; is the VM running here already?", path.display())]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The log file.
    #[error("The log file {} cannot be written", path.display())]
    Log {
        /// The path.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The process could not be created at all.
    #[error("The destination's command cannot be started (it needs `setsid` of util-linux)")]
    Spawn {
        /// The reason.
        source: std::io::Error,
    },
    /// It ended before its monitor answered.
    #[error("The destination's command {program} ended before its monitor answered ({ending}).")]
    Ended {
        /// Its program.
        program: String,
        /// Exit status and the end of its output.
        ending: String,
    },
    /// Its monitor does not answer.
    #[error(
        "The destination's command {program} runs, but its monitor did not answer within {waited:?}: {last} {output}"
    )]
    NotReady {
        /// Its program.
        program: String,
        /// How long was waited.
        waited: Duration,
        /// What was wrong with the monitor at last.
        last: String,
        /// The end of its output.
        output: String,
    },
    /// Another process answers.
    #[error("The monitor {} is answered by the process {pid}, which the destination's command did not start.", path.display())]
    ForeignProcess {
        /// The path.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// The process.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl LaunchTemplate {
    /// Checks an operator's command: the program and its arguments.
    ///
    /// # Errors
    /// The first mistake.
    pub fn parse(arguments: Vec<String>) -> Result<LaunchTemplate, TemplateError> {
        let program = arguments.first().ok_or(TemplateError::Empty)?;
        if program.is_empty() || program.starts_with('-') || program.contains(['{', '}']) {
            return Err(TemplateError::Program(program.clone()));
        }
        if arguments.iter().any(|argument| argument.contains('\0')) {
            return Err(TemplateError::ZeroByte);
        }
        let mut has_monitor = false;
        for argument in &arguments {
            for piece in pieces(argument) {
                match piece {
                    Piece::Placeholder("qmp") => has_monitor = true,
                    Piece::Placeholder("vm" | "migration") | Piece::Text(_) => {}
                    Piece::Placeholder(other) => return Err(TemplateError::UnknownPlaceholder(other.to_owned())),
                }
            }
        }
        if has_monitor {
            Ok(LaunchTemplate { arguments })
        } else {
            Err(TemplateError::NoMonitor)
        }
    }

    /// The command line with its values.
    pub fn arguments(&self, values: &LaunchValues) -> Vec<String> {
        let filled = |argument: &String| -> String {
            pieces(argument)
                .map(|piece| match piece {
                    Piece::Text(text) => text,
                    Piece::Placeholder("qmp") => path_text(&values.qmp),
                    Piece::Placeholder("migration") => path_text(&values.migration),
                    Piece::Placeholder(_) => &values.vm,
                })
                .collect()
        };
        self.arguments.iter().map(filled).collect()
    }

    fn program(&self) -> &str {
        self.arguments.first().map_or("", String::as_str)
    }
}

impl LaunchValues {
    /// Checks values: the VM's name (which may come from a peer), the monitor's socket and the migration's socket.
    ///
    /// # Errors
    /// [`TemplateError::VmName`], [`TemplateError::SocketPath`].
    pub fn new(vm: &str, qmp: &Path, migration: &Path) -> Result<LaunchValues, TemplateError> {
        let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let starts_well = vm.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !starts_well || vm.len() > VM_NAME_LIMIT || !vm.bytes().all(is_name_byte) {
            return Err(TemplateError::VmName(vm.chars().take(VM_NAME_LIMIT).collect()));
        }
        for path in [qmp, migration] {
            // A comma would begin another option of QEMU, a blank or quote mislead whoever reads a log.
            let is_path_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+@".contains(&byte);
            let text = path.to_str().unwrap_or_default();
            if !path.is_absolute() || text.len() > SOCKET_PATH_LIMIT || !text.bytes().all(is_path_byte) {
                return Err(TemplateError::SocketPath(path.to_string_lossy().into_owned()));
            }
        }
        Ok(LaunchValues {
            vm: vm.to_owned(),
            qmp: qmp.to_owned(),
            migration: migration.to_owned(),
        })
    }
}

/// A started destination whose monitor answers.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) qmp: QmpClient,
    pub(super) process: Process,
    pub(super) output: Output,
}

/// What is known of the end of a process that we started, or found again.
#[derive(Debug)]
pub(super) struct Output {
    log: Option<PathBuf>,
    exit: Option<watch::Receiver<Option<ExitStatus>>>,
}

/// Starts the command and waits until its monitor answers.
pub(super) async fn launch(launch: &Launch) -> Result<Launched, LaunchError> {
    let qmp_path = &launch.values.qmp;
    if is_in_use(qmp_path).await {
        return Err(LaunchError::SocketInUse { path: qmp_path.clone() });
    }
    let log_error = |source| LaunchError::Log {
        path: launch.log.clone(),
        source,
    };
    let log = create_log(&launch.log).map_err(log_error)?;
    let errors = log.try_clone().map_err(log_error)?;
    // `setsid` without a process group of its own calls setsid() and becomes the program, with the same pid.
    let mut child = Command::new("setsid")
        .args(launch.template.arguments(&launch.values).iter().map(OsStr::new))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .kill_on_drop(false)
        .spawn()
        .map_err(|source| LaunchError::Spawn { source })?;
    let Some(pid) = child.id() else {
        return Err(ProcessError::Gone { pid: 0 }.into());
    };
    // Not reaped before the next line's task runs, so the pid is still that of our child.
    let started = Process::open(pid);
    let (exit_sender, exit) = watch::channel(None);
    tokio::spawn(async move {
        if let Ok(status) = child.wait().await {
            exit_sender.send_replace(Some(status));
        }
    });
    let output = Output {
        log: Some(launch.log.clone()),
        exit: Some(exit),
    };
    let started = match started {
        Ok(process) => process,
        Err(ProcessError::Gone { .. }) => return Err(ended(launch, &output).await),
        Err(error) => return Err(error.into()),
    };
    tokio::spawn(keep_log_bounded(launch.log.clone(), started.try_clone()?));

    let mut guard = KillOnDrop {
        processes: vec![started.try_clone()?],
    };
    let end = Instant::now() + launch.ready_within;
    let mut last = QmpError::NoSocket { path: qmp_path.clone() };
    let qmp = loop {
        if !started.is_alive() {
            return Err(ended(launch, &output).await);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(LaunchError::NotReady {
                program: launch.template.program().to_owned(),
                waited: launch.ready_within,
                last: last.to_string(),
                output: output.describe(),
            });
        }
        match QmpClient::connect(qmp_path, left).await {
            Ok(qmp) => break qmp,
            Err(error) => last = error,
        }
        sleep(CONNECT_INTERVAL).await;
    };
    // The command may be a wrapper that starts QEMU; whatever answers must have come from it.
    let process = Process::open(qmp.peer_pid())?;
    if process.session()? != pid {
        return Err(LaunchError::ForeignProcess {
            path: qmp_path.clone(),
            pid: process.pid(),
        });
    }
    process.check_signal_permission()?;
    guard.processes.clear();
    Ok(Launched { qmp, process, output })
}

async fn ended(launch: &Launch, output: &Output) -> LaunchError {
    let ending = output.ending().await;
    LaunchError::Ended {
        program: launch.template.program().to_owned(),
        ending,
    }
}

impl Output {
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

/// Ends what was started unless launching succeeded, also when the caller is cancelled in between.
struct KillOnDrop {
    processes: Vec<Process>,
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        for process in &self.processes {
            process.kill_session();
        }
    }
}

/// A part of an argument.
enum Piece<'a> {
    Text(&'a str),
    Placeholder(&'a str),
}

/// Splits at `{name}` where the name has only lower-case letters, digits and underscores. Other braces are text: QEMU takes
/// JSON in its arguments.
fn pieces(argument: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = argument;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut from = 0;
        while let Some(open) = rest[from..].find('{').map(|place| place + from) {
            let name = &rest[open + 1..];
            let length = name
                .bytes()
                .take_while(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
                .count();
            if length > 0 && name.as_bytes().get(length) == Some(&b'}') {
                let (text, placeholder) = (&rest[..open], &name[..length]);
                if !text.is_empty() {
                    rest = &rest[open..];
                    return Some(Piece::Text(text));
                }
                rest = &name[length + 1..];
                return Some(Piece::Placeholder(placeholder));
            }
            from = open + 1;
        }
        Some(Piece::Text(std::mem::take(&mut rest)))
    })
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("LaunchValues::new accepts only ASCII paths")
}

/// Whether something listens on the path.
async fn is_in_use(path: &Path) -> bool {
    match UnixStream::connect(path).await {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// Removes the socket file of a process that was killed, unless somebody listens on it again.
pub(super) async fn remove_stale_socket(path: &Path) {
    let is_stale =
        matches!(UnixStream::connect(path).await, Err(error) if error.kind() == ErrorKind::ConnectionRefused);
    if is_stale && let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "a stale monitor socket could not be removed");
    }
}

fn create_log(path: &Path) -> std::io::Result<File> {
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

/// Longest VM name, in bytes.
const VM_NAME_LIMIT: usize = 64;
/// Size at which a log file is cut, in bytes; it can be exceeded by what is written in [`LOG_CHECK_INTERVAL`].
const LOG_LIMIT: u64 = 1 << 20;
/// How often the size is looked at.
const LOG_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Bytes of the log that are read for an error text.
const TAIL_BYTES: u64 = 2048;
/// Lines of it.
const TAIL_LINES: usize = 8;
/// Between two attempts to reach a monitor that is not there yet.
const CONNECT_INTERVAL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn template(arguments: &[&str]) -> Result<LaunchTemplate, TemplateError> {
        LaunchTemplate::parse(arguments.iter().map(|&argument| argument.to_owned()).collect())
    }

    fn values() -> LaunchValues {
        LaunchValues::new("db-1", Path::new("/run/x/qmp"), Path::new("/run/x/mig")).unwrap()
    }

    #[test]
    fn placeholders_are_filled_once_and_json_is_left_alone() {
        let template = template(&[
            "qemu",
            "-name",
            "{vm}",
            "-qmp",
            "unix:{qmp},server=on",
            "{\"driver\":\"x\"}",
            "{vm}{vm}",
            "{{vm}}",
            "{",
            "x{Y}",
        ]);
        let filled = template.unwrap().arguments(&values());
        let wanted = [
            "qemu",
            "-name",
            "db-1",
            "-qmp",
            "unix:/run/x/qmp,server=on",
            "{\"driver\":\"x\"}",
            "db-1db-1",
            "{db-1}",
            "{",
            "x{Y}",
        ];
        assert_eq!(filled, wanted);
    }

    #[test]
    fn mistakes_in_a_template_are_named() {
        assert_eq!(template(&[]), Err(TemplateError::Empty));
        assert_eq!(template(&["{vm}", "{qmp}"]), Err(TemplateError::Program("{vm}".into())));
        assert_eq!(
            template(&["--wait", "{qmp}"]),
            Err(TemplateError::Program("--wait".into()))
        );
        assert_eq!(
            template(&["qemu", "{qpm}"]),
            Err(TemplateError::UnknownPlaceholder("qpm".into()))
        );
        assert_eq!(template(&["qemu", "{vm}"]), Err(TemplateError::NoMonitor));
        assert_eq!(template(&["qemu", "{qmp}\0"]), Err(TemplateError::ZeroByte));
        assert!(
            template(&["qemu", "{qpm}"])
                .unwrap_err()
                .to_string()
                .contains("contains {qpm}; the placeholders are {qmp}")
        );
    }

    #[test]
    fn a_vm_name_that_could_mean_something_else_is_refused() {
        let with = |name: &str| LaunchValues::new(name, Path::new("/a"), Path::new("/b"));
        assert!(with(&"a".repeat(64)).is_ok());
        let too_long = "a".repeat(65);
        for name in [
            "",
            "-x",
            ".x",
            "a,b",
            "a b",
            "a/b",
            "a\n",
            "{qmp}",
            "ä",
            too_long.as_str(),
        ] {
            assert!(matches!(with(name), Err(TemplateError::VmName(_))), "{name:?}");
        }
    }

    #[test]
    fn a_socket_path_that_qemu_would_misread_is_refused() {
        let with = |path: &str| LaunchValues::new("x", Path::new(path), Path::new("/b"));
        assert!(with(&format!("/{}", "a".repeat(106))).is_ok());
        let too_long = format!("/{}", "a".repeat(107));
        for path in ["relative", "/a,b", "/a b", "/ä", "/{vm}", too_long.as_str()] {
            assert!(matches!(with(path), Err(TemplateError::SocketPath(_))), "{path:?}");
        }
    }

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
