//! The numbers of the protocol (section *Values*, and the magic numbers of the messages).

/// First word of a server: `NBDMAGIC`.
pub(super) const INIT_PASSWORD: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle server, and first word of an option: `IHAVEOPT`.
pub(super) const I_HAVE_OPT: u64 = 0x4948_4156_454f_5054;
/// Second word of an oldstyle server.
pub(super) const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
pub(super) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST: u32 = 0x2560_9513;
pub(super) const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
pub(super) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY: u32 = 0x668e_33ef;
pub(super) const EXTENDED_REPLY: u32 = 0x6e8a_278c;

// Handshake flags, and the client's that answer them.
pub(super) const FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const NO_ZEROES: u16 = 1 << 1;

// Option types.
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;
pub(super) const OPT_EXTENDED_HEADERS: u32 = 11;

// Option reply types; those with bit 31 are errors.
pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_IS_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_IS_ERROR + 1;
pub(super) const REP_ERR_POLICY: u32 = REP_IS_ERROR + 2;
pub(super) const REP_ERR_INVALID: u32 = REP_IS_ERROR + 3;
pub(super) const REP_ERR_PLATFORM: u32 = REP_IS_ERROR + 4;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_IS_ERROR + 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_IS_ERROR + 6;
pub(super) const REP_ERR_SHUTDOWN: u32 = REP_IS_ERROR + 7;
pub(super) const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_IS_ERROR + 8;
pub(super) const REP_ERR_TOO_BIG: u32 = REP_IS_ERROR + 9;
pub(super) const REP_ERR_EXT_HEADER_REQD: u32 = REP_IS_ERROR + 10;

// Information types of NBD_REP_INFO.
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

// Transmission flags.
pub(super) const HAS_FLAGS: u16 = 1 << 0;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const SEND_DF: u16 = 1 << 7;
pub(super) const SEND_FAST_ZERO: u16 = 1 << 11;

// Request types.
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

// Command flags.
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;
pub(super) const FLAG_DF: u16 = 1 << 2;
pub(super) const FLAG_FAST_ZERO: u16 = 1 << 4;
/// Of every write with extended headers, and of nothing else.
pub(super) const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

// Structured reply flags and types; types with bit 15 are errors.
pub(super) const REPLY_DONE: u16 = 1 << 0;
pub(super) const REPLY_NONE: u16 = 0;
pub(super) const REPLY_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_OFFSET_HOLE: u16 = 2;
pub(super) const REPLY_BLOCK_STATUS: u16 = 5;
pub(super) const REPLY_BLOCK_STATUS_EXT: u16 = 6;
pub(super) const REPLY_IS_ERROR: u16 = 1 << 15;
pub(super) const REPLY_ERROR_OFFSET: u16 = REPLY_IS_ERROR + 2;
