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

/// The byte sequences that the signs come to.
#[derive(Debug)]
pub(super) struct Needles {
    needles: [Needle; 5],
}

/// A byte sequence to look for.
#[derive(Debug)]
struct Needle {
    candidate: Candidate,
    /// How far the sequence is behind the candidate's start.
    back: usize,
    bytes: [u8; RAM_START.len()],
    /// Bytes of the sequence in use; none where there is nothing to look for.
    len: usize,
}

impl Needles {
    pub(super) fn new(signs: Signs) -> Self {
        let id = |candidate, kind, id: Option<u32>| {
            id.map_or(Needle::nothing(), |id| {
                let [a, b, c, d] = id.to_be_bytes();
                Needle::new(candidate, 0, &[kind, a, b, c, d])
            })
        };
        let text = |wanted, back, text| {
            if wanted {
                Needle::new(Candidate::Header, back, text)
            } else {
                Needle::nothing()
            }
        };
        let needles = [
            id(Candidate::Footer, element::FOOTER, signs.open),
            id(Candidate::Header, element::PART, signs.ram),
            id(Candidate::Header, element::END, signs.ram),
            text(signs.ram_start, RAM_START_BACK, &RAM_START),
            text(signs.description, DESCRIPTION_BACK, DESCRIPTION_START),
        ];
        Self { needles }
    }
}

impl Needle {
    fn new(candidate: Candidate, back: usize, text: &[u8]) -> Self {
        let mut bytes = [0; RAM_START.len()];
        bytes[..text.len()].copy_from_slice(text);
        Self {
            candidate,
            back,
            bytes,
            len: text.len(),
        }
    }

    fn nothing() -> Self {
        Self::new(Candidate::Header, 0, &[])
    }
}

/// One pass over a slice.
#[derive(Debug)]
pub(super) struct Search<'n, 'b> {
    bytes: &'b [u8],
    trails: [Option<Trail<'n>>; 5],
}

/// How far the search for one needle is.
#[derive(Debug)]
struct Trail<'n> {
    needle: &'n Needle,
    finder: memmem::Finder<'n>,
    /// The candidate found last, if it is not behind the search.
    found: Found,
}

#[derive(Clone, Copy, Debug)]
enum Found {
    NotYet,
    At(usize),
    NoMore,
}

impl<'n, 'b> Search<'n, 'b> {
    pub(super) fn new(bytes: &'b [u8], needles: &'n Needles) -> Self {
        let trails = needles.needles.each_ref().map(|needle| {
            (needle.len > 0).then(|| Trail {
                needle,
                finder: memmem::Finder::new(&needle.bytes[..needle.len]),
                found: Found::NotYet,
            })
        });
        Self { bytes, trails }
    }

    /// The first candidate at `from` or behind it. `from` must not go back: every needle is looked for once in every byte.
    pub(super) fn next(&mut self, from: usize) -> Option<(usize, Candidate)> {
        let bytes = self.bytes;
        let trails = self.trails.iter_mut().flatten();
        trails
            .filter_map(|trail| Some((trail.next(bytes, from)?, trail.needle.candidate)))
            .min_by_key(|&(at, _)| at)
    }
}

impl Trail<'_> {
    fn next(&mut self, bytes: &[u8], from: usize) -> Option<usize> {
        match self.found {
            Found::At(at) if at >= from => return Some(at),
            Found::NoMore => return None,
            _ => {}
        }
        let rest = bytes.get(from + self.needle.back..)?;
        let at = self.finder.find(rest).map(|hit| from + hit);
        self.found = at.map_or(Found::NoMore, Found::At);
        at
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
        let signs = Signs {
            open: Some(9),
            ram: Some(2),
            ram_start: true,
            description: true,
        };
        let needles = Needles::new(signs);
        let mut search = Search::new(&bytes, &needles);
        let mut found = Vec::new();
        let mut from = 0;
        while let Some((at, candidate)) = search.next(from) {
            found.push((at, candidate));
            from = at + 1;
        }
        let header = Candidate::Header;
        assert_eq!(
            found,
            [(20, header), (45, Candidate::Footer), (50, header), (67, header)]
        );
    }

    #[test]
    fn without_signs_there_is_nothing_to_find() {
        let needles = Needles::new(Signs::default());
        assert_eq!(Search::new(&[0; 100], &needles).next(0), None);
    }
}
