//! The ownership journal from async code: one thread appends, everybody else waits for it.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::metrics::Metrics;
use crate::proto::ownership::JournalRecord;
use crate::proto::page::{JournalId, MigrationId};
use crate::store::journal::{Journal, JournalError};

/// A handle to the journal's thread.
#[derive(Clone, Debug)]
pub(crate) struct JournalHandle {
    id: JournalId,
    work: mpsc::Sender<Work>,
}

enum Work {
    Append(Box<JournalRecord>, oneshot::Sender<Result<(), Arc<JournalError>>>),
    Reserve(oneshot::Sender<Result<(), Arc<JournalError>>>),
    Records(MigrationId, oneshot::Sender<Vec<JournalRecord>>),
}

impl JournalHandle {
    /// Hands the journal to a thread of its own; it is closed when the last handle is dropped.
    pub(crate) fn spawn(mut journal: Journal, metrics: Arc<Metrics>) -> Self {
        let id = journal.id();
        let (work, mut queue) = mpsc::channel(64);
        tokio::task::spawn_blocking(move || {
            while let Some(work) = queue.blocking_recv() {
                match work {
                    Work::Append(record, reply) => {
                        let appended = journal.append(*record);
                        if let Err(error) = &appended {
                            tracing::error!("{error}");
                            metrics.count_journal_error();
                        }
                        let _ = reply.send(appended.map_err(Arc::new));
                    }
                    Work::Reserve(reply) => {
                        let _ = reply.send(journal.reserve().map_err(Arc::new));
                    }
                    Work::Records(migration, reply) => {
                        let _ = reply.send(journal.records_of(migration).cloned().collect());
                    }
                }
            }
        });
        Self { id, work }
    }

    /// The journal's name.
    pub(crate) fn id(&self) -> JournalId {
        self.id
    }

    /// Appends a record; it is durable when this returns.
    ///
    /// # Errors
    /// It may or may not be durable, and nobody can say.
    pub(crate) async fn append(&self, record: JournalRecord) -> Result<(), Arc<JournalError>> {
        let (reply, answer) = oneshot::channel();
        self.work
            .send(Work::Append(Box::new(record), reply))
            .await
            .expect("the journal's thread lives as long as a handle");
        answer.await.expect("the journal's thread answers")
    }

    /// Makes sure that there is room for the records of another migration.
    ///
    /// # Errors
    /// The disk is full, or the journal in doubt: nothing may begin.
    pub(crate) async fn reserve(&self) -> Result<(), Arc<JournalError>> {
        let (reply, answer) = oneshot::channel();
        self.work
            .send(Work::Reserve(reply))
            .await
            .expect("the journal's thread lives as long as a handle");
        answer.await.expect("the journal's thread answers")
    }

    /// Every record of a migration, oldest first.
    pub(crate) async fn records_of(&self, migration: MigrationId) -> Vec<JournalRecord> {
        let (reply, answer) = oneshot::channel();
        self.work
            .send(Work::Records(migration, reply))
            .await
            .expect("the journal's thread lives as long as a handle");
        answer.await.expect("the journal's thread answers")
    }
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Append(..) => "Append",
            Self::Reserve(..) => "Reserve",
            Self::Records(..) => "Records",
        })
    }
}
