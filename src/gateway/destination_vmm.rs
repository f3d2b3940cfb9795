//! The destination's vmm through a whole migration: started or connected to, fed, continued, found again after a restart, killed. A VM that is off has
//! none: what arrives is its images.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;

use super::disks::cold_image::{ColdImageError, Hold};
use super::disks::take::Place;
use super::disks::volumes;
use super::vm_context::VmContext;
use crate::config::Vm;
use crate::hypervisor::image_server;
use crate::hypervisor::process::Process;
use crate::hypervisor::qemu::{DestinationError, DestinationVm, Launch, LaunchValues, Loaded, RunState, VmInventory};
use crate::proto::ownership::VmmFact;

/// Time for a hypervisor that was started to answer.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Time for the monitor to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Time for the process to end after SIGKILL before it is tried again.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Time for it to write what it has of its disks, and to end.
const QUIT_DEADLINE: Duration = Duration::from_secs(5);

/// Between looks whether an image is closed.
const CLOSE_LOOK: Duration = Duration::from_millis(10);

/// The vmm, in whichever way it is held at the moment.
#[derive(Debug)]
pub(crate) struct DestinationVmm {
    context: VmContext,
    log: PathBuf,
    /// Started by us, so ours to end where nothing has come of it.
    launched: bool,
    /// Somebody else's: found with another VM in it than the one that it was to receive.
    foreign: bool,
    vm: Option<DestinationVm>,
    loaded: Option<Loaded>,
    /// Of a VM that is off: the source has let it go, and its images are complete.
    is_complete: bool,
    /// Its images, once they are written and until the VM is here: it must not be started from them.
    held: Vec<Hold>,
}

/// What can be seen of the load.
#[derive(Debug)]
pub(crate) enum LoadState {
    /// Not there yet.
    Loading,
    /// Loaded and paused.
    Loaded,
    /// Loaded, and the guest runs.
    Running,
    /// It will never be loaded.
    Failed(String),
    /// The process is gone.
    Dead(String),
    /// It did not answer.
    Unknown,
}

/// What became of `cont`.
#[derive(Debug)]
pub(crate) enum ContinueOutcome {
    /// The guest runs.
    Running,
    /// The vmm said no: the guest has not run.
    Refused(String),
    /// The vmm said nothing, and the guest stands.
    Paused,
    /// The process is gone.
    Dead,
}

impl DestinationVmm {
    /// Starts the vmm of the configuration's command, or connects to the one that waits. Nothing is left running on failure, and
    /// a vmm that does not wait for a migration is left alone.
    ///
    /// # Errors
    /// A sentence for both operators.
    pub(crate) async fn start(config: &Vm, socket: &Path, log: PathBuf) -> Result<Self, String> {
        let started = match &config.command {
            Some(template) => {
                let template = template.clone();
                let values = LaunchValues::new(&config.name, &config.qmp, socket).map_err(|error| error.to_string())?;
                let launch = Launch {
                    template,
                    values,
                    log: log.clone(),
                    ready_within: READY_WITHIN,
                };
                DestinationVm::launch(&launch).await
            }
            None => DestinationVm::connect(&config.qmp, DEADLINE).await,
        };
        let vm = started.map_err(|error| error.to_string())?;
        let context = VmContext {
            qmp: config.qmp.clone(),
            process: Some(vm.identity().clone()),
            leave_after_success: false,
            settings: None,
            is_off: false,
            images: Vec::new(),
        };
        let mut vmm = Self {
            context,
            log,
            launched: config.command.is_some(),
            foreign: false,
            vm: Some(vm),
            loaded: None,
            is_complete: false,
            held: Vec::new(),
        };
        match vmm.look_before().await {
            Ok(()) => Ok(vmm),
            Err(error) => {
                vmm.abandon().await;
                Err(error.to_string())
            }
        }
    }

    /// Of a VM that is off.
    pub(crate) fn off(config: &Vm, log: PathBuf) -> Self {
        let images = config.images.iter().map(|image| image.path.clone()).collect();
        Self::of_earlier(VmContext::off(&config.qmp, images), log)
    }

    /// There is no vmm.
    pub(crate) fn is_off(&self) -> bool {
        self.context.is_off
    }

    /// Keeps others from the images of a VM that is off, now that nothing writes them any more.
    ///
    /// # Errors
    /// A sentence: somebody was faster.
    pub(crate) async fn hold_images(&mut self) -> Result<(), String> {
        for image in &self.context.images {
            match Hold::take(image).await {
                Ok(held) => self.held.push(held),
                Err(error @ ColdImageError::InUse { .. }) => return Err(error.to_string()),
                Err(error) if !image.exists() => return Err(error.to_string()),
                // A file system without locks: QEMU has none there either.
                Err(error) => tracing::warn!("the image of a VM that arrives is not held: {error}"),
            }
        }
        Ok(())
    }

    /// The VM is here: who wants it to run may start it.
    pub(crate) fn let_go_of_images(&mut self) {
        self.held.clear();
    }

    /// Everything that is needed is here: of a VM that is off, nothing more is waited for.
    pub(crate) fn complete(&mut self) {
        self.is_complete = true;
    }

    /// It waits for a migration, and these settings of it will have to be put back.
    async fn look_before(&mut self) -> Result<(), DestinationError> {
        let vm = self.connected().await?;
        vm.check_waits().await?;
        self.context.settings = Some(vm.remember_settings().await?);
        Ok(())
    }

    /// Finds the vmm of a migration that an earlier gateway began, without touching its guest.
    pub(crate) async fn find(context: VmContext, log: PathBuf) -> (Self, VmmFact) {
        let mut vmm = Self::of_earlier(context, log);
        let fact = if vmm.is_off() {
            // What writes its images ends with the gateway that let it.
            VmmFact::Paused
        } else if vmm.is_dead() {
            VmmFact::Dead
        } else {
            match vmm.load_state().await {
                LoadState::Running => VmmFact::Running,
                LoadState::Loaded => VmmFact::Paused,
                LoadState::Dead(_) => VmmFact::Dead,
                LoadState::Loading | LoadState::Failed(_) | LoadState::Unknown => VmmFact::Unreachable,
            }
        };
        (vmm, fact)
    }

    /// The vmm of a migration that an earlier gateway began, without a look at it.
    pub(crate) fn of_earlier(context: VmContext, log: PathBuf) -> Self {
        Self {
            context,
            log,
            launched: true,
            foreign: false,
            vm: None,
            loaded: None,
            is_complete: false,
            held: Vec::new(),
        }
    }

    pub(crate) fn context(&self) -> &VmContext {
        &self.context
    }

    /// Whether its process is gone, for sure.
    pub(crate) fn is_dead(&self) -> bool {
        match &self.context.process {
            Some(identity) => matches!(Process::reattach(identity), Ok(None)),
            None => !self.is_off(),
        }
    }

    /// What the machine consists of.
    ///
    /// # Errors
    /// A sentence.
    pub(crate) async fn inventory(&mut self) -> Result<VmInventory, String> {
        let vm = self.connected().await.map_err(|error| error.to_string())?;
        vm.inventory().await.map_err(|error| error.to_string())
    }

    /// Where its disks are written, of which `vm` says where those are that it is off with.
    ///
    /// # Errors
    /// A sentence.
    pub(crate) async fn disks(&mut self, site: &str, vm: Option<&Vm>) -> Result<Place, String> {
        if self.is_off() {
            return Ok(Place::Off {
                site: site.to_owned(),
                images: vm.map(|vm| vm.images.clone()).unwrap_or_default(),
            });
        }
        let vm = self.connected().await.map_err(|error| error.to_string())?;
        Ok(Place::Running(vm.block_layer()))
    }

    /// Makes it listen on `socket` for the stream and connects to that.
    ///
    /// # Errors
    /// A sentence. The process is left as it is; one that was given another VM meanwhile is not ours to end any more.
    pub(crate) async fn receive(&mut self, socket: &Path) -> Result<UnixStream, String> {
        let vm = self.connected().await.map_err(|error| error.to_string())?;
        let prepared = vm.prepare(socket).await;
        if let Err(DestinationError::NotIncoming { .. } | DestinationError::NotDeferred { .. }) = prepared {
            self.foreign = !self.launched;
        }
        prepared.map_err(|error| error.to_string())?;
        let stream = UnixStream::connect(socket).await;
        // Nobody else needs to find it.
        let _ = std::fs::remove_file(socket);
        stream.map_err(|error| format!("the hypervisor does not listen where it was told to: {error}"))
    }

    /// What can be seen of the load now.
    pub(crate) async fn load_state(&mut self) -> LoadState {
        if self.is_off() {
            return match self.is_complete {
                true => LoadState::Loaded,
                false => LoadState::Loading,
            };
        }
        let looked = match self.connected().await {
            Ok(vm) => vm.wait_loaded(Duration::ZERO).await,
            Err(error) => Err(error),
        };
        match looked {
            Ok(loaded) => {
                self.loaded = Some(loaded);
                LoadState::Loaded
            }
            Err(DestinationError::StartedByItself) => LoadState::Running,
            Err(DestinationError::NotLoadedInTime { .. }) => LoadState::Loading,
            Err(DestinationError::LoadFailed { reason }) => LoadState::Failed(reason),
            Err(error @ (DestinationError::Ended { .. } | DestinationError::RecordedProcessGone { .. })) => {
                LoadState::Dead(error.to_string())
            }
            Err(error) if self.is_dead() => LoadState::Dead(error.to_string()),
            Err(error) => {
                tracing::debug!(qmp = %self.context.qmp.display(), "the hypervisor did not answer: {error}");
                LoadState::Unknown
            }
        }
    }

    /// Lets the guest run. Only after COMMIT.
    pub(crate) async fn cont(&mut self) -> ContinueOutcome {
        if self.is_off() {
            // It is here, and whoever wants it to run starts it.
            return ContinueOutcome::Running;
        }
        loop {
            if self.loaded.is_none() {
                match self.load_state().await {
                    LoadState::Loaded => {}
                    LoadState::Running => return ContinueOutcome::Running,
                    LoadState::Dead(_) => return ContinueOutcome::Dead,
                    // What it is cannot be told yet, and nothing was asked of it.
                    LoadState::Loading | LoadState::Failed(_) | LoadState::Unknown => return ContinueOutcome::Paused,
                }
            }
            let (Some(vm), Some(loaded)) = (&self.vm, &self.loaded) else {
                continue;
            };
            return match vm.cont(loaded, DEADLINE).await {
                Ok(()) => ContinueOutcome::Running,
                Err(DestinationError::ContRefused(error)) => ContinueOutcome::Refused(error.to_string()),
                Err(error) => {
                    tracing::warn!(qmp = %self.context.qmp.display(), "{error}");
                    if self.is_dead() {
                        return ContinueOutcome::Dead;
                    }
                    match vm.run_state().await {
                        Ok(RunState::Running) => ContinueOutcome::Running,
                        _ => ContinueOutcome::Paused,
                    }
                }
            };
        }
    }

    /// Lets it tell the network so many times where the guest is, if that runs, and puts its migration settings back.
    pub(crate) async fn settle(&mut self, announce_rounds: u32) {
        if self.is_off() || self.is_dead() {
            return;
        }
        let qmp = self.context.qmp.clone();
        let vm = match self.connected().await {
            Ok(vm) => vm,
            Err(error) => {
                tracing::warn!(qmp = %qmp.display(), "the VM was not announced to its network: {error}");
                return;
            }
        };
        let announced = match vm.run_state().await {
            Ok(RunState::Running) => vm.announce_self(announce_rounds).await,
            // A guest that was paused before is where it was; it is announced by whoever lets it run.
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = announced {
            tracing::warn!(qmp = %qmp.display(), "the VM was not announced to its network: {error}");
        }
        if let Err(error) = vm.restore_settings().await {
            tracing::debug!(qmp = %qmp.display(), "migration settings were not put back: {error}");
        }
    }

    /// Gives it up before it was told to load anything: one that we started is ended, another goes on waiting.
    pub(crate) async fn abandon(mut self) {
        if self.launched {
            self.kill_confirmed().await;
        }
    }

    /// Asks it to end by itself, so that its disks are as they were written. It may not hear: to be followed by [`Self::kill_confirmed`].
    pub(crate) async fn quit(&mut self) {
        if self.is_off() || !self.launched || self.foreign || self.is_dead() {
            return;
        }
        let quit = async { self.connected().await?.quit(QUIT_DEADLINE).await };
        if let Err(error) = quit.await {
            tracing::debug!("the hypervisor does not end by itself: {error}");
        }
    }

    /// Ends it and returns when its process is gone, however long that takes. Somebody else's, into which nothing was loaded, is
    /// let be.
    pub(crate) async fn kill_confirmed(&mut self) {
        if self.foreign {
            return;
        }
        if self.is_off() {
            self.let_go_of_images();
            return images_closed(&self.context.images).await;
        }
        loop {
            if self.is_dead() {
                break;
            }
            let killed = match (&self.vm, self.context.process.as_ref().map(Process::reattach)) {
                (Some(vm), _) => vm.kill(KILL_DEADLINE).await.map_err(|error| error.to_string()),
                (None, Some(Ok(Some(process)))) => process.kill(KILL_DEADLINE).await.map_err(|error| error.to_string()),
                (None, Some(Err(error))) => Err(error.to_string()),
                (None, Some(Ok(None)) | None) => Ok(()),
            };
            match killed {
                Ok(()) => break,
                Err(error) => tracing::error!("the hypervisor that must not run could not be ended: {error}"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.vm = None;
        // Its log is of no use once what it said has been told.
        let _ = std::fs::remove_file(&self.log);
        remove_socket_of_the_dead(&self.context.qmp);
    }

    async fn connected(&mut self) -> Result<&mut DestinationVm, DestinationError> {
        if self.vm.as_ref().is_some_and(DestinationVm::is_lost) {
            self.vm = None;
        }
        if self.vm.is_none() {
            let Some(identity) = &self.context.process else {
                return Err(DestinationError::RecordedProcessGone { pid: 0 });
            };
            let log = self.log.exists().then(|| self.log.clone());
            let settings = self.context.settings.clone();
            self.vm = Some(DestinationVm::reattach(&self.context.qmp, identity, settings, log, DEADLINE).await?);
        }
        Ok(self.vm.as_mut().expect("connected above"))
    }
}

/// Waits until nothing of ours writes these images. What does ends once it has written what it has.
async fn images_closed(images: &[PathBuf]) {
    for image in images {
        let is_used = || File::open(image).is_ok_and(|file| volumes::is_used(&file));
        let end = tokio::time::Instant::now() + image_server::END_DEADLINE;
        while is_used() && tokio::time::Instant::now() < end {
            tokio::time::sleep(CLOSE_LOOK).await;
        }
    }
}

/// A killed vmm leaves its socket file, on which nobody listens.
fn remove_socket_of_the_dead(path: &Path) {
    if let Err(error) = std::os::unix::net::UnixStream::connect(path)
        && error.kind() == std::io::ErrorKind::ConnectionRefused
    {
        let _ = std::fs::remove_file(path);
    }
}
