//! What bulk data gets out of a link: two gateways and their link test, beside the kernel's TCP on the same link in the same run.
//!
//! Sender after sender in turn, and that several times, so that a machine that is busy for a while is busy for all of them. Achievable is
//! what the payload of full packets can be at most, once loss has taken its share: of the 1514 bytes that a packet takes of the link, 1432 are
//! stream bytes of the gateways, or 1448 of TCP.

use std::fmt;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::engine::{Engine, hosts};
use super::error::LabError;
use super::gateway_file::LinkSection;
use super::interrupt::interrupted;
use super::process::{Process, run as run_process};
use super::record::append;
use super::site::Site;
use super::stage::Stage;
use super::table::{Table, median, or_dash};
use super::usage::Watch;
use crate::config::units::{parse_duration, show_duration};
use crate::proto::page::ByteRate;

/// Fills links by two gateways and by the kernel's TCP, one after the other, and shows what arrives.
#[derive(Clone, Debug, Args)]
#[command(args_override_self = true)]
pub struct GoodputArgs {
    /// Rates of the links.
    #[arg(long, value_name = "RATE", value_delimiter = ',', default_value = "300mbit,1gbit")]
    pub rates: Vec<ByteRate>,
    /// What the links lose, independently in both directions, in percent.
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_value = "0,0.1,1")]
    pub losses: Vec<f64>,
    /// Round trip time of the links.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "150ms")]
    pub rtt: Duration,
    /// How long each sender fills the link.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "10s")]
    pub time: Duration,
    /// How often each sender has its turn.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeat: u32,
    /// Where each turn goes as a line of JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory of the script that makes the link.
    #[arg(long, value_name = "DIR", default_value = "netem-scripts")]
    pub scripts: PathBuf,
}

/// Who fills the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Sender {
    /// `longhaul link-test` between two gateways that know rate and RTT.
    Longhaul,
    /// BBR and socket buffers of 256 MB at both ends.
    TcpBbrTuned,
    /// CUBIC and the kernel's default buffers.
    TcpCubicDefault,
}

impl Sender {
    const ALL: [Self; 3] = [Self::Longhaul, Self::TcpBbrTuned, Self::TcpCubicDefault];

    /// The hosts of the engine that moves guests in this way.
    fn engine(self) -> Engine {
        match self {
            Self::Longhaul => Engine::Longhaul,
            Self::TcpBbrTuned => Engine::QemuTcpBbrTuned,
            Self::TcpCubicDefault => Engine::QemuTcpCubicDefault,
        }
    }

    /// Payload in what a full packet takes of the link.
    fn efficiency(self) -> f64 {
        match self {
            Self::Longhaul => 1432.0 / 1514.0,
            _ => 1448.0 / 1514.0,
        }
    }
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Longhaul => "longhaul",
            Self::TcpBbrTuned => "TCP BBR tuned",
            Self::TcpCubicDefault => "TCP CUBIC default",
        })
    }
}

/// One turn of one sender.
#[derive(Clone, Debug, Serialize)]
struct Turn {
    sender: Sender,
    rate_bits_per_second: u64,
    loss_percent: f64,
    rtt_seconds: f64,
    repetition: u32,
    /// Payload that arrived, once the link was full.
    goodput_bits_per_second: f64,
    /// Of what this sender's payload can be at most on this link.
    share_of_achievable: f64,
    /// CPU of both gateways for a Gbit of payload.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_seconds_per_gbit: Option<f64>,
    /// Share of its time for which a gateway waited for a CPU that others had.
    #[serde(skip_serializing_if = "Option::is_none")]
    waited_share: Option<f64>,
    /// Why the link was not what was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    link_fault: Option<String>,
}

/// Runs the comparison and returns its exit code: 0 every turn was measured, 1 not so, 2 nothing was begun.
pub async fn run(args: GoodputArgs) -> u8 {
    let prepared = async {
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::NotRoot);
        }
        if let Some(json) = &args.json {
            append(json, "")?;
        }
        let longhaul = std::env::current_exe().map_err(LabError::Unnamed)?;
        let stage = Stage::new(&args.scripts.join("link"), say).await?;
        Ok((longhaul.display().to_string(), stage))
    };
    let (longhaul, stage) = match prepared.await {
        Ok(prepared) => prepared,
        Err(error) => {
            say(&error.to_string());
            return 2;
        }
    };
    stage.allow_controls().await;
    let mut turns = Vec::new();
    let measured = tokio::select! {
        measured = measure(&args, &longhaul, &stage, &mut turns) => measured,
        name = interrupted() => Err(LabError::Interrupted { name }),
    };
    stage.clean(None).await;
    if let Err(error) = &measured {
        say(&error.to_string());
    }
    let _ = writeln!(std::io::stdout(), "{}", table(&args, &turns));
    u8::from(measured.is_err())
}

async fn measure(args: &GoodputArgs, longhaul: &str, stage: &Stage, turns: &mut Vec<Turn>) -> Result<(), LabError> {
    for &rate in &args.rates {
        for &loss_percent in &args.losses {
            for repetition in 1..=args.repeat {
                for sender in Sender::ALL {
                    let link = Asked {
                        rate,
                        loss_percent,
                        rtt: args.rtt,
                    };
                    let turn = turn(args, longhaul, stage, sender, &link, repetition).await?;
                    say(&format!(
                        "{rate}, {loss_percent} % loss, {sender}: {:.1} Mbit/s, {:.1} % of achievable",
                        turn.goodput_bits_per_second / 1e6,
                        turn.share_of_achievable * 100.0
                    ));
                    if let Some(json) = &args.json {
                        let line = serde_json::to_string(&turn).expect("a turn is plain data");
                        append(json, &format!("{line}\n"))?;
                    }
                    turns.push(turn);
                }
            }
        }
    }
    Ok(())
}

/// The link that is asked for.
struct Asked {
    rate: ByteRate,
    loss_percent: f64,
    rtt: Duration,
}

/// One turn, from an empty stage to an empty stage.
async fn turn(
    args: &GoodputArgs,
    longhaul: &str,
    stage: &Stage,
    sender: Sender,
    link: &Asked,
    repetition: u32,
) -> Result<Turn, LabError> {
    let profile = stage.directory.join("link.toml");
    let rtt = show_duration(link.rtt);
    let text = format!(
        "rtt = \"{rtt}\"\nrate = \"{}\"\nloss = \"{}%\"\n",
        link.rate, link.loss_percent
    );
    std::fs::write(&profile, text).map_err(|source| LabError::file(&profile, source))?;
    stage
        .link
        .up(&profile.display().to_string(), u64::from(repetition))
        .await?;
    let sites = stage.sites()?;
    let sent = async {
        for site in &sites {
            hosts::tune(&site.namespace, sender.engine()).await?;
        }
        match sender {
            Sender::Longhaul => by_gateways(longhaul, &sites, link, args.time).await,
            _ => by_tcp(&sites, args.time).await,
        }
    };
    let sent = sent.await;
    stage.kill_all().await;
    let fault = stage.link.carried().await.ok().and_then(|carried| carried.fault);
    stage.link.down().await?;
    stage.remove_sites(&sites);
    let sent = sent?;
    let achievable = link.rate.0 as f64 * 8.0 * (1.0 - link.loss_percent / 100.0) * sender.efficiency();
    Ok(Turn {
        sender,
        rate_bits_per_second: link.rate.0 * 8,
        loss_percent: link.loss_percent,
        rtt_seconds: link.rtt.as_secs_f64(),
        repetition,
        goodput_bits_per_second: sent.bits_per_second,
        share_of_achievable: sent.bits_per_second / achievable,
        cpu_seconds_per_gbit: sent.cpu_seconds.map(|seconds| {
            let gbit = sent.bits_per_second * args.time.as_secs_f64() / 1e9;
            seconds / gbit.max(1e-9)
        }),
        waited_share: sent.waited_share,
        link_fault: fault,
    })
}

struct Sent {
    bits_per_second: f64,
    cpu_seconds: Option<f64>,
    waited_share: Option<f64>,
}

async fn by_gateways(longhaul: &str, sites: &[Site; 2], link: &Asked, time: Duration) -> Result<Sent, LabError> {
    let section = LinkSection {
        rate: link.rate.to_string(),
        rtt: show_duration(link.rtt),
        keeps_pages: false,
    };
    let [a, b] = sites;
    let gateways = [
        a.start_gateway(longhaul, b, None, &section).await?,
        b.start_gateway(longhaul, a, None, &section).await?,
    ];
    a.pair(longhaul, b).await?;
    let watch = Watch::start([a.directory.clone(), b.directory.clone()]);
    let tested = a.test_link(longhaul, b, time).await;
    let usage = watch.stop();
    for gateway in gateways {
        gateway.kill().await;
    }
    let goodput = tested?;
    Ok(Sent {
        bits_per_second: goodput * 8.0,
        cpu_seconds: Some(usage.cpu_seconds.source + usage.cpu_seconds.destination),
        waited_share: usage.waited_for_others(),
    })
}

/// TCP's first three seconds are left out: its start-up is not what is compared.
const LEFT_OUT: u64 = 3;

async fn by_tcp(sites: &[Site; 2], time: Duration) -> Result<Sent, LabError> {
    let [a, b] = sites;
    let address = b.listen.ip().to_string();
    let server = ["iperf3", "-s", "-1", "-B", &address].map(str::to_owned);
    let log = b.directory.join("iperf3.log");
    let mut server = Process::spawn("iperf3 at site-b", Some(&b.namespace), &server, &log)?;
    wait_for_server(b, &mut server).await?;
    let seconds = time.as_secs().max(1).to_string();
    let left_out = LEFT_OUT.to_string();
    let mut client = vec!["ip", "netns", "exec", &a.namespace, "iperf3", "-c", &address, "-J"];
    client.extend(["-t", &seconds, "-O", &left_out]);
    let said = run_process(&client).await;
    server.kill().await;
    let said = said?;
    let result: Value = serde_json::from_str(&said).unwrap_or_default();
    let rate = result["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(Sent {
        bits_per_second: rate.ok_or(LabError::NoFigures { tool: "iperf3", said })?,
        cpu_seconds: None,
        waited_share: None,
    })
}

/// Until the server listens on its port.
async fn wait_for_server(site: &Site, server: &mut Process) -> Result<(), LabError> {
    for _ in 0..SERVER_LOOKS {
        server.check()?;
        let listening = run_process(&[
            "ip",
            "netns",
            "exec",
            &site.namespace,
            "ss",
            "-Hltn",
            "sport",
            "=",
            ":5201",
        ])
        .await?;
        if !listening.trim().is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(LabError::NoFigures {
        tool: "iperf3",
        said: "its server does not listen".to_owned(),
    })
}

const SERVER_LOOKS: u32 = 250;

fn table(args: &GoodputArgs, turns: &[Turn]) -> Table {
    let mut table = Table::new(&[
        "link",
        "sender",
        "goodput (median)",
        "of achievable",
        "worst",
        "CPU s/Gbit",
        "turns",
        "late link",
    ]);
    for rate in &args.rates {
        for loss in &args.losses {
            for sender in Sender::ALL {
                let of = |figure: fn(&Turn) -> Option<f64>| {
                    let mine = turns.iter().filter(move |turn| {
                        turn.sender == sender && turn.rate_bits_per_second == rate.0 * 8 && turn.loss_percent == *loss
                    });
                    mine.filter_map(figure).collect::<Vec<f64>>()
                };
                let shares = of(|turn| Some(turn.share_of_achievable));
                let percent = |share: f64| format!("{:.1} %", share * 100.0);
                let middle = |values: &[f64]| median(values.iter().copied());
                table.row([
                    format!("{rate}, {loss} %"),
                    sender.to_string(),
                    or_dash(middle(&of(|turn| Some(turn.goodput_bits_per_second))), |rate| {
                        format!("{:.1} Mbit/s", rate / 1e6)
                    }),
                    or_dash(middle(&shares), percent),
                    or_dash(shares.iter().copied().reduce(f64::min), percent),
                    or_dash(middle(&of(|turn| turn.cpu_seconds_per_gbit)), |seconds| {
                        format!("{seconds:.2}")
                    }),
                    shares.len().to_string(),
                    of(|turn| turn.link_fault.as_ref().map(|_| 1.0)).len().to_string(),
                ]);
            }
        }
    }
    table
}

fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
