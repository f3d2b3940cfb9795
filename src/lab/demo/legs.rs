//! Moves by the gateways: the pair of them, the guest, and its legs to and fro, with or without a link between them.

use std::time::Duration;

use serde_json::{Map, Value};

use super::report::{Leg, Proof};
use super::site::{LinkSection, Site, words};
use super::{DemoError, Tools, VM, say};
use crate::lab::guest::Start;
use crate::lab::heartbeat::{Beat, Crossing, Heartbeat};
use crate::lab::link::Link;
use crate::lab::process::{Process, output};

/// Two sites with gateways, and the guest at one of them.
pub(super) struct Pair<'a> {
    tools: &'a Tools,
    sites: [Site; 2],
    gateways: [Process; 2],
    /// The QEMU that booted the guest; gone after the first leg.
    first_qemu: Process,
    heartbeat: Heartbeat,
    /// Index of the site where the guest is.
    place: usize,
    link: Option<Link>,
}

impl<'a> Pair<'a> {
    /// Starts and pairs the gateways, and boots the guest at the first site.
    pub(super) async fn start(
        tools: &'a Tools,
        sites: [Site; 2],
        section: &LinkSection,
        link: Option<Link>,
    ) -> Result<Self, DemoError> {
        let [a, b] = &sites;
        let gateways = [
            a.start_gateway(&tools.longhaul, b, &tools.launch, section).await?,
            b.start_gateway(&tools.longhaul, a, &tools.launch, section).await?,
        ];
        a.pair(&tools.longhaul, b).await?;
        let (first_qemu, heartbeat) = boot(tools, a).await?;
        Ok(Self {
            tools,
            sites,
            gateways,
            first_qemu,
            heartbeat,
            place: 0,
            link,
        })
    }

    /// Moves the guest to the other site and has it prove itself there. `Err` says why the guest did not arrive; what was
    /// found until then is in `leg` all the same.
    pub(super) async fn leg(&mut self, proof: &mut Proof, legs: &mut Vec<Leg>) -> Result<(), DemoError> {
        let (from, to) = (&self.sites[self.place], &self.sites[1 - self.place]);
        let before = self.wire_bytes().await?;
        let migrate = from.client(
            &self.tools.longhaul,
            &["migrate", VM, "--to", to.name, "--output", "json"],
        );
        let argv = words(&migrate);
        let mut arrival = Box::pin(Heartbeat::connect(&to.files.heartbeat, LEG));
        let mut command = Box::pin(output(&argv));
        // The destination's QEMU is there long before the guest is; whoever is first, the command's end decides.
        let (command, arrival) = tokio::select! {
            arrival = &mut arrival => (command.await?, Some(arrival?)),
            command = &mut command => (command?, None),
        };
        let report: Map<String, Value> = serde_json::from_slice(&command.stdout).unwrap_or_default();
        let direction = if self.place == 0 { "A to B" } else { "B to A" };
        legs.push(Leg {
            report,
            downtime_outside_seconds: None,
            wire_bytes_outside: None,
            direction,
        });
        let leg = legs.last_mut().expect("one was pushed");
        if !command.status.success() {
            let mut said = String::from_utf8_lossy(&command.stderr).trim_end().to_owned();
            for (site, gateway) in self.sites.iter().zip(&self.gateways) {
                said.push_str(&format!("\nthe gateway of {} said:\n{}", site.name, gateway.said()));
            }
            return Err(DemoError::NotMoved {
                direction,
                status: command.status,
                said,
            });
        }
        let mut arrival = match arrival {
            Some(arrival) => arrival,
            None => Heartbeat::connect(&to.files.heartbeat, SOON).await?,
        };
        let first = arrival.first(SOON).await?;
        // The source's QEMU is quit after the move; its last word is in by then.
        let source = self.heartbeat.ended(SOON).await?;
        let last = source.last.ok_or(DemoError::NeverHeard)?;
        leg.downtime_outside_seconds = Some(crossing(direction, last, first)?.downtime.as_secs_f64());
        if let (Some(before), Some(link)) = (before, &self.link) {
            leg.wire_bytes_outside = Some(link.carried().await?.wire_bytes.saturating_sub(before));
        }
        self.heartbeat = arrival;
        self.place = 1 - self.place;
        prove(&mut self.heartbeat, proof).await
    }

    /// Kills the gateways and what they started that this process knows of.
    pub(super) async fn stop(self) {
        let [a, b] = self.gateways;
        a.kill().await;
        b.kill().await;
        self.first_qemu.kill().await;
    }

    async fn wire_bytes(&self) -> Result<Option<u64>, DemoError> {
        match &self.link {
            Some(link) => Ok(Some(link.carried().await?.wire_bytes)),
            None => Ok(None),
        }
    }
}

/// Boots the guest at `site` and waits until its working set is filled and it has run for a while.
pub(super) async fn boot(tools: &Tools, site: &Site) -> Result<(Process, Heartbeat), DemoError> {
    say(&format!("booting the guest at {}", site.name));
    let mut qemu = site.start_qemu(&tools.launch, Start::Boot)?;
    let mut heartbeat = match Heartbeat::connect(&site.files.heartbeat, SOON).await {
        Ok(heartbeat) => heartbeat,
        // A QEMU that ended at once says why; that is worth more than that nobody answers.
        Err(error) => {
            qemu.check()?;
            return Err(error.into());
        }
    };
    let settled = tools.launch.dials.pages_per_second;
    let is_settled = |beat: Option<Beat>| beat.is_some_and(|beat| beat.writes >= settled);
    heartbeat
        .wait_for("the first second of work", BOOT, |heard| is_settled(heard.last))
        .await?;
    Ok((qemu, heartbeat))
}

/// Has the guest read every page; notes what it found.
///
/// # Errors
/// [`DemoError::Damaged`] where a page is not as it must be.
pub(super) async fn prove(heartbeat: &mut Heartbeat, proof: &mut Proof) -> Result<(), DemoError> {
    let verified = heartbeat.verify(VERIFY).await?;
    let heard = heartbeat.heard();
    let bad = verified.bad.max(heard.last.map_or(0, |beat| beat.bad));
    proof.pages_checked += verified.pages;
    if bad > 0 || !verified.is_intact() {
        return Err(DemoError::Damaged {
            bad,
            pages: verified.pages,
        });
    }
    if heard.out_of_order > 0 {
        return Err(DemoError::OutOfOrder {
            jumps: heard.out_of_order,
        });
    }
    Ok(())
}

/// What lies between the last sign of life at the source and the first at the destination.
///
/// # Errors
/// [`DemoError::RanTwice`] where the guest did not go on where it was stopped.
pub(super) fn crossing(direction: &'static str, last: Beat, first: Beat) -> Result<Crossing, DemoError> {
    let ran_twice = DemoError::RanTwice {
        direction,
        last: last.sequence,
        first: first.sequence,
    };
    Crossing::between(last, first)
        .filter(Crossing::is_seamless)
        .ok_or(ran_twice)
}

/// How long a leg may take before the demo gives up.
const LEG: Duration = Duration::from_secs(900);
/// From the start of QEMU to a guest at work; some seconds under TCG, more on a machine that does other things too.
const BOOT: Duration = Duration::from_secs(180);
/// What should follow at once.
const SOON: Duration = Duration::from_secs(30);
/// A check of 200 MiB takes about a second under TCG.
const VERIFY: Duration = Duration::from_secs(120);
