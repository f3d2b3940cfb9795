//! A server that says what a test wants, and a client that is ready for it.

mod answers;
mod breaches;
mod commands;
mod handshake;
mod slices;

use bytes::{BufMut, Bytes};

use super::*;

/// Everything that a QEMU of any version says a writable export can do.
pub(super) const FLAGS: u16 = 0b1110_1110_1101 & !2;
/// Bytes of the export.
pub(super) const SIZE: u64 = 1 << 20;
/// Ids of the contexts, in the order of [`contexts`].
pub(super) const IDS: [u32; 2] = [7, 3];

pub(super) const ACK: u32 = 1;
pub(super) const UNSUPPORTED: u32 = 0x8000_0001;

pub(super) fn contexts() -> Vec<MetaContext> {
    vec![MetaContext::Allocation, MetaContext::DirtyBitmap("round-1".into())]
}

pub(super) fn greeting() -> Vec<u8> {
    b"NBDMAGICIHAVEOPT\0\x03".to_vec()
}

pub(super) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut reply = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    reply.put_u32(option);
    reply.put_u32(kind);
    reply.put_u32(u32::try_from(data.len()).unwrap());
    reply.extend(data);
    reply
}

pub(super) fn context_reply(id: u32, name: &str) -> Vec<u8> {
    let mut data = id.to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    option_reply(10, 4, &data)
}

pub(super) fn export_info(size: u64, flags: u16) -> Vec<u8> {
    let mut data = vec![0, 0];
    data.put_u64(size);
    data.put_u16(flags);
    option_reply(7, 3, &data)
}

pub(super) fn block_info(sizes: [u32; 3]) -> Vec<u8> {
    let mut data = vec![0, 3];
    sizes.into_iter().for_each(|size| data.put_u32(size));
    option_reply(7, 3, &data)
}

/// All that a server says up to the end of the handshake.
pub(super) fn whole_handshake(headers: Headers) -> Vec<u8> {
    let mut said = greeting();
    match headers {
        Headers::Extended => said.extend(option_reply(11, ACK, &[])),
        Headers::Structured => {
            said.extend(option_reply(11, UNSUPPORTED, b"unknown"));
            said.extend(option_reply(8, ACK, &[]));
        }
        Headers::Simple => {
            said.extend(option_reply(11, UNSUPPORTED, &[]));
            said.extend(option_reply(8, UNSUPPORTED, &[]));
        }
    }
    if headers > Headers::Simple {
        // Not in the order in which they are asked for.
        said.extend(context_reply(IDS[1], "qemu:dirty-bitmap:round-1"));
        said.extend(context_reply(IDS[0], "base:allocation"));
        said.extend(option_reply(10, ACK, &[]));
    }
    said.extend(block_info([1, 4096, 32 << 20]));
    said.extend(export_info(SIZE, FLAGS));
    said.extend(option_reply(7, ACK, &[]));
    said
}

/// A connection that is ready; nothing waits to be sent.
pub(super) fn ready(headers: Headers) -> Connection {
    let wanted = if headers == Headers::Simple {
        Vec::new()
    } else {
        contexts()
    };
    let mut connection = Connection::new("disk", wanted).unwrap();
    let mut events = Vec::new();
    connection.feed(&whole_handshake(headers), &mut events).unwrap();
    assert!(matches!(&events[..], [Event::Ready(export)] if export.headers == headers));
    sent(&mut connection);
    connection
}

/// What waits to be sent, in one.
pub(super) fn sent(connection: &mut Connection) -> Vec<u8> {
    let pieces = std::iter::from_fn(|| connection.take_outgoing());
    pieces.flat_map(|piece| piece.to_vec()).collect()
}

pub(super) fn simple(error: u32, cookie: Cookie, data: &[u8]) -> Vec<u8> {
    let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
    reply.put_u32(error);
    reply.put_u64(cookie.0);
    reply.extend(data);
    reply
}

/// A chunk in answer to a request at byte `offset`, in the form of `headers`.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) is_last: bool,
    pub(super) kind: u16,
    pub(super) cookie: Cookie,
    pub(super) offset: u64,
    pub(super) payload: Vec<u8>,
}

impl Chunk {
    pub(super) fn new(cookie: Cookie, offset: u64, kind: u16, payload: Vec<u8>) -> Self {
        Self {
            is_last: false,
            kind,
            cookie,
            offset,
            payload,
        }
    }

    pub(super) fn last(mut self) -> Self {
        self.is_last = true;
        self
    }

    pub(super) fn encode(&self, headers: Headers) -> Vec<u8> {
        let is_extended = headers == Headers::Extended;
        let magic = if is_extended { 0x6e8a_278c } else { 0x668e_33ef_u32 };
        let mut chunk = magic.to_be_bytes().to_vec();
        chunk.put_u16(u16::from(self.is_last));
        chunk.put_u16(self.kind);
        chunk.put_u64(self.cookie.0);
        if is_extended {
            chunk.put_u64(self.offset);
            chunk.put_u64(self.payload.len() as u64);
        } else {
            chunk.put_u32(u32::try_from(self.payload.len()).unwrap());
        }
        chunk.extend(&self.payload);
        chunk
    }
}

pub(super) fn data(offset: u64, data: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), data].concat()
}

pub(super) fn hole(offset: u64, length: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat()
}

pub(super) fn error(number: u32, text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).unwrap();
    [&number.to_be_bytes()[..], &length.to_be_bytes(), text.as_bytes()].concat()
}

pub(super) fn error_at(number: u32, text: &str, offset: u64) -> Vec<u8> {
    [&error(number, text)[..], &offset.to_be_bytes()].concat()
}

/// Kind and payload of block status.
pub(super) fn status(headers: Headers, id: u32, descriptors: &[(u32, u32)]) -> (u16, Vec<u8>) {
    let mut payload = id.to_be_bytes().to_vec();
    if headers == Headers::Extended {
        payload.put_u32(u32::try_from(descriptors.len()).unwrap());
        for &(length, flags) in descriptors {
            payload.put_u64(length.into());
            payload.put_u64(flags.into());
        }
        return (6, payload);
    }
    for &(length, flags) in descriptors {
        payload.put_u32(length);
        payload.put_u32(flags);
    }
    (5, payload)
}

pub(super) fn read(offset: u64, length: u32) -> Command {
    Command::Read {
        offset,
        length,
        reading: Reading::Sparse,
    }
}

pub(super) fn piece(offset: u64, bytes: &[u8]) -> Piece {
    Piece {
        offset,
        content: Content::Data(Bytes::copy_from_slice(bytes)),
    }
}

pub(super) fn hole_piece(offset: u64, length: u64) -> Piece {
    Piece {
        offset,
        content: Content::Hole(length),
    }
}
