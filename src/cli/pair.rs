//! `longhaul pair`: two sites trust each other from now on.

use std::io::BufRead as _;
use std::io::Read as _;
use std::time::Duration;

use super::control::ControlArgs;
use super::output::{OutputArgs, note, seconds};
use super::{Failure, YES};
use crate::api::{AcceptInvite, InviteRequest, PairByFingerprint, Paired};
use crate::config::PeerAddress;
use crate::config::units::{parse_duration, parse_name};
use crate::store::trust::Fingerprint;

/// Makes two sites trust each other.
///
/// By a code: `longhaul pair --invite` at one site prints it, `longhaul pair CODE` at the other uses it, and both trust
/// each other. The code can be used once and expires; who has it can pair, so send it as you would send a password. By
/// fingerprints: `longhaul fingerprint` at each site, compared by voice, then `longhaul pair --peer …` at each site.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
#[command(group(clap::ArgGroup::new("way").required(true).args(["code", "invite", "peer"])))]
pub(super) struct Args {
    /// Code from the other site; - reads it from stdin, which keeps it out of the history of the shell.
    #[arg(value_name = "CODE")]
    code: Option<String>,

    /// Print a code for the other site.
    #[arg(long)]
    invite: bool,

    /// How long the code can be used, at most 24h [default: 10m]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, conflicts_with_all = ["code", "peer"])]
    valid_for: Option<Duration>,

    /// Name of the other site.
    #[arg(long, value_name = "NAME", value_parser = parse_name, requires = "fingerprint", requires = "address")]
    peer: Option<String>,

    /// Fingerprint of the other site, as `longhaul fingerprint` prints it there.
    #[arg(long, value_name = "FINGERPRINT", requires = "peer", conflicts_with_all = ["code", "invite"])]
    fingerprint: Option<Fingerprint>,

    /// With --peer: where the other site is called. With --invite: where it calls this site [default: advertise of the
    /// gateway]
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "code")]
    address: Option<PeerAddress>,

    #[command(flatten)]
    output: OutputArgs,

    #[command(flatten)]
    control: ControlArgs,
}

pub(super) async fn run(args: Args) -> Result<u8, Failure> {
    let client = args.control.client()?;
    if let Some(code) = args.code {
        let code = if code == "-" { read_code()? } else { code };
        let answer = client.accept_invite(&AcceptInvite { code }).await;
        let paired = answer.map_err(|error| Failure::of_change(&error, LOOK))?;
        args.output.result(&paired, text);
        return Ok(YES);
    }
    if let (Some(peer), Some(fingerprint), Some(address)) = (args.peer, args.fingerprint, &args.address) {
        let request = PairByFingerprint {
            peer,
            fingerprint,
            address: address.to_string(),
        };
        let answer = client.pair_by_fingerprint(&request).await;
        let paired = answer.map_err(|error| Failure::of_change(&error, LOOK))?;
        args.output.result(&paired, text);
        note("now do the same at the other site, with the fingerprint of this one");
        return Ok(YES);
    }
    let request = InviteRequest {
        address: args.address.map(|address| address.to_string()),
        valid_for_seconds: args.valid_for.map(|valid| valid.as_secs_f64()),
    };
    let invitation = client.invite(&request).await?;
    args.output.result(&invitation, |invitation| invitation.code.clone());
    note(&format!(
        "within {}, run `longhaul pair CODE` at the other site; the code works once and is void when this gateway restarts",
        seconds(invitation.valid_for_seconds)
    ));
    Ok(YES)
}

fn text(paired: &Paired) -> String {
    let address = paired.address.as_deref().unwrap_or("an address that is not known yet");
    format!("{} at {address} is trusted: {}", paired.peer, paired.fingerprint)
}

fn read_code() -> Result<String, Failure> {
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .take(MAX_CODE_BYTES)
        .read_line(&mut line)
        .map_err(|error| Failure::no(format!("cannot read the code from stdin: {error}")))?;
    Ok(line.trim().to_owned())
}

/// Above any code, with the longest address and name in it.
const MAX_CODE_BYTES: u64 = 4096;

const HELP: &str = "\
Examples:
  longhaul pair --invite --address frankfurt.example.net:4646
  longhaul pair lh1.Zm9v…
  longhaul pair - < code.txt
  longhaul pair --peer tokyo --fingerprint sha256:… --address tokyo.example.net:4646

Exit codes: 0 done, 2 not (nothing was trusted), 3 the gateway went away before it answered: `longhaul peers` tells.";

const LOOK: &str = "`longhaul peers` tells who is trusted";
