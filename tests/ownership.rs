//! The ownership machines: every step as a golden table, and every history of a small world explored.
#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

#[path = "ownership/deeds.rs"]
mod deeds;
#[path = "ownership/explore.rs"]
mod explore;
#[path = "ownership/surroundings.rs"]
mod surroundings;
#[path = "ownership/table.rs"]
mod table;
#[path = "ownership/world.rs"]
mod world;
