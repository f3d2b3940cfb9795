//! Streams of other programs between two gateways: any bytes, both ways, through cuts; and whole VMs that nobody but their hypervisor knows of.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use common::guest::Machine;
use common::process::Running;
use common::relay::Relay;
use common::site::{SitePlan, free_port};
use common::{PATIENCE, Rig, Site, need, noise, qemu, until};
use rustix::process::Signal;
use serde_json::json;
use socket2::SockRef;

/// A tunnel `t` from a socket at `a` to a TCP port at `b`.
fn tunnel(a: &mut SitePlan, b: &mut SitePlan, to: u16) -> PathBuf {
    let entrance = a.folder.join("t.sock");
    let listen = entrance.display();
    a.settings += &format!("[[tunnel]]\nname = \"t\"\nlisten = \"{listen}\"\npeer = \"b\"\n");
    b.settings += &format!("[[tunnel]]\nname = \"t\"\nconnect = \"127.0.0.1:{to}\"\nfrom = [\"a\"]\n");
    entrance
}

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn accept(listener: &TcpListener) -> TcpStream {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn connect(entrance: &PathBuf) -> UnixStream {
    let stream = UnixStream::connect(entrance).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn read_all(mut stream: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

/// A series of whole numbers.
fn metric(site: &Site, series: &str) -> u64 {
    let mut stream = TcpStream::connect(("127.0.0.1", site.port())).unwrap();
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let text = String::from_utf8(read_all(stream)).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    line.unwrap_or_else(|| panic!("{series}: {text}"))
        .trim()
        .parse()
        .unwrap()
}

/// Bytes and bytes of frames of the streams that have ended at the entrance.
fn ended(rig: &Rig) -> Vec<(u64, u64)> {
    let field = |line: &str, key: &str| {
        let (_, rest) = line.split_once(key).unwrap();
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    let log = rig.a.log();
    let ends = log.lines().filter(|line| line.contains("a stream has ended"));
    ends.map(|line| (field(line, " bytes="), field(line, "frame_bytes=")))
        .collect()
}

#[test]
fn a_stream_and_its_answers_arrive_whole_and_each_way_ends_by_itself() {
    let (listener, port) = listen();
    let mut entrance = PathBuf::new();
    let rig = Rig::planned(&[], |a, b| entrance = tunnel(a, b, port));
    let (said, answered) = (noise(8 << 20, 1), noise(2 << 20, 2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut program = accept(&listener);
            assert!(read_all(&mut program) == said, "what arrived differs");
            // After the other way has ended.
            program.write_all(&answered).unwrap();
        });
        let mut program = connect(&entrance);
        program.write_all(&said).unwrap();
        program.shutdown(Shutdown::Write).unwrap();
        assert!(read_all(&mut program) == answered, "what was answered differs");
    });
    until("the stream has ended", || ended(&rig).len() == 1);
    assert_eq!(ended(&rig)[0].0, said.len() as u64);
    until("at the exit too", || rig.b.log().contains("a stream has ended"));
    rig.assert_only(&[]);
}

#[test]
fn a_question_is_answered_before_the_next_one_comes() {
    let (listener, port) = listen();
    let mut entrance = PathBuf::new();
    let rig = Rig::planned(&[], |a, b| entrance = tunnel(a, b, port));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut program = accept(&listener);
            let mut question = [0; 3];
            while program.read_exact(&mut question).is_ok() {
                program.write_all(&[question[0] ^ question[2]]).unwrap();
            }
        });
        let mut program = connect(&entrance);
        for number in 0..100_u8 {
            program.write_all(&[number, 7, 3]).unwrap();
            let mut answer = [0];
            program.read_exact(&mut answer).unwrap();
            assert_eq!(answer[0], number ^ 3);
        }
    });
    until("the stream has ended", || ended(&rig).len() == 1);
}

#[test]
fn what_a_stream_says_twice_crosses_once_and_is_counted() {
    let (listener, port) = listen();
    let mut entrance = PathBuf::new();
    let rig = Rig::planned(&[], |a, b| {
        entrance = tunnel(a, b, port);
        (a.metrics, b.metrics) = (true, true);
    });
    let part = noise(4 << 20, 3);
    let twice = [&part[..], b"not at a multiple of anything", &part[..]].concat();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut program = accept(&listener);
            program.write_all(b"answer").unwrap();
            assert!(read_all(program) == twice, "what arrived differs");
        });
        let mut program = connect(&entrance);
        program.read_exact(&mut [0; 6]).unwrap();
        assert_eq!(metric(&rig.a, "longhaul_tunnel_streams{role=\"source\"}"), 1);
        assert_eq!(metric(&rig.b, "longhaul_tunnel_streams{role=\"destination\"}"), 1);
        program.write_all(&twice).unwrap();
    });
    until("the stream has ended", || ended(&rig).len() == 1);
    let (bytes, frame_bytes) = ended(&rig)[0];
    assert_eq!(bytes, twice.len() as u64);
    // Reads cut through a chunk now and then.
    assert!(frame_bytes < part.len() as u64 * 5 / 4, "{frame_bytes} of {bytes}");
    for (site, said, answered) in [(&rig.a, "in", "out"), (&rig.b, "out", "in")] {
        let of = |direction: &str| {
            metric(
                site,
                &format!("longhaul_tunnel_bytes_total{{direction=\"{direction}\"}}"),
            )
        };
        until("all of it is counted", || of(said) == bytes && of(answered) == 6);
    }
    let sent = "longhaul_tunnel_frame_bytes_total{direction=\"out\"}";
    until("its frames are counted", || metric(&rig.a, sent) == frame_bytes);
    until("it is counted no more", || {
        metric(&rig.a, "longhaul_tunnel_streams{role=\"source\"}") == 0
    });
}

#[test]
fn a_cut_is_waited_for_and_nothing_is_lost_or_said_twice_either_way() {
    let (listener, port) = listen();
    let mut entrance = PathBuf::new();
    let mut relays = Vec::new();
    let rig = Rig::planned(&[], |a, b| {
        entrance = tunnel(a, b, port);
        for (plan, peer) in [(&mut *a, "b"), (&mut *b, "a")] {
            let front = free_port();
            relays.push(Relay::start(front, plan.port));
            plan.settings = format!(
                "advertise = \"127.0.0.1:{front}\"\n[migration]\nrate = \"20mbit\"\n{}[[peer]]\nname = \"{peer}\"\n",
                plan.settings
            );
        }
    });
    let (said, answered) = (noise(6 << 20, 4), noise(6 << 20, 5));
    let noticed = |times: usize| rig.a.log().matches("contact lost").count() >= times;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let program = accept(&listener);
            let mut writer = program.try_clone().unwrap();
            let answered = &answered;
            scope.spawn(move || {
                writer.write_all(answered).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            assert!(read_all(program) == said, "what arrived differs");
        });
        let program = connect(&entrance);
        let mut writer = program.try_clone().unwrap();
        let said = &said;
        scope.spawn(move || {
            writer.write_all(said).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut reader = program;
        let mut had = vec![0; 100_000];
        reader.read_exact(&mut had).unwrap();
        for times in 1..=2 {
            relays.iter().for_each(|relay| relay.cut(true));
            until("the entrance has noticed", || noticed(times));
            relays.iter().for_each(|relay| relay.cut(false));
            // More than sockets and gateways hold: the stream has gone on.
            let mut more = vec![0; 1 << 20];
            reader.read_exact(&mut more).unwrap();
            had.append(&mut more);
        }
        had.append(&mut read_all(reader));
        assert!(had == answered, "what was answered differs");
    });
    until("the stream has ended", || ended(&rig).len() == 1);
    until("at the exit too", || rig.b.log().contains("a stream has ended"));
}

#[test]
fn a_program_that_is_refused_is_let_go_and_the_log_says_why() {
    let (listener, port) = listen();
    drop(listener);
    let mut sockets = Vec::new();
    let rig = Rig::planned(&[], |a, b| {
        for (name, peer) in [("t", "b"), ("unknown", "b"), ("closed", "b"), ("lost", "nowhere")] {
            let listen = a.folder.join(format!("{name}.sock"));
            a.settings += &format!(
                "[[tunnel]]\nname = \"{name}\"\nlisten = \"{}\"\npeer = \"{peer}\"\n",
                listen.display()
            );
            sockets.push(listen);
        }
        b.settings += &format!(
            "[[tunnel]]\nname = \"t\"\nconnect = \"127.0.0.1:{port}\"\n\
             [[tunnel]]\nname = \"closed\"\nconnect = \"127.0.0.1:{port}\"\nfrom = [\"c\"]\n"
        );
    });
    for (socket, reason) in sockets.iter().zip([
        "where t ends: Connection refused",
        "b has no [[tunnel]] unknown",
        "b takes no streams of closed from here",
        "nowhere",
    ]) {
        assert_eq!(read_all(connect(socket)), b"");
        until(reason, || rig.a.log().contains(reason));
    }
    assert_eq!(rig.b.log().matches("refused: ").count(), 3, "{}", rig.b.log());
}

#[test]
fn answers_of_a_byte_each_wait_for_a_program_that_does_not_read_yet() {
    let (listener, port) = listen();
    let mut entrance = PathBuf::new();
    let rig = Rig::planned(&[], |a, b| entrance = tunnel(a, b, port));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut program = accept(&listener);
            for number in 0..300_000_u32 {
                program.write_all(&[number as u8]).unwrap();
            }
        });
        let program = connect(&entrance);
        // More than the gateways keep for it, and sockets hold the rest.
        until("all of it is written", || other.is_finished());
        program.shutdown(Shutdown::Write).unwrap();
        let had = read_all(program);
        assert!(had.len() == 300_000 && (0..300_000_u32).all(|number| had[number as usize] == number as u8));
    });
    until("the stream has ended", || ended(&rig).len() == 1);
}

#[test]
fn what_ends_during_a_cut_has_ended_well_after_it() {
    let (listener, port) = listen();
    let mut entrance = PathBuf::new();
    let mut relays = Vec::new();
    let rig = Rig::planned(&[], |a, b| {
        entrance = tunnel(a, b, port);
        for plan in [a, b] {
            let front = free_port();
            relays.push(Relay::start(front, plan.port));
            plan.settings = format!("advertise = \"127.0.0.1:{front}\"\n{}", plan.settings);
        }
    });
    let said = noise(300_000, 6);
    let mut program = connect(&entrance);
    let other = accept(&listener);
    other.shutdown(Shutdown::Write).unwrap();
    assert_eq!(program.read(&mut [0]).unwrap(), 0, "the answers have ended");
    relays.iter().for_each(|relay| relay.cut(true));
    program.write_all(&said).unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    until("the entrance has noticed", || rig.a.log().contains("contact lost"));
    relays.iter().for_each(|relay| relay.cut(false));
    assert!(read_all(other) == said, "what arrived differs");
    until("the stream has ended", || ended(&rig).len() == 1);
    until("at the exit too", || rig.b.log().contains("a stream has ended"));
}

/// Site b's gateway ends while a stream is open: what the programs see of it.
#[track_caller]
fn ends_with_a_gateway(signal: Signal) {
    let (listener, port) = listen();
    let mut entrance = PathBuf::new();
    let mut rig = Rig::planned(&[], |a, b| entrance = tunnel(a, b, port));
    let mut program = connect(&entrance);
    program.write_all(b"begun").unwrap();
    let mut other = accept(&listener);
    let mut had = [0; 5];
    other.read_exact(&mut had).unwrap();
    rig.b.gateway().signal(signal);
    let error = other.read(&mut had).expect_err("a reset, and no end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    until("it has ended", || rig.b.gateway().has_ended());
    rig.b.start();
    assert_eq!(
        read_all(program),
        b"",
        "the entrance hears that the exit has forgotten it"
    );
    until("the log says so", || rig.a.log().contains("a stream has failed"));
    rig.assert_only(&[]);
}

#[test]
fn a_stream_that_is_cut_off_by_the_end_of_a_gateway_does_not_look_like_one_that_has_ended() {
    ends_with_a_gateway(Signal::KILL);
    ends_with_a_gateway(Signal::TERM);
}

#[test]
fn a_program_that_is_gone_resets_the_other_whichever_it_is() {
    let (listener, port) = listen();
    let front = free_port();
    let rig = Rig::planned(&[], |a, b| {
        tunnel(a, b, port);
        let socket = format!("\"{}\"", a.folder.join("t.sock").display());
        a.settings = a.settings.replace(&socket, &format!("\"127.0.0.1:{front}\""));
    });
    for is_first in [true, false] {
        let mut first = TcpStream::connect(("127.0.0.1", front)).unwrap();
        first.set_read_timeout(Some(PATIENCE)).unwrap();
        first.write_all(b"begun").unwrap();
        let mut second = accept(&listener);
        second.read_exact(&mut [0; 5]).unwrap();
        let (leaves, mut stays) = if is_first { (first, second) } else { (second, first) };
        SockRef::from(&leaves).set_linger(Some(Duration::ZERO)).unwrap();
        drop(leaves);
        let error = stays.read(&mut [0]).expect_err("a reset, and no end");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    let failed = |site: &Site| site.log().matches("a stream has failed").count() == 2;
    until("both logs say so", || failed(&rig.a) && failed(&rig.b));
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_anything_else_is_not() {
    let (_listener, port) = listen();
    let mut entrance = PathBuf::new();
    let mut rig = Rig::planned(&[], |a, b| entrance = tunnel(a, b, port));
    rig.a.kill();
    assert!(entrance.exists());
    rig.a.start();
    drop(connect(&entrance));
    rig.a.gateway().signal(Signal::TERM);
    until("it has ended", || rig.a.gateway().has_ended());
    until("and its socket is gone", || !entrance.exists());
    std::fs::write(&entrance, "a disk").unwrap();
    let refused = Running::start(rig.a.gateway_command(), rig.path()).wait();
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("something else than a socket is there"),
        "{refused:?}"
    );
    assert_eq!(std::fs::read(&entrance).unwrap(), b"a disk");
}

#[test]
fn a_vm_that_its_hypervisor_moves_by_itself_arrives_through_a_tunnel() {
    need!(qemu());
    let mut sockets = (PathBuf::new(), PathBuf::new());
    let mut rig = Rig::planned(&[("vm", Machine::filled(48))], |a, b| {
        sockets = (a.folder.join("out.sock"), b.folder.join("in.sock"));
        let (listen, connect) = (sockets.0.display(), sockets.1.display());
        a.settings += &format!("[[tunnel]]\nname = \"vms\"\nlisten = \"{listen}\"\npeer = \"b\"\n");
        b.settings += &format!("[[tunnel]]\nname = \"vms\"\nconnect = \"{connect}\"\n");
    });
    rig.a.boot("vm");
    let incoming = format!("unix:{}", sockets.1.display());
    rig.b.launch("vm", &Machine::filled(48), &["-incoming", &incoming]);
    let outgoing = json!({ "uri": format!("unix:{}", sockets.0.display()) });
    rig.a.qmp("vm", "migrate", &outgoing).unwrap();
    until("the VM runs at the other site", || {
        rig.b.state("vm").as_deref() == Some("running")
    });
    assert_eq!(rig.a.state("vm").as_deref(), Some("postmigrate"));
    until("the stream has ended", || ended(&rig).len() == 1);
    rig.a.kill_hypervisors("vm");
    rig.assert_only(&[(&rig.b, "vm")]);
}
