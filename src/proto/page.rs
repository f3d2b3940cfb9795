//! The nouns that every stage shares: pages and where they live, digests, ids and byte rates.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes in a guest page. The QEMU stream uses the target page, 4 KiB on x86 (`TARGET_PAGE_SIZE`).
pub const PAGE_SIZE: usize = 4096;

/// Where a page lives in the guest: a RAM block, numbered in the order in which the vmm stream listed the blocks, and the
/// index of the page within the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageAddress {
    /// Number of the RAM block in the order of the stream's block list.
    pub block: u16,
    /// Byte offset in the block divided by [`PAGE_SIZE`].
    pub page: u64,
}

/// Names the content of one page: the first 16 bytes of its BLAKE3 hash.
///
/// 128 bits collide by accident with probability 2^-65 at 2^32 pages (16 TiB).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageDigest(pub [u8; 16]);

impl PageDigest {
    /// The digest of `content`.
    #[must_use]
    pub fn of(content: &[u8]) -> Self {
        let mut digest = [0; 16];
        digest.copy_from_slice(&blake3::hash(content).as_bytes()[..16]);
        Self(digest)
    }
}

impl fmt::Debug for PageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex(&self.0))
    }
}

/// BLAKE3 of a whole vmm stream, from its first byte to its last.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StreamDigest(pub [u8; 32]);

impl fmt::Display for StreamDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for StreamDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// BLAKE3 of what is known of a VM's memory, as one migration left it: both sites know the same where it is equal.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDigest(pub [u8; 32]);

impl fmt::Debug for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// Names one migration, for ever and at both ends: 128 random bits, shown as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for MigrationId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Ok(Self(unhex(text)?))
    }
}

/// Names one ownership journal: drawn at random when the journal is created, never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JournalId(pub [u8; 16]);

impl fmt::Display for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for JournalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for JournalId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Ok(Self(unhex(text)?))
    }
}

/// A text is not the name of a migration or a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id has 32 hexadecimal digits")]
pub struct InvalidId;

/// Bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct ByteRate(pub u64);

impl ByteRate {
    /// A rate stated in bits per second, as operators and `tc` state them.
    #[must_use]
    pub const fn from_bits_per_second(bits: u64) -> Self {
        Self(bits / 8)
    }

    /// Bytes that pass in `duration` at this rate. One BDP is `rate.bytes_in(rtt)`: 1 Gbit/s x 150 ms = 18.75 MB.
    #[must_use]
    pub fn bytes_in(self, duration: std::time::Duration) -> u64 {
        u64::try_from(u128::from(self.0) * duration.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// The rate at which `bytes` pass in `duration`; zero where that is no time.
    #[must_use]
    pub fn over(bytes: u64, duration: std::time::Duration) -> Self {
        let nanos = duration.as_nanos().max(1);
        let rate = u128::from(bytes) * 1_000_000_000 / nanos;
        Self(if duration.is_zero() {
            0
        } else {
            u64::try_from(rate).unwrap_or(u64::MAX)
        })
    }

    /// How long `bytes` take at this rate. A rate of zero never gets there: `Duration::MAX`.
    #[must_use]
    pub fn time_for(self, bytes: u64) -> std::time::Duration {
        if self.0 == 0 {
            return std::time::Duration::MAX;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.0);
        std::time::Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Shown in bits per second with the unit that reads best, as `tc` does: `800mbit`.
impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from(self.0) * 8;
        for (unit, size) in [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1_000)] {
            if bits >= size && bits % (size / 1000) == 0 {
                let whole = bits / size;
                let thousandths = bits % size / (size / 1000);
                if thousandths == 0 {
                    return write!(f, "{whole}{unit}");
                }
                let decimals = format!("{thousandths:03}");
                return write!(f, "{whole}.{}{unit}", decimals.trim_end_matches('0'));
            }
        }
        write!(f, "{bits}bit")
    }
}

/// A rate as `tc` writes it: a number with `bit`, `kbit`, `mbit` or `gbit` (powers of 1000). A bare number is refused, since
/// nobody can tell bits from bytes.
impl FromStr for ByteRate {
    type Err = InvalidRate;

    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        let lower = text.trim().to_ascii_lowercase();
        let (number, size) = [
            ("gbit", 1_000_000_000.0),
            ("mbit", 1_000_000.0),
            ("kbit", 1_000.0),
            ("bit", 1.0),
        ]
        .iter()
        .find_map(|(unit, size)| lower.strip_suffix(unit).map(|number| (number.trim(), *size)))
        .ok_or(InvalidRate)?;
        let value: f64 = number.parse().map_err(|_| InvalidRate)?;
        let bytes = value * size / 8.0;
        if !bytes.is_finite() || !(1.0..1e15).contains(&bytes) {
            return Err(InvalidRate);
        }
        Ok(Self(bytes as u64))
    }
}

/// A text is not a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write a rate with its unit, for example 800mbit or 1gbit")]
pub struct InvalidRate;

/// Lower-case hexadecimal digits of `bytes`.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// The bytes that exactly `2 * N` hexadecimal digits stand for.
///
/// # Errors
/// [`InvalidId`] where the text is longer, shorter or has another character.
pub fn unhex<const N: usize>(text: &str) -> Result<[u8; N], InvalidId> {
    if text.len() != 2 * N || !text.is_ascii() {
        return Err(InvalidId);
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let high = char::from(digits[0]).to_digit(16).ok_or(InvalidId)?;
        let low = char::from(digits[1]).to_digit(16).ok_or(InvalidId)?;
        *byte = u8::try_from(high * 16 + low).map_err(|_| InvalidId)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_rate_is_read_as_tc_writes_it_and_shown_the_same_way() {
        for text in ["1gbit", "800mbit", "2.5gbit", "64kbit"] {
            assert_eq!(
                text.parse::<ByteRate>().map(|rate| rate.to_string()),
                Ok(text.to_owned())
            );
        }
        for bad in ["", "800", "mbit", "-1mbit", "nanmbit", "1e99gbit"] {
            assert_eq!(bad.parse::<ByteRate>(), Err(InvalidRate), "{bad}");
        }
    }

    #[test]
    fn a_gigabit_at_150_ms_holds_18_75_megabytes() {
        let rate = ByteRate::from_bits_per_second(1_000_000_000);
        assert_eq!(rate.bytes_in(Duration::from_millis(150)), 18_750_000);
        assert_eq!(rate.time_for(18_750_000), Duration::from_millis(150));
    }

    #[test]
    fn an_id_survives_its_text_and_nothing_else_is_an_id() {
        let id = MigrationId([7; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "07", &"0".repeat(31), &"g".repeat(32), &"é".repeat(16)] {
            assert_eq!(bad.parse::<MigrationId>(), Err(InvalidId));
        }
    }
}
