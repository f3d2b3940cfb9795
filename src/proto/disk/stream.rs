//! The disks of a VM as one stream of bytes.
//!
//! ```text
//! 0      1      2      4              8               16              24
//! +------+------+------+--------------+---------------+---------------+
//! | kind | 0    | disk | 0            | offset        | length        |  bytes of a Data or an End …     all little-endian
//! +------+------+------+--------------+---------------+---------------+
//! ```
//!
//! Records are carried out in their order, but within a round no two of them touch the same bytes. The last one is [`Record::End`], with a
//! BLAKE3 of everything before it: who writes the disks knows from the stream itself whether that is what was read.
//!
//! A stream that begins with [`Record::Ask`] is answered with what the disks hold already ([`held`](super::held)). The first round then has a
//! [`Record::Same`] in the place of the bytes that are equal, and their digests are part of the stream's.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::held::Digest;

/// Bytes before what a record carries.
pub const HEADER_LEN: usize = 24;

/// Most bytes that one record carries.
pub const MAX_DATA: usize = 1 << 20;

/// Most disks of one VM.
pub const MAX_DISKS: usize = 64;

const DATA: u8 = 1;
const ZEROES: u8 = 2;
const ROUND: u8 = 3;
const END: u8 = 4;
const ASK: u8 = 5;
const SAME: u8 = 6;

/// A step of bringing the destination's disks up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The disk has these bytes from `offset` on.
    Data {
        /// Its number in the offer.
        disk: u16,
        /// First byte.
        offset: u64,
        /// At most [`MAX_DATA`].
        data: Bytes,
    },
    /// The disk reads as zeroes here.
    Zeroes {
        /// Its number in the offer.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A round is over: what follows may touch the same bytes again.
    Round,
    /// What do the disks hold? The first record, or none.
    Ask,
    /// The disk has what it had when it was asked about. [`Reader::confirm`] has to follow.
    Same {
        /// Its number in the offer.
        disk: u16,
        /// First byte: of a block.
        offset: u64,
        /// Bytes: of whole blocks, but for the disk's last.
        length: u64,
    },
    /// Nothing follows, and everything before has this digest.
    End {
        /// BLAKE3.
        digest: [u8; 32],
    },
}

/// Writes records and keeps their digest.
#[derive(Debug, Default)]
pub struct Writer(blake3::Hasher);

impl Writer {
    /// The header of a record of data, which follows it.
    #[must_use]
    pub fn data(&mut self, disk: u16, offset: u64, data: &[u8]) -> Bytes {
        let header = header(DATA, disk, offset, data.len() as u64);
        self.0.update(&header);
        self.0.update(data);
        header
    }

    /// A record of zeroes.
    #[must_use]
    pub fn zeroes(&mut self, disk: u16, offset: u64, length: u64) -> Bytes {
        let header = header(ZEROES, disk, offset, length);
        self.0.update(&header);
        header
    }

    /// The question with which a stream may begin.
    #[must_use]
    pub fn ask(&mut self) -> Bytes {
        let header = header(ASK, 0, 0, 0);
        self.0.update(&header);
        header
    }

    /// A record of blocks that are as the destination has them, with what they have to be there.
    #[must_use]
    pub fn same(&mut self, disk: u16, offset: u64, length: u64, blocks: &[Digest]) -> Bytes {
        let header = header(SAME, disk, offset, length);
        self.0.update(&header);
        self.0.update(blocks.as_flattened());
        header
    }

    /// The end of a round.
    #[must_use]
    pub fn round(&mut self) -> Bytes {
        let header = header(ROUND, 0, 0, 0);
        self.0.update(&header);
        header
    }

    /// The end of the stream, and the digest that it has.
    #[must_use]
    pub fn end(self) -> (Bytes, [u8; 32]) {
        let digest = *self.0.finalize().as_bytes();
        let mut record = BytesMut::from(&header(END, 0, 0, 32)[..]);
        record.put_slice(&digest);
        (record.freeze(), digest)
    }
}

fn header(kind: u8, disk: u16, offset: u64, length: u64) -> Bytes {
    let mut header = BytesMut::with_capacity(HEADER_LEN);
    header.put_u8(kind);
    header.put_u8(0);
    header.put_u16_le(disk);
    header.put_u32_le(0);
    header.put_u64_le(offset);
    header.put_u64_le(length);
    header.freeze()
}

/// Reads records, of a peer that may say anything.
#[derive(Debug)]
pub struct Reader {
    /// Of each disk, in bytes.
    sizes: Vec<u64>,
    hasher: blake3::Hasher,
    has_begun: bool,
    has_asked: bool,
    has_ended: bool,
}

/// The stream is not one of these disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// No record begins so.
    #[error("the stream of disks has a record of the unknown kind {kind}")]
    Kind {
        /// Its first byte.
        kind: u8,
    },
    /// What has to be zero is not.
    #[error("the stream of disks has a record with reserved bytes")]
    Reserved,
    /// A disk that was not offered.
    #[error("the stream of disks has bytes of disk {disk}, which was not offered")]
    Disk {
        /// Its number.
        disk: u16,
    },
    /// Bytes beyond the end of a disk, or more than a record may carry.
    #[error("the stream of disks has {length} bytes at {offset} for disk {disk}, which cannot be")]
    Range {
        /// The disk's number.
        disk: u16,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A question that is not the first record, or something is said to be known that was not asked for.
    #[error("the stream of disks has a record of kind {kind} where none may be")]
    Place {
        /// Its first byte.
        kind: u8,
    },
    /// What was read at the source is not what has arrived.
    #[error("what arrived of the disks is not what was read at the source")]
    Digest,
    /// Something after the end.
    #[error("the stream of disks goes on after its end")]
    AfterTheEnd,
}

impl Reader {
    /// Of disks of these sizes.
    #[must_use]
    pub fn new(sizes: Vec<u64>) -> Self {
        Self {
            sizes,
            hasher: blake3::Hasher::new(),
            has_begun: false,
            has_asked: false,
            has_ended: false,
        }
    }

    /// The blocks of the [`Record::Same`] that was returned last, as they were when the disks were asked about.
    pub fn confirm(&mut self, blocks: &[Digest]) {
        self.hasher.update(blocks.as_flattened());
    }

    /// Whether the end was read, with the right digest.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Takes the next record off the front of `received`; `None` where more bytes are needed. At most [`HEADER_LEN`] and [`MAX_DATA`] bytes are.
    ///
    /// # Errors
    /// [`StreamError`], before anything is waited for that cannot be. The stream is of no use any more.
    pub fn next(&mut self, received: &mut BytesMut) -> Result<Option<Record>, StreamError> {
        if self.has_ended && !received.is_empty() {
            return Err(StreamError::AfterTheEnd);
        }
        let Some(mut header) = received.get(..HEADER_LEN) else {
            return Ok(None);
        };
        let (kind, pad, disk) = (header.get_u8(), header.get_u8(), header.get_u16_le());
        let (reserved, offset, length) = (header.get_u32_le(), header.get_u64_le(), header.get_u64_le());
        if pad != 0 || reserved != 0 {
            return Err(StreamError::Reserved);
        }
        let carried = match kind {
            DATA | ZEROES | SAME => {
                if kind == SAME && !self.has_asked {
                    return Err(StreamError::Place { kind });
                }
                let size = *self.sizes.get(usize::from(disk)).ok_or(StreamError::Disk { disk })?;
                let is_inside = offset.checked_add(length).is_some_and(|end| end <= size);
                if !is_inside || length == 0 || kind == DATA && length > MAX_DATA as u64 {
                    return Err(StreamError::Range { disk, offset, length });
                }
                if kind == DATA { length as usize } else { 0 }
            }
            ASK if self.has_begun => return Err(StreamError::Place { kind }),
            ROUND | ASK if (disk, offset, length) == (0, 0, 0) => 0,
            END if (disk, offset, length) == (0, 0, 32) => 32,
            ROUND | ASK | END => return Err(StreamError::Reserved),
            kind => return Err(StreamError::Kind { kind }),
        };
        if received.len() < HEADER_LEN + carried {
            received.reserve(HEADER_LEN + carried - received.len());
            return Ok(None);
        }
        self.has_begun = true;
        self.has_asked |= kind == ASK;
        if kind != END {
            self.hasher.update(&received[..HEADER_LEN + carried]);
        }
        received.advance(HEADER_LEN);
        let data = received.split_to(carried).freeze();
        Ok(Some(match kind {
            DATA => Record::Data { disk, offset, data },
            ZEROES => Record::Zeroes { disk, offset, length },
            SAME => Record::Same { disk, offset, length },
            ASK => Record::Ask,
            ROUND => Record::Round,
            _ => {
                let digest: [u8; 32] = data[..].try_into().expect("an end carries 32 bytes");
                if self.hasher.finalize() != digest {
                    return Err(StreamError::Digest);
                }
                self.has_ended = true;
                Record::End { digest }
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream() -> Vec<u8> {
        let mut writer = Writer::default();
        let data = vec![7; 1000];
        let mut bytes = writer.data(1, 4096, &data).to_vec();
        bytes.extend(&data);
        bytes.extend(&writer.zeroes(0, 0, 1 << 20)[..]);
        bytes.extend(&writer.round()[..]);
        bytes.extend(&writer.end().0[..]);
        bytes
    }

    fn read(sizes: &[u64], bytes: &[u8], step: usize) -> Result<Vec<Record>, StreamError> {
        let mut reader = Reader::new(sizes.to_vec());
        let (mut received, mut records) = (BytesMut::new(), Vec::new());
        for chunk in bytes.chunks(step) {
            received.extend_from_slice(chunk);
            while let Some(record) = reader.next(&mut received)? {
                records.push(record);
            }
        }
        Ok(records)
    }

    const SIZES: [u64; 2] = [1 << 20, 8192];

    #[test]
    fn records_survive_any_slicing() {
        let bytes = stream();
        let whole = read(&SIZES, &bytes, bytes.len()).unwrap();
        assert_eq!(whole.len(), 4);
        assert!(matches!(&whole[0], Record::Data { disk: 1, offset: 4096, data } if data[..] == [7; 1000]));
        for step in 1..200 {
            assert_eq!(read(&SIZES, &bytes, step).unwrap(), whole);
        }
    }

    #[test]
    fn a_changed_byte_is_found_at_the_end_at_the_latest() {
        let bytes = stream();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let read = read(&SIZES, &changed, 512);
            let ended = read.is_ok_and(|records| matches!(records.last(), Some(Record::End { .. })));
            assert!(!ended, "byte {at}");
        }
    }

    #[test]
    fn bytes_beyond_a_disk_and_more_than_a_record_has_are_refused_before_they_come() {
        let refusal = |bytes: &[u8]| read(&SIZES, bytes, HEADER_LEN).unwrap_err();
        let beyond = header(DATA, 1, 8000, 193);
        assert!(matches!(refusal(&beyond), StreamError::Range { offset: 8000, .. }));
        let large = header(DATA, 0, 0, MAX_DATA as u64 + 1);
        assert!(matches!(refusal(&large), StreamError::Range { .. }));
        let overflow = header(ZEROES, 0, u64::MAX, 2);
        assert!(matches!(refusal(&overflow), StreamError::Range { .. }));
        assert_eq!(refusal(&header(ZEROES, 2, 0, 1)), StreamError::Disk { disk: 2 });
        assert_eq!(refusal(&header(9, 0, 0, 0)), StreamError::Kind { kind: 9 });
        let mut after = stream();
        after.push(0);
        assert_eq!(refusal(&after), StreamError::AfterTheEnd);
    }

    fn asked(blocks: &[Digest]) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut bytes = writer.ask().to_vec();
        bytes.extend(&writer.same(0, 4096, 8192, blocks)[..]);
        bytes.extend(&writer.end().0[..]);
        bytes
    }

    #[test]
    fn what_is_the_same_is_the_same_by_the_digest_of_the_whole() {
        let bytes = asked(&[[1; 32], [2; 32]]);
        let last = |confirmed: [Digest; 2]| {
            let mut reader = Reader::new(SIZES.to_vec());
            let mut received = BytesMut::from(&bytes[..]);
            assert_eq!(reader.next(&mut received), Ok(Some(Record::Ask)));
            let same = reader.next(&mut received).unwrap().unwrap();
            assert!(matches!(
                same,
                Record::Same {
                    disk: 0,
                    offset: 4096,
                    length: 8192
                }
            ));
            reader.confirm(&confirmed);
            reader.next(&mut received)
        };
        assert!(matches!(last([[1; 32], [2; 32]]), Ok(Some(Record::End { .. }))));
        assert_eq!(last([[1; 32], [3; 32]]), Err(StreamError::Digest));
    }

    #[test]
    fn a_question_comes_first_and_nothing_is_the_same_without_one() {
        let place = |kind| StreamError::Place { kind };
        let same = header(SAME, 0, 0, 4096);
        assert_eq!(read(&SIZES, &same, HEADER_LEN), Err(place(SAME)));
        let late = [header(ROUND, 0, 0, 0), header(ASK, 0, 0, 0)].concat();
        assert_eq!(read(&SIZES, &late, HEADER_LEN), Err(place(ASK)));
        let beyond = [header(ASK, 0, 0, 0), header(SAME, 1, 4096, 4097)].concat();
        assert!(matches!(
            read(&SIZES, &beyond, HEADER_LEN),
            Err(StreamError::Range { .. })
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0_u8..8) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            let _ = read(&SIZES, &bytes, 7);
        }
    }
}
