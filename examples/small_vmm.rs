//! A VMM whose guest a gateway can move: what it takes to embed the native engine.
//!
//! ```text
//! cargo run --release --example small_vmm -- here.qmp                           a guest that counts, and prints a dot now and then
//! cargo run --release --example small_vmm -- there.qmp --incoming defer -S      a machine for it at the other site
//! ```
//!
//! A `[[vm]]` of each site's gateway names its socket, with its whole path, as `qmp`; then `longhaul migrate` moves the guest. One vCPU, 2 MiB, a port that prints; no interrupt
//! controller. The engine is the lines around `Machine` and `Monitor` in `main`, and the eight functions of `Vmm`, of which three have nothing to do here.

#![expect(unsafe_code, reason = "KVM is given the guest's memory")]

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    eprintln!("small_vmm: the native engine is there for x86-64 hosts only");
}

#[cfg(target_arch = "x86_64")]
fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_incoming = match &arguments[..] {
        [_] => false,
        // As a gateway's configuration has it, which asks for these words of every hypervisor.
        [_, incoming, defer, stands] if [incoming, defer, stands] == ["--incoming", "defer", "-S"] => true,
        _ => {
            eprintln!("usage: small_vmm SOCKET [--incoming defer -S]");
            return std::process::ExitCode::from(2);
        }
    };
    match vmm::run(&arguments[0], is_incoming) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("small_vmm: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod vmm {
    use std::error::Error;
    use std::io::Write;
    use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
    use std::time::Duration;

    use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
    use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
    use longhaul::hypervisor::kvm::{GuestRam, Machine, Monitor, MonitorConfig, Start, Visit, Vmm, VmmError};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
    use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

    const MEMORY: usize = 2 << 20;
    const SLOT: u32 = 0;
    const CODE: u64 = 0x1000;

    /// Real-mode code: counts at 0x2000, and after 32768 times it prints a dot.
    #[rustfmt::skip]
    const PAYLOAD: [u8; 21] = [
        0x66, 0xff, 0x06, 0x00, 0x20,             // again: inc dword [0x2000]
        0xf7, 0x06, 0x00, 0x20, 0xff, 0x7f,       //        test word [0x2000], 0x7fff
        0x75, 0xf3,                               //        jnz again
        0xb0, 0x2e, 0xba, 0xf8, 0x03, 0xee,       //        mov al, '.'; mov dx, 0x3f8; out dx, al
        0xeb, 0xeb,                               //        jmp again
    ];

    pub(super) fn run(socket: &str, is_incoming: bool) -> Result<(), Box<dyn Error>> {
        let kvm = Kvm::new()?;
        let vm = Arc::new(kvm.create_vm()?);
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])?;
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            memory_size: MEMORY as u64,
            userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
            ..Default::default()
        };
        // SAFETY: `memory` is kept by `ram` below, which outlives the vCPU.
        unsafe { vm.set_user_memory_region(region)? };
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        if !is_incoming {
            memory.write_slice(&PAYLOAD, GuestAddress(CODE))?;
            let mut sregs = vcpu.get_sregs()?;
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            vcpu.set_sregs(&sregs)?;
            let mut regs = vcpu.get_regs()?;
            (regs.rip, regs.rflags) = (CODE, 2);
            vcpu.set_regs(&regs)?;
        }

        let ram = GuestRam::new(memory, &[SLOT])?;
        let vmm = SmallVmm::start(vcpu)?;
        // SAFETY: slot 0 of `vm` is the one block of `ram`, as it was set above, and there is no other.
        let machine = unsafe { Machine::new(kvm, vm, ram, vmm.clone()) };
        let config = MonitorConfig {
            paths: vec![socket.into()],
            name: "small".to_owned(),
            uuid: None,
            cpu_features: machine.cpu_features()?,
            start: if is_incoming { Start::Incoming } else { Start::Running },
        };
        let _monitor = Monitor::serve(config, Arc::new(machine))?;
        vmm.wait_for_quit();
        Ok(())
    }

    struct SmallVmm {
        vcpu: Mutex<VcpuFd>,
        state: Mutex<State>,
        changed: Condvar,
        /// The thread that runs the vCPU.
        thread: OnceLock<std::thread::JoinHandle<()>>,
    }

    #[derive(Default)]
    struct State {
        runs: bool,
        /// How many look at the vCPU.
        visits: usize,
        is_inside: bool,
        is_over: bool,
        /// What the kernel calls it.
        thread: u32,
    }

    impl SmallVmm {
        fn start(vcpu: VcpuFd) -> Result<Arc<Self>, Box<dyn Error>> {
            extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
            register_signal_handler(SIGRTMIN(), ignore)?;
            let vmm = Arc::new(Self {
                vcpu: Mutex::new(vcpu),
                state: Mutex::default(),
                changed: Condvar::new(),
                thread: OnceLock::new(),
            });
            let serving = Arc::clone(&vmm);
            let thread = std::thread::Builder::new().name("vcpu0".to_owned());
            let _ = vmm.thread.set(thread.spawn(move || serving.serve())?);
            drop(vmm.wait_while(|state| state.thread == 0));
            Ok(vmm)
        }

        fn serve(&self) {
            lock(&self.state).thread = rustix::thread::gettid().as_raw_pid().unsigned_abs();
            self.changed.notify_all();
            loop {
                let mut state = self.wait_while(|state| !state.is_over && (!state.runs || state.visits > 0));
                if state.is_over {
                    return;
                }
                state.is_inside = true;
                drop(state);
                let outcome = self.step();
                let mut state = lock(&self.state);
                state.is_inside = false;
                if let Err(error) = outcome {
                    eprintln!("small_vmm: the guest has ended: {error}");
                    state.runs = false;
                }
                self.changed.notify_all();
            }
        }

        /// Into the guest and out again, with what it asked for done.
        fn step(&self) -> Result<(), Box<dyn Error>> {
            let mut vcpu = lock(&self.vcpu);
            vcpu.set_kvm_immediate_exit(0);
            loop {
                match vcpu.run() {
                    Ok(VcpuExit::IoOut(0x3f8, bytes)) => {
                        let mut out = std::io::stdout();
                        out.write_all(bytes).and_then(|()| out.flush())?;
                    }
                    Ok(VcpuExit::Intr) => return Ok(()),
                    Ok(exit) => return Err(format!("{exit:?}").into()),
                    Err(error) if error.errno() == libc::EINTR => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
                // An access to a port is complete only once KVM was entered again, which then comes out with EINTR.
                vcpu.set_kvm_immediate_exit(1);
            }
        }

        /// Returns when the vCPU is outside of the guest, and stays there.
        fn call_out(&self, change: impl FnOnce(&mut State)) {
            let mut state = lock(&self.state);
            change(&mut state);
            while state.is_inside {
                // Again and again: one that comes just before the guest is entered has no effect.
                if let Some(thread) = self.thread.get() {
                    let _ = thread.kill(SIGRTMIN());
                }
                let waited = self.changed.wait_timeout(state, Duration::from_millis(1));
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }

        fn wait_for_quit(&self) {
            drop(self.wait_while(|state| !state.is_over));
        }

        fn wait_while(&self, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
            let waited = self.changed.wait_while(lock(&self.state), |state| condition(state));
            waited.unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Vmm for SmallVmm {
        fn pause(&self) -> Result<(), VmmError> {
            self.call_out(|state| state.runs = false);
            Ok(())
        }

        fn resume(&self) -> Result<(), VmmError> {
            lock(&self.state).runs = true;
            self.changed.notify_all();
            Ok(())
        }

        fn visit_vcpus(&self, visit: &mut Visit<'_>) -> Result<(), VmmError> {
            self.call_out(|state| state.visits += 1);
            let outcome = visit(0, &mut lock(&self.vcpu));
            lock(&self.state).visits -= 1;
            self.changed.notify_all();
            outcome
        }

        /// Nothing but KVM writes to the guest's memory.
        fn take_device_writes(&self, _written: &mut dyn FnMut(u64, u64)) {}

        fn vcpu_threads(&self) -> Vec<u32> {
            vec![lock(&self.state).thread]
        }

        fn save_devices(&self) -> Result<Vec<u8>, VmmError> {
            Ok(Vec::new())
        }

        fn load_devices(&self, _state: &[u8]) -> Result<(), VmmError> {
            Ok(())
        }

        fn quit(&self) {
            self.call_out(|state| state.is_over = true);
            self.changed.notify_all();
        }
    }

    fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
