//! What of the guest's physical address space a device may reach: its RAM, and device memory that
//! the host lets others reach (P2P). All of it is in one IOAS, mapped once.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::admission::Unfit;
use super::kernel::Kernel;
use super::object::Ioas;
use crate::GuestRam;
use crate::backend::Access;
use crate::reserved::Regions;

/// The guest's memory in an IOAS of its own, IOVA = GPA.
#[derive(Debug)]
pub(super) struct Memory {
    ioas: Arc<Ioas>,
    /// First to last address of each mapping. Never merged: the kernel removes whole ones only.
    mapped: RwLock<BTreeMap<u64, u64>>,
    /// Reserved regions of every device that was ever admitted.
    reserved: RwLock<Regions>,
}

impl Memory {
    /// Maps `ram` with one call per region: by file where a region has one, which keeps the
    /// mapping valid across a change of process.
    ///
    /// Everything is writeable: a nest parent takes no read-only mapping (erratum 772415).
    pub(super) fn new(kernel: Arc<dyn Kernel>, ram: &GuestRam) -> Result<Self, Unfit> {
        let ioas = Arc::new(Ioas::new(kernel).map_err(|e| Unfit::host("IOMMU_IOAS_ALLOC", "", e))?);
        let ranges = ram
            .iter()
            .map(|region| (region.start_addr().0, region.last_addr().0))
            .collect::<Vec<_>>();
        // From here on a device whose reserved regions lie in RAM is refused, rather than RAM
        // getting a hole.
        ioas.allow(&ranges)
            .map_err(|e| Unfit::host("IOMMU_IOAS_ALLOW_IOVAS", "guest RAM", e))?;
        let mut mapped = BTreeMap::new();
        for region in ram.iter() {
            let (gpa, length) = (region.start_addr().0, region.len());
            let what = || format!("guest RAM {gpa:#x} (+{length:#x})");
            match region.file_offset() {
                Some(file) => ioas
                    .map_file(
                        file.file().as_fd(),
                        file.start(),
                        length,
                        gpa,
                        Access::READ_WRITE,
                    )
                    .map_err(|e| Unfit::mapping("IOMMU_IOAS_MAP_FILE", what(), e))?,
                None => {
                    let address = region
                        .get_host_address(MemoryRegionAddress(0))
                        .map_err(|e| Unfit::host("mmap", what(), io::Error::other(e)))?;
                    ioas.map(address as u64, length, gpa, Access::READ_WRITE)
                        .map_err(|e| Unfit::mapping("IOMMU_IOAS_MAP", what(), e))?;
                }
            }
            mapped.insert(gpa, region.last_addr().0);
        }
        Ok(Self {
            ioas,
            mapped: RwLock::new(mapped),
            reserved: RwLock::default(),
        })
    }

    pub(super) fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }

    /// Adds `length` bytes of a device's memory (a dma-buf) at `gpa`.
    pub(super) fn add(
        &self,
        gpa: u64,
        buffer: BorrowedFd<'_>,
        offset: u64,
        length: u64,
    ) -> Result<(), Unfit> {
        let what = || format!("device memory {gpa:#x} (+{length:#x})");
        let last = length
            .checked_sub(1)
            .and_then(|rest| gpa.checked_add(rest))
            .ok_or_else(|| {
                let error = io::Error::from_raw_os_error(libc::EOVERFLOW);
                Unfit::host("IOMMU_IOAS_MAP_FILE", what(), error)
            })?;
        // The kernel knows the reserved regions of attached devices only; ours are of all.
        if let Some(&region) = self.reserved().overlapping(gpa, last) {
            return Err(Unfit::Reserved(region));
        }
        let mut mapped = self.mapped.write().unwrap_or_else(PoisonError::into_inner);
        self.ioas
            .map_file(buffer, offset, length, gpa, Access::READ_WRITE)
            .map_err(|e| Unfit::mapping("IOMMU_IOAS_MAP_FILE", what(), e))?;
        mapped.insert(gpa, last);
        Ok(())
    }

    /// Removes what [`add`](Self::add) mapped at `gpa`. Copies of it in domains stay until they
    /// are unmapped there.
    pub(super) fn remove(&self, gpa: u64) -> Result<(), Unfit> {
        let mut mapped = self.mapped.write().unwrap_or_else(PoisonError::into_inner);
        let Some(&last) = mapped.get(&gpa) else {
            return Ok(());
        };
        self.ioas
            .unmap(gpa, last - gpa + 1)
            .map_err(|e| Unfit::host("IOMMU_IOAS_UNMAP", format!("device memory {gpa:#x}"), e))?;
        mapped.remove(&gpa);
        Ok(())
    }

    /// Whether `gpa` to `last` (inclusive) is memory without a hole.
    pub(super) fn covers(&self, gpa: u64, last: u64) -> bool {
        let mut next = gpa;
        let mut complete = false;
        self.pieces(gpa, last, |first, end| {
            complete |= first == next && end == last;
            if first == next {
                next = end.wrapping_add(1);
            }
        });
        complete
    }

    /// Calls `each` with the parts (first, last) of `gpa` to `last` that are memory, ascending.
    pub(super) fn pieces(&self, gpa: u64, last: u64, mut each: impl FnMut(u64, u64)) {
        let mapped = self.mapped.read().unwrap_or_else(PoisonError::into_inner);
        let before = mapped.range(..gpa).next_back();
        for (&first, &end) in before.into_iter().chain(mapped.range(gpa..=last)) {
            if end >= gpa {
                each(first.max(gpa), end.min(last));
            }
        }
    }

    /// Remembers a device's reserved regions, for every later mapping.
    pub(super) fn reserve(&self, regions: &Regions) {
        let mut reserved = self
            .reserved
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        reserved.merge(regions);
    }

    /// The reserved regions of every device that was ever admitted.
    pub(super) fn reserved(&self) -> RwLockReadGuard<'_, Regions> {
        self.reserved.read().unwrap_or_else(PoisonError::into_inner)
    }
}
