//! Writes a guest.

use std::io::{self, Write};

use super::{DESCRIPTION, MACHINE, RAM_ID, STATE_ID, STATE_SECTION, STATE_VERSION};
use crate::hypervisor::kvm::memory::Block;
use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::vmm_stream::qemu::{element, ram};
use crate::proto::vmm_stream::{PageKind, PageRecord, write_page_header};

/// Bytes that are gathered before they are written.
const BUFFER: usize = 256 << 10;

/// The writing end of a stream.
#[derive(Debug)]
pub(in crate::hypervisor::kvm) struct Writer<W> {
    into: W,
    buffer: Vec<u8>,
    written: u64,
    names: Vec<Vec<u8>>,
    last_block: Option<u16>,
}

impl<W: Write> Writer<W> {
    /// Begins a stream of a guest with this memory.
    pub(in crate::hypervisor::kvm) fn begin(into: W, blocks: &[Block]) -> io::Result<Self> {
        let mut writer = Self {
            into,
            buffer: Vec::with_capacity(BUFFER),
            written: 0,
            names: blocks.iter().map(|block| block.name.clone().into_bytes()).collect(),
            last_block: None,
        };
        let out = &mut writer.buffer;
        out.extend_from_slice(&element::FILE_HEADER);
        out.push(element::CONFIGURATION);
        out.extend_from_slice(&(MACHINE.len() as u32).to_be_bytes());
        out.extend_from_slice(MACHINE);
        open(out, element::START, RAM_ID, ram::SECTION_NAME, ram::SECTION_VERSION);
        let total: u64 = blocks.iter().map(|block| block.len).sum();
        out.extend_from_slice(&(total | ram::FLAG_MEM_SIZE).to_be_bytes());
        for block in blocks {
            out.push(block.name.len() as u8);
            out.extend_from_slice(block.name.as_bytes());
            out.extend_from_slice(&block.len.to_be_bytes());
        }
        out.extend_from_slice(&ram::FLAG_EOS.to_be_bytes());
        close(out, RAM_ID);
        Ok(writer)
    }

    /// Begins a pass over memory, the last where it `is_last`.
    pub(in crate::hypervisor::kvm) fn begin_pass(&mut self, is_last: bool) {
        self.buffer.push(if is_last { element::END } else { element::PART });
        self.buffer.extend_from_slice(&RAM_ID.to_be_bytes());
        self.last_block = None;
    }

    /// A page, zero where it has no content.
    pub(in crate::hypervisor::kvm) fn page(
        &mut self,
        at: PageAddress,
        content: Option<&[u8; PAGE_SIZE]>,
    ) -> io::Result<()> {
        let record = PageRecord {
            at,
            continues: self.last_block == Some(at.block),
        };
        self.last_block = Some(at.block);
        let name = &self.names[usize::from(at.block)];
        match content {
            Some(content) => {
                write_page_header(record, PageKind::Page, name, &mut self.buffer);
                self.buffer.extend_from_slice(content);
            }
            None => {
                write_page_header(record, PageKind::Zero, name, &mut self.buffer);
                self.buffer.push(0);
            }
        }
        match self.buffer.len() >= BUFFER - 2 * PAGE_SIZE {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Ends the pass, and hands over everything that was gathered.
    pub(in crate::hypervisor::kvm) fn end_pass(&mut self) -> io::Result<()> {
        self.buffer.extend_from_slice(&ram::FLAG_EOS.to_be_bytes());
        close(&mut self.buffer, RAM_ID);
        self.flush()
    }

    /// What is not memory, and the end.
    pub(in crate::hypervisor::kvm) fn finish(mut self, state: &[u8], devices: &[u8]) -> io::Result<u64> {
        open(&mut self.buffer, element::FULL, STATE_ID, STATE_SECTION, STATE_VERSION);
        for bytes in [state, devices] {
            self.buffer.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
            self.buffer.extend_from_slice(bytes);
        }
        close(&mut self.buffer, STATE_ID);
        self.buffer.push(element::EOF);
        self.buffer.push(element::DESCRIPTION);
        self.buffer.extend_from_slice(&(DESCRIPTION.len() as u32).to_be_bytes());
        self.buffer.extend_from_slice(DESCRIPTION);
        self.flush()?;
        Ok(self.written)
    }

    /// Bytes that were taken until now.
    pub(in crate::hypervisor::kvm) fn written(&self) -> u64 {
        self.written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.into.write_all(&self.buffer)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

fn open(out: &mut Vec<u8>, kind: u8, id: u32, name: &[u8], version: u32) {
    out.push(kind);
    out.extend_from_slice(&id.to_be_bytes());
    out.push(name.len() as u8);
    out.extend_from_slice(name);
    out.extend_from_slice(&0_u32.to_be_bytes());
    out.extend_from_slice(&version.to_be_bytes());
}

fn close(out: &mut Vec<u8>, id: u32) {
    out.push(element::FOOTER);
    out.extend_from_slice(&id.to_be_bytes());
}
