//! A group of literals: coded together, so that the codec sees what pages have in common.
//!
//! ```text
//! u8 codec      0 stored, 1 lz4 block; 2 is kept for zstd
//! varint n      coded length; absent where stored
//! coded[n]
//! ```
//!
//! The length of the content is not in it: all groups of a payload but the last are full.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use super::varint;

/// Bytes of content in a full group.
///
/// lz4 finds matches up to 64 KiB back, and grouping pages gains only about 6 % over single ones; what is left to gain is for
/// stronger codecs, which still gain at this size.
pub(super) const GROUP_BYTES: usize = 128 * 1024;

const CODEC_STORED: u8 = 0;
const CODEC_LZ4: u8 = 1;

/// How a group is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Stored,
    Lz4,
}

/// Whether coding `len` bytes into `coded` pays for undoing it: a gain of at least 6 %.
fn pays(len: usize, coded: usize) -> bool {
    coded <= len - len * 6 / 100
}

/// Codes groups, with the scratch memory it needs.
pub(super) struct Encoder {
    table: CompressTable,
    coded: Vec<u8>,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self {
            table: CompressTable::large(),
            coded: vec![0; get_maximum_output_size(GROUP_BYTES)],
        }
    }

    /// Appends `content` (at most [`GROUP_BYTES`]) to `out`, compressed where that pays.
    pub(super) fn encode(&mut self, content: &[u8], out: &mut Vec<u8>) -> Codec {
        let len = self.compress(content);
        if pays(content.len(), len) {
            out.push(CODEC_LZ4);
            varint::write(len as u64, out);
            out.extend_from_slice(&self.coded[..len]);
            Codec::Lz4
        } else {
            out.push(CODEC_STORED);
            out.extend_from_slice(content);
            Codec::Stored
        }
    }

    /// Whether compressing `content` (at most [`GROUP_BYTES`]) pays.
    pub(super) fn would_pay(&mut self, content: &[u8]) -> bool {
        let len = self.compress(content);
        pays(content.len(), len)
    }

    fn compress(&mut self, content: &[u8]) -> usize {
        compress_into_with_table(content, &mut self.coded, &mut self.table)
            .expect("the buffer has the codec's largest output for a full group")
    }
}

/// What is wrong with a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum GroupError {
    #[error("it ends too soon")]
    Truncated,
    #[error("it names codec {0}, which this version does not have")]
    UnknownCodec(u8),
    #[error("it does not decompress to its length")]
    Damaged,
}

/// Takes one group off the front of `bytes`; its content fills `content` exactly.
pub(super) fn decode(bytes: &mut &[u8], content: &mut [u8]) -> Result<Codec, GroupError> {
    let codec = *bytes.split_off_first().ok_or(GroupError::Truncated)?;
    match codec {
        CODEC_STORED => {
            let stored = bytes.split_off(..content.len()).ok_or(GroupError::Truncated)?;
            content.copy_from_slice(stored);
            Ok(Codec::Stored)
        }
        CODEC_LZ4 => {
            let len = varint::read(bytes)
                .and_then(|len| usize::try_from(len).ok())
                .ok_or(GroupError::Truncated)?;
            let coded = bytes.split_off(..len).ok_or(GroupError::Truncated)?;
            match decompress_into(coded, content) {
                Ok(len) if len == content.len() => Ok(Codec::Lz4),
                _ => Err(GroupError::Damaged),
            }
        }
        other => Err(GroupError::UnknownCodec(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn a_group_survives_and_shrinks_only_where_that_pays() {
        let text: Vec<u8> = b"a line of text that repeats\n"
            .iter()
            .copied()
            .cycle()
            .take(GROUP_BYTES)
            .collect();
        for (content, codec) in [
            (text, Codec::Lz4),
            (noise(GROUP_BYTES), Codec::Stored),
            (noise(1), Codec::Stored),
        ] {
            let mut coded = Vec::new();
            assert_eq!(Encoder::new().encode(&content, &mut coded), codec);
            assert!(coded.len() <= content.len() + 1);
            let mut restored = vec![0; content.len()];
            let mut rest = coded.as_slice();
            assert_eq!(decode(&mut rest, &mut restored), Ok(codec));
            assert!(rest.is_empty());
            assert_eq!(restored, content);
        }
    }

    #[test]
    fn a_gain_of_six_per_cent_pays_and_less_does_not() {
        assert!(pays(1000, 940));
        assert!(!pays(1000, 941));
    }

    #[test]
    fn a_group_of_another_length_or_an_unknown_codec_is_refused() {
        let mut coded = Vec::new();
        Encoder::new().encode(&[7; 1000], &mut coded);
        for len in [0, 999, 1001] {
            assert_eq!(
                decode(&mut coded.as_slice(), &mut vec![0; len]),
                Err(GroupError::Damaged),
                "{len}"
            );
        }
        for len in 0..coded.len() {
            assert_eq!(
                decode(&mut &coded[..len], &mut [0; 1000]),
                Err(GroupError::Truncated),
                "{len}"
            );
        }
        assert_eq!(
            decode(&mut [2, 0].as_slice(), &mut [0; 1]),
            Err(GroupError::UnknownCodec(2))
        );
    }
}
