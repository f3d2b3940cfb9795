//! Why a measurement of the lab could not be made, or what it found that must not be.

use std::path::{Path, PathBuf};

use super::guest::ImageError;
use super::heartbeat::HeartbeatError;
use super::link::LinkError;
use super::monitor::MonitorError;
use super::plan::PlanError;
use super::prober::ProberError;
use super::process::ProcessError;
use crate::api::ClientError;
use crate::wan::ProfileError;

/// The lab could not measure, or found what must not be.
#[derive(Debug, thiserror::Error)]
pub(super) enum LabError {
    /// Namespaces need root.
    #[error(
        "making network namespaces needs root; the scripts in netem-scripts ask sudo for it, and a run without a link needs none"
    )]
    NotRoot,
    /// A tool that measures says nothing that is understood.
    #[error("{tool} gave no figures: {said}")]
    NoFigures {
        /// Which one.
        tool: &'static str,
        /// What it said.
        said: String,
    },
    /// The path of this program is unknown.
    #[error("cannot find the path of this program: {0}")]
    Unnamed(std::io::Error),
    /// A file cannot be read or written.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A plan cannot be used.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A profile cannot be used.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A gateway's configuration cannot be written as TOML.
    #[error("cannot write a gateway's configuration: {0}")]
    Configuration(toml::ser::Error),
    /// The guest's image is not to be had.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A process did not do what it should.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The link cannot be used.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The guest cannot be heard.
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
    /// The guest cannot be probed.
    #[error(transparent)]
    Prober(#[from] ProberError),
    /// A QEMU cannot be driven.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// A gateway does not answer its client.
    #[error(transparent)]
    Gateway(#[from] ClientError),
    /// A gateway runs but serves no control socket.
    #[error("the gateway of {site} serves no control socket; it said: {said}")]
    GatewayMute {
        /// Its site.
        site: &'static str,
        /// Its last words.
        said: String,
    },
    /// The gateways did not move the guest.
    #[error("the guest was not moved from {direction}: {said}")]
    NotMoved {
        /// Which way it should have gone.
        direction: &'static str,
        /// What the command and the gateways said.
        said: String,
    },
    /// The guest gave no sign of life where it ran.
    #[error("the guest gave no sign of life where it should have run")]
    NeverHeard,
    /// Memory of the guest is not as it must be.
    #[error("the guest found {bad} damaged pages of {pages}")]
    Damaged {
        /// Damaged pages.
        bad: u64,
        /// Checked pages.
        pages: u64,
    },
    /// The guest's count went back or jumped at one site.
    #[error("the guest's signs of life were out of order {jumps} times")]
    OutOfOrder {
        /// How often.
        jumps: u64,
    },
    /// The guest did not go on at the destination where it was stopped at the source.
    #[error(
        "after sign of life {last} at the source came {first} at the destination ({direction}): the guest ran twice"
    )]
    RanTwice {
        /// Which way it went.
        direction: &'static str,
        /// The last number at the source.
        last: u64,
        /// The first number at the destination.
        first: u64,
    },
    /// The client of the guest's database did not do its work.
    #[error("the client of the guest's database: {said}")]
    Client {
        /// What it said.
        said: String,
    },
    /// `--only` matches nothing.
    #[error("no case has such a name; --list shows them")]
    NoCase,
    /// A thread that watches could not be started.
    #[error("cannot start a thread: {source}")]
    Thread {
        /// What the system said.
        source: std::io::Error,
    },
    /// There are no free ports.
    #[error("no free UDP ports on the loopback device: {0}")]
    NoPort(std::io::Error),
    /// A guest could not be saved to be used again.
    #[error("the booted guest could not be saved: QEMU says {status}")]
    Unsaved {
        /// Of its migration to a file.
        status: String,
    },
    /// A fault could not be taken back.
    #[error("a fault could not be taken back: {source}")]
    Unmended {
        /// What the system said.
        source: std::io::Error,
    },
    /// A migration that was to be cancelled did not begin.
    #[error("the migration that was to be cancelled did not begin")]
    NotBegun,
    /// Someone asked the lab to end.
    #[error("stopped by {name}")]
    Interrupted {
        /// The signal.
        name: &'static str,
    },
}

impl LabError {
    /// The guest is not what it was: damaged, or there twice.
    pub(super) fn is_about_the_guest(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. } | Self::OutOfOrder { .. } | Self::RanTwice { .. }
        )
    }

    /// A file that cannot be used.
    pub(super) fn file(path: &Path, source: std::io::Error) -> Self {
        Self::File {
            path: path.to_owned(),
            source,
        }
    }
}
