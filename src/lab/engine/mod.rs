//! What can move a guest: the gateways, and QEMU in the ways that operators use it without them.
//!
//! ```text
//! hosts (TCP as the engine's hosts have it) ─▶ gateways | qemu ─▶ Moved ─▶ the guest proves itself
//! ```

pub(super) mod gateways;
pub(super) mod hosts;
pub(super) mod outside;
pub(super) mod proof;
pub(super) mod qemu;
mod ssh;
mod timeline;
mod tls;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::heartbeat::Beat;
use super::monitor::{Monitor, MonitorError};
use super::record::{Application, Moment, Outcome};
use super::usage::Usage;

/// A way to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Engine {
    /// The gateways.
    Longhaul,
    /// The gateways, and a source whose QEMU sends over multifd channels.
    LonghaulMultifd,
    /// The gateways, and a guest of KVM under the native engine.
    LonghaulKvm,
    /// QEMU and kernel as they come: CUBIC, the kernel's default buffers, QEMU's cap of 128 MiB/s.
    QemuTcpCubicDefault,
    /// CUBIC, socket buffers of 256 MB on both hosts, no cap.
    QemuTcpCubicTuned,
    /// BBR with the kernel's default buffers, no cap.
    QemuTcpBbrDefault,
    /// BBR, socket buffers of 256 MB on both hosts, no cap.
    QemuTcpBbrTuned,
    /// The same hosts, and QEMU's own page deltas with a cache of the guest's size.
    QemuXbzrle,
    /// The same hosts, and eight zstd channels: what an expert gets out of QEMU.
    QemuMultifdZstd,
    /// The same hosts, through a tunnel of OpenSSH.
    QemuSsh,
    /// The same hosts, with QEMU's own TLS.
    QemuTls,
}

/// How QEMU's stream gets to the other host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    Tcp,
    Ssh,
    Tls,
}

/// What a move came to.
#[derive(Clone, Debug)]
pub(super) struct Moved {
    pub(super) outcome: Outcome,
    /// Why it did not complete.
    pub(super) reason: Option<String>,
    /// From the command to the first sign of life at the destination; until it was stopped where it did not finish.
    pub(super) total_seconds: Option<f64>,
    /// From the last sign of life at the source to the first at the destination.
    pub(super) downtime_seconds: Option<f64>,
    /// IP bytes of both directions that the link counted; of a move with a link.
    pub(super) wire_bytes: Option<u64>,
    /// IP bytes from the source to the destination.
    pub(super) forward_bytes: Option<u64>,
    /// Passes over the dirty set.
    pub(super) rounds: Option<u64>,
    /// The engine's own report.
    pub(super) report: Map<String, Value>,
    /// Why the link was not what its profile says.
    pub(super) link_fault: Option<String>,
    pub(super) timeline: Vec<Moment>,
    /// What the processes cost meanwhile.
    pub(super) usage: Option<Usage>,
    /// Pages that the guest rewrote a second meanwhile, at the source.
    pub(super) pages_per_second: Option<f64>,
    /// How long a client had no answer.
    pub(super) blackout_seconds: Option<f64>,
    pub(super) application: Option<Application>,
}

impl Moved {
    fn new(outcome: Outcome) -> Self {
        Self {
            outcome,
            reason: None,
            total_seconds: None,
            downtime_seconds: None,
            wire_bytes: None,
            forward_bytes: None,
            rounds: None,
            report: Map::new(),
            link_fault: None,
            timeline: Vec::new(),
            usage: None,
            pages_per_second: None,
            blackout_seconds: None,
            application: None,
        }
    }

    /// It broke.
    pub(super) fn failed(reason: String) -> Self {
        Self {
            reason: Some(reason),
            ..Self::new(Outcome::Failed)
        }
    }

    /// This machine cannot run it.
    pub(super) fn unavailable(reason: String) -> Self {
        Self {
            reason: Some(reason),
            ..Self::new(Outcome::Unavailable)
        }
    }
}

/// Pages rewritten a second between two signs of life.
fn pages_per_second(before: Option<Beat>, last: Option<Beat>) -> Option<f64> {
    let (before, last) = before.zip(last)?;
    let seconds = last.at.checked_duration_since(before.at)?.as_secs_f64();
    (seconds > 0.1).then(|| last.writes.saturating_sub(before.writes) as f64 / seconds)
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Engine {
    #[cfg(test)]
    pub(super) const ALL: [Self; 11] = [
        Self::Longhaul,
        Self::LonghaulMultifd,
        Self::LonghaulKvm,
        Self::QemuTcpCubicDefault,
        Self::QemuTcpCubicTuned,
        Self::QemuTcpBbrDefault,
        Self::QemuTcpBbrTuned,
        Self::QemuXbzrle,
        Self::QemuMultifdZstd,
        Self::QemuSsh,
        Self::QemuTls,
    ];

    /// As plans and results write it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Longhaul => "longhaul",
            Self::LonghaulMultifd => "longhaul-multifd",
            Self::LonghaulKvm => "longhaul-kvm",
            Self::QemuTcpCubicDefault => "qemu-tcp-cubic-default",
            Self::QemuTcpCubicTuned => "qemu-tcp-cubic-tuned",
            Self::QemuTcpBbrDefault => "qemu-tcp-bbr-default",
            Self::QemuTcpBbrTuned => "qemu-tcp-bbr-tuned",
            Self::QemuXbzrle => "qemu-xbzrle",
            Self::QemuMultifdZstd => "qemu-multifd-zstd",
            Self::QemuSsh => "qemu-ssh",
            Self::QemuTls => "qemu-tls",
        }
    }

    /// Whether the gateways move the guest.
    pub(super) fn has_gateways(self) -> bool {
        matches!(self, Self::Longhaul | Self::LonghaulMultifd | Self::LonghaulKvm)
    }

    /// What TCP of the engine's hosts uses. The gateways use none.
    pub(super) fn congestion_control(self) -> &'static str {
        match self {
            Self::QemuTcpCubicDefault | Self::QemuTcpCubicTuned => "cubic",
            _ if self.has_gateways() => "cubic",
            _ => "bbr",
        }
    }

    /// `tcp_rmem` and `tcp_wmem` of the engine's hosts.
    fn buffers(self) -> [&'static str; 2] {
        match self {
            Self::QemuTcpCubicDefault | Self::QemuTcpBbrDefault => DEFAULT_BUFFERS,
            _ if self.has_gateways() => DEFAULT_BUFFERS,
            _ => ["4096 131072 268435456", "4096 16384 268435456"],
        }
    }

    fn carrier(self) -> Carrier {
        match self {
            Self::QemuSsh => Carrier::Ssh,
            Self::QemuTls => Carrier::Tls,
            _ => Carrier::Tcp,
        }
    }

    /// Sets a QEMU up for a guest of `memory_mb`: both ends', without gateways, which set up the destination's themselves.
    pub(super) async fn set_up(self, monitor: &mut Monitor, memory_mb: u64) -> Result<(), MonitorError> {
        if let Some(capabilities) = self.capabilities() {
            monitor.execute("migrate-set-capabilities", capabilities).await?;
        }
        if let Some(parameters) = self.parameters(memory_mb) {
            monitor.execute("migrate-set-parameters", parameters).await?;
        }
        Ok(())
    }

    /// QEMU's capabilities that are switched on.
    fn capabilities(self) -> Option<Value> {
        let on = |name: &str| json!({ "capabilities": [{ "capability": name, "state": true }] });
        match self {
            Self::LonghaulMultifd | Self::QemuMultifdZstd => Some(on("multifd")),
            Self::QemuXbzrle => Some(on("xbzrle")),
            _ => None,
        }
    }

    /// QEMU's migration parameters for a guest of `memory_mb`.
    fn parameters(self, memory_mb: u64) -> Option<Value> {
        let mut parameters = match self {
            Self::Longhaul | Self::LonghaulKvm | Self::QemuTcpCubicDefault => return None,
            // As many as the gateway uses; the rest it sets itself.
            Self::LonghaulMultifd => return Some(json!({ "multifd-channels": 2 })),
            _ => json!({ "max-bandwidth": NO_CAP, "downtime-limit": DOWNTIME_LIMIT_MS }),
        };
        match self {
            Self::QemuMultifdZstd => {
                parameters["multifd-channels"] = json!(8);
                parameters["multifd-compression"] = json!("zstd");
            }
            Self::QemuXbzrle => {
                // QEMU wants a power of two.
                parameters["xbzrle-cache-size"] = json!(memory_mb.max(1).next_power_of_two() << 20);
            }
            Self::QemuTls => {
                parameters["tls-creds"] = json!(tls::CREDENTIALS);
                parameters["tls-hostname"] = json!(tls::HOSTNAME);
            }
            _ => {}
        }
        Some(parameters)
    }
}

/// `tcp_rmem` and `tcp_wmem` of a host with some GiB of memory (tcp(7)).
const DEFAULT_BUFFERS: [&str; 2] = ["4096 131072 6291456", "4096 16384 4194304"];
/// Far above any link, in bytes a second.
const NO_CAP: u64 = 10 << 30;
/// As the gateways' default.
const DOWNTIME_LIMIT_MS: u64 = 500;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_has_the_same_name_in_a_plan_and_in_a_result() {
        for engine in Engine::ALL {
            assert_eq!(serde_json::to_value(engine).unwrap(), engine.name());
        }
    }
}
