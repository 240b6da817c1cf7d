//! Open-file-description locks on ranges of bytes (`fcntl(2)`, `F_OFD_SETLK`).
//!
//! Such a lock belongs to what `open` made, not to a process: it ends when the last file
//! descriptor of that open is closed, also by `kill -9`, and a second `open` in the same process
//! conflicts with it as another process would.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// An inclusive range of bytes of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Range {
    pub(super) first: u32,
    pub(super) last: u32,
}

impl Range {
    /// The bytes from `first` to `last`, both included.
    pub(super) const fn new(first: u32, last: u32) -> Self {
        Self { first, last }
    }

    /// How many bytes.
    pub(super) const fn len(self) -> u32 {
        self.last - self.first + 1
    }

    /// What of it lies in `other`, which it meets.
    pub(super) fn cut_to(self, other: Self) -> Self {
        Self::new(self.first.max(other.first), self.last.min(other.last))
    }
}

/// Locks `range` exclusively, without waiting; `false` when some of it is locked by another open.
/// The lock is whole or not at all.
pub(super) fn try_lock(file: &File, range: Range) -> io::Result<bool> {
    match call(file, libc::F_OFD_SETLK, libc::F_WRLCK, range) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Unlocks `range`.
pub(super) fn unlock(file: &File, range: Range) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, libc::F_UNLCK, range).map(drop)
}

/// One lock of another open that covers some of `range`: any of them, not the lowest, and as long
/// as it is.
pub(super) fn conflict(file: &File, range: Range) -> io::Result<Option<Range>> {
    let found = call(file, libc::F_OFD_GETLK, libc::F_WRLCK, range)?;
    if i32::from(found.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    let last = match found.l_len {
        // To the end of the file, however long it becomes.
        0 => i64::MAX,
        length => found.l_start.saturating_add(length - 1),
    };
    // A program of others may lock more than 32 bits of bytes.
    let byte = |offset: i64| u32::try_from(offset).unwrap_or(u32::MAX);
    Ok(Some(Range::new(byte(found.l_start), byte(last))))
}

fn call(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    range: Range,
) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.first.into(),
        l_len: range.len().into(),
        // The kernel insists on 0 for locks of this kind.
        l_pid: 0,
    };
    // SAFETY: `lock` is a valid `struct flock` for the whole call, which is what these commands
    // take; the kernel writes nothing else.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(lock),
    }
}
