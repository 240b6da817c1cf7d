//! The host's VFIO, one device.
//!
//! Direct calls on vfio-bindings: vfio-ioctls makes an address space of its own for each VM,
//! swallows errors of register accesses and of resets, and detaches requests without PASID only.

mod open;
mod region;

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio as sys;
use viommu::Pasid;
use viommu::backend::iommufd::AttachDevice;

pub use self::open::{OpenError, group};
use self::open::{bind_reason, host_drivers, node_of};
use self::region::region;
use super::hardware::{CONFIG, Hardware, Irq, Mapping, Region};

/// `_IO(';', 100 + n)`
const fn number(n: u32) -> libc::c_ulong {
    (b';' as u32 * 256 + 100 + n) as libc::c_ulong
}

const DEVICE_GET_INFO: libc::c_ulong = number(7);
const DEVICE_GET_REGION_INFO: libc::c_ulong = number(8);
const DEVICE_GET_IRQ_INFO: libc::c_ulong = number(9);
const DEVICE_SET_IRQS: libc::c_ulong = number(10);
const DEVICE_RESET: libc::c_ulong = number(11);
const DEVICE_FEATURE: libc::c_ulong = number(17);
const DEVICE_BIND_IOMMUFD: libc::c_ulong = number(18);
const DEVICE_ATTACH_IOMMUFD_PT: libc::c_ulong = number(19);
const DEVICE_DETACH_IOMMUFD_PT: libc::c_ulong = number(20);

/// A VFIO device descriptor.
#[derive(Debug)]
pub struct VfioDevice {
    file: File,
    path: PathBuf,
    /// Offset of each region in the descriptor.
    regions: Vec<(u64, Region)>,
    can_reset: bool,
    /// While the device is stopped: whether the guest wants it to do DMA. Held across each write of
    /// its command register.
    stopped: Mutex<Option<bool>>,
}

impl VfioDevice {
    /// Opens the character device of the function at `sysfs` (`/sys/bus/pci/devices/…`) and binds
    /// it to `iommufd`. Returns it with its bind id; its DMA is blocked.
    ///
    /// # Errors
    /// Why not, with the remedy.
    pub fn open(sysfs: &Path, iommufd: BorrowedFd<'_>) -> Result<(Self, u32), OpenError> {
        let name = node_of(sysfs)?;
        let path = Path::new("/dev/vfio/devices").join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|source| OpenError::Open {
                path: path.clone(),
                source,
            })?;
        Self::bind(file, path, iommufd).map_err(|error| match error {
            OpenError::Bind { path, source, .. } if !host_drivers(sysfs).is_empty() => {
                OpenError::Bind {
                    path,
                    reason: format!(
                        "its IOMMU group has {}; bind that to vfio-pci too, or unbind it",
                        host_drivers(sysfs).join(", ")
                    ),
                    source,
                }
            }
            error => error,
        })
    }

    /// As [`open`](Self::open), for a device that somebody else has opened, and that is bound as
    /// `bound` already, or not yet. One that was in use is reset.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`OpenError::NotIt`].
    pub fn given(
        sysfs: &Path,
        file: File,
        iommufd: BorrowedFd<'_>,
        bound: Option<u32>,
    ) -> Result<(Self, u32), OpenError> {
        let name = node_of(sysfs)?;
        let number = std::fs::read_to_string(sysfs.join("vfio-dev").join(&name).join("dev"));
        let opened = file.metadata().ok().filter(|meta| {
            let of = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
            let shown = format!("{}:{}", of.0, of.1);
            meta.file_type().is_char_device() && number.is_ok_and(|text| text.trim() == shown)
        });
        if opened.is_none() {
            let name = name.to_string_lossy().into_owned();
            return Err(OpenError::NotIt(sysfs.into(), name));
        }
        let Some(number) = bound else {
            return Self::bind(file, sysfs.into(), iommufd);
        };
        let device = Self::describe(file, sysfs.into())?;
        device.quiet().map_err(|source| OpenError::Call {
            path: sysfs.into(),
            call: "pwrite of the command register",
            source,
        })?;
        Ok((device, number))
    }

    /// Ends what DMA a device still does for who had it before, as if it had just been opened.
    fn quiet(&self) -> io::Result<()> {
        // First, since the kernel puts the register back after a reset; and not every device can
        // be reset.
        self.change_command(|command| command & !BUS_MASTER)?;
        if let Err(why) = self.reset() {
            log::debug!("{} is not reset: {why}", self.path.display());
        }
        Ok(())
    }

    /// Binds a character device that was passed in; `path` is for messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn bind(
        file: File,
        path: PathBuf,
        iommufd: BorrowedFd<'_>,
    ) -> Result<(Self, u32), OpenError> {
        let mut argument = sys::vfio_device_bind_iommufd {
            argsz: size_of::<sys::vfio_device_bind_iommufd>() as u32,
            iommufd: iommufd.as_raw_fd(),
            ..Default::default()
        };
        call(&file, DEVICE_BIND_IOMMUFD, &mut argument).map_err(|source| OpenError::Bind {
            path: path.clone(),
            reason: bind_reason(&source),
            source,
        })?;
        Ok((Self::describe(file, path)?, argument.out_devid))
    }

    /// A descriptor that can be used already (bound, or from a group).
    ///
    /// # Errors
    /// [`OpenError::Call`] for what is not a VFIO PCI device.
    pub fn describe(file: File, path: PathBuf) -> Result<Self, OpenError> {
        let mut info = sys::vfio_device_info {
            argsz: size_of::<sys::vfio_device_info>() as u32,
            ..Default::default()
        };
        let result = call(&file, DEVICE_GET_INFO, &mut info).and_then(|()| {
            if info.flags & sys::VFIO_DEVICE_FLAGS_PCI == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENODEV));
            }
            Ok(())
        });
        result.map_err(|source| OpenError::Call {
            path: path.clone(),
            call: "VFIO_DEVICE_GET_INFO",
            source,
        })?;
        let regions = (0..info.num_regions.min(sys::VFIO_PCI_NUM_REGIONS))
            .map(|index| region(&file, index).unwrap_or_default())
            .collect();
        Ok(Self {
            can_reset: info.flags & sys::VFIO_DEVICE_FLAGS_RESET != 0,
            regions,
            file,
            path,
            stopped: Mutex::default(),
        })
    }

    fn at(&self, region: u32, offset: u64, length: usize) -> io::Result<u64> {
        let outside = || io::Error::from_raw_os_error(libc::EINVAL);
        let (start, region) = self.regions.get(region as usize).ok_or_else(outside)?;
        let end = offset.checked_add(length as u64).ok_or_else(outside)?;
        if end > region.length {
            return Err(outside());
        }
        Ok(start + offset)
    }
}

impl AsFd for VfioDevice {
    /// For KVM's VFIO device, which lets a guest flush caches.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn call<T>(file: &File, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller pairs the number with the structure that the kernel defines for it,
    // whose `argsz` is no more than its size; pointers inside are to memory that outlives the
    // call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Hardware for VfioDevice {
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.at(region, offset, data.len())?;
        self.file.read_exact_at(data, at)
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.at(region, offset, data.len())?;
        let command = COMMAND.checked_sub(offset).filter(|_| region == CONFIG);
        let command = command.filter(|&into| into < data.len() as u64);
        let Some(into) = command else {
            return self.file.write_all_at(data, at);
        };
        let mut stopped = self.stopped();
        let mut data = data.to_vec();
        if let (Some(wanted), Some(byte)) = (&mut *stopped, data.get_mut(into as usize)) {
            *wanted = *byte & BUS_MASTER != 0;
            *byte &= !BUS_MASTER;
        }
        self.file.write_all_at(&data, at)
    }

    fn region(&self, region: u32) -> Region {
        let found = self.regions.get(region as usize);
        found.map(|(_, region)| region.clone()).unwrap_or_default()
    }

    fn map(&self, region: u32, offset: u64, length: u64) -> io::Result<Arc<Mapping>> {
        let at = self.at(
            region,
            offset,
            usize::try_from(length).map_err(io::Error::other)?,
        )?;
        Mapping::new(self.file.as_fd(), at, length).map(Arc::new)
    }

    fn interrupts(&self, irq: Irq) -> u32 {
        let mut info = sys::vfio_irq_info {
            argsz: size_of::<sys::vfio_irq_info>() as u32,
            index: irq as u32,
            ..Default::default()
        };
        match call(&self.file, DEVICE_GET_IRQ_INFO, &mut info) {
            Ok(()) if info.flags & sys::VFIO_IRQ_INFO_EVENTFD != 0 => info.count,
            _ => 0,
        }
    }

    fn connect(&self, irq: Irq, eventfds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let data = if eventfds.is_empty() {
            sys::VFIO_IRQ_SET_DATA_NONE
        } else {
            sys::VFIO_IRQ_SET_DATA_EVENTFD
        };
        let flags = data | sys::VFIO_IRQ_SET_ACTION_TRIGGER;
        self.set_irqs(irq, flags, eventfds.len(), eventfds)
    }

    fn unmask_line(&self) -> io::Result<()> {
        let flags = sys::VFIO_IRQ_SET_DATA_NONE | sys::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set_irqs(Irq::Intx, flags, 1, &[])
    }

    fn reset(&self) -> io::Result<()> {
        if !self.can_reset {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // SAFETY: this call has no argument.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), DEVICE_RESET) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn export(&self, region: u32, offset: u64, length: u64) -> io::Result<OwnedFd> {
        // struct vfio_device_feature, then vfio_device_feature_dma_buf with one range
        let mut words = [0u32; 10];
        words[0] = size_of::<[u32; 10]>() as u32;
        words[1] = sys::VFIO_DEVICE_FEATURE_GET | sys::VFIO_DEVICE_FEATURE_DMA_BUF;
        words[2] = region;
        words[3] = (libc::O_RDWR | libc::O_CLOEXEC) as u32;
        words[5] = 1;
        words[6..8].copy_from_slice(&[offset as u32, (offset >> 32) as u32]);
        words[8..].copy_from_slice(&[length as u32, (length >> 32) as u32]);
        // SAFETY: the words are laid out as the kernel's two structures, `argsz` is their size.
        let fd = unsafe { libc::ioctl(self.file.as_raw_fd(), DEVICE_FEATURE, &mut words) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl VfioDevice {
    /// `struct vfio_irq_set` with its descriptors, as words.
    fn set_irqs(
        &self,
        irq: Irq,
        flags: u32,
        count: usize,
        eventfds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut words = vec![0, flags, irq as u32, 0, count as u32];
        words.extend(eventfds.iter().map(|fd| fd.as_raw_fd() as u32));
        words[0] = 4 * words.len() as u32;
        // SAFETY: `argsz` is the length of the words in bytes, and they hold `count` descriptors
        // where the flags say that there are any.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), DEVICE_SET_IRQS, words.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AttachDevice for VfioDevice {
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()> {
        let mut argument = sys::vfio_device_attach_iommufd_pt {
            argsz: size_of::<sys::vfio_device_attach_iommufd_pt>() as u32,
            pt_id: hwpt,
            ..Default::default()
        };
        match pasid {
            Some(Pasid(pasid)) => {
                argument.flags = sys::VFIO_DEVICE_ATTACH_PASID;
                argument.pasid = pasid;
            }
            // The shorter structure, which kernels without PASIDs know as well.
            None => argument.argsz = 12,
        }
        call(&self.file, DEVICE_ATTACH_IOMMUFD_PT, &mut argument)
    }

    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()> {
        let mut argument = sys::vfio_device_detach_iommufd_pt {
            argsz: size_of::<sys::vfio_device_detach_iommufd_pt>() as u32,
            ..Default::default()
        };
        match pasid {
            Some(Pasid(pasid)) => {
                argument.flags = sys::VFIO_DEVICE_DETACH_PASID;
                argument.pasid = pasid;
            }
            None => argument.argsz = 8,
        }
        call(&self.file, DEVICE_DETACH_IOMMUFD_PT, &mut argument)
    }

    fn stop(&self) {
        let mut stopped = self.stopped();
        match self.change_command(|command| command & !BUS_MASTER) {
            Ok(before) => {
                stopped.get_or_insert(before & BUS_MASTER != 0);
            }
            Err(error) => {
                *stopped = Some(false);
                log::error!("{}: bus mastering stays on: {error}", self.path.display());
            }
        }
    }

    fn resume(&self) {
        let mut stopped = self.stopped();
        if stopped.take() == Some(true)
            && let Err(error) = self.change_command(|command| command | BUS_MASTER)
        {
            log::error!("{}: bus mastering stays off: {error}", self.path.display());
        }
    }
}

/// Where the low byte of the command register is, which has Bus Master Enable.
const COMMAND: u64 = 4;
const BUS_MASTER: u8 = 1 << 2;

impl VfioDevice {
    fn stopped(&self) -> MutexGuard<'_, Option<bool>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the low byte of the command register, with `stopped` locked, and gives what it was.
    fn change_command(&self, change: impl Fn(u8) -> u8) -> io::Result<u8> {
        let at = self.at(CONFIG, COMMAND, 1)?;
        let mut command = [0];
        self.file.read_exact_at(&mut command, at)?;
        self.file.write_all_at(&[change(command[0])], at)?;
        Ok(command[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_abi_has_the_numbers_and_sizes_of_linux_7_2() {
        assert_eq!(DEVICE_GET_INFO, 0x3b6b);
        assert_eq!(DEVICE_GET_REGION_INFO, 0x3b6c);
        assert_eq!(DEVICE_GET_IRQ_INFO, 0x3b6d);
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
        assert_eq!(DEVICE_RESET, 0x3b6f);
        assert_eq!(DEVICE_FEATURE, 0x3b75);
        assert_eq!(DEVICE_BIND_IOMMUFD, 0x3b76);
        assert_eq!(DEVICE_ATTACH_IOMMUFD_PT, 0x3b77);
        assert_eq!(DEVICE_DETACH_IOMMUFD_PT, 0x3b78);
        assert_eq!(size_of::<sys::vfio_device_bind_iommufd>(), 24);
        assert_eq!(size_of::<sys::vfio_device_attach_iommufd_pt>(), 16);
        assert_eq!(size_of::<sys::vfio_device_detach_iommufd_pt>(), 12);
    }

    /// A device that is a file, with a configuration space and nothing else; it cannot be reset.
    fn device() -> VfioDevice {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        file.as_file().set_len(256).unwrap();
        let mut regions = vec![(0, Region::default()); CONFIG as usize];
        regions.push((
            0,
            Region {
                length: 256,
                mappable: Vec::new(),
            },
        ));
        VfioDevice {
            file: file.as_file().try_clone().unwrap(),
            path: "test".into(),
            regions,
            can_reset: false,
            stopped: Mutex::default(),
        }
    }

    fn command(device: &VfioDevice) -> u16 {
        let mut bytes = [0; 2];
        device.read(CONFIG, COMMAND, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    #[test]
    fn a_device_that_was_in_use_does_no_dma_although_it_cannot_be_reset() {
        let device = device();
        device.write(CONFIG, 4, &[0x06, 0x04]).unwrap();
        device.quiet().unwrap();
        assert_eq!(command(&device), 0x0402);
    }

    #[test]
    fn a_stopped_device_gets_no_bus_mastering_from_its_guest_until_it_may_go_on() {
        let device = device();
        let command = || command(&device);
        device.write(CONFIG, 4, &[0x06, 0x04]).unwrap();
        assert_eq!(command(), 0x0406);
        device.stop();
        assert_eq!(command(), 0x0402);
        // Whatever the size of the access.
        for (at, bytes) in [(4, &[0x07][..]), (4, &[7, 4, 0, 0]), (3, &[0, 0x07])] {
            device.write(CONFIG, at, bytes).unwrap();
            assert_eq!(command() & 7, 3);
        }
        device.stop();
        device.resume();
        assert_eq!(command() & 7, 7, "what the guest asked for meanwhile");
        device.write(CONFIG, 4, &[0, 0]).unwrap();
        device.stop();
        device.resume();
        assert_eq!(command(), 0);
    }

    #[test]
    fn what_is_not_bound_is_refused_with_the_way_to_bind_it() {
        let file = File::open("/dev/null").unwrap();
        let error = VfioDevice::open(Path::new("/nonexistent"), file.as_fd()).unwrap_err();
        assert!(error.to_string().contains("vfio-pci"), "{error}");
        let error = VfioDevice::bind(file.try_clone().unwrap(), "/dev/null".into(), file.as_fd())
            .unwrap_err();
        assert!(matches!(error, OpenError::Bind { .. }));
        let error = VfioDevice::describe(file, "/dev/null".into()).unwrap_err();
        assert!(matches!(error, OpenError::Call { .. }));
    }
}
