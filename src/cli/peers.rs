//! `longhaul peers`: whom this site knows, whom it trusts, whom it reaches.

use super::control::ControlArgs;
use super::output::{OutputArgs, seconds, table};
use super::{Failure, YES};
use crate::api::PeerStatus;
use crate::proto::page::ByteRate;

/// Shows every peer with its trust, connection, RTT and the rate that holds now.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let peers = args.control.client()?.peers().await?;
    args.output.result(&peers, |peers| text(peers));
    Ok(YES)
}

fn text(peers: &[PeerStatus]) -> String {
    if peers.is_empty() {
        return "no peers; `longhaul pair --invite` makes one".to_owned();
    }
    let dash = || "-".to_owned();
    let rows: Vec<_> = peers
        .iter()
        .map(|peer| {
            [
                peer.name.clone(),
                peer.address.clone().unwrap_or_else(dash),
                peer.trust.to_string(),
                if peer.connected { "connected" } else { "not connected" }.to_owned(),
                peer.rtt_seconds.map_or_else(dash, seconds),
                peer.rate_bytes_per_second
                    .map_or_else(dash, |rate| ByteRate(rate).to_string()),
                peer.fingerprint
                    .map_or_else(dash, |fingerprint| fingerprint.to_string()),
            ]
        })
        .collect();
    let head = ["PEER", "ADDRESS", "TRUST", "CONNECTION", "RTT", "RATE", "FINGERPRINT"];
    table(head, &rows)
}
