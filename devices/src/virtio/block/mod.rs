//! virtio-blk (virtio 1.3, 5.2) over a raw image or a block device of the host.
//!
//! A small pool of threads serves the queue. The thread that was kicked takes a request and
//! executes it; while more are waiting it wakes another thread before it does. So a lone request
//! is served with no hand-over, and a deep queue keeps several system calls in flight.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use viommu::dma::{DmaAccess, DmaPort};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use crate::limit::warn_limited;
use crate::virtio::buffers::{self, TransferError};
use crate::virtio::device::{Activation, ActiveQueue, DeviceType, VirtioDevice, VirtioInterrupt};
use crate::virtio::ring::{Broken, Chain, RING_FEATURES, Ring};
use crate::virtio::worker::{Stop, Waiter, Workers};

/// Bytes of a sector, the unit of the protocol whatever the block size is.
pub const SECTOR: u64 = 512;

const QUEUE_SIZE: u16 = 256;
/// A chain has a header and a status byte besides its data.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one segment; with [`SEGMENTS`] it bounds how long one request, and so a reset, takes.
const SEGMENT_LENGTH: u32 = 1 << 18;
const MOST_BYTES: u64 = SEGMENTS as u64 * SEGMENT_LENGTH as u64;
/// Threads that serve the queue: as many system calls can be in flight.
const THREADS: usize = 4;

/// Limits of one discard or write-zeroes request. Zeroes may have to be written out, so there the
/// limit keeps one request short.
const MOST_RANGES: u32 = 32;
const MOST_DISCARD: u32 = 1 << 22;
const MOST_ZEROES: u32 = 1 << 15;

/// Bytes of one range of a discard or write-zeroes request (5.2.6).
const RANGE: usize = 16;

/// What a disk is made from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BlockConfig {
    /// The raw image file or block device.
    pub path: PathBuf,
    /// Open it read-only, and tell the guest so.
    pub readonly: bool,
    /// What the guest sees as the disk's serial number; cut to 20 bytes.
    pub serial: String,
}

/// Why a disk was not opened.
#[derive(Error, Debug)]
pub enum BlockError {
    /// There is no such file.
    #[error("disk {0:?} does not exist: create it with `truncate -s 1G {0:?}`")]
    Missing(PathBuf),
    /// This user may not open it.
    #[error("disk {path:?} cannot be opened for {access} by this user: change its permissions{}",
        if *.access == "writing" { " or set readonly=on" } else { "" })]
    Permission {
        /// The disk.
        path: PathBuf,
        /// What for.
        access: &'static str,
    },
    /// It is neither a file nor a block device.
    #[error("disk {0:?} is neither a regular file nor a block device: give a raw image")]
    Kind(PathBuf),
    /// Its length is not a whole number of sectors, or 0.
    #[error(
        "disk {path:?} has {bytes} bytes, which is not a whole number of 512-byte sectors: \
         make it one with `truncate -s %512 {path:?}`, or give a raw image that is not empty"
    )]
    Size {
        /// The disk.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Somebody else writes to it, or reads it while we would write.
    #[error(
        "disk {0:?} is in use by another disk or process: stop that, or share it with \
         readonly=on everywhere"
    )]
    InUse(PathBuf),
    /// Anything else.
    #[error("disk {path:?} cannot be opened")]
    Host {
        /// The disk.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A virtio block device.
pub struct Block {
    disk: Arc<Disk>,
    config: [u8; CONFIG_LENGTH],
    running: Mutex<Option<Workers>>,
}

/// The image, apart from any virtio.
struct Disk {
    file: File,
    /// Bytes, a multiple of [`SECTOR`].
    length: u64,
    readonly: bool,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

impl Block {
    /// Opens a disk, with a lock on it: exclusive when it is writable, else shared.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn open(config: &BlockConfig) -> Result<Arc<Self>, BlockError> {
        let path = &config.path;
        let host = |source| BlockError::Host {
            path: path.clone(),
            source,
        };
        let (file, length, physical) = open(path, config.readonly)?;
        let locked = if config.readonly {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(BlockError::InUse(path.clone())),
            // A file system without locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(host(error)),
        }
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        let disk = Disk {
            file,
            length,
            readonly: config.readonly,
            serial,
        };
        Ok(Arc::new(Self {
            config: config_space(length / SECTOR, physical),
            disk: Arc::new(disk),
            running: Mutex::new(None),
        }))
    }

    /// The capacity in bytes.
    pub fn length(&self) -> u64 {
        self.disk.length
    }

    fn running(&self) -> MutexGuard<'_, Option<Workers>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the image and learns its length and physical block size, in bytes.
fn open(path: &Path, readonly: bool) -> Result<(File, u64, u64), BlockError> {
    let host = |source| BlockError::Host {
        path: path.into(),
        source,
    };
    let access = if readonly { "reading" } else { "writing" };
    let refused = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => BlockError::Missing(path.into()),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            BlockError::Permission {
                path: path.into(),
                access,
            }
        }
        io::ErrorKind::IsADirectory => BlockError::Kind(path.into()),
        _ => host(error),
    };
    // Opening something else, such as a FIFO, could wait for ever.
    let kind = std::fs::metadata(path).map_err(refused)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockError::Kind(path.into()));
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!readonly)
        .open(path)
        .map_err(refused)?;
    // A block device's metadata has no length; its end has.
    let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(host)?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return Err(BlockError::Size {
            path: path.into(),
            bytes,
        });
    }
    let physical = file.metadata().map_err(host)?.blksize();
    Ok((file, bytes, physical))
}

/// Bytes of struct virtio_blk_config up to and with write_zeroes_may_unmap (5.2.4).
const CONFIG_LENGTH: usize = 57;

fn config_space(sectors: u64, physical: u64) -> [u8; CONFIG_LENGTH] {
    let mut space = [0; CONFIG_LENGTH];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    // The host's page cache takes any sector; its blocks say what is cheap.
    let physical = if physical.is_power_of_two() {
        physical.clamp(SECTOR, 1 << 16)
    } else {
        4096
    };
    let exponent = (physical / SECTOR).ilog2();
    put(0, &sectors.to_le_bytes());
    put(8, &SEGMENT_LENGTH.to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // topology: physical_block_exp, alignment_offset, min_io_size, opt_io_size (in blocks)
    put(24, &[exponent as u8, 0]);
    put(26, &(1u16 << exponent).to_le_bytes());
    put(36, &MOST_DISCARD.to_le_bytes());
    put(40, &MOST_RANGES.to_le_bytes());
    put(44, &(1u32 << exponent).to_le_bytes());
    put(48, &MOST_ZEROES.to_le_bytes());
    put(52, &MOST_RANGES.to_le_bytes());
    put(56, &[1]);
    space
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        let access = if self.disk.readonly {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        RING_FEATURES | common | access
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let from = self.config.iter().skip(offset as usize);
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn activate(&self, mut activation: Activation) -> io::Result<()> {
        let Some(ActiveQueue { ring, kick }) = activation.queues.pop().flatten() else {
            return Ok(());
        };
        let mut workers = Workers::new()?;
        let service = Arc::new(Service {
            stop: workers.stop(),
            disk: Arc::clone(&self.disk),
            dma: activation.dma,
            interrupt: activation.interrupt,
            queue: Mutex::new(Queue {
                ring,
                wanted: false,
                ended: false,
            }),
            work: Condvar::new(),
        });
        let mut waiter = Waiter::new()?;
        waiter.add(&*service.stop, STOP, EventSet::IN)?;
        waiter.add(&*kick, KICK, EventSet::IN)?;
        let leader = Arc::clone(&service);
        workers.spawn("virtio-blk", move || leader.lead(&mut waiter, &kick))?;
        for _ in 1..THREADS {
            let helper = Arc::clone(&service);
            workers.spawn("virtio-blk", move || helper.help())?;
        }
        *self.running() = Some(workers);
        Ok(())
    }

    fn reset(&self) {
        let workers = self.running().take();
        drop(workers);
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}

const STOP: u64 = 0;
const KICK: u64 = 1;

/// One activation of the device.
///
/// Locks: a thread begins its DMA access first and takes `queue` second. The other way round, an
/// invalidation could wait for an access whose thread waits for a lock whose holder waits for the
/// invalidation.
struct Service {
    stop: Arc<Stop>,
    disk: Arc<Disk>,
    dma: DmaPort,
    interrupt: Arc<dyn VirtioInterrupt>,
    queue: Mutex<Queue>,
    work: Condvar,
}

struct Queue {
    ring: Ring,
    /// A waiting thread is to look at the ring.
    wanted: bool,
    /// The leader stopped, or the ring is broken: nobody looks at it any more.
    ended: bool,
}

impl Service {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread that hears the kicks and the stop.
    fn lead(&self, waiter: &mut Waiter, kick: &EventFd) {
        // What was made available before the device was ready had its kick then.
        let port = self.dma.clone();
        self.serve(&port);
        loop {
            let stop = match waiter.wait() {
                Ok(mut ready) => ready.any(|(token, _)| token == STOP),
                Err(error) => {
                    log::error!("virtio-blk stops: {error}");
                    self.interrupt.needs_reset();
                    true
                }
            };
            if stop {
                self.end();
                return;
            }
            // Another signal that comes in now is not lost: it wakes us again.
            let _ = kick.read();
            self.serve(&port);
        }
    }

    /// A thread that joins when there is more than one request.
    fn help(&self) {
        let port = self.dma.clone();
        loop {
            let idle = |queue: &mut Queue| !queue.wanted && !queue.ended;
            let mut queue = self
                .work
                .wait_while(self.queue(), idle)
                .unwrap_or_else(PoisonError::into_inner);
            if queue.ended {
                return;
            }
            queue.wanted = false;
            drop(queue);
            self.serve(&port);
        }
    }

    fn end(&self) {
        self.queue().ended = true;
        self.work.notify_all();
    }

    /// `port` is the thread's own: each has its own translation cache.
    fn serve(&self, port: &DmaPort) {
        let mut chain = Chain::default();
        if let Err(broken) = self.drain(port, &mut chain) {
            warn_limited!("virtio-blk needs a reset by the guest: {broken}");
            // Helpers that finish their request meanwhile find the ring ended.
            self.end();
            self.interrupt.needs_reset();
        }
    }

    /// Serves requests until there are no more.
    fn drain(&self, port: &DmaPort, chain: &mut Chain) -> Result<(), Broken> {
        loop {
            let access = port.access();
            let mut queue = self.queue();
            if queue.ended || self.stop.is_set() {
                return Ok(());
            }
            if !queue.ring.pop(&access, chain)? {
                if queue.ring.enable_kicks(&access)? {
                    continue;
                }
                return Ok(());
            }
            queue.ring.disable_kicks(&access)?;
            // One at a time: the thread that wakes wakes the next one, if there is more still.
            if !queue.wanted && queue.ring.has_more(&access)? {
                queue.wanted = true;
                self.work.notify_one();
            }
            drop(queue);

            let written = self.disk.execute(&access, chain);

            let mut queue = self.queue();
            if queue.ended {
                return Ok(());
            }
            queue.ring.push(&access, chain.head(), written)?;
            if queue.ring.wants_interrupt(&access)? {
                self.interrupt.queue(0);
            }
        }
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
    fn execute(&self, access: &DmaAccess<'_>, chain: &mut Chain) -> u32 {
        // Without a status byte there is no way to tell the driver anything but "used".
        let Some(status_at) = buffers::take_last(&mut chain.writable) else {
            return 0;
        };
        let (status, data) = match self.request(access, chain) {
            Ok(written) => (Status::Ok, written),
            Err(status) => (status, 0),
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
                Ok(length as u32)
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let length = buffers::length(&chain.readable);
                let offset = self.check(sector, length, MOST_BYTES)?;
                buffers::write_at(access, &chain.readable, self.file.as_fd(), offset)
                    .map_err(|error| self.failed("write", error))?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.file
                    .sync_data()
                    .map_err(|error| self.failed("flush", error.into()))?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => buffers::copy_out(access, &chain.writable, &self.serial)
                .map(|written| written as u32)
                .ok_or(Status::IoError),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                self.ranges(access, chain, kind)?;
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

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod tests;
