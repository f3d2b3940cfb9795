//! Rates: how fast a link of known capacity is filled, and how a rate is kept exactly. Arithmetic only.

mod bucket;
mod controller;

pub use bucket::TokenBucket;
pub use controller::{ControllerSettings, LinkController, RoundTrip};
