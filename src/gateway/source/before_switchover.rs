//! The hook `before_switchover`, and what keeps the hypervisor from stopping its guest before that has succeeded.
//!
//! A hypervisor stops its guest once little enough is left to send, and cannot be told to ask. So it is given the shortest limit until then; and since a
//! guest that writes nothing is within any limit at the end of its first pass, its stream is not read to where nothing may be left: less than what is
//! certain to be left stands between the last page that was read and the end. Once no more than that is left, the hook is due. A guest whose memory is no
//! more from the beginning has it before its stream begins.
//!
//! ```text
//! pages:  read and counted │ read, not counted │ in the hypervisor's socket │ … left …
//!                          └───────── margin ──────────────────────────────┘
//! ```

use tokio_util::task::AbortOnDropHandle;

use super::SourceDriver;
use crate::api;
use crate::config::Hook;
use crate::gateway::clock;
use crate::gateway::hooks::{self, Facts};
use crate::hypervisor::qemu::{MigrationProgress, MigrationStatus, RunState};
use crate::proto::ownership::{SourceEvent, SourceState};
use crate::proto::page::PAGE_SIZE;

/// The socket of a connection holds half as much again as its `wmem_default`, where Linux adds a message to one that is nearly full
/// (`unix_stream_sendmsg`); and QEMU as much as its `IO_BUF_SIZE` (32 KiB) twice.
const IN_QEMU: u64 = 64 << 10;

/// Linux's own, where the system does not say.
const WMEM_DEFAULT: u64 = 208 << 10;

/// Read at once, before it is counted ([`Backlog`](crate::proto::precopy::Backlog)), and a little more.
const READ_AT_ONCE: u64 = 320 << 10;

/// Bytes of the stream that a page takes at least: of zeroes, over multifd, where its offset is all there is.
pub(crate) const LEAST_PAGE_BYTES: u64 = 8;

/// As much is enough to go on with until the next look.
const SLACK: u64 = 16 << 20;

/// What has been read of a page that is not whole counts as pages of its own: the last of these would never be let by.
const NEVER_COUNTED: u64 = 2 * PAGE_SIZE as u64 / LEAST_PAGE_BYTES;

/// The main connection, and those that a migration with multifd is left with.
const CONNECTIONS_OF_MULTIFD: u64 = 3;

/// Where the hook is.
#[derive(Debug)]
pub(super) enum Hold {
    /// There is none, or it has succeeded.
    Open,
    /// Not due yet.
    Closed { margin: Margin },
    /// Running. `first`: the stream begins after it.
    Running {
        margin: Margin,
        hook: AbortOnDropHandle<Result<(), String>>,
        first: bool,
    },
    /// It has succeeded, and the stream begins as soon as there is contact.
    ToStart,
}

/// Bytes of the guest's memory that may have gone into the stream since they were last counted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Margin(u64);

impl Margin {
    fn of(connections: u64) -> Self {
        let stated = std::fs::read_to_string("/proc/sys/net/core/wmem_default");
        let socket = stated
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(WMEM_DEFAULT);
        let stream = connections * (socket + socket / 2 + IN_QEMU) + READ_AT_ONCE;
        Self(stream / LEAST_PAGE_BYTES * PAGE_SIZE as u64)
    }

    /// Pages that may be read on where so many bytes are left, and none where the hook is due.
    fn pages_before(self, left: u64) -> u64 {
        let pages = left.saturating_sub(self.0 + SLACK) / PAGE_SIZE as u64;
        if pages <= NEVER_COUNTED { 0 } else { pages }
    }
}

impl Hold {
    fn margin(&self) -> Option<Margin> {
        match self {
            Self::Closed { margin } | Self::Running { margin, .. } => Some(*margin),
            Self::Open | Self::ToStart => None,
        }
    }

    /// How the hook has ended; never, where none runs. Cancel-safe.
    pub(super) async fn ended(&mut self) -> Result<(), String> {
        match self {
            Self::Running { hook, .. } => hook
                .await
                .unwrap_or_else(|error| Err(format!("the hook before_switchover was not seen to its end: {error}"))),
            _ => std::future::pending().await,
        }
    }
}

impl SourceDriver {
    /// Whether the guest is kept running for the hook. Where its memory would be through before anything can keep it, the hook runs at once, and the
    /// stream has to wait.
    ///
    /// # Errors
    /// The hypervisor does not answer.
    pub(super) async fn hold(&mut self) -> Result<bool, String> {
        let Some(copying) = &mut self.copying else {
            return Ok(false);
        };
        if !matches!(self.hold, Hold::Open) || !hooks::is_configured(&self.core, Hook::BeforeSwitchover) {
            return Ok(false);
        }
        copying.set_held(true);
        let memory = copying.memory_bytes();
        let several = async { self.vmm.connected().await?.multifd_channels().await };
        let connections = match several.await.map_err(|error| error.to_string())? {
            Some(_) => CONNECTIONS_OF_MULTIFD,
            None => 1,
        };
        let margin = Margin::of(connections);
        self.hold = Hold::Closed { margin };
        let waits = margin.pages_before(memory) == 0;
        if waits {
            self.run_before_switchover(true);
        }
        Ok(waits)
    }

    /// So much of the stream, which begins now, may be read before anything is known of it.
    pub(super) fn hold_at_start(&self) {
        if let (Some(margin), Some(copying), Some(stream)) = (self.hold.margin(), &self.copying, &self.stream) {
            stream.outbound.hold_at(margin.pages_before(copying.memory_bytes()));
        }
    }

    /// Takes in a look at the hypervisor, before which so many pages had been counted.
    ///
    /// # Errors
    /// The guest does not run any more, and the hook has not succeeded: it must not be handed over.
    pub(super) async fn keep_from_stopping(
        &mut self,
        progress: &MigrationProgress,
        counted: u64,
    ) -> Result<(), String> {
        let (Some(margin), Some(stream)) = (self.hold.margin(), &self.stream) else {
            return Ok(());
        };
        let mut stopped = progress.status == MigrationStatus::Completed;
        if self.stopped_at.is_some() {
            // Perhaps by a person.
            let state = async { self.vmm.connected().await?.run_state().await };
            stopped |= matches!(state.await, Ok(RunState::FinishMigrate | RunState::PostMigrate));
        }
        if stopped {
            return Err(format!(
                "the hypervisor stopped {} before the hook before_switchover had succeeded",
                self.entry.vm
            ));
        }
        let Some(ram) = progress.ram.filter(|_| progress.status == MigrationStatus::Active) else {
            return Ok(());
        };
        let pages = margin.pages_before(ram.remaining_bytes);
        stream.outbound.hold_at(counted + pages);
        if pages == 0 && matches!(self.hold, Hold::Closed { .. }) {
            self.run_before_switchover(false);
        }
        Ok(())
    }

    fn run_before_switchover(&mut self, first: bool) {
        let margin = self.hold.margin().unwrap_or_default();
        let core = self.core.clone();
        let facts = Facts::new(
            self.entry.migration,
            &self.entry.vm,
            &self.entry.peer,
            api::Role::Source,
        );
        let hook = tokio::spawn(async move { hooks::run(&core, Hook::BeforeSwitchover, &facts).await });
        self.hold = Hold::Running {
            margin,
            hook: AbortOnDropHandle::new(hook),
            first,
        };
    }

    /// The hook has ended: the hypervisor may go on, or never will.
    pub(super) async fn on_before_switchover(&mut self, ended: Result<(), String>) {
        let Hold::Running { first, .. } = std::mem::replace(&mut self.hold, Hold::Open) else {
            return;
        };
        if let Err(reason) = ended {
            self.fail(reason);
            self.feed(&SourceEvent::Cancel);
            return;
        }
        if let Some(copying) = &mut self.copying {
            copying.set_held(false);
        }
        if let Some(stream) = &self.stream {
            stream.outbound.release();
        }
        if first {
            self.hold = Hold::ToStart;
            self.start_late().await;
        }
    }

    /// Begins the stream that has waited for the hook; later, where there is no contact.
    pub(super) async fn start_late(&mut self) {
        if !matches!(self.hold, Hold::ToStart)
            || self.lost_contact.is_some()
            || !matches!(self.machine.state(), SourceState::Copying(_))
        {
            return;
        }
        self.hold = Hold::Open;
        if let Err(error) = self.start_migrate().await {
            self.fail(error);
            self.feed(&SourceEvent::MigrateFailed);
        }
    }

    /// Gives up a migration whose deadline passes before its stream has begun. One that has is looked at with it.
    pub(super) fn waits_too_long(&mut self) -> bool {
        let late = |copying: &crate::gateway::copying::Copying| copying.is_late(clock::now());
        if self.stream.is_some() || !self.copying.as_ref().is_some_and(late) {
            return false;
        }
        let while_what = match matches!(self.hold, Hold::Open) {
            true => "the disks were copied",
            false => "the hook before_switchover ran",
        };
        self.fail(format!("the deadline has passed while {while_what}"));
        self.feed(&SourceEvent::Cancel);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_is_due_where_all_that_is_left_may_be_on_its_way() {
        let margin = Margin::of(1);
        // 90,000 pages of zeroes wait in a socket of Linux's own size, and in what is read at once.
        assert!(margin.0 > 200 << 20 && margin.0 < 1 << 30, "{margin:?}");
        assert!(Margin::of(3).0 > margin.0);
        assert_eq!(margin.pages_before(margin.0 + SLACK), 0);
        assert_eq!(margin.pages_before(0), 0);
        let beyond = |pages| margin.pages_before(margin.0 + SLACK + pages * PAGE_SIZE as u64);
        assert_eq!(beyond(NEVER_COUNTED), 0);
        assert_eq!(beyond(NEVER_COUNTED + 1), NEVER_COUNTED + 1);
        // They are within the slack, so that the guest is not nearer to its stop than without them.
        const { assert!(NEVER_COUNTED * PAGE_SIZE as u64 <= SLACK / 2) };
    }
}
