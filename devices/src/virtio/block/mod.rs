//! virtio-blk (virtio 1.3, 5.2) over a raw image or a block device of the host.
//!
//! A small pool of threads serves the queue. The thread that was kicked takes a request and
//! executes it; while more are waiting it wakes another thread before it does. So a lone request
//! is served with no hand-over, and a deep queue keeps several system calls in flight.

#![forbid(unsafe_code)]

mod request;

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use viommu::dma::DmaPort;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::request::Disk;
use crate::counters::Counters;
use crate::limit::warn_limited;
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
    /// The descriptor that was given for it was opened in another way.
    #[error(
        "the descriptor for disk {0:?} is not open for reading and writing: open it with O_RDWR \
         (or O_RDONLY, and set readonly=on), without O_APPEND and O_DIRECT"
    )]
    Descriptor(PathBuf),
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

impl Block {
    /// Opens a disk, with a lock on it: exclusive when it is writable, else shared.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn open(config: &BlockConfig) -> Result<Arc<Self>, BlockError> {
        Self::new(config, open(&config.path, config.readonly)?)
    }

    /// As [`open`](Self::open), of what somebody else has opened; the path is its name only.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn adopt(config: &BlockConfig, descriptor: OwnedFd) -> Result<Arc<Self>, BlockError> {
        Self::new(config, adopt(&config.path, descriptor, config.readonly)?)
    }

    fn new(
        config: &BlockConfig,
        (file, length, physical): (File, u64, u64),
    ) -> Result<Arc<Self>, BlockError> {
        let path = &config.path;
        let host = |source| BlockError::Host {
            path: path.clone(),
            source,
        };
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
            counts: Arc::default(),
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
    let file = OpenOptions::new()
        .read(true)
        .write(!readonly)
        .open(path)
        .map_err(refused)?;
    measured(path, file)
}

/// Looks at what somebody else has opened.
fn adopt(path: &Path, descriptor: OwnedFd, readonly: bool) -> Result<(File, u64, u64), BlockError> {
    let file = File::from(descriptor);
    let host = |source| BlockError::Host {
        path: path.into(),
        source,
    };
    let kind = file.metadata().map_err(host)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockError::Kind(path.into()));
    }
    let flags = super::buffers::status_flags(&file).map_err(host)?;
    let for_writing = flags & libc::O_ACCMODE == libc::O_RDWR;
    let for_reading = for_writing || flags & libc::O_ACCMODE == libc::O_RDONLY;
    let special = libc::O_APPEND | libc::O_DIRECT | libc::O_PATH;
    if flags & special != 0 || !(for_writing || readonly && for_reading) {
        return Err(BlockError::Descriptor(path.into()));
    }
    measured(path, file)
}

/// Its length and its physical block size, in bytes.
fn measured(path: &Path, mut file: File) -> Result<(File, u64, u64), BlockError> {
    let host = |source| BlockError::Host {
        path: path.into(),
        source,
    };
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

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(self.disk.counts.clone())
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

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod tests;
