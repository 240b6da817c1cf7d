//! Moving bytes between a chain's buffers and the device or a file, without a copy in between
//! where a file is the other side.
//!
//! A driver may cut a request into buffers wherever it likes (virtio 1.3, 2.7.4.1), so nothing
//! here assumes where one buffer ends. A translated buffer may be many slices of guest memory;
//! they are handed to the kernel in batches of bounded length.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use thiserror::Error;
use vm_memory::bitmap::BS;
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::ring::Buffer;

/// Slices per system call. `IOV_MAX` is 1024; this many make the call's own cost vanish.
const BATCH: usize = 128;

/// Why bytes were not moved.
#[derive(Error, Debug)]
pub enum TransferError {
    /// A buffer is not memory that the device can access.
    #[error("a buffer is not in memory the device can access")]
    Memory,
    /// A packet is in more slices of memory than one call takes.
    #[error("a packet is in more than 128 pieces of memory")]
    Scattered,
    /// The file ended early.
    #[error("the file is shorter than it was")]
    Short,
    /// The host failed.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// Total length, in bytes.
pub fn length(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.length)).sum()
}

/// Takes `bytes` off the front. `false`, with nothing left, when there were fewer.
pub fn trim_front(buffers: &mut Vec<Buffer>, bytes: u32) -> bool {
    let mut left = bytes;
    let mut gone = 0;
    for buffer in buffers.iter_mut() {
        if left < buffer.length {
            // An address that wraps is refused by the access itself.
            buffer.address.0 = buffer.address.0.wrapping_add(left.into());
            buffer.length -= left;
            left = 0;
            break;
        }
        left -= buffer.length;
        gone += 1;
    }
    buffers.drain(..gone);
    left == 0
}

/// Takes the last byte off and returns where it is.
pub fn take_last(buffers: &mut Vec<Buffer>) -> Option<Buffer> {
    while let Some(buffer) = buffers.last_mut() {
        let Some(rest) = buffer.length.checked_sub(1) else {
            buffers.pop();
            continue;
        };
        buffer.length = rest;
        return Some(Buffer {
            address: vm_memory::GuestAddress(buffer.address.0.wrapping_add(rest.into())),
            length: 1,
        });
    }
    None
}

/// Copies from the front of `buffers` until `data` is full. `false` when there is not enough or
/// it cannot be read.
#[inline]
pub fn copy_in<M: GuestMemory>(memory: &M, buffers: &[Buffer], data: &mut [u8]) -> bool {
    let mut rest = data;
    for buffer in buffers {
        let count = rest.len().min(buffer.length as usize);
        let Ok(slices) = memory.get_slices(buffer.address, count, Permissions::Read) else {
            return false;
        };
        let before = rest.len();
        for slice in slices {
            let Ok(slice) = slice else { return false };
            let (part, after) = rest.split_at_mut(slice.len().min(rest.len()));
            slice.copy_to(part);
            rest = after;
        }
        if before - rest.len() != count {
            return false;
        }
    }
    rest.is_empty()
}

/// Copies `data` to the front of `buffers`, as much as fits; the number of bytes, or `None` when
/// they cannot be written.
#[inline]
pub fn copy_out<M: GuestMemory>(memory: &M, buffers: &[Buffer], data: &[u8]) -> Option<usize> {
    let mut rest = data;
    for buffer in buffers {
        let count = rest.len().min(buffer.length as usize);
        let before = rest.len();
        for slice in memory
            .get_slices(buffer.address, count, Permissions::Write)
            .ok()?
        {
            let slice = slice.ok()?;
            let (part, after) = rest.split_at(slice.len().min(rest.len()));
            slice.copy_from(part);
            rest = after;
        }
        if before - rest.len() != count {
            return None;
        }
    }
    Some(data.len() - rest.len())
}

/// Reads from `file` at `offset` until `buffers` are full.
///
/// # Errors
/// See [`TransferError`]; some buffers may be written then.
pub fn read_at<M: GuestMemory>(
    memory: &M,
    buffers: &[Buffer],
    file: BorrowedFd<'_>,
    offset: u64,
) -> Result<(), TransferError> {
    each_batch(memory, buffers, Permissions::Write, offset, |batch, at| {
        batch.preadv(file, at)
    })
}

/// Writes all of `buffers` to `file` at `offset`.
///
/// # Errors
/// See [`TransferError`]; some bytes may be in the file then.
pub fn write_at<M: GuestMemory>(
    memory: &M,
    buffers: &[Buffer],
    file: BorrowedFd<'_>,
    offset: u64,
) -> Result<(), TransferError> {
    each_batch(memory, buffers, Permissions::Read, offset, |batch, at| {
        batch.pwritev(file, at)
    })
}

/// Reads once from `file` into `buffers`: what a stream has, no more than `most` bytes and than
/// one call takes. The number of bytes.
///
/// # Errors
/// See [`TransferError`].
pub fn read_once<M: GuestMemory>(
    memory: &M,
    buffers: &[Buffer],
    most: u32,
    file: BorrowedFd<'_>,
) -> Result<usize, TransferError> {
    let (batch, _) = first_batch(memory, buffers, most, Permissions::Write)?;
    again(|| batch.readv(file))
}

/// Writes `buffers` to `file` once: as much as a stream takes, no more than `most` bytes and than
/// one call takes. The number of bytes.
///
/// # Errors
/// See [`TransferError`].
pub fn write_once<M: GuestMemory>(
    memory: &M,
    buffers: &[Buffer],
    most: u32,
    file: BorrowedFd<'_>,
) -> Result<usize, TransferError> {
    let (batch, _) = first_batch(memory, buffers, most, Permissions::Read)?;
    again(|| batch.writev(file))
}

/// Writes all of `buffers` to `file` as one packet. The number of bytes.
///
/// # Errors
/// See [`TransferError`].
pub fn write_packet<M: GuestMemory>(
    memory: &M,
    buffers: &[Buffer],
    file: BorrowedFd<'_>,
) -> Result<usize, TransferError> {
    match first_batch(memory, buffers, u32::MAX, Permissions::Read)? {
        (batch, true) => again(|| batch.writev(file)),
        (_, false) => Err(TransferError::Scattered),
    }
}

/// A few slices of guest memory as the kernel takes them, valid as long as the borrow of the
/// memory they are in.
struct Batch<'m> {
    slices: [libc::iovec; BATCH],
    count: usize,
    /// Slices before this were moved whole.
    done: usize,
    memory: PhantomData<&'m ()>,
}

impl<'m> Batch<'m> {
    fn new() -> Self {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            slices: [empty; BATCH],
            count: 0,
            done: 0,
            memory: PhantomData,
        }
    }

    /// `false` when there is no more room.
    fn push<B: vm_memory::bitmap::BitmapSlice>(&mut self, slice: &VolatileSlice<'m, B>) -> bool {
        let Some(free) = self.slices.get_mut(self.count) else {
            return false;
        };
        *free = libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.count += 1;
        true
    }

    fn left(&self) -> &[libc::iovec] {
        self.slices.get(self.done..self.count).unwrap_or_default()
    }

    /// Drops the first `bytes` of what is left.
    fn advance(&mut self, mut bytes: usize) {
        while let Some(slice) = self.slices[..self.count].get_mut(self.done) {
            if bytes < slice.iov_len {
                slice.iov_base = slice.iov_base.wrapping_byte_add(bytes);
                slice.iov_len -= bytes;
                return;
            }
            bytes -= slice.iov_len;
            self.done += 1;
        }
    }

    fn preadv(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let left = self.left();
        let count = left.len() as libc::c_int;
        let offset = offset_of(offset)?;
        // SAFETY: every slice lies in mapped guest memory that the borrow 'm keeps mapped, and
        // guest memory is only ever accessed as volatile, so that the kernel may write it.
        check(unsafe { libc::preadv(file.as_raw_fd(), left.as_ptr(), count, offset) })
    }

    fn pwritev(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let left = self.left();
        let count = left.len() as libc::c_int;
        let offset = offset_of(offset)?;
        // SAFETY: every slice lies in mapped guest memory that the borrow 'm keeps mapped; the
        // kernel only reads it.
        check(unsafe { libc::pwritev(file.as_raw_fd(), left.as_ptr(), count, offset) })
    }

    fn readv(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let left = self.left();
        let count = left.len() as libc::c_int;
        // SAFETY: every slice lies in mapped guest memory that the borrow 'm keeps mapped, and
        // guest memory is only ever accessed as volatile, so that the kernel may write it.
        check(unsafe { libc::readv(file.as_raw_fd(), left.as_ptr(), count) })
    }

    fn writev(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let left = self.left();
        let count = left.len() as libc::c_int;
        // SAFETY: every slice lies in mapped guest memory that the borrow 'm keeps mapped; the
        // kernel only reads it.
        check(unsafe { libc::writev(file.as_raw_fd(), left.as_ptr(), count) })
    }
}

fn offset_of(offset: u64) -> io::Result<libc::off_t> {
    offset
        .try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// The flags that `file` was opened with (`O_RDWR`, …).
pub(super) fn status_flags(file: &impl AsRawFd) -> io::Result<libc::c_int> {
    // SAFETY: the call takes numbers only.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) } {
        flags if flags < 0 => Err(io::Error::last_os_error()),
        flags => Ok(flags),
    }
}

fn check(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn slices<'m, M: GuestMemory>(
    memory: &'m M,
    buffers: &'m [Buffer],
    access: Permissions,
) -> impl Iterator<Item = Result<VolatileSlice<'m, BS<'m, M::Bitmap>>, TransferError>> {
    buffers.iter().flat_map(move |buffer| {
        let count = buffer.length as usize;
        // vm-memory leaves an address that wraps to the caller.
        let wraps = buffer.address.0.checked_add(count as u64).is_none();
        let (found, refused) = match memory.get_slices(buffer.address, count, access) {
            Ok(found) if !wraps => (Some(found), None),
            _ => (None, Some(Err(TransferError::Memory))),
        };
        let found = found
            .into_iter()
            .flatten()
            .map(|slice| slice.map_err(|_| TransferError::Memory));
        refused.into_iter().chain(found)
    })
}

fn each_batch<'m, M: GuestMemory>(
    memory: &'m M,
    buffers: &'m [Buffer],
    access: Permissions,
    mut offset: u64,
    mut call: impl FnMut(&Batch<'m>, u64) -> io::Result<usize>,
) -> Result<(), TransferError> {
    let mut batch = Batch::new();
    let mut flush = |batch: &mut Batch<'m>| {
        while !batch.left().is_empty() {
            match call(batch, offset) {
                Ok(0) => return Err(TransferError::Short),
                Ok(moved) => {
                    batch.advance(moved);
                    offset += moved as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        *batch = Batch::new();
        Ok(())
    };
    for slice in slices(memory, buffers, access) {
        let slice = slice?;
        if slice.is_empty() {
            continue;
        }
        if !batch.push(&slice) {
            flush(&mut batch)?;
            batch.push(&slice);
        }
    }
    flush(&mut batch)
}

/// As much of `buffers` as one call takes, up to `most` bytes, and whether that is all of it.
fn first_batch<'m, M: GuestMemory>(
    memory: &'m M,
    buffers: &'m [Buffer],
    most: u32,
    access: Permissions,
) -> Result<(Batch<'m>, bool), TransferError> {
    let mut batch = Batch::new();
    let mut left = most as usize;
    for slice in slices(memory, buffers, access) {
        let slice = slice?;
        if slice.is_empty() {
            continue;
        }
        let part = slice
            .subslice(0, slice.len().min(left))
            .map_err(|_| TransferError::Memory)?;
        if part.is_empty() || !batch.push(&part) {
            return Ok((batch, false));
        }
        left -= part.len();
        if part.len() < slice.len() {
            return Ok((batch, false));
        }
    }
    Ok((batch, true))
}

fn again(call: impl Fn() -> io::Result<usize>) -> Result<usize, TransferError> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return Ok(other?),
        }
    }
}
