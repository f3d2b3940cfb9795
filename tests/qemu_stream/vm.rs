//! A QEMU process to test with, driven by its monitor, and a recorder of its migration.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::boot_sector::boot_sector;

/// How long QEMU may be silent.
const DEADLINE: Duration = Duration::from_secs(120);

/// A migration as it was on the wire, and what QEMU says about it.
pub(crate) struct Capture {
    pub(crate) main: Vec<u8>,
    /// multifd's channels.
    pub(crate) others: Vec<Vec<u8>>,
    pub(crate) normal: u64,
    pub(crate) zero: u64,
    /// Pages that were sent compressed and are not among `normal`.
    pub(crate) compressed: u64,
    pub(crate) syncs: u64,
}

/// A QEMU process with its monitor. Ended when dropped.
pub(crate) struct Vm {
    child: Child,
    monitor: BufReader<UnixStream>,
    /// The guest's serial port.
    serial: Option<UnixStream>,
    /// Events that came while something else was awaited.
    events: Vec<Value>,
    /// Connections that a migration makes.
    pub(crate) channels: usize,
    dir: TempDir,
}

impl Vm {
    pub(crate) fn start(qemu: &Path, machine: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("monitor")).unwrap();
        let child = Command::new(qemu)
            .current_dir(dir.path())
            .args([
                "-nodefaults",
                "-display",
                "none",
                "-accel",
                "tcg",
                "-chardev",
                "socket,id=monitor,path=monitor",
            ])
            .args(["-mon", "chardev=monitor,mode=control", "-machine", machine])
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut vm = Self {
            child,
            monitor: BufReader::new(accept(&listener)),
            serial: None,
            events: Vec::new(),
            channels: 1,
            dir,
        };
        vm.read();
        vm.execute("qmp_capabilities", json!({}));
        vm.set_capability("events");
        vm
    }

    /// A guest that writes a word to each of 128 pages, over and over. It runs when this returns.
    pub(crate) fn start_writing_guest(qemu: &Path, machine: &str) -> Self {
        let disk = tempfile::NamedTempFile::new().unwrap();
        fs::write(disk.path(), boot_sector()).unwrap();
        let serial_dir = tempfile::tempdir().unwrap();
        let path = serial_dir.path().join("serial");
        let listener = UnixListener::bind(&path).unwrap();
        let drive = format!("id=boot,file={},format=raw,readonly=on,if=none", disk.path().display());
        let chardev = format!("socket,id=serial,path={}", path.display());
        let disk_args = ["-drive", &drive, "-device", "virtio-blk-pci,drive=boot"];
        let serial_args = ["-chardev", &chardev, "-serial", "chardev:serial"];
        let args = [&["-m", "64"], &disk_args[..], &serial_args[..]].concat();
        let mut vm = Self::start(qemu, machine, &args);
        let mut serial = accept(&listener);
        let mut sign = [0];
        serial.read_exact(&mut sign).unwrap();
        assert_eq!(&sign, b"R");
        vm.serial = Some(serial);
        vm
    }

    pub(crate) fn migrate(&mut self) -> Capture {
        self.execute("migrate-set-parameters", json!({"max-bandwidth": 0}));
        self.migrate_until(|_| ())
    }

    /// Keeps a writing guest from converging until QEMU synchronised its dirty bitmap `syncs` times. A guest that gets no CPU meanwhile
    /// writes nothing and converges all the same.
    pub(crate) fn migrate_in_rounds(&mut self, syncs: u64) -> Capture {
        self.execute(
            "migrate-set-parameters",
            json!({"max-bandwidth": 1 << 20, "downtime-limit": 1}),
        );
        self.migrate_until(|vm| {
            vm.wait_for_pass(syncs);
            vm.execute(
                "migrate-set-parameters",
                json!({"max-bandwidth": 0, "downtime-limit": 10_000}),
            );
        })
    }

    /// Migrates to a recorder; `during` runs while the migration does.
    fn migrate_until(&mut self, during: impl FnOnce(&mut Self)) -> Capture {
        let listener = UnixListener::bind(self.dir.path().join("migration")).unwrap();
        let channels = self.channels;
        let recorder = thread::spawn(move || {
            let record = |mut stream: UnixStream| {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).map(|_| bytes)
            };
            let readers: Vec<_> = (0..channels)
                .map(|_| accept(&listener))
                .map(|stream| thread::spawn(move || record(stream)))
                .collect();
            readers
                .into_iter()
                .map(|reader| reader.join().unwrap().unwrap())
                .collect::<Vec<_>>()
        });
        self.execute("migrate", json!({"uri": "unix:migration"}));
        during(self);
        let end = self.wait("MIGRATION", |data| {
            matches!(data["status"].as_str(), Some("completed" | "failed"))
        });
        let info = self.execute("query-migrate", json!({}));
        assert_eq!(end["status"], "completed", "{info}");
        let streams = recorder.join().unwrap();
        let (mut main, others): (Vec<_>, Vec<_>) = streams.into_iter().partition(|bytes| bytes.starts_with(b"QEVM"));
        assert_eq!((main.len(), others.len()), (1, channels - 1));
        let count = |pointer| info.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
        Capture {
            main: main.remove(0),
            others,
            normal: count("/ram/normal"),
            zero: count("/ram/duplicate"),
            compressed: count("/xbzrle-cache/pages") + count("/compression/pages"),
            syncs: count("/ram/dirty-sync-count"),
        }
    }

    pub(crate) fn has_capability(&mut self, name: &str) -> bool {
        let all = self.execute("query-migrate-capabilities", json!({}));
        all.as_array()
            .unwrap()
            .iter()
            .any(|capability| capability["capability"] == name)
    }

    pub(crate) fn set_capability(&mut self, name: &str) {
        self.execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": name, "state": true}]}),
        );
    }

    #[track_caller]
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.monitor.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut answer = self.read();
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
            assert!(answer.get("event").is_some(), "{command}: {answer}");
            self.events.push(answer);
        }
    }

    /// Waits for a pass over memory, or for the end of the migration, whose event is left to be waited for.
    fn wait_for_pass(&mut self, pass: u64) {
        let is_pass =
            |event: &Value| event["event"] == "MIGRATION_PASS" && event["data"]["pass"].as_u64() >= Some(pass);
        let is_end = |event: &Value| matches!(event["data"]["status"].as_str(), Some("completed" | "failed"));
        loop {
            if let Some(position) = self.events.iter().position(is_pass) {
                self.events.drain(..=position);
                return;
            }
            if self.events.iter().any(is_end) {
                return;
            }
            let event = self.read();
            self.events.push(event);
        }
    }

    /// Waits for an event with such data.
    #[track_caller]
    fn wait(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            while !self.events.is_empty() {
                let mut event = self.events.remove(0);
                if event["event"] == name && wanted(&event["data"]) {
                    return event["data"].take();
                }
                let over = matches!(event["data"]["status"].as_str(), Some("completed" | "failed"));
                assert!(!over, "waited for {name}, and {event}");
            }
            let event = self.read();
            self.events.push(event);
        }
    }

    #[track_caller]
    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The next connection, with a deadline on everything read from it.
#[track_caller]
fn accept(listener: &UnixListener) -> UnixStream {
    rustix::event::poll(
        &mut [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)],
        Some(&DEADLINE.try_into().unwrap()),
    )
    .unwrap();
    listener.set_nonblocking(true).unwrap();
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("nobody connected within {DEADLINE:?}"),
        Err(error) => panic!("{error}"),
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// The QEMUs to test with. Where one cannot be had, says why and leaves it out.
pub(crate) fn qemus() -> &'static [PathBuf] {
    static QEMUS: OnceLock<Vec<PathBuf>> = OnceLock::new();
    QEMUS.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("netem-scripts/qemu");
        let mut found = Vec::new();
        for suite in ["stable", "backports"] {
            let got = Command::new(&script).arg(suite).stdin(Stdio::null()).output();
            match got {
                Ok(got) if got.status.success() => {
                    let path = PathBuf::from(String::from_utf8(got.stdout).unwrap().trim());
                    if !found.contains(&path) {
                        found.push(path);
                    }
                }
                Ok(got) => {
                    let reason = String::from_utf8_lossy(&got.stderr).into_owned();
                    say(&format!(
                        "skipped with QEMU from {suite}: {}",
                        reason.lines().last().unwrap_or_default()
                    ));
                }
                Err(error) => say(&format!(
                    "skipped with QEMU from {suite}: {}: {error}",
                    script.display()
                )),
            }
        }
        found
    })
}

/// Prints a line that the test harness does not swallow.
pub(crate) fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
