//! The pages: what each of them must hold, how it is rewritten, and whether it is what it must be.
//!
//! What a page holds is drawn from its number and the seed, so that the shares are spread evenly over the working set:
//!
//! | content | words 0, 1, 2 | the others | rewritten |
//! |---|---|---|---|
//! | random | number, version, checksum | random words | yes |
//! | text | number, version, checksum | words of text | yes |
//! | zero | 0, 0, 0 | 0 | no |
//! | duplicated | number of the original, 0, checksum | words of text | no |
//!
//! Pages that are zero or duplicated are never rewritten: so their shares stay what the dials say for as long as the guest runs,
//! and what they must hold is known to the byte. All rewrites go to the others.

use crate::Dials;
use crate::content::{PADDING, Random, Vocabulary, mix};

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u64; PAGE_WORDS]);

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Random,
    Text,
    Zero,
    Duplicated,
}

/// The pages, what each of them must be, and the words that text is made of.
pub(crate) struct WorkingSet {
    pub(crate) dials: Dials,
    pages: Vec<Page>,
    versions: Vec<u32>,
    /// What word 0 of each page must say.
    names: Vec<u32>,
    /// Numbers of the pages that are rewritten.
    rewritable: Vec<u32>,
    /// Checksums of the contents that several pages hold.
    originals: Vec<u64>,
    vocabulary: Vocabulary,
    random: Random,
}

impl WorkingSet {
    pub(crate) fn filled(dials: Dials) -> Self {
        let mut random = Random(dials.seed);
        let vocabulary = Vocabulary::new(&mut random);
        let pages = vec![Page([0; PAGE_WORDS]); dials.pages()];
        let versions = vec![0; pages.len()];
        let names = vec![0; pages.len()];
        let mut set = Self {
            dials,
            pages,
            versions,
            names,
            rewritable: Vec::new(),
            originals: Vec::new(),
            vocabulary,
            random,
        };
        let numbers = 0..set.pages.len();
        let (mut duplicated, mut rewritable) = (Vec::new(), Vec::new());
        for number in numbers {
            match set.content(number) {
                Content::Zero => {}
                Content::Duplicated => duplicated.push(number),
                Content::Random | Content::Text => {
                    set.fill(number, number);
                    rewritable.push(number as u32);
                }
            }
        }
        set.rewritable = rewritable;
        set.duplicate(&duplicated);
        set
    }

    /// Fills the pages in rounds: one round holds every original once, so that copies are far apart.
    fn duplicate(&mut self, pages: &[usize]) {
        let originals = pages.len().div_ceil(COPIES);
        for (place, number) in pages.iter().enumerate() {
            let original = place % originals;
            if place < originals {
                self.fill(*number, original);
                self.originals.push(self.pages[*number].0[CHECKSUM]);
            } else {
                self.pages[*number] = self.pages[pages[original]].clone();
                self.names[*number] = original as u32;
            }
        }
    }

    /// Fills a page for the first time. `name` is what its word for the number says.
    fn fill(&mut self, number: usize, name: usize) {
        let mut content = [0; PAGE_WORDS - CONTENT];
        self.compose(number, &mut content);
        let page = &mut self.pages[number].0;
        page[NUMBER] = name as u64;
        self.names[number] = name as u32;
        page[CONTENT..].copy_from_slice(&content);
        page[CHECKSUM] = checksum(page);
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// What belongs into page `number`.
    fn content(&self, number: usize) -> Content {
        let draw = mix(number as u64 ^ self.dials.seed) % 100;
        let random = self.dials.incompressible_percent;
        let zero = random + self.dials.zero_percent;
        let duplicated = zero + self.dials.duplicated_percent;
        match draw {
            _ if draw < random => Content::Random,
            _ if draw < zero => Content::Zero,
            _ if draw < duplicated => Content::Duplicated,
            _ => Content::Text,
        }
    }

    /// Fills `content` with what belongs into page `number`.
    fn compose(&mut self, number: usize, content: &mut [u64]) {
        if self.content(number) == Content::Random {
            content.fill_with(|| self.random.next());
            return;
        }
        let mut text = [0; PAGE_BYTES + PADDING];
        let length = content.len() * 8;
        self.vocabulary.write(&mut self.random, &mut text[..length + PADDING]);
        for (word, bytes) in content.iter_mut().zip(text.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes"));
        }
    }

    /// Changes a run of words, the version and the checksum of one page, and nothing else of it. False where no page may be
    /// rewritten.
    pub(crate) fn rewrite(&mut self) -> bool {
        let pages = self.rewritable.len() as u64;
        if pages == 0 {
            return false;
        }
        let hot = (pages * self.dials.hot_pages_percent / 100).max(1);
        let is_hot = self.random.below(100) < self.dials.hot_writes_percent;
        let place = self.random.below(if is_hot { hot } else { pages });
        let number = self.rewritable[place as usize] as usize;
        let words = self.dials.words_per_rewrite();
        let first = CONTENT + self.random.below((PAGE_WORDS - CONTENT - words + 1) as u64) as usize;
        let mut fresh = [0; PAGE_WORDS - CONTENT];
        self.compose(number, &mut fresh[..words]);

        self.versions[number] = self.versions[number].wrapping_add(1);
        let page = &mut self.pages[number].0;
        let version = u64::from(self.versions[number]);
        let mut sum = page[CHECKSUM];
        for (place, word) in (first..).zip(&fresh[..words]).chain([(VERSION, &version)]) {
            sum = sum
                .wrapping_sub(weight(place, page[place]))
                .wrapping_add(weight(place, *word));
            page[place] = *word;
        }
        page[CHECKSUM] = sum;
        true
    }

    pub(crate) fn is_intact(&self, number: usize) -> bool {
        let page = &self.pages[number].0;
        let is_whole = page[NUMBER] == u64::from(self.names[number])
            && page[VERSION] == u64::from(self.versions[number])
            && page[CHECKSUM] == checksum(page);
        match self.content(number) {
            Content::Zero => page.iter().all(|word| *word == 0),
            // The page of its own that has the number of the original carries a right checksum too.
            Content::Duplicated => is_whole && page[CHECKSUM] == self.originals[self.names[number] as usize],
            Content::Random | Content::Text => is_whole,
        }
    }

    /// What a page is and should be, for a person.
    pub(crate) fn describe(&self, number: usize) -> String {
        let page = &self.pages[number].0;
        format!(
            "number {} (must be {}) version {} (must be {}) checksum {:016x} (must be {:016x})",
            page[NUMBER],
            self.names[number],
            page[VERSION],
            self.versions[number],
            page[CHECKSUM],
            checksum(page)
        )
    }

    /// Rewrites so far, according to the table of versions.
    pub(crate) fn versions_total(&self) -> u64 {
        self.versions.iter().map(|version| u64::from(*version)).sum()
    }
}

/// What one word adds to its page's checksum. It depends on the place, and a word that changes always changes it.
fn weight(place: usize, word: u64) -> u64 {
    let keyed = word ^ (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (keyed ^ keyed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

fn checksum(page: &[u64; PAGE_WORDS]) -> u64 {
    let head = weight(NUMBER, page[NUMBER]).wrapping_add(weight(VERSION, page[VERSION]));
    page.iter()
        .enumerate()
        .skip(CONTENT)
        .fold(head, |sum, (place, word)| sum.wrapping_add(weight(place, *word)))
}

pub(crate) const PAGE_BYTES: usize = 4096;
pub(crate) const PAGE_WORDS: usize = PAGE_BYTES / 8;
const NUMBER: usize = 0;
const VERSION: usize = 1;
const CHECKSUM: usize = 2;
pub(crate) const CONTENT: usize = 3;
/// Pages that hold the same, among the duplicated ones.
const COPIES: usize = 8;
