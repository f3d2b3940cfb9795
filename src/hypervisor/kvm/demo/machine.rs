//! The vCPUs of a VM, each on a thread, which run together, stand together, and can be shown one by one.

#![expect(
    unsafe_code,
    reason = "a vCPU is called out of the guest by a byte that it shares with KVM, and by a signal to its thread"
)]

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::heartbeat::Told;
use super::layout::SIGN_PORT;
use super::serial::Serial;
use crate::hypervisor::kvm::vmm::{Visit, VmmError};

/// Shared by the threads of the vCPUs and whoever controls them.
pub(super) struct Machine {
    seats: Vec<Seat>,
    state: Mutex<State>,
    changed: Condvar,
    /// Whoever stops, starts or visits vCPUs, one at a time.
    control: Mutex<()>,
    serial: Mutex<Serial>,
    /// Who is told of signs of life, once somebody is.
    told: OnceLock<Arc<Told>>,
    when_failed: OnceLock<Job>,
}

type Job = Box<dyn Fn() + Send + Sync>;

/// A vCPU.
struct Seat {
    vcpu: Mutex<VcpuFd>,
    /// `immediate_exit` of the page that it shares with KVM.
    immediate_exit: AtomicPtr<u8>,
    /// Its thread is to leave the guest. Set before `immediate_exit`, which the thread clears before it looks here: no
    /// call is missed.
    is_called: AtomicBool,
}

struct State {
    runs: bool,
    /// How many hold the vCPUs, whether the guest runs or not.
    holders: u32,
    is_over: bool,
    /// Why the guest cannot go on, ever.
    failure: Option<VmmError>,
    /// The vCPU that stands although the guest runs.
    visited: Option<usize>,
    /// Which have entered the guest.
    inside: Vec<bool>,
    /// Their threads; 0: not yet there.
    threads: Vec<u32>,
}

impl Seat {
    /// In one order with `is_called`, so that a thread which clears this sees a call that was made before.
    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: the page is mapped for as long as the seat has its VcpuFd. KVM reads the byte when it enters the
        // guest, and this process touches it only here.
        unsafe { AtomicU8::from_ptr(self.immediate_exit.load(Ordering::Relaxed)) }.store(value, Ordering::SeqCst);
    }
}

impl Machine {
    /// Of these vCPUs, which stand, and have no threads yet.
    pub(super) fn new(vcpus: Vec<VcpuFd>, serial: Serial) -> Result<Self, kvm_ioctls::Error> {
        register_signal_handler(SIGRTMIN(), ignore)?;
        let count = vcpus.len();
        let seats = vcpus.into_iter().map(|mut vcpu| Seat {
            immediate_exit: AtomicPtr::new(&raw mut vcpu.get_kvm_run().immediate_exit),
            vcpu: Mutex::new(vcpu),
            is_called: AtomicBool::new(false),
        });
        Ok(Self {
            seats: seats.collect(),
            state: Mutex::new(State {
                runs: false,
                holders: 0,
                is_over: false,
                failure: None,
                visited: None,
                inside: vec![false; count],
                threads: vec![0; count],
            }),
            changed: Condvar::new(),
            control: Mutex::new(()),
            serial: Mutex::new(serial),
            told: OnceLock::new(),
            when_failed: OnceLock::new(),
        })
    }

    /// What the thread of vCPU `number` does, until all is over.
    pub(super) fn serve(&self, number: usize) {
        let thread = rustix::thread::gettid().as_raw_pid().unsigned_abs();
        lock(&self.state).threads[number] = thread;
        self.changed.notify_all();
        while self.enter(number) {
            let outcome = self.run(number);
            self.leave(number, outcome);
        }
    }

    /// The threads of the vCPUs; waits until all are there.
    pub(super) fn threads(&self) -> Vec<u32> {
        let state = lock(&self.state);
        self.wait_while(state, |state| state.threads.contains(&0))
            .threads
            .clone()
    }

    /// Returns when all vCPUs stand.
    pub(super) fn pause(&self) {
        let _control = lock(&self.control);
        let mut state = lock(&self.state);
        state.runs = false;
        (0..self.seats.len()).for_each(|number| self.call(&state, number));
        drop(self.wait_while(state, |state| state.inside.contains(&true)));
    }

    pub(super) fn resume(&self) -> Result<(), VmmError> {
        let _control = lock(&self.control);
        let mut state = lock(&self.state);
        if let Some(failure) = &state.failure {
            return Err(failure.clone());
        }
        if state.is_over {
            return Err(VmmError("The guest has been ended.".into()));
        }
        state.runs = true;
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn visit(&self, visit: &mut Visit<'_>) -> Result<(), VmmError> {
        let _control = lock(&self.control);
        for (number, seat) in self.seats.iter().enumerate() {
            let mut state = lock(&self.state);
            state.visited = Some(number);
            self.call(&state, number);
            drop(self.wait_while(state, |state| state.inside[number]));
            // Also where `visit` panics: the vCPU goes on.
            let _go_on = GoOn(self);
            visit(number, &mut lock(&seat.vcpu))?;
        }
        Ok(())
    }

    /// Holds all vCPUs outside of the guest, whatever becomes of it meanwhile.
    pub(super) fn hold(&self) -> Held<'_> {
        let mut state = lock(&self.state);
        state.holders += 1;
        let held = Held(self);
        (0..self.seats.len()).for_each(|number| self.call(&state, number));
        drop(self.wait_while(state, |state| state.inside.contains(&true)));
        held
    }

    /// Tells of signs of life from now on.
    pub(super) fn tell(&self, told: Arc<Told>) {
        // Once only: a machine has one heartbeat.
        let _ = self.told.set(told);
    }

    /// Calls `job` once the guest has failed.
    pub(super) fn when_failed(&self, job: Job) {
        // Once only: it has one owner.
        let _ = self.when_failed.set(job);
    }

    /// Everything stops, for ever.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        state.is_over = true;
        (0..self.seats.len()).for_each(|number| self.call(&state, number));
        self.changed.notify_all();
    }

    /// Returns after [`Machine::end`]; why the guest failed, if it did.
    pub(super) fn wait(&self) -> Result<(), VmmError> {
        let state = lock(&self.state);
        let state = self.wait_while(state, |state| !state.is_over);
        state.failure.clone().map_or(Ok(()), Err)
    }

    /// Why the guest cannot go on.
    pub(super) fn failure(&self) -> Option<VmmError> {
        lock(&self.state).failure.clone()
    }

    pub(super) fn serial(&self) -> MutexGuard<'_, Serial> {
        lock(&self.serial)
    }

    /// Calls vCPU `number` out of the guest, and does not wait.
    fn call(&self, state: &State, number: usize) {
        // One that is outside looks at the state before it enters.
        if !state.inside[number] {
            return;
        }
        let seat = &self.seats[number];
        seat.is_called.store(true, Ordering::SeqCst);
        seat.set_immediate_exit(1);
        let thread = libc::c_long::from(state.threads[number]);
        // SAFETY: a signal with a handler, to a thread of this process that exists: it has to take the lock of the
        // state to leave.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
    }

    /// Waits until vCPU `number` is to run. False: it is over.
    fn enter(&self, number: usize) -> bool {
        let state = lock(&self.state);
        let mut state = self.wait_while(state, |state| {
            !state.is_over && (!state.runs || state.holders > 0 || state.visited == Some(number))
        });
        if state.is_over {
            return false;
        }
        self.seats[number].is_called.store(false, Ordering::SeqCst);
        state.inside[number] = true;
        true
    }

    fn leave(&self, number: usize, outcome: Result<(), VmmError>) {
        // Before it stands, so that nobody takes it for a guest that was stopped.
        if let (Err(_), Some(job)) = (&outcome, self.when_failed.get()) {
            job();
        }
        let mut state = lock(&self.state);
        state.inside[number] = false;
        if let Err(failure) = outcome {
            tracing::error!("{failure}");
            state.failure.get_or_insert(failure);
            state.runs = false;
            (0..self.seats.len()).for_each(|number| self.call(&state, number));
        }
        self.changed.notify_all();
    }

    /// Runs vCPU `number` until it is called.
    fn run(&self, number: usize) -> Result<(), VmmError> {
        let seat = &self.seats[number];
        let mut vcpu = lock(&seat.vcpu);
        loop {
            seat.set_immediate_exit(0);
            if seat.is_called.load(Ordering::SeqCst) {
                break;
            }
            self.step(number, &mut vcpu)?;
        }
        // An access to a port that the guest has made is complete only after KVM was entered again; without that its
        // registers are from before it.
        seat.set_immediate_exit(1);
        while !self.step(number, &mut vcpu)? {}
        seat.set_immediate_exit(0);
        Ok(())
    }

    /// Once into the guest and out again. True: it came out because it was called.
    fn step(&self, number: usize, vcpu: &mut VcpuFd) -> Result<bool, VmmError> {
        let exit = match vcpu.run() {
            Ok(VcpuExit::IoOut(SIGN_PORT, _)) => {
                if let Some(told) = self.told.get() {
                    told.sign();
                }
                return Ok(false);
            }
            Ok(VcpuExit::IoOut(port, bytes)) => {
                self.serial().write(port, bytes);
                return Ok(false);
            }
            Ok(VcpuExit::IoIn(port, into)) => {
                Serial::read(port, into);
                return Ok(false);
            }
            Ok(VcpuExit::Intr) => return Ok(true),
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => return Ok(false),
            Err(error) if error.errno() == libc::EINTR => return Ok(true),
            Err(error) if error.errno() == libc::EAGAIN => return Ok(false),
            Ok(VcpuExit::Shutdown) => "a triple fault".to_owned(),
            Ok(VcpuExit::InternalError) => "an internal error of KVM".to_owned(),
            Ok(VcpuExit::FailEntry(reason, _)) => format!("an entry that the processor refuses ({reason:#x})"),
            Ok(VcpuExit::MmioRead(address, _)) => format!("a read from {address:#x}, where there is nothing"),
            Ok(VcpuExit::MmioWrite(address, _)) => format!("a write to {address:#x}, where there is nothing"),
            Ok(other) => format!("an exit that nobody handles ({other:?})"),
            Err(error) => format!("an error of KVM_RUN ({error})"),
        };
        let place = match vcpu.get_regs() {
            Ok(registers) => format!("rip {:#x}", registers.rip),
            Err(error) => format!("an unknown rip ({error})"),
        };
        Err(VmmError(format!(
            "vCPU {number} of the guest ended at {place} by {exit}."
        )))
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        mut condition: impl FnMut(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_while(state, |state| condition(state));
        waited.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a visit.
struct GoOn<'a>(&'a Machine);

impl Drop for GoOn<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).visited = None;
        self.0.changed.notify_all();
    }
}

/// All vCPUs, held. Dropping it lets them go on.
pub(super) struct Held<'a>(&'a Machine);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).holders -= 1;
        self.0.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signal has done its work when it arrives.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}
