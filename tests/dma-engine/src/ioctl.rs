//! One kernel call, with errors that name it.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};

/// `ioctl(fd, request, argument)`.
///
/// # Safety
/// `argument` must be what `request` takes, for as long as the kernel uses it.
///
/// # Errors
/// What the kernel said.
pub(crate) unsafe fn ioctl<T>(
    name: &'static str,
    fd: impl AsFd,
    request: u64,
    argument: *mut T,
) -> Result<i32> {
    // SAFETY: the descriptor is open for the length of the call; the caller vouches for the rest.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as _, argument) };
    match result {
        -1 => Err(std::io::Error::last_os_error()).context(name),
        result => Ok(result),
    }
}
