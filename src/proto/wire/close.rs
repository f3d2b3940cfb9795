//! Why a connection was closed: a number on the wire, a sentence for a person. Never one of our error types.

/// Application close codes of QUIC connections (RFC 9000, 19.19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CloseCode {
    /// Done, or no longer needed.
    Finished = 1,
    /// The gateway is being stopped and takes no more migrations.
    Draining = 2,
    /// The peer sent what the wire format does not allow.
    ProtocolViolation = 3,
    /// No version of the wire format is spoken by both.
    NoCommonVersion = 4,
    /// The peer is no longer paired.
    NotTrusted = 5,
    /// A newer connection of the same peer took over.
    Superseded = 6,
}

impl CloseCode {
    /// What happened, in words that the other side's operator can use.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Draining => "the gateway is being stopped",
            Self::ProtocolViolation => "a message did not follow the wire format",
            Self::NoCommonVersion => "the gateways have no wire version in common: upgrade the older one",
            Self::NotTrusted => "the gateways are not paired any more",
            Self::Superseded => "a newer connection took over",
        }
    }
}

impl From<CloseCode> for u32 {
    fn from(code: CloseCode) -> Self {
        code as Self
    }
}
