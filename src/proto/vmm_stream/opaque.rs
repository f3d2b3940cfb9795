//! The way back out of bytes whose length nobody states: device state, and whatever was not understood.
//!
//! A search looks for the few byte sequences that a known place in the stream must have. A hit is only a candidate: the
//! parser judges what follows it, and marks no page before that was confirmed.

use memchr::memmem;

use super::element;
use super::ram;

/// What is known about where the opaque bytes may end.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Signs {
    /// Id of the section whose body the bytes are: its footer ends them.
    pub(super) open: Option<u32>,
    /// Id of the RAM section while more of it is to come: its next PART or END ends them.
    pub(super) ram: Option<u32>,
    /// RAM has not been seen: its START ends them.
    pub(super) ram_start: bool,
    /// Sections have no footers and RAM is over: only the description at the end is left to find.
    pub(super) description: bool,
}

/// A place that may be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Candidate {
    /// A footer is here, and an element's header behind it.
    Footer,
    /// An element's header is here.
    Header,
}

/// Bytes that a candidate needs behind its start before it is judged, so that the order of candidates does not depend on
/// how the stream was sliced. A search leaves one less for the next.
pub(super) const LOOKAHEAD: usize = RAM_START_BACK + RAM_START.len();

/// The RAM section's name, instance and version, as they stand in START behind the id.
const RAM_START: [u8; 12] = {
    let mut bytes = [0; 12];
    bytes[0] = ram::SECTION_NAME.len() as u8;
    let mut at = 0;
    while at < ram::SECTION_NAME.len() {
        bytes[1 + at] = ram::SECTION_NAME[at];
        at += 1;
    }
    bytes[11] = ram::SECTION_VERSION as u8;
    bytes
};

/// Type byte and id in front of [`RAM_START`].
const RAM_START_BACK: usize = 5;

/// How the JSON of the description starts, and what stands before it: EOF, type byte, length.
const DESCRIPTION_START: &[u8] = b"{\"";
const DESCRIPTION_BACK: usize = 1 + element::DESCRIPTION_LEN;

/// One pass over a slice.
#[derive(Debug)]
pub(super) struct Search<'b> {
    bytes: &'b [u8],
    needles: [Needle; 5],
}

impl<'b> Search<'b> {
    pub(super) fn new(bytes: &'b [u8], signs: Signs) -> Self {
        let id = |kind, id: Option<u32>, candidate| {
            let mut needle = Needle::new(candidate, 0, &[]);
            if let Some(id) = id {
                needle.bytes[0] = kind;
                needle.bytes[1..5].copy_from_slice(&id.to_be_bytes());
                needle.len = 5;
            }
            needle
        };
        let text = |wanted, text: &[u8], back| {
            if wanted { Needle::new(Candidate::Header, back, text) } else { Needle::new(Candidate::Header, 0, &[]) }
        };
        let needles = [
            id(element::FOOTER, signs.open, Candidate::Footer),
            id(element::PART, signs.ram, Candidate::Header),
            id(element::END, signs.ram, Candidate::Header),
            text(signs.ram_start, &RAM_START, RAM_START_BACK),
            text(signs.description, DESCRIPTION_START, DESCRIPTION_BACK),
        ];
        Self { bytes, needles }
    }

    /// The first candidate at `from` or behind it. `from` must not go back: every needle is looked for once in every byte.
    pub(super) fn next(&mut self, from: usize) -> Option<(usize, Candidate)> {
        let bytes = self.bytes;
        let found = self.needles.iter_mut().filter_map(|needle| Some((needle.next(bytes, from)?, needle.candidate)));
        found.min_by_key(|&(at, _)| at)
    }
}

/// A byte sequence to look for.
#[derive(Debug)]
struct Needle {
    candidate: Candidate,
    bytes: [u8; 12],
    /// Bytes of the sequence in use; none where there is nothing to look for.
    len: usize,
    /// How far the sequence is behind the candidate's start.
    back: usize,
    /// Where the candidate is that was found last; `usize::MAX` where there is none any more.
    found: Option<usize>,
}

impl Needle {
    fn new(candidate: Candidate, back: usize, text: &[u8]) -> Self {
        let mut bytes = [0; 12];
        bytes[..text.len()].copy_from_slice(text);
        Self { candidate, bytes, len: text.len(), back, found: None }
    }

    fn next(&mut self, bytes: &[u8], from: usize) -> Option<usize> {
        if self.len == 0 {
            return None;
        }
        let at = match self.found {
            Some(at) if at >= from => at,
            _ => {
                let start = from + self.back;
                let hit = bytes.get(start..).and_then(|rest| memmem::find(rest, &self.bytes[..self.len]));
                hit.map_or(usize::MAX, |hit| from + hit)
            }
        };
        self.found = Some(at);
        (at != usize::MAX).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_come_in_order_whatever_they_are() {
        let mut bytes = vec![0xff; 20];
        bytes.extend([element::END, 0, 0, 0, 2]);
        bytes.extend([0xff; 20]);
        bytes.extend([element::FOOTER, 0, 0, 0, 9]);
        bytes.extend([element::START, 0, 0, 0, 2]);
        bytes.extend(RAM_START);
        bytes.extend([element::EOF, element::DESCRIPTION, 0, 0, 0, 2]);
        bytes.extend(DESCRIPTION_START);
        let signs = Signs { open: Some(9), ram: Some(2), ram_start: true, description: true };
        let mut search = Search::new(&bytes, signs);
        let mut found = Vec::new();
        let mut from = 0;
        while let Some((at, candidate)) = search.next(from) {
            found.push((at, candidate));
            from = at + 1;
        }
        let header = Candidate::Header;
        assert_eq!(found, [(20, header), (45, Candidate::Footer), (50, header), (67, header)]);
    }

    #[test]
    fn without_signs_there_is_nothing_to_find() {
        assert_eq!(Search::new(&[0; 100], Signs::default()).next(0), None);
    }
}
