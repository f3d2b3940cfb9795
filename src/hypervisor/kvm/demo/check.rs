//! What the demo guest has counted, and whether its memory is what it must be: seen from outside.

use super::dials::{Dials, word};
use super::layout::{COUNTERS, COUNTERS_SIZE, TABLE, WORKING_SET, counter, share};
use crate::hypervisor::kvm::memory::GuestRam;
use crate::proto::page::PAGE_SIZE;

/// What the guest has counted since it was loaded, wherever it ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages written by all vCPUs.
    pub pages: u64,
    /// Pages that were not what had been written before, by all vCPUs. Each was written again and is fine since.
    pub errors: u64,
    /// Lines written to the serial port.
    pub beats: u64,
    /// Signs of life.
    pub signs: u64,
    /// Timer interrupts of vCPU 0.
    pub ticks: u64,
    /// Each vCPU by itself.
    pub vcpus: Vec<VcpuCounters>,
}

/// What one vCPU has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuCounters {
    /// Pages written.
    pub pages: u64,
    /// Pages that were not what it had written before.
    pub errors: u64,
    /// Timer interrupts.
    pub ticks: u64,
}

/// Memory that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// No demo guest is in it.
    #[error("There is no demo guest in this memory.")]
    NoGuest,
    /// Another one is in it.
    #[error("The demo guest in this memory has other dials: {0:?}")]
    OtherDials(Box<Dials>),
    /// A page is lost, torn, or of another time.
    #[error("Page {page} of the working set is not what was written to it as generation {generation}.")]
    Page {
        /// Its number in the working set.
        page: u64,
        /// What the guest's table says.
        generation: u32,
    },
    /// The table is of another time.
    #[error("vCPU {vcpu} has written {counted} pages, and its table of generations says {table}.")]
    Table {
        /// The vCPU.
        vcpu: usize,
        /// What it counted.
        counted: u64,
        /// Sum of the generations.
        table: u64,
    },
}

impl Counters {
    /// What the guest in this memory has counted; zero where there is none. It may run.
    #[must_use]
    pub fn of(ram: &GuestRam) -> Counters {
        let Some((_, vcpus)) = Dials::of(ram) else {
            return Counters::default();
        };
        let page = counters_page(ram);
        let mut all = Counters {
            beats: counted(&page, 0, counter::BEATS),
            signs: counted(&page, 0, counter::SIGNS),
            ticks: counted(&page, 0, counter::TICKS),
            ..Counters::default()
        };
        for number in 0..vcpus {
            let vcpu = VcpuCounters {
                pages: counted(&page, number, counter::PAGES),
                errors: counted(&page, number, counter::ERRORS),
                ticks: counted(&page, number, counter::TICKS),
            };
            // What arrived in a broken stream may be any number.
            all.pages = all.pages.wrapping_add(vcpu.pages);
            all.errors = all.errors.wrapping_add(vcpu.errors);
            all.vcpus.push(vcpu);
        }
        all
    }
}

/// Checks every byte of the working set against what the guest must have written by now, and returns how many pages
/// that are. The guest stands.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify(ram: &GuestRam, dials: &Dials) -> Result<u64, CheckError> {
    let (found, vcpus) = Dials::of(ram).ok_or(CheckError::NoGuest)?;
    if found != *dials {
        return Err(CheckError::OtherDials(Box::new(found)));
    }
    let counters = counters_page(ram);
    let mut table_page = [0; PAGE_SIZE];
    for vcpu in 0..vcpus {
        let (first, count) = share(dials.pages(), vcpus, vcpu);
        let writing = counted(&counters, vcpu, counter::WRITING);
        let mut sum = 0;
        for page in first..first + count {
            let entry = TABLE + page * 4;
            if page == first || entry.is_multiple_of(PAGE_SIZE as u64) {
                ram.read(0, entry / PAGE_SIZE as u64, &mut table_page);
            }
            let at = (entry % PAGE_SIZE as u64) as usize;
            let generation = word(&table_page, at & !7) >> ((at & 4) * 8);
            let generation = generation as u32;
            sum += u64::from(generation);
            check_page(ram, dials, page, generation, page == writing)?;
        }
        // It may stand between the entry in the table and the sum.
        let counted = counted(&counters, vcpu, counter::SUM);
        if sum != counted && sum != counted.wrapping_add(1) {
            return Err(CheckError::Table {
                vcpu,
                counted,
                table: sum,
            });
        }
    }
    Ok(dials.pages())
}

/// `is_in_hand`: the vCPU may stand in the middle of writing to it. Then the first words, or all of them, are of the
/// next generation already.
fn check_page(ram: &GuestRam, dials: &Dials, page: u64, generation: u32, is_in_hand: bool) -> Result<(), CheckError> {
    let mut found = [0; PAGE_SIZE];
    ram.read(0, WORKING_SET / PAGE_SIZE as u64 + page, &mut found);
    let mut expected = dials.content_of(page, generation);
    if found == expected {
        return Ok(());
    }
    if is_in_hand {
        for (at, word) in dials.words_of(page, generation.wrapping_add(1)) {
            expected[at..at + 8].copy_from_slice(&word);
            if found == expected {
                return Ok(());
            }
        }
    }
    Err(CheckError::Page { page, generation })
}

fn counters_page(ram: &GuestRam) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    ram.read(0, COUNTERS / PAGE_SIZE as u64, &mut page);
    page
}

fn counted(page: &[u8; PAGE_SIZE], vcpu: usize, which: usize) -> u64 {
    word(page, vcpu * COUNTERS_SIZE as usize + which)
}
