//! What tools that know nothing of this project say about a link: `ping`, and `iperf3` where it is installed.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::clock;
use super::link::{Link, Site};
use super::probe::quantile_ms;
use crate::proto::page::ByteRate;

/// Round trips, as `ping` shows them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pings {
    /// Mean, to the microsecond.
    pub mean_ms: f64,
    /// 99 % took no longer. From 100 ms on `ping` shows single ones to the millisecond.
    pub p99_ms: f64,
}

/// A UDP stream from A to B, as `iperf3` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Stream {
    /// UDP payload that the server received in a second, the median of its intervals but the first and the last.
    pub received_bits_per_second: f64,
    /// Of the datagrams that the client sent.
    pub lost_percent: f64,
}

/// A tool failed, or said something else than expected.
#[derive(Debug, thiserror::Error)]
#[error("{tool} across the link failed: {words}")]
pub struct ToolError {
    /// Which one.
    pub tool: &'static str,
    /// What it said.
    pub words: String,
}

/// Pings B from A `count` times, one in 10 ms.
///
/// # Errors
/// [`ToolError`], also where no answer came.
pub(super) fn ping(link: &Link, count: u64) -> Result<Pings, ToolError> {
    let failed = |words: String| ToolError { tool: "ping", words };
    let output = at(link, Site::A, "ping")
        .args(["-n", "-i", "0.01", "-W", "3", "-c", &count.to_string()])
        .arg(link.address(Site::B).to_string())
        .output()
        .map_err(|error| failed(format!("ip cannot be run; install iproute2 ({error})")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    read_ping(&text).ok_or_else(|| {
        let words = String::from_utf8_lossy(&output.stderr);
        failed(format!("{} {}", text.trim(), words.trim()))
    })
}

/// Sends UDP from A to B at `rate`, Ethernet framing included, for `time`. Nothing where `iperf3` is not installed.
///
/// # Errors
/// [`ToolError`] where it is, and fails.
pub(super) fn iperf3(link: &Link, rate: ByteRate, time: Duration) -> Result<Option<Stream>, ToolError> {
    if !is_installed("iperf3") {
        return Ok(None);
    }
    let failed = |words: String| ToolError { tool: "iperf3", words };
    let address = link.address(Site::B);
    let server = Server::start(link, address, time).map_err(|error| failed(error.to_string()))?;
    let payload = u64::from(link.profile.mtu_bytes - UDP_IP_HEADERS);
    let wire = u64::from(link.profile.mtu_bytes + super::model::ETHERNET_OVERHEAD);
    let bits = u128::from(rate.0) * 8 * u128::from(payload) / u128::from(wire);
    // iperf3 counts in seconds and tenths of them.
    let seconds = time.as_secs().max(2);
    let mut words = String::new();
    for _ in 0..CONNECTS {
        let output = at(link, Site::A, "iperf3")
            .args(["-c", &address.to_string(), "-p", PORT, "-u", "-J", "-i", "0.2"])
            .args(["--get-server-output", "-t", &seconds.to_string()])
            .args(["-b", &bits.to_string(), "-l", &payload.to_string()])
            .output()
            .map_err(|error| failed(error.to_string()))?;
        words = String::from_utf8_lossy(&output.stdout).into_owned();
        if let Some(stream) = read_iperf3(&words) {
            drop(server);
            return Ok(Some(stream));
        }
        // The server may not listen yet.
        if !words.contains("refused") {
            break;
        }
        clock::sleep(Duration::from_millis(50));
    }
    let error = serde_json::from_str(&words)
        .ok()
        .and_then(|json: Value| Some(json["error"].as_str()?.to_owned()));
    Err(failed(
        error.unwrap_or_else(|| "its output is not understood".to_owned()),
    ))
}

/// An `iperf3` server for one test. Ends with this value.
#[derive(Debug)]
struct Server(Child);

impl Server {
    fn start(link: &Link, address: Ipv4Addr, time: Duration) -> std::io::Result<Self> {
        // A limit of its own, should this process be killed.
        let limit = (time.as_secs() + 60).to_string();
        let mut command = at(link, Site::B, "timeout");
        // JSON, as what the server saw comes to the client in the server's own form.
        command.args([
            &limit,
            "iperf3",
            "-s",
            "-1",
            "-J",
            "-i",
            "0.2",
            "-p",
            PORT,
            "-B",
            &address.to_string(),
        ]);
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        quiet.spawn().map(Self)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGTERM, which timeout passes on; a server that has ended needs none.
        if let Ok(Some(_)) = self.0.try_wait() {
            return;
        }
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

/// A command in the namespace of a site.
fn at(link: &Link, site: Site, program: &str) -> Command {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", &link.name.site(site), program])
        .env("LC_ALL", "C");
    command
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Of lines `64 bytes from 10.77.0.2: icmp_seq=1 ttl=64 time=150 ms` and of
/// `rtt min/avg/max/mdev = 150.1/150.2/150.3/0.05 ms`.
fn read_ping(text: &str) -> Option<Pings> {
    let summary = text.lines().find(|line| line.starts_with("rtt "))?;
    let mean_ms = summary.split_once('=')?.1.split('/').nth(1)?.parse().ok()?;
    let mut times: Vec<Duration> = text
        .lines()
        .filter(|line| !line.contains("(DUP!)"))
        .filter_map(|line| line.split_once("time=")?.1.split_once(" ms")?.0.parse().ok())
        .filter_map(|ms: f64| Duration::try_from_secs_f64(ms / 1e3).ok())
        .collect();
    times.sort_unstable();
    (!times.is_empty()).then(|| Pings {
        mean_ms,
        p99_ms: quantile_ms(&times, 0.99),
    })
}

fn read_iperf3(text: &str) -> Option<Stream> {
    let json: Value = serde_json::from_str(text).ok()?;
    let lost_percent = json["end"]["sum"]["lost_percent"].as_f64()?;
    let intervals = json["server_output_json"]["intervals"].as_array()?;
    let rates = intervals
        .iter()
        .filter_map(|interval| interval["sum"]["bits_per_second"].as_f64());
    let mut rates: Vec<f64> = rates.collect();
    if rates.len() < 3 {
        return None;
    }
    rates.pop();
    rates.remove(0);
    rates.sort_unstable_by(f64::total_cmp);
    Some(Stream {
        received_bits_per_second: rates[rates.len() / 2],
        lost_percent,
    })
}

const UDP_IP_HEADERS: u32 = 28;
const PORT: &str = "5201";
const CONNECTS: u32 = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_ping_are_read_and_copies_are_not() {
        let line = |ms: &str, rest: &str| format!("64 bytes from 10.77.0.2: icmp_seq=1 ttl=64 time={ms} ms{rest}\n");
        let lines = [line("150.3", ""), line("150.1", ""), line("190", " (DUP!)")].concat();
        let summary = "rtt min/avg/max/mdev = 150.071/150.109/150.264/0.032 ms, pipe 15\n";
        let pings = read_ping(&format!("{lines}{summary}")).expect("complete");
        assert!(
            (pings.mean_ms - 150.109).abs() < 1e-6 && (pings.p99_ms - 150.3).abs() < 1e-6,
            "{pings:?}"
        );
        assert_eq!(read_ping(&lines), None);
        assert_eq!(read_ping("100 packets transmitted, 0 received"), None);
    }

    #[test]
    fn the_servers_middle_interval_is_the_rate_and_its_loss_the_loss() {
        let interval = |rate: f64| serde_json::json!({ "sum": { "bits_per_second": rate } });
        let text = |rates: &[f64]| {
            serde_json::json!({
                "end": { "sum": { "lost_percent": 0.5, "bits_per_second": 99.0 } },
                "server_output_json": { "intervals": rates.iter().map(|rate| interval(*rate)).collect::<Vec<_>>() },
            })
            .to_string()
        };
        let stream = read_iperf3(&text(&[1.0, 50.0, 48.0, 49.0, 2.0])).expect("complete");
        assert_eq!((stream.received_bits_per_second, stream.lost_percent), (49.0, 0.5));
        assert_eq!(read_iperf3(&text(&[1.0, 2.0])), None);
        assert_eq!(read_iperf3("iperf3: error"), None);
    }
}
