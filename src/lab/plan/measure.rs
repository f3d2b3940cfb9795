//! One move of a plan, from an empty stage to an empty stage.

use std::time::Duration;

use super::matrix::Cell;
use crate::gateway::clock;
use crate::lab::engine::gateways::Pair;
use crate::lab::engine::outside::{Client, Outside};
use crate::lab::engine::proof::Proof;
use crate::lab::engine::{Moved, hosts, qemu};
use crate::lab::error::LabError;
use crate::lab::gateway_file::LinkSection;
use crate::lab::guest::Launch;
use crate::lab::monitor::MonitorError;
use crate::lab::record::{Ends, Outcome, Run, Setting};
use crate::lab::stage::Stage;

/// What the moves of a plan have in common.
pub(super) struct Bench<'a> {
    /// The program whose gateways are measured.
    pub(super) longhaul: String,
    pub(super) stage: &'a Stage,
    pub(super) time_limit: Duration,
    /// What every run's setting says.
    pub(super) setting: Setting,
    /// A process that for more of its time waited for a CPU which others had was starved, 0..=1.
    pub(super) longest_run_delay: f64,
}

impl Bench<'_> {
    /// Moves a guest once. A move that fails is a run that says so; an error is the lab's own.
    pub(super) async fn measure(&self, cell: &Cell, launch: &Launch, qemu_version: &str) -> Result<Run, LabError> {
        let mut setting = Setting {
            qemu: qemu_version.to_owned(),
            link_rtt_seconds: Some(cell.link.profile.rtt.as_secs_f64()),
            link_rate_bits_per_second: Some(cell.link.profile.rate.0 as f64 * 8.0),
            link_loss_fraction: Some(cell.link.profile.loss.mean()),
            started_unix_seconds: clock::unix_ms() / 1000,
            ..self.setting.clone()
        };
        let mut proof = Proof::default();
        self.stage
            .link
            .up(&cell.link.file.display().to_string(), cell.seed)
            .await?;
        let moved = self.move_once(cell, launch, &mut setting, &mut proof).await;
        self.stage.kill_all().await;
        let backend = self.stage.link.carried().await.map(|carried| carried.backend);
        setting.link_backend = backend.unwrap_or_default();
        self.stage.link.down().await?;
        let (moved, is_damaged) = match moved {
            Ok(moved) => (moved, false),
            Err(error) if error.is_about_the_guest() => (Moved::failed(error.to_string()), true),
            // A guest that does not boot or a gateway that does not start is worth a line; the plan goes on.
            Err(error) => (Moved::failed(error.to_string()), false),
        };
        Ok(self.record(cell, moved, is_damaged, proof, setting))
    }

    /// A move that this machine cannot make.
    pub(super) fn unavailable(&self, cell: &Cell, reason: &str) -> Run {
        let setting = Setting {
            started_unix_seconds: clock::unix_ms() / 1000,
            ..self.setting.clone()
        };
        self.record(
            cell,
            Moved::unavailable(reason.to_owned()),
            false,
            Proof::default(),
            setting,
        )
    }

    async fn move_once(
        &self,
        cell: &Cell,
        launch: &Launch,
        setting: &mut Setting,
        proof: &mut Proof,
    ) -> Result<Moved, LabError> {
        let mut sites = self.stage.sites()?;
        let mut outside = Outside {
            client: None,
            application: cell.dials.application,
            events: None,
        };
        if !cell.link.profile.events.is_empty() {
            let log = self.stage.directory.join("events.log");
            outside.events = Some((self.stage.link.clone(), log));
        }
        if let Some(guest) = cell.dials.address {
            let network = &self.stage.network;
            network.up().await?;
            for (site, tap) in sites.iter_mut().zip(network.taps()) {
                site.files = site.files.clone().on_tap(tap);
            }
            outside.client = Some(Client {
                longhaul: self.longhaul.clone(),
                namespace: network.client().to_owned(),
                guest,
            });
        }
        let moved = async {
            let [a, b] = &sites;
            for site in [a, b] {
                if let Err(error) = hosts::tune(&site.namespace, cell.engine).await {
                    return Ok(Moved::unavailable(error.to_string()));
                }
            }
            setting.tcp = hosts::settings(&a.namespace).await?;
            if !cell.engine.has_gateways() {
                let plain = qemu::Move {
                    engine: cell.engine,
                    launch,
                    a,
                    b,
                    link: &self.stage.link,
                    limit: self.time_limit,
                    outside,
                };
                return plain.run(proof).await;
            }
            let link = Some(self.stage.link.clone());
            let section = LinkSection::of(&cell.link.profile);
            let mut pair = Pair::start(&self.longhaul, launch, sites.clone(), &section, link, outside).await?;
            let moved = match pair.set_up(cell.engine, cell.dials.memory_mb).await {
                Ok(()) => pair.leg(self.time_limit, proof).await,
                Err(MonitorError::Refused { said, .. }) => Ok(Moved::unavailable(said)),
                Err(error) => Err(error.into()),
            };
            pair.stop().await;
            moved
        };
        let moved = moved.await;
        self.stage.kill_all().await;
        if self.stage.network.is_there() {
            self.stage.network.down().await?;
        }
        self.stage.remove_sites(&sites);
        moved
    }

    fn record(&self, cell: &Cell, moved: Moved, is_damaged: bool, proof: Proof, mut setting: Setting) -> Run {
        setting.link_fault.clone_from(&moved.link_fault);
        let gib = cell.dials.memory_mb as f64 / 1024.0;
        let usage = moved.usage;
        let waited = usage.and_then(|usage| usage.waited_for_others());
        let starved = waited.filter(|&share| share > self.longest_run_delay).map(|share| {
            format!(
                "the machine was too busy: in {:.0} % of the time that a gateway or hypervisor could have run, other programs \
                 had the CPU; at most {:.0} % are allowed",
                share * 100.0,
                self.longest_run_delay * 100.0
            )
        });
        let fault = moved.link_fault.or(starved);
        let seconds = moved.total_seconds.filter(|&seconds| seconds > 0.0);
        let link_use = moved
            .forward_bytes
            .zip(seconds)
            .map(|(bytes, seconds)| (bytes as f64 / (cell.link.profile.rate.0 as f64 * seconds)).min(1.0));
        Run {
            engine: cell.engine.name().to_owned(),
            profile: cell.link.profile.name.clone(),
            guest: cell.guest.clone(),
            seed: cell.seed,
            repetition: cell.repetition,
            outcome: moved.outcome,
            usable: fault.is_none() && moved.outcome != Outcome::Unavailable,
            reason: moved.reason.or(fault),
            total_seconds: moved.total_seconds,
            downtime_seconds: moved.downtime_seconds,
            blackout_seconds: moved.blackout_seconds,
            wire_bytes: moved.wire_bytes,
            link_use,
            rounds: moved.rounds,
            cpu_seconds_per_gib: usage.map(|usage| Ends {
                source: usage.cpu_seconds.source / gib,
                destination: usage.cpu_seconds.destination / gib,
            }),
            peak_rss_bytes: usage.and_then(|usage| usage.gateway_peak_rss_bytes),
            run_delay_share: usage.and_then(|usage| usage.run_delay_share),
            others_share: usage.and_then(|usage| usage.others_share),
            guest_pages_per_second: moved.pages_per_second,
            guest_intact: match (moved.outcome, is_damaged) {
                (_, true) => Some(false),
                (Outcome::Completed, false) => Some(proof.pages_checked > 0),
                _ => None,
            },
            pages_checked: (proof.pages_checked > 0).then_some(proof.pages_checked),
            application: moved.application,
            timeline: moved.timeline,
            report: moved.report,
            dials: cell.dials.clone(),
            setting,
        }
    }
}
