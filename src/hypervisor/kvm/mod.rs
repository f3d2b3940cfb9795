//! The native engine: pre-copy of guests of KVM, for VMMs that embed it.
//!
//! A VMM gives the [`Machine`] what makes its guest (the VM's file, its memory, and [`Vmm`], by which vCPUs are stopped and shown) and serves a [`Monitor`].
//! From then on a gateway moves the guest as it moves one of QEMU: the monitor answers the same commands, and the guest goes by the same stream. So there is
//! one core and two edges: ownership, resume, reduction, shaping, forecast and report are the gateway's and know no difference. What differs is who decides
//! what is sent: here that is [`proto::precopy`](crate::proto::precopy)'s heat, page by page: after the first passes hot pages wait for the end.
//!
//! ```text
//!              VMM                      engine                                             gateway
//! Vmm ◀── pause, resume, vCPUs ── monitor/ ◀──────────── QMP, a unix socket ──────────────── site agent
//!                                    │ Mover
//! GuestRam ── dirty log, pages ── sending ──▶ stream/ ──── the guest, a unix socket ───────▶ vmm_stream
//!          ◀── pages ──────────── receiving ◀ stream/ ◀──────────────────────────────────── restored
//! KVM ◀── registers, chips, clock ── state/
//! ```
//!
//! | file | is |
//! |---|---|
//! | `vmm.rs` | what the engine asks of the VMM |
//! | `machine.rs` | a guest that can be moved |
//! | `memory.rs`, `page_map.rs` | its memory, and sets of its pages |
//! | `dirty.rs` | KVM's log of what it writes |
//! | `sending.rs`, `receiving.rs` | the two ends of a migration |
//! | `stream/` | its bytes |
//! | `state/` | what KVM knows of it beside its memory |
//! | `monitor/` | the commands of a gateway, and what becomes of the guest by them |
//! | `migration.rs`, `mover.rs` | what monitor and engine share |
//! | `clock.rs` | its looks at the clock |
//! | `demo/` | a guest for tests, the lab and first steps, and the VMM around it |
//!
//! # Bits
//!
//! A page that the guest has written is never missed: see `dirty.rs`. A migration that fails leaves nothing behind but the guest, and the next one begins
//! with every page (of which the gateways send what the destination does not know yet).
//!
//! # Not here
//!
//! Post-copy; vCPUs that are throttled; devices in the kernel (vhost, VFIO), which write without KVM's log.

mod clock;
pub mod demo;
mod dirty;
mod machine;
mod memory;
mod migration;
mod monitor;
mod mover;
mod page_map;
mod receiving;
mod sending;
mod state;
mod stream;
mod vmm;

/// Their types are in the interface.
pub use {kvm_ioctls, vm_memory};

pub use machine::Machine;
pub use memory::{Block, GuestRam, RamError};
pub use migration::{Guidance, Progress};
pub use monitor::listener::ListenError;
pub use monitor::{CpuFeature, CpuRegister, Monitor, MonitorConfig, MonitorError, RunState, Start};
pub use mover::{MoveError, Mover};
pub use vmm::{Visit, Vmm, VmmError};
