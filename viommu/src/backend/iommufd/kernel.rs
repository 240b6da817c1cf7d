//! Every call into the host's iommufd, behind one trait.
//!
//! [`Kernel`] is the seam where tests stand: a fake that models VT-d's behaviour (`linux.md`, A3 to
//! A6, A8, A9) and fails any call on demand, and the kernel's own mock driver. [`Linux`] is the
//! real one: one method, one ioctl.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use iommufd_bindings as sys;

use super::hwinfo::{HwInfo, HwModel};
use crate::backend::Access;

/// What kind of hardware page table to allocate.
#[derive(Clone, Copy, Debug)]
pub enum HwptKind<'a> {
    /// A table that the kernel fills from an IOAS.
    Paging {
        /// Nested tables can sit on it (forces VT-d's second-stage format).
        nest_parent: bool,
        /// Dirty tracking can be switched on later (it cannot be added then).
        dirty: bool,
        /// It can be attached to PASIDs, and to an endpoint that has PASIDs attached.
        pasid: bool,
    },
    /// A guest's first-stage table over a nest parent.
    Nested {
        /// The table, in VT-d's format.
        table: &'a sys::iommu_hwpt_vtd_s1,
        /// As for `Paging`.
        pasid: bool,
        /// The fault queue that gets its page requests.
        fault_queue: Option<u32>,
    },
}

/// An invalidation array of which only a part took effect.
#[derive(Debug)]
pub struct Partial {
    /// How many entries took effect, from the front.
    pub handled: usize,
    /// Why the next one did not.
    pub source: io::Error,
}

/// The calls of iommufd that nestling uses. Ids are the kernel's object ids; the types in
/// [`super::object`] own them.
pub trait Kernel: Send + Sync {
    /// `IOMMU_DESTROY`: frees the object `id`.
    ///
    /// # Errors
    /// `EBUSY` while something uses it.
    fn destroy(&self, id: u32) -> io::Result<()>;

    /// `IOMMU_IOAS_ALLOC`: a new, empty address space.
    ///
    /// # Errors
    /// What the kernel says.
    fn ioas_alloc(&self) -> io::Result<u32>;

    /// `IOMMU_IOAS_ALLOW_IOVAS`: `ranges` (first, last) must stay usable; a device whose reserved
    /// regions hit them cannot be attached.
    ///
    /// # Errors
    /// `EADDRINUSE` when an attached device reserves part of them.
    fn allow_iovas(&self, ioas: u32, ranges: &[(u64, u64)]) -> io::Result<()>;

    /// `IOMMU_IOAS_IOVA_RANGES`: what can be mapped now (first, last), ascending.
    ///
    /// # Errors
    /// What the kernel says.
    fn iova_ranges(&self, ioas: u32) -> io::Result<Vec<(u64, u64)>>;

    /// `IOMMU_IOAS_MAP_FILE`: maps `length` bytes of `file` (memfd or dma-buf) from `offset` at
    /// `iova`.
    ///
    /// # Errors
    /// `EINVAL` in reserved regions, `EEXIST` over a mapping, `ENOMEM` over the locked-memory
    /// limit.
    fn map_file(
        &self,
        ioas: u32,
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()>;

    /// `IOMMU_IOAS_MAP`: maps `length` bytes of this process from `address` at `iova`. The kernel
    /// pins the pages, so the mapping stays valid whatever the process does with its own.
    ///
    /// # Errors
    /// As [`map_file`](Self::map_file); `EFAULT` where there is no memory.
    fn map(
        &self,
        ioas: u32,
        address: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()>;

    /// `IOMMU_IOAS_COPY`: maps what `from` has at `from_iova` into `to` as well, sharing its pins.
    ///
    /// # Errors
    /// As [`map_file`](Self::map_file); `ENOENT` when `from` has a hole there.
    fn copy(
        &self,
        to: u32,
        to_iova: u64,
        from: u32,
        from_iova: u64,
        length: u64,
        access: Access,
    ) -> io::Result<()>;

    /// `IOMMU_IOAS_UNMAP`: removes the whole areas inside the range and returns their bytes.
    ///
    /// # Errors
    /// `ENOENT` when the range cuts an area or has none.
    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> io::Result<u64>;

    /// `IOMMU_HWPT_ALLOC` for `device` (its bind id) on `under`: an IOAS for a paging table, a
    /// nest parent for a nested one.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the hardware cannot, `EINVAL` for a wrong parent or table.
    fn hwpt_alloc(&self, device: u32, under: u32, kind: HwptKind<'_>) -> io::Result<u32>;

    /// `IOMMU_GET_HW_INFO`.
    ///
    /// # Errors
    /// What the kernel says.
    fn hw_info(&self, device: u32) -> io::Result<HwInfo>;

    /// `IOMMU_HWPT_INVALIDATE` on a nested table.
    ///
    /// # Errors
    /// How many entries took effect before the one that failed.
    fn invalidate(
        &self,
        hwpt: u32,
        entries: &[sys::iommu_hwpt_vtd_s1_invalidate],
    ) -> Result<(), Partial>;

    /// `IOMMU_FAULT_QUEUE_ALLOC`: its id, and the descriptor that must be closed before the id is
    /// destroyed. Reads must not block.
    ///
    /// # Errors
    /// What the kernel says.
    fn fault_queue_alloc(&self) -> io::Result<(u32, OwnedFd)>;

    /// Waits a moment (10 ms) before the next try of a call that failed with `EBUSY` while the
    /// device is being reset.
    fn pause(&self);
}

/// The running kernel, through a descriptor of `/dev/iommu`.
#[derive(Debug)]
pub struct Linux {
    file: OwnedFd,
}

impl Linux {
    /// Opens `path` (`/dev/iommu`).
    ///
    /// # Errors
    /// `ENOENT` without `CONFIG_IOMMUFD`, `EACCES` without the right.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)?;
        Ok(file.into())
    }
}

impl From<File> for Linux {
    /// Takes over a descriptor of `/dev/iommu` that was passed in.
    fn from(file: File) -> Self {
        Self { file: file.into() }
    }
}

impl AsFd for Linux {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The argument of one iommufd ioctl.
///
/// # Safety
/// `COMMAND` must be the command whose argument the kernel defines with this layout, whose first
/// field is its size in bytes.
unsafe trait Request: Sized {
    const COMMAND: u32;

    /// `_IO(';', COMMAND)`.
    const NUMBER: libc::c_ulong =
        ((sys::IOMMUFD_TYPE as u32) << 8 | Self::COMMAND) as libc::c_ulong;
}

macro_rules! request {
    ($($argument:ident: $command:ident),* $(,)?) => {$(
        // SAFETY: the kernel's header pairs this command with this structure, and the bindings
        // are generated from that header; a test pins numbers and sizes.
        unsafe impl Request for sys::$argument {
            const COMMAND: u32 = sys::$command;
        }
    )*};
}

request! {
    iommu_destroy: IOMMUFD_CMD_DESTROY,
    iommu_ioas_alloc: IOMMUFD_CMD_IOAS_ALLOC,
    iommu_ioas_allow_iovas: IOMMUFD_CMD_IOAS_ALLOW_IOVAS,
    iommu_ioas_copy: IOMMUFD_CMD_IOAS_COPY,
    iommu_ioas_iova_ranges: IOMMUFD_CMD_IOAS_IOVA_RANGES,
    iommu_ioas_map: IOMMUFD_CMD_IOAS_MAP,
    iommu_ioas_map_file: IOMMUFD_CMD_IOAS_MAP_FILE,
    iommu_ioas_unmap: IOMMUFD_CMD_IOAS_UNMAP,
    iommu_hwpt_alloc: IOMMUFD_CMD_HWPT_ALLOC,
    iommu_hw_info: IOMMUFD_CMD_GET_HW_INFO,
    iommu_hwpt_invalidate: IOMMUFD_CMD_HWPT_INVALIDATE,
    iommu_fault_alloc: IOMMUFD_CMD_FAULT_QUEUE_ALLOC,
}

/// The size field of a request.
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

fn map_flags(access: Access) -> u32 {
    let mut flags = sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
    if access.read {
        flags |= sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
    }
    if access.write {
        flags |= sys::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
    }
    flags
}

impl Linux {
    fn call<T: Request>(&self, argument: &mut T) -> io::Result<()> {
        // SAFETY: `Request` promises that the kernel reads and writes no more than a `T` here, and
        // every pointer inside it was made by the callers below from a live reference that
        // outlives the call.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), T::NUMBER, argument) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Kernel for Linux {
    fn destroy(&self, id: u32) -> io::Result<()> {
        self.call(&mut sys::iommu_destroy {
            size: size::<sys::iommu_destroy>(),
            id,
        })
    }

    fn ioas_alloc(&self) -> io::Result<u32> {
        let mut argument = sys::iommu_ioas_alloc {
            size: size::<sys::iommu_ioas_alloc>(),
            ..Default::default()
        };
        self.call(&mut argument)?;
        Ok(argument.out_ioas_id)
    }

    fn allow_iovas(&self, ioas: u32, ranges: &[(u64, u64)]) -> io::Result<()> {
        let ranges = ranges
            .iter()
            .map(|&(start, last)| sys::iommu_iova_range { start, last })
            .collect::<Vec<_>>();
        self.call(&mut sys::iommu_ioas_allow_iovas {
            size: size::<sys::iommu_ioas_allow_iovas>(),
            ioas_id: ioas,
            num_iovas: ranges.len() as u32,
            allowed_iovas: ranges.as_ptr() as u64,
            ..Default::default()
        })
    }

    fn iova_ranges(&self, ioas: u32) -> io::Result<Vec<(u64, u64)>> {
        let mut ranges = vec![sys::iommu_iova_range::default(); 32];
        loop {
            let mut argument = sys::iommu_ioas_iova_ranges {
                size: size::<sys::iommu_ioas_iova_ranges>(),
                ioas_id: ioas,
                num_iovas: ranges.len() as u32,
                allowed_iovas: ranges.as_mut_ptr() as u64,
                ..Default::default()
            };
            let result = self.call(&mut argument);
            let needed = argument.num_iovas as usize;
            match result {
                // The kernel says how many there are: once more, with room for them.
                Err(error)
                    if error.raw_os_error() == Some(libc::EMSGSIZE) && needed > ranges.len() =>
                {
                    ranges.resize(needed, Default::default());
                }
                Err(error) => return Err(error),
                Ok(()) => {
                    ranges.truncate(needed);
                    return Ok(ranges
                        .iter()
                        .map(|range| (range.start, range.last))
                        .collect());
                }
            }
        }
    }

    fn map_file(
        &self,
        ioas: u32,
        file: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()> {
        self.call(&mut sys::iommu_ioas_map_file {
            size: size::<sys::iommu_ioas_map_file>(),
            flags: map_flags(access),
            ioas_id: ioas,
            fd: file.as_raw_fd(),
            start: offset,
            length,
            iova,
        })
    }

    fn map(
        &self,
        ioas: u32,
        address: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()> {
        self.call(&mut sys::iommu_ioas_map {
            size: size::<sys::iommu_ioas_map>(),
            flags: map_flags(access),
            ioas_id: ioas,
            user_va: address,
            length,
            iova,
            ..Default::default()
        })
    }

    fn copy(
        &self,
        to: u32,
        to_iova: u64,
        from: u32,
        from_iova: u64,
        length: u64,
        access: Access,
    ) -> io::Result<()> {
        self.call(&mut sys::iommu_ioas_copy {
            size: size::<sys::iommu_ioas_copy>(),
            flags: map_flags(access),
            dst_ioas_id: to,
            src_ioas_id: from,
            length,
            dst_iova: to_iova,
            src_iova: from_iova,
        })
    }

    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> io::Result<u64> {
        let mut argument = sys::iommu_ioas_unmap {
            size: size::<sys::iommu_ioas_unmap>(),
            ioas_id: ioas,
            iova,
            length,
        };
        self.call(&mut argument)?;
        Ok(argument.length)
    }

    fn hwpt_alloc(&self, device: u32, under: u32, kind: HwptKind<'_>) -> io::Result<u32> {
        let mut argument = sys::iommu_hwpt_alloc {
            size: size::<sys::iommu_hwpt_alloc>(),
            dev_id: device,
            pt_id: under,
            ..Default::default()
        };
        let mut flag = |on: bool, bit| argument.flags |= if on { bit } else { 0 };
        match kind {
            HwptKind::Paging {
                nest_parent,
                dirty,
                pasid,
            } => {
                flag(
                    nest_parent,
                    sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT,
                );
                flag(
                    dirty,
                    sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
                );
                flag(pasid, sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID);
            }
            HwptKind::Nested {
                table,
                pasid,
                fault_queue,
            } => {
                flag(pasid, sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID);
                flag(
                    fault_queue.is_some(),
                    sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID,
                );
                argument.fault_id = fault_queue.unwrap_or(0);
                argument.data_type = sys::iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1;
                argument.data_len = size_of_val(table) as u32;
                argument.data_uptr = std::ptr::from_ref(table) as u64;
            }
        }
        self.call(&mut argument)?;
        Ok(argument.out_hwpt_id)
    }

    fn hw_info(&self, device: u32) -> io::Result<HwInfo> {
        // As large as the largest known: the kernel zeroes what it does not fill.
        let mut data = [0u64; 8];
        let mut argument = sys::iommu_hw_info {
            size: size::<sys::iommu_hw_info>(),
            dev_id: device,
            data_len: size_of_val(&data) as u32,
            data_uptr: data.as_mut_ptr() as u64,
            ..Default::default()
        };
        self.call(&mut argument)?;
        // SAFETY: both members of the union are a `u32`, so any value is valid.
        let kind = unsafe { argument.__bindgen_anon_1.out_data_type };
        Ok(HwInfo {
            model: HwModel::decode(kind, &data),
            pasid_bits: argument.out_max_pasid_log2,
            capabilities: argument.out_capabilities,
        })
    }

    fn invalidate(
        &self,
        hwpt: u32,
        entries: &[sys::iommu_hwpt_vtd_s1_invalidate],
    ) -> Result<(), Partial> {
        let mut argument = sys::iommu_hwpt_invalidate {
            size: size::<sys::iommu_hwpt_invalidate>(),
            hwpt_id: hwpt,
            data_uptr: entries.as_ptr() as u64,
            data_type: sys::iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
            entry_len: size::<sys::iommu_hwpt_vtd_s1_invalidate>(),
            entry_num: entries.len() as u32,
            ..Default::default()
        };
        self.call(&mut argument).map_err(|source| Partial {
            // The kernel writes the count back even when it fails; where it did not get that far
            // the count is what went in, and nothing took effect.
            handled: match argument.entry_num as usize {
                handled if handled < entries.len() => handled,
                _ => 0,
            },
            source,
        })
    }

    fn fault_queue_alloc(&self) -> io::Result<(u32, OwnedFd)> {
        let mut argument = sys::iommu_fault_alloc {
            size: size::<sys::iommu_fault_alloc>(),
            ..Default::default()
        };
        self.call(&mut argument)?;
        // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(argument.out_fault_fd as i32) };
        Ok((argument.out_fault_id, fd))
    }

    fn pause(&self) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_abi_has_the_numbers_and_sizes_of_linux_7_2() {
        fn is<T: Request>(number: libc::c_ulong, bytes: usize) {
            assert_eq!((T::NUMBER, size_of::<T>()), (number, bytes));
        }
        is::<sys::iommu_destroy>(0x3b80, 8);
        is::<sys::iommu_ioas_alloc>(0x3b81, 12);
        is::<sys::iommu_ioas_allow_iovas>(0x3b82, 24);
        is::<sys::iommu_ioas_copy>(0x3b83, 40);
        is::<sys::iommu_ioas_iova_ranges>(0x3b84, 32);
        is::<sys::iommu_ioas_map>(0x3b85, 40);
        is::<sys::iommu_ioas_unmap>(0x3b86, 24);
        is::<sys::iommu_hwpt_alloc>(0x3b89, 48);
        is::<sys::iommu_hw_info>(0x3b8a, 40);
        is::<sys::iommu_hwpt_invalidate>(0x3b8d, 32);
        is::<sys::iommu_fault_alloc>(0x3b8e, 16);
        is::<sys::iommu_ioas_map_file>(0x3b8f, 40);
        assert_eq!(size_of::<sys::iommu_hwpt_vtd_s1>(), 24);
        assert_eq!(size_of::<sys::iommu_hwpt_vtd_s1_invalidate>(), 24);
        assert_eq!(size_of::<sys::iommu_hw_info_vtd>(), 24);
        assert_eq!(size_of::<sys::iommu_hwpt_pgfault>(), 40);
        assert_eq!(size_of::<sys::iommu_hwpt_page_response>(), 8);
    }

    #[test]
    fn a_mapping_asks_for_no_more_access_than_it_was_given() {
        assert_eq!(map_flags(Access::READ), 1 | 4);
        assert_eq!(map_flags(Access::READ_WRITE), 1 | 2 | 4);
        assert_eq!(
            map_flags(Access {
                read: false,
                write: true
            }),
            1 | 2
        );
    }

    #[test]
    fn without_iommufd_on_the_host_opening_says_which_file() {
        let error = Linux::open(Path::new("/nonexistent/iommu")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
