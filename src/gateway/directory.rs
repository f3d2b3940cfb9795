//! Who serves a migration, or a stream of a tunnel, by its id and the peer that it belongs to: a peer reaches its own migrations and no others.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::proto::page::MigrationId;

/// Values by migration.
#[derive(Debug)]
pub(crate) struct Directory<T>(Mutex<HashMap<MigrationId, (String, T)>>);

impl<T> Default for Directory<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Directory<T> {
    /// Names who serves the migration from now on.
    pub(crate) fn insert(&self, migration: MigrationId, peer: &str, value: T) {
        self.entries().insert(migration, (peer.to_owned(), value));
    }

    /// The same, where nobody serves it yet; whether that was so.
    pub(crate) fn claim(&self, migration: MigrationId, peer: &str, value: T) -> bool {
        match self.entries().entry(migration) {
            Entry::Occupied(_) => false,
            Entry::Vacant(vacant) => {
                vacant.insert((peer.to_owned(), value));
                true
            }
        }
    }

    /// Who serves it, where it is a migration of this peer.
    pub(crate) fn get(&self, migration: MigrationId, peer: &str) -> Option<T> {
        let entries = self.entries();
        let (owner, value) = entries.get(&migration)?;
        (owner == peer).then(|| value.clone())
    }

    /// How many migrations of this peer are served.
    pub(crate) fn count_of(&self, peer: &str) -> usize {
        self.entries().values().filter(|(owner, _)| owner == peer).count()
    }

    /// Nobody serves it any more.
    pub(crate) fn remove(&self, migration: MigrationId) {
        self.entries().remove(&migration);
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<MigrationId, (String, T)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
