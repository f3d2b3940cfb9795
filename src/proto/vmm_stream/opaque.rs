//! A stream of which nothing is known, as chunks that its own content ends.
//!
//! A chunk ends where the gear hash of the 64 bytes before has eleven certain bits clear (FastCDC, Xia et al., USENIX ATC 2016), so content that
//! comes again is cut in the same way, wherever in the stream it is: what is inserted or missing before it moves no boundary but the next
//! few. [`MIN_CHUNK`] bytes are passed over first, and [`MAX_CHUNK`] end a chunk in any case: it fits a slot of the dictionary. The mean is 2.6 KiB.
//!
//! A program that waits for an answer must not wait for the end of a chunk: one that is not whole when nothing more has come is carried as
//! bytes, and the next one begins where it would have.

use super::Record;
use crate::proto::page::PAGE_SIZE;

/// No chunk is shorter.
pub const MIN_CHUNK: usize = 1024;

/// No chunk is longer.
pub const MAX_CHUNK: usize = PAGE_SIZE;

/// See the head of this file.
#[derive(Clone, Debug, Default)]
pub struct Chunker {
    /// Bytes of the chunk that are gone already.
    gone: usize,
    hash: u64,
}

impl Chunker {
    /// Appends the records of `bytes`, which are the next ones of the stream. How many they cover: all, or with `more` to come all but a chunk
    /// that is not whole, which is to be given again with what follows.
    pub fn cut(&mut self, bytes: &[u8], more: bool, records: &mut Vec<Record>) -> usize {
        let mut taken = 0;
        while taken < bytes.len() {
            let (len, end) = self.end_in(&bytes[taken..]);
            match end {
                End::Chunk if self.gone == 0 => records.push(Record::Chunk { len }),
                End::Chunk => records.push(Record::Bytes { len }),
                End::None { .. } if more => break,
                End::None { .. } => records.push(Record::Bytes { len }),
            }
            *self = match end {
                End::Chunk => Self::default(),
                End::None { hash } => Self {
                    gone: self.gone + len,
                    hash,
                },
            };
            taken += len;
        }
        taken
    }

    /// How many of `bytes` are of the present chunk, and whether it ends with them.
    fn end_in(&self, bytes: &[u8]) -> (usize, End) {
        let most = bytes.len().min(MAX_CHUNK - self.gone);
        let ignored = (MIN_CHUNK - WINDOW).saturating_sub(self.gone);
        let mut hash = self.hash;
        for (at, &byte) in bytes[..most].iter().enumerate().skip(ignored) {
            hash = (hash << 1).wrapping_add(GEAR[usize::from(byte)]);
            if hash & ENDS == 0 && self.gone + at + 1 >= MIN_CHUNK {
                return (at + 1, End::Chunk);
            }
        }
        if self.gone + most == MAX_CHUNK {
            (most, End::Chunk)
        } else {
            (most, End::None { hash })
        }
    }
}

/// What the bytes that were looked at end with.
#[derive(Clone, Copy, Debug)]
enum End {
    Chunk,
    /// They end before their chunk, with this hash.
    None {
        hash: u64,
    },
}

/// Bytes that the hash depends on: the oldest is shifted out of it.
const WINDOW: usize = 64;

/// High bits depend on all bytes of the window.
const ENDS: u64 = ((1 << 11) - 1) << 53;

/// A number at random for each byte, from splitmix64.
const GEAR: [u64; 256] = {
    let mut gear = [0; 256];
    let mut state = 0_u64;
    let mut at = 0;
    while at < gear.len() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        gear[at] = mixed ^ (mixed >> 31);
        at += 1;
    }
    gear
};

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn noise(len: usize, mut state: u64) -> Vec<u8> {
        let next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    /// What `bytes` are cut into when they come in pieces of this length, and which of it are whole chunks.
    fn cut(bytes: &[u8], piece: usize) -> Vec<(Vec<u8>, bool)> {
        let (mut chunker, mut cut) = (Chunker::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            let (mut records, mut at) = (Vec::new(), 0);
            assert_eq!(chunker.cut(piece, false, &mut records), piece.len());
            for record in records {
                let (len, whole) = match record {
                    Record::Chunk { len } => (len, true),
                    Record::Bytes { len } => (len, false),
                    Record::Page(_) | Record::Zero(_) => unreachable!("a chunker knows no pages"),
                };
                cut.push((piece[at..at + len].to_vec(), whole));
                at += len;
            }
            assert_eq!(at, piece.len());
        }
        cut
    }

    #[test]
    fn a_chunk_that_is_not_whole_waits_for_what_is_about_to_come() {
        let bytes = noise(1 << 20, 5);
        let all = whole(&bytes, bytes.len());
        let (mut chunker, mut records, mut pending) = (Chunker::default(), Vec::new(), Vec::new());
        for piece in bytes.chunks(700) {
            pending.extend_from_slice(piece);
            let taken = chunker.cut(&pending, true, &mut records);
            pending.drain(..taken);
            assert!(pending.len() < MAX_CHUNK);
        }
        let lengths = all.iter().map(|chunk| Record::Chunk { len: chunk.len() });
        assert_eq!(records, lengths.collect::<Vec<_>>());
    }

    fn whole(bytes: &[u8], piece: usize) -> Vec<Vec<u8>> {
        let chunks = cut(bytes, piece).into_iter();
        chunks.filter_map(|(chunk, whole)| whole.then_some(chunk)).collect()
    }

    #[test]
    fn chunks_are_within_their_limits_and_near_their_mean() {
        let bytes = noise(4 << 20, 1);
        let chunks = whole(&bytes, bytes.len());
        assert!(
            chunks
                .iter()
                .all(|chunk| (MIN_CHUNK..=MAX_CHUNK).contains(&chunk.len()))
        );
        let mean = bytes.len() / chunks.len();
        assert!((2500..=2750).contains(&mean), "{mean}");
        let zeroes = whole(&[0; 10 * MAX_CHUNK], 10 * MAX_CHUNK);
        assert!(zeroes.iter().all(|chunk| chunk.len() == zeroes[0].len()));
    }

    #[test]
    fn what_comes_again_is_cut_again_in_the_same_way_wherever_it_is() {
        let bytes = noise(1 << 20, 2);
        let chunks: HashSet<_> = whole(&bytes, bytes.len()).into_iter().collect();
        let shifted = [&noise(777, 3), &bytes[..500_000], b"inserted", &bytes[500_000..]].concat();
        let again = whole(&shifted, shifted.len());
        let found: usize = again.iter().filter(|chunk| chunks.contains(*chunk)).map(Vec::len).sum();
        assert!(found * 100 >= bytes.len() * 97, "{found} of {}", bytes.len());
    }

    #[test]
    fn pieces_lose_only_the_chunks_that_they_cut_through() {
        let bytes = noise(1 << 20, 4);
        let chunks: HashSet<_> = whole(&bytes, bytes.len()).into_iter().collect();
        for piece in [1, 63, 1000, 5000, 100_000] {
            let parts = cut(&bytes, piece);
            let joined: Vec<u8> = parts.iter().flat_map(|(part, _)| part).copied().collect();
            assert_eq!(joined, bytes, "{piece}");
            let whole: Vec<_> = parts.into_iter().filter(|(_, whole)| *whole).collect();
            assert!(whole.iter().all(|(chunk, _)| chunks.contains(chunk)), "{piece}");
            let cut_through = bytes.len() / piece + 1;
            assert!(whole.len() + cut_through >= chunks.len(), "{piece}: {}", whole.len());
        }
    }
}
