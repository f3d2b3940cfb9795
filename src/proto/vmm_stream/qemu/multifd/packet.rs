//! What stands on a multifd channel (`migration/multifd.c`, QEMU 7.2 to 10.2). All integers are big-endian.
//!
//! ```text
//! initial, 64 bytes:    u32 magic, u32 1, uuid[16], u8 channel, 39 bytes that are not used
//! packet, 1344 bytes:   u32 magic, u32 1, u32 flags, u32 pages allocated, u32 pages, u32 payload, u64 number,
//!                       u32 zero pages (QEMU 9.0 and newer, 0 before), 28 bytes that are not used,
//!                       block[256], u64 offset[128]: those of the pages, then those of the zero pages
//! payload:              the content of the pages, 4096 bytes each, where nothing compresses them
//! ```
//!
//! A packet with the flag SYNC ends what the channel sends between two synchronisations, its own pages included. Where it has no pages, QEMU
//! 7.2 states the payload of the packet before.

use super::super::element::{be32, be64};
use super::super::ram::Ram;
use super::MultifdError;
use crate::proto::page::PAGE_SIZE;

pub(super) const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
pub(super) const INITIAL_LEN: usize = 64;
const INITIAL_CHANNEL: usize = 24;

const FLAGS: usize = 8;
const FLAGS_END: usize = 12;

/// Pages of a packet: QEMU's packets have 512 KiB.
pub(super) const MAX_PAGES: usize = 128;
const BLOCK: usize = 64;
const BLOCK_LEN: usize = 256;
const OFFSETS: usize = BLOCK + BLOCK_LEN;
pub(super) const PACKET_LEN: usize = OFFSETS + 8 * MAX_PAGES;

pub(super) const FLAG_SYNC: u32 = 1;
/// Which method compresses the payload; 0 is none.
pub(super) const FLAGS_COMPRESSION: u32 = 0x1f << 1;
pub(super) const FLAG_DEVICE_STATE: u32 = 1 << 6;

/// A packet without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    /// Block of the pages; meaningless where there are none.
    pub(super) block: u16,
    /// Pages whose content follows, in this order.
    pub(super) pages: Vec<u64>,
    pub(super) zero_pages: Vec<u64>,
    /// Whether the channel has come to a synchronisation.
    pub(super) is_sync: bool,
}

/// Reads the number of the channel that introduces itself with these [`INITIAL_LEN`] bytes.
pub(super) fn read_initial(bytes: &[u8]) -> Result<u8, MultifdError> {
    check_start(bytes)?;
    Ok(bytes[INITIAL_CHANNEL])
}

/// Reads the packet at the start of `bytes`; `None` where not all [`PACKET_LEN`] of it are there. What shows that it is none is told as soon as it is:
/// a packet with a device's state is shorter.
pub(super) fn read_packet(bytes: &[u8], ram: &Ram) -> Result<Option<Packet>, MultifdError> {
    if bytes.len() >= FLAGS_END {
        check_start(bytes)?;
        check_flags(bytes)?;
    }
    let Some(bytes) = bytes.get(..PACKET_LEN) else {
        return Ok(None);
    };
    let word = |at| be32(bytes, at).expect("a packet has its length");
    let flags = word(FLAGS);
    let (pages, zero_pages) = (word(16) as usize, word(32) as usize);
    if pages > MAX_PAGES || zero_pages > MAX_PAGES - pages {
        return Err(MultifdError::Packet("number of pages"));
    }
    let is_sync = flags & FLAG_SYNC != 0;
    if pages + zero_pages == 0 {
        return Ok(Some(Packet {
            block: 0,
            pages: Vec::new(),
            zero_pages: Vec::new(),
            is_sync,
        }));
    }
    if pages > 0 && word(20) as usize != pages * PAGE_SIZE {
        return Err(MultifdError::Packet("payload"));
    }
    let name = &bytes[BLOCK..BLOCK + BLOCK_LEN];
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let block = ram.block(name).ok_or(MultifdError::UnknownBlock)?;
    let offsets = bytes[OFFSETS..].chunks_exact(8).take(pages + zero_pages).map(|offset| {
        let offset = be64(offset).expect("eight bytes");
        let page = offset / PAGE_SIZE as u64;
        if !offset.is_multiple_of(PAGE_SIZE as u64) || page >= ram.pages_of(block) {
            return Err(MultifdError::OutsideBlock);
        }
        Ok(page)
    });
    let mut pages_and_zeroes = offsets.collect::<Result<Vec<u64>, MultifdError>>()?;
    let zero_pages = pages_and_zeroes.split_off(pages);
    Ok(Some(Packet {
        block,
        pages: pages_and_zeroes,
        zero_pages,
        is_sync,
    }))
}

fn check_flags(bytes: &[u8]) -> Result<(), MultifdError> {
    let flags = be32(bytes, FLAGS).unwrap_or_default();
    if flags & FLAGS_COMPRESSION != 0 {
        return Err(MultifdError::Compressed);
    }
    if flags & FLAG_DEVICE_STATE != 0 {
        return Err(MultifdError::DeviceState);
    }
    if flags & !FLAG_SYNC != 0 {
        return Err(MultifdError::Packet("flags"));
    }
    Ok(())
}

fn check_start(bytes: &[u8]) -> Result<(), MultifdError> {
    match (be32(bytes, 0), be32(bytes, 4)) {
        (Some(MAGIC), Some(VERSION)) => Ok(()),
        (Some(MAGIC), _) => Err(MultifdError::Packet("version")),
        _ => Err(MultifdError::Packet("magic number")),
    }
}
