//! The WAN between two sites, for demo, lab and tests.
//!
//! ```text
//! profile ── a link as an operator states it (TOML): rtt, rate, queue, loss, jitter, mtu
//!    │
//!    ├─ shell ── netem-scripts/link: namespaces, and `tc netem` where the kernel has it
//!    │
//!    └─ model ── one direction as arithmetic; loss and random numbers are its parts
//!          │      (pure: also for an in-process simulation)
//!          └─ direction ── frames in, runs of surviving segments out; arena and segments are its parts
//!                └─ emulator ── two TUN devices, one thread;  control ── its socket and signals
//!
//! show ── what a link carried, of either backend      probe, check ── does it do what its profile asks?
//! ```
//!
//! Loss, rate and queue apply to each datagram as a wire would carry it, also inside the trains of segmentation offload.
//! All byte counts are IP bytes; the bottleneck adds [`ETHERNET_OVERHEAD`] to each datagram, as `tc` does.
//! `unsafe` is only in `tun`.

mod arena;
mod args;
mod check;
mod clock;
mod command;
mod control;
mod direction;
mod emulator;
mod lateness;
mod link;
mod loss;
mod model;
mod probe;
mod profile;
mod random;
mod segments;
mod shell;
mod show;
mod stats;
mod tun;
mod units;

pub use args::{EmulatorArgs, WanError, run};
pub use check::{CheckError, CheckReport, Finding, check};
pub use control::{ControlError, ask};
pub use emulator::EmulatorError;
pub use lateness::LatenessSummary;
pub use link::{InvalidLinkName, Link, LinkError, LinkName, SITE_DEVICE, Site, enter_namespace};
pub use loss::{GilbertElliott, Loss};
pub use model::{DropCause, ETHERNET_OVERHEAD, Jitter, LinkModel, LinkSettings, Verdict};
pub use probe::{OneWayDelay, ProbeError, ProbeReport, ProbeSettings, probe};
pub use profile::{Mistake, Profile, ProfileError};
pub use random::Probability;
pub use show::{ShowError, show};
pub use stats::{Backend, DirectionStats, Dropped, Drops, EmulatorStats, LinkStats, Scheduling, Traffic};
