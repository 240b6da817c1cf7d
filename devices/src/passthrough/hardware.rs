//! What [`VfioPci`](super::VfioPci) needs of a real device, behind a trait, so that tests have
//! devices without hardware.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use vfio_bindings::bindings::vfio as sys;
use vmm_sys_util::eventfd::EventFd;

/// One region of a device: a base address register, the ROM, configuration space.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Region {
    /// Bytes; 0 when the device has none.
    pub length: u64,
    /// Parts (offset, length) that may be mapped into the guest; empty when none may.
    pub mappable: Vec<(u64, u64)>,
}

/// Device memory that is mapped into this process, and from here into the guest.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: the address is a number here: this type never reads or writes through it.
unsafe impl Send for Mapping {}
// SAFETY: as above; there is nothing to race for.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Where it is in this process.
    pub fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length as u64
    }

    /// Maps `length` bytes of `file` at `offset`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(file: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<Self> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: the kernel chooses a free place, so no other memory of ours changes.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(address) {
            Some(address) if address.as_ptr() != libc::MAP_FAILED => Ok(Self { address, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `new`, and nothing refers to it: whoever gave it to
        // KVM keeps this value until the slot is gone.
        unsafe { libc::munmap(self.address.as_ptr(), self.length) };
    }
}

/// The interrupts of a device (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u32)]
pub enum Irq {
    /// The line.
    Intx = sys::VFIO_PCI_INTX_IRQ_INDEX,
    /// MSI.
    Msi = sys::VFIO_PCI_MSI_IRQ_INDEX,
    /// MSI-X.
    Msix = sys::VFIO_PCI_MSIX_IRQ_INDEX,
    /// An uncorrected error happened: the device is not usable.
    Error = sys::VFIO_PCI_ERR_IRQ_INDEX,
    /// The host wants the device back.
    Request = sys::VFIO_PCI_REQ_IRQ_INDEX,
}

/// The region that is configuration space.
pub const CONFIG: u32 = sys::VFIO_PCI_CONFIG_REGION_INDEX;

/// What a passed-through device is made of.
pub trait Hardware: Send + Sync {
    /// Reads `data.len()` bytes of `region`.
    ///
    /// # Errors
    /// What the kernel says.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` to `region`.
    ///
    /// # Errors
    /// What the kernel says.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()>;

    /// What `region` is; a region that does not exist has length 0.
    fn region(&self, region: u32) -> Region;

    /// Maps a part of `region`, which is within what it says is mappable.
    ///
    /// # Errors
    /// What the kernel says.
    fn map(&self, region: u32, offset: u64, length: u64) -> io::Result<Arc<Mapping>>;

    /// How many interrupts of a kind there are; 0 when there are none.
    fn interrupts(&self, irq: Irq) -> u32;

    /// Connects the first interrupts of a kind to `eventfds`; none disables the kind.
    ///
    /// # Errors
    /// The host has no more interrupt vectors.
    fn connect(&self, irq: Irq, eventfds: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// Lets the line interrupt again; it masks itself whenever it does.
    ///
    /// # Errors
    /// What the kernel says.
    fn unmask_line(&self) -> io::Result<()>;

    /// Function-level reset, or the next best that the device has.
    ///
    /// # Errors
    /// The device cannot be reset.
    fn reset(&self) -> io::Result<()>;

    /// Device memory as a dma-buf, for the DMA of other devices.
    ///
    /// # Errors
    /// `ENOTTY` or `EOPNOTSUPP` on hosts without P2P.
    fn export(&self, region: u32, offset: u64, length: u64) -> io::Result<OwnedFd>;
}

/// An eventfd's descriptor, as VFIO takes it.
pub(super) fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: an eventfd's descriptor is its own, and stays open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}
