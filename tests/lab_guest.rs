//! The lab's guest, really booted: it proves its own memory, finds damage, counts on across a migration, answers from outside, and runs
//! applications.
//!
//! Needs QEMU, and the network at the first run, for the kernel and the application; root for the guest's network. Without them a test prints
//! why it did nothing.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use longhaul::lab::guest::{GuestDials, GuestFiles, Image, Launch, Start, Workload};
use longhaul::lab::heartbeat::{Crossing, Heartbeat};
use longhaul::lab::network::{GUEST_ADDRESS, Network};
use longhaul::lab::prober::{Prober, monotonic};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

const PATIENCE: Duration = Duration::from_secs(120);

/// The guest's launch, or the reason for skipping.
fn small_guest() -> Option<Launch> {
    guest_with(Workload::None, GuestDials::small())
}

fn guest_with(application: Workload, dials: GuestDials) -> Option<Launch> {
    let launch = || -> Result<Launch, String> {
        let qemu = std::env::var("LONGHAUL_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned());
        let found = Command::new(&qemu).arg("--version").stdout(Stdio::null()).status();
        found.map_err(|error| format!("{qemu} cannot be run: {error}"))?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = match application {
            Workload::None => root.join("target/guest"),
            _ => root.join("target/guest-applications").join(application.name()),
        };
        let image = Image::build_with(&root.join("netem-scripts/guest"), &directory, application);
        let image = image.map_err(|error| error.to_string())?;
        Ok(Launch {
            qemu,
            ..Launch::new(image, dials.clone())
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
        Self::start_in(None, launch, files, start)
    }

    /// In a network namespace.
    fn start_in(namespace: Option<&str>, launch: &Launch, files: GuestFiles, start: Start) -> Self {
        let enter = namespace.map(|namespace| ["ip", "netns", "exec", namespace].map(str::to_owned));
        let argv: Vec<String> = enter
            .into_iter()
            .flatten()
            .chain(launch.command(&files, start))
            .collect();
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

/// The network namespaces of two sites, and the guest's network between them; removed at the end of the test.
struct Sites {
    namespaces: [String; 2],
    network: Network,
}

impl Sites {
    /// `None` where this process may not make them, which is said.
    async fn make(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: making network namespaces needs root");
            return None;
        }
        // Tests run at the same time, and links have at most eight characters before the dash.
        let name = format!("lg{name}{}", std::process::id() % 10_000);
        let namespaces = [format!("{name}-a"), format!("{name}-b")];
        let network = Network::named(&name, [&namespaces[0], &namespaces[1]]);
        let sites = Self { namespaces, network };
        for namespace in &sites.namespaces {
            ip(&["netns", "add", namespace]);
        }
        sites.network.up().await.unwrap();
        Some(sites)
    }

    /// Boots the guest at the first site, or has the second one wait for it.
    fn start(&self, site: usize, launch: &Launch, directory: &Path, start: Start) -> Qemu {
        let files = GuestFiles::named(directory, ["source", "destination"][site]).on_tap(self.network.taps()[site]);
        Qemu::start_in(Some(&self.namespaces[site]), launch, files, start)
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        for namespace in self
            .namespaces
            .iter()
            .map(String::as_str)
            .chain([self.network.client()])
        {
            ip(&["netns", "delete", namespace]);
        }
    }
}

fn ip(arguments: &[&str]) {
    assert!(
        Command::new("ip").args(arguments).status().unwrap().success(),
        "ip {arguments:?}"
    );
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

#[tokio::test]
async fn a_guest_of_zeroes_copies_and_random_bytes_is_as_exact_as_one_of_text() {
    let Some(mut launch) = small_guest() else { return };
    launch.dials.incompressible_percent = 20;
    launch.dials.zero_percent = 30;
    launch.dials.duplicated_percent = 40;
    let directory = tempfile::tempdir().unwrap();
    let qemu = Qemu::start(&launch, directory.path(), "vm", Start::Boot);
    let mut heartbeat = Heartbeat::connect(&qemu.files.heartbeat, PATIENCE).await.unwrap();
    let at_work = |heard: &longhaul::lab::heartbeat::Heard| {
        heard.last.is_some_and(|beat| beat.writes >= launch.dials.pages() / 100)
    };
    heartbeat
        .wait_for("some writes", PATIENCE, at_work)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", qemu.console()));
    let verified = heartbeat.verify(PATIENCE).await.unwrap();
    assert!(verified.is_intact(), "{verified:?}\n{}", qemu.console());

    // What the guest's memory holds, seen from outside: texts that are there eight times.
    let dump = directory.path().join("memory");
    let whole = json!({ "val": 0, "size": launch.dials.memory_mb << 20, "filename": dump });
    qmp(&qemu.files.qmp, "pmemsave", whole).await;
    let mut copies = std::collections::HashMap::<&[u8], usize>::new();
    let bytes = std::fs::read(&dump).unwrap();
    for page in bytes.chunks_exact(4096) {
        *copies.entry(page).or_default() += 1;
    }
    let duplicated: usize = copies.values().filter(|count| **count == 8).sum();
    let share = |percent: u64| (launch.dials.pages() * percent / 100) as usize;
    assert!(
        (share(35)..share(45)).contains(&duplicated),
        "{duplicated} pages have seven copies"
    );
}

#[tokio::test]
async fn a_pause_of_the_guest_is_a_gap_for_the_prober_and_its_session_survives() {
    let Some(mut launch) = small_guest() else { return };
    let Some(sites) = Sites::make("p").await else { return };
    launch.dials.address = Some(GUEST_ADDRESS);
    let directory = tempfile::tempdir().unwrap();
    let qemu = sites.start(0, &launch, directory.path(), Start::Boot);
    let mut prober = Prober::start(env!("CARGO_BIN_EXE_longhaul"), sites.network.client(), GUEST_ADDRESS).unwrap();
    prober
        .ready(PATIENCE)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", qemu.console()));

    let began = monotonic();
    qmp(&qemu.files.qmp, "stop", json!({})).await;
    let pause = Duration::from_millis(300);
    tokio::time::sleep(pause).await;
    qmp(&qemu.files.qmp, "cont", json!({})).await;
    let probed = prober.finish().await.unwrap();

    let pause = pause.as_secs_f64();
    assert!(probed.gap_seconds(began).unwrap() >= pause, "{probed:?}");
    assert!(probed.stall_seconds(began).unwrap() >= pause, "{probed:?}");
    assert!(probed.session.survived, "{probed:?}");
}

#[tokio::test]
async fn a_client_finds_the_guest_where_it_has_moved_to_and_its_session_goes_on() {
    let Some(mut launch) = small_guest() else { return };
    let Some(sites) = Sites::make("m").await else { return };
    launch.dials.address = Some(GUEST_ADDRESS);
    let directory = tempfile::tempdir().unwrap();
    let source = sites.start(0, &launch, directory.path(), Start::Boot);
    let destination = sites.start(1, &launch, directory.path(), Start::Receive);
    let mut prober = Prober::start(env!("CARGO_BIN_EXE_longhaul"), sites.network.client(), GUEST_ADDRESS).unwrap();
    prober
        .ready(PATIENCE)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", source.console()));
    let mut at_destination = Heartbeat::connect(&destination.files.heartbeat, PATIENCE)
        .await
        .unwrap();

    let began = monotonic();
    let address = json!({ "uri": format!("unix:{}", directory.path().join("migration").display()) });
    qmp(&destination.files.qmp, "migrate-incoming", address.clone()).await;
    qmp(&source.files.qmp, "migrate", address).await;
    at_destination.first(PATIENCE).await.unwrap();
    drop(source);
    let settled = |heard: &longhaul::lab::heartbeat::Heard| {
        let (first, last) = (
            heard.first.map(|beat| beat.sequence),
            heard.last.map(|beat| beat.sequence),
        );
        last.zip(first).is_some_and(|(last, first)| last >= first + 200)
    };
    at_destination
        .wait_for("a second of life", PATIENCE, settled)
        .await
        .unwrap();

    let probed = prober.finish().await.unwrap();
    assert!(probed.session.survived, "{probed:?}");
    assert!(probed.gaps.iter().all(|gap| !gap.is_open), "{probed:?}");
    println!(
        "gap {:?} s, stall {:?} s",
        probed.gap_seconds(began),
        probed.stall_seconds(began)
    );
}

#[tokio::test]
async fn an_application_in_the_guest_tells_how_much_it_does_before_during_and_after_a_move() {
    let dials = GuestDials::with_application(Workload::Redis);
    let Some(launch) = guest_with(Workload::Redis, dials) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let source = Qemu::start(&launch, directory.path(), "source", Start::Boot);
    let destination = Qemu::start(&launch, directory.path(), "destination", Start::Receive);
    let mut at_source = Heartbeat::connect(&source.files.heartbeat, PATIENCE).await.unwrap();
    let mut at_destination = Heartbeat::connect(&destination.files.heartbeat, PATIENCE)
        .await
        .unwrap();
    let has_worked = |heard: &longhaul::lab::heartbeat::Heard| heard.windows.iter().count() >= 4;
    at_source
        .wait_for("work of the application", PATIENCE, has_worked)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", source.console()));

    let command = tokio::time::Instant::now().into_std();
    let address = json!({ "uri": format!("unix:{}", directory.path().join("migration").display()) });
    qmp(&destination.files.qmp, "migrate-incoming", address.clone()).await;
    qmp(&source.files.qmp, "migrate", address).await;
    let arrival = at_destination.first(PATIENCE).await.unwrap().at;
    let heard = at_destination
        .wait_for("work after the move", PATIENCE, has_worked)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", destination.console()));

    let windows = at_source.heard().windows.joined(&heard.windows);
    let application = windows.around(launch.dials.application, command, arrival).unwrap();
    println!("{application:?}");
    for work in [application.before, application.during, application.after] {
        assert!(work.operations_per_second > 0.0 && work.p99_seconds > 0.0, "{work:?}");
    }
    assert!(at_destination.verify(PATIENCE).await.unwrap().is_intact());
}
