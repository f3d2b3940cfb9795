//! The unit on a lane.
//!
//! ```text
//!  0       1       2       3       4               8
//! +-------+-------+-------+-------+---------------+-------------------------------+
//! | 0x4c  |version| kind  | flags | payload bytes | migration (16 bytes)          |
//! +-------+-------+-------+-------+---------------+-------------------------------+
//! 24              28              32                              40              48
//! | epoch         | stream bytes  | sequence                      | stream offset |  payload …
//! ```
//!
//! `stream offset` and `stream bytes` say which part of the vmm stream the payload restores to, so that a decoder that has
//! lost step notices at once and not at the final digest.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::proto::page::MigrationId;

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 48;

/// Most bytes of a payload: a lane stays far below the 2.5 MB at which 1024 gaps can close a QUIC stream
/// (quinn-proto 0.11 `MAX_CHUNKS`), and above what a batch that cannot be reduced takes (`reduce::MAX_PAYLOAD_BYTES`).
pub const MAX_PAYLOAD: usize = (1 << 20) + (512 << 10);

/// Most bytes of the vmm stream that one frame restores to.
pub const MAX_RAW: usize = 1 << 20;

/// The largest sequence and the largest stream offset, so that whoever adds to them need not think of overflow. A stream of
/// 10 Gbit/s takes a century to come this far.
pub const MAX_POSITION: u64 = 1 << 62;

/// Most frames that are sent and not yet acknowledged, however small they are: each costs its receiver some hundred bytes beside its
/// own. With frames of 1 KiB it is more than a window of 4 BDP at 1 Gbit/s and 100 ms.
pub const MAX_UNACKNOWLEDGED: usize = 1 << 16;

/// Version of the frame layout, negotiated in the hello as part of [`super::hello::VERSION`].
pub const FRAME_VERSION: u8 = 1;

const MAGIC: u8 = 0x4c;
const FLAG_LAST: u8 = 1;
const FLAG_HELD: u8 = 2;

/// How a payload stands for stream bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// The bytes themselves.
    Plain = 1,
    /// A batch of the reduction (`proto::reduce`).
    Reduced = 2,
    /// Parity over other frames' lanes ([`super::repair`]): stands for no stream bytes, and its sequence is the first one covered.
    /// Since version 2.
    Repair = 3,
}

/// What a frame says about its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Kind of payload.
    pub kind: FrameKind,
    /// No frame with a higher sequence exists: the vmm stream ends here.
    pub last: bool,
    /// The vmm stream has reached the device state: from here on nothing is given to the destination's vmm before
    /// ownership has moved.
    pub held: bool,
    /// Migration that the frame belongs to.
    pub migration: MigrationId,
    /// Incarnation of the session; frames of an older one are refused.
    pub epoch: u32,
    /// Place among the frames of the migration, from 0, without gap.
    pub sequence: u64,
    /// Offset in the vmm stream of the first byte that the payload restores to.
    pub stream_offset: u64,
    /// How many stream bytes the payload restores to.
    pub stream_bytes: u32,
}

/// A header and its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The header.
    pub header: FrameHeader,
    /// The payload, at most [`MAX_PAYLOAD`] bytes.
    pub payload: Bytes,
}

impl Frame {
    /// The header's bytes; a lane is these and then the payload.
    ///
    /// # Panics
    /// Where the payload or the stream bytes exceed their limit, which the encoder of this process prevents.
    #[must_use]
    pub fn encode_header(&self) -> Bytes {
        let header = &self.header;
        assert!(
            self.payload.len() <= MAX_PAYLOAD,
            "a payload is cut before it is framed"
        );
        assert!(
            header.stream_bytes as usize <= MAX_RAW,
            "a batch is cut before it is framed"
        );
        let mut out = BytesMut::with_capacity(HEADER_LEN);
        out.put_u8(MAGIC);
        out.put_u8(FRAME_VERSION);
        out.put_u8(header.kind as u8);
        out.put_u8(u8::from(header.last) * FLAG_LAST + u8::from(header.held) * FLAG_HELD);
        out.put_u32_le(u32::try_from(self.payload.len()).expect("MAX_PAYLOAD fits"));
        out.put_slice(&header.migration.0);
        out.put_u32_le(header.epoch);
        out.put_u32_le(header.stream_bytes);
        out.put_u64_le(header.sequence);
        out.put_u64_le(header.stream_offset);
        out.freeze()
    }

    /// Bytes of the lane that carries this frame.
    #[must_use]
    pub fn lane_bytes(&self) -> u64 {
        (HEADER_LEN + self.payload.len()) as u64
    }

    /// Reads a whole lane.
    ///
    /// # Errors
    /// [`FrameError`] where the bytes are not exactly one frame within the limits.
    pub fn decode(mut lane: Bytes) -> Result<Self, FrameError> {
        let Some(front) = lane.first_chunk() else {
            return Err(FrameError::Short { len: lane.len() });
        };
        let (header, payload_len) = FrameHeader::decode(front)?;
        lane.advance(HEADER_LEN);
        if payload_len != lane.len() {
            return Err(FrameError::WrongLength {
                stated: payload_len,
                found: lane.len(),
            });
        }
        Ok(Self { header, payload: lane })
    }
}

impl FrameHeader {
    /// Reads the front of a lane: the header, and how many bytes of payload follow.
    ///
    /// # Errors
    /// [`FrameError`] where it is not the header of a frame within the limits.
    pub fn decode(front: &[u8; HEADER_LEN]) -> Result<(Self, usize), FrameError> {
        let mut front = &front[..];
        let magic = front.get_u8();
        let version = front.get_u8();
        if magic != MAGIC || version != FRAME_VERSION {
            return Err(FrameError::NotAFrame { magic, version });
        }
        let kind = match front.get_u8() {
            1 => FrameKind::Plain,
            2 => FrameKind::Reduced,
            3 => FrameKind::Repair,
            kind => return Err(FrameError::UnknownKind { kind }),
        };
        let flags = front.get_u8();
        if flags & !(FLAG_LAST | FLAG_HELD) != 0 {
            return Err(FrameError::UnknownFlags { flags });
        }
        let payload_len = front.get_u32_le() as usize;
        let mut migration = [0; 16];
        front.copy_to_slice(&mut migration);
        let epoch = front.get_u32_le();
        let stream_bytes = front.get_u32_le();
        let sequence = front.get_u64_le();
        let stream_offset = front.get_u64_le();
        if payload_len > MAX_PAYLOAD || stream_bytes as usize > MAX_RAW {
            return Err(FrameError::TooLarge {
                payload_len,
                stream_bytes,
            });
        }
        let lengths_fit = match kind {
            FrameKind::Plain => stream_bytes as usize == payload_len,
            FrameKind::Repair => stream_bytes == 0,
            FrameKind::Reduced => true,
        };
        if !lengths_fit {
            return Err(FrameError::WrongLength {
                stated: stream_bytes as usize,
                found: payload_len,
            });
        }
        if sequence > MAX_POSITION || stream_offset > MAX_POSITION {
            return Err(FrameError::BeyondTheStream {
                sequence,
                stream_offset,
            });
        }
        let header = Self {
            kind,
            last: flags & FLAG_LAST != 0,
            held: flags & FLAG_HELD != 0,
            migration: MigrationId(migration),
            epoch,
            sequence,
            stream_offset,
            stream_bytes,
        };
        Ok((header, payload_len))
    }
}

/// A lane does not hold a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than a header.
    #[error("a lane of {len} bytes is too short for a frame")]
    Short {
        /// Bytes in the lane.
        len: usize,
    },
    /// Another protocol, or another version of this one.
    #[error("a lane begins with {magic:#04x} {version:#04x}, which is not a frame of this version")]
    NotAFrame {
        /// First byte.
        magic: u8,
        /// Second byte.
        version: u8,
    },
    /// A kind that this version does not have.
    #[error("frame kind {kind} is unknown")]
    UnknownKind {
        /// The number found.
        kind: u8,
    },
    /// A flag that this version does not have.
    #[error("frame flags {flags:#04x} are unknown")]
    UnknownFlags {
        /// The flags found.
        flags: u8,
    },
    /// More than the limits allow.
    #[error("a frame of {payload_len} payload bytes for {stream_bytes} stream bytes is over the limit")]
    TooLarge {
        /// Payload bytes stated.
        payload_len: usize,
        /// Stream bytes stated.
        stream_bytes: u32,
    },
    /// The lane is longer or shorter than its header says.
    #[error("a frame states {stated} bytes and has {found}")]
    WrongLength {
        /// Bytes stated.
        stated: usize,
        /// Bytes found.
        found: usize,
    },
    /// The sequence or the offset cannot exist.
    #[error("frame {sequence} at stream offset {stream_offset} lies beyond any stream")]
    BeyondTheStream {
        /// Sequence stated.
        sequence: u64,
        /// Offset stated.
        stream_offset: u64,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(frame: &Frame) -> Bytes {
        [frame.encode_header(), frame.payload.clone()].concat().into()
    }

    fn frame() -> Frame {
        Frame {
            header: FrameHeader {
                kind: FrameKind::Plain,
                last: true,
                held: false,
                migration: MigrationId([0xab; 16]),
                epoch: 3,
                sequence: 0x0102_0304_0506_0708,
                stream_offset: 9,
                stream_bytes: 3,
            },
            payload: Bytes::from_static(b"abc"),
        }
    }

    #[test]
    fn a_frame_has_these_bytes_and_no_others() {
        let expected = concat!(
            "4c010101",
            "03000000",
            "abababababababababababababababab",
            "03000000",
            "03000000",
            "0807060504030201",
            "0900000000000000",
            "616263"
        );
        assert_eq!(crate::proto::page::hex(&encode(&frame())), expected);
        assert_eq!(Frame::decode(encode(&frame())), Ok(frame()));
    }

    #[test]
    fn a_frame_with_one_byte_less_or_more_is_refused() {
        let whole = encode(&frame());
        for len in 0..whole.len() {
            assert!(Frame::decode(whole.slice(..len)).is_err(), "{len}");
        }
        let longer = [whole.as_ref(), b"x"].concat();
        assert_eq!(
            Frame::decode(longer.into()),
            Err(FrameError::WrongLength { stated: 3, found: 4 })
        );
    }

    #[test]
    fn positions_at_the_limit_are_taken_and_beyond_are_refused() {
        let at = |sequence, stream_offset| {
            let mut frame = frame();
            (frame.header.sequence, frame.header.stream_offset) = (sequence, stream_offset);
            Frame::decode(encode(&frame)).map(drop)
        };
        assert_eq!(at(MAX_POSITION, MAX_POSITION), Ok(()));
        for (sequence, stream_offset) in [(MAX_POSITION + 1, 0), (0, MAX_POSITION + 1), (u64::MAX, u64::MAX)] {
            assert_eq!(
                at(sequence, stream_offset),
                Err(FrameError::BeyondTheStream {
                    sequence,
                    stream_offset
                })
            );
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_what_decodes_encodes_to_the_same(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            header in proptest::bool::ANY,
        ) {
            let mut bytes = bytes;
            if header && bytes.len() > 2 {
                bytes[0] = MAGIC;
                bytes[1] = FRAME_VERSION;
            }
            let bytes = Bytes::from(bytes);
            if let Ok(frame) = Frame::decode(bytes.clone()) {
                prop_assert_eq!(encode(&frame), bytes);
            }
        }
    }
}
