//! How a server can break the protocol. Nothing that it sends afterwards can be told apart, so each of these ends the connection.

/// What a server did that the protocol does not allow, or that is beyond the limits of [`super`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// The first words are not NBD's.
    #[error("it does not speak NBD: its first words are {first:#018x} {second:#018x}")]
    NotNbd {
        /// First eight bytes.
        first: u64,
        /// The next eight.
        second: u64,
    },
    /// A server without options.
    #[error("it speaks only the old NBD handshake, without options: upgrade the server")]
    NotFixedNewstyle,
    /// What should be an option reply is something else.
    #[error("it sent {magic:#018x} where the reply to an option begins")]
    NoOptionReply {
        /// The first eight bytes.
        magic: u64,
    },
    /// A reply to an option that was not sent.
    #[error("it replied to option {found} while option {asked} was open")]
    OtherOption {
        /// The option that was sent.
        asked: u32,
        /// The option of the reply.
        found: u32,
    },
    /// A longer reply than any can be.
    #[error("its reply to option {option} is said to have {bytes} bytes, more than any has")]
    OptionReplyTooLong {
        /// The option.
        option: u32,
        /// Stated length.
        bytes: u32,
    },
    /// The content of an option reply has another form.
    #[error("its reply of type {reply} to option {option} is malformed")]
    MalformedOptionReply {
        /// The option.
        option: u32,
        /// The reply's type.
        reply: u32,
    },
    /// A kind of reply that does not belong to the option.
    #[error("it sent a reply of type {reply} to option {option}, which has none such")]
    UnexpectedOptionReply {
        /// The option.
        option: u32,
        /// The reply's type.
        reply: u32,
    },
    /// More pieces of information than there are kinds.
    #[error("it sent more replies to option {option} than it can have")]
    TooManyOptionReplies {
        /// The option.
        option: u32,
    },
    /// A metadata context that was not asked for, or that was named before.
    #[error("it selected the metadata context {name:?}, which was not asked for or is there already")]
    UnexpectedContext {
        /// Its name.
        name: String,
    },
    /// Two contexts with one id.
    #[error("it gave two metadata contexts the id {id}")]
    ContextIdTwice {
        /// The id.
        id: u32,
    },
    /// Transmission would begin without its size and flags.
    #[error("it did not say how large the export is")]
    NoExportInformation,
    /// A size beyond what an offset can say.
    #[error("it says that the export has {bytes} bytes, more than any disk")]
    ExportTooLarge {
        /// Stated size.
        bytes: u64,
    },
    /// Block sizes that contradict the section *Block sizes*.
    #[error(
        "its block sizes contradict each other: smallest {minimum}, preferred {preferred}, largest {maximum} bytes"
    )]
    BlockSizes {
        /// Stated minimum.
        minimum: u32,
        /// Stated preference.
        preferred: u32,
        /// Stated maximum.
        maximum: u32,
    },
    /// What should be a reply is something else, or a kind that was not agreed on.
    #[error("it sent {magic:#010x} where a reply of the agreed kind begins")]
    NoReply {
        /// The first four bytes.
        magic: u32,
    },
    /// A reply to nothing.
    #[error("it replied to a request with cookie {cookie} that is not open")]
    UnknownCookie {
        /// The cookie.
        cookie: u64,
    },
    /// Extended headers repeat the request's offset.
    #[error("its reply to a request at byte {asked} says byte {found}")]
    OtherOffset {
        /// Offset of the request.
        asked: u64,
        /// Offset of the reply.
        found: u64,
    },
    /// A reply without chunks, to a request whose answer has content.
    #[error("it sent a simple reply to a request that has a structured one")]
    SimpleReply,
    /// A chunk that says less or more than its type can.
    #[error("its chunk of type {kind} is said to have {bytes} bytes, which none of its kind has here")]
    ChunkLength {
        /// The chunk's type.
        kind: u16,
        /// Stated length.
        bytes: u64,
    },
    /// The content of a chunk has another form.
    #[error("its chunk of type {kind} is malformed")]
    MalformedChunk {
        /// The chunk's type.
        kind: u16,
    },
    /// A chunk that cannot answer this request.
    #[error("it sent a chunk of type {kind} in answer to a request that has none such")]
    UnexpectedChunk {
        /// The chunk's type.
        kind: u16,
    },
    /// `NBD_REPLY_TYPE_NONE` is always the last.
    #[error("it sent an empty chunk that is not the last of its reply")]
    EmptyChunkNotLast,
    /// Content outside of what was asked for.
    #[error("it sent bytes {start}..{end} in answer to a request for bytes {from}..{to}")]
    OutOfRequest {
        /// First byte sent.
        start: u64,
        /// One past the last byte sent; saturated.
        end: u64,
        /// First byte asked for.
        from: u64,
        /// One past the last byte asked for.
        to: u64,
    },
    /// A byte twice in one read.
    #[error("it sent byte {offset} twice in answer to one read")]
    Overlap {
        /// The byte.
        offset: u64,
    },
    /// A read in crumbs.
    #[error("it sent an answer to a read in more than {most} chunks")]
    TooManyPieces {
        /// The limit for this read.
        most: usize,
    },
    /// A read was said to be complete and is not.
    #[error("it ended its answer to a read without byte {offset}")]
    Missing {
        /// The first byte that is missing.
        offset: u64,
    },
    /// Block status for a context that was not selected, or that was told before in this reply.
    #[error("it sent block status for the metadata context with id {id}, which is unknown or was told before")]
    ContextStatus {
        /// The id.
        id: u32,
    },
    /// Descriptors that say nothing, or go on beyond the request.
    #[error("its block status for byte {offset} has an empty descriptor, or one more after its end")]
    Descriptors {
        /// First byte of the request.
        offset: u64,
    },
    /// Block status without one of the contexts.
    #[error("it ended its block status without the metadata context {name}")]
    StatusMissing {
        /// Name of the context.
        name: String,
    },
    /// An error that is none.
    #[error("it reported an error with the number 0")]
    ErrorZero,
}
