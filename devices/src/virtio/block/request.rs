//! What the disk does with one request (virtio 1.3, 5.2.6), whoever serves the queue.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use viommu::dma::DmaAccess;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Bytes;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::{MOST_BYTES, MOST_DISCARD, MOST_RANGES, MOST_ZEROES, SECTOR};
use crate::counters;
use crate::limit::warn_limited;
use crate::virtio::buffers::{self, TransferError};
use crate::virtio::ring::Chain;

/// Bytes of one range of a discard or write-zeroes request (5.2.6).
const RANGE: usize = 16;

/// The image, apart from any virtio.
pub(super) struct Disk {
    pub(super) file: File,
    /// Bytes, a multiple of [`SECTOR`].
    pub(super) length: u64,
    pub(super) readonly: bool,
    pub(super) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    pub(super) counts: Arc<Counts>,
}

counters! {
    /// What a disk counts: requests that were done, and their bytes.
    pub(super) struct Counts {
        /// Reads.
        read_ops,
        /// Their bytes.
        read_bytes,
        /// Writes.
        write_ops,
        /// Their bytes.
        write_bytes,
        /// Flushes.
        flush_ops,
        /// Discards and writes of zeroes.
        discard_ops,
        /// Requests that were not done.
        failed_ops,
    }
}

/// How a request ended (5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl Disk {
    /// Executes one request; the number of bytes written to the chain's buffers.
    pub(super) fn execute(&self, access: &DmaAccess<'_>, chain: &mut Chain) -> u32 {
        // Without a status byte there is no way to tell the driver anything but "used".
        let Some(status_at) = buffers::take_last(&mut chain.writable) else {
            return 0;
        };
        let (status, data) = match self.request(access, chain) {
            Ok(written) => (Status::Ok, written),
            Err(status) => {
                self.counts.failed_ops.add(1);
                (status, 0)
            }
        };
        match access.write_obj(status as u8, status_at.address) {
            // The length counts from the first byte, so a failed read counts none (2.7.8.2).
            Ok(()) if status == Status::Ok => data + 1,
            Ok(()) if chain.writable.is_empty() => 1,
            _ => 0,
        }
    }

    fn request(&self, access: &DmaAccess<'_>, chain: &mut Chain) -> Result<u32, Status> {
        let mut header = [0; 16];
        if !buffers::copy_in(access, &chain.readable, &mut header) {
            return Err(Status::IoError);
        }
        buffers::trim_front(&mut chain.readable, 16);
        let [kind, _reserved, low, high] = dwords(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        match kind {
            VIRTIO_BLK_T_IN => {
                let length = buffers::length(&chain.writable);
                let offset = self.check(sector, length, MOST_BYTES)?;
                buffers::read_at(access, &chain.writable, self.file.as_fd(), offset)
                    .map_err(|error| self.failed("read", error))?;
                self.counts.read_ops.add(1);
                self.counts.read_bytes.add(length);
                Ok(length as u32)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let length = buffers::length(&chain.readable);
                let offset = self.check(sector, length, MOST_BYTES)?;
                buffers::write_at(access, &chain.readable, self.file.as_fd(), offset)
                    .map_err(|error| self.failed("write", error))?;
                self.counts.write_ops.add(1);
                self.counts.write_bytes.add(length);
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.file
                    .sync_data()
                    .map_err(|error| self.failed("flush", error.into()))?;
                self.counts.flush_ops.add(1);
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => buffers::copy_out(access, &chain.writable, &self.serial)
                .map(|written| written as u32)
                .ok_or(Status::IoError),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                self.ranges(access, chain, kind)?;
                self.counts.discard_ops.add(1);
                Ok(0)
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Discards or zeroes the ranges that a request lists. All are checked before the first takes
    /// effect.
    fn ranges(&self, access: &DmaAccess<'_>, chain: &Chain, kind: u32) -> Result<(), Status> {
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        let length = buffers::length(&chain.readable);
        let mut list = [0; RANGE * MOST_RANGES as usize];
        let list = usize::try_from(length)
            .ok()
            .filter(|length| length.is_multiple_of(RANGE))
            .and_then(|length| list.get_mut(..length))
            .ok_or(Status::IoError)?;
        if !buffers::copy_in(access, &chain.readable, list) {
            return Err(Status::IoError);
        }
        let parse = |range: &[u8; RANGE]| {
            let [low, high, sectors, flags] = dwords(range);
            (u64::from(high) << 32 | u64::from(low), sectors, flags)
        };
        let most = SECTOR * u64::from(if discard { MOST_DISCARD } else { MOST_ZEROES });
        let (ranges, _) = list.as_chunks::<RANGE>();
        for (sector, sectors, flags) in ranges.iter().map(parse) {
            // Unmap means nothing in a discard, and other flags mean nothing yet (5.2.6.2).
            let known = if discard {
                0
            } else {
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
            };
            if flags & !known != 0 {
                return Err(Status::Unsupported);
            }
            self.check(sector, u64::from(sectors) * SECTOR, most)?;
        }
        for (sector, sectors, flags) in ranges.iter().map(parse) {
            let (offset, length) = (sector * SECTOR, u64::from(sectors) * SECTOR);
            if length == 0 {
                continue;
            }
            let done = if discard {
                self.discard(offset, length)
            } else {
                self.zero(offset, length, flags != 0)
            };
            done.map_err(|error| self.failed("discard or zero", error.into()))?;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateMode::PunchHole, true, offset, length) {
            // A discard is a hint: a file system without holes has nothing to do for it.
            Err(error) if error.errno() == libc::EOPNOTSUPP => Ok(()),
            other => other.map_err(io::Error::from),
        }
    }

    fn zero(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let mode = if unmap {
            FallocateMode::PunchHole
        } else {
            FallocateMode::ZeroRange
        };
        match fallocate(&self.file, mode, true, offset, length) {
            Err(error) if error.errno() == libc::EOPNOTSUPP => {}
            other => return other.map_err(io::Error::from),
        }
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        let mut at = offset;
        while at < offset + length {
            let left = offset + length - at;
            let part = ZEROES.get(..left as usize).unwrap_or(&ZEROES);
            self.file.write_all_at(part, at)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// The offset in bytes of `length` bytes at `sector`, if they are whole sectors of the disk
    /// and no more than `most`.
    fn check(&self, sector: u64, length: u64, most: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = offset.checked_add(length).ok_or(Status::IoError)?;
        if length.is_multiple_of(SECTOR) && length <= most && end <= self.length {
            Ok(offset)
        } else {
            Err(Status::IoError)
        }
    }

    fn check_writable(&self) -> Result<(), Status> {
        if self.readonly {
            Err(Status::IoError)
        } else {
            Ok(())
        }
    }

    fn failed(&self, what: &str, error: TransferError) -> Status {
        // The guest causes the others at will; the host's own are rare and matter.
        if let TransferError::Host(error) = &error
            && error.raw_os_error() != Some(libc::EFAULT)
        {
            warn_limited!("a {what} of a disk failed: {error}");
        }
        Status::IoError
    }
}

fn dwords(bytes: &[u8; 16]) -> [u32; 4] {
    let (dwords, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|index| dwords.get(index).map_or(0, |d| u32::from_le_bytes(*d)))
}
