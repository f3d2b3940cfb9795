//! Rates: how fast a link of known capacity is filled, how the rate of an unknown path is found, how a rate is kept exactly, what a path
//! loses, which rate holds when. Arithmetic only.

mod bucket;
mod calendar;
mod controller;
mod loss;
mod probe;
mod recent;

pub use bucket::TokenBucket;
pub use calendar::{Calendar, CalendarEntry, Hours, InvalidHours, InvalidWeekdays, Weekdays};
pub use controller::{ControllerSettings, LinkController, RoundTrip};
pub use loss::LossMeter;
pub use probe::ProbeController;
