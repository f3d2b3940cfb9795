//! One application under load: a server as the distribution ships it and one client that never waits between two operations, or a
//! compiler that compiles. Everything is in memory, but for PostgreSQL's data where the machine has a disk.
//!
//! An operation is what the application's module says. Its time is the guest's, which stands still while no vCPU runs. About four times a second
//! a line tells what was done since the line before:
//!
//! ```text
//! work NUMBER MICROSECONDS CLASS:COUNT …     NUMBER grows by one; see histogram.rs for the classes
//! ```
//!
//! A line `TOKEN WORD` on standard input ends the load and tells the application something. Each is answered, in order:
//!
//! ```text
//! told TOKEN ok WORDS        or: told TOKEN failed WORDS
//! ```

mod compile;
mod nginx;
mod postgres;
mod redis;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::histogram::Histogram;

/// What can run under load.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Application {
    Redis,
    Nginx,
    Postgres,
    Compile,
}

impl Application {
    /// # Errors
    /// There is none of that name.
    pub(crate) fn named(name: &str) -> Result<Option<Self>, String> {
        Ok(Some(match name {
            "none" => return Ok(None),
            "redis" => Self::Redis,
            "nginx" => Self::Nginx,
            "postgres" => Self::Postgres,
            "compile" => Self::Compile,
            _ => return Err(format!("there is no application named {name}")),
        }))
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Nginx => "nginx",
            Self::Postgres => "postgres",
            Self::Compile => "compile",
        }
    }
}

/// An application that was started and filled.
trait Load {
    /// Does the next operation and waits for its end.
    fn operate(&mut self) -> Result<(), String>;

    /// Does what it is told from outside; no operation follows.
    fn obey(&mut self, word: &str) -> Result<String, String> {
        Err(format!("nobody here knows what {word} is"))
    }
}

/// Starts the application, and reports on its operations until one fails.
///
/// # Errors
/// Why the application cannot be started, or what an operation met.
pub(crate) fn run(name: &str) -> Result<(), String> {
    let application = Application::named(name)?.ok_or("no application is named")?;
    let mut load: Box<dyn Load> = match application {
        Application::Redis => Box::new(redis::Redis::start()?),
        Application::Nginx => Box::new(nginx::Nginx::start()?),
        Application::Postgres => Box::new(postgres::Postgres::start()?),
        Application::Compile => Box::new(compile::Compile::start()?),
    };
    let mut output = std::io::stdout();
    let nobody_listens = |error| format!("nobody listens: {error}");
    let (sender, words) = mpsc::channel();
    thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    let mut told = None;
    let mut began = Instant::now();
    for number in 0_u64.. {
        let mut histogram = Histogram::default();
        let window = loop {
            let start = Instant::now();
            load.operate()?;
            let end = Instant::now();
            histogram.count((end - start).as_micros() as u64);
            told = words.try_recv().ok();
            if told.is_some() || end - began >= WINDOW {
                break end - began;
            }
        };
        began += window;
        let (length, classes) = (window.as_micros(), histogram.to_words());
        writeln!(output, "work {number} {length} {classes}").map_err(nobody_listens)?;
        if told.is_some() {
            break;
        }
    }
    for line in told.into_iter().chain(words) {
        let (token, word) = line.split_once(' ').unwrap_or((&line, ""));
        let answer = match load.obey(word) {
            Ok(answer) => format!("ok {answer}"),
            Err(problem) => format!("failed {}", problem.replace('\n', " ")),
        };
        writeln!(output, "told {token} {answer}").map_err(nobody_listens)?;
    }
    Ok(())
}

/// Starts a server, which says on the console what it has to say.
fn serve(command: &mut Command) -> Result<Child, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot run {name}: {error}"))
}

/// Runs a command to its end.
fn complete(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = serve(command)?
        .wait()
        .map_err(|error| format!("cannot wait for {name}: {error}"))?;
    status.success().then_some(()).ok_or(format!("{name} failed: {status}"))
}

/// Runs a command to its end and returns what it printed.
fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run {name}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let problem = || {
        format!(
            "{name} failed: {}: {said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
    };
    output.status.success().then(|| said.clone()).ok_or_else(problem)
}

/// Connects to a server's socket, as soon as it serves that.
fn connect(server: &mut Child, socket: &Path) -> Result<UnixStream, String> {
    let deadline = Instant::now() + START;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(format!("{}: {error}", socket.display())),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
        if let Ok(Some(status)) = server.try_wait() {
            return Err(format!("the server of {} ended: {status}", socket.display()));
        }
    }
}

fn broken(name: &'static str) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{name} does not answer: {error}")
}

/// How often is reported; short against a move of a second or two.
const WINDOW: Duration = Duration::from_millis(250);
/// A server that translates every instruction takes its time.
const START: Duration = Duration::from_secs(120);
