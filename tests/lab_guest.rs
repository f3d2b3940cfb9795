//! The lab's guest, really booted: it proves its own memory, finds damage, and counts on across a migration.
//!
//! Needs QEMU, and the network at the first run, for the kernel. Without them a test prints why it did nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use longhaul::lab::guest::{GuestDials, GuestFiles, Image, Launch, Start};
use longhaul::lab::heartbeat::{Crossing, Heartbeat};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(120);

/// The guest's launch, or the reason for skipping.
fn small_guest() -> Option<Launch> {
    let launch = || -> Result<Launch, String> {
        let qemu = std::env::var("LONGHAUL_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        let found = Command::new(&qemu).arg("--version").stdout(Stdio::null()).status();
        found.map_err(|error| format!("{qemu} cannot be run: {error}"))?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let image = Image::build(&root.join("netem-scripts/guest"), &root.join("target/guest"));
        let image = image.map_err(|error| error.to_string())?;
        Ok(Launch {
            qemu,
            ..Launch::new(image, GuestDials::small())
        })
    };
    launch().inspect_err(|reason| println!("skipped: {reason}")).ok()
}

/// A QEMU that is killed at the end of the test.
struct Qemu {
    child: Child,
    files: GuestFiles,
}

impl Qemu {
    fn start(launch: &Launch, directory: &Path, name: &str, start: Start) -> Self {
        let files = GuestFiles::named(directory, name);
        let argv = launch.command(&files, start);
        let child = Command::new(&argv[0])
            .args(&argv[1..])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, files }
    }

    fn console(&self) -> String {
        std::fs::read_to_string(&self.files.console).unwrap_or_default()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs one QMP command on a connection of its own.
async fn qmp(socket: &PathBuf, command: &str, arguments: Value) -> Value {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let mut answer = Value::Null;
    for (command, arguments) in [("qmp_capabilities", json!({})), (command, arguments)] {
        let request = json!({ "execute": command, "arguments": arguments });
        writer.write_all(format!("{request}\n").as_bytes()).await.unwrap();
        answer = loop {
            let line = lines
                .next_line()
                .await
                .unwrap()
                .expect("QEMU answers before it hangs up");
            let value: Value = serde_json::from_str(&line).unwrap();
            assert!(value.get("error").is_none(), "{command}: {value}");
            if let Some(value) = value.get("return") {
                break value.clone();
            }
        };
    }
    answer
}

#[tokio::test]
async fn the_guest_boots_changes_its_memory_and_finds_it_intact() {
    let Some(launch) = small_guest() else { return };
    let directory = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(&launch, directory.path(), "vm", Start::Boot);
    let mut heartbeat = Heartbeat::connect(&qemu.files.heartbeat, PATIENCE).await.unwrap();

    let first = heartbeat
        .first(PATIENCE)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", qemu.console()));
    assert_eq!(first.sequence, 0);
    let at_work = |writes: u64| {
        move |heard: &longhaul::lab::heartbeat::Heard| heard.last.is_some_and(|beat| beat.writes >= writes)
    };
    heartbeat.wait_for("some writes", PATIENCE, at_work(50)).await.unwrap();
    let verified = heartbeat.verify(PATIENCE).await.unwrap();
    assert_eq!(verified.pages, launch.dials.pages());
    assert!(verified.is_intact(), "{verified:?}\n{}", qemu.console());
    assert!(verified.writes >= 50);
    let heard = heartbeat.heard();
    assert_eq!(
        (heard.ready, heard.out_of_order, heard.fragments),
        (Some(launch.dials.pages()), 0, 0)
    );

    drop(qemu);
    assert!(heartbeat.ended(PATIENCE).await.unwrap().ended);
}

#[tokio::test]
async fn the_guest_goes_on_where_it_was_stopped_when_it_is_migrated() {
    let Some(launch) = small_guest() else { return };
    let directory = tempfile::tempdir().unwrap();
    let source = Qemu::start(&launch, directory.path(), "source", Start::Boot);
    let mut at_source = Heartbeat::connect(&source.files.heartbeat, PATIENCE).await.unwrap();
    at_source
        .first(PATIENCE)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", source.console()));

    let destination = Qemu::start(&launch, directory.path(), "destination", Start::Receive);
    let mut at_destination = Heartbeat::connect(&destination.files.heartbeat, PATIENCE)
        .await
        .unwrap();
    let address = json!({ "uri": format!("unix:{}", directory.path().join("migration").display()) });
    qmp(&destination.files.qmp, "migrate-incoming", address.clone()).await;
    assert_eq!(
        at_destination.heard().first,
        None,
        "a guest that has not arrived is not heard"
    );
    qmp(&source.files.qmp, "migrate", address).await;

    let first = at_destination.first(PATIENCE).await.unwrap();
    let crossing = Crossing::between(at_source.heard().last.unwrap(), first).expect("the source was heard last");
    assert!(crossing.is_seamless(), "{crossing:?}");
    let verified = at_destination.verify(PATIENCE).await.unwrap();
    assert!(verified.is_intact(), "{verified:?}\n{}", destination.console());
    assert_eq!(verified.pages, launch.dials.pages());
}

/// What is the proof worth? Memory is changed behind the guest's back, and the guest must say so.
#[tokio::test]
async fn the_guest_finds_a_page_that_was_changed_behind_its_back() {
    let Some(mut launch) = small_guest() else { return };
    // Nobody but the test writes, so that the page it finds in the dump is still the guest's when it is changed.
    launch.dials.pages_per_second = 0;
    let directory = tempfile::tempdir().unwrap();
    let memory = directory.path().join("memory");
    let mut argv_launch = launch.clone();
    argv_launch.machine = "pc,memory-backend=ram".to_owned();
    let files = GuestFiles::named(directory.path(), "vm");
    let mut argv = argv_launch.command(&files, Start::Boot);
    argv.push("-object".to_owned());
    let size = argv[argv.iter().position(|argument| argument == "-m").unwrap() + 1].clone();
    argv.push(format!(
        "memory-backend-file,id=ram,size={size},share=on,mem-path={}",
        memory.display()
    ));
    let child = Command::new(&argv[0])
        .args(&argv[1..])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let qemu = Qemu { child, files };
    let mut heartbeat = Heartbeat::connect(&qemu.files.heartbeat, PATIENCE).await.unwrap();
    heartbeat
        .first(PATIENCE)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", qemu.console()));
    assert!(heartbeat.verify(PATIENCE).await.unwrap().is_intact());

    // Page 7 of the working set is the page that starts with the words 7 and 0 and holds a checksum behind them.
    let bytes = std::fs::read(&memory).unwrap();
    let word = |page: &[u8], place: usize| u64::from_le_bytes(page[place * 8..][..8].try_into().unwrap());
    let is_seventh = |page: &[u8]| {
        word(page, 0) == 7 && word(page, 1) == 0 && word(page, 2) > u64::from(u32::MAX) && word(page, 500) != 0
    };
    let places: Vec<usize> = bytes
        .chunks_exact(4096)
        .enumerate()
        .filter(|(_, page)| is_seventh(page))
        .map(|(place, _)| place)
        .collect();
    assert_eq!(places.len(), 1, "the page is to be found in memory once");
    let place = places[0] as u64 * 4096 + 4000;
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[bytes[place as usize] ^ 1], place).unwrap();

    let verified = heartbeat.verify(PATIENCE).await.unwrap();
    assert_eq!(verified.bad, 1, "{verified:?}\n{}", qemu.console());
    assert!(!verified.is_intact());
}
