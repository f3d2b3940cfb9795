//! The controls of a link that is up: what is in force, and how to change it, whatever carries its packets.
//!
//! The emulator is told by its socket and knows what is in force. Of netem the link's state directory holds what it was
//! told, and `tc` and `ip` tell it anew.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde_json::Value;

use super::change::Directions;
use super::control::{self, ControlError};
use super::iproute::{IprouteError, run};
use super::link::{Link, LinkName, SITE_DEVICE, Site};
use super::model::LinkSettings;
use super::stats::Backend;
use super::tc;
use super::timeline::Deed;

/// A link cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum ControlsError {
    /// The emulator does not answer.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The emulator refused.
    #[error("the emulator of the link {name} refuses: {reason}")]
    Refused {
        /// The link.
        name: LinkName,
        /// Its words.
        reason: String,
    },
    /// netem has no such thing.
    #[error("the link {name} is carried by the kernel, and {reason}; build it with --backend emulator")]
    Netem {
        /// The link.
        name: LinkName,
        /// Why not.
        reason: &'static str,
    },
    /// What netem was told cannot be kept.
    #[error("{} cannot be read or written", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `ip` or `tc` failed.
    #[error(transparent)]
    Iproute(#[from] IprouteError),
}

/// The controls of one link.
#[derive(Debug)]
pub(super) struct Controls {
    name: LinkName,
    backend: Backend,
    addresses: [Ipv4Addr; 2],
    /// In force from A to B and from B to A.
    settings: [LinkSettings; 2],
    /// With netem, whether the direction is cut by us.
    cut: [bool; 2],
}

impl Controls {
    /// Of `link`.
    pub(super) fn open(link: &Link) -> Result<Self, ControlsError> {
        let settings = match link.backend {
            Backend::Emulator => {
                let answer = control::ask(&link.name.control_socket(), "settings")?;
                serde_json::from_str(&answer).map_err(|_| ControlsError::Refused {
                    name: link.name.clone(),
                    reason: answer,
                })?
            }
            Backend::Netem => match std::fs::read_to_string(settings_file(&link.name)) {
                Ok(text) => serde_json::from_str(&text).map_err(|error| ControlsError::State {
                    path: settings_file(&link.name),
                    source: error.into(),
                })?,
                Err(_) => [link.profile.direction(), link.profile.direction()],
            },
        };
        Ok(Self {
            name: link.name.clone(),
            backend: link.backend,
            addresses: link.addresses,
            settings,
            cut: [false; 2],
        })
    }

    /// In force from A to B and from B to A.
    pub(super) fn settings(&self) -> &[LinkSettings; 2] {
        &self.settings
    }

    /// Does what a time line says, now. A cut of the emulator ends by itself.
    pub(super) fn perform(&mut self, deed: &Deed) -> Result<(), ControlsError> {
        match (deed, self.backend) {
            (Deed::Cut { directions, length }, Backend::Emulator) => {
                self.ask(&format!("down {directions} {}us", length.as_micros()))
            }
            (Deed::Cut { directions, .. }, Backend::Netem) => self.set_cut(*directions, true),
            (Deed::Restore { .. }, Backend::Emulator) => Ok(()),
            (Deed::Restore { directions }, Backend::Netem) => self.set_cut(*directions, false),
            (Deed::Lose { directions, datagrams }, Backend::Emulator) => {
                self.ask(&format!("lose {directions} {datagrams}"))
            }
            (Deed::Lose { .. }, Backend::Netem) => Err(self.not_netem(tc::NO_BURSTS)),
            (Deed::Change { directions, change }, _) => {
                for index in directions.indices() {
                    let settings = change.apply(&self.settings[index]);
                    match self.backend {
                        Backend::Emulator => self.replace(index, &settings)?,
                        Backend::Netem => self.retell(index, &settings, self.cut[index])?,
                    }
                    self.settings[index] = settings;
                }
                self.keep()
            }
            (Deed::Address { site, address }, _) => self.readdress(*site, *address),
        }
    }

    /// Ends a cut before its time.
    pub(super) fn end_cut(&mut self, directions: Directions) -> Result<(), ControlsError> {
        match self.backend {
            Backend::Emulator => self.ask(&format!("up {directions}")),
            Backend::Netem => self.set_cut(directions, false),
        }
    }

    fn ask(&self, line: &str) -> Result<(), ControlsError> {
        let answer = control::ask(&self.name.control_socket(), line)?;
        let answer: Value = serde_json::from_str(&answer).unwrap_or(Value::Null);
        match answer["error"].as_str() {
            None => Ok(()),
            Some(reason) => Err(ControlsError::Refused {
                name: self.name.clone(),
                reason: reason.to_owned(),
            }),
        }
    }

    fn replace(&self, index: usize, settings: &LinkSettings) -> Result<(), ControlsError> {
        let json = serde_json::to_string(settings).unwrap_or_default();
        self.ask(&format!("replace {} {json}", Directions::one(index)))
    }

    fn set_cut(&mut self, directions: Directions, is_cut: bool) -> Result<(), ControlsError> {
        for index in directions.indices() {
            self.retell(index, &self.settings[index], is_cut)?;
            self.cut[index] = is_cut;
        }
        Ok(())
    }

    /// Tells the kernel what a direction is like. A direction is shaped where the router sends to its end.
    fn retell(&self, index: usize, settings: &LinkSettings, is_cut: bool) -> Result<(), ControlsError> {
        if let Some(reason) = tc::refusal(settings) {
            return Err(self.not_netem(reason));
        }
        let device = if index == 0 { Site::B } else { Site::A }.router_device();
        let router = self.name.router();
        let before = &self.settings[index];
        let (netem, bottleneck) = (tc::netem(settings, is_cut), tc::bottleneck(settings));
        if netem != tc::netem(before, self.cut[index]) {
            run(&format!(
                "tc -n {router} qdisc change dev {device} root handle 1: {netem}"
            ))?;
        }
        if bottleneck != tc::bottleneck(before) {
            run(&format!(
                "tc -n {router} qdisc change dev {device} parent 1:1 handle 10: {bottleneck}"
            ))?;
        }
        if settings.mtu_bytes != before.mtu_bytes {
            run(&format!(
                "ip -n {router} link set dev {device} mtu {}",
                settings.mtu_bytes
            ))?;
        }
        Ok(())
    }

    /// Keeps what netem was told.
    fn keep(&self) -> Result<(), ControlsError> {
        if self.backend == Backend::Emulator {
            return Ok(());
        }
        let path = settings_file(&self.name);
        let json = serde_json::to_vec(&self.settings).unwrap_or_default();
        std::fs::write(&path, json).map_err(|source| ControlsError::State { path, source })
    }

    /// The old address goes, so that what is bound to it has to move.
    fn readdress(&mut self, site: Site, address: Ipv4Addr) -> Result<(), ControlsError> {
        let index = if site == Site::A { 0 } else { 1 };
        let old = self.addresses[index];
        if old == address {
            return Ok(());
        }
        let namespace = self.name.site(site);
        // Without this the new address, being the second of its network, would go with the first.
        run(&format!(
            "ip netns exec {namespace} sysctl -q -w net.ipv4.conf.{SITE_DEVICE}.promote_secondaries=1"
        ))?;
        run(&format!("ip -n {namespace} address add {address}/24 dev {SITE_DEVICE}"))?;
        if self.backend == Backend::Netem {
            self.reroute(site, old, address)?;
        }
        run(&format!("ip -n {namespace} address delete {old}/24 dev {SITE_DEVICE}"))?;
        self.addresses[index] = address;
        let path = self.name.address_file(site);
        std::fs::write(&path, format!("{address}\n")).map_err(|source| ControlsError::State { path, source })
    }

    /// The router and the other site know the new address as they knew the old one.
    fn reroute(&self, site: Site, old: Ipv4Addr, address: Ipv4Addr) -> Result<(), ControlsError> {
        let (router, device) = (self.name.router(), site.router_device());
        let peer = self.name.site(site.peer());
        for (namespace, device) in [(&router, device), (&peer, SITE_DEVICE)] {
            let shown = run(&format!("ip -n {namespace} -j neighbour show to {old} dev {device}"))?;
            let entries: Value = serde_json::from_slice(&shown).unwrap_or(Value::Null);
            if let Some(hardware) = entries[0]["lladdr"].as_str() {
                run(&format!(
                    "ip -n {namespace} neighbour replace {address} lladdr {hardware} nud permanent dev {device}"
                ))?;
            }
        }
        run(&format!("ip -n {router} route replace {address}/32 dev {device}"))?;
        run(&format!("ip -n {router} route delete {old}/32 dev {device}"))?;
        Ok(())
    }

    fn not_netem(&self, reason: &'static str) -> ControlsError {
        ControlsError::Netem {
            name: self.name.clone(),
            reason,
        }
    }
}

fn settings_file(name: &LinkName) -> PathBuf {
    name.state_directory().join("settings")
}
