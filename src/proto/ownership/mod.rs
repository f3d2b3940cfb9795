//! Who may run the VM: two machines, one at each gateway, that agree on one owner whatever is lost, repeated or restarted.
//!
//! ```text
//!      source                                     destination
//!   Started ─ migrate, pre-copy                 Prepared ─ vmm loads, its tail held back
//!      │  EOF + completed + postmigrate            │
//!      │  vmm frozen                               │
//!   PERMIT ──── right behind the last byte ─────►  digest and length equal: tail released, loaded, barriers
//!      │                                        COMMIT, then cont             or   vmm dead, then ABORT
//!      │                                           │        └ cont refused,             │
//!      │                                           │          vmm dead: REVERT          │
//!      │ ◄──────────────────────────────────────  RUNNING       │                       │
//!   quit the vmm                                                ▼                       ▼
//!   thaw, resume  ◄─────────────────────────────────────────────┴───────────────────────┘
//! ```
//!
//! A machine takes events and gives back [`Effect`]s, which the edge performs in order; it reads no clock and touches nothing.
//! The drivers of a migration and the recovery after a restart feed the same machines: recovery only rebuilds the state from
//! the journal ([`Source::recover`], [`Destination::recover`]).
//!
//! A message may come for a migration that no machine is in memory for: the machine is recovered from its records then, also
//! where nothing was open, and without records it is a new one ([`Source::new`], [`Destination::new`]), which knows what to
//! answer. When the gateway starts, only the migrations that are open ([`Standing`]) must be recovered.
//!
//! What is promised (and explored exhaustively in `tests/ownership.rs`): at every instant at most one side runs the VM; a guest
//! that ran at the destination never runs again from its old state at the source, unless a person says so; the source's copy is
//! ended only when the destination owns the VM; and when faults stop, exactly one side runs it or a person was asked for a
//! reason of [`Doubt`]. What is *not* here: timers (the edge reports `TimedOut` and `Contact`), the stream, the hypervisor.

mod destination;
mod effect;
mod message;
mod record;
mod source;

pub use destination::{Destination, DestinationEvent, DestinationState, DestinationTerms, Fate};
pub use effect::{Effect, IllegalStep, ImpossibleRecords, VmmFact};
pub use message::{AbortReason, Claim, Doubt, Message, Permit, Resolution, StreamSum, Verdict};
pub use record::{JournalRecord, Outcome, RecordKind, Role, Standing};
pub use source::{Bytes, Evidence, Source, SourceEvent, SourceState, SourceTerms};
