//! The edge towards the hypervisor.
//!
//! ```text
//! process.rs       a process that is never mistaken for another one
//! file_lock.rs     locks of files, as QEMU takes them
//! image_lock.rs    who holds the lock of an image that a QEMU was refused
//! qemu_img.rs      the tool that makes and copies images
//! qmp/             one monitor connection: greeting, commands with deadlines, events in order
//! image_server.rs  the program that serves an image which no hypervisor has open
//! nbd.rs           one export of a disk: reads, writes, which bytes are allocated and which are dirty
//! qemu/            one virtual machine: what it is, how its settings are changed and put back, and the steps of a migration
//! kvm/             the native engine, for VMMs that embed it: the other end of qmp/ and of the vmm stream
//! ```
//!
//! Nothing here knows of peers, frames or the journal. Callers pass paths, durations and rates, and get typed answers
//! whose documentation says in which state the guest is left.

pub(crate) mod file_lock;
pub(crate) mod image_lock;
pub(crate) mod image_server;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod nbd;
pub mod process;
pub mod qemu;
pub(crate) mod qemu_img;
pub mod qmp;
