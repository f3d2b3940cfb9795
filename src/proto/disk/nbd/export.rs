//! What haggling ended with: an export, and how it is spoken about.

use super::MAX_PAYLOAD;
use super::breach::Breach;
use super::numbers;

/// An export that is ready for requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its size.
    pub size_bytes: u64,
    /// What the server can do with it.
    pub flags: TransmissionFlags,
    /// What requests must be aligned to, and how much one may be.
    pub block_sizes: BlockSizes,
    /// The form of requests and replies.
    pub headers: Headers,
}

/// Section *Transmission flags*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransmissionFlags(pub(super) u16);

/// Section *Block sizes*; bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// What offsets and lengths are multiples of; a power of two.
    pub minimum: u32,
    /// What is efficient; a power of two.
    pub preferred: u32,
    /// Most that a read or a write may have.
    pub maximum: u32,
}

/// The form of requests and replies, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Headers {
    /// Only simple replies: no block status, no holes, no texts.
    Simple,
    /// Replies in chunks (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// Replies in chunks, 64-bit lengths (`NBD_OPT_EXTENDED_HEADERS`; QEMU 8.2 and newer).
    Extended,
}

impl TransmissionFlags {
    /// Writes are refused.
    pub fn is_read_only(self) -> bool {
        self.has(numbers::READ_ONLY)
    }

    /// Flush is there.
    pub fn can_flush(self) -> bool {
        self.has(numbers::SEND_FLUSH)
    }

    /// Trim is there.
    pub fn can_trim(self) -> bool {
        self.has(numbers::SEND_TRIM)
    }

    /// Zeroes can be written without sending them.
    pub fn can_write_zeroes(self) -> bool {
        self.has(numbers::SEND_WRITE_ZEROES)
    }

    /// Zeroes can be refused where they would be slow.
    pub fn can_zero_fast(self) -> bool {
        self.can_write_zeroes() && self.has(numbers::SEND_FAST_ZERO)
    }

    /// A read can be asked for in one piece.
    pub fn can_read_whole(self) -> bool {
        self.has(numbers::SEND_DF)
    }

    fn has(self, flag: u16) -> bool {
        self.0 & flag != 0
    }
}

impl BlockSizes {
    /// What a client assumes of a server that says nothing.
    pub(super) const UNSAID: Self = Self {
        minimum: 512,
        preferred: 4096,
        maximum: MAX_PAYLOAD,
    };

    /// As a server states them. The maximum is lowered to [`MAX_PAYLOAD`].
    pub(super) fn stated(minimum: u32, preferred: u32, maximum: u32) -> Result<Self, Breach> {
        let is_sound = minimum.is_power_of_two()
            && minimum <= MAX_MINIMUM
            && preferred.is_power_of_two()
            && preferred >= minimum
            && maximum >= minimum
            && (maximum == u32::MAX || maximum.is_multiple_of(minimum));
        if !is_sound {
            return Err(Breach::BlockSizes {
                minimum,
                preferred,
                maximum,
            });
        }
        Ok(Self {
            minimum,
            preferred,
            maximum: maximum.min(MAX_PAYLOAD),
        })
    }
}

/// Largest minimum that the section allows.
const MAX_MINIMUM: u32 = 1 << 16;
