//! How a page is carried, cheapest first.

use crate::proto::page::{PAGE_SIZE, PageAddress, PageDigest};

use super::dictionary::SourceDictionary;

/// How one page record is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// All zeroes.
    Blank,
    /// Identical to what was last sent for this page.
    Same,
    /// The content of this slot.
    Reference(u32),
    /// Not known to the destination. `previous`: the slot that holds the page as it was last sent, or what took its place there.
    New { previous: Option<u32> },
}

/// Finds how to carry the page at `at`, and enters it in the dictionary as the destination will, unless it is new: then that is left to do.
pub(super) fn classify(
    dictionary: &mut SourceDictionary,
    at: PageAddress,
    content: &[u8; PAGE_SIZE],
    digest: PageDigest,
) -> Class {
    if is_zero(content) {
        dictionary.sent.zero(at);
        Class::Blank
    } else if dictionary.is_same(at, digest) {
        dictionary.sent.same(at);
        Class::Same
    } else if let Some(slot) = dictionary.find(digest) {
        dictionary.sent.set(at, slot);
        Class::Reference(slot)
    } else {
        Class::New {
            previous: dictionary.sent.slot(at),
        }
    }
}

/// Whether all bytes are zero. Most pages that are not show it in their first line.
fn is_zero(content: &[u8; PAGE_SIZE]) -> bool {
    let (blocks, _) = content.as_chunks::<128>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |bits, byte| bits | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::reduce::DictionaryLimits;

    #[test]
    fn one_bit_anywhere_makes_a_page_not_zero() {
        assert!(is_zero(&[0; PAGE_SIZE]));
        for offset in 0..PAGE_SIZE {
            let mut content = [0; PAGE_SIZE];
            content[offset] = 0x80;
            assert!(!is_zero(&content), "{offset}");
        }
    }

    #[test]
    fn the_cheapest_way_that_is_right_is_taken() {
        let mut dictionary = SourceDictionary::new(DictionaryLimits::new(8, 8).unwrap(), 8);
        let mut class_of = |page, fill: u8| {
            let content = [fill; PAGE_SIZE];
            let (at, digest) = (PageAddress { block: 0, page }, PageDigest::of(&content));
            let class = classify(&mut dictionary, at, &content, digest);
            if let Class::New { previous } = class {
                dictionary.insert(at, digest, previous, &content);
            }
            class
        };
        let new = |previous| Class::New { previous };
        assert_eq!(class_of(0, 0), Class::Blank);
        assert_eq!(class_of(0, 1), new(None));
        assert_eq!(class_of(0, 1), Class::Same);
        assert_eq!(class_of(1, 1), Class::Reference(0));
        assert_eq!(class_of(1, 1), Class::Same);
        assert_eq!(class_of(0, 2), new(Some(0)));
        assert_eq!(class_of(1, 2), Class::Reference(1));
        // A page that was blank in between is still known as it was before.
        assert_eq!(class_of(1, 0), Class::Blank);
        assert_eq!(class_of(1, 2), Class::Same);
    }
}
