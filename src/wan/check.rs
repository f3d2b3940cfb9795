//! Does a link do what its profile asks? Measured from its two sites and judged by fixed tolerances.
//!
//! | measured | asked | tolerance |
//! | --- | --- | --- |
//! | RTT, p50 | `rtt` | 0.15 ms + 0.1 % |
//! | RTT, p99 | `rtt` | 1 ms + 0.1 % |
//! | at 0.9 x `rate`: drops at the queue | 0 | 0 |
//! | at 0.9 x `rate`: one-way delay, p99 | `rtt` / 2 | + 2 ms |
//! | at 0.9 x `rate`, in trains: lost datagrams | `loss` | the 99.9 % interval (see `interval`) |
//! | … mean run of lost datagrams | 1 / (1 - p), in bursts 1 / r | 15 %, or 99.9 % where few were lost |
//! | … datagrams that overtook, copies | `reordering`, `duplication` | the 99.9 % interval |
//! | at 1.1 x `rate`: offered, else the machine is too slow to tell | 1.1 x `rate` | 5 % of `rate` |
//! | at 1.1 x `rate`: payload rate | `rate` x payload / wire size, and what netem lets overtake | 1 % |
//! | at 1.1 x `rate`: one-way delay, p50 | `rtt` / 2 + `queue` | 1 ms |
//! | drops outside the model | 0 | 0 |
//! | CPU: lateness of the emulator, p99 | 0 | 500 us |
//! | CPU: run delay of the emulator | 0 | 1 % of the time |
//! | CPU: each probe starved (see `starvation`) | 0 | 1 % of the time |
//!
//! A link that is late by more has no reason to be early: nothing may arrive before its time, less what clocks round off.
//! With jitter the tolerances of delays are wider by three deviations.
//!
//! A run of lost datagrams as long as the train means that offload packets are lost whole: the trap of a netem queue on the
//! sender's own device. The last three rows are about the machine, in the worst of the measurements. Where they are
//! exceeded, the other figures say nothing about the link, good or bad, and none of them may be used.
//!
//! A measurement in which something was late or slow is made up to twice again, and the report says so: a host that does
//! not run this machine for a millisecond makes any link look late once. What is counted is never a reason to count again.
//!
//! Beside its own figures the check shows those of `ping` and `iperf3`. They are not judged: `ping` measures its own
//! wake-up with the link and is answered by a kernel that is awake already, and `iperf3` sends no trains, so that 1 Gbit/s
//! of it needs a core and more.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::awake::Awake;
use super::control::{self, ControlError};
use super::link::{Link, Site};
use super::model::ETHERNET_OVERHEAD;
use super::probe::{ProbeError, ProbeReport, ProbeSettings, probe};
use super::rtt::{RttReport, measure_rtt};
use super::show::{ShowError, show};
use super::stats::{Backend, DirectionStats, Drops, LinkStats, MAX_LATENESS_US};
use super::{clock, interval, starvation, tools};
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
    /// Measurements that were made again, and what was wrong with them.
    pub repeated: Vec<String>,
    /// All are within their tolerances.
    pub ok: bool,
    /// Why the figures are not to be used. Nothing, where they are.
    pub refused: Option<Refusal>,
    /// Tools whose figures are not beside ours, and why.
    pub left_out: Vec<String>,
}

/// Why a check does not vouch for its figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The machine did not run the emulator or the probes when it should have. Whether the link is off cannot be known.
    Starved(Vec<String>),
    /// The link is not what its profile asks for.
    Off(Vec<String>),
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
    /// It is about the machine, not the link.
    pub of_machine: bool,
    /// It counts datagrams, which no machine changes by being late.
    #[serde(skip)]
    counted: bool,
    /// What another tool measured.
    pub beside: Option<Beside>,
}

/// A figure of another tool.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Beside {
    /// Its name.
    pub tool: &'static str,
    /// In the unit of the finding.
    pub measured: f64,
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
}

/// Measures `link`, which must carry nothing else meanwhile. Takes about twenty seconds when `duration`, of each of eight
/// measurements, is two; up to three times as long where measurements have to be made again.
///
/// # Errors
/// [`CheckError`] where something could not be measured; a link that is off is no error.
pub fn check(link: &Link, duration: Duration) -> Result<CheckReport, CheckError> {
    let pings = (duration.as_millis() / PING_SPACING.as_millis()).clamp(20, 1000) as u64;
    let mut findings = Findings::default();
    let _awake = Awake::keep();
    // The emulator learns anew how long this machine takes to wake up.
    clock::sleep(SETTLE);
    findings.measure("RTT", || {
        let begin = Begin::of(link)?;
        let report = measure_rtt(link, pings, PING_SPACING)?;
        let mut findings = judge_rtt(link, &report);
        findings.extend(of_time("RTT probe starved", report.starved_seconds, duration));
        begin.judge(link, &mut findings)?;
        Ok(findings)
    })?;
    for (from, label) in [(Site::A, "A to B"), (Site::B, "B to A")] {
        for tenths in [9, 11] {
            let share = format!("{}.{} x rate", tenths / 10, tenths % 10);
            let label = format!("{label}, {share}");
            findings.measure(&label, || {
                let begin = Begin::of(link)?;
                let report = probe(
                    link,
                    ProbeSettings {
                        from,
                        rate: ByteRate(link.profile.rate.0 / 10 * tenths),
                        segments: segments(link),
                        duration,
                    },
                )?;
                let mut findings = if tenths < 10 {
                    let (before, after) = (drops(&begin.stats, from), drops(&show(link)?, from));
                    let queue = after.queue.packets - before.queue.packets;
                    let script = after.script.packets - before.script.packets;
                    judge_below(link, &label, &report, queue, script)
                } else {
                    judge_above(link, &label, &report)
                };
                let what = format!("probe from {from} starved, {share}");
                findings.extend(of_time(&what, report.starved_seconds, duration));
                begin.judge(link, &mut findings)?;
                Ok(findings)
            })?;
        }
    }
    let Findings { mut accepted, repeated } = findings;
    // Last in the table: they are about the others.
    accepted.sort_by_key(|finding| finding.of_machine);
    // Last in time, since what they do to the machine must not spoil the figures above.
    let left_out = set_beside(link, pings, duration, &mut accepted);
    let refused = refusal(&accepted);
    Ok(CheckReport {
        name: link.name.to_string(),
        profile: link.profile.name.clone(),
        backend: link.backend,
        ok: refused.is_none(),
        findings: accepted,
        repeated,
        refused,
        left_out,
    })
}

/// What has been measured so far.
#[derive(Debug, Default)]
struct Findings {
    accepted: Vec<Finding>,
    repeated: Vec<String>,
}

impl Findings {
    /// Measures up to three times, until nothing is late: a link that is off is off each time, a machine that was busy for a
    /// moment is not. Counts, which are a matter of chance, are taken as they come the first time that nothing is late.
    fn measure(
        &mut self,
        what: &str,
        measurement: impl Fn() -> Result<Vec<Finding>, CheckError>,
    ) -> Result<(), CheckError> {
        let mut findings = measurement()?;
        for attempt in 1..ATTEMPTS {
            let late = findings.iter().filter(|finding| !finding.ok && !finding.counted);
            let late: Vec<_> = late.map(Finding::in_words).collect();
            if late.is_empty() {
                break;
            }
            self.repeated
                .push(format!("{what}, attempt {attempt}: {}", late.join("; ")));
            findings = measurement()?;
        }
        for finding in findings {
            let known = self.accepted.iter_mut().find(|known| known.measure == finding.measure);
            match known {
                // The worst stands for all measurements.
                Some(known) if known.measured >= finding.measured => {}
                Some(known) => *known = finding,
                None => self.accepted.push(finding),
            }
        }
        Ok(())
    }
}

/// How things were before a measurement.
#[derive(Debug)]
struct Begin {
    at: Instant,
    run_delay: Option<Duration>,
    stats: LinkStats,
}

impl Begin {
    fn of(link: &Link) -> Result<Self, CheckError> {
        if link.backend == Backend::Emulator {
            control::ask(&link.name.control_socket(), "reset")?;
        }
        Ok(Self {
            at: clock::now(),
            run_delay: link.emulator().and_then(starvation::of_process),
            stats: show(link)?,
        })
    }

    /// What the link and its emulator have suffered since.
    fn judge(&self, link: &Link, findings: &mut Vec<Finding>) -> Result<(), CheckError> {
        let stats = show(link)?;
        let directions = [("A to B", self.stats.ab, stats.ab), ("B to A", self.stats.ba, stats.ba)];
        for (label, before, after) in directions {
            let own = |stats: DirectionStats| {
                let drops = stats.dropped;
                drops.overrun.packets + drops.ingress.packets + drops.egress.packets
            };
            findings.push(Finding::new(
                format!("{label}: drops outside the model"),
                "datagrams",
                0.0,
                (own(after) - own(before)) as f64,
                0.0..=0.0,
            ));
        }
        if let Some(emulator) = &stats.emulator {
            let late = emulator.lateness.p99_us;
            let allowed = 0.0..=MAX_LATENESS_US;
            let lateness = Finding::new(
                "CPU: lateness of the emulator, p99".to_owned(),
                "us",
                0.0,
                late,
                allowed,
            );
            findings.push(lateness.of_machine());
        }
        let waited = starvation::since(self.run_delay, link.emulator().and_then(starvation::of_process));
        let waited = waited.map(|waited| waited.as_secs_f64());
        findings.extend(of_time("run delay of the emulator", waited, clock::now() - self.at));
        Ok(())
    }
}

fn drops(stats: &LinkStats, from: Site) -> Drops {
    match from {
        Site::A => stats.ab.dropped,
        Site::B => stats.ba.dropped,
    }
}

/// How much of `time` a thread did not get, where the kernel tells.
fn of_time(what: &str, seconds: Option<f64>, time: Duration) -> Option<Finding> {
    let share = 100.0 * seconds? / time.as_secs_f64();
    Some(Finding::new(format!("CPU: {what}"), "%", 0.0, share, 0.0..=MAX_STARVED_PERCENT).of_machine())
}

fn judge_rtt(link: &Link, report: &RttReport) -> Vec<Finding> {
    let asked = ms(link.profile.rtt);
    let wider = 3.0 * jitter_ms(link);
    let share = 0.001 * asked;
    [
        (RTT_P50, report.p50_ms, 0.15 + share),
        (RTT_P99, report.p99_ms, 1.0 + share),
    ]
    .map(|(measure, measured, tolerance)| {
        let allowed = asked - CLOCK_MS - wider..=asked + tolerance + wider;
        Finding::new(measure.to_owned(), "ms", asked, measured, allowed)
    })
    .into()
}

/// Below its rate the link adds its delay, and loses what its model takes. Its queue has dropped `queue` datagrams and its
/// script has taken `scripted`.
fn judge_below(link: &Link, label: &str, report: &ProbeReport, queue: u64, scripted: u64) -> Vec<Finding> {
    let profile = &link.profile;
    let mut findings = vec![Finding::new(
        format!("{label}: drops at the queue"),
        "datagrams",
        0.0,
        queue as f64,
        0.0..=0.0,
    )];
    let delay = ms(profile.one_way_delay());
    // What overtakes is early on purpose.
    let early = if profile.reordering.is_some() { delay } else { CLOCK_MS };
    findings.push(Finding::new(
        format!("{label}: one-way delay, p99"),
        "ms",
        delay,
        report.one_way.p99_ms,
        delay - early..=delay + 2.0 + 4.0 * jitter_ms(link),
    ));
    let shares = [
        (
            "overtook",
            report.overtook,
            report.received + report.duplicates,
            profile.reordering.map_or(0.0, |reordering| reordering.share.value()),
        ),
        (
            "copies",
            report.duplicates,
            report.received,
            profile.duplication.value(),
        ),
    ];
    for (what, measured, of, share) in shares {
        let (least, most) = interval::binomial(of, share);
        let percent = |count: f64| 100.0 * count / of as f64;
        let finding = Finding::new(
            format!("{label}: {what}"),
            "%",
            100.0 * share,
            percent(measured as f64),
            percent(least)..=percent(most),
        );
        findings.push(finding.counted());
    }
    let left_to_chance = report.sent - scripted;
    let lost = report.lost.saturating_sub(scripted);
    let (least, most) = interval::losses(&profile.loss, left_to_chance);
    let percent = |count: f64| 100.0 * count / left_to_chance as f64;
    let finding = Finding::new(
        format!("{label}: loss"),
        "%",
        100.0 * profile.loss.mean(),
        percent(lost as f64),
        percent(least)..=percent(most),
    );
    findings.push(finding.counted());
    if let Some(goes_on) = interval::goes_on(&profile.loss).filter(|goes_on| *goes_on < 1.0)
        && report.loss_runs > 0
        && scripted == 0
    {
        let run = 1.0 / (1.0 - goes_on);
        let (least, most) = interval::mean_run(report.lost, goes_on);
        let finding = Finding::new(
            format!("{label}: mean run of losses"),
            "datagrams",
            run,
            report.lost as f64 / report.loss_runs as f64,
            least.min(0.85 * run)..=most.max(1.15 * run),
        );
        findings.push(finding.counted());
    }
    findings
}

/// Beyond its rate the link passes its rate, behind a full queue.
fn judge_above(link: &Link, label: &str, report: &ProbeReport) -> Vec<Finding> {
    let wire = f64::from(link.profile.mtu_bytes + ETHERNET_OVERHEAD);
    let offered = report.sent as f64 * wire * 8e-6 / report.send_seconds;
    let rate = link.profile.rate.0 as f64 * 8e-6;
    let mut findings = vec![Finding::new(
        format!("{label}: offered"),
        "Mbit/s",
        1.1 * rate,
        offered,
        1.05 * rate..=1.15 * rate,
    )];
    // netem hands out what overtakes beside the bottleneck, which is its child.
    let beside = match (link.backend, link.profile.reordering) {
        (Backend::Netem, Some(reordering)) => 1.1 * reordering.share.value(),
        _ => 0.0,
    };
    let payload_mbit = rate * (1.0 + beside) * report.payload_bytes as f64 / wire;
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
    findings
}

/// Puts the figures of other tools beside those of the same measure. Returns which could not be had, and why: they are no
/// part of the judgement.
fn set_beside(link: &Link, pings: u64, time: Duration, findings: &mut [Finding]) -> Vec<String> {
    let mut set = |measure: &str, tool, measured| {
        if let Some(finding) = findings.iter_mut().find(|finding| finding.measure == measure) {
            finding.beside = Some(Beside { tool, measured });
        }
    };
    let mut left_out = Vec::new();
    match tools::ping(link, pings) {
        Ok(ping) => {
            set(RTT_P50, "the mean of ping", ping.mean_ms);
            set(RTT_P99, "ping", ping.p99_ms);
        }
        Err(error) => left_out.push(error.to_string()),
    }
    let at = |tenths: u64| tools::iperf3(link, ByteRate(link.profile.rate.0 / 10 * tenths), time);
    let streams = at(9).and_then(|below| Ok(below.zip(at(11)?)));
    match streams {
        Ok(Some((below, above))) => {
            set("A to B, 0.9 x rate: loss", "iperf3", below.lost_percent);
            let measured = above.received_bits_per_second * 1e-6;
            set("A to B, 1.1 x rate: payload rate", "iperf3", measured);
        }
        Ok(None) => left_out.push("iperf3 is not installed (Debian package iperf3)".to_owned()),
        Err(error) => left_out.push(error.to_string()),
    }
    left_out
}

/// A machine that starved the check comes first: it may have made the link look off.
fn refusal(findings: &[Finding]) -> Option<Refusal> {
    let failed = |of_machine: bool| -> Vec<String> {
        let failed = findings
            .iter()
            .filter(|finding| !finding.ok && finding.of_machine == of_machine);
        failed.map(Finding::in_words).collect()
    };
    let (starved, off) = (failed(true), failed(false));
    match (starved.is_empty(), off.is_empty()) {
        (false, _) => Some(Refusal::Starved(starved)),
        (true, false) => Some(Refusal::Off(off)),
        (true, true) => None,
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
            of_machine: false,
            counted: false,
            beside: None,
        }
    }

    fn counted(self) -> Self {
        Self { counted: true, ..self }
    }

    fn of_machine(self) -> Self {
        Self {
            of_machine: true,
            ..self
        }
    }

    fn in_words(&self) -> String {
        format!(
            "{} is {:.3} {}, and {:.3} to {:.3} are allowed",
            self.measure, self.measured, self.unit, self.least, self.most
        )
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
            write!(
                f,
                "{:44} {:>12.3} {:>12.3} {allowed:>25} {:9} {verdict}",
                finding.measure, finding.asked, finding.measured, finding.unit
            )?;
            if let Some(beside) = &finding.beside {
                write!(f, "   {} says {:.3}", beside.tool, beside.measured)?;
            }
            writeln!(f)?;
        }
        for reason in &self.repeated {
            writeln!(f, "measured again: {reason}")?;
        }
        for reason in &self.left_out {
            writeln!(f, "left out: {reason}")?;
        }
        match &self.refused {
            None => Ok(()),
            Some(refusal) => writeln!(f, "\nrefused: {refusal}"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starved(reasons) => write!(
                f,
                "the machine was too busy to measure a link, so nothing above says anything about it; end what else runs \
                 and check again: {}",
                reasons.join("; ")
            ),
            Self::Off(reasons) => write!(f, "the link is not what its profile asks for: {}", reasons.join("; ")),
        }
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn jitter_ms(link: &Link) -> f64 {
    link.profile.jitter.map_or(0.0, |jitter| ms(jitter.deviation))
}

const RTT_P50: &str = "RTT, p50";
const RTT_P99: &str = "RTT, p99";
/// Of a measurement.
const ATTEMPTS: u32 = 3;
/// More than the emulator looks back at, when nothing flows.
const SETTLE: Duration = Duration::from_millis(500);
const PING_SPACING: Duration = Duration::from_millis(10);
/// What rounding in clocks may take off.
const CLOCK_MS: f64 = 0.02;
/// A p99 cannot be moved by less.
const MAX_STARVED_PERCENT: f64 = 1.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(measured: f64) -> Finding {
        Finding::new("RTT".to_owned(), "ms", 150.0, measured, 149.98..=150.3)
    }

    #[test]
    fn a_finding_is_judged_by_its_bounds_inclusively() {
        assert!(finding(149.98).ok && finding(150.3).ok);
        assert!(!finding(149.97).ok && !finding(150.31).ok && !finding(f64::NAN).ok);
    }

    #[test]
    fn a_link_within_its_tolerances_is_reported_and_one_that_is_off_is_refused_with_the_reason() {
        assert_eq!(refusal(&[finding(150.0), finding(150.3)]), None);
        let Some(Refusal::Off(reasons)) = refusal(&[finding(150.0), finding(151.0)]) else {
            panic!("off")
        };
        assert_eq!(reasons, ["RTT is 151.000 ms, and 149.980 to 150.300 are allowed"]);
    }

    #[test]
    fn a_starved_machine_is_the_reason_whatever_the_link_looks_like() {
        let starved =
            |seconds| of_time("run delay of the emulator", Some(seconds), Duration::from_secs(10)).expect("counted");
        assert!(starved(0.1).ok, "one hundredth");
        for link in [finding(150.0), finding(151.0)] {
            let refused = refusal(&[link, starved(0.101)]);
            let Some(Refusal::Starved(reasons)) = refused else {
                panic!("{refused:?}")
            };
            assert!(reasons.len() == 1 && reasons[0].contains("emulator"), "{reasons:?}");
        }
        assert_eq!(
            of_time("emulator", None, Duration::from_secs(10)),
            None,
            "nothing is known"
        );
    }
}
