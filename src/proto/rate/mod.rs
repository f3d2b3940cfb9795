//! Rates: how fast a link of known capacity is filled, how the rate of an unknown path is found, how a rate is kept exactly, who of several
//! sends next, which rate holds when, what a path loses, when it is interrupted. Arithmetic only.

mod bucket;
mod calendar;
mod controller;
mod loss;
mod overdue;
mod probe;
mod recent;
mod scheduler;

pub use bucket::TokenBucket;
pub use calendar::{Calendar, CalendarEntry, Hours, InvalidHours, InvalidWeekdays, Weekdays};
pub use controller::{ControllerSettings, LinkController, RoundTrip};
pub use loss::LossMeter;
pub use overdue::Overdue;
pub use probe::ProbeController;
pub use scheduler::{Class, FlowId, Scheduler, Weight};
