//! The disks that arrive with a VM at its destination.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::task::JoinError;

use super::DestinationDriver;
use crate::config::VmImage;
use crate::gateway::again;
use crate::gateway::destination_vmm::DestinationVmm;
use crate::gateway::disks::mark::{self, Rest};
use crate::gateway::disks::take::{self, NotTaken, Place, Taken};
use crate::gateway::disks::{rest, sum_of, volumes};
use crate::proto::disk::held::BlockKey;
use crate::proto::ownership::{AbortReason, DestinationEvent, DestinationState, Verdict};

impl DestinationDriver {
    /// Waits for them, and writes them.
    pub(super) async fn take_disks(&mut self, place: Place) -> Result<(), String> {
        let migration = self.entry.migration;
        let vm = self.core.config.vm(&self.entry.vm);
        let are_new = vm.is_some_and(|vm| volumes::are_empty(vm, migration));
        let socket = self.core.disk_socket(migration);
        let key = BlockKey::of(migration.0);
        let (end, task) = take::begin(place, socket, &self.disks, are_new, key).await?;
        self.take = Some(task);
        let end = Arc::new(Mutex::new(Some(end)));
        self.core.disk_ends.insert(migration, &self.entry.peer, end);
        Ok(())
    }

    /// Their images stay, or not.
    pub(super) async fn put_disks_away(&mut self, verdict: Verdict) {
        let migration = self.entry.migration;
        let Some(vm) = self.core.config.vm(&self.entry.vm) else {
            return;
        };
        if verdict == Verdict::Running {
            mark::keep(vm, migration);
            if let Some(vmm) = self.vmm.as_mut().filter(|vmm| vmm.is_off()) {
                mark::sync(vm.images.iter().map(|image| image.path.clone()).collect()).await;
                vmm.let_go_of_images();
            }
            return;
        }
        let rest = self.rest_of_disks();
        mark::discard(vm, migration, rest).await;
        if rest == Rest::Stays && mark::is_unfinished(vm, migration) {
            let (core, peer) = (Arc::clone(&self.core), self.entry.peer.clone());
            tokio::spawn(rest::settle(core, vm.name.clone(), peer, migration));
        }
    }

    /// What becomes of the disks that were to arrive. Another migration may follow on one that was cut short.
    pub(super) fn rest_of_disks(&self) -> Rest {
        let reason = match (self.machine.state(), self.machine.verdict()) {
            (DestinationState::Killing(reason), _) => *reason,
            (_, Some(Verdict::Aborted(reason))) => reason,
            _ => return Rest::Goes,
        };
        match reason {
            // A restarted gateway cancels too.
            AbortReason::TimedOut | AbortReason::Cancelled => Rest::Stays,
            // That the source's gateway was restarted may be noticed here first.
            _ if self.disks_are_cut => Rest::Stays,
            reason if again::is_restart(reason) => Rest::Stays,
            _ => Rest::Goes,
        }
    }

    /// Nothing more is written to the disks that arrive.
    pub(super) fn stop_disks(&mut self) {
        self.take = None;
        self.taken = None;
        self.core.disk_ends.remove(self.entry.migration);
    }

    /// The path of an image of ours at which there is something else now: it would be taken for what was written.
    fn replaced_image(&self) -> Option<PathBuf> {
        let vm = self.core.config.vm(&self.entry.vm)?;
        let is_off = self.vmm.as_ref().is_some_and(DestinationVmm::is_off);
        // A hypervisor that waited has made its images itself.
        if !is_off && vm.command.is_none() {
            return None;
        }
        let is_offered = |image: &&VmImage| self.disks.iter().any(|disk| volumes::is_of(image, disk));
        let mut images = vm.images.iter().filter(is_offered);
        let replaced = images.find(|image| !mark::is_written(image, self.entry.migration));
        replaced.map(|image| image.path.clone())
    }

    /// What is at their paths is what was written, and of a VM that is off nobody gets at it from now on.
    async fn take_over_images(&mut self) -> Result<(), String> {
        if let Some(path) = self.replaced_image() {
            return Err(format!(
                "{} is not what was written any more: somebody has removed or replaced it",
                path.display()
            ));
        }
        match self.vmm.as_mut().filter(|vmm| vmm.is_off()) {
            Some(vmm) => vmm.hold_images().await,
            None => Ok(()),
        }
    }

    /// What wrote them has ended.
    pub(super) async fn on_taken(&mut self, taken: Result<Taken, JoinError>) {
        self.take = None;
        let reason = match taken {
            Ok(Taken {
                result: Ok(digest),
                stream,
            }) => {
                tracing::info!(migration = %self.entry.migration, vm = self.entry.vm, "disks are written");
                match self.take_over_images().await {
                    Ok(()) => {
                        if self.vmm.as_ref().is_some_and(DestinationVmm::is_off) {
                            // There is nothing else.
                            self.feed(&DestinationEvent::StreamEnded(sum_of(digest)));
                        }
                        return self.feed(&DestinationEvent::BarrierPassed);
                    }
                    Err(reason) => {
                        self.taken = Some(stream);
                        format!("{reason} at {}", self.core.config.site)
                    }
                }
            }
            Ok(Taken {
                result: Err(NotTaken { reason, is_cut }),
                stream,
            }) => {
                self.disks_are_cut |= is_cut;
                // The source is told here, and only then sees its stream end.
                self.taken = Some(stream);
                format!("{} at {}", reason, self.core.config.site)
            }
            Err(error) => format!("what writes the disks ended: {error}"),
        };
        self.fail(reason).await;
        self.feed(&DestinationEvent::LoadFailed);
    }
}
