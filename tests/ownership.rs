//! The ownership machines: every step as a golden table, and every history of a small world explored.

#[path = "ownership/explore.rs"]
mod explore;
#[path = "ownership/table.rs"]
mod table;
#[path = "ownership/world.rs"]
mod world;
