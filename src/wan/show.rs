//! What a link has carried, from whichever backend carries it.

use serde_json::Value;

use super::control::{self, ControlError};
use super::iproute::{IprouteError, run};
use super::link::{Link, SITE_DEVICE, Site};
use super::model::ETHERNET_OVERHEAD;
use super::stats::{Backend, DirectionStats, Dropped, LinkStats, Traffic};

/// The counters of a link cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// The emulator does not answer.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The emulator answers something else.
    #[error("the emulator's answer is not understood: {answer}")]
    Answer {
        /// What it said.
        answer: String,
    },
    /// `ip` or `tc` failed.
    #[error(transparent)]
    Iproute(#[from] IprouteError),
    /// A device or queue is missing from what `ip` or `tc` printed.
    #[error("{command} does not show {what}; the link may have been changed by hand")]
    Missing {
        /// The command line.
        command: String,
        /// A device or queue.
        what: String,
    },
}

/// What `link` has carried since it was set up.
///
/// # Errors
/// [`ShowError`] where its emulator is gone or its devices have been removed.
pub fn show(link: &Link) -> Result<LinkStats, ShowError> {
    let mut stats = match link.backend {
        Backend::Emulator => emulator(link)?,
        Backend::Netem => netem(link)?,
    };
    stats.fault = stats.judge(link.profile.rtt);
    Ok(stats)
}

fn emulator(link: &Link) -> Result<LinkStats, ShowError> {
    let answer = control::ask(&link.name.control_socket(), "stats")?;
    let mut stats: LinkStats = serde_json::from_str(&answer).map_err(|_| ShowError::Answer { answer })?;
    for (site, direction) in [(Site::A, &mut stats.ab), (Site::B, &mut stats.ba)] {
        let devices = Report::run("ip", &link.name.site(site), &["link", "show", "dev", SITE_DEVICE])?;
        let dropped = devices.device(SITE_DEVICE)?.number("/stats64/tx/dropped");
        if dropped > 0 {
            direction.dropped.ingress = Dropped::uncounted(direction.dropped.ingress.packets + dropped);
        }
    }
    Ok(stats)
}

fn netem(link: &Link) -> Result<LinkStats, ShowError> {
    let router = link.name.router();
    let devices = Report::run("ip", &router, &["link", "show"])?;
    let queues = Report::run("tc", &router, &["qdisc", "show"])?;
    let direction = |from: Site| netem_direction(&devices, &queues, from);
    Ok(LinkStats {
        name: link.name.to_string(),
        profile: link.profile.name.clone(),
        backend: Backend::Netem,
        seed: None,
        ab: direction(Site::A)?,
        ba: direction(Site::B)?,
        emulator: None,
        fault: None,
    })
}

/// The kernel counts a packet with its Ethernet header. The netem queue counts what its child, the bottleneck, drops too.
fn netem_direction(devices: &Report, queues: &Report, from: Site) -> Result<DirectionStats, ShowError> {
    let entry = devices.device(from.router_device())?;
    let exit = devices.device(from.peer().router_device())?;
    let device = from.peer().router_device();
    let delay = queues.queue(device, "netem")?;
    let bottleneck = queues.queue(device, "tbf")?;
    let ip_bytes = |bytes: u64, packets: u64| bytes.saturating_sub(packets * u64::from(ETHERNET_OVERHEAD));
    let traffic = |device: &Entry<'_>, way: &str| {
        let packets = device.number(&format!("/stats64/{way}/packets"));
        Traffic {
            packets,
            bytes: ip_bytes(device.number(&format!("/stats64/{way}/bytes")), packets),
        }
    };
    let mut stats = DirectionStats {
        offered: traffic(&entry, "rx"),
        delivered: traffic(&exit, "tx"),
        in_flight_bytes: ip_bytes(delay.number("/backlog"), delay.number("/qlen")),
        ..DirectionStats::default()
    };
    let full = bottleneck.number("/drops");
    stats.dropped.queue = Dropped::uncounted(full);
    stats.dropped.loss = Dropped::uncounted(delay.number("/drops").saturating_sub(full));
    stats.dropped.ingress = Dropped::uncounted(entry.number("/stats64/rx/dropped"));
    stats.dropped.egress = Dropped::uncounted(exit.number("/stats64/tx/errors"));
    Ok(stats)
}

/// What `ip -j` or `tc -j` printed: a list of objects.
#[derive(Debug)]
struct Report {
    command: String,
    entries: Vec<Value>,
}

/// One object of it.
#[derive(Clone, Copy, Debug)]
struct Entry<'a>(&'a Value);

impl Report {
    fn run(tool: &str, namespace: &str, arguments: &[&str]) -> Result<Self, ShowError> {
        let options = ["-n", namespace, "-s", "-j"];
        let command = format!("{tool} {} {}", options.join(" "), arguments.join(" "));
        let json = run(&command)?;
        Self::parse(command, &json)
    }

    fn parse(command: String, json: &[u8]) -> Result<Self, ShowError> {
        match serde_json::from_slice(json) {
            Ok(entries) => Ok(Self { command, entries }),
            Err(error) => Err(IprouteError::Failed {
                command,
                message: format!("its output is not JSON: {error}"),
            }
            .into()),
        }
    }

    fn device(&self, name: &str) -> Result<Entry<'_>, ShowError> {
        self.find(name, |entry| entry["ifname"] == name)
    }

    fn queue(&self, device: &str, kind: &str) -> Result<Entry<'_>, ShowError> {
        self.find(&format!("{kind} on {device}"), |entry| {
            entry["dev"] == device && entry["kind"] == kind
        })
    }

    fn find(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Entry<'_>, ShowError> {
        let missing = || ShowError::Missing {
            command: self.command.clone(),
            what: what.to_owned(),
        };
        self.entries
            .iter()
            .find(|entry| is_it(entry))
            .map(Entry)
            .ok_or_else(missing)
    }
}

impl Entry<'_> {
    /// A counter; zero where the kernel does not have it.
    fn number(&self, path: &str) -> u64 {
        self.0.pointer(path).and_then(Value::as_u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(json: &str) -> Report {
        Report::parse("tc".to_owned(), json.as_bytes()).expect("valid JSON")
    }

    const DEVICES: &str = r#"[{"ifname":"lo"},
        {"ifname":"to-a","stats64":{"rx":{"bytes":151400,"packets":100,"dropped":0},"tx":{"bytes":660,"packets":10}}},
        {"ifname":"to-b","stats64":{"rx":{"bytes":660,"packets":10},"tx":{"bytes":121120,"packets":80,"errors":0}}}]"#;
    const QUEUES: &str = r#"[{"kind":"noqueue","dev":"lo"},
        {"kind":"netem","handle":"1:","dev":"to-b","root":true,"drops":15,"backlog":7570,"qlen":5},
        {"kind":"tbf","handle":"10:","dev":"to-b","parent":"1:1","drops":12,"backlog":0,"qlen":0},
        {"kind":"netem","handle":"1:","dev":"to-a","root":true,"drops":0},
        {"kind":"tbf","handle":"10:","dev":"to-a","parent":"1:1","drops":0}]"#;

    #[test]
    fn kernel_counters_become_ip_bytes_and_causes() {
        let stats = netem_direction(&report(DEVICES), &report(QUEUES), Site::A).expect("complete");
        assert_eq!(
            stats.offered,
            Traffic {
                packets: 100,
                bytes: 150_000
            }
        );
        assert_eq!(
            stats.delivered,
            Traffic {
                packets: 80,
                bytes: 120_000
            }
        );
        assert_eq!(stats.in_flight_bytes, 7_500);
        assert_eq!(
            stats.dropped.queue,
            Dropped {
                packets: 12,
                bytes: None
            }
        );
        assert_eq!(
            stats.dropped.loss,
            Dropped {
                packets: 3,
                bytes: None
            }
        );
        let back = netem_direction(&report(DEVICES), &report(QUEUES), Site::B).expect("complete");
        assert_eq!(
            back.offered,
            Traffic {
                packets: 10,
                bytes: 520
            }
        );
        assert_eq!(
            back.dropped.loss,
            Dropped {
                packets: 0,
                bytes: Some(0)
            }
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = netem_direction(&report(DEVICES), &report("[]"), Site::A)
            .expect_err("no queue")
            .to_string();
        assert!(error.contains("netem on to-b"), "{error}");
        assert!(Report::parse("ip".to_owned(), b"Cannot find device").is_err());
    }
}
