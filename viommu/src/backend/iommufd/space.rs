//! An address space of our own: an IOAS whose mappings share the pins of guest memory, and one
//! hardware table for each kind of IOMMU that shows it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::kernel::Kernel;
use super::object::{Hwpt, Ioas, Paging};
use crate::backend::Access;

/// One mapping as the kernel has it. It goes as a whole: the kernel splits none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Area {
    /// Last IOVA.
    pub last: u64,
    /// What its first IOVA maps to.
    pub gpa: u64,
    pub access: Access,
}

/// Mappings by their first IOVA.
pub(super) type Areas = BTreeMap<u64, Area>;

pub(super) struct AddressSpace {
    kernel: Arc<dyn Kernel>,
    ioas: Arc<Ioas>,
    /// By the parent that stands for a kind of IOMMU.
    tables: Mutex<Vec<(Weak<Hwpt>, Arc<Hwpt>)>>,
    areas: Mutex<Areas>,
}

impl AddressSpace {
    pub(super) fn new(kernel: Arc<dyn Kernel>) -> io::Result<Self> {
        Ok(Self {
            ioas: Arc::new(Ioas::new(kernel.clone())?),
            kernel,
            tables: Mutex::default(),
            areas: Mutex::default(),
        })
    }

    /// The table that shows this space to devices whose parent is `class`, made for `device` if
    /// it is the first.
    pub(super) fn table(&self, class: &Arc<Hwpt>, device: u32) -> io::Result<Arc<Hwpt>> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        // What was made for an IOMMU that has no device left goes with it.
        tables.retain(|(class, _)| class.strong_count() > 0);
        let of = Arc::downgrade(class);
        if let Some((_, table)) = tables.iter().find(|(class, _)| class.ptr_eq(&of)) {
            return Ok(table.clone());
        }
        // Dirty tracking forces the second-stage format where the host has it, whose addresses
        // reach twice as far as first-stage's. Never a nest parent: that takes no read-only
        // mapping (erratum 772415).
        let kind = Paging {
            nest_parent: false,
            ..class.kind()
        };
        let table = Hwpt::paging(self.kernel.clone(), device, &self.ioas, kind)?;
        let table = Arc::new(table);
        tables.push((of, table.clone()));
        Ok(table)
    }

    /// Drops tables of IOMMUs that have no device left.
    pub(super) fn sweep(&self) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|(class, _)| class.strong_count() > 0);
    }

    /// The mappings. They are changed only through [`add`](Self::add) and
    /// [`remove`](Self::remove), so that they are what the kernel has.
    pub(super) fn areas(&self) -> MutexGuard<'_, Areas> {
        self.areas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `area` at `iova` from guest memory `from`, which covers it.
    pub(super) fn add(
        &self,
        areas: &mut Areas,
        from: &Ioas,
        iova: u64,
        area: Area,
    ) -> io::Result<()> {
        let length = area.last - iova + 1;
        self.ioas.copy(iova, from, area.gpa, length, area.access)?;
        areas.insert(iova, area);
        Ok(())
    }

    /// Removes the areas that lie in `first` to `last`, which cuts none, with one call where the
    /// kernel is content. Returns their bytes.
    pub(super) fn remove(&self, areas: &mut Areas, first: u64, last: u64) -> io::Result<u64> {
        let inside = areas
            .range(first..=last)
            .filter(|(_, area)| area.last <= last)
            .map(|(&iova, area)| (iova, area.last))
            .collect::<Vec<_>>();
        let (Some(&(start, _)), Some(&(_, end))) = (inside.first(), inside.last()) else {
            return Ok(0);
        };
        let bytes = inside.iter().map(|(iova, last)| last - iova + 1).sum();
        if self.ioas.unmap(start, end - start + 1).is_ok() {
            for (iova, _) in inside {
                areas.remove(&iova);
            }
            return Ok(bytes);
        }
        // It may have removed some before it failed. One by one, "there is none" is as good as
        // success, and what remains is on record.
        let mut result = Ok(bytes);
        for (iova, last) in inside {
            match self.ioas.unmap(iova, last - iova + 1) {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => result = Err(error),
                _ => drop(areas.remove(&iova)),
            }
        }
        result
    }
}
