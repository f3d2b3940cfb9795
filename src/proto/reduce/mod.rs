//! Stage 2: a batch of records as one payload, and back.
//!
//! ```text
//! records → Batch → digest → classify → dictionary ─┬→ ops ──────────────────────────────┐
//!                                                   └→ literals, or what changed (delta) ─┴→ Draft → Coder → payload
//! payload → ops + literals + page shelf → the exact bytes of the vmm stream
//! ```
//!
//! [`Reducer`] stands at the source, [`Restorer`] at the destination. The law: payloads restored in the order in which they
//! were encoded give back exactly the bytes that went in, for any slicing of the stream into batches and any size of the
//! dictionary. Nothing is asked of the peer and nothing can be missed: what the dictionary holds, and what it evicts, is a
//! function of the payload sequence alone, so both ends compute it and neither tells the other.
//!
//! A session may begin with what both ends kept of an earlier one ([`KnownPages`]).
//!
//! The source keeps a digest of each page, and of as many as it may the bytes too, to send what changed in them; the destination keeps the bytes
//! of all, on a [`PageShelf`].
//!
//! This stage does not parse the vmm stream, frame or order payloads, or check the whole: the session does the second, and
//! the running digest of the stream the third.

mod batch;
mod classify;
mod copies;
mod delta;
mod dictionary;
mod digest;
mod draft;
mod effort;
mod group;
mod index;
mod known;
mod ops;
mod packing;
mod payload;
mod reducer;
mod restorer;
mod sent;
mod shelf;
mod stats;
mod varint;

pub use self::batch::{Batch, Batches, batches};
pub use self::dictionary::{DictionaryLimits, DictionaryTooLarge};
pub use self::digest::digest_many;
pub use self::draft::{Coded, Coder, Draft};
pub use self::effort::{Effort, EffortControl};
pub use self::group::MAX_CODERS;
pub use self::known::{KeptPages, KnownContent, KnownPages, NoSuchContent};
pub use self::payload::PayloadError;
pub use self::reducer::Reducer;
pub use self::restorer::{RestoreError, Restorer};
pub use self::shelf::{PageShelf, ShelfError};
pub use self::stats::{BatchStats, PageCounts};

/// Most bytes of vmm stream in one batch. It bounds what a payload can make the destination allocate.
pub const MAX_BATCH_BYTES: usize = 1 << 20;

/// Most records in one batch: it bounds what a few bytes of payload can make the destination do.
pub const MAX_BATCH_RECORDS: usize = 4096;

/// No payload is longer: a batch that cannot be reduced, 4096 pages with the worst ops, and every block's name.
pub const MAX_PAYLOAD_BYTES: usize = MAX_BATCH_BYTES + (512 << 10);
