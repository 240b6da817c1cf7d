//! Descriptors that who started nestling has left open for it (`fd=N`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// A copy of descriptor `fd`, which must be none of the standard ones.
///
/// # Errors
/// A sentence that begins with `fd=`.
pub(crate) fn inherited(fd: RawFd) -> Result<OwnedFd, String> {
    if fd <= libc::STDERR_FILENO {
        return Err(format!("fd={fd} is standard input or output; pass another"));
    }
    // SAFETY: borrowed for one call only, which fails if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed
        .try_clone_to_owned()
        .map_err(|why| format!("fd={fd} is not open ({why}); pass an open one"))
}

/// Whether a socket listens.
///
/// # Errors
/// It is no socket.
pub(crate) fn listens(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut listens: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is an int, whose size `length` says; both are writable for the call.
    let refused = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ACCEPTCONN,
            (&raw mut listens).cast(),
            &raw mut length,
        )
    };
    match refused {
        0 => Ok(listens != 0),
        _ => Err(io::Error::last_os_error()),
    }
}
