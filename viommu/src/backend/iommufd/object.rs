//! The kernel's objects, each owning what it stands on.
//!
//! A type here is made only from an id that the kernel has just given, and destroys that id when
//! it is dropped, so an error path needs no ladder and the order of destruction is a property of
//! the types.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use iommufd_bindings::{iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate};

use super::kernel::{HwptKind, Kernel, Partial};
use crate::backend::Access;

/// A kernel object id that is destroyed with its owner.
struct Id {
    kernel: Arc<dyn Kernel>,
    id: u32,
}

impl Drop for Id {
    fn drop(&mut self) {
        if let Err(error) = self.kernel.destroy(self.id) {
            // Closing /dev/iommu frees it in the end; until then it only costs memory.
            log::error!("iommufd object {} stays behind: {error}", self.id);
        }
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)
    }
}

/// An I/O address space: what is mapped, whichever hardware tables show it.
#[derive(Debug)]
pub struct Ioas(Id);

impl Ioas {
    /// A new, empty one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(kernel: Arc<dyn Kernel>) -> io::Result<Self> {
        let id = kernel.ioas_alloc()?;
        Ok(Self(Id { kernel, id }))
    }

    /// The kernel's id.
    pub fn id(&self) -> u32 {
        self.0.id
    }

    /// `ranges` (first, last) must stay usable, whatever is attached later.
    ///
    /// # Errors
    /// See [`Kernel::allow_iovas`].
    pub fn allow(&self, ranges: &[(u64, u64)]) -> io::Result<()> {
        self.0.kernel.allow_iovas(self.id(), ranges)
    }

    /// What can be mapped now (first, last), ascending.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn usable(&self) -> io::Result<Vec<(u64, u64)>> {
        self.0.kernel.iova_ranges(self.id())
    }

    /// Maps `length` bytes of a memfd or dma-buf.
    ///
    /// # Errors
    /// See [`Kernel::map_file`].
    pub fn map_file(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()> {
        let Id { kernel, id } = &self.0;
        kernel.map_file(*id, file, offset, length, iova, access)
    }

    /// Maps `length` bytes of this process.
    ///
    /// # Errors
    /// See [`Kernel::map`].
    pub fn map(&self, address: u64, length: u64, iova: u64, access: Access) -> io::Result<()> {
        self.0.kernel.map(self.id(), address, length, iova, access)
    }

    /// Maps what `from` has at `from_iova`, sharing its pins.
    ///
    /// # Errors
    /// See [`Kernel::copy`].
    pub fn copy(
        &self,
        iova: u64,
        from: &Self,
        from_iova: u64,
        length: u64,
        access: Access,
    ) -> io::Result<()> {
        let Id { kernel, id } = &self.0;
        kernel.copy(*id, iova, from.id(), from_iova, length, access)
    }

    /// Removes the whole mappings inside the range; returns their bytes.
    ///
    /// # Errors
    /// See [`Kernel::unmap`].
    pub fn unmap(&self, iova: u64, length: u64) -> io::Result<u64> {
        self.0.kernel.unmap(self.id(), iova, length)
    }
}

/// What a [`Hwpt`] stands on; kept alive by it.
#[derive(Debug)]
enum Under {
    Ioas {
        _ioas: Arc<Ioas>,
    },
    Parent {
        _parent: Arc<Hwpt>,
        _faults: Option<Arc<FaultQueue>>,
    },
}

/// A hardware page table.
#[derive(Debug)]
pub struct Hwpt {
    // Dropped before what it stands on: fields drop in order.
    id: Id,
    _under: Under,
    kind: Paging,
    faults: bool,
}

impl Hwpt {
    /// A table that shows `ioas`, made for `device`.
    ///
    /// # Errors
    /// See [`Kernel::hwpt_alloc`].
    pub fn paging(
        kernel: Arc<dyn Kernel>,
        device: u32,
        ioas: &Arc<Ioas>,
        kind: Paging,
    ) -> io::Result<Self> {
        let wanted = HwptKind::Paging {
            nest_parent: kind.nest_parent,
            dirty: kind.dirty,
            pasid: kind.pasid,
        };
        let id = kernel.hwpt_alloc(device, ioas.id(), wanted)?;
        Ok(Self {
            id: Id { kernel, id },
            _under: Under::Ioas {
                _ioas: ioas.clone(),
            },
            kind,
            faults: false,
        })
    }

    /// A guest's first-stage table over the nest parent `parent`, made for `device`.
    ///
    /// # Errors
    /// See [`Kernel::hwpt_alloc`].
    pub fn nested(
        parent: &Arc<Self>,
        device: u32,
        table: &iommu_hwpt_vtd_s1,
        faults: Option<&Arc<FaultQueue>>,
    ) -> io::Result<Self> {
        let kernel = parent.id.kernel.clone();
        let kind = HwptKind::Nested {
            table,
            pasid: parent.kind.pasid,
            fault_queue: faults.map(|queue| queue.id()),
        };
        let id = kernel.hwpt_alloc(device, parent.id(), kind)?;
        Ok(Self {
            id: Id { kernel, id },
            kind: Paging {
                nest_parent: false,
                ..parent.kind
            },
            faults: faults.is_some(),
            _under: Under::Parent {
                _parent: parent.clone(),
                _faults: faults.cloned(),
            },
        })
    }

    /// The kernel's id.
    pub fn id(&self) -> u32 {
        self.id.id
    }

    /// How it was made; of a nested table, what it inherits from its parent.
    pub fn kind(&self) -> Paging {
        self.kind
    }

    /// Whether its page requests go to a fault queue.
    pub fn has_faults(&self) -> bool {
        self.faults
    }

    /// Forgets cached translations of a nested table.
    ///
    /// # Errors
    /// See [`Kernel::invalidate`].
    pub fn invalidate(&self, entries: &[iommu_hwpt_vtd_s1_invalidate]) -> Result<(), Partial> {
        self.id.kernel.invalidate(self.id(), entries)
    }
}

/// How a paging table is made; see [`HwptKind::Paging`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paging {
    /// Nested tables can sit on it.
    pub nest_parent: bool,
    /// Dirty tracking can be switched on.
    pub dirty: bool,
    /// It can be attached to PASIDs.
    pub pasid: bool,
}

/// A queue of page requests.
#[derive(Debug)]
pub struct FaultQueue {
    // The kernel refuses to destroy a queue whose descriptor is open: fields drop in order.
    file: File,
    id: Id,
}

impl FaultQueue {
    /// A new, empty one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(kernel: Arc<dyn Kernel>) -> io::Result<Self> {
        let (id, file) = kernel.fault_queue_alloc()?;
        Ok(Self {
            file: file.into(),
            id: Id { kernel, id },
        })
    }

    /// The kernel's id.
    pub fn id(&self) -> u32 {
        self.id.id
    }

    /// Where page requests are read and responses written.
    pub fn file(&self) -> &File {
        &self.file
    }
}
