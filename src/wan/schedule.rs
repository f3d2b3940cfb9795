//! When the kernel runs a thread: before all others, or when nobody else wants to.

#![expect(unsafe_code, reason = "sched_setscheduler has no safe wrapper")]

use std::io;

/// Runs this thread before all ordinary ones (SCHED_FIFO); threads and processes that it starts do not inherit that.
pub(super) fn in_real_time(priority: i32) -> io::Result<()> {
    set(libc::SCHED_FIFO, priority)
}

/// Runs this thread only while its processor has nothing else to do (SCHED_IDLE).
pub(super) fn when_idle() -> io::Result<()> {
    set(libc::SCHED_IDLE, 0)
}

fn set(class: libc::c_int, priority: i32) -> io::Result<()> {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the parameters are read during the call only, and thread 0 is the calling one.
    match unsafe { libc::sched_setscheduler(0, class | libc::SCHED_RESET_ON_FORK, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
