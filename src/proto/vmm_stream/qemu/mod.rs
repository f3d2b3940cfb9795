//! Marks pages in QEMU's native migration stream, versions 7.2 to 10.2.
//!
//! ```text
//! FileHeader → Configuration → Element ⇄ RAM: Total → List → Records → Footer → Element
//!                                 │  ⇅        START                PART, END
//!                                 │ Opaque    other sections: no length on the wire; searched for their footer
//!                                 └ EOF → Description → Rest
//! any state → Opaque where the stream contradicts what is known
//! ```
//!
//! Trust: everything up to a section without a length is known exactly. Behind it, and behind a contradiction, the parser
//! is on probation: it follows the stream, but what it takes for pages stays bytes until two more units fit (RAM records,
//! section footers, the whole block list). A guest cannot reach this: what it controls is inside pages and device state,
//! and pages are never searched while the parser is sure.
//!
//! `configuration` reads the start of the stream, `element` single headers of the outer framing, `ram` the block list and the
//! page records; `opaque` finds the way back out of bytes whose length nobody states.
//!
//! `multifd` makes one stream of a migration's main stream and multifd channels, before this parser sees it. Not here: the return path.

mod configuration;
pub(crate) mod element;
pub mod multifd;
mod opaque;
pub(crate) mod ram;

use self::element::Element;
use self::opaque::{Candidate, Needles, Search, Signs};
use self::ram::{BlockList, ListStep, Pause, Ram};
use super::{LostTrackReason, MAX_BLOCK_NAME, Output, RamBlock, Read, Record, StreamEvent, WORD};
use crate::proto::page::PAGE_SIZE;

/// Advisory parser of one stream, from its first byte on.
///
/// Holds at most 300 KiB (the block list). What [`QemuParser::parse`] appends grows with the bytes it is given: no more than
/// a record and an event for every 5 bytes, the copy of the block list apart.
#[derive(Debug)]
pub struct QemuParser {
    state: State,
    trust: Trust,
    /// Track was reported lost and has not been reported regained. Never so while `trust` is [`Trust::Sure`].
    owes_regained: bool,
    /// Bytes consumed.
    offset: u64,
    ram: Ram,
    /// Id of the RAM section, once its START was seen.
    ram_id: Option<u32>,
    ram_part: RamPart,
    ram_end: RamEnd,
    /// Whether sections end with a footer, once a RAM section showed it.
    footers: Option<bool>,
    /// The section whose body the stream is in.
    open: Option<u32>,
    /// Sections other than RAM that were started and may have PARTs.
    iterables: Vec<u32>,
}

/// What comes next in the stream.
#[derive(Clone, Copy, Debug)]
enum State {
    FileHeader,
    Configuration,
    Subsections,
    /// Names of capabilities in the configuration.
    CapabilityNames {
        left: u32,
    },
    Element,
    Total,
    List(BlockList),
    Records,
    Footer,
    /// Bytes of stated length.
    Skip {
        left: u64,
        then: Then,
    },
    Opaque,
    Description,
    /// Nothing more to find.
    Rest,
}

/// Where the stream goes on behind bytes of stated length.
#[derive(Clone, Copy, Debug)]
enum Then {
    Subsections,
    Element,
    Records,
    Rest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Sure,
    /// So many units must fit before the parser is sure.
    Probation(u8),
}

/// Which part of the RAM section the stream is in, or was in last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RamPart {
    Start,
    Part,
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RamEnd {
    ToCome,
    /// At this offset, if the place where the parser is proves true.
    Unsure(u64),
    Over,
}

/// What a step came to.
enum Step {
    /// So many bytes were marked; with none, the state changed.
    Took(usize),
    More,
}

/// Units that must fit behind a place that was searched for.
const CONFIRMATIONS: u8 = 2;

/// Most sections other than RAM whose PARTs are known as such. A guest has a handful (dirty bitmaps, VFIO devices).
const MAX_ITERABLES: usize = 64;

impl Default for QemuParser {
    fn default() -> Self {
        Self {
            state: State::FileHeader,
            trust: Trust::Sure,
            owes_regained: false,
            offset: 0,
            ram: Ram::default(),
            ram_id: None,
            ram_part: RamPart::Start,
            ram_end: RamEnd::ToCome,
            footers: None,
            open: None,
            iterables: Vec::new(),
        }
    }
}

impl QemuParser {
    /// Most bytes that [`QemuParser::parse`] leaves unconsumed: a page record with the longest header, less a byte.
    pub const MAX_PENDING: usize = WORD + 1 + MAX_BLOCK_NAME + PAGE_SIZE - 1;

    /// Parses a prefix of `bytes`, which are the stream's bytes from the first one not yet consumed on.
    ///
    /// Appends records that cover exactly the bytes consumed, and returns their number. What is not consumed, at most
    /// [`QemuParser::MAX_PENDING`] bytes, must be offered again with more bytes behind it. `end` says that no bytes come
    /// behind these: then everything is consumed. Records that were in `records` before are left alone, and neighbouring
    /// bytes of one call are one record.
    ///
    /// How the stream is sliced changes neither records nor events, except that a run of bytes may come as several records.
    pub fn parse(
        &mut self,
        bytes: &[u8],
        end: bool,
        records: &mut Vec<Record>,
        events: &mut Vec<StreamEvent>,
    ) -> usize {
        let mut out = Output::new(records, events);
        let mut at = 0;
        while at < bytes.len() {
            match self.step(&bytes[at..], end, &mut out) {
                Step::Took(len) => {
                    at += len;
                    self.offset += len as u64;
                }
                Step::More if end => {
                    out.bytes(bytes.len() - at);
                    self.offset += (bytes.len() - at) as u64;
                    self.state = State::Rest;
                    at = bytes.len();
                }
                Step::More => break,
            }
        }
        at
    }

    /// The guest's RAM blocks in the order of the stream's list: [`PageAddress::block`](crate::proto::page::PageAddress::block) is an index into it. Empty
    /// before [`StreamEvent::RamBlocks`].
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        match self.state {
            State::Total | State::List(_) => &[],
            _ => self.ram.blocks(),
        }
    }

    /// Marks what is at the start of `bytes`, which are not empty.
    fn step(&mut self, bytes: &[u8], end: bool, out: &mut Output<'_>) -> Step {
        match self.state {
            State::FileHeader => self.file_header(bytes, out),
            State::Configuration => self.configuration(bytes, out),
            State::Subsections => self.subsection(bytes, out),
            State::CapabilityNames { left } => self.capability_name(left, bytes, out),
            State::Element => self.element(bytes, end, out),
            State::Total => self.total(bytes, out),
            State::List(list) => self.list(list, bytes, out),
            State::Records => self.records(bytes, out),
            State::Footer => self.footer(bytes, out),
            State::Skip { left, then } => self.skip(left, then, bytes, out),
            State::Opaque => self.search(bytes, end, out),
            State::Description => self.description(bytes, out),
            State::Rest => {
                out.bytes(bytes.len());
                Step::Took(bytes.len())
            }
        }
    }

    fn element(&mut self, bytes: &[u8], end: bool, out: &mut Output<'_>) -> Step {
        match self.look(bytes, self.trust != Trust::Sure, end) {
            Read::Is((element, len)) => {
                self.confirm(1, self.offset, out);
                self.enter(element, self.offset, out);
                self.take(len, out)
            }
            Read::More => Step::More,
            Read::Not(reason) => self.lose(reason, out),
        }
    }

    /// Reads the header of an element and says whether it can come here. `strict` asks what follows it for evidence too, as
    /// is due where the bytes before give no reason to believe it.
    fn look<'b>(&self, bytes: &'b [u8], strict: bool, end: bool) -> Read<(Element<'b>, usize)> {
        const NOT: LostTrackReason = LostTrackReason::Element;
        let (element, len) = match element::read(bytes) {
            Read::Is(found) => found,
            other => return other,
        };
        let evidence = match element {
            Element::Opening {
                full,
                name,
                instance,
                version,
                ..
            } if name == ram::SECTION_NAME => {
                if full || self.ram_id.is_some() || instance != 0 || version != ram::SECTION_VERSION {
                    return Read::Not(LostTrackReason::RamSection);
                }
                if strict {
                    discard(Ram::read_total(&bytes[len..]))
                } else {
                    Read::Is(())
                }
            }
            Element::Opening { id, .. } if self.ram_id != Some(id) => Read::Is(()),
            Element::Following { id, .. } if self.ram_id == Some(id) && self.ram_end != RamEnd::Over => {
                if strict {
                    self.ram.starts_record(&bytes[len..])
                } else {
                    Read::Is(())
                }
            }
            Element::Following { id, .. } if self.iterables.contains(&id) => Read::Is(()),
            Element::Command { command, len, .. } if !strict || element::is_known_command(command, len) => Read::Is(()),
            Element::Eof if !strict || (end && bytes.len() == len) => Read::Is(()),
            Element::Eof => discard(element::read_description(&bytes[len..])),
            _ => Read::Not(NOT),
        };
        match evidence {
            Read::Is(()) => Read::Is((element, len)),
            Read::More => Read::More,
            Read::Not(reason) => Read::Not(reason),
        }
    }

    /// Goes on behind the header of an element that is at `offset`.
    fn enter(&mut self, element: Element<'_>, offset: u64, out: &mut Output<'_>) {
        match element {
            Element::Opening {
                id,
                name: ram::SECTION_NAME,
                ..
            } => {
                self.open = Some(id);
                self.ram_id = Some(id);
                self.ram_part = RamPart::Start;
                self.state = State::Total;
            }
            Element::Opening { full, id, .. } => {
                if !full && self.iterables.len() < MAX_ITERABLES && !self.iterables.contains(&id) {
                    self.iterables.push(id);
                }
                self.open = Some(id);
                self.state = State::Opaque;
            }
            Element::Following { end, id } => {
                self.open = Some(id);
                if self.ram_id == Some(id) {
                    self.ram_part = if end { RamPart::End } else { RamPart::Part };
                    self.state = State::Records;
                } else {
                    self.state = State::Opaque;
                }
            }
            Element::Command { data, .. } => {
                self.open = None;
                self.state = State::Skip {
                    left: data,
                    then: Then::Element,
                };
            }
            Element::Eof => {
                out.events.push(StreamEvent::StreamEof { offset });
                self.open = None;
                self.state = State::Description;
            }
        }
    }

    fn total(&mut self, bytes: &[u8], out: &mut Output<'_>) -> Step {
        match Ram::read_total(bytes) {
            Read::Is(list) => {
                self.state = State::List(list);
                self.take(WORD, out)
            }
            Read::More => Step::More,
            Read::Not(reason) => self.lose_blocks(reason, out),
        }
    }

    fn list(&mut self, list: BlockList, bytes: &[u8], out: &mut Output<'_>) -> Step {
        match self.ram.read_list(list, bytes) {
            Read::Is(ListStep::Took(len, list)) => {
                self.state = State::List(list);
                self.take(len, out)
            }
            Read::Is(ListStep::Complete) => {
                out.events.push(StreamEvent::RamBlocks(self.ram.blocks().to_vec()));
                self.confirm(CONFIRMATIONS, self.offset, out);
                self.state = State::Records;
                Step::Took(0)
            }
            Read::More => Step::More,
            Read::Not(reason) => self.lose_blocks(reason, out),
        }
    }

    /// Without its block list the RAM section is as if it had not been seen.
    fn lose_blocks(&mut self, reason: LostTrackReason, out: &mut Output<'_>) -> Step {
        self.ram.clear();
        self.ram_id = None;
        self.lose(reason, out)
    }

    fn records(&mut self, bytes: &[u8], out: &mut Output<'_>) -> Step {
        let sure = self.trust == Trust::Sure;
        let (len, pause) = if sure {
            self.ram.records(bytes, self.offset, out)
        } else {
            let (len, pause) = self.ram.unsure_record(bytes, out);
            if len > 0 {
                self.confirm(1, self.offset + len as u64, out);
            }
            (len, pause)
        };
        match pause {
            Pause::More if len == 0 => return Step::More,
            Pause::More => {}
            Pause::Eos => self.state = State::Footer,
            Pause::Flush => {
                if sure && self.ram_part == RamPart::Part {
                    self.ram.start_round();
                    out.events.push(StreamEvent::RoundEnd {
                        offset: self.offset + len as u64,
                    });
                }
            }
            Pause::Skip(left) => {
                self.state = State::Skip {
                    left,
                    then: Then::Records,
                }
            }
            Pause::Lost(reason) => self.lose_at(len, reason, out),
        }
        Step::Took(len)
    }

    fn footer(&mut self, bytes: &[u8], out: &mut Output<'_>) -> Step {
        let len = if bytes[0] == element::FOOTER {
            let Some(id) = element::be32(bytes, 1) else {
                return Step::More;
            };
            if self.open != Some(id) {
                return self.lose(LostTrackReason::Footer, out);
            }
            element::FOOTER_LEN
        } else {
            0
        };
        self.footers = Some(len > 0);
        if len > 0 {
            self.confirm(1, self.offset + len as u64, out);
        }
        self.open = None;
        self.state = State::Element;
        if self.ram_part == RamPart::End {
            self.end_ram(self.offset + len as u64, out);
        }
        self.take(len, out)
    }

    fn skip(&mut self, left: u64, then: Then, bytes: &[u8], out: &mut Output<'_>) -> Step {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let left = left - len as u64;
        self.state = match then {
            _ if left > 0 => State::Skip { left, then },
            Then::Subsections => State::Subsections,
            Then::Element => State::Element,
            Then::Records => State::Records,
            Then::Rest => State::Rest,
        };
        self.take(len, out)
    }

    /// Looks for the end of bytes without a stated length.
    fn search(&mut self, bytes: &[u8], end: bool, out: &mut Output<'_>) -> Step {
        let ram_over = self.ram_end == RamEnd::Over;
        let signs = Signs {
            open: self.open,
            ram: self.ram_id.filter(|_| !ram_over),
            ram_start: self.ram_id.is_none(),
            description: ram_over && self.footers == Some(false),
        };
        let needles = Needles::new(signs);
        let mut search = Search::new(bytes, &needles);
        let mut from = 0;
        while let Some((at, candidate)) = search.next(from) {
            if bytes.len() - at < opaque::LOOKAHEAD && !end {
                return self.hold(at, out);
            }
            let header = at
                + if candidate == Candidate::Footer {
                    element::FOOTER_LEN
                } else {
                    0
                };
            match self.look(&bytes[header..], true, end) {
                Read::Is((element, len)) => {
                    self.regain(candidate, self.offset + header as u64, out);
                    self.enter(element, self.offset + header as u64, out);
                    return self.take(header + len, out);
                }
                Read::More if !end => return self.hold(at, out),
                Read::More | Read::Not(_) => from = at + 1,
            }
        }
        let keep = if end { 0 } else { opaque::LOOKAHEAD - 1 };
        self.hold(bytes.len().saturating_sub(keep), out)
    }

    /// Marks `len` bytes and waits for more behind the others.
    fn hold(&mut self, len: usize, out: &mut Output<'_>) -> Step {
        if len == 0 { Step::More } else { self.take(len, out) }
    }

    fn description(&mut self, bytes: &[u8], out: &mut Output<'_>) -> Step {
        match element::read_description(bytes) {
            Read::Is(len) => {
                let offset = self.offset + element::DESCRIPTION_LEN as u64;
                out.events.push(StreamEvent::Description { offset, len });
                self.state = State::Skip {
                    left: u64::from(len),
                    then: Then::Rest,
                };
                self.take(element::DESCRIPTION_LEN, out)
            }
            Read::More => Step::More,
            Read::Not(_) => {
                self.state = State::Rest;
                Step::Took(0)
            }
        }
    }

    fn take(&mut self, len: usize, out: &mut Output<'_>) -> Step {
        out.bytes(len);
        Step::Took(len)
    }

    /// Counts units that fit, and is sure when there were enough.
    fn confirm(&mut self, units: u8, offset: u64, out: &mut Output<'_>) {
        let Trust::Probation(left) = self.trust else { return };
        let left = left.saturating_sub(units);
        if left > 0 {
            self.trust = Trust::Probation(left);
            return;
        }
        self.trust = Trust::Sure;
        if std::mem::take(&mut self.owes_regained) {
            out.events.push(StreamEvent::Regained { offset });
        }
        if let RamEnd::Unsure(offset) = self.ram_end {
            self.end_ram(offset, out);
        }
    }

    fn end_ram(&mut self, offset: u64, out: &mut Output<'_>) {
        if self.trust == Trust::Sure {
            self.ram_end = RamEnd::Over;
            out.events.push(StreamEvent::DeviceState { offset });
        } else {
            self.ram_end = RamEnd::Unsure(offset);
        }
    }

    /// Goes on at a place that was searched for: the header at `offset`.
    fn regain(&mut self, candidate: Candidate, offset: u64, out: &mut Output<'_>) {
        match self.trust {
            Trust::Sure => self.trust = Trust::Probation(CONFIRMATIONS),
            Trust::Probation(_) => self.confirm(1, offset, out),
        }
        let closed_ram = candidate == Candidate::Footer && self.open.is_some() && self.open == self.ram_id;
        if closed_ram && self.ram_part == RamPart::End {
            self.end_ram(offset, out);
        }
    }

    /// Goes on without knowing where, until a search finds a place.
    fn lose(&mut self, reason: LostTrackReason, out: &mut Output<'_>) -> Step {
        self.lose_at(0, reason, out);
        Step::Took(0)
    }

    fn lose_at(&mut self, len: usize, reason: LostTrackReason, out: &mut Output<'_>) {
        match self.trust {
            Trust::Sure => {
                out.events.push(StreamEvent::LostTrack {
                    offset: self.offset + len as u64,
                    reason,
                });
                self.owes_regained = true;
            }
            Trust::Probation(_) => {
                if let RamEnd::Unsure(_) = self.ram_end {
                    self.ram_end = RamEnd::ToCome;
                }
            }
        }
        // The place that ends the search comes on top.
        self.trust = Trust::Probation(CONFIRMATIONS + 1);
        self.ram.lose_place();
        self.state = State::Opaque;
    }

    /// Lets the rest of the stream pass.
    fn give_up(&mut self, reason: LostTrackReason, out: &mut Output<'_>) -> Step {
        out.events.push(StreamEvent::LostTrack {
            offset: self.offset,
            reason,
        });
        self.state = State::Rest;
        Step::Took(0)
    }
}

fn discard<T>(read: Read<T>) -> Read<()> {
    match read {
        Read::Is(_) => Read::Is(()),
        Read::More => Read::More,
        Read::Not(reason) => Read::Not(reason),
    }
}
