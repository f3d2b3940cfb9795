//! What the network hears of a VM that has moved: the frames that its hypervisor and its guest send, on a socket in the place of a switch.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::guest::{Machine, qemu_program};
use common::process::Running;
use common::{PATIENCE, Rig, SitePlan, need, qemu, until_some};
use longhaul::lab::guest::{GuestDials, GuestFiles, Image, Launch, Start};
use longhaul::lab::network::GUEST_ADDRESS;
use serde_json::{Value, json};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Of this hardware address (RFC 4291, appendix A).
const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe12, 0x3456);

const DEVICE: &str = "virtio-net-pci,netdev=net,mac=52:54:00:12:34:56,romfile=";

/// Longer than between two announcements. What does not come can only be waited for.
const SILENCE: Duration = Duration::from_secs(2);

/// A switch that only listens, from its beginning to its end.
struct Switch {
    socket: UdpSocket,
    frames: Receiver<(Duration, Vec<u8>)>,
    listener: Option<JoinHandle<()>>,
}

impl Switch {
    #[expect(clippy::disallowed_methods, reason = "compared with the clock of the hypervisor")]
    fn new() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let heard = socket.try_clone().unwrap();
        let (sender, frames) = channel();
        let listener = std::thread::spawn(move || {
            let mut frame = vec![0; 2048];
            // An empty one is the end.
            while let Ok(length @ 1..) = heard.recv(&mut frame) {
                let seen = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                if sender.send((seen, frame[..length].to_vec())).is_err() {
                    break;
                }
            }
        });
        Self {
            socket,
            frames,
            listener: Some(listener),
        }
    }

    /// What a machine is given to be on it.
    fn port(&self) -> String {
        let port = self.socket.local_addr().unwrap().port();
        format!("socket,id=net,udp=127.0.0.1:{port},localaddr=127.0.0.1:0")
    }

    /// The next frame within `patience`, and when it was seen.
    fn next(&self, patience: Duration) -> Option<(Duration, Vec<u8>)> {
        self.frames.recv_timeout(patience).ok()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.socket.send_to(&[], self.socket.local_addr().unwrap());
        let _ = self.listener.take().map(JoinHandle::join);
    }
}

/// RARP of this VM (RFC 903: ethertype 0x8035), to everybody.
fn is_announcement(frame: &[u8]) -> bool {
    frame[..6] == [0xff; 6] && frame[6..12] == MAC && frame[12..14] == [0x80, 0x35]
}

/// ARP by which everybody who knows the guest's address learns where it is (RFC 5227, 3: from and for the same address).
fn is_gratuitous_arp(frame: &[u8]) -> bool {
    let address = GUEST_ADDRESS.octets();
    frame.len() >= 42
        && frame[..6] == [0xff; 6]
        && frame[6..12] == MAC
        && frame[12..14] == [0x08, 0x06]
        && frame[22..28] == MAC
        && frame[28..32] == address
        && frame[38..42] == address
}

/// ICMPv6 of this type (RFC 4861) from the guest's own address.
fn is_icmpv6(frame: &[u8], kind: u8) -> bool {
    frame.len() >= 62
        && frame[6..12] == MAC
        && frame[12..14] == [0x86, 0xdd]
        && frame[20..22] == [58, 255]
        && frame[22..38] == LINK_LOCAL.octets()
        && frame[54] == kind
}

/// A neighbour advertisement to all nodes for which nobody has asked.
fn is_unsolicited_advertisement(frame: &[u8]) -> bool {
    const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
    const SOLICITED: u8 = 0x40;
    frame[..6] == ALL_NODES
        && is_icmpv6(frame, 136)
        && frame[58] & SOLICITED == 0
        && frame.get(62..78) == Some(&LINK_LOCAL.octets())
}

/// Its name, and how it is known.
type Announcement = (&'static str, fn(&[u8]) -> bool);

/// Everything by which a network learns where the VM is.
const ANNOUNCEMENTS: [Announcement; 3] = [
    ("RARP", is_announcement),
    ("gratuitous ARP", is_gratuitous_arp),
    ("unsolicited neighbour advertisement", is_unsolicited_advertisement),
];

/// The image of a guest that has a network stack.
fn linux() -> Result<Image, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Image::build(&root.join("netem-scripts/guest"), &root.join("target/guest")).map_err(|error| error.to_string())
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
        let machine = Machine::filled(24).with(&["-netdev", &ports[0], "-device", DEVICE]);
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

/// The command line of the guest on a switch, with its monitor and a second one.
fn linux_command(image: &Image, folder: &Path, qmp: &str, port: &str, start: Start) -> Vec<String> {
    let dials = GuestDials {
        address: Some(GUEST_ADDRESS),
        ..GuestDials::small()
    };
    let launch = Launch {
        qemu: qemu_program(),
        ..Launch::new(image.clone(), dials)
    };
    let files = GuestFiles {
        qmp: qmp.into(),
        ..GuestFiles::named(folder, "vm")
    };
    let mut words = launch.command(&files, start);
    let monitor = format!("unix:{qmp}.test,server=on,wait=off");
    words.extend(["-netdev", port, "-device", DEVICE, "-qmp", &monitor].map(str::to_owned));
    words
}

#[test]
fn a_linux_guest_announces_its_own_addresses_where_it_has_moved_to_and_not_before_it_runs_there() {
    need!(qemu());
    let image = match linux() {
        Ok(image) => image,
        Err(reason) => return println!("SKIP: {reason}"),
    };
    let switches = [Switch::new(), Switch::new()];
    let ports = switches.each_ref().map(Switch::port);
    let mut plans = None;
    let rig = Rig::planned(&[("vm", Machine::firmware())], |a, b| {
        let command = linux_command(&image, &b.folder, "{qmp}", &ports[1], Start::ReceivePaused);
        b.vm("vm").command = Some(command);
        plans = Some([a.clone(), b.clone()]);
    });
    let [at_a, at_b] = plans.unwrap();
    let qmp = at_a.vms["vm"].qmp.display().to_string();
    let words = linux_command(&image, &at_a.folder, &qmp, &ports[0], Start::Boot);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    let _source = Running::start(command, rig.path());
    // It asks for routers once its address is its own; one that is not yet is not announced.
    const ROUTER_SOLICITATION: u8 = 133;
    loop {
        let (_, frame) = switches[0].next(PATIENCE).expect("the guest has a network");
        assert!(
            !is_gratuitous_arp(&frame),
            "the guest says so only when it is told to: {frame:?}"
        );
        if is_icmpv6(&frame, ROUTER_SOLICITATION) {
            break;
        }
    }

    let client = rig.a.begin(&["migrate", "vm", "--to", "b"]);
    let resumed = Monitor::of(&at_b, "vm").resumed();
    let mut missing = Vec::from(ANNOUNCEMENTS);
    while !missing.is_empty() {
        let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
        let (seen, frame) = switches[1]
            .next(PATIENCE)
            .unwrap_or_else(|| panic!("there was no {names:?}"));
        assert!(seen >= resumed, "{seen:?} is before {resumed:?}: {frame:?}");
        missing.retain(|(_, is_it)| !is_it(&frame));
    }
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    while let Some((_, frame)) = switches[0].next(Duration::from_millis(1)) {
        for (name, is_it) in ANNOUNCEMENTS {
            assert!(!is_it(&frame), "a {name} where it was: {frame:?}");
        }
    }
}
