//! longhaul: a long-distance WAN migration gateway. Moves running virtual machines between continents.
//!
//! ```text
//! vmm socket → vmm_stream (bytes → records) → reduce (→ payloads) → wire (→ frames) → session → shaper → transport (QUIC)
//! QUIC → transport → session (order) → wire → reduce (→ bytes) → vmm socket
//!
//!                site A                                                      site B
//! vmm ── unix ── gateway ══════════ control: channels of messages ══════════ gateway ── unix ── vmm
//!  ▲ QMP            │  ═══════════ bulk: lanes, one frame each ═══════════     │             QMP ▲
//!  └── hypervisor ──┤                                                          ├── hypervisor ───┘
//!                journal                                                    journal
//! ```
//!
//! The hypervisor at site A migrates into its local gateway as if that were the destination; the gateway at site B plays the
//! source for the hypervisor there. In between every byte passes exactly, by fewer bytes, and the two journals say who owns
//! the VM.
//!
//! # Map
//!
//! | module | is | |
//! |---|---|---|
//! | [`proto`] | pure | everything hard: parsing, reduction, order and resume, ownership, convergence, rate control, disks |
//! | [`gateway`] | edge | the daemon: accepts, drives sessions, back-pressure, tunnels, pairing, recovery, hooks |
//! | [`migrate`] | edge | one migration seen from its source: phases in a straight line, one exit that says where the VM is |
//! | [`transport`] | edge | quinn and rustls: endpoints, paced socket, pinned keys, tuning from rate and RTT |
//! | [`shaper`] | edge | whose turn it is on a link, and what passes: limits of links and of migrations |
//! | [`hypervisor`] | edge | QMP and QEMU: inventory, settings, launch, freeze, permit; NBD: its disks; the native engine for guests of KVM |
//! | [`store`] | edge | ownership journal, trust, spilled dictionary pages, what VMs leave for their next move, on disk |
//! | [`config`] | edge | TOML, flags and environment, validated once |
//! | [`api`] | edge | the control socket: types, server, client |
//! | [`cli`] | edge | one file per verb |
//! | [`metrics`] | edge | every series, once |
//! | [`wan`] | tool | the emulated link between two sites, and what looks at it |
//! | [`lab`] | tool | real guests on that link: engines that move them, plans, measures, reports, the demo, the faults |
//!
//! # What a reader may rely on
//!
//! Checked by `tests/purity.rs`, but for the last two:
//!
//! - `proto` takes bytes, events and `now`, and gives back bytes, events and the next deadline. It names no runtime, socket, file,
//!   thread, clock or random source, and no module outside of itself.
//! - Inside `proto` a stage imports only the noun of the stage before it. Only `session` sees several; `wire` also carries the
//!   messages of `ownership`.
//! - `transport` does not know what a page is, `shaper` does not know what a migration is.
//! - `unsafe` is only in `wan/tun.rs`, `wan/schedule.rs` and `hypervisor/kvm/`.
//! - Every queue has a bound in bytes or entries where it is made, and no length that a peer, a hypervisor or a file states is
//!   allocated before it was compared with a limit.
//! - A record is in the journal before anything is done because of it. Drivers (`gateway::source`, `gateway::destination`) route
//!   events; what may be done is decided in `proto::ownership` alone.

pub mod api;
pub mod cli;
pub mod config;
pub mod gateway;
pub mod hypervisor;
pub mod lab;
pub mod metrics;
pub mod migrate;
pub mod proto;
pub mod shaper;
pub mod store;
pub mod transport;
pub mod wan;
