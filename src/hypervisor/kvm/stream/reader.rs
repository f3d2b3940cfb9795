//! Reads a guest, strictly: what is not as [`Writer`](super::Writer) writes it is an error.

use std::io::{self, Read};

use super::{MACHINE, RAM_ID, STATE_ID, STATE_LIMIT, STATE_SECTION, STATE_VERSION};
use crate::hypervisor::kvm::memory::Block;
use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::vmm_stream::qemu::{element, ram};
use crate::proto::vmm_stream::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO};

/// Why a stream is not a guest that can be taken in here.
#[derive(Debug, thiserror::Error)]
pub(in crate::hypervisor::kvm) enum StreamError {
    /// The stream broke, or ended too early.
    #[error("the stream broke at byte {at}: {error}")]
    Broken { at: u64, error: io::Error },
    /// Something else than what has to be there.
    #[error("at byte {at} of the stream {wanted} was expected, and something else came")]
    Unexpected { at: u64, wanted: &'static str },
    /// It is of another hypervisor, or of another version of this one.
    #[error("the guest comes from a machine {0:?}, and this is longhaul-kvm")]
    AnotherMachine(String),
    /// The guest's memory is not what this machine has.
    #[error("the guest's memory is {theirs}, and this machine's is {ours}")]
    AnotherMemory { theirs: String, ours: String },
    /// A page that is not in a block.
    #[error("page {page} lies outside of the block {block} of the guest's memory")]
    OutsideBlock { page: u64, block: String },
    /// State of more bytes than any machine has.
    #[error("{len} bytes are stated for the state of the machine, of which {STATE_LIMIT} are the most")]
    TooMuchState { len: u64 },
    /// Bytes behind the end.
    #[error("the stream goes on behind its end")]
    GoesOn,
}

/// The reading end of a stream.
#[derive(Debug)]
pub(in crate::hypervisor::kvm) struct Reader<R> {
    from: R,
    at: u64,
}

/// KVM's state and that of the VMM's devices.
pub(in crate::hypervisor::kvm) struct State {
    pub(in crate::hypervisor::kvm) machine: Vec<u8>,
    pub(in crate::hypervisor::kvm) devices: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads from `from`, which should be buffered.
    pub(in crate::hypervisor::kvm) fn new(from: R) -> Self {
        Self { from, at: 0 }
    }

    /// Reads a whole guest into a machine that has these blocks. `page` takes each page, zero where it has no content.
    pub(in crate::hypervisor::kvm) fn read(
        mut self,
        blocks: &[Block],
        mut page: impl FnMut(PageAddress, Option<&[u8; PAGE_SIZE]>),
    ) -> Result<State, StreamError> {
        self.begin()?;
        self.block_list(blocks)?;
        loop {
            let kind = self.byte()?;
            if kind != element::PART && kind != element::END {
                return Err(self.unexpected("a part of the guest's memory"));
            }
            self.expect(&RAM_ID.to_be_bytes(), "the section of memory")?;
            self.pass(blocks, &mut page)?;
            if kind == element::END {
                break;
            }
        }
        self.open(element::FULL, STATE_ID, STATE_SECTION, STATE_VERSION)?;
        let state = State {
            machine: self.counted()?,
            devices: self.counted()?,
        };
        self.close(STATE_ID)?;
        self.expect(&[element::EOF, element::DESCRIPTION], "the end of the guest")?;
        let len = self.u32()?;
        self.skip(u64::from(len))?;
        self.end()?;
        Ok(state)
    }

    fn begin(&mut self) -> Result<(), StreamError> {
        self.expect(&element::FILE_HEADER, "the header of a migration stream")?;
        self.expect(&[element::CONFIGURATION], "the configuration")?;
        let len = self.u32()?;
        let name = match len {
            1..=255 => self.bytes(len as usize)?,
            _ => return Err(self.unexpected("the name of the machine")),
        };
        match name == MACHINE {
            true => Ok(()),
            false => Err(StreamError::AnotherMachine(String::from_utf8_lossy(&name).into_owned())),
        }
    }

    fn block_list(&mut self, blocks: &[Block]) -> Result<(), StreamError> {
        self.open(element::START, RAM_ID, ram::SECTION_NAME, ram::SECTION_VERSION)?;
        let total = self.u64()?;
        if total & ram::FLAG_MASK != ram::FLAG_MEM_SIZE {
            return Err(self.unexpected("the size of the guest's memory"));
        }
        let mut left = total & !ram::FLAG_MASK;
        let mut theirs = Vec::new();
        while left > 0 && theirs.len() <= blocks.len() {
            let len = self.byte()?;
            let name = String::from_utf8_lossy(&self.bytes(usize::from(len))?).into_owned();
            let bytes = self.u64()?;
            if bytes == 0 || bytes > left {
                return Err(self.unexpected("a block that is part of the guest's memory"));
            }
            left -= bytes;
            theirs.push((name, bytes));
        }
        let ours: Vec<_> = blocks.iter().map(|block| (block.name.clone(), block.len)).collect();
        if theirs != ours {
            return Err(StreamError::AnotherMemory {
                theirs: listed(&theirs),
                ours: listed(&ours),
            });
        }
        self.expect(&ram::FLAG_EOS.to_be_bytes(), "the end of the list of blocks")?;
        self.close(RAM_ID)
    }

    fn pass(
        &mut self,
        blocks: &[Block],
        page: &mut impl FnMut(PageAddress, Option<&[u8; PAGE_SIZE]>),
    ) -> Result<(), StreamError> {
        let mut content = [0; PAGE_SIZE];
        let mut block = None;
        loop {
            let word = self.u64()?;
            let flags = word & ram::FLAG_MASK;
            if word == ram::FLAG_EOS {
                return self.close(RAM_ID);
            }
            if flags & FLAG_CONTINUE == 0 {
                let len = self.byte()?;
                let name = self.bytes(usize::from(len))?;
                block = blocks.iter().position(|block| block.name.as_bytes() == name);
            }
            let Some(number) = block else {
                return Err(self.unexpected("a page of a known block"));
            };
            let at = PageAddress {
                block: number as u16,
                page: word / PAGE_SIZE as u64,
            };
            if at.page >= blocks[number].pages() {
                return Err(StreamError::OutsideBlock {
                    page: at.page,
                    block: blocks[number].name.clone(),
                });
            }
            match flags & !FLAG_CONTINUE {
                FLAG_PAGE => {
                    self.fill(&mut content)?;
                    page(at, Some(&content));
                }
                FLAG_ZERO => {
                    self.expect(&[0], "a page of zeroes")?;
                    page(at, None);
                }
                _ => return Err(self.unexpected("a page, or the end of a pass")),
            }
        }
    }

    fn open(&mut self, kind: u8, id: u32, name: &[u8], version: u32) -> Result<(), StreamError> {
        self.expect(&[kind], "a section")?;
        self.expect(&id.to_be_bytes(), "the number of a section")?;
        self.expect(&[name.len() as u8], "the name of a section")?;
        self.expect(name, "the name of a section")?;
        self.expect(&0_u32.to_be_bytes(), "the one instance of a section")?;
        self.expect(&version.to_be_bytes(), "a section of a version that is known here")
    }

    fn close(&mut self, id: u32) -> Result<(), StreamError> {
        self.expect(&[element::FOOTER], "the end of a section")?;
        self.expect(&id.to_be_bytes(), "the end of this section")
    }

    fn counted(&mut self) -> Result<Vec<u8>, StreamError> {
        match self.u64()? {
            len if len <= STATE_LIMIT => self.bytes(len as usize),
            len => Err(StreamError::TooMuchState { len }),
        }
    }

    fn expect(&mut self, wanted: &[u8], what: &'static str) -> Result<(), StreamError> {
        let at = self.at;
        let mut found = [0; 16];
        let found = &mut found[..wanted.len()];
        self.fill(found)?;
        match found == wanted {
            true => Ok(()),
            false => Err(StreamError::Unexpected { at, wanted: what }),
        }
    }

    fn byte(&mut self) -> Result<u8, StreamError> {
        let mut byte = [0];
        self.fill(&mut byte)?;
        Ok(byte[0])
    }

    fn u32(&mut self) -> Result<u32, StreamError> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64, StreamError> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Grows with what comes, not with what is stated.
    fn bytes(&mut self, len: usize) -> Result<Vec<u8>, StreamError> {
        let mut bytes = Vec::new();
        let read = self.from.by_ref().take(len as u64).read_to_end(&mut bytes);
        self.at += bytes.len() as u64;
        match read {
            Ok(read) if read == len => Ok(bytes),
            Ok(_) => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn skip(&mut self, len: u64) -> Result<(), StreamError> {
        match io::copy(&mut self.from.by_ref().take(len), &mut io::sink()) {
            Ok(skipped) if skipped == len => Ok(()),
            Ok(_) => Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn end(&mut self) -> Result<(), StreamError> {
        match self.from.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(StreamError::GoesOn),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn fill(&mut self, into: &mut [u8]) -> Result<(), StreamError> {
        self.from.read_exact(into).map_err(|error| self.broken(error))?;
        self.at += into.len() as u64;
        Ok(())
    }

    fn broken(&self, error: io::Error) -> StreamError {
        StreamError::Broken { at: self.at, error }
    }

    fn unexpected(&self, wanted: &'static str) -> StreamError {
        StreamError::Unexpected { at: self.at, wanted }
    }
}

fn listed(blocks: &[(String, u64)]) -> String {
    let texts = blocks.iter().map(|(name, bytes)| format!("{name} of {bytes} bytes"));
    texts.collect::<Vec<_>>().join(", ")
}
