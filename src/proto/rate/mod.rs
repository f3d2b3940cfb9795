//! Rates: how fast a link of known capacity is filled, how a rate is kept exactly, what a path loses. Arithmetic only.

mod bucket;
mod controller;
mod loss;
mod recent;

pub use bucket::TokenBucket;
pub use controller::{ControllerSettings, LinkController, RoundTrip};
pub use loss::LossMeter;
