//! The command line against a scripted gateway: exit codes, what goes to stdout and stderr, signals.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod gateway;
mod migrate;
mod verbs;
