//! The source's vmm through a whole migration: connected, frozen, thawed, found again after a restart, ended. A VM that is off has none: then it is its
//! images that are held.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::disks::cold_image::{ColdImage, ColdImageError, Hold};
use super::disks::mark;
use super::vm_context::VmContext;
use crate::hypervisor::process::Process;
use crate::hypervisor::qemu::{FreezeError, Frozen, RunState, SourceError, SourceVm, Undone};
use crate::hypervisor::qmp::{Events, EventsEnd};
use crate::proto::ownership::VmmFact;
use crate::proto::page::MigrationId;

/// Time for the vmm to answer, to stop or to go on.
const DEADLINE: Duration = Duration::from_secs(10);

/// The vmm, in whichever way it is held at the moment.
#[derive(Debug)]
pub(crate) struct SourceVmm {
    context: VmContext,
    was_running: bool,
    vm: Option<SourceVm>,
    events: Option<Events>,
    frozen: Option<Frozen>,
    /// Of a VM that is off.
    held: Vec<Arc<Hold>>,
}

/// What the vmm reports by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VmEvent {
    /// The vCPUs stand.
    Stopped,
    /// The vCPUs run.
    Resumed,
    /// It waits before it sends the rest, where it was told to.
    PreSwitchover,
    /// The monitor is closed, or more was said than could be listened to: what the guest does now has to be asked.
    Deaf,
    /// Something that does not matter here.
    Other,
}

/// How an attempt to freeze went.
#[derive(Debug)]
pub(crate) enum FreezeOutcome {
    Frozen,
    Dead,
    Failed(String),
}

/// How an attempt to let the guest run went.
#[derive(Debug)]
pub(crate) enum ResumeOutcome {
    Running,
    Dead,
    /// The vmm said no, or the guest is in a state that is not the migration's doing.
    Refused(String),
    /// The vmm did not answer: it may be asked again.
    Silent(String),
}

impl SourceVmm {
    /// A vmm that was just connected to.
    pub(crate) fn new(vm: SourceVm, context: VmContext) -> Self {
        let events = Some(vm.events());
        Self {
            context,
            was_running: vm.was_running(),
            vm: Some(vm),
            events,
            frozen: None,
            held: Vec::new(),
        }
    }

    /// Of a VM that is off, with these images.
    pub(crate) fn off(context: VmContext, images: &[ColdImage]) -> Self {
        Self {
            context,
            was_running: false,
            vm: None,
            events: None,
            frozen: None,
            held: images.iter().map(ColdImage::hold).collect(),
        }
    }

    /// There is no vmm, and none may be started from its images.
    pub(crate) fn is_off(&self) -> bool {
        self.context.is_off
    }

    /// Its guest uses the images that are copied, whatever they were before.
    pub(crate) fn claim_images(&self) {
        mark::claim(self.context.images.iter().map(PathBuf::as_path));
    }

    /// Finds the vmm of a migration that an earlier gateway began, without touching its guest.
    pub(crate) async fn find(context: VmContext, was_running: bool) -> (Self, VmmFact) {
        let mut vmm = Self {
            context,
            was_running,
            vm: None,
            events: None,
            frozen: None,
            held: Vec::new(),
        };
        let fact = match vmm.is_off() {
            true => vmm.hold_again().await,
            false => vmm.look().await,
        };
        (vmm, fact)
    }

    async fn hold_again(&mut self) -> VmmFact {
        for image in &self.context.images {
            match Hold::take(image).await {
                Ok(hold) => self.held.push(Arc::new(hold)),
                Err(error @ ColdImageError::InUse { .. }) => {
                    tracing::warn!("the VM was off: {error}");
                    return VmmFact::Running;
                }
                Err(error) => {
                    tracing::warn!("the VM was off: {error}");
                    return VmmFact::Unreachable;
                }
            }
        }
        VmmFact::Paused
    }

    /// What can be seen of it now.
    pub(crate) async fn look(&mut self) -> VmmFact {
        if self.is_off() {
            return VmmFact::Paused;
        }
        if self.is_dead() {
            return VmmFact::Dead;
        }
        if self.frozen.is_some() {
            return VmmFact::Paused;
        }
        if let Some(identity) = &self.context.process
            && let Ok(Some(frozen)) = Frozen::reattach(identity)
        {
            self.frozen = Some(frozen);
            return VmmFact::Paused;
        }
        let state = match self.connected().await {
            Ok(vm) => vm.run_state().await,
            Err(error) => Err(error),
        };
        match state {
            Ok(RunState::Running) => VmmFact::Running,
            Ok(_) => VmmFact::Paused,
            Err(_) if self.is_dead() => VmmFact::Dead,
            Err(_) => VmmFact::Unreachable,
        }
    }

    pub(crate) fn context(&self) -> &VmContext {
        &self.context
    }

    /// Whether its process is gone, for sure.
    pub(crate) fn is_dead(&self) -> bool {
        match &self.context.process {
            Some(identity) => matches!(Process::reattach(identity), Ok(None)),
            None => false,
        }
    }

    /// The connection to its monitor, made again where there is none.
    pub(crate) async fn connected(&mut self) -> Result<&mut SourceVm, SourceError> {
        if self.vm.as_ref().is_some_and(SourceVm::is_lost) {
            self.vm = None;
        }
        if self.vm.is_none() {
            let identity = self
                .context
                .process
                .as_ref()
                .ok_or_else(|| SourceError::AnotherProcess {
                    path: self.context.qmp.display().to_string(),
                })?;
            let settings = self.context.settings.clone();
            let vm = SourceVm::reattach(&self.context.qmp, identity, self.was_running, settings, DEADLINE).await?;
            self.events = Some(vm.events());
            self.vm = Some(vm);
        }
        Ok(self.vm.as_mut().expect("connected above"))
    }

    /// What it reports next; never, where it is not connected. Cancel-safe.
    pub(crate) async fn next_event(&mut self) -> VmEvent {
        let Some(events) = &mut self.events else {
            return std::future::pending().await;
        };
        match events.next().await {
            Ok(event) => match event.name.as_str() {
                "STOP" => VmEvent::Stopped,
                "RESUME" => VmEvent::Resumed,
                "MIGRATION" if event.data["status"] == "pre-switchover" => VmEvent::PreSwitchover,
                _ => VmEvent::Other,
            },
            Err(EventsEnd::Lagged) => {
                self.events = self.vm.as_ref().map(SourceVm::events);
                VmEvent::Deaf
            }
            Err(EventsEnd::Closed) => {
                self.events = None;
                VmEvent::Deaf
            }
        }
    }

    /// Stops the process so that nobody can resume the guest. On failure it has been let go on, and the guest is where the
    /// vmm left it.
    pub(crate) async fn freeze(&mut self) -> FreezeOutcome {
        if self.is_off() {
            return FreezeOutcome::Frozen;
        }
        if let Some(frozen) = &self.frozen
            && frozen.is_still_frozen().unwrap_or(false)
        {
            return FreezeOutcome::Frozen;
        }
        self.frozen = None;
        let frozen = match self.connected().await {
            Ok(vm) => vm.freeze().await.map_err(|error| match error {
                FreezeError::NotReady(conditions) => {
                    format!("the source's hypervisor is not ready to hand over: {conditions}")
                }
                other => other.to_string(),
            }),
            Err(error) => Err(error.to_string()),
        };
        match frozen {
            Ok(frozen) => {
                self.frozen = Some(frozen);
                FreezeOutcome::Frozen
            }
            Err(_) if self.is_dead() => FreezeOutcome::Dead,
            Err(reason) => FreezeOutcome::Failed(reason),
        }
    }

    /// Stops the process of a guest that was handed over and that somebody continued, whatever its monitor says, and leaves it
    /// stopped.
    ///
    /// # Errors
    /// A sentence: it may run on.
    pub(crate) async fn stop_again(&mut self) -> Result<(), String> {
        let identity = self.context.process.as_ref();
        let process = match identity.map(Process::reattach) {
            Some(Ok(Some(process))) => process,
            Some(Ok(None)) | None => return Ok(()),
            Some(Err(error)) => return Err(error.to_string()),
        };
        process.stop(&[], DEADLINE).await.map_err(|error| error.to_string())?;
        self.frozen = Frozen::reattach(process.identity()).map_err(|error| error.to_string())?;
        Ok(())
    }

    /// Whether somebody has continued the process since it was stopped for the hand-over.
    pub(crate) fn was_let_go(&self) -> bool {
        self.frozen
            .as_ref()
            .is_some_and(|frozen| matches!(frozen.is_still_frozen(), Ok(false)))
    }

    /// What a guest does whose process somebody has continued.
    pub(crate) async fn ask_after_let_go(&mut self) -> VmmFact {
        self.frozen = None;
        self.look().await
    }

    /// Lets the process go on. The guest stays paused.
    pub(crate) async fn thaw(&mut self) {
        if self.frozen.is_none()
            && let Some(identity) = &self.context.process
        {
            self.frozen = Frozen::reattach(identity).ok().flatten();
        }
        if let Some(frozen) = self.frozen.take()
            && let Err(error) = frozen.thaw().await
        {
            tracing::warn!(qmp = %self.context.qmp.display(), "the hypervisor's process could not be let go on: {error}");
        }
    }

    /// Tells it to stop migrating. Fine where it does not migrate.
    pub(crate) async fn cancel(&mut self) {
        if self.is_off() {
            return;
        }
        let cancelled = match self.connected().await {
            Ok(vm) => vm.cancel(DEADLINE).await,
            Err(error) => Err(error),
        };
        if let Err(error) = cancelled {
            tracing::debug!(qmp = %self.context.qmp.display(), "the migration was not cancelled: {error}");
        }
    }

    /// Brings the guest back to what it was before the migration: running, if it ran. Only where the rules of ownership say so.
    pub(crate) async fn resume(&mut self) -> ResumeOutcome {
        if self.is_off() {
            return ResumeOutcome::Running;
        }
        let undone = match self.connected().await {
            Ok(vm) => vm.undo(DEADLINE).await,
            Err(error) => Err(error),
        };
        match undone {
            Ok(Undone::Running | Undone::PausedAsBefore) => ResumeOutcome::Running,
            Ok(Undone::Stopped(state)) => {
                ResumeOutcome::Refused(format!("the guest does not run at the source; its state is {state}"))
            }
            Err(_) if self.is_dead() => ResumeOutcome::Dead,
            Err(SourceError::ContRefused(refusal)) => ResumeOutcome::Refused(refusal.to_string()),
            Err(SourceError::Qmp(error)) if error.is_refusal() => ResumeOutcome::Refused(error.to_string()),
            Err(error) => ResumeOutcome::Silent(error.to_string()),
        }
    }

    /// Ends what is left of reading its disks.
    pub(crate) async fn clean_up_disks(&mut self) {
        if self.is_off() || self.frozen.is_some() || self.is_dead() {
            return;
        }
        match self.connected().await {
            Ok(vm) => vm.block_layer().clean_up().await,
            Err(error) => {
                tracing::debug!(qmp = %self.context.qmp.display(), "the disks were not cleaned up: {error}");
            }
        }
    }

    /// Puts the migration settings back to what they were.
    pub(crate) async fn restore_settings(&mut self) {
        if self.is_off() || self.frozen.is_some() || self.is_dead() {
            return;
        }
        let restored = match self.connected().await {
            Ok(vm) => vm.restore_settings().await,
            Err(error) => Err(error),
        };
        match restored {
            // So that nothing is put back twice, over what somebody has set since.
            Ok(()) => self.context.settings = None,
            Err(error) => {
                tracing::debug!(qmp = %self.context.qmp.display(), "migration settings were not put back: {error}");
            }
        }
    }

    /// Ends it without letting the guest run again: the VM is elsewhere. Left paused where the configuration says so. Its images, where they were
    /// copied, are old from now on.
    ///
    /// # Errors
    /// A sentence: it still exists.
    pub(crate) async fn discard(&mut self, migration: MigrationId) -> Result<(), String> {
        if self.is_off() && self.held.len() < self.context.images.len() {
            // Since the gateway was restarted.
            return Err("somebody uses its images here, which are what it was before".to_owned());
        }
        mark::leave(self.context.images.iter().map(PathBuf::as_path), migration);
        if self.is_off() {
            mark::sync(self.context.images.clone()).await;
            self.held.clear();
            return Ok(());
        }
        if self.is_dead() {
            return Ok(());
        }
        if self.context.leave_after_success {
            self.thaw().await;
            return Ok(());
        }
        if self.frozen.is_none()
            && let Some(identity) = &self.context.process
        {
            self.frozen = Frozen::reattach(identity).ok().flatten();
        }
        if let Some(frozen) = &self.frozen {
            return frozen.kill(DEADLINE).await.map_err(|error| error.to_string());
        }
        match self.vm.take() {
            Some(vm) => vm.quit(DEADLINE).await.map_err(|error| error.to_string()),
            None => match self.context.process.as_ref().map(Process::reattach) {
                Some(Ok(Some(process))) => process.kill(DEADLINE).await.map_err(|error| error.to_string()),
                _ => Ok(()),
            },
        }
    }
}
