//! Why a journal cannot be opened or written, and what to do then.

use std::io;
use std::path::PathBuf;

use super::block;

/// Why a journal cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has it open.
    #[error("the ownership journal {} is in use by another gateway; stop that one first, or give this one a state_dir of its own", path.display())]
    Locked {
        /// The journal.
        path: PathBuf,
    },
    /// The file is something else.
    #[error("{} is not an ownership journal; move it away if it does not belong there", path.display())]
    NotAJournal {
        /// The file.
        path: PathBuf,
    },
    /// Written by another release.
    #[error(
        "the ownership journal {} has format {found} and this release reads format {}; run the release that wrote it",
        path.display(), block::VERSION
    )]
    OtherVersion {
        /// The journal.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Bytes that were acknowledged have changed.
    #[error(
        "the ownership journal {} is damaged at byte {offset}; make sure where each of its VMs runs, and move the file away: the \
         peers will then treat its migrations as in doubt",
        path.display()
    )]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// Where the first damaged block begins.
        offset: u64,
    },
    /// It lies in another file than the one it was written to.
    #[error(
        "the ownership journal {} was copied or restored to where it is, and may lack what was decided since. If no gateway has used it \
         elsewhere since it was copied, say so: longhaul journal adopt {}. If it is from a backup, make sure where each of its VMs \
         runs (longhaul journal show {}), and move it away: the peers will then treat its migrations as in doubt",
        path.display(), path.display(), path.display()
    )]
    Copied {
        /// The journal.
        path: PathBuf,
    },
    /// It has fewer records than its file has had.
    #[error(
        "the ownership journal {} has held more than it does now: an older copy was put over it, which lacks what was decided since. Make sure \
         where each of its VMs runs (longhaul journal show {}), and move it away: the peers will then treat its migrations as in doubt. If it is \
         the latest after all, say so: longhaul journal adopt {}",
        path.display(), path.display(), path.display()
    )]
    Older {
        /// The journal.
        path: PathBuf,
    },
    /// No room for a new migration. Nothing was written, and the journal can still be used.
    #[error("the disk of the ownership journal {} is full; free some space before a migration is begun", path.display())]
    Full {
        /// The journal.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// A write or an fsync failed, now or earlier.
    #[error(
        "the ownership journal {} could not be written, so it is not known what it holds; repair its disk and restart the gateway",
        path.display()
    )]
    InDoubt {
        /// The journal.
        path: PathBuf,
        /// What the file system said, if it was now.
        source: Option<io::Error>,
    },
    /// A field is larger than it may be. Nothing was written.
    #[error("the {field} of a journal record has {bytes} bytes and may have {limit}")]
    TooLarge {
        /// Which field.
        field: &'static str,
        /// How large it is.
        bytes: usize,
        /// How large it may be.
        limit: usize,
    },
    /// Something else went wrong before anything was written.
    #[error("the ownership journal {} cannot be {action}", path.display())]
    Io {
        /// The journal.
        path: PathBuf,
        /// Completes the sentence.
        action: &'static str,
        /// What the file system said.
        source: io::Error,
    },
}
