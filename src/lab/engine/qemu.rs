//! A move by plain QEMU over TCP across the link: what an operator has without gateways.

use std::time::Duration;

use serde_json::{Value, json};

use super::outside::Outside;
use super::proof::{Proof, boot, crossing, prove};
use super::timeline::{SAMPLE, Timeline};
use super::{Carrier, Engine, Moved, hosts, pages_per_second, ssh, tls};
use crate::lab::error::LabError;
use crate::lab::guest::{Launch, Start};
use crate::lab::heartbeat::Heartbeat;
use crate::lab::link::{ADDRESS_B, Link};
use crate::lab::monitor::{Monitor, MonitorError};
use crate::lab::process::Process;
use crate::lab::record::Outcome;
use crate::lab::site::Site;
use crate::lab::usage::Watch;

/// One move that is about to be made.
pub(in crate::lab) struct Move<'a> {
    pub(in crate::lab) engine: Engine,
    pub(in crate::lab) launch: &'a Launch,
    pub(in crate::lab) a: &'a Site,
    pub(in crate::lab) b: &'a Site,
    pub(in crate::lab) link: &'a Link,
    /// When it is stopped.
    pub(in crate::lab) limit: Duration,
    pub(in crate::lab) outside: Outside,
}

/// A guest at work at A and a QEMU that waits for it at B.
struct Ready {
    at_source: Heartbeat,
    source: Process,
    destination: Process,
}

impl Move<'_> {
    /// Boots the guest at A and moves it to B. A move that does not arrive is no error: it says why.
    pub(in crate::lab) async fn run(self, proof: &mut Proof) -> Result<Moved, LabError> {
        for site in [self.a, self.b] {
            if let Err(error) = hosts::tune(&site.namespace, self.engine).await {
                return Ok(Moved::unavailable(error.to_string()));
            }
        }
        let tunnel = match self.engine.carrier() {
            Carrier::Ssh => match ssh::Tunnel::open(self.a, self.b, (ADDRESS_B, PORT)).await {
                Ok(tunnel) => Some(tunnel),
                Err(reason) => return Ok(Moved::unavailable(reason)),
            },
            Carrier::Tls => match tls::write_certificates(&[&self.a.directory, &self.b.directory]) {
                Ok(()) => None,
                Err(reason) => return Ok(Moved::unavailable(reason)),
            },
            Carrier::Tcp => None,
        };
        let (source, at_source) = boot(self.launch, self.a).await?;
        let destination = self.b.start_qemu(self.launch, Start::Receive)?;
        let mut ready = Ready {
            at_source,
            source,
            destination,
        };
        let moved = self.migrate(&mut ready, tunnel.as_ref(), proof).await;
        ready.source.kill().await;
        ready.destination.kill().await;
        if let Some(tunnel) = tunnel {
            tunnel.close().await;
        }
        moved
    }

    async fn migrate(
        &self,
        ready: &mut Ready,
        tunnel: Option<&ssh::Tunnel>,
        proof: &mut Proof,
    ) -> Result<Moved, LabError> {
        let mut at_destination = Heartbeat::connect(&self.b.files.heartbeat, QEMU_START).await?;
        let mut source = Monitor::connect(&self.a.files.qmp, QEMU_START).await?;
        let mut destination = Monitor::connect(&self.b.files.qmp, QEMU_START).await?;
        let set_up = async {
            self.set_up(&mut source, self.a, "client").await?;
            self.set_up(&mut destination, self.b, "server").await
        };
        match set_up.await {
            // What QEMU refuses says something about this QEMU, not about the lab.
            Err(MonitorError::Refused { said, .. }) => return Ok(Moved::unavailable(said)),
            other => other?,
        }
        let listening = json!({ "uri": format!("tcp:{ADDRESS_B}:{PORT}") });
        destination.execute("migrate-incoming", listening.clone()).await?;
        let to = tunnel.map_or(listening, |tunnel| json!({ "uri": tunnel.uri() }));

        let before = self.link.carried().await?;
        let watching = self.outside.begin(&mut ready.at_source).await?;
        let beat_before = ready.at_source.heard().last;
        let watch = Watch::start([self.a.directory.clone(), self.b.directory.clone()]);
        let mut timeline = Timeline::begin(ready.source.id());
        let begun = timeline.begun();
        source.execute("migrate", to).await?;
        let (outcome, status) = loop {
            let status = source.execute("query-migrate", json!({})).await?;
            timeline.add_query(&status);
            match status["status"].as_str() {
                Some("completed") => break (Outcome::Completed, status),
                Some("failed" | "cancelled") => break (Outcome::Failed, status),
                _ if begun.elapsed() > self.limit => break (Outcome::NotFinished, status),
                _ => tokio::time::sleep(SAMPLE / 2).await,
            }
        };
        let mut moved = Moved::new(outcome);
        moved.total_seconds = Some(begun.elapsed().as_secs_f64());
        moved.reason = status["error-desc"].as_str().map(str::to_owned);
        moved.rounds = status["ram"]["dirty-sync-count"].as_u64();
        moved.timeline = timeline.finish();
        moved.usage = Some(watch.stop());
        moved.pages_per_second = pages_per_second(beat_before, ready.at_source.heard().last);
        if let Value::Object(report) = status {
            moved.report = report;
        }
        if outcome == Outcome::Completed {
            let first = at_destination.first(ARRIVAL).await?;
            let last = ready.at_source.heard().last.ok_or(LabError::NeverHeard)?;
            moved.downtime_seconds = Some(crossing("A to B", last, first)?.downtime.as_secs_f64());
            moved.total_seconds = Some(first.at.saturating_duration_since(begun).as_secs_f64());
            let windows = ready.at_source.heard().windows;
            watching
                .end(&windows, &mut at_destination, [begun, first.at], &mut moved)
                .await?;
        }
        let carried = self.link.carried().await?;
        moved.wire_bytes = Some(carried.wire_bytes().saturating_sub(before.wire_bytes()));
        moved.forward_bytes = Some(carried.offered[0].saturating_sub(before.offered[0]));
        moved.link_fault = carried.fault;
        if outcome == Outcome::Completed {
            prove(&mut at_destination, proof).await?;
        }
        Ok(moved)
    }

    async fn set_up(&self, monitor: &mut Monitor, site: &Site, endpoint: &str) -> Result<(), MonitorError> {
        if self.engine.carrier() == Carrier::Tls {
            let credentials = tls::credentials(&site.directory, endpoint);
            monitor.execute("object-add", credentials).await?;
        }
        self.engine.set_up(monitor, self.launch.dials.memory_mb).await
    }
}

const PORT: u16 = 4700;
const QEMU_START: Duration = Duration::from_secs(20);
/// From `completed` at the source to the first sign of life at the destination.
const ARRIVAL: Duration = Duration::from_secs(60);
