//! Memory that a device shares: buffers, and its registers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};

use crate::registers::Registers;

/// A piece of this process's memory. Only touched with volatile accesses: a device may do so too.
#[derive(Debug)]
pub struct Memory {
    start: NonNull<u8>,
    length: usize,
    /// `malloc` gave it.
    heap: bool,
}

// SAFETY: the mapping belongs to this value and is accessed in single volatile bytes and words.
unsafe impl Send for Memory {}
// SAFETY: as above; a race between threads is as one with the device.
unsafe impl Sync for Memory {}

impl Memory {
    /// `length` bytes of new memory, at `place` when that is given and free. No page is there
    /// before it is touched.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(length: usize, place: Option<usize>) -> Result<Self> {
        let fixed = place.map_or(0, |_| libc::MAP_FIXED_NOREPLACE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
        Self::map(length, place.unwrap_or(0), flags, -1, 0).context("cannot map memory")
    }

    /// `length` bytes that `malloc` gives.
    ///
    /// # Errors
    /// It gives none.
    pub fn heap(length: usize) -> Result<Self> {
        // SAFETY: the call takes a number.
        let start = NonNull::new(unsafe { libc::malloc(length) }.cast());
        Ok(Self {
            start: start.context("malloc gives nothing")?,
            length,
            heap: true,
        })
    }

    /// `length` bytes of `file` from `offset` on, shared.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn of_file(file: &File, offset: u64, length: usize) -> Result<Self> {
        let mapped = Self::map(length, 0, libc::MAP_SHARED, file.as_raw_fd(), offset);
        mapped.with_context(|| format!("cannot map {file:?} from {offset:#x}"))
    }

    fn map(length: usize, place: usize, flags: i32, fd: i32, offset: u64) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses the place, or one that is free, so no memory that is in use
        // changes.
        let start = unsafe {
            libc::mmap(
                place as *mut _,
                length,
                access,
                flags,
                fd,
                offset as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            start,
            length,
            heap: false,
        })
    }

    /// Where it is: the address that a device which shares the address space uses.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.length as u64
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn at<T>(&self, at: usize) -> Option<*mut T> {
        let fits = at
            .checked_add(size_of::<T>())
            .is_some_and(|end| end <= self.length);
        // SAFETY: inside the mapping, as just checked.
        (fits && at.is_multiple_of(size_of::<T>()))
            .then(|| unsafe { self.start.as_ptr().add(at) }.cast())
    }

    /// The byte at `at`; 0 beyond the end.
    pub fn byte(&self, at: usize) -> u8 {
        // SAFETY: `at` gives a valid pointer into the mapping.
        self.at::<u8>(at)
            .map_or(0, |byte| unsafe { byte.read_volatile() })
    }

    /// All bytes.
    pub fn bytes(&self) -> impl Iterator<Item = u8> + '_ {
        (0..self.length).map(|at| self.byte(at))
    }

    /// Sets every byte to what `value` says of its offset.
    pub fn fill_with(&self, value: impl Fn(usize) -> u8) {
        for at in 0..self.length {
            if let Some(byte) = self.at::<u8>(at) {
                // SAFETY: `at` gives a valid pointer into the mapping.
                unsafe { byte.write_volatile(value(at)) };
            }
        }
    }

    /// Fails at the first byte that is not what `value` says of its offset.
    ///
    /// # Errors
    /// Which one.
    pub fn check(&self, what: &str, value: impl Fn(usize) -> u8) -> Result<()> {
        for (at, byte) in self.bytes().enumerate() {
            let wanted = value(at);
            ensure!(
                byte == wanted,
                "{what}: byte {at:#x} is {byte:#x}, not {wanted:#x}"
            );
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let start = self.start.as_ptr().cast();
        if self.heap {
            // SAFETY: `malloc` gave it to this value, and nothing points into it any more.
            return unsafe { libc::free(start) };
        }
        // SAFETY: the mapping is this value's own, and nothing points into it any more.
        unsafe { libc::munmap(start, self.length) };
    }
}

impl Registers for Memory {
    fn read(&self, at: u64) -> u32 {
        let Some(register) = self.at::<u32>(at as usize) else {
            return u32::MAX;
        };
        // SAFETY: `at` gives a valid, aligned pointer into the mapping.
        u32::from_le(unsafe { register.read_volatile() })
    }

    fn write(&self, at: u64, value: u32) {
        if let Some(register) = self.at::<u32>(at as usize) {
            // SAFETY: `at` gives a valid, aligned pointer into the mapping.
            unsafe { register.write_volatile(value.to_le()) };
        }
    }
}
