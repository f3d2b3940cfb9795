//! Two gateways on the link, a guest at A that is all but idle, and its disk on the way to B.
//!
//! The migration is one that waits with its disks copied (`--warm`): so memory is not on the wire beside the first pass, and what the link has
//! carried by then is the pass's. Then it is told to switch over, and the images are compared.

use std::time::Duration;

use rustix::process::{Signal, pidfd_send_signal};

use super::Bench;
use super::course::Course;
use crate::api::{Client, Event, Outcome, Phase, Progress, Report, Role, StartRequest, Warm};
use crate::lab::disks::image;
use crate::lab::engine::proof::boot;
use crate::lab::engine::{Engine, hosts};
use crate::lab::error::LabError;
use crate::lab::gateway_file::VM;
use crate::lab::guest::GuestDisk;
use crate::lab::heartbeat::Heartbeat;
use crate::lab::link::Carried;
use crate::lab::process::Process;
use crate::lab::site::Site;
use crate::lab::usage::Watch;
use crate::proto::page::MigrationId;

pub(super) struct Scene<'a> {
    bench: &'a Bench<'a>,
    pub(super) sites: [Site; 2],
    gateways: [Process; 2],
    /// What it says is read as long as it is kept, so that it does not wait for a reader. None: the VM is off.
    guest: Option<(Process, Heartbeat)>,
}

/// A migration whose disks have been read once.
pub(super) struct Waiting {
    pub(super) migration: MigrationId,
    /// How many were begun in the place of one that a restart has undone.
    pub(super) begun_again: usize,
}

impl<'a> Scene<'a> {
    /// From an empty stage: a link, gateways that trust each other, and a guest with its disk.
    pub(super) async fn set(bench: &'a Bench<'a>, disks: [GuestDisk; 2], seed: u64) -> Result<Self, LabError> {
        let mut scene = Self::set_without_guest(bench, disks, seed).await?;
        scene.guest = Some(boot(&bench.launch, &scene.sites[0]).await?);
        Ok(scene)
    }

    /// The same of a VM that is off.
    pub(super) async fn set_without_guest(
        bench: &'a Bench<'a>,
        disks: [GuestDisk; 2],
        seed: u64,
    ) -> Result<Self, LabError> {
        bench.stage.link.up(&bench.args.profile, seed).await?;
        let mut sites = bench.stage.sites()?;
        for (site, disk) in sites.iter_mut().zip(disks) {
            site.files.disk = Some(disk);
            hosts::tune(&site.namespace, Engine::Longhaul).await?;
        }
        let [a, b] = &sites;
        let (longhaul, launch) = (&bench.longhaul, Some(&bench.launch));
        let gateways = [
            a.start_gateway(longhaul, b, launch, &bench.section).await?,
            b.start_gateway(longhaul, a, launch, &bench.section).await?,
        ];
        a.pair(longhaul, b).await?;
        Ok(Self {
            bench,
            sites,
            gateways,
            guest: None,
        })
    }

    /// To an empty stage again. Why the link was not what its profile says.
    pub(super) async fn leave(self) -> Result<Option<String>, LabError> {
        let qemu = self.guest.map(|(qemu, _)| qemu);
        for process in self.gateways.into_iter().chain(qemu) {
            process.kill().await;
        }
        let stage = &self.bench.stage;
        stage.kill_all().await;
        let fault = stage.link.carried().await?.fault;
        stage.link.down().await?;
        stage.remove_sites(&self.sites);
        self.bench.remove_arrived();
        Ok(fault)
    }

    pub(super) async fn carried(&self) -> Result<Carried, LabError> {
        Ok(self.bench.stage.link.carried().await?)
    }

    /// What the processes of both sites cost from now on.
    pub(super) fn watch(&self) -> Watch {
        Watch::start([self.sites[0].directory.clone(), self.sites[1].directory.clone()])
    }

    fn source(&self) -> Client {
        Client::new(&self.sites[0].control_socket())
    }

    /// Bytes of payload a second that a link test gets across.
    pub(super) async fn test_link(&self, time: Duration) -> Result<f64, LabError> {
        self.sites[0]
            .test_link(&self.bench.longhaul, &self.sites[1], time)
            .await
    }

    fn request(&self) -> StartRequest {
        StartRequest {
            vm: VM.to_owned(),
            peer: self.sites[1].name.to_owned(),
            downtime_limit_seconds: None,
            rate_bytes_per_second: None,
            deadline_seconds: None,
            weight: None,
            warm: None,
            cold: false,
            disk_rate_bytes_per_second: None,
            disk_places: Vec::new(),
        }
    }

    /// Begins to migrate.
    pub(super) async fn begin(&self) -> Result<MigrationId, LabError> {
        let request = StartRequest {
            warm: Some(Warm { until_unix_ms: None }),
            ..self.request()
        };
        Ok(self.source().start(&request).await?.migration)
    }

    /// Moves the VM, which is off, and compares the images. What differs is no error.
    pub(super) async fn move_cold(&self) -> Result<(Report, Result<(), String>), LabError> {
        let request = StartRequest {
            cold: true,
            ..self.request()
        };
        let migration = self.source().start(&request).await?.migration;
        self.end_of(migration, PASS).await
    }

    /// Until the disk has been read once and is durable at the destination, or until so much of it has been read.
    pub(super) async fn first_pass(
        &self,
        migration: MigrationId,
        until_bytes: Option<u64>,
    ) -> Result<Course, LabError> {
        let mut course = Course::default();
        let mut following = self.source().follow(migration).await?;
        let disk_bytes = self.bench.disk_bytes();
        while let Some(event) = following.next().await? {
            match event {
                Event::Progress(progress) if progress.phase == Phase::Disks => {
                    let has_ended = waits(&progress);
                    let done = match (has_ended, course.has_begun()) {
                        (true, _) => disk_bytes,
                        (false, true) => disk_bytes.saturating_sub(progress.remaining_bytes),
                        // It knows of nothing that remains before the first look at it.
                        (false, false) => 0,
                    };
                    course.note(progress.elapsed_seconds, done);
                    if has_ended || until_bytes.is_some_and(|bytes| done >= bytes) {
                        return Ok(course);
                    }
                }
                Event::Report(report) => return Err(not_moved(report.reason)),
                Event::Progress(_) | Event::Notice(_) => {}
            }
        }
        Err(not_moved("its gateway went away".to_owned()))
    }

    /// Kills a gateway, and starts it again after some time.
    pub(super) async fn kill_gateway(&mut self, place: usize, away: Duration) -> Result<(), LabError> {
        let [a, b] = &self.sites;
        let (site, other) = if place == 0 { (a, b) } else { (b, a) };
        let gateway = &mut self.gateways[place];
        // It fails only for a process that has ended by itself, which is found out next.
        let _ = pidfd_send_signal(gateway.descriptor()?, Signal::KILL);
        gateway.wait().await?;
        let log = site.directory.join("gateway.log");
        std::fs::rename(&log, site.directory.join("gateway-killed.log"))
            .map_err(|source| LabError::file(&log, source))?;
        tokio::time::sleep(away).await;
        let (longhaul, launch) = (&self.bench.longhaul, Some(&self.bench.launch));
        *gateway = site.start_gateway(longhaul, other, launch, &self.bench.section).await?;
        Ok(())
    }

    /// Until a migration waits with its disk copied, also one that was begun in the place of another.
    pub(super) async fn waiting(&self) -> Result<Waiting, LabError> {
        let source = self.source();
        let deadline = tokio::time::Instant::now() + PASS;
        let mut said = "nothing is begun again".to_owned();
        while tokio::time::Instant::now() < deadline {
            // The gateway may be about to answer again.
            let mut listed = source.list().await.unwrap_or_default();
            listed.retain(|migration| migration.role == Role::Source);
            if let Some(open) = listed.iter().find(|migration| migration.outcome.is_none()) {
                let status = source.status(open.migration).await?;
                if status.progress.as_ref().is_some_and(waits) {
                    return Ok(Waiting {
                        migration: open.migration,
                        begun_again: listed.len() - 1,
                    });
                }
                said = format!("after {} s it is in the phase {}", PASS.as_secs(), open.phase);
            }
            tokio::time::sleep(LOOK).await;
        }
        Err(not_moved(said))
    }

    /// Lets it go on to its end, and compares the images. What differs is no error.
    pub(super) async fn finish(&self, migration: MigrationId) -> Result<(Report, Result<(), String>), LabError> {
        self.source().switch_over(migration).await?;
        self.end_of(migration, REST).await
    }

    async fn end_of(&self, migration: MigrationId, within: Duration) -> Result<(Report, Result<(), String>), LabError> {
        let source = self.source();
        let deadline = tokio::time::Instant::now() + within;
        while tokio::time::Instant::now() < deadline {
            if let Some(report) = source.status(migration).await?.report {
                if report.outcome != Outcome::Completed {
                    return Err(not_moved(report.reason));
                }
                return Ok((report, image::compare_sites(&self.sites).await?));
            }
            tokio::time::sleep(LOOK).await;
        }
        Err(not_moved(format!("it did not end within {} s", within.as_secs())))
    }
}

/// The disk has been read once; while it is read there is nothing to explain.
fn waits(progress: &Progress) -> bool {
    progress.phase == Phase::Disks && progress.eta_reason.is_some()
}

fn not_moved(said: String) -> LabError {
    LabError::NotMoved {
        direction: "A to B",
        said,
    }
}

const LOOK: Duration = Duration::from_millis(20);
/// Of a pass, also of one that begins again.
const PASS: Duration = Duration::from_secs(900);
/// Of the small memory of the guest, and of the end.
const REST: Duration = Duration::from_secs(120);
