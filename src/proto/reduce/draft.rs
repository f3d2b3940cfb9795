//! A batch on its way to a payload: all that needs the batches before it is done, its literals are not coded yet.

use super::effort::Effort;
use super::group::{self, GROUP_BYTES};
use super::packing::{GroupOrigins, Literals, Verdict};
use super::payload::Head;
use super::stats::BatchStats;

/// What [`Reducer::draft`](super::Reducer::draft) makes of a batch. A [`Coder`] makes it a payload, on any thread.
#[derive(Debug)]
pub struct Draft {
    pub(super) head: Head,
    /// For a destination that knows neither deltas nor zstd.
    pub(super) plainly: bool,
    pub(super) effort: Effort,
    pub(super) stats: BatchStats,
    pub(super) parts: Parts,
}

/// Memory of a draft, which the next one uses again.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) ops: Vec<u8>,
    pub(super) literals: Literals,
    /// Bytes that are carried as they are beside the groups.
    pub(super) plain: Vec<u8>,
}

/// What coding a draft has shown, for [`Reducer::learn`](super::Reducer::learn).
#[derive(Debug)]
pub struct Coded {
    effort: Effort,
    stats: BatchStats,
    verdicts: Vec<Verdict>,
    parts: Parts,
}

/// Codes drafts of one session: one of up to [`MAX_CODERS`](super::MAX_CODERS), each for a thread of its own.
///
/// A coder must be given its drafts in the order in which they were made, and any coder may have any draft: the payloads go to the destination
/// in the order of the drafts.
pub struct Coder {
    groups: group::Encoder,
    coded: Vec<u8>,
}

impl Draft {
    /// Bytes of vmm stream that it stands for.
    #[must_use]
    pub fn stream_bytes(&self) -> usize {
        self.head.raw_len
    }
}

impl Coder {
    /// The session's coder of this number.
    ///
    /// # Panics
    /// Where `number` is not below [`MAX_CODERS`](super::MAX_CODERS). Others than 0 are for destinations of wire version 6 and later.
    #[must_use]
    pub fn new(number: usize) -> Self {
        assert!(number < super::MAX_CODERS, "a session has {} coders", super::MAX_CODERS);
        Self {
            groups: group::Encoder::new(number as u8),
            coded: Vec::new(),
        }
    }

    /// Appends the payload of `draft` to `out`.
    pub fn code(&mut self, draft: Draft, out: &mut Vec<u8>) -> Coded {
        let start = out.len();
        let Draft {
            head,
            plainly,
            effort,
            mut stats,
            parts,
        } = draft;
        self.coded.clear();
        let contents = parts.literals.content.chunks(GROUP_BYTES);
        let mut verdicts = Vec::with_capacity(contents.len());
        for (content, origins) in contents.zip(&parts.literals.groups) {
            let before = self.coded.len();
            let pays = self.groups.encode(effort, content, &mut self.coded);
            verdicts.push(Verdict {
                content: content.len(),
                coded: self.coded.len() - before,
                pays,
            });
            if pays {
                stats.pages.literal += origins.pages;
            } else {
                stats.pages.raw += origins.pages;
            }
        }
        head.write(plainly, out);
        out.reserve_exact(parts.ops.len() + self.coded.len() + parts.plain.len());
        out.extend_from_slice(&parts.ops);
        out.extend_from_slice(&self.coded);
        out.extend_from_slice(&parts.plain);
        stats.bytes_out = (out.len() - start) as u64;
        Coded {
            effort,
            stats,
            verdicts,
            parts,
        }
    }
}

impl Coded {
    /// What the batch was made of.
    #[must_use]
    pub fn stats(&self) -> BatchStats {
        self.stats
    }

    pub(super) fn effort(&self) -> Effort {
        self.effort
    }

    pub(super) fn verdicts(&self) -> impl Iterator<Item = (&GroupOrigins, Verdict)> {
        self.parts.literals.groups.iter().zip(self.verdicts.iter().copied())
    }

    pub(super) fn into_parts(self) -> Parts {
        self.parts
    }
}

impl std::fmt::Debug for Coder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coder").finish_non_exhaustive()
    }
}
