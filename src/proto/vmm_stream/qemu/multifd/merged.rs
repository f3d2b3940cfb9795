//! The one stream that main stream and channels are merged to.

use super::super::element;
use super::super::ram::{self, Ram};
use super::MultifdError;
use crate::proto::page::PageAddress;
use crate::proto::vmm_stream::{PageKind, PageRecord, write_page_header};

/// Where the merged stream is. Pages stand in PART sections of its own, which are opened for the first page and closed for whatever is
/// not a page: the channels know nothing of the main stream's sections.
#[derive(Debug, Default)]
pub(super) struct Merged {
    place: Place,
    /// Block of the page record before, in this section.
    block: Option<u16>,
    /// A page has come since the last synchronisation.
    has_unsynchronised_pages: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Place {
    /// Before the end of RAM's START.
    #[default]
    Start,
    BetweenSections,
    InSection,
    /// Behind RAM's END.
    End,
}

/// The RAM section as the main stream has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RamSection<'a> {
    pub(super) id: u32,
    pub(super) ram: &'a Ram,
}

impl Merged {
    /// Closes RAM's START, behind which pages can come.
    pub(super) fn end_start(&mut self, section: RamSection<'_>, out: &mut Vec<u8>) {
        close(section, out);
        self.place = Place::BetweenSections;
    }

    /// A page with its content, or a zero page.
    pub(super) fn page(
        &mut self,
        at: PageAddress,
        content: Option<&[u8]>,
        section: RamSection<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), MultifdError> {
        match self.place {
            Place::Start | Place::End => return Err(MultifdError::PageOutOfPlace),
            Place::InSection => {}
            Place::BetweenSections => {
                out.push(element::PART);
                out.extend_from_slice(&section.id.to_be_bytes());
                self.place = Place::InSection;
                self.block = None;
            }
        }
        let record = PageRecord {
            at,
            continues: self.block == Some(at.block),
        };
        self.block = Some(at.block);
        self.has_unsynchronised_pages = true;
        let name = &section.ram.blocks()[usize::from(at.block)].name;
        match content {
            Some(content) => {
                write_page_header(record, PageKind::Page, name, out);
                out.extend_from_slice(content);
            }
            None => {
                write_page_header(record, PageKind::Zero, name, out);
                out.push(0);
            }
        }
        Ok(())
    }

    /// A whole element of the main stream that is not of RAM.
    pub(super) fn element(&mut self, bytes: &[u8], section: RamSection<'_>, out: &mut Vec<u8>) {
        self.end_section(section, out);
        out.extend_from_slice(bytes);
    }

    /// All connections have come to a synchronisation.
    pub(super) fn synchronised(&mut self) {
        self.has_unsynchronised_pages = false;
    }

    /// RAM is over.
    pub(super) fn end(&mut self, section: RamSection<'_>, out: &mut Vec<u8>) -> Result<(), MultifdError> {
        if self.has_unsynchronised_pages {
            return Err(MultifdError::NotSynchronised);
        }
        self.end_section(section, out);
        out.push(element::END);
        out.extend_from_slice(&section.id.to_be_bytes());
        close(section, out);
        self.place = Place::End;
        Ok(())
    }

    fn end_section(&mut self, section: RamSection<'_>, out: &mut Vec<u8>) {
        if self.place == Place::InSection {
            close(section, out);
            self.place = Place::BetweenSections;
        }
    }
}

fn close(section: RamSection<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(&ram::FLAG_EOS.to_be_bytes());
    out.push(element::FOOTER);
    out.extend_from_slice(&section.id.to_be_bytes());
}
