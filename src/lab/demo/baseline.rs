//! The same move by plain QEMU over TCP across the same link: what an operator has without gateways.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::legs::{boot, crossing, prove};
use super::report::{Baseline, Outcome, Proof};
use super::site::Site;
use super::{DemoError, Tools, say};
use crate::lab::guest::Start;
use crate::lab::heartbeat::Heartbeat;
use crate::lab::link::{ADDRESS_B, Link};
use crate::lab::monitor::{Monitor, MonitorError};
use crate::lab::process::run;

/// A way to migrate without gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// QEMU and kernel as they come: CUBIC, the kernel's default buffers, QEMU's cap of 128 MiB/s.
    CubicDefault,
    /// BBR, socket buffers of 256 MB on both hosts, no cap.
    BbrTuned,
    /// The same hosts, and eight zstd channels: what an expert gets out of QEMU.
    MultifdZstd,
}

/// Everything that is run, in order.
pub(super) const ENGINES: [Engine; 3] = [Engine::CubicDefault, Engine::BbrTuned, Engine::MultifdZstd];

impl Engine {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::CubicDefault => "qemu-tcp-cubic-default",
            Self::BbrTuned => "qemu-tcp-bbr-tuned",
            Self::MultifdZstd => "qemu-multifd-zstd",
        }
    }

    fn congestion_control(self) -> &'static str {
        match self {
            Self::CubicDefault => "cubic",
            Self::BbrTuned | Self::MultifdZstd => "bbr",
        }
    }

    /// `tcp_rmem` and `tcp_wmem`.
    fn buffers(self) -> [&'static str; 2] {
        match self {
            // Of a host with some GiB of memory (tcp(7)).
            Self::CubicDefault => ["4096 131072 6291456", "4096 16384 4194304"],
            Self::BbrTuned | Self::MultifdZstd => ["4096 131072 268435456", "4096 16384 268435456"],
        }
    }

    /// Set at both ends.
    fn capabilities(self) -> Option<Value> {
        let capabilities = json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
        (self == Self::MultifdZstd).then_some(capabilities)
    }

    /// Set at both ends.
    fn parameters(self) -> Option<Value> {
        match self {
            Self::CubicDefault => None,
            Self::BbrTuned => Some(json!({ "max-bandwidth": NO_CAP, "downtime-limit": DOWNTIME_LIMIT_MS })),
            Self::MultifdZstd => Some(json!({
                "max-bandwidth": NO_CAP, "downtime-limit": DOWNTIME_LIMIT_MS,
                "multifd-channels": 8, "multifd-compression": "zstd",
            })),
        }
    }
}

/// Runs `engine` from `a` to `b` and stops it after `limit`.
pub(super) async fn measure(
    tools: &Tools,
    engine: Engine,
    [a, b]: [&Site; 2],
    link: &Link,
    limit: Duration,
    proof: &mut Proof,
) -> Result<Baseline, DemoError> {
    say(&format!(
        "baseline {}, stopped after {:.0} s",
        engine.name(),
        limit.as_secs_f64()
    ));
    let mut found = Baseline {
        engine: engine.name(),
        outcome: Outcome::Unavailable,
        total_seconds: None,
        wire_bytes: None,
        downtime_seconds: None,
        reason: None,
        link_fault: None,
    };
    for namespace in [&a.namespace, &b.namespace] {
        if let Err(error) = tune(namespace, engine).await {
            found.reason = Some(error.to_string());
            return Ok(found);
        }
    }
    let (source, mut at_source) = boot(tools, a).await?;
    let destination = b.start_qemu(&tools.launch, Start::Receive)?;
    let moved = Move {
        engine,
        a,
        b,
        link,
        limit,
    }
    .run(&mut at_source, &mut found, proof)
    .await;
    source.kill().await;
    destination.kill().await;
    match moved {
        // What QEMU refuses says something about QEMU, not about the demo.
        Err(DemoError::Monitor(MonitorError::Refused { said, .. })) => {
            found.outcome = Outcome::Failed;
            found.reason = Some(said);
        }
        other => other?,
    }
    Ok(found)
}

struct Move<'a> {
    engine: Engine,
    a: &'a Site,
    b: &'a Site,
    link: &'a Link,
    limit: Duration,
}

impl Move<'_> {
    async fn run(self, at_source: &mut Heartbeat, found: &mut Baseline, proof: &mut Proof) -> Result<(), DemoError> {
        let mut at_destination = Heartbeat::connect(&self.b.files.heartbeat, QEMU_START).await?;
        let mut source = Monitor::connect(&self.a.files.qmp, QEMU_START).await?;
        let mut destination = Monitor::connect(&self.b.files.qmp, QEMU_START).await?;
        for monitor in [&mut source, &mut destination] {
            if let Some(capabilities) = self.engine.capabilities() {
                monitor.execute("migrate-set-capabilities", capabilities).await?;
            }
            if let Some(parameters) = self.engine.parameters() {
                monitor.execute("migrate-set-parameters", parameters).await?;
            }
        }
        let address = json!({ "uri": format!("tcp:{ADDRESS_B}:{PORT}") });
        destination.execute("migrate-incoming", address.clone()).await?;

        let bytes_before = self.link.carried().await?.wire_bytes;
        let begun = tokio::time::Instant::now();
        source.execute("migrate", address).await?;
        let outcome = loop {
            let status = source.execute("query-migrate", json!({})).await?;
            match status["status"].as_str() {
                Some("completed") => break Outcome::Completed,
                Some("failed" | "cancelled") => {
                    found.reason = status["error-desc"].as_str().map(str::to_owned);
                    break Outcome::Failed;
                }
                _ if begun.elapsed() > self.limit => break Outcome::NotFinished,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        found.outcome = outcome;
        found.total_seconds = Some(begun.elapsed().as_secs_f64());
        if outcome == Outcome::Completed {
            let first = at_destination.first(ARRIVAL).await?;
            let last = at_source.heard().last.ok_or(DemoError::NeverHeard)?;
            found.downtime_seconds = Some(crossing("A to B", last, first)?.downtime.as_secs_f64());
            found.total_seconds = Some(first.at.saturating_duration_since(begun.into_std()).as_secs_f64());
        }
        let carried = self.link.carried().await?;
        found.wire_bytes = Some(carried.wire_bytes.saturating_sub(bytes_before));
        found.link_fault = carried.fault;
        if outcome == Outcome::Completed {
            prove(&mut at_destination, proof).await?;
        }
        Ok(())
    }
}

/// Sets the TCP of a namespace as the engine's hosts have it.
async fn tune(namespace: &str, engine: Engine) -> Result<(), DemoError> {
    let [receive, send] = engine.buffers();
    for (key, value) in [
        ("tcp_congestion_control", engine.congestion_control()),
        ("tcp_rmem", receive),
        ("tcp_wmem", send),
        // Nothing that one move learnt about the path may help the next.
        ("tcp_no_metrics_save", "1"),
    ] {
        let file = format!("/proc/sys/net/ipv4/{key}");
        run(&[
            "ip",
            "netns",
            "exec",
            namespace,
            "sh",
            "-c",
            "printf %s \"$1\" >\"$2\"",
            "sh",
            value,
            &file,
        ])
        .await?;
    }
    Ok(())
}

/// Lets namespaces use the congestion controls of [`ENGINES`], which only the host's own list can allow. What the list was
/// is kept in `note`, for [`restore_controls`].
///
/// What the kernel does not have stays out; the engines that need it then say so.
pub(super) async fn allow_controls(note: &Path) -> std::io::Result<()> {
    let before = std::fs::read_to_string(ALLOWED)?;
    let mut wanted: Vec<&str> = before.split_ascii_whitespace().collect();
    let allowed = wanted.len();
    for control in ENGINES.map(Engine::congestion_control) {
        if !available(control) {
            // A module that is not loaded yet. Where there is none, the kernel has it built in or not at all.
            let _ = run(&["modprobe", &format!("tcp_{control}")]).await;
        }
        if available(control) && !wanted.contains(&control) {
            wanted.push(control);
        }
    }
    if wanted.len() > allowed {
        std::fs::write(note, before.trim())?;
        std::fs::write(ALLOWED, wanted.join(" "))?;
    }
    Ok(())
}

/// Puts the host's list back to what `note` says; nothing where there is no note.
pub(super) fn restore_controls(note: &Path) -> std::io::Result<()> {
    match std::fs::read_to_string(note) {
        Ok(before) => std::fs::write(ALLOWED, before),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn available(control: &str) -> bool {
    let path = Path::new("/proc/sys/net/ipv4/tcp_available_congestion_control");
    std::fs::read_to_string(path).is_ok_and(|list| list.split_ascii_whitespace().any(|name| name == control))
}

const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
const PORT: u16 = 4700;
/// Far above any link, in bytes a second.
const NO_CAP: u64 = 10 << 30;
/// As the gateways' default.
const DOWNTIME_LIMIT_MS: u64 = 500;
const QEMU_START: Duration = Duration::from_secs(20);
/// From `completed` at the source to the first sign of life at the destination.
const ARRIVAL: Duration = Duration::from_secs(60);
