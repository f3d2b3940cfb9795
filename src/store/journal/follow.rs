//! Looks on at a journal that a gateway is writing.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::block::{self, BLOCK_BYTES, Block, Header, Slot};
use super::{JournalError, offset_of};
use crate::proto::ownership::JournalRecord;

/// Reads what is added to a journal, without a lock. A look that finds nothing new reads one block.
///
/// A record is seen as soon as it is written, which is before it is known to be on disk. A journal that is compacted meanwhile
/// is another file, of which this one sees nothing.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    file: File,
    header: Header,
    /// Records that were read so far.
    read: u64,
}

impl Follower {
    /// Begins before the first record of the journal at `path`.
    ///
    /// # Errors
    /// There is no journal, or what is there is none.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let failed = |source| JournalError::Io {
            path: path.to_owned(),
            action: "read",
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let mut block: Box<Block> = Box::new([0; BLOCK_BYTES]);
        file.read_exact_at(&mut *block, 0).map_err(failed)?;
        let header = Header::decode(&block).map_err(|_| JournalError::NotAJournal { path: path.to_owned() })?;
        Ok(Self {
            path: path.to_owned(),
            file,
            header,
            read: 0,
        })
    }

    /// The next record, if it is there. One that is being written just now is not.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn poll(&mut self) -> Result<Option<JournalRecord>, JournalError> {
        let mut block: Box<Block> = Box::new([0; BLOCK_BYTES]);
        match self.file.read_exact_at(&mut *block, offset_of(self.read)) {
            Ok(()) => {}
            // The file ends here until it is given more room.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(source) => {
                return Err(JournalError::Io {
                    path: self.path.clone(),
                    action: "read",
                    source,
                });
            }
        }
        let expected = self.header.first_sequence + self.read;
        match block::decode_slot(self.header.id, &block) {
            Slot::Record { sequence, record, .. } if sequence == expected => {
                self.read += 1;
                Ok(Some(*record))
            }
            _ => Ok(None),
        }
    }
}
