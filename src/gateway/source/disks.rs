//! The disks that a source copies with its VM: everything first, what the guest writes beside memory, the rest while the guest stands.

use std::time::{Duration, Instant};

use super::SourceDriver;
use crate::api::{DiskFigures, Phase};
use crate::config::{Disks, Vm};
use crate::gateway::clock;
use crate::gateway::disks;
use crate::gateway::disks::cold_image::ColdImage;
use crate::gateway::disks::pull::{Failure, Origin, Pull};
use crate::hypervisor::qemu::{GuestDisk, RunState, SourceError};
use crate::proto::ownership::{SourceEvent, SourceState};
use crate::proto::page::ByteRate;
use crate::proto::precopy::DiskRounds;

/// Where they are.
#[derive(Debug, Default)]
pub(super) struct CopiedDisks {
    disks: Vec<GuestDisk>,
    /// Of a VM that is off: where each is.
    images: Option<Vec<ColdImage>>,
    /// They are read no faster.
    most: Option<ByteRate>,
    pull: Option<Pull>,
    /// All of them have been read once.
    is_bulk_done: bool,
    /// Memory is copied beside them.
    is_memory_begun: bool,
    /// The hypervisor was told to send the rest.
    is_continued: bool,
    figures: Option<DiskFigures>,
    /// They do not reach the peer any more, since when and why. It has some time to say the cause where the migration is driven.
    failed: Option<(Instant, String)>,
}

/// How long after contact is there the peer is given for that.
const WORD_OF_THE_PEER: Duration = Duration::from_secs(2);

impl CopiedDisks {
    pub(super) fn new(disks: Vec<GuestDisk>, images: Option<Vec<ColdImage>>, most: Option<ByteRate>) -> Self {
        Self {
            disks,
            images,
            most,
            ..Self::default()
        }
    }

    /// There are none.
    pub(super) fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Until something has to be done for them. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        match &mut self.pull {
            Some(pull) => pull.changed().await,
            None => std::future::pending().await,
        }
    }

    /// What has been read of them, where it was begun.
    pub(super) fn figures(&self) -> Option<DiskFigures> {
        self.pull.as_ref().map(Pull::figures).or(self.figures)
    }

    /// What is known of their rounds, where they are copied beside memory.
    pub(super) fn rounds(&self) -> Option<DiskRounds> {
        self.pull.as_ref().map(Pull::rounds)
    }

    /// Nothing more is read.
    pub(super) fn stop(&mut self) {
        self.figures = self.figures();
        self.pull = None;
    }
}

impl SourceDriver {
    /// Begins to copy, with the disks where there are any.
    pub(super) async fn start(&mut self) {
        let started = match self.begin_disks().await {
            Ok(true) => return,
            Ok(false) => self.start_memory().await,
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            self.fail(error);
            self.feed(&SourceEvent::MigrateFailed);
        }
    }

    async fn start_memory(&mut self) -> Result<(), String> {
        match self.hold().await? {
            true => Ok(()),
            false => self.start_migrate().await,
        }
    }

    /// Begins to read the disks; whether there are any.
    async fn begin_disks(&mut self) -> Result<bool, String> {
        if self.disks.is_empty() {
            return Ok(false);
        }
        let origin = match &self.disks.images {
            Some(images) => Origin::Off(images.clone()),
            None => {
                self.vmm.claim_images();
                let vm = self.vmm.connected().await.map_err(|error| error.to_string())?;
                Origin::Running(vm.block_layer())
            }
        };
        let pull = Pull::begin(
            &self.core,
            &self.entry,
            origin,
            self.disks.disks.clone(),
            self.disks.most,
        );
        self.disks.pull = Some(pull);
        self.show(Phase::Disks, None);
        Ok(true)
    }

    /// Something has changed.
    pub(super) async fn on_disks(&mut self) {
        let Some(pull) = &mut self.disks.pull else { return };
        let state = pull.take_state();
        let is_copying = matches!(self.machine.state(), SourceState::Copying(_));
        if let Some(failure) = state.failed {
            self.disks.stop();
            match failure {
                Failure::Here(reason) if is_copying => {
                    self.fail(reason);
                    self.feed(&SourceEvent::Cancel);
                }
                Failure::OnTheWay(reason) if is_copying => self.disks.failed = Some((clock::now(), reason)),
                // The destination decides.
                Failure::Here(_) | Failure::OnTheWay(_) => {}
            }
            return;
        }
        if !is_copying {
            return;
        }
        if let Some(digest) = state.digest {
            // They are all that there is of a VM that is off.
            self.feed(&SourceEvent::StreamEnded(disks::sum_of(digest)));
            self.feed(&SourceEvent::MigrateCompleted);
            return self.feed(&SourceEvent::PostMigrate);
        }
        if state.is_bulk_done && !self.disks.is_bulk_done {
            self.disks.is_bulk_done = true;
            let figures = state.figures;
            tracing::info!(migration = %self.entry.migration, vm = self.entry.vm, read_bytes = figures.read_bytes,
                zero_bytes = figures.zero_bytes, "disks are read once");
            self.go_on_after_disks().await;
        }
        if state.is_complete && !self.disks.is_continued {
            self.disks.is_continued = true;
            let continued = match self.vmm.connected().await {
                Ok(vm) => vm.continue_switchover().await,
                Err(error) => Err(error),
            };
            if let Err(error) = continued {
                self.fail(format!("the hypervisor does not go on after its disks: {error}"));
                self.feed(&SourceEvent::Cancel);
            }
        }
    }

    /// Memory follows, unless the migration was asked to wait with its disks copied.
    async fn go_on_after_disks(&mut self) {
        if self.entry.waits(clock::unix_ms()) {
            return;
        }
        self.disks.is_memory_begun = true;
        if let Some(copying) = &mut self.copying {
            copying.goes_on(clock::now());
        }
        if let Err(error) = self.start_memory().await {
            self.fail(error);
            self.feed(&SourceEvent::MigrateFailed);
        }
    }

    /// The hypervisor says that it waits before it sends the rest. What is read of the disks once the guest stands is the last of them.
    pub(super) async fn finish_disks(&mut self) {
        let waits = |pull: &Pull| !pull.is_finishing();
        if !self.disks.pull.as_ref().is_some_and(waits) {
            return;
        }
        let stands = async {
            let state = self.vmm.connected().await?.run_state().await?;
            Ok::<_, SourceError>(state != RunState::Running)
        };
        match (stands.await, &self.disks.pull) {
            (Ok(true), Some(pull)) => pull.finish(),
            // Looked at again.
            (Ok(false), _) | (_, None) => {}
            (Err(error), _) => {
                tracing::debug!(migration = %self.entry.migration, "the hypervisor did not answer: {error}");
            }
        }
    }

    /// A look at disks for which memory waits, or that do not arrive; whether the migration was given up for these.
    pub(super) async fn look_at_disks(&mut self) -> bool {
        if let Some((since, reason)) = &mut self.disks.failed {
            let now = clock::now();
            if self.lost_contact.is_some() {
                *since = now;
            } else if now.saturating_duration_since(*since) > WORD_OF_THE_PEER {
                let reason = std::mem::take(reason);
                self.disks.failed = None;
                self.fail(reason);
                self.feed(&SourceEvent::Cancel);
                return true;
            }
        }
        if self.disks.is_memory_begun || self.disks.pull.is_none() {
            return false;
        }
        if self.disks.is_bulk_done {
            self.go_on_after_disks().await;
            if self.disks.is_memory_begun {
                return false;
            }
        }
        let waits = self.disks.is_bulk_done.then(|| {
            let migration = self.entry.migration;
            let until = self.entry.waits_until().and_then(|ms| i64::try_from(ms).ok());
            let until = until.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
            let until = until.map_or_else(String::new, |until| format!("{until:.0} or "));
            format!("its disks are kept up to date until {until}`longhaul switchover {migration}`")
        });
        if let (Some(figures), Some(copying), Some(link)) = (self.disks.figures(), &mut self.copying, &self.link) {
            copying.look_at_disks(clock::now(), figures, waits, link, &self.entry);
        }
        false
    }

    /// What is put back in a hypervisor whose VM stays.
    pub(super) async fn put_back(&mut self) {
        self.disks.stop();
        let is_copied = |vm: &Vm| vm.disks == Disks::Copied;
        if self.core.config.vm(&self.entry.vm).is_some_and(is_copied) {
            self.vmm.clean_up_disks().await;
        }
        self.vmm.restore_settings().await;
    }
}
