//! The main stream of a migration with multifd: everything but the pages that the channels carry.

use super::super::ram::{FLAG_EOS, FLAG_FLUSH};
use super::super::{QemuParser, RamPart, State, Step, Trust};
use super::MultifdError;
use super::merged::{Merged, RamSection};
use crate::proto::page::PAGE_SIZE;
use crate::proto::vmm_stream::{Output, Record, StreamEvent, WORD};

/// Most bytes of a command that are held until it is whole: what its length can state.
const MAX_HELD: usize = 5 + 0xffff;

/// Follows the main stream. Not advisory as its parser is: what it does not understand ends the migration.
#[derive(Debug, Default)]
pub(super) struct MainStream {
    parser: QemuParser,
    phase: Phase,
    /// Part of an element that is not of RAM. Pages may not come in the middle of it, nor may they wait for the rest of it: QEMU may have that
    /// in a buffer, and not write it out before its channels can send.
    held: Vec<u8>,
    records: Vec<Record>,
    events: Vec<StreamEvent>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Up to the end of RAM's START.
    #[default]
    Start,
    /// Rounds over RAM. How a synchronisation shows is what START has shown.
    Rounds(SyncMark),
    /// Behind RAM's END.
    Over,
}

/// How a synchronisation shows on the main stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncMark {
    /// By a FLUSH record (machine types of QEMU 8.1 and newer).
    Flush,
    /// By the end of every RAM section's records.
    Eos,
}

/// Why [`MainStream::advance`] stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reached {
    /// The end of what is there.
    More,
    /// A synchronisation.
    Sync,
}

impl MainStream {
    /// Whether RAM is over: what follows passes as it is.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// The RAM section. Its blocks are known once its START is over.
    pub(super) fn section(&self) -> RamSection<'_> {
        RamSection {
            id: self.parser.ram_id.unwrap_or_default(),
            ram: &self.parser.ram,
        }
    }

    /// Goes on with `bytes`, those behind what was taken before, and says how many it took.
    pub(super) fn advance(
        &mut self,
        bytes: &[u8],
        merged: &mut Merged,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Reached), MultifdError> {
        let mut at = 0;
        while at < bytes.len() {
            if self.is_over() {
                out.extend_from_slice(&bytes[at..]);
                return Ok((bytes.len(), Reached::More));
            }
            let before = self.parser.state;
            self.records.clear();
            self.events.clear();
            let mut output = Output::new(&mut self.records, &mut self.events);
            let Step::Took(len) = self.parser.step(&bytes[at..], false, &mut output) else {
                break;
            };
            self.parser.offset += len as u64;
            let taken = &bytes[at..at + len];
            at += len;
            for event in &self.events {
                if let StreamEvent::LostTrack { reason, .. } = event {
                    return Err(MultifdError::MainStream(*reason));
                }
            }
            let reached = match before {
                State::Records => self.records(taken, merged, out)?,
                State::Footer => {
                    self.footer(taken, merged, out)?;
                    Reached::More
                }
                _ => {
                    self.other(taken, merged, out)?;
                    Reached::More
                }
            };
            if reached == Reached::Sync {
                return Ok((at, Reached::Sync));
            }
        }
        Ok((at, Reached::More))
    }

    /// Takes in what one step has found in a RAM section.
    fn records(&mut self, taken: &[u8], merged: &mut Merged, out: &mut Vec<u8>) -> Result<Reached, MultifdError> {
        if self.parser.trust != Trust::Sure {
            return Err(MultifdError::Record);
        }
        let section = self.section();
        let mut at = 0;
        let mut word = None;
        for record in &self.records {
            let len = record.stream_len(section.ram.blocks());
            let bytes = &taken[at..at + len];
            at += len;
            match record {
                Record::Page(page) => merged.page(page.at, Some(&bytes[len - PAGE_SIZE..]), section, out)?,
                Record::Zero(page) => merged.page(page.at, None, section, out)?,
                Record::Bytes { len: WORD } => word = bytes.first_chunk().map(|word| u64::from_be_bytes(*word)),
                Record::Bytes { .. } | Record::Chunk { .. } => return Err(MultifdError::Record),
            }
        }
        match (word, self.phase) {
            (None, _) => Ok(Reached::More),
            // What else is in START is left out: QEMU may keep it in a buffer until its channels have sent pages.
            (Some(FLAG_FLUSH), Phase::Start) => {
                merged.end_start(section, out);
                self.phase = Phase::Rounds(SyncMark::Flush);
                Ok(Reached::Sync)
            }
            (Some(FLAG_EOS), Phase::Start) => {
                merged.end_start(section, out);
                self.phase = Phase::Rounds(SyncMark::Eos);
                Ok(Reached::Sync)
            }
            (Some(FLAG_FLUSH), Phase::Rounds(SyncMark::Flush)) | (Some(FLAG_EOS), Phase::Rounds(SyncMark::Eos)) => {
                Ok(Reached::Sync)
            }
            (Some(FLAG_EOS), _) => Ok(Reached::More),
            (Some(_), _) => Err(MultifdError::Record),
        }
    }

    fn footer(&mut self, taken: &[u8], merged: &mut Merged, out: &mut Vec<u8>) -> Result<(), MultifdError> {
        if taken.is_empty() {
            return Err(MultifdError::NoFooters);
        }
        if self.parser.ram_part == RamPart::End {
            merged.end(self.section(), out)?;
            self.phase = Phase::Over;
        }
        Ok(())
    }

    /// Takes in what is not in a RAM section.
    fn other(&mut self, taken: &[u8], merged: &mut Merged, out: &mut Vec<u8>) -> Result<(), MultifdError> {
        match (self.phase, self.parser.state) {
            (Phase::Start, _) => out.extend_from_slice(taken),
            // The header of a PART or of END: pages have sections of their own.
            (_, State::Records) => {}
            (_, State::Opaque) => return Err(MultifdError::OtherDevice),
            (_, state) => {
                self.held.extend_from_slice(taken);
                if self.held.len() > MAX_HELD {
                    return Err(MultifdError::Record);
                }
                if matches!(state, State::Element) {
                    merged.element(&self.held, self.section(), out);
                    self.held.clear();
                }
            }
        }
        Ok(())
    }
}
