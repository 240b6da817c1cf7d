//! The older way to a device, for hosts without iommufd: a group in a type 1 container.
//!
//! The device has all of guest RAM, IOVA = GPA, and no vIOMMU can stand before it.

use std::fs::{File, OpenOptions, read_link};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vfio_bindings::bindings::vfio as sys;
use viommu::GuestRam;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::vfio::{OpenError, VfioDevice};

/// The container's node.
pub(super) const CONTAINER: &str = "/dev/vfio/vfio";

const SET_IOMMU: libc::c_ulong = 0x3b66;
const GROUP_GET_STATUS: libc::c_ulong = 0x3b67;
const GROUP_SET_CONTAINER: libc::c_ulong = 0x3b68;
const GROUP_GET_DEVICE_FD: libc::c_ulong = 0x3b6a;
const IOMMU_MAP_DMA: libc::c_ulong = 0x3b71;
const TYPE1V2_IOMMU: libc::c_ulong = 3;

/// Why a device cannot be reached this way.
#[derive(Debug, thiserror::Error)]
pub enum LegacyError {
    /// A node cannot be opened.
    #[error(
        "{path} cannot be opened: {source}; end the VM that has it, load vfio-pci, or run as root"
    )]
    Open {
        /// The node.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It stands behind no IOMMU.
    #[error("{0} stands behind no IOMMU; enable VT-d in the firmware")]
    NoGroup(PathBuf),
    /// Another device of the group has a host driver.
    #[error(
        "group {0} has a device with a host driver; bind all of it to vfio-pci (nestling doctor names it)"
    )]
    NotViable(String),
    /// The host's IOMMU does not remap interrupts.
    #[error(
        "the host does not remap interrupts, so a guest could raise the host's; switch that on in the firmware, or, for a guest that is trusted: modprobe vfio_iommu_type1 allow_unsafe_interrupts=1"
    )]
    Interrupts(#[source] io::Error),
    /// A call failed.
    #[error("{call} failed; see the kernel's log of the host")]
    Call {
        /// The call, by the kernel's name.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Pinning guest memory went over the limit.
    #[error("guest RAM cannot be locked in memory; raise the limit (ulimit -l, LimitMEMLOCK=)")]
    LockedMemory(#[source] io::Error),
    /// The device itself.
    #[error(transparent)]
    Device(#[from] OpenError),
}

/// A container with guest RAM in it, for as long as a group is in it.
#[derive(Debug)]
pub struct LegacyContainer {
    container: OwnedFd,
    ram: GuestRam,
    /// Held while groups come and go.
    groups: Mutex<Vec<Weak<Group>>>,
}

/// A group in the container. Dropping it takes the group out again; its devices are closed before.
#[derive(Debug)]
pub struct Group {
    number: String,
    fd: OwnedFd,
}

impl AsFd for Group {
    /// For KVM's VFIO device: older kernels know groups only.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl LegacyContainer {
    /// An empty one.
    ///
    /// # Errors
    /// [`LegacyError::Open`].
    pub fn new(ram: GuestRam) -> Result<Self, LegacyError> {
        Ok(Self {
            container: open(Path::new(CONTAINER))?.into(),
            ram,
            groups: Mutex::default(),
        })
    }

    /// The device at `sysfs`, with all of guest RAM in its reach, and its group, to be dropped
    /// after it.
    ///
    /// # Errors
    /// Why not.
    pub fn open(&self, sysfs: &Path) -> Result<(VfioDevice, Arc<Group>), LegacyError> {
        let number = read_link(sysfs.join("iommu_group"))
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .ok_or_else(|| LegacyError::NoGroup(sysfs.into()))?;
        let group = self.group(number)?;
        let name = sysfs.file_name().unwrap_or_default().to_string_lossy();
        let name = std::ffi::CString::new(name.as_bytes()).unwrap_or_default();
        // SAFETY: the argument is a string that ends with 0 and outlives the call.
        let device =
            unsafe { libc::ioctl(group.fd.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
        if device < 0 {
            return Err(last("VFIO_GROUP_GET_DEVICE_FD"));
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        let file = unsafe { File::from_raw_fd(device) };
        Ok((VfioDevice::describe(file, sysfs.into())?, group))
    }

    fn groups(&self) -> MutexGuard<'_, Vec<Weak<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group with this number, put into the container if it is not there yet.
    fn group(&self, number: String) -> Result<Arc<Group>, LegacyError> {
        let mut groups = self.groups();
        groups.retain(|group| group.strong_count() > 0);
        let found = groups.iter().filter_map(Weak::upgrade);
        if let Some(group) = found.into_iter().find(|group| group.number == number) {
            return Ok(group);
        }
        let fd = self.join(&number)?;
        // The container forgets everything with its last group.
        if groups.is_empty() {
            self.set_up()?;
        }
        let group = Arc::new(Group { number, fd });
        groups.push(Arc::downgrade(&group));
        Ok(group)
    }

    /// Puts a group into the container.
    fn join(&self, group: &str) -> Result<OwnedFd, LegacyError> {
        let fd: OwnedFd = open(&Path::new("/dev/vfio").join(group))?.into();
        let mut status = sys::vfio_group_status {
            argsz: size_of::<sys::vfio_group_status>() as u32,
            flags: 0,
        };
        // SAFETY: the structure is the one that the kernel has for this call.
        if unsafe { libc::ioctl(fd.as_raw_fd(), GROUP_GET_STATUS, &mut status) } < 0 {
            return Err(last("VFIO_GROUP_GET_STATUS"));
        }
        if status.flags & sys::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(LegacyError::NotViable(group.into()));
        }
        let container = self.container.as_raw_fd();
        // SAFETY: the argument is the address of a descriptor number, as the kernel wants it.
        if unsafe { libc::ioctl(fd.as_raw_fd(), GROUP_SET_CONTAINER, &container) } < 0 {
            return Err(last("VFIO_GROUP_SET_CONTAINER"));
        }
        Ok(fd)
    }

    /// Makes a container with its first group one of type 1, with guest RAM in it.
    fn set_up(&self) -> Result<(), LegacyError> {
        // SAFETY: this call takes a number.
        if unsafe { libc::ioctl(self.container.as_raw_fd(), SET_IOMMU, TYPE1V2_IOMMU) } < 0 {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::EPERM) => LegacyError::Interrupts(source),
                _ => LegacyError::Call {
                    call: "VFIO_SET_IOMMU",
                    source,
                },
            });
        }
        self.map_ram()
    }

    fn map_ram(&self) -> Result<(), LegacyError> {
        for region in self.ram.iter() {
            let start: GuestAddress = region.start_addr();
            let address = self
                .ram
                .get_host_address(start)
                .map_err(|error| LegacyError::Call {
                    call: "VFIO_IOMMU_MAP_DMA",
                    source: io::Error::other(error),
                })?;
            let map = sys::vfio_iommu_type1_dma_map {
                argsz: size_of::<sys::vfio_iommu_type1_dma_map>() as u32,
                flags: sys::VFIO_DMA_MAP_FLAG_READ | sys::VFIO_DMA_MAP_FLAG_WRITE,
                vaddr: address as u64,
                iova: start.0,
                size: region.len(),
            };
            // SAFETY: the structure is the one that the kernel has for this call, and the range is
            // guest RAM, which `self.ram` keeps mapped; the kernel pins its pages.
            let result = unsafe { libc::ioctl(self.container.as_raw_fd(), IOMMU_MAP_DMA, &map) };
            if result < 0 {
                let source = io::Error::last_os_error();
                return Err(match source.raw_os_error() {
                    Some(libc::ENOMEM) => LegacyError::LockedMemory(source),
                    _ => LegacyError::Call {
                        call: "VFIO_IOMMU_MAP_DMA",
                        source,
                    },
                });
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, LegacyError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| LegacyError::Open {
            path: path.into(),
            source,
        })
}

fn last(call: &'static str) -> LegacyError {
    LegacyError::Call {
        call,
        source: io::Error::last_os_error(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use vm_memory::GuestMemoryMmap;
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn a_device_without_a_group_is_refused_before_anything_is_opened() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let container = LegacyContainer {
            container: File::open("/dev/null").unwrap().into(),
            ram: Arc::new(ram),
            groups: Mutex::default(),
        };
        let dir = TempDir::new().unwrap();
        let error = container.open(dir.as_path()).unwrap_err();
        assert!(matches!(error, LegacyError::NoGroup(_)));
        symlink("../../iommu_groups/4711", dir.as_path().join("iommu_group")).unwrap();
        let error = container.open(dir.as_path()).unwrap_err();
        assert!(error.to_string().contains("/dev/vfio/4711"), "{error}");
    }

    #[test]
    fn the_kernel_abi_has_the_sizes_of_linux_7_2() {
        assert_eq!(size_of::<sys::vfio_iommu_type1_dma_map>(), 32);
        assert_eq!(size_of::<sys::vfio_group_status>(), 8);
        assert_eq!(TYPE1V2_IOMMU, 3);
    }
}
