//! Does a link do what its profile asks? Measured from its two sites with ping and the probe, and judged by fixed tolerances.
//!
//! | measured | asked | tolerance |
//! | --- | --- | --- |
//! | RTT, mean of 100 pings | `rtt` | + 0.5 ms, with netem + 1 ms |
//! | deviation of the RTT | 0 | 0.3 ms, without jitter |
//! | at 0.9 x `rate`: drops at the queue | 0 | 0 |
//! | at 0.9 x `rate`: one-way delay, p99 | `rtt` / 2 | + 2 ms |
//! | at 0.9 x `rate`, in trains: lost datagrams | `loss` | the 99.9 % interval |
//! | … mean run of lost datagrams | 1 / (1 - p), in bursts 1 / r | 15 %, or 99.9 % where few were lost |
//! | at 1.1 x `rate`: offered, else the machine is too slow to tell | 1.1 x `rate` | 5 % of `rate` |
//! | at 1.1 x `rate`: payload rate | `rate` x payload / wire size | 1 % |
//! | at 1.1 x `rate`: one-way delay, p50 | `rtt` / 2 + `queue` | 1 ms |
//! | emulator: lateness p99, drops of its own | 0 | 500 us, none |
//!
//! A run of lost datagrams as long as the train means that offload packets are lost whole: the trap of a netem queue on the
//! sender's own device.

use std::fmt;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use super::control::{self, ControlError};
use super::link::{Link, Site};
use super::loss::Loss;
use super::model::ETHERNET_OVERHEAD;
use super::probe::{ProbeError, ProbeReport, ProbeSettings, probe};
use super::random::Probability;
use super::show::{ShowError, show};
use super::stats::Backend;
use crate::proto::page::ByteRate;

/// What was measured, beside what was asked.
#[derive(Clone, Debug, Serialize)]
pub struct CheckReport {
    /// Name of the link.
    pub name: String,
    /// Name of its profile.
    pub profile: String,
    /// What carries its packets.
    pub backend: Backend,
    /// One for each measure.
    pub findings: Vec<Finding>,
    /// All are within their tolerances.
    pub ok: bool,
}

/// One measure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What it is.
    pub measure: String,
    /// Of all its numbers.
    pub unit: &'static str,
    /// What the profile asks for.
    pub asked: f64,
    /// What was measured.
    pub measured: f64,
    /// The least that is allowed.
    pub least: f64,
    /// The most that is allowed.
    pub most: f64,
    /// It is allowed.
    pub ok: bool,
}

/// A check cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The probe failed.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The counters cannot be read.
    #[error(transparent)]
    Show(#[from] ShowError),
    /// The emulator does not answer.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// `ping` failed or said something else.
    #[error("ping across the link failed: {0}")]
    Ping(String),
}

/// Measures `link`, which must carry nothing else meanwhile. Takes about ten seconds when `duration`, of each of the four
/// probes, is two.
///
/// # Errors
/// [`CheckError`] where something could not be measured; a link that is off is no error.
pub fn check(link: &Link, duration: Duration) -> Result<CheckReport, CheckError> {
    let mut findings = Vec::new();
    if link.backend == Backend::Emulator {
        control::ask(&link.name.control_socket(), "reset")?;
    }
    let before = show(link)?;
    ping(link, &mut findings)?;
    for (from, label) in [(Site::A, "A to B"), (Site::B, "B to A")] {
        let queue_drops = |stats: &super::stats::LinkStats| match from {
            Site::A => stats.ab.dropped.queue.packets,
            Site::B => stats.ba.dropped.queue.packets,
        };
        let at = |tenths: u64| ProbeSettings {
            from,
            rate: ByteRate(link.profile.rate.0 / 10 * tenths),
            segments: segments(link),
            duration,
        };
        let start = show(link)?;
        let below = probe(link, at(9))?;
        let dropped = queue_drops(&show(link)?) - queue_drops(&start);
        findings.push(Finding::new(
            format!("{label}, 0.9 x rate: drops at the queue"),
            "datagrams",
            0.0,
            dropped as f64,
            0.0..=0.0,
        ));
        judge_below(link, label, &below, &mut findings);
        judge_above(link, label, &probe(link, at(11))?, &mut findings);
    }
    let after = show(link)?;
    if let Some(emulator) = &after.emulator {
        let p99 = emulator.lateness.p99_us;
        findings.push(Finding::new(
            "emulator: lateness, p99".to_owned(),
            "us",
            0.0,
            p99,
            0.0..=MAX_LATENESS_US,
        ));
    }
    for (label, before, after) in [("A to B", before.ab, after.ab), ("B to A", before.ba, after.ba)] {
        let own = |drops: super::stats::Drops| drops.overrun.packets + drops.ingress.packets + drops.egress.packets;
        let dropped = own(after.dropped) - own(before.dropped);
        findings.push(Finding::new(
            format!("{label}: drops outside the model"),
            "datagrams",
            0.0,
            dropped as f64,
            0.0..=0.0,
        ));
    }
    Ok(CheckReport {
        name: link.name.to_string(),
        profile: link.profile.name.clone(),
        backend: link.backend,
        ok: findings.iter().all(|finding| finding.ok),
        findings,
    })
}

fn ping(link: &Link, findings: &mut Vec<Finding>) -> Result<(), CheckError> {
    let address = Site::B.address().to_string();
    let output = Command::new("ip")
        .args([
            "netns",
            "exec",
            &link.name.site(Site::A),
            "ping",
            "-q",
            "-n",
            "-c",
            "100",
            "-i",
            "0.01",
            "-W",
            "3",
        ])
        .arg(&address)
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| CheckError::Ping(format!("ip cannot be run; install iproute2 ({error})")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (mean, deviation) = read_ping(&text).ok_or_else(|| {
        CheckError::Ping(format!(
            "{}{}",
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    })?;
    let jitter_ms = link.profile.jitter.map_or(0.0, |jitter| ms(jitter.deviation));
    let tolerance = match link.backend {
        Backend::Emulator => 0.5,
        Backend::Netem => 1.0,
    };
    let asked = ms(link.profile.rtt);
    let allowed = asked - CLOCK_MS - 3.0 * jitter_ms..=asked + tolerance + 3.0 * jitter_ms;
    findings.push(Finding::new("RTT by ping, mean".to_owned(), "ms", asked, mean, allowed));
    if link.profile.jitter.is_none() {
        findings.push(Finding::new(
            "RTT by ping, deviation".to_owned(),
            "ms",
            0.0,
            deviation,
            0.0..=0.3,
        ));
    }
    Ok(())
}

/// Mean and deviation, milliseconds, of `rtt min/avg/max/mdev = 150.1/150.2/150.3/0.05 ms`.
fn read_ping(text: &str) -> Option<(f64, f64)> {
    let line = text.lines().find(|line| line.starts_with("rtt "))?;
    let (numbers, _) = line.split_once('=')?.1.split_once(" ms")?;
    let numbers: Vec<f64> = numbers
        .trim()
        .split('/')
        .map_while(|number| number.parse().ok())
        .collect();
    match numbers.as_slice() {
        [_, mean, _, deviation] => Some((*mean, *deviation)),
        _ => None,
    }
}

/// Below its rate the link adds its delay, and loses what its model takes.
fn judge_below(link: &Link, label: &str, report: &ProbeReport, findings: &mut Vec<Finding>) {
    let label = format!("{label}, 0.9 x rate");
    let delay = ms(link.profile.one_way_delay());
    let jitter_ms = link.profile.jitter.map_or(0.0, |jitter| ms(jitter.deviation));
    let allowed = delay - CLOCK_MS..=delay + 2.0 + 4.0 * jitter_ms;
    findings.push(Finding::new(
        format!("{label}: one-way delay, p99"),
        "ms",
        delay,
        report.one_way.p99_ms,
        allowed,
    ));
    findings.push(Finding::new(
        format!("{label}: reordered"),
        "datagrams",
        0.0,
        report.reordered as f64,
        0.0..=0.0,
    ));
    let (least, most) = loss_interval(&link.profile.loss, report.sent);
    let percent = |count: f64| 100.0 * count / report.sent as f64;
    findings.push(Finding::new(
        format!("{label}: loss"),
        "%",
        100.0 * link.profile.loss.mean(),
        percent(report.lost as f64),
        percent(least)..=percent(most),
    ));
    if let Some((run, deviation)) = mean_run(&link.profile.loss)
        && report.loss_runs > 0
    {
        let measured = report.lost as f64 / report.loss_runs as f64;
        let tolerance = (0.15 * run).max(SIGMAS * deviation / (report.loss_runs as f64).sqrt());
        findings.push(Finding::new(
            format!("{label}: mean run of losses"),
            "datagrams",
            run,
            measured,
            (run - tolerance).max(1.0)..=run + tolerance,
        ));
    }
}

/// Beyond its rate the link passes its rate, behind a full queue.
fn judge_above(link: &Link, label: &str, report: &ProbeReport, findings: &mut Vec<Finding>) {
    let label = format!("{label}, 1.1 x rate");
    let wire = f64::from(link.profile.mtu_bytes + ETHERNET_OVERHEAD);
    let offered = report.sent as f64 * wire * 8e-6 / report.send_seconds;
    let rate = link.profile.rate.0 as f64 * 8e-6;
    findings.push(Finding::new(
        format!("{label}: offered"),
        "Mbit/s",
        1.1 * rate,
        offered,
        1.05 * rate..=1.15 * rate,
    ));
    let payload_mbit = link.profile.rate.0 as f64 * 8e-6 * report.payload_bytes as f64 / wire;
    let measured = report.payload_bits_per_second * 1e-6;
    let allowed = 0.99 * payload_mbit..=1.01 * payload_mbit;
    findings.push(Finding::new(
        format!("{label}: payload rate"),
        "Mbit/s",
        payload_mbit,
        measured,
        allowed,
    ));
    if link.profile.jitter.is_none() {
        let full = ms(link.profile.one_way_delay() + link.profile.queue);
        let measured = report.one_way_second_half.p50_ms;
        findings.push(Finding::new(
            format!("{label}: one-way delay, p50"),
            "ms",
            full,
            measured,
            full - 1.0..=full + 1.0,
        ));
    }
}

/// Ten to a train, as QUIC sends, but at most half a millisecond of line time, so that a train's own length does not show as
/// delay.
fn segments(link: &Link) -> usize {
    let wire = link.profile.mtu_bytes + ETHERNET_OVERHEAD;
    let in_half_a_ms = link.profile.rate.bytes_in(Duration::from_micros(500)) / u64::from(wire);
    let in_64_kib = 65_000 / u64::from(link.profile.mtu_bytes);
    in_half_a_ms.min(in_64_kib).clamp(1, 10) as usize
}

/// How many of `sent` datagrams may be lost: 99.9 % of all runs are inside.
fn loss_interval(loss: &Loss, sent: u64) -> (f64, f64) {
    let (sent, mean) = (sent as f64, loss.mean());
    match loss {
        Loss::None => (0.0, 0.0),
        Loss::Bernoulli(_) => binomial_interval(sent, mean),
        Loss::GilbertElliott(model) => {
            // Losses are correlated by 1 - p - r from one datagram to the next, which widens the sum's spread.
            let memory = 1.0 - model.to_bad.value() - model.to_good.value();
            let spread = SIGMAS * (sent * mean * (1.0 - mean) * (1.0 + memory) / (1.0 - memory)).sqrt();
            ((sent * mean - spread).max(0.0), sent * mean + spread)
        }
    }
}

/// The central 99.9 % of the binomial distribution; exact where few are expected, and by its normal form beyond.
fn binomial_interval(count: f64, chance: f64) -> (f64, f64) {
    let mean = count * chance;
    if mean > 500.0 || chance >= 0.5 {
        let spread = SIGMAS * (mean * (1.0 - chance)).sqrt();
        return ((mean - spread).max(0.0), (mean + spread).min(count));
    }
    let mut probability = (count * (-chance).ln_1p()).exp();
    let (mut hits, mut sum, mut least) = (0.0, probability, None);
    loop {
        if least.is_none() && sum > TAIL {
            least = Some(hits);
        }
        if sum >= 1.0 - TAIL || hits >= count {
            return (least.unwrap_or(hits), hits);
        }
        probability *= (count - hits) / (hits + 1.0) * chance / (1.0 - chance);
        hits += 1.0;
        sum += probability;
    }
}

/// Mean and deviation of the length of a run of lost datagrams, where the model has a simple one.
fn mean_run(loss: &Loss) -> Option<(f64, f64)> {
    let end = match loss {
        Loss::None => return None,
        Loss::Bernoulli(chance) => 1.0 - chance.value(),
        Loss::GilbertElliott(model)
            if model.loss_in_bad == Probability::ALWAYS && model.loss_in_good == Probability::NEVER =>
        {
            model.to_good.value()
        }
        Loss::GilbertElliott(_) => return None,
    };
    // Geometric: it goes on with 1 - end.
    (end > 0.0).then(|| (1.0 / end, (1.0 - end).sqrt() / end))
}

impl Finding {
    fn new(
        measure: String,
        unit: &'static str,
        asked: f64,
        measured: f64,
        allowed: std::ops::RangeInclusive<f64>,
    ) -> Self {
        let ok = allowed.contains(&measured);
        Self {
            measure,
            unit,
            asked,
            measured,
            least: *allowed.start(),
            most: *allowed.end(),
            ok,
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = match self.backend {
            Backend::Netem => "netem",
            Backend::Emulator => "emulator",
        };
        writeln!(f, "link {}, profile {}, backend {backend}", self.name, self.profile)?;
        writeln!(f, "{:44} {:>12} {:>12} {:>25}", "", "asked", "measured", "allowed")?;
        for finding in &self.findings {
            let allowed = format!("{:.3} to {:.3}", finding.least, finding.most);
            let verdict = if finding.ok { "ok" } else { "OFF" };
            writeln!(
                f,
                "{:44} {:>12.3} {:>12.3} {allowed:>25} {:9} {verdict}",
                finding.measure, finding.asked, finding.measured, finding.unit
            )?;
        }
        Ok(())
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// What rounding in ping and clocks may take off.
const CLOCK_MS: f64 = 0.02;
/// The emulator's own bound for usable figures.
const MAX_LATENESS_US: f64 = 500.0;
/// Two-sided 99.9 % of the normal distribution.
const SIGMAS: f64 = 3.29;
const TAIL: f64 = 0.0005;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::loss::GilbertElliott;

    fn chance(value: f64) -> Probability {
        Probability::new(value).expect("a probability")
    }

    #[test]
    fn the_interval_of_a_rare_loss_is_the_exact_binomial_one() {
        // Poisson with mean 14.8: P(X <= 3) = 0.0003, P(X <= 4) = 0.0011; P(X > 29) = 0.0004, P(X > 28) = 0.0008.
        assert_eq!(binomial_interval(148_000.0, 0.0001), (4.0, 29.0));
        assert_eq!(binomial_interval(100.0, 0.0), (0.0, 0.0));
    }

    #[test]
    fn both_forms_of_the_interval_agree_where_they_meet() {
        let (low, high) = binomial_interval(499_000.0, 0.001);
        let spread = SIGMAS * (499.0_f64 * 0.999).sqrt();
        assert!(
            (low - (499.0 - spread)).abs() < 3.0 && (high - (499.0 + spread)).abs() < 3.0,
            "{low} to {high}"
        );
    }

    #[test]
    fn bursts_widen_the_interval_and_lengthen_the_runs() {
        let bursts = Loss::GilbertElliott(GilbertElliott {
            to_bad: chance(0.000_2),
            to_good: chance(0.2),
            loss_in_bad: Probability::ALWAYS,
            loss_in_good: Probability::NEVER,
        });
        let (low, high) = loss_interval(&bursts, 1_000_000);
        let (flat_low, flat_high) = loss_interval(&Loss::Bernoulli(chance(bursts.mean())), 1_000_000);
        assert!(
            (high - low) / (flat_high - flat_low) > 2.9,
            "a factor of three for bursts of five"
        );
        assert_eq!(mean_run(&bursts).map(|(run, _)| run), Some(5.0));
        assert_eq!(loss_interval(&Loss::None, 1000), (0.0, 0.0));
    }

    #[test]
    fn the_summary_of_ping_is_read_and_nothing_else_is() {
        let text =
            "100 packets transmitted, 100 received\nrtt min/avg/max/mdev = 150.071/150.109/150.264/0.032 ms, pipe 15\n";
        assert_eq!(read_ping(&text.replace(", pipe 15", "")), Some((150.109, 0.032)));
        assert_eq!(read_ping(text), Some((150.109, 0.032)));
        assert_eq!(read_ping("100 packets transmitted, 0 received"), None);
    }

    #[test]
    fn a_finding_is_judged_by_its_bounds_inclusively() {
        let finding = |measured| Finding::new("RTT".to_owned(), "ms", 150.0, measured, 149.98..=150.5).ok;
        assert!(finding(149.98) && finding(150.5));
        assert!(!finding(149.97) && !finding(150.51) && !finding(f64::NAN));
    }
}
