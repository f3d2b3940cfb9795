//! Sets of pages, by block.

use super::memory::Block;

/// Pages in a word of a map.
pub(super) const WORD_PAGES: u64 = 64;

/// A bit for each page of every block.
#[derive(Clone, Debug)]
pub(super) struct PageMap {
    blocks: Vec<Bits>,
    count: u64,
}

#[derive(Clone, Debug)]
struct Bits {
    words: Vec<u64>,
    pages: u64,
}

impl PageMap {
    /// None.
    pub(super) fn empty(blocks: &[Block]) -> Self {
        let bits = |block: &Block| Bits {
            words: vec![0; block.pages().div_ceil(WORD_PAGES) as usize],
            pages: block.pages(),
        };
        Self {
            blocks: blocks.iter().map(bits).collect(),
            count: 0,
        }
    }

    /// All.
    pub(super) fn full(blocks: &[Block]) -> Self {
        let mut map = Self::empty(blocks);
        for block in 0..map.blocks.len() {
            let all = vec![u64::MAX; map.blocks[block].words.len()];
            map.add(block, &all);
        }
        map
    }

    /// How many are in it.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Adds those whose bits are set, from the block's first page on. What is beyond the block is left out.
    pub(super) fn add(&mut self, block: usize, bits: &[u64]) {
        for (word, bits) in bits.iter().take(self.words(block)).enumerate() {
            self.add_word(block, word, *bits);
        }
    }

    /// Adds those of 64 pages whose bits are set.
    pub(super) fn add_word(&mut self, block: usize, word: usize, bits: u64) {
        let Bits { words, pages } = &mut self.blocks[block];
        let left = *pages - word as u64 * WORD_PAGES;
        let inside = if left < WORD_PAGES { (1 << left) - 1 } else { u64::MAX };
        let bits = bits & inside;
        self.count += u64::from((bits & !words[word]).count_ones());
        words[word] |= bits;
    }

    /// Adds the pages that `len` bytes from `offset` on touch.
    pub(super) fn add_bytes(&mut self, block: usize, offset: u64, len: u64) {
        let page = crate::proto::page::PAGE_SIZE as u64;
        let Bits { words, pages } = &mut self.blocks[block];
        let end = offset.saturating_add(len).div_ceil(page).min(*pages);
        for page in offset / page..end {
            let word = &mut words[(page / WORD_PAGES) as usize];
            let bit = 1 << (page % WORD_PAGES);
            self.count += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// Words of a block.
    pub(super) fn words(&self, block: usize) -> usize {
        self.blocks[block].words.len()
    }

    /// The bits of one word.
    pub(super) fn word(&self, block: usize, word: usize) -> u64 {
        self.blocks[block].words[word]
    }

    /// The bits of so many words from `word` on, or of those that there are.
    pub(super) fn span(&self, block: usize, word: usize, words: usize) -> &[u64] {
        let all = &self.blocks[block].words;
        &all[word..all.len().min(word + words)]
    }

    /// Takes these out.
    pub(super) fn remove(&mut self, block: usize, word: usize, bits: u64) {
        let place = &mut self.blocks[block].words[word];
        self.count -= u64::from((*place & bits).count_ones());
        *place &= !bits;
    }
}

/// Numbers of the bits that are set, from the lowest on.
pub(super) fn set_bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| u64::from(word.trailing_zeros()))?;
        word &= word - 1;
        Some(bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(pages: &[u64]) -> Vec<Block> {
        let block = |(number, pages): (usize, &u64)| Block {
            name: format!("ram{number}"),
            slot: number as u32,
            guest_address: (number as u64) << 32,
            len: pages * 4096,
        };
        pages.iter().enumerate().map(block).collect()
    }

    #[test]
    fn a_full_map_has_every_page_and_none_beyond_the_last() {
        let map = PageMap::full(&blocks(&[1, 64, 130]));
        assert_eq!(map.count(), 195);
        assert_eq!((map.word(0, 0), map.word(1, 0), map.word(2, 2)), (1, u64::MAX, 3));
        assert_eq!([0, 1, 2].map(|block| map.words(block)), [1, 1, 3]);
    }

    #[test]
    fn what_is_added_twice_counts_once_and_what_is_removed_can_be_added_again() {
        let mut map = PageMap::empty(&blocks(&[100]));
        map.add(0, &[0b1010, u64::MAX]);
        assert_eq!(map.count(), 2 + 36);
        map.add(0, &[0b1110, 0]);
        assert_eq!(map.count(), 3 + 36);
        map.remove(0, 0, 0b0110);
        assert_eq!((map.count(), map.word(0, 0)), (1 + 36, 0b1000));
        map.add(0, &[0b0010]);
        assert_eq!(map.count(), 2 + 36);
    }

    #[test]
    fn bytes_dirty_every_page_that_they_touch() {
        let mut map = PageMap::empty(&blocks(&[3]));
        map.add_bytes(0, 4095, 2);
        map.add_bytes(0, 4095, 0);
        assert_eq!((map.count(), map.word(0, 0)), (2, 0b011));
        map.add_bytes(0, 8192, u64::MAX);
        assert_eq!((map.count(), map.word(0, 0)), (3, 0b111));
    }

    #[test]
    fn set_bits_come_from_the_lowest_on() {
        assert_eq!(set_bits(0).count(), 0);
        assert_eq!(set_bits(1 << 63 | 0b101).collect::<Vec<_>>(), [0, 2, 63]);
    }
}
