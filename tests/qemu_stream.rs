//! The parser on what real QEMU sends: the records give the stream back, and count as many pages as QEMU says it sent.
//!
//! Runs with the QEMU of the system's release and with the one from backports (`netem-scripts/qemu`), guests of SeaBIOS alone
//! or of a boot sector that writes to memory, under TCG.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use longhaul::proto::page::PAGE_SIZE;
use longhaul::proto::vmm_stream::qemu::QemuParser;
use longhaul::proto::vmm_stream::{PageKind, Record, StreamEvent, write_page_header};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long QEMU may be silent.
const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn every_page_of_a_machine_is_marked() {
    for qemu in qemus() {
        for (machine, memory, more) in [
            ("pc", "64", &["-S"][..]),
            (
                "pc",
                "256",
                &["-device", "VGA,romfile=", "-device", "virtio-net-pci,romfile="],
            ),
            ("q35", "128", &["-S", "-device", "virtio-balloon-pci"]),
            (
                "q35",
                "64",
                &["-smp", "2", "-device", "qemu-xhci", "-device", "virtio-serial-pci"],
            ),
        ] {
            let capture = Vm::start(qemu, machine, &[&["-m", memory], more].concat()).migrate();
            let marked = capture.check();
            assert!(
                marked
                    .machine()
                    .is_some_and(|name| name.starts_with(&format!("pc-{}", machine.replace("pc", ""))))
            );
            assert_eq!(
                (marked.pages, marked.zeros),
                (capture.normal, capture.zero),
                "{qemu:?} {machine}"
            );
            assert!(marked.description_len() > 1000);
        }
    }
}

#[test]
fn machines_without_footers_configuration_or_description_are_marked() {
    for qemu in qemus() {
        let no_footers = ["-global", "migration.send-section-footer=off"];
        // Without the description too: QEMU 10.0 trips over its own JSON writer otherwise.
        let no_configuration = ["-global", "migration.send-configuration=off"];
        for (machine, more) in [
            ("q35", no_footers.to_vec()),
            ("pc,suppress-vmdesc=on", no_configuration.to_vec()),
            ("pc-i440fx-2.9", vec![]),
        ] {
            let capture = Vm::start(qemu, machine, &[&["-m", "64"], &more[..]].concat()).migrate();
            let marked = capture.check();
            assert_eq!(
                (marked.pages, marked.zeros),
                (capture.normal, capture.zero),
                "{qemu:?} {machine}"
            );
            assert_eq!(marked.description_len() == 0, machine.contains("suppress-vmdesc"));
        }
    }
}

#[test]
fn rounds_of_a_writing_guest_are_marked_with_their_ends() {
    for qemu in qemus() {
        let mut vm = Vm::start_writing_guest(qemu, "pc");
        let capture = vm.migrate_in_rounds(5);
        let marked = capture.check();
        assert_eq!((marked.pages, marked.zeros), (capture.normal, capture.zero), "{qemu:?}");
        assert!(
            marked.most_sends >= 4,
            "pages were sent up to {} times",
            marked.most_sends
        );
        // A page comes at most once a pass, and each end is noticed.
        assert!(marked.round_ends + 1 >= marked.most_sends, "{} ends", marked.round_ends);
        assert!(
            marked.round_ends <= capture.syncs,
            "{} ends, {} syncs",
            marked.round_ends,
            capture.syncs
        );
    }
}

#[test]
fn early_device_sections_are_passed_over() {
    for qemu in qemus() {
        let args = [
            "-m",
            "64M,slots=1,maxmem=512M",
            "-object",
            "memory-backend-ram,id=m,size=64M",
        ];
        let device = ["-device", "virtio-mem-pci,memdev=m,id=vm,requested-size=32M"];
        let capture = Vm::start(qemu, "q35", &[&args[..], &device[..]].concat()).migrate();
        let marked = capture.check();
        // Since QEMU 8.0 they have no length; what follows RAM's START behind one is confirmed by two records that stay bytes.
        let early = capture.main.windows(23).any(|name| name == b"virtio-mem-device-early");
        let missed = capture.normal + capture.zero - marked.pages - marked.zeros;
        assert_eq!(missed, if early { 2 } else { 0 }, "{qemu:?}");
    }
}

#[test]
fn with_multifd_the_main_stream_passes() {
    for qemu in qemus() {
        let mut vm = Vm::start_writing_guest(qemu, "pc");
        vm.set_capability("multifd");
        vm.execute("migrate-set-parameters", json!({"multifd-channels": 2}));
        vm.channels = 3;
        let capture = vm.migrate_in_rounds(3);
        let marked = capture.check();
        assert_eq!(marked.pages, 0);
        for channel in &capture.others {
            let parsed = Marked::of(channel, usize::MAX);
            assert!(matches!(parsed.events[..], [StreamEvent::LostTrack { offset: 0, .. }]));
        }
    }
}

#[test]
fn compressed_pages_pass_as_bytes() {
    for qemu in qemus() {
        for capability in ["xbzrle", "compress"] {
            let mut vm = Vm::start_writing_guest(qemu, "q35");
            if !vm.has_capability(capability) {
                say(&format!("skipped: {} has no {capability}", qemu.display()));
                continue;
            }
            vm.set_capability(capability);
            let capture = vm.migrate_in_rounds(5);
            let marked = capture.check();
            assert!(capture.compressed > 0, "{capability} compressed nothing");
            assert_eq!(marked.pages, capture.normal, "{qemu:?} {capability}");
            if capability == "xbzrle" {
                assert_eq!(marked.zeros, capture.zero, "{qemu:?}");
            } else {
                // QEMU counts a zero page again whenever it collects from the thread that found it.
                assert!(marked.zeros <= capture.zero, "{qemu:?}");
            }
        }
    }
}

/// A change to a captured stream. Places are fractions of its length, in 2^-32.
#[derive(Clone, Debug)]
enum Mutation {
    Flip(u32, u8),
    Truncate(u32),
    Insert(u32, Vec<u8>),
    Remove(u32, usize),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let place = |at: u32| ((bytes.len() as u64 * u64::from(at)) >> 32) as usize;
        match self {
            Self::Flip(at, bits) => {
                let at = place(*at);
                bytes[at] ^= bits;
            }
            Self::Truncate(at) => bytes.truncate(place(*at).max(1)),
            Self::Insert(at, more) => {
                let at = place(*at);
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Remove(at, len) => {
                let at = place(*at).max(1);
                let end = bytes.len().min(at + len);
                bytes.drain(at..end);
            }
        }
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    // Half of the changes hit the headers at the start, where a stream of megabytes has most of its structure.
    let at = || prop_oneof![any::<u32>(), 0u32..1 << 20];
    prop_oneof![
        (at(), 1u8..).prop_map(|(at, bits)| Mutation::Flip(at, bits)),
        at().prop_map(Mutation::Truncate),
        (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, more)| Mutation::Insert(at, more)),
        (at(), 1usize..5000).prop_map(|(at, len)| Mutation::Remove(at, len)),
    ]
}

#[test]
fn no_damage_to_a_real_stream_costs_a_byte() {
    for qemu in qemus() {
        let capture = Vm::start_writing_guest(qemu, "pc").migrate_in_rounds(3).main;
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(48));
        let input = (prop::collection::vec(mutation(), 1..6), 1usize..100_000);
        runner
            .run(&input, |(mutations, slice)| {
                let mut bytes = capture.clone();
                mutations.iter().for_each(|mutation| mutation.apply(&mut bytes));
                let (whole, sliced) = (Marked::of(&bytes, usize::MAX), Marked::of(&bytes, slice));
                prop_assert_eq!((whole.pages, whole.zeros), (sliced.pages, sliced.zeros));
                prop_assert_eq!(whole.events, sliced.events);
                Ok(())
            })
            .unwrap();
    }
}

/// What the parser made of a stream.
struct Marked {
    pages: u64,
    zeros: u64,
    /// How often the page was sent that was sent most often.
    most_sends: u64,
    round_ends: u64,
    events: Vec<StreamEvent>,
}

impl Marked {
    /// Parses `stream` as a gateway does, `slice` bytes at a time, and checks that the records give it back.
    #[track_caller]
    fn of(stream: &[u8], slice: usize) -> Self {
        let mut parser = QemuParser::default();
        let mut marked = Self {
            pages: 0,
            zeros: 0,
            most_sends: 0,
            round_ends: 0,
            events: Vec::new(),
        };
        let mut sends = std::collections::HashMap::new();
        let (mut records, mut rebuilt) = (Vec::new(), Vec::with_capacity(stream.len()));
        let (mut consumed, mut offered) = (0, 0usize);
        while offered < stream.len() {
            offered = stream.len().min(offered.saturating_add(slice));
            let end = offered == stream.len();
            records.clear();
            let took = parser.parse(&stream[consumed..offered], end, &mut records, &mut marked.events);
            for record in &records {
                let len = record.stream_len(parser.blocks());
                let (page, kind, content) = match *record {
                    Record::Bytes { .. } => {
                        rebuilt.extend_from_slice(&stream[consumed..consumed + len]);
                        consumed += len;
                        continue;
                    }
                    Record::Page(page) => (page, PageKind::Page, PAGE_SIZE),
                    Record::Zero(page) => (page, PageKind::Zero, 1),
                };
                match kind {
                    PageKind::Page => marked.pages += 1,
                    PageKind::Zero => marked.zeros += 1,
                }
                let count: &mut u64 = sends.entry(page.at).or_default();
                *count += 1;
                marked.most_sends = marked.most_sends.max(*count);
                let name = &parser.blocks()[usize::from(page.at.block)].name;
                write_page_header(page, kind, name, &mut rebuilt);
                rebuilt.extend_from_slice(&stream[consumed + len - content..consumed + len]);
                consumed += len;
            }
            assert!(took <= offered && offered - consumed <= QemuParser::MAX_PENDING);
        }
        assert!(rebuilt == stream, "the records do not give the stream back");
        marked.round_ends = marked
            .events
            .iter()
            .filter(|e| matches!(e, StreamEvent::RoundEnd { .. }))
            .count() as u64;
        marked
    }

    fn machine(&self) -> Option<&str> {
        self.events.iter().find_map(|event| match event {
            StreamEvent::Machine(name) => Some(name.as_str()),
            _ => None,
        })
    }

    fn description_len(&self) -> u32 {
        let len = |event: &StreamEvent| match *event {
            StreamEvent::Description { len, .. } => Some(len),
            _ => None,
        };
        self.events.iter().find_map(len).unwrap_or(0)
    }
}

/// A migration as it was on the wire, and what QEMU says about it.
struct Capture {
    main: Vec<u8>,
    /// multifd's channels.
    others: Vec<Vec<u8>>,
    normal: u64,
    zero: u64,
    /// Pages that were sent compressed and are not among `normal`.
    compressed: u64,
    syncs: u64,
}

impl Capture {
    /// Parses the main stream in two ways and checks what holds for every migration that worked.
    #[track_caller]
    fn check(&self) -> Marked {
        let marked = Marked::of(&self.main, usize::MAX);
        assert_eq!(marked.events, Marked::of(&self.main, 1500).events);
        let mut device_state = None;
        let mut eof = None;
        let mut end = None;
        for event in &marked.events {
            match *event {
                StreamEvent::LostTrack { offset, reason } => panic!("lost track at {offset}: {reason}"),
                StreamEvent::DeviceState { offset } => device_state = Some(offset),
                StreamEvent::StreamEof { offset } => (eof, end) = (Some(offset), Some(offset + 1)),
                StreamEvent::Description { offset, len } => end = Some(offset + u64::from(len)),
                _ => {}
            }
        }
        assert!(device_state.is_some() && device_state < eof, "{device_state:?} {eof:?}");
        assert_eq!(
            end,
            Some(self.main.len() as u64),
            "the stream ends with its description"
        );
        marked
    }
}

/// A QEMU process with its monitor. Ended when dropped.
struct Vm {
    child: Child,
    monitor: BufReader<UnixStream>,
    /// The guest's serial port.
    serial: Option<UnixStream>,
    /// Events that came while something else was awaited.
    events: Vec<Value>,
    /// Connections that a migration makes.
    channels: usize,
    dir: TempDir,
}

impl Vm {
    fn start(qemu: &Path, machine: &str, args: &[&str]) -> Self {
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
    fn start_writing_guest(qemu: &Path, machine: &str) -> Self {
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

    fn migrate(&mut self) -> Capture {
        self.execute("migrate-set-parameters", json!({"max-bandwidth": 0}));
        self.migrate_until(|_| ())
    }

    /// Keeps a writing guest from converging until QEMU synchronised its dirty bitmap `syncs` times.
    fn migrate_in_rounds(&mut self, syncs: u64) -> Capture {
        self.execute(
            "migrate-set-parameters",
            json!({"max-bandwidth": 1 << 20, "downtime-limit": 1}),
        );
        self.migrate_until(|vm| {
            vm.wait("MIGRATION_PASS", |data| data["pass"].as_u64() >= Some(syncs));
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

    fn has_capability(&mut self, name: &str) -> bool {
        let all = self.execute("query-migrate-capabilities", json!({}));
        all.as_array()
            .unwrap()
            .iter()
            .any(|capability| capability["capability"] == name)
    }

    fn set_capability(&mut self, name: &str) {
        self.execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": name, "state": true}]}),
        );
    }

    #[track_caller]
    fn execute(&mut self, command: &str, arguments: Value) -> Value {
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

/// Real-mode code at 0x7c00 that reports on COM1, then writes to every page from 0x10000 to 0x8ffff for ever.
///
/// It switches A20 in every pass, which changes nothing below 1 MiB but makes TCG flush its TLB: QEMU 7.2 misses writes
/// through entries that were there when it synchronised the dirty bitmap.
fn boot_sector() -> Vec<u8> {
    let code: &[&[u8]] = &[
        &[0xfa],                                     // cli
        &[0xba, 0xf8, 0x03, 0xb0, b'R', 0xee],       // mov dx, 0x3f8; mov al, 'R'; out dx, al
        &[0x31, 0xc9],                               // xor cx, cx
        &[0xe4, 0x92, 0x34, 0x02, 0xe6, 0x92],       // pass: in al, 0x92; xor al, 2; out 0x92, al
        &[0xbb, 0x00, 0x10],                         // mov bx, 0x1000
        &[0x8e, 0xc3],                               // segment: mov es, bx
        &[0x31, 0xff],                               // xor di, di
        &[0x26, 0x89, 0x0d, 0x26, 0xff, 0x45, 0x40], // page: mov es:[di], cx; inc word es:[di + 0x40]
        &[0x81, 0xc7, 0x00, 0x10, 0x75, 0xf3],       // add di, 0x1000; jnz page
        &[0x81, 0xc3, 0x00, 0x10],                   // add bx, 0x1000
        &[0x81, 0xfb, 0x00, 0x90, 0x75, 0xe5],       // cmp bx, 0x9000; jnz segment
        &[0x41, 0xeb, 0xd9],                         // inc cx; jmp pass
    ];
    let mut sector = code.concat();
    sector.resize(1 << 20, 0);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// The QEMUs to test with. Where one cannot be had, says why and leaves it out.
fn qemus() -> &'static [PathBuf] {
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
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
