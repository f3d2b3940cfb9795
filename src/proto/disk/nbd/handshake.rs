//! From the first word to `NBD_OPT_GO` (section *Handshake phase*).
//!
//! ```text
//! greeting → EXTENDED_HEADERS ─refused→ STRUCTURED_REPLY ─refused→ simple
//!                   │ agreed                 │ agreed                │ (no contexts wanted)
//!                   └────────────────────────┴──► SET_META_CONTEXT ──┴──► GO → Export
//! ```
//!
//! One option is open at a time: the next depends on the answer, and the socket is local. The wanted contexts are all selected, or
//! the handshake ends: a caller that asked for a dirty bitmap cannot go on without.

use bytes::{BufMut, Bytes, BytesMut};

use super::breach::Breach;
use super::connection::ConnectionError;
use super::context::MetaContext;
use super::export::{BlockSizes, Export, Headers};
use super::option::{self, Info, MAX_REPLY_DATA, ReplyHead};
use super::request::RequestError;
use super::{MAX_CONTEXTS, MAX_STRING, numbers};

/// Why a server and this client do not come together, though both keep to the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No export of that name.
    #[error("there is no export {export:?} ({text}): check that it was added and how it is named")]
    UnknownExport {
        /// The name asked for.
        export: String,
        /// The server's words.
        text: String,
    },
    /// The server refuses something else, or everything.
    #[error("it refuses option {option} ({reason}; {text})")]
    Option {
        /// The option.
        option: u32,
        /// What the type of the reply means.
        reason: &'static str,
        /// The server's words.
        text: String,
    },
    /// Contexts were asked of a server that has no replies for them.
    #[error("it cannot tell block status: it has no structured replies")]
    NoStructuredReplies,
    /// A context that is not there. QEMU's answer is silence, not an error.
    #[error(
        "its export {export:?} does not have the metadata context {name}: check that the bitmap exists and was named when the export \
         was added"
    )]
    NoContext {
        /// The export.
        export: String,
        /// The context's name.
        name: String,
    },
}

/// The state of a handshake.
#[derive(Debug)]
pub(super) struct Handshake {
    export: String,
    contexts: Vec<MetaContext>,
    /// The ids of those that the server has selected.
    ids: Vec<Option<u32>>,
    headers: Headers,
    info: Information,
    step: Step,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug)]
enum Step {
    Greeting,
    /// The head of a reply to this option.
    Head {
        option: u32,
    },
    /// Its data.
    Data(ReplyHead),
}

#[derive(Debug, Default)]
struct Information {
    export: Option<(u64, super::TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    /// Replies so far.
    count: usize,
}

/// What was agreed on: the export, and the id of each wanted context.
#[derive(Debug)]
pub(super) struct Agreement {
    pub(super) export: Export,
    pub(super) contexts: Vec<(u32, MetaContext)>,
}

impl Handshake {
    pub(super) fn new(export: &str, contexts: Vec<MetaContext>) -> Result<Self, RequestError> {
        let names = contexts.iter().map(MetaContext::name);
        if let Some(name) = std::iter::once(export.to_owned())
            .chain(names)
            .find(|name| name.len() > MAX_STRING || name.contains('\0'))
        {
            return Err(RequestError::Name { name });
        }
        let is_twice = contexts
            .iter()
            .enumerate()
            .any(|(at, context)| contexts[..at].contains(context));
        if is_twice || contexts.len() > MAX_CONTEXTS {
            return Err(RequestError::Contexts { count: contexts.len() });
        }
        Ok(Self {
            export: export.to_owned(),
            ids: vec![None; contexts.len()],
            contexts,
            headers: Headers::Simple,
            info: Information::default(),
            step: Step::Greeting,
        })
    }

    /// Bytes that [`Handshake::advance`] takes next.
    pub(super) fn expected(&self) -> usize {
        match self.step {
            Step::Greeting => GREETING,
            Step::Head { .. } => ReplyHead::LEN,
            // Compared with its limit when the head came.
            Step::Data(head) => head.length as usize,
        }
    }

    /// Takes exactly the expected bytes; adds what has to be sent.
    pub(super) fn advance(
        &mut self,
        bytes: Bytes,
        outgoing: &mut impl FnMut(Bytes),
    ) -> Result<Option<Agreement>, ConnectionError> {
        match self.step {
            Step::Greeting => {
                outgoing(answer_greeting(&bytes)?);
                self.ask(numbers::OPT_EXTENDED_HEADERS, outgoing);
                Ok(None)
            }
            Step::Head { option } => {
                let head = ReplyHead::decode(bytes)?;
                if head.option != option {
                    return Err(Breach::OtherOption {
                        asked: option,
                        found: head.option,
                    }
                    .into());
                }
                if head.length as usize > MAX_REPLY_DATA {
                    return Err(Breach::OptionReplyTooLong {
                        option,
                        bytes: head.length,
                    }
                    .into());
                }
                self.step = Step::Data(head);
                Ok(None)
            }
            Step::Data(head) => {
                self.step = Step::Head { option: head.option };
                self.reply(head, bytes, outgoing)
            }
        }
    }

    /// Sends an option and waits for its reply.
    fn ask(&mut self, option: u32, outgoing: &mut impl FnMut(Bytes)) {
        outgoing(match option {
            numbers::OPT_SET_META_CONTEXT => option::set_meta_context(&self.export, &self.contexts),
            numbers::OPT_GO => option::go(&self.export),
            _ => option::plain(option),
        });
        self.step = Step::Head { option };
    }

    fn reply(
        &mut self,
        head: ReplyHead,
        data: Bytes,
        outgoing: &mut impl FnMut(Bytes),
    ) -> Result<Option<Agreement>, ConnectionError> {
        if head.is_error() {
            self.refused(head, &data, outgoing)?;
            return Ok(None);
        }
        match (head.option, head.kind) {
            (_, numbers::REP_ACK) if !data.is_empty() => return Err(head.malformed().into()),
            (numbers::OPT_EXTENDED_HEADERS, numbers::REP_ACK) => self.agreed(Headers::Extended, outgoing),
            (numbers::OPT_STRUCTURED_REPLY, numbers::REP_ACK) => self.agreed(Headers::Structured, outgoing),
            (numbers::OPT_SET_META_CONTEXT, numbers::REP_META_CONTEXT) => self.selected(head, data)?,
            (numbers::OPT_SET_META_CONTEXT, numbers::REP_ACK) => {
                self.all_selected()?;
                self.ask(numbers::OPT_GO, outgoing);
            }
            (numbers::OPT_GO, numbers::REP_INFO) => self.inform(head, data)?,
            (numbers::OPT_GO, numbers::REP_ACK) => return self.agreement().map(Some).map_err(Into::into),
            (option, reply) => return Err(Breach::UnexpectedOptionReply { option, reply }.into()),
        }
        Ok(None)
    }

    fn agreed(&mut self, headers: Headers, outgoing: &mut impl FnMut(Bytes)) {
        self.headers = headers;
        let next = if self.contexts.is_empty() {
            numbers::OPT_GO
        } else {
            numbers::OPT_SET_META_CONTEXT
        };
        self.ask(next, outgoing);
    }

    /// An error: there is a way without it, or the handshake ends.
    fn refused(&mut self, head: ReplyHead, text: &Bytes, outgoing: &mut impl FnMut(Bytes)) -> Result<(), Refusal> {
        let is_not_offered = matches!(
            head.kind,
            numbers::REP_ERR_UNSUP | numbers::REP_ERR_POLICY | numbers::REP_ERR_INVALID | numbers::REP_ERR_PLATFORM
        );
        match head.option {
            numbers::OPT_EXTENDED_HEADERS if is_not_offered => self.ask(numbers::OPT_STRUCTURED_REPLY, outgoing),
            numbers::OPT_STRUCTURED_REPLY if is_not_offered && self.contexts.is_empty() => {
                self.ask(numbers::OPT_GO, outgoing);
            }
            numbers::OPT_STRUCTURED_REPLY if is_not_offered => return Err(Refusal::NoStructuredReplies),
            option => return Err(self.refusal(option, head.kind, text)),
        }
        Ok(())
    }

    fn refusal(&self, option: u32, kind: u32, text: &Bytes) -> Refusal {
        let text = if text.is_empty() {
            "it gives no reason".to_owned()
        } else {
            String::from_utf8_lossy(text).into_owned()
        };
        if kind == numbers::REP_ERR_UNKNOWN {
            return Refusal::UnknownExport {
                export: self.export.clone(),
                text,
            };
        }
        Refusal::Option {
            option,
            reason: reason(kind),
            text,
        }
    }

    /// One context of those that were asked for.
    fn selected(&mut self, head: ReplyHead, data: Bytes) -> Result<(), Breach> {
        let (id, name) = option::decode_context(data).ok_or_else(|| head.malformed())?;
        if self.ids.contains(&Some(id)) {
            return Err(Breach::ContextIdTwice { id });
        }
        let at = self.contexts.iter().position(|context| context.name() == name);
        match at.and_then(|at| self.ids.get_mut(at)) {
            Some(place @ None) => *place = Some(id),
            _ => return Err(Breach::UnexpectedContext { name }),
        }
        Ok(())
    }

    fn all_selected(&self) -> Result<(), Refusal> {
        let missing = self.contexts.iter().zip(&self.ids).find(|(_, id)| id.is_none());
        missing.map_or(Ok(()), |(context, _)| {
            Err(Refusal::NoContext {
                export: self.export.clone(),
                name: context.name(),
            })
        })
    }

    fn inform(&mut self, head: ReplyHead, data: Bytes) -> Result<(), Breach> {
        self.info.count += 1;
        if self.info.count > MAX_INFORMATION {
            return Err(Breach::TooManyOptionReplies { option: head.option });
        }
        match Info::decode(data).ok_or_else(|| head.malformed())?? {
            Info::Export { size_bytes, flags } => self.info.export = Some((size_bytes, flags)),
            Info::BlockSizes(sizes) => self.info.block_sizes = Some(sizes),
            Info::Other => {}
        }
        Ok(())
    }

    fn agreement(&mut self) -> Result<Agreement, Breach> {
        let (size_bytes, flags) = self.info.export.ok_or(Breach::NoExportInformation)?;
        if flags.0 & numbers::HAS_FLAGS == 0 {
            return Err(Breach::NoExportInformation);
        }
        if size_bytes > MAX_SIZE {
            return Err(Breach::ExportTooLarge { bytes: size_bytes });
        }
        let ids = std::mem::take(&mut self.ids).into_iter().flatten();
        Ok(Agreement {
            export: Export {
                size_bytes,
                flags,
                block_sizes: self.info.block_sizes.unwrap_or(BlockSizes::UNSAID),
                headers: self.headers,
            },
            contexts: ids.zip(std::mem::take(&mut self.contexts)).collect(),
        })
    }
}

/// The client's flags, in answer to a greeting.
fn answer_greeting(greeting: &[u8]) -> Result<Bytes, Breach> {
    let word = |at: usize| {
        let bytes = greeting[at..at + 8].try_into().expect("eight bytes");
        u64::from_be_bytes(bytes)
    };
    let (first, second) = (word(0), word(8));
    if (first, second) == (numbers::INIT_PASSWORD, numbers::OLDSTYLE) {
        return Err(Breach::NotFixedNewstyle);
    }
    if (first, second) != (numbers::INIT_PASSWORD, numbers::I_HAVE_OPT) {
        return Err(Breach::NotNbd { first, second });
    }
    let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
    if flags & numbers::FIXED_NEWSTYLE == 0 {
        return Err(Breach::NotFixedNewstyle);
    }
    let mut answer = BytesMut::with_capacity(4);
    answer.put_u32(u32::from(flags & (numbers::FIXED_NEWSTYLE | numbers::NO_ZEROES)));
    Ok(answer.freeze())
}

/// What an error reply means (section *Option reply types*).
fn reason(kind: u32) -> &'static str {
    match kind {
        numbers::REP_ERR_UNSUP => "it does not know it",
        numbers::REP_ERR_POLICY => "it is not allowed here",
        numbers::REP_ERR_INVALID => "it finds it malformed",
        numbers::REP_ERR_PLATFORM => "its platform cannot do it",
        numbers::REP_ERR_TLS_REQD => "it wants TLS, which is not spoken on a local socket",
        numbers::REP_ERR_SHUTDOWN => "it is shutting down",
        numbers::REP_ERR_BLOCK_SIZE_REQD => "it wants its block sizes to be kept",
        numbers::REP_ERR_TOO_BIG => "it is too long for it",
        numbers::REP_ERR_EXT_HEADER_REQD => "it wants extended headers",
        _ => "for a reason that this version does not know",
    }
}

/// `NBDMAGIC`, `IHAVEOPT`, flags.
const GREETING: usize = 18;
/// Kinds of information that the protocol has, twice over.
const MAX_INFORMATION: usize = 16;
/// Offsets are signed in the systems that serve them.
const MAX_SIZE: u64 = i64::MAX as u64;
