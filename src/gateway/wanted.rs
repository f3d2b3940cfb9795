//! What was asked for and is not over: by this a migration that the restart of a gateway has undone is begun again.
//!
//! A file for each migration that goes from here, from the request to the end. It says what is wanted, never where the VM is: that is
//! the journal's. One that is lost costs a `longhaul migrate`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::api::{Adjustment, NewRate, StartRequest};
use crate::proto::page::{JournalId, MigrationId};
use crate::store::file::{remove_file, replace_file};

const EXTENSION: &str = "wanted";

/// Far above what a request takes.
const MOST_BYTES: u64 = 64 << 10;

/// One migration that is wanted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Wanted {
    pub(crate) request: StartRequest,
    /// When this one began: what has passed is gone from its deadline.
    began_unix_ms: u64,
    /// How often it has been begun again.
    pub(crate) restarts: u32,
    /// Those that it was begun in the place of, the first one first.
    #[serde(default)]
    pub(crate) earlier: Vec<MigrationId>,
    /// The journal that knows what has become of it. Another one would say that it has never begun.
    pub(crate) journal: JournalId,
}

impl Wanted {
    /// As it was asked for just now.
    pub(crate) fn new(request: StartRequest, journal: JournalId, now_unix_ms: u64) -> Self {
        Self {
            request,
            began_unix_ms: now_unix_ms,
            restarts: 0,
            earlier: vec![],
            journal,
        }
    }

    /// What is wanted once this one, `migration`, has been undone, at most the `most`th time.
    ///
    /// # Errors
    /// Why it is not begun again, in words that follow what undid it.
    pub(crate) fn again(mut self, migration: MigrationId, most: u32, now_unix_ms: u64) -> Result<Self, String> {
        // One that waits may do so for weeks.
        let waits = self.request.warm.is_some();
        if !waits && self.restarts >= most {
            return Err(format!("it is not begun again (migration.restarts = {most})"));
        }
        // What waits has all of its time from when it goes on.
        if !waits && let Some(deadline) = &mut self.request.deadline_seconds {
            *deadline -= now_unix_ms.saturating_sub(self.began_unix_ms) as f64 / 1e3;
            if *deadline <= 0.0 {
                return Err("its deadline has passed".to_owned());
            }
        }
        self.began_unix_ms = now_unix_ms;
        self.restarts += u32::from(!waits);
        self.earlier.push(migration);
        Ok(self)
    }
}

/// Every migration that is wanted from here, in memory and as files in the state directory.
#[derive(Debug)]
pub(crate) struct WantedFiles {
    state_dir: PathBuf,
    wanted: Mutex<HashMap<MigrationId, Wanted>>,
    /// Held by whoever brings a file to what is wanted: the last one writes the last word.
    writing: tokio::sync::Mutex<()>,
}

impl WantedFiles {
    /// What an earlier process left.
    pub(crate) fn load(state_dir: &Path) -> Self {
        let mut wanted = HashMap::new();
        for entry in std::fs::read_dir(state_dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let Some(migration) = migration_of(&path) else {
                if is_half_written(&path) {
                    let _ = std::fs::remove_file(path);
                }
                continue;
            };
            match read(&path) {
                Ok(found) => drop(wanted.insert(migration, found)),
                Err(error) => {
                    tracing::warn!(%migration, "what was asked for cannot be read, and is not begun again: {error}");
                    let _ = std::fs::remove_file(path);
                }
            }
        }
        Self {
            state_dir: state_dir.to_owned(),
            wanted: Mutex::new(wanted),
            writing: tokio::sync::Mutex::default(),
        }
    }

    /// What is wanted of a migration, until it is over or cancelled.
    pub(crate) fn get(&self, migration: MigrationId) -> Option<Wanted> {
        self.lock().get(&migration).cloned()
    }

    /// All of it.
    pub(crate) fn all(&self) -> Vec<(MigrationId, Wanted)> {
        self.lock().iter().map(|(id, wanted)| (*id, wanted.clone())).collect()
    }

    /// A migration is wanted from now on, also by the next process.
    pub(crate) async fn put(&self, migration: MigrationId, wanted: Wanted) {
        self.lock().insert(migration, wanted);
        self.write(migration).await;
    }

    /// Another takes its place. Whether it was still wanted.
    pub(crate) async fn replace(&self, migration: MigrationId, next: MigrationId, wanted: Wanted) -> bool {
        {
            let mut all = self.lock();
            if all.remove(&migration).is_none() {
                return false;
            }
            all.insert(next, wanted);
        }
        // One of them is there at any time.
        self.write(next).await;
        self.write(migration).await;
        true
    }

    /// It is over.
    pub(crate) async fn forget(&self, migration: MigrationId) {
        if self.lock().remove(&migration).is_some() {
            self.write(migration).await;
        }
    }

    /// It is not wanted any more, nor what may have taken its place this moment.
    pub(crate) async fn cancel(&self, migration: MigrationId) {
        let given_up: Vec<MigrationId> = {
            let mut all = self.lock();
            let is_meant = |id: MigrationId, wanted: &Wanted| id == migration || wanted.earlier.contains(&migration);
            all.extract_if(|id, wanted| is_meant(*id, wanted))
                .map(|(id, _)| id)
                .collect()
        };
        for id in given_up {
            self.write(id).await;
        }
    }

    /// What it may take of its link was changed. No limit becomes the configured one.
    pub(crate) async fn adjust(&self, migration: MigrationId, adjustment: &Adjustment) {
        match self.lock().get_mut(&migration) {
            None => return,
            Some(Wanted { request, .. }) => {
                request.weight = adjustment.weight.or(request.weight);
                match adjustment.rate {
                    Some(NewRate::BytesPerSecond(rate)) => request.rate_bytes_per_second = Some(rate),
                    Some(NewRate::Unlimited) => request.rate_bytes_per_second = None,
                    None => {}
                }
            }
        }
        self.write(migration).await;
    }

    /// It was told to go on, at this time: also its successor does not wait.
    pub(crate) async fn waits_no_more(&self, migration: MigrationId, now_unix_ms: u64) {
        let ids: Vec<MigrationId> = {
            let mut all = self.lock();
            // It may be begun again this very moment.
            let of_it =
                |(id, wanted): &(&MigrationId, &mut Wanted)| **id == migration || wanted.earlier.contains(&migration);
            let told = all.iter_mut().filter(of_it).map(|(id, wanted)| {
                wanted.request.warm = None;
                wanted.began_unix_ms = now_unix_ms;
                *id
            });
            told.collect()
        };
        for id in ids {
            self.write(id).await;
        }
    }

    async fn write(&self, migration: MigrationId) {
        let path = self.state_dir.join(format!("{migration}.{EXTENSION}"));
        let _turn = self.writing.lock().await;
        let wanted = self.get(migration);
        let written = tokio::task::spawn_blocking(move || match wanted {
            Some(wanted) => replace_file(&path, &serde_json::to_vec(&wanted).expect("a request is plain data")),
            None => remove_file(&path),
        });
        if let Err(error) = written.await.expect("writing a file does not panic") {
            tracing::warn!(%migration, "whether it is begun again after a restart of this gateway could not be noted: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MigrationId, Wanted>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn migration_of(path: &Path) -> Option<MigrationId> {
    path.file_name()?
        .to_str()?
        .strip_suffix(EXTENSION)?
        .strip_suffix('.')?
        .parse()
        .ok()
}

fn is_half_written(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "new") && migration_of(&path.with_extension("")).is_some()
}

fn read(path: &Path) -> std::io::Result<Wanted> {
    if std::fs::metadata(path)?.len() > MOST_BYTES {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIGRATION: MigrationId = MigrationId([7; 16]);
    const NEXT: MigrationId = MigrationId([8; 16]);
    const JOURNAL: JournalId = JournalId([9; 16]);

    fn request() -> StartRequest {
        StartRequest {
            vm: "db-1".to_owned(),
            peer: "tokyo".to_owned(),
            downtime_limit_seconds: Some(0.3),
            rate_bytes_per_second: None,
            deadline_seconds: Some(60.0),
            weight: None,
            warm: None,
            cold: false,
            disk_rate_bytes_per_second: None,
            disk_places: Vec::new(),
        }
    }

    #[tokio::test]
    async fn what_is_wanted_outlives_the_process_until_it_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let files = WantedFiles::load(directory.path());
        files.put(MIGRATION, Wanted::new(request(), JOURNAL, 1_000)).await;
        let limit = Adjustment {
            rate: Some(NewRate::BytesPerSecond(5)),
            weight: None,
        };
        files.adjust(MIGRATION, &limit).await;
        let next = WantedFiles::load(directory.path());
        let expected = StartRequest {
            rate_bytes_per_second: Some(5),
            ..request()
        };
        assert_eq!(next.get(MIGRATION).unwrap().request, expected);
        next.forget(MIGRATION).await;
        next.adjust(MIGRATION, &limit).await;
        assert_eq!(WantedFiles::load(directory.path()).all(), []);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_cancellation_reaches_what_has_taken_its_place_and_nothing_takes_the_place_of_what_is_cancelled() {
        let directory = tempfile::tempdir().unwrap();
        let files = WantedFiles::load(directory.path());
        let wanted = Wanted::new(request(), JOURNAL, 0);
        let again = wanted.clone().again(MIGRATION, 5, 0).unwrap();
        files.put(MIGRATION, wanted.clone()).await;
        assert!(files.replace(MIGRATION, NEXT, again.clone()).await);
        assert_eq!(WantedFiles::load(directory.path()).all(), [(NEXT, again.clone())]);
        files.cancel(MIGRATION).await;
        assert_eq!(WantedFiles::load(directory.path()).all(), []);
        files.put(MIGRATION, wanted).await;
        files.cancel(MIGRATION).await;
        assert!(!files.replace(MIGRATION, NEXT, again).await);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_says_nothing_is_removed_and_those_of_others_stay() {
        let directory = tempfile::tempdir().unwrap();
        let bad = directory.path().join(format!("{MIGRATION}.wanted"));
        let half = directory.path().join(format!("{MIGRATION}.wanted.new"));
        let other = directory.path().join("x.wanted");
        for path in [&bad, &half, &other] {
            std::fs::write(path, "{").unwrap();
        }
        assert_eq!(WantedFiles::load(directory.path()).all(), []);
        assert!(!bad.exists() && !half.exists() && other.exists());
    }

    #[test]
    fn a_deadline_goes_on_across_restarts_and_restarts_have_an_end() {
        let wanted = Wanted::new(request(), JOURNAL, 1_000);
        let again = wanted.again(MIGRATION, 5, 21_000).unwrap();
        assert_eq!(again.earlier, [MIGRATION]);
        assert_eq!(again.request.deadline_seconds, Some(40.0));
        assert!(again.clone().again(NEXT, 5, 61_000).unwrap_err().contains("deadline"));
        let mut last = again;
        while let Ok(next) = last.clone().again(NEXT, 5, 21_000) {
            last = next;
        }
        assert_eq!((last.restarts, last.earlier.len()), (5, 5));
    }
}
