//! The host's devices in a VM (`--device`): looked at before memory is laid out, opened while the
//! kernel is being loaded, admitted before the vIOMMUs are made, and connected last, when it is
//! certain what the vIOMMUs offer.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::interrupt::LevelLine;
use devices::legacy::Ioapic;
use devices::passthrough::features::{Switch, Wishes};
use devices::passthrough::hardware::{Hardware, Irq};
use devices::passthrough::vfio::OpenError;
use devices::passthrough::{
    Admitted, Connections, DirectMemory, HostError, PassthroughHost, VfioPci, reserved_regions,
    reserved_regions_of_host,
};
use devices::pci::root::{RootError, Slot};
use devices::pci::{PciRoot, Placement};
use viommu::backend::iommufd::{AttachDevice, HostIommu, prefault};
use viommu::backend::{Backend, Capabilities};
use viommu::reserved::{Kind, Regions};
use viommu::{GuestRam, Rid};
use vmm_sys_util::eventfd::EventFd;

use super::event_loop::DeviceEvent;
use super::viommus::{ViommuError, Viommus};
use crate::config::{Behind, DeviceConfig, FeatureMode, Reserve};
use crate::control::Descriptors;
use crate::interrupts::Interrupts;
use crate::kvm::cpuid::Paging;
use crate::kvm::slots::DeviceSlots;
use crate::kvm::vfio::{KnownFile, VfioFiles};
use crate::kvm::{self, KvmError};
use crate::memory::layout::{BOOT_AREA, Collision, HostReserved};

/// The first PCI device number that is tried for them, so that other devices have the same place
/// with and without.
const FIRST_DEVICE: u8 = 16;
/// The device numbers of bus 0 that have an interrupt line, and the pins of the I/O APIC where
/// these end. None is shared, so nobody has to ask several devices whose it was.
pub(super) const LINES: [(u8, u32); 8] = {
    let mut lines = [(0, 0); 8];
    let mut n = 0;
    while n < lines.len() {
        let device = FIRST_DEVICE + n as u8;
        lines[n] = (device, device as u32);
        n += 1;
    }
    lines
};
/// Threads that fault guest memory in.
const MOST_THREADS: usize = 16;

/// Why a device of the host is not in the VM: one sentence, with its sources' appended.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// There is no such device.
    #[error("device path={} is not there ({source}); lspci -D shows the devices of this host", path.display())]
    NotThere {
        /// As it was given.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// No IOMMU of the host translates its DMA.
    #[error(
        "device path={} stands behind no IOMMU ({source}); enable VT-d (AMD: IOMMU) in the firmware and boot the host with intel_iommu=on",
        path.display()
    )]
    NoIommu {
        /// As it was given.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host's groups cannot be listed.
    #[error(
        "platform reserve=host cannot read {} ({source}); boot the host with its IOMMU on (intel_iommu=on), or leave reserve=host out",
        path.display()
    )]
    Groups {
        /// Where they are.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What was opened for it cannot be used.
    #[error("the descriptor of a device cannot be used ({0}); pass an open one")]
    Descriptor(io::Error),
    /// It came too late for memory to be laid out around it.
    #[error(transparent)]
    Collision(#[from] Collision),
    /// The host's IOMMU cannot be had, or guest memory cannot be put in it.
    #[error("no device can be passed through")]
    Host(#[source] HostError),
    /// It does not fit, or fails.
    #[error("device path={} cannot be passed through", path.display())]
    Device {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: HostError,
    },
    /// Its vIOMMU does not take it.
    #[error("device path={} cannot be passed through", path.display())]
    Viommu {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: ViommuError,
    },
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The PCI root.
    #[error(transparent)]
    Pci(#[from] RootError),
}

/// Where the host lists its IOMMU groups.
const GROUPS: &str = "/sys/kernel/iommu_groups";

/// What memory must be laid out around. Devices that can never be passed through are refused here,
/// before anything is made.
pub(super) fn reserved(
    devices: &[DeviceConfig],
    reserve: Reserve,
) -> Result<Vec<HostReserved>, PassthroughError> {
    let of_devices = devices.iter().map(|device| reserved_by(&device.path));
    let mut reserved = of_devices.collect::<Result<Vec<_>, _>>()?;
    if reserve == Reserve::Host {
        reserved.extend(reserved_by_host(Path::new(GROUPS))?);
    }
    Ok(reserved)
}

/// What one device of the host reserves, at boot or before it is plugged.
pub(super) fn reserved_by(path: &Path) -> Result<HostReserved, PassthroughError> {
    std::fs::metadata(path).map_err(|source| PassthroughError::NotThere {
        path: path.into(),
        source,
    })?;
    if !path.join("vfio-dev").exists() {
        return Err(OpenError::NotBound(path.into()).into());
    }
    let regions = reserved_regions(path).map_err(|source| PassthroughError::NoIommu {
        path: path.into(),
        source,
    })?;
    let what = format!("device path={}", path.display());
    Ok(HostReserved { what, regions })
}

/// What all devices of the host reserve that could be plugged. A group with a region of the
/// firmware's is never given away by the kernel, so where that is in the way of booting, it counts
/// for nothing.
fn reserved_by_host(groups: &Path) -> Result<Vec<HostReserved>, PassthroughError> {
    let all = reserved_regions_of_host(groups).map_err(|source| PassthroughError::Groups {
        path: groups.into(),
        source,
    })?;
    let may_come = |regions: &Regions| {
        let direct = regions.iter().any(|region| region.kind == Kind::Direct);
        !direct
            || regions
                .overlapping(BOOT_AREA.first, BOOT_AREA.last)
                .is_none()
    };
    let all = all.into_iter().filter(|(_, regions)| may_come(regions));
    Ok(all
        .map(|(group, regions)| HostReserved {
            what: format!("IOMMU group {group} (platform reserve=host)"),
            regions,
        })
        .collect())
}

/// The host's IOMMU with all of `ram` in it, opened while `work` is done: clearing and pinning
/// memory takes most of a second for each few GiB. `None` when there is no device for it.
pub(super) fn open_during<T>(
    devices: &[DeviceConfig],
    ram: &GuestRam,
    descriptors: &Descriptors,
    work: impl FnOnce() -> T,
) -> (T, Result<Option<PassthroughHost>, PassthroughError>) {
    if devices.is_empty() {
        return (work(), Ok(None));
    }
    std::thread::scope(|scope| {
        let opening = std::thread::Builder::new().spawn_scoped(scope, || open(ram, descriptors));
        let done = work();
        let host = match opening.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(host)) => host,
            // It could not be started, or it panicked, which was reported: here, then.
            Ok(Err(_)) | Err(_) => open(ram, descriptors),
        };
        (done, host.map(Some))
    })
}

fn open(ram: &GuestRam, descriptors: &Descriptors) -> Result<PassthroughHost, PassthroughError> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS));
    if let Err(error) = prefault(ram, threads) {
        // Mapping does the same, on one thread, and says what is wrong if something is.
        log::debug!("guest memory is not faulted in ahead: {error}");
    }
    let given = descriptors.iommufd();
    match given.map_err(PassthroughError::Descriptor)? {
        Some(iommufd) => PassthroughHost::new(File::from(iommufd).into(), ram.clone()),
        None => PassthroughHost::open(ram.clone()),
    }
    .map_err(PassthroughError::Host)
}

/// The host's side of all of them.
pub(super) struct Passthrough {
    host: PassthroughHost,
    slots: Arc<DeviceSlots>,
    files: Arc<VfioFiles>,
    /// What the host's CPUs can.
    paging: Paging,
    descriptors: Descriptors,
}

/// A device that is in the host's IOMMU, blocked, and not yet a function of the guest. Dropping
/// it gives it back to the host.
pub(super) struct Waiting {
    config: DeviceConfig,
    slot: Slot,
    known: Arc<KnownFile>,
    admitted: Admitted,
}

/// A device that is a function of the guest.
pub(super) struct Passed {
    rid: Rid,
    function: Arc<VfioPci>,
    _known: Arc<KnownFile>,
    // Dropped last: it takes the device out of the host's IOMMU.
    admitted: Admitted,
}

impl Passthrough {
    pub(super) fn new(
        host: PassthroughHost,
        vm: &Arc<kvm::Vm>,
        paging: Paging,
        descriptors: &Descriptors,
    ) -> Result<Self, PassthroughError> {
        Ok(Self {
            descriptors: descriptors.clone(),
            host,
            slots: Arc::new(DeviceSlots::new(vm.clone())),
            files: VfioFiles::new(vm)?,
            paging,
        })
    }

    /// For the first device that comes while the guest runs, or comes after all of them have left:
    /// it must have what the guest was `offered`.
    pub(super) fn open(
        vm: &Arc<kvm::Vm>,
        paging: Paging,
        offered: Option<Capabilities>,
        descriptors: &Descriptors,
    ) -> Result<Self, PassthroughError> {
        let opened = Self::new(open(vm.ram(), descriptors)?, vm, paging, descriptors)?;
        if let (Some(offered), Some(host)) = (offered, opened.host()) {
            host.freeze(offered);
        }
        Ok(opened)
    }

    /// The host's IOMMU, where iommufd has it.
    pub(super) fn host(&self) -> Option<&Arc<HostIommu>> {
        self.host.backend()
    }

    /// The address on the bus for the device at this position of the configuration.
    pub(super) fn slot(root: &Arc<PciRoot>, position: usize) -> Result<Slot, RootError> {
        let device = FIRST_DEVICE.saturating_add(position.try_into().unwrap_or(u8::MAX));
        let at = Placement::At(Rid::new(0, device & 0x1f, 0));
        root.reserve(at).or_else(|_| root.reserve(Placement::Any))
    }

    /// Opens a device, and takes it into the host's IOMMU for `slot`.
    pub(super) fn admit(
        &self,
        config: &DeviceConfig,
        slot: Slot,
    ) -> Result<Waiting, PassthroughError> {
        if self.host().is_none() && behind(config) != Behind::Nothing {
            return Err(device_error(&config.path, HostError::NoViommu));
        }
        let admitted = match config.fd {
            Some(_) => self.admit_given(config, slot.rid())?,
            None => self.host.admit(slot.rid(), &config.path),
        };
        let admitted = admitted.map_err(|source| device_error(&config.path, source))?;
        Ok(Waiting {
            known: self.files.add(admitted.file())?,
            config: config.clone(),
            slot,
            admitted,
        })
    }

    /// The same, for a device that somebody else has opened. It is bound once, to an iommufd that
    /// is kept with it: a reboot finds both.
    fn admit_given(
        &self,
        config: &DeviceConfig,
        rid: Rid,
    ) -> Result<Result<Admitted, HostError>, PassthroughError> {
        let id = config.id.as_deref().unwrap_or_default();
        let refused = PassthroughError::Descriptor;
        let file = File::from(self.descriptors.of(id).map_err(refused)?);
        let bound = self.descriptors.bound(id);
        let admitted = self.host.admit_given(rid, &config.path, file, bound);
        if let (Ok((_, number)), Some(iommufd)) = (&admitted, self.host.iommufd()) {
            let kept = self.descriptors.bind(id, *number, iommufd);
            kept.map_err(refused)?;
        }
        Ok(admitted.map(|(admitted, _)| admitted))
    }

    /// Puts a device behind its vIOMMU, if it has one. It can make that one offer less to the
    /// others until the guest has seen it.
    pub(super) fn place(
        &self,
        waiting: &Waiting,
        viommus: &mut Viommus,
    ) -> Result<(), PassthroughError> {
        let Some(host) = self.host() else {
            return Ok(());
        };
        let config = &waiting.config;
        viommus
            .pass_through(waiting.slot.rid(), behind(config), host)
            .map_err(|source| PassthroughError::Viommu {
                path: config.path.clone(),
                source,
            })
    }

    /// Makes a function of the guest of a device that was placed. What its vIOMMU offers is fixed
    /// from here on.
    pub(super) fn connect(
        &self,
        waiting: Waiting,
        viommus: &Viommus,
        interrupts: &Arc<Interrupts>,
        ioapic: &Arc<Ioapic>,
    ) -> Result<Passed, PassthroughError> {
        let Waiting {
            config,
            slot,
            known,
            admitted,
        } = waiting;
        let hardware = admitted.device();
        let has = |irq| hardware.interrupts(irq) > 0;
        let line = line(slot.rid(), ioapic);
        if line.is_none() && has(Irq::Intx) && !has(Irq::Msi) && !has(Irq::Msix) {
            log::warn!(
                "device path={} has an interrupt line only, and its place in the guest has \
                 none: a driver that does not poll will wait in vain",
                config.path.display()
            );
        }
        let paging = viommus.paging(self.paging);
        let behind = behind(&config);
        let messages = interrupts.source(slot.rid(), viommus.remapper(behind));
        let direct: Arc<dyn DirectMemory> = self.slots.clone();
        let connections = Connections {
            messages: &*messages,
            line,
            direct,
            peers: self.host().map(|host| host.clone() as _),
        };
        let function = admitted
            .connect(
                viommus.before(behind, paging),
                &wishes(&config),
                connections,
            )
            .map_err(|source| device_error(&config.path, source))?;
        let rid = slot.fill(function.clone())?;
        Ok(Passed {
            rid,
            function,
            _known: known,
            admitted,
        })
    }

    /// The guest was offered what all devices here have, which this gives: later ones must have as
    /// much. `None` where no vIOMMU can stand before any.
    pub(super) fn freeze(&self) -> Option<Capabilities> {
        let host = self.host()?;
        let offered = host.capabilities();
        host.freeze(offered);
        Some(offered)
    }
}

impl Waiting {
    /// Its address in the guest.
    pub(super) fn rid(&self) -> Rid {
        self.slot.rid()
    }
}

impl Passed {
    /// Ends its DMA, whatever the guest was doing with it: it is reset when it is closed.
    pub(super) fn stop(&self) {
        self.admitted.device().stop();
    }

    /// What is signalled, and what it means.
    pub(super) fn events(&self) -> [(&EventFd, DeviceEvent); 2] {
        [
            (self.function.error_event(), DeviceEvent::Failed(self.rid)),
            (self.function.request_event(), DeviceEvent::Wanted(self.rid)),
        ]
    }
}

fn wishes(config: &DeviceConfig) -> Wishes {
    let switch = |mode| match mode {
        FeatureMode::Auto => Switch::Auto,
        FeatureMode::On => Switch::On,
        FeatureMode::Off => Switch::Off,
    };
    Wishes {
        pasid: switch(config.pasid),
        pri: switch(config.pri),
        dma_width: config.dma_width,
        pasid_offset: config.pasid_offset,
    }
}

/// The interrupt line of the device at `rid`, if its place has one.
fn line(rid: Rid, ioapic: &Arc<Ioapic>) -> Option<Arc<dyn LevelLine>> {
    let place = LINES.iter().find(|(device, _)| *device == rid.device());
    let (_, pin) = place.filter(|_| rid.bus() == 0 && rid.function() == 0)?;
    Some(ioapic.line(u8::try_from(*pin).ok()?))
}

fn behind(config: &DeviceConfig) -> Behind<'_> {
    Behind::new(config.iommu, config.viommu.as_deref())
}

fn device_error(path: &Path, source: HostError) -> PassthroughError {
    match source {
        HostError::Open(error) => error.into(),
        source => PassthroughError::Device {
            path: path.into(),
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn a_device_that_cannot_be_passed_through_is_refused_before_anything_is_made() {
        let dir = TempDir::new().unwrap();
        let device = |path: PathBuf| DeviceConfig {
            path,
            ..DeviceConfig::default()
        };
        let absent =
            reserved(&[device(dir.as_path().join("absent"))], Reserve::Devices).unwrap_err();
        assert!(absent.to_string().contains("lspci"), "{absent}");
        let here = [device(dir.as_path().into())];
        let unbound = reserved(&here, Reserve::Devices).unwrap_err();
        assert!(unbound.to_string().contains("vfio-pci"), "{unbound}");
        std::fs::create_dir(dir.as_path().join("vfio-dev")).unwrap();
        let bare = reserved(&here, Reserve::Devices).unwrap_err();
        assert!(bare.to_string().contains("intel_iommu=on"), "{bare}");
        std::fs::create_dir(dir.as_path().join("iommu_group")).unwrap();
        std::fs::write(
            dir.as_path().join("iommu_group/reserved_regions"),
            "0x00000000fee00000 0x00000000feefffff msi\n",
        )
        .unwrap();
        let regions = &reserved(&here, Reserve::Devices).unwrap()[0].regions;
        assert_eq!(regions.iter().count(), 1);
    }

    #[test]
    fn the_whole_host_is_reserved_but_for_what_can_never_be_plugged() {
        let dir = TempDir::new().unwrap();
        for (group, line) in [
            ("1", "0xfd00000000 0xffffffffff reserved"),
            ("2", "0x7b800000 0x7fffffff direct"),
            // The firmware's, and the guest must boot there.
            ("3", "0x0 0xfff direct"),
        ] {
            let device = dir.as_path().join(group).join("devices/d/iommu_group");
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("reserved_regions"), line).unwrap();
        }
        let all = reserved_by_host(dir.as_path()).unwrap();
        let of: Vec<_> = all.iter().map(|host| host.what.as_str()).collect();
        assert_eq!(
            of,
            [
                "IOMMU group 1 (platform reserve=host)",
                "IOMMU group 2 (platform reserve=host)"
            ]
        );
        let absent = reserved_by_host(&dir.as_path().join("absent")).unwrap_err();
        assert!(absent.to_string().contains("intel_iommu=on"), "{absent}");
    }

    #[test]
    fn without_devices_the_hosts_iommu_is_not_opened() {
        let ram = Arc::new(vm_memory::GuestMemoryMmap::new());
        let (done, host) = open_during(&[], &ram, &Descriptors::default(), || 7);
        assert_eq!(done, 7);
        assert!(host.unwrap().is_none());
    }
}
