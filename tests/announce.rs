//! What the network hears of a VM that has moved: the frames that its hypervisor sends, on a socket in the place of a switch.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::guest::Machine;
use common::{PATIENCE, Rig, SitePlan, need, qemu, until_some};
use serde_json::{Value, json};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Longer than between two announcements. What does not come can only be waited for.
const SILENCE: Duration = Duration::from_secs(2);

/// A switch that only listens.
struct Switch(UdpSocket);

impl Switch {
    fn new() -> Self {
        Self(UdpSocket::bind("127.0.0.1:0").unwrap())
    }

    /// What a machine is given to be on it.
    fn port(&self) -> String {
        let port = self.0.local_addr().unwrap().port();
        format!("socket,id=net,udp=127.0.0.1:{port},localaddr=127.0.0.1:0")
    }

    /// The next frame within `patience`, and when it was seen.
    #[expect(clippy::disallowed_methods, reason = "compared with the clock of the hypervisor")]
    fn next(&self, patience: Duration) -> Option<(Duration, Vec<u8>)> {
        self.0.set_read_timeout(Some(patience)).unwrap();
        let mut frame = vec![0; 2048];
        let length = self.0.recv(&mut frame).ok()?;
        frame.truncate(length);
        Some((SystemTime::now().duration_since(UNIX_EPOCH).unwrap(), frame))
    }
}

/// RARP of this VM (RFC 903: ethertype 0x8035), to everybody.
fn is_announcement(frame: &[u8]) -> bool {
    frame[..6] == [0xff; 6] && frame[6..12] == MAC && frame[12..14] == [0x80, 0x35]
}

/// What a hypervisor tells on its second monitor.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    /// From when it can be reached on.
    fn of(plan: &SitePlan, vm: &str) -> Self {
        let path = format!("{}.test", plan.vms[vm].qmp.display());
        let mut stream = until_some("the hypervisor can be reached", || UnixStream::connect(&path).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = json!({ "execute": "qmp_capabilities" });
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        Self(BufReader::new(stream))
    }

    /// When it says that its guest runs.
    fn resumed(&mut self) -> Duration {
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            let said: Value = serde_json::from_str(&line).unwrap();
            if said["event"] == "RESUME" {
                let time = |unit: &str| said["timestamp"][unit].as_u64().unwrap();
                return Duration::from_secs(time("seconds")) + Duration::from_micros(time("microseconds"));
            }
        }
    }
}

#[test]
fn a_vm_is_announced_as_often_as_configured_and_not_before_it_runs_there() {
    need!(qemu());
    for rounds in [3, 0] {
        let switches = [Switch::new(), Switch::new()];
        let ports = switches.each_ref().map(Switch::port);
        let device = "virtio-net-pci,netdev=net,mac=52:54:00:12:34:56,romfile=";
        let machine = Machine::filled(24).with(&["-netdev", &ports[0], "-device", device]);
        let mut plan = None;
        let mut rig = Rig::planned(&[("vm", machine)], |_, b| {
            b.settings += &format!("[migration]\nannounce_rounds = \"{rounds}\"\n");
            for word in b.vm("vm").command.iter_mut().flatten() {
                if *word == ports[0] {
                    word.clone_from(&ports[1]);
                }
            }
            plan = Some(b.clone());
        });
        rig.a.boot("vm");
        let client = rig.a.begin(&["migrate", "vm", "--to", "b", "--rate", "40mbit"]);
        let resumed = Monitor::of(&plan.unwrap(), "vm").resumed();
        for round in 0..rounds {
            let (seen, frame) = switches[1].next(PATIENCE).expect("there are as many announcements");
            assert!(is_announcement(&frame), "{round}: {frame:?}");
            assert!(seen >= resumed, "{round}: {seen:?} is before {resumed:?}");
        }
        assert_eq!(switches[1].next(SILENCE), None);
        let moved = client.wait();
        assert_eq!(moved.code, Some(0), "{moved:?}");
        let at_source = switches[0].next(Duration::from_millis(1));
        assert_eq!(at_source, None, "nothing is announced where it was");
    }
}
