//! Locks that belong to an open file and not to the process (`F_OFD_SETLK`), as QEMU takes them: another descriptor of the same file may come and go.

use std::fs::File;
use std::io;
use std::ops::Range;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, c_int, flock, off_t};

/// Takes a shared lock on all of a file, for as long as it is open: whoever wants to write it, and asks, is refused.
///
/// # Errors
/// Somebody else has an exclusive one; the file system has no locks.
pub(crate) fn share_whole(file: &File) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock(F_RDLCK, 0..0)))?;
    Ok(())
}

/// Which locks are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    Any,
    /// Those that keep others from reading.
    Exclusive,
}

/// Whether somebody holds a lock on these bytes, by another open file than this one.
pub(crate) fn is_held(file: &File, bytes: Range<off_t>, of: Of) -> bool {
    let mut found = match of {
        Of::Any => lock(F_WRLCK, bytes),
        Of::Exclusive => lock(F_RDLCK, bytes),
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).is_ok() && c_int::from(found.l_type) != F_UNLCK
}

/// An empty range: to the end of the file, however it grows.
fn lock(kind: c_int, bytes: Range<off_t>) -> flock {
    flock {
        l_type: kind as _,
        l_whence: SEEK_SET as _,
        l_start: bytes.start,
        l_len: bytes.end - bytes.start,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_outlives_other_descriptors_of_its_file_and_is_not_in_its_own_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::open(file.path()).unwrap();
        let (held, other) = (open(), open());
        assert!(!is_held(&other, 100..300, Of::Any));
        share_whole(&held).unwrap();
        drop(open());
        assert!(is_held(&other, 100..300, Of::Any));
        assert!(!is_held(&held, 100..300, Of::Any));
        assert!(!is_held(&other, 100..300, Of::Exclusive));
        drop(held);
        assert!(!is_held(&other, 100..300, Of::Any));
    }
}
