//! The WAN between two sites, for demo, lab and tests.
//!
//! ```text
//! profile ── a link as an operator states it (TOML): rtt, rate, queue, loss, jitter, mtu, …, and what happens to it (event)
//!    │
//!    ├─ timeline ── events as steps in the order of time, change ── one setting, new (pure)
//!    │     └─ play ── does them when they are due;  controls ── on a link that is up, of either backend
//!    │
//!    ├─ shell ── netem-scripts/link: namespaces, and `tc netem` where the kernel has it;  tc ── its words
//!    │
//!    └─ model ── one direction as arithmetic; loss, ordinals and random numbers are its parts
//!          │      (pure: also for an in-process simulation)
//!          └─ direction ── frames in, runs of surviving segments out; arena and segments are its parts
//!                └─ emulator ── two TUN devices, one thread;  control ── its socket and signals, command ── its lines
//!                     └─ wake_up ── when did a packet come that woke it?
//!
//! show ── what a link carried, of either backend
//! check ── does it do what its profile asks? By rtt and probe, within interval; beside it what other tools say; starvation, awake
//! ```
//!
//! Loss, rate and queue apply to each datagram as a wire would carry it, also inside the trains of segmentation offload.
//! All byte counts are IP bytes; the bottleneck adds [`ETHERNET_OVERHEAD`] to each datagram, as `tc` does.
//! `unsafe` is only in `tun` and `schedule`.

mod arena;
mod args;
mod awake;
mod change;
mod check;
mod clock;
mod command;
mod control;
mod controls;
mod direction;
mod emulator;
mod event;
mod interval;
mod iproute;
mod lateness;
mod link;
mod loss;
mod model;
mod ordinals;
mod play;
mod probe;
mod profile;
mod random;
mod rtt;
mod schedule;
mod segments;
mod shell;
mod show;
mod starvation;
mod stats;
mod tc;
mod timeline;
mod tools;
mod tun;
mod units;
mod wake_up;

pub use args::{EmulatorArgs, WanError, run};
pub use change::{Change, Directions, InvalidChange};
pub use check::{Beside, CheckError, CheckReport, Finding, Refusal, check};
pub use control::{ControlError, ask};
pub use controls::ControlsError;
pub use emulator::EmulatorError;
pub use event::{Event, Happening};
pub use iproute::IprouteError;
pub use lateness::LatenessSummary;
pub use link::{InvalidLinkName, Link, LinkError, LinkName, SITE_DEVICE, Site, enter_namespace};
pub use loss::{GilbertElliott, Loss};
pub use model::{DropCause, ETHERNET_OVERHEAD, Fate, Jitter, LinkModel, LinkSettings, Reordering, Verdict};
pub use ordinals::{InvalidOrdinals, Ordinals};
pub use play::{Ending, PlayError, Played, play};
pub use probe::{OneWayDelay, ProbeError, ProbeReport, ProbeSettings, probe};
pub use profile::{Mistake, Profile, ProfileError};
pub use random::{OutsideZeroToOne, Probability};
pub use rtt::{RttReport, measure_rtt};
pub use show::{ShowError, show};
pub use stats::{Backend, DirectionStats, Dropped, Drops, EmulatorStats, LinkStats, Scheduling, Traffic};
pub use timeline::{Deed, Step, states, steps};
pub use tools::{Pings, Stream, ToolError};
