//! The device through VFIO: by its group with the type 1 IOMMU, which stock kernels have, or by
//! its character device with iommufd, which has PASIDs.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use iommufd_bindings as iommufd;
use vfio_bindings::bindings::vfio;

use crate::ioctl::ioctl;
use crate::memory::Memory;
use crate::registers::BAR_SIZE;
use crate::sysfs::Function;

/// Numbers of VFIO's and iommufd's commands: both are `_IO(';', n)`.
const fn command(n: u64) -> u64 {
    (b';' as u64) << 8 | n
}

const SET_IOMMU: u64 = command(102);
const GROUP_SET_CONTAINER: u64 = command(104);
const GROUP_GET_DEVICE_FD: u64 = command(106);
const DEVICE_GET_REGION_INFO: u64 = command(108);
const DEVICE_SET_IRQS: u64 = command(110);
const DEVICE_RESET: u64 = command(111);
const IOMMU_MAP_DMA: u64 = command(113);
const IOMMU_UNMAP_DMA: u64 = command(114);
const DEVICE_BIND_IOMMUFD: u64 = command(118);
const DEVICE_ATTACH: u64 = command(119);
const DEVICE_DETACH: u64 = command(120);
const IOMMU_IOAS_ALLOC: u64 = command(0x81);
const IOMMU_IOAS_MAP: u64 = command(0x85);
const IOMMU_IOAS_UNMAP: u64 = command(0x86);
const IOMMU_HWPT_ALLOC: u64 = command(0x89);

/// Index of configuration space among a device's regions.
const CONFIG_REGION: u32 = 7;

fn open(path: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.with_context(|| format!("cannot open {path}"))
}

/// A null argument.
fn nothing() -> *mut u8 {
    std::ptr::null_mut()
}

/// An open VFIO device.
#[derive(Debug)]
pub struct Device(File);

impl Device {
    fn region(&self, index: u32) -> Result<vfio::vfio_region_info> {
        let mut info = vfio::vfio_region_info {
            argsz: size_of::<vfio::vfio_region_info>() as u32,
            index,
            ..Default::default()
        };
        // SAFETY: the command takes this structure, whose `argsz` is right.
        unsafe {
            ioctl(
                "VFIO_DEVICE_GET_REGION_INFO",
                &self.0,
                DEVICE_GET_REGION_INFO,
                &mut info,
            )
        }?;
        Ok(info)
    }

    /// Lets it do DMA, and gives its BAR 0.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn enable(&self) -> Result<Memory> {
        let config = self.region(CONFIG_REGION)?;
        self.0
            .write_all_at(&6u16.to_le_bytes(), config.offset + 4)?;
        let bar = self.region(0)?;
        ensure!(bar.size == BAR_SIZE, "BAR 0 has {:#x} bytes", bar.size);
        Memory::of_file(&self.0, bar.offset, BAR_SIZE as usize)
    }

    /// Function level reset.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn reset(&self) -> Result<()> {
        // SAFETY: the command takes no argument.
        unsafe { ioctl("VFIO_DEVICE_RESET", &self.0, DEVICE_RESET, nothing()) }?;
        Ok(())
    }

    /// Connects the MSI-X vectors, from 0 on, to eventfds.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn connect(&self, vectors: &[Event]) -> Result<()> {
        let words = [
            20 + 4 * vectors.len() as u32,
            vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER,
            vfio::VFIO_PCI_MSIX_IRQ_INDEX,
            0,
            vectors.len() as u32,
        ];
        let eventfds = vectors.iter().map(|event| event.0.as_raw_fd() as u32);
        let mut set: Vec<u32> = words.into_iter().chain(eventfds).collect();
        // SAFETY: a `vfio_irq_set` (five words) with its eventfds behind it, as `argsz` says.
        unsafe {
            ioctl(
                "VFIO_DEVICE_SET_IRQS",
                &self.0,
                DEVICE_SET_IRQS,
                set.as_mut_ptr(),
            )
        }?;
        Ok(())
    }
}

/// An eventfd.
#[derive(Debug)]
pub struct Event(File);

impl Event {
    /// A new one at 0.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new() -> Result<Self> {
        // SAFETY: takes two numbers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        ensure!(fd >= 0, "no eventfd: {}", std::io::Error::last_os_error());
        // SAFETY: it was just made and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }

    /// How often it was signalled since the last call.
    pub fn take(&self) -> u64 {
        let mut count = [0; 8];
        match std::io::Read::read(&mut &self.0, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }
}

/// A device by its group, in an address space (a container) that others may share.
#[derive(Debug)]
pub struct Group {
    /// The device.
    pub device: Device,
    container: Arc<File>,
    _group: File,
}

impl Group {
    /// Gives the function to `vfio-pci` and opens it, with an address space of its own.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn open(address: &str) -> Result<Self> {
        Self::join(address, Arc::new(open("/dev/vfio/vfio")?), true)
    }

    /// The same in the address space of `self`, with what is mapped there.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn beside(&self, address: &str) -> Result<Self> {
        Self::join(address, Arc::clone(&self.container), false)
    }

    /// `fresh`: the container has no IOMMU yet.
    fn join(address: &str, container: Arc<File>, fresh: bool) -> Result<Self> {
        let function = Function::at(address)?;
        function.give_to(Some("vfio-pci"))?;
        let group = fs::read_link(function.file("iommu_group"));
        let group = group.context("the function is behind no IOMMU")?;
        let number = group.file_name().context("a group without a number")?;
        let group = open(&format!("/dev/vfio/{}", number.to_string_lossy()))?;
        let mut fd = container.as_raw_fd();
        // SAFETY: the command reads one descriptor.
        unsafe {
            ioctl(
                "VFIO_GROUP_SET_CONTAINER",
                &group,
                GROUP_SET_CONTAINER,
                &mut fd,
            )
        }?;
        if fresh {
            let kind = std::ptr::without_provenance_mut::<u8>(vfio::VFIO_TYPE1v2_IOMMU as usize);
            // SAFETY: the command takes a number in the place of a pointer.
            unsafe { ioctl("VFIO_SET_IOMMU", &container, SET_IOMMU, kind) }?;
        }
        let name = CString::new(address)?;
        let name = name.as_ptr().cast_mut();
        // SAFETY: the command reads a string that ends with a zero.
        let fd = unsafe {
            ioctl(
                "VFIO_GROUP_GET_DEVICE_FD",
                &group,
                GROUP_GET_DEVICE_FD,
                name,
            )
        }?;
        // SAFETY: the command made the descriptor, and nobody else has it.
        let device = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            device: Device(device.into()),
            container,
            _group: group,
        })
    }

    /// Maps `memory` at `iova`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn map(&self, memory: &Memory, iova: u64, writable: bool) -> Result<()> {
        let mut map = vfio::vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio::vfio_iommu_type1_dma_map>() as u32,
            flags: vfio::VFIO_DMA_MAP_FLAG_READ
                | if writable {
                    vfio::VFIO_DMA_MAP_FLAG_WRITE
                } else {
                    0
                },
            vaddr: memory.address(),
            iova,
            size: memory.len(),
        };
        // SAFETY: the command takes this structure; the memory is a mapping of volatile bytes.
        unsafe {
            ioctl(
                "VFIO_IOMMU_MAP_DMA",
                &self.container,
                IOMMU_MAP_DMA,
                &mut map,
            )
        }?;
        Ok(())
    }

    /// Unmaps what was mapped at `iova`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unmap(&self, iova: u64, length: u64) -> Result<()> {
        // A `vfio_iommu_type1_dma_unmap` without its data: argsz and flags, iova, size.
        let mut unmap = [24u64, iova, length];
        // SAFETY: the command takes such a structure of 24 bytes, as `argsz` says.
        unsafe {
            ioctl(
                "VFIO_IOMMU_UNMAP_DMA",
                &self.container,
                IOMMU_UNMAP_DMA,
                &mut unmap,
            )
        }?;
        ensure!(
            unmap[2] == length,
            "{:#x} bytes unmapped, not {length:#x}",
            unmap[2]
        );
        Ok(())
    }
}

/// A device by its character device, on an iommufd.
#[derive(Debug)]
pub struct Cdev {
    /// The device.
    pub device: Device,
    iommufd: File,
    id: u32,
}

/// An address space: an IOAS, and what of it is attached.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    ioas: u32,
    /// A page table that PASIDs can have, or the IOAS itself: then the kernel makes the table.
    table: u32,
}

impl Cdev {
    /// Gives the function to `vfio-pci` and binds it to an iommufd.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn open(address: &str) -> Result<Self> {
        let function = Function::at(address)?;
        function.give_to(Some("vfio-pci"))?;
        let mut names = fs::read_dir(function.file("vfio-dev"))
            .context("the kernel has no VFIO character devices")?;
        let name = names
            .next()
            .context("the function has no VFIO character device")??;
        let device = open(&format!(
            "/dev/vfio/devices/{}",
            name.file_name().to_string_lossy()
        ))?;
        let iommufd = open("/dev/iommu")?;
        let mut bind = vfio::vfio_device_bind_iommufd {
            argsz: 16,
            iommufd: iommufd.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: the command takes this structure, of which 16 bytes are its older form.
        unsafe {
            ioctl(
                "VFIO_DEVICE_BIND_IOMMUFD",
                &device,
                DEVICE_BIND_IOMMUFD,
                &mut bind,
            )
        }?;
        Ok(Self {
            device: Device(device),
            iommufd,
            id: bind.out_devid,
        })
    }

    /// A new address space for requests without PASID.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn space(&self) -> Result<Space> {
        let ioas = self.ioas()?;
        Ok(Space { ioas, table: ioas })
    }

    fn ioas(&self) -> Result<u32> {
        let mut ioas = iommufd::iommu_ioas_alloc {
            size: size_of::<iommufd::iommu_ioas_alloc>() as u32,
            ..Default::default()
        };
        // SAFETY: the command takes this structure, whose `size` is right.
        unsafe {
            ioctl(
                "IOMMU_IOAS_ALLOC",
                &self.iommufd,
                IOMMU_IOAS_ALLOC,
                &mut ioas,
            )
        }?;
        Ok(ioas.out_ioas_id)
    }

    /// A new address space that PASIDs can have.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn space_for_pasids(&self) -> Result<Space> {
        let ioas = self.ioas()?;
        let mut hwpt = iommufd::iommu_hwpt_alloc {
            size: size_of::<iommufd::iommu_hwpt_alloc>() as u32,
            flags: iommufd::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID,
            dev_id: self.id,
            pt_id: ioas,
            ..Default::default()
        };
        // SAFETY: the command takes this structure, whose `size` is right.
        unsafe {
            ioctl(
                "IOMMU_HWPT_ALLOC",
                &self.iommufd,
                IOMMU_HWPT_ALLOC,
                &mut hwpt,
            )
        }?;
        Ok(Space {
            ioas,
            table: hwpt.out_hwpt_id,
        })
    }

    /// Attaches an address space to the device's requests with `pasid`, or without any. What was
    /// attached there is replaced.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn attach(&self, space: Space, pasid: Option<u32>) -> Result<()> {
        let mut attach = vfio::vfio_device_attach_iommufd_pt {
            argsz: size_of::<vfio::vfio_device_attach_iommufd_pt>() as u32,
            flags: pasid.map_or(0, |_| vfio::VFIO_DEVICE_ATTACH_PASID),
            pt_id: space.table,
            pasid: pasid.unwrap_or(0),
        };
        // SAFETY: the command takes this structure, whose `argsz` is right.
        unsafe {
            ioctl(
                "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
                &self.device.0,
                DEVICE_ATTACH,
                &mut attach,
            )
        }?;
        Ok(())
    }

    /// Detaches what is attached to `pasid`, or to requests without any.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn detach(&self, pasid: Option<u32>) -> Result<()> {
        let mut detach = vfio::vfio_device_detach_iommufd_pt {
            argsz: size_of::<vfio::vfio_device_detach_iommufd_pt>() as u32,
            flags: pasid.map_or(0, |_| vfio::VFIO_DEVICE_DETACH_PASID),
            pasid: pasid.unwrap_or(0),
        };
        // SAFETY: the command takes this structure, whose `argsz` is right.
        unsafe {
            ioctl(
                "VFIO_DEVICE_DETACH_IOMMUFD_PT",
                &self.device.0,
                DEVICE_DETACH,
                &mut detach,
            )
        }?;
        Ok(())
    }

    /// Maps `memory` at `iova` of an address space.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn map(&self, space: Space, memory: &Memory, iova: u64) -> Result<()> {
        let mut map = iommufd::iommu_ioas_map {
            size: size_of::<iommufd::iommu_ioas_map>() as u32,
            flags: iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
                | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE
                | iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
            ioas_id: space.ioas,
            user_va: memory.address(),
            length: memory.len(),
            iova,
            ..Default::default()
        };
        // SAFETY: the command takes this structure; the memory is a mapping of volatile bytes.
        unsafe { ioctl("IOMMU_IOAS_MAP", &self.iommufd, IOMMU_IOAS_MAP, &mut map) }?;
        Ok(())
    }

    /// Unmaps what was mapped at `iova` of an address space.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unmap(&self, space: Space, iova: u64, length: u64) -> Result<()> {
        let mut unmap = iommufd::iommu_ioas_unmap {
            size: size_of::<iommufd::iommu_ioas_unmap>() as u32,
            ioas_id: space.ioas,
            iova,
            length,
        };
        // SAFETY: the command takes this structure, whose `size` is right.
        unsafe {
            ioctl(
                "IOMMU_IOAS_UNMAP",
                &self.iommufd,
                IOMMU_IOAS_UNMAP,
                &mut unmap,
            )
        }?;
        Ok(())
    }
}
