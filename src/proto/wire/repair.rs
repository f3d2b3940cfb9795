//! The payload of a repair: parity over the lanes of a few frames, from which the receiver computes what was lost of them.
//!
//! ```text
//! | rows (1) | row exponent (1) | lanes (1) | 0 (1) | lanes x [ lane (8) | bytes (4) | check (4) ] | parity …
//! ```
//!
//! `lane` is the number of the QUIC stream among the connection's streams of its kind (RFC 9000, 2.1, without the two type bits):
//! a lane of which not even the header has arrived is known by it. The lanes' bytes, one behind the other, make blocks of 64 rows of
//! 2^exponent bytes, the last one shorter; for each block follow `rows` parity rows. `check` is the start of the BLAKE3 digest of
//! the lane: what was computed is compared with it.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::frame::{HEADER_LEN, MAX_PAYLOAD};
use crate::proto::page::StreamDigest;

/// Lanes that one repair covers at the most. Also the distance of the sequences at which a receiver forgets what it kept for repairs:
/// a repair never covers frames of two such runs.
pub const RUN: u64 = 8;

/// Rows of a block.
pub const BLOCK_ROWS: usize = 64;

/// Bytes of the lanes that one repair covers at the most.
pub const MAX_COVERED: usize = 4 << 20;

/// Exponents of a row's length: from 2 KiB, the packets of an Ethernet, to 16 KiB, jumbo packets.
pub const ROW_EXPONENTS: std::ops::RangeInclusive<u8> = 11..=14;

/// Parity rows of a block at the most.
pub const MAX_ROWS: u8 = 8;

const FIXED_LEN: usize = 4;
const LANE_LEN: usize = 16;

/// Bytes at the front of a repair's payload within which its head ends.
pub const MAX_HEAD: usize = FIXED_LEN + RUN as usize * LANE_LEN;

/// What a repair says before its parity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepairHead {
    /// Parity rows of each block.
    pub rows: u8,
    /// A row has 2^this bytes.
    pub row_exponent: u8,
    /// The lanes that are covered, of frames with consecutive sequences from the repair's own on.
    pub lanes: Vec<CoveredLane>,
}

/// A lane that a repair covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoveredLane {
    /// Number of its QUIC stream.
    pub lane: u64,
    /// Its length, header included.
    pub bytes: u32,
    /// The start of its digest.
    pub check: [u8; 4],
}

impl CoveredLane {
    /// The start of the digest of a lane's bytes.
    #[must_use]
    pub fn check_of(digest: &StreamDigest) -> [u8; 4] {
        [digest.0[0], digest.0[1], digest.0[2], digest.0[3]]
    }
}

impl RepairHead {
    /// Bytes of a row.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        1 << self.row_exponent
    }

    /// Bytes of the lanes that are covered.
    #[must_use]
    pub fn covered_bytes(&self) -> usize {
        self.lanes.iter().map(|lane| lane.bytes as usize).sum()
    }

    /// Bytes of the parity that follows.
    #[must_use]
    pub fn parity_bytes(&self) -> usize {
        let blocks = self.covered_bytes().div_ceil(BLOCK_ROWS * self.row_bytes());
        blocks * usize::from(self.rows) * self.row_bytes()
    }

    /// Whether this can be the head of a repair whose payload has so many bytes and that covers frames from `sequence` on.
    ///
    /// # Errors
    /// [`RepairError`].
    pub fn check(&self, sequence: u64, payload_bytes: usize) -> Result<(), RepairError> {
        let expected = self.len() + self.parity_bytes();
        if payload_bytes != expected {
            return Err(RepairError::WrongLength {
                expected,
                found: payload_bytes,
            });
        }
        if sequence % RUN + self.lanes.len() as u64 > RUN {
            return Err(RepairError::TwoRuns {
                sequence,
                lanes: self.lanes.len(),
            });
        }
        Ok(())
    }

    /// Bytes of the head itself.
    #[must_use]
    pub fn len(&self) -> usize {
        FIXED_LEN + self.lanes.len() * LANE_LEN
    }

    /// Whether it covers nothing, which no repair does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// The payload's front; the parity follows.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.len());
        out.put_u8(self.rows);
        out.put_u8(self.row_exponent);
        out.put_u8(u8::try_from(self.lanes.len()).expect("a repair covers few lanes"));
        out.put_u8(0);
        for lane in &self.lanes {
            out.put_u64_le(lane.lane);
            out.put_u32_le(lane.bytes);
            out.put_slice(&lane.check);
        }
        out.freeze()
    }

    /// Reads the front of a payload; `None` where more of it is needed.
    ///
    /// # Errors
    /// [`RepairError`] where it is no repair within the limits.
    pub fn decode(mut front: &[u8]) -> Result<Option<Self>, RepairError> {
        if front.len() < FIXED_LEN {
            return Ok(None);
        }
        let (rows, row_exponent, count, zero) = (front.get_u8(), front.get_u8(), front.get_u8(), front.get_u8());
        let is_sane = (1..=MAX_ROWS).contains(&rows)
            && ROW_EXPONENTS.contains(&row_exponent)
            && (1..=RUN).contains(&u64::from(count))
            && zero == 0;
        if !is_sane {
            return Err(RepairError::Malformed {
                rows,
                row_exponent,
                lanes: count,
            });
        }
        if front.len() < usize::from(count) * LANE_LEN {
            return Ok(None);
        }
        let lanes: Vec<CoveredLane> = (0..count)
            .map(|_| {
                let (lane, bytes) = (front.get_u64_le(), front.get_u32_le());
                let mut check = [0; 4];
                front.copy_to_slice(&mut check);
                CoveredLane { lane, bytes, check }
            })
            .collect();
        let longest = HEADER_LEN + MAX_PAYLOAD;
        if let Some(lane) = lanes
            .iter()
            .find(|lane| !(HEADER_LEN..=longest).contains(&(lane.bytes as usize)))
        {
            return Err(RepairError::Lane { bytes: lane.bytes });
        }
        let head = Self {
            rows,
            row_exponent,
            lanes,
        };
        let covered = head.covered_bytes();
        if covered > MAX_COVERED {
            return Err(RepairError::TooMuch { covered });
        }
        Ok(Some(head))
    }
}

/// A repair cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RepairError {
    /// A number is out of its range.
    #[error("a repair of {rows} rows of 2^{row_exponent} bytes over {lanes} lanes is out of the limits")]
    Malformed {
        /// Parity rows stated.
        rows: u8,
        /// Exponent stated.
        row_exponent: u8,
        /// Lanes stated.
        lanes: u8,
    },
    /// No frame has this length.
    #[error("a repair covers a lane of {bytes} bytes, which no frame has")]
    Lane {
        /// Length stated.
        bytes: u32,
    },
    /// More than a repair may cover.
    #[error("a repair covers {covered} bytes, over the limit of {MAX_COVERED}")]
    TooMuch {
        /// Bytes stated.
        covered: usize,
    },
    /// The payload is shorter or longer than its head says.
    #[error("a repair whose head makes {expected} bytes has {found}")]
    WrongLength {
        /// Bytes that follow from the head, which they include.
        expected: usize,
        /// Bytes of the payload.
        found: usize,
    },
    /// It ends before its head does.
    #[error("a repair ends within its head")]
    Truncated,
    /// Its frames are of two runs, of which a receiver need not keep the older.
    #[error("a repair over {lanes} lanes from frame {sequence} on reaches into the next run of {RUN}")]
    TwoRuns {
        /// The first frame covered.
        sequence: u64,
        /// Lanes stated.
        lanes: usize,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head() -> RepairHead {
        RepairHead {
            rows: 2,
            row_exponent: 11,
            lanes: vec![
                CoveredLane {
                    lane: 7,
                    bytes: 100_000,
                    check: *b"abcd",
                },
                CoveredLane {
                    lane: 9,
                    bytes: 48,
                    check: *b"efgh",
                },
            ],
        }
    }

    #[test]
    fn a_head_survives_and_a_shorter_one_waits_for_more() {
        let bytes = head().encode();
        assert_eq!(bytes.len(), head().len());
        assert_eq!(RepairHead::decode(&bytes), Ok(Some(head())));
        for len in 0..bytes.len() {
            assert_eq!(RepairHead::decode(&bytes[..len]), Ok(None), "{len}");
        }
    }

    #[test]
    fn the_parity_is_two_rows_for_each_block_that_was_begun() {
        let block = (BLOCK_ROWS << 11) as u32;
        let of = |bytes| {
            RepairHead {
                lanes: vec![CoveredLane {
                    lane: 1,
                    bytes,
                    check: [0; 4],
                }],
                ..head()
            }
            .parity_bytes()
        };
        assert_eq!((of(block), of(block + 1)), (2 << 11, 4 << 11));
    }

    #[test]
    fn lanes_at_the_limits_are_taken_and_beyond_are_refused() {
        let of = |bytes: usize, count: usize| {
            let lane = CoveredLane {
                lane: 1,
                bytes: bytes as u32,
                check: [0; 4],
            };
            RepairHead::decode(
                &RepairHead {
                    lanes: vec![lane; count],
                    ..head()
                }
                .encode(),
            )
        };
        assert!(of(HEADER_LEN, RUN as usize).is_ok());
        assert!(of(HEADER_LEN, RUN as usize + 1).is_err());
        assert!(of(HEADER_LEN - 1, 1).is_err());
        assert!(of(MAX_COVERED / 4, 4).is_ok());
        assert!(of(MAX_COVERED / 4 + 1, 4).is_err());
        assert!(of(HEADER_LEN + MAX_PAYLOAD + 1, 1).is_err());
    }

    #[test]
    fn a_head_fits_its_payload_and_its_place_or_is_refused() {
        let head = head();
        let payload = head.len() + head.parity_bytes();
        assert_eq!(head.check(6, payload), Ok(()));
        assert_eq!(
            head.check(7, payload),
            Err(RepairError::TwoRuns { sequence: 7, lanes: 2 })
        );
        for found in [payload - 1, payload + 1] {
            assert_eq!(
                head.check(6, found),
                Err(RepairError::WrongLength {
                    expected: payload,
                    found
                })
            );
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_what_decodes_encodes_to_the_same(bytes in proptest::collection::vec(any::<u8>(), 0..160)) {
            if let Ok(Some(head)) = RepairHead::decode(&bytes) {
                prop_assert_eq!(&head.encode()[..], &bytes[..head.len()]);
            }
        }
    }
}
