//! What a server says when it could not do one request. The connection goes on.

use std::fmt;

/// An error that a server reported for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind of error.
    pub number: ErrorNumber,
    /// The server's words, or nothing.
    pub text: String,
    /// Where on the disk, if the server said so.
    pub offset: Option<u64>,
}

/// A value of section *Error values*: `errno` of Linux, whatever the server runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorNumber(pub u32);

impl ErrorNumber {
    /// The export does not allow it.
    pub const PERM: Self = Self(1);
    /// The disk could not be read or written.
    pub const IO: Self = Self(5);
    /// The request was not understood or is out of bounds.
    pub const INVAL: Self = Self(22);
    /// No space is left.
    pub const NOSPC: Self = Self(28);
    /// Too much for one unfragmented read.
    pub const OVERFLOW: Self = Self(75);
    /// It would not be fast.
    pub const NOTSUP: Self = Self(95);
    /// The server is being shut down.
    pub const SHUTDOWN: Self = Self(108);
}

impl fmt::Display for ErrorNumber {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::PERM => write!(out, "it is not permitted (EPERM)"),
            Self::IO => write!(out, "the disk could not be read or written (EIO)"),
            Self::INVAL => write!(out, "the request is not valid (EINVAL)"),
            Self::NOSPC => write!(out, "no space is left (ENOSPC)"),
            Self::OVERFLOW => write!(out, "it is too much for one answer (EOVERFLOW)"),
            Self::NOTSUP => write!(out, "it is not supported (ENOTSUP)"),
            Self::SHUTDOWN => write!(out, "the server is shutting down (ESHUTDOWN)"),
            Self(12) => write!(out, "the server has no memory for it (ENOMEM)"),
            Self(other) => write!(out, "error {other}"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.number)?;
        if let Some(offset) = self.offset {
            write!(out, " at byte {offset}")?;
        }
        if !self.text.is_empty() {
            write!(out, ": {}", self.text)?;
        }
        Ok(())
    }
}
