//! `longhaul peers`: whom this site knows, whom it trusts, whom it reaches.

use super::control::ControlArgs;
use super::output::{OutputArgs, seconds, table};
use super::{Failure, YES};
use crate::api::PeerStatus;

/// Shows every peer with its trust, connection and RTT.
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
                peer.fingerprint
                    .map_or_else(dash, |fingerprint| fingerprint.to_string()),
            ]
        })
        .collect();
    table(["PEER", "ADDRESS", "TRUST", "CONNECTION", "RTT", "FINGERPRINT"], &rows)
}
