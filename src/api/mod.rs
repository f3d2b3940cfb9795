//! The control API: how commands talk to the gateway of their site.
//!
//! ```text
//! longhaul migrate ── HTTP/1 over state_dir/control.sock, JSON, /v1/… ── server ── Command ──▶ gateway
//! ```
//!
//! The server turns each request into a [`Command`] with a [`Reply`] in it and knows nothing of migrations. Who may
//! open the socket (mode 0600, so root and the gateway's user) may do everything.

mod client;
mod link_test;
mod move_disk;
mod server;
pub mod types;

use tokio::sync::{mpsc, oneshot};

pub use self::client::{Client, ClientError, Following};
pub use self::link_test::{LinkTest, LinkTestRequest, RoundTrips};
pub use self::move_disk::{
    DiskOfVm, MoveDiskEvent, MoveDiskOutcome, MoveDiskPhase, MoveDiskPlan, MoveDiskProgress, MoveDiskReport,
    MoveDiskRequest,
};
pub use self::server::{BindError, ControlSocket, serve};
pub use self::types::*;
use crate::proto::page::MigrationId;

/// What the gateway is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Start a migration. Checks may come before the reply or after it, in the report.
    Start {
        /// What to move where.
        request: StartRequest,
        /// Once it is accepted.
        reply: Reply<Started>,
    },
    /// Make every check and a forecast; nothing moves.
    Check {
        /// What would be moved where.
        request: StartRequest,
        /// All checks.
        reply: Reply<DryRun>,
    },
    /// Every migration that is remembered, the newest first.
    List {
        /// All of them.
        reply: Reply<Vec<MigrationSummary>>,
    },
    /// Everything that is known of one migration.
    Status {
        /// Which one.
        migration: MigrationId,
        /// What is known.
        reply: Reply<MigrationStatus>,
    },
    /// Look on until it has ended. A migration that has ended gives its report at once. When the receiver is dropped,
    /// the watcher has gone; the migration goes on.
    Follow {
        /// Which one.
        migration: MigrationId,
        /// The events, [`Event::Report`] as the last.
        reply: Reply<mpsc::Receiver<Event>>,
    },
    /// Cancel a migration that has not been committed.
    Cancel {
        /// Which one.
        migration: MigrationId,
        /// Whether it is being cancelled.
        reply: Reply<Cancellation>,
    },
    /// Let a migration go on that waits with its disks copied.
    SwitchOver {
        /// Which one.
        migration: MigrationId,
        /// Whether it goes on.
        reply: Reply<Switchover>,
    },
    /// Change what a migration may take of its link.
    Adjust {
        /// Which one.
        migration: MigrationId,
        /// To what.
        adjustment: Adjustment,
        /// What holds from now on.
        reply: Reply<Limits>,
    },
    /// A person states where a VM is that is in doubt.
    Resolve {
        /// What is stated.
        request: ResolveRequest,
        /// Who states it: the user behind the other end of the socket, as the system knows it.
        by: String,
        /// What came of it.
        reply: Reply<Resolution>,
    },
    /// Measure the link to a peer.
    TestLink {
        /// Which one, and for how long.
        request: LinkTestRequest,
        /// What came of it. Where nobody waits for it any more, the test ends.
        reply: Reply<LinkTest>,
    },
    /// Move a disk within this site, and look on. When the receiver is dropped, the watcher has gone; the move goes on.
    MoveDisk {
        /// Which disk, and where to.
        request: MoveDiskRequest,
        /// The events, [`MoveDiskEvent::Report`] as the last.
        reply: Reply<mpsc::Receiver<MoveDiskEvent>>,
    },
    /// Make every check of such a move; nothing is made.
    CheckMoveDisk {
        /// Which disk, and where to.
        request: MoveDiskRequest,
        /// What would be done.
        reply: Reply<MoveDiskPlan>,
    },
    /// Look on at a move until it has ended.
    FollowMoveDisk {
        /// Which one.
        of: DiskOfVm,
        /// The events, [`MoveDiskEvent::Report`] as the last.
        reply: Reply<mpsc::Receiver<MoveDiskEvent>>,
    },
    /// Cancel a move.
    CancelMoveDisk {
        /// Which one.
        of: DiskOfVm,
        /// Whether it is being cancelled.
        reply: Reply<Cancellation>,
    },
    /// Every peer that is configured or paired.
    Peers {
        /// All of them.
        reply: Reply<Vec<PeerStatus>>,
    },
    /// Make a code for the other site.
    Invite {
        /// Where and how long.
        request: InviteRequest,
        /// The code.
        reply: Reply<Invitation>,
    },
    /// Use a code from the other site.
    AcceptInvite {
        /// The code.
        request: AcceptInvite,
        /// Who is trusted now.
        reply: Reply<Paired>,
    },
    /// Trust a peer whose fingerprint a person has compared.
    PairByFingerprint {
        /// Whom.
        request: PairByFingerprint,
        /// Who is trusted now.
        reply: Reply<Paired>,
    },
    /// Trust a peer no more.
    Unpair {
        /// Its name.
        peer: String,
        /// Once nothing of it is trusted.
        reply: Reply<()>,
    },
    /// Who this gateway is.
    Identity {
        /// Name and fingerprint.
        reply: Reply<Identity>,
    },
}

/// Where the answer to a [`Command`] goes. Dropping it answers that the gateway gave none.
#[derive(Debug)]
pub struct Reply<T>(oneshot::Sender<Result<T, Refusal>>);

impl<T> Reply<T> {
    /// A reply, and where its answer comes out.
    #[must_use]
    pub fn channel() -> (Self, oneshot::Receiver<Result<T, Refusal>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(sender), receiver)
    }

    /// Completes when the asker has gone.
    pub async fn abandoned(&mut self) {
        self.0.closed().await;
    }

    /// Answers. That the asker has gone meanwhile is no error: what was asked for has been done.
    pub fn send(self, answer: Result<T, Refusal>) {
        let _ = self.0.send(answer);
    }
}
