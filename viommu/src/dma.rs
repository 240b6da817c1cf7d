//! How an emulated device reaches guest memory.
//!
//! A device is given one [`DmaPort`] and never learns whether a vIOMMU stands in it. Each piece of
//! work (a descriptor chain, a batch of packets) is done through one [`DmaAccess`], which is a
//! [`GuestMemory`] for virtio-queue and everything else built on vm-memory:
//!
//! ```
//! use std::sync::Arc;
//! use viommu::dma::DmaPort;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
//! let port = DmaPort::direct(Arc::new(ram));
//! let access = port.access();
//! access.write_slice(b"hello", GuestAddress(0x1000))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! While a `DmaAccess` lives, an invalidation that removes what it may have translated waits for
//! it. So: take one per piece of work, drop it before waiting for anything that depends on the
//! guest or on the network, and never keep one across `epoll_wait`.

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, Permissions};

use crate::GuestRam;

/// One device's way to guest memory, without PASID. Cheap to clone; each device thread has one.
#[derive(Clone, Debug)]
pub struct DmaPort {
    ram: GuestRam,
}

impl DmaPort {
    /// A port with no vIOMMU in it: what the device says is a guest-physical address.
    pub fn direct(ram: GuestRam) -> Self {
        Self { ram }
    }

    /// Whether a vIOMMU translates what goes through here (a virtio device offers
    /// `VIRTIO_F_ACCESS_PLATFORM` then).
    pub fn is_translated(&self) -> bool {
        false
    }

    /// Begins one piece of DMA work.
    pub fn access(&self) -> DmaAccess<'_> {
        DmaAccess { port: self }
    }
}

/// Guest memory for the length of one piece of DMA work. See the module's text.
#[derive(Debug)]
pub struct DmaAccess<'p> {
    port: &'p DmaPort,
}

impl GuestMemory for DmaAccess<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        GuestMemoryBackend::check_range(&*self.port.ram, addr, count)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        Ok(GuestMemoryBackend::get_slices(&*self.port.ram, addr, count))
    }
}
