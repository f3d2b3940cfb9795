//! Moves by the gateways: the pair of them, the guest, and its legs to and fro, with or without a link between them.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::outside::{Outside, Watching};
use super::proof::{Proof, SOON, boot, crossing, prove};
use super::timeline::Timeline;
use super::{Engine, Moved, pages_per_second};
use crate::api::Client;
use crate::lab::error::LabError;
use crate::lab::gateway_file::{LinkSection, VM, words};
use crate::lab::guest::Launch;
use crate::lab::heartbeat::Heartbeat;
use crate::lab::link::Link;
use crate::lab::monitor::{Monitor, MonitorError};
use crate::lab::process::{Process, output};
use crate::lab::record::Outcome;
use crate::lab::site::Site;
use crate::lab::usage::Watch;

/// Two sites with gateways, and the guest at one of them.
pub(in crate::lab) struct Pair<'a> {
    longhaul: &'a str,
    sites: [Site; 2],
    gateways: [Process; 2],
    /// The QEMU that booted the guest; gone after the first leg.
    first_qemu: Process,
    heartbeat: Heartbeat,
    /// Index of the site where the guest is.
    place: usize,
    link: Option<Link>,
    outside: Outside,
}

impl<'a> Pair<'a> {
    /// Starts and pairs the gateways, and boots the guest at the first site.
    pub(in crate::lab) async fn start(
        longhaul: &'a str,
        launch: &Launch,
        sites: [Site; 2],
        section: &LinkSection,
        link: Option<Link>,
        outside: Outside,
    ) -> Result<Self, LabError> {
        let [a, b] = &sites;
        let gateways = [
            a.start_gateway(longhaul, b, Some(launch), section).await?,
            b.start_gateway(longhaul, a, Some(launch), section).await?,
        ];
        a.pair(longhaul, b).await?;
        let (first_qemu, heartbeat) = boot(launch, a).await?;
        Ok(Self {
            longhaul,
            sites,
            gateways,
            first_qemu,
            heartbeat,
            place: 0,
            link,
            outside,
        })
    }

    /// Sets up the QEMU that booted the guest as the engine has it.
    pub(in crate::lab) async fn set_up(&self, engine: Engine, memory_mb: u64) -> Result<(), MonitorError> {
        let mut monitor = Monitor::connect(&self.sites[0].files.qmp, SOON).await?;
        engine.set_up(&mut monitor, memory_mb).await
    }

    /// From the next leg on others look on.
    pub(in crate::lab) fn look_on(&mut self, outside: Outside) {
        self.outside = outside;
    }

    /// The guest, where it is.
    pub(in crate::lab) fn guest(&mut self) -> &mut Heartbeat {
        &mut self.heartbeat
    }

    /// The way that the next leg goes.
    pub(in crate::lab) fn direction(&self) -> &'static str {
        if self.place == 0 { "A to B" } else { "B to A" }
    }

    /// Moves the guest to the other site and has it prove itself there. A move that does not arrive is no error: it says why.
    pub(in crate::lab) async fn leg(&mut self, limit: Duration, proof: &mut Proof) -> Result<Moved, LabError> {
        let (from, to) = (&self.sites[self.place], &self.sites[1 - self.place]);
        let before = match &self.link {
            Some(link) => Some(link.carried().await?),
            None => None,
        };
        let migrate = from.client(self.longhaul, &["migrate", VM, "--to", to.name, "--output", "json"]);
        let argv = words(&migrate);
        let watching = self.outside.begin(&mut self.heartbeat).await?;
        let beat_before = self.heartbeat.heard().last;
        let watch = Watch::start([from.directory.clone(), to.directory.clone()]);
        let gateway = Client::new(&from.control_socket());
        let mut timeline = Timeline::begin(self.gateways[self.place].id());
        let begun = timeline.begun();
        let mut command = Box::pin(output(&argv));
        let mut arrival = Box::pin(Heartbeat::connect(&to.files.heartbeat, limit + SOON));
        let mut arrived = None;
        let ended = {
            let mut follow = Box::pin(timeline.follow(&gateway));
            let mut limit = Box::pin(tokio::time::sleep(limit));
            loop {
                tokio::select! {
                    ended = &mut command => break Some(ended?),
                    // The destination's QEMU is there long before the guest is; the command's end decides.
                    heard = &mut arrival, if arrived.is_none() => arrived = Some(heard?),
                    () = &mut limit => break None,
                    () = &mut follow => {}
                }
            }
        };
        drop(arrival);
        let mut moved = Moved::new(Outcome::NotFinished);
        moved.total_seconds = Some(begun.elapsed().as_secs_f64());
        moved.timeline = timeline.finish();
        moved.usage = Some(watch.stop());
        moved.pages_per_second = pages_per_second(beat_before, self.heartbeat.heard().last);
        if let Some(ended) = &ended {
            moved.report = serde_json::from_slice(&ended.stdout).unwrap_or_default();
            moved.rounds = moved
                .report
                .get("rounds")
                .and_then(Value::as_array)
                .map(|rounds| rounds.len() as u64);
            moved.outcome = Outcome::Failed;
            if !ended.status.success() {
                moved.reason = Some(self.last_words(&String::from_utf8_lossy(&ended.stderr)));
            }
        }
        if ended.is_some_and(|ended| ended.status.success()) {
            moved.outcome = Outcome::Completed;
            self.arrive(begun, arrived, watching, &mut moved).await?;
        }
        if let (Some(before), Some(link)) = (before, &self.link) {
            let carried = link.carried().await?;
            moved.wire_bytes = Some(carried.wire_bytes().saturating_sub(before.wire_bytes()));
            let forward = carried.offered[self.place].saturating_sub(before.offered[self.place]);
            moved.forward_bytes = Some(forward);
            moved.link_fault = carried.fault;
        }
        if moved.outcome == Outcome::Completed {
            self.place = 1 - self.place;
            prove(&mut self.heartbeat, proof).await?;
        }
        Ok(moved)
    }

    /// The guest is at the other site: when it was last heard here and first there.
    async fn arrive(
        &mut self,
        begun: Instant,
        arrived: Option<Heartbeat>,
        watching: Watching,
        moved: &mut Moved,
    ) -> Result<(), LabError> {
        let to = &self.sites[1 - self.place];
        let mut arrival = match arrived {
            Some(arrival) => arrival,
            None => Heartbeat::connect(&to.files.heartbeat, SOON).await?,
        };
        let first = arrival.first(SOON).await?;
        // The source's QEMU is quit after the move; its last word is in by then.
        let source = self.heartbeat.ended(SOON).await?;
        let last = source.last.ok_or(LabError::NeverHeard)?;
        moved.downtime_seconds = Some(crossing(self.direction(), last, first)?.downtime.as_secs_f64());
        moved.total_seconds = Some(first.at.saturating_duration_since(begun).as_secs_f64());
        watching
            .end(&source.windows, &mut arrival, [begun, first.at], moved)
            .await?;
        self.heartbeat = arrival;
        Ok(())
    }

    /// What the command and the gateways said.
    fn last_words(&self, command: &str) -> String {
        let mut said = command.trim_end().to_owned();
        for (site, gateway) in self.sites.iter().zip(&self.gateways) {
            said.push_str(&format!("\nthe gateway of {} said:\n{}", site.name, gateway.said()));
        }
        said
    }

    /// Kills the gateways and what they started that this process knows of.
    pub(in crate::lab) async fn stop(self) {
        let [a, b] = self.gateways;
        a.kill().await;
        b.kill().await;
        self.first_qemu.kill().await;
    }
}
