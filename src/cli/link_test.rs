//! `longhaul link-test`: what the link to a peer is worth, without a VM.

use std::fmt::Write as _;
use std::str::FromStr as _;
use std::time::Duration;

use super::control::ControlArgs;
use super::output::{OutputArgs, bytes, note, seconds, wire_rate};
use super::{Failure, YES};
use crate::api::{LinkTest, LinkTestRequest, RoundTrips};
use crate::config::units::{parse_duration, parse_name, parse_size};
use crate::proto::page::ByteRate;

/// Measures the link to another site: round trip, loss, packet size, and how much arrives when it is filled.
///
/// Both gateways run; no VM is touched. The link is filled at the configured rate for some seconds, behind every
/// migration that is on it. It measures the way from here to there; ask the gateway of the other site for the way back.
/// Ctrl-C ends it and leaves nothing behind.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub(super) struct Args {
    /// Site to measure the link to.
    #[arg(long = "to", value_name = "PEER", value_parser = parse_name)]
    peer: String,

    /// How long the link is filled, such as 30s; 1s to 10m.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "10s")]
    time: Duration,

    /// Say what a migration of a guest with so much memory in use would take, such as 16gib.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,

    /// What that guest writes to its memory, such as 160mbit; `longhaul migrate --dry-run` measures it.
    #[arg(long, value_name = "RATE", value_parser = ByteRate::from_str, requires = "memory")]
    dirty_rate: Option<ByteRate>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let request = LinkTestRequest {
        peer: args.peer,
        seconds: args.time.as_secs_f64(),
        memory_bytes: args.memory,
        dirty_bytes_per_second: args.dirty_rate.map_or(0, |rate| rate.0),
    };
    note(&format!(
        "testing the link to {}: it is filled for {}",
        request.peer,
        seconds(request.seconds)
    ));
    let test = args.control.client()?.test_link(&request).await?;
    args.output.result(&test, text);
    Ok(YES)
}

fn text(test: &LinkTest) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<13}{value}");
    };
    line("round trip", round_trips(&test.idle));
    line("while filled", round_trips(&test.loaded));
    line(
        "goodput",
        match test.achievable_bytes_per_second {
            Some(achievable) => format!(
                "{}, {:.1} % of the {} that a link of {} with this loss carries",
                wire_rate(test.goodput_bytes_per_second as f64),
                100.0 * test.goodput_bytes_per_second as f64 / achievable.max(1) as f64,
                wire_rate(achievable as f64),
                wire_rate(test.capacity_bytes_per_second.unwrap_or_default() as f64),
            ),
            None => wire_rate(test.goodput_bytes_per_second as f64),
        },
    );
    line("lost", format!("{:.2} % of the packets", 100.0 * test.lost_share));
    line("packets", format!("of up to {} bytes of UDP payload", test.mtu_bytes));
    line("sent", bytes(test.wire_bytes));
    if let Some(forecast) = &test.forecast {
        line(
            "migration",
            format!(
                "{}, {} after reduction, downtime {}",
                seconds(forecast.total_seconds),
                bytes(forecast.wire_bytes),
                seconds(forecast.downtime_seconds)
            ),
        );
        let verdict = if forecast.converges {
            "it converges"
        } else {
            "it does NOT converge"
        };
        line("", format!("{verdict}: {}", forecast.reason));
    }
    for finding in &test.findings {
        line("note", finding.clone());
    }
    text
}

/// Fractions of a millisecond tell on short links.
fn round_trips(trips: &RoundTrips) -> String {
    let millis = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
    format!(
        "{} (least {}, p99 {}, jitter {})",
        millis(trips.median_seconds),
        millis(trips.least_seconds),
        millis(trips.p99_seconds),
        millis(trips.jitter_seconds)
    )
}

const HELP: &str = "\
Examples:
  longhaul link-test --to tokyo
  longhaul link-test --to tokyo --time 60s --memory 16gib --dirty-rate 160mbit

Exit code: 0 measured, 2 not.";
