//! The bytes of a journal: blocks of 4 KiB, each with the same content twice.
//!
//! ```text
//! file    header block, then one block a record, then zeros to the end (preallocated)
//! block   [half: 2048 bytes][the same half again]
//! header  "longhaul-journal" 16 | version u32 | 0 u32 | journal id 16 | created u64 | first sequence u64 | BLAKE3 32
//!         | inode u64 | its birth: seconds i64, nanoseconds u32 | 1 u32 | BLAKE3 of all before 32 | zeros
//! record  payload length u32 | 0 u32 | sequence u64 | BLAKE3 32 | payload (postcard of JournalRecord) | zeros
//! ```
//!
//! Integers are little-endian. A record's checksum covers the journal's id, the sequence number and the payload, so a block of
//! another journal, or one in a wrong place, is not a record. The second half is there because of the last record: a checksum
//! alone cannot tell a write that was cut short, which nobody has relied on, from a bit that went bad in a record that was
//! acknowledged. A write cut short spoils both halves or leaves a good one; one bad sector spoils one half.
//!
//! The inode says which file the journal was written to: a copy has another. A header without (written by a release before 2026-12) is
//! given one when it is opened.

use crate::proto::ownership::JournalRecord;
use crate::proto::page::JournalId;

/// Bytes in a block: a page, and a sector of every disk we know.
pub(super) const BLOCK_BYTES: usize = 4096;

/// The format that this code writes, and the only one that it reads.
pub(super) const VERSION: u32 = 1;

const HALF_BYTES: usize = BLOCK_BYTES / 2;
const MAGIC: &[u8; 16] = b"longhaul-journal";
const HEADER_BYTES: usize = 56;
const PLACE_AT: usize = HEADER_BYTES + 32;
const PLACE_END: usize = PLACE_AT + 24;
const HAS_PLACE: u32 = 1;
const PREFIX_BYTES: usize = 48;

/// No journal lives to write as many; what follows may be counted without overflow.
const MAX_FIRST_SEQUENCE: u64 = u64::MAX / 2;

/// Most bytes of an encoded record. The bounds of [`JournalRecord`]'s fields keep it below.
pub(super) const MAX_PAYLOAD_BYTES: usize = HALF_BYTES - PREFIX_BYTES;

pub(super) type Block = [u8; BLOCK_BYTES];

/// The first block of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) id: JournalId,
    pub(super) created_unix_ms: u64,
    /// Sequence number of the record in the first block after the header.
    pub(super) first_sequence: u64,
    /// The file that it was written to.
    pub(super) place: Option<Place>,
}

/// Which file it is, as long as that exists: an inode's number is given again, its birth is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) inode: u64,
    /// Since the Unix epoch; zeros where the file system does not tell.
    pub(super) birth_seconds: i64,
    pub(super) birth_nanoseconds: u32,
}

impl Place {
    /// Whether both may be the same file. A file system may learn to tell of births.
    pub(super) fn may_be(self, other: Self) -> bool {
        let birth = |place: Self| (place.birth_seconds, place.birth_nanoseconds);
        let is_unknown = |place| birth(place) == (0, 0);
        self.inode == other.inode && (birth(self) == birth(other) || is_unknown(self) || is_unknown(other))
    }
}

/// What a first block is, if it is not a header of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    NotAJournal,
    OtherVersion(u32),
    Damaged,
}

/// What a block after the first holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// A record. `both`: neither half has been damaged.
    Record {
        sequence: u64,
        record: Box<JournalRecord>,
        both: bool,
    },
    /// Never written.
    Empty,
    /// Something, but no record.
    Broken,
}

impl Header {
    pub(super) fn encode(&self) -> Box<Block> {
        let mut half = [0; HALF_BYTES];
        half[..16].copy_from_slice(MAGIC);
        half[16..20].copy_from_slice(&VERSION.to_le_bytes());
        half[24..40].copy_from_slice(&self.id.0);
        half[40..48].copy_from_slice(&self.created_unix_ms.to_le_bytes());
        half[48..56].copy_from_slice(&self.first_sequence.to_le_bytes());
        let checksum = blake3::hash(&half[..HEADER_BYTES]);
        half[HEADER_BYTES..PLACE_AT].copy_from_slice(checksum.as_bytes());
        if let Some(place) = self.place {
            half[PLACE_AT..PLACE_AT + 8].copy_from_slice(&place.inode.to_le_bytes());
            half[PLACE_AT + 8..PLACE_AT + 16].copy_from_slice(&place.birth_seconds.to_le_bytes());
            half[PLACE_AT + 16..PLACE_AT + 20].copy_from_slice(&place.birth_nanoseconds.to_le_bytes());
            half[PLACE_AT + 20..PLACE_END].copy_from_slice(&HAS_PLACE.to_le_bytes());
            let checksum = blake3::hash(&half[..PLACE_END]);
            half[PLACE_END..PLACE_END + 32].copy_from_slice(checksum.as_bytes());
        }
        twice(&half)
    }

    pub(super) fn decode(block: &Block) -> Result<Self, BadHeader> {
        let (first, second) = block.split_at(HALF_BYTES);
        let header = Self::decode_half(first).or_else(|bad| Self::decode_half(second).map_err(|_| bad))?;
        Ok(Self {
            place: decode_place(first).or_else(|| decode_place(second)),
            ..header
        })
    }

    fn decode_half(half: &[u8]) -> Result<Self, BadHeader> {
        if half[..16] != *MAGIC {
            return Err(BadHeader::NotAJournal);
        }
        let version = u32::from_le_bytes(array(&half[16..20]));
        if version != VERSION {
            return Err(BadHeader::OtherVersion(version));
        }
        if half[HEADER_BYTES..PLACE_AT] != *blake3::hash(&half[..HEADER_BYTES]).as_bytes() {
            return Err(BadHeader::Damaged);
        }
        let first_sequence = u64::from_le_bytes(array(&half[48..56]));
        if first_sequence > MAX_FIRST_SEQUENCE {
            return Err(BadHeader::Damaged);
        }
        Ok(Self {
            id: JournalId(array(&half[24..40])),
            created_unix_ms: u64::from_le_bytes(array(&half[40..48])),
            first_sequence,
            place: None,
        })
    }
}

fn decode_place(half: &[u8]) -> Option<Place> {
    let is_whole = half[PLACE_END..PLACE_END + 32] == *blake3::hash(&half[..PLACE_END]).as_bytes()
        && u32::from_le_bytes(array(&half[PLACE_AT + 20..PLACE_END])) == HAS_PLACE;
    is_whole.then(|| Place {
        inode: u64::from_le_bytes(array(&half[PLACE_AT..PLACE_AT + 8])),
        birth_seconds: i64::from_le_bytes(array(&half[PLACE_AT + 8..PLACE_AT + 16])),
        birth_nanoseconds: u32::from_le_bytes(array(&half[PLACE_AT + 16..PLACE_AT + 20])),
    })
}

/// The block of a record, or nothing if the record is larger than a block holds.
pub(super) fn encode_record(journal: JournalId, sequence: u64, record: &JournalRecord) -> Option<Box<Block>> {
    let mut half = [0; HALF_BYTES];
    let length = postcard::to_slice(record, &mut half[PREFIX_BYTES..]).ok()?.len();
    half[..4].copy_from_slice(&u32::try_from(length).ok()?.to_le_bytes());
    half[8..16].copy_from_slice(&sequence.to_le_bytes());
    let sum = checksum(journal, sequence, &half[PREFIX_BYTES..PREFIX_BYTES + length]);
    half[16..PREFIX_BYTES].copy_from_slice(sum.as_bytes());
    Some(twice(&half))
}

pub(super) fn decode_slot(journal: JournalId, block: &Block) -> Slot {
    let (first, second) = block.split_at(HALF_BYTES);
    match (decode_half(journal, first), decode_half(journal, second)) {
        (Some((sequence, record)), other) => Slot::Record {
            sequence,
            record: Box::new(record),
            both: other.is_some() && first == second,
        },
        (None, Some((sequence, record))) => Slot::Record {
            sequence,
            record: Box::new(record),
            both: false,
        },
        (None, None) if block.iter().all(|byte| *byte == 0) => Slot::Empty,
        (None, None) => Slot::Broken,
    }
}

fn decode_half(journal: JournalId, half: &[u8]) -> Option<(u64, JournalRecord)> {
    let length = usize::try_from(u32::from_le_bytes(array(&half[..4]))).ok()?;
    if length == 0 || length > MAX_PAYLOAD_BYTES {
        return None;
    }
    let sequence = u64::from_le_bytes(array(&half[8..16]));
    let payload = &half[PREFIX_BYTES..PREFIX_BYTES + length];
    if half[16..PREFIX_BYTES] != *checksum(journal, sequence, payload).as_bytes() {
        return None;
    }
    match postcard::take_from_bytes(payload) {
        Ok((record, [])) => Some((sequence, record)),
        _ => None,
    }
}

fn checksum(journal: JournalId, sequence: u64, payload: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&journal.0)
        .update(&sequence.to_le_bytes())
        .update(payload);
    hasher.finalize()
}

fn twice(half: &[u8; HALF_BYTES]) -> Box<Block> {
    let mut block = Box::new([0; BLOCK_BYTES]);
    block[..HALF_BYTES].copy_from_slice(half);
    block[HALF_BYTES..].copy_from_slice(half);
    block
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller sliced N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::ownership::{Claim, RecordKind, Resolution, Role};
    use crate::proto::page::{MigrationId, hex};

    fn largest() -> JournalRecord {
        JournalRecord {
            migration: MigrationId([0xff; 16]),
            role: Role::Destination,
            kind: RecordKind::Resolved(Resolution {
                claim: Claim::PeerOwns,
                by: "b".repeat(Resolution::MAX_BY),
            }),
            peer: "p".repeat(JournalRecord::MAX_NAME),
            peer_journal: JournalId([0xff; 16]),
            vm: "v".repeat(JournalRecord::MAX_NAME),
            context: vec![0xff; JournalRecord::MAX_CONTEXT],
            unix_ms: u64::MAX,
        }
    }

    #[test]
    fn the_largest_record_fits_a_block_and_comes_back_equal() {
        let id = JournalId([3; 16]);
        let block = encode_record(id, u64::MAX, &largest()).expect("fits");
        let slot = decode_slot(id, &block);
        assert_eq!(
            slot,
            Slot::Record {
                sequence: u64::MAX,
                record: Box::new(largest()),
                both: true
            }
        );
        assert_eq!(
            decode_slot(JournalId([4; 16]), &block),
            Slot::Broken,
            "a record of another journal"
        );
    }

    #[test]
    fn a_header_says_where_it_was_written_and_an_old_one_does_not() {
        let old = Header {
            id: JournalId([1; 16]),
            created_unix_ms: 2,
            first_sequence: 3,
            place: None,
        };
        assert_eq!(Header::decode(&old.encode()), Ok(old));
        let place = Place {
            inode: 4,
            birth_seconds: -5,
            birth_nanoseconds: 6,
        };
        let header = Header {
            place: Some(place),
            ..old
        };
        let block = header.encode();
        assert_eq!(Header::decode(&block), Ok(header));
        let unborn = Place {
            birth_seconds: 0,
            birth_nanoseconds: 0,
            ..place
        };
        let younger = Place {
            birth_nanoseconds: 7,
            ..place
        };
        assert!(place.may_be(unborn) && unborn.may_be(place) && !place.may_be(younger));
        // What an older release reads is where it was.
        assert_eq!(block[..PLACE_AT], old.encode()[..PLACE_AT]);
    }

    #[test]
    fn the_first_format_stays_as_it_is() {
        let record = JournalRecord {
            migration: MigrationId([9; 16]),
            role: Role::Source,
            kind: RecordKind::Started { was_running: true },
            peer: "site-b".into(),
            peer_journal: JournalId([2; 16]),
            vm: "web".into(),
            context: vec![1, 2],
            unix_ms: 1_700_000_000_000,
        };
        let block = encode_record(JournalId([1; 16]), 7, &record).expect("fits");
        assert_eq!(
            hex(&block[..16 + 32 + 55]),
            "370000000000000007000000000000006650e71513e8a6e570f32f7aa8beb884b367f69d6945f6e936fb6247b733ec5a\
             0909090909090909090909090909090900000106736974652d6202020202020202020202020202020202037765620201\
             0280d095ffbc31",
        );
    }
}
