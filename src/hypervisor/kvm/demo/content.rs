//! What is in a page of the working set: what it began as, and over that the words of its generation.

use super::dials::{Content, Dials};
use crate::proto::page::PAGE_SIZE;

/// An odd number: to multiply by it maps no two words to the same one.
pub(super) const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
/// What one word of a page is more than the one before.
pub(super) const STEP: u64 = 0xd1b5_4a32_d192_ed03;

impl Dials {
    /// Page `page` of the working set after it was written `generation` times.
    pub(super) fn content_of(&self, page: u64, generation: u32) -> [u8; PAGE_SIZE] {
        let mut content = [0; PAGE_SIZE];
        let is_random = source(!self.seed, page) >> 32 & 0xffff < self.random_percent * 0x1_0000 / 100;
        match self.content {
            Content::Text if is_random => fill_with_random(&mut content, source(self.seed, page)),
            Content::Zero => {}
            Content::Text => fill_with_text(&mut content, source(self.seed, page)),
            Content::Random => fill_with_random(&mut content, source(self.seed, page)),
        }
        if generation > 0 || self.content != Content::Zero {
            for (at, word) in self.words_of(page, generation) {
                content[at..at + 8].copy_from_slice(&word);
            }
        }
        content
    }

    /// The words that generation `generation` writes into page `page`, in this order, and where. The first one is
    /// another for every page and generation, and so is the second and every other: none of them can be mistaken for
    /// that of another page or time.
    pub(super) fn words_of(&self, page: u64, generation: u32) -> impl Iterator<Item = (usize, [u8; 8])> {
        let (words, stride) = (self.words(), self.stride());
        let mixed = (page << 32 | u64::from(generation)) ^ self.seed;
        let mixed = mixed.wrapping_mul(FACTOR);
        let first = mixed ^ mixed >> 32;
        (0..words).map(move |number| {
            let word = first.wrapping_add(STEP.wrapping_mul(number as u64));
            (number * stride, word.to_le_bytes())
        })
    }
}

/// Where the random numbers of something begin; never 0.
pub(super) fn source(seed: u64, number: u64) -> u64 {
    let mixed = (seed ^ number.rotate_left(32)).wrapping_add(1).wrapping_mul(FACTOR);
    (mixed ^ mixed >> 29) | 1
}

fn fill_with_random(content: &mut [u8; PAGE_SIZE], mut state: u64) {
    for word in content.chunks_exact_mut(8) {
        word.copy_from_slice(&draw(&mut state).to_le_bytes());
    }
}

fn fill_with_text(content: &mut [u8; PAGE_SIZE], mut state: u64) {
    let mut rest = &mut content[..];
    while !rest.is_empty() {
        let drawn = draw(&mut state) >> 32;
        let word = WORDS[drawn as usize % WORDS.len()].as_bytes();
        let len = word.len().min(rest.len());
        let (here, after) = rest.split_at_mut(len);
        here.copy_from_slice(&word[..len]);
        rest = after;
    }
}

/// Xorshift, as the guest has it.
fn draw(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

const WORDS: [&str; 32] = [
    "the ", "of ", "and ", "a ", "ship ", "harbour ", "in ", "to ", "wind ", "was ", "cargo ", "it ", "over ", "long ",
    "sea, ", "night. ", "captain ", "with ", "from ", "north ", "they ", "island ", "had ", "crew ", "sailed ",
    "dawn, ", "course ", "for ", "lantern ", "rope ", "tide.\n", "at ",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_and_pages_differ_in_every_word() {
        let dials = Dials {
            bytes_per_page: 4096,
            ..Dials::default()
        };
        let one: Vec<_> = dials.words_of(7, 3).collect();
        for (page, generation) in [(7, 2), (7, 4), (6, 3), (3, 7), (0, 3)] {
            let other = dials.words_of(page, generation);
            assert!(one.iter().zip(other).all(|(one, other)| *one != other));
        }
    }

    #[test]
    fn words_are_spread_over_the_page_and_stay_inside() {
        for (bytes, words, last) in [(8, 1, 0), (15, 1, 0), (64, 8, 3584), (100, 12, 3696), (4096, 512, 4088)] {
            let dials = Dials {
                bytes_per_page: bytes,
                ..Dials::default()
            };
            let places: Vec<_> = dials.words_of(1, 1).map(|(at, _)| at).collect();
            assert_eq!((places.len(), places.last().copied()), (words, Some(last)), "{bytes}");
        }
    }

    #[test]
    fn kinds_of_content_are_what_they_are_called() {
        let page = |content| {
            let dials = Dials {
                content,
                ..Dials::default()
            };
            dials.content_of(5, 0)
        };
        assert_eq!(page(Content::Zero), [0; PAGE_SIZE]);
        let letters = page(Content::Text).iter().filter(|byte| byte.is_ascii()).count();
        assert!(letters > PAGE_SIZE - 64);
        let mut seen = [0; 256];
        page(Content::Random)
            .iter()
            .for_each(|&byte| seen[usize::from(byte)] += 1);
        assert!(seen.iter().all(|&times| times < 64));
    }
}
