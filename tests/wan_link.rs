//! `netem-scripts/link` with real network namespaces, TUN devices and traffic, by the emulator's backend.
//!
//! Each test has a link of its own. Without root, namespaces or /dev/net/tun they say why they skip.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use longhaul::wan::{LinkStats, Site, enter_namespace};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;

/// A link under a name that no other test and no other run of the tests has.
struct TestLink {
    name: String,
    directory: TempDir,
}

impl TestLink {
    /// A link that is not up yet; nothing where this machine cannot have one.
    fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let reason = if !rustix::process::geteuid().is_root() {
            "it needs root for network namespaces"
        } else if !Path::new("/dev/net/tun").exists() {
            "/dev/net/tun is missing"
        } else if !Command::new("ip")
            .args(["netns", "list"])
            .output()
            .is_ok_and(|output| output.status.success())
        {
            "ip netns does not work (Debian package iproute2, kernel with network namespaces)"
        } else {
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("t{number}x{:x}", std::process::id() % 0xf_ffff);
            return Some(Self {
                name,
                directory: tempfile::tempdir().unwrap(),
            });
        };
        eprintln!("skipped: {reason}");
        None
    }

    /// A link with this profile, up.
    #[track_caller]
    fn up(profile: &str) -> Option<Self> {
        let link = Self::new()?;
        let output = link.try_up(profile, &[]);
        assert!(output.status.success(), "{}", text(&output));
        Some(link)
    }

    fn try_up(&self, profile: &str, arguments: &[&str]) -> Output {
        let path = self.directory.path().join("test.toml");
        std::fs::write(&path, profile).unwrap();
        let mut all = vec!["--backend", "emulator", "--profile", path.to_str().unwrap()];
        all.extend(arguments);
        self.script("up", &all)
    }

    fn command(&self, verb: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("netem-scripts/link"));
        command
            .arg(verb)
            .args(["--name", &self.name])
            .args(arguments)
            .env("LONGHAUL_BIN", env!("CARGO_BIN_EXE_longhaul"));
        command
    }

    fn script(&self, verb: &str, arguments: &[&str]) -> Output {
        self.command(verb, arguments).output().unwrap()
    }

    /// Runs the script, which must succeed, and returns what it prints.
    #[track_caller]
    fn print(&self, verb: &str, arguments: &[&str]) -> String {
        let output = self.script(verb, arguments);
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn show(&self) -> LinkStats {
        serde_json::from_str(&self.print("show", &[])).unwrap()
    }

    fn site(&self, site: Site) -> String {
        match site {
            Site::A => format!("{}-a", self.name),
            Site::B => format!("{}-b", self.name),
        }
    }

    fn state(&self) -> PathBuf {
        Path::new("/run/longhaul-link").join(&self.name)
    }

    fn emulator(&self) -> Pid {
        let text = std::fs::read_to_string(self.state().join("pid")).unwrap();
        Pid::from_raw(text.split_whitespace().next().unwrap().parse().unwrap()).unwrap()
    }

    /// What is left of the link on this machine.
    fn remains(&self) -> Vec<PathBuf> {
        let namespaces = ["a", "b", "wan"].map(|end| Path::new("/run/netns").join(format!("{}-{end}", self.name)));
        namespaces
            .into_iter()
            .chain([self.state()])
            .filter(|path| path.exists())
            .collect()
    }

    /// Loss and times, milliseconds, of some pings from A to B; nothing where ping is not installed.
    fn ping(&self, count: u32) -> Option<(u32, Vec<f64>)> {
        let output = Command::new("ip")
            .args([
                "netns",
                "exec",
                &self.site(Site::A),
                "ping",
                "-n",
                "-i",
                "0.05",
                "-W",
                "1",
                "-c",
                &count.to_string(),
            ])
            .arg(Site::B.address().to_string())
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        let text = text(&output);
        if text.contains("exec of \"ping\" failed") {
            eprintln!("skipped: ping is missing (Debian package iputils-ping)");
            return None;
        }
        let times = text
            .lines()
            .filter_map(|line| line.split_once("time=")?.1.strip_suffix(" ms")?.parse().ok());
        let times: Vec<f64> = times.collect();
        Some((count - times.len() as u32, times))
    }
}

impl Drop for TestLink {
    fn drop(&mut self) {
        let output = self.script("down", &[]);
        if !std::thread::panicking() {
            assert!(output.status.success(), "{}", text(&output));
            assert_eq!(self.remains(), Vec::<PathBuf>::new());
        }
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// Waits until a process has ended.
#[track_caller]
fn wait_for_end(process: Pid) {
    // Gone already is as good.
    let Ok(process) = pidfd_open(process, PidfdFlags::empty()) else {
        return;
    };
    let mut events = [PollFd::new(&process, PollFlags::IN)];
    let deadline = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(
        rustix::event::poll(&mut events, Some(&deadline)),
        Ok(1),
        "it still runs"
    );
}

/// Sends `data` by TCP from a thread in one namespace to one in another, and returns what arrives.
#[track_caller]
fn transfer(link: &TestLink, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    let (ready, address) = mpsc::channel();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            enter_namespace(&link.site(Site::B)).unwrap();
            let listener = TcpListener::bind(to).unwrap();
            ready.send(listener.local_addr().unwrap()).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let mut arrived = Vec::new();
            stream.read_to_end(&mut arrived).unwrap();
            arrived
        });
        let sender = scope.spawn(move || {
            enter_namespace(&link.site(Site::A)).unwrap();
            TcpStream::connect(address.recv().unwrap())
                .unwrap()
                .write_all(data)
                .unwrap();
        });
        sender.join().unwrap();
        receiver.join().unwrap()
    })
}

/// What the probe says of the link.
#[track_caller]
fn probe(link: &TestLink, arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .args(["wan-emulator", "probe", "--name", &link.name])
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

const FAST: &str = "rtt = '4ms'\nrate = '200mbit'\n";

#[test]
fn a_ping_across_150_ms_takes_150_ms() {
    let Some(link) = TestLink::up("rtt = '150ms'\nrate = '1gbit'") else {
        return;
    };
    let Some((lost, times)) = link.ping(20) else { return };
    assert_eq!(lost, 0);
    let best = times.iter().copied().fold(f64::INFINITY, f64::min);
    // Never earlier; the best of twenty is late only where the machine does nothing else for a second.
    assert!((149.98..160.0).contains(&best), "{times:?}");
}

#[test]
fn tcp_arrives_whole_across_loss_by_both_ip_versions() {
    let Some(link) = TestLink::up(&format!("{FAST}loss = '1%'")) else {
        return;
    };
    let data: Vec<u8> = (0..2_000_000_u32)
        .flat_map(|number| blake3::hash(&number.to_le_bytes()).as_bytes()[..2].to_vec())
        .collect();
    for address in [
        SocketAddr::from((Site::B.address(), 0)),
        SocketAddr::from((Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2), 0)),
    ] {
        let arrived = transfer(&link, address, &data);
        assert_eq!(
            blake3::hash(&arrived),
            blake3::hash(&data),
            "{} of {} bytes by {address}",
            arrived.len(),
            data.len()
        );
    }
    let stats = link.show();
    for direction in [stats.ab, stats.ba] {
        let drops = direction.dropped;
        let dropped = drops.loss.bytes.unwrap() + drops.queue.bytes.unwrap() + drops.egress.bytes.unwrap();
        assert_eq!(
            direction.offered.bytes,
            direction.delivered.bytes + dropped + direction.in_flight_bytes,
            "{direction:?}"
        );
        assert_eq!(
            (drops.egress.packets, drops.overrun.packets, drops.ingress.packets),
            (0, 0, 0),
            "{direction:?}"
        );
    }
    assert!(stats.ab.dropped.loss.packets > 10, "{stats:?}");
    // 8 MB of payload, in packets of at most 1448 bytes of it with 52 of headers.
    assert!(
        stats.ab.offered.bytes > data.len() as u64 * 2 * 1500 / 1448,
        "{stats:?}"
    );
    assert_eq!(
        stats.ab.offered.packets.div_ceil(1000),
        stats.ab.offered.bytes.div_ceil(1_500_000),
        "full packets: {stats:?}"
    );
}

#[test]
fn a_train_of_ten_datagrams_loses_single_ones() {
    let Some(link) = TestLink::up(&format!("{FAST}loss = '5%'")) else {
        return;
    };
    let report = probe(&link, &["--rate", "40mbit", "--segments", "10", "--duration", "2s"]);
    let number = |key: &str| report[key].as_u64().unwrap();
    // 6 610 datagrams: 330 lost, of which four deviations are 71.
    assert!((259..=401).contains(&number("lost")), "{report}");
    let run = number("lost") as f64 / number("loss_runs") as f64;
    assert!(
        (1.0..1.2).contains(&run),
        "1 / (1 - 0.05) expected, a lost train would be 10: {report}"
    );
    assert_eq!(
        link.show().ab.dropped.loss.packets,
        number("lost"),
        "nothing else was lost"
    );
}

#[test]
fn the_link_obeys_while_it_carries_packets() {
    let Some(link) = TestLink::up(FAST) else { return };
    let Some((lost, _)) = link.ping(3) else { return };
    assert_eq!(lost, 0);
    assert_eq!(link.print("ask", &["set", "ab.loss=100%"]).trim(), r#"{"ok":true}"#);
    assert_eq!(link.ping(3).unwrap().0, 3);
    assert_eq!(link.show().ab.dropped.loss.packets, 3);
    link.print("ask", &["set", "loss=0%"]);
    link.print("ask", &["down", "ba", "3600s"]);
    assert_eq!(link.ping(3).unwrap().0, 3);
    assert_eq!(link.show().ba.dropped.outage.packets, 3);
    link.print("ask", &["up"]);
    link.print("ask", &["set", "delay=50ms"]);
    let (lost, times) = link.ping(3).unwrap();
    assert!(lost == 0 && times.iter().all(|time| *time >= 99.98), "{times:?}");
    let refused = link.script("ask", &["set", "loss=2"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("0.1%"), "{}", text(&refused));
    let too_much = link.script("ask", &["set", "delay=60s"]);
    assert!(
        too_much.status.code() == Some(1) && text(&too_much).contains("room"),
        "{}",
        text(&too_much)
    );
}

#[test]
fn check_tells_a_link_that_is_off() {
    let Some(link) = TestLink::up("rtt = '20ms'\nrate = '20mbit'") else {
        return;
    };
    link.print("ask", &["set", "ab.delay=15ms"]);
    let output = link.script("check", &["--json", "--duration", "0.5s"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)));
    let rtt = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .find(|finding| finding["measure"] == "RTT, p50")
        .unwrap();
    assert_eq!((&rtt["ok"], &report["ok"]), (&Value::Bool(false), &Value::Bool(false)));
    assert!(rtt["measured"].as_f64().unwrap() >= 24.98, "{rtt}");
    assert!(
        rtt["beside"]["measured"].as_f64().unwrap() >= 24.98,
        "ping sees it too: {rtt}"
    );
    // A machine that was too busy is the reason before the link is.
    let reasons = report["refused"]["off"]
        .as_array()
        .or(report["refused"]["starved"].as_array());
    assert!(reasons.is_some_and(|reasons| !reasons.is_empty()), "{report}");
}

#[test]
fn copies_and_overtaking_of_single_datagrams_arrive_and_are_counted() {
    let Some(link) = TestLink::up(&format!("{FAST}duplication = '5%'\nreordering = '5%'")) else {
        return;
    };
    let report = probe(&link, &["--rate", "40mbit", "--segments", "10", "--duration", "2s"]);
    let number = |key: &str| report[key].as_u64().unwrap();
    let stats = link.show();
    // 5 % of 6 610: four deviations are 71.
    for counted in [stats.ab.duplicated.unwrap(), stats.ab.overtaking.unwrap()] {
        assert!((259..=420).contains(&counted.packets), "{stats:?}");
    }
    assert_eq!(stats.ab.duplicated.unwrap().packets, number("duplicates"), "{report}");
    assert_eq!(number("lost"), 0, "{report}");
    // One at the end of a train may have nothing before it that is still on its way.
    let overtook = number("overtook");
    assert!(
        overtook > 200 && overtook <= stats.ab.overtaking.unwrap().packets,
        "{report}"
    );
    let delivered = stats.ab.delivered.packets;
    assert_eq!(delivered, stats.ab.offered.packets + number("duplicates"), "{stats:?}");
}

#[test]
fn a_script_loses_the_datagrams_it_names() {
    let Some(link) = TestLink::up(&format!("{FAST}lose = '2, 4-5'")) else {
        return;
    };
    let Some((lost, times)) = link.ping(6) else { return };
    // Requests 2, 4 and 5; and of the answers to 1, 3 and 6 the second.
    assert_eq!((lost, times.len()), (4, 2));
    let stats = link.show();
    assert_eq!(
        (stats.ab.dropped.script.packets, stats.ba.dropped.script.packets),
        (3, 1)
    );
}

/// What `set` or `play` printed: one line for each step.
fn steps(printed: &str) -> Vec<String> {
    let line = |line: &str| {
        serde_json::from_str::<Value>(line).unwrap()["did"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    printed.lines().map(line).collect()
}

#[test]
fn a_time_line_is_played_to_its_end_and_leaves_what_is_for_good() {
    let events = "[[event]]\nat = '0.2s'\nkind = 'rate'\nto = '50mbit'\n\
                  [[event]]\nat = '0.1s'\nkind = 'cut'\nfor = '0.2s'\ndirection = 'ab'\n\
                  [[event]]\nat = '0.4s'\nkind = 'rtt'\nto = '600ms'\nfor = '0.1s'\n\
                  [[event]]\nat = '0.6s'\nkind = 'address'\nto = '10.77.0.11'\n";
    let Some(link) = TestLink::up(&format!("{FAST}{events}")) else {
        return;
    };
    let settings = || -> Value { serde_json::from_str(&link.print("ask", &["settings"])).unwrap() };
    let before = settings();
    let played = steps(&link.print("play", &[]));
    assert_eq!(
        played,
        [
            "cut ab for 200ms",
            "rate 50mbit both",
            "end of the cut ab",
            "delay 300ms both",
            "delay 2ms ab",
            "delay 2ms ba",
            "address of site A 10.77.0.11"
        ]
    );
    let mut expected = before;
    for direction in expected.as_array_mut().unwrap() {
        direction["rate"] = (50_000_000 / 8).into();
    }
    assert_eq!(settings(), expected);
    let output = Command::new("ip")
        .args(["-n", &link.site(Site::A), "-4", "-o", "address", "show", "dev", "wan0"])
        .output()
        .unwrap();
    let addresses = text(&output);
    assert!(
        addresses.contains("10.77.0.11/24") && !addresses.contains("10.77.0.1/24"),
        "{addresses}"
    );
    if let Some((lost, _)) = link.ping(3) {
        assert_eq!(lost, 0, "the new address is reached");
    }
    // The probe goes by the new address too.
    let report = probe(&link, &["--rate", "10mbit", "--duration", "0.2s", "--from", "b"]);
    assert_eq!(report["lost"], 0);
}

#[test]
fn a_change_for_a_time_is_taken_back_when_it_is_stopped() {
    let Some(link) = TestLink::up(FAST) else { return };
    let Some((lost, _)) = link.ping(3) else { return };
    assert_eq!(lost, 0);
    for (change, done) in [
        (["--cut", "3600s", "--direction", "ba"].as_slice(), "cut ba for 3600s"),
        (
            &["--loss", "100%", "--for", "3600s", "--direction", "ba"],
            "loss 100% ba",
        ),
    ] {
        let mut child = link.command("set", change).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        reader.read_line(&mut line).unwrap();
        assert_eq!(steps(&line), [done]);
        assert_eq!(link.ping(3).unwrap().0, 3, "{done}");
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1), "{done}");
        assert_eq!(link.ping(3).unwrap().0, 0, "after {done}");
    }
    let dropped = link.show().ba.dropped;
    assert_eq!((dropped.outage.packets, dropped.loss.packets), (3, 3));
}

#[test]
fn a_change_for_good_is_made_when_set_returns() {
    let Some(link) = TestLink::up(FAST) else { return };
    let done = steps(&link.print("set", &["--mtu", "1300", "--lose", "2", "--direction", "ab"]));
    assert_eq!(done, ["lose ab 2 datagrams", "mtu 1300 ab"]);
    let Some((lost, _)) = link.ping(5) else { return };
    assert_eq!(lost, 2);
    assert_eq!(link.show().ab.dropped.script.packets, 2);
    let settings: Value = serde_json::from_str(&link.print("ask", &["settings"])).unwrap();
    assert_eq!(
        (&settings[0]["mtu_bytes"], &settings[1]["mtu_bytes"]),
        (&1300.into(), &1500.into())
    );
}

#[test]
fn all_that_is_wrong_with_a_change_is_said_at_once_and_nothing_is_changed() {
    let Some(link) = TestLink::up(FAST) else { return };
    let before = link.print("ask", &["settings"]);
    let refused = link.script("set", &["--rate", "fast", "--cut", "5", "--mtu", "1400"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    for part in ["--rate.to", "--cut.for"] {
        assert!(text(&refused).contains(part), "{}", text(&refused));
    }
    let nothing = link.script("set", &[]);
    assert!(
        nothing.status.code() == Some(2) && text(&nothing).contains("--cut 5s"),
        "{}",
        text(&nothing)
    );
    let no_events = link.script("play", &[]);
    assert!(
        no_events.status.code() == Some(2) && text(&no_events).contains("[[event]]"),
        "{}",
        text(&no_events)
    );
    // Beyond the memory that the emulator took.
    let too_much = link.script("set", &["--rtt", "60s"]);
    assert!(
        too_much.status.code() == Some(2) && text(&too_much).contains("room"),
        "{}",
        text(&too_much)
    );
    assert_eq!(link.print("ask", &["settings"]), before);
}

#[test]
fn two_links_are_up_at_once_and_go_one_by_one() {
    let Some(one) = TestLink::up(FAST) else { return };
    let Some(other) = TestLink::up("rtt = '30ms'\nrate = '100mbit'") else {
        return;
    };
    assert_eq!(one.show().profile, "test");
    assert!(one.script("down", &[]).status.success());
    assert_eq!(one.remains(), Vec::<PathBuf>::new());
    if let Some((lost, times)) = other.ping(3) {
        assert!(lost == 0 && times.iter().all(|time| *time >= 29.98), "{times:?}");
    }
}

#[test]
fn a_link_is_gone_after_down_also_when_its_emulator_was_killed() {
    let Some(link) = TestLink::up(FAST) else { return };
    let emulator = link.emulator();
    assert!(link.script("down", &[]).status.success());
    wait_for_end(emulator);
    assert_eq!(link.remains(), Vec::<PathBuf>::new());
    assert!(link.script("down", &[]).status.success(), "twice is no error");

    let output = link.try_up(FAST, &[]);
    assert!(output.status.success(), "{}", text(&output));
    kill_process(link.emulator(), Signal::KILL).unwrap();
    wait_for_end(link.emulator());
    assert_eq!(link.script("show", &[]).status.code(), Some(2));
    assert!(link.script("down", &[]).status.success());
    assert_eq!(link.remains(), Vec::<PathBuf>::new());
}

#[test]
fn sigusr1_and_sigterm_print_what_was_carried() {
    let Some(link) = TestLink::up(FAST) else { return };
    if link.ping(3).is_none() {
        return;
    }
    let emulator = link.emulator();
    let log = || std::fs::read_to_string(link.state().join("log")).unwrap();
    kill_process(emulator, Signal::USR1).unwrap();
    // Each look takes the emulator's own thread one round further.
    assert!(
        (0..1000).any(|_| link.show().ab.offered.packets == 3 && !log().is_empty()),
        "no line after SIGUSR1"
    );
    kill_process(emulator, Signal::TERM).unwrap();
    wait_for_end(emulator);
    let log = log();
    let lines: Vec<LinkStats> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "{log}");
    for stats in lines {
        assert_eq!(
            (stats.ab.delivered.packets, stats.ba.delivered.packets),
            (3, 3),
            "{log}"
        );
    }
}

#[test]
fn up_that_fails_leaves_nothing_and_touches_nothing_else() {
    let Some(link) = TestLink::new() else { return };
    let output = link.try_up("rtt = '4ms'\nspeed = 'fast'", &[]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("speed"), "{}", text(&output));
    assert_eq!(link.remains(), Vec::<PathBuf>::new());

    // An emulator that ends at its start.
    let wrapper = link.directory.path().join("longhaul");
    let real = env!("CARGO_BIN_EXE_longhaul");
    std::fs::write(
        &wrapper,
        format!("#!/bin/sh\n[ \"$2\" != run ] || {{ echo no luck; exit 1; }}\nexec {real} \"$@\"\n"),
    )
    .unwrap();
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let profile = link.directory.path().join("test.toml");
    std::fs::write(&profile, FAST).unwrap();
    let arguments = ["--backend", "emulator", "--profile", profile.to_str().unwrap()];
    let output = link
        .command("up", &arguments)
        .env("LONGHAUL_BIN", &wrapper)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("no luck"), "{}", text(&output));
    assert_eq!(link.remains(), Vec::<PathBuf>::new());

    // A namespace of somebody else.
    let foreign = link.site(Site::B);
    assert!(
        Command::new("ip")
            .args(["netns", "add", &foreign])
            .status()
            .unwrap()
            .success()
    );
    let output = link.try_up(FAST, &[]);
    let remains = link.remains();
    assert!(
        Command::new("ip")
            .args(["netns", "delete", &foreign])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert_eq!(remains, [Path::new("/run/netns").join(foreign)]);
}

#[test]
fn a_second_link_of_the_same_name_is_refused_and_the_first_lives() {
    let Some(link) = TestLink::up(FAST) else { return };
    let output = link.try_up(FAST, &[]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("up already"), "{}", text(&output));
    assert_eq!(link.show().fault, None);
}

#[test]
fn names_that_are_no_names_are_refused() {
    let Some(link) = TestLink::new() else { return };
    for name in ["abcdefghi", "A", "a-b", "../x", ""] {
        let output = link.script("up", &["--profile", "lan", "--name", name]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains("lower-case letters"), "{}", text(&output));
    }
}

/// The other backend, in a kernel that has it. Its figures are not judged here: they depend on what else this machine does.
#[test]
fn the_kernels_netem_plays_a_time_line_and_is_then_what_it_was() {
    if TestLink::new().is_none() {
        return;
    }
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("netem-scripts/uml-check"))
        .arg("--events")
        .env("LONGHAUL_BIN", env!("CARGO_BIN_EXE_longhaul"))
        .output()
        .unwrap();
    if output.status.code() == Some(2) {
        eprintln!("skipped: user-mode Linux cannot be had: {}", text(&output));
        return;
    }
    assert!(output.status.success(), "{}", text(&output));
    for did in [
        "cut ab for 500ms",
        "rate 10mbit both",
        "delay 50ms both",
        "loss 50% both",
        "mtu 1400 both",
        "end of the cut ab",
        "address of site A 10.77.0.11",
        "mtu 1500 ba",
        "0% packet loss",
    ] {
        assert!(text(&output).contains(did), "{did}: {}", text(&output));
    }
}
