//! Convergence: rounds, the downtime budget, the forecast, and what to tell the operator meanwhile.
//!
//! QEMU decides the moment of switchover by `remaining bytes <= bandwidth x downtime-limit`, both in vmm bytes and at our
//! socket. What it cannot know is the rest of the way: one-way delay, what waits in the gateway, syncs to disk, loading at
//! the destination. [`budget`] subtracts that; [`policy`] asks for the shortest stop that the guest's writing allows and
//! widens it, up to the budget, only where rounds stop shrinking.

pub mod budget;
pub mod disks;
pub mod estimate;
pub mod forecast;
pub mod guest_io;
pub mod heat;
pub mod outlook;
pub mod policy;
pub mod restoring;
pub mod rounds;

pub use budget::{Backlog, Budget, BudgetError, FixedCosts};
pub use disks::DiskRounds;
pub use estimate::{EncoderMeter, GoodputMeter, PathMeter, RatioMeter, usable_ratio};
pub use forecast::{Forecast, ForecastInput};
pub use guest_io::{GuestIo, ReadPace, Served};
pub use heat::{Heat, Held};
pub use outlook::{Outlook, ProgressTracker};
pub use policy::{Decision, Policy, Sample};
pub use restoring::{Report, Restoring};
pub use rounds::{Round, Rounds};
