//! The VMM that runs the demo guest: memory from address 0 on in one slot, vCPUs, KVM's interrupt controllers, a serial
//! port.

#![expect(unsafe_code, reason = "KVM is given the guest's memory")]

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::heartbeat::Heartbeat;
use super::layout::{LARGEST_MEMORY, MOST_VCPUS, SMALLEST_MEMORY};
use super::machine::Machine;
use super::serial::Serial;
use super::{Counters, DemoConfig, DemoError, Dials, payload};
use crate::hypervisor::kvm;
use crate::hypervisor::kvm::memory::GuestRam;
use crate::hypervisor::kvm::vmm::{Visit, Vmm, VmmError};
use crate::proto::page::PAGE_SIZE;

/// A machine with the demo guest in it, or with none yet.
pub struct DemoVmm {
    machine: Arc<Machine>,
    heartbeat: Mutex<Option<Heartbeat>>,
    vm: Arc<VmFd>,
    ram: GuestRam,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl DemoVmm {
    /// A machine that stands.
    ///
    /// # Errors
    /// [`DemoError`].
    pub fn new(config: DemoConfig) -> Result<Arc<Self>, DemoError> {
        let DemoConfig {
            memory_bytes, vcpus, ..
        } = config;
        if !(1..=MOST_VCPUS).contains(&vcpus) {
            return Err(DemoError::Vcpus(vcpus));
        }
        if !(SMALLEST_MEMORY..=LARGEST_MEMORY).contains(&memory_bytes) || !memory_bytes.is_multiple_of(PAGE_SIZE as u64)
        {
            return Err(DemoError::MemorySize(memory_bytes));
        }
        if let Some(dials) = &config.guest {
            dials.check(memory_bytes, vcpus)?;
        }
        let kvm = Kvm::new().map_err(DemoError::NoKvm)?;
        let vm = Arc::new(kvm.create_vm().map_err(refused("a VM"))?);
        let ram = give_memory(&vm, memory_bytes)?;
        vm.set_tss_address(TSS)
            .map_err(refused("an address for its task state"))?;
        vm.create_irq_chip().map_err(refused("interrupt controllers"))?;
        if config.has_pit {
            vm.create_pit2(kvm_pit_config::default()).map_err(refused("a PIT"))?;
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("its list of CPUID"))?;
        let cpus = (0..vcpus)
            .map(|number| create_vcpu(&vm, &cpuid, number, config.guest.as_ref(), vcpus))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(dials) = &config.guest {
            let tsc_khz = cpus[0].get_tsc_khz().map_err(refused("the frequency of the TSC"))?;
            payload::load(&ram, dials, vcpus, u64::from(tsc_khz) * 1000);
        }
        let machine = Machine::new(cpus, Serial::open(&config.serial)?).map_err(refused("a signal handler"))?;
        let machine = Arc::new(machine);
        let heartbeat = match &config.heartbeat {
            Some(path) => Some(Heartbeat::serve(path, ram.clone(), Arc::downgrade(&machine))?),
            None => None,
        };
        if let Some(heartbeat) = &heartbeat {
            machine.tell(heartbeat.told());
        }
        let vmm = Arc::new(Self {
            machine,
            heartbeat: Mutex::new(heartbeat),
            vm,
            ram,
            threads: Mutex::default(),
        });
        // From here on dropping it ends the threads that there are.
        for number in 0..vcpus {
            let machine = vmm.machine.clone();
            let thread = Builder::new()
                .name(format!("vcpu{number}"))
                .spawn(move || machine.serve(number))
                .map_err(DemoError::Thread)?;
            vmm.lock_threads().push(thread);
        }
        vmm.machine.threads();
        Ok(vmm)
    }

    /// Its memory: one block, slot 0.
    pub fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    /// It, as the engine moves it.
    ///
    /// # Errors
    /// KVM cannot be opened another time.
    pub fn movable(self: &Arc<Self>) -> Result<kvm::Machine, DemoError> {
        let kvm = Kvm::new().map_err(DemoError::NoKvm)?;
        let vmm: Arc<dyn Vmm> = self.clone();
        // SAFETY: the VM has one slot, which `give_memory` made of this memory.
        Ok(unsafe { kvm::Machine::new(kvm, Arc::clone(&self.vm), self.ram(), vmm) })
    }

    /// Begins to run: the guest that was loaded, or the one that has arrived.
    ///
    /// # Errors
    /// It has failed, or was ended.
    pub fn start(&self) -> Result<(), VmmError> {
        self.machine.resume()
    }

    /// Returns after [`Vmm::quit`], when no thread is left.
    ///
    /// # Errors
    /// The guest had failed before that.
    pub fn wait(&self) -> Result<(), VmmError> {
        let outcome = self.machine.wait();
        // Whoever listens is told so before the process ends.
        drop(self.heartbeat.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.join();
        outcome
    }

    /// Calls `job` where the guest fails, from the thread of a vCPU, which is not to be waited for.
    pub fn when_failed(&self, job: impl Fn() + Send + Sync + 'static) {
        self.machine.when_failed(Box::new(job));
    }

    /// Why the guest stands for ever: a sentence that names vCPU, exit and `rip`.
    pub fn failure(&self) -> Option<VmmError> {
        self.machine.failure()
    }

    /// What the guest has counted. It may run.
    pub fn counters(&self) -> Counters {
        Counters::of(&self.ram)
    }

    fn join(&self) {
        for thread in self.lock_threads().drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }

    fn lock_threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vmm for DemoVmm {
    fn pause(&self) -> Result<(), VmmError> {
        self.machine.pause();
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        self.machine.resume()
    }

    fn visit_vcpus(&self, visit: &mut Visit<'_>) -> Result<(), VmmError> {
        self.machine.visit(visit)
    }

    fn take_device_writes(&self, _written: &mut dyn FnMut(u64, u64)) {}

    fn vcpu_threads(&self) -> Vec<u32> {
        self.machine.threads()
    }

    fn save_devices(&self) -> Result<Vec<u8>, VmmError> {
        Ok(self.machine.serial().save())
    }

    fn load_devices(&self, state: &[u8]) -> Result<(), VmmError> {
        self.machine.serial().load(state)
    }

    fn announce(&self) {
        let beats = self.counters().beats;
        tracing::info!(beats, "the demo guest runs here now");
    }

    fn quit(&self) {
        self.machine.end();
    }
}

impl Drop for DemoVmm {
    fn drop(&mut self) {
        self.machine.end();
        self.join();
    }
}

/// Memory of `bytes` bytes, zero, which the VM has from address 0 on.
fn give_memory(vm: &VmFd, bytes: u64) -> Result<GuestRam, DemoError> {
    let len = usize::try_from(bytes).map_err(|_| DemoError::MemorySize(bytes))?;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)])
        .map_err(|error| DemoError::Memory(error.to_string()))?;
    let ram = GuestRam::new(memory, &[SLOT])?;
    let region = kvm_userspace_memory_region {
        slot: SLOT,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: bytes,
        userspace_addr: ram.host_address(0),
    };
    // SAFETY: the memory is mapped for as long as `ram` is there. That is longer than a vCPU runs: dropping the VMM
    // ends their threads first.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("the guest's memory"))?;
    Ok(ram)
}

/// vCPU `number`, at the beginning of the payload if there is one.
fn create_vcpu(
    vm: &VmFd,
    cpuid: &CpuId,
    number: usize,
    guest: Option<&Dials>,
    vcpus: usize,
) -> Result<VcpuFd, DemoError> {
    let vcpu = vm.create_vcpu(number as u64).map_err(refused("a vCPU"))?;
    let mut cpuid = cpuid.clone();
    for entry in cpuid.as_mut_slice() {
        let id = number as u32;
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => entry.edx = id,
            0x8000_001e => entry.eax = id,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).map_err(refused("its own list of CPUID"))?;
    let Some(dials) = guest else {
        return Ok(vcpu);
    };
    let mut sregs = vcpu.get_sregs().map_err(refused("a look at segments"))?;
    payload::enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(refused("64-bit mode"))?;
    vcpu.set_regs(&payload::registers(dials, vcpus, number))
        .map_err(refused("registers"))?;
    // The others would wait for the first one to start them.
    let runnable = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    vcpu.set_mp_state(runnable).map_err(refused("a vCPU that runs"))?;
    Ok(vcpu)
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> DemoError {
    move |error| DemoError::Kvm { what, error }
}

const SLOT: u32 = 0;
/// Three pages that KVM needs on some Intel hosts, where no guest has memory.
const TSS: usize = 0xfffb_d000;
