//! What the engine asks of the VMM that embeds it.

use kvm_ioctls::VcpuFd;

/// Why a VMM could not do what it was asked for: a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct VmmError(pub String);

/// A VMM, as far as a migration needs it: a process that runs one guest, which a gateway stops (SIGSTOP) once the guest is handed over, and ends (SIGKILL) when that
/// runs elsewhere. Called from threads of the engine and of its monitor, also from two at once; some of that under the monitor's lock: nothing of
/// [`Monitor`](super::Monitor) is to be called from here, and it is not to be dropped here.
pub trait Vmm: Send + Sync + 'static {
    /// Stops the guest: when it returns, no vCPU is in `KVM_RUN`, the exit by which each came out is completed (KVM was entered again with `immediate_exit`
    /// until it gave `EINTR`: what an exit to a port or to memory reads is written to the guest only then), and no device writes to the guest's memory. Fine where it stands already.
    ///
    /// # Errors
    /// The guest runs on.
    fn pause(&self) -> Result<(), VmmError>;

    /// Lets the guest run. Fine where it runs already.
    ///
    /// # Errors
    /// The guest stands.
    fn resume(&self) -> Result<(), VmmError>;

    /// Shows every vCPU to `visit`, from 0 on, each of them outside of `KVM_RUN` for as long as that takes, and as completed as after a pause. The guest may run, or stand.
    ///
    /// # Errors
    /// What `visit` returns; the ones after it are not shown.
    fn visit_vcpus(&self, visit: &mut Visit<'_>) -> Result<(), VmmError>;

    /// Tells of everything that was written to the guest's memory since the last time by anything but KVM, on whichever thread, by guest address and length in
    /// bytes: used rings, buffers, whatever a device of the VMM stores. KVM's log has not seen it, and a page that is not told of is old at the destination. What
    /// is written is noted after it was stored, never before. Nothing to do where the VMM stores nothing after its guest was loaded.
    fn take_device_writes(&self, written: &mut dyn FnMut(u64, u64));

    /// Threads of this process that run vCPUs: what a gateway knows the process by.
    fn vcpu_threads(&self) -> Vec<u32>;

    /// The state of the devices that are not KVM's own. The guest stands; what this stores in the guest's memory still goes with it. Whatever the devices have
    /// open elsewhere (disks, locks of images) is flushed and let go: the process may end without another call. If the
    /// migration then comes to nothing, [`Vmm::resume`] follows, and takes it back.
    ///
    /// # Errors
    /// The migration fails, and the guest runs on.
    fn save_devices(&self) -> Result<Vec<u8>, VmmError>;

    /// Takes in what [`Vmm::save_devices`] gave at the source. The guest stands, its memory is complete.
    ///
    /// # Errors
    /// The guest cannot run here.
    fn load_devices(&self, state: &[u8]) -> Result<(), VmmError>;

    /// Tells the network where the guest is now. Called when it runs here, once for each round that the gateway asks for.
    fn announce(&self) {}

    /// Ends the process, soon: somebody has said `quit`.
    fn quit(&self);
}

/// What is done with a vCPU, of which the number comes first.
pub type Visit<'a> = dyn FnMut(usize, &mut VcpuFd) -> Result<(), VmmError> + 'a;
