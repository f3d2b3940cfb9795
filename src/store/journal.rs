//! temp
use std::path::Path;
use crate::proto::ownership::JournalRecord;
use crate::proto::page::{JournalId, MigrationId};
#[derive(Debug)]
pub struct Journal { id: JournalId, records: Vec<JournalRecord> }
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct JournalError;
impl Journal {
    pub fn open_or_create(_p: &Path, id: [u8;16], _now: u64) -> Result<Self, JournalError> { Ok(Self{id: JournalId(id), records: vec![]}) }
    pub fn id(&self) -> JournalId { self.id }
    pub fn append(&mut self, r: JournalRecord) -> Result<(), JournalError> { self.records.push(r); Ok(()) }
    pub fn records_of(&self, m: MigrationId) -> impl Iterator<Item=&JournalRecord> { self.records.iter().filter(move |r| r.migration == m) }
    pub fn open_migrations(&self) -> Vec<MigrationId> { vec![] }
}
