//! Single headers of QEMU's outer framing (`migration/savevm.c`). All integers are big-endian.
//!
//! ```text
//! u32 "QEVM", u32 3
//! 0x07 CONFIGURATION u32 len, machine[len], then subsections: 0x05, u8 n, name[n], u32 version, body
//! 0x01 START, 0x04 FULL   u32 id, u8 n, name[n], u32 instance, u32 version, body, footer
//! 0x02 PART,  0x03 END    u32 id, body, footer
//! 0x08 COMMAND            u16 command, u16 len, data[len]; PACKAGED: data is u32 len, and as many bytes follow
//! 0x00 EOF
//! 0x06 DESCRIPTION        u32 len, JSON[len]                         after EOF only
//! footer                  0x7e, u32 id                               unless the machine goes without
//! ```

use super::super::{LostTrackReason, Read};

/// "QEVM", version 3: the only one in use since 2009.
pub(crate) const FILE_HEADER: [u8; 8] = [0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3];

pub(crate) const EOF: u8 = 0x00;
pub(crate) const START: u8 = 0x01;
pub(crate) const PART: u8 = 0x02;
pub(crate) const END: u8 = 0x03;
pub(crate) const FULL: u8 = 0x04;
pub(super) const SUBSECTION: u8 = 0x05;
pub(crate) const DESCRIPTION: u8 = 0x06;
pub(crate) const CONFIGURATION: u8 = 0x07;
pub(super) const COMMAND: u8 = 0x08;
pub(crate) const FOOTER: u8 = 0x7e;

/// The command whose data states the length of a nested stream behind it.
pub(super) const COMMAND_PACKAGED: u16 = 7;

/// Bytes of a footer.
pub(super) const FOOTER_LEN: usize = 5;

/// Bytes of a PART or END header.
pub(super) const PART_LEN: usize = 5;

/// QEMU numbers sections from zero as devices register them; a guest has hundreds at most.
const MAX_SECTION_ID: u32 = 0xffff;

/// Versions are small numbers counted up by hand.
const MAX_VERSION: u32 = 0xffff;

/// Longest description that is believed. A guest with 33 devices has 46 KB.
const MAX_DESCRIPTION: u32 = 64 << 20;

/// One element's header. `'a`: the bytes that it was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element<'a> {
    /// START or FULL.
    Opening {
        full: bool,
        id: u32,
        name: &'a [u8],
        instance: u32,
        version: u32,
    },
    /// PART or END.
    Following { end: bool, id: u32 },
    /// A command and all that belongs to it behind the header.
    Command { command: u16, len: u16, data: u64 },
    /// The end of the stream.
    Eof,
}

/// Reads an element's header and its length in bytes, at most 271.
pub(super) fn read(bytes: &[u8]) -> Read<(Element<'_>, usize)> {
    const NOT: LostTrackReason = LostTrackReason::Element;
    let Some(&kind) = bytes.first() else { return Read::More };
    match kind {
        START | FULL => {
            let (Some(id), Some(&n)) = (be32(bytes, 1), bytes.get(5)) else {
                return Read::More;
            };
            let n = usize::from(n);
            let Some(name) = bytes.get(6..6 + n) else {
                return Read::More;
            };
            if n == 0 || id > MAX_SECTION_ID || !name.iter().all(is_printable) {
                return Read::Not(NOT);
            }
            let (Some(instance), Some(version)) = (be32(bytes, 6 + n), be32(bytes, 10 + n)) else {
                return Read::More;
            };
            if version > MAX_VERSION {
                return Read::Not(NOT);
            }
            Read::Is((
                Element::Opening {
                    full: kind == FULL,
                    id,
                    name,
                    instance,
                    version,
                },
                14 + n,
            ))
        }
        PART | END => {
            let Some(id) = be32(bytes, 1) else { return Read::More };
            Read::Is((Element::Following { end: kind == END, id }, PART_LEN))
        }
        COMMAND => {
            let (Some(command), Some(len)) = (be16(bytes, 1), be16(bytes, 3)) else {
                return Read::More;
            };
            if command != COMMAND_PACKAGED {
                return Read::Is((
                    Element::Command {
                        command,
                        len,
                        data: u64::from(len),
                    },
                    5,
                ));
            }
            if len != 4 {
                return Read::Not(NOT);
            }
            let Some(package) = be32(bytes, 5) else {
                return Read::More;
            };
            Read::Is((
                Element::Command {
                    command,
                    len,
                    data: u64::from(package),
                },
                9,
            ))
        }
        EOF => Read::Is((Element::Eof, 1)),
        _ => Read::Not(NOT),
    }
}

/// Whether a command with that much data exists (QEMU 10.2): asked where the bytes before give no reason to believe it.
pub(super) fn is_known_command(command: u16, len: u16) -> bool {
    match command {
        1 | 4 | 5 | 8 | 9 | 11 => len == 0,
        2 | COMMAND_PACKAGED => len == 4,
        3 => len == 0 || len == 16,
        6 => len >= 3,
        10 => len >= 2,
        _ => false,
    }
}

/// Reads the header of the description: the length of the JSON behind [`DESCRIPTION_LEN`] bytes.
pub(super) fn read_description(bytes: &[u8]) -> Read<u32> {
    const NOT: LostTrackReason = LostTrackReason::Element;
    match bytes.first() {
        None => return Read::More,
        Some(&DESCRIPTION) => {}
        Some(_) => return Read::Not(NOT),
    }
    let Some(len) = be32(bytes, 1) else { return Read::More };
    if !(2..=MAX_DESCRIPTION).contains(&len) {
        return Read::Not(NOT);
    }
    match bytes.get(DESCRIPTION_LEN..DESCRIPTION_LEN + 2) {
        None => Read::More,
        Some(b"{\"") => Read::Is(len),
        Some(_) => Read::Not(NOT),
    }
}

/// Bytes of the description's header.
pub(super) const DESCRIPTION_LEN: usize = 5;

pub(super) fn is_printable(byte: &u8) -> bool {
    matches!(byte, 0x20..=0x7e)
}

pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[inline]
pub(super) fn be64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.first_chunk()?))
}
