//! Descriptors that who started nestling has left open for it (`fd=N`).

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

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
