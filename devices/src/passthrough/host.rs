//! All passed-through devices of a VM, put together: the host's iommufd with guest RAM in it, or
//! the older container where there is none, and each device's way in and out.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use viommu::backend::iommufd::hwinfo::HwInfo;
use viommu::backend::iommufd::kernel::Linux;
use viommu::backend::iommufd::{Device, HostIommu, Unfit};
use viommu::backend::{Capabilities, EventSink, Fault, PageRequest, Refused};
use viommu::reserved::{Kind, Regions};
use viommu::spec::vtd::registers::Cap;
use viommu::{GuestRam, Rid, Target};

use super::config::{Offer, SIZE, has_page_requests};
use super::features::{self, Facts, NotOffered, Wishes};
use super::function::{Connections, VfioPci};
use super::hardware::{CONFIG, Hardware};
use super::legacy::{CONTAINER, Group, LegacyContainer, LegacyError};
use super::vfio::{OpenError, VfioDevice, group};

/// Why a device is not in the VM.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no iommufd.
    #[error("{path} cannot be opened: {source}; nestling doctor says what this host lacks")]
    Iommufd {
        /// The node.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be had from its group.
    #[error(transparent)]
    Legacy(#[from] LegacyError),
    /// A vIOMMU was to stand before it.
    #[error(
        "no vIOMMU can stand before it, since this host has no iommufd with VFIO devices (/dev/iommu, /dev/vfio/devices); use a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, or leave iommu=on out"
    )]
    NoViommu,
    /// It does not fit this VM.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// Its DMA could not be set up.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Something was asked for that it cannot have.
    #[error(transparent)]
    NotOffered(#[from] NotOffered),
    /// A register or an interrupt failed.
    #[error("device {rid} cannot be used; see the kernel's log of the host")]
    Device {
        /// Which.
        rid: Rid,
        /// What failed.
        #[source]
        source: io::Error,
    },
}

/// The host's iommufd.
const IOMMUFD: &str = "/dev/iommu";
/// Where the devices are that iommufd can have.
const DEVICES: &str = "/dev/vfio/devices";

/// The host's side of the passed-through devices of a VM.
#[derive(Debug)]
pub struct PassthroughHost(Way);

/// How devices are had.
#[derive(Debug)]
enum Way {
    Iommufd {
        kernel: Arc<Linux>,
        backend: Arc<HostIommu>,
    },
    Groups {
        container: LegacyContainer,
        /// The node that a kernel with the better way has.
        missing: &'static str,
    },
}

/// The addresses that the DMA of the host's device at `sysfs` cannot use: what guest
/// RAM and other devices' memory must be laid out around, known before the device is opened.
///
/// Relaxable regions of the firmware are left out: the kernel gives them up with the device.
///
/// # Errors
/// It stands behind no IOMMU.
pub fn reserved_regions(sysfs: &Path) -> io::Result<Regions> {
    let text = std::fs::read_to_string(sysfs.join("iommu_group/reserved_regions"))?;
    let mut regions = Regions::of_host(&text);
    // The kernel does not list what is beyond the unit's width. Other makes of IOMMU have 48 bits
    // and more; where that is too few, the device is refused when it is opened.
    let width = std::fs::read_to_string(sysfs.join("iommu/intel-iommu/cap"))
        .ok()
        .and_then(|cap| u64::from_str_radix(cap.trim(), 16).ok())
        .map(|cap| Cap::from_bits(cap).mgaw() + 1);
    if let Some(beyond) = width.and_then(|width| 1u64.checked_shl(width.into())) {
        regions.insert(beyond, u64::MAX, Kind::Reserved);
    }
    Ok(regions)
}

/// The same of every IOMMU group that the host has, by the number of the group: `groups` is
/// `/sys/kernel/iommu_groups`. A group without devices reserves nothing.
///
/// # Errors
/// The folder cannot be read.
pub fn reserved_regions_of_host(groups: &Path) -> io::Result<Vec<(String, Regions)>> {
    let mut found = Vec::new();
    for group in std::fs::read_dir(groups)? {
        let group = group?.path();
        let mut regions = Regions::new();
        for device in std::fs::read_dir(group.join("devices"))
            .into_iter()
            .flatten()
        {
            // A device that goes while the folder is read is no reason to stop.
            if let Ok(device) = device
                && let Ok(its) = reserved_regions(&device.path())
            {
                regions.merge(&its);
            }
        }
        if let (Some(number), false) = (group.file_name(), regions.is_empty()) {
            found.push((number.to_string_lossy().into_owned(), regions));
        }
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(found)
}

/// What stands between a device and guest memory.
#[derive(Clone, Copy, Debug)]
pub enum Before {
    /// No vIOMMU: the device reaches all guest memory, at its guest-physical addresses.
    Nothing,
    /// A unit that will claim it.
    Viommu {
        /// What it offers to the guest.
        offered: Capabilities,
        /// Bits of address that the guest's CPUs translate: 48, or 57 with 5-level paging.
        cpu_width: u8,
    },
}

impl PassthroughHost {
    /// Opens `/dev/iommu` and maps `ram` there. Where the host's kernel has no iommufd, or VFIO
    /// does not use it, devices are had from their groups: with all of `ram` in their reach, and no
    /// vIOMMU before them.
    ///
    /// # Errors
    /// There is neither, or the memory cannot be pinned.
    pub fn open(ram: GuestRam) -> Result<Self, HostError> {
        let path = Path::new(IOMMUFD);
        let missing = match Linux::open(path) {
            // Where devices are bound there are nodes of theirs, if the kernel makes any.
            Ok(kernel) if Path::new(DEVICES).exists() || !has_container() => {
                return Self::new(kernel, ram);
            }
            Ok(_) => DEVICES,
            Err(source) if source.kind() == io::ErrorKind::NotFound && has_container() => IOMMUFD,
            Err(source) => {
                return Err(HostError::Iommufd {
                    path: path.into(),
                    source,
                });
            }
        };
        Ok(Self(Way::Groups {
            container: LegacyContainer::new(ram)?,
            missing,
        }))
    }

    /// With an iommufd that was passed in.
    ///
    /// # Errors
    /// The memory cannot be pinned.
    pub fn new(kernel: Linux, ram: GuestRam) -> Result<Self, HostError> {
        let kernel = Arc::new(kernel);
        let backend = Arc::new(HostIommu::new(kernel.clone(), ram)?);
        Ok(Self(Way::Iommufd { kernel, backend }))
    }

    /// The back end that translates for the devices: what vIOMMU front ends claim them from.
    /// `None` on a host without iommufd.
    pub fn backend(&self) -> Option<&Arc<HostIommu>> {
        match &self.0 {
            Way::Iommufd { backend, .. } => Some(backend),
            Way::Groups { .. } => None,
        }
    }

    /// Takes the host's device at `sysfs` (`/sys/bus/pci/devices/…`) in as endpoint `rid`. Its DMA
    /// is blocked; [`Admitted::connect`] makes it a function of the guest. From a group, its DMA
    /// reaches guest memory as soon as it does any.
    ///
    /// # Errors
    /// Why this device cannot be in this VM, with the remedy.
    pub fn admit(&self, rid: Rid, sysfs: &Path) -> Result<Admitted, HostError> {
        match &self.0 {
            Way::Iommufd { kernel, .. } => {
                let (device, id) = VfioDevice::open(sysfs, kernel.as_fd())?;
                self.admit_device(rid, sysfs, device, id)
            }
            Way::Groups { container, missing } => {
                let (device, group) = container.open(sysfs)?;
                log::warn!(
                    "device {rid} is had by its group, since this host has no {missing}: all of \
                     the guest's memory is in its reach, no vIOMMU can stand before it, and no \
                     other device reaches its memory (no P2P)"
                );
                Ok(Admitted {
                    raw: configuration(&device, rid)?,
                    rid,
                    device: Arc::new(device),
                    keeper: Keeper::Group(group),
                })
            }
        }
    }

    /// As [`admit`](Self::admit), for a device that somebody else has opened, and that is bound to
    /// this iommufd as `bound`, or to none yet. Returns what it is bound as, too.
    ///
    /// # Errors
    /// As [`admit`](Self::admit), and when `file` is not the device at `sysfs`.
    pub fn admit_given(
        &self,
        rid: Rid,
        sysfs: &Path,
        file: File,
        bound: Option<u32>,
    ) -> Result<(Admitted, u32), HostError> {
        let iommufd = self.iommufd().ok_or_else(no_iommufd)?;
        let (device, id) = VfioDevice::given(sysfs, file, iommufd, bound)?;
        Ok((self.admit_device(rid, sysfs, device, id)?, id))
    }

    /// The iommufd, if the host has one.
    pub fn iommufd(&self) -> Option<BorrowedFd<'_>> {
        match &self.0 {
            Way::Iommufd { kernel, .. } => Some(kernel.as_fd()),
            Way::Groups { .. } => None,
        }
    }

    /// As [`admit`](Self::admit), for the device at `sysfs` that is open and bound to this iommufd as `id`.
    ///
    /// # Errors
    /// As [`admit`](Self::admit), or this is no iommufd.
    pub fn admit_device(
        &self,
        rid: Rid,
        sysfs: &Path,
        device: VfioDevice,
        id: u32,
    ) -> Result<Admitted, HostError> {
        let backend = self.backend().ok_or_else(no_iommufd)?;
        let device = Arc::new(device);
        let raw = configuration(&device, rid)?;
        let bound = Device {
            id,
            attach: device.clone(),
            page_requests: has_page_requests(&raw),
            // Unknown, it could be that of another device here.
            group: Some(group(sysfs).map_err(|source| HostError::Device { rid, source })?),
        };
        backend.add_device(rid, bound)?;
        Ok(Admitted {
            rid,
            device,
            raw,
            keeper: Keeper::Iommufd(backend.clone()),
        })
    }
}

fn no_iommufd() -> HostError {
    HostError::Iommufd {
        path: IOMMUFD.into(),
        source: io::ErrorKind::NotFound.into(),
    }
}

/// Whether there is a container to fall back to.
fn has_container() -> bool {
    Path::new(CONTAINER).exists()
}

/// The configuration space of a device, as the host shows it.
fn configuration(device: &VfioDevice, rid: Rid) -> Result<Box<[u8; SIZE]>, HostError> {
    let mut raw = Box::new([0; SIZE]);
    let length = (device.region(CONFIG).length as usize).min(SIZE);
    for (at, dword) in (0..).step_by(4).zip(raw[..length].chunks_exact_mut(4)) {
        device
            .read(CONFIG, at, dword)
            .map_err(|source| HostError::Device { rid, source })?;
    }
    Ok(raw)
}

/// A device in the VM's iommufd or container. Dropping it takes it out again, with nothing left
/// behind.
#[derive(Debug)]
pub struct Admitted {
    rid: Rid,
    device: Arc<VfioDevice>,
    raw: Box<[u8; SIZE]>,
    // After the device, which is closed first.
    keeper: Keeper,
}

/// What has a device.
#[derive(Debug)]
enum Keeper {
    Iommufd(Arc<HostIommu>),
    Group(Arc<Group>),
}

impl Admitted {
    /// The open device.
    pub fn device(&self) -> &Arc<VfioDevice> {
        &self.device
    }

    /// The file that KVM's VFIO device knows it by: its own, or that of its group, which it shares
    /// with the group's other devices.
    pub fn file(&self) -> BorrowedFd<'_> {
        match &self.keeper {
            Keeper::Iommufd(_) => self.device.as_fd(),
            Keeper::Group(group) => group.as_fd(),
        }
    }

    fn backend(&self) -> Option<&Arc<HostIommu>> {
        match &self.keeper {
            Keeper::Iommufd(backend) => Some(backend),
            Keeper::Group(_) => None,
        }
    }

    /// Makes it a function of the guest. Without a vIOMMU it reaches guest memory from here on;
    /// with one, when the unit says so.
    ///
    /// # Errors
    /// `wishes` cannot be, the host has no more interrupt routes, or refuses the device guest
    /// memory.
    pub fn connect(
        &self,
        before: Before,
        wishes: &Wishes,
        connections: Connections<'_>,
    ) -> Result<Arc<VfioPci>, HostError> {
        let facts = self.facts(before);
        let decision = features::decide(wishes, &facts)?;
        match (before, self.backend()) {
            (Before::Nothing, Some(backend)) => {
                backend.let_through(self.rid, Arc::new(NoFrontEnd))?;
            }
            (Before::Viommu { .. }, None) => return Err(HostError::NoViommu),
            (Before::Nothing, None) | (Before::Viommu { .. }, Some(_)) => {}
        }
        let rid = self.rid;
        log::info!("device {rid}: DMA addresses of {}", decision.width);
        for (feature, why) in &decision.hidden {
            log::warn!("device {rid} has no {feature} in the guest: {why}");
        }
        let offer = Offer {
            pin: 1,
            ..decision.offer
        };
        VfioPci::new(self.device.clone(), offer, connections).map_err(|source| HostError::Device {
            rid: self.rid,
            source,
        })
    }

    /// What there is for this device.
    fn facts(&self, before: Before) -> Facts<'_> {
        let backend = self.backend();
        let info = backend.and_then(|backend| backend.hw_info(self.rid));
        let has = |bit| info.is_some_and(|info| info.capabilities & bit != 0);
        let (offered, cpu_width) = match before {
            Before::Nothing => (Capabilities::NOTHING, 0),
            Before::Viommu { offered, cpu_width } => (offered, cpu_width),
        };
        Facts {
            raw: &self.raw,
            offered,
            cpu_width,
            iommu_width: info.map_or(0, |info| info.model.stage1_width()),
            pasid_bits: backend.map_or(0, |backend| backend.pasid_bits(self.rid)),
            privileged: has(HwInfo::PASID_PRIV),
            ats: !has(HwInfo::ATS_NOT_SUPPORTED),
            page_requests: backend.is_some_and(|backend| backend.page_requests(self.rid)),
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Keeper::Iommufd(backend) = &self.keeper {
            backend.remove_device(self.rid);
        }
    }
}

/// The front end of a device that has none: nobody asks it for pages, and nobody is told of faults.
struct NoFrontEnd;

impl EventSink for NoFrontEnd {
    fn fault(&self, fault: Fault) {
        log::debug!("{fault:?}");
    }

    /// Nobody lets it have translations of its own.
    fn translation_request(&self, _: Target, _: viommu::Iova) -> bool {
        false
    }

    fn page_request(&self, request: PageRequest) {
        // Its table is the kernel's, which has no page requests.
        log::debug!("{request:?}");
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn reserved_regions_are_read_before_a_device_is_opened() {
        let dir = TempDir::new().unwrap();
        assert!(reserved_regions(dir.as_path()).is_err());
        std::fs::create_dir(dir.as_path().join("iommu_group")).unwrap();
        std::fs::write(
            dir.as_path().join("iommu_group/reserved_regions"),
            "0x0000000000000000 0x0000000000ffffff direct-relaxable\n\
             0x00000000fee00000 0x00000000feefffff msi\nnonsense\n\
             0x000000fd00000000 0x000000ffffffffff reserved\n",
        )
        .unwrap();
        let shown = |regions: &Regions| regions.iter().map(ToString::to_string).collect::<Vec<_>>();
        let listed = [
            "0xfee00000-0xfeefffff (MSI doorbell)",
            "0xfd00000000-0xffffffffff (reserved)",
        ];
        assert_eq!(shown(&reserved_regions(dir.as_path()).unwrap()), listed);
        // A unit of 39 bits (a client of Intel's) reaches nothing above.
        std::fs::create_dir_all(dir.as_path().join("iommu/intel-iommu")).unwrap();
        std::fs::write(
            dir.as_path().join("iommu/intel-iommu/cap"),
            "1c0000c40660462\n",
        )
        .unwrap();
        let regions = reserved_regions(dir.as_path()).unwrap();
        assert_eq!(
            shown(&regions)[1..],
            ["0x8000000000-0xffffffffffffffff (reserved)"]
        );
    }

    #[test]
    fn the_whole_host_is_what_its_groups_reserve() {
        let dir = TempDir::new().unwrap();
        assert!(reserved_regions_of_host(&dir.as_path().join("absent")).is_err());
        for (group, text) in [
            ("0", "0x00000000fee00000 0x00000000feefffff msi\n"),
            ("3", "0x000000007b800000 0x000000007fffffff direct\n"),
        ] {
            let device = dir.as_path().join(group).join("devices/0000:00:02.0");
            std::fs::create_dir_all(device.join("iommu_group")).unwrap();
            std::fs::write(device.join("iommu_group/reserved_regions"), text).unwrap();
        }
        std::fs::create_dir_all(dir.as_path().join("9/devices")).unwrap();
        let found = reserved_regions_of_host(dir.as_path()).unwrap();
        let shown: Vec<_> = found
            .iter()
            .flat_map(|(group, regions)| regions.iter().map(move |r| format!("{group}: {r}")))
            .collect();
        assert_eq!(
            shown,
            [
                "0: 0xfee00000-0xfeefffff (MSI doorbell)",
                "3: 0x7b800000-0x7fffffff (direct, kept by the firmware)"
            ]
        );
    }
}
