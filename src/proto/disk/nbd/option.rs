//! Options and the replies to them, in bytes (section *Fixed newstyle negotiation*).
//!
//! ```text
//! option  IHAVEOPT 8 │ option 4 │ length 4 │ data          reply  magic 8 │ option 4 │ type 4 │ length 4 │ data
//! ```
//!
//! All numbers are big-endian.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::MAX_STRING;
use super::breach::Breach;
use super::context::MetaContext;
use super::export::{BlockSizes, TransmissionFlags};
use super::numbers;

/// The head of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReplyHead {
    pub(super) option: u32,
    pub(super) kind: u32,
    /// Bytes of data that follow; not compared with anything yet.
    pub(super) length: u32,
}

/// Information about an export (`NBD_REP_INFO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Info {
    Export {
        size_bytes: u64,
        flags: TransmissionFlags,
    },
    BlockSizes(BlockSizes),
    /// A name, a description, or what came after this was written.
    Other,
}

impl ReplyHead {
    pub(super) const LEN: usize = 20;

    pub(super) fn decode(mut bytes: Bytes) -> Result<Self, Breach> {
        let magic = bytes.get_u64();
        if magic != numbers::OPTION_REPLY {
            return Err(Breach::NoOptionReply { magic });
        }
        Ok(Self {
            option: bytes.get_u32(),
            kind: bytes.get_u32(),
            length: bytes.get_u32(),
        })
    }

    pub(super) fn is_error(self) -> bool {
        self.kind & numbers::REP_IS_ERROR != 0
    }

    pub(super) fn malformed(self) -> Breach {
        Breach::MalformedOptionReply {
            option: self.option,
            reply: self.kind,
        }
    }
}

impl Info {
    /// `None` if malformed, except for block sizes that contradict each other.
    pub(super) fn decode(mut bytes: Bytes) -> Option<Result<Self, Breach>> {
        let kind = bytes.try_get_u16().ok()?;
        match (kind, bytes.len()) {
            (numbers::INFO_EXPORT, 10) => Some(Ok(Self::Export {
                size_bytes: bytes.get_u64(),
                flags: TransmissionFlags(bytes.get_u16()),
            })),
            (numbers::INFO_BLOCK_SIZE, 12) => {
                let sizes = BlockSizes::stated(bytes.get_u32(), bytes.get_u32(), bytes.get_u32());
                Some(sizes.map(Self::BlockSizes))
            }
            (numbers::INFO_EXPORT | numbers::INFO_BLOCK_SIZE, _) => None,
            _ => Some(Ok(Self::Other)),
        }
    }
}

/// The id and the name of a metadata context (`NBD_REP_META_CONTEXT`).
pub(super) fn decode_context(mut bytes: Bytes) -> Option<(u32, String)> {
    let id = bytes.try_get_u32().ok()?;
    Some((id, String::from_utf8(bytes.into()).ok()?))
}

/// An option without data.
pub(super) fn plain(option: u32) -> Bytes {
    encode(option, &[])
}

/// `NBD_OPT_SET_META_CONTEXT`: exactly these contexts of `export`.
pub(super) fn set_meta_context(export: &str, contexts: &[MetaContext]) -> Bytes {
    let mut data = Vec::new();
    put_string(&mut data, export);
    data.put_u32(counted(contexts.len()));
    for context in contexts {
        put_string(&mut data, &context.name());
    }
    encode(numbers::OPT_SET_META_CONTEXT, &data)
}

/// `NBD_OPT_GO`: `export` from here on. By asking for block sizes the client promises to keep to them.
pub(super) fn go(export: &str) -> Bytes {
    let mut data = Vec::new();
    put_string(&mut data, export);
    data.put_u16(1);
    data.put_u16(numbers::INFO_BLOCK_SIZE);
    encode(numbers::OPT_GO, &data)
}

fn encode(option: u32, data: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(16 + data.len());
    bytes.put_u64(numbers::I_HAVE_OPT);
    bytes.put_u32(option);
    bytes.put_u32(counted(data.len()));
    bytes.put_slice(data);
    bytes.freeze()
}

fn put_string(data: &mut Vec<u8>, text: &str) {
    data.put_u32(counted(text.len()));
    data.put_slice(text.as_bytes());
}

/// Lengths of our own: a name and a few contexts, each checked to be a string of the protocol.
fn counted(length: usize) -> u32 {
    u32::try_from(length).expect("a few strings of the protocol have less than 4 GiB")
}

/// Most data in a reply: a context's id and its name.
pub(super) const MAX_REPLY_DATA: usize = 4 + MAX_STRING;
